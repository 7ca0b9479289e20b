"""trackio: a database on this machine, in `TRACKIO_DIR` (https://github.com/gradio-app/trackio)."""

from __future__ import annotations

from collections.abc import Mapping

from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["trackio"]


def trackio(run: TrackedRun) -> Tracker:
    """Log to a trackio run named after the run's folder and id.

    trackio cannot delete single steps, so a resumed run with void steps is written again without them.
    """
    return _Trackio(run)


class _Trackio(Tracker):
    def __init__(self, run: TrackedRun) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{run.name}-{run.id[:6]}"
        self.where = f"trackio show --project {run.project} (run {name})"
        logged = SQLiteStorage.get_logs(run.project, name) if run.step else []
        stale = any(entry["step"] >= run.step for entry in logged)
        if stale:
            for known in trackio.Api().runs(run.project):
                if known.name == name:
                    known.delete()
        self._finish = trackio.finish  # the run's `finish` would be repeated at exit, with output
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = trackio.init(run.project, name=name, config=dict(run.config), resume="allow", **quiet)
        for entry in logged if stale else []:
            if (step := entry["step"]) < run.step:
                self.log(step, {key: value for key, value in entry.items() if key not in ("step", "timestamp")})

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def end(self) -> None:
        self._finish()
