"""All that changes while an autoencoder trains, and one update of it; what a checkpoint holds.

Costs: three times the weights, for their gradient and the optimizer.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..metrics import ScoreKeeper, null_if_not_finite
from ..ranges import PositionRange
from ..sae.autoencoder import Autoencoder, Output
from ..settings import TrainSettings
from .batch import Batch
from .data_parallel import Team
from .schedules import Clock, Curriculum, learning_rate_factor

_SHUFFLE = 0x5EED


class State:
    """All that changes while training, and one update of it."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        settings: TrainSettings,
        ranges: Sequence[PositionRange],
        device: torch.device,
        team: Team,
    ) -> None:
        """That of the first step.

        Args:
            autoencoder: untrained.
            settings: resolved.
            ranges: that FVU is reported for.
            device: where the autoencoder is.
            team: the processes that share the training.
        """
        self.autoencoder = autoencoder
        self.team = autoencoder.share = team
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

    def leave_team(self) -> None:
        """Go on without the other processes; each has to."""
        self.team.leave()
        self.team = self.autoencoder.share = Team()

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
        rising: float = getattr(s, "sparsity_warmup", 0) * s.steps
        self.autoencoder.sparsity_factor = min(1.0, (step + 1) / rising) if rising else 1.0

    @torch.no_grad()
    def count_dead(self) -> None:
        """Tell the autoencoder which features were silent for long."""
        silent = int(self.n_tokens) - self.last_fired
        self._set_dead(silent > self.settings.dead_after_tokens)

    def _set_dead(self, is_dead: Tensor) -> None:
        # As a list, once: a GPU would have to be waited for in every step that makes one of flags.
        dead = is_dead.nonzero()[:, 0]
        self.autoencoder.dead = dead if len(dead) else None

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
            x = x[torch.as_tensor(order).to(self.device, non_blocking=True)]
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
        self.optimizer.zero_grad(set_to_none=True)
        with _float32_products(self.device, "tf32" if precision == "tf32" else "ieee"):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                output = self.autoencoder(x, offsets, positions)
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
        code = output.codes.code
        keeper = ScoreKeeper(x.shape[1], self.autoencoder.dictionary_size, len(offsets) - 1)
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
            "l1_coefficient": self.autoencoder.sparsity_factor
            * getattr(self.settings, "l1_coefficient", 0.0),
            "l0": scores.l0,
            "fvu": null_if_not_finite(scores.fvu),
            "fvu_base": null_if_not_finite(scores.fvu_base),
            "fvu_by_range": null_if_not_finite(scores.fvu_by_range),
            "gradient_norm": norm.item(),
            "gradient_norm_mean": (self.norms[1] / self.norms[0]).item(),
            "gradient_norm_mean_square": (self.norms[2] / self.norms[0]).item(),
            "dead_fraction": (silent > self.settings.dead_after_tokens).float().mean().item(),
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors by name: copies on the CPU."""
        found = {f"weights.{name}": value for name, value in self.autoencoder.state_dict().items()}
        for number, entry in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
        found |= {"generator": self.autoencoder.generator.get_state(), "last_fired": self.last_fired}
        found |= {"curriculum": self.curriculum.tensor(), "norms": self.norms, "clock": self.clock.tensor()}
        found["dead"] = torch.zeros_like(self.last_fired, dtype=torch.bool)
        if self.autoencoder.dead is not None:
            found["dead"][self.autoencoder.dead] = True
        found["n_tokens"] = self.n_tokens
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

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
        if "dead" in tensors:
            self._set_dead(tensors["dead"].to(self.device))
        self.n_tokens.copy_(tensors["n_tokens"])


@contextmanager
def _float32_products(device: torch.device, precision: Literal["ieee", "tf32"]) -> Generator[None]:
    """How a GPU computes float32 products: a switch of the whole process, so it is set back."""
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    # torch before 2.9 has the other switch alone; later ones refuse to mix the two.
    is_current = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", precision) if is_current else ("allow_tf32", precision == "tf32")
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def _shuffled(n_rows: int, data_seed: int, step: int) -> NDArray[np.int64]:
    """Which row takes which place, so that positions tell nothing; another draw than any of the order's."""
    return np.random.Generator(np.random.PCG64([data_seed, step, _SHUFFLE])).permutation(n_rows)
