"""Scalars of MLP neurons: a neuron through every view of a node."""

from actstore.query.derived.declaration import Direction
from actstore.query.derived.nodes import (
    NEURON,
    act_times_grad,
    projection,
    write,
    write_norm,
    write_sum,
)

__all__ = ["SCALARS"]

SCALARS = (
    write_norm(NEURON),
    write(NEURON),
    write_sum(NEURON, "resid_delta_mlp_from_mlp_post_act"),
    act_times_grad(NEURON),
    projection(NEURON, Direction.FINAL_RESIDUAL_GRAD, "mlp_write_to_final_residual_grad"),
    projection(
        NEURON,
        Direction.FINAL_ACTIVATION_RESIDUAL_GRAD,
        "mlp_write_to_final_activation_residual_grad",
    ),
)
