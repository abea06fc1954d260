"""Fill the layers of a store: run the model over its contexts, shard by shard.

While the model runs the next batch, threads encode and write the previous one, and a finished shard is made
durable while the next one begins. Memory: about six batches of the layers' activations.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...store.manifest import Manifest, token_specs
from ...store.shards import ShardReader
from ...store.stats import ordinary_tokens
from ...store.writer import NotFiniteError, ShardOfLayers, StoreWriter
from ..device import n_cores
from ..errors import ModelError
from ..processes import Processes
from ..progress import Progress, Silent
from .host_copies import HostCopies, HostCopy
from .language_model import LanguageModel


def fill(
    writer: StoreWriter,
    layers: Sequence[int],
    load_model: Callable[[], LanguageModel],
    *,
    named_layers: Sequence[int],
    device: torch.device,
    processes: Processes,
    progress: Progress,
) -> int:
    """Commit every missing shard of some layers: first those that no process holds, then what others leave.

    Args:
        writer: of the store, whose tokens are committed.
        layers: the layers to fill.
        load_model: is called before the first batch, so not if nothing is missing.
        named_layers: the layers that the user asked for; messages suggest these without one that failed.
        device: where the model runs.
        processes: those that share the store.
        progress: of all processes, reported by the first.

    Returns:
        Tokens that this process ran the model over.

    Raises:
        ModelError: a layer does not run on text alone, or gives activations that are not finite.
        StoreWriteError: the disk refused.
    """
    missing = processes.dealt(writer.missing_shards(layers))
    tally = _Tally(writer, layers, missing, progress if processes.is_first else Silent())
    tokens = ShardReader(writer.files, token_specs(writer.manifest)["tokens"])
    copies = HostCopies(device)
    n_encoders = max(2, n_cores() // processes.n_local)
    model: LanguageModel | None = None
    n_tokens = 0
    with (
        ThreadPoolExecutor(n_encoders, "posae-encode") as encoders,
        # Making a shard durable takes time, in which the model begins the next one.
        ThreadPoolExecutor(1, "posae-commit") as committer,
    ):
        committing: Future[None] | None = None
        for shard in writer.lock_each(layers, missing):
            with ExitStack() as held:
                held.enter_context(shard)
                tally.begin_shard(shard.shard)
                model = model or load_model()
                rows = tokens.read_rows(np.array(shard.contexts))
                batches = _batches(writer.manifest, shard, rows, model, copies, named_layers)
                with _not_finite_explained(writer.manifest, shard, named_layers):
                    for copy, ordinary in _one_behind(batches):
                        for layer, bits in copy.bits().items():
                            copy.read_by(shard.append(layer, bits, ordinary, encoders))
                        tally.advance(ordinary.size)
                if committing:
                    committing.result()
                held.pop_all()
                committing = committer.submit(_commit, writer.manifest, shard, named_layers)
            n_tokens += rows.size
        if committing:
            committing.result()
    tally.end()
    return n_tokens


def _batches(
    manifest: Manifest,
    shard: ShardOfLayers,
    tokens: NDArray[np.int32],
    model: LanguageModel,
    copies: HostCopies,
    named_layers: Sequence[int],
) -> Iterator[tuple[HostCopy, NDArray[np.bool_]]]:
    """Run the model over a shard; yield each batch's activations and which tokens are ordinary."""
    size = manifest.batch_contexts
    on_device = torch.as_tensor(tokens).to(model.device)
    for start in range(0, len(tokens), size):
        within = slice(start, start + size)
        activations = model.activations(on_device[within], shard.layers)
        if silent := sorted(set(shard.layers) - activations.keys()):
            others = ",".join(str(layer) for layer in named_layers if layer not in silent)
            raise ModelError(
                f"layer {silent[0]} of {model.facts.id} does not run on text alone; leave it out"
                + (f": --layers {others}" if others else "")
            )
        ordinary = ordinary_tokens(manifest, tokens[within], shard.contexts[within])
        yield copies.start(activations), ordinary


class _Tally:
    """Reports the progress of all processes; that of others from the shards that they commit."""

    def __init__(
        self, writer: StoreWriter, layers: Sequence[int], missing: Sequence[int], progress: Progress
    ) -> None:
        self._writer = writer
        self._layers = layers
        self._progress = progress
        # A shard file that is missing all the same is damaged, and will be written again.
        self._others = set(missing) - writer.standing_shards(layers)
        manifest = writer.manifest
        total = manifest.n_contexts * manifest.context_length
        done = total - sum(map(self._n_tokens, missing))
        progress.begin("harvesting", total, "tokens", done, manifest.d_model * 2 * len(layers))

    def _n_tokens(self, shard: int) -> int:
        manifest = self._writer.manifest
        return len(manifest.contexts_of(shard)) * manifest.context_length

    def begin_shard(self, shard: int) -> None:
        """This process fills ``shard``: count what others have committed since."""
        self._others.discard(shard)
        self._count_others()

    def _count_others(self) -> None:
        done = self._others & self._writer.standing_shards(self._layers)
        self._others -= done
        if done:
            self._progress.advance(sum(map(self._n_tokens, done)))

    def advance(self, n_tokens: int) -> None:
        """This process has run the model over so many tokens."""
        self._progress.advance(n_tokens)

    def end(self) -> None:
        """All shards are committed."""
        self._count_others()
        self._progress.end()


_Item = TypeVar("_Item")


def _one_behind(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, each once the next one has been requested, so that one is used while the next is made."""
    last: list[_Item] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def _commit(manifest: Manifest, shard: ShardOfLayers, named_layers: Sequence[int]) -> None:
    with shard, _not_finite_explained(manifest, shard, named_layers):
        shard.commit()


@contextmanager
def _not_finite_explained(
    manifest: Manifest, shard: ShardOfLayers, named_layers: Sequence[int]
) -> Generator[None]:
    """Turn the writer's NotFiniteError into a ModelError that says what to do."""
    try:
        yield
    except NotFiniteError as error:
        others = ",".join(str(layer) for layer in named_layers if layer != error.layer)
        raise ModelError(
            f"layer {error.layer} of {manifest.model} gives activations that are not finite, in contexts "
            f"{shard.contexts.start} to {shard.contexts.stop - 1}; "
            + (f"leave that layer out (--layers {others}), or " if others else "")
            + "harvest into another folder with another --device or --attention"
        ) from None
