import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3etr.data.sampling import epoch_batches, evaluation_keys, micro_batches, share


def _sizes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 60, (count, 2))


@pytest.mark.parametrize("bucket", [False, True])
def test_an_epoch_shows_each_image_at_most_once(bucket):
    batches = epoch_batches(_sizes(103), 8, seed=0, epoch=0, bucket=bucket)
    assert batches.shape == (12, 8)
    assert len(np.unique(batches)) == 96


@pytest.mark.parametrize("bucket", [False, True])
def test_the_order_depends_on_seed_and_epoch(bucket):
    sizes = _sizes(64)
    orders = [
        epoch_batches(sizes, 8, seed, epoch, bucket).tolist()
        for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3] and orders[2] != orders[3]


def test_other_images_are_left_out_in_each_epoch():
    left_out = [
        frozenset(range(15)) - frozenset(epoch_batches(_sizes(15), 8, 0, epoch, True).ravel())
        for epoch in range(5)
    ]
    assert len(set(left_out)) > 1


def _padding(batches: np.ndarray, sizes: np.ndarray) -> float:
    batched = sizes[batches]
    padded = batched.max(1).prod(1).sum() * batches.shape[1]
    return 1 - batched.prod(2).sum() / padded


def test_buckets_make_padding_small():
    choices = np.array([(800, 1066), (1066, 800), (800, 1200), (1200, 800), (800, 800)])
    sizes = choices[np.random.default_rng(0).integers(5, size=2000)]
    plain = _padding(epoch_batches(sizes, 16, 0, 0, bucket=False), sizes)
    bucketed = _padding(epoch_batches(sizes, 16, 0, 0, bucket=True), sizes)
    assert plain > 0.25
    assert bucketed < 0.03


def test_batches_of_one_shape_do_not_come_in_a_row():
    sizes = np.array([(40, 60)] * 320 + [(60, 40)] * 320)
    batches = epoch_batches(sizes, 8, 0, 0, bucket=True)
    lying = (batches[:, 0] < 320).astype(int)
    assert np.abs(np.diff(lying)).sum() > 20


@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 5),
)
def test_workers_and_accumulation_only_cut_the_global_batch(world, parts, micro, bucket, epoch):
    sizes = _sizes(100)
    batches = epoch_batches(sizes, world * parts * micro, 3, epoch, bucket)
    keys = [
        micro_batches(batches, sizes, epoch, world * parts, share(world * parts, rank, world))
        for rank in range(world)
    ]
    for step, batch in enumerate(batches):
        mine = [key for rank in keys for key in rank[step * parts : (step + 1) * parts]]
        assert sorted(index for key in mine for index in key.indices) == sorted(batch)
        assert {key.size for key in mine} == {tuple(sizes[batch].max(0))}
        assert {len(key.indices) for key in mine} == {micro}


@given(st.integers(1, 9), st.integers(0, 20))
def test_any_number_of_workers_shares_all_micro_batches_evenly(world, more):
    parts = world + more
    shares = [share(parts, rank, world) for rank in range(world)]
    assert [index for own in shares for index in own] == list(range(parts))
    sizes = [len(own) for own in shares]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_evaluation_shows_every_image_exactly_once_over_all_workers(images, size, world, bucket):
    sizes = _sizes(images)
    keys = [evaluation_keys(sizes, size, rank, world, bucket) for rank in range(world)]
    shown = [index for rank in keys for key in rank for index in key.indices]
    assert sorted(shown) == list(range(images))
    assert max(map(len, keys)) - min(map(len, keys)) <= 1
