"""Which write comes before which residual stream."""

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import LocationWithinLayer

__all__ = ["Place", "precedes"]

Place = tuple[LocationWithinLayer | None, int | None]
"""Where in its layer, and the layer; None for the embedding, which comes before all."""


def precedes(write: Place, residual: Place) -> bool:
    """Whether a write comes strictly before a residual stream.

    Raises:
        InvalidInput: both are of one layer, and one has no place in it.

    >>> precedes((LocationWithinLayer.ATTN, 2), (LocationWithinLayer.RESID_POST_ATTN, 2))
    True
    >>> precedes((LocationWithinLayer.MLP, 2), (LocationWithinLayer.RESID_POST_ATTN, 2))
    False
    """
    (at, layer), (target, target_layer) = write, residual
    if layer is None:
        return True
    if target_layer is None:
        return False
    if layer != target_layer:
        return layer < target_layer
    if at is None or target is None:
        raise InvalidInput(
            f"A write of layer {layer} has no known place in it, so whether it comes before the "
            "residual stream there is not known.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    return at < target
