"""Where runs come from, for a page: store and digests, model, data, versions, settings, command.

Everything comes from a run's own files; what the files of an older posae lack is left out.
"""

import html
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from .measured import Measured

_OPEN = 3
"""With more runs, all are folded."""

Arguments = Callable[[Mapping[str, Any], int], Sequence[str] | None]
"""The arguments after ``posae train STORE RUN`` for some settings at some d_model, or None."""


class Provenance(NamedTuple):
    """Where one run comes from."""

    label: str
    summary: str
    facts: Sequence[tuple[str, str]]
    """Name and value."""
    settings: Sequence[tuple[str, str, str | None]]
    """Name, value, and the default where it differs."""
    command: str | None
    """The command that trains it again; None where no arguments give its settings."""


def provenance(label: str, run: Measured, defaults: Mapping[str, Any], arguments: Arguments) -> Provenance:
    """Where a run comes from.

    Args:
        label: of the run.
        run: its files.
        defaults: of every training setting.
        arguments: finds the arguments of a command.
    """
    store = _object(run.config.get("store"))
    read = _object(store.get("read"))
    scored = _object(run.evaluation.get("store"))
    span = run.evaluation.get("contexts")
    known: list[tuple[str, Any]] = [
        ("folder", run.folder),
        ("store", store.get("path")),
        ("identity of the store", scored.get("identity") if scored.get("trained_from") else None),
        *((f"read: {what}", digest) for what, digest in read.items()),
        ("model", store.get("model")),
        ("data", store.get("dataset")),
        ("hook point", store.get("hook_point")),
        ("layer", run.setting("layer")),
        ("contexts trained on", store.get("training_contexts")),
        ("scored contexts that it was trained on", run.n_seen_contexts),
        (
            "contexts scored on",
            ":".join(map(str, cast("list[Any]", span))) if isinstance(span, list) else None,
        ),
        ("scored on another store", scored.get("path") if run.is_of_another_store else None),
        ("posae", run.config.get("posae")),
        ("torch", run.config.get("torch")),
        ("device", run.config.get("device")),
    ]
    facts = [(name, str(value)) for name, value in known if value is not None]
    by_name = dict(facts)
    summary = ", ".join(
        f"{name} {by_name[key]}" if name else by_name[key]
        for name, key in (("", "model"), ("on", "data"), ("layer", "layer"), ("store", "store"))
        if key in by_name
    )
    settings = [
        (name, _value(value), _other(defaults.get(name), value)) for name, value in run.settings.items()
    ]
    d_model = run.d_model
    options = arguments(run.settings, d_model) if d_model and run.settings else None
    path = store.get("path")
    command = None
    if options is not None and isinstance(path, str):
        command = shlex.join(["posae", "train", path, run.folder, *options])
    return Provenance(label, summary, facts, settings, command)


def section(runs: Sequence[Provenance]) -> str:
    """HTML of all runs, folded where there are many."""
    return "".join(_run(run, is_open=len(runs) <= _OPEN) for run in runs)


def _run(run: Provenance, *, is_open: bool) -> str:
    differ = [
        (name, f"{value}  (default {default})")
        for name, value, default in run.settings
        if default is not None
    ]
    command = (
        f'<pre class="command">{html.escape(run.command)}</pre>'
        if run.command
        else '<p class="about">No command of this version of posae gives all of its settings.</p>'
    )
    return (
        f'<details class="run"{" open" if is_open else ""}>'
        f"<summary><b>{html.escape(run.label)}</b> {html.escape(run.summary)}</summary>\n"
        f'{command}<div class="beside"><div>{_table(run.facts)}</div>'
        f"<div><h3>Settings that are not the defaults</h3>{_table(differ)}"
        f"<details><summary>All settings</summary>"
        f"{_table((name, value) for name, value, _ in run.settings)}</details></div></div></details>\n"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    inner = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows
    )
    return f'<table class="facts">{inner}</table>\n'


def _object(value: Any) -> Mapping[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _other(default: Any, value: Any) -> str | None:
    """The default, where the value differs; None also for settings that training fills in."""
    return None if default is None or default == value else _value(default)


def _value(value: Any) -> str:
    """A setting, about as a TOML file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
