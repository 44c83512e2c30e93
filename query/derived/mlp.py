"""Scalars of MLP neurons that need no gradient.

Formulas, with ``a`` the activations and ``W`` the output weights (neuron, channel):
``mlp_write_norm = a[t, n] * |W[n]|`` (signed), ``mlp_write = a[t, n] * W[n, c]`` and
``resid_delta_mlp_from_mlp_post_act = a W``, which leaves the output bias out.
"""

from actstore.query.derived.nodes import NEURON, write, write_norm, write_sum

__all__ = ["SCALARS"]

SCALARS = (
    write_norm(NEURON),
    write(NEURON),
    write_sum(NEURON, "resid_delta_mlp_from_mlp_post_act"),
)
