"""A method outside the package: clients with a large loss count more.

If Python finds this module, a configuration and every command can name its factory:

    PYTHONPATH=examples hetlora run examples/demo.toml --set 'method={name="fair:fair", q=2.0}'

`add_a_method.py` does the same from Python.
"""

from __future__ import annotations

from hetlora import Method, WeightedSum
from hetlora.core.aggregation import weighted_mean
from hetlora.core.method import truncate_to_rank


def fair(*, q: float = 1.0) -> Method[WeightedSum]:
    """Weigh a client by its examples times the q-th power of its training loss.

    `p_k ∝ n_k F_k^q` over zero-padded factors; `q = 0` is `zeropad`.

    Args:
        q: Exponent of the loss, q >= 0.

    Raises:
        ValueError: `q` is negative.

    It weighs as Li et al. do, and leaves out their step sizes.
    """
    if q < 0:
        raise ValueError(f"q={q!r} is not allowed; use 0 or more")
    return Method(
        name="fair",
        reference="Li et al.: Fair Resource Allocation in Federated Learning, ICLR 2020, arXiv 1905.10497.",
        distribute=truncate_to_rank,
        weigh=lambda update: update.examples * update.loss**q,
        start=lambda state: WeightedSum.like(state.adapter),
        add=lambda total, update, weight: total.add(update.adapter, weight),
        finish=weighted_mean,
    )
