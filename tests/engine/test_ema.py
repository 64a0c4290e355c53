import pytest
import torch
from torch import nn

from d3etr.detectors.batch_norm import BatchNorm2d
from d3etr.engine.ema import WeightAverage


def module(value: float) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    nn.init.constant_(linear.weight, value)
    return linear


def test_average_follows_its_recursion_with_a_growing_decay() -> None:
    linear = module(0.0)
    average = WeightAverage(linear, decay=0.15)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, 4.0]):
        nn.init.constant_(linear.weight, value)
        average.update(step)
        decay = min(0.15, (1 + step) / (10 + step))  # 0.1, 0.15, 0.15
        expected = decay * expected + (1 - decay) * value
    assert float(average.state_dict()["weight"]) == pytest.approx(expected)


def test_applied_exchanges_the_weights_and_puts_them_back() -> None:
    linear = module(1.0)
    average = WeightAverage(linear, decay=0.5)
    nn.init.constant_(linear.weight, 3.0)
    with average.applied():
        assert linear.weight.item() == 1.0
    assert linear.weight.item() == 3.0
    assert float(average.state_dict()["weight"]) == 1.0


def test_weights_come_back_when_evaluation_fails() -> None:
    linear = module(1.0)
    average = WeightAverage(linear, decay=0.5)
    nn.init.constant_(linear.weight, 3.0)
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert linear.weight.item() == 3.0


def test_saved_averages_are_taken_over_and_foreign_ones_refused() -> None:
    average = WeightAverage(module(1.0), decay=0.5)
    average.load_state_dict({"weight": torch.full((1, 1), 5.0)})
    assert float(average.state_dict()["weight"]) == 5.0
    with pytest.raises(ValueError, match="other"):
        average.load_state_dict({"other": torch.zeros(1, 1)})


def test_frozen_weights_have_no_average() -> None:
    model = nn.Sequential(module(1.0), module(2.0))
    model[0].requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    assert average.state_dict().keys() == {"1.weight"}
    nn.init.constant_(model[0].weight, 7.0)  # nothing that is frozen is exchanged either
    nn.init.constant_(model[1].weight, 3.0)
    with average.applied():
        assert (model[0].weight.item(), model[1].weight.item()) == (7.0, 2.0)
    assert model[1].weight.item() == 3.0


def test_checkpoints_that_averaged_frozen_weights_still_fit() -> None:
    model = nn.Sequential(module(1.0), module(2.0))
    model[0].requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    average.load_state_dict({"0.weight": torch.zeros(1, 1), "1.weight": torch.full((1, 1), 5.0)})
    assert float(average.state_dict()["1.weight"]) == 5.0
    with pytest.raises(ValueError, match=r"1\.weight"):
        average.load_state_dict({"0.weight": torch.zeros(1, 1)})


def test_statistics_of_trained_batch_norm_are_averaged_as_its_weights_are() -> None:
    model = nn.Sequential(BatchNorm2d(1), BatchNorm2d(1))
    model[1].requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    assert {"0.running_mean", "0.running_var"} == {
        name for name in average.state_dict() if "running" in name
    }
    model.train()(torch.tensor([0.0, 20.0]).view(2, 1, 1, 1))  # mean 10, unbiased variance 200
    assert model[0].running_mean.item() == pytest.approx(1.0)
    average.update(0)  # decay 0.1
    with average.applied():
        assert model[0].running_mean.item() == pytest.approx(0.9)
        assert model[0].running_var.item() == pytest.approx(0.1 + 0.9 * (0.9 + 20))
        assert model[1].running_mean.item() == 0.0
    assert model[0].running_mean.item() == pytest.approx(1.0)
    saved = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    another = WeightAverage(model, decay=0.5)
    another.load_state_dict(saved)
    with another.applied():
        assert model[0].running_mean.item() == pytest.approx(0.9)
