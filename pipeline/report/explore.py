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
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...store.errors import PosaeError, StoreIncompleteError
from ...store.reader import ActivationStore
from ..errors import RunError
from ..evaluate.held_out import HeldOut
from ..evaluate.scoring.profiles import (
    ProfileKeeper,
    Profiles,
    choose_features,
    in_levels,
    neighbours,
    turned,
)
from ..harvest.tokenizer import tokenizer_of
from ..metrics import ABOVE
from ..progress import Progress, Silent
from ..ranges import PositionRange, equal_ranges
from ..runs import Run
from ..sae.autoencoder import Autoencoder
from ..train.batch import as_torch
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
    tokenizers = _Tokenizers(tokenizer, progress)
    explored: list[Explored | Unexplored] = []
    for label, folder in runs:
        try:
            explored.append(_explored(label, folder, n_features, n_contexts, tokenizers, progress))
        except PosaeError as error:
            progress.say(f"no explorer of {label}: {error}")
            explored.append(Unexplored(label, str(folder), str(error)))
    return explored


@torch.no_grad()
def _explored(
    label: str, folder: Path, n_features: int, n_contexts: int, tokenizers: "_Tokenizers", progress: Progress
) -> Explored:
    """The features of one run."""
    held_out = _opened(Run(folder), n_contexts)
    store, autoencoder = held_out.store, held_out.autoencoder
    length = store.context_length
    tokenizer, note = tokenizers.of(store)
    progress.begin(f"exploring {label}", (held_out.stop - held_out.start) * length, "tokens")
    profiles = _profiles(held_out, progress)
    progress.end()
    ranges = autoencoder.ranges if len(autoencoder.ranges) > 1 else equal_ranges(length, min(4, length))
    features = _features(held_out, profiles, ranges, n_features, progress)
    shown = sorted({excerpt.context for feature in features for excerpt in feature.excerpts})
    tokens = dict(zip(shown, store.tokens(np.array(shown, np.int64)), strict=True))
    ids = sorted({int(token) for row in tokens.values() for token in row})
    return Explored(
        label=label,
        folder=str(folder),
        layer=held_out.layer,
        contexts=(held_out.start, held_out.stop),
        n_tokens=int(profiles.n_rows.sum()),
        context_length=length,
        ranges=[(r.start, r.stop) for r in ranges],
        dictionary_size=autoencoder.dictionary_size,
        n_fired=int(profiles.firings.any(axis=0).sum()),
        features=features,
        tokens=tokens,
        texts=None if tokenizer is None else {token: _text(tokenizer, token) for token in ids},
        note=note,
    )


def _profiles(held_out: HeldOut, progress: Progress) -> Profiles:
    """Statistics of every feature; the first pass."""
    autoencoder, length = held_out.autoencoder, held_out.store.context_length
    has_base = _has_adapters(autoencoder)
    keeper = ProfileKeeper(
        autoencoder.dictionary_size,
        length,
        n_kept=N_EXCERPTS,
        above=ABOVE,
        has_base=has_base,
        device=held_out.device,
    )
    for contexts, x, is_ordinary in _batches(held_out, np.arange(held_out.start, held_out.stop)):
        code = _code(autoencoder, x, is_ordinary)
        base_code = _code(autoencoder, x, is_ordinary, without_adapters=True) if has_base else None
        keeper.add(code, base_code, contexts, is_ordinary)
        progress.advance(len(contexts) * length)
    profiles = keeper.profiles()
    if not profiles.n_rows.any():
        raise StoreIncompleteError(f"{held_out.store.root} has only special tokens in its held-out contexts")
    return profiles


def _features(
    held_out: HeldOut,
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
    levels = _levels(held_out, profiles, chosen, progress)
    nearest, cosines = neighbours(held_out.autoencoder.W_dec, chosen, N_NEIGHBOURS)
    decoders = _decoders(held_out.autoencoder, chosen, ranges)
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


def _opened(run: Run, n_contexts: int) -> HeldOut:
    """A run and the contexts that its features are shown on.

    Raises:
        RunError: training diverged; and as ``HeldOut.of``.
    """
    held_out = HeldOut.of(
        run,
        path=_place(run),
        n_contexts=n_contexts,
        option=f"posae evaluate {run.folder} --store STORE",
    )
    if not all(bool(torch.isfinite(weight).all()) for weight in held_out.autoencoder.state_dict().values()):
        raise RunError(f"{run.folder} has weights that are not finite: its training diverged")
    return held_out


def _batches(
    held_out: HeldOut, contexts: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Tensor, NDArray[np.bool_]]]:
    """Whole contexts in order, a few at a time.

    Args:
        held_out: the run and its store.
        contexts: which, ascending; [contexts].

    Yields:
        Which these are; their activations, bfloat16 [contexts, positions, d_model]; and which of their
        tokens are ordinary, [contexts, positions].
    """
    size = held_out.batch_contexts(_CODE_NUMBERS)
    for begin in range(0, len(contexts), size):
        part = contexts[begin : begin + size]
        x = as_torch(held_out.store.read(held_out.layer, part)).to(held_out.device)
        yield part, x, ~held_out.is_special(held_out.store.tokens(part))


def _place(run: Run) -> str | None:
    """Where the run's store was when the run was last scored on it; None if it was not."""
    try:
        scored: Any = run.evaluation.get("store")
    except RunError:
        return None
    store = cast("dict[str, Any]", scored) if isinstance(scored, dict) else {}
    return str(store["path"]) if store.get("path") and store.get("trained_from") else None


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
    return autoencoder.alpha != 0 and autoencoder.comes_in_with_alpha


def _levels(
    held_out: HeldOut, profiles: Profiles, chosen: NDArray[np.int64], progress: Progress
) -> NDArray[np.int8]:
    """Activations in the excerpts of the chosen features, in levels; int8 [chosen, kept, positions]."""
    length = held_out.store.context_length
    which = np.where(profiles.peaks[:, chosen] != 0, profiles.peak_contexts[:, chosen], -1)
    levels = np.zeros((len(chosen), len(which), length), np.int8)
    wanted = np.unique(which[which >= 0])
    device = held_out.device
    features = torch.as_tensor(chosen).to(device)
    peaks = torch.as_tensor(np.abs(profiles.peaks[0, chosen])).to(device)
    progress.begin("reading excerpts", len(wanted) * length, "tokens")
    for contexts, x, is_ordinary in _batches(held_out, wanted):
        code = _code(held_out.autoencoder, x, is_ordinary)[..., features]
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


class _Tokenizers:
    """The stores' tokenizers, or why there are none; each is loaded once."""

    def __init__(self, named: str | None, progress: Progress) -> None:
        self._named = named
        self._progress = progress
        self._loaded: dict[str, tuple[Any, str | None]] = {}

    def of(self, store: ActivationStore) -> tuple[Any, str | None]:
        """A store's tokenizer, or None and why."""
        if store.address not in self._loaded:
            self._loaded[store.address] = self._load(store)
            if note := self._loaded[store.address][1]:
                self._progress.say(f"token ids are shown instead of text: {note}")
        return self._loaded[store.address]

    def _load(self, store: ActivationStore) -> tuple[Any, str | None]:
        try:
            return tokenizer_of(store, self._named, option="--tokenizer", progress=self._progress), None
        except PosaeError as error:
            return None, str(error)


def _text(tokenizer: Any, token: int) -> str:
    """A token's text; for a part of a character, its name in the vocabulary."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text
