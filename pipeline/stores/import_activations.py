"""Importing activations saved by other programs as a store, which records what is not known about them.

Otherwise the store is like a harvest's: the same arrays, statistics and seal. Activations become bfloat16,
rounded to nearest. Contexts keep their order; the last of them are held out. Rows without contexts are cut
into contexts, whose positions then have no meaning. Run again after a kill, it resumes.

Cost: reading the files twice, once for their digest, and writing the store once; memory for the tokens, 12
bytes each, and a few batches.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...store.errors import SettingsError
from ...store.layout import CHUNK_CONTEXTS, shard_contexts
from ...store.manifest import MAX_LAYERS, MAX_TEXT, Imported, Manifest
from ...store.reader import ActivationStore
from ...store.stats import ordinary_tokens
from ...store.writer import ShardOfLayers, StoreWriter
from ..digests import reading, sha256
from ..errors import ForeignFileError
from ..harvest.hooks import layer_of
from ..harvest.text.contexts import held_out_contexts
from ..progress import Progress, Silent
from ..settings import ImportSettings
from .caches import open_cache
from .filling import fill_shards

UNKNOWN = "unknown"
"""The recorded name of an unknown model or device."""

_ROWS_AT_ONCE = 8192
_MOST_VALUES = 2**24
"""Approximate number of values in memory at once: 64 MB in float32."""
_VERSIONS_THAT_MATTER = ("posae", "numpy", "numcodecs")


class ImportedStore(NamedTuple):
    """The result of an import."""

    store: ActivationStore
    n_tokens: int
    """Tokens written this time; 0 if the store was complete."""
    n_left_out: int
    """Rows at the end that do not fill a context."""


class Import:
    """An import before it runs: files are opened and settings resolved, and nothing is written yet."""

    def __init__(self, source: Path, path: Path, settings: ImportSettings) -> None:
        """Resolve the open settings.

        Raises:
            ForeignFileError: there are no files, or none that can be imported.
            SettingsError: a setting contradicts the files, or is missing.
        """
        self.path = path
        self.settings = settings
        self.source = source
        self._progress: Progress = Silent()
        self.cache = open_cache(source, settings.tensor)
        shape = self.cache.shape
        if shape.length is not None and settings.context_length not in (None, shape.length):
            raise SettingsError(
                f"{source} has contexts of {shape.length} tokens, not {settings.context_length}; leave "
                "out --context-length"
            )
        self.length: int = shape.length or settings.context_length or 128
        entries_of_context = 1 if shape.length else self.length
        self.n_contexts, left_out = divmod(shape.n_entries, entries_of_context)
        self.n_left_out = left_out
        if self.length < 2 or not self.n_contexts:
            raise SettingsError(
                f"{source} has {shape.n_entries} entries, which fill no context of two or more tokens; give "
                "a smaller --context-length, or more activations"
            )
        self.knows_positions: bool = (
            shape.length is not None if settings.positions is None else settings.positions
        )
        if self.knows_positions and left_out:
            raise SettingsError(
                f"{source} has {shape.n_entries} rows, which are not whole contexts of {self.length}; give "
                "their true --context-length, or leave out --positions"
            )
        if settings.special_token_ids is not None and not self.cache.has_tokens:
            raise SettingsError(
                f"{source} has no token ids, so none are special; leave out --special-token-ids"
            )
        self.layer = self._layer()

    def _layer(self) -> int:
        hook, wanted = self.cache.hook_name, self.settings.layer
        found = None if hook is None else layer_of(hook)
        if hook is not None and found is None and hook.startswith(("blocks.", "model.")):
            raise SettingsError(
                f"{self.source} holds activations of {hook}, but a store holds the residual stream after a "
                "block; save activations of that hook point"
            )
        if found is not None and wanted not in (None, found):
            raise SettingsError(
                f"{self.source} is of {hook}, which is layer {found}, not {wanted}; leave out --layer"
            )
        layer = wanted if found is None else found
        if layer is None:
            raise SettingsError(f"{self.source} does not record its layer; give it with --layer")
        if layer >= MAX_LAYERS:
            raise SettingsError(
                f"layer {layer} is too large: layers are below {MAX_LAYERS:,}; choose another"
            )
        return layer

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not known about the activations, sorted."""
        said = {
            "documents": False,
            "model": self.settings.model != UNKNOWN,
            "positions": self.knows_positions,
            "special_tokens": self.settings.special_token_ids is not None,
            "tokens": self.cache.has_tokens,
        }
        return tuple(name for name, is_known in said.items() if not is_known)

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids [contexts, positions]; zeros where they are not known.

        Raises:
            ForeignFileError: values that are not token ids.
        """
        tokens = np.zeros((self.n_contexts, self.length), np.int32)
        if not self.cache.has_tokens:
            return tokens
        step = max(1, 2**20 // self.length)
        for start in range(0, self.n_contexts, step):
            stop = min(start + step, self.n_contexts)
            found = self.cache.read_tokens(*self._entries(start, stop)).reshape(stop - start, self.length)
            if found.min() < 0 or found.max() >= 2**31 - 1:
                raise ForeignFileError(
                    f"{self.source}: token ids are not all between 0 and 2^31 - 2; save it again"
                )
            tokens[start:stop] = found
        return tokens

    def _entries(self, start: int, stop: int) -> tuple[int, int]:
        """Entries of the files' axis 0 that make up contexts ``start`` to ``stop``."""
        each = 1 if self.cache.shape.length else self.length
        return start * each, stop * each

    def _digest(self) -> str:
        """Digests of the files by name; sizes would not distinguish other activations."""
        files = self.cache.files
        try:
            with reading("digest of the files", files.values(), self._progress) as advance:
                digests = sorted((name, sha256(path, advance)) for name, path in files.items())
        except OSError as error:
            raise ForeignFileError(
                f"{self.source}: cannot be read ({error}); check the files and their permissions"
            ) from None
        return f"sha256:{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]}"

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest, as far as its values are known."""
        s, cache = self.settings, self.cache
        held_out = held_out_contexts(self.n_contexts, s.held_out, CHUNK_CONTEXTS)
        special = tuple(sorted(set(s.special_token_ids or ())))
        largest = max(int(self.tokens.max()), *special, 0)
        return Manifest(
            model=s.model,
            model_revision=None,
            model_config_hash="",
            model_layers=self.layer + 1,
            d_model=cache.shape.d_model,
            attention=UNKNOWN,
            device=UNKNOWN,
            batch_contexts=1,
            n_contexts=self.n_contexts,
            context_length=self.length,
            skip_contexts=0,
            held_out=(self.n_contexts - held_out, self.n_contexts),
            packing="pack",
            dataset=_printable(self.source.absolute().name),
            dataset_revision=self._digest(),
            dataset_config=None,
            dataset_split=None,
            dataset_column=_printable(cache.tensor) or None,
            tokenizer_hash="",
            first_token=None,
            separator_token=None,
            special_token_ids=special,
            vocabulary_size=largest + 1,
            seed=0,
            codec=s.codec,
            byte_counts=True,
            imported=Imported(kind=cache.kind, dtype=cache.shape.dtype, unknown=self.unknown),
            chunk_contexts=CHUNK_CONTEXTS,
            shard_contexts=shard_contexts(self.n_contexts),
            versions={name: version(name) for name in _VERSIONS_THAT_MATTER},
        )

    def run(self, progress: Progress | None = None) -> ImportedStore:
        """Import what is missing, and seal the store.

        Raises:
            ForeignFileError: a file is damaged, or an activation is not finite.
            SettingsError: contexts that are too large for a store.
            StoreMismatchError: the store was begun from other files, or with other settings.
            StoreWriteError: the disk refused.
        """
        self._progress = progress = progress or Silent()
        try:
            manifest = self.manifest
        except ForeignFileError:
            raise
        except ValueError:
            raise SettingsError(
                f"{self.source}: no store can have contexts of {self.length} tokens with "
                f"{self.cache.shape.d_model} numbers each; give a smaller --context-length"
            ) from None
        writer = StoreWriter.begin(self.path, manifest, [self.layer])
        with writer.lock():
            if not writer.has_tokens:
                # No counts: the corpus is not known.
                writer.write_tokens(self.tokens, np.zeros(self.tokens.shape, np.int64), {})
            layers = writer.begin_layers([self.layer])
        n_tokens = fill_shards(
            writer,
            layers,
            lambda shard, pool: self._fill_shard(shard, pool, progress),
            task="importing",
            progress=progress,
            not_finite=self._not_finite,
        )
        with writer.lock():
            writer.finish([self.layer])
        return ImportedStore(ActivationStore.open(self.path), n_tokens, self.n_left_out)

    def _not_finite(self, contexts: range) -> ForeignFileError:
        return ForeignFileError(
            f"{self.source}: an activation in contexts {contexts.start} to {contexts.stop - 1} is not "
            "finite, or too large for bfloat16; leave those contexts out"
        )

    def _fill_shard(self, shard: ShardOfLayers, pool: ThreadPoolExecutor, progress: Progress) -> None:
        manifest = self.manifest
        most_rows = min(_ROWS_AT_ONCE, _MOST_VALUES // manifest.d_model)
        chunk = manifest.chunk_contexts
        step = max(1, most_rows // (self.length * chunk)) * chunk
        for start in range(0, len(shard.contexts), step):
            contexts = shard.contexts[start : start + step]
            bits = self.cache.read(*self._entries(contexts.start, contexts.stop))
            bits = bits.reshape(len(contexts), self.length, manifest.d_model)
            tokens = self.tokens[contexts.start : contexts.stop]
            for layer in shard.layers:
                shard.append(layer, bits, ordinary_tokens(manifest, tokens, contexts), pool)
            progress.advance(tokens.size)


def _printable(name: str) -> str:
    """A name as a manifest may hold it."""
    return "".join(char if char.isprintable() else "?" for char in name)[:MAX_TEXT]
