"""SAEBench's own sparse probing scores a run, at true positions, or is refused."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.autoencoder import Autoencoder
from posae.pipeline.sae.registry import new_autoencoder
from posae.pipeline.sae.saving import save_autoencoder
from posae.store.errors import SettingsError

D_MODEL, FEATURES, LENGTH = 8, 12, 6
OWN: dict[str, dict[str, Any]] = {
    "hierarchical": {"l1_coefficient": 0.04, "adapter_width": 4},
    "separate": {"l1_coefficient": 0.04},
    "topk": {"target_l0": 3},
    "standard": {"l1_coefficient": 0.04},
}


@pytest.fixture(scope="module")
def saebench() -> Iterator[Any]:
    """posae's door to SAEBench; SAEBench's hints are not checked, as some are wrong about their own sizes."""
    jaxtyping: Any = pytest.importorskip("jaxtyping", reason="sae-bench is not installed: see .ci/run")
    pytest.importorskip("sae_bench", reason="sae-bench is not installed: see .ci/run")
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its dependencies, at import
        pytest.importorskip("sae_lens", reason="sae-lens is not installed: see .ci/run")
        yield import_module("posae.pipeline.interop.saebench")
    jaxtyping.config.update("jaxtyping_disable", before)


def saved(folder: Path, architecture: str, **more: Any) -> Autoencoder:
    autoencoder = new_autoencoder(
        architecture,
        d_model=D_MODEL,
        dictionary_size=FEATURES,
        ranges=equal_ranges(LENGTH, 3),
        generator=torch.Generator().manual_seed(0),
        activation_scale=0.3,
        **OWN[architecture],
        **more,
    ).eval()
    autoencoder.alpha = 0.7
    metadata = {"model_name": "made-up", "hook_name": "blocks.2.hook_resid_post"}
    save_autoencoder(autoencoder, folder, metadata)
    return autoencoder


def texts(n: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Activations [contexts, positions, d_model] as SAEBench masks them: BOS first, padding last."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, LENGTH, D_MODEL, generator=generator)
    x[..., 0] += shift
    x[:, 0] = 0
    n_tokens = torch.randint(2, LENGTH + 1, (n, 1), generator=generator)
    return torch.where(torch.arange(LENGTH) < n_tokens, 1, 0)[..., None] * x


@pytest.mark.parametrize("architecture", OWN)
def test_codes_are_those_of_the_run_at_their_positions(
    architecture: str, saebench: Any, tmp_path: Path
) -> None:
    mine = saved(tmp_path, architecture)
    theirs = saebench.SAEBenchAutoencoder(tmp_path)
    x, positions = texts(20), torch.arange(LENGTH)
    code = mine.encode(x, positions)
    # Its decoder has unit norm in scaled units; here in those of activations.
    norms = mine.W_dec.square().sum(1).sqrt() / 0.3
    torch.testing.assert_close(theirs.encode(x), code * norms, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(x), mine.decode(code, positions), rtol=1e-4, atol=1e-4)
    assert theirs.check_decoder_norms()
    assert (theirs.cfg.hook_layer, theirs.cfg.hook_name) == (2, "blocks.2.hook_resid_post")
    half = theirs.to(device="cpu", dtype=torch.bfloat16)
    assert half.encode(x.bfloat16()).dtype == half.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:'penalty' was deprecated:FutureWarning")
def test_saebench_probes_a_run(saebench: Any, tmp_path: Path) -> None:
    saved(tmp_path / "run", "hierarchical", position_mean="exact")
    autoencoder = saebench.SAEBenchAutoencoder(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main: Any = import_module("sae_bench.evals.sparse_probing.main")
        config: Any = import_module("sae_bench.evals.sparse_probing.eval_config")
    name = "fancyzhx/ag_news"
    classes = ("0", "1", "2", "3")
    acts = {
        part: {one: texts(n, 10 * i + n, 4.0 * i) for i, one in enumerate(classes)}
        for part, n in (("train", 60), ("test", 30))
    }
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    llm = {"llm_test_accuracy": dict.fromkeys(classes, 0.5)}
    torch.save(acts | {"llm_results": llm}, artifacts / "fancyzhx_ag_news_activations.pt")
    settings = config.SparseProbingEvalConfig(dataset_names=[name], k_values=[1, 5], random_seed=0)
    with contextlib.redirect_stdout(io.StringIO()):
        found, by_class = main.run_eval_single_sae(
            settings, autoencoder, cast(Any, None), "cpu", str(artifacts)
        )
    assert by_class[f"{name}_results"]["sae_top_5_test_accuracy"].keys() == set(classes)
    # The first class is far from the others along one direction.
    assert by_class[f"{name}_results"]["sae_top_5_test_accuracy"]["0"] > 0.7
    assert 0.5 < found["sae_test_accuracy"] <= 1


def test_padding_on_the_left_is_refused(saebench: Any, tmp_path: Path) -> None:
    saved(tmp_path / "aware", "hierarchical")
    saved(tmp_path / "plain", "topk")
    aware, plain = (saebench.SAEBenchAutoencoder(tmp_path / name) for name in ("aware", "plain"))
    # All but the first row fill their context; that one has two tokens, after the padding.
    left = 3 * torch.randn(20, LENGTH, D_MODEL)
    left[:, 0] = left[0, :-2] = 0
    with pytest.raises(SettingsError, match="padded on the left"):
        aware.encode(left)
    assert plain.encode(left).shape == (20, LENGTH, FEATURES)
    with pytest.raises(SettingsError, match="pads on the left"):
        saebench.SAEBenchAutoencoder(tmp_path / "aware", tokenizer=SimpleNamespace(padding_side="left"))
    saebench.SAEBenchAutoencoder(tmp_path / "aware", tokenizer=SimpleNamespace(padding_side="right"))


def test_what_has_no_positions_is_refused(saebench: Any, tmp_path: Path) -> None:
    saved(tmp_path / "aware", "separate")
    saved(tmp_path / "plain", "standard")
    aware, plain = (saebench.SAEBenchAutoencoder(tmp_path / name) for name in ("aware", "plain"))
    rows = texts(4).reshape(-1, D_MODEL)
    for call, x in ((aware.encode, rows), (aware, rows), (aware.decode, rows.new_zeros(3, FEATURES))):
        with pytest.raises(SettingsError, match="needs to know positions"):
            call(x)
    assert plain(rows).shape == rows.shape
    longer = torch.cat([texts(4), texts(4)], dim=1)
    with pytest.raises(SettingsError, match="context_length to 6 or less"):
        aware.encode(longer)
    assert plain.encode(longer).shape == (4, 2 * LENGTH, FEATURES)
