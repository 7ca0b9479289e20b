"""Mutation tests: each typical mistake, planted in the sources, must turn a test red.

A mutation names a function and what is wrong in it, as syntax: neither a file that moves, nor a line that is laid out anew, nor
a comment breaks it.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import hetlora.methods
from forks import LIBRARIES, Ended, forks

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "hetlora"


class Mutation(NamedTuple):
    """A mistake.

    Attributes:
        function: Where it is made: the end of a qualified name, as much of it as tells the function from all others.
        right: What stands there, once: an expression, a keyword of a call, or a statement. `BODY`: all that it does.
        wrong: What the mistake would write; nothing: the keyword is left out.
        tests: The file of tests that must notice.
        chosen: Which of them, as `pytest -k` takes it; empty for all.
    """

    function: str
    right: str
    wrong: str
    tests: str
    chosen: str = ""


BODY = "the whole body"


def server(function: str, right: str, wrong: str, chosen: str) -> Mutation:
    """A mistake that an example worked out by hand must notice."""
    return Mutation(function, right, wrong, "test_methods_by_hand.py", chosen)


METHODS, TRAINING, PACKING = "test_methods.py", "test_training.py", "test_packing.py"
ROBUST, UPDATE_BOUND, FLOWER = "test_robust.py", "test_update_bound.py", "test_flower_engine.py"
WRAPPERS, COMPRESSION, REFERENCES = "test_wrappers.py", "test_compression.py", "test_method_references.py"

NONE = "no mistake at all"

MUTATIONS = {
    NONE: server("flora._fold", "folded=folded", "folded=folded", "flora"),
    # Bounded influence
    "count the change of A as one of B": Mutation(
        "_change_sizes",
        "largest[letter] = max(largest[letter], float(size))",
        "largest['B'] = max(largest['B'], float(size))",
        ROBUST, "honest_client_moves or by_hand",
    ),
    "clip over the whole factor": Mutation(
        "_change_sizes", "tree_sum(slots.square()).max()", "tree_sum(slots.square()).mean()", ROBUST, "slot"
    ),
    "clip what does not travel": Mutation("_change_sizes", "letter in task.sends", "True", ROBUST, "travel"),
    "weigh an update as it was before it was clipped": Mutation(
        "Robustness.__call__", "weigh(counted[index].update)", "weigh(answers[index][1])", ROBUST, "weight"
    ),
    "take the median with those that have no weight": Mutation(
        "cap_weights", "median_low(positive)", "median_low(weights)", ROBUST, "capped_by_hand"
    ),
    "zeros of those that lack a slot vote": Mutation("_over_slots", "rank >= end", "rank >= begin", ROBUST, "numpy"),
    "Krum on the products and not on their changes": Mutation(
        "robust._change",
        "LoraPair(torch.cat([trained.A.double(), start_a]), torch.cat([trained.B.double(), -start_b], dim=1))",
        "LoraPair(trained.A.double(), trained.B.double())",
        ROBUST, "krum",
    ),
    "Krum counts the distance to itself": Mutation(
        "krum_order", "distances.sort(dim=1).values[:, 1 : 1 + max(1, count - hostile - 2)]",
        "distances.sort(dim=1).values[:, : max(1, count - hostile - 2)]", ROBUST, "krums_order",
    ),
    "take one more than the honest": Mutation(
        "Robustness.__call__", "len(answers) - hostile", "len(answers) - hostile + 1", ROBUST, "leaves_the_hostile"
    ),
    "believe how many steps there were": Mutation(
        "admission._check_reach", "update.steps == expected", "True", UPDATE_BOUND, "steps_are"
    ),
    "believe how many examples there were": Mutation(
        "round._weight", "update.examples > most_examples", "False", UPDATE_BOUND, "no_more_examples"
    ),
    "believe any prune": Mutation("admission._admit", "lowest_rank(assigned)", "0", UPDATE_BOUND, "can_have_left"),
    "a tenth more than training goes": Mutation(
        "admission._check_reach", "furthest > SLACK * limit", "furthest > 1.1 * SLACK * limit", UPDATE_BOUND, "further"
    ),
    "forget that int8 rounds": Mutation(
        "admission._check_reach", "SLACK * limit + rounded", "SLACK * limit", UPDATE_BOUND, "one_large_number"
    ),
    "forget that decay moves, too": Mutation(
        "LocalTraining.reach", "decay + steps * 2.0**-23", "steps * 2.0**-23", UPDATE_BOUND, "no_gradients"
    ),
    "a step of AdamW goes one learning rate": Mutation(
        "LocalTraining.reach", "_steps_of_adamw(steps)", "steps", UPDATE_BOUND, "reached"
    ),
    # HetLoRA
    "equal weights instead of norms": Mutation("norm_weight", BODY, "return 1.0", METHODS, "by_the_norms"),
    "never prune": Mutation("prune_by_tail", BODY, "return update", METHODS, "prune or tail"),
    "prune on equality": Mutation("hetlora._shrank", "after < before", "after <= before", METHODS, "strictly"),
    "drop the tail penalty": Mutation("tail_penalty", BODY, "return None", TRAINING, "batched_cohort"),
    "alpha / r instead of one scaling": Mutation(
        "_GroupedUpdate.forward", "alpha=scaling", "alpha=scaling / rank", TRAINING, "batched_cohort"
    ),
    # A pass of many clients
    "positions go on from row to row": Mutation(
        "pack_rows", "[place for length in lengths for place in range(length)]", "list(range(sum(lengths)))",
        PACKING, "losses_it_gets_alone",
    ),
    "attention over the rows of a block": Mutation(
        "packing._blocked", "part.view(*block, *part.shape[1:])", "part.view(1, -1, *part.shape[1:])",
        PACKING, "losses_it_gets_alone",
    ),
    "the window of attention is forgotten": Mutation(
        "attend_within_rows", "window is None or block.length <= window", "True",
        PACKING, "losses_it_gets_alone and sliding",
    ),
    "a factor's gradient without the scaling": Mutation(
        "_GroupedUpdate.backward", "(upstream[tokens] @ B[g, :, :rank]).mul_(scaling)", "upstream[tokens] @ B[g, :, :rank]",
        TRAINING, "batched_cohort",
    ),
    "the output layer's gradient without the target": Mutation(
        "_LinearCrossEntropy.forward", "product.div_(total).sub_(weight.index_select(0, targets[part]))", "product.div_(total)",
        PACKING, "gradients",
    ),
    "a pass of more tokens than allowed": Mutation(
        "local.micro_batches", "part, room = [[] for _ in rows], tokens", "part, room = [[] for _ in rows], 2 * tokens",
        PACKING, "every_row_once",
    ),
    "the penalty once a pass": Mutation(
        "local._fit", "penalty(factors.adapter)", "sum(penalty(factors.adapter) for _ in micro_batches(rows, tokens_a_pass))",
        TRAINING, "how_many_passes",
    ),
    # The round
    "forget the ranks of absent clients": Mutation(
        "run_round", "updated(state.ranks, pruned)", "pruned", METHODS, "absent"
    ),
    "drop all clients but the first": Mutation(
        "run_round", "method.add(total, answer, weight)", "total if reports else method.add(total, answer, weight)",
        METHODS, "fedavg_weighs",
    ),
    "send the untruncated adapter": Mutation(
        "truncate_to_rank", "state.truncated(rank)", "dict(state.adapter)", METHODS, "distributes"
    ),
    "forget what absent clients keep": server("run_round", "updated(state.kept, kept)", "kept", "absent_clients_b or local"),
    "believe that a failed client has received": server(
        "run_round", "dict.fromkeys([*reports, *summed], state.round)", "dict.fromkeys(tasks, state.round)",
        "failed or answered",
    ),
    "forget a folded round that a client missed": server(
        "BaseDelta.num_bytes", "round_number >= since", "round_number > since", "bytes"
    ),
    "count folded stacks where the sum is smaller": server("BaseDelta.num_bytes", "min", "max", "bytes or dense_sum"),
    "let a client change what is frozen": Mutation(
        "admission._admit", "torch.equal(A, sent_a[:rank])", "True", "test_method_laws.py", "frozen"
    ),
    # Sums
    "a sum of the weighted instead of their mean": Mutation("WeightedSum.weight", BODY, "return 1.0", METHODS, "fedavg"),
    "dilute slots by clients that lack them": server(
        "Owners.of_slots", BODY, "return torch.full((slots,), self.weight, dtype=torch.float64)", "fedsa or replication"
    ),
    "overwrite slots that nobody has": server(
        "weighted_mean", "tail(state.adapter, slots)", "tail(mean, slots)", "ffa_lora"
    ),
    "add products without their weights": server(
        "StackedSum.mean", "B.double() * own_weight / weight", "B.double() / weight", "flexlora"
    ),
    "forget what was stacked where the sums turn dense": Mutation(
        "StackedSum._within_bounds", "self.dense.add(adapter, weight)", "None", REFERENCES, "redistribution"
    ),
    # Methods
    "zeropad: equal weights": Mutation(
        "zeropad", 'example_weight("examples")', 'example_weight("equal")', METHODS, "zeropad"
    ),
    "rbla: zeros where nobody owns a slot": Mutation(
        "rbla.rbla",
        "total.mean(unowned=state.adapter)",
        "total.mean(unowned={m: type(p)(p.A * 0, p.B * 0) for m, p in state.adapter.items()})",
        METHODS, "rbla",
    ),
    "carryover: pad values with zeros": Mutation(
        "SlotSum.moved", "sums.A - weight[:, None] * A.double()", "sums.A - whole * A.double()", METHODS, "carryover"
    ),
    "carryover: examples weigh": Mutation(
        "carryover.carryover", "weigh_by(weights)", 'weigh_by("examples")', METHODS, "carryover"
    ),
    "principal: pad values with zeros": server("principal._finish", "1.0 - share", "0.0", "principal"),
    "principal: the share of the last slot for all of them": server(
        "principal._finish", "total.owners.of_slots(module, rank)", "total.owners.of_slots(module, rank)[-1]", "principal"
    ),
    "principal: examples weigh": server("principal.principal", "weigh_by(weights)", 'weigh_by("examples")', "principal"),
    "replication: pad with zeros": server(
        "replication._finish", "missing[:, None] * top.A", "0.0 * top.A", "replication"
    ),
    "replication: the first of the widest clients alone": server(
        "replication._add", "rank == total.top_rank.get(module)", "rank > highest", "replication"
    ),
    "flexlora: a sum instead of a mean": server(
        "flexlora._redistribute", "mean[module]", "mean[module]._replace(B=mean[module].B * total.weight)", "flexlora"
    ),
    "flexlora: dead slots beyond the rank": server("fill_missing_slots", "A.clone()", "A.new_zeros(A.shape)", "flexlora"),
    "flexlora: the vectors of a singular value that is rounding": server(
        "fill_missing_slots", "values > NOTHING * values[0]", "values > -1.0", "flexlora"
    ),
    "recon_svd: weights by examples": server("recon_svd", "flexlora(weights=weights)", "flexlora()", "recon_svd"),
    "flora: nothing is folded": server("flora._fold", "folded=folded", "", "flora"),
    "flora: a stale base, this round's alone": server("flora._fold", "state.folded", "type(state.folded)()", "flora"),
    "flora: the same A in every round": server("flora._draw", "state.round", "0", "flora"),
    "flora: one A for all clients": server("flora._draw", "client.name", "''", "flora"),
    "flora: the old adapter on top of the fold": server("flora._fold", "adapter=nothing", "", "flora"),
    "fedex_lora: the residual is dropped": server(
        "fedex_lora._finish", "mean[module] - ordered_delta(pair)", "0.0 * mean[module]", "fedex"
    ),
    "fedex_lora: nobody's slots are subtracted in every round": server(
        "fedex_lora._finish", "truncate(after.adapter, total.factors.slots)", "after.adapter", "fedex"
    ),
    "fedex_lora: the last residuals are forgotten": server(
        "fedex_lora._finish", "state.folded", "type(state.folded)()", "fedex"
    ),
    "fedex_lora: the averages' share of the bytes": server(
        "fedex_lora._finish", "total.products.size + num_bytes(own)", "total.products.size", "fedex or bytes"
    ),
    "ffa_lora: A is averaged": server(
        "ffa_lora._keep_a", 'with_factor(after.adapter, "A", state.adapter)', "after.adapter", "ffa_lora"
    ),
    "ffa_lora: A is trained": server("ffa_lora._frozen_a", 'trains="B"', 'trains="AB"', "ffa_lora"),
    "rolora: the other factor is averaged": server(
        "rolora._average_one", "_trained(state.round - 1)", "_trained(state.round)", "rolora"
    ),
    "rolora: A first, which has no gradient": server(
        "rolora._trained", "round_number % 2", "not round_number % 2", "rolora"
    ),
    "rolora: one factor to a client that missed a round": server(
        "rolora._one_factor", "state.answered.get(client.name) == state.round - 1", "client.name in state.answered", "rolora"
    ),
    "fedsa_lora: B is shared": server("fedsa_lora._average_a", 'with_factor(mean, "B", state.adapter)', "mean", "fedsa"),
    "fedsa_lora: a client's B is lost": server("fedsa_lora._own_b", "client.name not in state.kept", "True", "fedsa"),
    "fedsa_lora: B travels": server("fedsa_lora._own_b", 'sends="A"', 'sends="AB"', "fedsa or bytes"),
    "fedavg: ranks are mixed silently": Mutation("fedavg._whole", "rank != slots", "rank > slots", METHODS, "mix_ranks"),
    "fedit: equal weights": server("fedit", "fedavg()", 'fedavg(weights="equal")', "fedit"),
    "full: the constant travels": server("full._change", 'receives="B"', 'receives="AB"', "full or bytes"),
    "central: a federation": server("central", 'clients="pooled"', 'clients="sampled"', "central"),
    "local: clients begin anew": server(
        "alone._own", "state.kept.get(client.name, task.adapter)", "task.adapter", "local"
    ),
    "zeroshot: somebody trains": server("zeroshot", 'clients="nobody"', 'clients="sampled"', "zeroshot"),
    # Wrappers
    "fedopt: momentum is forgotten": Mutation("fedopt.finish", "beta1 * m + d", "d", WRAPPERS, "by_hand"),
    "fedopt: the second moment begins at tau": Mutation("fedopt.fedopt", "tau * tau", "tau", WRAPPERS, "by_hand"),
    "fedopt: yogi runs away": Mutation("fedopt._yogi", "v - squared", "squared - v", WRAPPERS, "by_hand"),
    "fedopt: slots that nobody has go on moving": Mutation(
        "fedopt.finish", "_held(resting, state.adapter, moved)", "moved", WRAPPERS, "rest"
    ),
    "steady: clients go on from the average": Mutation(
        "averaged.distribute", "state.training_state", "state", WRAPPERS, "averages or steady"
    ),
    "steady: the sum goes on from the average": Mutation(
        "averaged.finish", "state.training_state", "state", WRAPPERS, "steady"
    ),
    "steady: what was before the first answer counts": Mutation(
        "averaged.finish", "first = 'iterate' not in state.moments", "first = False", WRAPPERS, "first_answer"
    ),
    "steady: all rounds alike": Mutation(
        "averaged.finish", "(power + 1.0) / (state.round + 1 + power)", "1.0 / (state.round + 1)", WRAPPERS, "averages"
    ),
    "steady: the last round is handed out": Mutation(
        "averaged.finish", "adapter=mean", "adapter=after.adapter", WRAPPERS, "averages"
    ),
    "fedprox: twice the term": Mutation("fedprox.penalty.total", "0.5 * mu", "mu", WRAPPERS, "fedprox"),
    "fedprox: the method's own penalty is dropped": Mutation(
        "fedprox.penalty.total", "moved + own(adapter)", "moved", WRAPPERS, "fedprox"
    ),
    # What travels
    "int8: cut instead of rounded": Mutation(
        "quantize_slots", "steps.round_()", "steps.trunc_()", COMPRESSION, "half_a_scale or by_hand"
    ),
    "wire: what rounding lost is forgotten": Mutation(
        "pack_update", "place.add_(debt)", "place", COMPRESSION, "last_residual or makes_good"
    ),
    "wire: the residual of a factor that waits is lost": Mutation(
        "pack_update",
        '_replaced(owed, compress(meant, "float32", due).values, due)',
        '_replaced(_owed(None, mine.layout, ""), compress(meant, "float32", due).values, due)',
        COMPRESSION, "waits",
    ),
    "wire: a change takes the place of the value": Mutation(
        "parse_update", "place.add_(change)", "place.copy_(change)", COMPRESSION, "the_change or does_not_enter"
    ),
    "wire: a rank above the assigned one": Mutation(
        "codec._answers", "1 <= rank <= ranks[name]", "1 <= rank", "test_wire.py", "does_not_fit"
    ),
    # Over Flower
    "flower: a frozen factor is sent every round": Mutation(
        "FlowerEngine._bundles", "task.receives", "'AB'", FLOWER, "sent_once"
    ),
    "flower: a frozen factor is that of any round": Mutation(
        "_last_received", "number == begun", "True", FLOWER, "later_one"
    ),
    "flower: a client trains more than it affords": Mutation(
        "ClientRuntime._check", "largest > afforded", "False", FLOWER, "affords"
    ),
    "flower: two nodes speak for one client": Mutation(
        "NodeRegistry._check", "node.client.name == other.client.name", "False", FLOWER, "speak_for"
    ),
    "flower: a score is believed": Mutation(
        "remote_experiment._score", "0.0 <= nll <= MOST_NLL * tokens", "True", FLOWER, "suspicion"
    ),
    # Training and what is written
    "count who is in two sums twice": Mutation(
        "_partial_problem", "not answered.isdisjoint(names)", "False", "test_partial_totals.py", "counts_once"
    ),
    "train modules in the order in which they came": Mutation(
        "BatchedFactors.__init__", "sorted(padded)", "list(padded)", TRAINING, "order_of_modules"
    ),
    "drop-outs answer all the same": Mutation(
        "DropOuts.train", "gone.isdisjoint(clients)", "True", "test_cohort.py", "drop"
    ),
    "train what is frozen": Mutation(
        "train_clients",
        "BatchedFactors([task.adapter for task in tasks], tasks[0].trains, model.device)",
        "BatchedFactors([task.adapter for task in tasks], 'AB', model.device)",
        TRAINING, "frozen",
    ),
    "train on the stale base": Mutation("local._fit", "tasks[0].folded.delta", "None", TRAINING, "folded"),
    "a batch over two bases": Mutation(
        "train_clients", "_same_base(task.folded, tasks[0].folded)", "True", TRAINING, "different_things"
    ),
    "fold without the scaling": Mutation(
        "LoraLayer.forward", "nn.functional.linear(x.to(folded.dtype), folded).mul(self.scaling)",
        "nn.functional.linear(x.to(folded.dtype), folded)", TRAINING, "folded",
    ),
    "full: every client begins where the last one ended": Mutation(
        "FullModel.use", "self._start[name] + (B * A).view(parameter.shape).to(parameter)",
        "parameter.detach() + (B * A).view(parameter.shape).to(parameter)", "test_full_model.py", "as_it_was",
    ),
    "merge without what was folded": Mutation(
        "write_merged", "folded[name] if folded else 0.0", "0.0", "test_merge.py", "folded"
    ),
    "merge a Conv1D the wrong way": Mutation(
        "write_merged", "change if isinstance(module, nn.Linear) else change.T", "change", "test_merge.py", "gpt2"
    ),
}  # fmt: skip


# How a mistake is made ------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A function of the package: the file it is in, of which that is the syntax, and its own."""

    file: str
    tree: ast.Module
    function: ast.FunctionDef


@cache
def sources() -> dict[Path, str]:
    return {path.relative_to(SOURCE): path.read_text("utf8") for path in sorted(SOURCE.rglob("*.py"))}


def named(function: str) -> Place:
    """Find a function by the end of its qualified name, e.g. `methods.fedopt.fedopt.finish`."""
    found = {}
    for file, text in sources().items():
        if f"def {function.rpartition('.')[2]}(" not in text:
            continue
        tree = ast.parse(text)
        inside: list[tuple[tuple[str, ...], ast.AST]] = [(file.with_suffix("").parts, tree)]
        for parts, node in inside:
            for child in ast.iter_child_nodes(node):
                own = (*parts, child.name) if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else parts
                inside.append((own, child))
                if isinstance(child, ast.FunctionDef) and f".{'.'.join(own)}".endswith(f".{function}"):
                    found[".".join(own)] = Place(str(file), tree, child)
    assert len(found) == 1, f"{function} is the name of {len(found)} functions: {', '.join(found)}"
    return next(iter(found.values()))


class Mistake(ast.NodeTransformer):
    """Writes one thing for another, and counts how often it was there."""

    def __init__(self, right: str, wrong: str) -> None:
        self.right, self.wrong = {ast.dump(form): kind for kind, form in forms(right)}, dict(forms(wrong))
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST | None:
        if (kind := self.right.get(ast.dump(node))) is None:
            return self.generic_visit(node)
        self.count += 1
        return self.wrong.get(kind)


def forms(text: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield what a text may be as syntax: an expression, a keyword of a call, a statement."""
    with contextlib.suppress(SyntaxError):
        yield "expression", ast.parse(text, mode="eval").body
        return
    with contextlib.suppress(SyntaxError):
        for keyword in ast.parse(f"dict({text})", mode="eval").body.keywords:
            yield "keyword", keyword
    for statement in ast.parse(text).body:
        yield "statement", statement


def mistaken(mutation: Mutation) -> tuple[str, str]:
    """Return the file of a mutation, and what is in it with the mistake."""
    file, tree, function = named(mutation.function)
    if mutation.right == BODY:
        function.body = ast.parse(mutation.wrong).body
    else:
        mistake = Mistake(mutation.right, mutation.wrong)
        mistake.generic_visit(function)
        assert mistake.count == 1, f"{mutation.right} stands {mistake.count} times in {mutation.function}, not once"
    return file, ast.unparse(ast.fix_missing_locations(tree))


def test_a_function_is_found_wherever_it_is_and_its_syntax_is_changed() -> None:
    file, source = mistaken(MUTATIONS["steady: the last round is handed out"])
    before, after = (ast.unparse(ast.parse(text)) for text in ((SOURCE / file).read_text("utf8"), source))
    assert after == before.replace("adapter=mean, moments", "adapter=after.adapter, moments") != before
    for function in ("finish", "no_such_function"):
        with pytest.raises(AssertionError, match=f"{function} is the name of"):
            named(function)
    with pytest.raises(AssertionError, match="stands 0 times"):
        mistaken(Mutation("averaged.finish", "adapter=nothing", "", WRAPPERS))


@pytest.mark.run
def test_every_mistake_can_still_be_made() -> None:
    for mutation in MUTATIONS.values():
        mistaken(mutation)


# Each of them ---------------------------------------------------------------------------------------------------------

# That an example fails is enough: it need not be the smallest one.
PYTEST = """
import hypothesis, pytest
phases = [phase for phase in hypothesis.Phase if phase.name not in ("shrink", "explain")]
hypothesis.settings.register_profile("mistakes", phases=phases, database=None)
hypothesis.settings.load_profile("mistakes")
raise SystemExit(int(pytest.main({})))
"""


@pytest.fixture(scope="module")
def run_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ended]]:
    """Run pytest in a folder with a copy of the package, in a fork that imports it, and what else is there, anew."""
    others = ["pytest", "hypothesis.strategies", "transformers.models.gpt2.modeling_gpt2"]
    if importlib.util.find_spec("flwr"):
        others += ["flwr.clientapp", "flwr.serverapp"]
    environment = {"PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with forks(tmp_path_factory.mktemp("forks"), [*LIBRARIES, *others], **environment) as server:

        def call(folder: Path, *arguments: str) -> Ended:
            return server.run(PYTEST.format(list(arguments)), folder, [folder / "src"])

        yield call


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutations are tested in forks")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_turns_a_test_red(name: str, tmp_path: Path, run_tests: Callable[..., Ended]) -> None:
    mutation = MUTATIONS[name]
    file, source = mistaken(mutation)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    bundled = Path("src", "hetlora", "data", "bundled")
    (tmp_path / bundled).symlink_to(ROOT / bundled)
    shutil.copytree(ROOT / "proofs", tmp_path / "proofs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for part in (
        "conftest.py",
        "drawn_examples.py",
        "fake_clients.py",
        "small_models.py",
        "fake_grid.py",
        "processes.py",
        mutation.tests,
    ):
        shutil.copy(ROOT / "tests" / part, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "src" / "hetlora" / file).write_text(source, encoding="utf8")

    arguments = ["-q", "-x", "--tb=no", "-p", "no:cacheprovider", f"tests/{mutation.tests}", "-k", mutation.chosen]
    ended = run_tests(tmp_path, *arguments)
    expected = 0 if name == NONE else 1
    red = " failed" in ended.out or re.search(r"^ERROR \S+::", ended.out, flags=re.MULTILINE)  # a fixture may refuse it
    assert bool(red) == bool(expected), f"pytest did not get as far as its tests:\n{ended.out[-2000:]}"
    assert ended.code == expected, f"exit code {ended.code}, expected {expected}:\n{ended.out[-2000:]}"


@pytest.mark.run
def test_every_method_has_a_mistake_that_is_noticed() -> None:
    methods = {value.__module__ for value in vars(hetlora.methods).values() if inspect.isfunction(value)}
    files = {named(mutation.function).file for mutation in MUTATIONS.values()}
    assert len(methods) > 10
    assert methods <= {".".join(("hetlora", *Path(file).with_suffix("").parts)) for file in files}
