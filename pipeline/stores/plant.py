"""Planting a known effect of position into a copy of a store, to test whether a method finds it.

The copy is written like a harvest, with the same tokens, layout and statistics, shard by shard, and resumes
after a kill. Its manifest records what was planted, also in the name of the model, so that no reader mistakes
it for a harvest. Activations of special tokens stay unchanged, as training leaves them out; all others are
changed in float32 and rounded to bfloat16. Costs reading and writing the store once, and two narrow matrix
products per token; memory for the tokens and a few batches.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...store.errors import SettingsError, StoreIncompleteError
from ...store.manifest import Manifest
from ...store.reader import ActivationStore
from ...store.rounding import float32_to_bits
from ...store.stats import LayerStats, bits_to_float32, ordinary_tokens
from ...store.writer import ShardOfLayers, StoreWriter
from ..progress import Progress, Silent
from ..ranges import PositionRange, parse_ranges
from ..settings import PlantSettings
from .assembling import but
from .filling import fill_shards

_DEFAULTS = {"additive": (0.12, 8), "rotation": (1.0, 32), "none": (0.0, 0)}
"""Strength and rank of each effect."""

_BATCH_CHUNKS = 4
_VERSIONS_THAT_MATTER = ("posae", "numpy", "numcodecs")


class Effect(Protocol):
    """A change to the activations of one layer."""

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The activations with the effect; float32 [contexts, positions, d_model], not changed in place."""
        ...


class Additive(NamedTuple):
    """A vector for each position, added."""

    vectors: NDArray[np.float32]
    """[positions, d_model]."""

    @classmethod
    def drawn(
        cls, stats: LayerStats, *, strength: float, rank: int, generator: np.random.Generator
    ) -> "Additive":
        """Smooth vectors in a random subspace: sines and cosines with 1, 2, 3 … cycles in twice a context.

        All have the same amplitude, chosen so that the vectors make up the share ``strength`` of the variance
        of the sum, over the store's ordinary tokens. Their correlation with the existing means by position is
        taken into account.

        Args:
            stats: of the layer.
            strength: the share, above 0 and below 1.
            rank: dimensions of the subspace; at most d_model, and the context's length.
            generator: where the subspace comes from.
        """
        length, d_model = stats.sums.shape
        cycles = np.arange(1, rank // 2 + 2, dtype=np.float64)
        turns = np.pi / length * np.arange(length, dtype=np.float64)[:, np.newaxis] * cycles
        waves = np.stack([np.sin(turns), np.cos(turns)], axis=2).reshape(length, -1)[:, :rank]
        vectors = waves @ orthonormal_rows(rank, d_model, generator)
        centred = vectors - stats.counts @ vectors / stats.n_tokens
        between = float((stats.counts * np.square(centred).sum(axis=1)).sum())
        agreeing = float((centred * stats.sums).sum())
        # Of a · vectors: a² · between = strength · (variation + 2 · a · agreeing + a² · between).
        twice = (1 - strength) * between
        root = math.sqrt((strength * agreeing) ** 2 + twice * strength * stats.variation)
        return cls((vectors * ((strength * agreeing + root) / twice)).astype(np.float32))

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add each position's vector."""
        return values + self.vectors


class Rotation(NamedTuple):
    """A subspace rotated about the layer's mean, differently in each range; the first is unchanged."""

    mean: NDArray[np.float32]
    """Mean of the store's ordinary tokens; [d_model]."""

    subspace: NDArray[np.float32]
    """Orthonormal rows; [rank, d_model]."""

    changes: NDArray[np.float32]
    """Change of the subspace's components in each range; [ranges, rank, d_model], 0 in the first."""

    ranges: tuple[PositionRange, ...]

    @classmethod
    def drawn(
        cls,
        stats: LayerStats,
        *,
        strength: float,
        rank: int,
        ranges: tuple[PositionRange, ...],
        generator: np.random.Generator,
    ) -> "Rotation":
        """One random subspace for all ranges, and a random rotation of it for each range but the first.

        The rotation turns ⌊rank / 2⌋ random planes of the subspace, perpendicular to each other, by angles
        drawn evenly between -π and π times ``strength``. It keeps each activation's distance from the mean,
        and so the variance of each range; position explains about as much as it did before.

        Args:
            stats: of the layer.
            strength: above 0, at most 1.
            rank: dimensions of the subspace, from 2 to d_model.
            ranges: position ranges.
            generator: where subspace, planes and angles come from.
        """
        d_model = stats.sums.shape[1]
        subspace = orthonormal_rows(rank, d_model, generator)
        changes = np.zeros((len(ranges), rank, d_model))
        for number in range(1, len(ranges)):
            planes = orthonormal_rows(rank, rank, generator)
            angles = strength * generator.uniform(-np.pi, np.pi, rank // 2)
            turned = planes.copy()
            one, other = planes[0 : 2 * len(angles) : 2], planes[1 : 2 * len(angles) : 2]
            cos, sin = np.cos(angles)[:, np.newaxis], np.sin(angles)[:, np.newaxis]
            turned[0 : 2 * len(angles) : 2] = cos * one + sin * other
            turned[1 : 2 * len(angles) : 2] = cos * other - sin * one
            changes[number] = (planes.T @ turned - np.eye(rank)) @ subspace
        mean = stats.sums.sum(axis=0) / stats.n_tokens
        return cls(mean.astype(np.float32), subspace.astype(np.float32), changes.astype(np.float32), ranges)

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rotate the components in the subspace."""
        turned = values.copy()
        for (start, stop), change in zip(self.ranges[1:], self.changes[1:], strict=True):
            inside = (values[:, start:stop] - self.mean) @ self.subspace.T
            turned[:, start:stop] += inside @ change
        return turned


def unchanged(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The effect ``none``."""
    return values


def orthonormal_rows(n_rows: int, width: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """A uniformly random orthonormal basis of a random subspace; [n_rows, width]."""
    q, r = np.linalg.qr(generator.standard_normal((width, n_rows)))
    return (q * np.sign(np.diagonal(r))).T


class Planted(NamedTuple):
    """The result of planting."""

    store: ActivationStore
    layers: tuple[int, ...]
    """The requested layers."""

    n_tokens: int
    """Tokens changed or copied this time; 0 if the store was complete."""


class Planting:
    """Planting before it runs: settings are resolved and the source checked, and nothing is written yet."""

    def __init__(self, source: ActivationStore, path: Path, settings: PlantSettings) -> None:
        """Resolve the open settings.

        Raises:
            SettingsError: a setting does not fit the store.
            StoreIncompleteError: the store is unfinished or lacks the layer.
            StoreDamagedError: the store is not what was written.
        """
        self.source = source
        self.path = path
        self.settings = settings
        if source.identity is None:
            raise StoreIncompleteError(f"{source.root} is an unfinished harvest; finish it before planting")
        if str(path.absolute()) == source.address:
            raise SettingsError(f"{path} is the store to plant from; choose another folder for the new one")
        self.layers: tuple[int, ...] = source.layers if settings.layer is None else (settings.layer,)
        for layer in self.layers:
            source.check_layer(layer)
        self.ranges: tuple[PositionRange, ...] = parse_ranges(settings.ranges, source.context_length)
        strength, rank = _DEFAULTS[settings.effect]
        self.strength: float = strength if settings.strength is None else settings.strength
        self.rank: int = rank if settings.rank is None else settings.rank
        most = source.d_model
        if settings.effect == "additive":
            most = min(most, source.context_length)
        if settings.effect != "none" and self.rank > most:
            raise SettingsError(
                f"rank {self.rank}: activations of {source.d_model} numbers at {source.context_length} "
                f"positions have room for {settings.effect} of rank {most}; give --rank {most} or less"
            )

    @cached_property
    def manifest(self) -> Manifest:
        """The source's manifest, with what is planted."""
        source, settings = self.source.manifest, self.settings
        planted = {
            "effect": settings.effect,
            "model": source.language_model,
            "store": str(self.source.identity),
        }
        named = f"planted {settings.effect}"
        if settings.effect != "none":
            named += f" {self.strength:g}"
            planted |= {"strength": repr(self.strength), "rank": str(self.rank), "seed": str(settings.seed)}
        if settings.effect == "rotation":
            planted["ranges"] = ",".join(map(str, self.ranges))
        changed = {
            "model": f"{source.model} + {named}",
            "planted": planted,
            # Planted activations are not rounded again.
            "mantissa_bits": None,
            "byte_counts": True,
            "versions": {**source.versions, **{name: version(name) for name in _VERSIONS_THAT_MATTER}},
        }
        return Manifest.model_validate(source.model_dump() | changed)

    def effect(self, layer: int) -> Effect:
        """The change to one layer; each layer has its own subspace.

        Raises:
            StoreIncompleteError: the training part has no ordinary tokens to measure an effect by.
            StoreDamagedError: the statistics are not what was written.
        """
        settings = self.settings
        if settings.effect == "none":
            return unchanged
        stats = self.source.stats(layer)
        if not 0 < stats.variation < math.inf:
            raise StoreIncompleteError(
                f"layer {layer} of {self.source.root} has no variance over the ordinary tokens of its "
                "training part, so that no strength can be measured by it; harvest more contexts"
            )
        generator = np.random.default_rng([settings.seed, layer])
        if settings.effect == "additive":
            return Additive.drawn(stats, strength=self.strength, rank=self.rank, generator=generator)
        return Rotation.drawn(
            stats, strength=self.strength, rank=self.rank, ranges=self.ranges, generator=generator
        )

    def run(self, progress: Progress | None = None) -> Planted:
        """Plant what is missing, and seal the new store.

        Raises:
            SettingsError: an activation that is too large to be changed.
            StoreDamagedError: a chunk of the source is not what was written.
            StoreMismatchError: the new store was begun with other settings.
            StoreWriteError: the disk refused.
        """
        progress = progress or Silent()
        effects = {layer: self.effect(layer) for layer in self.layers}
        writer = StoreWriter.begin(self.path, self.manifest, self.layers)
        with writer.lock():
            if not writer.has_tokens:
                writer.write_tokens(self.source.tokens(), self.source.documents(), self.source.corpus)
            versions = {
                layer: but(self.source.layer_versions(layer), _VERSIONS_THAT_MATTER) for layer in self.layers
            }
            layers = writer.begin_layers(self.layers, versions)
        n_tokens = fill_shards(
            writer,
            layers,
            lambda shard, pool: self._fill_shard(shard, effects, pool, progress),
            task="planting",
            progress=progress,
            not_finite=self._too_large,
        )
        with writer.lock():
            writer.finish(self.layers)
        return Planted(ActivationStore.open(self.path), self.layers, n_tokens)

    def _too_large(self, contexts: range) -> SettingsError:
        return SettingsError(
            f"{self.source.root} has activations in contexts {contexts.start} to {contexts.stop - 1} "
            "that are too large to be changed; choose another --layer"
        )

    def _fill_shard(
        self,
        shard: ShardOfLayers,
        effects: dict[int, Effect],
        pool: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        manifest = self.manifest
        step = manifest.chunk_contexts * _BATCH_CHUNKS
        for start in range(0, len(shard.contexts), step):
            contexts = shard.contexts[start : start + step]
            part = slice(contexts.start, contexts.stop)
            tokens = self.source.tokens(part)
            special = np.isin(tokens, np.array(manifest.special_token_ids))
            ordinary = ordinary_tokens(manifest, tokens, contexts)
            for layer in shard.layers:
                bits = self.source.read(layer, part)
                with np.errstate(over="ignore", invalid="ignore"):  # refused by the writer
                    planted = float32_to_bits(effects[layer](bits_to_float32(bits)))
                planted[special] = bits[special]
                shard.append(layer, planted, ordinary, pool)
            progress.advance(tokens.size)
