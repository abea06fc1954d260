"""The house keeps its floors: cli -> pipeline -> store, and the store knows no model."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_USE = {
    "store": {
        *("numpy", "zarr", "numcodecs", "pydantic", "awscrt"),
        "obstore",  # the web and object storage
        *("huggingface_hub", "httpx2"),  # the hub: its commits and token; the session that it reads with
    },
    "pipeline": {
        *("store", "numpy", "torch", "transformers", "datasets", "safetensors", "pydantic"),
        "sklearn",  # SAEBench's probes are its logistic regression
        *("huggingface_hub", "pyarrow"),  # the hub's errors and revisions; parquet: both come with datasets
        *("scipy", "plotly", "psutil"),  # intervals; figures; free memory: ONLY_IN says where
        *("sae_lens", "sae_bench"),  # what autoencoders become classes of; an extra, and on one's own
        "wandb",  # curves in Weights & Biases; an extra
    },
    "cli": {"store", "pipeline", "typer", "rich"},
}
ONLY_IN = {
    "scipy": "pipeline/results/verdicts.py",
    "plotly": "pipeline/results/page.py",
    "psutil": "pipeline/device.py",
    "sae_lens": "pipeline/saelens.py",
    "sae_bench": "pipeline/saebench.py",
    "wandb": "pipeline/trackers.py",
    "obstore": "store/remote/objects.py",
    "httpx2": "store/remote/hub.py",
}
STAGES = {
    *("harvest", "train", "evaluate", "explore", "report", "sweep", "plant", "copy", "merge"),
    *("import_activations", "import_sae"),
    *("saelens", "saebench", "activation_dataset"),  # doors for other programs, beside the stages
}
SPOKEN_BY_ALL = {
    "errors",
    "progress",  # a protocol: how a stage, or a part that works for one, says what it does
    "digests",  # what tells files apart, be they weights, text or activations
    "device",  # what the machine has: memory and blocks that fit it
    "sae.sparse",  # a code as a list of its active features, which scores read too
    "corpus",  # counts and digests of contexts, for whoever makes a store or compares two
    "ranges",  # parts of a context, which autoencoders, scores and settings all name
    "chunk_memory",  # where batches keep decoded chunks
}
FILES = sorted(path.relative_to(ROOT) for folder in MAY_USE for path in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """Each import of ``file`` as (dotted name, leading dots)."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_uses_only_floors_below_and_its_own_packages(file: Path) -> None:
    allowed = MAY_USE[file.parts[0]] | set(sys.stdlib_module_names)
    # Dots climb to the floors: two from a file of a floor, three from one in a part's folder.
    own = len(file.parts) - 1
    foreign = {name.split(".")[0] for name, dots in imports(file) if dots in (0, own + 1)} - allowed
    foreign.discard("")  # the package itself: its version
    assert not foreign, f"{file} may not import {sorted(foreign)}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_used_in_one_file(package: str) -> None:
    using = [str(file) for file in FILES if package in {name.split(".")[0] for name, _ in imports(file)}]
    assert using == [ONLY_IN[package]]


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "pipeline"], ids=str)
def test_parts_of_the_pipeline_do_not_know_each_other(file: Path) -> None:
    in_a_folder = len(file.parts) > 2
    siblings = {name for name, dots in imports(file) if dots == (2 if in_a_folder else 1)} - SPOKEN_BY_ALL
    assert not siblings & STAGES, f"{file} imports a stage"
    # A folder is one part, or one stage, whose files may import each other; __init__ is the front door.
    may = Path(file.parts[1]).stem in STAGES or file.stem == "__init__"
    assert may or not siblings, f"{file} is a part, but imports {sorted(siblings)}"


def test_every_package_is_shipped_and_nothing_else() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(("posae", *f.parent.parts)) for f in FILES}
    assert set(shipped) == {"posae", "posae.pipeline.demo_model"} | folders
    assert {p.name for p in ROOT.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
    }  # root *.py files are shipped too


def test_every_file_beside_the_code_is_shipped() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        file
        for package, names in patterns.items()
        for name in names
        for file in ROOT.joinpath(*package.split(".")[1:]).glob(name)
    }
    beside = {
        file
        for folder in MAY_USE
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert shipped == beside | {ROOT / "py.typed"}
