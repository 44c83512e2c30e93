"""Ordered integer keys of stored floats.

The bits of a float, folded so that integers compare as the floats do. Zone maps and
top lists are kept as keys: integer max and min are exact, fast for every dtype, and a
bound is never rounded. -0.0 and 0.0 share a key, as they share a rank.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.store.layout import StoredDtype

__all__ = ["highest_key", "infinity_key", "key_values", "lowest_key", "ordered_keys"]


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
    bits = values.view(dtype.keys)
    magnitude = dtype.keys.type(np.iinfo(dtype.keys).max)
    keys: npt.NDArray[Any] = bits ^ ((bits >> (8 * dtype.keys.itemsize - 1)) & magnitude)
    # Folding sends -0.0 to -1, next to 0; nothing else maps there.
    keys += keys == -1
    return keys


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
