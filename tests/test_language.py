"""Messages, help and documents are plain English: none of the phrases below (docs/style.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

AVOIDED = {
    r"\b(go|goes|going|went) on\b(?! (to|the|a) (disk|GPU|device))": "resume, continue",
    r"\breckon(s|ed|ing)?\b": "estimate, assume",
    r"\b(is|are|be|been|was|were) told\b": "report, print; or say what is known",
    r"\b[Tt]old (of|by|apart|from)\b": "report; distinguish",
    r"\bthe same words\b": "the same options",
    r"\b(is|are|was|be) read \S+ times\b": "epochs",
    r"\b(a|each|one|single|this|every|another|same) training"
    r"(?! (part|set|run|step|loss|data|script|token|batch|context|command|loop|code|time))\b": "run",
    r"\btrainings\b": "runs",
    r"\bto a (token|batch|context|chunk|shard|forward pass|firing)\b": "per token",
    r"\blets? go\b": "release",
    r"\bspeaks? of\b": "name, describe",
    r"\bnext to nothing\b": "almost nothing",
    r"\bbegins? anew\b": "starts over",
    r"\b(harvest|write|save|fetch|open|compress|score) (\w+ ){1,3}anew\b": "again",
    r"\blooked? for in vain\b": "not found",
    r"\bno whole number\b": "not an integer",
    r"\bfor people to read\b": "shown in reports",
    r"\bdone away with\b": "fixed, removed",
    r"\b(was|were) asked for, and\b": "is out of range",
    r"\bhas no need\b": "does not need",
    r"\bmanyfold\b": "many times",
    r"\bwhoever\b": "name the person or program",
    r"\bthe like\b": "name them",
    r"\b(dataset_revision|model_revision|n_contexts)\b (is|are)\b": "the option's name",
}
"""Regular expressions, and what to write instead."""

NOT_NOW = ("docs/log.md", "docs/style.md", "docs/decisions")
"""Documents of the past, and the page that quotes what to avoid."""


def is_below(file: Path, places: tuple[str, ...]) -> bool:
    return any(file.relative_to(ROOT).is_relative_to(place) for place in places)


CODE = [file for folder in ("cli", "pipeline", "store") for file in sorted((ROOT / folder).rglob("*.py"))]
DOCUMENTS = [
    file
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if not is_below(file, NOT_NOW)
]


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string; what an f-string fills in is left as ``{}``."""
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def avoided(text: str) -> Iterator[str]:
    flat = " ".join(text.split())
    for pattern, better in AVOIDED.items():
        for match in re.finditer(pattern, flat):
            around = flat[max(0, match.start() - 30) : match.end() + 30]
            yield f"{match[0]!r} (better: {better}) in: …{around}…"


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_messages_and_help_avoid_phrases(file: Path) -> None:
    faults = [
        f"line {line}: {fault}"
        for line, text in literals(ast.parse(file.read_text()))
        for fault in avoided(text)
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_documents_avoid_phrases(file: Path) -> None:
    paragraphs = re.split(r"\n\s*\n", file.read_text())
    faults = [fault for paragraph in paragraphs for fault in avoided(paragraph)]
    assert not faults, "\n".join(faults)


def test_the_check_finds_what_it_looks_for() -> None:
    tree = ast.parse('raise Error(f"it goes\\n on; read {n} times")\nx = "12 tokens to a batch"')
    texts = {text for _, text in literals(tree)}
    assert texts == {"it goes\n on; read {} times", "12 tokens to a batch"}
    assert len(list(avoided("it goes on, the part is read {} times, and trainings are told apart"))) >= 3
