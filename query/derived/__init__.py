"""Derived scalars: one declaration each, one module per family."""

from actstore.query.derived.declaration import (
    UNIT_ARGUMENTS,
    Coefficient,
    DerivedScalar,
    General,
    Identity,
    Product,
    ScaledBy,
    Source,
)
from actstore.query.derived.loading import load_scalars
from actstore.query.derived.naming import derived_scalar
from actstore.query.derived.registry import (
    FAMILIES,
    SCALARS,
    parse_scalar,
    register_scalar,
    scalar,
    temporary_scalars,
    unregister_scalar,
)

__all__ = [
    "FAMILIES",
    "SCALARS",
    "UNIT_ARGUMENTS",
    "Coefficient",
    "DerivedScalar",
    "General",
    "Identity",
    "Product",
    "ScaledBy",
    "Source",
    "derived_scalar",
    "load_scalars",
    "parse_scalar",
    "register_scalar",
    "scalar",
    "temporary_scalars",
    "unregister_scalar",
]
