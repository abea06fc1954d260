"""What notebooks show of stores and runs: what matters, and nothing that a stranger's string could do."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from posae.pipeline import Run
from posae.store import ActivationStore

if TYPE_CHECKING:
    from .conftest import Made, MakeStore

HOSTILE = "<img src=x onerror='alert(1)'>&\"<script>"


class Page(HTMLParser):
    """The tags of a piece of HTML, their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(shown: Any) -> Page:
    """As Jupyter finds it; only our own tags and attributes may be in it."""
    page = Page(shown._repr_html_())
    ours = {"div", "strong", "details", "summary", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.tags <= ours
    assert page.attributes <= {("style", "text-align:left")}
    return page


def test_a_store_shows_what_it_holds(good_store: "Made") -> None:
    store = ActivationStore.open(good_store.root)
    text = page_of(store).text
    assert text[0] == str(good_store.root)
    hook_point = "resid_post, the residual stream after a block, 16 wide; layers 0, 3 of 26, counted from 0"
    assert {hook_point, str(store.identity)} <= {*text}
    ratio = store.raw_bytes(3) / store.stored_bytes(3)
    layer = text[text.index("ratio") + 6 :]
    assert (layer[0], layer[1], layer[3], layer[4]) == ("3", "41", "7.87 kB", f"{ratio:.3f}")


def test_a_store_of_nothing_yet_shows_that(make_store: "MakeStore", tmp_path: Path) -> None:
    made = make_store(tmp_path / "a.zarr", seal=False, shards=[])
    text = page_of(ActivationStore.open(made.root)).text
    assert {"unfinished", "0 B", "-"} <= {*text}
    assert any(line.startswith("0 of 6 tokens and 20 planned, ") for line in text)


def test_strings_of_a_store_are_shown_as_text(make_store: "MakeStore", tmp_path: Path) -> None:
    named: dict[str, Any] = {"model": HOSTILE, "dataset": HOSTILE}
    store = ActivationStore.open(make_store(tmp_path / "<b>.zarr", **named).root)
    text = page_of(store).text
    assert (text[0], HOSTILE in text) == (str(tmp_path / "<b>.zarr"), True)


def run_of(folder: Path, **files: Any) -> Run:
    folder.mkdir()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return Run(folder)


SETTINGS = {"architecture": "topk", "layer": 12, "dictionary_size": 16384, "seed": 3, "steps": 10000}
STORE = {"path": "pile.zarr", "model": "made-up", "dataset": "pile"}


def test_a_run_shows_its_settings_state_and_scores(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", config={"settings": SETTINGS, "store": STORE})
    text = page_of(run).text
    assert "topk, layer 12, 16,384 features, seed 3" in text
    assert "pile.zarr: made-up on pile" in text
    assert {"at step 0 of 10,000", "none yet"} <= {*text}
    run.add_metrics({"step": 50})
    assert "at step 50 of 10,000" in page_of(run).text
    scores = {"fvu": 0.25, "l0": 32.0, "ranges": ["0:64", "64:128"], "fvu_by_range": [0.3, None]}
    run.write_json("evaluation.json", scores)
    for name in ("sae_weights.safetensors", "cfg.json"):
        (run.folder / name).touch()
    text = page_of(run).text
    assert {"finished, 10,000 steps", "0.25", "32"} <= {*text}
    assert text[text.index("0:64") :][:4] == ["0:64", "64:128", "0.3", "-"]


@pytest.mark.parametrize("odd", [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}, None, 1e999])
def test_whatever_a_run_says_is_shown_as_text(odd: Any, tmp_path: Path) -> None:
    config = {"settings": dict.fromkeys([*SETTINGS, HOSTILE], odd), "store": dict.fromkeys(STORE, odd)}
    scores = {"fvu": odd, "l0": odd, "ranges": [odd, odd], "fvu_by_range": [odd]}
    for number, files in enumerate(({"config": config, "evaluation": scores}, {"config": {"settings": odd}})):
        run = run_of(tmp_path / f"<i>{number}", **files)
        (run.folder / "metrics.jsonl").write_text(json.dumps(odd))
        page = page_of(run)
        assert page.text[0] == str(run.folder)
        assert not files.get("evaluation") or odd != HOSTILE or page.text.count(HOSTILE) >= len(SETTINGS)


def test_a_run_that_cannot_be_read_shows_why(tmp_path: Path) -> None:
    assert any("there is no run at" in part for part in page_of(Run(tmp_path / "none")).text)
    damaged = run_of(tmp_path / "run", config={}, evaluation=HOSTILE)
    assert any("evaluation.json cannot be read" in part for part in page_of(damaged).text)
