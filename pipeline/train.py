"""Stage two: autoencoders from an activation store; no language model is needed.

Batches come from the store in an order that its settings fix; each row carries its position. A run
resumes at its last checkpoint with the same batches and, on the same machine, the same weights. Several
runs that read the same batches train side by side in one pass, each to the weights that it has alone; and
several processes can share one training (data_parallel.py). The autoencoder is float32, the activations
bfloat16. Costs: three products with the weights a step, while alpha is 0 nothing for adapters; three times
the weights for gradient and optimizer, of each run that trains; two windows of the store, or the layer where
it is kept decoded.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import __version__
from ..store.errors import RunBusyError, RunMismatchError, SettingsError, StoreIncompleteError
from ..store.ranges import PositionRange, parse_ranges
from ..store.reader import ActivationStore
from ..store.stats import LayerStats
from .batches import Batch, DecodedLayer, ShuffledBatches
from .controls import refuse_unknown_positions
from .data_parallel import Alone, Several, joined
from .device import choose_device, free_bytes
from .interrupts import held_back
from .metrics import ScoreKeeper
from .processes import processes_here, shares_a_training
from .progress import Progress, Silent
from .runs import Run
from .sae.autoencoder import Autoencoder, CommonSettings, Output
from .sae.calibration import calibrate_threshold
from .sae.registry import ARCHITECTURES, architecture_class, new_autoencoder
from .sae.saving import save_autoencoder
from .sae.share import AllRows
from .sae.topk import BatchTopK
from .schedules import Clock, Curriculum, learning_rate_factor
from .settings import TrainSettings

_CALIBRATION_ROWS = 2**16
"""Tokens of the training part that BatchTopK's threshold is set by in the end."""
_SHUFFLE = 0x5EED
_COUNT_DEAD_STEPS = 100
"""How often it is counted anew which features are dead: it makes a GPU wait."""


Watch = Callable[[Path, Mapping[str, Any]], None]
"""Is told of each line of metrics, with the folder of its run."""


class Trained(NamedTuple):
    """What a training left."""

    run: Run
    steps_done: int
    """Updates made this time; 0 if the run was finished."""


class Training:
    """A training about to run: settings resolved, store checked, nothing computed yet."""

    def __init__(self, store: ActivationStore, folder: Path, settings: TrainSettings) -> None:
        """Resolve what ``settings`` leave open.

        Raises:
            SettingsError: a setting does not fit the store.
            StoreIncompleteError: the store lacks the layer.
            StoreDamagedError: the store is not what was written.
        """
        self.store = store
        self.run = Run(folder)
        self.settings = resolve(store, settings)
        assert self.settings.layer is not None
        self.layer = self.settings.layer
        store.check_layer(self.layer)
        self.ranges: tuple[PositionRange, ...] = parse_ranges(self.settings.ranges, store.context_length)
        self.device = choose_device(self.settings.device, processes_here().local_rank)
        self.n_contexts = self._n_contexts()
        self.leave_out = () if self.settings.special_tokens else store.manifest.special_token_ids
        self.new_autoencoder(None)  # refuses what the architecture cannot be, before a run is begun

    @cached_property
    def stats(self) -> LayerStats:
        """Of the layer; an entry of sums for each shard is read, once."""
        return self.store.stats(self.layer)

    def new_autoencoder(self, generator: torch.Generator | None) -> Autoencoder:
        """An untrained autoencoder; without a generator one whose weights are only shapes.

        Raises:
            SettingsError: a setting that the architecture cannot have.
        """
        return _autoencoder_of(
            self.settings,
            d_model=self.store.d_model,
            context_length=self.store.context_length,
            generator=generator,
            activation_scale=_activation_scale(self) if generator else 1.0,
        )

    def _n_contexts(self) -> int:
        # A run keeps to the contexts that it began with, whatever the store has grown to since.
        if self.run.is_begun:
            begun: int = self.run.config.get("store", {}).get("training_contexts", 0)
            if begun > self.store.contexts_by_layer[self.layer]:
                raise RunMismatchError(
                    f"{self.run.folder} was begun on {begun} contexts, and {self.store.root} has "
                    f"{self.store.contexts_by_layer[self.layer]}; give the store that it was begun on"
                )
            return begun or self.store.training_contexts(self.layer)
        return self.store.training_contexts(self.layer)

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` says: all that the weights depend on."""
        store, manifest = self.store, self.store.manifest
        return {
            "posae": __version__,
            "torch": torch.__version__,
            "settings": self.settings.model_dump(mode="json"),
            "device": self.device.type,
            "store": {
                "path": store.address,
                "read": store.digests(self.layer),
                "model": manifest.model,
                "dataset": manifest.dataset,
                "hook_point": manifest.hook_point,
                "context_length": manifest.context_length,
                "d_model": manifest.d_model,
                "training_contexts": self.n_contexts,
                "left_out_ids": list(self.leave_out),
            },
        }

    def check(self) -> None:
        """Refuse a folder that cannot become, or is not, this run; ``train`` does so too.

        Raises:
            RunMismatchError: the run was begun with other settings or another store.
            RunError: the folder holds something else.
        """
        self.run.check(self.config_to_check())

    def train(
        self,
        progress: Progress | None = None,
        memory: "LayerMemory | None" = None,
        watch: Watch | None = None,
        team: Alone | None = None,
    ) -> Trained:
        """Train, or go on, to the last step.

        Args:
            progress: told of tokens.
            memory: where the layer is kept decoded, if it is.
            watch: told of what is measured.
            team: the processes that share the training, if there are several; each calls this.

        Raises:
            RunBusyError: another process trains the run.
            PosaeError: as ``Ongoing.begin`` and ``train_together``.
        """
        team = team or Alone()
        if team.is_first:
            self.check()
        with self.run.locked() if team.is_first else nullcontext(True) as is_held:
            if not is_held:
                raise RunBusyError(
                    f"{self.run.folder} is being trained by another process; wait for it, or give another "
                    "folder"
                )
            ongoing = Ongoing.begin(self, team)
            if ongoing is None:
                return Trained(self.run, 0)
            train_together([ongoing], progress, memory, watch)
            return Trained(self.run, ongoing.step - ongoing.start)

    @contextmanager
    def team(self) -> Generator[Alone]:
        """What this process is in the training: one of those that torchrun started, or alone.

        Raises:
            PosaeError: as ``joined``.
        """
        if shares_a_training():
            with joined(self.device) as several:
                yield several
        else:
            yield Alone()

    def take_after(self, team: Alone) -> None:
        """Read the contexts that the first process reads; where there is but one, nothing.

        Raises:
            RunMismatchError: this process was started otherwise than the first, or on another store.
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
                f"process {team.number} of this training has other settings, versions or another store than "
                "process 0; start all with the same words, on equal copies of one store"
            )

    def batches(self, decoded: DecodedLayer | None = None, team: Alone | None = None) -> ShuffledBatches:
        """What it reads, in its order.

        Args:
            decoded: where the layer is to be kept, if it is.
            team: of which process the part is wanted; by default all of every batch.
        """
        team = team or Alone()
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
        """What fixes the batches: trainings of which this is equal can share one pass over the store."""
        s = self.settings
        of_store = (self.store.address, self.layer, self.n_contexts, self.leave_out)
        return (*of_store, s.batch_size, s.window_contexts, s.data_seed, self.device)

    @cached_property
    def n_bytes(self) -> int:
        """Memory that its weights, their gradient and the optimizer take while it trains."""
        return 4 * 4 * self.new_autoencoder(None).n_parameters()

    def config_to_check(self) -> dict[str, Any]:
        """``config``, with what may differ from that of a run that was begun taken from there."""
        config = self.config
        if self.run.is_begun:
            begun = self.run.config
            config["posae"] = begun.get("posae")
            # A setting that there was not yet had what is now its default.
            fields, settings = TrainSettings.model_fields, begun.get("settings", {})
            for name in config["settings"].keys() - settings.keys():
                if config["settings"][name] == fields[name].default:
                    del config["settings"][name]
            # Where the store lies may change, what it holds may not; the digests say. Of another layer than
            # the run's they say nothing: that is another setting.
            if settings.get("layer") == self.layer:
                self.run.check_read(self.store.root, config["store"]["read"], "give that one to go on")
            for key in ("path", "read"):
                config["store"][key] = begun.get("store", {}).get(key)
        return config

    @property
    def sae_lens_metadata(self) -> dict[str, Any]:
        """What ``cfg.json`` says of where the activations are from, in SAELens' words."""
        manifest = self.store.manifest
        return {
            "model_name": manifest.model,
            "hook_name": f"blocks.{self.layer}.hook_resid_post",
            "hook_head_index": None,
            "context_size": manifest.context_length,
            "dataset_path": manifest.dataset,
            "prepend_bos": manifest.first_token is not None,
            "exclude_special_tokens": not self.settings.special_tokens,
            "model_class_name": "AutoModelForCausalLM",
            "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {},
        }


def side_by_side(trainings: Sequence[Training], most: int) -> list[list[Training]]:
    """Trainings in groups that share a pass, as many to a group as half of the free memory holds.

    Args:
        trainings: in the order that is wanted; a group stands where its first member stood.
        most: trainings to a group at the most.
    """
    groups: list[list[Training]] = []
    open_groups: dict[tuple[Any, ...], list[Training]] = {}
    for training in trainings:
        group = open_groups.get(training.reads)
        room = free_bytes(training.device) // 2
        if group is None or len(group) == most or sum(t.n_bytes for t in (*group, training)) > room:
            group = open_groups[training.reads] = []
            groups.append(group)
        group.append(training)
    return groups


class LayerMemory:
    """Whether a layer is kept decoded in memory, for later epochs and passes; one at a time is.

    Attributes:
        wish: ``always``, ``never``, or ``auto``: where a GPU or a server would have to be waited for, half of
            the free memory holds it, and it is read more than once.
    """

    def __init__(self, wish: Literal["auto", "always", "never"] = "auto") -> None:
        """Nothing is kept yet."""
        self.wish = wish
        self._of: tuple[Any, ...] | None = None
        self._kept: DecodedLayer | None = None

    def of(self, training: Training, steps: int) -> DecodedLayer | None:
        """Memory for what ``training`` reads in ``steps``, with what is there of it; None: it is not kept."""
        store, n_contexts = training.store, training.n_contexts
        which = (store.address, training.layer, n_contexts)
        if which != self._of:
            self._of, self._kept = which, None
            n_bytes = DecodedLayer.n_bytes(store, training.layer, n_contexts)
            if self.wish == "always" or (self.wish == "auto" and self._is_worth_it(training, steps, n_bytes)):
                self._kept = DecodedLayer(store, training.layer, n_contexts)
        return self._kept

    def _is_worth_it(self, training: Training, steps: int, n_bytes: int) -> bool:
        # Beside the products of a CPU decoding is next to nothing.
        is_waited_for = training.device.type != "cpu" or training.store.is_remote
        epochs = steps * training.settings.batch_size / (training.n_contexts * training.store.context_length)
        # In time each process of a machine comes to hold all of it: parts change from epoch to epoch.
        n_bytes *= processes_here().n_local
        return is_waited_for and epochs > 1 and n_bytes <= free_bytes(torch.device("cpu")) // 2


def train_together(
    trainings: "Sequence[Ongoing]",
    progress: Progress | None = None,
    memory: "LayerMemory | None" = None,
    watch: Watch | None = None,
) -> None:
    """Train several to their ends in one pass over their store; each to the weights that it has alone.

    Those that were interrupted at different steps are read for from the first of these on, and wait for
    theirs.

    Args:
        trainings: at least one; of all ``reads`` is equal.
        progress: told of the tokens of all of them together.
        memory: where their layer is kept decoded, if it is.
        watch: told of what is measured.

    Raises:
        StoreIncompleteError: the store has no token to train on.
        StoreDamagedError: a chunk is missing or not what was written.
        StoreWriteError: the disk refused.
    """
    progress = progress or Silent()
    first, team = trainings[0].training, trainings[0].state.team
    if any(one.training.reads != first.reads for one in trainings):
        raise ValueError("trainings that read different batches cannot share a pass")
    steps = max(one.stop for one in trainings) - min(one.start for one in trainings)
    batches = first.batches((memory or LayerMemory("never")).of(first, steps), team)
    if batches.is_empty:
        raise StoreIncompleteError(
            f"{first.store.root} has no token to train on in layer {first.layer}; harvest more contexts"
        )
    size = first.settings.batch_size
    n_steps, n_before = sum(one.stop for one in trainings), sum(one.start for one in trainings)
    start, stop = min(one.start for one in trainings), max(one.stop for one in trainings)
    progress.begin("training", n_steps * size, "tokens", n_before * size)
    with held_back() as interrupt:
        for batch in batches.steps(start, stop):
            x = batch.on_device.to(torch.float32)
            taking = [one for one in trainings if one.start <= batch.step < one.stop]
            for one in taking:
                progress.advance(size, one.take(batch, x, watch))
            interrupt.asked = team.agreed(interrupt.asked)
            for one in taking:
                # What ends before the others is safe until all are at their end.
                wanted = one.step == one.stop or one.step % one.training.settings.checkpoint_steps == 0
                if one.step < stop and (wanted or interrupt.asked):
                    one.save_checkpoint()
            interrupt.check()
    progress.end()
    for one in trainings:
        one.finish(batches)


class Ongoing:
    """A training that was begun: its state, and what goes into its folder when.

    Attributes:
        training: which.
        start: steps that were done before.
        step: steps that are done.
        stop: steps in the end.
    """

    def __init__(self, training: Training, state: "_State", start: int) -> None:
        """Of a state after ``start`` steps."""
        self.training, self.state = training, state
        self.start, self.step, self.stop = start, start, training.settings.steps

    @classmethod
    def begin(cls, training: Training, team: Alone | None = None) -> "Ongoing | None":
        """At the first step, or after the last checkpoint; None where the run is finished.

        Args:
            training: which.
            team: the processes that share it, if there are several; the first alone reads and writes the run.

        Raises:
            RunMismatchError: the run was begun with other settings or another store.
            RunError: the checkpoint is damaged, or the folder holds something else.
            SettingsError: the store has nothing that activations could be scaled by.
            StoreWriteError: the disk refused.
        """
        run, team = training.run, team or Alone()
        training.take_after(team)
        if team.is_first:
            run.begin(training.config_to_check())
        if team.told(run.is_finished):
            return None
        state = _State.new(training, team)
        checkpoint = run.load_checkpoint() if team.is_first else None
        start = 0
        if checkpoint:
            start, tensors = checkpoint
            state.restore(tensors)
        start = team.told(start)
        if tensors := team.sent(state.tensors):
            state.restore(tensors)
        if team.is_first:
            run.rewind_metrics(start)
        return cls(training, state, start)

    def take(self, batch: Batch, x: Tensor, watch: Watch | None = None) -> str:
        """One step; says what was measured, if anything."""
        run, state = self.training.run, self.state
        if self.step == self.training.settings.warmup_steps and state.team.is_first:
            run.save_base_phase(state.autoencoder.W_dec)
        with state.clock:
            line = self._step(batch, x)
        if not line or not state.team.is_first:
            return ""
        line = {"step": self.step, **line}
        run.add_metrics(line)
        if watch:
            watch(run.folder, line)
        return _note(line)

    def _step(self, batch: Batch, x: Tensor) -> dict[str, Any] | None:
        s, state = self.training.settings, self.state
        state.schedule(self.step)
        # Also where the base phase ends: what becomes of the base is told from there.
        measure = (self.step + 1) % s.log_steps == 0 or self.step + 1 in (s.warmup_steps, s.steps)
        line = state.update(batch, x, measure=measure)
        self.step += 1
        if self.step % _COUNT_DEAD_STEPS == 0:
            state.count_dead()
        return line

    def save_checkpoint(self) -> None:
        """Put what is needed to go on into the run."""
        if self.state.team.is_first:
            self.training.run.save_checkpoint(self.step, self.state.tensors())

    def finish(self, batches: ShuffledBatches) -> None:
        """After the last step: set what is set in the end, and write the weights.

        Args:
            batches: what was trained on, where one process had it all.
        """
        autoencoder, settings = self.state.autoencoder, self.training.settings
        if not self.state.team.is_first:
            return
        if self.state.team.n_processes > 1:  # what follows needs no others
            self.state.leave_team()
            batches = self.training.batches()
        if isinstance(autoencoder, BatchTopK):
            rows = (
                self.state.inputs(batch, batch.on_device.to(torch.float32))
                for batch in batches.steps(0, settings.steps)
            )
            calibrate_threshold(autoencoder, rows, max(_CALIBRATION_ROWS, 2 * settings.batch_size))
        save_autoencoder(autoencoder, self.training.run.folder, self.training.sae_lens_metadata)


def resolve(store: ActivationStore, settings: TrainSettings) -> TrainSettings:
    """The settings with everything that the store decides filled in.

    Raises:
        SettingsError: a setting does not fit the store.
        StoreIncompleteError: the store has no layers.
    """
    layer = store.layer_or_middle(settings.layer)
    parse_ranges(settings.ranges, store.context_length)
    _refuse_what_means_nothing(settings)
    refuse_unknown_positions(settings.model_dump(), store.manifest.unknown, store.root)
    warmup, ramp = settings.warmup_steps, settings.ramp_steps
    if warmup is None:
        # Not below a whole number that rounding hides: 1/11 of 11,000 is 1,000.
        wanted = math.floor(settings.steps * settings.warmup_share + 1e-6)
        warmup = wanted if ramp is None else settings.steps - ramp
    if ramp is None:
        share = settings.ramp_share or (0.2 if settings.curriculum == "plateau" else 1.0)
        ramp = max(1, min(settings.steps - warmup, math.floor(settings.steps * share + 1e-6)))
    kind = architecture_class(settings.architecture)
    size = settings.dictionary_size or store.d_model * kind.expansion
    resolved = settings.model_copy(
        update={
            "layer": layer,
            "dictionary_size": size,
            "learning_rate": settings.learning_rate or kind.usual_learning_rate(size),
            "warmup_steps": warmup,
            "ramp_steps": ramp,
        }
    )
    width = settings.adapter_width or max(1, store.d_model // 2)
    if settings.adapter_share is not None:
        width = _adapter_width(store, resolved, settings.adapter_share)
    update = {"adapter_width": width, "adapter_share": None, "ramp_share": None}
    # What was given stays known as that: so what is resolved can be resolved again.
    return TrainSettings.model_construct(settings.model_fields_set, **resolved.model_dump() | update)


def _refuse_what_means_nothing(settings: TrainSettings) -> None:
    """Raise SettingsError for a setting, given and not its default, that is only of other architectures."""
    homes: dict[str, list[str]] = {"adapter_share": ["hierarchical"]}
    for name, kind in ARCHITECTURES.items():
        for keyword in kind.keywords() & TrainSettings.model_fields.keys():
            homes.setdefault(keyword, []).append(name)
    for name in sorted(settings.model_fields_set & homes.keys()):
        is_default = getattr(settings, name) == TrainSettings.model_fields[name].default
        if settings.architecture not in homes[name] and not is_default:
            raise SettingsError(
                f"{name} is a setting of {', '.join(homes[name])}, and means nothing to "
                f"{settings.architecture}; leave it out"
            )


def _adapter_width(store: ActivationStore, settings: TrainSettings, share: float) -> int:
    """The width at which hierarchical's adapters come nearest to ``share`` of the other parameters."""
    one, two = (
        _autoencoder_of(
            settings.model_copy(update={"adapter_width": width}),
            d_model=store.d_model,
            context_length=store.context_length,
        )
        for width in (1, 2)
    )
    base, further = one.base_parameters(), two.n_parameters() - one.n_parameters()
    return max(1, 1 + round((base * (1 + share) - one.n_parameters()) / further))


def _autoencoder_of(
    settings: TrainSettings,
    *,
    d_model: int,
    context_length: int,
    generator: torch.Generator | None = None,
    activation_scale: float = 1.0,
) -> Autoencoder:
    """The autoencoder of resolved ``settings``; without a generator its weights are only shapes."""
    # An architecture's keywords, its own and the common ones, are settings of the same names.
    keywords = architecture_class(settings.architecture).keywords() | CommonSettings.__annotations__.keys()
    names = keywords & TrainSettings.model_fields.keys()
    given = {name: getattr(settings, name) for name in sorted(names)}
    return new_autoencoder(
        settings.architecture,
        **given
        | {
            "d_model": d_model,
            "ranges": parse_ranges(settings.ranges, context_length),
            "generator": generator,
            "activation_scale": activation_scale,
        },
    )


class _State:
    """All that changes while training, and one update of it."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        settings: TrainSettings,
        ranges: Sequence[PositionRange],
        device: torch.device,
        team: Alone,
    ) -> None:
        self.autoencoder = autoencoder
        self.team = team
        if isinstance(team, Several):
            autoencoder.share = team
        self.settings = settings
        self.ranges = ranges
        self.device = device
        assert settings.learning_rate is not None
        self.optimizer = torch.optim.AdamW(
            autoencoder.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        assert settings.warmup_steps is not None
        assert settings.ramp_steps is not None
        self.curriculum = Curriculum(
            settings.curriculum,
            steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            ramp_steps=settings.ramp_steps,
        )
        self.n_tokens = torch.zeros((), dtype=torch.int64)
        self.norms = torch.zeros(3, device=device)
        """Of gradients since the last line of metrics: how many, their sum, the sum of their squares."""
        self.clock = Clock()
        self.last_fired = torch.zeros(autoencoder.dictionary_size, dtype=torch.int64, device=device)

    @classmethod
    def new(cls, training: Training, team: Alone) -> "_State":
        generator = torch.Generator(training.device).manual_seed(training.settings.seed)
        autoencoder = training.new_autoencoder(generator)
        sums, counts = training.stats.sums, training.stats.counts
        if training.settings.shuffle_positions:  # then each position has the mean of all
            sums = counts[:, None] * (sums.sum(axis=0) / max(1, counts.sum()))
        autoencoder.fit_means(sums, counts)
        return cls(autoencoder, training.settings, training.ranges, training.device, team)

    def leave_team(self) -> None:
        """Go on without the other processes."""
        self.team, self.autoencoder.share = Alone(), AllRows()

    def schedule(self, step: int) -> None:
        """Set what changes by the step, for the update that follows ``step`` others."""
        s = self.settings
        assert s.learning_rate is not None
        factor = learning_rate_factor(
            step, s.steps, warmup=s.learning_rate_warmup, decay=s.learning_rate_decay
        )
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * factor
        self.autoencoder.alpha = self.curriculum.alpha(step)
        rising = s.sparsity_warmup * s.steps
        self.autoencoder.sparsity_factor = min(1.0, (step + 1) / rising) if rising else 1.0

    @torch.no_grad()
    def count_dead(self) -> None:
        """Tell the autoencoder which features were silent for long."""
        silent = int(self.n_tokens) - self.last_fired
        dead = silent > self.settings.dead_after_tokens
        self.autoencoder.dead = dead if bool(dead.any()) else None

    def inputs(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Activations float32 [rows, d_model], range offsets, positions [rows]: what ``forward`` takes.

        Args:
            batch: whose rows these are.
            x: its activations in float32, on the device; not changed.
        """
        if self.settings.shuffle_positions:
            order, batch = batch.with_positions_of_others(
                _shuffled(batch.n_rows, self.settings.data_seed, batch.step)
            )
            x = x[torch.as_tensor(order).to(self.device)]
        if batch.part is not None:
            self.team.begin(batch.part.places, batch.n_rows)
        if not len(x):  # a row that counts nothing, so that all processes go the same way
            x, batch = x.new_zeros(1, x.shape[1]), batch._replace(positions=np.zeros(1, np.int64))
        positions = torch.as_tensor(batch.positions).to(self.device, non_blocking=True)
        return x, torch.as_tensor(batch.offsets_of(self.ranges)), positions

    def update(self, batch: Batch, x: Tensor, *, measure: bool) -> dict[str, Any] | None:
        """One step of AdamW on one batch, after ``schedule``; what was measured, if asked to."""
        x, offsets, positions = self.inputs(batch, x)
        precision = self.settings.precision
        if self.device.type == "cuda":  # one switch for the whole process, so set anew for each run
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            output = self.autoencoder(x, offsets, positions)
        self.optimizer.zero_grad(set_to_none=True)
        (output.losses.total * self.team.weight).backward()  # pyright: ignore[reportUnknownMemberType]
        self.team.add_gradients(self.autoencoder.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.settings.clip_norm)
        if self.settings.project_gradient:
            self.autoencoder.project_gradient()
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self.autoencoder.normalise_decoder()
        if self.curriculum.looks(batch.step):
            self.curriculum.see(batch.step, self.team.mean(output.losses.reconstruction.detach()))
        self.norms += torch.stack([torch.ones_like(norm), norm, norm.square()])
        self.n_tokens += batch.n_rows
        # Not by indexing with booleans, for which a GPU must be waited for.
        self.last_fired.masked_fill_(self.team.any(output.fired()), int(self.n_tokens))
        if not measure:
            return None
        line = self._line(x, positions, offsets, output, norm)
        self.norms.zero_()
        return line

    @torch.no_grad()
    def _line(
        self, x: Tensor, positions: Tensor, offsets: Tensor, output: Output, norm: Tensor
    ) -> dict[str, Any]:
        code = output.code
        keeper = ScoreKeeper(x.shape[1], code.shape[1], len(offsets) - 1)
        base = None
        if output.base_code is not None:
            base = self.autoencoder.decode(output.base_code.float(), positions)
        if self.team.weight:
            keeper.add(x, output.reconstruction, code, offsets, base)
        scores = reduce(add, self.team.gathered(keeper.on_cpu())).scores()
        losses = self.team.mean(torch.stack(output.losses))
        silent = int(self.n_tokens) - self.last_fired
        return {
            "tokens": int(self.n_tokens),
            "loss": losses[0].item(),
            "reconstruction_loss": losses[1].item(),
            "sparsity_loss": losses[2].item(),
            "auxiliary_loss": losses[3].item(),
            "alpha": self.autoencoder.alpha,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "l1_coefficient": self.autoencoder.sparsity_factor * self.settings.l1_coefficient,
            "l0": scores.l0,
            "fvu": _finite(scores.fvu),
            "fvu_base": None if scores.fvu_base is None else _finite(scores.fvu_base),
            "fvu_by_range": [_finite(value) for value in scores.fvu_by_range],
            "gradient_norm": norm.item(),
            "gradient_norm_mean": (self.norms[1] / self.norms[0]).item(),
            "gradient_norm_mean_square": (self.norms[2] / self.norms[0]).item(),
            "dead_fraction": (silent > self.settings.dead_after_tokens).float().mean().item(),
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors by name."""
        found = {f"weights.{name}": value for name, value in self.autoencoder.state_dict().items()}
        for number, entry in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
        found |= {"generator": self.autoencoder.generator.get_state(), "last_fired": self.last_fired}
        found |= {"curriculum": self.curriculum.tensor(), "norms": self.norms, "clock": self.clock.tensor()}
        dead = self.autoencoder.dead
        found["dead"] = torch.zeros_like(self.last_fired, dtype=torch.bool) if dead is None else dead
        return {name: value.detach().cpu() for name, value in found.items()} | {"n_tokens": self.n_tokens}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``tensors``."""
        state: dict[int, dict[str, Tensor]] = {}
        weights: dict[str, Tensor] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "weights":
                weights[rest] = value
            elif kind == "optimizer":
                number, _, key = rest.partition(".")
                state.setdefault(int(number), {})[key] = value
        self.autoencoder.load_state_dict(weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.autoencoder.generator.set_state(tensors["generator"])
        self.last_fired.copy_(tensors["last_fired"])
        self.curriculum.restore(tensors["curriculum"])
        self.norms.copy_(tensors["norms"])
        self.clock = Clock(tensors["clock"])
        if "dead" in tensors and bool(tensors["dead"].any()):
            self.autoencoder.dead = tensors["dead"].to(self.device)
        self.n_tokens.copy_(tensors["n_tokens"])


def _activation_scale(training: Training) -> float:
    """What brings the layer's ordinary tokens to a root mean square norm of √d_model.

    Around their mean where that is taken off, else around 0.
    """
    settings = training.settings
    if settings.activation_scale == "none":
        return 1.0
    stats = training.stats
    is_centred = settings.position_mean != "none" or architecture_class(settings.architecture).is_centred
    squares = stats.variation if is_centred else float(stats.squares.sum())
    mean_square = squares / max(1, stats.n_tokens)
    if not mean_square > 0:
        raise SettingsError(
            "activation_scale rms needs ordinary tokens in the training part, and the store's stats name "
            "none; set activation_scale to none"
        )
    return math.sqrt(training.store.d_model / mean_square)


def _shuffled(n_rows: int, data_seed: int, step: int) -> NDArray[np.int64]:
    """Which row takes which place, so that positions tell nothing; another draw than any of the order's."""
    return np.random.Generator(np.random.PCG64([data_seed, step, _SHUFFLE])).permutation(n_rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _note(line: dict[str, Any]) -> str:
    fvu = line["fvu"] if line["fvu"] is not None else math.nan
    return f"loss {line['loss']:.3f}  FVU {fvu:.4f}  L0 {line['l0']:.1f}  alpha {line['alpha']:.2f}"
