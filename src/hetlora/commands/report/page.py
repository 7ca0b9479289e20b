"""The HTML page: what its template shows of runs."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hetlora._version import __version__
from hetlora.commands.report import charts, client_charts, summary
from hetlora.commands.report.answers import samples
from hetlora.commands.report.comparison import Compared
from hetlora.commands.report.summary import Group, mean_and_std, run_name, scores_of, totals
from hetlora.errors import printable
from hetlora.runs.folder import resume_command
from hetlora.runs.reader import RECORDS, Run, number, section
from hetlora.runs.text import MISSING, clean, figure, many, megabytes, method_labels, percent, several

__all__ = ["as_toml", "render"]


def render(runs: Sequence[Run], compared: Compared | None = None) -> str:
    """Return the page about one run, several side by side, or a comparison."""
    import jinja2

    groups, devices = summary.grouped(runs), summary.devices(runs)
    if compared:
        groups = compared.ordered(groups)
    names = several(list(dict.fromkeys(clean(group.label, 60) for group in groups)), 4)
    plotly, script = _file("plotly-basic.min.js"), _file("report.js")
    one = groups[0] if len(groups) == 1 and compared is None else None
    shared = [
        charts.differences_chart(groups, compared.reference) if compared and compared.reference else None,
        charts.tiers_chart(groups, devices),
    ]
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_visible, trim_blocks=True, lstrip_blocks=True
    )
    page.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page.filters |= {"text": clean, "data_rows": charts.data_rows}
    return page.from_string(_file("page.html")).render(
        css=_file("report.css"),
        plotly=plotly,
        script=script,
        policy=_policy(plotly, script),
        version=__version__,
        title=f"Comparison: {clean(compared.name, 60)}" if compared else f"Report: {names}",
        facts=_facts(runs, groups),
        notices=[notice for run in runs for notice in _notices(run)],
        tiles=_tiles(one) if one else [],
        compared=compared,
        side_by_side=None if one or compared else _side_by_side(groups),
        curves=charts.curves_chart(groups, bands=compared is None),
        charts=[chart for chart in shared if chart],
        slots=charts.slots_chart(groups),
        runs=[_detail(run, at, runs, devices) for at, run in enumerate(runs)],
        most_rows=charts.MOST_ROWS,
    )


def _visible(value: Any) -> Any:
    """Return what the template inserts, with invisible signs of text as escapes; what is marked as HTML stays."""
    plain = isinstance(value, str) and not hasattr(value, "__html__")
    return "\n".join(map(printable, value.split("\n"))) if plain else value


def _file(name: str) -> str:
    return resources.files("hetlora.commands.report").joinpath(name).read_text("utf8")


def _policy(*scripts: str) -> str:
    """Return the content security policy: only these scripts run, and nothing is loaded from elsewhere."""
    digests = (base64.b64encode(hashlib.sha256(script.encode("utf8")).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )


# The first screen ---------------------------------------------------------------------------------------------------


def _facts(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """Return what the runs are, in a few words each."""
    methods = method_labels(run.method for run in runs)
    every: list[list[str]] = [
        [_short(section(run.config, "model").get("base", "?")) for run in runs],
        [_short(section(run.config, "data").get("path", "?")) for run in runs],
        [methods[run.method] for run in runs],
        [_date(run) for run in runs],
        [str(run.config.get("seed", "?")) for run in runs],
        [str(run.head.get("hetlora", "?")) for run in runs],
    ]
    titles = ("model", "data", "method", "date", "seed", "hetlora")
    count = [f"{many(len(runs), 'run')}, {many(len(groups), 'configuration')}"] if len(runs) > 1 else []
    return count + [
        f"{title}{'s' if title == 'seed' and len(set(values)) > 1 else ''} {several(list(dict.fromkeys(values)), 4)}"
        for title, values in zip(titles, every, strict=True)
    ]


def _short(place: object) -> str:
    """Return the last part of a path; a name on a hub, which has two parts, as it is."""
    return str(place) if str(place).count("/") < 2 else Path(str(place)).name


def _date(run: Run) -> str:
    """Return the day on which the records were last written; they hold no date."""
    try:
        written = (run.folder / RECORDS).stat().st_mtime
    except OSError:
        return "?"
    return dt.datetime.fromtimestamp(written, tz=dt.UTC).date().isoformat()


def _notices(run: Run) -> list[tuple[str, str]]:
    """Return notices about an incomplete run and about unreadable records, each with a command or nothing."""
    notices = []
    if run.summary is None:
        done = f"{len(run.rounds)} of {many(run.planned, 'round')}" if run.planned else many(len(run.rounds), "round")
        lost = run.config.get("checkpoint_every") == 0 and run.rounds
        way_on = "It keeps no checkpoints: begin it again." if lost else "This goes on:"
        text = (
            f"{run_name(run)} is not complete: {done} are recorded. It is still running, or was interrupted or killed. "
        )
        notices.append((text + way_on, "" if lost else resume_command(run.folder)))
    if run.unreadable:
        text = (
            f"{run_name(run)}: {many(run.unreadable, 'line')} of its records cannot be read and count for nothing here."
        )
        notices.append((f"{text} A process that is killed while it writes leaves half of one.", ""))
    return notices


def _tiles(group: Group) -> list[tuple[str, str, str]]:
    """Return the four tiles of one configuration, means over its runs: title, figure, and what stands below it."""
    sums = [totals(run) for run in group.runs]
    sent = _mean([one.bytes_up + one.bytes_down for one in sums]) or 0.0
    full = _mean([one.full_up + one.full_down for one in sums])
    share = f"{percent(sent / full)} of full fine-tuning's {megabytes(full)}" if full else "nothing to compare with"
    clients = int(number(group.runs[0].head.get("clients")) or 0)
    prunes, failures = (sum(getattr(one, name) for one in sums) for name in ("prunes", "failures"))
    rounds = sum(len(run.rounds) for run in group.runs)
    perplexity = _tile(group, "perplexity", "not measured")
    return [
        ("held-out perplexity", *perplexity),
        ("ROUGE-L", *_tile(group, "rougeL", "not measured: evaluation.generate asks for answers")),
        ("sent up and down", megabytes(sent), share),
        ("clients", f"{clients:,}", f"{many(rounds, 'round')}, {many(prunes, 'prune')}, {many(failures, 'failure')}"),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _tile(group: Group, name: str, missing: str) -> tuple[str, str]:
    ends = [scores_of(run, name) for run in group.runs]
    both = [(was, now) for was, now in ends if was is not None and now is not None]
    before = [was for was, _ in both] or [was for was, _ in ends if was is not None]
    after = [now for _, now in both] or [now for _, now in ends if now is not None]
    if not before and not after:
        return MISSING, missing
    was, now = _mean(before), _mean(after)
    spread = mean_and_std(after).std if after else None
    below = [f"{percent(now / was - 1, signed=True)}"] if was and now is not None else []
    below += [f"± {figure(spread)} over {len(after)} runs"] if spread is not None else []
    below += [f"{len(both)} of {len(ends)} runs"] if 0 < len(both) < len(ends) else []
    alone = _mean([value for run in group.runs if (value := summary.base_alone(run, name)) is not None])
    below += [f"the base alone: {figure(alone)}"] if alone is not None else []
    return f"{figure(was)} → {figure(now)}", ", ".join(below)


def _side_by_side(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return a table with one row per configuration, the lowest mean perplexity first."""
    methods = method_labels(group.runs[0].method for group in groups)
    rows = []
    for group in groups:
        ends = {name: [scores_of(run, name) for run in group.runs] for name in ("perplexity", "rougeL")}
        mean = _mean([after for _, after in ends["perplexity"]])
        sums = [totals(run) for run in group.runs]
        cells = [
            group.label,
            methods[group.runs[0].method],
            *(_over([score[end] for score in found]) for found in ends.values() for end in (1, 0)),
            *(
                figure((_mean([getattr(one, name) for one in sums]) or 0.0) / 1e6)
                for name in ("bytes_up", "bytes_down")
            ),
            *(str(sum(getattr(one, name) for one in sums)) for name in ("prunes", "failures")),
            ", ".join(f"{len(run.rounds)} of {run.planned}" for run in group.runs[:3]),
        ]
        rows.append((mean is None, mean or 0.0, cells))
    columns = [
        "run",
        "method",
        "perplexity",
        "before",
        "ROUGE-L",
        "before",
        "MB up",
        "MB down",
        "prunes",
        "failures",
        "rounds",
    ]
    return columns, [cells for *_, cells in sorted(rows, key=lambda row: row[:2])]


def _over(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    point = mean_and_std(known)
    return figure(point.mean) + (f" ± {figure(point.std)}" if point.std is not None else "")


# One run in detail --------------------------------------------------------------------------------------------------


def _detail(run: Run, at: int, runs: Sequence[Run], devices: summary.Devices) -> dict[str, Any]:
    """Return what the template shows of one run."""
    local = summary.local_run(run, runs)
    shares = client_charts.shares_chart(run, f"shares-{at}", devices)
    drawn = [client_charts.ranks_chart(run, f"ranks-{at}", devices), shares]
    drawn.append(client_charts.clients_chart(run, f"clients-{at}", devices, local))
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(run.config.get("name") or run.label)).strip("-.")[:60] + ".toml"
    written = as_toml(run.config)
    return {
        "sentence": summary.sentence(run, runs),
        "samples": samples(run),
        "charts": [chart for chart in drawn if chart],
        "said": "" if shares else _why_no_shares(run),
        "alone": f"Alone: {run_name(local)}, in which every client trained by itself." if local else "",
        "failed": _failed(run),
        "reasons": _reasons(run),
        "origin": _origin(run),
        "digests": run.digests,
        "folder": str(run.folder),
        "file": name,
        "command": f"hetlora run {shlex.quote(name)}",
        "config": written,
        "link": "data:application/toml;base64," + base64.b64encode(written.encode("utf8")).decode(),
    }


def _why_no_shares(run: Run) -> str:
    if not summary.averages(run):
        return "Nothing is averaged: each client goes on from its own adapter, and has no influence on another's."
    if any(item.weights for item in run.rounds):
        return "Every update had the equal share in its round."
    if any(item.summed for item in run.rounds):
        return "Updates came as sums of several clients, so that nobody's share is known."
    return "No update was admitted in any round."


def _failed(run: Run) -> str:
    """Return how often clients failed; empty if nobody did."""
    asked, failures = sum(len(item.ranks) for item in run.rounds), totals(run).failures
    empty = sum(not item.updates for item in run.rounds)
    share = f", {percent(failures / asked)} of {asked:,} times that a client was asked" if asked else ""
    return f"{many(failures, 'failure')}{share}; {many(empty, 'round')} without any update." if failures else ""


def _reasons(run: Run) -> list[tuple[str, int, str, str]]:
    """Return the reasons of failures, the most frequent first: reason, times, rounds, and some of its clients."""
    found: dict[str, list[tuple[int, str]]] = {}
    for item in run.rounds:
        for client, reason in item.failures.items():
            found.setdefault(reason, []).append((item.number, clean(client)))
    ordered = sorted(found.items(), key=lambda entry: -len(entry[1]))[:50]
    return [
        (reason, len(own), f"{own[0][0]} to {own[-1][0]}", several(list(dict.fromkeys(name for _, name in own)), 8))
        for reason, own in ordered
    ]


def _origin(run: Run) -> str:
    """Return rows, sizes, costs and versions in a few sentences; what is not recorded is left out."""
    rows = [int(number(run.head.get(f"{key}_rows")) or 0) for key in ("train", "test", "truncated", "empty")]
    base, end = int(number(run.head.get("base_parameters")) or 0), run.summary or {}
    trained = [int(value) for item in section(run.head, "trainable_parameters").values() if (value := number(item))]
    peak, seconds = number(end.get("peak_megabytes")), number(end.get("seconds"))
    travelled = sum(sum(item.travelled) for item in run.rounds if item.travelled)
    versions = {"hetlora": run.head.get("hetlora", "?"), **section(run.head, "versions")}
    parts = [
        f"{rows[0]:,} training rows, {rows[1]:,} held out; {rows[2]:,} cut, {rows[3]:,} dropped as empty.",
        f"A client trains {min(trained):,} to {max(trained):,} of {base:,} numbers." if trained and base else "",
        f"{figure(seconds)} s." if seconds else "",
        f"{peak:,.0f} MB of memory at most." if peak else "",
        f"{megabytes(travelled)} travelled over Flower." if travelled else "",
        f"Made with {', '.join(f'{clean(key, 40)} {clean(value, 60)}' for key, value in versions.items())}.",
    ]
    return " ".join(filter(None, parts))


def as_toml(config: Mapping[str, Any]) -> str:
    r"""Return a configuration as a TOML file that starts the same run.

    None, which TOML lacks, is left out; half surrogates become question marks.

    Example:
        >>> print(as_toml({"seed": 1, "model": {"base": "nano\udcff", "tokenizer": None}}), end="")
        seed = 1
        <BLANKLINE>
        [model]
        base = "nano?"
    """
    import tomli_w

    def known(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: known(item) for key, item in value.items() if item is not None}
        return [known(item) for item in value if item is not None] if isinstance(value, list) else value

    return tomli_w.dumps(known(config)).encode("utf8", "replace").decode("utf8")
