"""Folders of runs and sweeps read, and what comes of them: JSON, Markdown, a page that a browser opens."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from posae.pipeline.errors import RunError, RunNotFoundError
from posae.pipeline.report.measured import Measured, Study, number, numbers
from posae.pipeline.report.page.figures import MAX_POINTS, drawn, phases
from posae.pipeline.report.paper.claims import CLAIMS
from posae.pipeline.report.report import as_json, collect, write
from posae.pipeline.report.tables import Series, beyond, by_range, of_study
from posae.pipeline.sae.run_settings import train_presets
from posae.store.errors import SettingsError

if TYPE_CHECKING:
    from ..conftest import MadeRuns, OpenPage

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
OUTSIDE = (
    '{{"studies": [{{"study": "a", "title": "", "runs": [{{"name": "a", "seed": 0, "folder": "{}"}}]}}]}}'
)


def studies(made: "type[MadeRuns]") -> list[Study]:
    """The method and its controls in three seeds, and a study that shares a run with them."""
    more: dict[str, Any] = {
        "fvu_by_position": [0.2 + 0.1 / (1 + p) for p in range(128)],
        "density_histogram": {"edges": [-4.0, -3.0, -2.0, -1.0], "counts": [1, 40, 87], "never": 0},
        "specificity": {"curve": {"specialisation": [0.0, 0.4], "interpretability": [0.6, 0.3]}},
        "training_seconds": 12.0,
    }

    def seeds(fvu: float, **settings: Any) -> list[Measured]:
        return [made.run({**settings, "seed": s}, fvu=fvu * (1 + s / 100), **more) for s in range(3)]

    runs = {
        "paper": seeds(0.2),
        "paper.agnostic": seeds(0.1, architecture="standard"),
        "paper.shared": seeds(0.2, shared_adapters=True),
        "paper.shuffled": seeds(0.21, shuffle_positions=True),
    }
    controls = {name: (name.partition(".")[2], "paper") for name in runs if "." in name}
    warmup = {"paper": runs["paper"], "warmup-0": seeds(0.3, warmup_steps=0, ramp_steps=1000)}
    return [made.study("position", runs, controls), made.study("warmup", warmup)]


@pytest.fixture(scope="module")
def sweep(made: "type[MadeRuns]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    made.write_sweep(folder, studies(made))
    return folder


def test_a_sweep_gives_every_answer_as_json(sweep: Path) -> None:
    found = cast("dict[str, Any]", as_json(collect([sweep])))
    json.dumps(found, allow_nan=False)
    assert found.keys() == {"runs", "studies", "position", "claims", "missing"}
    assert len(found["runs"]) == 5 * 3  # the run that stands in two studies once
    assert [study["study"] for study in found["studies"]] == ["position", "warmup"]
    (position,) = found["position"]
    assert position["answer"] == "contradicted"
    assert position["gain"]["mean"] == pytest.approx(-1)
    assert position["gain"]["seeds"] == 3
    answers = {claim["claim"]: claim["answer"] for claim in found["claims"]}
    assert answers["warm-up"] == "holds"
    assert answers["position"] == "contradicted"
    assert answers["gated residual"] == "not enough data"
    assert found["missing"] == []


def test_an_endless_interval_is_null_in_json(made: "type[MadeRuns]", tmp_path: Path) -> None:
    first = [
        Study(one.study, one.title, tuple(run for run in one.runs if run.seed == 0)) for one in studies(made)
    ]
    made.write_sweep(tmp_path, first)
    found = cast("dict[str, Any]", as_json(collect([tmp_path])))
    json.dumps(found, allow_nan=False)
    assert found["position"][0]["gain"]["low"] is None
    assert found["position"][0]["answer"] == "not enough data"


def test_plain_runs_are_a_list_of_their_scores(made: "type[MadeRuns]", tmp_path: Path) -> None:
    made.write_run(tmp_path / "a", made.run(fvu=0.25))
    found = cast("list[Any]", as_json(collect([tmp_path / "a"])))
    assert [(run["run"], run["fvu"]) for run in found] == [(str(tmp_path / "a"), 0.25)]


def test_what_has_no_scores_is_named_with_what_to_do(made: "type[MadeRuns]", tmp_path: Path) -> None:
    made.write_run(tmp_path / "a", made.run())
    unscored = made.run()
    made.write_run(tmp_path / "b", Measured("b", unscored.config, {}, unscored.metrics))
    report = collect([tmp_path / "a", tmp_path / "b"])
    assert report.missing == {str(tmp_path / "b"): "has no scores yet; run posae train again to resume it"}
    for name in ("sae_weights.safetensors", "cfg.json"):
        (tmp_path / "b" / name).touch()
    report = collect([tmp_path / "a", tmp_path / "b"])
    assert report.missing == {str(tmp_path / "b"): f"has no scores yet; run posae evaluate {tmp_path / 'b'}"}
    assert [table.title for table in report.answers()] == ["without scores"]
    assert cast("list[Any]", as_json(report))[1]["missing"].startswith("has no scores yet")


def test_runs_of_a_sweep_that_are_not_there_are_named(made: "type[MadeRuns]", tmp_path: Path) -> None:
    made.write_sweep(tmp_path, studies(made))
    shutil.rmtree(tmp_path / "paper.shuffled")
    report = collect([tmp_path])
    assert len(report.missing) == 3
    (finding,) = report.findings
    assert finding.missing == ("shuffled", "more-active")


def test_nothing_scored_is_an_error(made: "type[MadeRuns]", tmp_path: Path) -> None:
    unscored = made.run()
    made.write_run(tmp_path / "b", Measured("b", unscored.config, {}, ()))
    with pytest.raises(RunNotFoundError, match="has no scores yet"):
        collect([tmp_path / "b"])


def test_what_is_no_run_is_said_with_what_to_give(made: "type[MadeRuns]", tmp_path: Path) -> None:
    store, file = tmp_path / "a.zarr", tmp_path / "a.txt"
    store.mkdir()
    (store / "zarr.json").touch()
    file.touch()
    made.write_run(tmp_path / "runs" / "a", made.run())
    made.write_run(tmp_path / "sweep" / "paper" / "seed-0", made.run())
    made.write_sweep(tmp_path / "data" / "all", [made.study("mine", {"a": [made.run()]})])
    (tmp_path / "empty").mkdir()
    for folder, told in (
        (tmp_path / "nope", "does not exist"),
        (file, "is a file, not a run"),
        (store, f"is a store, not a run; train one from it: posae train {store} RUN"),
        (tmp_path / "runs", f"contains runs; name these: {tmp_path}/runs/*"),
        (tmp_path / "sweep" / "paper", f"contains runs; name these: {tmp_path}/sweep/paper/*"),
        (tmp_path / "sweep", f"contains runs; name these: {tmp_path}/sweep/*/*"),
        (tmp_path / "data", f"contains sweeps; name these: {tmp_path}/data/*"),
        (tmp_path / "empty", "is not a run; train one: "),
    ):
        with pytest.raises(RunNotFoundError, match=re.escape(f"{folder} ") + ".*" + re.escape(told)):
            collect([folder])
    beside = collect([tmp_path / "runs" / "a", tmp_path / "nope"])
    assert beside.missing[str(tmp_path / "nope")].startswith("does not exist")


def test_damaged_scores_are_to_be_made_again_not_the_run(made: "type[MadeRuns]", tmp_path: Path) -> None:
    made.write_run(tmp_path / "a", made.run())
    for content in ("{", "[]"):
        (tmp_path / "a" / "evaluation.json").write_text(content)
        with pytest.raises(RunError, match=f"score the run again: posae evaluate {tmp_path / 'a'}"):
            collect([tmp_path / "a"])
        (tmp_path / "a" / "config.json").write_text(content)
        with pytest.raises(RunError, match="train the run again"):
            collect([tmp_path / "a"])
        (tmp_path / "a" / "config.json").write_text("{}")


def on_store(
    made: "type[MadeRuns]", path: str, layer: int = 2, read: dict[str, str] | None = None
) -> Measured:
    run = made.run(
        layer=layer, store={"path": path, "identity": None, "read": read or {}, "trained_from": None}
    )
    return Measured(
        "", {**run.config, "store": {"path": path, "read": read or {}}}, run.evaluation, run.metrics
    )


def notes_of(tmp_path: Path, made: "type[MadeRuns]", *runs: Measured) -> list[str]:
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    folders = [tmp_path / "runs" / "abcdef"[number] for number in range(len(runs))]
    for folder, run in zip(folders, runs, strict=True):
        made.write_run(folder, run)
    return [note.text.replace(f"{tmp_path}/runs/", "") for note in collect(folders).notes()]


def test_runs_of_different_stores_or_layers_are_said_to_be_so(made: "type[MadeRuns]", tmp_path: Path) -> None:
    def told(*runs: Measured) -> list[str]:
        return notes_of(tmp_path, made, *runs)

    one, two = on_store(made, "/one.zarr"), on_store(made, "/two.zarr")
    assert told(one, one) == []
    assert told(one, made.run()) == []  # of which nothing is known
    assert told(one, two, one) == [
        "these runs are of different stores; their FVU cannot be compared: "
        "a, c: /one.zarr layer 2; b: /two.zarr layer 2"
    ]
    (layers,) = told(one, on_store(made, "/one.zarr", 4))
    assert layers.startswith("these runs are of different layers; ")
    assert layers.endswith("a: /one.zarr layer 2; b: /one.zarr layer 4")
    first, then = {"tokens": "12", "layers/2": "abcdef0123"}, {"tokens": "12", "layers/2": "fedcba"}
    moved = on_store(made, "/moved.zarr", read=first)
    assert told(on_store(made, "/one.zarr", read=first), moved) == []
    assert told(on_store(made, "/one.zarr", read=first), one) == []  # the one was not sealed yet
    (changed,) = told(on_store(made, "/one.zarr", read=first), on_store(made, "/one.zarr", read=then))
    assert changed.endswith(
        "a: /one.zarr layer 2 (activations abcdef01); b: /one.zarr layer 2 (activations fedcba)"
    )
    assert "b, c, d, e and 1 more: /two.zarr" in told(one, two, two, two, two, two)[0]


def test_an_fvu_above_one_is_noted(made: "type[MadeRuns]", tmp_path: Path) -> None:
    (note,) = notes_of(tmp_path, made, made.run(fvu=1.2), made.run(fvu=0.9))
    assert note == "FVU above 1, worse than the mean of all: a; it diverged or has not trained long enough"


def scored_on(
    made: "type[MadeRuns]", n_seen: int | None, *, is_own: bool = False, contexts: str = "held-out"
) -> Measured:
    store: dict[str, Any] = {
        "path": "/half.zarr",
        "read": {},
        "trained_from": is_own,
        "seen_contexts": n_seen,
    }
    probing = {"source": "offline", "data": {"contexts": contexts}}
    return made.run(store=store, contexts=[488, 512], probing=probing)


def test_scores_on_contexts_that_were_trained_on_say_so_everywhere(
    made: "type[MadeRuns]", tmp_path: Path
) -> None:
    made.write_run(tmp_path / "a", scored_on(made, 24))
    told = f"{tmp_path}/a was trained on 24 of the 24 contexts that it is scored on"
    report = collect([tmp_path / "a"])
    scores = report.measurements()[0]
    assert scores.title == "scores on contexts that were trained on, layer 2"
    assert scores.rows[0][0] == "a, on another store, trained on its contexts"
    (found,) = cast("list[Any]", as_json(report))
    assert found["notes"] == [f"{told}; these are not held-out scores"]
    for name in ("page.html", "report.md"):
        write(report, tmp_path / name)
        assert told in (tmp_path / name).read_text().replace("\\_", "_")
    made.write_run(tmp_path / "b", scored_on(made, 0, is_own=True))
    both = collect([tmp_path / "a", tmp_path / "b"]).measurements()[0]
    assert both.title == "scores on the held-out part, some on contexts that were trained on, layer 2"
    assert [row[0] for row in both.rows][1] == "b"


def test_what_is_not_known_to_be_unseen_is_noted(made: "type[MadeRuns]", tmp_path: Path) -> None:
    assert notes_of(tmp_path, made, scored_on(made, 0)) == []
    assert notes_of(tmp_path, made, scored_on(made, None)) == [
        "a: scored on another store; whether it was trained on the same contexts is unknown"
    ]
    (note,) = notes_of(tmp_path, made, scored_on(made, 0, contexts="all"))
    assert note.startswith("a: rows of sparse probes come from all contexts")


def test_one_comparison_has_one_number(made: "type[MadeRuns]", tmp_path: Path) -> None:
    """The study's table and the verdict print the gain at equal L0; as measured, the run is 6 % better."""
    runs = {
        "aware": [made.run({"seed": s, "dropout": 0.2}, fvu=0.094, l0=18) for s in range(3)],
        "agnostic": [made.run({"seed": s}, fvu=0.1, l0=16) for s in range(3)],
        "more": [made.run({"seed": s, "target_l0": 20}, fvu=0.081, l0=20) for s in range(3)],
    }
    study = made.study("mine", runs, {"agnostic": ("agnostic", "aware"), "more": ("more-active", "aware")})
    made.write_sweep(tmp_path, [study])
    report = collect([tmp_path])
    (table,) = (table for table in report.measurements() if table.title.startswith("mine"))
    assert dict(zip(table.columns, table.rows[0], strict=True))["to agnostic at equal L0"] == "+4.4 %"
    (finding,) = report.findings
    assert "4.4 % more unexplained at equal L0 (18.0)" in finding.reason
    assert "6.0 %" not in "".join(text for table in report.answers() for row in table.rows for text in row)


def test_notes_stand_in_every_form_of_a_report(made: "type[MadeRuns]", tmp_path: Path) -> None:
    made.write_run(tmp_path / "a", on_store(made, "/<one>.zarr"))
    made.write_run(tmp_path / "b", on_store(made, "/two.zarr"))
    report = collect([tmp_path / "a", tmp_path / "b"])
    told = "are of different stores; their FVU cannot be compared"
    for name in ("page.html", "report.md"):
        write(report, tmp_path / name)
        assert told in (tmp_path / name).read_text()
        assert "/<one>" not in (tmp_path / name).read_text().replace("\\<", "")
    assert all(told in run["notes"][0] for run in cast("list[Any]", as_json(report)))
    assert "notes" not in cast("list[Any]", as_json(collect([tmp_path / "a"])))[0]


def test_ones_own_sweep_shows_no_claims_that_none_of_its_runs_is_about(
    made: "type[MadeRuns]", sweep: Path, tmp_path: Path
) -> None:
    plain = [made.run({"architecture": "topk", "seed": seed}) for seed in range(2)]
    made.write_sweep(tmp_path, [made.study("mine", {"a": plain})])
    text = (tmp_path / "sweep.json").read_text()
    (tmp_path / "sweep.json").write_text(text.replace('"Mine"', '"mine"'))
    own = collect([tmp_path])
    assert [table.title for table in own.answers()] == []
    assert own.notes() == []
    assert "mine" in [table.title for table in own.measurements()]
    some = collect([sweep])
    claims = some.answers()[-1]
    assert claims.title == "the paper's claims"
    assert 0 < len(claims.rows) < len(some.claims)
    assert any("warmup steps" in row[0] for row in claims.rows)
    assert not any("no run of study" in row[2] for row in claims.rows)
    n_others = len(some.claims) - len(claims.rows)
    assert some.notes()[-1].text.startswith(f"{n_others} more claims of the paper are left out")
    write(some, tmp_path / "report.md")
    titles = re.findall("^## (.*)$", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert titles[0].startswith("scores on")
    assert titles[-1] == "the paper's claims"


def test_a_sweep_with_every_study_shows_every_claim(made: "type[MadeRuns]", tmp_path: Path) -> None:
    names = {claim.study for claim in CLAIMS}
    made.write_sweep(tmp_path, [made.study(name, {"a": [made.run()]}) for name in sorted(names)])
    report = collect([tmp_path])
    assert len(report.answers()[-1].rows) == len(CLAIMS)
    assert report.notes() == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Invalid JSON"),
        ('{"studies": [{"study": "a"}]}', "Field required"),
        (
            OUTSIDE.format("../a"),
            "outside its own",
        ),
        (
            OUTSIDE.format("/etc"),
            "outside its own",
        ),
    ],
)
def test_a_sweep_of_another_make_is_an_error(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(RunError, match=told):
        collect([tmp_path])


def test_older_and_odd_evaluations_only_lack_what_they_lack(made: "type[MadeRuns]", tmp_path: Path) -> None:
    odd: dict[str, Any] = {
        "fvu": "0.1",
        "l0": True,
        "drift": [1],
        "clusters": {"best_n": None},
        "specificity": 3,
        "fvu_by_position": {"a": 1},
        "probing": {"mean": None, "tasks": {}},
        "ranges": None,
    }
    good = made.run()
    made.write_run(tmp_path / "odd", Measured("", good.config, {**good.evaluation, **odd}, good.metrics))
    (tmp_path / "sweep").mkdir()
    made.write_sweep(tmp_path / "sweep", studies(made)[:1])
    report = collect([tmp_path / "odd", tmp_path / "sweep"])
    told = ["odd", "hierarchical", "128", "100,000 (+203%)", "-", "-", "0.0%", "-"]
    assert told in report.measurements()[0].rows
    write(report, tmp_path / "page.html")


def test_numbers_are_told_from_everything_else() -> None:
    assert number({"a": {"b": 2}}, "a", "b") == 2
    odd: list[Any] = [None, True, "1", float("nan"), float("inf"), [], {}]
    assert [number(value) for value in odd] == [None] * 7
    assert numbers([1, None, "x"]) == [1.0, None, None]
    assert numbers({"0": 1}) == []


def test_rows_of_a_sweep_are_means_over_seeds(sweep: Path) -> None:
    tables = {table.title: table for table in collect([sweep]).measurements()}
    scores = tables["scores on the held-out part, layer 2"]
    assert [row[0] for row in scores.rows] == [
        "paper",
        "paper.agnostic",
        "paper.shared",
        "paper.shuffled",
        "warmup-0",
    ]
    assert scores.rows[0][5] == "0.2020 ± 0.0020"
    assert scores.rows[0][7] == "12 s"
    assert tables["warmup: Warmup"].rows[0][:2] == ["paper", "3"]


def test_a_study_shows_its_controls_only_where_they_are_the_point(made: "type[MadeRuns]") -> None:
    whole = studies(made)[0]
    table = of_study(whole)
    assert table.columns == ["run", "seeds", "parameters", "L0", "FVU", "to agnostic at equal L0"]
    assert [(row[0], row[5]) for row in table.rows] == [
        ("paper", "+100.0 %"),
        ("paper.agnostic", ""),
        ("paper.shared", ""),
        ("paper.shuffled", ""),
    ]
    few = Study("ranges", "", [run for run in whole.runs if run.control in (None, "agnostic")])
    assert [row[0] for row in of_study(few).rows] == ["paper"]


def test_many_ranges_are_cut_into_tables(made: "type[MadeRuns]") -> None:
    sixteen = Series("a", [made.run(ranges=[f"{8 * r}:{8 * r + 8}" for r in range(16)])])
    four = Series("b", [made.run()])
    found = by_range([sixteen, four])
    assert [(len(table.columns), [row[0] for row in table.rows]) for table in found] == [
        (9, ["a"]),
        (9, ["a"]),
        (5, ["b"]),
    ]


def test_figures_mark_the_phases_and_hide_controls(sweep: Path) -> None:
    series = collect([sweep]).series()
    marked = [(shape["x0"], shape["x1"], shape["label"]["text"]) for shape in phases(series)]
    assert marked == [(0, 100, "base alone"), (100, 1000, "alpha rises")]
    figures = {title: figure for title, _, figure in drawn(series)}
    assert len(figures) == 6
    loss = figures["Figure 1a: loss over steps"]["data"]
    assert {line["name"]: line["visible"] for line in loss}["paper.shuffled"] == "legendonly"
    assert loss[0]["visible"] is True
    density = figures["Density of features"]["data"][0]
    assert density["x"] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert density["y"] == [1, 40, 87, 87]


def test_a_long_training_is_thinned_and_keeps_its_end(made: "type[MadeRuns]") -> None:
    series = [Series("long", [made.run(lines=made.metrics(5 * MAX_POINTS))])]
    line = drawn(series)[0][2]["data"][0]
    assert len(line["x"]) == MAX_POINTS
    assert line["x"][-1] == 50 * 5 * MAX_POINTS


class Page(html.parser.HTMLParser):
    """The tags of a page, and its words outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words += data


@pytest.fixture(scope="module")
def page(made: "type[MadeRuns]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep in which every name is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "plain").mkdir()
    made.write_sweep(folder / "plain", studies(made))
    runs: list[dict[str, Any]] = []
    for seed, run in studies(made)[0].series("paper").items():
        evil = {**run.evaluation, "architecture": HOSTILE, "ranges": [HOSTILE] * 4}
        place = folder / "names" / f"seed-{seed}"
        made.write_run(place, Measured("", run.config, evil, run.metrics))
        runs.append({"name": HOSTILE, "seed": seed, "folder": place.name})
    study = {"study": HOSTILE, "title": HOSTILE, "runs": runs}
    (folder / "names" / "sweep.json").write_text(json.dumps({"studies": [study]}))
    path = folder / "page.html"
    write(collect([folder / "names", folder / "plain"]), path)
    return path


def test_a_page_needs_nothing_else_and_runs_no_words(page: Path) -> None:
    found = Page(page.read_text())
    kinds = [tag for tag, _ in found.tags]
    assert not {"img", "link", "iframe", "object"} & set(kinds)
    assert all("src" not in attributes for _, attributes in found.tags)
    assert all(href.startswith("#") for _, a in found.tags if (href := a.get("href")) is not None)
    assert not any(name.startswith("on") for _, a in found.tags for name in a)
    assert any("default-src 'none'" in (a.get("content") or "") for _, a in found.tags)
    assert HOSTILE in found.words
    assert "contradicted" in found.words
    assert (
        kinds.count("section")
        == len([a for tag, a in found.tags if tag == "div" and a.get("class") == "wide"]) + 7
    )


def test_a_browser_draws_the_page_without_a_word_of_complaint(page: Path, open_page: "OpenPage") -> None:
    opened = open_page(page)
    assert opened.console == []
    assert "<title>posae report</title>" in opened.dom  # what is hostile did not run
    assert opened.dom.count('class="plotly-graph-div js-plotly-plot"') == 6
    assert opened.dom.count('class="scatterlayer') >= 6
    buttons = set(re.findall('data-title="([^"]*)"', opened.dom))
    assert "Download plot as a PNG" in buttons
    assert not {title for title in buttons if "Share" in title}  # a figure's data stay here


def test_markdown_keeps_words_as_words(page: Path, tmp_path: Path) -> None:
    write(collect([page.parent / "names"]), tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "\\<script>" in text
    assert "<script>" not in text.replace("\\<script>", "")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "| --- |" in lines[1]


def test_nothing_is_loaded_to_draw_with_before_a_page_is_wanted() -> None:
    source = "import sys, posae.pipeline.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_a_page_says_where_each_run_comes_from(made: "type[MadeRuns]", tmp_path: Path) -> None:
    run = made.run({**train_presets()["paper"], "seed": 3, "steps": 100})
    settings = {**run.config["settings"], "activation_scale": "rms"}
    store = {**run.config["store"], "path": "/data/a b.zarr", "read": {"tokens": "12ab"}, "model": HOSTILE}
    config = {"posae": "0.0.9", "torch": "2.0", "settings": settings, "store": store}
    scored = {**run.evaluation, "store": {"identity": "34cd", "trained_from": True}, "contexts": [240, 256]}
    made.write_run(tmp_path / "known", Measured("", config, scored, run.metrics))
    odd: dict[str, Any] = {"settings": {"seed": 1, "of the future": 2}, "store": [], "posae": None}
    made.write_run(tmp_path / "odd", Measured("", odd, {**run.evaluation, "store": 3}, run.metrics))
    write(collect([tmp_path / "known", tmp_path / "odd"]), tmp_path / "page.html")
    words = " ".join(Page((tmp_path / "page.html").read_text()).words.split())
    told_of = words.rpartition("Provenance")[2]
    for told in ("12ab", "34cd", HOSTILE, "240:256", "0.0.9", "seed3 (default 0)", "100 (default 10000)"):
        assert told in told_of, told
    assert f"posae train '/data/a b.zarr' {tmp_path}/known --preset paper --layer 2 " in told_of
    assert "No command of this version of posae gives all of its settings" in told_of
    assert "of the future" in told_of


def test_scores_that_are_only_measured_where_asked_for_have_a_table(made: "type[MadeRuns]") -> None:
    score = {"accuracy": 0.75, "standard_error": 0.1}
    means = {what: dict.fromkeys(("1", "2", "5", "all"), score) for what in ("codes", "activations")}
    asked = made.run(ce_loss={"recovered": 0.9}, probing={"mean": means})
    lost, probes = beyond([Series("asked", [asked]), Series("plain", [made.run()])])
    assert (lost.columns, lost.rows) == (["run", "CE-loss recovered"], [["asked", "0.900"]])
    assert probes.columns[:3] == ["run", "codes, k = 1", "codes, k = 5"]
    assert [row[:3] for row in probes.rows] == [["asked", "0.750", "0.750"]]
    assert beyond([Series("plain", [made.run()])]) == []


def test_another_ending_is_refused(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\.html"):
        write(collect([sweep]), tmp_path / "report.pdf")
