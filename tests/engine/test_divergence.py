import pytest
import torch
from torch import Tensor

from d3etr.engine.divergence import LossWindow, TrainingDiverged


def losses(a: float, b: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(a), "b": torch.tensor(b)}


def filled(*rows: tuple[float, float]) -> LossWindow:
    window = LossWindow()
    for number, row in enumerate(rows):
        window.add(100 + number, losses(*row), (number * 10, number * 10 + 1))
        window.add_norm(torch.tensor(1.0))
    return window


def test_micro_batches_of_a_step_add_up() -> None:
    window = LossWindow()
    window.add(4, losses(1, 2), (1,))
    total = window.add(4, losses(10, 20), (2,))
    window.add(5, losses(3, 4), (3,))
    assert float(total) == 30
    assert window.rows().tolist() == [[11, 22], [3, 4]]
    assert len(window) == 2


def test_finite_windows_pass() -> None:
    window = filled((1, 2), (3, 4))
    window.check(window.rows(), window.norms())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_step_is_named_with_its_losses_and_images(bad: float) -> None:
    window = filled((1, 2), (3, bad), (bad, bad))
    with pytest.raises(TrainingDiverged) as caught:
        window.check(window.rows(), window.norms())
    assert (caught.value.step, caught.value.what) == (101, ("b",))
    assert caught.value.image_ids == (10, 11)
    assert "optimiser step 101, image ids 10, 11" in str(caught.value)


def test_another_workers_images_are_not_invented() -> None:
    window = filled((1, 2), (3, 4))
    summed = window.rows() + torch.tensor([[0.0, 0.0], [float("nan"), 0.0]])
    with pytest.raises(TrainingDiverged, match="of another worker"):
        window.check(summed, window.norms())


def test_a_gradient_that_is_not_finite_counts_too() -> None:
    window = filled((1, 2), (3, 4))
    with pytest.raises(TrainingDiverged, match="the gradient's norm became NaN"):
        window.check(window.rows(), torch.tensor([1.0, float("inf")]))


def test_bad_outputs_are_traced_to_the_loss_that_was_bad_first() -> None:
    error = filled((1, 2), (float("nan"), 4)).explain(102, (20,), "why")
    assert (error.step, error.what, error.image_ids) == (101, ("a",), (10, 11))
    error = filled((1, 2)).explain(101, (20,), "why")
    assert (error.step, error.image_ids) == (101, (20,))


def test_losses_may_not_change_their_names() -> None:
    window = filled((1, 2))
    with pytest.raises(ValueError, match="losses changed"):
        window.add(101, {"a": torch.tensor(1.0)}, ())
