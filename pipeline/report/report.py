"""A report on runs and sweeps: read from their folders, compared, and judged.

A folder with a ``sweep.json`` is a sweep, any other a run. A report reads the JSON files of runs and computes
no scores. A run without scores stays in the report, with the reason.
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
    """Everything that a report shows.

    Attributes:
        runs: each once: those named by themselves, and those of the studies.
        studies: of the sweeps.
        findings: whether position helped, for each run that has controls.
        claims: of the paper, judged; empty without a sweep.
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
        """Notes on scores that cannot be compared, are not held out, or are bad; and on claims left out."""
        n_left_out = sum(not claim.is_asked for claim in self.claims)
        shows_claims = 0 < n_left_out < len(self.claims)
        return [*notes(self.runs), *([left_out(n_left_out)] if shows_claims else [])]

    def series(self) -> list[Series]:
        """Rows of tables and lines of figures: a run, or all seeds of one."""
        of_studies = tables.series_of_studies(self.studies)
        in_studies = {run.folder for one in of_studies for run in one.runs}
        return [*of_studies, *tables.series_of_runs(run for run in self.runs if run.folder not in in_studies)]

    def measurements(self) -> list[Table]:
        """Tables of what was measured."""
        measured = [tables.scores(self.series()), *tables.by_range(self.series())]
        measured += [tables.of_study(study) for study in self.studies]
        return [table for table in measured if table.rows]

    def written(self) -> list[Table]:
        """The same with tables that do not fit a terminal: CE-loss recovered and probing."""
        return [*self.measurements(), *tables.beyond(self.series())]

    def named(self) -> list[tuple[str, Path]]:
        """The label of each row and the folder of its run, of several seeds the first."""
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
        """Tables of runs without scores, and of verdicts."""
        answers = [tables.missing(self.runs), tables.position(self.findings), tables.claims(self.claims)]
        return [table for table in answers if table.rows]


def collect(folders: Iterable[Path]) -> Report:
    """Read runs and sweeps.

    Raises:
        RunNotFoundError: a folder is neither a run nor a sweep, or no run has scores.
        RunError: a file is not one that posae wrote.
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
    """What a folder is that is not a run, and what to do."""
    if not folder.exists():
        return "does not exist; name folders of runs or sweeps"
    if not folder.is_dir():
        return "is a file, not a run; name folders of runs or sweeps"
    if (folder / ROOT_PATH).exists():
        return f"is a store, not a run; train one from it: posae train {folder} RUN"
    if pattern := runs_below(folder):
        return f"is not a run, but contains runs; name these: {folder}/{pattern}"
    for below in ("*", "*/*"):
        for name, what in ((EVALUATION, "runs"), (SWEEP, "sweeps")):
            if next(folder.glob(f"{below}/{name}"), None):
                return f"is not a run, but contains {what}; name these: {folder}/{below}"
    return "is not a run; train one: posae train STORE RUN"


def _run(folder: Path, *, is_named: bool = False) -> Measured:
    """What a run's files say, or why it has no scores.

    Args:
        folder: of the run.
        is_named: whether the user named the folder; one that only a sweep names may not be started yet.
    """
    run = Run(folder)
    if not (folder / EVALUATION).exists():
        if is_named and not run.is_begun and not run.is_finished:
            return Measured(str(folder), metrics=run.metrics(), missing=_no_run(folder))
        remedy = f"run posae evaluate {folder}"
        if not run.is_finished:
            remedy = "run posae train again to resume it" if run.is_begun else "train it first"
        missing = f"has no scores yet; {remedy}"
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
    """The folder of a run, which must lie inside the sweep's."""
    parts = PurePosixPath(folder).parts
    if not parts or PurePosixPath(folder).is_absolute() or ".." in parts:
        raise RunError(f"{path} names a folder outside its own, {folder!r}; posae did not write it")
    return folder


def as_json(report: Report) -> list[Any] | dict[str, Any]:
    """A report as JSON: without sweeps a list of each run's scores, else an object with everything.

    Notes on a run are among its scores, under ``notes``.
    """
    on_runs = notes(report.runs)
    scores = [_scores(run, [note.text for note in on_runs if run.folder in note.runs]) for run in report.runs]
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
                "words": f.reason,
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


def _scores(run: Measured, on_run: Sequence[str]) -> dict[str, Any]:
    scores = {"missing": run.missing} if run.missing else run.evaluation
    return {"run": run.folder, **scores, **({"notes": on_run} if on_run else {})}


def _interval(gain: Interval | None) -> dict[str, float | int | None] | None:
    if gain is None:
        return None
    ends = {
        name: end if math.isfinite(end) else None for name, end in (("low", gain.low), ("high", gain.high))
    }
    return {"mean": gain.mean, **ends, "seeds": gain.n}


def write(report: Report, path: Path, explored: Sequence[Explored | Unexplored] = ()) -> None:
    """Write a report to a file: a page with figures (.html), or Markdown (.md).

    Args:
        report: to write.
        path: ends in .html or .md.
        explored: features that a page shows.

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
        raise SettingsError(f"{path} is neither a page (.html) nor Markdown (.md); use one of these endings")
    files = StoreFiles(path.parent)
    files.make_root()
    files.write(path.name, text.encode())
