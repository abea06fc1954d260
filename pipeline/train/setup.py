"""A run before anything is computed: settings resolved, store checked, autoencoder and batches at hand."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...store.errors import SettingsError
from ...store.reader import ActivationStore
from ...store.stats import LayerStats
from ..device import choose_device
from ..errors import RunMismatchError
from ..processes import processes_here
from ..ranges import PositionRange, parse_ranges
from ..runs import Run
from ..sae.autoencoder import Autoencoder
from ..sae.registry import architecture_class
from ..settings import TrainSettings
from .batches import ShuffledBatches
from .chunk_memory import DecodedLayer
from .data_parallel import Team
from .resolving import autoencoder_of, resolve
from .run_config import comparable_config, run_config, sae_lens_metadata, training_contexts
from .state import State


class Setup:
    """A run that is about to be trained.

    Attributes:
        store: that it reads.
        run: its folder.
        device: that it trains on.
        settings: resolved.
        layer: of the store.
        ranges: position ranges.
        n_contexts: training contexts, the first of the store.
        leave_out: token ids whose rows are left out.
    """

    def __init__(self, store: ActivationStore, folder: Path, settings: TrainSettings) -> None:
        """Resolve the settings that are left open.

        Raises:
            SettingsError: a setting does not fit the store.
            StoreIncompleteError: the store lacks the layer.
            StoreDamagedError: the store is not what was written.
        """
        self.store = store
        self.run = Run(folder)
        self.device = choose_device(settings.device, processes_here().local_rank, with_float64=True)
        self.settings = resolve(store, settings, self.device)
        assert self.settings.layer is not None
        self.layer = self.settings.layer
        store.check_layer(self.layer)
        self.ranges: tuple[PositionRange, ...] = parse_ranges(self.settings.ranges, store.context_length)
        self.n_contexts = training_contexts(self.run, store, self.layer)
        self.leave_out = () if self.settings.special_tokens else store.manifest.special_token_ids
        self.new_autoencoder(None)  # refuses impossible settings before the run is begun

    @cached_property
    def stats(self) -> LayerStats:
        """Statistics of the layer; reads one entry of sums per shard, once."""
        return self.store.stats(self.layer)

    def new_autoencoder(self, generator: torch.Generator | None) -> Autoencoder:
        """An untrained autoencoder; without a generator its weights have shapes but no values.

        Raises:
            SettingsError: a setting that the architecture cannot have.
        """
        return autoencoder_of(
            self.settings,
            d_model=self.store.d_model,
            context_length=self.store.context_length,
            generator=generator,
            activation_scale=self._activation_scale() if generator else 1.0,
        )

    def _activation_scale(self) -> float:
        """The factor that gives the layer's ordinary tokens a root mean square norm of √d_model.

        Around their mean if that is subtracted, else around 0.
        """
        settings, stats = self.settings, self.stats
        if settings.activation_scale == "none":
            return 1.0
        is_centred = settings.position_mean != "none" or architecture_class(settings.architecture).is_centred
        squares = stats.variation if is_centred else float(stats.squares.sum())
        mean_square = squares / max(1, stats.n_tokens)
        if not mean_square > 0:
            raise SettingsError(
                "activation_scale rms needs ordinary tokens in the training part, and the store's stats name "
                "none; set activation_scale to none"
            )
        return math.sqrt(self.store.d_model / mean_square)

    def new_state(self, team: Team) -> State:
        """The state before the first step."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        autoencoder = self.new_autoencoder(generator)
        sums, counts = self.stats.sums, self.stats.counts
        if self.settings.shuffle_positions:  # then each position has the mean of all
            sums = counts[:, None] * (sums.sum(axis=0) / max(1, counts.sum()))
        autoencoder.fit_means(sums, counts)
        return State(autoencoder, self.settings, self.ranges, self.device, team)

    def batches(self, decoded: DecodedLayer | None = None, team: Team | None = None) -> ShuffledBatches:
        """The batches that the run reads, in its order.

        Args:
            decoded: memory in which the layer is kept decoded, if it is.
            team: of the process whose part is read; by default all of every batch.
        """
        team = team or Team()
        return ShuffledBatches(
            self.store,
            self.layer,
            self.ranges,
            batch_size=self.settings.batch_size,
            window_contexts=self.settings.window_contexts,
            seed=self.settings.data_seed,
            leave_out=self.leave_out,
            n_contexts=self.n_contexts,
            device=self.device,
            decoded=decoded,
            part=team.number,
            n_parts=team.n_processes,
        )

    @property
    def reads(self) -> tuple[Any, ...]:
        """Everything that the batches depend on: runs with equal values can share one pass over the store."""
        s = self.settings
        of_store = (self.store.address, self.layer, self.n_contexts, self.leave_out)
        return (*of_store, s.batch_size, s.window_contexts, s.data_seed, self.device)

    @property
    def epochs(self) -> float:
        """Epochs that the run trains for, about."""
        return self.settings.steps * self.settings.batch_size / max(1, self.stats.n_tokens)

    @cached_property
    def n_bytes(self) -> int:
        """Memory for the weights, their gradient and the optimizer."""
        return 4 * 4 * self.new_autoencoder(None).n_parameters()

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` says: everything that the weights depend on."""
        return run_config(
            self.store,
            self.layer,
            self.settings,
            device=self.device,
            n_contexts=self.n_contexts,
            left_out_ids=self.leave_out,
        )

    def config_to_check(self) -> dict[str, Any]:
        """``config``, with what may differ on resuming taken from the run.

        Raises:
            RunMismatchError: the run was begun on a store with other contents.
        """
        return comparable_config(self.config, self.settings, self.run, self.store, self.layer)

    @property
    def sae_lens_metadata(self) -> dict[str, Any]:
        """What ``cfg.json`` records about the activations, under SAELens' keys."""
        return sae_lens_metadata(self.store, self.layer, self.settings)

    def check(self) -> None:
        """Refuse a folder that is not this run and cannot become it, without writing.

        Raises:
            RunMismatchError: the run was begun with other settings or another store.
            RunError: the folder holds something else.
        """
        self.run.check(self.config_to_check())

    def take_after(self, team: Team) -> None:
        """Read the same contexts as the first process; does nothing for a single process.

        Raises:
            RunMismatchError: this process has other options than the first, or another store.
        """
        if team.n_processes == 1:
            return
        mine = self.config
        first: dict[str, Any] = team.told(mine)
        if not team.is_first:
            self.n_contexts = first["store"]["training_contexts"]
            for key in ("path", "training_contexts"):
                mine["store"][key] = first["store"][key]
        if mine != first:
            raise RunMismatchError(
                f"process {team.number} of this run has other settings, versions or another store than "
                "process 0; start all with the same options, on equal copies of one store"
            )
