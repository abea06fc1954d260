"""Sweep files: their keys, and the runs they define, each in its own folder.

    include = ["layer-norm.toml"]   other sweep files, relative to this one
    study = "layer-norm"            the question of these runs: a name, a title, and the claim
    title = "LayerNorm and the variance of the gradient"
    claim = "Layer normalization … reduces gradient variance by 3.2x"
    seeds = [0, 1, 2]               each run once per seed, which sets its seed and its data_seed
    controls = true                 train all controls of position-aware runs; or only ["agnostic"]

    [evaluate]                      scoring settings, as in any TOML file of posae: probing = "offline"
    [train]                         settings of all runs, likewise; may name a preset
    [runs.paper]                    settings of this run only
    [runs.no-layer-norm]
    layer_norm = "none"

Precedence, lowest first: default, preset, ``[train]``, the run's own table, option. ``[train]``,
``[evaluate]``, ``seeds`` and ``controls`` of an including file override those of the included one.

All settings are resolved, and the size of every control computed, before anything is trained. Runs with equal
settings are trained once, whatever their names and studies. No torch here: the caller resolves settings on a
store and counts parameters.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import Field

from ... import __version__
from ...store.errors import SettingsError
from ...store.files import StoreFiles
from ..errors import RunError
from ..sae.run_settings import all_declared, resolve_train_settings, settings_class
from ..settings import EvaluateSettings, Settings, TrainSettings, build, nearest, read_toml
from .controls import CONTROLS, controls_of, has_adapters, is_position_aware

SWEEP = "sweep.json"
"""File in a sweep's folder that lists its studies, runs and controls."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SweepFile(Settings):
    """The keys of a sweep file."""

    include: tuple[str, ...] = ()
    """Other sweep files, relative to this one."""

    study: str | None = None
    """Name of the study that the runs of this file belong to."""

    title: str | None = None
    """Title of the study; by default its name."""

    claim: str | None = None
    """The claim that the study tests, quoted."""

    seeds: tuple[int, ...] | None = None
    """Each run is trained once per seed; by default with seed 0."""

    controls: bool | tuple[str, ...] | None = None
    """Whether to train the controls of position-aware runs, or a list of them; by default all."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Settings that all runs share."""

    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Settings of scoring."""

    runs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of each run, by its name."""


class Study(NamedTuple):
    """The runs of one sweep file, or of one call."""

    source: str
    """The file or folder, for messages."""
    name: str
    title: str
    claim: str | None
    runs: dict[str, TrainSettings]
    """Settings by name of the run; their seeds are ignored."""
    seeds: tuple[tuple[int, int], ...]
    """Pairs of the seeds of initialisation and of data."""
    controls: tuple[str, ...] = CONTROLS
    """Controls to train with position-aware runs."""
    scoring: EvaluateSettings = EvaluateSettings()
    """Settings of scoring, for runs and controls."""


class _Unresolved(NamedTuple):
    """A study before its settings are resolved."""

    file: Path
    name: str
    title: str
    claim: str | None
    seeds: tuple[int, ...] | None
    controls: bool | tuple[str, ...] | None
    shared: dict[str, Any]
    scoring: dict[str, Any]
    runs: dict[str, dict[str, Any]]

    def resolved(self, options: Mapping[str, Any], controls: bool | None) -> Study:
        options = {name: value for name, value in options.items() if value is not None}
        seeds = (options.pop("seed"),) if "seed" in options else self.seeds or (0,)
        runs: dict[str, TrainSettings] = {}
        for name, own in self.runs.items():
            with _naming(f"{self.file}, run {name!r}"):
                runs[name] = resolve_train_settings(config={**self.shared, **own}, options=options)
        chosen = self.controls if controls is None else controls
        if chosen is None or isinstance(chosen, bool):
            chosen = () if chosen is False else CONTROLS
        pairs = tuple((seed, seed) for seed in seeds)
        scoring = build(EvaluateSettings, self.scoring, f"{self.file}: [evaluate]")
        return Study(str(self.file), self.name, self.title, self.claim, runs, pairs, chosen, scoring)


class Planned(NamedTuple):
    """One run of a sweep."""

    name: str
    seed: int
    folder: str
    """Relative to the sweep's folder."""
    settings: TrainSettings
    """Resolved on the store."""
    n_parameters: int

    @property
    def cost(self) -> int:
        """Relative amount of work."""
        return self.settings.steps * self.settings.batch_size * self.n_parameters


class Fitted(NamedTuple):
    """Settings resolved on a store."""

    settings: TrainSettings
    """Without open choices."""
    n_parameters: int


Fit = Callable[[TrainSettings], Fitted]
"""Resolves settings on the store; raises SettingsError if they do not fit it."""


def read_sweep(path: Path, options: Mapping[str, Any], controls: bool | None = None) -> list[Study]:
    """The studies of a sweep file and of all that it includes.

    Args:
        path: the file.
        options: settings from the command line, which override the file; None means not given. A ``seed``
            replaces all seeds of the file.
        controls: overrides the files unless None.

    Raises:
        SettingsError: the file is missing or not TOML, has an unknown key, includes itself or has no runs; a
            name is invalid or used twice; seeds are set other than by ``seeds``; or settings are invalid.
            Names the file and the run.
    """
    if options.get("data_seed") is not None:
        raise SettingsError("a sweep uses each seed as data seed too; leave out --data-seed")
    studies = list(_read(path, ()))
    if not studies:
        raise SettingsError(f"{path} has no runs; add tables [runs.NAME], or include a file with runs")
    seen: dict[str, Path] = {}
    for study in studies:
        if study.name in seen:
            raise SettingsError(
                f"study {study.name!r} occurs twice, in {seen[study.name]} and {study.file}; "
                "give each study its own name, and include each file once"
            )
        seen[study.name] = study.file
    return [study.resolved(options, controls) for study in studies]


def _read(path: Path, above: tuple[Path, ...]) -> Iterator[_Unresolved]:
    if path.resolve() in [file.resolve() for file in above]:
        raise SettingsError(
            f"{path} includes itself: {' > '.join(map(str, (*above, path)))}; remove one of these includes"
        )
    table = read_toml(path)
    for name in table:
        if name in {"preset", *all_declared()} - {"seed", "data_seed"}:
            raise SettingsError(f"{path}: {name} is outside of a table; put it under [train]")
    parsed = build(SweepFile, table, f"{path}:")
    seeds = parsed.seeds
    if seeds is not None and (not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds)):
        raise SettingsError(f"{path}: seeds must be distinct integers from 0 up, at least one")
    for name in parsed.controls if isinstance(parsed.controls, tuple) else ():
        if name not in CONTROLS:
            raise SettingsError(f"{path}: unknown control {name!r}; {nearest(name, CONTROLS)}")
    for values in (parsed.train, *parsed.runs.values()):
        for name in ("seed", "data_seed"):
            if name in values:
                raise SettingsError(f"{path}: {name} is not a setting of a sweep; use the list seeds")
    for included in parsed.include:
        for study in _read(path.parent / included, (*above, path)):
            yield study._replace(
                shared={**study.shared, **parsed.train},
                scoring={**study.scoring, **parsed.evaluate},
                seeds=study.seeds if parsed.seeds is None else parsed.seeds,
                controls=study.controls if parsed.controls is None else parsed.controls,
            )
    if not parsed.runs:
        return
    if parsed.study is None:
        raise SettingsError(f"{path} has runs but no name for their study; add the key study")
    for name in (parsed.study, *parsed.runs):
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"{path}: {name!r} is not a valid name; use up to 64 letters, digits, - and _"
            )
    title = parsed.title or parsed.study
    yield _Unresolved(
        path,
        parsed.study,
        title,
        parsed.claim,
        seeds,
        parsed.controls,
        parsed.train,
        parsed.evaluate,
        parsed.runs,
    )


class Plan:
    """All runs of a sweep, and their roles.

    Attributes:
        studies: the studies in the form of ``sweep.json``.
        scoring: scoring settings by folder; the union if several studies share a run.
    """

    def __init__(self, studies: Sequence[Study], fit: Fit) -> None:
        """Resolve all runs on the store, and derive their controls.

        Args:
            studies: for example from ``read_sweep``.
            fit: resolves each run, and the sizes of controls.

        Raises:
            SettingsError: a run's settings do not fit the store, or two runs of the same name differ.
        """
        self._fit = fit
        self._by_settings: dict[TrainSettings, Planned] = {}
        self._by_name: dict[tuple[str, int], Planned] = {}
        self.studies: list[dict[str, Any]] = []
        self.scoring: dict[str, EvaluateSettings] = {}
        for study in studies:
            about = {"study": study.name, "title": study.title, "claim": study.claim}
            entries = list(self._entries(study))
            self.studies.append({**about, "runs": entries})
            asked = study.scoring.model_dump(exclude_unset=True)
            for entry in entries:
                before = self.scoring.get(entry["folder"], EvaluateSettings())
                self.scoring[entry["folder"]] = EvaluateSettings.model_validate(
                    before.model_dump(exclude_unset=True) | asked
                )

    def _entries(self, study: Study) -> Iterator[dict[str, Any]]:
        for name, settings in study.runs.items():
            with _naming(f"{study.source}, run {name!r}"):
                run = self._fit(settings)
                is_aware = is_position_aware(run.settings.model_dump())
                with_controls = is_aware and bool(study.controls)
                about = {"has_adapters": has_adapters(run.settings.model_dump())} if with_controls else {}
                yield from (self._entry(name, run, pair) | about for pair in study.seeds)
                if not is_aware:
                    continue
                for control, fitted in self._controls(run.settings, study.controls).items():
                    about = {"control": control, "of": name}
                    for pair in study.seeds:
                        yield self._entry(f"{name}.{control}", fitted, pair) | about

    def _controls(self, settings: TrainSettings, names: Sequence[str]) -> dict[str, Fitted]:
        if not names:
            return {}

        def fitted(values: Mapping[str, Any]) -> Fitted:
            # Not validated again: what is resolved names both a share and its steps.
            fields_set = settings.model_fields_set & values.keys()
            return self._fit(settings_class(values).model_construct(fields_set, **values))

        controls = controls_of(settings.model_dump(), lambda values: fitted(values).n_parameters)
        return {control: fitted(values) for control, values in controls.items() if control in names}

    def _entry(self, name: str, fitted: Fitted, seeds: tuple[int, int]) -> dict[str, Any]:
        seed, data_seed = seeds
        settings = fitted.settings.model_copy(update={"seed": seed, "data_seed": data_seed})
        candidate = Planned(name, seed, f"{name}/seed-{seed}", settings, fitted.n_parameters)
        planned = self._by_settings.setdefault(settings, candidate)
        before = self._by_name.setdefault((name, seed), planned)
        if before is not planned:
            old, new = before.settings.model_dump(), settings.model_dump()
            differ = ", ".join(key for key in new if new[key] != old.get(key))
            raise SettingsError(f"another run of this name has a different {differ}; rename one of them")
        return {"name": name, "seed": seed, "folder": planned.folder, "control": None, "of": None}

    @property
    def trainings(self) -> list[Planned]:
        """All runs, each once, by seed: an interrupted sweep then has all runs of the first seeds."""
        return sorted(self._by_settings.values(), key=lambda planned: planned.seed)

    def write(self, folder: Path) -> None:
        """Write the studies to ``sweep.json``; studies of other names from an earlier sweep stay.

        Raises:
            RunError: there is a ``sweep.json`` of something else.
            StoreWriteError: the disk refused.
        """
        studies = {study.get("study"): study for study in (*_studies_in(folder), *self.studies)}
        content = {"posae": __version__, "studies": list(studies.values())}
        data = (json.dumps(content, indent=1) + "\n").encode()
        files = StoreFiles(folder)
        files.make_root()
        if not (folder / SWEEP).exists() or (folder / SWEEP).read_bytes() != data:
            files.write(SWEEP, data)


def _studies_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / SWEEP
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it; this keeps the runs") from None
    studies = content.get("studies") if isinstance(content, dict) else None  # pyright: ignore
    if not isinstance(studies, list) or not all(isinstance(study, dict) for study in studies):  # pyright: ignore
        raise RunError(f"{path} has no studies; remove it; this keeps the runs")
    return cast("list[dict[str, Any]]", studies)


@contextmanager
def _naming(place: str) -> Generator[None]:
    """Prefix an error with the run and its file."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None
