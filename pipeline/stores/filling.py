"""Filling the shards of a new store one after another, for planting and importing.

Costs as much as computing the activations, as they are encoded in other threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ...store.errors import PosaeError
from ...store.writer import ShardOfLayers, StoreWriter
from ..progress import Progress

_ENCODING_THREADS = 4


def fill_shards(
    writer: StoreWriter,
    layers: Sequence[int],
    fill: Callable[[ShardOfLayers, ThreadPoolExecutor], None],
    *,
    task: str,
    progress: Progress,
    not_finite: Callable[[range], PosaeError],
) -> int:
    """Commit every shard that one of ``layers`` lacks; return the number of tokens filled this time.

    Args:
        writer: of a store whose layers are begun.
        layers: the layers; may be empty.
        fill: appends the activations of a shard, encoding in the pool, and advances ``progress`` by tokens.
        task: its name in the progress.
        progress: receives the progress in tokens.
        not_finite: makes the error for non-finite activations of some contexts.

    Raises:
        PosaeError: that of ``not_finite``.
        StoreWriteError: the disk refused.
    """
    if not layers:
        return 0
    manifest, n_tokens = writer.manifest, 0
    length = manifest.context_length
    missing = writer.missing_shards(layers)
    total = manifest.n_contexts * length
    left = sum(len(manifest.contexts_of(shard)) for shard in missing) * length
    bytes_to_a_token = manifest.d_model * 2 * len(layers)
    progress.begin(task, total, "tokens", done=total - left, unit_bytes=bytes_to_a_token)
    with ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="posae-encode") as pool:
        for locked in writer.lock_each(layers, missing):
            with locked:
                try:
                    fill(locked, pool)
                    locked.commit()
                except FloatingPointError:
                    raise not_finite(locked.contexts) from None
                n_tokens += len(locked.contexts) * length
    progress.end()
    return n_tokens
