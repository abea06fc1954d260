"""Small stores without a model: random activations, and tokens with BOS first and some EOS."""

import signal
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from posae.store.layout import shard_contexts
from posae.store.manifest import Manifest
from posae.store.writer import StoreWriter

pytest_plugins = ("servers",)

BOS, EOS, VOCABULARY = 2, 1, 1000

MANIFEST: dict[str, Any] = {
    "model": "made-up",
    "model_revision": None,
    "model_config_hash": "0" * 64,
    "model_layers": 26,
    "d_model": 16,
    "attention": "eager",
    "device": "cpu",
    "batch_contexts": 32,
    "n_contexts": 20,
    "context_length": 6,
    "skip_contexts": 0,
    "held_out": (20, 20),
    "packing": "pack",
    "dataset": "made-up",
    "dataset_revision": None,
    "dataset_config": None,
    "dataset_split": None,
    "dataset_column": None,
    "tokenizer_hash": "0" * 64,
    "first_token": BOS,
    "separator_token": EOS,
    "special_token_ids": (0, EOS, BOS),
    "vocabulary_size": VOCABULARY,
    "seed": 0,
    "codec": "small",
    "byte_counts": True,
    "chunk_contexts": 8,
    "shard_contexts": 512,
    "versions": {"numpy": "any"},
}


@pytest.fixture
def in_a_terminal() -> Generator[None]:
    """Ctrl-C interrupts: a process that is started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path; the lock file, which is empty and stays, aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Made:
    """A store and what was written into it."""

    root: Path
    manifest: Manifest
    tokens: NDArray[np.int32]
    documents: NDArray[np.int64]
    activations: dict[int, NDArray[np.uint16]]
    corpus: dict[str, Any]

    @property
    def ordinary(self) -> NDArray[np.bool_]:
        """Tokens of the training part that are not special; [contexts, positions]."""
        mask = ~np.isin(self.tokens, self.manifest.special_token_ids)
        mask[self.manifest.held_out[0] :] = False
        return mask

    def write(
        self,
        layers: Sequence[int],
        *,
        seal: bool = True,
        shards: Sequence[int] | None = None,
        allow_versions: bool = False,
    ) -> None:
        """Commit ``shards`` of ``layers``, and all that comes before; may be called again."""
        with patch("os.fsync"), ThreadPoolExecutor(2) as pool:
            writer = StoreWriter.begin(self.root, self.manifest, allow_versions=allow_versions)
            with writer.lock():
                if not writer.has_tokens:
                    writer.write_tokens(self.tokens, self.documents, self.corpus)
                writer.add_layers(layers)
            for shard in range(self.manifest.n_shards) if shards is None else shards:
                locked = writer.lock_shard(layers, shard, wait=False)
                if locked is None:
                    continue
                with locked:
                    rows = np.array(locked.contexts)
                    for layer in locked.layers:
                        locked.append(layer, self.activations[layer][rows], self.ordinary[rows], pool)
                    locked.commit()
            if seal:
                with writer.lock():
                    writer.seal()


class MakeStore(Protocol):
    """The fixture ``make_store``."""

    def __call__(
        self,
        root: Path,
        *,
        n_contexts: int = 20,
        context_length: int = 6,
        d_model: int = 16,
        layers: Sequence[int] = (1,),
        codec: str = "small",
        held_out: int = 0,
        seed: int = 0,
        seal: bool = True,
        shards: Sequence[int] | None = None,
        bits: NDArray[np.uint16] | None = None,
        **manifest: Any,
    ) -> Made: ...


def made_bits(rng: np.random.Generator, shape: Sequence[int]) -> NDArray[np.uint16]:
    values = rng.standard_normal(tuple(shape)).astype(np.float32)
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _make_store(
    root: Path,
    *,
    n_contexts: int = 20,
    context_length: int = 6,
    d_model: int = 16,
    layers: Sequence[int] = (1,),
    codec: str = "small",
    held_out: int = 0,
    seed: int = 0,
    seal: bool = True,
    shards: Sequence[int] | None = None,
    bits: NDArray[np.uint16] | None = None,
    **manifest: Any,
) -> Made:
    """A store in ``root``; ``bits`` are every layer's, else random; ``manifest`` sets further keys."""
    settings: dict[str, Any] = MANIFEST | {
        "n_contexts": n_contexts,
        "context_length": context_length,
        "d_model": d_model,
        "codec": codec,
        "held_out": (n_contexts - held_out, n_contexts),
        "seed": seed,
        "shard_contexts": shard_contexts(n_contexts),
    }
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCABULARY, (n_contexts, context_length), dtype=np.int32)
    tokens[rng.random(tokens.shape) < 0.1] = EOS
    tokens[:, 0] = BOS
    documents = rng.integers(0, 2**40, tokens.shape)
    shape = (n_contexts, context_length, d_model)
    activations = {layer: made_bits(rng, shape) if bits is None else bits for layer in layers}
    ids, counts = np.unique(tokens[np.isin(tokens, (BOS, EOS))], return_counts=True)
    corpus = {
        "documents": n_contexts,
        "documents_left_out": 0,
        "duplicate_contexts": 0,
        "special_tokens": {str(token): int(count) for token, count in zip(ids, counts, strict=True)},
    }
    made = Made(root, Manifest(**settings | manifest), tokens, documents, activations, corpus)
    made.write(layers, seal=seal, shards=shards)
    return made


@pytest.fixture(scope="session")
def make_store() -> MakeStore:
    """The function that makes a small store, so that tests need not import this file."""
    return _make_store


@pytest.fixture(scope="session")
def good_store(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A sealed store of two layers and three shards; not to be changed."""
    root = tmp_path_factory.mktemp("good") / "good.zarr"
    return _make_store(root, n_contexts=41, layers=(0, 3), held_out=9, shard_contexts=16)
