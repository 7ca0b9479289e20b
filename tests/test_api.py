"""`hetlora.run` and its result: the same as the command line, and the process stays unchanged."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

import hetlora
from hetlora import cli
from hetlora.api import Run
from hetlora.config import RunConfig, load_config, load_run_config, parse_config
from hetlora.errors import ConfigError, HetLoraError
from hetlora.runs.display import QuietDisplay
from hetlora.runs.records import RoundRecord, read_records
from proofs.small_run import document, ended, write_base, write_rows

pytestmark = [pytest.mark.run, pytest.mark.usefixtures("place")]
NAME = '<b>phones</b> & "tablets"'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with a base, rows, and the file of a run whose name would be markup."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    (folder / "phones.toml").write_text(tomli_w.dumps(document("runs")), encoding="utf8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def by_command(place: Path) -> Path:
    """The run by the command line."""
    assert cli.main(["run", "phones.toml", "--quiet", "--set", "output=command", "--set", "seed=3"]) == 0
    return place / "command" / "phones"


@pytest.fixture(scope="module")
def by_python(place: Path) -> Run:
    """The same run from Python."""
    return hetlora.run(place / "phones.toml", changes=["output=python", "seed=3"])


FORMS: Mapping[str, Callable[[], str | Path | Mapping[str, Any] | RunConfig]] = {
    "the path as text": lambda: "phones.toml",
    "a dictionary with a comparison": lambda: {**document("runs"), "compare": {"seeds": 2}},
    "a configuration as read": lambda: load_config(Path("phones.toml")),
    "a configuration as a run has written it": lambda: parse_run_config(),
}


def parse_run_config() -> RunConfig:
    """Every key at its value, which the form of a file may not have."""
    Path("config.json").write_text(parse_config(document("runs")).model_dump_json(), encoding="utf8")
    return load_run_config(Path("config.json"))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_the_one_of_the_command_line(by_command: Path, form: str):
    run = hetlora.run(FORMS[form](), changes=["output=forms", "seed=3"])
    assert ended(run.folder) == ended(by_command)
    there = run.summary()
    assert there is not None
    assert there | {"seconds": 0, "peak_megabytes": 0} == json.loads((run.folder / "summary.json").read_text()) | {
        "seconds": 0,
        "peak_megabytes": 0,
    }


def test_what_is_given_is_not_changed():
    given = document("unchanged")
    assert hetlora.run(given, changes="federation.rounds=1").folder == Path("unchanged/phones")
    assert given == document("unchanged")
    config = parse_config(document("unchanged"))
    assert hetlora.run(config, changes=["federation.rounds=1"]).folder == Path("unchanged/phones-2")
    assert config == parse_config(document("unchanged"))


def test_it_is_quiet_unless_it_is_asked(capfd: pytest.CaptureFixture[str]):
    short = ["output=loud", "federation.rounds=1"]
    run = hetlora.run("phones.toml", changes=short)
    run.export(check=False)
    run.generate("what is 3?")
    assert capfd.readouterr() == ("", "")
    hetlora.run("phones.toml", changes=short, display=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "round 1/1" in err


def test_what_spells_everything_out_is_quiet_too(by_python: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.enable_progress_bar()  # which a run by the command line, in another test, may have put out
    AutoModelForCausalLM.from_pretrained("base")
    assert "Loading weights" in capfd.readouterr().err, "the bar that is not to be seen"
    hetlora.export_run(by_python, tmp_path / "model", merged=True, scores=True, check=False)
    assert len(list(hetlora.generate(by_python, ["what is 3?"], compare_base=True))) == 1
    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_behind_in_the_process():
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_progress_bar()

    def process() -> tuple[object, ...]:
        drawn = random.getstate(), torch.random.get_rng_state().tolist()
        return (*drawn, torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled())

    before = process()
    run = hetlora.run("phones.toml", changes=["output=left", "threads=2", "federation.rounds=1"])
    assert run.generate("what is 3?") is not None
    assert process() == before
    for _ in hetlora.generate(run, ["what is 3?", "what is 4?"]):
        assert process() == before, "between two answers, too"
    hetlora.export_run(run, scores=True, check=False)
    assert process() == before
    with pytest.raises(HetLoraError, match="nowhere"):
        hetlora.run("phones.toml", changes=["output=left", "threads=2", "data.path=nowhere.jsonl"])
    assert process() == before


def test_the_table_is_what_was_recorded(by_python: Run):
    records = [record for record in read_records(by_python.folder / "records.jsonl") if record["kind"] == "round"]
    table = by_python.table()
    assert len(table) == len(records) == 4
    for row, record in zip(table, records, strict=True):
        for key in ("round", "loss", "perplexity", "bytes_up", "bytes_down"):
            assert row[key] == record[key]
        assert (row["prunes"], row["failures"]) == (len(record["prunes"]), len(record["failures"]))
    assert sum(row["prunes"] for row in table) > 0
    assert sum(row["failures"] for row in table) > 0
    assert any(row["perplexity"] is None for row in table)
    lines = str(table).splitlines()
    assert lines[0].split() == list(table[0])
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert len({len(line) for line in lines}) == 1, "columns stand below each other"


def test_a_slice_of_the_table_is_a_table(by_python: Run):
    table = by_python.table()
    assert [row["round"] for row in table[-3:]] == [2, 3, 4]
    lines = str(table[-3:]).splitlines()
    assert [lines[0].split(), *(line.split()[0] for line in lines[1:])] == [list(table[0]), "2", "3", "4"]
    assert table[-3:]._repr_html_().count("<tr>") == 1 + 3
    assert table[0]["round"] == 1
    assert str(table[:0]) == "no rounds"


def test_a_run_shows_itself_in_one_sentence(by_python: Run):
    shown, summary = repr(by_python), by_python.summary()
    assert summary is not None
    assert shown.count("\n") == 0
    assert shown.startswith("phones")
    assert f"{summary['prunes']} prunes, {summary['failures']} failures" in shown
    assert f"{summary['final']['perplexity']:.2f}" in shown.replace(",", "")
    assert "not complete" not in shown


def test_what_a_notebook_shows_is_text_and_never_markup(by_python: Run, tmp_path: Path):
    folder = tmp_path / NAME
    shutil.copytree(by_python.folder, folder)
    (folder / "summary.json").unlink()
    lines = (folder / "records.jsonl").read_text("utf8")
    (folder / "records.jsonl").write_text(lines.replace('"name": "phones"', f'"name": {json.dumps(NAME)}'), "utf8")
    shown = hetlora.open_run(folder)._repr_html_()
    assert set(re.findall(r"</?(\w+)", shown)) == {"p", "table", "tr", "th", "td"}
    assert shown.count("<tr>") == 1 + 4
    assert "&lt;b&gt;phones&lt;/b&gt; &amp; &quot;tablets&quot;" in shown


def test_a_folder_that_is_gone_does_not_keep_a_notebook_from_showing_the_rest(by_python: Run, tmp_path: Path):
    shutil.copytree(by_python.folder, tmp_path / "gone")
    run = hetlora.open_run(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert "cannot read" in repr(run)
    assert "cannot read" in run._repr_html_()
    with pytest.raises(HetLoraError, match="cannot read"):
        run.table()


def test_the_figure_has_the_records_figures(by_python: Run):
    figure = by_python.plot()
    perplexity, loss = figure.data
    table = by_python.table()
    assert list(loss.x) == [row["round"] for row in table]
    assert list(loss.y) == pytest.approx([row["loss"] for row in table], rel=1e-5)
    measured = {row["round"]: row["perplexity"] for row in table if row["perplexity"] is not None}
    summary = by_python.summary()
    assert summary is not None
    assert list(perplexity.x) == [0, *measured]
    assert list(perplexity.y) == pytest.approx([summary["base"]["perplexity"], *measured.values()], rel=1e-5)


def test_the_page_goes_where_it_is_wanted(by_python: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert by_python.report() == by_python.folder / "report.html"
    assert by_python.report(str(tmp_path / "page.html")) == tmp_path / "page.html"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert by_python.report("~/at-home.html") == tmp_path / "at-home.html"
    assert (tmp_path / "page.html").read_bytes() == (by_python.folder / "report.html").read_bytes()


def test_what_is_taken_away_is_what_the_command_takes_away(
    by_python: Run, by_command: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    taken = by_python.export(str(tmp_path / "python"), rank=2, check=False)
    assert (
        cli.main(
            ["export", str(by_command), "--quiet", "--rank", "2", "--no-check", "--output", str(tmp_path / "command")]
        )
        == 0
    )
    weights = [tmp_path / door / "adapter_model.safetensors" for door in ("python", "command")]
    assert taken.folder == tmp_path / "python"
    assert weights[0].read_bytes() == weights[1].read_bytes()
    capsys.readouterr()
    row = {"question": "what is 3?"}
    ask = ["generate", str(by_command), "--quiet", "--json", "--tier", "2", "--prompt", json.dumps(row)]
    assert cli.main(ask) == 0
    assert by_python.generate(row, tier="2") == json.loads(capsys.readouterr().out)["text"]
    with pytest.raises(HetLoraError, match="tier"):
        by_python.generate(row, tier="99")
    with pytest.raises(HetLoraError, match=r"hetlora.generate\(run, prompt, compare_base=True\)"):
        by_python.generate(row, compare_base=True)
    with pytest.raises(HetLoraError, match="prompt 1: of type list"):
        by_python.generate(["one", "two"])  # type: ignore[arg-type]


def test_a_run_stands_for_its_folder(by_python: Run, tmp_path: Path):
    assert hetlora.open_run(by_python) == by_python == hetlora.resume(by_python)
    assert hetlora.export_run(by_python, tmp_path / "whole", check=False).folder == tmp_path / "whole"
    assert len(list(hetlora.generate(by_python, ["one", "two"]))) == 2


def test_a_home_is_known_wherever_a_folder_is_taken(by_python: Run, place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(place))
    run = place / "python/phones"
    for opened in (hetlora.open_run("~/python/phones"), hetlora.resume("~/python/phones"), Run("~/python/phones")):  # type: ignore[arg-type]
        assert opened.folder == run
        assert opened.summary() == by_python.summary()
    assert Run("python/phones") == by_python  # type: ignore[arg-type]
    assert str(Run("python/phones").table()) == str(by_python.table())  # type: ignore[arg-type]
    assert by_python.export("~/home 1", rank=1, check=False).folder == place / "home 1"
    assert hetlora.export_run("~/python/phones", "~/home 2", rank=1, check=False).folder == place / "home 2"
    assert len(list(hetlora.generate("~/python/phones", "one"))) == 1
    with pytest.raises(ConfigError, match=r"federation\.clients_per_round = 0"):
        hetlora.run("~/phones.toml", changes=["federation.clients_per_round=0"])
    with pytest.raises(HetLoraError, match="'~nobody-of-this-name/x' is not there"):
        hetlora.open_run("~nobody-of-this-name/x")
    assert not Path("~").exists()


class Stopped(QuietDisplay):
    """Ctrl-C after the second round."""

    def round_ended(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_can_be_looked_at_and_gone_on_with(by_command: Path):
    with pytest.raises(KeyboardInterrupt, match=r"adapter of round 2; hetlora.resume\('stopped/phones'\) goes on"):
        hetlora.run("phones.toml", changes=["output=stopped", "seed=3"], display=Stopped())
    run = hetlora.open_run("stopped/phones")
    assert run.summary() is None
    assert "in 2 of 4 rounds" in repr(run)
    assert "not complete: hetlora.resume('stopped/phones') goes on" in repr(run)
    assert [row["round"] for row in run.table()] == [1, 2]
    assert hetlora.resume("stopped/phones") == run
    assert ended(run.folder) == ended(by_command)


def test_a_comparison_is_the_one_of_the_command_line(place: Path):
    methods = [{"name": "hetlora"}, {"name": "zeroshot"}]
    whole = {
        **document("runs", federation={"rounds": 1, "clients_per_round": 2}),
        "compare": {"seeds": [0, 1], "methods": methods},
    }
    done = hetlora.compare(whole, changes={"name": "both"}, jobs=1)
    assert (done.folder, done.failed, done.kept) == (Path("runs/both"), 0, 0)
    assert [row.label for row in done.rows] == ["hetlora", "zeroshot"]
    assert str(done).splitlines()[1].split()[0] in ("hetlora", "zeroshot")
    path = place / "both.toml"
    path.write_text(tomli_w.dumps(whole | {"name": "both"}), encoding="utf8")
    again = hetlora.compare(path, jobs=1)
    assert again.kept == 4
    assert again.rows == done.rows
    assert [row["label"] for row in again.table()] == ["hetlora", "zeroshot"]
    assert again.report() == Path("runs/both/report.html")
    assert again.report("both.html").read_text("utf8").count("Comparison: both")
    with pytest.raises(ConfigError, match=r"\[compare\] is missing"):
        hetlora.compare(document("runs"))


def test_errors_are_hetloras(place: Path):
    with pytest.raises(ConfigError, match="changes has 1 problem"):
        hetlora.run("phones.toml", changes=["federation.rounds"])
    with pytest.raises(ConfigError, match="there is no such file"):
        hetlora.run("nowhere.toml")
    with pytest.raises(HetLoraError, match=r"is no run, for it has no records\.jsonl; give the folder of a run"):
        hetlora.open_run(place)
    with pytest.raises(HetLoraError, match=r"'.*nowhere' is not there; give the folder of a run"):
        hetlora.resume(place / "nowhere")
    (place / "file").write_text("")
    with pytest.raises(HetLoraError, match="cannot write to 'file'"):
        hetlora.run("phones.toml", changes=["output=file"])


def test_a_run_is_opened_without_torch(by_python: Run):
    program = (
        "import sys, hetlora; run = hetlora.open_run(sys.argv[1]); print(run.table()); print(run, hetlora.run); "
        "assert not {'torch', 'transformers', 'pydantic', 'plotly'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(by_python.folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(by_python.table()))


def test_a_page_is_written_after_the_run_and_named_last(capsys: pytest.CaptureFixture[str]):
    command = ["run", "phones.toml", "--quiet", "--report", "--set", "federation.rounds=1", "--set", "output=paged"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["records:        paged/phones/records.jsonl", "report:         paged/phones/report.html"]
    assert "<!doctype html>" in Path("paged/phones/report.html").read_text("utf8")[:20].lower()
    assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == 1
    assert err.splitlines()[-1] == "report:         paged/phones-2/report.html"
