"""The raw scalars: every location of the forward pass, under its own name.

Formulas: the identity, but for queries and keys. The specification carries the factor
d_head^(-1/4) in those two, so that their product is the attention score; the store
keeps what the attention function received.
"""

from actstore.query.derived.declaration import (
    Coefficient,
    Dependence,
    DerivedScalar,
    Identity,
    LayerRule,
    ScaledBy,
    Source,
)
from actstore.store.vocabulary import ActivationLocationType

__all__ = ["SCALARS"]

_SCALED = (ActivationLocationType.ATTN_QUERY, ActivationLocationType.ATTN_KEY)


def _raw(location: ActivationLocationType) -> DerivedScalar:
    scaled = location in _SCALED
    dependence: Dependence = ScaledBy(Coefficient.QUERY_KEY_SCALE) if scaled else Identity()
    return DerivedScalar(
        name=location.label,
        meaning=f"{location.meaning}{', times d_head^(-1/4)' if scaled else ''}",
        axes=location.axes,
        node_type=location.node_type,
        has_layers=location.has_layers,
        sources=(
            Source(location, layer=LayerRule.SAME if location.has_layers else LayerRule.NONE),
        ),
        dependence=dependence,
    )


SCALARS = tuple(_raw(location) for location in ActivationLocationType)
