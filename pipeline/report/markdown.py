"""A report as Markdown."""

from collections.abc import Sequence

from .notes import Note
from .tables import Table


def markdown(tables: Sequence[Table], notes: Sequence[Note] = ()) -> str:
    r"""All notes, then all tables, each under its title; text is escaped.

    >>> print(markdown([Table("FVU", ["run", "0:32"], [["a|b", "0.1"]])], [Note("a*")]), end="")
    note: a\*
    <BLANKLINE>
    ## FVU
    <BLANKLINE>
    | run | 0:32 |
    | --- | ---: |
    | a\|b | 0.1 |
    """
    return "\n".join([*(f"note: {_escaped(note.text)}\n" for note in notes), *map(_table, tables)])


def _table(table: Table) -> str:
    rules = ["---" if number < table.n_left else "---:" for number in range(len(table.columns))]
    rows = [table.columns, *table.rows]
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(rules) + " |")
    return f"## {_escaped(table.title)}\n\n" + "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    r"""Text without meaning to Markdown.

    >>> _escaped("<b> *a* [x](y)")
    '\\<b> \\*a\\* \\[x\\](y)'
    """
    one_line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\|<*_[]`#" else c for c in one_line)
