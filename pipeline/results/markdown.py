"""Tables in Markdown, for documents."""

from collections.abc import Sequence

from .tables import Table


def markdown(tables: Sequence[Table]) -> str:
    r"""All tables, each under its title; what the words hold is escaped.

    >>> print(markdown([Table("FVU", ["run", "0:32"], [["a|b", "0.1"]])]), end="")
    ## FVU
    <BLANKLINE>
    | run | 0:32 |
    | --- | ---: |
    | a\|b | 0.1 |
    """
    return "\n".join(_table(table) for table in tables)


def _table(table: Table) -> str:
    rules = ["---" if number < table.n_left else "---:" for number in range(len(table.columns))]
    rows = [table.columns, *table.rows]
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(rules) + " |")
    return f"## {_escaped(table.title)}\n\n" + "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    r"""Text that stays text in Markdown.

    >>> _escaped("<b> *a* [x](y)")
    '\\<b> \\*a\\* \\[x\\](y)'
    """
    one_line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\|<*_[]`#" else c for c in one_line)
