"""The backward value of a scalar as a scalar of its own, so that it is derived and ranked."""

from dataclasses import replace

from actstore.query.derived.declaration import DerivedScalar, General, Identity
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import PassType

__all__ = ["in_pass"]


def in_pass(declared: DerivedScalar, pass_type: str) -> DerivedScalar:
    """The scalar in one pass.

    Args:
        declared: the scalar.
        pass_type: ``forward``, or ``backward`` for the gradient of the store's objective.

    Returns:
        The scalar itself, or its backward value under the name ``NAME_gradient``.

    Raises:
        InvalidInput: there is no such pass, or the scalar has no backward value.
    """
    if pass_type not in tuple(PassType):
        raise _invalid(f"pass_type is {pass_type!r}; use {', '.join(PassType)}.")
    if pass_type == PassType.FORWARD:
        return declared
    gradient = declared.gradient
    if gradient is None:
        raise _invalid(f"{declared.name} has no backward value; ask for its forward one.")
    is_raw = gradient.formula is None and isinstance(declared.dependence, Identity)
    return replace(
        declared,
        name=f"{declared.name}_gradient",
        meaning=f"gradient of the objective with respect to {declared.name}",
        sources=gradient.sources,
        dependence=Identity() if is_raw else General(),
        formula=None if is_raw else gradient.formula or (lambda sources, _, __: sources[0]),
        gradient=None,
        choose_sources=None,
    )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
