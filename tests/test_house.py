"""The house keeps its floors: cli -> pipeline -> store, and the store knows no model."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import posae.pipeline

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
    "scipy": "pipeline/report/verdicts.py",
    "plotly": "pipeline/report/page/page.py",
    "psutil": "pipeline/device.py",
    "sae_lens": "pipeline/interop/saelens.py",
    "sae_bench": "pipeline/interop/saebench.py",
    "wandb": "pipeline/train/trackers.py",
    "obstore": "store/remote/objects.py",
    "httpx2": "store/remote/hub.py",
}
FLOORS = (
    {"errors", "device", "processes", "progress", "ranges"},
    {"digests", "runs", "settings"},
    {"sae"},
    {"metrics"},  # scores of an autoencoder, while it trains and after
    {"harvest", "train"},
    {"evaluate", "stores", "interop"},
    {"report"},
)
"""The rooms of pipeline/, lowest floor first: each uses those below it, and none beside it."""
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
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


def room(file: Path) -> str:
    """The room of a file in pipeline/: the folder or file right below it."""
    return Path(file.parts[1]).stem


def imported(file: Path) -> Iterator[Path]:
    """The files of the house that ``file`` imports, be it at once or later."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in (alias.name for alias in node.names):
                candidates = (f"{module}/{name}.py", f"{module}.py", f"{module}/__init__.py")
                yield next(Path(path) for path in candidates if (ROOT / path).exists())


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Rooms that use each other in a circle; none where they can be put in an order."""
    left = dict(arrows)
    while free := [room for room, used in left.items() if not used & left.keys()]:
        for room in free:
            del left[room]
    return sorted(left)


def test_the_pipeline_is_built_in_floors() -> None:
    rooms = {room(file) for file in FILES if file.parts[0] == "pipeline"} - {"__init__"}
    assert rooms == FLOOR_OF.keys()
    upward = [
        f"{file} imports {other}"
        for file in FILES
        if file.parts[0] == "pipeline" and room(file) != "__init__"  # the front door, which opens lazily
        for other in imported(file)
        if other.parts[0] == "pipeline" and room(other) != room(file)
        if FLOOR_OF[room(other)] >= FLOOR_OF[room(file)]
    ]
    assert not upward


def test_the_house_has_few_rooms_and_no_circles() -> None:
    folders = {file.parent for file in FILES}
    assert len(folders) <= 20
    drawing: dict[str, set[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":
            drawing[str(file)] = {str(other) for other in imported(file) if other.name != "__init__.py"}
    assert not circle(drawing)


@pytest.mark.parametrize("name", posae.pipeline.__all__)
def test_every_name_that_the_pipeline_offers_can_be_imported(name: str) -> None:
    assert getattr(posae.pipeline, name)


def test_every_package_is_shipped_and_nothing_else() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(("posae", *f.parent.parts)) for f in FILES}
    assert set(shipped) == {"posae", "posae.pipeline.harvest.demo_model"} | folders
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
