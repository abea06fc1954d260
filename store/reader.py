"""Reading from a store: ``ActivationStore``.

Decodes whole chunks (8 contexts) from the memory map, about 2 GB/s per core with checksums on. Reading from
a server is described in ``remote/files.py``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SettingsError, StoreDamagedError, StoreIncompleteError
from .facts import facts, layer_sizes
from .layer_stats import StoreStatistics
from .manifest import layer_path, token_specs
from .notebook import block, columns
from .notebook import facts as table
from .stats import bits_to_float32

Selection = slice | Sequence[int] | NDArray[Any]


class ActivationStore(StoreStatistics):
    """A store opened for reading; safe to use from many threads, in forked children and pickled.

    Attributes:
        manifest: the model, the text and the settings of the harvest.
        layers: the layers that can be read, sorted.
        n_contexts: contexts committed in every layer.
        contexts_by_layer: contexts committed, by layer.
        is_sealed: whether the harvest is finished.
        identity: digest of the seal, or None.
    """

    def held_out_part(self, layer: int) -> tuple[int, int]:
        """Contexts [start, stop) that training does not read.

        If none of the manifest's held-out contexts is committed (a partial copy, an unfinished harvest),
        the last 5 % of the committed ones, in whole chunks; none of a single chunk.
        """
        committed, chunk = self.contexts_by_layer[layer], self.manifest.chunk_contexts
        start = self.manifest.held_out[0]
        if start < committed:
            return start, committed
        n_chunks = -(-committed // chunk)
        kept = n_chunks - max(1, n_chunks // 20) if n_chunks > 1 else n_chunks
        return min(kept * chunk, committed), committed

    def training_contexts(self, layer: int) -> int:
        """Number of contexts, from the first, that training reads."""
        return self.held_out_part(layer)[0]

    def read(
        self,
        layer: int,
        contexts: Selection = slice(None),
        positions: Selection = slice(None),
        dtype: str = "uint16",
    ) -> NDArray[Any]:
        """Activations of one layer, decoded by a few threads.

        Args:
            layer: one of ``layers``.
            contexts: a slice, indices or booleans over the layer's committed contexts.
            positions: the same over positions.
            dtype: ``uint16`` for the bits of bfloat16, or ``float32``.

        Returns:
            uint16 or float32 [contexts, positions, d_model].

        Raises:
            StoreIncompleteError: no such layer, or contexts that are not committed.
            StoreDamagedError: a chunk is not what was written.
        """
        if dtype not in ("uint16", "float32"):
            raise SettingsError(f"dtype {dtype!r}: use uint16 (the bits of bfloat16) or float32")
        if layer not in self.layers:
            self.check_layer(layer)
        rows = select(contexts, self.contexts_by_layer[layer], "contexts")
        columns = select(positions, self.context_length, "positions")
        whole = len(columns) == self.context_length and bool((np.diff(columns) == 1).all())
        bits = self.array(layer_path(layer)).read_rows(rows, self._pool, None if whole else columns)
        return bits_to_float32(bits) if dtype == "float32" else bits

    def tokens(self, contexts: Selection = slice(None)) -> NDArray[np.int32]:
        """Token ids; int32 [contexts, positions].

        By default, and counted from the end, of the contexts that every layer has; by their numbers of any
        that some layer has.

        Raises:
            StoreDamagedError: a chunk is not what was written.
        """
        rows = self._beside("tokens", contexts)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < self.manifest.vocabulary_size:
            raise StoreDamagedError("token ids outside the vocabulary", array="tokens")
        return rows

    def documents(self, contexts: Selection = slice(None)) -> NDArray[np.int64]:
        """Which document of the dataset each token came from; int64 [contexts, positions]."""
        return self._beside("document", contexts)

    def _beside(self, name: str, contexts: Selection) -> NDArray[Any]:
        # Of what is named, as far as the layer that is farthest: each is read, and trained on, by itself.
        farthest = max(self.contexts_by_layer.values(), default=0)
        rows = select(contexts, farthest if _names_each(contexts) else self.n_contexts, "contexts")
        if not len(rows):
            # The array itself may not be committed yet.
            return np.empty((0, self.context_length), token_specs(self.manifest)[name].dtype)
        pool = self._pool if self.is_remote else None
        return self.array(name).read_rows(rows, pool)

    def __repr__(self) -> str:
        """A line for notebooks."""
        state = "sealed" if self.is_sealed else "unfinished"
        return (
            f"ActivationStore({str(self.root)!r}: {self.manifest.model} on {self.manifest.dataset}, "
            f"layers {list(self.layers)}, {self.n_contexts} contexts of {self.context_length}, {state})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: where from, how much, and a line for each layer; sizes of files are read."""
        names, *rows = layer_sizes(self)
        return block(str(self.root), table(facts(self)), *([columns(names, rows)] if rows else []))


def _names_each(selection: Selection) -> bool:
    """Whether what is selected does not depend on how many there are."""
    if isinstance(selection, slice):
        ends = (selection.start, selection.stop)
        return selection.stop is not None and all(end is None or end >= 0 for end in ends)
    indices = np.asarray(selection)
    return indices.dtype != np.bool_ and indices.size > 0 and int(indices.min()) >= 0


def select(selection: Selection, size: int, axis: str) -> NDArray[np.int64]:
    """A selection along one axis as indices from 0.

    Raises:
        StoreIncompleteError: an index is not committed.
        TypeError: neither integers nor booleans.

    >>> select(slice(-2, None), 5, "contexts")
    array([3, 4])
    """
    if isinstance(selection, slice):
        for edge in (selection.start, selection.stop):
            if edge is not None and edge > size:
                raise StoreIncompleteError(f"{axis} up to {edge} are out of range: the store has {size}")
        return np.arange(*selection.indices(size))
    indices = np.atleast_1d(np.asarray(selection))
    if indices.size and indices.dtype.kind not in "iub":
        raise TypeError(f"{axis} are selected by a slice, integers or booleans, not by {indices.dtype}")
    if indices.dtype == np.bool_:
        if indices.shape != (size,):
            raise StoreIncompleteError(f"{len(indices)} booleans for {size} {axis}; give one for each")
        return np.flatnonzero(indices)
    indices = indices.astype(np.int64).reshape(-1)
    if indices.size and not -size <= int(indices.min()) <= int(indices.max()) < size:
        low, high = int(indices.min()), int(indices.max())
        which = f"{axis} {low} to {high} are" if low < high else f"{axis.removesuffix('s')} {low} is"
        raise StoreIncompleteError(f"{which} out of range: the store has {size}")
    return indices % size if indices.size else indices
