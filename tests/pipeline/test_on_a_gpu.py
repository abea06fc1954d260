"""On a GPU, a pretended one, harvest, training and scores are what they are on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.harvest.harvest import Harvest
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.report.explore import explore_runs
from posae.pipeline.report.page.explored import Explored
from posae.pipeline.sae.run_settings import train_presets, train_settings
from posae.pipeline.sae.sparse import SparseCode
from posae.pipeline.sae.standard import Standard
from posae.pipeline.sae.topk import BatchTopK, TopK
from posae.pipeline.settings import EvaluateSettings, HarvestSettings, TrainSettings, build
from posae.pipeline.train import Training
from posae.store import ActivationStore

from ..conftest import Made, tree
from .impatient import Impatient
from .pretended_gpu import GPU, pretended_gpu

LAYER = 2


def harvest(path: Path, device: str) -> dict[str, bytes]:
    words = {
        "contexts": 64,
        "context_length": 16,
        "layers": (1, LAYER),
        "batch_contexts": 8,
        "device": device,
    }
    Harvest(path, build(HarvestSettings, words, "")).run()
    return tree(path)


def small(preset: str, device: str) -> TrainSettings:
    words: dict[str, Any] = {**train_presets()[preset], "ranges": "2", "steps": 20, "batch_size": 32}
    words |= {"window_contexts": 16, "log_steps": 5, "checkpoint_steps": 5, "device": device}
    words |= {"learning_rate": 1e-3, "dead_after_tokens": 32, "curriculum": "plateau"}
    if words["architecture"] in ("topk", "batchtopk", "jumprelu"):
        words |= {"target_l0": 4, "position_mean": "exact"}
    if words["architecture"] == "hierarchical":
        words["dropout"] = 0.0  # drawn otherwise there
    return train_settings(words, "")


def test_a_pretended_gpu_refuses_what_a_real_one_does() -> None:
    with pretended_gpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there.device, (there + 1).device, here.to(GPU).device) == (GPU, GPU, GPU)
        assert there.cpu().device == here.device == torch.device("cpu")
        wrong: list[Callable[[], object]] = [
            lambda: there + here,
            lambda: torch.where(there > 0, here, there),
            lambda: there.numpy(),
            lambda: np.asarray(there),
            lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
            lambda: torch.randn(3, generator=torch.Generator(GPU)),
        ]
        for do in wrong:
            with pytest.raises((RuntimeError, TypeError), match=r"cuda:0|generator"):
                do()


def test_a_harvest_has_the_same_activations(tmp_path: Path) -> None:
    on_cpu = harvest(tmp_path / "cpu.zarr", "cpu")
    with pretended_gpu():
        on_gpu = harvest(tmp_path / "gpu.zarr", "auto")
    assert ActivationStore.open(tmp_path / "gpu.zarr").manifest.device == "cuda"
    differ = {name for name in on_cpu | on_gpu if on_cpu.get(name) != on_gpu.get(name)}
    assert differ == {"zarr.json", "seal.json", "README.md"}, "the device is named"


@pytest.mark.parametrize("preset", train_presets())
def test_every_preset_trains_and_goes_on_to_about_the_same_scores(
    preset: str, good_store: Made, tmp_path: Path
) -> None:
    store, nothing = ActivationStore.open(good_store.root), EvaluateSettings()
    Training(store, tmp_path / "cpu", small(preset, "cpu")).train()
    on_cpu = evaluate(tmp_path / "cpu", nothing, None, store)
    with pretended_gpu():
        with pytest.raises(KeyboardInterrupt):
            Training(store, tmp_path / "gpu", small(preset, "cuda")).train(Impatient(12))
        trained = Training(store, tmp_path / "gpu", small(preset, "cuda")).train()
        assert trained.steps_done == 10
        assert trained.run.config["device"] == "cuda"
        on_gpu = evaluate(tmp_path / "gpu", nothing, None, store)
    assert on_gpu["fvu"] == pytest.approx(on_cpu["fvu"], rel=1e-3)
    assert on_gpu["l0"] == pytest.approx(on_cpu["l0"], rel=1e-2)


@pytest.mark.parametrize("n_rows", [40, 1], ids=["many", "few"])
def test_batchtopk_keeps_the_same(n_rows: int) -> None:
    own: dict[str, Any] = {"d_model": 8, "dictionary_size": 24, "ranges": equal_ranges(16, 4), "target_l0": 6}
    here, there = (BatchTopK(**own, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x = torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(1)) - 0.5 * (n_rows == 1)
    offsets = [0, n_rows, n_rows, n_rows, n_rows]
    wanted = here(x, offsets).code
    with pretended_gpu():
        found = there.to(GPU)(x.to(GPU), offsets).code.cpu()
        torch.testing.assert_close(there.threshold.cpu(), here.threshold)
    torch.testing.assert_close(found, wanted)
    assert 0 < (found > 0).sum() <= 6 * n_rows


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_few_active_features_are_listed_to_the_same_gradients(kind: type[TopK]) -> None:
    own: dict[str, Any] = {"d_model": 8, "dictionary_size": 1024, "ranges": equal_ranges(16, 1)}
    here, there = (kind(**own, target_l0=3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    wanted = here(x, [0, 40])
    wanted.losses.total.backward()  # pyright: ignore[reportUnknownMemberType]
    with pretended_gpu():
        found = there.to(GPU)(x.to(GPU), [0, 40])
        assert isinstance(found.codes.code, SparseCode)
        torch.testing.assert_close(found.code.cpu(), wanted.code)
        torch.testing.assert_close(found.reconstruction.cpu(), wanted.reconstruction)
        assert torch.equal(found.fired().cpu(), wanted.fired())
        found.losses.total.backward()  # pyright: ignore[reportUnknownMemberType]
        for weight, other in zip(there.parameters(), here.parameters(), strict=True):
            assert weight.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(weight.grad.cpu(), other.grad)


def test_dropout_is_drawn_there(good_store: Made, tmp_path: Path) -> None:
    settings = small("paper", "cuda").model_copy(update={"dropout": 0.1})
    with pretended_gpu():
        trained = Training(ActivationStore.open(good_store.root), tmp_path / "run", settings).train()
    assert np.isfinite(trained.run.metrics()[-1]["loss"])


def test_rounded_products_are_of_the_steps_alone(
    good_store: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    forward = Standard.forward

    def watched(self: Standard, *words: Any) -> Any:
        found.append(torch.backends.cuda.matmul.fp32_precision)
        return forward(self, *words)

    monkeypatch.setattr(Standard, "forward", watched)
    settings, before = small("paper-baseline", "cuda"), torch.backends.cuda.matmul.fp32_precision
    with pretended_gpu():
        store = ActivationStore.open(good_store.root)
        Training(store, tmp_path / "run", settings).train()
        assert found == ["tf32"] * 20
        evaluate(tmp_path / "run", EvaluateSettings(), None, store)
        assert set(found[20:]) == {before}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_every_score_is_the_same(tmp_path: Path) -> None:
    harvest(tmp_path / "a.zarr", "cpu")
    store, run = ActivationStore.open(tmp_path / "a.zarr"), tmp_path / "run"
    Training(store, run, small("posae", "cpu").model_copy(update={"layer": LAYER})).train()
    words: dict[str, Any] = {"ce_loss": True, "ce_contexts": 4, "probing": "offline"}
    on_cpu = evaluate(run, EvaluateSettings(device="cpu", **words), None, store)
    (looked_at,) = explore_runs([("posae", run)], n_features=8, n_contexts=8)
    assert isinstance(looked_at, Explored)
    with pretended_gpu():
        assert evaluate(run, EvaluateSettings(**words), None, store) == on_cpu
        (there,) = explore_runs([("posae", run)], n_features=8, n_contexts=8)
    with np.printoptions(threshold=2**30):
        assert repr(there) == repr(looked_at)
