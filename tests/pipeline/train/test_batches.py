"""Shuffled batches: every wanted token once an epoch, at any step the same, positions true."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from posae.pipeline.ranges import equal_ranges, parse_ranges
from posae.pipeline.train.batch import as_torch
from posae.pipeline.train.batches import ShuffledBatches, ordered_batches, shuffled_batches
from posae.pipeline.train.chunk_memory import DecodedLayer
from posae.pipeline.train.order import Order
from posae.store.errors import StoreDamagedError
from posae.store.reader import ActivationStore
from posae.store.shards import ShardReader, index_bytes, parse_index

LENGTH, D_MODEL, CONTEXTS, TRAINING = 16, 8, 203, 184
RANGES = equal_ranges(LENGTH, 4)
SPECIAL = (0, 1, 2)


def activations_of(contexts: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Bits that name their own place: [rows, d_model]."""
    return np.repeat((contexts * LENGTH + positions)[:, np.newaxis], D_MODEL, axis=1).astype(np.uint16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_store: Callable[..., Any]) -> ActivationStore:
    contexts, positions = np.divmod(np.arange(CONTEXTS * LENGTH), LENGTH)
    root: Path = make_store(
        tmp_path_factory.mktemp("store") / "small.zarr",
        n_contexts=CONTEXTS,
        context_length=LENGTH,
        d_model=D_MODEL,
        layers=(0,),
        held_out=CONTEXTS - TRAINING,
        shard_contexts=64,
        bits=activations_of(contexts, positions).reshape(CONTEXTS, LENGTH, D_MODEL),
    ).root
    return ActivationStore.open(root)


def batches_of(store: ActivationStore, **options: Any) -> ShuffledBatches:
    return ShuffledBatches(store, 0, RANGES, leave_out=SPECIAL, **options)


def steps_of_epoch(order: Order, epoch: int) -> int:
    return sum(order.steps_of_window(chunks) for chunks in order.windows_of_epoch(epoch))


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 4000),
    window=st.integers(1, 40).map(lambda n: 8 * n),
    seed=st.integers(0, 2**32),
)
def test_every_wanted_token_comes_once_an_epoch(
    store: ActivationStore, batch_size: int, window: int, seed: int
) -> None:
    batch_size = max(batch_size, 40)
    batches = batches_of(store, batch_size=batch_size, window_contexts=window, seed=seed)
    n_steps = steps_of_epoch(batches.order, 0)
    seen: list[NDArray[np.int64]] = []
    for step, batch in enumerate(batches.steps(0, n_steps)):
        assert batch.step == step
        assert (batch.activations == activations_of(batch.contexts, batch.positions)).all()
        assert (batch.tokens == store.tokens()[batch.contexts, batch.positions]).all()
        for number, (a, b) in enumerate(RANGES):
            start, stop = batch.range_offsets[number : number + 2]
            assert ((batch.positions[start:stop] >= a) & (batch.positions[start:stop] < b)).all()
        assert batch.range_offsets[-1] == len(batch.positions)
        seen.append(batch.contexts * LENGTH + batch.positions)
    wanted = np.flatnonzero(~np.isin(store.tokens(slice(0, TRAINING)), SPECIAL))
    assert (np.sort(np.concatenate(seen)) == wanted).all()


@settings(max_examples=25, deadline=None)
@given(start=st.integers(0, 200), window=st.sampled_from([8, 64, 400]))
def test_a_batch_is_the_same_wherever_reading_begins(store: ActivationStore, start: int, window: int) -> None:
    batches = batches_of(store, batch_size=50, window_contexts=window)
    first = next(batches.steps(start, start + 1))
    found = (first.activations.copy(), first.contexts, first.positions)
    for batch in batches.steps(max(0, start - 3), start + 1):
        if batch.step == start:
            assert all(
                (a == b).all()
                for a, b in zip(found, (batch.activations, batch.contexts, batch.positions), strict=True)
            )


def order_of(counts: NDArray[np.int64], asked: list[int], **options: Any) -> Order:
    """The order over made-up counts; ``asked`` gets the chunks that were asked for."""

    def wanted_of(chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        asked.extend(chunks.tolist())
        return counts[chunks]

    contexts = {"n_contexts": 8 * len(counts), "context_length": LENGTH, "chunk_contexts": 8}
    return Order(**contexts, wanted_of=wanted_of, **options)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(0, 8 * LENGTH), min_size=1, max_size=40).filter(any),
    window=st.integers(1, 12).map(lambda n: 8 * n),
    batch_size=st.integers(1, 300),
    step=st.integers(0, 600),
    seed=st.integers(0, 2**32),
)
def test_a_step_is_found_where_counting_windows_one_by_one_finds_it(
    counts: list[int], window: int, batch_size: int, step: int, seed: int
) -> None:
    asked: list[int] = []
    order = order_of(np.array(counts), asked, window_contexts=window, batch_size=batch_size, seed=seed)
    place = order.find(step)

    passed: set[int] = set()
    epoch, before = 0, 0
    while True:
        for number, chunks in enumerate(order.windows_of_epoch(epoch)):
            rows = int(np.array(counts)[chunks].sum())
            passed |= {*chunks.tolist()}
            n_steps = max(1, round(rows / batch_size)) if rows else 0
            if step < before + n_steps:
                assert place == (epoch, number, step - before)
                assert {*asked} == passed, "a chunk past the step was counted"
                return
            before += n_steps
        epoch += 1


def test_a_window_can_be_the_first(store: ActivationStore) -> None:
    order = batches_of(store, window_contexts=32).order
    windows = [chunks.tolist() for chunks in order.windows_of_epoch(3)]
    assert len(windows) == order.n_windows
    assert [chunks.tolist() for chunks in order.windows_of_epoch(3, 4)] == windows[4:]


@settings(max_examples=15, deadline=None)
@given(
    n_parts=st.integers(1, 5),
    batch_size=st.integers(1, 700),
    window=st.integers(1, 12).map(lambda n: 8 * n),
    kept=st.booleans(),
)
def test_parts_of_a_batch_make_up_the_batch(
    store: ActivationStore, n_parts: int, batch_size: int, window: int, kept: bool
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "window_contexts": window, "seed": 3}
    parts: list[ShuffledBatches] = []
    for part in range(n_parts):
        decoded = DecodedLayer(store, 0, TRAINING) if kept else None
        parts.append(batches_of(store, **options, part=part, n_parts=n_parts, decoded=decoded))
    whole, steps = batches_of(store, **options), 2 * steps_of_epoch(parts[0].order, 0) + 1
    start = max(0, steps - 40)
    for batch, *found in zip(
        whole.steps(start, steps), *(one.steps(start, steps) for one in parts), strict=True
    ):
        order = np.random.default_rng(batch.step).permutation(len(batch.positions))
        places: list[NDArray[np.int64]] = []
        for one in found:
            assert one.n_rows == batch.n_rows
            places.append(np.arange(len(batch.positions)) if one.part is None else one.part.places)
            for name in ("activations", "positions", "contexts", "tokens"):
                np.testing.assert_array_equal(getattr(one, name), getattr(batch, name)[places[-1]])
            np.testing.assert_array_equal(np.diff(one.range_offsets), counts_by_range(one.positions))
            # With the positions of others: a row takes the same other position in its part as in the whole.
            rows, moved = one.with_positions_of_others(order)
            new_position = dict(zip(order.tolist(), batch.positions.tolist(), strict=True))
            assert [new_position[place] for place in places[-1][rows]] == moved.positions.tolist()
            assert (np.diff(moved.positions) >= 0).all()
        np.testing.assert_array_equal(np.sort(np.concatenate(places)), np.arange(len(batch.positions)))


def counts_by_range(positions: NDArray[np.int64]) -> list[int]:
    return [int(((positions >= start) & (positions < stop)).sum()) for start, stop in RANGES]


def test_where_no_token_is_wanted_there_is_no_batch(store: ActivationStore) -> None:
    everything = range(int(store.tokens().max()) + 1)
    batches = ShuffledBatches(store, 0, RANGES, leave_out=everything, window_contexts=32)
    assert batches.is_empty
    assert not list(batches.steps(0, 5))
    assert not batches_of(store).is_empty


def test_a_window_of_special_tokens_is_passed_over(make_store: Callable[..., Any], tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", n_contexts=32)
    special = {*made.tokens[8:16].flatten().tolist()}
    batches = ShuffledBatches(
        ActivationStore.open(made.root),
        1,
        equal_ranges(6, 2),
        leave_out=sorted(special),
        window_contexts=8,
        n_contexts=32,
    )
    read = [batch.contexts for batch in batches.steps(0, 2 * steps_of_epoch(batches.order, 0))]
    assert {*np.concatenate(read).tolist()} == {*range(8), *range(16, 32)}


def test_batches_of_a_window_differ_by_one_at_most(store: ActivationStore) -> None:
    batches = batches_of(store, batch_size=100, window_contexts=400)
    sizes = [len(batch.positions) for batch in batches.steps(0, steps_of_epoch(batches.order, 0))]
    assert max(sizes) - min(sizes) <= 1
    assert abs(sum(sizes) / len(sizes) - 100) < 5


def test_epochs_and_seeds_differ(store: ActivationStore) -> None:
    def first(step: int, seed: int) -> bytes:
        return next(batches_of(store, batch_size=64, seed=seed).steps(step, step + 1)).contexts.tobytes()

    n_steps = steps_of_epoch(batches_of(store, batch_size=64).order, 0)
    assert len({first(0, 0), first(0, 1), first(n_steps, 0), first(2 * n_steps, 0)}) == 4


def test_training_never_reads_the_held_out_part(store: ActivationStore) -> None:
    steps = 3 * steps_of_epoch(batches_of(store, batch_size=64).order, 0)
    for batch in shuffled_batches(store, 0, RANGES, steps=steps, batch_size=64, leave_out=SPECIAL):
        assert batch.contexts.max() < TRAINING


def test_shuffling_mixes_contexts(store: ActivationStore) -> None:
    batch = next(batches_of(store, batch_size=184, window_contexts=400).steps(0, 1))
    assert len(np.unique(batch.contexts)) > 100
    assert not (np.diff(batch.contexts) == 0).all()


def test_ordered_batches_are_the_part_asked_for(store: ActivationStore) -> None:
    ranges = parse_ranges("0:1,1:16", LENGTH)
    batches = list(
        ordered_batches(store, 0, ranges, start=TRAINING, stop=CONTEXTS, leave_out=SPECIAL, batch_contexts=8)
    )
    places = np.concatenate([batch.contexts * LENGTH + batch.positions for batch in batches])
    wanted = np.flatnonzero(~np.isin(store.tokens(slice(TRAINING, CONTEXTS)), SPECIAL)) + TRAINING * LENGTH
    assert (np.sort(places) == wanted).all()
    for batch in batches:
        assert (batch.activations == activations_of(batch.contexts, batch.positions)).all()
        assert batch.range_offsets.tolist() == [0, 0, len(batch.positions)]


def test_as_torch_shares_memory() -> None:
    bits = np.array([0x3F80, 0xC000], np.uint16)
    viewed = as_torch(bits)
    assert [value.item() for value in viewed] == [1.0, -2.0]
    bits[0] = 0x4000
    assert viewed[0].item() == 2.0


def read_an_epoch(store: ActivationStore) -> None:
    batches = batches_of(store, window_contexts=32)
    list(batches.steps(0, steps_of_epoch(batches.order, 0)))


def test_a_flipped_bit_in_any_chunk_that_is_read_stops_the_batches(
    store: ActivationStore, tmp_path: Path
) -> None:
    root = shutil.copytree(store.root, tmp_path / "a.zarr")
    rng = np.random.default_rng(0)
    n_stopped = 0
    for path in ("layer_0", "tokens"):
        spec = store.spec(path)
        for shard in range(spec.n_shards):
            file = root / spec.shard_path(shard)
            good = file.read_bytes()
            for chunk, entry in enumerate(parse_index(spec, shard, good[-index_bytes(spec) :], len(good))):
                bad = bytearray(good)
                bad[int(entry[0]) + int(rng.integers(int(entry[1])))] ^= 1 << int(rng.integers(8))
                file.unlink()  # maps of the last round keep the old file
                file.write_bytes(bad)
                place = f"{path}, shard {shard}, chunk {chunk}: its (checksum is wrong|Blosc header)"
                opened = ActivationStore.open(root)
                opened.check_layer(0)
                if shard * spec.shard_rows + chunk * spec.chunk_rows >= TRAINING:
                    read_an_epoch(opened)
                else:
                    n_stopped += 1
                    with pytest.raises(StoreDamagedError, match=place):
                        read_an_epoch(opened)
            file.unlink()
            file.write_bytes(good)
    assert n_stopped == 2 * TRAINING // 8


def test_rows_on_the_device_are_the_activations(store: ActivationStore) -> None:
    for batch in shuffled_batches(store, 0, RANGES, steps=9, batch_size=64, device=torch.device("cpu")):
        assert torch.equal(batch.on_device, as_torch(batch.activations))
        assert batch.on_device.dtype == torch.bfloat16


def test_a_batch_keeps_its_memory_while_the_next_is_made(store: ActivationStore) -> None:
    batches = shuffled_batches(store, 0, RANGES, steps=2, batch_size=64)
    first = next(batches)
    kept = first.activations.copy()
    next(batches)
    assert (first.activations == kept).all()


def test_nobody_reads_once_the_batches_are_ended(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = 0
    read_chunk = ShardReader.read_chunk

    def slowly(reader: ShardReader, chunk: int, out: NDArray[Any]) -> None:
        nonlocal reading
        reading += 1
        time.sleep(0.02)
        read_chunk(reader, chunk, out)
        reading -= 1

    monkeypatch.setattr(ShardReader, "read_chunk", slowly)
    for window in (32, 400):
        batches = batches_of(store, batch_size=40, window_contexts=window)
        steps = batches.steps(0, 10_000)
        next(steps)
        steps.close()
        assert reading == 0
