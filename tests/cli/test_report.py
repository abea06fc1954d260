"""``posae report`` by real invocations, on real trainings of a few steps."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import Posae, call

SMALL = ("--contexts", "24", "--context-length", "16", "--layers", "1")
QUICK = ("--steps", "40", "--batch-size", "64", "--window-contexts", "8", "--log-steps", "5")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are not folded."""
    monkeypatch.setattr("posae.cli.report.console.width", 100)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of the paper's architecture and its agnostic control, and what a sweep writes of them."""
    folder = tmp_path_factory.mktemp("report")
    store, runs = folder / "demo.zarr", folder / "runs"
    assert call("harvest", store, *SMALL) == 0
    entries: list[dict[str, Any]] = []
    for name, preset, about in (
        ("paper", "paper", {"control": None, "of": None}),
        ("paper.agnostic", "paper-baseline", {"control": "agnostic", "of": "paper"}),
    ):
        for seed in range(2):
            place = f"{name}/seed-{seed}"
            words = ("--preset", preset, "--seed", seed, "--data-seed", seed)
            assert call("train", store, runs / place, *QUICK, *words) == 0
            entries.append({"name": name, "seed": seed, "folder": place, **about})
    study = {"study": "position", "title": "does position help", "claim": None, "runs": entries}
    (runs / "sweep.json").write_text(json.dumps({"posae": "0.1.0", "studies": [study]}))
    return runs


def test_a_sweep_is_told_in_tables_and_verdicts(posae: Posae, sweep: Path) -> None:
    code, out, _ = posae("report", sweep)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    words = " ".join(out.split())
    for told in (
        "paper.agnostic standard 128 ",
        " ± ",
        "FVU by position range",
        "position: does position help",
        "“15% parameter overhead” contradicted adapters of the stated width, d/2 = 64,",
        "contradicted 128 features, and",
        "not enough data not enough steps for a verdict (40 of at least 500):",
        "more claims of the paper are left out for lack of runs",
    ):
        assert told in words, told
    assert "no run of study" not in words


def test_a_sweep_as_json_is_one_object(posae: Posae, sweep: Path) -> None:
    code, out, _ = posae("report", sweep, "--json")
    assert code == 0
    found = json.loads(out)
    assert len(found["runs"]) == 4
    (position,) = found["position"]
    assert position["run"] == "paper"
    assert set(position["missing"]) == {"shared", "shuffled", "more-active"}


def test_plain_runs_as_json_are_a_list_as_ever(posae: Posae, sweep: Path) -> None:
    run = sweep / "paper" / "seed-0"
    code, out, _ = posae("report", run, "--json")
    assert code == 0
    (found,) = json.loads(out)
    (note,) = found.pop("notes")
    assert note.startswith("FVU above 1")
    assert found == {"run": str(run), **json.loads((run / "evaluation.json").read_text())}


def test_runs_of_equal_names_are_told_apart_by_their_folders(posae: Posae, sweep: Path) -> None:
    code, out, _ = posae("report", sweep / "paper" / "seed-0", sweep / "paper" / "seed-1")
    assert code == 0
    flat = "".join(out.split())
    assert all(f"seed-{seed}:{sweep}/paper/seed-{seed}" in flat for seed in range(2))


def test_out_writes_a_page_or_markdown(posae: Posae, sweep: Path, tmp_path: Path) -> None:
    code, out, _ = posae("report", sweep, "--out", tmp_path / "page.html")
    assert (code, out.strip()) == (0, f"{tmp_path / 'page.html'}: written")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Figure 1b" in page
    assert posae("report", sweep, "--out", tmp_path / "report.md")[0] == 0
    assert "## the paper's claims" in (tmp_path / "report.md").read_text()


def test_a_page_of_one_plain_run_has_its_figures(posae: Posae, sweep: Path, tmp_path: Path) -> None:
    assert posae("report", sweep / "paper" / "seed-0", "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "Figure 1a" in page
    assert "the paper's claims" not in page


def explorers(page: Path) -> list[dict[str, Any]]:
    """The features that a page shows, of each run."""
    blocks: list[str] = re.findall('class="explored">(.*?)</script>', page.read_text())
    return [json.loads(block) for block in blocks]


def test_a_page_of_runs_shows_features_with_their_text(posae: Posae, sweep: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    runs = (sweep / "paper" / "seed-0", sweep / "paper.agnostic" / "seed-1")
    assert posae("report", *runs, "--out", page, "--features", 20)[0] == 0
    ours, theirs = explorers(page)
    assert [run["label"] for run in (ours, theirs)] == ["seed-0", "seed-1"]
    assert len(ours["features"]) == 20
    assert ours["contexts"] == [16, 24]
    assert all(feature["baseByRange"] for feature in ours["features"])
    assert not any(feature["baseByRange"] for feature in theirs["features"])
    assert "<bos>" in ours["texts"]
    assert any(text.isidentifier() for text in ours["texts"])
    assert ours["note"] is None
    assert posae("report", *runs, "--out", page, "--features", 5, "--contexts", 3)[0] == 0
    assert explorers(page)[0]["contexts"] == [16, 19]
    assert posae("report", *runs, "--out", page, "--features", 0)[0] == 0
    assert explorers(page) == []


def test_a_sweeps_page_shows_features_of_the_first_seeds_where_asked_to(
    posae: Posae, sweep: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert posae("report", sweep, "--out", page)[0] == 0
    assert explorers(page) == []
    assert posae("report", sweep, "--out", page, "--features", 4)[0] == 0
    found = [(run["label"], Path(run["folder"]).name) for run in explorers(page)]
    assert found == [("paper", "seed-0"), ("paper.agnostic", "seed-0")]


def test_without_the_store_a_page_is_made_and_says_what_it_lacks(
    posae: Posae, sweep: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(sweep / "paper" / "seed-0", tmp_path / "run")
    for name in ("config.json", "evaluation.json"):
        told = json.loads((run / name).read_text())
        told["store"]["path"] = str(tmp_path / "nowhere.zarr")
        (run / name).write_text(json.dumps(told))
    page = tmp_path / "page.html"
    code, out, err = posae("report", run, "--out", page)
    assert (code, out.strip()) == (0, f"{page}: written")
    assert "no explorer of run:" in " ".join(err.split())
    assert "nowhere.zarr" in page.read_text()
    assert "has no explorer" in page.read_text()
    assert explorers(page) == []


def test_another_ending_is_an_error_in_one_line(posae: Posae, sweep: Path, tmp_path: Path) -> None:
    code, _, err = posae("report", sweep, "--out", tmp_path / "page.pdf")
    assert code == 1
    assert "neither a page (.html) nor Markdown (.md)" in err
    assert not (tmp_path / "page.pdf").exists()


def test_no_name_is_cut_at_80_columns_by_figures_as_large_as_gemmas(
    posae: Posae, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posae.cli.report.console.width", 80)
    for name, time in (("hierarchical", 987), ("baseline", 9)):
        run = shutil.copytree(sweep / "paper" / "seed-0", tmp_path / name)
        scores = json.loads((run / "evaluation.json").read_text())
        scores |= {
            "dictionary_size": 2304,
            "n_parameters": 32_186_880,
            "n_base_parameters": 10_621_440,
            "training_seconds": time,
        }
        (run / "evaluation.json").write_text(json.dumps(scores))
    code, out, _ = posae("report", tmp_path / "hierarchical", tmp_path / "baseline")
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    (first,) = (line for line in lines if line.startswith("hierarchical hierarchical "))
    assert first.split()[2:5] == ["2,304", "32,186,880", "(+203%)"]
    assert first.endswith(" 987 s")
    assert any(line.startswith("baseline ") and line.endswith(" 9 s") for line in lines)


def test_names_of_a_sweep_stay_whole_at_80_columns(
    posae: Posae, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posae.cli.report.console.width", 80)
    runs = shutil.copytree(sweep, tmp_path / "runs")
    study = json.loads((runs / "sweep.json").read_text())
    longer = {"paper": "layer-norm-adapter", "paper.agnostic": "layer-norm-adapter.agnostic"}
    for run in study["studies"][0]["runs"]:
        run["name"], run["of"] = longer[run["name"]], longer.get(run["of"])
        scores = json.loads((runs / run["folder"] / "evaluation.json").read_text())
        scores |= {"ranges": [f"{2 * r}:{2 * r + 2}" for r in range(8)], "fvu_by_range": [0.5] * 8}
        scores |= {"n_parameters": 32_186_880, "training_seconds": 987}
        (runs / run["folder"] / "evaluation.json").write_text(json.dumps(scores))
    (runs / "sweep.json").write_text(json.dumps(study))
    code, out, _ = posae("report", runs)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "(no room for time, architecture" in out
    first_words = [line.split()[0] for line in out.splitlines() if line.startswith(" layer-norm-")]
    assert set(first_words) == set(longer.values())
    (scores,) = (line for line in out.splitlines() if " ± " in line and "adapter.agnostic " in line)
    assert "32,186,880" in scores
    assert out.count("FVU by position range") == 2  # a half each
    monkeypatch.setattr("posae.cli.report.console.width", 56)
    narrow = posae("report", runs).out
    assert max(map(len, narrow.splitlines())) <= 56
    for figure in ("32,186,880 (", *re.findall(r"\d\.\d{4} ± \d\.\d{4}", out)):
        assert figure in narrow


def test_a_report_goes_into_a_folder_that_is_not_there_yet(posae: Posae, sweep: Path, tmp_path: Path) -> None:
    page = tmp_path / "for" / "people" / "report.md"
    assert posae("report", sweep, "--out", page)[0] == 0
    assert "## scores on" in page.read_text()


def test_an_unscored_run_is_named_beside_the_others(posae: Posae, sweep: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((sweep / "paper" / "seed-0" / "config.json").read_bytes())
    code, out, _ = posae("report", sweep / "paper" / "seed-0", begun)
    assert code == 0
    assert "without scores" in out
    assert "run posae train again" in " ".join(out.split())
