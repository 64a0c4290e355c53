from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from d3etr.engine import system_load
from d3etr.engine.distributed import SingleProcess
from d3etr.engine.journal import Journal, read_journal
from d3etr.engine.metric_logger import MetricLogger, TrainingDiverged

CPU = torch.device("cpu")


def losses(a: float, b: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(a), "b": torch.tensor(b)}


def empty(folder: Path, context: SingleProcess | None = None) -> MetricLogger:
    optimiser = AdamW([torch.ones(1)], lr=0.5)
    return MetricLogger(Journal(folder / "journal"), context or SingleProcess(CPU), optimiser)


def filled(log: MetricLogger, *rows: tuple[float, float]) -> MetricLogger:
    for number, row in enumerate(rows):
        log.add(100 + number, losses(*row), (number * 10, number * 10 + 1))
        log.add_norm(torch.tensor(1.0))
    return log


def test_the_load_of_the_machine_is_recorded_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(system_load.time, "monotonic", lambda: now[0])
    optimiser, journal = AdamW([torch.ones(1)], lr=0.5), Journal(tmp_path / "journal")
    load = system_load.SystemLoad(CPU)
    log = MetricLogger(journal, SingleProcess(CPU), optimiser, load=load)
    for now[0] in (1.0, 10.0, 11.0):
        filled(log, (1.0, 2.0)).write(101)
    found = [
        {name for name in record["metrics"] if name.startswith("system/")}
        for record in read_journal(tmp_path / "journal")
    ]
    names = ("cpu_utilization_percentage", "system_memory_usage_megabytes")
    assert found[0] == found[2] == set() and {f"system/{name}" for name in names} <= found[1]
    assert not any(name.startswith("system/") for name in log.last), "summaries have none"


def test_micro_batches_of_a_step_add_up_and_steps_are_averaged(tmp_path: Path) -> None:
    log = empty(tmp_path)
    log.add(4, losses(1, 2), (1,))
    assert float(log.add(4, losses(10, 20), (2,))) == 30
    log.add_norm(torch.tensor(2.0))
    log.add(5, losses(3, 4), (3,))
    log.add_norm(torch.tensor(4.0))
    log.write(6)
    log.write(6)  # nothing new
    [record] = read_journal(tmp_path / "journal")
    metrics = record["metrics"]
    assert (metrics["train/a"], metrics["train/b"], metrics["train/loss"]) == (7, 13, 20)
    assert metrics["optimiser/gradient_norm"] == 3 and metrics["optimiser/learning_rate"] == 0.5
    assert record["step"] == 6 and metrics == log.last


def test_a_loss_that_not_every_step_has_is_averaged_over_those_that_have_it(tmp_path: Path) -> None:
    log = empty(tmp_path)
    for step, row in enumerate([{"a": 1.0, "b": 6.0}, {"a": 2.0}, {"a": 3.0}, {"a": 2.0}]):
        log.add(step, {name: torch.tensor(value) for name, value in row.items()}, (step,))
        log.add_norm(torch.tensor(1.0))
    log.write(4)
    assert (log.last["train/a"], log.last["train/b"], log.last["train/loss"]) == (2, 6, 3.5)
    log.add(4, {"a": torch.tensor(1.0)}, (4,))
    log.add_norm(torch.tensor(1.0))
    log.write(5)
    assert "train/b" not in log.last


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_step_is_named_with_its_losses_and_images(tmp_path: Path, bad: float) -> None:
    log = filled(empty(tmp_path), (1, 2), (3, bad), (bad, bad))
    with pytest.raises(TrainingDiverged) as caught:
        log.write(103)
    assert (caught.value.step, caught.value.what) == (101, ("b",))
    assert caught.value.image_ids == (10, 11)
    assert "optimiser step 101, image ids 10, 11" in str(caught.value)
    assert read_journal(tmp_path / "journal") == []


def test_another_workers_images_are_not_invented(tmp_path: Path) -> None:
    class Spoilt(SingleProcess):
        def all_reduce(self, tensor: Tensor) -> Tensor:
            return tensor + torch.tensor([[0.0, 0.0], [float("nan"), 0.0]])

    log = filled(empty(tmp_path, Spoilt(CPU)), (1, 2), (3, 4))
    with pytest.raises(TrainingDiverged, match="of another worker"):
        log.write(102)


def test_a_gradient_that_is_not_finite_counts_too(tmp_path: Path) -> None:
    log = filled(empty(tmp_path), (1, 2), (3, 4))
    log.add_norm(torch.tensor(float("inf")))
    with pytest.raises(TrainingDiverged, match="the gradient's norm became NaN"):
        log.write(102)


def test_bad_outputs_are_traced_to_the_loss_that_was_bad_first(tmp_path: Path) -> None:
    log = filled(empty(tmp_path), (1, 2))
    error = log.divergence(101, (20,), "why")
    assert (error.step, error.image_ids) == (101, (20,))
    log.add(101, losses(float("nan"), 4), (10, 11))
    error = log.divergence(102, (20,), "why")
    assert (error.step, error.what, error.image_ids) == (101, ("a",), (10, 11))


def test_losses_may_not_change_their_names(tmp_path: Path) -> None:
    log = filled(empty(tmp_path), (1, 2))
    log.add(101, {"a": torch.tensor(1.0)}, ())  # a step may have less
    for step, name in ((102, "c"), (101, "b")):
        with pytest.raises(ValueError, match="losses changed"):
            log.add(step, {name: torch.tensor(1.0)}, ())
