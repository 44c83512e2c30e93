"""A node's activation as the objective of a backward pass.

The residual stream before the node is taken out of the pass, still attached to its graph;
the activation is recomputed from it by the recipes that the derived scalars use, outside
the model, and differentiated. Rules: spec/derived_scalars.md (f), "Running a trace".
"""

from collections.abc import Mapping, Sequence

import torch

from actstore.ingest.ablations import check_index
from actstore.ingest.hooks import Place, wide_dtype
from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import Columns, Objective
from actstore.ingest.splicing import Splice
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.recipes import (
    RECIPES,
    Setting,
    WeightName,
    per_query_head,
    recompute,
)
from actstore.store.nodes import (
    NODE_LOCATIONS,
    ActivationIndex,
    AttentionTraceType,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import (
    ActivationLocationType,
    NodeType,
    WeightLocationType,
)

__all__ = ["Trace"]

_L = ActivationLocationType
_BEFORE_MLP = (_L.MLP_POST_ACT, _L.RESID_DELTA_MLP)


class Trace:
    """A trace of one model, checked.

    Args:
        config: what is traced.
        loaded: the model.
        splices: the autoencoders in the pass.
        autoencoders: the same by node type.
        objective: for a trace through V that has no downstream node, else None.
        lengths: tokens of each sequence of the batch.

    Raises:
        InvalidInput: the node is outside the model or a sequence, an index of it is
            missing, or the trace does not go with the objective or its downstream node.
        Unavailable: the node is a latent of autoencoders that are not in the pass.
    """

    def __init__(
        self,
        config: TraceConfig,
        loaded: LoadedModel,
        splices: Mapping[Place, Splice],
        autoencoders: Autoencoders,
        objective: Objective | None,
        lengths: Sequence[int],
    ) -> None:
        self._config = config
        self._loaded = loaded
        self._splices = splices
        self._autoencoders = autoencoders
        self._objective = objective
        self._recipes = RECIPES[loaded.architecture.name]
        self._weights = loaded.weights()
        self._dtype = wide_dtype(loaded.dtype)
        self._read: dict[tuple[WeightName, int | None], torch.Tensor] = {}
        downstream = config.downstream_trace_config
        for traced in (config, *([] if downstream is None else [downstream])):
            self._check_node(traced, lengths)
        on_loss = config.attention_trace_type is AttentionTraceType.V and downstream is None
        if on_loss != (objective is not None):
            raise _invalid(
                "A trace through V without a downstream trace needs an objective. Pass one, or "
                "set downstream_trace_config."
                if on_loss
                else "A pass has one objective, and a trace is one. Leave the trace or the "
                "objective out; only a trace through V without a downstream trace takes both."
            )
        if downstream is not None and not self._is_before(downstream):
            raise _invalid(
                f"The downstream {downstream.node_index.node_type} of layer "
                f"{downstream.node_index.layer_index} reads the residual stream before the head "
                f"of layer {config.node_index.layer_index} writes to it. Choose a later node."
            )

    def _check_node(self, config: TraceConfig, lengths: Sequence[int]) -> None:
        node = config.node_index
        check_index(
            ActivationIndex.from_node_index(node, NODE_LOCATIONS[node.node_type])
            if not node.node_type.is_autoencoder_latent
            else ActivationIndex(
                self._splice(config).latents[0][0], node.tensor_indices, node.layer_index
            ),
            self._loaded,
            self._splices,
            lengths,
        )
        needed = 3 if node.node_type is NodeType.ATTENTION_HEAD else 2
        if len(node.tensor_indices) != needed or None in node.tensor_indices:
            raise _invalid(
                f"The trace of a {node.node_type} node with indices {node.tensor_indices}: a pass "
                f"starts at one activation. Give {needed} numbers."
            )

    def _splice(self, config: TraceConfig) -> Splice:
        node = config.node_index
        family = self._autoencoders.of(node.node_type)
        return self._splices[family.location, family.at_layer(node.layer_index).layer]

    def _is_before(self, downstream: TraceConfig) -> bool:
        location, read = self._place(downstream)
        written = self._config.node_index.layer_index
        assert written is not None, "a traced node has a layer"
        return location is not _L.RESID_POST_EMBEDDING and read is not None and read >= written

    def _place(self, config: TraceConfig) -> Place:
        """The residual stream that a node reads."""
        node = config.node_index
        assert node.layer_index is not None, "a traced node has a layer"
        location = NODE_LOCATIONS[node.node_type]
        if node.node_type.is_autoencoder_latent:
            location = self._splice(config).autoencoder.location
        if location in _BEFORE_MLP and not self._loaded.dimensions.is_parallel:
            return _L.RESID_POST_ATTN, node.layer_index
        if node.layer_index == 0:
            return _L.RESID_POST_EMBEDDING, None
        return _L.RESID_POST_MLP, node.layer_index - 1

    @property
    def _target(self) -> Place | None:
        """The residual stream that the target of a trace through V reads; None for others."""
        downstream = self._config.downstream_trace_config
        if downstream is not None:
            return self._place(downstream)
        if self._config.attention_trace_type is AttentionTraceType.V:
            return _L.RESID_POST_MLP, self._loaded.dimensions.n_layers - 1
        return None

    @property
    def places(self) -> set[Place]:
        """The residual streams that the objective is recomputed from."""
        return {self._place(self._config), *([] if self._target is None else [self._target])}

    def objective(
        self,
        residuals: Mapping[Place, torch.Tensor],
        token_ids: torch.Tensor,
        columns: Columns | None,
    ) -> torch.Tensor:
        """The traced activation of one sequence.

        Args:
            residuals: those of :attr:`places`, (token, channel), on the graph of the pass.
            token_ids: int64 (token,).
            columns: the sequence's own values, in a list of one.

        Returns:
            A scalar.
        """
        residual = residuals[self._place(self._config)].to(self._dtype)
        if self._target is None:
            return self._activation(self._config, residual)
        target = residuals[self._target].detach().to(self._dtype).requires_grad_()
        downstream = self._config.downstream_trace_config
        value = (
            self._loss(target, token_ids, columns)
            if downstream is None
            else self._activation(downstream, target)
        )
        (gradient,) = torch.autograd.grad(value, target)
        return self._effect(residual, gradient)

    def _activation(self, config: TraceConfig, residual: torch.Tensor) -> torch.Tensor:
        node = config.node_index
        is_before = config.pre_or_post_act is PreOrPostAct.PRE
        layer, detach = node.layer_index, config.detach_layer_norm_scale
        if node.node_type is NodeType.ATTENTION_HEAD:
            token, attended, head = node.tensor_indices
            scores = _L.ATTN_QK_LOGITS if is_before else _L.ATTN_QK_PROBS
            constants = {
                location: self._values(location, layer, residual.detach(), detach)
                for location in _CONSTANTS[config.attention_trace_type]
            }
            return self._values(scores, layer, residual, detach, constants)[token, head, attended]
        token, unit = node.tensor_indices
        if not node.node_type.is_autoencoder_latent:
            location = _L.MLP_PRE_ACT if is_before else _L.MLP_POST_ACT
            return self._values(location, layer, residual, detach)[token, unit]
        autoencoder = self._splice(config).autoencoder
        values = autoencoder.encode_pre_act(
            self._values(autoencoder.location, layer, residual, detach)
        )
        return (values if is_before else autoencoder.activate(values))[token, unit]

    def _effect(self, residual: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """What a head writes at a pair of tokens, along a gradient; differentiable through V."""
        node = self._config.node_index
        token, attended, head = node.tensor_indices
        layer = node.layer_index
        pattern = self._values(_L.ATTN_QK_PROBS, layer, residual.detach(), detach=True)
        shared = self._values(_L.ATTN_VALUE, layer, residual, detach=True)
        value = per_query_head(shared, self._loaded.dimensions)[attended, head]
        write = value @ self._weight(WeightLocationType.ATTN_TO_RESIDUAL, layer)[head]
        if self._loaded.dimensions.has_post_norms:
            # With the denominator that the pass had, a head's part of the sum is linear.
            scale = self._values(
                _L.ATTN_OUTPUT_LAYER_NORM_SCALE, layer, residual.detach(), detach=True
            )
            gain = self._weight(WeightLocationType.LAYER_NORM_GAIN_POST_ATTN, layer)
            write = write * gain / scale[token]
        return pattern[token, head, attended] * (write @ gradient[token])

    def _loss(
        self,
        residual: torch.Tensor,
        token_ids: torch.Tensor,
        columns: Columns | None,
    ) -> torch.Tensor:
        assert self._objective is not None, "checked on creation"
        logits = recompute(
            self._recipes,
            _L.LOGITS,
            Setting(self._loaded.dimensions, None, detach_scale=True),
            self._weight,
            {_L.RESID_POST_MLP: residual},
        )
        return self._objective(logits[None], token_ids[None], [len(token_ids)], columns)[0]

    def _values(
        self,
        location: ActivationLocationType,
        layer: int | None,
        residual: torch.Tensor,
        detach: bool,
        given: Mapping[ActivationLocationType, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        known = dict(given or {})
        if location in (_L.MLP_PRE_ACT, *_BEFORE_MLP):
            known[_L.RESID_POST_ATTN] = residual
        setting = Setting(self._loaded.dimensions, layer, detach_scale=detach)
        return recompute(self._recipes, location, setting, self._weight, known, residual)

    def _weight(self, name: WeightName, layer: int | None) -> torch.Tensor:
        key = (name, layer)
        if key not in self._read:
            if isinstance(name, WeightLocationType):
                array = self._weights.weight(name, layer)
            else:
                assert layer is not None, "biases of attention have a layer"
                array = self._weights.attention_bias(name, layer)
            self._read[key] = torch.from_numpy(array).to(self._loaded.device, self._dtype)
        return self._read[key]


_CONSTANTS: Mapping[AttentionTraceType | None, tuple[ActivationLocationType, ...]] = {
    AttentionTraceType.Q: (_L.ATTN_KEY,),
    AttentionTraceType.K: (_L.ATTN_QUERY,),
    AttentionTraceType.QK: (),
}


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
