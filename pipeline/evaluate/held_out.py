"""A finished run with the contexts that it is scored on: those of a store that it was not trained on."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, ValidationError

from ...store.errors import StoreIncompleteError, StoreNotFoundError
from ...store.reader import ActivationStore
from ..device import choose_device, numbers_at_once
from ..errors import RunError, RunMismatchError, RunNotFoundError
from ..processes import processes_here
from ..ranges import PositionRange, parse_ranges
from ..runs import Run
from ..sae.autoencoder import Autoencoder
from ..sae.saving import load_autoencoder


class TrainedFrom(BaseModel):
    """What ``config.json`` records of the store that a run was trained from."""

    path: str
    training_contexts: NonNegativeInt
    left_out_ids: list[int]
    read: dict[str, Any] | None = None
    model_revision: str | None = None
    d_model: int | None = None
    context_length: int | None = None


class _Settings(BaseModel):
    layer: NonNegativeInt
    ranges: str = "1"


class _Config(BaseModel):
    """The part of ``config.json`` that scoring needs."""

    settings: _Settings
    store: TrainedFrom


class HeldOut(NamedTuple):
    """A run and the contexts [start, stop) of a store that it is scored on."""

    run: Run
    trained_from: TrainedFrom
    store: ActivationStore
    layer: int
    ranges: tuple[PositionRange, ...]
    start: int
    stop: int
    left_out_ids: NDArray[np.int64]
    """Special tokens that training leaves out, and scores by default too; [ids]."""
    autoencoder: Autoencoder
    device: torch.device

    @classmethod
    def of(
        cls,
        run: Run,
        *,
        store: ActivationStore | None = None,
        other_store: str | None = None,
        path: str | None = None,
        n_contexts: int | None = None,
        device: str = "auto",
        option: str = "--store",
    ) -> "HeldOut":
        """Open a run and its store, and compare them.

        Args:
            run: what is scored.
            store: the run's store, if it is already open.
            other_store: a store to score the run on instead of its own: a folder or URL.
            path: where the run's own store is; by default where it was at training.
            n_contexts: maximum number of contexts; by default all that are held out.
            device: where the autoencoder runs.
            option: what names a store, for messages.

        Raises:
            RunNotFoundError: the run does not exist or is not finished.
            RunError: a file of the run is damaged.
            RunMismatchError: the store is not the one that the run was trained from, and no other was named;
                or its activations have another size.
            StoreNotFoundError: the store does not exist.
            StoreIncompleteError: the store holds no contexts out of training.
        """
        recorded = _config_of(run)
        trained_from, layer = recorded.store, recorded.settings.layer
        if store is None:
            store = _opened(other_store, path or trained_from.path, option)
        store.check_layer(layer)
        if other_store is None:
            run.check_read(store, layer, f"name the right one with {option}")
        _check_sizes(store, trained_from)
        start, stop = store.held_out_part(layer)
        if "tokens" not in run.unlike(store, layer):
            start = max(start, trained_from.training_contexts)
        if start >= stop:
            raise StoreIncompleteError(
                f"{store.root} holds no contexts out of training, so nothing can be scored; harvest at least "
                "16 contexts, with --held-out above 0"
            )
        chosen = choose_device(device, processes_here().local_rank, with_float64=True)
        return cls(
            run,
            trained_from,
            store,
            layer,
            parse_ranges(recorded.settings.ranges, store.context_length),
            start,
            min(stop, start + (n_contexts or stop - start)),
            np.array(trained_from.left_out_ids, np.int64),
            load_autoencoder(run.folder).to(chosen),
            chosen,
        )

    def batch_contexts(self, n_numbers: int) -> int:
        """Contexts per batch: whole chunks, at most 64 contexts.

        Args:
            n_numbers: numbers of a code [contexts, positions, features] to hold at once; on a GPU more, if
                it has the memory.
        """
        if self.device.type != "cpu":
            n_numbers = max(n_numbers, numbers_at_once(self.device))
        chunk = self.store.manifest.chunk_contexts
        n_contexts = n_numbers // (self.autoencoder.dictionary_size * self.store.context_length)
        return max(chunk, min(64, n_contexts - n_contexts % chunk))

    def is_special(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which tokens training leaves out; of the shape of ``tokens``."""
        return np.isin(tokens, self.left_out_ids)


def _config_of(run: Run) -> _Config:
    try:
        config = _Config.model_validate(run.config)
    except ValidationError:
        raise RunError(
            f"{run.folder / 'config.json'} does not say which store the run read; train it again"
        ) from None
    if not run.is_finished:
        raise RunNotFoundError(f"{run.folder} has not finished training; resume it with posae train")
    return config


def _opened(other_store: str | None, path: str, option: str) -> ActivationStore:
    if other_store is not None:
        return ActivationStore.open(other_store)
    try:
        return ActivationStore.open(path)
    except StoreNotFoundError:
        raise StoreNotFoundError(
            f"there is no store at {path}; if it was moved, name it with {option}"
        ) from None


def _check_sizes(store: ActivationStore, trained_from: TrainedFrom) -> None:
    for name, size in (("d_model", store.d_model), ("context_length", store.context_length)):
        trained: int | None = getattr(trained_from, name)
        if trained not in (None, size):
            raise RunMismatchError(
                f"{store.root} has {name} {size}, and the run {trained}; "
                "name the store that it was trained from with --store"
            )
