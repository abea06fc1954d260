"""Runs and sweeps that were never trained: files as posae writes them, with the figures that a test wants.

And a real browser to open their pages in.
"""

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from posae.pipeline.report.measured import Measured, Study, StudyRun

D_MODEL = 128

PAPER: dict[str, Any] = {
    "architecture": "hierarchical",
    "layer": 2,
    "steps": 1000,
    "warmup_steps": 100,
    "ramp_steps": 900,
    "learning_rate": 3e-4,
    "clip_norm": 1.0,
    "l1_coefficient": 0.04,
    "activation_scale": "rms",
    "adapter_width": D_MODEL // 2,
    "dropout": 0.1,
    "ranges": "4",
    "layer_norm": "both",
    "residual": True,
    "position_mean": "none",
    "position_adapter": "none",
}


def evaluation(**scores: Any) -> dict[str, Any]:
    """What ``evaluation.json`` holds; ``scores`` win."""
    n_ranges = len(scores.get("ranges", "0123"))
    fvu = scores.get("fvu", 0.1)
    usual: dict[str, Any] = {
        "architecture": "hierarchical",
        "layer": 2,
        "dictionary_size": D_MODEL,
        "n_parameters": 100_000,
        "n_base_parameters": 33_000,
        "ranges": [f"{32 * r}:{32 * (r + 1)}" for r in range(n_ranges)],
        "l0": 16.0,
        "fvu": fvu,
        "fvu_by_range": [fvu] * n_ranges,
        "fvu_base": None,
        "dead_fraction": 0.0,
    }
    return usual | scores


def metrics(
    n_lines: int = 20,
    *,
    loss: Callable[[float], float] = lambda share: 10 * math.exp(-3 * share),
    spread: float = 1.0,
    costs: float = 1.0,
    **values: Any,
) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``.

    Args:
        n_lines: one every fifty steps.
        loss: at a share of the training.
        spread: standard deviation of the gradient's norm.
        costs: CPU-seconds to a step.
        **values: the same on every line.
    """
    found: list[dict[str, Any]] = []
    for number in range(1, n_lines + 1):
        step, share = 50 * number, number / n_lines
        line = {
            "step": step,
            "tokens": 64 * step,
            "loss": loss(share),
            "fvu": loss(share) / 10,
            "fvu_base": loss(share) / 8,
            "alpha": max(0.0, share - 0.1),
            "learning_rate": 3e-4,
            "l1_coefficient": 0.04,
            "gradient_norm_mean": 5.0,
            "gradient_norm_mean_square": 25 + spread**2,
            "cpu_seconds": costs * step,
        }
        found.append(line | values)
    return found


def run(
    settings: Mapping[str, Any] | None = None,
    lines: Sequence[Mapping[str, Any]] | None = None,
    *,
    folder: str = "",
    **scores: Any,
) -> Measured:
    """A run of the paper's settings but for ``settings``, with scores."""
    merged = {**PAPER, **(settings or {})}
    config = {"settings": merged, "store": {"d_model": D_MODEL}}
    found = evaluation(**{"architecture": merged["architecture"], **scores})
    name = folder or json.dumps([merged, scores], sort_keys=True)
    return Measured(name, config, found, metrics() if lines is None else lines)


def study(
    name: str, runs: Mapping[str, Sequence[Measured]], controls: Mapping[str, tuple[str, str]] | None = None
) -> Study:
    """A study of some runs by name, a seed each.

    Args:
        name: of the study.
        runs: by name, in the order of seeds.
        controls: of the names of controls: which control, and of what run.
    """
    entries: list[StudyRun] = []
    for label, seeds in runs.items():
        control, of = (controls or {}).get(label, (None, None))
        entries += [StudyRun(label, seed, found, control, of) for seed, found in enumerate(seeds)]
    return Study(name, name.title(), tuple(entries))


def write_run(folder: Path, measured: Measured) -> None:
    """Put a run into its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(measured.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured.metrics))
    if measured.evaluation:
        (folder / "evaluation.json").write_text(json.dumps(measured.evaluation))


def write_sweep(folder: Path, studies: Sequence[Study]) -> None:
    """Put studies into a folder, as a sweep does; equal runs lie where the first of them does."""
    places: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for one in studies:
        entries: list[dict[str, Any]] = []
        for entry in one.runs:
            place = f"{entry.name}/seed-{entry.seed}"
            if entry.run.folder not in places:
                places[entry.run.folder] = place
                write_run(folder / place, entry.run)
            entries.append(
                {
                    "name": entry.name,
                    "seed": entry.seed,
                    "folder": places[entry.run.folder],
                    "control": entry.control,
                    "of": entry.of,
                }
            )
        found.append({"study": one.study, "title": one.title, "claim": one.claim, "runs": entries})
    (folder / "sweep.json").write_text(json.dumps({"posae": "0.1.0", "studies": found}))


class MadeRuns:
    """The fixture ``made``: what makes them, so that tests need not import this file."""

    paper = PAPER
    evaluation = staticmethod(evaluation)
    metrics = staticmethod(metrics)
    run = staticmethod(run)
    study = staticmethod(study)
    write_run = staticmethod(write_run)
    write_sweep = staticmethod(write_sweep)


@pytest.fixture(scope="session")
def made() -> type[MadeRuns]:
    """Makes runs and sweeps that were never trained."""
    return MadeRuns


class Opened(NamedTuple):
    """What became of a page."""

    dom: str
    """HTML of all that is there in the end."""
    console: list[str]
    """What was complained of."""


OpenPage = Callable[[Path], Opened]


@pytest.fixture
def open_page(tmp_path: Path) -> OpenPage:
    """Opens a page in a real browser that reaches no network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")

    def open_page(page: Path) -> Opened:
        words = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000"),
            f"--user-data-dir={tmp_path / 'browser'}",
        )
        ended = subprocess.run(
            [browser, *words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return Opened(ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line])

    return open_page
