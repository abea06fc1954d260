"""The file of a checkpoint: tensors by name and the number of steps done, in the format safetensors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, OSError)
"""Errors of reading a file that is damaged, is not a checkpoint, or may not be read."""

_SAFETENSORS_TYPES = {
    "float64": "F64", "float32": "F32", "int64": "I64", "int32": "I32", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def checkpoint_pieces(step: int, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """The bytes of a checkpoint, piece by piece, so that no copy of all of it is made.

    The format: the header's length as 8 bytes, the header as JSON, then the tensors' bytes without gaps.

    Args:
        step: steps done.
        tensors: by name, on the CPU.
    """
    header: dict[str, Any] = {"__metadata__": {"step": str(step)}}
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


def read_checkpoint(file: Path) -> tuple[int, dict[str, Tensor]]:
    """Steps done, and the tensors by name.

    Raises:
        UNREADABLE: the file is not a checkpoint.
    """
    with safe_open(file, "pt") as opened:  # pyright: ignore[reportUnknownVariableType]
        checkpoint = cast(Any, opened)
        return _step(checkpoint), {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}  # noqa: SIM118 (no mapping)


def read_step(file: Path) -> int:
    """Steps done; reads the file's header alone.

    Raises:
        UNREADABLE: the file is not a checkpoint.
    """
    with safe_open(file, "pt") as opened:  # pyright: ignore[reportUnknownVariableType]
        return _step(opened)


def _step(checkpoint: Any) -> int:
    return int(checkpoint.metadata()["step"])
