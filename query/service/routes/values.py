"""Values: derived scalars and raw locations, by sequence, token and layer."""

from fastapi import Response

from actstore.query.service.models import TensorModel
from actstore.query.service.negotiation import TENSOR
from actstore.query.service.resources import Asked, new_router, resource
from actstore.query.service.routes.parameters import Dtype, Layers, NamePath, PassName, Rows

__all__ = ["router"]

router = new_router("values")


@resource(router, "/scalars/{name}", TensorModel, offers=TENSOR)
def scalar_values(
    ask: Asked,
    name: NamePath,
    sequence: Rows = None,
    token: Rows = None,
    layer: Layers = None,
    pass_type: PassName = "forward",
    dtype: Dtype = "float32",
) -> Response:
    """A derived scalar of whole sequences, or of rows by their `token` numbers.

    Arrow has a row per layer and token, npy the values alone, in the order of `dims`.
    """
    found = ask.store.answering.derive(
        name, sequences=sequence, tokens=token, layers=layer, dtype=dtype, pass_type=pass_type
    )
    return ask.tensor(found)


@resource(router, "/raw/{location}", TensorModel, offers=TENSOR)
def raw_values(
    ask: Asked,
    location: NamePath,
    sequence: Rows = None,
    token: Rows = None,
    layer: Layers = None,
    pass_type: PassName = "forward",
    dtype: Dtype = "float32",
) -> Response:
    """A location's values as the store holds or reconstructs them."""
    found = ask.store.answering.raw(
        location, sequences=sequence, tokens=token, layers=layer, dtype=dtype, pass_type=pass_type
    )
    return ask.tensor(found)
