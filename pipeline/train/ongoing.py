"""A run in training: its state, and what is written into its folder at which step."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sae.calibration import calibrate_threshold
from ..sae.saving import save_autoencoder
from .batch import Batch
from .batches import ShuffledBatches
from .checkpoints import CheckpointWriter
from .data_parallel import Team
from .setup import Setup
from .state import State

_CALIBRATION_ROWS = 2**16
"""Tokens of the training part that BatchTopK's threshold is calibrated on."""
_COUNT_DEAD_STEPS = 100
"""Dead features are counted every so many steps, as it makes a GPU wait."""

Watch = Callable[[Path, Mapping[str, Any]], None]
"""Receives each line of metrics, with the folder of its run."""


class Ongoing:
    """A run in training.

    Attributes:
        training: the run's settings, store and folder.
        state: weights, optimizer and all else that changes.
        start: steps done before this process began.
        step: steps done.
        stop: steps in total.
    """

    def __init__(self, training: Setup, state: State, start: int) -> None:
        """Continue from a state after ``start`` steps."""
        self.training, self.state = training, state
        self.start, self.step, self.stop = start, start, training.settings.steps

    @classmethod
    def begin(cls, training: Setup, team: Team | None = None) -> "Ongoing | None":
        """Start at the first step or at the last checkpoint; None if the run is finished.

        Args:
            training: the run.
            team: the processes that share it, if there are several; only the first reads and writes the run.

        Raises:
            RunMismatchError: the run was begun with other settings or another store.
            RunError: the checkpoint is damaged, or the folder holds something else.
            SettingsError: the store has no ordinary tokens to scale activations by.
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
                raise run.no_checkpoint(f"it is of another run: {why}") from None
        start = team.told(start)
        if tensors := team.sent(state.tensors):
            state.restore(tensors)
        if start:  # at the last step no further step would do so
            state.schedule(start - 1)
        if team.is_first:
            run.rewind_metrics(start)
        return cls(training, state, start)

    def take(self, batch: Batch, x: Tensor, watch: Watch | None = None) -> str:
        """Take one step.

        Returns:
            A note for the progress bar; empty unless something was measured.
        """
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
        # Also at the end of the base phase, with which later lines are compared.
        measure = (self.step + 1) % s.log_steps == 0 or self.step + 1 in (s.warmup_steps, s.steps)
        line = state.update(batch, x, measure=measure)
        self.step += 1
        if self.step % _COUNT_DEAD_STEPS == 0:
            state.count_dead()
        return line

    def save_checkpoint(self, writer: CheckpointWriter) -> None:
        """Begin to write what is needed to resume."""
        if self.state.team.is_first:
            writer.save(self.training.run, self.step, self.state.tensors)

    def finish(self, batches: ShuffledBatches) -> None:
        """After the last step: calibrate the threshold, and write the weights.

        Args:
            batches: that the run was trained on, if one process had them all.
        """
        autoencoder, settings, team = self.state.autoencoder, self.training.settings, self.state.team
        self.state.leave_team()  # the first process does the rest alone
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
