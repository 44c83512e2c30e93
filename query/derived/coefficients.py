"""Coefficients of scalars that rescale a raw value, one per unit, without torch.

They are the one source for every path (derive, top-k, SQL), so a value has the same
bits wherever it is asked for: ``float32(float64(raw) * coefficient)``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.query.derived.declaration import Coefficient, DerivedScalar, ScaledBy
from actstore.store.model.dimensions import ModelDimensions

__all__ = ["unit_coefficients"]


def unit_coefficients(
    declared: DerivedScalar,
    layer: int | None,
    dimensions: ModelDimensions,
    readout: Callable[[str, int], npt.NDArray[Any]],
    columns: int,
) -> npt.NDArray[np.float64]:
    """The factor between raw and derived value for every unit.

    Args:
        declared: a scalar whose dependence is ``Identity`` or ``ScaledBy``.
        layer: the layer, None for a scalar outside the blocks.
        dimensions: the model's sizes and constants.
        readout: ``(section, layer) ->`` a row of the store's readout, ``(unit,)``.
        columns: units of a layer, all unit axes together.

    Returns:
        float64 ``(columns,)``; ones for ``Identity``.
    """
    assert declared.raw_source is not None, f"{declared.name} does not rescale a raw value"
    if not isinstance(declared.dependence, ScaledBy):
        return np.ones(columns)
    assert layer is not None, "coefficients belong to layers"
    if declared.dependence.coefficient is Coefficient.QUERY_KEY_SCALE:
        return np.full(columns, math.sqrt(dimensions.attention_scaling(layer)))
    return np.asarray(readout(declared.dependence.coefficient.value, layer), np.float64)
