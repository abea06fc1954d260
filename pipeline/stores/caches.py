"""One interface to activations saved by other programs, read a few rows at a time.

    a folder of Hugging Face datasets   SAELens' cached activations: a column of them, and ``token_ids``
    *.safetensors                       a tensor of activations, with or without one of token ids
    *.npy                               an array of activations
    *.pt                                a tensor, or tensors by name, as ``torch.save`` writes them

A folder of files of one of the last three kinds is read in the order of their names. Nothing is unpickled or
executed. Files are mapped into memory, one at a time, so reading costs only the requested rows.
"""

import pickle
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...store.rounding import float32_to_bits
from ..errors import ForeignFileError

TOKEN_NAMES = ("token_ids", "tokens", "input_ids")
"""Names that programs use for the tensor of token ids."""

_FLOATS = ("float16", "float32", "float64", "bfloat16")


class Shape(NamedTuple):
    """Shape of activations: [contexts, positions, d_model], or [rows, d_model]."""

    n_entries: int
    """Axis 0."""

    length: int | None
    """Positions of a context; None for rows."""

    d_model: int
    dtype: str
    """Type of the values, as numpy or torch names it."""


class Cache(ABC):
    """Activations in files.

    Attributes:
        kind: ``saelens``, ``safetensors``, ``npy`` or ``pt``.
        shape: of all of them together.
        has_tokens: whether there are token ids.
        tensor: name of the tensor or column of activations; empty in files that hold a single array.
        hook_name: the hook point in the model; None if the files do not record it.
        files: all of them, by name.
    """

    kind: str
    shape: Shape
    has_tokens: bool
    tensor: str
    hook_name: str | None = None
    files: Mapping[str, Path]

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        """Entries ``start`` to ``stop`` of axis 0 as bits of bfloat16, rounded to nearest.

        Raises:
            ForeignFileError: the file is not what it was, or damaged.
        """

    @abstractmethod
    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token ids [contexts, positions] of the same entries; only if there are any.

        Raises:
            ForeignFileError: the file is not what it was, or damaged.
        """


def open_cache(source: Path, tensor: str | None = None) -> Cache:
    """The activations at ``source``.

    Args:
        source: a file, or a folder.
        tensor: the tensor or column, if there are several.

    Raises:
        ForeignFileError: there are no files, or none that can be imported.
    """
    if not source.exists():
        raise ForeignFileError(f"{source}: no such file or folder; give the file or folder of activations")
    if source.is_dir() and (source / "state.json").exists():
        return _DatasetCache(source, tensor)
    files = [source]
    if source.is_dir():
        kinds = {path.suffix for path in source.iterdir()} & _KINDS.keys()
        if len(kinds) != 1:
            found = "none" if not kinds else "several kinds"
            raise ForeignFileError(
                f"{source}: of {', '.join(_KINDS)} files there are {found}; give a folder of one kind, or "
                "one that datasets' save_to_disk wrote"
            )
        files = sorted(source.glob(f"*{kinds.pop()}"), key=_natural)
    if files[0].suffix not in _KINDS:
        raise ForeignFileError(f"{source}: no {', '.join(_KINDS)} file; convert it to one of these")
    return _FileCache(files, _KINDS[files[0].suffix], tensor)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key that puts ``part_10`` after ``part_9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _line(error: Exception) -> str:
    """A library's message in one line of limited length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def bits_of(values: Any) -> NDArray[np.uint16]:
    """The bits of values as bfloat16, rounded to nearest; exact for bfloat16.

    Args:
        values: a tensor or array of floats, of any shape.
    """
    if isinstance(values, Tensor):
        if values.dtype == torch.bfloat16:
            return values.contiguous().view(torch.int16).numpy().view(np.uint16)
        values = values.float().numpy()
    with np.errstate(over="ignore"):  # what is too large is refused where it is written
        return float32_to_bits(np.ascontiguousarray(values, np.float32))


# Files of arrays


class _Arrays(ABC):
    """The arrays of one file, opened."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Any:
        """Entries of axis 0, as a tensor or array."""


class _Safetensors(_Arrays):
    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "pt")
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
        self.dtypes = {name: _SAFETENSORS.get(found.get_dtype(), "other") for name, found in slices.items()}

    def rows(self, name: str, start: int, stop: int) -> Any:
        return self._file.get_slice(name)[start:stop]


_SAFETENSORS = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{
        f"{sign}{bits}": f"{kind}{bits}"
        for sign, kind in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}


class _Npy(_Arrays):
    kind = "npy"

    def __init__(self, path: Path) -> None:
        self._array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shapes, self.dtypes = {"": self._array.shape}, {"": str(self._array.dtype)}

    def rows(self, name: str, start: int, stop: int) -> Any:
        return self._array[start:stop]


class _Pt(_Arrays):
    kind = "pt"

    def __init__(self, path: Path) -> None:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        named = cast("dict[Any, Any]", found) if isinstance(found, dict) else {"": found}
        tensors = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
        self.tensors = {
            name: value.detach() for name, value in tensors.items() if value.layout == torch.strided
        }
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        self.dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Any:
        return self.tensors[name][start:stop]


_KINDS: dict[str, type[_Safetensors | _Npy | _Pt]] = {".safetensors": _Safetensors, ".npy": _Npy, ".pt": _Pt}


class _FileCache(Cache):
    """Files of one kind, one after the other."""

    def __init__(
        self, files: Sequence[Path], kind: type[_Safetensors | _Npy | _Pt], tensor: str | None
    ) -> None:
        self._paths = files
        self._open = kind
        self._opened: tuple[int, _Arrays] | None = None
        self.kind = kind.kind
        self.files = {path.name: path for path in files}
        first = self._file(0)
        self.tensor = _chosen(files[0], first.shapes, first.dtypes, tensor)
        self._tokens = next((name for name in TOKEN_NAMES if name in first.shapes), None)
        shapes = [self._shape(number) for number in range(len(files))]
        for path, shape in zip(files, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise ForeignFileError(
                    f"{path}: {shape} is not of the form of {files[0].name}, {shapes[0]}; "
                    "import them separately"
                )
        self._ends = list(accumulate(shape.n_entries for shape in shapes))
        self.shape = shapes[0]._replace(n_entries=self._ends[-1])
        self.has_tokens = self._tokens is not None

    def _file(self, number: int) -> _Arrays:
        if self._opened is None or self._opened[0] != number:
            path = self._paths[number]
            try:
                self._opened = number, self._open(path)
            except (
                OSError,
                ValueError,
                RuntimeError,
                EOFError,
                SafetensorError,
                pickle.UnpicklingError,
            ) as error:
                raise ForeignFileError(
                    f"{path}: damaged, or not only plain tensors ({_line(error)}); save it again, "
                    "as plain tensors"
                ) from None
        return self._opened[1]

    def _shape(self, number: int) -> Shape:
        arrays, path = self._file(number), self._paths[number]
        if self.tensor not in arrays.shapes:
            raise ForeignFileError(
                f"{path}: no tensor {self.tensor!r}, unlike {self._paths[0].name}; import them separately"
            )
        shape = arrays.shapes[self.tensor]
        if self._tokens and arrays.shapes.get(self._tokens) != shape[:-1]:
            raise ForeignFileError(
                f"{path}: {self._tokens} has the shape {arrays.shapes.get(self._tokens)}, and activations "
                f"{shape}; save the ids of the same tokens"
            )
        return _as_shape(path, shape, arrays.dtypes[self.tensor])

    def _rows(self, name: str, start: int, stop: int) -> list[Any]:
        parts: list[Any] = []
        while start < stop:
            number = bisect_right(self._ends, start)
            before = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            parts.append(self._file(number).rows(name, start - before, end - before))
            start = end
        return parts

    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        return np.concatenate([bits_of(part) for part in self._rows(self.tensor, start, stop)])

    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        assert self._tokens is not None
        return np.concatenate([np.asarray(part, np.int64) for part in self._rows(self._tokens, start, stop)])


def _chosen(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], wanted: str | None
) -> str:
    """The name of the tensor of activations."""
    fit = [name for name, shape in shapes.items() if len(shape) in (2, 3) and dtypes[name] in _FLOATS]
    if wanted is not None and wanted in fit:
        return wanted
    if wanted is None and len(fit) == 1:
        return fit[0]
    has = ", ".join(repr(name) for name in fit[:8]) or "none"
    raise ForeignFileError(
        f"{path}: the tensor of activations is unclear (floats with two or three axes: {has}); "
        "choose one with --tensor"
    )


def _as_shape(path: Path, shape: Sequence[int], dtype: str) -> Shape:
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype not in _FLOATS:
        raise ForeignFileError(
            f"{path}: {dtype} {list(shape)} is neither [contexts, positions, d_model] nor [rows, d_model] of "
            "floats; save it in one of these forms"
        )
    return Shape(shape[0], shape[1] if len(shape) == 3 else None, shape[-1], dtype)


# SAELens


class _DatasetCache(Cache):
    """Output of SAELens' ``CacheActivationsRunner``: a column named after the hook, and ``token_ids``."""

    kind = "saelens"

    def __init__(self, folder: Path, column: str | None) -> None:
        datasets: Any = import_module("datasets")  # seconds to import, and only this needs it
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ForeignFileError(
                f"{folder}: datasets cannot read it ({_line(error)}); create it again"
            ) from None
        features: dict[str, Any] = dict(getattr(loaded, "features", None) or {})
        fit = {name: found for name, found in features.items() if isinstance(found, datasets.Array2D)}
        shapes = {name: (len(loaded), *found.shape) for name, found in fit.items()}
        dtypes = {name: str(found.dtype) for name, found in fit.items()}
        self.tensor = self.hook_name = _chosen(folder, shapes, dtypes, column)
        self.shape = _as_shape(folder, shapes[self.hook_name], dtypes[self.hook_name])
        self.has_tokens = "token_ids" in features
        # Not every file in the folder: datasets also stores later computations there.
        paths = [Path(file["filename"]) for file in loaded.cache_files]
        self.files = {path.name: path for path in paths}
        self._folder = folder
        self._rows = loaded.with_format("numpy")

    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        return bits_of(self._column(str(self.hook_name), start, stop))

    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        found = np.asarray(self._column("token_ids", start, stop), np.int64)
        if found.shape != (stop - start, self.shape.length):
            raise ForeignFileError(
                f"{self._folder}: token_ids do not match the activations; create the folder again"
            )
        return found

    def _column(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._rows.select_columns([name])[start:stop][name]
