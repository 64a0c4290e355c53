from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from d3etr.engine.checkpoints import BackgroundSaver, CheckpointStore, State, snapshot
from d3etr.errors import UserError


class HeldStore(CheckpointStore):
    """Writes when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep=2)
        self.let, self.problem = Event(), ""

    def save(self, step: int, state: State, weights: Path | None = None) -> Path:
        assert self.let.wait(60)
        if self.problem:
            raise UserError(self.problem)
        return super().save(step, state, weights)


@pytest.fixture
def store(tmp_path: Path) -> HeldStore:
    return HeldStore(tmp_path / "checkpoints")


@pytest.fixture
def saver(store: HeldStore) -> Iterator[BackgroundSaver]:
    saver = BackgroundSaver(store)
    yield saver
    store.let.set()
    saver.close()


def test_a_checkpoint_is_of_the_moment_whenever_it_is_written(
    store: HeldStore, saver: BackgroundSaver, tmp_path: Path
) -> None:
    weights, better = tmp_path / "weights", tmp_path / "better"
    weights.write_bytes(b"of the moment")
    state: State = {"model": {"w": torch.zeros(3)}, "steps": [torch.ones(1)], "kept": {"step": 1}}
    saver.save(1, state, weights)
    state["model"]["w"].fill_(7)
    state["steps"][0].fill_(7)
    state["kept"]["step"] = 2
    better.write_bytes(b"better")
    better.replace(weights)
    assert store.newest() is None, "it has waited for the disk"
    store.let.set()
    saver.wait()
    newest = store.newest()
    assert newest is not None and newest.weights is not None
    assert newest.weights.read_bytes() == b"of the moment"
    assert [file.name for file in store.folder.iterdir()] == ["step-00000001"]
    found = newest.state()
    assert not found["model"]["w"].any() and found["steps"][0] == 1 and found["kept"]["step"] == 1


def test_the_next_checkpoint_waits_for_the_last_one(
    store: HeldStore, saver: BackgroundSaver
) -> None:
    store.let.set()
    for step in (1, 2, 3):
        saver.save(step, {"step": step})
    saver.wait()
    assert sorted(f.name for f in store.folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_what_went_wrong_beside_is_raised_by_the_next_call(
    store: HeldStore, saver: BackgroundSaver
) -> None:
    store.problem = "no space left"
    saver.save(1, {"step": 1})
    saver.check()  # nothing is known yet
    store.let.set()
    with pytest.raises(UserError, match="no space left"):
        while True:
            saver.check()
    store.problem = ""
    saver.save(2, {"step": 2})
    saver.wait()
    newest = store.newest()
    assert newest is not None and newest.step == 2


@pytest.mark.parametrize("method", ["wait", "close", "save"])
def test_no_way_out_is_silent(store: HeldStore, saver: BackgroundSaver, method: str) -> None:
    store.problem = "no space left"
    saver.save(1, {"step": 1})
    store.let.set()
    with pytest.raises(UserError, match="no space left"):
        getattr(saver, method)(*([2, {}] if method == "save" else []))


def test_a_snapshot_keeps_order_layout_and_versions_and_shares_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))
    state = module.state_dict()
    found = snapshot(state)
    assert type(found) is type(state) and [*found] == [*state]
    assert found._metadata == state._metadata
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor) and found[name].stride() == tensor.stride()
        assert found[name].data_ptr() != tensor.data_ptr()
    assert snapshot((1, [None, "word"])) == (1, [None, "word"])
