"""Evaluation of autoencoders made by hand, on small stores, against what numpy and transformers say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
import transformers
from numpy.typing import NDArray

import posae.pipeline.evaluate.scoring.rows as scored_rows
from posae.pipeline.errors import ModelError, RunError
from posae.pipeline.evaluate.evaluate import evaluate
from posae.pipeline.evaluate.scoring.evaluation import parse_evaluation
from posae.pipeline.harvest.model_facts import model_facts
from posae.pipeline.progress import Silent
from posae.pipeline.ranges import equal_ranges
from posae.pipeline.sae.autoencoder import Autoencoder
from posae.pipeline.sae.hierarchical import Hierarchical
from posae.pipeline.sae.saving import save_autoencoder
from posae.pipeline.sae.standard import Standard
from posae.pipeline.settings import EvaluateSettings
from posae.store import ActivationStore

if TYPE_CHECKING:
    from ...conftest import MakeStore

library = cast(Any, transformers)
safetensors = cast(Any, safetensors_torch)
torch.set_num_threads(1)

LENGTH, D_MODEL, LAYER, VOCABULARY = 8, 16, 1, 1000
HELD_OUT = (24, 104)


class Made(NamedTuple):
    """A run, and what it is scored on."""

    run: Path
    x: NDArray[np.float64]
    """[contexts, positions, d_model] of the held-out part."""
    ordinary: NDArray[np.bool_]
    tokens: NDArray[np.int32]


def scaling(d_model: int, factor: float, length: int) -> Standard:
    """An autoencoder whose reconstruction is ``factor`` · x: each number's positive and negative part."""
    found = Standard(
        l1_coefficient=0.0,
        d_model=d_model,
        dictionary_size=2 * d_model,
        ranges=equal_ranges(length, 2),
        generator=torch.Generator().manual_seed(0),
    )
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    found.load_state_dict(
        {
            "W_enc": both.T.contiguous(),
            "b_enc": torch.zeros(2 * d_model),
            "W_dec": factor * both,
            "b_dec": torch.zeros(d_model),
        }
    )
    return found


def make_run(store: Path, folder: Path, autoencoder: Autoencoder, layer: int = LAYER) -> Path:
    opened = ActivationStore.open(store)
    save_autoencoder(autoencoder, folder, {})
    config = {
        "settings": {"layer": layer, "ranges": "2"},
        "store": {
            "path": str(store),
            "read": opened.digests(layer),
            "d_model": opened.d_model,
            "training_contexts": opened.training_contexts(layer),
            "left_out_ids": list(opened.manifest.special_token_ids),
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def made(make_store: "MakeStore", tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Activations halved by the autoencoder; two ordinary tokens of an outlying norm, and all BOS."""
    root = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    x = 3 + rng.standard_normal((HELD_OUT[1], LENGTH, D_MODEL)).astype(np.float32)
    x[:, 0] *= 30
    tokens_of: dict[str, Any] = {
        "n_contexts": HELD_OUT[1],
        "context_length": LENGTH,
        "d_model": D_MODEL,
        "held_out": 80,
    }
    plain = make_store(root / "tokens.zarr", **tokens_of)
    places = np.argwhere(~np.isin(plain.tokens, plain.manifest.special_token_ids))
    for context, position in places[places[:, 0] >= HELD_OUT[0]][[5, 300]]:
        x[context, position] *= 40
    bits = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    store = make_store(root / "a.zarr", bits=bits, **tokens_of)
    run = make_run(store.root, root / "run", scaling(D_MODEL, 0.5, LENGTH))
    held_out = slice(*HELD_OUT)
    values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)[held_out].astype(np.float64)
    tokens = store.tokens[held_out]
    return Made(run, values, ~np.isin(tokens, store.manifest.special_token_ids), tokens)


def fvu(errors: NDArray[np.float64], x: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    return (errors**2).sum() / ((x - mean) ** 2).sum()


def test_every_fvu_is_a_ratio_of_sums_over_its_rows(made: Made) -> None:
    found = evaluate(made.run, EvaluateSettings())
    rows = made.x[made.ordinary]
    mean = rows.mean(axis=0)
    assert found["fvu"] == pytest.approx(fvu(rows / 2, rows, mean))
    everything = made.x.reshape(-1, D_MODEL)
    assert found["fvu_with_special"] == pytest.approx(
        fvu(everything / 2, everything, everything.mean(axis=0))
    )
    norms = np.linalg.norm(rows, axis=1)
    outliers = found["norm_outliers"]
    assert outliers["n_rows"] == 2
    assert outliers["threshold"] == pytest.approx(10 * np.median(norms), rel=0.19)  # a quarter octave
    inliers = rows[norms <= outliers["threshold"]]
    assert len(inliers) == len(rows) - 2
    assert found["fvu_without_outliers"] == pytest.approx(fvu(inliers / 2, inliers, inliers.mean(axis=0)))
    assert found["fvu_by_position"][0] is None  # BOS alone stands there
    assert found["l0_by_position"][0] is None
    for p in range(1, LENGTH):
        here = made.x[:, p][made.ordinary[:, p]]
        assert found["fvu_by_position"][p] == pytest.approx(fvu(here / 2, here, mean))
    for r, half in enumerate((slice(0, 4), slice(4, 8))):
        here = made.x[:, half][made.ordinary[:, half]]
        assert found["fvu_by_range"][r] == pytest.approx(fvu(here / 2, here, mean))
    assert found["n_rows"] == len(rows)
    assert found["contexts"] == list(HELD_OUT)


def test_l0_and_dead_features_are_those_of_ordinary_tokens(made: Made) -> None:
    found = evaluate(made.run, EvaluateSettings())
    code = np.concatenate([np.maximum(made.x, 0), np.maximum(-made.x, 0)], axis=2)
    rows = code[made.ordinary]
    assert found["l0"] == pytest.approx((rows != 0).sum(axis=1).mean())
    assert found["l0_above"] == pytest.approx((np.abs(rows) > 1e-3).sum(axis=1).mean())
    for p in range(1, LENGTH):
        here = code[:, p][made.ordinary[:, p]]
        assert found["l0_by_position"][p] == pytest.approx((here != 0).sum(axis=1).mean())
    fired = (rows > 1e-3).sum(axis=0)
    assert found["dead_fraction"] == pytest.approx((rows == 0).all(axis=0).mean())
    assert found["density_histogram"]["never"] == (fired == 0).sum()
    assert sum(found["density_histogram"]["counts"]) == (fired > 0).sum()
    assert (found["retention"], found["drift"], found["ce_loss"]) == (None, None, None)


def test_how_contexts_are_cut_into_batches_changes_no_score(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(made.run, EvaluateSettings())
    sizes: list[int] = []
    before = scored_rows.ordered_batches

    def counted(*words: Any, **named: Any) -> Any:
        sizes.append(named["batch_contexts"])
        return before(*words, **named)

    monkeypatch.setattr(scored_rows, "ordered_batches", counted)
    monkeypatch.setattr(scored_rows, "_CODE_NUMBERS", 0)
    assert_close(evaluate(made.run, EvaluateSettings()), whole)
    assert sizes == [8]


def assert_close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in cast("dict[str, Any]", a).items():
            assert_close(value, b[key])
    elif isinstance(a, list):
        for one, other in zip(cast("list[Any]", a), b, strict=True):
            assert_close(one, other)
    else:
        assert a == (pytest.approx(b, rel=1e-9) if isinstance(a, float) else b)


def test_a_part_of_the_held_out_contexts_can_be_scored(made: Made) -> None:
    found = evaluate(made.run, EvaluateSettings(contexts=16))
    assert found["contexts"] == [24, 40]
    assert found["n_rows"] == made.ordinary[:16].sum()


def test_what_the_run_kept_of_its_training_is_read(made: Made, tmp_path: Path) -> None:
    store = Path(json.loads((made.run / "config.json").read_text())["store"]["path"])
    adapted = Hierarchical(
        l1_coefficient=0.0,
        adapter_width=4,
        d_model=D_MODEL,
        dictionary_size=32,
        ranges=equal_ranges(LENGTH, 2),
        generator=torch.Generator().manual_seed(0),
    )
    run = make_run(store, tmp_path / "run", adapted)
    base = adapted.W_dec.detach().clone()
    base[:8] *= -1
    (run / "base_phase.safetensors").write_bytes(safetensors.save({"W_dec": base}))
    lines = [{"step": 1, "seconds": 2.5, "cpu_seconds": 4.0}, {"step": 2, "seconds": 5.5, "cpu_seconds": 8.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluate(run, EvaluateSettings())
    assert found["drift"]["cosine_mean"] == pytest.approx((32 - 16) / 32)
    assert found["drift"]["kept_share"] == pytest.approx(24 / 32)
    assert (found["training_seconds"], found["training_cpu_seconds"]) == (5.5, 8.0)
    assert found["retention"] == 1  # with an alpha of 0 the code is the base code
    assert found["fvu_base"] == pytest.approx(found["fvu"])


# CE loss


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 of random weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    cast(Any, torch).manual_seed(0)
    config = library.Gemma2Config(
        **{"vocab_size": VOCABULARY, "hidden_size": D_MODEL, "intermediate_size": 24, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.5},
    )
    library.Gemma2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


MakeRun = Callable[..., Path]


@pytest.fixture
def run_of(make_store: "MakeStore", tmp_path: Path) -> MakeRun:
    def make(model: str, name: str, factor: float, layer: int = LAYER, **manifest: Any) -> Path:
        facts = model_facts(model)
        about: dict[str, Any] = {"model": name, "model_revision": facts.revision}
        store = make_store(
            tmp_path / "of-model.zarr",
            n_contexts=32,
            context_length=LENGTH,
            d_model=facts.d_model,
            held_out=16,
            layers=(layer,),
            model_config_hash=facts.config_hash,
            vocabulary_size=VOCABULARY,
            **about | manifest,
        )
        return make_run(store.root, tmp_path / "run", scaling(facts.d_model, factor, LENGTH), layer)

    return make


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_an_autoencoder_that_changes_nothing_costs_nothing(name: str, gemma: Path, run_of: MakeRun) -> None:
    run = run_of("demo" if name == "demo" else str(gemma), name, 1.0)
    model = None if name == "demo" else str(gemma)
    found = evaluate(run, EvaluateSettings(ce_loss=True, model=model))
    ce = found["ce_loss"]
    assert found["fvu"] == 0
    assert ce["spliced"] == ce["clean"]
    assert ce["kl"] == pytest.approx(0, abs=1e-12)
    assert ce["recovered"] == ce["recovered_of_mean"] == 1
    assert ce["recovered_by_range"] == [1, 1]
    assert (ce["model"], ce["contexts"]) == (name, 16)
    assert ce["zero"] != ce["clean"]


def test_every_ce_is_that_of_a_hook_made_by_hand(gemma: Path, run_of: MakeRun) -> None:
    run = run_of(str(gemma), "tiny", 0.5)
    ce = evaluate(run, EvaluateSettings(ce_loss=True, model=str(gemma), ce_contexts=10))["ce_loss"]
    store = ActivationStore.open(json.loads((run / "config.json").read_text())["store"]["path"])
    ids = store.tokens(slice(16, 26))
    ordinary = torch.as_tensor(~np.isin(ids, store.manifest.special_token_ids))
    stats = store.stats(LAYER)
    mean = torch.as_tensor(stats.sums.sum(axis=0) / stats.counts.sum())
    model = library.Gemma2ForCausalLM.from_pretrained(
        gemma, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    tokens = torch.as_tensor(ids).long()

    def logs(replace: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        def hook(_module: Any, _arguments: Any, output: Any) -> Any:
            whole = isinstance(output, torch.Tensor)
            x = cast(torch.Tensor, output if whole else output[0])
            new = replace(x).to(x.dtype)
            return new if whole else (new, *output[1:])

        handle = model.model.layers[LAYER].register_forward_hook(hook)
        with torch.inference_mode():
            found = torch.log_softmax(model(input_ids=tokens).logits[:, :-1].float(), dim=-1)
        handle.remove()
        return found

    def score(log: torch.Tensor, positions: slice = slice(None)) -> float:
        loss = -log.gather(-1, tokens[:, 1:, None])[..., 0]
        return float(loss[:, positions][ordinary[:, :-1][:, positions]].double().mean())

    clean = logs(lambda x: x)
    spliced = logs(lambda x: torch.where(ordinary[..., None], x / 2, x))
    assert ce["clean"] == pytest.approx(score(clean), rel=1e-6)
    assert ce["zero"] == pytest.approx(score(logs(torch.zeros_like)), rel=1e-6)
    assert ce["mean"] == pytest.approx(score(logs(lambda x: mean.expand_as(x))), rel=1e-6)
    assert ce["spliced"] == pytest.approx(score(spliced), rel=1e-6)
    kl = (clean.exp() * (clean - spliced)).sum(-1)[ordinary[:, :-1]].double().mean()
    assert ce["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert ce["kl"] > 0
    assert ce["spliced_by_range"] == pytest.approx(
        [score(spliced, slice(0, 4)), score(spliced, slice(4, 8))], rel=1e-6
    )
    assert ce["n_rows"] == int(ordinary[:, :-1].sum())


def test_ce_loss_stays_when_the_run_is_scored_again_without_it(gemma: Path, run_of: MakeRun) -> None:
    run = run_of(str(gemma), "tiny", 0.5)
    first = evaluate(run, EvaluateSettings(ce_loss=True, model=str(gemma), ce_contexts=2))
    again = evaluate(run, EvaluateSettings())
    assert again == first
    assert again["ce_loss"]["contexts"] == 2
    assert json.loads((run / "evaluation.json").read_text()) == again
    (run / "evaluation.json").write_text("{")
    assert evaluate(run, EvaluateSettings())["ce_loss"] is None


def test_another_model_a_missing_one_and_one_that_looks_ahead_are_refused(
    gemma: Path, run_of: MakeRun, tmp_path: Path
) -> None:
    run = run_of(str(gemma), "tiny", 0.5)
    with pytest.raises(ModelError, match="local folder, tiny; name that folder with --model"):
        evaluate(run, EvaluateSettings(ce_loss=True))
    with pytest.raises(ModelError, match=r"demo is not tiny, .* configurations differ"):
        evaluate(run, EvaluateSettings(ce_loss=True, model="demo"))
    sizes = {"hidden_size": D_MODEL, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
    for name, kind in (("encoder", library.BertModel), ("masked", library.BertForMaskedLM)):
        kind(library.BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / name)
        for part in ("run", "of-model.zarr"):
            (tmp_path / part).rename(tmp_path / f"before-{name}-{part}")
        run = run_of(str(tmp_path / name), name, 0.5)
        with pytest.raises(ModelError, match=r"does not predict the next token .* leave --ce-loss out"):
            evaluate(run, EvaluateSettings(ce_loss=True, model=str(tmp_path / name)))
        assert not (run / "evaluation.json").exists()


class Heard(Silent):
    """Keeps the lines that stay."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_a_folder_is_not_taken_for_a_commit_of_the_hub(gemma: Path, run_of: MakeRun) -> None:
    run = run_of(str(gemma), "owner/tiny", 0.5, model_revision="c5ebcd4")
    asked = EvaluateSettings(ce_loss=True, model=str(gemma))
    for settings in (asked, EvaluateSettings(probing="saebench", model=str(gemma))):
        said = r"its weights and tokenizer are sha256:\w+, not c5ebcd4"
        with pytest.raises(ModelError, match=said) as told:
            evaluate(run, settings)
        assert "leave --model out, or get a copy: hf download owner/tiny --revision c5ebcd4" in str(
            told.value
        )
    assert not (run / "evaluation.json").exists()


def test_of_weights_that_the_store_does_not_name_it_is_said_that_they_are_taken(
    gemma: Path, run_of: MakeRun
) -> None:
    run, heard = run_of(str(gemma), "tiny", 0.5, model_revision=None), Heard()
    evaluate(run, EvaluateSettings(ce_loss=True, ce_contexts=2, model=str(gemma)), heard)
    assert [line for line in heard.lines if "does not say which weights it was made with" in line]


# evaluation.json


def test_an_older_evaluation_opens_and_one_without_a_score_says_what_to_do(made: Made) -> None:
    content = evaluate(made.run, EvaluateSettings())
    assert parse_evaluation(content, made.run).model_dump(mode="json") == content
    older = {key: value for key, value in content.items() if key not in ("clusters", "fvu_by_position")}
    assert parse_evaluation(older, made.run).clusters is None
    del older["fvu"]
    with pytest.raises(RunError, match=r"evaluation\.json: fvu: .*posae evaluate .*run"):
        parse_evaluation(older, made.run)


@pytest.mark.parametrize("config", [{"settings": {}}, {"settings": {"layer": LAYER}, "store": {"path": 3}}])
def test_a_run_that_does_not_record_its_store_is_refused(
    config: dict[str, Any], made: Made, tmp_path: Path
) -> None:
    run = shutil.copytree(made.run, tmp_path / "run")
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"config\.json does not say which store .*train it again"):
        evaluate(run, EvaluateSettings())
