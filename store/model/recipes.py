"""Recipes: how a location's values follow from other locations and the weights.

One table per architecture, one row per recipe, assembled from the pieces that families
share. Values are computed in float64 for one
whole sequence at a time, so a value never depends on what else was asked for. The
forward recipes repeat the model's own computation; the subtractions stand at the end
and cost more, since they lose the digits that the two residuals share.

Every function is differentiable, backward and forward, so :func:`recompute` also gives
the activations of a node as a function of the residual stream before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from actstore.store.model.architecture import ARCHITECTURES, Architecture
from actstore.store.model.computations import (
    Function,
    Setting,
    activate,
    affine,
    difference,
    embed,
    from_heads,
    hidden_pairs,
    into_heads,
    into_mlp,
    into_turned_heads,
    norm_scale,
    per_query_head,
    probabilities,
    scores,
    then_normed,
    then_scale,
    total,
    unembed,
    weighted_sum,
)
from actstore.store.model.sources import LayerRule, Source
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LAST_RESORT",
    "RECIPES",
    "Recipe",
    "Setting",
    "WeightName",
    "WeightOf",
    "hidden_pairs",
    "per_query_head",
    "recompute",
]

WeightName = WeightLocationType | ActivationLocationType
"""A weight; a location stands for the bias that queries, keys or values contain."""


WeightOf = Callable[[WeightName, int | None], "Tensor"]
"""Gives a weight of a layer, in the dtype of the computation."""


@dataclass(frozen=True)
class Recipe:
    """One way to a location's values.

    Attributes:
        target: the location.
        inputs: locations it is made from; none means the token ids.
        weights: weights of the target's own layer.
        function: ``(inputs, weights, setting) -> value``, float64, the token axis first.
        scale: the location of the norm's denominator that the function divides by.
        cost: steps that this recipe counts for when several lead to the target.
    """

    target: ActivationLocationType
    inputs: tuple[Source, ...]
    weights: tuple[WeightName, ...]
    function: Function
    scale: ActivationLocationType | None = None
    cost: int = 1


_L = ActivationLocationType
_W = WeightLocationType
LAST_RESORT = 1000

_BEFORE = Source(_L.RESID_POST_MLP, layer=LayerRule.PREVIOUS)
_LAST = Source(_L.RESID_POST_MLP, layer=-1)


def _same(*locations: ActivationLocationType) -> tuple[Source, ...]:
    return tuple(Source(location) for location in locations)


def _norm_weights(
    family: Architecture, gain: WeightLocationType, bias: WeightLocationType
) -> tuple[WeightLocationType, ...]:
    return (gain, bias) if family.norm.centres else (gain,)


def _attention(family: Architecture) -> Iterator[Recipe]:
    norm = _norm_weights(family, _W.LAYER_NORM_GAIN_PRE_ATTN, _W.LAYER_NORM_BIAS_PRE_ATTN)
    scale = _L.ATTN_INPUT_LAYER_NORM_SCALE
    yield Recipe(scale, (_BEFORE,), (), norm_scale)
    for target, matrix, gain in (
        (_L.ATTN_QUERY, _W.ATTN_TO_QUERY, _W.QUERY_NORM_GAIN),
        (_L.ATTN_KEY, _W.ATTN_TO_KEY, _W.KEY_NORM_GAIN),
    ):
        own_norm = (gain,) if family.has_query_key_norms else ()
        weights: tuple[WeightName, ...] = (*norm, matrix, target, *own_norm)
        yield Recipe(target, (_BEFORE,), weights, into_turned_heads, scale)
    value: tuple[WeightName, ...] = (*norm, _W.ATTN_TO_VALUE, _L.ATTN_VALUE)
    yield Recipe(_L.ATTN_VALUE, (_BEFORE,), value, into_heads, scale)
    yield Recipe(_L.ATTN_QK_LOGITS, _same(_L.ATTN_QUERY, _L.ATTN_KEY), (), scores)
    yield Recipe(_L.ATTN_QK_PROBS, _same(_L.ATTN_QK_LOGITS), (), probabilities)
    inputs = _same(_L.ATTN_QK_PROBS, _L.ATTN_VALUE)
    yield Recipe(_L.ATTN_WEIGHTED_SUM_OF_VALUES, inputs, (), weighted_sum)
    yield from _write(
        family,
        _L.RESID_DELTA_ATTN,
        _same(_L.ATTN_WEIGHTED_SUM_OF_VALUES),
        (_W.ATTN_TO_RESIDUAL, _W.ATTN_OUTPUT_BIAS),
        from_heads,
        (_L.ATTN_OUTPUT_LAYER_NORM_SCALE, _W.LAYER_NORM_GAIN_POST_ATTN),
    )


def _mlp(family: Architecture) -> Iterator[Recipe]:
    norm = _norm_weights(family, _W.LAYER_NORM_GAIN_PRE_MLP, _W.LAYER_NORM_BIAS_PRE_MLP)
    read = (_BEFORE,) if family.is_parallel else _same(_L.RESID_POST_ATTN)
    scale = _L.MLP_INPUT_LAYER_NORM_SCALE
    yield Recipe(scale, read, (), norm_scale)
    gate = (*norm, _W.MLP_TO_HIDDEN, _W.MLP_HIDDEN_BIAS)
    yield Recipe(_L.MLP_PRE_ACT, read, gate, into_mlp, scale)
    branches = [_L.MLP_PRE_ACT]
    if family.is_gated:
        linear = (*norm, _W.MLP_TO_HIDDEN_LINEAR, _W.MLP_HIDDEN_LINEAR_BIAS)
        yield Recipe(_L.MLP_PRE_LINEAR, read, linear, into_mlp, scale)
        branches.append(_L.MLP_PRE_LINEAR)
    yield Recipe(_L.MLP_POST_ACT, _same(*branches), (), activate)
    yield from _write(
        family,
        _L.RESID_DELTA_MLP,
        _same(_L.MLP_POST_ACT),
        (_W.MLP_TO_RESIDUAL, _W.MLP_OUTPUT_BIAS),
        affine,
        (_L.MLP_OUTPUT_LAYER_NORM_SCALE, _W.LAYER_NORM_GAIN_POST_MLP),
    )


def _write(
    family: Architecture,
    target: ActivationLocationType,
    inputs: tuple[Source, ...],
    weights: tuple[WeightName, ...],
    function: Function,
    post_norm: tuple[ActivationLocationType, WeightLocationType],
) -> Iterator[Recipe]:
    """What is added to the stream, through the norm that follows where there is one."""
    if not family.has_post_norms:
        yield Recipe(target, inputs, weights, function)
        return
    scale, gain = post_norm
    yield Recipe(scale, inputs, weights, then_scale(function))
    yield Recipe(target, inputs, (*weights, gain), then_normed(function), scale)


def _residuals(family: Architecture) -> Iterator[Recipe]:
    """The streams as sums of what is written, then what is written as their difference."""
    attention, mlp = _same(_L.RESID_DELTA_ATTN, _L.RESID_DELTA_MLP)
    middle, after = _same(_L.RESID_POST_ATTN, _L.RESID_POST_MLP)
    # (sum, addends): all that are targets of their own can be had from the others.
    sums = (
        ((after, (_BEFORE, attention, mlp)),)
        if family.is_parallel
        else ((middle, (_BEFORE, attention)), (after, (middle, mlp)))
    )
    for whole, addends in sums:
        yield Recipe(whole.location, addends, (), total)
    for whole, addends in sums:
        for addend in addends:
            if addend is not _BEFORE:
                others = tuple(other for other in addends if other is not addend)
                inputs = (whole, *others)
                yield Recipe(addend.location, inputs, (), difference, cost=LAST_RESORT)


def recipes_of(family: Architecture) -> tuple[Recipe, ...]:
    """The recipes of a family's locations; the first of each is the model's own computation."""
    embedding = (_W.EMBEDDING, _W.POSITION_EMBEDDING)
    final = _norm_weights(family, _W.LAYER_NORM_GAIN_FINAL, _W.LAYER_NORM_BIAS_FINAL)
    scale = _L.RESID_FINAL_LAYER_NORM_SCALE
    ways = (
        Recipe(
            _L.RESID_POST_EMBEDDING,
            (),
            tuple(name for name in embedding if name in family.weights),
            embed,
        ),
        *_attention(family),
        *_mlp(family),
        *_residuals(family),
        Recipe(scale, (_LAST,), (), norm_scale),
        Recipe(_L.LOGITS, (_LAST,), (*final, _W.UNEMBEDDING), unembed, scale),
    )
    return tuple(sorted(ways, key=lambda recipe: recipe.cost >= LAST_RESORT))


RECIPES: Mapping[str, tuple[Recipe, ...]] = MappingProxyType(
    {family.name: recipes_of(family) for family in ARCHITECTURES}
)
"""Architecture -> its recipes."""


def recompute(
    recipes: Sequence[Recipe],
    target: ActivationLocationType,
    setting: Setting,
    weight: WeightOf,
    given: Mapping[ActivationLocationType, "Tensor"],
    before: "Tensor | None" = None,
) -> "Tensor":
    """A location of one layer as a function of what stands before it.

    Args:
        recipes: those of the architecture.
        target: the location wanted.
        setting: its layer, and how norms are differentiated.
        weight: where weights come from.
        given: locations of the same layer whose values are known; a value that is to be a
            constant is given detached. The stream that the MLP reads goes by
            ``resid_post_attn`` in models without one too.
        before: the residual stream before the layer, ``(token, channel)``.

    Returns:
        ``(token, *unit axes)``, on the graph of what was given.
    """
    known = dict(given)
    if setting.dimensions.is_parallel and _L.RESID_POST_ATTN in known:
        # Where the MLP reads what attention reads, the stream before it is the layer's.
        before = known.pop(_L.RESID_POST_ATTN)

    def value(source: Source) -> "Tensor":
        if source.layer is LayerRule.PREVIOUS:
            assert before is not None, "the residual stream before the layer is needed"
            return before
        return at(source.location)

    def at(location: ActivationLocationType) -> "Tensor":
        if location not in known:
            recipe = next(recipe for recipe in recipes if recipe.target is location)
            weights = [weight(name, setting.layer) for name in recipe.weights]
            inputs = [value(source) for source in recipe.inputs]
            known[location] = recipe.function(inputs, weights, setting)
        return known[location]

    return at(target)
