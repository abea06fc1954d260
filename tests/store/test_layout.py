"""Where values lie: every context in one chunk of one shard, and no array but ours is accepted."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from posae.store import ActivationStore
from posae.store.codecs import CODECS
from posae.store.errors import StoreFormatError
from posae.store.layout import DATA_TYPES, MAX_SHARDS, ArraySpec, shard_contexts
from posae.store.manifest import group_json, parse_manifest

from ..conftest import MakeStore

names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


@st.composite
def specs(draw: st.DrawFn) -> ArraySpec:
    n_axes = draw(st.integers(1, 3))
    chunk_rows = draw(st.integers(1, 50))
    return ArraySpec(
        path=draw(names),
        shape=(draw(st.integers(1, 5000)), *draw(st.tuples(*[st.integers(1, 100)] * (n_axes - 1)))),
        data_type=draw(st.sampled_from([*DATA_TYPES])),
        chunk_rows=chunk_rows,
        shard_rows=chunk_rows * draw(st.integers(1, 64)),
        dimension_names=tuple(draw(st.lists(names, min_size=n_axes, max_size=n_axes))),
        codec=draw(st.sampled_from([*CODECS.values()])),
        attributes=draw(st.dictionaries(names, st.none() | st.integers() | names, max_size=3)),
    )


@given(specs())
def test_every_row_lies_in_exactly_one_chunk_and_shard(spec: ArraySpec) -> None:
    rows = np.zeros(spec.shape[0], int)
    chunks = [0] * spec.n_chunks
    for shard in range(spec.n_shards):
        assert spec.chunks_in(shard) >= 1
        for within in range(spec.chunks_in(shard)):
            chunk = shard * spec.chunks_per_shard + within
            chunks[chunk] += 1
            rows[chunk * spec.chunk_rows : (chunk + 1) * spec.chunk_rows] += 1
    assert set(chunks) == {1}
    assert set(rows.tolist()) == {1}
    paths = [spec.shard_path(shard) for shard in range(spec.n_shards)]
    assert len({*paths, spec.metadata_path}) == spec.n_shards + 1
    assert all(path.count(".") == len(spec.shape) for path in paths)


SPEC = ArraySpec(
    path="layer_3",
    shape=(41, 6, 16),
    data_type="bfloat16",
    chunk_rows=8,
    shard_rows=16,
    dimension_names=("context", "position", "feature"),
    attributes={"layer": 3},
)

Place = tuple[Any, ...]


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place below the attributes' siblings, outermost first."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType, reportUnknownArgumentType]
    for key, inner in items:
        if (*place, key) != ("attributes",):
            yield (*place, key)
            if isinstance(inner, dict | list):
                yield from places(inner, (*place, key))


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "missing": lambda parent, key: parent.pop(key),
    "null": lambda parent, key: parent.__setitem__(key, None),
    "text": lambda parent, key: parent.__setitem__(key, "other"),
    "negative": lambda parent, key: parent.__setitem__(key, -1),
    "huge": lambda parent, key: parent.__setitem__(key, 2**70),
    "fraction": lambda parent, key: parent.__setitem__(key, 0.5),
    "list": lambda parent, key: parent.__setitem__(key, [1]),
    "object": lambda parent, key: parent.__setitem__(key, {"name": "pickle", "configuration": {}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_array_is_refused(change: str, unsealed: Path) -> None:
    good = json.loads((unsealed / "layer_0/zarr.json").read_text())
    tried = 0
    for place in places(good):
        other = copy.deepcopy(good)
        parent: Any = other
        for key in place[:-1]:
            parent = parent[key]
        CHANGES[change](parent, place[-1])
        assert_refused(unsealed, other)
        tried += 1
    assert tried > 40


def test_a_key_too_many_is_refused(unsealed: Path) -> None:
    good = json.loads((unsealed / "layer_0/zarr.json").read_text())
    for extra in ("storage_transformers", "consolidated_metadata", "filters"):
        assert_refused(unsealed, good | {extra: []})


@pytest.fixture
def unsealed(make_store: MakeStore, tmp_path: Path) -> Path:
    """A store whose arrays no digest protects."""
    return make_store(tmp_path / "store", layers=(0,), seal=False).root


def assert_refused(root: Path, other: Any) -> None:
    ActivationStore.open(root)
    good = (root / "layer_0/zarr.json").read_text()
    (root / "layer_0/zarr.json").write_text(json.dumps(other))
    with pytest.raises(StoreFormatError, match=r"layer_0/zarr\.json"):
        ActivationStore.open(root)
    (root / "layer_0/zarr.json").write_text(good)


@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": (2**48 + 1, 2, 2)},
        {"shape": (8, 2**16, 2**16)},
        {"shape": (8, 0, 4)},
        {"shape": ()},
        {"chunk_rows": 0},
        {"chunk_rows": 3},
        {"chunk_rows": 1, "shard_rows": 2**21},
        {"shape": (8, 2**13, 2**13), "chunk_rows": 16},
    ],
    ids=str,
)
def test_sizes_past_all_bounds_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        replace(SPEC, **sizes).check_bounds()


@given(st.integers(1, 2**48))
def test_shards_double_until_they_are_few(n_contexts: int) -> None:
    contexts = shard_contexts(n_contexts)
    assert contexts >= 512
    assert contexts & (contexts - 1) == 0
    assert contexts * MAX_SHARDS >= n_contexts
    assume(contexts > 512)
    assert contexts // 2 * MAX_SHARDS < n_contexts


@pytest.mark.parametrize(
    ("written_by", "said"),
    [
        ("0.9.0", "posae 0.9.0 or later reads it"),
        ("0.9.0; rm -rf /", "a later posae reads it"),
        (None, "a later posae reads it"),
        (9, "a later posae reads it"),
    ],
)
def test_a_newer_format_names_the_posae_that_reads_it(written_by: object, said: str) -> None:
    root = {"posae": {"format": 2, "versions": {"posae": written_by}}}
    with pytest.raises(StoreFormatError, match=said) as raised:
        parse_manifest(group_json(root))
    assert "pip install --upgrade posae" in str(raised.value)
