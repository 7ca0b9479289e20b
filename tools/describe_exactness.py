"""Print docs/exactness.md: which methods give the mean of the products, and what becomes of slots in idle rounds.

python tools/describe_exactness.py > docs/exactness.md
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, LoraPair, ModuleShape, delta
from hetlora.core.method import Method
from hetlora.core.round import run_round
from hetlora.core.types import Client, ClientFailure, ClientUpdate, ServerState, TrainTask
from hetlora.methods import METHODS

SHAPE, RANK, SEED = ModuleShape(24, 20), 8, 0
WIDE_RANK = 20
"""A global rank that no mean product of the table exceeds: the rank of the module."""
MIXED = (2, 2, 4, 4, 8, 8)
THIN, THICK, IDLE_ROUNDS = 8, 2, 5
ONE_RANK = ("fedavg", "fedit")
UNAGGREGATED = {
    "fedsa_lora": "each client has its own B: there is no common product",
    "local": "nothing is averaged",
    "zeroshot": "nobody trains",
}
"""Methods without a product that all clients share, and why."""
ARGUMENTS: dict[str, dict[str, Any]] = {"hetlora": {"gamma": 1.0}, "steady": {"gamma": 1.0}}
"""Self-pruning would change what is averaged; the question here is the average."""


@dataclass(frozen=True)
class Pure:
    """An engine whose clients train by a pure function."""

    change: Callable[[TrainTask], ClientUpdate]

    def train(self, tasks: Sequence[TrainTask], method: Method[Any]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield every client's answer, self-pruned."""
        for task in tasks:
            yield method.prune(task, self.change(task))


def draw(name: str, *shape: int) -> Tensor:
    """Return standard normal numbers fixed by `name`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"exactness:{SEED}:{name}".encode()))
    return torch.randn(*shape, generator=generator)


def make(name: str) -> Method[Any]:
    """Return the method as the tables run it."""
    return METHODS[name](**ARGUMENTS.get(name, {}))


def start(method: Method[Any], rank: int = RANK) -> ServerState:
    """Return a random global adapter of this rank; the change of a whole weight beside A = 1 where those are trained."""
    if method.trains == "weights":
        numbers = SHAPE.out_features * SHAPE.in_features
        return ServerState({"m": LoraPair(torch.ones(1, 1), draw("B", numbers, 1))})
    out_features, in_features = SHAPE
    return ServerState({"m": LoraPair(draw("A", rank, in_features), draw("B", out_features, rank))}, seed=SEED)


def federation(method: Method[Any], name: str, ranks: Sequence[int]) -> list[Client]:
    """Return clients of these ranks, or of the one rank that the method takes."""
    if method.trains == "weights":
        ranks = [1] * len(ranks)
    elif name in ONE_RANK:
        ranks = [RANK] * len(ranks)
    elif method.clients == "pooled":
        ranks = [RANK]
    return [Client(f"client-{index}", rank, 1 + index) for index, rank in enumerate(ranks)]


def train(task: TrainTask) -> ClientUpdate:
    """Move the factors that the task trains by as much as they are large, at random."""
    moved: Adapter = {
        module: LoraPair(
            *(
                factor + draw(f"{task.client}:{task.round}:{letter}", *factor.shape)
                if letter in task.trains
                else factor
                for letter, factor in zip("AB", pair, strict=True)
            )
        )
        for module, pair in task.adapter.items()
    }
    return _update(task, moved, examples=1 + int(task.client.rpartition("-")[2]))


def _update(task: TrainTask, adapter: Adapter, examples: int = 1) -> ClientUpdate:
    return ClientUpdate(task.client, task.round, task.rank, adapter, examples, 1, 1.0)


def change_of_base(state: ServerState) -> Tensor:
    """Return `folded + B A`, float64: what the adapted module has on top of its first weight."""
    product = delta(LoraPair(*(factor.double() for factor in state.adapter["m"])))
    return product + state.folded.delta["m"].double() if state.folded.delta else product


def error(name: str, *, rank: int = RANK, rounds: int = 1) -> float:
    """Return `‖ΔW_new - Σ_k p_k ΔW_k‖ / ‖Σ_k p_k ΔW_k‖` of the last of these rounds, in the Frobenius norm.

    `ΔW_k` is what client k computes with on top of the base after training, `ΔW_new` what a client of the global rank
    computes with next, and `p_k` are the method's own weights.

    Args:
        name: The method's.
        rank: Of the global adapter.
        rounds: Each of a whole federation of mixed ranks.
    """
    method = make(name)
    state = start(method, rank)
    clients = federation(method, name, MIXED)
    if method.clients == "pooled":
        clients = [replace(client, rank=rank) for client in clients]
    for _ in range(rounds):
        sent: dict[str, Tensor] = {}
        before = state

        def change(task: TrainTask, before: ServerState = before, sent: dict[str, Tensor] = sent) -> ClientUpdate:
            update = train(task)
            sent[task.client] = change_of_base(replace(before, adapter=update.adapter))
            return update

        state, report = run_round(before, method, Pure(change), clients)
        if report.failures:
            raise RuntimeError(f"{name}: {report.failures}")
        mean = torch.stack([share * sent[client] for client, share in report.shares().items()]).sum(dim=0)
    return float((change_of_base(state) - mean).norm() / mean.norm())


def idle_factor(name: str) -> float:
    """Return by what the product of slots 2 ... 7 is multiplied in idle rounds: 8 clients of rank 2, 2 of rank 8.

    In the round before, one client of rank 8 brings the slots: orthogonal ones of the sizes 8, 7 ... 1, so that an SVD
    keeps them apart. All clients have as many examples.
    """
    method = make(name)
    state = start(method)
    if method.trains == "adapter":
        A = torch.eye(RANK, SHAPE.in_features)
        state = ServerState({"m": LoraPair(A, torch.zeros(SHAPE.out_features, RANK))}, seed=SEED)
    clients = [replace(client, examples=1) for client in federation(method, name, (2,) * THIN + (RANK,) * THICK)]
    state, _ = run_round(state, method, Pure(_bring), clients[-1:])
    first = change_of_base(state)
    for _ in range(IDLE_ROUNDS):
        state, _ = run_round(state, method, Pure(_rest), clients)
    tail = slice(2, RANK) if method.trains == "adapter" else slice(None)  # a whole weight has no slots
    last = change_of_base(state)
    return float((last[tail] * first[tail]).sum() / (first[tail] ** 2).sum())


def _rest(task: TrainTask) -> ClientUpdate:
    return _update(task, task.adapter)


def _bring(task: TrainTask) -> ClientUpdate:
    A, B = task.adapter["m"]
    sizes = torch.arange(A.shape[0], 0.0, -1.0)
    return _update(task, {"m": LoraPair(A, torch.eye(*B.shape) * sizes)})


EXPLAINED = """\
# Exactness

Generated by `python tools/describe_exactness.py > docs/exactness.md`; a test keeps it up to date.

A client of rank r_k trains `ΔW_k = B_k A_k`, on top of what is folded into the base. What a server wants is the mean of
what the clients have learned, `Σ_k p_k ΔW_k`; what it can send is a pair of factors. `mean(B) mean(A)` is not `mean(B A)`,
so methods that average the factors miss it, and others get it exactly by freezing a factor, by folding, or by an SVD.

## Who equals the mean of the products

One server step with clients of the ranks {ranks} on a module of {out} × {inn}, whose factors have moved at random by as much
as they were large (with `fedavg` and `fedit` all have rank {rank}; `central` has one client; `full` trains the weight itself).
The error is `‖ΔW_new - Σ_k p_k ΔW_k‖ / ‖Σ_k p_k ΔW_k‖` with the method's own weights p_k. Real updates move less than these,
and their errors are smaller; zero stays zero.

| method | relative error | |
| --- | --- | --- |
{errors}

Methods without a product that all clients share are left out: {left_out}.
`hetlora` and `steady` run with `gamma = 1`: self-pruning changes what is averaged, not how.

## What becomes of slots when nobody trains

One client of rank {rank} has brought something into all slots; then {thin} clients of rank 2 and {thick} of rank {rank} take part and nobody
trains. Slots 2 to 7 are had by the {thick} alone. The table says by what their product has been multiplied after {rounds} such
rounds: 1 is as it was, 0 is gone. With `fedavg` and `fedit` all have rank {rank}, and `full` trains the weight itself.

| method | factor after {rounds} idle rounds | |
| --- | --- | --- |
{idle}

Exact does not mean that nothing decays: to the mean of the products, a thin client has zeros in these slots, and with shares of
{thick} in {clients} they keep a fifth a round. Averaging A and B apart keeps a fifth of each, a twenty-fifth of the product. `fedex_lora`
folds a part of them into the base, where it stays; `flora` has folded all. The mean over a slot's owners does not shrink it.
"""


def error_rows() -> list[tuple[str, float, str]]:
    """Return name, relative error and remark of every method with a common product."""
    rows = []
    for name in METHODS:
        if name in UNAGGREGATED:
            continue
        value = error(name)
        rows.append((name, value, "exact" if value < EXACT else "not exact"))
        if name in ("flexlora", "recon_svd"):
            value = error(name, rank=WIDE_RANK)
            rows.append((f"{name}, global rank {WIDE_RANK}", value, "exact" if value < EXACT else "not exact"))
    return rows


EXACT = 1e-6
"""Relative error below which what is left is the rounding of float32."""


def idle_rows() -> list[tuple[str, float, str]]:
    """Return name, factor and remark of every method with a common product."""
    factors = {name: idle_factor(name) for name in METHODS if name not in UNAGGREGATED}
    return [(name, value, "unchanged" if abs(value - 1) < EXACT else "decays") for name, value in factors.items()]


def _shown(value: float) -> str:
    return "< 1e-6" if value < EXACT else f"{value:.2g}"


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    reasons = "; ".join(f"`{name}` ({reason})" for name, reason in UNAGGREGATED.items())
    print(
        EXPLAINED.format(
            ranks=", ".join(map(str, MIXED)),
            out=SHAPE.out_features,
            inn=SHAPE.in_features,
            rank=RANK,
            thin=THIN,
            thick=THICK,
            clients=THIN + THICK,
            rounds=IDLE_ROUNDS,
            errors="\n".join(
                f"| {_named(name)} | {_shown(value)} | {remark} |" for name, value, remark in error_rows()
            ),
            left_out=reasons,
            idle="\n".join(f"| {_named(name)} | {value:.2g} | {remark} |" for name, value, remark in idle_rows()),
        ),
        end="",
    )


def _named(name: str) -> str:
    method, comma, remark = name.partition(",")
    return f"`{method}`{comma}{remark}"


if __name__ == "__main__":
    main()
