"""Ordered integer keys of stored floats.

The bits of a float, folded so that integers compare as the floats do. Zone maps and
top lists are kept as keys: integer max and min are exact, fast for every dtype, and a
bound is never rounded. -0.0 and 0.0 share a key, as they share a rank.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.layout import StoredDtype

__all__ = [
    "finite_values",
    "highest_key",
    "infinity_key",
    "key_values",
    "lowest_key",
    "ordered_keys",
    "signed_zero_keys",
]


def ordered_keys(values: npt.NDArray[Any], dtype: StoredDtype) -> npt.NDArray[Any]:
    """Signed integer keys with the order of the stored values.

    Args:
        values: stored values, any shape.
        dtype: how they are stored.

    Returns:
        Keys of the same shape; NaN keys lie beyond ``infinity_key`` on either side.

    >>> ordered_keys(np.array([-1.5, -0.0, 0.0, 2.0], np.float16), StoredDtype.FLOAT16)
    array([-15873,      0,      0,  16384], dtype=int16)
    """
    keys = signed_zero_keys(values, dtype)
    # Folding sends -0.0 to -1, next to 0; nothing else maps there.
    keys += keys == -1
    return keys


def signed_zero_keys(
    values: npt.NDArray[Any], dtype: StoredDtype, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Keys that tell -0.0 (-1) from 0.0 (0), and are :func:`ordered_keys` otherwise.

    Faster; what is folded from them becomes an ordered key by turning -1 into 0.

    Args:
        values: stored values, any shape.
        dtype: how they are stored.
        out: where to put the keys; of their shape and dtype.
    """
    sort, sign, magnitude = _folding(dtype)
    bits = values.view(sort)
    keys: npt.NDArray[Any] = np.right_shift(bits, sign, out=out)
    keys &= magnitude
    keys ^= bits
    return keys


@cache
def _folding(dtype: StoredDtype) -> tuple[np.dtype[Any], int, Any]:
    """The keys' dtype, the place of the sign bit, and the mask of all others."""
    return dtype.keys, 8 * dtype.keys.itemsize - 1, dtype.keys.type(np.iinfo(dtype.keys).max)


def finite_values(
    values: npt.NDArray[Any], dtype: StoredDtype, out: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Exact float32 copies of stored values that are finite; of others, anything.

    float16 by integer arithmetic and one exact product, several times faster than numpy's
    conversion: exponent and mantissa move to float32's place, and 2**112 makes up for the
    difference of the exponents' offsets, subnormal numbers included.

    Args:
        values: stored values, any shape.
        dtype: how they are stored.
        out: where to put the copies; of the values' shape.
    """
    if dtype is StoredDtype.FLOAT32:
        np.copyto(out, values)
        return out
    bits = out.view(np.int32)
    np.copyto(bits, values.view(np.int16))
    if dtype is StoredDtype.BFLOAT16:
        bits <<= 16
        return out
    bits <<= 13
    bits &= np.int32(-0x70002000)
    out *= np.float32(2.0**112)
    return out


def key_values(keys: npt.NDArray[Any], dtype: StoredDtype) -> npt.NDArray[np.float32]:
    """The float32 values of keys: the inverse of :func:`ordered_keys`."""
    keys = np.ascontiguousarray(keys, dtype.keys)
    magnitude = dtype.keys.type(np.iinfo(dtype.keys).max)
    bits = keys ^ ((keys >> (8 * dtype.keys.itemsize - 1)) & magnitude)
    return dtype.to_float32(bits.view(dtype.storage))


def infinity_key(dtype: StoredDtype) -> int:
    """The key of plus infinity; a larger one is NaN."""
    bits = {
        StoredDtype.FLOAT16: 0x7C00,
        StoredDtype.BFLOAT16: 0x7F80,
        StoredDtype.FLOAT32: 0x7F800000,
    }
    return bits[dtype]


def lowest_key(dtype: StoredDtype) -> int:
    """Below every value: the maximum over no rows."""
    return int(np.iinfo(dtype.keys).min)


def highest_key(dtype: StoredDtype) -> int:
    """Above every value: the minimum over no rows."""
    return int(np.iinfo(dtype.keys).max)
