"""What a model's blocks consist of, as far as the names of its activations depend on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from actstore.query.cache.names import block_name, split_name
from actstore.store.model.weights import ModelWeights
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

__all__ = ["Anatomy", "NormPlace"]

_L = ActivationLocationType
_W = WeightLocationType


class NormPlace(Enum):
    """A norm that reads the residual stream: its name, its denominator, gain and bias."""

    ATTENTION = (
        "ln1",
        _L.ATTN_INPUT_LAYER_NORM_SCALE,
        _W.LAYER_NORM_GAIN_PRE_ATTN,
        _W.LAYER_NORM_BIAS_PRE_ATTN,
    )
    MLP = (
        "ln2",
        _L.MLP_INPUT_LAYER_NORM_SCALE,
        _W.LAYER_NORM_GAIN_PRE_MLP,
        _W.LAYER_NORM_BIAS_PRE_MLP,
    )
    FINAL = (
        "ln_final",
        _L.RESID_FINAL_LAYER_NORM_SCALE,
        _W.LAYER_NORM_GAIN_FINAL,
        _W.LAYER_NORM_BIAS_FINAL,
    )

    @property
    def hook(self) -> str:
        """Its name among the hooks."""
        return self.value[0]

    @property
    def scale(self) -> ActivationLocationType:
        """Where its denominator is kept."""
        return self.value[1]

    @property
    def gain(self) -> WeightLocationType:
        """Its gain."""
        return self.value[2]

    @property
    def bias(self) -> WeightLocationType:
        """Its bias; norms without centring have none."""
        return self.value[3]


@dataclass(frozen=True)
class Anatomy:
    """Which places a model's forward pass has.

    Attributes:
        n_layers: blocks.
        centres: whether norms subtract the mean over channels.
        has_position_embedding: whether positions are added to the stream.
        is_rotary: whether queries and keys are rotated by their position.
        is_parallel: whether attention and MLP read the same residual stream.
        is_gated: whether the MLP has a linear branch beside its gate.
        has_query_key_norms: whether queries and keys pass a norm of their own.
        has_post_norms: whether what a block writes passes a norm first.
    """

    n_layers: int
    centres: bool
    has_position_embedding: bool
    is_rotary: bool
    is_parallel: bool
    is_gated: bool
    has_query_key_norms: bool
    has_post_norms: bool

    @classmethod
    def of(cls, model: ModelWeights) -> "Anatomy":
        """What a model's description says."""
        sizes = model.dimensions
        return cls(
            n_layers=sizes.n_layers,
            centres=sizes.norm.centres,
            has_position_embedding=_W.POSITION_EMBEDDING in model.architecture.weights,
            is_rotary=bool(sizes.rotary),
            is_parallel=sizes.is_parallel,
            is_gated=sizes.is_gated,
            has_query_key_norms=sizes.has_query_key_norms,
            has_post_norms=sizes.has_post_norms,
        )

    def hooks(self) -> Iterator[str]:
        """Full names in the order in which the forward pass comes to them."""
        yield "hook_embed"
        if self.has_position_embedding:
            yield "hook_pos_embed"
        for layer in range(self.n_layers):
            for rest in self._of_block():
                yield block_name(layer, rest)
        yield from ("ln_final.hook_scale", "ln_final.hook_normalized")

    def has(self, name: str) -> bool:
        """Whether the model has a place of this full name, listed or computed when asked for."""
        layer, rest = split_name(name)
        if layer is None:
            return name == "logits" or name in self._outside
        return layer < self.n_layers and (rest == "attn.hook_result" or rest in self._in_block)

    @cached_property
    def _in_block(self) -> frozenset[str]:
        return frozenset(self._of_block())

    @cached_property
    def _outside(self) -> frozenset[str]:
        return frozenset(name for name in self.hooks() if split_name(name)[0] is None)

    def _of_block(self) -> Iterator[str]:
        yield from ("hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized")
        yield from ("attn.hook_q", "attn.hook_k", "attn.hook_v")
        if self.has_query_key_norms:
            for norm in ("q_norm", "k_norm"):
                yield f"attn.{norm}.hook_scale"
                yield f"attn.{norm}.hook_normalized"
        if self.is_rotary:
            yield from ("attn.hook_rot_q", "attn.hook_rot_k")
        yield from ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z")
        if self.has_post_norms:
            yield from ("ln1_post.hook_scale", "ln1_post.hook_normalized")
        yield "hook_attn_out"
        if not self.is_parallel:
            yield "hook_resid_mid"
        yield from ("ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre")
        if self.is_gated:
            yield "mlp.hook_pre_linear"
        yield "mlp.hook_post"
        if self.has_post_norms:
            yield from ("ln2_post.hook_scale", "ln2_post.hook_normalized")
        yield from ("hook_mlp_out", "hook_resid_post")
