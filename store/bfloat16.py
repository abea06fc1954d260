"""bfloat16 for zarr-python, which does not support it yet (zarr-python issue 711).

After ``register_bfloat16()`` plain ``zarr.open`` reads a store's layers as raw bits in uint16:
``torch.from_numpy(bits).view(torch.bfloat16)`` makes no copy. tensorstore does not need this, nor does posae
itself; importing zarr costs about 0.3 s.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
import zarr.dtype
import zarr.errors
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

from .rounding import float32_to_bits

# Newer versions, for Python 3.12 and later, have it among their errors, and warn at the old place.
DataTypeValidationError: type[ValueError] = (
    getattr(zarr.errors, "DataTypeValidationError", None) or zarr.dtype.DataTypeValidationError
)


def bfloat16_bits(value: float) -> np.uint16:
    """The bits of a number rounded to bfloat16, half to even.

    >>> hex(bfloat16_bits(1.0)), hex(bfloat16_bits(float("nan")))
    ('0x3f80', '0x7fc0')
    """
    return np.uint16(float32_to_bits(np.array([value], np.float32))[0])


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[np.dtype[np.uint16], np.uint16], HasItemSize, HasEndianness):
    """``bfloat16`` in the metadata, its raw bits as uint16 in memory."""

    dtype_cls = np.dtypes.UInt16DType
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> Self:
        """Refuse: uint16 stays uint16 unless bfloat16 is asked for by name."""
        raise DataTypeValidationError("bfloat16 must be asked for by name")

    def to_native_dtype(self) -> np.dtype[np.uint16]:
        """Little-endian uint16."""
        return np.dtype("<u2")

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError("bfloat16 exists in Zarr v3 alone")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != "bfloat16":
            raise DataTypeValidationError(f"{data!r} is not bfloat16")
        return cls()

    def to_json(self, zarr_format: int) -> Any:
        """The name, in v3."""
        if zarr_format != 3:
            raise ValueError("bfloat16 exists in Zarr v3 alone")
        return "bfloat16"

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number)

    def cast_scalar(self, data: object) -> np.uint16:
        """Bits, unchanged."""
        return np.uint16(cast("int", data))

    def default_scalar(self) -> np.uint16:
        """The bits of 0."""
        return np.uint16(0)

    def from_json_scalar(self, data: object, *, zarr_format: int) -> np.uint16:
        """A fill value: a number, ``NaN``, or bits such as ``0x7fc0``."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        if isinstance(data, str | int | float):
            return bfloat16_bits(float(data))
        raise TypeError(f"{data!r} is no fill value")

    def to_json_scalar(self, data: object, *, zarr_format: int) -> Any:
        """``NaN`` for the canonical one, else the bits."""
        bits = int(self.cast_scalar(data))
        return "NaN" if bits == 0x7FC0 else f"0x{bits:04x}"

    @property
    def item_size(self) -> int:
        """Two bytes."""
        return 2


def register_bfloat16() -> None:
    """Let zarr-python open arrays of data type ``bfloat16``."""
    registry: Mapping[str, Any] = data_type_registry.contents
    if "bfloat16" not in registry:
        data_type_registry.register("bfloat16", BFloat16)


register_bfloat16()
