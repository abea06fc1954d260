"""HTML for notebooks, of a store or a run: a heading and plain tables; every string is escaped."""

from collections.abc import Mapping, Sequence
from html import escape

_LEFT = ' style="text-align:left"'


def block(title: str, *parts: str) -> str:
    """A heading and the parts below it, made by ``facts``, ``columns`` or ``folded``.

    >>> block("runs/<a>")
    '<div><strong>runs/&lt;a&gt;</strong></div>'
    """
    return f"<div><strong>{escape(title)}</strong>{''.join(parts)}</div>"


def facts(by_name: Mapping[str, str]) -> str:
    """A table with one row per name and text."""
    rows = (
        f"<tr><th{_LEFT}>{escape(name)}</th><td{_LEFT}>{escape(text)}</td></tr>"
        for name, text in by_name.items()
    )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a header; notebooks align its numbers at the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def folded(title: str, part: str) -> str:
    """A collapsed part with a title."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"
