"""A model's parameters, from torch to the bytes that the store keeps.

The snapshot holds the parameters that ran, exactly, in the narrowest dtype that does
so: a float16 or bfloat16 checkpoint that ran upcast to float32 is stored as it was
published, at half the size, and a float32 checkpoint that ran in float16 is stored as
float16. So the fingerprint does not depend on the dtype that a checkpoint ran in, as
long as that dtype holds it.
"""

from collections.abc import Callable, Mapping

import torch

from actstore.store.model.dimensions import unsupported_model
from actstore.store.model.parameters import EncodedParameters, Parameter

__all__ = ["dtype_name", "encode_parameters"]

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NARROWEST_FIRST = (torch.float16, torch.bfloat16, torch.float32)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name as in configs and on the command line, ``float32``."""
    return str(dtype).removeprefix("torch.")


def encode_parameters(
    state: Mapping[str, torch.Tensor],
) -> tuple[EncodedParameters, torch.dtype]:
    """Encode a state dict for storage.

    Args:
        state: name -> tensor; names that share one tensor are stored once.

    Returns:
        The parameters, which read the tensors when written, and the dtype that the
        floating-point ones are stored in (the widest, where they differ).

    Raises:
        InvalidInput: a tensor has a dtype that cannot be stored.
    """
    owners: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.dtype not in _CODES:
            raise unsupported_model(f"its parameter {name} has dtype {dtype_name(tensor.dtype)}")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = owners.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            tied[name] = owner
    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    target = _exact_dtype(kept)
    stored = {name: _stored_as(tensor, target) for name, tensor in kept.items()}
    parameters = {
        name: Parameter(_CODES[stored[name]], tuple(tensor.shape), _reader(tensor, stored[name]))
        for name, tensor in kept.items()
    }
    floating = [dtype for dtype in stored.values() if dtype.is_floating_point]
    widest = max(floating, key=lambda dtype: dtype.itemsize)
    return EncodedParameters(parameters, tied), widest


def _exact_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    for dtype in _NARROWEST_FIRST:
        wider = [tensor for tensor in tensors.values() if _is_wider(tensor, dtype)]
        if wider and all(torch.equal(one.to(dtype).to(one.dtype), one) for one in wider):
            return dtype
    return None


def _is_wider(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > dtype.itemsize


def _stored_as(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and _is_wider(tensor, dtype) else tensor.dtype


def _reader(tensor: torch.Tensor, dtype: torch.dtype) -> Callable[[], memoryview]:
    def read() -> memoryview:
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data

    return read
