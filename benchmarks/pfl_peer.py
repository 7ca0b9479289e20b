"""hetlora's engine against pfl-research's simulator with the same model: the same result, and the ratio of times.

Both run in this process with the same threads: pfl does a round, hetlora does a round, and so on, and after every pair both
must have reached the same losses and the same global adapter. Needs the environment of `make bench-setup`:

    .venv-bench/bin/python -m benchmarks.pfl_peer            # or --quick
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.table import Row, row

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.peers.work import Answer, Work


def rows(quick: bool) -> Iterable[Row]:
    """Yield a row a model; none, with the reason, where pfl is not installed."""
    for module in ("pfl", "peft"):
        if importlib.util.find_spec(module) is None:
            print(f"pfl_peer: left out, {module} is not installed here; run `make bench-setup` and use .venv-bench")
            return
    import torch

    from benchmarks.peers.cases import CORES, PAIRS, cases

    os.environ["PFL_PYTORCH_DEVICE"] = "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for work, _ in cases(quick, Path(folder)):
                if not work.name.startswith("curve") and "64 tokens" not in work.name:  # the others tell enough
                    yield _measure(work, 1 if quick else PAIRS)
    finally:
        torch.set_num_threads(threads)


def _measure(work: Work, pairs: int) -> Row:
    from benchmarks.peers.work import Ours, check_same

    ours = Ours(work)
    first = ours.adapter()
    ratios = []
    began = time.perf_counter()

    def our_turn(theirs: Answer) -> None:
        nonlocal began
        between = time.perf_counter()
        answer = ours.round()
        after = time.perf_counter()
        ratios.append((between - began) / (after - between))
        check_same(first, theirs, answer)
        gc.collect()
        began = time.perf_counter()

    _run_pfl(work, first, 1 + pairs, our_turn)
    parameters = ours.model.base.num_parameters() / 1e6
    return row(
        f"pfl-research's simulator / hetlora, a round: {work.name}, {parameters:.1f} M parameters",
        ratios[1:],  # the first pair is the warm-up
        note=f"{work.cohort_size} clients x {work.steps} steps x {work.batch_size} rows; one process with two threads",
    )


def _run_pfl(work: Work, first: Mapping[str, Tensor], rounds: int, after_round: Callable[[Answer], None]) -> None:
    """Run pfl's FedAvg from a first adapter, and hand over what every round comes to."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    from benchmarks.peers.plain import PlainClient, pad

    class Network(torch.nn.Module):
        """What pfl trains, and the losses of its steps."""

        def __init__(self) -> None:
            super().__init__()
            self.peft = plain.model
            self.losses: dict[str, list[float]] = defaultdict(list)

        def loss(self, client: str, **batch: Tensor) -> Tensor:
            value: Tensor = self.peft(**batch).loss
            self.losses[client].append(value.item())
            return value

        def metrics(self, **batch: Tensor) -> dict[str, Any]:
            return {"loss": Weighted(self.peft(**batch).loss.item(), 1)}

    class Rows(Dataset):
        """A client's batches of one round."""

        def __init__(self, number: int, client: str) -> None:
            super().__init__((), user_id=client, train_kwargs={"client": client})
            self.number = number

        def __len__(self) -> int:
            return len(work.rows[self.user_id])

        def iter(self, _: int | None) -> Iterator[dict[str, Tensor]]:
            return (pad(batch, work.pad_id) for batch in work.batches(self.number, self.user_id))

    class Message(TrainingProcessCallback):
        """Hands over the global adapter and the clients' losses."""

        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
            adapter = {name: value.detach().clone() for name, value in get_peft_model_state_dict(plain.model).items()}
            losses = {client: sum(values) / len(values) for client, values in network.losses.items()}
            network.losses.clear()
            after_round((adapter, losses))
            return False, Metrics()

    plain = PlainClient(work)
    set_peft_model_state_dict(plain.model, dict(first))
    network = Network()
    draws = ((number, client) for number in itertools.count() for client in work.cohort(number))
    data = FederatedDataset(lambda drawn: Rows(*drawn), lambda: next(draws))
    FederatedAveraging().run(
        # pfl evaluates in the first round whatever the frequency: that is the warm-up.
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=work.cohort_size,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        PyTorchModel(
            network,
            lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
            torch.optim.SGD(plain.parameters, lr=1.0),
        ),
        NNTrainHyperParams(
            local_batch_size=work.batch_size,
            local_num_epochs=None,
            local_num_steps=work.steps,
            local_learning_rate=work.learning_rate,
            local_max_grad_norm=1.0,
        ),
        NNEvalHyperParams(local_batch_size=work.batch_size),
        [Message()],
        send_metrics_to_platform=False,
    )


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case")
    options = parser.parse_args()
    from hetlora.runs.process import prepare_process

    prepare_process()  # as hetlora's own command does
    for result in rows(options.quick):
        print(f"{result.name}: {result.ratio:.2f} ({result.min:.2f} to {result.max:.2f}) {result.target} {result.note}")


if __name__ == "__main__":
    main()
