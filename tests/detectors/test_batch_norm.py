"""Batch norm that is trained: against PyTorch's, by one worker and by two processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn

from d3etr.detectors.batch_norm import BatchNorm2d, trained_statistics

CHANNELS = 3
SHARES = (3, 1)
"""Images of each worker."""
CASES = {
    "near": (0.0, torch.float32),
    "far": (300.0, torch.float32),
    "bfloat16": (0.0, torch.bfloat16),
}
"""What is added to every value, and what the values are held in."""


def torchs(dtype: torch.dtype = torch.float32) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -3.0]))
        norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
        norm.running_var.copy_(torch.tensor([1.0, 2.0, 3.0]))
    return norm


def ours(dtype: torch.dtype = torch.float32) -> BatchNorm2d:
    norm = BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3).to(dtype)
    norm.load_state_dict(torchs(dtype).state_dict())
    return norm


def batch(offset: float) -> tuple[Tensor, Tensor]:
    """Images, each of another mean and spread, and what their outputs are weighed with."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SHARES), CHANNELS, 5, 4, generator=generator)
    images = torch.arange(1.0, 1 + sum(SHARES))[:, None, None, None]
    return x * images + images + offset, torch.randn(x.shape, generator=generator)


def run(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Two steps: outputs, gradients of the last, and what the norm keeps."""
    norm(x.detach() / 2)
    x = x.detach().requires_grad_()
    output = norm(x)
    (output.square() * weights).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return found | {
        name: buffer.clone() for name, buffer in norm.named_buffers() if "num" not in name
    }


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for case, (offset, dtype) in CASES.items():
        x, weights = (part.split(SHARES)[rank].to(dtype) for part in batch(offset))
        found[case] = run(ours(), x, weights)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes found in each case."""
    folder = tmp_path_factory.mktemp("workers")
    processes.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("case", "atol"), [("near", 1e-5), ("far", 1e-3)])
def test_two_workers_equal_one_with_the_joined_batch(
    case: str, atol: float, of_two: list[dict[str, dict[str, Tensor]]]
) -> None:
    """Also where the mean is far larger than the spread."""
    first, second = (found[case] for found in of_two)
    offset, _ = CASES[case]
    expected = run(torchs(torch.float64), *(part.double() for part in batch(offset)))
    for name in ("output", "x"):
        joined = torch.cat([first[name], second[name]]).double()
        torch.testing.assert_close(joined, expected[name], atol=atol, rtol=1e-5)
    for name in ("weight", "bias"):  # each worker has its part of the sum
        joined = (first[name] + second[name]).double()
        torch.testing.assert_close(joined, expected[name], atol=atol, rtol=1e-5)
    for name in ("running_mean", "running_var"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name].double(), expected[name], atol=atol, rtol=1e-5)


def test_two_workers_of_lower_precision_keep_float32_statistics(
    of_two: list[dict[str, dict[str, Tensor]]],
) -> None:
    found = [part["bfloat16"] for part in of_two]
    expected = run(torchs(), *(part.bfloat16().float() for part in batch(0.0)))
    for part in found:
        assert part["output"].dtype == part["x"].dtype == torch.bfloat16
        torch.testing.assert_close(part["running_mean"], expected["running_mean"])
        torch.testing.assert_close(part["running_var"], expected["running_var"])
    joined = torch.cat([part["output"].float() for part in found])
    torch.testing.assert_close(joined, expected["output"], atol=0.05, rtol=0.01)


def test_one_worker_equals_pytorchs() -> None:
    x, weights = batch(0.0)
    theirs, mine = torchs(), ours()
    expected, found = run(theirs, x, weights), run(mine, x, weights)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(mine.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_right_in_any_layout(images: int, training: bool) -> None:
    """Of tokens [B, S, C], whose gradient is stored channel by channel, PyTorch's are not."""
    norm, x = BatchNorm2d(16).train(training), torch.randn(images, 16, 3, 4)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    expected = nn.functional.batch_norm(x, torch.zeros(16), torch.ones(16), training=training)
    x = x.requires_grad_(True)
    above = torch.randn(images, 12, 16).transpose(1, 2).unflatten(2, (3, 4))
    norm(x).backward(above)
    assert norm.bias.grad is not None and norm.weight.grad is not None
    torch.testing.assert_close(norm.bias.grad, above.sum((0, 2, 3)))
    torch.testing.assert_close(norm.weight.grad, (above * expected).sum((0, 2, 3)))


def test_what_is_frozen_keeps_its_statistics_in_training() -> None:
    x, _ = batch(0.0)
    norm = ours().train().requires_grad_(False)
    assert torch.equal(norm(x), torchs().eval()(x))
    assert torch.equal(norm.running_mean, torch.tensor([0.1, 0.2, 0.3]))


def test_names_are_those_of_frozen_norms() -> None:
    """Files of either kind fit both; PyTorch's counter is passed over."""
    norm = ours()
    assert [*norm.state_dict()] == ["weight", "bias", "running_mean", "running_var"]
    network = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), ours())
    state = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), torchs()).state_dict()
    assert "1.num_batches_tracked" in state
    network.load_state_dict(state)
    assert "1.num_batches_tracked" in state


def test_trained_statistics_are_those_that_training_changes() -> None:
    network = nn.Sequential(ours(), nn.Sequential(ours(), nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    network[0].requires_grad_(False)
    found = trained_statistics(network)
    assert {*found} == {"1.0.running_mean", "1.0.running_var"}
    before = {name: buffer.clone() for name, buffer in found.items()}
    network(batch(0.0)[0])
    assert all(not torch.equal(before[name], buffer) for name, buffer in found.items())
    assert {*trained_statistics(ours())} == {"running_mean", "running_var"}
