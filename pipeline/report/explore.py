"""The features of finished runs, for the page of a report: where each one fires, and on what text.

Two passes over the first contexts of the held-out part of a run's store. The first accumulates statistics
of every feature; the second reads the contexts with the largest activations of the chosen features again.
Nothing is written.

Cost: each context is encoded twice, and once more without position adapters where there are some. Memory: a
few batches of codes; at most 28 bytes per feature and position (44 with adapters); and a byte per position of
each excerpt.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from ...store.errors import PosaeError, StoreIncompleteError, StoreNotFoundError
from ...store.reader import ActivationStore
from ..device import choose_device, numbers_at_once
from ..errors import RunError, RunNotFoundError
from ..evaluate.scoring.profiles import (
    ProfileKeeper,
    Profiles,
    choose_features,
    in_levels,
    neighbours,
    turned,
)
from ..harvest.language_model import is_hub_id, load_tokenizer
from ..harvest.text.contexts import tokenizer_hash
from ..metrics import ABOVE
from ..progress import Progress, Silent
from ..ranges import PositionRange, equal_ranges
from ..runs import Run
from ..sae.autoencoder import Autoencoder
from ..sae.hierarchical import Hierarchical
from ..sae.masked import Masked
from ..sae.saving import load_autoencoder
from ..train.batches import as_torch
from .page.explored import Excerpt, Explored, ExploredFeature, Unexplored

N_EXCERPTS = 10
"""Contexts shown for each feature."""
N_NEIGHBOURS = 6
MAX_BINS = 64
"""Bins of a feature's density by position."""

_CODE_NUMBERS = 2**22
"""About how many numbers of a code are in memory at once: 16 MB, a few times over; more on a GPU."""


def explore_runs(
    runs: Iterable[tuple[str, Path]],
    *,
    n_features: int,
    n_contexts: int,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> list[Explored | Unexplored]:
    """The features of each run, or the reason why they cannot be shown.

    Args:
        runs: label and folder of each.
        n_features: maximum features to show of a run; at least 1.
        n_contexts: maximum held-out contexts to scan; at least 1.
        tokenizer: hub id or folder of the stores' tokenizer; by default the one that each store names.
        progress: reports progress.
    """
    progress = progress or Silent()
    readers = _Readers(tokenizer, progress)
    explored: list[Explored | Unexplored] = []
    for label, folder in runs:
        try:
            explored.append(_explored(label, folder, n_features, n_contexts, readers, progress))
        except PosaeError as error:
            progress.say(f"no explorer of {label}: {error}")
            explored.append(Unexplored(label, str(folder), str(error)))
    return explored


@torch.no_grad()
def _explored(
    label: str, folder: Path, n_features: int, n_contexts: int, readers: "_Readers", progress: Progress
) -> Explored:
    """The features of one run."""
    looked_at = _LookedAt.of(Run(folder), n_contexts)
    store, autoencoder = looked_at.store, looked_at.autoencoder
    length = store.context_length
    reader, note = readers.of(store)
    progress.begin(f"exploring {label}", (looked_at.stop - looked_at.start) * length, "tokens")
    profiles = _profiles(looked_at, progress)
    progress.end()
    ranges = autoencoder.ranges if len(autoencoder.ranges) > 1 else equal_ranges(length, min(4, length))
    features = _features(looked_at, profiles, ranges, n_features, progress)
    shown = sorted({excerpt.context for feature in features for excerpt in feature.excerpts})
    tokens = dict(zip(shown, store.tokens(np.array(shown, np.int64)), strict=True))
    ids = sorted({int(token) for row in tokens.values() for token in row})
    return Explored(
        label=label,
        folder=str(folder),
        layer=looked_at.layer,
        contexts=(looked_at.start, looked_at.stop),
        n_tokens=int(profiles.n_rows.sum()),
        context_length=length,
        ranges=[(r.start, r.stop) for r in ranges],
        dictionary_size=autoencoder.dictionary_size,
        n_fired=int(profiles.firings.any(axis=0).sum()),
        features=features,
        tokens=tokens,
        texts=None if reader is None else {token: _text(reader, token) for token in ids},
        note=note,
    )


def _profiles(looked_at: "_LookedAt", progress: Progress) -> Profiles:
    """Statistics of every feature; the first pass."""
    autoencoder, length = looked_at.autoencoder, looked_at.store.context_length
    has_base = _has_adapters(autoencoder)
    keeper = ProfileKeeper(
        autoencoder.dictionary_size,
        length,
        n_kept=N_EXCERPTS,
        above=ABOVE,
        has_base=has_base,
        device=looked_at.device,
    )
    for contexts, x, is_ordinary in looked_at.batches(np.arange(looked_at.start, looked_at.stop)):
        code = _code(autoencoder, x, is_ordinary)
        base_code = _code(autoencoder, x, is_ordinary, without_adapters=True) if has_base else None
        keeper.add(code, base_code, contexts, is_ordinary)
        progress.advance(len(contexts) * length)
    profiles = keeper.profiles()
    if not profiles.n_rows.any():
        raise StoreIncompleteError(f"{looked_at.store.root} has only special tokens in its held-out contexts")
    return profiles


def _features(
    looked_at: "_LookedAt",
    profiles: Profiles,
    ranges: Sequence[PositionRange],
    n_features: int,
    progress: Progress,
) -> list[ExploredFeature]:
    """The features to show, with their excerpts; the second pass."""
    by_range = profiles.by_range([r.start for r in ranges])
    specificity, base = by_range.specificity, by_range.base_mean
    density = profiles.density()
    chosen = choose_features(profiles.firings.sum(axis=0), specificity.information, n_features)
    density_by_position, mean_by_position = _binned(profiles, chosen)
    levels = _levels(looked_at, profiles, chosen, progress)
    nearest, cosines = neighbours(looked_at.autoencoder.W_dec, chosen, N_NEIGHBOURS)
    decoders = _decoders(looked_at.autoencoder, chosen, ranges)
    return [
        ExploredFeature(
            number=feature,
            density=float(density[feature]),
            specificity=float(specificity.information[feature]),
            is_above_chance=bool(specificity.is_above[feature]),
            specialisation=float(specificity.specialisation[feature]),
            density_by_position=density_by_position[:, place].tolist(),
            mean_by_position=mean_by_position[:, place].tolist(),
            density_by_range=by_range.density[:, feature].tolist(),
            mean_by_range=by_range.mean[:, feature].tolist(),
            base_by_range=None if base is None else base[:, feature].tolist(),
            decoder_by_range=None if decoders is None else decoders[:, place].tolist(),
            neighbours=list(zip(nearest[place].tolist(), cosines[place].tolist(), strict=True)),
            excerpts=[
                Excerpt(
                    int(profiles.peak_contexts[kept, feature]),
                    float(peak),
                    int(profiles.peak_positions[kept, feature]),
                    levels[place, kept],
                )
                for kept, peak in enumerate(profiles.peaks[:, feature])
                if peak
            ],
        )
        for place, feature in enumerate(chosen.tolist())
    ]


class _Store(BaseModel):
    path: str
    training_contexts: NonNegativeInt
    left_out_ids: list[int]


class _Layer(BaseModel):
    layer: NonNegativeInt


class _Config(BaseModel):
    """The keys of ``config.json`` that are used."""

    settings: _Layer
    store: _Store


class _LookedAt(NamedTuple):
    """A run, and the contexts that are scanned for its features."""

    store: ActivationStore
    layer: int
    start: int
    stop: int
    leave_out: NDArray[np.int64]
    autoencoder: Autoencoder
    device: torch.device

    @classmethod
    def of(cls, run: Run, n_contexts: int) -> "_LookedAt":
        try:
            config = _Config.model_validate(run.config)
        except ValidationError:
            raise RunError(
                f"{run.folder / 'config.json'} does not say which store the run read; train it again"
            ) from None
        if not run.is_finished:
            raise RunNotFoundError(
                f"{run.folder} has not finished training; run posae train again to resume it"
            )
        place, layer = _place(run, config.store.path), config.settings.layer
        try:
            store = ActivationStore.open(place)
        except StoreNotFoundError:
            raise StoreNotFoundError(
                f"there is no store at {place}; if it was moved: posae evaluate {run.folder} --store STORE"
            ) from None
        store.check_layer(layer)
        run.check_read(store, layer, "run posae evaluate with --store and the right one")
        first, last = store.held_out_part(layer)
        start = max(first, config.store.training_contexts)
        if start >= last:
            raise StoreIncompleteError(
                f"{store.root} has no held-out contexts; harvest more, with --held-out above 0"
            )
        device = choose_device("auto", with_float64=True)
        autoencoder = load_autoencoder(run.folder).to(device)
        if not all(bool(torch.isfinite(weight).all()) for weight in autoencoder.state_dict().values()):
            raise RunError(f"{run.folder} has weights that are not finite: its training diverged")
        return cls(
            store,
            layer,
            start,
            min(last, start + n_contexts),
            np.array(config.store.left_out_ids, np.int64),
            autoencoder,
            device,
        )

    def batches(
        self, contexts: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, NDArray[np.bool_]]]:
        """Whole contexts in order, in batches.

        Args:
            contexts: indices, ascending; [contexts].

        Yields:
            Their indices; their activations, bfloat16 [contexts, positions, d_model]; and which of their
            tokens are ordinary, [contexts, positions].
        """
        chunk = self.store.manifest.chunk_contexts
        on_cpu = self.device.type == "cpu"
        numbers = _CODE_NUMBERS if on_cpu else max(_CODE_NUMBERS, numbers_at_once(self.device))
        most = numbers // (self.autoencoder.dictionary_size * self.store.context_length)
        size = max(chunk, min(64, most - most % chunk))
        for begin in range(0, len(contexts), size):
            part = contexts[begin : begin + size]
            x = as_torch(self.store.read(self.layer, part)).to(self.device)
            yield part, x, ~np.isin(self.store.tokens(part), self.leave_out)


def _place(run: Run, path: str) -> str:
    """Path of the store: where it was last scored, if that is the one that the run was trained from."""
    try:
        scored: Any = run.evaluation.get("store")
    except RunError:
        return path
    store = cast("dict[str, Any]", scored) if isinstance(scored, dict) else {}
    return str(store.get("path") or path) if store.get("trained_from") else path


def _code(
    autoencoder: Autoencoder, x: Tensor, is_ordinary: NDArray[np.bool_], *, without_adapters: bool = False
) -> Tensor:
    """Codes [contexts, positions, features] of whole contexts, 0 on tokens that are not ordinary."""
    alpha = autoencoder.alpha
    if without_adapters:
        autoencoder.alpha = 0.0
    try:
        code = autoencoder.encode(x, torch.arange(x.shape[1], device=x.device))
    finally:
        autoencoder.alpha = alpha
    return code.mul_(torch.as_tensor(is_ordinary).to(x.device)[..., None])


def _has_adapters(autoencoder: Autoencoder) -> bool:
    """Whether alpha changes codes."""
    learned = isinstance(autoencoder, Hierarchical) or autoencoder.position_adapter.form != "none"
    mask = isinstance(autoencoder, Masked) and autoencoder.mask_schedule == "curriculum"
    return autoencoder.alpha != 0 and (learned or mask)


def _levels(
    looked_at: _LookedAt, profiles: Profiles, chosen: NDArray[np.int64], progress: Progress
) -> NDArray[np.int8]:
    """Activations in the excerpts of the chosen features, in levels; int8 [chosen, kept, positions]."""
    length = looked_at.store.context_length
    which = np.where(profiles.peaks[:, chosen] != 0, profiles.peak_contexts[:, chosen], -1)
    levels = np.zeros((len(chosen), len(which), length), np.int8)
    wanted = np.unique(which[which >= 0])
    device = looked_at.device
    features = torch.as_tensor(chosen).to(device)
    peaks = torch.as_tensor(np.abs(profiles.peaks[0, chosen])).to(device)
    progress.begin("reading excerpts", len(wanted) * length, "tokens")
    for contexts, x, is_ordinary in looked_at.batches(wanted):
        code = _code(looked_at.autoencoder, x, is_ordinary)[..., features]
        in_batch = in_levels(code, peaks)
        kept, place = np.nonzero((which >= contexts[0]) & (which <= contexts[-1]))
        row = np.searchsorted(contexts, which[kept, place])
        levels[place, kept] = in_batch[row, :, place]
        progress.advance(len(contexts) * length)
    progress.end()
    return levels


def _decoders(
    autoencoder: Autoencoder, chosen: NDArray[np.int64], ranges: Sequence[PositionRange]
) -> NDArray[np.float32] | None:
    """Cosines of chosen directions with the adapted ones; float32 [ranges, chosen], None without any."""
    adapter = autoencoder.position_adapter
    if adapter.decoder_in is None or adapter.decoder_out is None:
        return None
    features = torch.as_tensor(chosen).to(autoencoder.W_dec.device)
    inner, decoder = adapter.decoder_in[:, features], autoencoder.W_dec[features]
    cosines = turned(decoder, inner, adapter.decoder_out, autoencoder.alpha)
    # An adapter shared by all ranges is shown in each.
    return np.broadcast_to(cosines, (len(ranges), len(chosen))) if len(cosines) == 1 else cosines


def _binned(profiles: Profiles, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Density and mean activation by position, in at most ``MAX_BINS`` bins; [bins, chosen] each."""
    length = len(profiles.n_rows)
    n_bins = min(length, MAX_BINS)
    starts = np.arange(n_bins) * length // n_bins
    rows = np.maximum(1, np.add.reduceat(profiles.n_rows, starts))[:, np.newaxis]
    firings, sums = (np.add.reduceat(of[:, chosen], starts) for of in (profiles.firings, profiles.sums))
    return firings / rows, sums / rows


class _Readers:
    """The stores' tokenizers, or why there are none; each is loaded once."""

    def __init__(self, named: str | None, progress: Progress) -> None:
        self._named = named
        self._progress = progress
        self._tokenizers: dict[tuple[str, str | None, str], tuple[Any, str | None]] = {}

    def of(self, store: ActivationStore) -> tuple[Any, str | None]:
        """A store's tokenizer, or None and why."""
        manifest = store.manifest
        name = self._named or manifest.language_model
        revision = None if self._named else manifest.model_revision
        key = (name, revision, manifest.tokenizer_hash)
        if key not in self._tokenizers:
            self._tokenizers[key] = self._loaded(*key)
            if note := self._tokenizers[key][1]:
                self._progress.say(f"token ids are shown instead of text: {note}")
        return self._tokenizers[key]

    def _loaded(self, name: str, revision: str | None, wanted_hash: str) -> tuple[Any, str | None]:
        if not self._named and name != "demo":
            if not is_hub_id(name, revision):
                return (
                    None,
                    f"the store was made with a local model, {name}; name its folder with --tokenizer",
                )
            self._progress.say(f"tokenizer of {name}")
        try:
            tokenizer = load_tokenizer(name, revision)
        except PosaeError as error:
            return None, str(error)
        if tokenizer_hash(tokenizer) != wanted_hash:
            return None, (
                f"the tokenizer of {name} is not the one that the store was made with; "
                "name the right one with --tokenizer"
            )
        return tokenizer, None


def _text(tokenizer: Any, token: int) -> str:
    """A token's text; for a part of a character, its name in the vocabulary."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
