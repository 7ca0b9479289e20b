"""The baselines of a federation: all data in one place, every client alone, no training at all."""

from __future__ import annotations

from dataclasses import replace

from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["central", "local", "zeroshot"]


def central() -> Method[WeightedSum]:
    """Pool the rows of all clients in one place and train one adapter of the largest rank on them.

    A round has as many local steps as a whole cohort: `clients_per_round` times those of a mean client. Drop-outs do not apply.

    Returns:
        The method, with one client.

    Example:
        >>> central().clients
        'pooled'

    Where we differ: the optimiser restarts every round, as on the clients.
    """
    why = "there is one client and no federation"
    return Method(
        name="central",
        reference="The usual upper bound; Cho et al., EMNLP 2024, arXiv 2401.06432, name what federation costs against it.",
        distribute=truncate_to_rank,
        weigh=example_weight("examples"),
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=weighted_mean,
        clients="pooled",
        refuses={"server_optimizer": why, "proximal": why, "robustness": why},
    )


def local() -> Method[None]:
    """Let every client fine-tune alone, at its own rank and on its own data; nothing is sent.

    Returns:
        The method. Each client keeps its own adapter, trains it when it is sampled, and is served by it. A client that is never
        sampled is served by the base. With all clients in every round this is the usual local-only baseline. If a client drops
        out after training, its adapter does not change.

    Example:
        >>> local().name
        'local'
    """
    why = "nothing is sent to a server"
    return Method(
        name="local",
        reference="The usual lower bound: what a client gains from the federation is what it has over this.",
        averages="nothing",
        distribute=_own,
        weigh=example_weight("examples"),
        start=lambda _: None,
        add=lambda _total, _update, _weight: None,
        finish=lambda state, _: state,
        keep=lambda update: update.adapter,
        refuses={"server_optimizer": why, "proximal": why, "robustness": why, "average": why},
    )


def zeroshot() -> Method[None]:
    """Train nothing: the base as it is.

    Returns:
        The method; its run has no rounds.

    Example:
        >>> zeroshot().clients
        'nobody'
    """
    why = "nobody trains"
    return Method(
        name="zeroshot",
        reference="A reference of HetLoRA's paper: Cho et al., EMNLP 2024, arXiv 2401.06432.",
        averages="nothing",
        distribute=truncate_to_rank,
        weigh=example_weight("examples"),
        start=lambda _: None,
        add=lambda _total, _update, _weight: None,
        finish=lambda state, _: state,
        clients="nobody",
        refuses={"server_optimizer": why, "proximal": why, "robustness": why, "average": why, "adapter": why},
    )


def _own(state: ServerState, client: Client) -> TrainTask:
    task = replace(truncate_to_rank(state, client), receives="", sends="")
    return replace(task, adapter=state.kept.get(client.name, task.adapter))
