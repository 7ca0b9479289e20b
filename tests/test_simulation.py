"""The engine: a client's result is independent of its batch, of the order and of the number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from hetlora.core.types import ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.methods import METHODS
from hetlora.model.lora_model import LoraModel
from hetlora.training.local import LocalTraining
from hetlora.training.parallel import in_parallel
from hetlora.training.simulation import SimulationEngine
from test_training import cohort, relative

pytestmark = pytest.mark.run

SETTINGS = LocalTraining(learning_rate=3e-3, batch_size=3, epochs=2)


class Rows:
    """Rows by client."""

    def __init__(self, tasks: Sequence[TrainTask], rows: Sequence[Sequence[Example]]) -> None:
        self.rows = {task.client: own for task, own in zip(tasks, rows, strict=True)}

    def train(self, client: str) -> Sequence[Example]:
        return self.rows[client]


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the test as many threads as it asks for, and the others one again."""
    yield
    torch.set_num_threads(1)


def train(model: LoraModel, count: int, **options: int | None) -> dict[str, ClientUpdate]:
    tasks, rows = cohort(model)
    torch.set_num_threads(count)
    engine = SimulationEngine(model, Rows(tasks, rows), SETTINGS, seed=0, **options)
    answers = list(engine.train(tasks if count % 2 else tasks[::-1], METHODS["hetlora"](gamma=0.7, min_rank=1)))
    assert torch.get_num_threads() == count, "the process has its threads back"
    assert all(isinstance(answer, ClientUpdate) for answer in answers)
    return {answer.client: answer for answer in answers}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"group_size": 1}, {"group_size": 3}, {"workers": 1}])
def test_groups_order_and_threads_do_not_change_what_is_learned(
    tiny_model: LoraModel, count: int, options: dict[str, int | None]
) -> None:
    alone = train(tiny_model, 1, group_size=1, workers=1)
    together = train(tiny_model, count, **options)
    assert together.keys() == alone.keys()
    for client, update in together.items():
        assert update.rank == alone[client].rank
        assert relative(update.adapter, alone[client].adapter) < 1e-4
        assert update.loss == pytest.approx(alone[client].loss, rel=1e-5)
    again = train(tiny_model, count, **options)
    assert all(relative(again[client].adapter, update.adapter) == 0.0 for client, update in together.items())


@pytest.mark.usefixtures("threads")
def test_the_first_error_of_a_worker_comes_out_and_the_threads_come_back() -> None:
    torch.set_num_threads(2)

    def work(item: int) -> int:
        if item == 1:
            raise ValueError("the second is broken")
        return item

    with pytest.raises(ValueError, match="the second is broken"):
        list(in_parallel(work, [0, 1, 2, 3], torch.device("cpu")))
    assert torch.get_num_threads() == 2
    results = in_parallel(work, [0, 2, 3], torch.device("cpu"))
    assert next(results) == 0
    results.close()
    assert torch.get_num_threads() == 2, "also where nobody wants the rest"
