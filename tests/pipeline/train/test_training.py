"""What a training resolves, refuses and keeps. That a killed one ends the same is tested with the command."""

import signal
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from posae.pipeline.errors import RunError, RunMismatchError
from posae.pipeline.progress import Silent
from posae.pipeline.report.measured import Measured
from posae.pipeline.runs import Run
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.sae.saving import load_autoencoder
from posae.pipeline.settings import TrainSettings
from posae.pipeline.train import LayerMemory, Ongoing, Team, Training, resolve, side_by_side, train_together
from posae.pipeline.train.batches import shuffled_batches
from posae.pipeline.train.schedules import Curriculum
from posae.store import ActivationStore
from posae.store.errors import SettingsError, StoreWriteError
from posae.store.shards import ShardReader

from ...conftest import Made
from ..impatient import Impatient


def settings(**values: Any) -> TrainSettings:
    return train_settings({"steps": 40, "batch_size": 32, "window_contexts": 16, **values}, "[train]")


def train(store: Made, folder: Path, **values: Any) -> Training:
    training = Training(ActivationStore.open(store.root), folder, settings(**values))
    training.train()
    return training


def small(preset: str, **values: Any) -> dict[str, Any]:
    """A preset that fits the small store."""
    found = {**train_presets()[preset], "target_l0": 4, "ranges": "2"}
    found["position_mean"] = "lowrank:2" if "position_mean" in found else "none"
    if found["architecture"] not in ("topk", "batchtopk", "jumprelu"):
        del found["target_l0"]
    return found | {"steps": 20, "batch_size": 32, **values}


def weights(folder: Path) -> bytes:
    return (folder / "sae_weights.safetensors").read_bytes()


@pytest.mark.parametrize("preset", train_presets())
def test_every_preset_trains(preset: str, good_store: Made, tmp_path: Path) -> None:
    training = train(good_store, tmp_path / "run", **small(preset))
    lines = training.run.metrics()
    assert lines[-1]["step"] == 20
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("preset", train_presets())
def test_products_in_bfloat16_train_float32_weights_to_about_the_same(
    preset: str, good_store: Made, tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = []
    # At one rate for all: topk's own is large for so small a dictionary.
    words = small(preset, learning_rate=1e-3)
    for precision in ("float32", "bfloat16"):
        training = train(good_store, tmp_path / precision, **words, precision=precision)
        lines.append(training.run.metrics()[-1])
        found = safetensors.torch.load_file(training.run.folder / "sae_weights.safetensors")  # pyright: ignore[reportUnknownMemberType]
        assert {weight.dtype for weight in found.values() if weight.is_floating_point()} == {torch.float32}
    assert lines[0]["loss"] != lines[1]["loss"]
    # Rounding can change which features are the largest.
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=0.15)


def test_each_ends_with_the_weights_that_it_has_alone(good_store: Made, tmp_path: Path) -> None:
    # Of different lengths, ranges and architectures; some were interrupted before, at different steps.
    store = ActivationStore.open(good_store.root)
    words = {
        preset: small(preset, steps=20 + number, ranges=("2", "0:1,1:6")[number % 2], checkpoint_steps=5)
        for number, preset in enumerate(train_presets())
    }
    words["shuffled"] = small("posae", shuffle_positions=True)
    group: list[Training] = []
    for number, (name, values) in enumerate(words.items()):
        train(good_store, tmp_path / "alone" / name, **values)
        group.append(Training(store, tmp_path / "together" / name, settings(**values)))
        if number % 3:
            with pytest.raises(KeyboardInterrupt):
                group[-1].train(Impatient(5 * (number % 3) + 2))
    several = side_by_side(group, len(group))  # some presets train on special tokens too
    assert sorted(len(side) for side in several)[-1] > len(group) / 2
    for side in several:
        begun = [ongoing for training in side if (ongoing := Ongoing.begin(training))]
        assert {ongoing.start for ongoing in begun} <= {0, 5, 10}
        train_together(begun)
    for name in words:
        alone, together = tmp_path / "alone" / name, tmp_path / "together" / name
        assert weights(alone) == weights(together), name
        lines = [
            [line | {"seconds": 0, "cpu_seconds": 0} for line in Run(at).metrics()]
            for at in (alone, together)
        ]
        assert lines[0] == lines[1], name


def test_those_that_read_other_batches_do_not_share_a_pass(good_store: Made, tmp_path: Path) -> None:
    store = ActivationStore.open(good_store.root)
    differ: list[dict[str, Any]] = [
        *({}, {"learning_rate": 1e-3}, {"ranges": "2"}, {"seed": 1}),  # share
        *(
            {"data_seed": 1},
            {"batch_size": 64},
            {"window_contexts": 8},
            {"layer": 0},
            {"special_tokens": True},
        ),
    ]
    group = [Training(store, tmp_path / str(n), settings(**values)) for n, values in enumerate(differ)]
    assert side_by_side(group, 8) == [group[:4], *([one] for one in group[4:])]
    assert side_by_side(group[:4], 3) == [group[:3], group[3:4]]
    with pytest.raises(ValueError, match="different batches"):
        train_together([ongoing for one in group[3:5] if (ongoing := Ongoing.begin(one))])


def test_a_layer_that_is_kept_is_read_once_and_changes_nothing(
    good_store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(good_store, tmp_path / "streamed", window_contexts=8)
    n_read = 0
    start_reading = ShardReader.start_reading

    def counting(reader: ShardReader, chunks: Collection[int], *args: Any) -> Any:
        nonlocal n_read
        n_read += len(chunks) if reader.spec.path.startswith("layer") else 0
        return start_reading(reader, chunks, *args)

    monkeypatch.setattr(ShardReader, "start_reading", counting)
    memory = LayerMemory("always")
    store = ActivationStore.open(good_store.root)
    for seed in (0, 1):
        words = settings(window_contexts=8, data_seed=seed)
        Training(store, tmp_path / str(seed), words).train(memory=memory)
    assert n_read == -(-store.training_contexts(3) // store.manifest.chunk_contexts)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "0")
    assert weights(tmp_path / "streamed") != weights(tmp_path / "1")


def test_the_share_of_adapters_becomes_their_width(good_store: Made) -> None:
    store = ActivationStore.open(good_store.root)
    for share in (0.5, 2.0):
        found = resolve(store, settings(adapter_share=share, dictionary_size=64))
        assert found.model_dump()["adapter_width"] is not None
        assert found.model_dump()["adapter_share"] is None
        autoencoder = Training(store, Path("unused"), found).new_autoencoder(None)
        overhead = autoencoder.n_parameters() / autoencoder.base_parameters() - 1
        one_wider = 4 * 129 / autoencoder.base_parameters()
        assert abs(overhead - share) <= one_wider / 2 + 1e-9


@pytest.mark.parametrize(
    ("values", "warmup", "ramp"),
    [
        ({}, 4, 36),
        ({"warmup_share": 0.5}, 20, 20),
        ({"warmup_share": 0.5, "warmup_steps": 1}, 1, 39),
        ({"ramp_steps": 10}, 30, 10),
        ({"curriculum": "plateau"}, 4, 8),
        ({"steps": 11_000, "warmup_share": 1 / 11}, 1000, 10_000),
    ],
    ids=str,
)
def test_the_curriculum_scales_with_the_steps(
    values: dict[str, Any], warmup: int, ramp: int, good_store: Made
) -> None:
    found = resolve(ActivationStore.open(good_store.root), settings(**values))
    assert (found.warmup_steps, found.ramp_steps) == (warmup, ramp)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architecture": "batchtopk", "adapter_width": 8}, "adapter_width is a setting of hierarchical"),
        ({"architecture": "standard", "mask": "gaussian"}, "mask is a setting of masked"),
        ({"architecture": "standard", "target_l0": 3}, "of topk, batchtopk, jumprelu"),
        ({"architecture": "topk", "adapter_share": 0.1}, "adapter_share is a setting of hierarchical"),
        ({"position_adapter": "offset"}, "position_adapter is offset"),
    ],
    ids=str,
)
def test_what_means_nothing_to_an_architecture_is_refused(
    values: dict[str, Any], said: str, good_store: Made, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=said):
        Training(ActivationStore.open(good_store.root), tmp_path / "run", settings(**values))
    assert not (tmp_path / "run").exists()


def test_shuffled_positions_tell_nothing(good_store: Made, tmp_path: Path) -> None:
    shuffled = train(good_store, tmp_path / "shuffled", architecture="standard", shuffle_positions=True)
    true = train(good_store, tmp_path / "true", architecture="standard")
    # Nothing in this architecture knows positions: the same rows in another order, the same but for rounding.
    lines = [training.run.metrics()[-1]["loss"] for training in (shuffled, true)]
    assert lines[0] == pytest.approx(lines[1], rel=1e-3)
    for shuffle, same in ((True, True), (False, False)):
        name = f"exact-{shuffle}"
        words: dict[str, Any] = {"architecture": "standard", "position_mean": "exact"}
        train(good_store, tmp_path / name, **words, shuffle_positions=shuffle)
        weights = safetensors.torch.load((tmp_path / name / "sae_weights.safetensors").read_bytes())
        table = weights["position_mean.table"][1:]  # every token at position 0 is special
        assert bool(torch.isclose(table, table[:1], atol=1e-4).all()) == same


def test_the_decoder_of_the_base_phase_is_kept(good_store: Made, tmp_path: Path) -> None:
    train(good_store, tmp_path / "run", warmup_steps=10)
    train(good_store, tmp_path / "base", warmup_steps=10, steps=11)
    kept = [
        safetensors.torch.load((tmp_path / name / "base_phase.safetensors").read_bytes())["W_dec"]
        for name in ("run", "base")
    ]
    assert torch.equal(kept[0], kept[1])
    torch.testing.assert_close(kept[0].square().sum(1), torch.ones(len(kept[0])))


class Noting(Silent):
    """Keeps what is said of a training while it goes on."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def advance(self, amount: int, note: str = "") -> None:
        self.notes += [note] if note else []


@pytest.mark.parametrize(
    ("values", "changes"),
    [
        ({"architecture": "hierarchical"}, True),
        ({"architecture": "topk", "target_l0": 4}, False),
        ({"architecture": "topk", "target_l0": 4, "position_adapter": "bias"}, True),
        ({"architecture": "masked"}, False),
        ({"architecture": "masked", "mask_schedule": "curriculum"}, True),
        ({"architecture": "separate"}, False),
    ],
    ids=str,
)
def test_alpha_is_told_where_something_changes_with_it(
    good_store: Made, tmp_path: Path, values: dict[str, Any], changes: bool
) -> None:
    progress = Noting()
    few = settings(**{"steps": 2, "log_steps": 1, "ranges": "2", **values})
    Training(ActivationStore.open(good_store.root), tmp_path / "run", few).train(progress)
    assert [("alpha" in note, "FVU" in note) for note in progress.notes] == [(changes, True)] * 2


def test_gradient_norms_of_every_step_are_counted(good_store: Made, tmp_path: Path) -> None:
    lines = train(good_store, tmp_path / "all", log_steps=1).run.metrics()
    training = train(good_store, tmp_path / "few", log_steps=20)
    few = training.run.metrics()
    assert [line["step"] for line in few] == [4, 20, 40], "one line also where the base phase ends"
    assert [line["alpha"] for line in few][:2] == [0, pytest.approx(16 / 36, abs=1 / 36)]
    norms = np.array([line["gradient_norm"] for line in lines])
    for part, line in zip(np.split(norms, [4, 20]), few, strict=True):
        assert line["gradient_norm_mean"] == pytest.approx(part.mean(), rel=1e-5)
        assert line["gradient_norm_mean_square"] == pytest.approx((part**2).mean(), rel=1e-5)
    measured = Measured("few", training.run.config, {}, few)
    assert measured.gradient_variance == pytest.approx(norms[4:].var(ddof=1), rel=1e-4)
    assert lines[-1]["cpu_seconds"] > lines[0]["cpu_seconds"] > 0


def test_a_run_of_an_older_release_goes_on(good_store: Made, tmp_path: Path) -> None:
    training = train(good_store, tmp_path / "run")
    config = training.run.config
    del config["settings"]["position_adapter"]
    training.run.write_json("config.json", config)
    assert train(good_store, tmp_path / "run").run.is_finished
    with pytest.raises(RunMismatchError, match=r"begun differently: position_adapter"):
        train(good_store, tmp_path / "run", position_adapter="bias")


def test_the_threshold_of_batchtopk_ends_where_l0_is_the_target(good_store: Made, tmp_path: Path) -> None:
    training = train(good_store, tmp_path / "run", architecture="batchtopk", target_l0=5)
    autoencoder = load_autoencoder(tmp_path / "run")
    active = n_rows = 0
    words = {"batch_size": 32, "window_contexts": 16, "leave_out": training.leave_out}
    for batch in shuffled_batches(training.store, training.layer, training.ranges, steps=40, **words):
        code = autoencoder(batch.on_device.float(), torch.as_tensor(batch.range_offsets)).code
        active, n_rows = active + int((code != 0).sum()), n_rows + len(code)
    assert active / n_rows == pytest.approx(5, rel=0.01)


@pytest.mark.usefixtures("in_a_terminal")
@pytest.mark.parametrize(
    ("presses", "n_processes", "repeated"),
    [(1, 1, 0), (2, 1, 5), (2, 2, 0)],
    ids=["once", "twice", "passed on by torchrun"],
)
def test_a_training_that_is_interrupted_goes_on_to_the_same_weights(
    presses: int,
    n_processes: int,
    repeated: int,
    good_store: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words: dict[str, Any] = {"architecture": "batchtopk", "target_l0": 4, "checkpoint_steps": 10}
    train(good_store, tmp_path / "whole", **words)
    looks, steps = Curriculum.looks, 0

    def pressing(self: Curriculum, step: int) -> bool:
        """Ctrl-C when the weights are changed and all else is not."""
        nonlocal steps
        steps += 1
        if steps == 15:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return looks(self, step)

    monkeypatch.setattr(Curriculum, "looks", pressing)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(n_processes))
    with pytest.raises(KeyboardInterrupt):
        train(good_store, tmp_path / "run", **words)
    assert steps == 15
    train(good_store, tmp_path / "run", **words)
    # Who presses twice does not wait for the step, whose half is left: from the last checkpoint on.
    assert steps == 15 + 25 + repeated
    assert weights(tmp_path / "whole") == weights(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Asked(Team):
    """A team that agrees on something while Ctrl-C is pressed, once."""

    def __init__(self, at_step: int) -> None:
        self.steps_left = at_step

    def agreed(self, asked: bool) -> bool:
        self.steps_left -= 1
        if not self.steps_left:
            signal.raise_signal(signal.SIGINT)
        return asked


@pytest.mark.usefixtures("in_a_terminal")
def test_an_interrupt_while_processes_agree_is_heard_after_the_next_step(
    good_store: Made, tmp_path: Path
) -> None:
    training = Training(ActivationStore.open(good_store.root), tmp_path / "run", settings())
    with pytest.raises(KeyboardInterrupt):
        training.train(team=Asked(10))
    assert (training.run.load_checkpoint() or (0,))[0] == 11


@pytest.mark.usefixtures("in_a_terminal")
def test_an_interrupt_in_the_last_step_waits_for_the_weights(good_store: Made, tmp_path: Path) -> None:
    training = Training(ActivationStore.open(good_store.root), tmp_path / "run", settings())
    with pytest.raises(KeyboardInterrupt):
        training.train(team=Asked(40))
    assert training.run.is_finished


def test_what_ended_before_an_interrupted_pass_is_saved_as_alone(good_store: Made, tmp_path: Path) -> None:
    store = ActivationStore.open(good_store.root)
    train(good_store, tmp_path / "alone", steps=20)

    def both() -> list[Ongoing]:
        pair = [Training(store, tmp_path / str(n), settings(steps=n, checkpoint_steps=5)) for n in (20, 40)]
        return [ongoing for training in pair if (ongoing := Ongoing.begin(training))]

    with pytest.raises(KeyboardInterrupt):
        train_together(both(), Impatient(20 + 30))
    assert not (tmp_path / "20/cfg.json").exists()
    train_together(both())
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert (tmp_path / "20" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.parametrize("changed", ["weights.W_dec", "last_fired"])
def test_a_checkpoint_without_what_is_needed_is_refused(
    changed: str, good_store: Made, tmp_path: Path
) -> None:
    store = ActivationStore.open(good_store.root)
    training = Training(store, tmp_path / "run", settings(checkpoint_steps=10))
    with pytest.raises(KeyboardInterrupt):
        training.train(Impatient(15))
    step, tensors = training.run.load_checkpoint() or (0, {})
    for broken in (
        {name: value for name, value in tensors.items() if name != changed},
        tensors | {changed: torch.zeros(3, 2)},
    ):
        training.run.save_checkpoint(step, broken)
        with pytest.raises(RunError, match=r"state\.safetensors cannot be read .*remove it to train"):
            training.train()


def test_a_step_does_not_wait_for_the_disk_and_an_interrupt_does(
    good_store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"checkpoint_steps": 10}
    train(good_store, tmp_path / "whole", **words)
    save, is_free = Run.save_checkpoint, threading.Event()
    steps_when_written: list[int] = []
    progress = Impatient(18)

    def slowly(self: Run, step: int, tensors: Any) -> None:
        assert is_free.wait(30)
        save(self, step, tensors)
        steps_when_written.append(18 - progress.steps_left)

    advance = progress.advance

    def freeing(amount: int, note: str = "") -> None:
        if progress.steps_left == 4:  # steps 11 to 14 were done meanwhile
            is_free.set()
        advance(amount, note)

    monkeypatch.setattr(Run, "save_checkpoint", slowly)
    monkeypatch.setattr(progress, "advance", freeing)
    training = Training(ActivationStore.open(good_store.root), tmp_path / "run", settings(**words))
    with pytest.raises(KeyboardInterrupt):
        training.train(progress)
    assert steps_when_written[0] >= 14
    assert training.run.checkpoint_step == 10
    train(good_store, tmp_path / "run", **words)
    assert weights(tmp_path / "whole") == weights(tmp_path / "run")


def test_a_checkpoint_that_the_disk_refuses_ends_the_training(
    good_store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Run, step: int, tensors: Any) -> None:
        raise StoreWriteError(f"no space left at step {step}")

    monkeypatch.setattr(Run, "save_checkpoint", refuse)
    training = Training(
        ActivationStore.open(good_store.root), tmp_path / "run", settings(checkpoint_steps=10)
    )
    with pytest.raises(StoreWriteError, match="at step 10"):
        training.train()
    assert not training.run.is_finished


def test_a_checkpoint_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 2),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "turned": torch.randn(2, 3, dtype=torch.float64).T,
    }
    run = Run(tmp_path)
    run.save_checkpoint(12, tensors)
    step, found = run.load_checkpoint() or (0, {})
    assert step == 12
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
