"""docs/evaluation.md and the JSON schema say what evaluation.json is."""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from posae.pipeline.evaluate.scoring.evaluation import Evaluation, json_schema

DOCS = Path(__file__).parents[3] / "docs"
MARK = "<!-- table: evaluation -->\n"


def rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """Each key and what it means, with those of the parts below it."""
    found: list[tuple[str, str]] = []
    for name, field in model.model_fields.items():
        found.append((prefix + name, (field.description or "").replace("\n", " ")))
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += rows(part, f"{prefix}{name}.")
    return found


def table() -> str:
    """The table as it should stand in docs/evaluation.md."""
    lines = [f"| `{name}` | {text} |" for name, text in rows(Evaluation)]
    return "\n".join(["", "| Key | Meaning |", "|---|---|", *lines, ""])


def test_the_table_in_the_documents_is_that_of_the_code() -> None:
    text = (DOCS / "evaluation.md").read_text()
    assert text.count(MARK) == 1
    assert text.partition(MARK)[2].startswith(table()), f"write this below the mark:\n{table()}"


def test_the_schema_in_the_documents_is_that_of_the_code() -> None:
    path = DOCS / "evaluation.schema.json"
    assert path.read_text() == json_schema(), f"write json_schema() into {path}"


def test_every_key_is_explained() -> None:
    unexplained: list[Any] = [name for name, text in rows(Evaluation) if not text.endswith(".")]
    assert not unexplained
