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
from actstore.query.derived.registry import SCALARS, parse_scalar, scalar

__all__ = [
    "SCALARS",
    "UNIT_ARGUMENTS",
    "Coefficient",
    "DerivedScalar",
    "General",
    "Identity",
    "Product",
    "ScaledBy",
    "Source",
    "parse_scalar",
    "scalar",
]
