"""Each method's server step against plain NumPy in float64, for random ranks and weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawn_examples import examples
from fake_clients import FULL, FakeEngine, answer, only_trained, products, start_of
from hetlora.core.adapter import map_tensors
from hetlora.core.round import run_round
from hetlora.core.types import Client
from hetlora.methods import METHODS

laws = examples(20)

# A reference takes the server's A [r, in] and B [out, r] of a module, and the clients' (weight, A_k, B_k). It returns the
# next A, B and what is folded in this round; None where nothing is.


def padded(A, B, rank):
    return np.vstack([A, np.zeros((rank - len(A), A.shape[1]))]), np.hstack([B, np.zeros((len(B), rank - B.shape[1]))])


def mean_of_padded(rank, clients):
    total = sum(w for w, _, _ in clients)
    pairs = [padded(a, b, rank) for _, a, b in clients]
    shares = [w / total for w, _, _ in clients]
    return sum(p * a for p, (a, _) in zip(shares, pairs)), sum(p * b for p, (_, b) in zip(shares, pairs))  # noqa: B905


def kept_beyond(A, B, new_a, new_b, clients):
    """Slots that nobody has are the server's."""
    widest = max(len(a) for _, a, _ in clients)
    return np.vstack([new_a[:widest], A[widest:]]), np.hstack([new_b[:, :widest], B[:, widest:]])


def zeropad(A, B, clients):
    return *kept_beyond(A, B, *mean_of_padded(len(A), clients), clients), None


def zeropad_to_zero(A, _, clients):
    return *mean_of_padded(len(A), clients), None


def by_slot(A, B, clients, fill):
    """Slot by slot the weighted mean over owners, and over the others with `fill(i)` for what they lack, if it is given."""
    new_a, new_b = A.copy(), B.copy()
    for i in range(len(A)):
        have = [(w, a[i], b[:, i]) for w, a, b in clients if len(a) > i]
        if have and fill is not None:
            have += [(w, *fill(i)) for w, a, _ in clients if len(a) <= i]
        if have:
            total = sum(w for w, _, _ in have)
            new_a[i] = sum(w * row for w, row, _ in have) / total
            new_b[:, i] = sum(w * column for w, _, column in have) / total
    return new_a, new_b


def rbla(A, B, clients):
    return *by_slot(A, B, clients, None), None


def carryover(A, B, clients):
    new_a, new_b, total = A.copy(), B.copy(), sum(w for w, _, _ in clients)
    for w, a, b in clients:
        new_a[: len(a)] += w / total * (a - A[: len(a)])
        new_b[:, : len(a)] += w / total * (b - B[:, : len(a)])
    return new_a, new_b, None


def replication(A, B, clients):
    widest = max(len(a) for _, a, _ in clients)
    top = [(w, a, b) for w, a, b in clients if len(a) == widest]

    def fill(i):
        total = sum(w for w, _, _ in top)
        return sum(w * a[i] for w, a, _ in top) / total, sum(w * b[:, i] for w, _, b in top) / total

    return *by_slot(A, B, clients, fill), None


def mean_product(clients):
    return sum(w * (b @ a) for w, a, b in clients) / sum(w for w, _, _ in clients)


def flora(_, B, clients):
    return None, np.zeros_like(B), mean_product(clients)


def fedex_lora(A, B, clients):
    new_a, new_b, _ = zeropad(A, B, clients)
    widest = max(len(a) for _, a, _ in clients)  # slots beyond are nobody's and stay as they were
    return new_a, new_b, mean_product(clients) - new_b[:, :widest] @ new_a[:widest]


def b_only(A, B, clients):
    return A, zeropad(A, B, clients)[1], None


def a_only(A, B, clients):
    return zeropad(A, B, clients)[0], B, None


def fedsa_lora(A, B, clients):
    return rbla(A, B, clients)[0], B, None


def nothing(A, B, _):
    return A, B, None


REFERENCES = {
    "zeropad": (zeropad, {}),
    "zeropad, unowned zero": (zeropad_to_zero, {"unowned": "zero"}),
    "replication": (replication, {}),
    "replication, equal": (replication, {"weights": "equal"}),
    "rbla": (rbla, {}),
    "carryover": (carryover, {"weights": "examples"}),
    "carryover, equal": (carryover, {"weights": "equal"}),
    "steady": (zeropad, {"gamma": 1.0, "weights": "examples"}),  # of a first round, which is no average yet
    "flora": (flora, {}),
    "flora, equal": (flora, {"weights": "equal"}),
    "fedex_lora": (fedex_lora, {}),
    "ffa_lora": (b_only, {}),
    "rolora": (b_only, {}),
    "rolora, odd": (a_only, {}),
    "fedsa_lora": (fedsa_lora, {}),
    "full": (b_only, {}),
    "fedavg": (zeropad, {}),
    "fedit": (zeropad, {}),
    "central": (zeropad, {}),
    "local": (nothing, {}),
    "zeroshot": (nothing, {}),
}


def a_round(method, seed, ranks, round_number=0):
    """A round of clients that send anything; the state before and after, and by module the sums' input in float64."""
    before = replace(start_of(method, seed), round=round_number)
    full_rank = len(next(iter(before.adapter.values())).A)
    ranks = [min(rank, full_rank) for rank in ranks]
    if method.name in ("fedavg", "fedit"):
        ranks = [full_rank] * len(ranks)
    cohort = [Client(str(k), rank, 1) for k, rank in enumerate(ranks)]
    sent = []

    def change(task):
        rng = np.random.default_rng([seed, int(task.client)])
        drawn = map_tensors(lambda f: torch.from_numpy(rng.standard_normal(tuple(f.shape))).float(), task.adapter)
        sent.append(answer(task, only_trained(task, drawn), examples=int(rng.integers(1, 9))))
        return sent[-1]

    after, report = run_round(before, method, FakeEngine(change), cohort)
    assert len(report.clients) == len(cohort)
    weights = [float(update.examples) for update in sent]
    clients = {
        module: [
            (w, update.adapter[module].A.double().numpy(), update.adapter[module].B.double().numpy())
            for w, update in zip(weights, sent, strict=True)
        ]
        for module in before.adapter
    }
    return before, after, clients


def close(ours, theirs):
    np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=2.0**-22, atol=1e-6)


@pytest.mark.parametrize("case", REFERENCES)
@laws
@given(ranks=st.lists(st.integers(1, FULL), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_a_server_step_equals_its_reference_in_numpy(case, ranks, seed):
    reference, arguments = REFERENCES[case]
    method = METHODS[case.partition(",")[0]](**arguments)
    before, after, clients = a_round(method, seed, ranks, round_number=1 if "odd" in case else 0)
    for module, (A, B) in before.adapter.items():
        own = clients[module]
        if arguments.get("weights") == "equal":
            own = [(1.0, a, b) for _, a, b in own]
        new_a, new_b, folded = reference(A.double().numpy(), B.double().numpy(), own)
        if new_a is not None:
            close(after.adapter[module].A, new_a)
        close(after.adapter[module].B, new_b)
        if folded is None:
            assert not after.folded.delta
        else:
            close(after.folded.delta[module], folded)


def test_every_method_has_a_reference():
    # HetLoRA's is in test_methods.py, those of the SVD are below.
    assert {case.partition(",")[0] for case in REFERENCES} | SVD.keys() | {"hetlora"} == METHODS.keys()


def mean_change(A, B, clients):
    return B @ A + sum(w * (b @ a - B[:, : len(a)] @ A[: len(a)]) for w, a, b in clients) / sum(
        w for w, _, _ in clients
    )


def from_nothing(_a, _b, clients):
    return mean_product(clients)


SVD = {
    "flexlora": (from_nothing, {}),
    "recon_svd": (from_nothing, {}),
    "principal": (mean_change, {"weights": "examples"}),
}


@pytest.mark.parametrize("name", SVD)
@laws
@given(ranks=st.lists(st.integers(1, FULL), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1))
def test_redistribution_equals_the_dense_svd_for_every_rank(name, ranks, seed):
    # Up to nine clients of rank 8 on modules of rank 3 and 2: the stack is compressed on the way.
    product, arguments = SVD[name]
    method = METHODS[name](**arguments)
    before, after, clients = a_round(method, seed, ranks)
    for module, own in clients.items():
        own = [(1.0 if name == "recon_svd" else w, a, b) for w, a, b in own]
        mean = product(*(factor.double().numpy() for factor in before.adapter[module]), own)
        u, s, v = np.linalg.svd(mean, full_matrices=False)
        for rank in range(1, FULL + 1):
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            ours = products(method, after, Client("any", rank, 1))[module].numpy()
            np.testing.assert_allclose(ours, best, rtol=0, atol=1e-5 * s[0])
        A, B = after.adapter[module]
        live = int((s > 1e-9 * s[0]).sum())
        np.testing.assert_allclose((A[:live] @ A[:live].T).numpy(), np.eye(live), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(B.numpy(), axis=0)[:live], s[:live], rtol=1e-4)
        assert not B[:, live:].any()
