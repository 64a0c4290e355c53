import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from coco_files import annotation

from d3etr.config.data import AugmentationConfig, DataConfig, PreprocessingConfig
from d3etr.data.loading import EpochLoader, EvaluationBatches
from d3etr.data.splits import read_split
from d3etr.errors import UserError

SIZES = [(40, 30), (30, 40), (36, 36), (48, 30), (30, 44)] * 5


@pytest.fixture
def config(write_split):
    boxes = [annotation(n, n, n % 2 * 7, [4, 4, 16, 12]) for n in range(1, 21)]
    return write_split(SIZES, boxes)


@pytest.fixture
def split(config):
    return read_split("train", config)


def _data(config, **changes) -> DataConfig:
    settings = {
        "train": config,
        "validation": config,
        "workers": 0,
        "preprocessing": PreprocessingConfig(shortest_side=24, longest_side=48),
        "augmentation": AugmentationConfig(
            crop=0.3, shortest_sides=(20, 24), colour_jitter=0.2, channel_permutation=0.5
        ),
    }
    return DataConfig(**(settings | changes))


def _loader(split, data, *, rank=0, world_size=1, parts=1) -> EpochLoader:
    return EpochLoader(
        split,
        data,
        batch_size=8,
        parts=parts,
        rank=rank,
        world_size=world_size,
        seed=5,
    )


def _images(step) -> dict[int, tuple]:
    """What a step shows: image id -> padded pixels, padding, objects."""
    found = {}
    for images, targets in step:
        padding = images.padding
        if padding is None:
            padding = torch.zeros_like(images.pixels[:, 0], dtype=torch.bool)
        for row, number in enumerate(targets.image_ids):
            count = targets.counts[row]
            objects = targets.labels[row, :count], targets.boxes_cxcywh[row, :count]
            found[number] = (images.pixels[row], padding[row], *objects)
    return found


def _same(first: dict[int, tuple], second: dict[int, tuple]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True)
    )


@pytest.mark.parametrize(
    ("world_size", "parts", "shares"),
    [
        (2, 2, [1, 1]),
        (1, 2, [2]),
        (2, 4, [2, 2]),
        (3, 4, [1, 1, 2]),
        (3, 8, [2, 3, 3]),
        (1, 8, [8]),
    ],
)
def test_a_step_shows_the_same_however_it_is_cut(config, split, world_size, parts, shares):
    data = _data(config)
    whole = [_images(step) for step in _loader(split, data).epoch(1)]
    loaders = [
        _loader(split, data, rank=rank, world_size=world_size, parts=parts)
        for rank in range(world_size)
    ]
    steps = list(zip(*(loader.epoch(1) for loader in loaders), strict=True))
    assert len(steps) == len(whole) == 3
    for expected, step in zip(whole, steps, strict=True):
        assert [len(own) for own in step] == shares
        assert _same(expected, _images(itertools.chain(*step)))


def test_epochs_differ_and_repeat_exactly(config, split):
    loader = _loader(split, _data(config))
    first, again, other = ([_images(step) for step in loader.epoch(epoch)] for epoch in (0, 0, 1))
    assert all(_same(a, b) for a, b in zip(first, again, strict=True))
    assert not any(_same(a, b) for a, b in zip(first, other, strict=True))


def test_a_resumed_epoch_goes_on_without_decoding_what_was_seen(config, split, monkeypatch):
    loader = _loader(split, _data(config))
    whole = [_images(step) for step in loader.epoch(2)]
    decoded = []
    resumed = _loader(split, _data(config))
    real = resumed.dataset.decoded
    monkeypatch.setattr(
        resumed.dataset, "decoded", lambda index: decoded.append(index) or real(index)
    )
    rest = [_images(step) for step in resumed.epoch(2, start_step=2)]
    assert len(rest) == 1 and _same(rest[0], whole[2])
    assert len(decoded) == 8


def test_padding_is_none_where_nothing_is_padded(write_split):
    config = write_split([(40, 30)] * 8)
    data = _data(config, augmentation=AugmentationConfig())
    (step,) = _loader(read_split("train", config), data).epoch(0)
    assert step[0][0].padding is None


@pytest.mark.slow
def test_loading_processes_give_what_one_process_gives(config, split):
    expected = [_images(s) for s in _loader(split, _data(config), parts=2).epoch(0)]
    loader = _loader(split, _data(config, workers=2), parts=2)
    # An epoch that is left half-way must not disturb the next.
    next(loader.epoch(1))
    found = [_images(step) for step in loader.epoch(0)]
    assert all(_same(a, b) for a, b in zip(expected, found, strict=True))
    assert loader.take_cpu_seconds() > 0, "the work of the processes counts"
    assert loader.take_cpu_seconds() == 0, "once"
    file = split.path(split.records[3])
    file.write_bytes(b"damaged")
    loader.close()
    with pytest.raises(UserError, match=r"^image id 4: .*4\.png: cannot be decoded"):
        list(_loader(split, _data(config, workers=1)).epoch(0))


_ENDLESS = """
import sys, time
from pathlib import Path
from d3etr.config.data import DataConfig, SplitConfig
from d3etr.data.splits import read_split
from d3etr.data.loading import EpochLoader

def main():
    config = SplitConfig(images=Path(sys.argv[1]), annotations=Path(sys.argv[2]))
    data = DataConfig(train=config, validation=config, workers=2)
    split = read_split("train", config)
    loader = EpochLoader(
        split, data, batch_size=4, parts=1, rank=0, world_size=1, seed=0
    )
    steps = loader.epoch(0)
    next(steps)
    print("loading", flush=True)
    time.sleep(300)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_loading_processes_end_when_the_training_process_is_killed(config, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    command = [sys.executable, str(script), str(config.images), str(config.annotations)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    assert len(_session(process.pid)) >= 4  # itself, the fork server, two loading processes
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = _session(process.pid)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert left == []


def _session(number: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == number and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_batches_hold_every_image_once(config, split, world_size):
    ids = []
    for rank in range(world_size):
        batches = EvaluationBatches(
            split, _data(config), batch_size=4, rank=rank, world_size=world_size
        )
        found = [targets.image_ids for _, targets in batches]
        assert len(found) == len(batches)
        ids += itertools.chain(*found)
    assert sorted(ids) == [record.id for record in split.records]


def test_evaluation_is_not_augmented_and_may_be_repeated(config, split):
    augmentation = AugmentationConfig(inversion=1.0, horizontal_flip=1.0)
    plain = EvaluationBatches(split, _data(config), batch_size=4, rank=0, world_size=1)
    batches = EvaluationBatches(
        split, _data(config, augmentation=augmentation), batch_size=4, rank=0, world_size=1
    )
    for _ in range(2):
        for first, second in zip(plain, batches, strict=True):
            assert _same(_images([first]), _images([second]))


SHORT_OF_SHARED_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from d3etr.config.data import DataConfig
from d3etr.data.splits import read_split
from d3etr.data.loading import EpochLoader

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of shared memory too
    data = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())
    found = []
    for workers in (0, 1):
        loader = EpochLoader(
            read_split("train", data.train), data.model_copy(update={"workers": workers}),
            batch_size=8, parts=1, rank=0, world_size=1, seed=5,
        )
        found.append([batch for step in loader.epoch(0) for batch in step])
        loader.close()
    for (ours, wanted), (theirs, targets) in zip(*found, strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(wanted.boxes_cxcywh, targets.boxes_cxcywh)
        assert wanted.image_ids == targets.image_ids and wanted.counts == targets.counts
    print(len(found[1]), "batches")
"""


def test_without_shared_memory_batches_are_the_same_and_a_warning_says_so(config, tmp_path):
    settings = tmp_path / "data.json"
    settings.write_text(_data(config).model_dump_json())
    script = tmp_path / "script.py"
    script.write_text(SHORT_OF_SHARED_MEMORY)
    done = subprocess.run(
        [sys.executable, str(script), str(settings)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 batches\n"
    assert done.stderr.count("shared memory is short") == 1
