"""Derived values of one sequence: declarations applied to raw values, in float64.

The values may come from a store or from a fresh pass over a prompt; the declarations
and this function are the same for both.
"""

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from actstore.query.derived.declaration import DerivedScalar, Identity, ScaledBy
from actstore.query.derived.registry import SCALARS
from actstore.store.vocabulary import ActivationLocationType, PassType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RawValues", "evaluate"]


class RawValues(Protocol):
    """Raw values of one sequence, and what the model adds to them."""

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        ...

    def raw(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> "Tensor":
        """float64 ``(token, *unit axes)``."""
        ...

    def weight(self, location: WeightLocationType, layer: int | None) -> "Tensor":
        """A weight in float64; the layer is ignored for a weight outside the blocks."""
        ...

    def coefficients(self, declared: DerivedScalar, layer: int | None) -> npt.NDArray[np.float64]:
        """The factor per unit of a scalar that rescales a raw value, ``(unit,)``."""
        ...


def evaluate(
    declared: DerivedScalar,
    values: RawValues,
    layer: int | None,
    rows: "Tensor | None" = None,
) -> "Tensor":
    """The scalar at one layer of one sequence.

    Args:
        declared: what to compute.
        values: where its sources come from.
        layer: the layer, None for a scalar outside the blocks.
        rows: positions to return, int64; all by default. The values are the same.

    Returns:
        float64 ``(token, *declared.axes)``, not to be written to.

    Raises:
        Unavailable: a source cannot be had.
    """
    import torch

    # What is wanted is taken out first where that cannot change a bit: a write vector per
    # token and neuron is a thousand times its source.
    early = rows if declared.row_wise else None
    sources = []
    for source in declared.sources:
        of, at = source.place(layer, values.n_layers)
        if isinstance(of, ActivationLocationType):
            value = values.raw(of, source.pass_type, at)
            sources.append(value if early is None else value[early])
        else:
            sources.append(evaluate(SCALARS[of], values, at, early))
    if isinstance(declared.dependence, Identity):
        return sources[0]
    if isinstance(declared.dependence, ScaledBy):
        factor = torch.tensor(values.coefficients(declared, layer))
        return sources[0] * factor.reshape(sources[0].shape[1:])
    assert declared.formula is not None
    weights = [values.weight(weight, layer) for weight in declared.weights]
    result = declared.formula(sources, weights)
    return result if rows is None or declared.row_wise else result[rows]
