"""The statistics of a store's layers, merged over their committed shards on request."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import StoreArrays
from .errors import StoreDamagedError
from .layout import ArraySpec
from .manifest import layer_path
from .stats import LayerStats, NormStats, RoundingError, byte_plane_bound, norm_stats

# Shards in a sample of a layer: 8,192 contexts, and about 20 MB to read at d_model 2,304.
_SAMPLE_SHARDS = 16
_BYTES_AT_ONCE = 2**26


class StoreStatistics(StoreArrays):
    """A store's arrays, with the statistics computed when they were written."""

    def impossible(self, spec: ArraySpec, entry: NDArray[Any]) -> str:
        """The problem of an invalid entry of statistics; empty if it is valid."""
        if entry.dtype.kind == "f":
            return "sums that are no numbers" if np.isnan(entry).any() else ""
        # A count is over a shard's contexts, of bytes also over all of their values.
        values = self.context_length * self.d_model if spec.path.endswith("/byte_counts") else 1
        possible = 0 <= entry.min() <= entry.max() <= self.manifest.shard_contexts * values
        return "" if possible or entry.dtype.kind != "i" else "counts that cannot be"

    def _merged(self, layer: int, name: str, most_shards: int | None = None) -> NDArray[Any]:
        array = self.array(f"stats/{layer_path(layer)}/{name}")
        shards = np.arange(self.committed_shards(layer))[:most_shards]
        pool = self._pool if self.is_remote else None
        total: NDArray[Any] | None = None
        # Not all at once: an entry may have a megabyte, and a layer thousands of them.
        n_entries = max(1, _BYTES_AT_ONCE // array.spec.chunk_bytes)
        for start in range(0, len(shards), n_entries):
            some = shards[start : start + n_entries]
            for shard, entry in zip(some.tolist(), array.read_rows(some, pool), strict=True):
                if problem := self.impossible(array.spec, entry):
                    raise StoreDamagedError(problem, array=array.spec.path, shard=shard)
                entry = entry.astype(np.float64) if entry.dtype.kind == "f" else entry
                total = entry if total is None else total + entry
        return np.zeros(array.spec.shape[1:]) if total is None else total

    def stats(self, layer: int, most_shards: int | None = None) -> LayerStats:
        """Statistics of the ordinary tokens of the training part.

        Args:
            layer: one of ``layers``.
            most_shards: maximum number of shards to read, from the first, which are a random sample of
                contexts; an entry has L · d_model float32 numbers.
        """
        # Threads beside those that read: each waits for these.
        with ThreadPoolExecutor(3 if self.is_remote else 1, thread_name_prefix="posae-merge") as pool:
            merging = [pool.submit(self._merged, layer, name, most_shards) for name in LayerStats._fields]
            return LayerStats(*(merged.result() for merged in merging))

    def norms(self, layer: int) -> NormStats:
        """Norms by position over all committed tokens."""
        counts = self._merged(layer, "norm_counts")
        if (counts.sum(axis=1) != self.contexts_by_layer[layer]).any():
            raise StoreDamagedError(
                "it does not count every token", array=f"stats/{layer_path(layer)}/norm_counts"
            )
        return norm_stats(self._merged(layer, "norm_sums"), counts)

    def compression_bound(self, layer: int) -> float | None:
        """The best ratio of raw to stored bytes that coding single bytes can reach; None if not counted.

        The low byte of a bfloat16 is noise, so without rounding this is about 1.5.
        """
        if not self.manifest.byte_counts:
            return None
        return byte_plane_bound(self._merged(layer, "byte_counts"))

    def rounding_error(self, layer: int) -> RoundingError | None:
        """The error of rounding to ``mantissa_bits``, measured at harvest; None if lossless."""
        if self.manifest.mantissa_bits is None:
            return None
        relative, squared = self._merged(layer, "rounding").sum(axis=1).tolist()
        sample = self._sample(layer)
        variance = sample.variation / max(1, sample.n_tokens)
        squared /= max(1, int(self._merged(layer, "counts").sum()))
        return RoundingError(
            relative / (self.contexts_by_layer[layer] * self.context_length),
            squared / variance if variance > 0 else float("nan"),
        )

    def position_r2(self, layer: int) -> float:
        """Share of the variance that position alone explains, on a sample of at most 16 shards."""
        return self._sample(layer).position_r2

    def _sample(self, layer: int) -> LayerStats:
        if layer not in self._samples:
            self._samples[layer] = self.stats(layer, _SAMPLE_SHARDS)
        return self._samples[layer]
