"""The folder of a run: which file holds what, and what a resumed run must agree with.

    config.json                 settings, the store that was read and its digests, versions
    metrics.jsonl               a line every log_steps
    checkpoint/state.safetensors  weights, optimizer and generator, to resume from
    base_phase.safetensors      the decoder at the end of the warm-up, for comparison
    sae_weights.safetensors, cfg.json   the trained autoencoder
    evaluation.json             scores on the held-out part
    evaluation-IDENTITY.json    earlier scores on another store

Every file is written whole or not at all, and nothing in it is pickled.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors.torch
from torch import Tensor

from ...store.files import StoreFiles, exclusive, is_leftover, writing
from ...store.manifest import Manifest, root_json
from ...store.notebook import block, facts
from ...store.plain_text import differences
from ...store.reader import ActivationStore
from ...store.seal import pretty_json
from ..errors import RunError, RunMismatchError, RunNotFoundError
from .checkpoint import UNREADABLE, checkpoint_pieces, read_checkpoint, read_step
from .notebook import as_object, run_html

T = TypeVar("T")

CONFIG, METRICS, EVALUATION = "config.json", "metrics.jsonl", "evaluation.json"
CHECKPOINT = "checkpoint/state.safetensors"
BASE_PHASE = "base_phase.safetensors"
WEIGHTS = "sae_weights.safetensors"

_SETTING = "settings."
_FOLLOWS = {f"{_SETTING}{name}" for name in ("warmup_steps", "ramp_steps", "adapter_width")}


class Run:
    """The folder of a run."""

    def __init__(self, folder: Path) -> None:
        """Refer to ``folder``; nothing is read yet."""
        self.folder = folder
        self._files = StoreFiles(folder)

    @property
    def is_begun(self) -> bool:
        """Whether the folder has a configuration, so that the run can be resumed."""
        return (self.folder / CONFIG).exists()

    @property
    def is_finished(self) -> bool:
        """Whether training is done."""
        return (self.folder / WEIGHTS).exists() and (self.folder / "cfg.json").exists()

    @property
    def config(self) -> dict[str, Any]:
        """The contents of ``config.json``.

        Raises:
            RunNotFoundError: there is no run here.
            RunError: not JSON.
        """
        return self._read_json(
            CONFIG,
            missing=f"there is no run at {self.folder}; train one: posae train STORE {self.folder}",
            remedy="train the run again",
        )

    @property
    def evaluation(self) -> dict[str, Any]:
        """The contents of ``evaluation.json``.

        Raises:
            RunNotFoundError: the run was never evaluated.
            RunError: not JSON.
        """
        return self.scores(EVALUATION)

    def scores(self, name: str) -> dict[str, Any]:
        """The contents of a file of scores: ``evaluation.json``, or one that was set aside.

        Raises:
            RunNotFoundError: there is none.
            RunError: not JSON.
        """
        return self._read_json(
            name,
            missing=f"{self.folder} has no scores yet; run posae evaluate {self.folder}",
            remedy=f"score the run again: posae evaluate {self.folder}",
        )

    def _read_json(self, name: str, *, missing: str, remedy: str) -> dict[str, Any]:
        try:
            value = json.loads((self.folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise RunNotFoundError(missing) from None
        except (ValueError, RecursionError, OSError) as error:
            raise RunError(f"{self.folder / name} cannot be read: {error}; {remedy}") from None
        if not isinstance(value, dict):
            raise RunError(f"{self.folder / name} is no JSON object; {remedy}")
        return cast("dict[str, Any]", value)

    @contextmanager
    def locked(self, *, wait: bool = False) -> Generator[bool]:
        """Lock the run, so that no other process trains it.

        Yields whether it is locked: not if another process has the lock and ``wait`` is not set.

        Raises:
            StoreWriteError: the disk refused.
        """
        self._files.make_root()
        with exclusive(self.folder, wait=wait) as is_held:
            yield is_held

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, or check that the existing one is the same.

        Raises:
            RunMismatchError: the run was begun with other settings; names those that differ.
            RunError: the folder holds something else.
        """
        self.check(config)
        if not self.is_begun:
            self._files.make_root()
            self.write_json(CONFIG, config)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what ``begin`` would, and write nothing.

        Raises:
            RunMismatchError: the run was begun with other settings; names those that differ.
            RunError: the folder holds something else.
        """
        if self.is_begun:
            begun = self.config
            if ("imported" in begun) != ("imported" in config):
                raise RunMismatchError(f"{self.folder} is a run already; give another folder")
            differ = list(_differences(begun, json.loads(json.dumps(config))))
            if differ:
                # Settings that the user gave come first; the others often follow from these.
                differ.sort(key=lambda entry: (not entry[0].startswith(_SETTING), entry[0] in _FOLLOWS))
                named = differences([(name.removeprefix(_SETTING), *values) for name, *values in differ])
                raise RunMismatchError(
                    f"{self.folder} was begun differently: {named}; "
                    "use the same options to resume, or give another folder"
                )
        elif self.folder.exists() and not self._is_free():
            if runs_below(self.folder):
                raise RunError(
                    f"{self.folder} is no run, and it holds runs: add --controls or --sweep, or give another "
                    "folder"
                )
            raise RunError(f"{self.folder} exists and is not a run; give another folder")

    def _is_free(self) -> bool:
        """Whether a run can be begun in the folder: it holds at most what a lock or a kill left."""
        folder = self.folder
        return folder.is_dir() and all(is_leftover(path.name) for path in folder.iterdir())

    def unlike(self, store: ActivationStore, layer: int) -> list[str]:
        """Which parts of a store differ from what the run read: some of tokens, activations, statistics.

        If the store has no seal yet, or had none when the run was begun, its manifest is compared, on which
        all of these depend. Empty if the run records no store.
        """
        begun: dict[str, Any] = self.config.get("store", {})
        before: dict[str, str] = begun.get("read") or {}
        read = store.digests(layer)
        if before and read:
            names = {"tokens": "tokens", "stats": "statistics"}
            return [names.get(key, "activations") for key in read if before.get(key) != read[key]]
        is_same = begun.get("manifest") in (None, digest_of(store.manifest))
        return [] if is_same else ["text, model or settings"]

    def check_read(self, store: ActivationStore, layer: int, remedy: str) -> None:
        """Refuse a store that holds other bytes than the run read.

        Raises:
            RunMismatchError: names which of tokens, activations, statistics differ.
        """
        if differ := self.unlike(store, layer):
            raise RunMismatchError(
                f"{store.root} is not the store that {self.folder} was trained from: "
                f"other {', '.join(differ)}; {remedy}"
            )

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one of the JSON files.

        Raises:
            StoreWriteError: the disk refused.
        """
        self._files.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, without one that a kill cut short."""
        lines: list[dict[str, Any]] = []
        if (self.folder / METRICS).exists():
            for line in (self.folder / METRICS).read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after ``step``, which will be written again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self._files.write(METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
            StoreWriteError: the disk refused.
        """
        with writing(self.folder), (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the last checkpoint with one after ``step`` steps.

        Raises:
            StoreWriteError: the disk refused.
        """
        self._files.write_pieces(CHECKPOINT, checkpoint_pieces(step, tensors))

    def save_base_phase(self, decoder: Tensor) -> None:
        """Save the decoder [dictionary_size, d_model] as it is before position adapters are switched on.

        Raises:
            StoreWriteError: the disk refused.
        """
        data = safetensors.torch.save({"W_dec": decoder.detach().cpu().contiguous()})
        self._files.write(BASE_PHASE, data)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor]] | None:
        """Steps done and the tensors of the last checkpoint, or None if there is none.

        Raises:
            RunError: the file is damaged, or may not be read.
        """
        return self._from_checkpoint(read_checkpoint)

    @property
    def checkpoint_step(self) -> int | None:
        """Steps done at the last checkpoint, or None if there is none; reads the file's header alone.

        Raises:
            RunError: the file is damaged, or may not be read.
        """
        return self._from_checkpoint(read_step)

    def _from_checkpoint(self, read: Callable[[Path], T]) -> T | None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            return read(path)
        except UNREADABLE as error:
            raise self.no_checkpoint(str(error)) from None

    def no_checkpoint(self, why: str) -> RunError:
        """The error for a checkpoint that cannot be read or is of another run."""
        path = self.folder / CHECKPOINT
        return RunError(f"{path} cannot be read ({why}); remove it to train from the start")

    def __repr__(self) -> str:
        """A line for notebooks."""
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows; an error takes the place of what cannot be read.

        Costs reading two small files and the metrics.
        """
        try:
            config = self.config
        except RunError as error:
            return block(str(self.folder), facts({"state": str(error)}))
        try:
            evaluation = self.evaluation
        except RunNotFoundError:
            evaluation = "none yet"
        except RunError as error:
            evaluation = str(error)
        last_step = None
        if not self.is_finished:
            lines = self.metrics()
            last_step = as_object(lines[-1]).get("step", "-") if lines else 0
        return run_html(self.folder, config, last_step, evaluation)


def digest_of(manifest: Manifest) -> str:
    """The digest of a store's manifest, which a run records; a manifest never changes once shards exist."""
    return hashlib.sha256(pretty_json(root_json(manifest))).hexdigest()


def runs_below(folder: Path) -> str | None:
    """The pattern of runs below a folder, ``*`` or ``*/*``; None if there are none."""
    for below in ("*", "*/*"):
        if any(_is_configuration(path) for path in folder.glob(f"{below}/{CONFIG}")):
            return below
    return None


def _is_configuration(path: Path) -> bool:
    try:
        return {"settings", "store"} <= as_object(json.loads(path.read_bytes())).keys()
    except (ValueError, RecursionError, OSError):
        return False


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], place: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Name with the names above it, value before, value now."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(
                cast("dict[str, Any]", old), cast("dict[str, Any]", new), f"{place}{key}."
            )
        elif old != new:
            yield f"{place}{key}", old, new
