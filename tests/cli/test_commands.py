"""The command line by real invocations: what it makes, what it says, how it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from posae.pipeline import as_torch, load_autoencoder
from posae.pipeline.harvest.language_model import LanguageModel
from posae.pipeline.runs import Run
from posae.store import ActivationStore

from ..conftest import tree
from .conftest import Posae, call

DEMO_MODEL = Path(__file__).parents[2] / "pipeline" / "harvest" / "demo_model"
SMALL = ("--contexts", "24", "--context-length", "16")
QUICK = ("--steps", "40", "--batch-size", "64", "--window-contexts", "8", "--log-steps", "10")


def begin(*words: object) -> subprocess.Popen[bytes]:
    """Run the command line in a process of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "posae", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "demo.zarr"
    assert call("harvest", path, *SMALL) == 0
    return path


@pytest.fixture(scope="session")
def trained(store: Path) -> Path:
    run = store.parent / "run"
    assert call("train", store, run, *QUICK) == 0
    return run


def test_harvest_keeps_bit_for_bit_what_transformers_computes(store: Path) -> None:
    opened = ActivationStore.open(store)
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.inference_mode():
        tokens = torch.as_tensor(opened.tokens()).long()
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    assert opened.layers == (1, 2, 4)
    for layer in opened.layers:
        assert torch.equal(as_torch(opened.read(layer)), hidden[layer + 1])


def test_every_context_begins_with_bos_and_the_last_chunk_is_held_out(store: Path) -> None:
    opened = ActivationStore.open(store)
    assert (opened.tokens()[:, 0] == opened.manifest.first_token).all()
    assert opened.manifest.held_out == (16, 24)


def test_inspect_store_as_json_says_everything(posae: Posae, store: Path) -> None:
    ended = posae("inspect-store", store, "--json", "--verify")
    facts = json.loads(ended.out)
    assert ended.code == 0
    assert facts["verified"] is True
    assert facts["damaged"] == []
    assert {key: facts[key] for key in ("contexts", "tokens", "complete", "layers", "codec", "format")} == {
        "contexts": 24,
        "tokens": 24 * 16,
        "complete": True,
        "layers": [1, 2, 4],
        "codec": "small",
        "format": 1,
    }
    opened = ActivationStore.open(store)
    norms = np.linalg.norm(opened.read(2, dtype="float32"), axis=-1).mean(axis=0)
    np.testing.assert_allclose(facts["norms"]["2"], norms, rtol=1e-5)
    assert facts["raw_bytes"] == 3 * 24 * 16 * 128 * 2


def test_a_harvest_may_lose_bits_by_choice_and_the_label_says_what(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    rounded = tmp_path / "rounded.zarr"
    assert posae("harvest", rounded, *SMALL, "--mantissa-bits", 5).code == 0
    facts = json.loads(posae("inspect-store", rounded, "--json", "--verify").out)
    exact = json.loads(posae("inspect-store", store, "--json").out)
    assert (facts["verified"], facts["mantissa_bits"], exact["mantissa_bits"]) == (True, 5, None)
    assert facts["stored_bytes"] < 0.87 * exact["stored_bytes"]
    values = ActivationStore.open(store).read(2, dtype="float32")
    error = np.linalg.norm(ActivationStore.open(rounded).read(2, dtype="float32") - values, axis=-1)
    mean = (error / np.linalg.norm(values, axis=-1)).mean()
    assert facts["by_layer"]["2"]["rounding_error"] == pytest.approx(mean, rel=1e-4)
    assert 0.005 < mean < 0.009
    assert f"rounding changed activations by {mean:.2%}" in posae("inspect-store", rounded).out
    assert "rounding" not in posae("inspect-store", store).out
    refused = posae("harvest", rounded, *SMALL)
    assert (refused.code, "--mantissa-bits was 5 and is now None" in refused.err) == (1, True)


def test_inspect_store_says_what_compression_could_gain_and_what_position_explains(
    posae: Posae, store: Path
) -> None:
    facts = json.loads(posae("inspect-store", store, "--json").out)["by_layer"]["2"]
    assert 1.3 < facts["bound"] < 1.7
    assert facts["share_of_bound"] == pytest.approx(facts["ratio"] / facts["bound"])
    shown = posae("inspect-store", store).out
    assert f"of the byte-plane bound {facts['bound']:.3f}" in shown
    assert f"position explains {max(0.0, facts['position_r2']):.2%} of the variance" in shown


def test_inspect_store_draws_norms_by_position(posae: Posae, store: Path) -> None:
    ended = posae("inspect-store", store)
    assert ended.code == 0
    assert "layer 4" in ended.out
    assert "█" in ended.out
    assert "stdlib" in ended.out
    assert f"identity        {ActivationStore.open(store).identity}\n" in ended.out


def test_inspect_store_shows_the_text_of_a_context(posae: Posae, store: Path) -> None:
    ended = posae("inspect-store", store, "--context", 3)
    assert ended.code == 0
    assert "<bos>" in ended.out


def test_inspecting_and_helping_do_without_torch(store: Path) -> None:
    code = (
        "import sys; from posae.cli.app import app\n"
        f"app(['inspect-store', {str(store)!r}], standalone_mode=False)\n"
        "app(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'zarr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_same_words_again_change_nothing(posae: Posae, store: Path) -> None:
    before = tree(store)
    ended = posae("harvest", store, *SMALL)
    assert ended.code == 0
    assert "already finished" in ended.out
    assert tree(store) == before


def test_other_words_are_refused_by_name(posae: Posae, store: Path) -> None:
    before = tree(store)
    ended = posae("harvest", store, *SMALL, "--seed", 7, "--packing", "truncate")
    assert ended.code == 1
    assert "--seed was 0 and is now 7" in ended.err
    assert "--packing was 'pack' and is now 'truncate'" in ended.err
    assert tree(store) == before


def test_a_further_layer_joins_the_others(posae: Posae, tmp_path: Path) -> None:
    both, later = tmp_path / "both.zarr", tmp_path / "later.zarr"
    assert posae("harvest", both, *SMALL, "--layers", "0,5").code == 0
    assert posae("harvest", later, *SMALL, "--layers", "5").code == 0
    before = tree(later)
    assert posae("harvest", later, *SMALL, "--layers", "0").code == 0
    after = tree(later)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"seal.json", "README.md"}
    assert after == tree(both)


def test_dry_run_writes_nothing(posae: Posae, tmp_path: Path) -> None:
    ended = posae("harvest", tmp_path / "none.zarr", "--tokens", 1_000_000, "--dry-run", "--rate", 1000)
    assert ended.code == 0
    assert "1,000,064" in ended.out
    assert "16 min 40 s at 1,000 tokens/s" in ended.out
    assert not (tmp_path / "none.zarr").exists()


def test_a_killed_harvest_goes_on_to_the_same_bytes(store: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed.zarr"
    for seconds_after_root in (0.0, 0.5):
        harvesting = begin("harvest", killed, *SMALL)
        while harvesting.poll() is None and not (killed / "zarr.json").exists():
            time.sleep(0.01)
        time.sleep(seconds_after_root)
        kill(harvesting)
        assert ActivationStore.open(killed).n_contexts in (0, 24)
    assert call("harvest", killed, *SMALL) == 0
    assert tree(killed) == tree(store)


def test_plant_puts_an_effect_into_a_copy_and_says_what_position_explains(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.zarr"
    words = ("plant", store, planted, "--strength", 0.5, "--rank", 4)
    ended = posae(*words)
    assert ended.code == 0, ended.err
    assert "demo + planted additive 0.5" in ended.out
    opened = ActivationStore.open(planted)
    assert f"layer 2: position explains {opened.position_r2(2):.2%} of the variance" in ended.out
    assert opened.position_r2(2) > 0.4
    facts = json.loads(posae("inspect-store", planted, "--json", "--verify").out)
    assert (facts["verified"], facts["model"]) == (True, "demo + planted additive 0.5")
    assert facts["manifest"]["planted"]["rank"] == "4"
    assert "<bos>" in posae("inspect-store", planted, "--context", 3).out
    before = tree(planted)
    assert "already finished" in posae(*words).out
    refused = posae(*words, "--seed", 1)
    assert (refused.code, "planted seed was '0' and is now '1'" in refused.err) == (1, True)
    refused = posae("harvest", planted, *SMALL)
    assert (refused.code, "model was 'demo + planted additive 0.5'" in refused.err) == (1, True)
    assert posae("plant", store, planted, "--effect", "scale").code == 2
    assert tree(planted) == before


def test_no_model_is_run_on_behalf_of_a_planted_store(posae: Posae, store: Path, tmp_path: Path) -> None:
    planted, run = tmp_path / "planted.zarr", tmp_path / "run"
    assert posae("plant", store, planted, "--layer", 2).code == 0
    assert posae("train", planted, run, *QUICK).code == 0
    for words in (("--ce-loss", "--model", "demo"), ("--probing", "saebench")):
        ended = posae("evaluate", run, *words)
        assert (ended.code, "an effect was planted" in ended.err) == (1, True), ended.err


def test_a_killed_planting_goes_on_to_the_same_bytes(store: Path, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    words = ("--effect", "rotation", "--rank", 8)
    for name in ("zarr.json", "stats/zarr.json"):
        working = begin("plant", store, killed, *words)
        while working.poll() is None and not (killed / name).exists():
            time.sleep(0.001)
        kill(working)
        assert ActivationStore.open(killed).n_contexts in (0, 24)
    assert call("plant", store, killed, *words) == 0
    assert call("plant", store, whole, *words) == 0
    assert tree(killed) == tree(whole)


def test_train_scores_the_paper_on_the_held_out_part(posae: Posae, store: Path, trained: Path) -> None:
    ended = posae("evaluate", trained, "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    notes = found.pop("notes")
    assert any("FVU above 1" in note for note in notes)
    assert found == json.loads((trained / "evaluation.json").read_text())
    assert found["architecture"] == "hierarchical"
    assert found["contexts"] == [16, 24]
    special = ActivationStore.open(store).manifest.special_token_ids
    assert found["n_rows"] == int(
        (~np.isin(ActivationStore.open(store).tokens(slice(16, 24)), special)).sum()
    )
    assert len(found["fvu_by_range"]) == 4
    config = json.loads((trained / "config.json").read_text())["settings"]
    assert (config["layer"], config["warmup_steps"], config["ramp_steps"]) == (2, 4, 36)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 10, 20, 30, 40]  # also where the base phase ends
    assert lines[-1]["alpha"] == 1.0


def test_a_trained_autoencoder_reproduces_its_score(store: Path, trained: Path) -> None:
    opened, autoencoder = ActivationStore.open(store), load_autoencoder(trained)
    tokens = opened.tokens(slice(16, 24))
    wanted = torch.as_tensor(~np.isin(tokens, opened.manifest.special_token_ids))
    x = as_torch(opened.read(2, slice(16, 24))).float()
    with torch.no_grad():
        error = x - autoencoder.decode(autoencoder.encode(x, torch.arange(16)))
    rows = x[wanted]
    fvu = error[wanted].square().sum() / (rows - rows.mean(0)).square().sum()
    found = json.loads((trained / "evaluation.json").read_text())
    assert fvu.item() == pytest.approx(found["fvu"], rel=1e-4)


@pytest.mark.parametrize("architecture", ["hierarchical", "standard", "batchtopk"])
def test_a_killed_training_ends_with_the_same_weights(architecture: str, store: Path, tmp_path: Path) -> None:
    words = (*QUICK, "--steps", "300", "--checkpoint-steps", "20", "--architecture", architecture)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    training = begin("train", store, killed, *words)
    while training.poll() is None and not (killed / "checkpoint" / "state.safetensors").exists():
        time.sleep(0.001)
    kill(training)
    assert not (killed / "sae_weights.safetensors").exists()
    assert call("train", store, killed, *words) == 0
    assert call("train", store, whole, *words) == 0
    for name in ("sae_weights.safetensors", "base_phase.safetensors", "cfg.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    lines = [Run(folder).metrics() for folder in (killed, whole)]
    for line in (*lines[0], *lines[1]):
        assert line.pop("seconds") > 0
        assert line.pop("cpu_seconds") > 0
    assert lines[0] == lines[1]


def test_a_training_that_is_asked_to_end_leaves_a_checkpoint(store: Path, tmp_path: Path) -> None:
    words = (*QUICK, "--steps", "3000", "--checkpoint-steps", "3000", "--log-steps", "20")
    training = begin("train", store, tmp_path / "run", *words)
    while training.poll() is None and len(Run(tmp_path / "run").metrics()) < 2:
        time.sleep(0.001)
    training.terminate()
    training.terminate()  # as by SLURM and torchrun, one each
    training.communicate(timeout=60)
    assert training.returncode == -signal.SIGTERM
    checkpoint = Run(tmp_path / "run").load_checkpoint()
    assert checkpoint is not None
    assert 20 <= checkpoint[0] < 3000


def test_the_preset_posae_takes_position_means_off(posae: Posae, store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = posae(
        "train",
        store,
        run,
        "--preset",
        "posae",
        "--steps",
        40,
        "--position-mean",
        "lowrank:2",
        "--target-l0",
        8,
    )
    assert ended.code == 0, ended.err
    assert "position explains" in ended.err
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert (settings["architecture"], settings["dictionary_size"]) == ("batchtopk", 1024)
    assert settings["learning_rate"] == pytest.approx(3.2e-3)
    found = json.loads((run / "evaluation.json").read_text())
    assert found["n_parameters"] - found["n_base_parameters"] == 2 * (16 + 128) + 128
    assert 2 < found["l0"] < 64, "240 tokens to train on: of others more features are active"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["learning_rate"] < 8e-4, "it does not fall at the end"
    opened, autoencoder = ActivationStore.open(store), load_autoencoder(run)
    bits = as_torch(opened.read(2, slice(16, 24)))
    x, positions = bits[:, 1:], torch.arange(1, 16)
    rebuilt = autoencoder.decode(autoencoder.encode(x, positions), positions)
    special = np.isin(opened.tokens(slice(16, 24))[:, 1:], opened.manifest.special_token_ids)
    ordinary = torch.as_tensor(~special)
    error, kept = (x - rebuilt).square()[ordinary], x.float()[ordinary]
    fvu = error.sum() / (kept - kept.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(fvu.item(), rel=1e-3)


def test_a_finished_training_says_so_and_changes_nothing(posae: Posae, store: Path, trained: Path) -> None:
    before = tree(trained)
    ended = posae("train", store, trained, *QUICK)
    assert ended.code == 0
    assert "already finished" in ended.out
    assert tree(trained) == before


def test_report_sets_runs_side_by_side(posae: Posae, store: Path, trained: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline"
    assert posae("train", store, baseline, *QUICK, "--preset", "paper-baseline").code == 0
    ended = posae("report", trained, baseline)
    assert ended.code == 0
    assert "hierarchical" in ended.out
    assert "standard" in ended.out
    assert "12:16" in ended.out


def test_a_store_of_one_context_is_harvested_and_trained_from(posae: Posae, tmp_path: Path) -> None:
    store = tmp_path / "one.zarr"
    assert posae("harvest", store, "--contexts", 1, "--context-length", 16, "--layers", 0).code == 0
    assert ActivationStore.open(store).n_contexts == 1
    ended = posae("train", store, tmp_path / "run", "--steps", 2, "--ranges", "0:1,1:16")
    assert ended.code == 0
    assert "trained; not scored" in ended.out


def test_a_local_model_and_local_text_are_named_without_their_folders(posae: Posae, tmp_path: Path) -> None:
    model, text, store = tmp_path / "my-model", tmp_path / "my-text.txt", tmp_path / "own.zarr"
    shutil.copytree(DEMO_MODEL, model)
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    words = ("--model", model, "--dataset", text, *SMALL, "--layers", 0)
    assert posae("harvest", store, *words).code == 0
    facts = json.loads(posae("inspect-store", store, "--json").out)
    assert (facts["model"], facts["dataset"]) == ("my-model", "my-text.txt")
    assert all(str(tmp_path).encode() not in data for data in tree(store).values())
    text.unlink()  # not touched again: the tokens are in the store
    assert "already finished" in posae("harvest", store, *words).out
    ended = posae("inspect-store", store, "--context", 0)
    assert ended.code == 1
    assert "--tokenizer" in ended.err
    assert posae("inspect-store", store, "--context", 0, "--tokenizer", model).code == 0


def test_a_model_is_not_loaded_where_something_else_is_wrong(
    posae: Posae, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("it was loaded")

    monkeypatch.setattr(LanguageModel, "load", load)
    for words in ((tmp_path / "a.zarr", "--dataset", tmp_path / "no.txt"), (trained,)):
        ended = posae("harvest", *words, *SMALL)
        assert (ended.code, ended.err.startswith("error: ")) == (1, True)


def test_what_is_wrong_with_a_model_is_told_before_a_store_is_begun(posae: Posae, tmp_path: Path) -> None:
    model, path = tmp_path / "tiny", tmp_path / "a.zarr"
    shutil.copytree(DEMO_MODEL, model)
    words = ("harvest", path, "--model", model, "--contexts", "16", "--context-length", "16")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1000])
    ended = posae(*words)
    assert (ended.code, path.exists()) == (1, False)
    assert "tiny could not be loaded" in ended.err
    (model / "model.safetensors").unlink()
    ended = posae(*words)
    assert (ended.code, path.exists()) == (1, False)
    assert "holds no weights in the format safetensors" in ended.err
    (model / "model.safetensors").write_bytes(weights)
    ended = posae(*words[:-1], "100000")
    assert (ended.code, path.exists()) == (1, False)
    assert "choose a shorter context length" in ended.err
    assert posae(*words).code == 0


def test_settings_come_from_a_file_and_options_win(posae: Posae, store: Path, tmp_path: Path) -> None:
    config = tmp_path / "posae.toml"
    config.write_text('[train]\npreset = "paper-baseline"\nsteps = 3\nseed = 5\nbatch_size = 32\n')
    run = tmp_path / "run"
    assert posae("train", store, run, "--config", config, "--steps", 4).code == 0
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert (settings["steps"], settings["seed"], settings["architecture"]) == (4, 5, "standard")


WRONG: list[tuple[list[str], str]] = [
    (["inspect-store", "{nowhere}"], "there is no store at"),
    (["inspect-store", "{text}"], "a store is a folder"),
    (["inspect-store", "{folder}"], "is not a store"),
    (["train", "{nowhere}", "{run}"], "there is no store at"),
    (["train", "{store}", "{run}", "--layer", "3"], "has no layer 3; it has 1, 2, 4"),
    (["train", "{store}", "{run}", "--steps", "0"], "steps"),
    (["train", "{store}", "{run}", "--preset", "papper"], "did you mean 'paper'"),
    (
        ["train", "{store}", "{run}", "--preset", "paper", "--architecture", "standard"],
        "leave one of them out",
    ),
    (["train", "{store}", "{run}", "--ranges", "0:4,5:16"], "should start at 4"),
    (
        ["train", "{store}", "{run}", "--steps", "9", "--warmup-steps", "5", "--ramp-steps", "5"],
        "do not fit into 9",
    ),
    (["train", "{store}", "{run}", "--config", "{toml}"], "did you mean 'learning_rate'"),
    (["train", "{store}", "{folder}"], "is not a run"),
    (["evaluate", "{nowhere}"], "there is no run at"),
    (["report", "{nowhere}"], "does not exist; name folders of runs"),
    (["report", "{store}"], "is a store, not a run"),
    (["harvest", "{run}", "--layers", "6"], "layer"),
    (["harvest", "{run}", "--layers", "one"], "write e.g. 5,12,19"),
    (["harvest", "{run}", "--model", "./not-here"], "not-here"),
    (["harvest", "{run}", "--dataset", "{text}", "--contexts", "800"], "larger corpus"),
    (["harvest", "{run}", "--dataset", "{binary}"], "binary.txt"),
    (["harvest", "{run}", "--dataset", "{jsonl}"], "column"),
    (["harvest", "{run}", "--contexts", "8", "--tokens", "8"], "give one of them"),
    (["harvest", "{run}", "--mantissa-bits", "5", "--codec", "raw"], "take small"),
    (["train", "{store}", "{run}", "--position-mean", "means"], "none, range, exact, or lowrank:R"),
    (["train", "{store}", "{run}", "--architecture", "topk", "--target-l0", "2000"], "target_l0 is 2000"),
    (["harvest", "{text}"], "text.txt"),
    (["harvest", "{folder}"], "is not a store"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_a_wrong_word_ends_in_one_clear_line(
    posae: Posae, store: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    places = {
        "nowhere": tmp_path / "nowhere",
        "text": tmp_path / "text.txt",
        "folder": tmp_path / "folder",
        "run": tmp_path / "run",
        "toml": tmp_path / "posae.toml",
        "binary": tmp_path / "binary.txt",
        "jsonl": tmp_path / "text.jsonl",
        "store": store,
    }
    places["text"].write_text("a little text\n")
    places["binary"].write_bytes(b"\xff\xfe\x00\x01")
    places["jsonl"].write_text('{"body": "words"}\n')
    places["toml"].write_text("[train]\nlerning_rate = 1e-4\n")
    places["folder"].mkdir()
    (places["folder"] / "something.txt").write_text("else")
    ended = posae(*(word.format(**places) for word in words))
    assert ended.code == 1
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.err
    assert said in lines[0]
    assert "Traceback" not in ended.err
    assert (places["folder"] / "something.txt").read_text() == "else"


def test_wrong_usage_exits_with_2(posae: Posae) -> None:
    assert posae("harvest").code == 2
    assert posae("train", "a", "b", "--stepps", "3").code == 2


def test_a_damaged_store_is_told_by_verify_and_stops_training(posae: Posae, tmp_path: Path) -> None:
    store = tmp_path / "damaged.zarr"
    assert posae("harvest", store, *SMALL, "--layers", 0).code == 0
    shard = store / "layer_0" / "c.0.0.0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    ended = posae("inspect-store", store, "--json", "--verify")
    facts = json.loads(ended.out)
    assert ended.code == 1
    assert facts["verified"] is False
    assert [(d["array"], d["shard"], d["chunk"]) for d in facts["damaged"]] == [("layer_0", 0, 0)]
    ended = posae("train", store, tmp_path / "run", *QUICK)
    assert ended.code == 1
    assert "layer_0, shard 0, chunk 0" in ended.err
    (store / "zarr.json").write_text("{}")
    ended = posae("inspect-store", store, "--json", "--verify")
    assert ended.code == 1
    assert json.loads(ended.out)["damaged"][0]["array"] == "zarr.json"
