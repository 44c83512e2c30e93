"""What a scalar costs per token and layer, from its declaration alone.

*Operations* count the formula as one sum over every axis of its sources, weights and value,
a multiplication and an addition for each term: an upper bound, since sums can be ordered
better. A scalar that is the raw value costs none, one that rescales it one for each value.
Sources that are scalars themselves add their own. Parts of the model that are run again for
gradients at a node, or for changes along a write, are not counted.

*Bytes* count each raw source once, as float32. What is not stored is reconstructed, and then
what it is made from is read in its place. Weights are read once per layer, not per token.
"""

from collections.abc import Iterable

from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    Identity,
    LatentWrites,
    Product,
    ScaledBy,
)
from actstore.query.derived.registry import SCALARS, inputs_of
from actstore.store.model.recipes import WeightName
from actstore.store.vocabulary import ActivationLocationType, Dimension, WeightLocationType

__all__ = ["SYMBOLS", "axes_of_weight", "bytes_read", "operations", "size_text"]

_D = Dimension
_W = WeightLocationType

SYMBOLS = {
    _D.ATTENDED: "U",
    _D.HEAD: "H",
    _D.KV_HEAD: "K",
    _D.HEAD_CHANNEL: "C",
    _D.NEURON: "F",
    _D.LATENT: "N",
    _D.CHANNEL: "D",
    _D.VOCABULARY: "V",
}
"""Axis -> what formulas of cost call its length."""

_WEIGHT_AXES = {
    _W.EMBEDDING: (_D.VOCABULARY, _D.CHANNEL),
    _W.UNEMBEDDING: (_D.CHANNEL, _D.VOCABULARY),
    _W.ATTN_TO_QUERY: (_D.HEAD, _D.CHANNEL, _D.HEAD_CHANNEL),
    _W.ATTN_TO_KEY: (_D.KV_HEAD, _D.CHANNEL, _D.HEAD_CHANNEL),
    _W.ATTN_TO_VALUE: (_D.KV_HEAD, _D.CHANNEL, _D.HEAD_CHANNEL),
    _W.ATTN_TO_RESIDUAL: (_D.HEAD, _D.HEAD_CHANNEL, _D.CHANNEL),
    _W.MLP_TO_HIDDEN: (_D.CHANNEL, _D.NEURON),
    _W.MLP_HIDDEN_BIAS: (_D.NEURON,),
    _W.MLP_TO_HIDDEN_LINEAR: (_D.CHANNEL, _D.NEURON),
    _W.MLP_HIDDEN_LINEAR_BIAS: (_D.NEURON,),
    _W.MLP_TO_RESIDUAL: (_D.NEURON, _D.CHANNEL),
    _W.QUERY_NORM_GAIN: (_D.HEAD_CHANNEL,),
    _W.KEY_NORM_GAIN: (_D.HEAD_CHANNEL,),
}


def axes_of_weight(weight: WeightName | LatentWrites) -> tuple[Dimension, ...]:
    """A weight's axes.

    >>> [str(axis) for axis in axes_of_weight(WeightLocationType.MLP_TO_RESIDUAL)]
    ['neuron', 'channel']
    """
    if isinstance(weight, LatentWrites):
        return (_D.LATENT, _D.CHANNEL)
    if isinstance(weight, ActivationLocationType):
        return weight.axes
    return _WEIGHT_AXES.get(weight, (_D.CHANNEL,))


def size_text(axes: Iterable[Dimension]) -> str:
    """A product of lengths.

    >>> size_text([Dimension.NEURON, Dimension.CHANNEL])
    'F·D'
    """
    found = set(axes)
    return "·".join(symbol for axis, symbol in SYMBOLS.items() if axis in found) or "1"


def operations(declared: DerivedScalar) -> str:
    """Floating-point operations per token and layer, at most; ``no`` for none.

    >>> operations(SCALARS["mlp_write"])
    '2·F·D'
    """
    terms: dict[str, None] = {}
    waiting = [declared]
    while waiting:
        one = waiting.pop(0)
        terms[_own_operations(one)] = None
        waiting += [SCALARS[str(source.of)] for source in one.sources if source.of in SCALARS]
    return " + ".join(term for term in terms if term != "0") or "no"


def _own_operations(declared: DerivedScalar) -> str:
    if isinstance(declared.dependence, Identity):
        return "0"
    if isinstance(declared.dependence, ScaledBy | Product):
        return size_text(declared.axes)
    axes = dict.fromkeys(
        axis
        for group in (
            *(_axes_of_source(source.of) for source in declared.sources),
            *map(axes_of_weight, declared.weights),
            declared.ranked_axes,
        )
        for axis in group
    )
    # Heads of queries come in groups that share their keys and values: each is counted once.
    shared = {_D.KV_HEAD} if _D.HEAD in axes else set()
    return f"2·{size_text(axes.keys() - shared)}"


def _axes_of_source(of: ActivationLocationType | str) -> tuple[Dimension, ...]:
    if isinstance(of, ActivationLocationType):
        return of.axes
    return (_D.CHANNEL,) if of in set(Direction) else SCALARS[of].axes


def bytes_read(declared: DerivedScalar) -> str:
    """Bytes read from float32 arrays per token and layer.

    >>> bytes_read(SCALARS["mlp_act_times_grad"])
    '4·(F + F)'
    """
    inputs = dict.fromkeys((source.of, source.pass_type) for source in inputs_of(declared))
    sizes = [size_text(_axes_of_source(of)) for of, _ in inputs]
    if sizes == ["1"]:
        return "4"
    return f"4·{sizes[0]}" if len(sizes) == 1 else f"4·({' + '.join(sizes)})"
