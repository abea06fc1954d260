"""Many trainings from one file: what a sweep file says, and which runs it gives, each in its own folder.

    include = ["layer-norm.toml"]   other sweep files, relative to this one
    study = "layer-norm"            what these runs are to tell: a name, a title, and what is claimed
    title = "LayerNorm and the variance of the gradient"
    claim = "Layer normalization … reduces gradient variance by 3.2x"
    seeds = [0, 1, 2]               each run once a seed, which is its seed and its data_seed
    controls = true                 set position-aware runs beside all their controls; or ["agnostic"]

    [evaluate]                      settings of all scoring, as in any TOML file of posae: probing = "offline"
    [train]                         settings of all runs, likewise; a preset too
    [runs.paper]                    what this run alone has
    [runs.no-layer-norm]
    layer_norm = "none"

Values come, later ones first, from: default < preset < ``[train]`` < the run's own < option. What an
including file says in ``[train]``, ``[evaluate]``, ``seeds`` and ``controls`` wins over what the included one
says there.

All is resolved, and every control's size found, before anything is trained. Runs of equal settings are one
training, whatever their names and in however many studies they are. What settings are on a store, and how
many parameters they give, is asked of the caller. A training knows nothing of its neighbours; whoever shares
a pass over the store among several needs only ``Plan.trainings``.
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
"""In the folder of a sweep: which run is whose control, of which study, and where."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SweepFile(Settings):
    """The keys of a sweep file."""

    include: tuple[str, ...] = ()
    """Other sweep files, relative to this one."""

    study: str | None = None
    """Name of the study that the runs of this file belong to."""

    title: str | None = None
    """The study in a few words; by default its name."""

    claim: str | None = None
    """What is claimed, word for word."""

    seeds: tuple[int, ...] | None = None
    """Each run is made once with each; by default with 0."""

    controls: bool | tuple[str, ...] | None = None
    """Whether position-aware runs are set beside their controls, or which of these; by default all."""

    train: dict[str, Any] = Field(default_factory=dict)
    """Settings that all runs share."""

    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Settings that they are scored with."""

    runs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings that each run has for itself, by its name."""


class Study(NamedTuple):
    """The runs of one sweep file, or of one call."""

    source: str
    """Where they are from, for messages."""
    name: str
    title: str
    claim: str | None
    runs: dict[str, TrainSettings]
    """By name; their seeds do not count."""
    seeds: tuple[tuple[int, int], ...]
    """Of initialisation, and of data."""
    controls: tuple[str, ...] = CONTROLS
    """Which are made of position-aware runs."""
    scoring: EvaluateSettings = EvaluateSettings()
    """What runs and controls are scored with."""


class _Given(NamedTuple):
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
        wanted = self.controls if controls is None else controls
        if wanted is None or isinstance(wanted, bool):
            wanted = () if wanted is False else CONTROLS
        pairs = tuple((seed, seed) for seed in seeds)
        scoring = build(EvaluateSettings, self.scoring, f"{self.file}: [evaluate]")
        return Study(str(self.file), self.name, self.title, self.claim, runs, pairs, wanted, scoring)


class Planned(NamedTuple):
    """One training of a sweep."""

    name: str
    seed: int
    folder: str
    """Below the folder of the sweep."""
    settings: TrainSettings
    """Resolved: nothing is left to the store."""
    n_parameters: int

    @property
    def cost(self) -> int:
        """How much work it is, in units that say nothing but compare."""
        return self.settings.steps * self.settings.batch_size * self.n_parameters


class Fitted(NamedTuple):
    """Settings on a store."""

    settings: TrainSettings
    """Nothing in them is left open."""
    n_parameters: int


Fit = Callable[[TrainSettings], Fitted]
"""What settings are on the store; raises SettingsError where they do not fit it."""


def read_sweep(path: Path, options: Mapping[str, Any], controls: bool | None = None) -> list[Study]:
    """The studies of a sweep file and of all that it includes.

    Args:
        path: the file.
        options: settings given on the command line, which win; None means not given. A ``seed`` is the only
            one then.
        controls: wins over the files where it is given.

    Raises:
        SettingsError: no such file or no TOML, an unknown key, files that include each other, a name that
            cannot be a folder's or stands twice, seeds set otherwise than by ``seeds``, no runs at all, or
            settings that are impossible; says which run of which file.
    """
    if options.get("data_seed") is not None:
        raise SettingsError("a sweep's runs have their seed as data seed too; leave --data-seed out")
    given = list(_read(path, ()))
    if not given:
        raise SettingsError(
            f"{path} has no runs; give it tables [runs.NAME], or include a file that has some"
        )
    seen: dict[str, Path] = {}
    for study in given:
        if study.name in seen:
            raise SettingsError(
                f"study {study.name!r} stands twice, in {seen[study.name]} and {study.file}; "
                "give each another name, and include each file once"
            )
        seen[study.name] = study.file
    return [study.resolved(options, controls) for study in given]


def _read(path: Path, above: tuple[Path, ...]) -> Iterator[_Given]:
    if path.resolve() in [file.resolve() for file in above]:
        raise SettingsError(
            f"{path} includes itself: {' > '.join(map(str, (*above, path)))}; break the circle"
        )
    found = read_toml(path)
    for name in found:
        if name in {"preset", *all_declared()} - {"seed", "data_seed"}:
            raise SettingsError(f"{path}: {name} stands outside of a table; put it under [train]")
    parsed = build(SweepFile, found, f"{path}:")
    seeds = parsed.seeds
    if seeds is not None and (not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds)):
        raise SettingsError(f"{path}: seeds are different whole numbers from 0, at least one")
    for name in parsed.controls if isinstance(parsed.controls, tuple) else ():
        if name not in CONTROLS:
            raise SettingsError(f"{path}: there is no control {name!r}; {nearest(name, CONTROLS)}")
    for values in (parsed.train, *parsed.runs.values()):
        for name in ("seed", "data_seed"):
            if name in values:
                raise SettingsError(f"{path}: {name} is set by the list seeds, for all runs alike")
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
        raise SettingsError(f"{path} has runs and no name for them; give it a key study")
    for name in (parsed.study, *parsed.runs):
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"{path}: {name!r} cannot be a folder's name; take up to 64 letters, digits, - and _"
            )
    title = parsed.title or parsed.study
    yield _Given(
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
    """All trainings of a sweep, and what each stands for.

    Attributes:
        studies: as ``sweep.json`` has them.
        scoring: what each folder's run is scored with; of several studies that share it, all that any asks.
    """

    def __init__(self, studies: Sequence[Study], fit: Fit) -> None:
        """Resolve all runs on the store, and find their controls.

        Args:
            studies: from ``read_sweep``, or made.
            fit: asked for each run, and for sizes of controls.

        Raises:
            SettingsError: a run's settings do not fit the store, or two runs of one name differ; says which.
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
                for control, found in self._controls(run.settings, study.controls).items():
                    about = {"control": control, "of": name}
                    for pair in study.seeds:
                        yield self._entry(f"{name}.{control}", found, pair) | about

    def _controls(self, settings: TrainSettings, wanted: Sequence[str]) -> dict[str, Fitted]:
        if not wanted:
            return {}

        def fitted(values: Mapping[str, Any]) -> Fitted:
            # Not validated again: what is resolved names both a share and its steps.
            were_set = settings.model_fields_set & values.keys()
            return self._fit(settings_class(values).model_construct(were_set, **values))

        found = controls_of(settings.model_dump(), lambda values: fitted(values).n_parameters)
        return {control: fitted(values) for control, values in found.items() if control in wanted}

    def _entry(self, name: str, fitted: Fitted, seeds: tuple[int, int]) -> dict[str, Any]:
        seed, data_seed = seeds
        settings = fitted.settings.model_copy(update={"seed": seed, "data_seed": data_seed})
        wanted = Planned(name, seed, f"{name}/seed-{seed}", settings, fitted.n_parameters)
        planned = self._by_settings.setdefault(settings, wanted)
        before = self._by_name.setdefault((name, seed), planned)
        if before is not planned:
            old, new = before.settings.model_dump(), settings.model_dump()
            differ = ", ".join(key for key in new if new[key] != old.get(key))
            raise SettingsError(
                f"another run of this name has another {differ}; give one of them another name"
            )
        return {"name": name, "seed": seed, "folder": planned.folder, "control": None, "of": None}

    @property
    def trainings(self) -> list[Planned]:
        """Each once. The first seed of all comes first: what is interrupted has told most by then."""
        return sorted(self._by_settings.values(), key=lambda planned: planned.seed)

    def write(self, folder: Path) -> None:
        """Put the studies into ``sweep.json``; those of an earlier sweep that have other names stay.

        Raises:
            RunError: another ``sweep.json`` is there.
            StoreWriteError: the disk refused.
        """
        studies = {study.get("study"): study for study in (*_studies_in(folder), *self.studies)}
        found = {"posae": __version__, "studies": list(studies.values())}
        data = (json.dumps(found, indent=1) + "\n").encode()
        files = StoreFiles(folder)
        files.make_root()
        if not (folder / SWEEP).exists() or (folder / SWEEP).read_bytes() != data:
            files.write(SWEEP, data)


def _studies_in(folder: Path) -> list[dict[str, Any]]:
    path = folder / SWEEP
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it, the runs beside it stay") from None
    studies = found.get("studies") if isinstance(found, dict) else None  # pyright: ignore
    if not isinstance(studies, list) or not all(isinstance(study, dict) for study in studies):  # pyright: ignore
        raise RunError(f"{path} has no studies; remove it, the runs beside it stay")
    return cast("list[dict[str, Any]]", studies)


@contextmanager
def _naming(place: str) -> Generator[None]:
    """Say which run of which file an error is about."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None
