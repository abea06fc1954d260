"""Stage two: an autoencoder from an activation store; no language model is needed.

Batches come from the store in an order that its settings fix; each row carries its position. A run
resumes at its last checkpoint with the same batches and, on the same machine, the same weights. The
autoencoder is float32, the activations bfloat16. Costs: three products with the weights a step,
while alpha is 0 nothing for adapters; twice the weights for the optimizer; two windows of the store.
"""

import inspect
import math
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..store.errors import RunMismatchError, SettingsError, StoreIncompleteError
from ..store.ranges import PositionRange, parse_ranges
from ..store.reader import ActivationStore
from ..store.stats import LayerStats
from .batches import Batch, ShuffledBatches
from .device import choose_device
from .metrics import ScoreKeeper
from .progress import Progress, Silent
from .runs import Run
from .sae.autoencoder import Autoencoder, Output
from .sae.registry import architecture_class, new_autoencoder
from .sae.saving import save_autoencoder
from .settings import TrainSettings

_COUNT_DEAD_STEPS = 100
"""How often it is counted anew which features are dead: it makes a GPU wait."""


class Curriculum(NamedTuple):
    """When the position adapters come in: alpha of equations 3 and 5.

    >>> curriculum = Curriculum(warmup_steps=1000, ramp_steps=9000)
    >>> curriculum.alpha(999), curriculum.alpha(5499), curriculum.alpha(9999)
    (0.0, 0.5, 1.0)
    """

    warmup_steps: int
    ramp_steps: int

    def alpha(self, step: int) -> float:
        """Alpha of the update that follows ``step`` others: 0, then in a line to 1 at the last."""
        return min(1.0, max(0.0, (step + 1 - self.warmup_steps) / max(1, self.ramp_steps)))


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
        self.device = choose_device(self.settings.device)
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
        settings = self.settings
        # An architecture's own keywords are settings of the same names.
        keywords = inspect.signature(architecture_class(settings.architecture)).parameters
        own = {name: getattr(settings, name) for name in keywords if name in TrainSettings.model_fields}
        common = {
            "d_model": self.store.d_model,
            "dictionary_size": settings.dictionary_size,
            "ranges": self.ranges,
            "generator": generator,
            "activation_scale": _activation_scale(self) if generator else 1.0,
            "position_mean": settings.position_mean,
        }
        return new_autoencoder(settings.architecture, **own, **common)

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
                "path": str(store.root.absolute()),
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

    def train(self, progress: Progress | None = None) -> Trained:
        """Train, or go on, to the last step.

        Raises:
            RunMismatchError: the run was begun with other settings or another store.
            StoreDamagedError: a chunk is missing or not what was written.
            StoreWriteError: the disk refused.
        """
        progress = progress or Silent()
        self.run.begin(self._config_to_check())
        if self.run.is_finished:
            return Trained(self.run, 0)
        batches = ShuffledBatches(
            self.store,
            self.layer,
            self.ranges,
            batch_size=self.settings.batch_size,
            window_contexts=self.settings.window_contexts,
            seed=self.settings.data_seed,
            leave_out=self.leave_out,
            n_contexts=self.n_contexts,
            device=self.device,
        )
        if not int(batches.order.wanted_by_chunk.sum()):
            raise StoreIncompleteError(
                f"{self.store.root} has no token to train on in layer {self.layer}; harvest more contexts"
            )
        state = _State.new(self)
        checkpoint = self.run.load_checkpoint()
        start = 0
        if checkpoint:
            start, tensors = checkpoint
            state.restore(tensors)
        self.run.rewind_metrics(start)
        self._loop(state, batches, start, progress)
        save_autoencoder(state.autoencoder, self.run.folder, self._sae_lens_metadata())
        return Trained(self.run, self.settings.steps - start)

    def _config_to_check(self) -> dict[str, Any]:
        config = self.config
        if self.run.is_begun:
            begun = self.run.config
            config["posae"] = begun.get("posae")
            # Where the store lies may change, what it holds may not; the digests say.
            config["store"]["path"] = begun.get("store", {}).get("path")
            if not begun.get("store", {}).get("read") or not config["store"]["read"]:
                config["store"]["read"] = begun.get("store", {}).get("read")
        return config

    def _loop(self, state: "_State", batches: ShuffledBatches, start: int, progress: Progress) -> None:
        s = self.settings
        assert s.warmup_steps is not None
        assert s.ramp_steps is not None
        curriculum = Curriculum(s.warmup_steps, s.ramp_steps)
        progress.begin("training", s.steps * s.batch_size, "tokens", start * s.batch_size)
        step = start
        try:
            for batch in batches.steps(start, s.steps):
                state.autoencoder.alpha = curriculum.alpha(step)
                state.set_learning_rate(learning_rate(s, step))
                measure = (step + 1) % s.log_steps == 0 or step + 1 == s.steps
                line = state.update(batch, measure=measure)
                step += 1
                if step % _COUNT_DEAD_STEPS == 0:
                    state.count_dead()
                if line:
                    self.run.add_metrics({"step": step, **line})
                    progress.advance(0, _note(line))
                progress.advance(s.batch_size)
                if step % s.checkpoint_steps == 0 and step < s.steps:
                    self.run.save_checkpoint(step, state.tensors())
        except KeyboardInterrupt:
            self.run.save_checkpoint(step, state.tensors())
            raise
        progress.end()

    def _sae_lens_metadata(self) -> dict[str, Any]:
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


def resolve(store: ActivationStore, settings: TrainSettings) -> TrainSettings:
    """The settings with everything that the store decides filled in.

    Raises:
        SettingsError: a setting does not fit the store.
        StoreIncompleteError: the store has no layers.
    """
    layer = store.layer_or_middle(settings.layer)
    parse_ranges(settings.ranges, store.context_length)
    warmup, ramp = settings.warmup_steps, settings.ramp_steps
    if warmup is None:
        warmup = settings.steps // 10 if ramp is None else max(0, settings.steps - ramp)
    if ramp is None:
        ramp = max(1, settings.steps - warmup)
    kind = architecture_class(settings.architecture)
    size = settings.dictionary_size or store.d_model * kind.expansion
    return settings.model_copy(
        update={
            "layer": layer,
            "dictionary_size": size,
            "learning_rate": settings.learning_rate or kind.usual_learning_rate(size),
            "adapter_width": settings.adapter_width or max(1, store.d_model // 2),
            "warmup_steps": warmup,
            "ramp_steps": ramp,
        }
    )


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of the update that follows ``step`` others.

    >>> shares = {"learning_rate_warmup": 0.1, "learning_rate_decay": 0.2}
    >>> settings = TrainSettings(steps=100, learning_rate=1.0, **shares)
    >>> [round(learning_rate(settings, step), 2) for step in (0, 9, 50, 89, 99)]
    [0.1, 1.0, 1.0, 0.55, 0.05]
    """
    assert settings.learning_rate is not None
    rising = settings.learning_rate_warmup * settings.steps
    falling = settings.learning_rate_decay * settings.steps
    up = (step + 1) / rising if rising else 1.0
    down = (settings.steps - step) / falling if falling else 1.0
    return settings.learning_rate * min(1.0, up, down)


class _State:
    """All that changes while training, and one update of it."""

    def __init__(self, autoencoder: Autoencoder, settings: TrainSettings, device: torch.device) -> None:
        self.autoencoder = autoencoder
        self.settings = settings
        self.device = device
        assert settings.learning_rate is not None
        self.optimizer = torch.optim.AdamW(
            autoencoder.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.n_tokens = torch.zeros((), dtype=torch.int64)
        self.last_fired = torch.zeros(autoencoder.dictionary_size, dtype=torch.int64, device=device)

    @classmethod
    def new(cls, training: Training) -> "_State":
        generator = torch.Generator(training.device).manual_seed(training.settings.seed)
        autoencoder = training.new_autoencoder(generator)
        autoencoder.fit_means(training.stats.sums, training.stats.counts)
        return cls(autoencoder, training.settings, training.device)

    def set_learning_rate(self, rate: float) -> None:
        """For the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def count_dead(self) -> None:
        """Tell the autoencoder which features were silent for long."""
        silent = int(self.n_tokens) - self.last_fired
        dead = silent > self.settings.dead_after_tokens
        self.autoencoder.dead = dead if bool(dead.any()) else None

    def update(self, batch: Batch, *, measure: bool) -> dict[str, Any] | None:
        """One step of AdamW on one batch; what was measured, if asked to."""
        x = batch.on_device.to(torch.float32)
        offsets = torch.as_tensor(batch.range_offsets)
        positions = torch.as_tensor(batch.positions).to(self.device, non_blocking=True)
        output = self.autoencoder(x, offsets, positions)
        self.optimizer.zero_grad(set_to_none=True)
        output.losses.total.backward()  # pyright: ignore[reportUnknownMemberType]
        norm = torch.nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.settings.clip_norm)
        self.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        self.autoencoder.normalise_decoder()
        self.n_tokens += len(x)
        # Not by indexing with booleans, for which a GPU must be waited for.
        self.last_fired.masked_fill_((output.code.detach() != 0).any(0), int(self.n_tokens))
        return self._line(x, positions, offsets, output, norm) if measure else None

    @torch.no_grad()
    def _line(
        self, x: Tensor, positions: Tensor, offsets: Tensor, output: Output, norm: Tensor
    ) -> dict[str, Any]:
        keeper = ScoreKeeper(x.shape[1], output.code.shape[1], len(offsets) - 1)
        base = None
        if output.base_code is not None:
            base = self.autoencoder.decode(output.base_code, positions)
        keeper.add(x, output.reconstruction, output.code, offsets, base)
        scores = keeper.scores()
        silent = int(self.n_tokens) - self.last_fired
        return {
            "tokens": int(self.n_tokens),
            "loss": output.losses.total.item(),
            "reconstruction_loss": output.losses.reconstruction.item(),
            "sparsity_loss": output.losses.sparsity.item(),
            "auxiliary_loss": output.losses.auxiliary.item(),
            "alpha": self.autoencoder.alpha,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "l1_coefficient": self.settings.l1_coefficient,
            "l0": scores.l0,
            "fvu": _finite(scores.fvu),
            "fvu_base": None if scores.fvu_base is None else _finite(scores.fvu_base),
            "fvu_by_range": [_finite(value) for value in scores.fvu_by_range],
            "gradient_norm": norm.item(),
            "dead_fraction": (silent > self.settings.dead_after_tokens).float().mean().item(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything, as tensors by name."""
        found = {f"weights.{name}": value for name, value in self.autoencoder.state_dict().items()}
        for number, entry in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
        found |= {"generator": self.autoencoder.generator.get_state(), "last_fired": self.last_fired}
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _note(line: dict[str, Any]) -> str:
    fvu = line["fvu"] if line["fvu"] is not None else math.nan
    return f"loss {line['loss']:.3f}  FVU {fvu:.4f}  L0 {line['l0']:.1f}  alpha {line['alpha']:.2f}"
