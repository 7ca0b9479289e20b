"""MLflow: a run in the store of the environment, by default a database in the working directory (https://mlflow.org)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from hetlora.runs.tracking.base import TrackedRun, Tracker

__all__ = ["mlflow"]


def mlflow(run: TrackedRun) -> Tracker:
    """Log to an MLflow run in the experiment of the project; its tag ``hetlora.id`` identifies it.

    MLflow cannot delete steps. A resumed run logs repeated rounds again, with the same figures and new times.
    """
    return _MLflow(run)


class _MLflow(Tracker):
    def __init__(self, run: TrackedRun) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(run.project)
        experiment = known.experiment_id if known else self._client.create_experiment(run.project)
        found = self._client.search_runs([experiment], f"tags.`hetlora.id` = '{run.id}'")
        tags = {"hetlora.id": run.id, "hetlora.folder": str(run.folder)}
        self._id = (
            found[0] if found else self._client.create_run(experiment, run_name=run.name, tags=tags)
        ).info.run_id
        self._client.update_run(self._id, status="RUNNING")
        if not found:
            for section, settings in run.config.items():
                self._client.log_param(self._id, section, json.dumps(settings, ensure_ascii=False)[:6000])
        self.where = f"mlflow ui --backend-store-uri {self._client.tracking_uri}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in figures.items()])

    def end(self) -> None:
        self._client.set_terminated(self._id)
