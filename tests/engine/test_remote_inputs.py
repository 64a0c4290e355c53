"""Runs whose data and weights are on a storage: the same as runs from paths."""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from s3_store import s3_store
from test_workers import start
from tiny_runs import DETECTOR, MakeConfig, losses, records, write_teacher
from torch import Tensor

from d3etr.config.data import DataConfig, SplitConfig
from d3etr.config.location import Url
from d3etr.config.tree import Config
from d3etr.data.digit_scenes import write_digit_scenes
from d3etr.detectors.build import build_detector
from d3etr.detectors.weights import file_digest, write_tensors
from d3etr.engine.distributed import SingleProcess, run_on_all_workers
from d3etr.engine.provenance import (
    INPUTS_KEY,
    Inputs,
    ensure_same_everywhere,
    remote_files,
    remote_folders,
    weight_digests,
)
from d3etr.engine.run import run_training
from d3etr.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("D3ETR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shared(tmp_path: Path, scenes: DataConfig) -> Path:
    """A folder with everything that a run reads."""
    folder = tmp_path / "shared"
    folder.mkdir()
    assert scenes.digit_scenes is not None
    train = write_digit_scenes(scenes.digit_scenes)["train"]
    assert isinstance(train.images, Path)
    (folder / "scenes").symlink_to(train.images.parent.parent)
    write_teacher(folder / "teacher.safetensors", scenes)
    torch.manual_seed(3)
    backbone = build_detector(DETECTOR, 10).backbone.state_dict()
    write_tensors(folder / "backbone.safetensors", backbone, {})
    return folder


def placed(config: Config, root: str) -> Config:
    """The same run with everything that it reads below ``root``."""
    splits = {
        name: SplitConfig.model_validate(
            {
                "images": f"{root}/scenes/images/{name}",
                "annotations": f"{root}/scenes/annotations/{name}.json",
            }
        )
        for name in ("train", "validation", "test")
    }
    tree = config.model_dump(mode="json")
    tree["data"] |= {name: split.model_dump(mode="json") for name, split in splits.items()}
    tree["data"]["digit_scenes"] = None
    tree["teacher"]["weights"] = f"{root}/teacher.safetensors"
    tree["student"]["backbone_weights"] = f"{root}/backbone.safetensors"
    return Config.model_validate_json(json.dumps(tree))


@contextmanager
def over_http(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder's URL, and a list that gets the path of every GET."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def assert_same_result(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference)
    assert records(run_dir, "evaluation") == records(reference, "evaluation")
    ours, theirs = (
        json.loads((folder / "summary.json").read_text()) for folder in (run_dir, reference)
    )
    assert ours[INPUTS_KEY] == theirs[INPUTS_KEY]
    assert set(ours[INPUTS_KEY]) == {
        "the training data",
        "the training images",
        "the validation data",
        "the validation images",
        "the test data",
        "the test images",
        "teacher.weights",
        "student.backbone_weights",
    }
    assert ours["test/mAP"] == theirs["test/mAP"]


@pytest.mark.slow
def test_two_workers_train_from_urls_as_from_paths_and_fetch_once(
    make_config: MakeConfig, shared: Path, tmp_path: Path, cache: Path
) -> None:
    config = make_config(optimisation={"epochs": 1}, evaluation={"test": True})
    with over_http(shared) as (root, asked):
        for name, place in (("paths", str(shared)), ("urls", root)):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            workers = [
                start(placed(config, place), tmp_path / name, rank, port) for rank in range(2)
            ]
            assert [worker.wait(timeout=180) for worker in workers] == [0, 0]
            assert cache.exists() == (name == "urls")
        fetched = [path for path in asked if not path.endswith("/")]
        assert sorted(fetched) == sorted(set(fetched))
        assert len(fetched) == 24 + 7 + 6 + 3 + 2
    assert_same_result(tmp_path / "urls", tmp_path / "paths")


@pytest.mark.slow
def test_a_run_from_s3_is_the_run_from_paths(
    make_config: MakeConfig, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_store(monkeypatch, "bucket") as files:
        for file in (path for path in shared.glob("**/*") if path.is_file()):
            files.put_file(str(file), f"bucket/{file.relative_to(shared)}")
        for path in (shared / "scenes").glob("*/**/*.*"):
            files.put_file(str(path), f"bucket/{path.relative_to(shared)}")
        config = make_config(optimisation={"epochs": 1}, evaluation={"test": True})
        for name, place in (("paths", str(shared)), ("urls", "s3://bucket")):
            context = SingleProcess(torch.device("cpu"))
            run_training(placed(config, place), tmp_path / name, context)
    assert_same_result(tmp_path / "urls", tmp_path / "paths")


@pytest.fixture
def in_memory(shared: Path) -> Iterator[str]:
    """What ``shared`` holds, on ``memory://``."""
    files = fsspec.filesystem("memory")
    for name in ("teacher.safetensors", "backbone.safetensors"):
        files.pipe(f"/shared/{name}", (shared / name).read_bytes())
    yield "memory://shared"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_what_a_run_reads_from_urls_is_known(make_config: MakeConfig) -> None:
    config = placed(make_config(), "s3://bucket")
    assert remote_files(config) == {
        "data.train.annotations": Url("s3://bucket/scenes/annotations/train.json"),
        "data.validation.annotations": Url("s3://bucket/scenes/annotations/validation.json"),
        "teacher.weights": Url("s3://bucket/teacher.safetensors"),
        "student.backbone_weights": Url("s3://bucket/backbone.safetensors"),
    }
    assert set(remote_folders(config)) == {"data.train.images", "data.validation.images"}
    assert not remote_files(make_config()) and not remote_folders(make_config())


def test_weights_have_the_same_digest_wherever_they_are(
    make_config: MakeConfig, shared: Path, in_memory: str
) -> None:
    digests = weight_digests(placed(make_config(), in_memory))
    assert digests == weight_digests(placed(make_config(), str(shared)))
    assert digests["teacher.weights"] == file_digest(shared / "teacher.safetensors")


def test_a_result_outlives_weights_on_a_storage_but_not_others_in_their_place(
    make_config: MakeConfig, in_memory: str, tmp_path: Path
) -> None:
    config = placed(make_config(), in_memory)
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({INPUTS_KEY: weight_digests(config)}))
    Inputs().ensure_result_is_of(config, tmp_path)
    files = fsspec.filesystem("memory")
    files.pipe("/shared/teacher.safetensors", b"another teacher")
    with pytest.raises(UserError, match=r"teacher\.weights is not what the run"):
        Inputs().ensure_result_is_of(config, tmp_path)
    files.rm("/shared/teacher.safetensors")
    Inputs().ensure_result_is_of(config, tmp_path)


class Peers:
    """Workers in threads that add up numbers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=20)
        self.values = [torch.zeros(0)] * count


class Peer(SingleProcess):
    """One of them."""

    def __init__(self, peers: Peers, rank: int) -> None:
        super().__init__(torch.device("cpu"))
        self.peers, self.rank, self.world_size = peers, rank, peers.count

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.peers.values[self.rank] = tensor.clone()
        self.peers.barrier.wait()
        total = torch.stack(self.peers.values).sum(0)
        self.peers.barrier.wait()
        return total


def test_workers_go_on_when_the_last_one_has_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3etr.engine.distributed.POLL_SECONDS", 0.01)
    peers, slow, order = Peers(2), threading.Event(), list[str]()

    def work(rank: int) -> None:
        def fetch() -> int:
            if rank == 1:
                slow.wait(10)
            order.append(f"{rank} fetched")
            return 10 + rank

        assert run_on_all_workers(fetch, Peer(peers, rank)) == 10 + rank
        order.append("on")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    while order != ["0 fetched"]:
        threads[0].join(0.01)
    threads[0].join(0.1)
    assert order == ["0 fetched"], "it waits"
    slow.set()
    for thread in threads:
        thread.join(20)
    assert order == ["0 fetched", "1 fetched", "on", "on"]


def test_a_worker_without_its_data_ends_with_the_reason() -> None:
    peers = Peers(1)
    peers.count = 2
    peers.values = [torch.zeros(()), torch.zeros(())]

    def fetch() -> None:
        raise UserError("no such bucket")

    with pytest.raises(UserError, match="no such bucket"):
        run_on_all_workers(fetch, Peer(peers, 0))


class Gathering(SingleProcess):
    """Rank 0, which gets what the others are said to send."""

    def __init__(self, others: Sequence[Tensor]) -> None:
        super().__init__(torch.device("cpu"))
        self.others = others

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, *self.others]


def test_machines_that_read_different_files_are_noticed() -> None:
    digests = {"the training data": "ab" * 32, "teacher.weights": "cd" * 32}
    same = torch.tensor([[int(digests[name][:15], 16) for name in sorted(digests)]])
    ensure_same_everywhere(digests, Gathering([same, same]))
    other = same.clone()
    other[0, 1] += 1
    with pytest.raises(UserError, match="do not read the same files: the training data differ"):
        ensure_same_everywhere(digests, Gathering([same, other]))
