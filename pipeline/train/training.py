"""Trainings: what each is before anything is computed, and how it, or several at once, are carried out."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import __version__
from ...store.errors import SettingsError, StoreIncompleteError
from ...store.reader import ActivationStore
from ...store.stats import LayerStats
from ..device import choose_device, free_bytes
from ..errors import RunBusyError, RunMismatchError
from ..processes import processes_here, shares_a_training
from ..progress import Progress, Silent
from ..ranges import PositionRange, parse_ranges
from ..runs import Run, digest_of
from ..sae.autoencoder import Autoencoder
from ..sae.calibration import calibrate_threshold
from ..sae.registry import architecture_class
from ..sae.run_settings import as_in_run
from ..sae.saving import save_autoencoder
from ..settings import TrainSettings
from .batches import Batch, ShuffledBatches
from .checkpoints import CheckpointWriter
from .chunk_memory import DecodedLayer
from .data_parallel import Team, joined
from .interrupts import held_back
from .resident import LayerMemory
from .resolving import autoencoder_of, resolve
from .state import State

_CALIBRATION_ROWS = 2**16
"""Tokens of the training part that BatchTopK's threshold is set by in the end."""
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
        here = processes_here().local_rank
        self.device = choose_device(settings.device, here, with_float64=True)
        self.settings = resolve(store, settings, self.device)
        assert self.settings.layer is not None
        self.layer = self.settings.layer
        store.check_layer(self.layer)
        self.ranges: tuple[PositionRange, ...] = parse_ranges(self.settings.ranges, store.context_length)
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
        return autoencoder_of(
            self.settings,
            d_model=self.store.d_model,
            context_length=self.store.context_length,
            generator=generator,
            activation_scale=self._activation_scale() if generator else 1.0,
        )

    def _activation_scale(self) -> float:
        """What brings the layer's ordinary tokens to a root mean square norm of √d_model.

        Around their mean where that is taken off, else around 0.
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
        """That of the first step."""
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        autoencoder = self.new_autoencoder(generator)
        sums, counts = self.stats.sums, self.stats.counts
        if self.settings.shuffle_positions:  # then each position has the mean of all
            sums = counts[:, None] * (sums.sum(axis=0) / max(1, counts.sum()))
        autoencoder.fit_means(sums, counts)
        return State(autoencoder, self.settings, self.ranges, self.device, team)

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
                "manifest": digest_of(manifest),
                "model": manifest.model,
                "model_revision": manifest.model_revision,
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
        team: Team | None = None,
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
        team = team or Team()
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
    def team(self) -> Generator[Team]:
        """What this process is in the training: one of those that torchrun started, or alone.

        Raises:
            PosaeError: as ``joined``.
        """
        if shares_a_training():
            with joined(self.device) as several:
                yield several
        else:
            yield Team()

    def take_after(self, team: Team) -> None:
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

    def batches(self, decoded: DecodedLayer | None = None, team: Team | None = None) -> ShuffledBatches:
        """What it reads, in its order.

        Args:
            decoded: where the layer is to be kept, if it is.
            team: of which process the part is wanted; by default all of every batch.
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
        """What fixes the batches: trainings of which this is equal can share one pass over the store."""
        s = self.settings
        of_store = (self.store.address, self.layer, self.n_contexts, self.leave_out)
        return (*of_store, s.batch_size, s.window_contexts, s.data_seed, self.device)

    @property
    def epochs(self) -> float:
        """How often the training part is read, about."""
        return self.settings.steps * self.settings.batch_size / max(1, self.stats.n_tokens)

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
            settings = begun.get("settings", {})
            config["settings"] = as_in_run(self.settings, settings)
            # Where the store lies may change, what it holds may not; the digests say. Of another layer than
            # the run's they say nothing: that is another setting.
            if settings.get("layer") == self.layer:
                self.run.check_read(self.store, self.layer, "give that one to go on")
            for key in ("path", "read", "manifest", "model_revision"):
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
    asked_size = first.settings.batch_size
    start, stop = min(one.start for one in trainings), max(one.stop for one in trainings)
    n_steps, n_before = sum(one.stop for one in trainings), sum(one.start for one in trainings)
    decoded = (memory or LayerMemory("never")).of(
        first.store, first.layer, first.n_contexts, n_tokens=(stop - start) * asked_size, device=first.device
    )
    batches = first.batches(decoded, team)
    if batches.is_empty:
        raise StoreIncompleteError(
            f"{first.store.root} has no token to train on in layer {first.layer}; harvest more contexts"
        )
    size, found = asked_size, batches.usual_size
    if found < asked_size // 2:
        size = found
        progress.say(
            f"batches have {size:,} tokens and not {asked_size:,}: a window of "
            f"{batches.order.window_chunks * batches.order.chunk_contexts:,} contexts holds no more"
        )
    progress.begin("training", n_steps * size, "tokens", n_before * size)
    is_alone = processes_here().n_processes == 1
    with CheckpointWriter() as writer, held_back(is_alone=is_alone) as interrupt:
        for batch in batches.steps(start, stop):
            x = batch.on_device.to(torch.float32)
            taking = [one for one in trainings if one.start <= batch.step < one.stop]
            for one in taking:
                progress.advance(size, one.take(batch, x, watch))
            # Who is asked while the others answer is heard after the next step.
            asked = team.agreed(interrupt.asked)
            for one in taking:
                # What ends before the others is safe until all are at their end.
                wanted = one.step == one.stop or one.step % one.training.settings.checkpoint_steps == 0
                if one.step < stop and (wanted or asked):
                    one.save_checkpoint(writer)
            if asked and batch.step + 1 < stop:
                writer.wait()
                interrupt.stop()
        progress.end()
        writer.wait()
        for one in trainings:
            one.finish(batches)
        if interrupt.asked:
            interrupt.stop()


class Ongoing:
    """A training that was begun: its state, and what goes into its folder when.

    Attributes:
        training: which.
        start: steps that were done before.
        step: steps that are done.
        stop: steps in the end.
    """

    def __init__(self, training: Training, state: State, start: int) -> None:
        """Of a state after ``start`` steps."""
        self.training, self.state = training, state
        self.start, self.step, self.stop = start, start, training.settings.steps

    @classmethod
    def begin(cls, training: Training, team: Team | None = None) -> "Ongoing | None":
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
        run, team = training.run, team or Team()
        training.take_after(team)
        if team.is_first:
            run.begin(training.config_to_check())
        if team.told(run.is_finished):
            return None
        state = training.new_state(team)
        checkpoint = run.load_checkpoint() if team.is_first else None
        start = 0
        if checkpoint:
            start, tensors = checkpoint
            try:
                state.restore(tensors)
            except torch.OutOfMemoryError:
                raise
            except (KeyError, RuntimeError, ValueError) as error:
                why = " ".join(str(error).split())[:200]
                raise run.no_checkpoint(f"not one of this training: {why}") from None
        start = team.told(start)
        if tensors := team.sent(state.tensors):
            state.restore(tensors)
        if start:  # of a training that is at its end no step will do so
            state.schedule(start - 1)
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
        return _note(line, with_alpha=state.autoencoder.comes_in_with_alpha)

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

    def save_checkpoint(self, writer: CheckpointWriter) -> None:
        """Have what is needed to resume written into the run."""
        if self.state.team.is_first:
            writer.save(self.training.run, self.step, self.state.tensors)

    def finish(self, batches: ShuffledBatches) -> None:
        """After the last step: set what is set in the end, and write the weights.

        Args:
            batches: what was trained on, where one process had it all.
        """
        autoencoder, settings, team = self.state.autoencoder, self.training.settings, self.state.team
        self.state.leave_team()  # what follows needs no others
        if not team.is_first:
            return
        if team.n_processes > 1:
            batches = self.training.batches()
        if autoencoder.is_calibrated:
            rows = (
                self.state.inputs(batch, batch.on_device.to(torch.float32))
                for batch in batches.steps(0, settings.steps)
            )
            calibrate_threshold(autoencoder, rows, max(_CALIBRATION_ROWS, 2 * settings.batch_size))
        save_autoencoder(autoencoder, self.training.run.folder, self.training.sae_lens_metadata)


def _note(line: dict[str, Any], *, with_alpha: bool) -> str:
    fvu = line["fvu"] if line["fvu"] is not None else math.nan
    alpha = f"  alpha {line['alpha']:.2f}" if with_alpha else ""
    return f"loss {line['loss']:.3f}  FVU {fvu:.4f}  L0 {line['l0']:.1f}{alpha}"
