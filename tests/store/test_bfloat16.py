"""bfloat16's bits, and its fill values as zarr-python writes them."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posae.store.bfloat16 import BFloat16, DataTypeValidationError, bfloat16_bits

bfloat16: Any = ml_dtypes.bfloat16


@given(st.floats(width=32))
def test_bits_are_rounded_as_others_round_them(value: float) -> None:
    expected = int(np.float32(value).astype(bfloat16).view(np.uint16))
    found = int(bfloat16_bits(value))
    # Others write one NaN for all; ours keeps the payload's upper bits.
    assert found == expected or (value != value and found & 0x7FFF > 0x7F80 < expected & 0x7FFF)


@given(st.integers(0, 2**16 - 1))
def test_a_fill_value_comes_back_from_json(bits: int) -> None:
    kind = BFloat16()
    text = kind.to_json_scalar(np.uint16(bits), zarr_format=3)
    assert kind.from_json_scalar(text, zarr_format=3) == bits


def test_fill_values_may_be_numbers_and_nothing_else() -> None:
    kind = BFloat16()
    assert kind.from_json_scalar("NaN", zarr_format=3) == 0x7FC0
    assert kind.from_json_scalar("-Infinity", zarr_format=3) == 0xFF80
    assert kind.from_json_scalar(1, zarr_format=3) == 0x3F80
    with pytest.raises(TypeError):
        kind.from_json_scalar(None, zarr_format=3)


def test_it_is_known_by_its_name_in_version_3_alone() -> None:
    assert BFloat16.from_json("bfloat16", zarr_format=3) == BFloat16()
    assert BFloat16().to_json(zarr_format=3) == "bfloat16"
    assert (BFloat16().item_size, BFloat16().to_native_dtype()) == (2, np.dtype("<u2"))
    with pytest.raises(DataTypeValidationError):
        BFloat16.from_json("float16", zarr_format=3)
    with pytest.raises(DataTypeValidationError):
        BFloat16.from_json("bfloat16", zarr_format=2)
    with pytest.raises(DataTypeValidationError):
        BFloat16.from_native_dtype(np.dtype("<u2"))
