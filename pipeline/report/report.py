"""What runs and sweeps show: read from their folders, set beside each other, and judged.

A folder with a ``sweep.json`` is a sweep, any other a run. Nothing is computed again: a report costs the
reading of the runs' JSON files. A run without scores stays in the report, with the reason.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ...store.errors import SettingsError
from ...store.files import StoreFiles
from ...store.seal import ROOT_PATH
from ..errors import RunError, RunNotFoundError
from ..runs import EVALUATION, Run, runs_below
from . import tables
from .comparison import Finding, findings
from .markdown import markdown
from .measured import Measured, Study, StudyRun
from .notes import Note, left_out, notes
from .page.explored import Explored, Unexplored
from .paper.claims import Judged, judged
from .provenance import Provenance, provenance
from .tables import Series, Table
from .verdicts import Interval

SWEEP = "sweep.json"


class _Run(BaseModel):
    name: str
    seed: int
    folder: str
    control: Literal["agnostic", "shared", "shuffled", "more-active"] | None = None
    of: str | None = None
    has_adapters: bool | None = None


class _Study(BaseModel):
    study: str
    title: str
    claim: str | None = None
    runs: list[_Run]


class _Sweep(BaseModel):
    studies: list[_Study]


@dataclass(frozen=True)
class Report:
    """All that is known of some runs.

    Attributes:
        runs: each once: those named by themselves, and those of the studies.
        studies: of the sweeps.
        findings: whether position helped, for each run that has controls.
        claims: of the paper, judged; empty where no sweep is.
    """

    runs: Sequence[Measured]
    studies: Sequence[Study] = ()
    findings: Sequence[Finding] = ()
    claims: Sequence[Judged] = ()

    @property
    def missing(self) -> dict[str, str]:
        """Runs without scores, and why, by folder."""
        return {run.folder: run.missing for run in self.runs if run.missing is not None}

    def notes(self) -> list[Note]:
        """What a reader of the tables should know: what cannot be compared, is bad, or is left out."""
        n_left_out = sum(not claim.is_asked for claim in self.claims)
        shows_claims = 0 < n_left_out < len(self.claims)
        return [*notes(self.runs), *([left_out(n_left_out)] if shows_claims else [])]

    def series(self) -> list[Series]:
        """What is a row of a table, or a line of a figure: a run, or all seeds of one."""
        of_studies = tables.series_of_studies(self.studies)
        there = {run.folder for one in of_studies for run in one.runs}
        return [*of_studies, *tables.series_of_runs(run for run in self.runs if run.folder not in there)]

    def measurements(self) -> list[Table]:
        """What was measured, in tables."""
        found = [tables.scores(self.series()), *tables.by_range(self.series())]
        found += [tables.of_study(study) for study in self.studies]
        return [table for table in found if table.rows]

    def written(self) -> list[Table]:
        """The same with what a terminal has no room for: CE-loss recovered and probing."""
        return [*self.measurements(), *tables.beyond(self.series())]

    def named(self) -> list[tuple[str, Path]]:
        """What each row of a table is called, and the folder of its run; of several seeds the first."""
        return [(one.label, Path(one.runs[0].folder)) for one in self.series()]

    def provenance(self) -> list[Provenance]:
        """Where each run with scores comes from."""
        # Architectures need torch, and pages alone need architectures.
        from ..sae.run_settings import all_declared
        from ..sae.words import train_words

        defaults = {name: field.default for name, field in all_declared().items()}
        return [
            provenance(
                one.label if len(one.runs) == 1 else f"{one.label}, seed {run.setting('seed')}",
                run,
                defaults,
                train_words,
            )
            for one in self.series()
            for run in one.runs
        ]

    def answers(self) -> list[Table]:
        """What is missing, and what follows from what is there."""
        found = [tables.missing(self.runs), tables.position(self.findings), tables.claims(self.claims)]
        return [table for table in found if table.rows]


def collect(folders: Iterable[Path]) -> Report:
    """Read runs and sweeps.

    Raises:
        RunNotFoundError: a folder is no run and no sweep, or none of all has scores.
        RunError: a file is not what posae writes.
    """
    runs: dict[str, Measured] = {}
    studies: list[Study] = []
    for folder in folders:
        if (folder / SWEEP).exists():
            for study in _studies(folder, runs):
                studies.append(study)
        else:
            runs[str(folder)] = _run(folder, is_named=True)
    unscored = [run for run in runs.values() if run.missing]
    if unscored and len(unscored) == len(runs):
        raise RunNotFoundError(f"{unscored[0].folder} {unscored[0].missing}")
    claims = judged(studies) if studies else []
    return Report(tuple(runs.values()), tuple(studies), tuple(findings(studies)), tuple(claims))


def _no_run(folder: Path) -> str:
    """What a folder is where it is no run, and what to do."""
    if not folder.exists():
        return "is not there; give folders of runs, or of sweeps"
    if not folder.is_dir():
        return "is a file, not a run; give folders of runs, or of sweeps"
    if (folder / ROOT_PATH).exists():
        return f"is a store, not a run; train one from it: posae train {folder} RUN"
    if found := runs_below(folder):
        return f"is no run; runs lie below, give these: {folder}/{found}"
    for below in ("*", "*/*"):
        for name, what in ((EVALUATION, "runs"), (SWEEP, "sweeps")):
            if next(folder.glob(f"{below}/{name}"), None):
                return f"is no run; {what} lie below, give these: {folder}/{below}"
    return "is no run; train one: posae train STORE RUN"


def _run(folder: Path, *, is_named: bool = False) -> Measured:
    """What a run's files say; where it is not one that posae began, that it is missing.

    Args:
        folder: of the run.
        is_named: whether somebody named the folder; one that a sweep names was not begun yet.
    """
    run = Run(folder)
    if not (folder / EVALUATION).exists():
        if is_named and not run.is_begun and not run.is_finished:
            return Measured(str(folder), metrics=run.metrics(), missing=_no_run(folder))
        begin = f"run posae evaluate {folder}"
        if not run.is_finished:
            begin = "run posae train again, it goes on" if run.is_begun else "train it first"
        missing = f"has no scores yet; {begin}"
        config = run.config if run.is_begun else {}
        return Measured(str(folder), config, metrics=run.metrics(), missing=missing)
    config = run.config if run.is_begun else {}
    return Measured(str(folder), config, run.evaluation, run.metrics())


def _studies(folder: Path, runs: dict[str, Measured]) -> Iterable[Study]:
    path = folder / SWEEP
    try:
        sweep = _Sweep.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise RunError(f"{path} cannot be read: {problem}; run posae train --sweep again") from None
    for study in sweep.studies:
        entries: list[StudyRun] = []
        for entry in study.runs:
            place = folder / _inside(path, entry.folder)
            if str(place) not in runs:
                runs[str(place)] = _run(place)
            run = runs[str(place)]
            entries.append(StudyRun(entry.name, entry.seed, run, entry.control, entry.of, entry.has_adapters))
        yield Study(study.study, study.title, tuple(entries), study.claim)


def _inside(path: Path, folder: str) -> str:
    """A folder that a sweep names, unless it leads out of the sweep's own."""
    parts = PurePosixPath(folder).parts
    if not parts or PurePosixPath(folder).is_absolute() or ".." in parts:
        raise RunError(f"{path} names a folder outside its own, {folder!r}; it is not from posae")
    return folder


def as_json(report: Report) -> list[Any] | dict[str, Any]:
    """All of a report as JSON: of plain runs a list of their scores, else an object with all there is.

    A run that a note is about has the note among its scores, under ``notes``.
    """
    told = notes(report.runs)
    scores = [_scores(run, [note.words for note in told if run.folder in note.runs]) for run in report.runs]
    if not report.studies:
        return scores
    return {
        "runs": scores,
        "studies": [
            {
                "study": study.study,
                "title": study.title,
                "claim": study.claim,
                "runs": [
                    {"name": e.name, "seed": e.seed, "run": e.run.folder, "control": e.control, "of": e.of}
                    for e in study.runs
                ],
            }
            for study in report.studies
        ],
        "position": [
            {
                "study": f.study,
                "run": f.name,
                "answer": f.answer.value,
                "words": f.words,
                "gain": _interval(f.gain),
                "gains": {name: _interval(gain) for name, gain in f.gains.items()},
                "missing": list(f.missing),
            }
            for f in report.findings
        ],
        "claims": [
            {
                "claim": c.claim.name,
                "says": c.claim.says,
                "measured": c.claim.measured,
                "study": c.claim.study,
                "answer": c.verdict.answer.value,
                "reason": c.verdict.reason,
            }
            for c in report.claims
        ],
        "missing": [{"run": folder, "reason": reason} for folder, reason in report.missing.items()],
    }


def _scores(run: Measured, told: Sequence[str]) -> dict[str, Any]:
    found = {"missing": run.missing} if run.missing else run.evaluation
    return {"run": run.folder, **found, **({"notes": told} if told else {})}


def _interval(found: Interval | None) -> dict[str, float | int | None] | None:
    if found is None:
        return None
    ends = {
        name: end if math.isfinite(end) else None for name, end in (("low", found.low), ("high", found.high))
    }
    return {"mean": found.mean, **ends, "seeds": found.n}


def write(report: Report, path: Path, explored: Sequence[Explored | Unexplored] = ()) -> None:
    """Write a report to a file: a page with figures, or Markdown, by the name's ending.

    Args:
        report: what is written.
        path: ends in .html or .md.
        explored: features that a page shows besides.

    Raises:
        SettingsError: another ending.
        StoreWriteError: the disk refused.
    """
    if path.suffix == ".html":
        from .page.page import page

        text = page(
            report.answers(),
            report.series(),
            report.written(),
            explored,
            report.provenance(),
            report.notes(),
        )
    elif path.suffix == ".md":
        text = markdown([*report.written(), *report.answers()], report.notes())
    else:
        raise SettingsError(
            f"{path} is neither a page (.html) nor Markdown (.md); give it one of these endings"
        )
    files = StoreFiles(path.parent)
    files.make_root()
    files.write(path.name, text.encode())
