"""A batched cohort equals each client trained alone, and a plain PEFT and PyTorch loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hetlora.core.adapter import Adapter, Factors, LoraPair, map_tensors, rank_of, tail
from hetlora.core.admission import AdmissionRule, admit
from hetlora.core.types import BaseDelta, ClientFailure, ClientUpdate, TrainTask
from hetlora.data.tokenization import Example
from hetlora.methods.hetlora import tail_penalty
from hetlora.model.lora_model import LoraModel, load_base
from hetlora.training.local import LocalTraining, local_batches, train_clients

pytestmark = pytest.mark.run

RANKS = {"a": 1, "b": 8, "c": 3, "d": 5}


def random_adapter(model: LoraModel, rank: int, seed: int) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: LoraPair(
            0.3 * torch.randn(rank, shape.in_features, generator=generator),
            0.3 * torch.randn(shape.out_features, rank, generator=generator),
        )
        for path, shape in model.shapes.items()
    }


def cohort(model: LoraModel) -> tuple[list[TrainTask], list[list[Example]]]:
    """Four clients of different ranks, numbers of rows and lengths of rows."""
    tasks = [
        TrainTask(name, 3, rank, random_adapter(model, rank, seed)) for seed, (name, rank) in enumerate(RANKS.items())
    ]
    generator = torch.Generator().manual_seed(7)

    def example() -> Example:
        length = int(torch.randint(4, 24, (1,), generator=generator))
        ids = torch.randint(2, 258, (length,), generator=generator).tolist()
        return Example(tuple(ids), int(torch.randint(0, length - 1, (1,), generator=generator)))

    return tasks, [[example() for _ in range(rows)] for rows in (7, 2, 12, 5)]


def relative(ours: Adapter, theirs: Adapter) -> float:
    """Largest relative difference of a factor, in the Frobenius norm."""
    return max(
        float((ours[name][side] - theirs[name][side]).norm() / theirs[name][side].norm())
        for name in theirs
        for side in (0, 1)
    )


def rounding(settings: LocalTraining) -> float:
    """How far, relative, two orders of adding up may bring the factors of one training apart.

    Of a gradient's entries float32 leaves an error of d = 3e-6 of their usual size (against float64: 1e-6 to 2e-6). SGD passes
    that on times its rate. AdamW divides an entry by its own size: one that is smaller than its error moves by the whole rate
    either way, a larger one by its share of it. With entries normally distributed that is `rate * sqrt(1.6 * d)` in the mean
    square: 7e-6 a step at a rate of 3e-3, and in four steps up to 3e-5, on factors whose entries are 0.3.
    """
    return 1e-4 if settings.optimizer == "adamw" else 1e-5


def alone_with_peft(
    folder: str, task: TrainTask, rows: list[Example], settings: LocalTraining, penalty_factor: float, scaling: float
) -> dict[str, LoraPair]:
    """The loop a user would write: PEFT, PyTorch's optimiser, right-padded batches with an attention mask."""
    from peft import LoraConfig, get_peft_model

    base = load_base(folder)
    with torch.no_grad():
        for path, change in task.folded.delta.items():
            base.get_submodule(path).weight += scaling * change
    config = LoraConfig(r=task.rank, lora_alpha=scaling * task.rank, target_modules=["q_proj", "v_proj"])
    peft = get_peft_model(base, config).eval()
    factors = {name: parameter for name, parameter in peft.named_parameters() if "lora_" in name}
    parameters = {
        name: parameter.requires_grad_(any(f"lora_{letter}." in name for letter in task.trains))
        for name, parameter in factors.items()
    }
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

    def factor(path: str, letter: str) -> Tensor:
        return factors[f"base_model.model.{path}.lora_{letter}.default.weight"]

    with torch.no_grad():
        for path, (A, B) in task.adapter.items():
            factor(path, "A").copy_(A)
            factor(path, "B").copy_(B)
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(parameters.values(), lr=settings.learning_rate)
    start = max(1, int(0.7 * task.rank)) if task.rank > 1 else 1
    seed = f"0:{task.round}:{task.client}"
    for batch in local_batches(rows, settings.batch_size, settings.count(len(rows)), seed):
        length = max(len(row.ids) for row in batch)
        ids = torch.tensor([[*row.ids, *[1] * (length - len(row.ids))] for row in batch])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in batch])
        labels = ids.clone()
        for index, row in enumerate(batch):
            labels[index, : row.scored_from] = -100
            labels[index, len(row.ids) :] = -100
        loss = peft(input_ids=ids, attention_mask=mask, labels=labels).loss
        for path in task.adapter:
            tail_a, tail_b = factor(path, "A")[start:], factor(path, "B")[:, start:]
            loss = loss + penalty_factor * torch.linalg.matrix_norm(tail_a) * torch.linalg.matrix_norm(tail_b)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
        optimizer.step()
    return {path: LoraPair(factor(path, "A").detach(), factor(path, "B").detach()) for path in task.adapter}


SETTINGS = {
    "adamw, clipped": LocalTraining(learning_rate=3e-3, batch_size=4, steps=4, clip_norm=0.5),
    "adamw, decay, epochs": LocalTraining(learning_rate=3e-3, batch_size=3, epochs=2, weight_decay=0.1, clip_norm=None),
    "sgd": LocalTraining(learning_rate=0.05, batch_size=4, steps=3, optimizer="sgd"),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_batched_cohort_equals_each_client_alone_and_a_plain_peft_loop(
    tiny: str, tiny_model: LoraModel, settings: LocalTraining
) -> None:
    tasks, rows = cohort(tiny_model)
    penalty = tail_penalty(tasks, gamma=0.7, penalty=0.2, min_rank=1)
    together = train_clients(tiny_model, tasks, rows, settings, penalty)
    for index, task in enumerate(tasks):
        update = together[index]
        assert isinstance(update, ClientUpdate)
        assert update.steps == settings.count(len(rows[index]))
        own = tail_penalty([task], gamma=0.7, penalty=0.2, min_rank=1)
        [alone] = train_clients(tiny_model, [task], [rows[index]], settings, own)
        assert isinstance(alone, ClientUpdate)
        assert relative(update.adapter, alone.adapter) <= rounding(settings)
        assert update.loss == pytest.approx(alone.loss, rel=1e-5)
        plain = alone_with_peft(tiny, task, rows[index], settings, 0.2, tiny_model.scaling)
        assert relative(update.adapter, plain) <= rounding(settings)
        assert relative(update.adapter, task.adapter) > 1e-3, "training must have moved the adapter"


@pytest.mark.parametrize("trains", ["A", "B"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_frozen_factors_over_a_folded_base_equal_a_plain_peft_loop(
    tiny: str, tiny_model: LoraModel, settings: LocalTraining, trains: Factors
) -> None:
    """The clip norm, decay and optimiser see the trained factors alone, and the base computes with what was folded."""
    generator = torch.Generator().manual_seed(5)
    folded = BaseDelta(
        {path: 0.3 * torch.randn(shape, generator=generator) for path, shape in tiny_model.shapes.items()}
    )
    tasks, rows = cohort(tiny_model)
    tasks = [replace(task, trains=trains, folded=folded) for task in tasks]
    penalty = tail_penalty(tasks, gamma=0.7, penalty=0.2, min_rank=1)
    together = train_clients(tiny_model, tasks, rows, settings, penalty)
    other = "AB".replace(trains, "")
    for index, task in enumerate(tasks):
        update = together[index]
        assert isinstance(update, ClientUpdate)
        plain = alone_with_peft(tiny, task, rows[index], settings, 0.2, tiny_model.scaling)
        assert relative(update.adapter, plain) <= rounding(settings)
        for path, pair in update.adapter.items():
            assert torch.equal(getattr(pair, other), getattr(task.adapter[path], other)), "frozen"
            assert not torch.equal(getattr(pair, trains), getattr(task.adapter[path], trains)), "trained"
        admit(update, {task.client: task}, (), AdmissionRule(settings))


def test_what_was_folded_counts_also_where_both_factors_are_trained(tiny: str, tiny_model: LoraModel) -> None:
    generator = torch.Generator().manual_seed(6)
    folded = BaseDelta(
        {path: 0.3 * torch.randn(shape, generator=generator) for path, shape in tiny_model.shapes.items()}
    )
    tasks, rows = cohort(tiny_model)
    settings = SETTINGS["adamw, clipped"]
    [without] = train_clients(tiny_model, tasks[:1], rows[:1], settings)
    task = replace(tasks[0], folded=folded)
    [update] = train_clients(tiny_model, [task], rows[:1], settings)
    assert isinstance(update, ClientUpdate)
    assert isinstance(without, ClientUpdate)
    plain = alone_with_peft(tiny, task, rows[0], settings, 0.0, tiny_model.scaling)
    assert relative(update.adapter, plain) <= rounding(settings)
    assert relative(update.adapter, without.adapter) > 1e-3


def test_a_batch_that_trains_different_things_is_refused(tiny_model: LoraModel) -> None:
    tasks, rows = cohort(tiny_model)
    zero = {path: torch.zeros(shape) for path, shape in tiny_model.shapes.items()}
    one = {path: torch.ones(shape) for path, shape in tiny_model.shapes.items()}
    settings = LocalTraining(steps=1)
    for changed in (replace(tasks[1], trains="B"), replace(tasks[1], folded=BaseDelta(one))):
        with pytest.raises(ValueError, match="train different factors or another base"):
            train_clients(tiny_model, [tasks[0], changed], rows[:2], settings)
    mixed = [replace(tasks[0], folded=BaseDelta(zero)), replace(tasks[1], folded=BaseDelta(one))]
    with pytest.raises(ValueError, match="train different factors or another base"):
        train_clients(tiny_model, mixed, rows[:2], settings)
    # Tasks that were made apart, as another engine makes them, fold the same into the base if the numbers are the same.
    alike = [replace(task, folded=BaseDelta({path: part.clone() for path, part in one.items()})) for task in tasks[:2]]
    answers = train_clients(tiny_model, alike, rows[:2], settings)
    assert all(isinstance(answer, ClientUpdate) for answer in answers)


def test_training_starts_from_b_zero_without_nan(tiny_model: LoraModel) -> None:
    tasks, rows = cohort(tiny_model)
    tasks = [TrainTask(t.client, 0, t.rank, _with_zero_b(t.adapter)) for t in tasks]
    penalty = tail_penalty(tasks, gamma=0.7, penalty=0.2, min_rank=1)
    for update in train_clients(tiny_model, tasks, rows, LocalTraining(steps=3), penalty):
        assert isinstance(update, ClientUpdate)
        assert all(bool(torch.isfinite(factor).all()) for pair in update.adapter.values() for factor in pair)
        assert any(float(pair.B.norm()) > 0 for pair in update.adapter.values())


def test_padded_slots_stay_exactly_zero(tiny_model: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at in the batch itself, before each client is cut to its rank."""
    import hetlora.training.local

    seen: list[Adapter] = []
    original = hetlora.training.local.unbatch

    def spy(adapter: Adapter, ranks: list[int]) -> list[dict[str, LoraPair]]:
        seen.append(adapter)
        return original(adapter, ranks)

    monkeypatch.setattr(hetlora.training.local, "unbatch", spy)
    tasks, rows = cohort(tiny_model)
    settings = LocalTraining(learning_rate=0.01, steps=20, batch_size=4, weight_decay=0.1)
    penalty = tail_penalty(tasks, gamma=0.7, penalty=0.2, min_rank=1)
    train_clients(tiny_model, tasks, rows, settings, penalty)
    [trained] = seen
    for index, task in enumerate(tasks):
        own = map_tensors(lambda factor, i=index: factor[i], trained)
        assert all(
            torch.equal(factor, torch.zeros_like(factor))
            for pair in tail(own, rank_of(task.rank, "any")).values()
            for factor in pair
        )
        assert all(bool(pair.A[: task.rank].abs().amin(dim=1).gt(0).all()) for pair in own.values())


def test_a_client_that_is_done_stands_still(tiny_model: LoraModel) -> None:
    """With epochs, client b does 2 steps and client c does 8; momentum and decay must not move b meanwhile."""
    tasks, rows = cohort(tiny_model)
    settings = LocalTraining(learning_rate=0.01, epochs=2, batch_size=3, weight_decay=0.3)
    steps = [settings.count(len(own)) for own in rows]
    assert len(set(steps)) > 2
    together = train_clients(tiny_model, tasks, rows, settings)
    [alone] = train_clients(tiny_model, [tasks[1]], [rows[1]], settings)
    assert isinstance(together[1], ClientUpdate)
    assert isinstance(alone, ClientUpdate)
    assert relative(together[1].adapter, alone.adapter) <= 3 * rounding(settings)  # its rate is three times as high


def test_the_base_is_shared_and_never_changes(tiny_model: LoraModel) -> None:
    before = {name: value.clone() for name, value in tiny_model.base.state_dict().items()}
    tasks, rows = cohort(tiny_model)
    received = [map_tensors(torch.clone, task.adapter) for task in tasks]
    train_clients(tiny_model, tasks, rows, LocalTraining(steps=3))
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.base.state_dict().items())
    assert not any("lora" in name for name in before), "no factor lives in the model"
    for task, copy in zip(tasks, received, strict=True):
        assert all(torch.equal(task.adapter[name].A, copy[name].A) for name in copy)


def test_the_order_of_modules_changes_no_bit(tiny_model: LoraModel) -> None:
    """Over the wire modules of equal shapes come side by side; q_proj and v_proj differ where keys and values are grouped."""
    tasks, rows = cohort(tiny_model)
    settings = LocalTraining(learning_rate=3e-3, batch_size=5, steps=4, clip_norm=0.01)
    by_shape = [replace(task, adapter=dict(sorted(task.adapter.items(), key=lambda m: m[1].B.shape))) for task in tasks]
    assert list(by_shape[0].adapter) != list(tasks[0].adapter)
    for index in range(len(tasks)):
        [one], [other] = (
            train_clients(tiny_model, [order[index]], [rows[index]], settings) for order in (tasks, by_shape)
        )
        assert isinstance(one, ClientUpdate)
        assert isinstance(other, ClientUpdate)
        for module, pair in one.adapter.items():
            assert all(map(torch.equal, pair, other.adapter[module])), module


@pytest.mark.parametrize("tokens", [1, 30, 60])
def test_how_many_passes_a_step_takes_does_not_change_it(tiny_model: LoraModel, tokens: int) -> None:
    tasks, rows = cohort(tiny_model)
    settings = LocalTraining(learning_rate=3e-3, batch_size=5, steps=3)
    penalty = tail_penalty(tasks, gamma=0.7, penalty=0.2, min_rank=1)
    whole = train_clients(tiny_model, tasks, rows, settings, penalty)
    divided = train_clients(tiny_model, tasks, rows, settings, penalty, tokens_a_pass=tokens)
    for one, other in zip(whole, divided, strict=True):
        assert isinstance(one, ClientUpdate)
        assert isinstance(other, ClientUpdate)
        assert relative(one.adapter, other.adapter) <= rounding(settings)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


@pytest.mark.parametrize("at", ["first step", "later step"])
def test_a_client_whose_data_give_nan_is_reported_and_leaves_the_others_as_they_were(tiny: str, at: str) -> None:
    """Token 200 has a NaN embedding, as a broken row of a vocabulary would; only client c has it."""
    healthy, broken = LoraModel(load_base(tiny)), LoraModel(load_base(tiny))
    with torch.no_grad():
        broken.base.get_input_embeddings().weight[200] = float("nan")
    tasks, rows = cohort(healthy)
    rows = [[Example(tuple(min(i, 199) for i in row.ids), row.scored_from) for row in own] for own in rows]
    settings = LocalTraining(learning_rate=3e-3, batch_size=3, steps=4)
    penalty = tail_penalty(tasks, gamma=0.7, penalty=0.2, min_rank=1)
    expected = train_clients(healthy, tasks, rows, settings, penalty)

    order = [row for batch in local_batches(rows[2], 3, 4, "0:3:c") for row in batch]
    victim = order[0] if at == "first step" else order[-1]
    rows[2] = [Example((200, *row.ids[1:]), row.scored_from) if row is victim else row for row in rows[2]]
    answers = train_clients(broken, tasks, rows, settings, penalty)
    failure = answers[2]
    assert isinstance(failure, ClientFailure)
    assert failure.client == "c"
    assert "nan" in failure.reason
    assert ("local step 1" in failure.reason) == (at == "first step")
    for index in (0, 1, 3):
        ours, theirs = answers[index], expected[index]
        assert isinstance(ours, ClientUpdate)
        assert isinstance(theirs, ClientUpdate)
        # Not bit by bit: once c is gone, the products have fewer rows, and may add up in another order.
        assert relative(ours.adapter, theirs.adapter) <= rounding(settings)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_a_client_without_rows_is_a_failure_and_harms_nobody(tiny_model: LoraModel) -> None:
    tasks, rows = cohort(tiny_model)
    answers = train_clients(tiny_model, tasks, [[], *rows[1:]], LocalTraining(steps=2))
    assert answers[0] == ClientFailure("a", "it has no training rows")
    assert all(isinstance(answer, ClientUpdate) for answer in answers[1:])


def test_local_batches_are_reshuffled_epochs_fixed_by_the_seed_alone() -> None:
    rows = [Example((index, index), 0) for index in range(10)]
    batches = list(local_batches(rows, 4, 6, "seed"))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = ([row for batch in epoch for row in batch] for epoch in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == rows
    assert first != second != rows
    assert batches == list(local_batches(rows, 4, 6, "seed"))
    assert batches != list(local_batches(rows, 4, 6, "other"))
    assert [len(batch) for batch in local_batches(rows[:3], 8, 2, "seed")] == [3, 3]


def _with_zero_b(adapter: Adapter) -> dict[str, LoraPair]:
    return {name: LoraPair(pair.A, torch.zeros_like(pair.B)) for name, pair in adapter.items()}
