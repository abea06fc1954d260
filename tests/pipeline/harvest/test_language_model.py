"""A tiny model of each kind gives the activations of transformers, and each failure one clear line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub.constants
import pytest
import safetensors.torch as safetensors_torch
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from posae.pipeline.errors import ModelError
from posae.pipeline.harvest.language_model import LanguageModel
from posae.pipeline.harvest.model_facts import (
    ModelFacts,
    check_layers,
    default_layers,
    facts_of_recorded,
    is_recorded,
    model_facts,
)
from posae.pipeline.harvest.tokenizer import load_tokenizer
from posae.store.errors import SettingsError
from posae.store.manifest import Manifest

from ...conftest import MANIFEST

# Any, as few of their functions are typed.
library = cast(Any, transformers)
local_folder = cast(Any, import_module("huggingface_hub._local_folder"))
safetensors = cast(Any, safetensors_torch)

N_LAYERS = 4
D_MODEL = 32
N_POSITIONS = 12
COMMIT = "0123456789abcdef0123456789abcdef01234567"

IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = IDS | {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
# The sliding window is shorter than the contexts, so that it matters.
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 5}
DECODERS: dict[str, Callable[[], Any]] = {
    "gemma": lambda: library.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: library.Gemma2Config(**GEMMA),
    "gemma3_text": lambda: library.Gemma3TextConfig(**GEMMA),
    "llama": lambda: library.LlamaConfig(**GROUPED),
    "qwen2": lambda: library.Qwen2Config(**GROUPED),
    "qwen3": lambda: library.Qwen3Config(**GROUPED, head_dim=8),
    "gpt_neox": lambda: library.GPTNeoXConfig(**COMMON),
    "gpt2": lambda: library.GPT2Config(**IDS, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, n_positions=64),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: library.BertConfig(**COMMON),
    "roberta": lambda: library.RobertaConfig(**COMMON),
    "distilbert": lambda: library.DistilBertConfig(
        **IDS, dim=D_MODEL, hidden_dim=48, n_layers=N_LAYERS, n_heads=4, max_position_embeddings=64
    ),
}
KINDS = [*DECODERS, *ENCODERS, "gemma3"]


def gemma3() -> Any:
    """A model of text and images, whose two parts have as many layers."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    return library.Gemma3Config(text_config=GEMMA, vision_config=vision, mm_tokens_per_image=1)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a kind, with its head, as on the hub; made once, to be read only."""
    root = tmp_path_factory.mktemp("models")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            cast(Any, torch).manual_seed(0)
            if kind in ENCODERS:
                model = library.AutoModelForMaskedLM.from_config(ENCODERS[kind]())
            elif kind == "gemma3":
                model = library.Gemma3ForConditionalGeneration(gemma3())
            else:
                model = library.AutoModelForCausalLM.from_config(DECODERS[kind]())
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def load(make_model: Callable[[str], Path]) -> Callable[[str], LanguageModel]:
    """A tiny model of a kind on the CPU, loaded once."""

    @lru_cache
    def load(kind: str) -> LanguageModel:
        return LanguageModel.load(str(make_model(kind)), device=torch.device("cpu"))

    return load


@pytest.fixture
def llama(make_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny model, to be damaged."""
    return shutil.copytree(make_model("llama"), tmp_path / "tiny-llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (3, N_POSITIONS), generator=torch.Generator().manual_seed(1))


def reference(folder: Path, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """The residual stream after every block, as transformers itself gives it."""
    model = library.AutoModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    text_model = getattr(model, "language_model", model)
    blocks: Any = next(module for module in text_model.modules() if isinstance(module, torch.nn.ModuleList))
    last: list[Any] = []

    def keep(_block: Any, _arguments: Any, output: Any) -> None:
        last.append(output)

    blocks[-1].register_forward_hook(keep)
    with torch.no_grad():
        hidden_states = model(tokens, output_hidden_states=True).hidden_states
    (output,) = last
    after = [*hidden_states[1:-1], cast(Any, output[0]) if isinstance(output, tuple) else output]
    return dict(enumerate(after))


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_transformers_bit_for_bit(
    kind: str,
    make_model: Callable[[str], Path],
    load: Callable[[str], LanguageModel],
    tokens: torch.Tensor,
) -> None:
    expected = reference(make_model(kind), tokens)
    assert len(expected) == N_LAYERS

    model = load(kind)

    assert model.facts[3:] == (N_LAYERS, D_MODEL)
    for layers in ([1], [2, 0], list(range(N_LAYERS))):
        activations = model.activations(tokens, layers)
        assert list(activations) == sorted(layers)
        for layer, found in activations.items():
            assert found.dtype == torch.bfloat16
            assert found.shape == (3, N_POSITIONS, D_MODEL)
            assert torch.equal(found.view(torch.int16), expected[layer].view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_after_the_last_wanted_layer_do_not_run(
    kind: str,
    load: Callable[[str], LanguageModel],
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(kind)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("this block ran")

    monkeypatch.setattr(model.blocks[2], "forward", fail)

    assert list(model.activations(tokens, [0, 1])) == [0, 1]
    with pytest.raises(AssertionError, match="this block ran"):
        model.activations(tokens, [0, 3])
    assert list(model.activations(tokens, [1])) == [1]  # no hook of the failed call is left


def test_only_the_text_part_of_a_model_of_text_and_images_is_kept(
    load: Callable[[str], LanguageModel],
) -> None:
    assert not [name for name in load("gemma3").text_model.state_dict() if "vision" in name]


def test_tokens_may_be_int32(load: Callable[[str], LanguageModel], tokens: torch.Tensor) -> None:
    model = load("llama")

    assert torch.equal(model.activations(tokens.int(), [1])[1], model.activations(tokens, [1])[1])


def test_contexts_longer_than_the_model_takes_are_refused(load: Callable[[str], LanguageModel]) -> None:
    model = load("gpt2")

    assert model.activations(torch.ones(1, 64, dtype=torch.int64), [0])
    with pytest.raises(ModelError, match="gpt2 takes at most 64 positions, these contexts have 65"):
        model.activations(torch.ones(1, 65, dtype=torch.int64), [0])


def test_a_block_without_one_vector_per_position_is_refused(
    load: Callable[[str], LanguageModel], tokens: torch.Tensor
) -> None:
    model = load("llama")

    with (
        model.blocks[1].register_forward_hook(lambda _block, _arguments, output: output[0]),
        pytest.raises(ModelError, match=r"layer 1 of llama gives \(12, 32\), not"),
    ):
        model.activations(tokens, [1])


# Facts


def test_facts_need_no_weights(llama: Path) -> None:
    facts = model_facts(str(llama))
    assert facts.id == "tiny-llama"
    assert facts.revision is not None
    assert facts.revision.startswith("sha256:")
    assert facts[3:] == (N_LAYERS, D_MODEL)

    (llama / "model.safetensors").write_bytes(b"no weights at all")
    changed = model_facts(str(llama))
    assert changed.revision not in (None, facts.revision)
    assert changed._replace(revision=facts.revision) == facts

    (llama / "model.safetensors").unlink()
    assert model_facts(str(llama)) == facts._replace(revision=None)


def test_facts_of_a_copy_are_the_same(llama: Path, tmp_path: Path) -> None:
    facts = model_facts(str(llama))
    copy = shutil.copytree(llama, tmp_path / "elsewhere" / "tiny-llama")
    (copy / "README.md").write_text("not part of the model")

    assert model_facts(str(copy)) == facts
    assert str(tmp_path) not in repr(facts)

    (copy / "tokenizer.json").write_text("{}")
    assert model_facts(str(copy)).revision != facts.revision


def test_config_hash_leaves_out_what_varies_by_machine(llama: Path) -> None:
    config_hash = model_facts(str(llama)).config_hash
    config = json.loads((llama / "config.json").read_text())

    varied = config | {"dtype": "bfloat16", "transformers_version": "4.50.0", "_name_or_path": "/home"}
    (llama / "config.json").write_text(json.dumps(varied))
    assert model_facts(str(llama)).config_hash == config_hash

    (llama / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert model_facts(str(llama)).config_hash != config_hash


def test_a_folder_is_held_to_its_digest(llama: Path) -> None:
    facts = model_facts(str(llama))
    assert LanguageModel.load(str(llama), facts.revision, device=torch.device("cpu")).facts == facts

    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"not the revision sha256:.*restore them"):
        LanguageModel.load(str(llama), facts.revision, device=torch.device("cpu"))


def test_relative_paths_and_home_are_folders(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = model_facts(str(llama))
    monkeypatch.chdir(llama.parent)
    monkeypatch.setenv("HOME", str(llama.parent))

    for model in ("tiny-llama", "./tiny-llama/", "~/tiny-llama"):
        assert model_facts(model) == facts
    monkeypatch.chdir(llama)
    assert model_facts(".") == facts


@pytest.mark.parametrize(
    ("n_layers", "layers"), [(26, (5, 12, 19)), (6, (1, 2, 4)), (12, (2, 5, 8)), (1, (0,)), (2, (0, 1))]
)
def test_default_layers(n_layers: int, layers: tuple[int, ...]) -> None:
    assert default_layers(n_layers) == layers


def test_layers_that_the_model_lacks_are_refused_before_anything_is_loaded(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    facts = model_facts(str(llama))

    check_layers(facts, [0, 3])
    for layers in ([4], [0, -1]):
        with pytest.raises(ModelError, match=r"tiny-llama has 4 layers, 0-3; .*choose from those"):
            check_layers(facts, layers)
    with pytest.raises(ModelError, match="at least one"):
        check_layers(facts, [])


def test_the_older_gemma_is_told_from_the_newer() -> None:
    facts = ModelFacts("google/gemma-2b", COMMIT, "", n_layers=18, d_model=2048)

    with pytest.raises(ModelError) as error:
        check_layers(facts, [5, 12, 19])
    assert str(error.value) == "google/gemma-2b has 18 layers, 0-17; layer 19 exists in google/gemma-2-2b"
    with pytest.raises(ModelError, match="choose from those"):
        check_layers(facts, [26])


# The built-in model


def test_the_built_in_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of the same name does not stand in its way

    facts = model_facts("demo")
    model = LanguageModel.load("demo", facts.revision, device=torch.device("cpu"))
    tokenizer = cast(Any, load_tokenizer("demo", facts.revision))
    ids = torch.tensor([tokenizer.encode("for name in names:")])
    activations = model.activations(ids, default_layers(facts.n_layers))

    assert facts[0::3] == ("demo", 6)
    assert facts.d_model == 128
    assert facts.revision is not None
    assert list(activations) == [1, 2, 4]
    for found in activations.values():
        assert found.shape == (*ids.shape, 128)
        assert found.isfinite().all()


def test_loading_is_quiet_and_leaves_the_log_as_it_was(
    make_model: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_model("bert")
    capfd.readouterr()
    verbosity = library.logging.get_verbosity()

    LanguageModel.load(str(folder), device=torch.device("cpu"))
    load_tokenizer("demo")

    assert capfd.readouterr() == ("", "")
    assert library.logging.get_verbosity() == verbosity


# Attention


@pytest.mark.parametrize("attention", ["kernels-community/x", "flash_attention_2"])
def test_no_attention_is_fetched_from_the_hub(attention: str, make_model: Callable[[str], Path]) -> None:
    with pytest.raises(SettingsError, match=f"no attention {attention}: choose from eager, sdpa"):
        LanguageModel.load(str(make_model("llama")), device=torch.device("cpu"), attention=attention)


# Folders that are no model


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*missing: check the path"):
        model_facts(str(tmp_path / "missing"))
    for model in ("./missing", "~/missing", "~nobody/missing"):
        with pytest.raises(ModelError, match=f"there is no folder {model}"):
            load_tokenizer(model)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match="is a file: give the folder"):
        model_facts(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match=r"has no config\.json: give a model"):
        model_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", "of model_type None, unknown to transformers"),
        ('{"model_type": "gemma9"}', "gemma9, unknown to transformers .*; upgrade transformers"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "code of its own, .* never runs"),
        ('{"model_type": "vit"}', "of model_type vit, which posae cannot read: choose"),
        ('{"model_type": "wav2vec2"}', "of model_type wav2vec2, which posae cannot read"),
        ('{"model_type": "t5"}', "of model_type t5, which posae cannot read"),
        ('{"model_type": "bart"}', "of model_type bart, which posae cannot read"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "could not be loaded .*expected int"),
        ('{"model_type": ["llama"]}', "could not be loaded"),
        ("[]", "could not be loaded"),
        ("{", "could not be loaded .*not a valid JSON file"),
    ],
)
def test_configs_that_are_no_language_model(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(ModelError, match=message) as error:
        model_facts(str(tmp_path))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"a pickle")

    with pytest.raises(ModelError, match=r"no weights in the format safetensors, and pickles"):
        LanguageModel.load(str(llama), device=torch.device("cpu"))


def test_incomplete_weights_are_not_filled_with_random_numbers(llama: Path) -> None:
    weights = safetensors.load_file(llama / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    safetensors.save_file(weights, llama / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelError, match=r"lacks 1 of its weights, the first layers\.2\.mlp\.up_proj"):
        LanguageModel.load(str(llama), device=torch.device("cpu"))


def test_damaged_and_foreign_weights(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match="could not be loaded"):
        LanguageModel.load(str(llama), device=torch.device("cpu"))

    with (llama / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"could not be loaded \(SafetensorError: .*its files are complete"):
        LanguageModel.load(str(llama), device=torch.device("cpu"))


def test_layers_that_share_one_block_cannot_be_read(tmp_path: Path) -> None:
    shared = {"embedding_size": 16, "num_hidden_layers": 3}
    model = library.AlbertForMaskedLM(library.AlbertConfig(**COMMON | shared))
    model.save_pretrained(tmp_path / "albert")

    with pytest.raises(ModelError, match="albert does not keep its 3 layers in one list of blocks"):
        LanguageModel.load(str(tmp_path / "albert"), device=torch.device("cpu"))


def test_no_memory_left(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(library.LlamaModel, "to", fail)

    with pytest.raises(ModelError, match=r"too little memory for .*choose --device cpu"):
        LanguageModel.load(str(llama), device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_model_without_tokenizer(kind: str, make_model: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=rf"no tokenizer\.json found for .*/{kind}:"):
        load_tokenizer(str(make_model(kind)))


# The hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def put_into_cache(cache: Path, folder: Path, commit: str) -> Path:
    """Lay a model into the cache, as if someone/tiny had been downloaded at this commit, the newest."""
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, repository / "snapshots" / commit)


def http_error(kind: Any) -> Exception:
    return kind("said the hub", response=cast(Any, SimpleNamespace(headers={}, request=None)))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(GatedRepoError),
            r"^google/gemma-9 is gated: accept its licence on https://huggingface.co/google/gemma-9, "
            r"then run `hf auth login` or set HF_TOKEN$",
        ),
        (http_error(RepositoryNotFoundError), "google/gemma-9 is no folder here and no model on .*spelling"),
        (http_error(RevisionNotFoundError), "google/gemma-9 has no revision v2: choose one from https"),
        (http_error(RemoteEntryNotFoundError), r"google/gemma-9 has no config\.json"),
        (
            LocalEntryNotFoundError("no network"),
            "gemma-9 at revision v2 was not downloaded before, and the hub cannot",
        ),
        (PermissionError(13, "Permission denied", "/cache"), "could not be loaded .*/cache"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_the_hub_refuses(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", fail)

    with pytest.raises(ModelError, match=message) as raised:
        model_facts("google/gemma-9", "v2")
    assert "\n" not in str(raised.value)


def test_names_that_no_model_can_have() -> None:
    for name in ("a/b/c", "two words", "https://huggingface.co/gpt2"):
        with pytest.raises(ModelError, match="is no folder here and no model on"):
            model_facts(name)


@pytest.mark.usefixtures("offline")
def test_offline_and_not_cached() -> None:
    for use in (model_facts, load_tokenizer, LanguageModel.load):
        with pytest.raises(
            ModelError,
            match="google/gemma-9 is no folder here, was not downloaded before, and HF_HUB_OFFLINE is set",
        ):
            use("google/gemma-9")


def test_a_model_of_the_hub_is_pinned_to_its_commit(
    make_model: Callable[[str], Path], offline: Path, tokens: torch.Tensor
) -> None:
    put_into_cache(offline, make_model("llama"), COMMIT)
    facts = model_facts("someone/tiny")
    assert facts == model_facts(str(make_model("llama")))._replace(id="someone/tiny", revision=COMMIT)

    put_into_cache(offline, make_model("gpt2"), "f" * 40)
    assert model_facts("someone/tiny").revision == "f" * 40
    model = LanguageModel.load("someone/tiny", facts.revision, device=torch.device("cpu"))

    assert model.facts == facts
    expected = reference(make_model("llama"), tokens)
    assert torch.equal(model.activations(tokens, [1])[1], expected[1])


def recorded(facts: ModelFacts) -> Manifest:
    """A manifest of a store made with that model."""
    changed: dict[str, Any] = {
        "model": facts.id,
        "model_revision": facts.revision,
        "model_config_hash": facts.config_hash,
    }
    return Manifest(**MANIFEST | changed)


def fetched(kind: str, folder: Path, repository: Path) -> Path:
    """Lay out a copy as huggingface_hub does: a folder of one's own, or a snapshot in its cache."""
    if kind == "folder":
        copy = Path(shutil.copytree(folder, repository))
        for file in folder.iterdir():
            local_folder.write_download_metadata(copy, file.name, COMMIT, name_on_hub(file))
        return copy
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / name_on_hub(file))
        (snapshot / file.name).symlink_to(Path("../..", "blobs", name_on_hub(file)))
    return snapshot


def name_on_hub(file: Path) -> str:
    """A large file's sha256, a small one's name in git."""
    if file.suffix == ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return git_hash(file.read_bytes())


@pytest.mark.parametrize("kind", ["folder", "cache"])
def test_a_copy_of_a_commit_is_the_model_of_the_hub_while_its_files_are_unchanged(
    kind: str, make_model: Callable[[str], Path], offline: Path, tmp_path: Path
) -> None:
    put_into_cache(offline, make_model("llama"), COMMIT)
    manifest = recorded(model_facts("someone/tiny"))
    copy = fetched(kind, make_model("llama"), tmp_path / "copy")
    assert is_recorded(str(copy), model_facts(str(copy)), manifest)
    # One that was fetched otherwise is of no commit, and neither is one of another.
    assert not is_recorded(str(make_model("llama")), model_facts(str(make_model("llama"))), manifest)
    later = manifest.model_copy(update={"model_revision": "f" * 40})
    assert not is_recorded(str(copy), model_facts(str(copy)), later)
    file = copy / "model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)
    assert not is_recorded(str(copy), model_facts(str(copy)), manifest)


def test_a_hub_id_in_a_manifest_means_the_commit_there(
    make_model: Callable[[str], Path], offline: Path
) -> None:
    put_into_cache(offline, make_model("llama"), COMMIT)
    manifest = recorded(model_facts("someone/tiny"))
    put_into_cache(offline, make_model("llama"), "f" * 40)
    facts = facts_of_recorded("someone/tiny", manifest)
    assert (facts.revision, is_recorded("someone/tiny", facts, manifest)) == (COMMIT, True)
    newer = model_facts("someone/tiny")
    assert (newer.revision, is_recorded("someone/tiny", newer, manifest)) == ("f" * 40, False)


def test_a_model_of_the_hub_without_safetensors(make_model: Callable[[str], Path], offline: Path) -> None:
    snapshot = put_into_cache(offline, make_model("llama"), COMMIT)
    (snapshot / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="no weights in the format safetensors within reach, and pickles"):
        LanguageModel.load("someone/tiny", device=torch.device("cpu"))
