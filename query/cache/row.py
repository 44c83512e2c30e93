"""One row of a batch: every activation of a sequence, by its hook's name."""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from actstore.query.cache.anatomy import Anatomy, NormPlace
from actstore.query.cache.names import UnknownHook, split_name
from actstore.query.cache.norm import Norm
from actstore.query.derived.evaluation import RawValues
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.model.recipes import WeightName
from actstore.store.vocabulary import ActivationLocationType, PassType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Row", "optional_weight"]

_L = ActivationLocationType
_W = WeightLocationType

WeightOf = Callable[[WeightName, int | None], "Tensor"]


def optional_weight(weight: WeightOf, name: WeightName, layer: int | None) -> "Tensor | None":
    """A weight, or None where models of this architecture have none."""
    try:
        return weight(name, layer)
    except Unavailable:
        return None


class Row:
    """Activations of one sequence in float64, read or computed when asked for.

    Args:
        values: the sequence's raw values.
        token_ids: gives its tokens, int64 ``(token,)``.
        anatomy: what its model consists of.
    """

    def __init__(
        self, values: RawValues, token_ids: "Callable[[], Tensor]", anatomy: Anatomy
    ) -> None:
        self.values = values
        self.anatomy = anatomy
        self._give_token_ids = token_ids

    @cached_property
    def token_ids(self) -> "Tensor":
        """The sequence's tokens, int64 ``(token,)``."""
        return self._give_token_ids()

    def raw(self, location: ActivationLocationType, layer: int | None = None) -> "Tensor":
        """A raw location's forward values, ``(token, *axes)``."""
        return self.values.raw(location, PassType.FORWARD, layer)

    def optional(self, name: WeightName, layer: int | None = None) -> "Tensor | None":
        """A weight, or None where the model has none."""
        return optional_weight(self.values.weight, name, layer)

    # The residual stream

    def residual(self, layer: int) -> "Tensor":
        """The stream that enters a block; of layer ``n_layers``, what leaves the last one."""
        if layer == 0:
            return self.raw(_L.RESID_POST_EMBEDDING)
        return self.raw(_L.RESID_POST_MLP, layer - 1)

    def mlp_input(self, layer: int) -> "Tensor":
        """The stream that a block's MLP reads."""
        return self.residual(layer) if self.anatomy.is_parallel else self.middle(layer)

    def middle(self, layer: int) -> "Tensor":
        """The stream between attention and MLP.

        Raises:
            InvalidInput: the two run side by side in this model.
        """
        if self.anatomy.is_parallel:
            raise InvalidInput(
                "Attention and MLP of this model read the same residual stream, so there is no "
                "resid_mid. Leave out incl_mid, and ask for resid_pre.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            )
        return self.raw(_L.RESID_POST_ATTN, layer)

    def embedding(self) -> "Tensor":
        """What the token embedding adds to the stream."""
        if not self.anatomy.has_position_embedding:
            return self.raw(_L.RESID_POST_EMBEDDING)
        return self.values.weight(_W.EMBEDDING, None)[self.token_ids]

    def position_embedding(self) -> "Tensor":
        """What the position embedding adds to the stream."""
        return self.values.weight(_W.POSITION_EMBEDDING, None)[: len(self.token_ids)]

    # Norms

    def norm(self, place: NormPlace, layer: int | None) -> Norm:
        """A norm of the residual stream, with the statistics of what it reads."""
        return Norm(
            self.anatomy.centres,
            self.values.dimensions.layer_norm_epsilon,
            gain=self.values.weight(place.gain, layer),
            bias=self.optional(place.bias, layer),
        )

    def norm_input(self, place: NormPlace, layer: int | None) -> "Tensor":
        """What a norm reads."""
        if place is NormPlace.FINAL:
            return self.residual(self.anatomy.n_layers)
        assert layer is not None
        return self.residual(layer) if place is NormPlace.ATTENTION else self.mlp_input(layer)

    def post_norm(self, kind: str, layer: int, at: "Tensor") -> Norm:
        """The norm that a block's writes pass, linear by the denominator of their sum.

        Args:
            kind: ``attn`` or ``mlp``.
            layer: the block.
            at: positions.
        """
        scale, gain = _POST_NORMS[kind]
        return Norm(
            self.anatomy.centres,
            self.values.dimensions.layer_norm_epsilon,
            scale=self.raw(scale, layer)[at],
            gain=self.values.weight(gain, layer),
        )

    def post_normalised(self, kind: str, layer: int) -> "Tensor":
        """What a block writes over the denominator of the norm that it passes."""
        if kind == "attn":
            written = self.raw(_L.ATTN_WEIGHTED_SUM_OF_VALUES, layer).flatten(1)
            weight = self.values.weight(_W.ATTN_TO_RESIDUAL, layer).flatten(0, 1)
            bias = self.optional(_W.ATTN_OUTPUT_BIAS, layer)
        else:
            written = self.raw(_L.MLP_POST_ACT, layer)
            weight = self.values.weight(_W.MLP_TO_RESIDUAL, layer)
            bias = self.optional(_W.MLP_OUTPUT_BIAS, layer)
        output = written @ weight if bias is None else written @ weight + bias
        return output / self.raw(_POST_NORMS[kind][0], layer)

    # Hooks

    def hook(self, name: str) -> "Tensor":
        """An activation by its full name.

        Returns:
            ``(token, *unit axes)``; an attention pattern as (token, head, attended).

        Raises:
            UnknownHook: this model has no such place.
            Unavailable: it cannot be had from what is stored.
        """
        layer, rest = split_name(name)
        if not self.anatomy.has(name):
            raise UnknownHook(
                f"This model has no {name!r}. Its names are those of `list(cache)`.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            )
        return _OUTSIDE[name](self) if layer is None else _IN_BLOCK[rest](self, layer)

    def scale(self, place: NormPlace, layer: int | None = None) -> "Tensor":
        """A norm's denominator, ``(token, 1)``."""
        return self.raw(place.scale, layer)

    def normalised(self, place: NormPlace, layer: int | None = None) -> "Tensor":
        """A norm's output; before the gain where it does not centre, as upstream has it."""
        norm = self.norm(place, layer)
        residual = self.norm_input(place, layer)
        if not self.anatomy.centres:
            return residual / self.scale(place, layer)
        return norm(residual)

    def projected(
        self, matrix: WeightLocationType, bias: ActivationLocationType, layer: int
    ) -> "Tensor":
        """Queries, keys or values as the projection gives them, ``(token, head, channel)``."""
        entering = self.norm(NormPlace.ATTENTION, layer)(self.residual(layer))
        heads = (entering @ self.values.weight(matrix, layer)).transpose(0, 1)
        added = self.optional(bias, layer)
        return heads if added is None else heads + added

    def query(self, layer: int) -> "Tensor":
        """Queries before they are normalised and rotated."""
        if self.anatomy.is_rotary:
            return self.projected(_W.ATTN_TO_QUERY, _L.ATTN_QUERY, layer)
        return self.raw(_L.ATTN_QUERY, layer)

    def key(self, layer: int) -> "Tensor":
        """Keys before they are normalised and rotated."""
        if self.anatomy.is_rotary:
            return self.projected(_W.ATTN_TO_KEY, _L.ATTN_KEY, layer)
        return self.raw(_L.ATTN_KEY, layer)

    def head_scale(self, heads: "Tensor") -> "Tensor":
        """The denominator of the norm of each head's queries or keys, ``(token, head, 1)``."""
        return Norm(False, self.values.dimensions.layer_norm_epsilon).own_scale(heads)

    def head_normalised(self, heads: "Tensor") -> "Tensor":
        """Each head's queries or keys over that denominator."""
        return heads / self.head_scale(heads)

    def head_results(self, layer: int) -> "Tensor":
        """Each head's part of attention's output, ``(token, head, channel)``."""
        import torch

        z = self.raw(_L.ATTN_WEIGHTED_SUM_OF_VALUES, layer)
        return torch.einsum("thc,hcd->thd", z, self.values.weight(_W.ATTN_TO_RESIDUAL, layer))


def _of(location: ActivationLocationType) -> "Callable[[Row, int], Tensor]":
    return lambda row, layer: row.raw(location, layer)


_POST_NORMS = {
    "attn": (_L.ATTN_OUTPUT_LAYER_NORM_SCALE, _W.LAYER_NORM_GAIN_POST_ATTN),
    "mlp": (_L.MLP_OUTPUT_LAYER_NORM_SCALE, _W.LAYER_NORM_GAIN_POST_MLP),
}
_OUTSIDE: "dict[str, Callable[[Row], Tensor]]" = {
    "hook_embed": Row.embedding,
    "hook_pos_embed": Row.position_embedding,
    "ln_final.hook_scale": lambda row: row.scale(NormPlace.FINAL),
    "ln_final.hook_normalized": lambda row: row.normalised(NormPlace.FINAL),
    "logits": lambda row: row.raw(_L.LOGITS),
}
_IN_BLOCK: "dict[str, Callable[[Row, int], Tensor]]" = {
    "hook_resid_pre": Row.residual,
    "ln1.hook_scale": lambda row, layer: row.scale(NormPlace.ATTENTION, layer),
    "ln1.hook_normalized": lambda row, layer: row.normalised(NormPlace.ATTENTION, layer),
    "attn.hook_q": Row.query,
    "attn.hook_k": Row.key,
    "attn.hook_v": _of(_L.ATTN_VALUE),
    "attn.q_norm.hook_scale": lambda row, layer: row.head_scale(row.query(layer)),
    "attn.q_norm.hook_normalized": lambda row, layer: row.head_normalised(row.query(layer)),
    "attn.k_norm.hook_scale": lambda row, layer: row.head_scale(row.key(layer)),
    "attn.k_norm.hook_normalized": lambda row, layer: row.head_normalised(row.key(layer)),
    "attn.hook_rot_q": _of(_L.ATTN_QUERY),
    "attn.hook_rot_k": _of(_L.ATTN_KEY),
    "attn.hook_attn_scores": _of(_L.ATTN_QK_LOGITS),
    "attn.hook_pattern": _of(_L.ATTN_QK_PROBS),
    "attn.hook_z": _of(_L.ATTN_WEIGHTED_SUM_OF_VALUES),
    "attn.hook_result": Row.head_results,
    "ln1_post.hook_scale": _of(_L.ATTN_OUTPUT_LAYER_NORM_SCALE),
    "ln1_post.hook_normalized": lambda row, layer: row.post_normalised("attn", layer),
    "hook_attn_out": _of(_L.RESID_DELTA_ATTN),
    "hook_resid_mid": Row.middle,
    "ln2.hook_scale": lambda row, layer: row.scale(NormPlace.MLP, layer),
    "ln2.hook_normalized": lambda row, layer: row.normalised(NormPlace.MLP, layer),
    "mlp.hook_pre": _of(_L.MLP_PRE_ACT),
    "mlp.hook_pre_linear": _of(_L.MLP_PRE_LINEAR),
    "mlp.hook_post": _of(_L.MLP_POST_ACT),
    "ln2_post.hook_scale": _of(_L.MLP_OUTPUT_LAYER_NORM_SCALE),
    "ln2_post.hook_normalized": lambda row, layer: row.post_normalised("mlp", layer),
    "hook_mlp_out": _of(_L.RESID_DELTA_MLP),
    "hook_resid_post": _of(_L.RESID_POST_MLP),
}
