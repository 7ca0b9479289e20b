"""The HTML page: sections of sentences, charts and tables in one self-contained file."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from hetlora._version import __version__
from hetlora.commands.report.chart import Chart, Table
from hetlora.commands.report.client_charts import (
    clients_chart,
    distribution_chart,
    events_chart,
    failures_table,
    ranks_chart,
)
from hetlora.commands.report.curves import loss_chart, memory_table, perplexity_chart, slots_chart, traffic_chart
from hetlora.commands.report.share_charts import bounded_table, shares_chart, spread_chart
from hetlora.commands.report.summary import Group, averages, grouped, local_run, totals, trains_alone, trains_weights
from hetlora.commands.report.tier_chart import tiers_chart
from hetlora.runs.folder import resume_command
from hetlora.runs.reader import Run, number, section
from hetlora.runs.text import change, clean, figure, many, megabytes, method_labels, several

__all__ = ["as_toml", "render", "sentence"]

MOST_CLIENTS, LEAST_CLIENTS = 60, 8
CELLS = 150_000
"""Approximate limit for all heat maps of a page together; many long runs show fewer clients each."""


def render(runs: Sequence[Run]) -> str:
    """Return the page about one run, or about several side by side."""
    from plotly.offline import get_plotlyjs

    groups = grouped(runs)
    names = "; ".join(dict.fromkeys(clean(group.label, 60) for group in groups[:4]))
    title = f"Report: {names}" + (f" and {len(groups) - 4} more" if len(groups) > 4 else "")
    sections = [
        ("result", "Result", _result(runs, groups)),
        ("curves", "Loss and perplexity", _curves(groups)),
        ("ranks", "Ranks", _each(runs, _ranks)),
        ("influence", "Influence", _each(runs, _influence)),
        ("events", "Prunes and failures", _each(runs, _events)),
        ("scores", "Tiers and clients", [*_tiers(groups), *_each(runs, _clients)]),
        ("dilution", "Dilution of high slots", _slots(runs, groups)),
        ("costs", "Communication and memory", _costs(runs, groups)),
        ("origin", "Configuration and origin", _each(runs, _origin)),
    ]
    plotly, script = str(get_plotlyjs()), _file("report.js")
    parts = {
        "policy": _policy(plotly, script),
        "version": html.escape(__version__),
        "title": html.escape(title),
        "css": _file("report.css"),
        "contents": "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections),
        "selector": _selector(runs),
        "notices": "".join(f'<p class="notice">{text}</p>' for run in runs for text in _notices(run)),
        "sections": "\n".join(_section(*section) for section in sections),
        "plotly": plotly,
        "script": script,
    }
    # One pass: the inserted text is not searched for placeholders.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("template.html"))


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


def _selector(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    options = "".join(f'<option value="{at}">{_text(_name(run))}</option>' for at, run in enumerate(runs))
    return f'<label for="run">Details of <select id="run">{options}</select></label>'


def _name(run: Run) -> str:
    seed = run.config.get("seed")
    return clean(run.label, 80) + (f", seed {seed}" if isinstance(seed, int) else "")


def _section(name: str, title: str, parts: Sequence[str]) -> str:
    text = "\n".join(parts)
    return f'<section id="{name}" aria-labelledby="{name}-t"><h2 id="{name}-t">{title}</h2>\n{text}\n</section>'


def _each(runs: Sequence[Run], part: Callable[[Run, int, Sequence[Run]], Iterable[str]]) -> list[str]:
    """Return each run's part of a section; of several runs the page shows one at a time."""
    if len(runs) == 1:
        return list(part(runs[0], 0, runs))
    return [
        f'<div class="of-run" data-run="{at}"><h3>{_text(_name(run))}</h3>\n'
        + "\n".join(part(run, at, runs))
        + "</div>"
        for at, run in enumerate(runs)
    ]


# Sections -----------------------------------------------------------------------------------------------------------


def _notices(run: Run) -> list[str]:
    """Return notices about an incomplete run and about unreadable records."""
    notices = []
    if run.summary is None:
        done = f"{len(run.rounds)} of {many(run.planned, 'round')}" if run.planned else many(len(run.rounds), "round")
        notices.append(
            f"{_text(_name(run))} is not complete: {done} are recorded. It is still running, or was interrupted or killed. "
            + _way_on(run)
        )
    if run.unreadable:
        notices.append(
            f"{_text(_name(run))}: {many(run.unreadable, 'line')} of its records cannot be read and count for nothing here; "
            "a process that is killed while it writes leaves half of one."
        )
    return notices


def _way_on(run: Run) -> str:
    if run.config.get("checkpoint_every") == 0 and run.rounds:
        return "It keeps no checkpoints, so that it can only be begun again."
    return f"<code>{_text(resume_command(run.folder))}</code> goes on."


def _result(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    if len(runs) == 1:
        return [_p(sentence(runs[0]), "lead"), _table(_side_by_side(runs))]
    measured = [(run, after) for run in runs if (after := _scores(run)[1][0]) is not None]
    best = min(measured, key=lambda found: found[1], default=None)
    lead = f"{many(len(runs), 'run')}, {many(len(groups), 'configuration')}."
    if best is not None:
        lead += f" The lowest held-out perplexity is {figure(best[1])}, of {_name(best[0])}."
    sentences = "".join(f"<li>{_text(sentence(run, runs))}</li>" for run in runs)
    each = f"<details><summary>Each run in one sentence</summary><ul>{sentences}</ul></details>"
    return [_p(lead, "lead"), _table(_side_by_side(runs)), each]


def _scores(run: Run) -> tuple[tuple[float | None, float | None], tuple[float | None, float | None]]:
    """Return perplexity and ROUGE-L before the first round, and at the end or last measured."""
    before, final = run.before.overall if run.before else {}, run.final.overall if run.final else {}
    last = [item.perplexity for item in run.rounds if item.perplexity is not None]
    after = final.get("perplexity") if run.final else (last[-1] if last else None)
    return (before.get("perplexity"), before.get("rougeL")), (after, final.get("rougeL"))


def _base_alone(run: Run, name: str) -> float | None:
    """Return a figure of the base alone, for a run that started from an adapter."""
    return run.base.overall.get(name) if run.base and run.starts_from_adapter else None


def sentence(run: Run, among: Sequence[Run] = ()) -> str:
    """Describe a run's result in one sentence, beside those of other runs."""
    method = method_labels(other.method for other in (run, *among))[run.method]
    (before, rouge), (after, rouge_after) = _scores(run)
    sums = totals(run)
    scores = [
        f"held-out perplexity {change(before, after)}" if before or after else "no held-out perplexity was measured"
    ]
    if run.starts_from_adapter and (before or after):
        scores[0] += f" from the adapter it started from (the base alone: {figure(_base_alone(run, 'perplexity'))})"
    if rouge is not None and rouge_after is not None:
        scores.append(f"ROUGE-L {change(rouge, rouge_after)}")
    elif rouge_after is not None and (rouge_base := _base_alone(run, "rougeL")) is not None:
        scores.append(f"ROUGE-L {figure(rouge_after)} (the base alone: {figure(rouge_base)})")
    clients = int(number(run.head.get("clients")) or 0)
    of = f"{len(run.rounds)} of {run.planned}" if len(run.rounds) < run.planned else f"{len(run.rounds)}"
    return (
        f"{_name(run)} ({method}): {', '.join(scores)}, in {of} round{'s' if len(run.rounds) != 1 else ''} with "
        f"{many(clients, 'client')}; {megabytes(sums.bytes_up)} up, {megabytes(sums.bytes_down)} down, "
        f"{many(sums.prunes, 'prune')}, {many(sums.failures, 'failure')}."
    )


def _side_by_side(runs: Sequence[Run]) -> Table:
    rows = []
    methods = method_labels(run.method for run in runs)
    started = any(run.starts_from_adapter for run in runs)
    for run in runs:
        (before, rouge), (after, rouge_after) = _scores(run)
        sums = totals(run)
        seconds = number((run.summary or {}).get("seconds"))
        seconds = sum(item.seconds for item in run.rounds) if seconds is None else seconds
        rows.append(
            [
                _name(run),
                methods[run.method],
                "complete" if run.summary is not None else "not complete",
                f"{len(run.rounds)} of {run.planned}" if run.planned else str(len(run.rounds)),
                int(number(run.head.get("clients")) or 0),
                *([figure(run.base.overall.get("perplexity") if run.base else None)] if started else []),
                *map(figure, (before, after, rouge, rouge_after)),
                *(figure(count / 1e6) if count else "0" for count in (sums.bytes_up, sums.bytes_down)),
                sums.prunes,
                sums.failures,
                sums.updates,
                figure(seconds),
            ]
        )
    columns = ["run", "method", "state", "rounds", "clients", *(["perplexity of the base"] if started else [])]
    columns += ["perplexity before", "after", "ROUGE-L before", "after"]
    columns += ["MB up", "MB down", "prunes", "failures", "updates", "seconds"]
    return Table("Runs side by side" if len(runs) > 1 else "The run in figures", columns, rows)


def _curves(groups: Sequence[Group]) -> list[str]:
    charts = [loss_chart(groups), perplexity_chart(groups)]
    band = "Runs of one configuration, whatever their seeds, are one line, their mean, with a band of one standard deviation."
    return [
        *([_p(band)] if any(len(group.runs) > 1 for group in groups) else []),
        *(_chart(chart) for chart in charts if chart is not None),
        *([] if charts[0] else [_p("There is no curve of the training loss: no round has one.")]),
        *([] if charts[1] else [_p("There is no curve of the perplexity: it was not measured, or was not finite.")]),
    ]


def _shown_clients(runs: Sequence[Run]) -> int:
    columns = sum(min(len(run.rounds), 500) for run in runs)
    return max(LEAST_CLIENTS, min(MOST_CLIENTS, CELLS // max(1, columns)))


def _ranks(run: Run, at: int, runs: Sequence[Run]) -> list[str]:
    charts = [ranks_chart(run, f"ranks-{at}", _shown_clients(runs)), distribution_chart(run, f"distribution-{at}")]
    shown = [_chart(chart, several_runs=len(runs) > 1) for chart in charts if chart is not None]
    if trains_weights(run):
        return [_p("This method trains the weights of the base, and no client has a rank.")]
    return shown or [_p("No rank is recorded: no client was asked in any round.")]


def _influence(run: Run, at: int, runs: Sequence[Run]) -> list[str]:
    if not averages(run):
        return [_p("Nothing is averaged: each client goes on from its own adapter, and has no influence on another's.")]
    charts = [shares_chart(run, f"shares-{at}", _shown_clients(runs)), spread_chart(run, f"spread-{at}")]
    shown = [_chart(chart, several_runs=len(runs) > 1) for chart in charts if chart is not None]
    if not shown and any(item.summed for item in run.rounds):
        return [_p("Updates came as sums of several clients, so that nobody's share is known.")]
    if not shown:
        return [_p("No update was admitted in any round, so that nobody had any influence.")]
    bounded = bounded_table(run)
    return [*shown, *([_folded(bounded)] if bounded else [])]


def _events(run: Run, at: int, runs: Sequence[Run]) -> list[str]:
    chart = events_chart(run, f"events-{at}")
    if chart is None:
        return [_p(f"Nobody pruned and nobody failed in {many(len(run.rounds), 'round')}.")]
    found = failures_table(run)
    tables = [_table(found[0]), _folded(found[1])] if found else [_p("Nobody failed.")]
    return [_chart(chart, several_runs=len(runs) > 1), *tables]


def _tiers(groups: Sequence[Group]) -> list[str]:
    chart = tiers_chart(groups)
    return [_chart(chart)] if chart else [_p("No tier was measured.")]


def _clients(run: Run, at: int, runs: Sequence[Run]) -> list[str]:
    local = local_run(run, runs)
    chart = clients_chart(run, f"clients-{at}", _shown_clients(runs), local)
    parts = (
        [_chart(chart, several_runs=len(runs) > 1)]
        if chart
        else [_p("Clients cannot be compared with before: the run has no measurement of them at its end.")]
    )
    if local is not None:
        parts.append(_p(f"Alone: {_name(local)}, in which every client trained by itself."))
    elif averages(run):
        if any(trains_alone(other) and other.final for other in runs):
            parts.append(
                _p("The run of method local is of another base or other rows, and nobody is compared with it.")
            )
        parts.append(
            "<p>To see what clients gain over training alone, give a run with method <code>local</code> of the same base, "
            f"training rows and held-out rows, too: <code>{_text(_local_command(run))}</code> makes one, from the file at the "
            "end of this page.</p>"
        )
    return parts


def _local_command(run: Run) -> str:
    arguments = [f"--set method.{name}=" for name in section(run.config, "method") if name != "name"]
    # Method local refuses these sections, which concern what clients send.
    arguments += [f"--set {part}=" for part in ("server_optimizer", "robustness") if run.config.get(part)]
    arguments += ["--set training.proximal="] if section(run.config, "training").get("proximal") else []
    return " ".join(
        ["hetlora run", shlex.quote(_file_name(run)), "--set method.name=local --set name=local", *arguments]
    )


def _slots(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    why = (
        "A slot is one index of the rank. Where factors are padded with zeros and averaged, a slot that only few clients of a "
        "round have shrinks, and one that is zero in A and in B never changes again. The records count the slots that are "
        "alive after each round, not how large they are."
    )
    chart = slots_chart(groups)
    alone = [group.label for group in groups if not all(map(averages, group.runs))]
    apart = [_p(f"Nothing is averaged in {several(alone)}, and so no slot is diluted there.")] if alone else []
    if chart is not None:
        return [_p(why), _chart(chart), *apart]
    if all(map(trains_weights, runs)):
        return [_p("The base's own weights were trained, which have no slots.")]
    return apart or [_p("No round records slots.")]


def _costs(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    chart = traffic_chart(groups)
    note = (
        "Full fine-tuning is arithmetic, not a run: every number of the base in 4 bytes, sent to each client that was asked "
        "and back by each whose update was admitted. 16 bytes a trained number are weight, gradient and the two moments of "
        "AdamW in float32; what else training holds, hetlora plan says. The peak is of the process that ran the federation."
    )
    return [*([_chart(chart)] if chart else [_p("Nothing was sent.")]), _p(note, "quiet"), _table(memory_table(runs))]


def _origin(run: Run, at: int, _: Sequence[Run]) -> list[str]:
    name = _file_name(run)
    versions = {"hetlora": run.head.get("hetlora", "?"), **section(run.head, "versions")}
    made_with = ", ".join(f"{clean(key, 40)} {clean(value, 60)}" for key, value in versions.items())
    digests = "".join(f"<li>{_text(file)}: SHA-256 <code>{digest}</code></li>" for file, digest in run.digests.items())
    rows = {
        key: int(number(run.head.get(key)) or 0) for key in ("train_rows", "test_rows", "truncated_rows", "empty_rows")
    }
    quoted = _text(shlex.quote(name))
    repeat = (
        f"<p>Saved as <code>{_text(name)}</code>, the configuration repeats the run: <code>hetlora run {quoted}</code>, with "
        "its paths relative to the working directory.</p>"
    )
    button = f'<button type="button" data-file="{_text(name)}" aria-controls="config-{at}">Save {_text(name)}</button>'
    written = f'<pre id="config-{at}" tabindex="0">{html.escape(as_toml(run.config))}</pre>'
    return [
        _p(f"Seed {run.config.get('seed', '?')}; made with {made_with}."),
        _p(
            f"{rows['train_rows']:,} training rows, {rows['test_rows']:,} held out; {rows['truncated_rows']:,} cut, "
            f"{rows['empty_rows']:,} dropped as empty."
        ),
        f"<p>Read from <code>{_text(str(run.folder))}</code>:</p><ul>{digests}</ul>",
        repeat,
        f'<p class="tools group">{button}</p>',
        f"<details><summary>The configuration, every key at its value</summary>{written}</details>",
    ]


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


def _file_name(run: Run) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(run.config.get("name") or run.label)).strip("-.")[:60] + ".toml"


# HTML ---------------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(clean(value))


def _p(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def _chart(chart: Chart, *, several_runs: bool = False) -> str:
    """Return a chart as a figure, with its sentence above and its data as a table below."""
    level, name = (4 if several_runs else 3), chart.name
    data = {
        "traces": chart.traces,
        "layout": chart.layout,
        "height": chart.height,
        "labels": list(chart.labels),
        "views": [vars(view) for view in chart.views],
    }
    views = "".join(
        f'<button type="button" aria-pressed="{"false" if at else "true"}">{html.escape(view.label)}</button>'
        for at, view in enumerate(chart.views)
    )
    title = html.escape(chart.title)
    what = f"{title}, as a chart; the sentence above says what is seen, the table below has its data"
    saves = [("csv", "Data as CSV"), ("png", "PNG"), ("svg", "SVG")]
    buttons = "".join(f'<button type="button" data-save="{kind}">{label}</button>' for kind, label in saves)
    parts = [
        f'<figure class="chart" id="{name}" aria-labelledby="{name}-t">',
        f'<figcaption><h{level} id="{name}-t">{title}</h{level}>{_p(chart.sentence)}</figcaption>',
        f'<div class="group views" role="group" aria-label="Horizontal axis">{views}</div>' if views else "",
        f'<div class="group legend" role="group" aria-label="Shown in {title}"></div>',
        f'<div class="plot" role="img" aria-label="{what}"></div>',
        f'<script type="application/json">{_json(data)}</script>',
        f'<div class="group tools">{buttons}</div>',
        _folded(chart.table),
        "</figure>",
    ]
    return "\n".join(part for part in parts if part)


def _json(value: Mapping[str, Any]) -> str:
    """Return JSON that is safe inside an HTML script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _folded(table: Table) -> str:
    rows = many(len(table.rows), "row")
    return f"<details><summary>{html.escape(table.caption)}: a table of {rows}</summary>{_table(table)}</details>"


def _table(table: Table) -> str:
    of_text = [_is_text(cell) for cell in table.rows[0]] if table.rows else [True] * len(table.columns)
    head = "".join(
        f'<th scope="col"{" class=t" if text else ""}>{html.escape(column).replace("ROUGE-L", "<span>ROUGE-L</span>")}</th>'
        for column, text in zip(table.columns, of_text, strict=True)
    )
    body = "\n".join(
        f'<tr><th scope="row">{_cell(first)}</th>' + "".join(map(_data, rest)) + "</tr>" for first, *rest in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.caption)}"><table><caption>'
        f"{html.escape(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _data(cell: Any) -> str:
    # Without the optional end tag a large table is a third smaller.
    return f"<td class=t>{_cell(cell)}" if _is_text(cell) else f"<td>{_cell(cell)}"


def _is_text(cell: Any) -> bool:
    return isinstance(cell, str) and not re.fullmatch(r"[—\d.,+−e%x ]*( of \d+)?", cell)


def _cell(cell: Any) -> str:
    return "" if cell is None else html.escape(clean(cell)) if isinstance(cell, str) else str(cell)
