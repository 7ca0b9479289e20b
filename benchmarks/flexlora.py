"""FlexLoRA's server step on stacked factors against the dense SVD: the same product, and the ratio of times.

    OMP_NUM_THREADS=2 python benchmarks/flexlora.py               # 4096 x 4096, 20 clients: some minutes, nearly all dense
    OMP_NUM_THREADS=1 python benchmarks/flexlora.py --size 512    # the small version

The dense way forms every client's product [out, in], adds them up and takes the SVD of the sum, as the paper's description
does; both ways work in float64 and give factors of the largest rank. The factored way is the median of five, the dense way
one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from hetlora.core.adapter import LoraPair
from hetlora.core.aggregation import StackedSum
from hetlora.core.types import ServerState
from hetlora.methods import flexlora

RANKS = (4, 8, 16, 32)


def clients_of(size: int, count: int, seed: int) -> list[tuple[LoraPair, float]]:
    """Draw trained factors of ranks 4 to 32 and a number of examples a client."""
    generator = torch.Generator().manual_seed(seed)
    ranks = [RANKS[index % len(RANKS)] for index in range(count)]
    return [
        (
            LoraPair(
                torch.randn(rank, size, generator=generator) / size**0.5,
                torch.randn(size, rank, generator=generator),
            ),
            float(10 + index),
        )
        for index, rank in enumerate(ranks)
    ]


def dense(clients: Sequence[tuple[LoraPair, float]], rank: int) -> LoraPair:
    """Form the mean product and take its SVD."""
    whole = sum(weight for _, weight in clients)
    mean = torch.zeros(clients[0][0].B.shape[0], clients[0][0].A.shape[1], dtype=torch.float64)
    for (A, B), weight in clients:
        mean.addmm_(B.double(), A.double(), alpha=weight / whole)
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    return LoraPair(v[:rank], u[:, :rank] * s[:rank])


def factored(clients: Sequence[tuple[LoraPair, float]], rank: int) -> LoraPair:
    """Do what the method does."""
    size_in, size_out = clients[0][0].A.shape[1], clients[0][0].B.shape[0]
    state = ServerState({"m": LoraPair(torch.zeros(rank, size_in), torch.zeros(size_out, rank))})
    total = StackedSum()
    for pair, weight in clients:
        total = total.add({"m": pair}, weight)
    return flexlora().finish(state, total).adapter["m"]


def measure(size: int, count: int) -> tuple[float, float]:
    """Return how many times faster the factored way is, and how far its product is from the dense one, relatively."""
    clients, rank = clients_of(size, count, seed=0), max(RANKS)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        ours = factored(clients, rank)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    theirs = dense(clients, rank)
    ratio = (time.perf_counter() - began) / statistics.median(times)
    expected = theirs.B.double() @ theirs.A.double()
    error = torch.linalg.norm(ours.B.double() @ ours.A.double() - expected) / torch.linalg.norm(expected)
    return ratio, float(error)


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=20)
    options = parser.parse_args()
    ratio, error = measure(options.size, options.clients)
    print(f"{options.size} x {options.size}, {options.clients} clients: {ratio:.0f} times as fast as the dense SVD")
    print(f"relative difference of the products: {error:.1e}")


if __name__ == "__main__":
    main()
