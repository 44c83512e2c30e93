"""The words of the field: dimensions, nodes, passes and places in the forward pass.

Each enumeration is one table. The names of the locations are those of OpenAI's
Transformer Debugger (lower case); TransformerLens' hook names are accepted wherever
a location is named.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum

__all__ = [
    "FORWARD_LOCATIONS",
    "OPTIONAL_LOCATIONS",
    "ActivationLocationType",
    "Dimension",
    "LocationWithinLayer",
    "NodeType",
    "PassType",
    "WeightLocationType",
]


class PassType(StrEnum):
    """Forward values, or the gradient of the run's objective with respect to them."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Dimension(StrEnum):
    """Names of tensor axes; the same in Zarr's ``dimension_names``, SQL and results."""

    LAYER = "layer"
    TOKEN = "token"
    ATTENDED = "attended"
    HEAD = "head"
    KV_HEAD = "kv_head"
    """Heads of keys and values: as many as query heads, or fewer that several of them share."""
    HEAD_CHANNEL = "head_channel"
    NEURON = "neuron"
    LATENT = "latent"
    CHANNEL = "channel"
    VOCABULARY = "vocabulary"
    SINGLETON = "singleton"


class NodeType(StrEnum):
    """What the last axis of a tensor indexes."""

    ATTENTION_HEAD = "attention_head"
    QK_CHANNEL = "qk_channel"
    V_CHANNEL = "v_channel"
    MLP_NEURON = "mlp_neuron"
    AUTOENCODER_LATENT = "autoencoder_latent"
    MLP_AUTOENCODER_LATENT = "mlp_autoencoder_latent"
    ATTENTION_AUTOENCODER_LATENT = "attention_autoencoder_latent"
    LAYER = "layer"
    RESIDUAL_STREAM_CHANNEL = "residual_stream_channel"
    VOCAB_TOKEN = "vocab_token"

    @property
    def is_autoencoder_latent(self) -> bool:
        """Whether it is a latent of an autoencoder, of whatever input."""
        return self in (
            NodeType.AUTOENCODER_LATENT,
            NodeType.MLP_AUTOENCODER_LATENT,
            NodeType.ATTENTION_AUTOENCODER_LATENT,
        )


class LocationWithinLayer(IntEnum):
    """Order of the places of one layer: which write comes before which residual stream."""

    END_OF_PREV_LAYER = 1
    ATTN = 2
    RESID_POST_ATTN = 3
    MLP = 4
    RESID_POST_MLP = 5


@dataclass(frozen=True)
class _Location:
    axes: tuple[Dimension, ...]
    node_type: NodeType
    has_layers: bool
    lens_name: str
    meaning: str
    within_layer: LocationWithinLayer | None = None


_D = Dimension
_N = NodeType
_P = LocationWithinLayer


class ActivationLocationType(Enum):
    """A place in the forward pass whose tensor is raw.

    ``axes`` are the axes after the token axis; ``lens_name`` is TransformerLens' hook
    name within a block, or the whole name for a place outside the blocks.
    """

    RESID_POST_EMBEDDING = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        False,
        "hook_embed_sum",
        "token plus position embedding, before block 0",
    )
    ATTN_INPUT_LAYER_NORM_SCALE = _Location(
        (_D.SINGLETON,),
        _N.LAYER,
        True,
        "ln1.hook_scale",
        "denominator of the norm before attention, sqrt(variance + eps)",
    )
    ATTN_QUERY = _Location(
        (_D.HEAD, _D.HEAD_CHANNEL),
        _N.QK_CHANNEL,
        True,
        "attn.hook_q",
        "queries as the attention function received them",
        _P.ATTN,
    )
    ATTN_KEY = _Location(
        (_D.KV_HEAD, _D.HEAD_CHANNEL),
        _N.QK_CHANNEL,
        True,
        "attn.hook_k",
        "keys as the attention function received them",
        _P.ATTN,
    )
    ATTN_VALUE = _Location(
        (_D.KV_HEAD, _D.HEAD_CHANNEL),
        _N.V_CHANNEL,
        True,
        "attn.hook_v",
        "values as the attention function received them",
        _P.ATTN,
    )
    ATTN_QK_LOGITS = _Location(
        (_D.HEAD, _D.ATTENDED),
        _N.ATTENTION_HEAD,
        True,
        "attn.hook_attn_scores",
        "scaled query-key products, minus infinity above the diagonal",
        _P.ATTN,
    )
    ATTN_QK_PROBS = _Location(
        (_D.HEAD, _D.ATTENDED),
        _N.ATTENTION_HEAD,
        True,
        "attn.hook_pattern",
        "attention probabilities over the attended tokens",
        _P.ATTN,
    )
    ATTN_WEIGHTED_SUM_OF_VALUES = _Location(
        (_D.HEAD, _D.HEAD_CHANNEL),
        _N.V_CHANNEL,
        True,
        "attn.hook_z",
        "values weighted by the probabilities, before the output projection",
        _P.ATTN,
    )
    ATTN_OUTPUT_LAYER_NORM_SCALE = _Location(
        (_D.SINGLETON,),
        _N.LAYER,
        True,
        "ln1_post.hook_scale",
        "denominator of the norm that attention's output passes, where a model has one",
    )
    RESID_DELTA_ATTN = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        True,
        "hook_attn_out",
        "what attention adds to the residual stream, output bias included",
        _P.ATTN,
    )
    RESID_POST_ATTN = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        True,
        "hook_resid_mid",
        "residual stream after attention",
        _P.RESID_POST_ATTN,
    )
    MLP_INPUT_LAYER_NORM_SCALE = _Location(
        (_D.SINGLETON,),
        _N.LAYER,
        True,
        "ln2.hook_scale",
        "denominator of the norm before the MLP, sqrt(variance + eps)",
    )
    MLP_PRE_ACT = _Location(
        (_D.NEURON,),
        _N.MLP_NEURON,
        True,
        "mlp.hook_pre",
        "MLP neurons before the activation function",
        _P.MLP,
    )
    MLP_PRE_LINEAR = _Location(
        (_D.NEURON,),
        _N.MLP_NEURON,
        True,
        "mlp.hook_pre_linear",
        "the linear branch that multiplies the activation function of a gated MLP",
        _P.MLP,
    )
    MLP_POST_ACT = _Location(
        (_D.NEURON,),
        _N.MLP_NEURON,
        True,
        "mlp.hook_post",
        "MLP neurons after the activation function; in a gated MLP, times the linear branch",
        _P.MLP,
    )
    MLP_OUTPUT_LAYER_NORM_SCALE = _Location(
        (_D.SINGLETON,),
        _N.LAYER,
        True,
        "ln2_post.hook_scale",
        "denominator of the norm that the MLP's output passes, where a model has one",
    )
    RESID_DELTA_MLP = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        True,
        "hook_mlp_out",
        "what the MLP adds to the residual stream, output bias included",
        _P.MLP,
    )
    RESID_POST_MLP = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        True,
        "hook_resid_post",
        "residual stream after the MLP: the output of the block",
        _P.RESID_POST_MLP,
    )
    RESID_FINAL_LAYER_NORM_SCALE = _Location(
        (_D.SINGLETON,),
        _N.LAYER,
        False,
        "ln_final.hook_scale",
        "denominator of the final norm, sqrt(variance + eps)",
    )
    LOGITS = _Location(
        (_D.VOCABULARY,),
        _N.VOCAB_TOKEN,
        False,
        "logits",
        "the unembedding's output",
    )
    ONLINE_AUTOENCODER_LATENT = _Location(
        (_D.LATENT,),
        _N.AUTOENCODER_LATENT,
        True,
        "online_autoencoder_latent",
        "latents of the one autoencoder that is spliced into the pass",
    )
    ONLINE_MLP_AUTOENCODER_LATENT = _Location(
        (_D.LATENT,),
        _N.MLP_AUTOENCODER_LATENT,
        True,
        "online_mlp_autoencoder_latent",
        "latents of the autoencoder spliced in at the MLP",
        _P.MLP,
    )
    ONLINE_ATTENTION_AUTOENCODER_LATENT = _Location(
        (_D.LATENT,),
        _N.ATTENTION_AUTOENCODER_LATENT,
        True,
        "online_attention_autoencoder_latent",
        "latents of the autoencoder spliced in at attention's output",
        _P.ATTN,
    )
    ONLINE_MLP_AUTOENCODER_ERROR = _Location(
        (_D.NEURON,),
        _N.MLP_NEURON,
        True,
        "online_mlp_autoencoder_error",
        "mlp_post_act less what its autoencoder makes of it",
        _P.MLP,
    )
    ONLINE_RESIDUAL_MLP_AUTOENCODER_ERROR = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        True,
        "online_residual_mlp_autoencoder_error",
        "resid_delta_mlp less what its autoencoder makes of it",
        _P.MLP,
    )
    ONLINE_RESIDUAL_ATTENTION_AUTOENCODER_ERROR = _Location(
        (_D.CHANNEL,),
        _N.RESIDUAL_STREAM_CHANNEL,
        True,
        "online_residual_attention_autoencoder_error",
        "resid_delta_attn less what its autoencoder makes of it",
        _P.ATTN,
    )

    @property
    def label(self) -> str:
        """The lower-case name, as in code, docs, SQL and paths."""
        return self.name.lower()

    @property
    def axes(self) -> tuple[Dimension, ...]:
        """The axes after the token axis."""
        return self.value.axes

    @property
    def node_type(self) -> NodeType:
        """What the last axis indexes."""
        return self.value.node_type

    @property
    def has_layers(self) -> bool:
        """Whether there is one tensor per layer."""
        return self.value.has_layers

    @property
    def meaning(self) -> str:
        """One line for people."""
        return self.value.meaning

    @property
    def is_pair_shaped(self) -> bool:
        """Whether an axis runs over attended tokens."""
        return Dimension.ATTENDED in self.axes

    @property
    def is_online(self) -> bool:
        """Whether it exists only in a pass with an autoencoder spliced in."""
        return self.name.startswith("ONLINE_")

    @property
    def within_layer(self) -> LocationWithinLayer | None:
        """Where in its layer it writes or stands; None where that has no meaning."""
        return self.value.within_layer

    @property
    def is_ranked_by_unit(self) -> bool:
        """Whether its units are columns that people rank: neurons, head channels, latents."""
        first = self.axes[0]
        return not self.is_pair_shaped and first in (
            _D.NEURON,
            _D.HEAD,
            _D.KV_HEAD,
            _D.LATENT,
        )

    @property
    def lens_name(self) -> str:
        """TransformerLens' hook name, without ``blocks.N.``."""
        return self.value.lens_name

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"ActivationLocationType.{self.name}"


class WeightLocationType(StrEnum):
    """A weight of the model, in the orientation that the derived scalars use."""

    EMBEDDING = "embedding"
    UNEMBEDDING = "unembedding"
    POSITION_EMBEDDING = "position_embedding"
    ATTN_TO_QUERY = "attn_to_query"
    ATTN_TO_KEY = "attn_to_key"
    ATTN_TO_VALUE = "attn_to_value"
    ATTN_TO_RESIDUAL = "attn_to_residual"
    ATTN_OUTPUT_BIAS = "attn_output_bias"
    MLP_TO_HIDDEN = "mlp_to_hidden"
    MLP_HIDDEN_BIAS = "mlp_hidden_bias"
    MLP_TO_HIDDEN_LINEAR = "mlp_to_hidden_linear"
    MLP_HIDDEN_LINEAR_BIAS = "mlp_hidden_linear_bias"
    MLP_TO_RESIDUAL = "mlp_to_residual"
    MLP_OUTPUT_BIAS = "mlp_output_bias"
    LAYER_NORM_GAIN_PRE_ATTN = "layer_norm_gain_pre_attn"
    LAYER_NORM_BIAS_PRE_ATTN = "layer_norm_bias_pre_attn"
    LAYER_NORM_GAIN_PRE_MLP = "layer_norm_gain_pre_mlp"
    LAYER_NORM_BIAS_PRE_MLP = "layer_norm_bias_pre_mlp"
    QUERY_NORM_GAIN = "query_norm_gain"
    KEY_NORM_GAIN = "key_norm_gain"
    LAYER_NORM_GAIN_POST_ATTN = "layer_norm_gain_post_attn"
    LAYER_NORM_GAIN_POST_MLP = "layer_norm_gain_post_mlp"
    LAYER_NORM_GAIN_FINAL = "layer_norm_gain_final"
    LAYER_NORM_BIAS_FINAL = "layer_norm_bias_final"

    @property
    def has_layers(self) -> bool:
        """Whether there is one such weight per layer."""
        return self not in (
            WeightLocationType.EMBEDDING,
            WeightLocationType.UNEMBEDDING,
            WeightLocationType.POSITION_EMBEDDING,
            WeightLocationType.LAYER_NORM_GAIN_FINAL,
            WeightLocationType.LAYER_NORM_BIAS_FINAL,
        )


_L = ActivationLocationType
FORWARD_LOCATIONS = tuple(location for location in _L if not location.is_online)
"""The places of models' own forward passes, in their order; no model has all of them."""

OPTIONAL_LOCATIONS = (
    _L.ATTN_OUTPUT_LAYER_NORM_SCALE,
    _L.MLP_PRE_LINEAR,
    _L.MLP_OUTPUT_LAYER_NORM_SCALE,
)
"""Places of some families alone: a gated MLP's linear branch, norms after attention and MLP."""
