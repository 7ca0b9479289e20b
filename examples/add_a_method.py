"""A method of one's own in one file: clients on which the model does badly count more.

    python examples/add_a_method.py

A method is a frozen record of pure functions; the round, the engine, the command line and `hetlora compare` take it as they
take their own. To make it part of the package, put the factory into `src/hetlora/methods/` and its name into `METHODS`; the
laws of the tests then run over it.
"""

from __future__ import annotations

from pathlib import Path

from hetlora import METHODS, Method, WeightedSum
from hetlora.config import load_config
from hetlora.core.aggregation import weighted_mean
from hetlora.core.method import truncate_to_rank
from hetlora.runs.display import choose_display
from hetlora.runs.local_experiment import Experiment
from hetlora.testing import check_method


def fair(*, q: float = 1.0) -> Method[WeightedSum]:
    """Weigh a client by its examples and the q-th power of its training loss, so that hard clients are heard.

    `p_k ∝ n_k F_k^q` over zero-padded factors; `q = 0` is `zeropad`.

    Args:
        q: How much more a client counts that is served badly, q >= 0.

    Raises:
        ValueError: `q` is negative.

    Reference:
        After Li et al.: Fair Resource Allocation in Federated Learning, ICLR 2020, arXiv 1905.10497, whose step sizes are
        left out here.
    """
    if q < 0:
        raise ValueError(f"q={q!r} is not allowed; use 0 or more")
    return Method(
        name="fair",
        distribute=truncate_to_rank,
        weigh=lambda update: update.examples * update.loss**q,
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=weighted_mean,
    )


if __name__ == "__main__":
    check_method(fair(q=2.0))  # does it keep the laws of methods? An error names the one that it breaks.
    METHODS["fair"] = fair
    demo = Path(__file__).with_name("demo.toml")
    # The demonstration's own method has arguments that this one does not take.
    changes = ['method={name="fair", q=2.0}', "name=fair", "federation.rounds=2", "federation.clients_per_round=4"]
    changes += ["data.clients=20", "evaluation.generate=0", "evaluation.rows_per_client=2"]
    result = Experiment(load_config(demo, changes), choose_display(quiet=False)).run()
    print(f"held-out perplexity {result.base.overall.perplexity:.2f} -> {result.final.overall.perplexity:.2f}")
