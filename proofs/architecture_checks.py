"""What is looked at of an architecture, each against a reference that hetlora has no part in."""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hetlora.commands.export.export import export_run
from hetlora.commands.generate import generate
from hetlora.commands.plan import make_plan
from hetlora.config import RunConfig, parse_config
from hetlora.config.preconditions import check_causal
from hetlora.core.adapter import Adapter, LoraPair
from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.errors import HetLoraError
from hetlora.model.full_model import FullModel
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.model.peft_check import check_peft_modules
from hetlora.model.targets import is_linear, linear_paths
from hetlora.model.text_pass import check_rows
from hetlora.runs.display import QuietDisplay
from hetlora.runs.local_experiment import LocalExperiment
from hetlora.runs.result import RunResult
from hetlora.training.local import LocalTraining, local_batches, train_clients
from proofs.small_bases import write_base_of
from proofs.small_run import document, write_base, write_rows

__all__ = ["COLUMNS", "Cell", "Examination"]

SETTINGS = LocalTraining(learning_rate=3e-3, batch_size=2, steps=2)
PLAIN = LocalTraining(learning_rate=0.05, batch_size=2, steps=2, optimizer="sgd")
RANKS = {"a": 2, "b": 4}
SCALING = 2.0


class Cell(NamedTuple):
    """What came out.

    Attributes:
        state: "ok", "refused" (before anything was trained), "skipped" (another column says why), "wrong" or "error".
        detail: The figure, or the reason.
    """

    state: str
    detail: str


class Wrong(Exception):  # noqa: N818  what it says
    """A figure that is not that of the reference."""


class Skipped(Exception):  # noqa: N818
    """There is nothing to look at, because of what another column says."""


class Examination:
    """One architecture, its random weights and rows in a folder.

    Args:
        kind: Its type.
        variant: Its variant.
        folder: An empty one.

    Raises:
        Exception: Whatever transformers says when it cannot be built.
    """

    def __init__(self, kind: str, variant: str, folder: Path) -> None:
        self.folder = folder
        write_base(folder / "tokenizer")
        write_base_of(kind, variant, folder / "tokenizer", folder / "base")
        write_rows(folder / "rows.jsonl")

    def cell(self, column: str) -> Cell:
        """Look at a column."""
        try:
            if column != "run":
                self.causal  # noqa: B018  which a run asks first
            return Cell("ok", COLUMNS_BY_NAME[column](self))
        except Skipped as reason:
            return Cell("skipped", str(reason))
        except HetLoraError as error:
            return Cell("refused", str(error).replace(str(self.folder), ""))
        except Wrong as error:
            return Cell("wrong", str(error))
        except Exception as error:  # noqa: BLE001  that is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}, line {place.lineno}"
            return Cell("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})")

    @property
    def base(self) -> str:
        """Return where the base is."""
        return str(self.folder / "base")

    def plain(self, dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Any:
        """Return the base as transformers loads it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            folder or self.base, dtype=dtype, trust_remote_code=False, use_safetensors=True
        ).eval()

    @functools.cached_property
    def targets(self) -> list[str] | None:
        """Return what is adapted in most columns: the default, or all names that can be where there is none."""
        try:
            LoraModel(load_base(self.base))
        except HetLoraError:
            base = load_base(self.base)
            names = sorted({path.rpartition(".")[2] for path in linear_paths(base)})
            if self._can_be_adapted(*names):
                return names
            return [name for name in names if self._can_be_adapted(name)] or None
        return None

    def _can_be_adapted(self, *names: str) -> bool:
        try:
            check_peft_modules(LoraModel(load_base(self.base), target_modules=names))
        except HetLoraError:
            return False
        return True

    def model(self, **more: str) -> dict[str, Any]:
        """Return the section of the base."""
        targets = {} if self.targets is None else {"target_modules": self.targets}
        return {"base": self.base, "device": "cpu", **targets, **more}

    def config(self, **changes: Any) -> RunConfig:
        """Return the configuration of a run of one round."""
        usual = {
            "model": self.model(),
            "federation": {"rounds": 1, "clients_per_round": 3},
            "evaluation": {"every": 0, "generate": 2, "max_new_tokens": 4},
            "training": {"steps": 2, "batch_size": 2, "learning_rate": 1e-2},
        }
        whole = document(str(self.folder / "runs"), threads=1, **{**usual, **changes})
        whole["data"] = {**whole["data"], "path": str(self.folder / "rows.jsonl")}
        return parse_config(whole)

    @functools.cached_property
    def causal(self) -> None:
        """Refuse a base that sees the future."""
        check_causal(self.config(model={"base": self.base}), load_base(self.base))

    @functools.cached_property
    def experiment(self) -> LocalExperiment:
        """Return the experiment of the run with all at its default."""
        return LocalExperiment(self.config(), QuietDisplay())

    @functools.cached_property
    def result(self) -> RunResult:
        """Do the run with all at its default."""
        return self.experiment.run()

    @functools.cached_property
    def run_folder(self) -> Path:
        """Return the folder of the run; what cannot be run has no more columns."""
        try:
            return self.result.records.parent
        except Exception as error:
            raise Skipped("there is no run") from error

    @functools.cached_property
    def learned(self) -> Tensor:
        """Return the logits of what was learned, as the run itself computes them."""
        self.run_folder  # noqa: B018  or there is nothing to look at
        model = self.experiment.model
        model.use(self.result.state.owned_slots(self.experiment.trainers))
        try:
            return _logits(model.base)
        finally:
            model.use(None)


def _targets(of: Examination) -> str:
    model = LoraModel(load_base(of.base))
    names = sorted({path.rpartition(".")[2] for path in model.shapes})
    return f"{len(model.shapes)} modules: {', '.join(names)}"


def _run(of: Examination) -> str:
    result = of.result
    if result.failures or not result.updates or result.final is None:
        raise Wrong(f"{result.failures} clients failed, {result.updates} updates")
    if result.final.overall.perplexity == result.base.overall.perplexity:
        raise Wrong("nothing was learned")
    return f"perplexity {_number(result.base.overall.perplexity)} to {_number(result.final.overall.perplexity)}"


def _perplexity(of: Examination) -> str:
    of.run_folder  # noqa: B018
    return _same_perplexity(of.result, of.experiment, of.plain(), 1e-4)


def _same_perplexity(
    result: RunResult, experiment: LocalExperiment, plain: Any, allowed: float, *, final: bool = False
) -> str:
    """Compare a run's perplexity with that of a plain model, one row at a time."""
    rows = [row for client in experiment.measured for row in experiment.data.test(client)]
    with torch.inference_mode():
        theirs = math.exp(sum(float(_loss(plain, row)) for row in rows) / sum(row.scored for row in rows))
    measured = result.final if final else result.base
    assert measured is not None
    ours = measured.overall.perplexity
    assert ours is not None
    return _within(abs(ours - theirs) / theirs, allowed, f"perplexity {ours:.4f}, transformers {theirs:.4f}")


def _cohort(of: Examination) -> str:
    return _trained_alike(of, of.targets)


def _all_linear(of: Examination) -> str:
    return _trained_alike(of, ["all-linear"])


def _trained_alike(of: Examination, targets: list[str] | None) -> str:
    """Train two clients of different ranks together, and each alone with PEFT and PyTorch; compare their changes."""
    model = LoraModel(load_base(of.base), target_modules=targets, scaling=SCALING)
    rows = [_rows(seed) for seed in range(len(RANKS))]
    check_peft_modules(model)  # as a run does before it trains, and so the next one
    check_rows(model, [row.ids for row in rows[0]])
    tasks = [TrainTask(name, 0, rank, _random(model, rank, seed)) for seed, (name, rank) in enumerate(RANKS.items())]
    updates = train_clients(model, tasks, rows, SETTINGS)
    worst = 0.0
    for task, own, update in zip(tasks, rows, updates, strict=True):
        if not isinstance(update, ClientUpdate):
            raise Wrong(f"{update}")
        worst = max(worst, _apart(task.adapter, update.adapter, _alone(of, model, task, own)))
    unreached = _unreached(of, model) if targets == ["all-linear"] else ""
    return _within(worst, 0.02, f"{len(model.shapes)} modules{unreached}")


def _alone(of: Examination, model: LoraModel, task: TrainTask, rows: Sequence[Example]) -> dict[str, LoraPair]:
    """Train a client as a user of PEFT would, a row at a time."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=task.rank if isinstance(task.rank, int) else 0,
        lora_alpha=SCALING * len(next(iter(task.adapter.values())).A),
        target_modules=list(model.target_modules),
        fan_in_fan_out=model.fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    peft: Any = get_peft_model(of.plain(), settings).eval()
    factors = {name: value for name, value in peft.named_parameters() if "lora_" in name}

    def factor(path: str, letter: str) -> Tensor:
        return factors[f"base_model.model.{path}.lora_{letter}.default.weight"]

    if len(factors) != 2 * len(task.adapter):
        raise Wrong(f"PEFT adapts {len(factors) // 2} modules, and we {len(task.adapter)}")
    with torch.no_grad():
        for path, (A, B) in task.adapter.items():
            factor(path, "A").copy_(A)
            factor(path, "B").copy_(B)
    _descend(peft, list(factors.values()), rows, task.client, SETTINGS)
    return {path: LoraPair(factor(path, "A").detach(), factor(path, "B").detach()) for path in task.adapter}


def _descend(model: Any, weights: list[Tensor], rows: Sequence[Example], client: str, settings: LocalTraining) -> None:
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(weights, lr=settings.learning_rate, weight_decay=0.0)
    for batch in local_batches(rows, settings.batch_size, settings.count(len(rows)), f"0:0:{client}"):
        optimizer.zero_grad()
        for row in batch:
            (_loss(model, row) / sum(each.scored for each in batch)).backward()  # type: ignore[no-untyped-call]
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, settings.clip_norm)
        optimizer.step()


def _unreached(of: Examination, model: LoraModel) -> str:
    """Check that what PEFT would adapt on top learns nothing from a text; say how many modules those are."""
    from peft import LoraConfig, get_peft_model

    try:
        peft: Any = get_peft_model(of.plain(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    except ValueError:
        return ", and PEFT takes no all-linear here"
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A") and is_linear(module.get_base_layer())  # and no tensor of several experts' weights
    }
    try:
        _loss(peft.eval(), _rows(0)[0]).backward()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001  such as a layer that is linear by its class alone
        return ", and with PEFT's own choice the base does not compute"
    learning = [
        path
        for path in layers.keys() - model.shapes.keys()
        if any(parameter.grad is not None for name, parameter in layers[path].named_parameters() if "lora_" in name)
    ]
    if learning and not any(str(len(learning)) in note for note in model.notes):
        raise Wrong(f"PEFT's all-linear trains {len(learning)} modules more, such as {min(learning)}")
    if learning:
        return f", and PEFT {len(learning)} more that a note says cannot be"
    more = layers.keys() - model.shapes.keys()
    return f", and PEFT {len(more)} more that learn nothing" if more else ""


def _export(of: Examination) -> str:
    from peft import PeftModel

    done = export_run(of.run_folder, of.folder / "exported", check=False)  # it is read back here, in this process
    peft = PeftModel.from_pretrained(of.plain(), str(done.folder)).eval()
    return _same_logits(of, _logits(peft))


def _merged(of: Examination) -> str:
    done = export_run(of.run_folder, of.folder / "merged", merged=True, check=False)
    return _same_logits(of, _logits(of.plain(folder=done.folder)))


def _same_logits(of: Examination, theirs: Tensor) -> str:
    base = _logits(of.plain())
    learned = float((of.learned - base).norm())
    if learned <= 1e-4 * float(base.norm()):
        raise Wrong("what was learned changes nothing")
    return _within(float((theirs - of.learned).norm()) / learned, 0.01, "of what was learned")


def _generation(of: Examination) -> str:
    """Ask what was learned: many prompts at once, and each alone with the exported adapter in PEFT."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    prompts = ["what is 3?", "number", "tell me of the phone that is on the table", "of 5 and 6"]
    ours = [answer.text for answer in generate(of.run_folder, prompts, max_new_tokens=6)]
    if not (of.folder / "exported").is_dir():
        raise Skipped("there is no adapter to ask")
    tokenizer = AutoTokenizer.from_pretrained(of.base, trust_remote_code=False)
    peft: Any = PeftModel.from_pretrained(of.plain(), str(of.folder / "exported")).eval()
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        out = _greedily(peft, ids)
        theirs.append(tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True).strip())
    different = sum(one != other for one, other in zip(ours, theirs, strict=True))
    if different:
        raise Wrong(f"{different} of {len(prompts)} answers differ: {ours} and {theirs}")
    return f"{len(prompts)} answers"


def _greedily(model: Any, ids: Tensor) -> Tensor:
    """Return the ids `[1, n]` and the six tokens of the largest logits after them, each from a whole pass.

    transformers' own `generate` is no reference: with a cache some architectures say something else.
    """
    with torch.inference_mode():
        for _ in range(6):
            last = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if last == 0:  # the end
                break
            ids = torch.cat([ids, torch.tensor([[last]])], dim=1)
    return ids


def _plan(of: Examination) -> str:
    model = LoraModel(load_base(of.base), target_modules=of.targets)
    training = {"steps": 1, "batch_size": 1, "learning_rate": 1e-2}
    plan = make_plan(of.config(training=training), bound=True)
    expected = {rank * sum(sum(shape) for shape in model.shapes.values()) for rank in (2, 4)}
    if {tier.parameters for tier in plan.tiers} != expected or plan.modules != len(model.shapes):
        raise Wrong(f"it says {[tier.parameters for tier in plan.tiers]} parameters; there are {sorted(expected)}")
    held = sum(parameter.nbytes for parameter in model.base.parameters())
    if any(tier.peak_bytes < held or not tier.flops for tier in plan.tiers):
        raise Wrong(f"its peak of {plan.tiers[0].peak_bytes} bytes is less than the base's {held}")
    return f"peak {plan.tiers[-1].peak_bytes / 1e6:.1f} MB"


def _bfloat16(of: Examination) -> str:
    experiment = LocalExperiment(of.config(model=of.model(dtype="bfloat16")), QuietDisplay())
    result = experiment.run()
    if result.failures or result.final is None:
        raise Wrong(f"{result.failures} clients failed")
    return _same_perplexity(result, experiment, of.plain(torch.bfloat16), 0.1)


def _full(of: Examination) -> str:
    """Do a run that trains all weights, whose model is read again; and train one client, and it in a plain loop."""
    whole = of.config(model={"base": of.base, "device": "cpu"}, method={"name": "full"})
    experiment = LocalExperiment(whole, QuietDisplay())
    result = experiment.run()
    assert result.adapter is not None
    _same_perplexity(result, experiment, of.plain(folder=result.adapter), 1e-3, final=True)
    model, plain, rows = FullModel(load_base(of.base)), of.plain(), _rows(0)
    start = model.initial_adapter()
    [update] = train_clients(model, [TrainTask("a", 0, 1, start, trains="B")], [rows], PLAIN)
    if not isinstance(update, ClientUpdate):
        raise Wrong(f"{update}")
    before = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    _descend(plain, list(plain.parameters()), rows, "a", PLAIN)
    changes = {name: (weight - before[name]).detach() for name, weight in plain.named_parameters()}
    ours = torch.cat([update.adapter[name].B.flatten() for name in changes])
    theirs = torch.cat([change.flatten() for change in changes.values()])
    apart = float((ours - theirs).norm() / theirs.norm())
    return _within(apart, 0.01, "changes of all weights")


IDS = torch.tensor([[5, 9, 40, 71, 33, 101, 60, 12, 9, 77, 81, 64]])


def _logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits.float()


def _loss(model: nn.Module, row: Example) -> Tensor:
    """Return the sum of `-log p` over the scored tokens of a row."""
    ids = torch.tensor([row.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    first = max(row.scored_from, 1)
    return nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")


def _rows(seed: int) -> list[Example]:
    """Return rows of different lengths, all longer than the sliding windows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (11, 17, 23)
    return [Example(tuple(torch.randint(2, 200, (n,), generator=generator).tolist()), n // 2) for n in lengths]


def _random(model: LoraModel, rank: int, seed: int) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraPair(
            0.05 * torch.randn(rank, shape.in_features, generator=generator),
            0.05 * torch.randn(shape.out_features, rank, generator=generator),
        )
        for path, shape in model.shapes.items()
    }


def _apart(start: Adapter, ours: Adapter, theirs: Adapter) -> float:
    """Return the distance of two results as a share of the way to them, over all factors."""
    apart = sum(float((ours[p][s] - theirs[p][s]).square().sum()) for p in start for s in (0, 1))
    way = sum(float((theirs[p][s] - start[p][s]).square().sum()) for p in start for s in (0, 1))
    return math.sqrt(apart / way) if way else math.inf


def _within(apart: float, allowed: float, what: str) -> str:
    if not apart <= allowed:
        raise Wrong(f"{apart:.1e} apart: {what}")
    return f"{apart:.0e} apart: {what}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


COLUMNS_BY_NAME: Mapping[str, Callable[[Examination], str]] = {
    "targets": _targets,
    "run": _run,
    "perplexity": _perplexity,
    "cohort": _cohort,
    "all-linear": _all_linear,
    "export": _export,
    "merged": _merged,
    "generation": _generation,
    "plan": _plan,
    "bfloat16": _bfloat16,
    "full": _full,
}
COLUMNS = tuple(COLUMNS_BY_NAME)
