"""A run: the folder of one training, and what lies where in it.

    config.json                 settings, the store that was read and its digests, versions
    metrics.jsonl               a line every log_steps
    checkpoint/state.safetensors  weights, optimizer and generator, to go on from
    base_phase.safetensors      the decoder at the end of the warm-up, to see what became of it
    sae_weights.safetensors, cfg.json   the autoencoder, once training is done
    evaluation.json             scores on the held-out part
    evaluation-IDENTITY.json    the same on another store, before it was scored on that one

Every file is written whole or not at all, and nothing in it is pickled.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..store.files import StoreFiles, exclusive, is_leftover, writing
from ..store.manifest import Manifest, root_json
from ..store.notebook import block, columns, facts, folded
from ..store.plain_text import differences
from ..store.reader import ActivationStore
from ..store.seal import pretty_json
from .errors import RunError, RunMismatchError, RunNotFoundError

CONFIG, METRICS, EVALUATION = "config.json", "metrics.jsonl", "evaluation.json"
CHECKPOINT = "checkpoint/state.safetensors"
BASE_PHASE = "base_phase.safetensors"
WEIGHTS = "sae_weights.safetensors"

_SAFETENSORS_TYPES = {
    "float64": "F64", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_SETTING = "settings."
_FOLLOWS = {f"{_SETTING}{name}" for name in ("warmup_steps", "ramp_steps", "adapter_width")}
_UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, OSError)


class Run:
    """One training's folder."""

    def __init__(self, folder: Path) -> None:
        """Speak of ``folder``; nothing is read yet."""
        self.folder = folder
        self._files = StoreFiles(folder)

    @property
    def is_begun(self) -> bool:
        """Whether there is a configuration to go on from."""
        return (self.folder / CONFIG).exists()

    @property
    def is_finished(self) -> bool:
        """Whether training is done."""
        return (self.folder / WEIGHTS).exists() and (self.folder / "cfg.json").exists()

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` says.

        Raises:
            RunNotFoundError: there is no run here.
            RunError: not JSON.
        """
        return self._read_json(
            CONFIG,
            missing=f"there is no run at {self.folder}; train one: posae train STORE {self.folder}",
            remedy="train the run anew",
        )

    @property
    def evaluation(self) -> dict[str, Any]:
        """What ``evaluation.json`` says.

        Raises:
            RunNotFoundError: the run was never evaluated.
            RunError: not JSON.
        """
        return self.scores(EVALUATION)

    def scores(self, name: str) -> dict[str, Any]:
        """What a file of scores says: ``evaluation.json``, or what was set aside.

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
            found = json.loads((self.folder / name).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise RunNotFoundError(missing) from None
        except (ValueError, RecursionError, OSError) as error:
            raise RunError(f"{self.folder / name} cannot be read: {error}; {remedy}") from None
        if not isinstance(found, dict):
            raise RunError(f"{self.folder / name} is no JSON object; {remedy}")
        return cast("dict[str, Any]", found)

    @contextmanager
    def locked(self, *, wait: bool = False) -> Generator[bool]:
        """Hold the run, so that no other process trains it.

        Gives whether it is held: not where another process has it and ``wait`` is not set.

        Raises:
            StoreWriteError: the disk refused.
        """
        self._files.make_root()
        with exclusive(self.folder, wait=wait) as is_held:
            yield is_held

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, or check that the one there is the same.

        Raises:
            RunMismatchError: the run was begun otherwise; says what differs.
            RunError: the folder holds something else.
        """
        self.check(config)
        if not self.is_begun:
            self._files.make_root()
            self.write_json(CONFIG, config)

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what ``begin`` would, and write nothing.

        Raises:
            RunMismatchError: the run was begun otherwise; says what differs.
            RunError: the folder holds something else.
        """
        if self.is_begun:
            begun = self.config
            if ("imported" in begun) != ("imported" in config):
                raise RunMismatchError(f"{self.folder} is a run already; give another folder")
            differ = list(_differences(begun, json.loads(json.dumps(config))))
            if differ:
                # What was typed comes first; the rest often follows from it.
                differ.sort(key=lambda found: (not found[0].startswith(_SETTING), found[0] in _FOLLOWS))
                told = differences([(name.removeprefix(_SETTING), *values) for name, *values in differ])
                raise RunMismatchError(
                    f"{self.folder} was begun otherwise: {told}; "
                    "give the same words to go on, or another folder"
                )
        elif self.folder.exists() and not self._is_free():
            if runs_below(self.folder):
                raise RunError(
                    f"{self.folder} is no run, and it holds runs: add --controls or --sweep, or give another "
                    "folder"
                )
            raise RunError(f"{self.folder} is there already and is no run; give another folder")

    def _is_free(self) -> bool:
        """Whether a run can be begun in the folder: nothing is there but what a lock or a kill left."""
        folder = self.folder
        return folder.is_dir() and all(is_leftover(path.name) for path in folder.iterdir())

    def unlike(self, store: ActivationStore, layer: int) -> list[str]:
        """What of a store is not what the run read: some of tokens, activations, statistics.

        Where the store has no seal yet, or had none when the run was begun, its manifest is compared, which
        holds all that these depend on. Empty also where the run names no store.
        """
        begun: dict[str, Any] = self.config.get("store", {})
        before: dict[str, str] = begun.get("read") or {}
        read = store.digests(layer)
        if before and read:
            words = {"tokens": "tokens", "stats": "statistics"}
            return [words.get(key, "activations") for key in read if before.get(key) != read[key]]
        is_same = begun.get("manifest") in (None, digest_of(store.manifest))
        return [] if is_same else ["text, model or settings"]

    def check_read(self, store: ActivationStore, layer: int, remedy: str) -> None:
        """Refuse a store that holds other bytes than the run read.

        Raises:
            RunMismatchError: says which of tokens, activations, statistics differ.
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
        """The lines of ``metrics.jsonl``; one cut short by a kill is left out."""
        found: list[dict[str, Any]] = []
        if (self.folder / METRICS).exists():
            for line in (self.folder / METRICS).read_text().splitlines():
                try:
                    found.append(json.loads(line))
                except ValueError:
                    break
        return found

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after ``step``: they will be written again."""
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
        """Put what is needed to go on after ``step`` steps in place of the last checkpoint.

        Raises:
            StoreWriteError: the disk refused.
        """
        self._files.write_pieces(CHECKPOINT, _safetensors(tensors, {"step": str(step)}))

    def save_base_phase(self, decoder: Tensor) -> None:
        """Keep the decoder [dictionary_size, d_model] as it is before position adapters come in.

        Raises:
            StoreWriteError: the disk refused.
        """
        data = safetensors.torch.save({"W_dec": decoder.detach().cpu().contiguous()})
        self._files.write(BASE_PHASE, data)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor]] | None:
        """Steps done and the tensors of the last checkpoint, or None where there is none.

        Raises:
            RunError: the file is damaged, or may not be read.
        """
        with self._checkpoint() as file:
            if file is None:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return _step(file), tensors

    @property
    def checkpoint_step(self) -> int | None:
        """Steps done at the last checkpoint, or None where there is none; the file's header alone is read.

        Raises:
            RunError: the file is damaged, or may not be read.
        """
        with self._checkpoint() as file:
            return None if file is None else _step(file)

    @contextmanager
    def _checkpoint(self) -> Generator[Any]:
        """The file of the last checkpoint, opened; None where there is none."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            yield None
            return
        try:
            with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
                yield file
        except _UNREADABLE as error:
            raise self.no_checkpoint(str(error)) from None

    def no_checkpoint(self, why: str) -> RunError:
        """What to raise where the checkpoint is not what ``save_checkpoint`` was given."""
        path = self.folder / CHECKPOINT
        return RunError(f"{path} cannot be read ({why}); remove it to train from the start")

    def __repr__(self) -> str:
        """A line for notebooks."""
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: what was trained on what, its scores if it has some, and all settings.

        What cannot be read is said in its place. Costs reading two small files and the metrics.
        """
        title = str(self.folder)
        try:
            config = self.config
        except RunError as error:
            return block(title, facts({"state": str(error)}))
        settings, store = (_object(config.get(name)) for name in ("settings", "store"))
        told = {
            "trained": f"{_shown(settings, 'architecture')}, layer {_shown(settings, 'layer')}, "
            f"{_shown(settings, 'dictionary_size')} features, seed {_shown(settings, 'seed')}",
            "store": f"{_shown(store, 'path')}: {_shown(store, 'model')} on {_shown(store, 'dataset')}",
            "state": self._state(settings),
        }
        parts: list[str] = []
        try:
            parts = _scores_html(self.evaluation)
        except RunNotFoundError:
            told["scores"] = "none yet"
        except RunError as error:
            told["scores"] = str(error)
        every_setting = facts({name: _shown(settings, name) for name in settings})
        return block(title, facts(told), *parts, folded("all settings", every_setting))

    def _state(self, settings: Mapping[str, Any]) -> str:
        steps = _shown(settings, "steps")
        if self.is_finished:
            return f"finished, {steps} steps"
        lines = self.metrics()
        return f"at step {_shown(_object(lines[-1]), 'step') if lines else 0} of {steps}"


def _safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """A file of safetensors in pieces, each tensor as it lies in memory: written without a copy of it all.

    The format: the header's length as 8 bytes, the header as JSON, then the tensors' bytes without gaps.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in tensors.items()}
    begin = 0
    for name, array in sorted(arrays.items(), key=lambda one: (-one[1].itemsize, one[0])):
        end = begin + array.nbytes
        kind = _SAFETENSORS_TYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the first tensor begins at a multiple of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for name in list(header)[1:]:
        yield cast(bytes, arrays[name].reshape(-1).view(np.uint8).data)  # file.write takes any buffer


def _step(checkpoint: Any) -> int:
    return int(checkpoint.metadata()["step"])


def digest_of(manifest: Manifest) -> str:
    """What a run keeps of a store's manifest, which never changes once there is something to train on."""
    return hashlib.sha256(pretty_json(root_json(manifest))).hexdigest()


def runs_below(folder: Path) -> str | None:
    """Where runs lie below a folder, ``*`` or ``*/*``; None: no run is there."""
    for below in ("*", "*/*"):
        if any(_is_configuration(path) for path in folder.glob(f"{below}/{CONFIG}")):
            return below
    return None


def _is_configuration(path: Path) -> bool:
    try:
        return {"settings", "store"} <= _object(json.loads(path.read_bytes())).keys()
    except (ValueError, RecursionError, OSError):
        return False


def _scores_html(evaluation: Mapping[str, Any]) -> list[str]:
    """Scores in all, and FVU by position range where both lists are there."""
    names = {"FVU": "fvu", "L0": "l0", "dead": "dead_fraction", "parameters": "n_parameters"}
    parts = [columns([*names], [[_shown(evaluation, key) for key in names.values()]])]
    ranges, by_range = evaluation.get("ranges"), evaluation.get("fvu_by_range")
    if isinstance(ranges, list) and isinstance(by_range, list):
        told = [_word(value) for value in cast("list[Any]", by_range)]
        parts.append(columns(["FVU by range", *map(str, cast("list[Any]", ranges))], [["", *told]]))
    return parts


def _object(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _shown(values: Mapping[str, Any], name: str) -> str:
    return _word(values.get(name))


def _word(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


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
