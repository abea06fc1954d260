"""What the documents say is what the code does: commands, format, settings, errors, links."""

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import typer.main
import yaml

import posae
from posae.cli.app import app
from posae.pipeline.sae.registry import ARCHITECTURES
from posae.pipeline.sae.run_settings import all_options, resolve_train_settings
from posae.pipeline.settings import (
    HARVEST_PRESETS,
    EvaluateSettings,
    HarvestSettings,
    resolve_settings,
)
from posae.pipeline.settings.declared import is_hidden
from posae.pipeline.train.sweep import SweepFile, read_sweep
from posae.store import errors
from posae.store.codecs import CODECS
from posae.store.layout import ArraySpec
from posae.store.manifest import (
    Imported,
    Manifest,
    Origin,
    layer_spec,
    parse_manifest,
    root_json,
    token_specs,
)
from posae.store.reader import ActivationStore
from posae.store.stats import stats_specs
from posae.store.writer import StoreWriter

from .conftest import tree

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "docs" / "format.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def documents() -> list[Path]:
    """Every Markdown file of the repository, but not of what is installed or made in it."""
    folders = ("docs", "examples", "benchmarks", "tests")
    found = [*ROOT.glob("*.md"), *(file for name in folders for file in (ROOT / name).rglob("*.md"))]
    return sorted(file.relative_to(ROOT) for file in found)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [m[3] for m in FENCE.finditer(text) if m[2] == language]


def after(mark: str) -> str:
    """What stands in docs/format.md after ``<!-- mark -->``."""
    text = f"<!-- {mark} -->"
    assert FORMAT.count(text) == 1, mark
    return FORMAT.partition(text)[2].lstrip("\n")


def table(mark: str) -> list[list[str]]:
    """The rows of a marked table of docs/format.md, without its head; code marks taken off."""
    lines = after(f"table: {mark}").splitlines()
    rows = lines[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def example(mark: str, language: str) -> str:
    """A marked fenced block of docs/format.md."""
    found = FENCE.match(after(f"example: {mark}"))
    assert found, mark
    assert found[2] == language
    return found[3]


# Commands


class Parameter(NamedTuple):
    options: list[str]
    """As they are written, ``--no-…`` too; of an argument empty."""

    help: str


def commands() -> dict[str, tuple[str, list[Parameter]]]:
    """Help and parameters of each command."""
    group = cast(Any, typer.main.get_command(app))
    found: dict[str, tuple[str, list[Parameter]]] = {}
    for name, command in group.commands.items():
        parameters = [
            Parameter(
                [*p.opts, *p.secondary_opts] if p.param_type_name == "option" else [], str(p.help or "")
            )
            for p in command.get_params(typer.Context(command))
        ]
        found[str(name)] = (str(command.help or ""), parameters)
    return found


def documented_commands() -> Iterator[tuple[Path, list[str]]]:
    """Each ``posae …`` line in a block of shell commands, as words."""
    for file in documents():
        for block in blocks((ROOT / file).read_text(), "sh"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words and words[0] == "posae":
                    yield file, words[1:]


def test_every_command_is_documented_and_has_help_for_all_it_takes() -> None:
    told = {words[0] for _, words in documented_commands()}
    prose = "\n".join((ROOT / file).read_text() for file in documents())
    assert commands().keys() >= {"harvest", "train", "inspect-store", "evaluate", "report"}
    for name, (text, parameters) in commands().items():
        assert name in told or f"`posae {name}" in prose, f"no document shows posae {name}"
        assert f"Example: posae {name} " in text, f"the help of posae {name} has no example"
        assert all(p.help for p in parameters), f"posae {name} has a parameter without help"


def test_documented_commands_exist_with_their_options() -> None:
    known = commands()
    for file, words in documented_commands():
        assert words[0] in known, f"{file}: posae {words[0]}"
        options = {"--help"}.union(*(p.options for p in known[words[0]][1]))
        given = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert given <= options, f"{file}: posae {words[0]} has no {sorted(given - options)}"


def test_options_named_in_prose_exist() -> None:
    known = {option for _, parameters in commands().values() for p in parameters for option in p.options}
    for file in ("README.md", "docs/paper.md", "docs/format.md"):
        named = set(re.findall(r"`(--[a-z0-9-]+)", (ROOT / file).read_text()))
        assert named - {"--help", "--extra-index-url"} <= known, file


def test_python_in_documents_names_what_there_is() -> None:
    sources = [block for file in documents() for block in blocks((ROOT / file).read_text(), "python")]
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posae"):
                module = importlib.import_module(node.module or "")
                # The front doors are lazy: asking them for a name would import torch.
                there = set(getattr(module, "__all__", ())) | set(vars(module))
                assert {alias.name for alias in node.names} <= there, node.module


def test_the_drawing_of_the_house_has_every_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawing = next(block for block in blocks(text, "") if block.startswith("cli/"))
    drawn = {line.split()[0].rstrip("/") for line in drawing.splitlines()}
    folders = {
        folder.relative_to(ROOT).as_posix()
        for name in ("store", "pipeline", "cli")
        for folder in [ROOT / name, *(ROOT / name).rglob("*/")]
        if folder.is_dir() and folder.name != "__pycache__"
    }
    beside = {"tests", "benchmarks", "docs", "examples", "typings"}
    assert drawn == folders | beside


# Format


def json_type(schema: dict[str, Any]) -> str:
    """A JSON schema in the words of docs/format.md."""
    if "$ref" in schema:
        return "object"
    if "anyOf" in schema:
        return " or ".join(json_type(part) for part in schema["anyOf"])
    if schema["type"] == "array":
        inner = schema.get("items") or schema["prefixItems"][0]
        return f"array of {json_type(inner)}s"
    if schema["type"] == "object":
        return f"object of {json_type(schema['additionalProperties'])}s"
    return str(schema["type"])


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """The one that docs/format.md shows."""
    return parse_manifest(json.loads(example("root", "json")))


@pytest.mark.parametrize(
    ("name", "kind"), [("manifest", Manifest), ("origin", Origin), ("imported", Imported)]
)
def test_manifest_tables_have_one_row_a_field_in_order(
    name: str, kind: type[Manifest | Origin | Imported]
) -> None:
    schema = kind.model_json_schema(mode="serialization")["properties"]
    expected = [(field, json_type(schema[field])) for field in kind.model_fields]
    assert [(row[0], row[1]) for row in table(name)] == expected
    assert all(row[2] for row in table(name))


def test_root_in_format_is_what_the_writer_writes(manifest: Manifest) -> None:
    shown = json.loads(example("root", "json"))
    assert root_json(manifest) == shown
    assert json.dumps(root_json(manifest)) == json.dumps(shown), "the order of keys differs"


def test_layer_in_format_is_what_the_writer_writes(manifest: Manifest) -> None:
    assert json.dumps(layer_spec(manifest, 12).to_json()) == json.dumps(json.loads(example("layer", "json")))


def specs_of(manifest: Manifest, layer: int) -> dict[str, ArraySpec]:
    found = [layer_spec(manifest, layer), *token_specs(manifest).values()]
    return {spec.path: spec for spec in [*found, *stats_specs(manifest, layer).values()]}


def test_arrays_table_is_what_the_writer_writes(manifest: Manifest) -> None:
    sizes = {
        "C": manifest.n_contexts,
        "L": manifest.context_length,
        "D": manifest.d_model,
        "S": manifest.n_shards,
        "c": manifest.chunk_contexts,
        "s": manifest.shard_contexts,
    }

    def size(text: str) -> int:
        return sizes[text] if text in sizes else int(text)

    rows = {row[0].replace("layer_N", "layer_12"): row[1:] for row in table("arrays")}
    specs = specs_of(manifest.model_copy(update={"mantissa_bits": 5}), 12)
    assert rows.keys() == specs.keys()
    for path, (data_type, shape, chunk, shard, names, fill) in rows.items():
        spec = specs[path]
        assert spec.data_type == data_type
        assert spec.shape == tuple(size(part) for part in shape.strip("[]").split(", ")), path
        assert (spec.chunk_rows, spec.shard_rows) == (size(chunk), size(shard)), path
        assert spec.dimension_names == tuple(names.split(", ")), path
        assert spec.to_json()["fill_value"] == json.loads(fill), path
        assert spec.codec == CODECS["small"], path


def test_codecs_table_is_the_presets() -> None:
    rows = table("codecs")
    assert [row[0] for row in rows] == list(CODECS)
    for name, cname, clevel, shuffle, blocksize in rows:
        found = CODECS[name].to_json(2)
        if not found:
            assert cname.startswith("none")
            continue
        assert found[0]["configuration"] == {
            "typesize": 2,
            "cname": cname,
            "clevel": int(clevel),
            "shuffle": shuffle,
            "blocksize": int(blocksize),
        }


@pytest.fixture(scope="module")
def store(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of 21 contexts: two shards of two chunks of 6, the last chunk not full."""
    small = manifest.model_copy(
        update={
            "n_contexts": 21,
            "held_out": (18, 21),
            "context_length": 4,
            "d_model": 16,
            "chunk_contexts": 6,
            "shard_contexts": 12,
        }
    )
    path = tmp_path_factory.mktemp("docs") / "small.zarr"
    random = np.random.default_rng(0)
    writer = StoreWriter.begin(path, small)
    tokens = random.integers(0, 100, (21, 4)).astype(np.int32)
    bits = random.normal(size=(21, 4, 16)).astype(np.float32).view(np.uint32) >> 16
    with writer.lock(), ThreadPoolExecutor(1) as pool:
        writer.write_tokens(tokens, tokens.astype(np.int64) + 2**40, {})
        writer.add_layers([5])
        for shard in range(small.n_shards):
            locked = writer.lock_shard([5], shard, wait=True)
            assert locked
            with locked:
                rows = bits[locked.contexts].astype(np.uint16)
                locked.append(5, rows, np.ones(rows.shape[:2], np.bool_), pool)
                locked.commit()
        writer.seal()
    return path


def test_files_of_a_store_are_those_in_format(store: Path) -> None:
    specs = specs_of(ActivationStore.open(store).manifest, 5).values()
    expected = {"zarr.json", "seal.json", "stats/zarr.json", "stats/layer_5/zarr.json"}
    for spec in specs:
        key = "c.{}" + ".0" * (len(spec.shape) - 1)
        shards = -(-spec.shape[0] // spec.shard_rows)
        expected |= {f"{spec.path}/zarr.json", *(f"{spec.path}/{key.format(i)}" for i in range(shards))}
    assert tree(store).keys() == expected


def test_reader_in_format_reads_every_array(store: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(example("reader", "python"), "docs/format.md", "exec"), names)
    read_chunk = cast(Callable[[Path, str, int], np.ndarray[Any, Any]], names["read_chunk"])
    opened = ActivationStore.open(store)
    for path, spec in specs_of(opened.manifest, 5).items():
        n_chunks = -(-spec.shape[0] // spec.chunk_rows)
        found = np.concatenate([read_chunk(store, path, chunk) for chunk in range(n_chunks)])
        wanted = opened.array(path).read_rows(np.arange(spec.shape[0]))
        assert found.dtype == wanted.dtype
        assert (found[: len(wanted)].view(np.uint8) == wanted.view(np.uint8)).all(), path
        assert (found[len(wanted) :] == spec.fill).all(), path


def test_citation_is_of_this_version() -> None:
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (said["title"], said["version"]) == (project["name"], posae.__version__)
    assert (said["license"], said["authors"]) == (project["license"], project["authors"])


def test_every_extra_for_users_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert told == extras.keys() - {"dev", "docs", "fuzz"}


# Settings, errors, links, words


def test_example_of_gemma_equals_the_presets() -> None:
    example_file = ROOT / "examples" / "gemma-2-2b.toml"
    harvest = resolve_settings(HarvestSettings, presets=HARVEST_PRESETS, config=example_file, options={})
    options = {"tokens": 22_000_000}
    assert harvest == resolve_settings(
        HarvestSettings, presets=HARVEST_PRESETS, preset="gemma-2-2b", options=options
    )
    train = resolve_train_settings(config=example_file, options={})
    assert train == resolve_train_settings(preset="paper", options={})


def test_example_of_the_demo_equals_the_makefile() -> None:
    example_file = ROOT / "examples" / "demo.toml"
    makefile = (ROOT / "Makefile").read_text()
    harvest = resolve_settings(HarvestSettings, presets={}, config=example_file, options={})
    assert (harvest.model, harvest.dataset, harvest.layers) == ("demo", "stdlib", (1, 2, 4))
    assert f"--contexts {harvest.contexts}" in makefile
    for preset in (None, "paper-baseline"):
        train = resolve_train_settings(preset=preset, config=example_file, options={})
        assert f"--steps {train.steps}" in makefile
        assert train.architecture == ("standard" if preset else "hierarchical")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_resolve_for_every_stage(file: Path) -> None:
    resolve_settings(HarvestSettings, presets=HARVEST_PRESETS, config=file, options={})
    resolve_train_settings(config=file, options={})
    resolve_settings(EvaluateSettings, presets={}, config=file, options={})


def test_the_example_of_a_sweep_is_one_and_every_key_is_told(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text()
    (written,) = blocks(text, "toml")
    file = tmp_path / "sweep.toml"
    file.write_text(written)
    (study,) = read_sweep(file, {})
    assert list(study.runs) == ["paper", "no-layer-norm"]
    assert (study.seeds, study.controls) == (((0, 0), (1, 1)), ("agnostic",))
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(SweepFile.model_fields)


def test_settings_that_help_leaves_out_are_listed_with_the_paper() -> None:
    text = (ROOT / "docs" / "paper.md").read_text().partition("<!-- table: hidden settings -->\n")[2]
    rows = [line.strip("| ").split(" | ")[:3] for line in text.partition("\n\n")[0].splitlines()[2:]]
    hidden = {name: field for name, field in all_options().items() if is_hidden(field)}
    assert [(name.strip("`"), default) for name, _, default in rows] == [
        (name, str(field.default)) for name, field in hidden.items()
    ]
    for name, architectures, _ in rows:
        homes = [kind for kind, one in ARCHITECTURES.items() if name.strip("`") in one.settings.model_fields]
        assert architectures == ("all" if len(homes) == len(ARCHITECTURES) else ", ".join(homes))


def test_every_error_stands_in_the_tree() -> None:
    drawn: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r" {4}([│├└─ ]*)(\w+)(?: \((\w+)\))?(?:  |$)", line)
        if found:
            depth = len(found[1]) // 4
            above = [*above[:depth], found[2]]
            drawn[found[2]] = tuple(name for name in (*above[-2:-1], found[3]) if name)
    classes = {
        name: tuple(base.__name__ for base in kind.__bases__)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.PosaeError)
    }
    assert classes.pop("PosaeError") == ("Exception",)
    assert drawn.pop("PosaeError") == ()
    assert drawn == classes


@pytest.mark.parametrize("file", documents(), ids=str)
def test_relative_links_lead_somewhere(file: Path) -> None:
    text = FENCE.sub("", (ROOT / file).read_text())
    links: list[str] = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if not re.match(r"[a-z]+:", link):
            path = link.partition("#")[0]
            assert (ROOT / file.parent / path).exists(), link


@pytest.mark.parametrize("file", documents(), ids=str)
def test_words_are_those_of_the_glossary(file: Path) -> None:
    if file.name != "glossary.md":
        assert not re.search(r"\b(latents?|neurons?)\b", (ROOT / file).read_text(), re.IGNORECASE)
