"""What a federation is measured against: all data in one place, every client alone, nobody at all."""

from __future__ import annotations

from dataclasses import replace

from hetlora.core.aggregation import WeightedSum, weighted_mean
from hetlora.core.method import Method, example_weight, truncate_to_rank
from hetlora.core.types import Client, ServerState, TrainTask

__all__ = ["central", "local", "zeroshot"]


def central() -> Method[WeightedSum]:
    """Pool the rows of all clients in one place and train one adapter of the largest rank on them.

    A round is as many local steps as a whole cohort of the federation would do, `clients_per_round` times those of a mean
    client. Nobody drops out.

    Returns:
        The method, of one client. Only its bytes are a federation's, for none of its data stayed where it was.

    Reference:
        The usual upper bound; Cho et al., EMNLP 2024, arXiv 2401.06432, name what federation costs against it.

    Example:
        >>> central().clients
        'pooled'

    Where we differ: the optimiser begins anew every round, as the clients' does.
    """
    why = "there is one client and no federation"
    return Method(
        name="central",
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
        The method. Each client goes on from its own adapter whenever it is drawn and is served by it; one that is never
        drawn is served by the base. With all clients in every round it is the usual local-only baseline. A client that drops
        out after training goes on from where it was before.

    Reference:
        The usual lower bound: what a client gains from the federation is what it has over this.

    Example:
        >>> local().name
        'local'
    """
    why = "nothing is sent to a server"
    return Method(
        name="local",
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
    """Train nobody: the base as it is.

    Returns:
        The method; its run has no rounds.

    Reference:
        A reference of HetLoRA's paper: Cho et al., EMNLP 2024, arXiv 2401.06432.

    Example:
        >>> zeroshot().clients
        'nobody'
    """
    why = "nobody trains"
    return Method(
        name="zeroshot",
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
