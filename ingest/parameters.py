"""A model's parameters, from torch to the bytes that the store keeps.

The snapshot holds the parameters that ran, exactly, in the first of bfloat16, float16,
float32 and float64 that can: a half-precision checkpoint that ran upcast to float32 is
stored at half the size, and a float32 checkpoint that was rounded to float16 for the
run is stored as it ran. So the fingerprint follows from the values alone, whatever
dtype held them.
"""

from collections.abc import Callable, Mapping, Sequence

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
# Values of a bfloat16 checkpoint often fit float16 too; the other way round hardly ever.
_PREFERRED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        The parameters, which read the tensors when written, and the one dtype that the
        floating-point ones are stored in.

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
    floating = _exact_dtype([one for one in kept.values() if one.is_floating_point()])
    stored = {
        name: floating if tensor.is_floating_point() else tensor.dtype
        for name, tensor in kept.items()
    }
    parameters = {
        name: Parameter(_CODES[stored[name]], tuple(tensor.shape), _reader(tensor, stored[name]))
        for name, tensor in kept.items()
    }
    return EncodedParameters(parameters, tied), floating


def _exact_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    for dtype in _PREFERRED:
        if all(one.dtype == dtype or _holds(dtype, one) for one in tensors):
            return dtype
    # Only NaN equals nothing; a payload survives in the widest dtype alone.
    return max((one.dtype for one in tensors), key=lambda dtype: dtype.itemsize)


def _holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _reader(tensor: torch.Tensor, dtype: torch.dtype) -> Callable[[], memoryview]:
    def read() -> memoryview:
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data

    return read
