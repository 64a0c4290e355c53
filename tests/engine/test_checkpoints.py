import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from d3etr.engine import checkpoints
from d3etr.engine.checkpoints import MANIFEST, STATE_FILE, WEIGHTS_FILE, CheckpointStore, State
from d3etr.errors import UserError


def state(step: int) -> State:
    return {"step": step, "model": {"w": torch.arange(step, dtype=torch.float32)}, "kept": None}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_the_newest_checkpoint_comes_back_as_it_was(store: CheckpointStore) -> None:
    assert store.newest() is None
    store.save(3, state(3))
    store.save(10, state(10))
    newest = store.newest()
    assert newest is not None and newest.step == 10 and newest.weights is None
    assert torch.equal(newest.state()["model"]["w"], torch.arange(10.0))


def test_only_the_newest_stay(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        store.save(step, state(step))
    assert sorted(f.name for f in store.folder.iterdir()) == ["step-00000002", "step-00000003"]


def test_the_weights_of_the_moment_are_kept_beside(store: CheckpointStore, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"first")
    store.save(1, state(1), weights)
    replacement = tmp_path / "new"
    replacement.write_bytes(b"second")
    replacement.replace(weights)
    newest = store.newest()
    assert newest is not None and newest.weights is not None
    assert newest.weights.read_bytes() == b"first"


@pytest.mark.parametrize("damaged", [STATE_FILE, MANIFEST, WEIGHTS_FILE])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, damaged: str, how: str
) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, warn=warnings.append)
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    store.save(1, state(1), weights)
    weights.unlink()  # a new file, as renaming makes one
    weights.write_bytes(b"better weights")
    path = store.save(2, state(2), weights) / damaged
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        path.write_bytes(content[:10] + bytes([content[10] ^ 1]) + content[11:])
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert len(warnings) == 1 and str(path.parent) in warnings[0]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", '{"sha256": {}}', '{"sha256": []}', '{"sha256": 3}', "[" * 9999]
)
def test_a_manifest_without_the_states_checksum_verifies_nothing(
    tmp_path: Path, content: str
) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=2, warn=warnings.append)
    store.save(1, state(1))
    (store.save(2, state(2)) / MANIFEST).write_text(content)
    newest = store.newest()
    assert newest is not None and newest.step == 1
    assert len(warnings) == 1 and "step-00000002" in warnings[0] and MANIFEST in warnings[0]


def test_nothing_but_damaged_checkpoints_is_an_error(store: CheckpointStore) -> None:
    (store.save(1, state(1)) / STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        store.newest()


def test_nothing_is_executed_when_a_checkpoint_is_read(store: CheckpointStore) -> None:
    folder = store.save(1, state(1))

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (shutil.rmtree, (str(folder),))

    torch.save({"step": Evil()}, folder / STATE_FILE)
    manifest = {"step": 1, "sha256": {STATE_FILE: checkpoints.sha256(folder / STATE_FILE)}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    newest = store.newest()
    assert newest is not None
    with pytest.raises(Exception, match=r"weights_only|WeightsUnpickler"):
        newest.state()
    assert folder.exists()


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(1, state(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(UserError, match="no space left: the checkpoint of step 2"):
        store.save(2, state(2))
    assert [f.name for f in store.folder.iterdir()] == ["step-00000001"]
    newest = store.newest()
    assert newest is not None and newest.step == 1


def test_leftovers_of_a_killed_run_are_removed(store: CheckpointStore) -> None:
    store.save(1, state(1))
    (store.folder / ".step-00000002.abc.tmp").mkdir()
    (store.folder / ".step-00000003.abc.tmp").touch()
    store.remove_leftovers()
    assert [f.name for f in store.folder.iterdir()] == ["step-00000001"]


def test_a_worker_that_does_not_see_the_checkpoint_says_what_is_expected(
    store: CheckpointStore,
) -> None:
    with pytest.raises(UserError, match="storage that all nodes share"):
        store.at(5)
