"""The tests notice the mistakes this field makes: each mutation of the sources must turn one of them red."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from forks import LIBRARIES, Ended, forks

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    """A mistake.

    Attributes:
        file: Where it is made, under `src/hetlora`.
        right: What stands there, once.
        wrong: What the mistake would write.
        tests: The file of tests that must notice.
        chosen: Which of them, as `pytest -k` takes it; empty for all.
    """

    file: str
    right: str
    wrong: str
    tests: str
    chosen: str = ""


def server(file: str, right: str, wrong: str, chosen: str) -> Mutation:
    """A mistake that an example worked out by hand must notice."""
    return Mutation(file, right, wrong, "test_methods_by_hand.py", chosen)


HETLORA, FEDERATED, TRAINING = "methods/hetlora.py", "federated.py", "training.py"
METHODS = "test_methods.py"
B_BY_SERVER = 'with_factor(mean, "B", state.adapter)'
A_BY_SERVER = 'with_factor(after.adapter, "A", state.adapter)'

ROBUST, ADMISSION = "robust.py", "admission.py"

MUTATIONS = {
    "no mistake at all": server("methods/flora.py", "folded = state", "folded = state", "flora"),
    # Bounded influence
    "count the change of A as one of B": Mutation(
        ROBUST,
        "largest[letter] = max(largest[letter], float(size))",
        "largest['B'] = max(largest['B'], float(size))",
        "test_robust.py",
        "honest_client_moves or by_hand",
    ),
    "clip over the whole factor": Mutation(ROBUST, "dim=1).max()", "dim=1).square().mean().sqrt()", "test_robust.py", "slot"),
    "clip what does not travel": Mutation(
        ROBUST, "letter in task.trains and letter in task.sends", "letter in task.trains", "test_robust.py", "travel"
    ),
    "weigh an update as it was before it was clipped": Mutation(
        ROBUST,
        "raw = [weigh(counted[index].update) for index in taken]",
        "raw = [weigh(answers[index][1]) for index in taken]",
        "test_robust.py",
        "weight",
    ),
    "take the median with those that have no weight": Mutation(
        ROBUST, "multiple * median_low(positive)", "multiple * median_low(weights)", "test_robust.py", "capped_by_hand"
    ),
    "zeros of those that lack a slot vote": Mutation(
        ROBUST, "if rank >= end]", "if rank >= begin]", "test_robust.py", "numpy"
    ),
    "Krum on the products and not on their changes": Mutation(
        ROBUST,
        "LoraPair(torch.cat([trained.A.double(), start_a]), torch.cat([trained.B.double(), -start_b], dim=1))",
        "LoraPair(trained.A.double(), trained.B.double())",
        "test_robust.py",
        "krum",
    ),
    "Krum counts the distance to itself": Mutation(
        ROBUST, "[:, 1 : 1 + max(1, count - hostile", "[:, : max(1, count - hostile", "test_robust.py", "krums_order"
    ),
    "take one more than the honest": Mutation(
        ROBUST, "else len(answers) - hostile])", "else len(answers) - hostile + 1])", "test_robust.py", "leaves_the_hostile"
    ),
    "believe how many steps there were": Mutation(
        ADMISSION, "update.steps == expected", "update.steps >= 0", "test_reach.py", "steps_are"
    ),
    "believe how many examples there were": Mutation(
        FEDERATED, "if update.examples > most_examples:", "if update.examples < 0:", "test_reach.py", "no_more_examples"
    ),
    "believe any prune": Mutation(
        ADMISSION, "if rank < (least := lowest_rank(assigned)):", "if rank < (least := 0):", "test_reach.py", "can_have_left"
    ),
    "a tenth more than training goes": Mutation(
        ADMISSION, "if furthest > SLACK * limit", "if furthest > 1.1 * SLACK * limit", "test_reach.py", "further"
    ),
    "forget that int8 rounds": Mutation(
        ADMISSION, "if moved > SLACK * limit + rounded", "if moved > SLACK * limit", "test_reach.py", "one_large_number"
    ),
    "forget that decay moves, too": Mutation(
        TRAINING, "decay + steps * 2.0**-23)", "steps * 2.0**-23)", "test_reach.py", "no_gradients"
    ),
    "a step of AdamW goes one learning rate": Mutation(
        TRAINING, "each, joint = rate * _steps_of_adamw(steps)", "each, joint = rate * steps", "test_reach.py", "reached"
    ),
    # HetLoRA
    "equal weights instead of norms": Mutation(
        HETLORA, "return float(delta_norm(update.adapter))", "return 1.0", METHODS, "by_the_norms"
    ),
    "never prune": Mutation(HETLORA, "return bool(after < before)", "return False", METHODS, "prune or tail"),
    "prune on equality": Mutation(
        HETLORA, "return bool(after < before)", "return bool(after <= before)", METHODS, "strictly"
    ),
    "drop the tail penalty": Mutation(
        HETLORA,
        "return penalty * tail_norm(adapter, first)",
        "return 0.0 * tail_norm(adapter, first)",
        "test_training.py",
        "batched_cohort",
    ),
    "alpha / r instead of one scaling": Mutation(
        "lora_layer.py",
        "alpha=scaling)",
        "alpha=scaling / rank)",
        "test_training.py",
        "batched_cohort",
    ),
    # A pass of many clients
    "positions go on from row to row": Mutation(
        "packing.py", "[place for length in lengths for place in range(length)]", "list(range(sum(lengths)))",
        "test_packing.py", "losses_it_gets_alone",
    ),
    "attention over the rows of a block": Mutation(
        "packing.py", "part.view(*block, *part.shape[1:])", "part.view(1, -1, *part.shape[1:])",
        "test_packing.py", "losses_it_gets_alone",
    ),
    "the window of attention is forgotten": Mutation(
        "packing.py", "None if window is None or block.length <= window else", "None if True else",
        "test_packing.py", "losses_it_gets_alone and sliding",
    ),
    "a factor's gradient without the scaling": Mutation(
        "lora_layer.py", "B[g, :, :rank]).mul_(scaling)", "B[g, :, :rank])", "test_training.py", "batched_cohort",
    ),
    "the output layer's gradient without the target": Mutation(
        "output_head.py", ".sub_(weight.index_select(0, targets[part]))", "", "test_packing.py", "gradients",
    ),
    "a pass of more tokens than allowed": Mutation(
        TRAINING, "part, room = [[] for _ in rows], tokens", "part, room = [[] for _ in rows], 2 * tokens",
        "test_packing.py", "every_row_once",
    ),
    "the penalty once a pass": Mutation(
        TRAINING,
        "        if penalty is not None:\n            penalty(",
        "            if penalty is not None:\n                penalty(",
        "test_training.py",
        "passes",
    ),
    # The round
    "forget the ranks of absent clients": Mutation(
        FEDERATED, "ranks=updated(state.ranks, pruned)", "ranks=pruned", METHODS, "absent"
    ),
    "drop all clients but the first": Mutation(
        FEDERATED,
        "total = method.add(total, answer, weight)",
        "total = total if reports else method.add(total, answer, weight)",
        METHODS,
        "fedavg_weighs",
    ),
    "send the untruncated adapter": Mutation(
        FEDERATED, "adapter = state.truncated(rank)", "adapter = dict(state.adapter)", METHODS, "distributes"
    ),
    "forget what absent clients keep": server(
        FEDERATED, "kept=updated(state.kept, kept)", "kept=kept", "absent_clients_b or local"
    ),
    "believe that a failed client has received": server(
        FEDERATED, "dict.fromkeys(reports, state.round)", "dict.fromkeys(tasks, state.round)", "failed or answered"
    ),
    "forget a folded round that a client missed": server(
        FEDERATED, "if round_number >= since)", "if round_number > since)", "bytes"
    ),
    "count folded stacks where the sum is smaller": server(
        FEDERATED, "return min(missed, sum(", "return max(missed, sum(", "bytes or dense_sum"
    ),
    "let a client change what is frozen": Mutation(
        "admission.py", '"A" in task.trains or torch.equal', "True or torch.equal", "test_method_laws.py", "frozen"
    ),
    "average over clients instead of weights": Mutation(
        "aggregation.py", "(factor / self.weight)", "factor", METHODS, "fedavg"
    ),
    "dilute slots by clients that lack them": server(
        "aggregation.py", "self.weight[name][:rank] += weight", "self.weight[name] += weight", "fedsa or replication"
    ),
    "overwrite slots that nobody has": server(
        "aggregation.py", "kept = tail(state.adapter, total.slots)", "kept = tail(mean, total.slots)", "ffa_lora"
    ),
    "stack products without their weights": server(
        "aggregation.py", "LoraPair(A.double(), weight * B.double())", "LoraPair(A.double(), B.double())", "flexlora"
    ),
    "cut a stack that is too wide": Mutation(
        "aggregation.py",
        "return best_rank(pair, full) if",
        "return best_rank(pair, 1) if",
        "test_method_references.py",
        "redistribution",
    ),
    # Methods
    "zeropad: equal weights": Mutation(
        "methods/zeropad.py", 'example_weight("examples")', 'example_weight("equal")', METHODS, "zeropad"
    ),
    "rbla: zeros where nobody owns a slot": Mutation(
        "methods/rbla.py",
        "total.mean(unowned=state.adapter)",
        "total.mean(unowned={m: type(p)(p.A * 0, p.B * 0) for m, p in state.adapter.items()})",
        METHODS,
        "rbla",
    ),
    "carryover: pad values with zeros": Mutation(
        "aggregation.py", "(sums.A - weight[:, None] * A.double())", "(sums.A - whole * A.double())", METHODS, "carryover"
    ),
    "carryover: examples weigh": Mutation(
        "methods/carryover.py", "weigh_by(weights)", 'weigh_by("examples")', METHODS, "carryover"
    ),
    "principal: pad values with zeros": server(
        "methods/principal.py", "(1.0 - total.share(module, rank))", "0.0", "principal"
    ),
    "principal: a share of the highest rank's slots alone": server(
        "methods/principal.py", "owned[:rank] += weight", "owned[rank - 1] += weight", "principal"
    ),
    "principal: examples weigh": server(
        "methods/principal.py", "weigh_by(weights)", 'weigh_by("examples")', "principal"
    ),
    "replication: pad with zeros": server(
        "methods/replication.py", "missing[:, None] * top.A", "0.0 * top.A", "replication"
    ),
    "replication: the first of the widest clients alone": server(
        "methods/replication.py", "LoraPair(have.A + scaled.A, have.B + scaled.B)", "have", "replication"
    ),
    "flexlora: a sum instead of a mean": server(
        "methods/flexlora.py", "LoraPair(A, B / total.weight)", "LoraPair(A, B)", "flexlora"
    ),
    "flexlora: dead slots beyond the rank": server(
        "adapter.py", "A = A.clone()", "A = A.new_zeros(A.shape)", "flexlora"
    ),
    "flexlora: the vectors of a singular value that is rounding": server(
        "adapter.py", "(values > NOTHING * values[0])", "(values > -1.0)", "flexlora"
    ),
    "recon_svd: weights by examples": server(
        "methods/flexlora.py", "flexlora(weights=weights)", "flexlora()", "recon_svd"
    ),
    "flora: nothing is folded": server("methods/flora.py", "adapter=nothing, folded=folded", "adapter=nothing", "flora"),
    "flora: a stale base, this round's alone": server(
        "methods/flora.py", "folded = state.folded.plus", "folded = type(state.folded)().plus", "flora"
    ),
    "flora: the same A in every round": server("methods/flora.py", "{state.seed}:{state.round}", "{state.seed}", "flora"),
    "flora: one A for all clients": server("methods/flora.py", "{client.name}:", "", "flora"),
    "flora: the old adapter on top of the fold": server("methods/flora.py", "adapter=nothing, ", "", "flora"),
    "fedex_lora: the residual is dropped": server(
        "methods/fedex_lora.py", "mean[module] - delta(pair)", "0.0 * mean[module]", "fedex"
    ),
    "fedex_lora: nobody's slots are subtracted in every round": server(
        "methods/fedex_lora.py",
        "torch.Tensor.double, truncate(after.adapter, total.factors.slots)",
        "torch.Tensor.double, after.adapter",
        "fedex",
    ),
    "fedex_lora: the last residuals are forgotten": server(
        "methods/fedex_lora.py", "folded=state.folded.plus", "folded=type(state.folded)().plus", "fedex"
    ),
    "fedex_lora: the averages' share of the bytes": server(
        "methods/fedex_lora.py", "total.products.size + num_bytes", "total.products.size + 0 * num_bytes", "fedex or bytes"
    ),
    "ffa_lora: A is averaged": server("methods/ffa_lora.py", A_BY_SERVER, "after.adapter", "ffa_lora"),
    "ffa_lora: A is trained": server("methods/ffa_lora.py", 'trains="B"', 'trains="AB"', "ffa_lora"),
    "rolora: the other factor is averaged": server(
        "methods/rolora.py", "_trained(state.round - 1), state.adapter", "_trained(state.round), state.adapter", "rolora"
    ),
    "rolora: A first, which has no gradient": server(
        "methods/rolora.py", '"A" if round_number % 2 else "B"', '"B" if round_number % 2 else "A"', "rolora"
    ),
    "rolora: one factor to a client that missed a round": server(
        "methods/rolora.py", "state.answered.get(client.name) == state.round - 1", "client.name in state.answered", "rolora"
    ),
    "fedsa_lora: B is shared": server("methods/fedsa_lora.py", B_BY_SERVER, "mean", "fedsa"),
    "fedsa_lora: a client's B is lost": server(
        "methods/fedsa_lora.py", "if client.name not in state.kept", "if True", "fedsa"
    ),
    "fedsa_lora: B travels": server("methods/fedsa_lora.py", 'sends="A"', 'sends="AB"', "fedsa or bytes"),
    "fedavg: ranks are mixed silently": Mutation(
        "methods/fedavg.py", "if rank != slots", "if rank > slots", METHODS, "mix_ranks"
    ),
    "fedit: equal weights": server("methods/fedavg.py", "replace(fedavg(), ", 'replace(fedavg(weights="equal"), ', "fedit"),
    "full: the constant travels": server("methods/full.py", 'receives="B"', 'receives="AB"', "full or bytes"),
    "central: a federation": server("methods/alone.py", 'clients="pooled"', 'clients="sampled"', "central"),
    "local: clients begin anew": server(
        "methods/alone.py", "state.kept.get(client.name, task.adapter)", "task.adapter", "local"
    ),
    "zeroshot: somebody trains": server("methods/alone.py", 'clients="nobody"', 'clients="sampled"', "zeroshot"),
    # Wrappers
    "fedopt: momentum is forgotten": Mutation(
        "methods/fedopt.py", "lambda m, d: beta1 * m + d,", "lambda m, d: d,", "test_wrappers.py", "by_hand"
    ),
    "fedopt: the second moment begins at tau": Mutation(
        "methods/fedopt.py", '"second": tau * tau', '"second": tau', "test_wrappers.py", "by_hand"
    ),
    "fedopt: yogi runs away": Mutation(
        "methods/fedopt.py", "torch.sign(v - squared)", "torch.sign(squared - v)", "test_wrappers.py", "by_hand"
    ),
    "fedopt: slots that nobody has go on moving": Mutation(
        "methods/fedopt.py",
        "_held(resting, state.adapter, moved)",
        "moved",
        "test_wrappers.py",
        "rest",
    ),
    "steady: clients go on from the average": Mutation(
        "methods/steady.py", "method.distribute(state.iterate, client)", "method.distribute(state, client)",
        "test_wrappers.py", "averages or steady",
    ),
    "steady: the sum goes on from the average": Mutation(
        "methods/steady.py", "method.finish(state.iterate, total)", "method.finish(state, total)", "test_wrappers.py", "steady"
    ),
    "steady: what was before the first answer counts": Mutation(
        "methods/steady.py", "1.0 if first else ", "", "test_wrappers.py", "first_answer"
    ),
    "steady: all rounds alike": Mutation(
        "methods/steady.py", "(power + 1.0) / (state.round + 1 + power)", "1.0 / (state.round + 1)",
        "test_wrappers.py", "averages",
    ),
    "steady: the last round is handed out": Mutation(
        "methods/steady.py", "adapter=mean, moments", "adapter=after.adapter, moments", "test_wrappers.py", "averages"
    ),
    "fedprox: twice the term": Mutation(
        "methods/fedprox.py", "0.5 * mu *", "mu *", "test_wrappers.py", "fedprox"
    ),
    "fedprox: the method's own penalty is dropped": Mutation(
        "methods/fedprox.py", "else moved + own(adapter)", "else moved", "test_wrappers.py", "fedprox"
    ),
    # What travels
    "int8: cut instead of rounded": Mutation(
        "compression.py", "steps.round_()", "steps.trunc_()", "test_compression.py", "half_a_scale or by_hand"
    ),
    "wire: what rounding lost is forgotten": Mutation(
        "wire.py", "place.add_(debt)", "place.add_(0.0 * debt)", "test_compression.py", "last_residual or makes_good"
    ),
    "wire: the residual of a factor that waits is lost": Mutation(
        "wire.py", "_replaced(owed, compress",
        "_replaced(_owed(None, mine.layout, ''), compress", "test_compression.py", "waits"
    ),
    "wire: a change takes the place of the value": Mutation(
        "wire.py", "place.add_(change)", "place.copy_(change)", "test_compression.py", "the_change or does_not_enter"
    ),
    "wire: a rank above the assigned one": Mutation(
        "wire.py", "if not 1 <= rank <= ranks[name]:", "if rank < 1:", "test_wire.py", "does_not_fit"
    ),
    # Over Flower
    "flower: a frozen factor is sent every round": Mutation(
        "flower/engine.py", '"AB" if self._since(task, sent.node, whole=whole) is None else task.receives', '"AB"',
        "test_flower_engine.py", "sent_once",
    ),
    "flower: a frozen factor is that of any round": Mutation(
        "flower/local.py", " and source == [server, begun]", "", "test_flower_engine.py", "later_one"
    ),
    "flower: a client trains more than it affords": Mutation(
        "flower/local.py", "afforded is not None and largest > afforded", "False", "test_flower_engine.py", "affords"
    ),
    "flower: two nodes speak for one client": Mutation(
        "flower/roll.py", "and node.client.name == other.client.name", "and False", "test_flower_engine.py", "speak_for"
    ),
    "flower: a score is believed": Mutation(
        "flower/deployment.py", "and 0.0 <= nll <= MOST_NLL * tokens", "", "test_flower_engine.py", "suspicion"
    ),
    # Training and what is written
    "drop-outs answer all the same": Mutation(
        "cohort.py", "if answer.client not in gone:", "if True:", "test_cohort.py", "drop"
    ),
    "train what is frozen": Mutation(
        TRAINING, "tasks[0].trains, model.device", '"AB", model.device',
        "test_training.py", "frozen",
    ),
    "train on the stale base": Mutation(
        TRAINING, "factors.adapter, tasks[0].folded.delta, ranks", "factors.adapter, None, ranks", "test_training.py", "folded"
    ),
    "a batch over two bases": Mutation(
        TRAINING, "and _same_base(task.folded, tasks[0].folded)", "", "test_training.py", "different_things"
    ),
    "fold without the scaling": Mutation(
        "lora_layer.py", "folded).mul(self.scaling)", "folded)", "test_training.py", "folded"
    ),
    "full: every client begins where the last one ended": Mutation(
        "full_model.py", "changed = self._start[name] +", "changed = parameter.detach() +", "test_full_model.py", "as_it_was"
    ),
    "merge without what was folded": Mutation(
        "merged.py", "(folded[name] if folded else 0.0)", "0.0", "test_merged.py", "folded"
    ),
    "merge a Conv1D the wrong way": Mutation(
        "merged.py", "change if isinstance(module, nn.Linear) else change.T", "change", "test_merged.py", "gpt2"
    ),
}  # fmt: skip

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="mutations are tested in forks")


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
        others += ["flwr.clientapp", "flwr.serverapp", "flwr_datasets"]
    environment = {"PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with forks(tmp_path_factory.mktemp("forks"), [*LIBRARIES, *others], **environment) as server:

        def call(folder: Path, *arguments: str) -> Ended:
            return server.run(PYTEST.format(list(arguments)), folder, [folder / "src"])

        yield call


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_turns_a_test_red(name: str, tmp_path: Path, run_tests: Callable[..., Ended]) -> None:
    file, right, wrong, tests, chosen = MUTATIONS[name]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "bundled"))
    bundled = Path("src", "hetlora", "data", "bundled")
    (tmp_path / bundled).symlink_to(ROOT / bundled)
    shutil.copytree(ROOT / "proofs", tmp_path / "proofs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for part in ("conftest.py", "fake_clients.py", "small_models.py", "fake_grid.py", tests):
        shutil.copy(ROOT / "tests" / part, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "src" / "hetlora" / file
    source = path.read_text("utf8")
    assert source.count(right) == 1, f"the mutation no longer finds its place in {file}"
    path.write_text(source.replace(right, wrong), encoding="utf8")

    ended = run_tests(tmp_path, "-q", "-x", "--tb=no", "-p", "no:cacheprovider", f"tests/{tests}", "-k", chosen)
    expected = 0 if right == wrong else 1
    assert (" failed" in ended.out) == bool(expected), f"pytest did not get as far as its tests:\n{ended.out[-2000:]}"
    assert ended.code == expected, f"exit code {ended.code}, expected {expected}:\n{ended.out[-2000:]}"


def test_every_method_has_a_mistake_that_is_noticed() -> None:
    files = {path.name for path in (ROOT / "src/hetlora/methods").glob("*.py")} - {"__init__.py"}
    assert files == {
        Path(mutation.file).name for mutation in MUTATIONS.values() if mutation.file.startswith("methods/")
    }
