"""Two scalars of your own.

Import this file, or name it on the command line:

    actstore topk runs/gpt2 mlp_relative_write --scalars examples/my_scalar.py
"""

from typing import TYPE_CHECKING

import actstore

if TYPE_CHECKING:
    from torch import Tensor


@actstore.derived_scalar(
    axes="neuron",
    sources={"write": "mlp_write_norm", "stream": "resid_post_attn_norm"},
    row_wise=True,
)
def mlp_relative_write(write: "Tensor", stream: "Tensor") -> "Tensor":
    """What a neuron writes, relative to the length of the stream that it writes to."""
    return write / stream


@actstore.derived_scalar(
    axes="singleton",
    sources={"entering": ("resid_post_mlp", "previous"), "activation": "mlp_post_act"},
    weights={"writes": "mlp_to_residual"},
)
def mlp_erasure(entering: "Tensor", activation: "Tensor", writes: "Tensor") -> "Tensor":
    """How far an MLP's write points against the stream that enters its layer: minus a cosine."""
    written = activation @ writes
    lengths = (entering.square().sum(-1) * written.square().sum(-1)).sqrt()
    return -((entering * written).sum(-1) / lengths).unsqueeze(-1)
