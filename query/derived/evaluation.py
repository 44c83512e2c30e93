"""Derived values of one sequence: declarations applied to raw values, in float64.

The values may come from a store or from a fresh pass over a prompt; the declarations
and this function are the same for both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from actstore.query.derived.backward import in_pass
from actstore.query.derived.config import DstConfig
from actstore.query.derived.conformity import conforming
from actstore.query.derived.declaration import (
    Coefficient,
    DerivedScalar,
    Direction,
    Identity,
    LatentWrites,
    LayerRule,
    ScaledBy,
    Source,
)
from actstore.query.derived.post_norms import PostNorm, post_norm
from actstore.query.derived.precedence import Place, precedes
from actstore.query.derived.reconstitution import gradient_at, traced_activation
from actstore.query.derived.registry import SCALARS, is_built_in
from actstore.store.errors import ErrorKind, Unavailable
from actstore.store.model.autoencoder_functions import Normalisation
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import (
    Recipe,
    Setting,
    WeightName,
    per_query_head,
    recompute,
)
from actstore.store.vocabulary import (
    ActivationLocationType,
    LocationWithinLayer,
    NodeType,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

    from actstore.store.model.autoencoders import Autoencoder

__all__ = ["PLAIN", "RawValues", "evaluate", "layers_of"]

_L = ActivationLocationType

_SPLICED = {
    _L.ONLINE_AUTOENCODER_LATENT: NodeType.AUTOENCODER_LATENT,
    _L.ONLINE_MLP_AUTOENCODER_LATENT: NodeType.MLP_AUTOENCODER_LATENT,
    _L.ONLINE_ATTENTION_AUTOENCODER_LATENT: NodeType.ATTENTION_AUTOENCODER_LATENT,
    _L.ONLINE_MLP_AUTOENCODER_ERROR: NodeType.MLP_AUTOENCODER_LATENT,
    _L.ONLINE_RESIDUAL_MLP_AUTOENCODER_ERROR: NodeType.MLP_AUTOENCODER_LATENT,
    _L.ONLINE_RESIDUAL_ATTENTION_AUTOENCODER_ERROR: NodeType.ATTENTION_AUTOENCODER_LATENT,
}
"""Online location -> the autoencoders that it belongs to."""

_INTO_RESIDUAL = {
    _L.MLP_POST_ACT: WeightLocationType.MLP_TO_RESIDUAL,
    _L.ATTN_WEIGHTED_SUM_OF_VALUES: WeightLocationType.ATTN_TO_RESIDUAL,
}
"""What an autoencoder decodes -> the weights through which that is written."""

PLAIN = DstConfig()
"""A question that adds nothing."""


class RawValues(Protocol):
    """Raw values of one sequence, and what the model adds to them."""

    @property
    def dimensions(self) -> ModelDimensions:
        """The model's sizes."""
        ...

    @property
    def recipes(self) -> Sequence[Recipe]:
        """How the model's locations follow from each other."""
        ...

    def raw(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> "Tensor":
        """float64 ``(token, *location.axes)``."""
        ...

    def has(self, location: ActivationLocationType, layer: int | None) -> bool:
        """Whether an online location was recorded in a pass with an autoencoder spliced in."""
        ...

    def weight(self, name: WeightName, layer: int | None) -> "Tensor":
        """A weight in float64; the layer is ignored for a weight outside the blocks."""
        ...

    def coefficients(self, declared: DerivedScalar, layer: int | None) -> npt.NDArray[np.float64]:
        """The factor per unit of a scalar that rescales a raw value, ``(unit,)``."""
        ...


def layers_of(
    declared: DerivedScalar, n_layers: int, config: DstConfig = PLAIN
) -> tuple[int | None, ...]:
    """The layers at which a scalar exists for a config.

    Raises:
        InvalidInput: the config lacks the node that the scalar is about.
    """
    if not declared.has_layers:
        return (None,)
    if declared.only_node_layer:
        assert declared.about is not None
        layers: tuple[int | None, ...] = (config.layer_about(declared.about, declared.name),)
    elif declared.latents is not None:
        layers = config.family(declared.latents).layers
    else:
        layers = tuple(range(n_layers))
    if declared.layers is not None:
        layers = tuple(layer for layer in layers if layer in declared.layers)
    wanted = config.layer_indices
    return layers if wanted is None else tuple(layer for layer in layers if layer in wanted)


def evaluate(
    declared: DerivedScalar,
    values: RawValues,
    layer: int | None,
    rows: "Tensor | None" = None,
    *,
    config: DstConfig = PLAIN,
    pass_type: PassType = PassType.FORWARD,
) -> "Tensor":
    """The scalar at one layer of one sequence.

    Args:
        declared: what to compute.
        values: where its sources come from.
        layer: the layer, None for a scalar outside the blocks.
        rows: positions to return, int64; all by default. The values are the same. A
            flattened scalar returns the pairs of these positions.
        config: what the question adds.
        pass_type: forward, or the backward value where one is defined.

    Returns:
        float64 ``(token, *declared.axes)``, not to be written to.

    Raises:
        Unavailable: a source cannot be had.
        InvalidInput: the config does not fit the scalar, it has no backward value, or the
            formula of a user's own scalar returned something else than it declares.
    """
    declared = in_pass(declared, pass_type)
    # What is wanted is taken out first where that cannot change a bit: a write vector per
    # token and neuron is a thousand times its source.
    early = rows if declared.row_wise else None
    sources, formula = declared.sources_for(config), declared.formula
    frame = _Frame(declared, values, layer, config)
    tensors = [
        frame.source(source, None if number in declared.whole else early)
        for number, source in enumerate(sources)
    ]
    if isinstance(declared.dependence, ScaledBy):
        import torch

        factor = torch.tensor(values.coefficients(declared, layer))
        scaled = tensors[0] * factor.reshape(tensors[0].shape[1:])
        if declared.dependence.coefficient is Coefficient.WRITE_NORM:
            norm = post_norm(values, WeightLocationType.MLP_TO_RESIDUAL, layer)
            scaled = scaled if norm is None else scaled / norm.divisor(scaled.ndim, early)
        return scaled
    if isinstance(declared.dependence, Identity) or formula is None:
        return tensors[0]
    weights = [frame.weight(weight, layer) for weight in declared.weights]
    for weight in declared.weights:
        if isinstance(weight, LatentWrites):
            tensors[0] = frame.restored(weight.node_type, tensors[0], early)
    if is_built_in(declared):
        frame.through_post_norms(pass_type, tensors, weights, early)
        for number, source in enumerate(sources):
            if source.of is _L.ATTN_VALUE and source.pass_type is PassType.FORWARD:
                tensors[number] = per_query_head(tensors[number], values.dimensions)
        result = formula(tensors, weights, frame)
    else:
        given = [*tensors, *weights]
        versions = [tensor._version for tensor in given]
        result = conforming(
            declared,
            formula(tensors, weights, frame),
            sources,
            given,
            versions,
            values.dimensions,
            None if early is None else len(early),
        )
    if rows is None or declared.row_wise:
        return result
    return result[_pairs_of(rows) if declared.is_flattened else rows]


def _through_decoder(autoencoder: "Autoencoder", read: "Tensor", gradient: "Tensor") -> "Tensor":
    """The gradient of the latents, from that of what the autoencoder's output stands for."""
    import torch

    leaf = autoencoder.encode(read).detach().requires_grad_()
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(autoencoder.decode(leaf, read.detach()), leaf, gradient)
    return pulled


def _pairs_of(rows: "Tensor") -> "Tensor":
    """Places of the pairs of some positions among all pairs, row by row."""
    import torch

    starts = rows * (rows + 1) // 2
    return torch.cat(
        [
            torch.arange(int(start), int(start) + int(row) + 1)
            for start, row in zip(starts, rows, strict=True)
        ]
    )


@dataclass(frozen=True)
class _Frame:
    """One scalar at one layer of one sequence; see ``declaration.Frame``."""

    declared: DerivedScalar
    values: RawValues
    layer: int | None
    config: DstConfig

    @property
    def name(self) -> str:
        return self.declared.name

    @property
    def dimensions(self) -> ModelDimensions:
        return self.values.dimensions

    def source(self, source: Source, rows: "Tensor | None") -> "Tensor":
        """An input: a location, another scalar or a direction."""
        if isinstance(source.of, str) and source.of in set(Direction):
            direction, target = self._direction(Direction(source.of))
            return direction if precedes(self._writes_at(), target) else direction * 0
        about = self.declared.about
        node_layer = None if about is None else self.config.layer_about(about, self.name)
        of, at = source.place(self.layer, self.dimensions.n_layers, node_layer)
        if isinstance(of, ActivationLocationType):
            value = self._raw(of, source.pass_type, at)
            return value if rows is None else value[rows]
        return evaluate(
            SCALARS[of], self.values, at, rows, config=self.config, pass_type=source.pass_type
        )

    def _raw(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> "Tensor":
        """A location; one of an autoencoder that was not spliced in, as if it had been.

        Splicing changes no value and no gradient upstream, so latents and errors follow from
        what the autoencoder reads: ``grad(latent)[n] = decoder[n] . grad(x)``, and the error's
        gradient is ``grad(x)``.
        """
        if self._reads_entering(location):
            return self._entering(pass_type, layer)
        if not location.is_online or self.values.has(location, layer):
            return self.values.raw(location, pass_type, layer)
        assert layer is not None
        autoencoder = self.autoencoder(_SPLICED[location], layer)
        is_latent = location.node_type.is_autoencoder_latent
        if not is_latent and autoencoder.location.axes != location.axes:
            raise Unavailable(
                f"{self.name} is of an autoencoder that reads {location.axes[-1]}s, and the one "
                f"here reads {autoencoder.location}. Give another.",
                kind=ErrorKind.NOT_STORED,
            )
        read = self.values.raw(autoencoder.location, pass_type, layer)
        if pass_type is PassType.FORWARD:
            latents = autoencoder.encode(read)
            return latents if is_latent else read - autoencoder.decode(latents, read)
        if not is_latent:
            return read
        forward = self.values.raw(autoencoder.location, PassType.FORWARD, layer)
        return _through_decoder(autoencoder, forward, read)

    def _reads_entering(self, location: ActivationLocationType) -> bool:
        """Whether the stream after attention stands for what a node of the MLP reads.

        Where attention and MLP run side by side, that is the stream that enters the layer;
        a scalar about no node means the location itself, which is not there.
        """
        return (
            location is _L.RESID_POST_ATTN
            and self.dimensions.is_parallel
            and self.declared.about is not None
            and is_built_in(self.declared)
        )

    def _entering(self, pass_type: PassType, layer: int | None) -> "Tensor":
        source = Source(_L.RESID_POST_MLP, pass_type, LayerRule.PREVIOUS)
        of, at = source.place(layer, self.dimensions.n_layers)
        assert isinstance(of, ActivationLocationType)
        return self.values.raw(of, pass_type, at)

    def weight(self, name: WeightName | LatentWrites, layer: int | None) -> "Tensor":
        if not isinstance(name, LatentWrites):
            return self.values.weight(name, layer)
        assert layer is not None
        autoencoder = self.autoencoder(name.node_type, layer)
        rows = autoencoder.latents_decoder_rows
        into = _INTO_RESIDUAL.get(autoencoder.output_location)
        if into is None:
            return rows
        output = self.values.weight(into, autoencoder.output_layer)
        return rows @ output.reshape(-1, output.shape[-1])

    def restored(
        self, node_type: NodeType, latents: "Tensor", rows: "Tensor | None" = None
    ) -> "Tensor":
        """Latents in the units of what they write: an input's normalisation undone.

        Args:
            node_type: which autoencoders.
            latents: ``(token, latent)``, or of ``rows`` alone.
            rows: positions, where the latents are of those.
        """
        assert self.layer is not None
        autoencoder = self.autoencoder(node_type, self.layer)
        if autoencoder.normalisation is Normalisation.NONE:
            return latents
        read = self.values.raw(autoencoder.location, PassType.FORWARD, self.layer)
        scale = autoencoder.output_scale(read)
        return latents * (scale if rows is None else scale[rows])

    def post_norm(self, weight: WeightName) -> PostNorm | None:
        """The norm that what a weight maps into the stream passes in this layer."""
        return post_norm(self.values, weight, self.layer)

    def through_post_norms(
        self,
        pass_type: PassType,
        tensors: "list[Tensor]",
        weights: "list[Tensor]",
        rows: "Tensor | None",
    ) -> None:
        """Give the first source and the rows it writes the norm that follows; see ``post_norms``.

        Args:
            pass_type: of a backward value, the first source is a gradient.
            tensors: the sources; the first is changed.
            weights: those of the declaration; changed.
            rows: positions, where the first source is of those.
        """
        for number, name in enumerate(self.declared.weights):
            through = WeightLocationType.MLP_TO_RESIDUAL
            if isinstance(name, LatentWrites):
                assert self.layer is not None
                if self.autoencoder(name.node_type, self.layer).location is not _L.MLP_POST_ACT:
                    continue
            elif isinstance(name, WeightLocationType):
                through = name
            norm = self.post_norm(through)
            if norm is not None:
                divisor = norm.divisor(tensors[0].ndim, rows)
                is_forward = pass_type is PassType.FORWARD
                tensors[0] = tensors[0] / divisor if is_forward else tensors[0] * divisor
                weights[number] = weights[number] * norm.gain

    def autoencoder(self, node_type: NodeType, layer: int) -> "Autoencoder":
        import torch

        return self.config.autoencoder(node_type, layer).to(torch.float64)

    def recompute(
        self,
        target: ActivationLocationType,
        layer: int,
        given: "Mapping[ActivationLocationType, Tensor]",
        before: "Tensor | None" = None,
        *,
        detach_scale: bool = False,
    ) -> "Tensor":
        setting = Setting(self.dimensions, layer, detach_scale=detach_scale)
        return recompute(self.values.recipes, target, setting, self.values.weight, given, before)

    def _writes_at(self) -> Place:
        """Where the scalar's first source writes."""
        source = self.declared.sources_for(self.config)[0]
        while isinstance(source.of, str):
            source = SCALARS[source.of].sources_for(self.config)[0]
        layer = self.layer if source.location.has_layers else None
        return self.config.within_layer(source.location), layer

    def _direction(self, direction: Direction) -> tuple["Tensor", Place]:
        """A gradient at a residual stream ``(token, channel)``, and where that is."""
        config, last = self.config, self.dimensions.n_layers - 1
        if direction is Direction.SUBNODE_ATTRIBUTION_GRAD:
            node = config.attributed(self.name)
            layer = config.layer_about("node_index_for_attribution", self.name)
            gradient = SCALARS["grad_of_single_subnode_attribution"]
            value = evaluate(gradient, self.values, layer, config=config)
            return value, self._before(node.node_type, layer)[1]
        backward = direction is Direction.FINAL_RESIDUAL_GRAD
        if backward and config.trace_config is None:
            value = self.values.raw(_L.RESID_POST_MLP, PassType.BACKWARD, last)
            return value, (LocationWithinLayer.RESID_POST_MLP, last)
        trace = config.traced(self.name)
        layer = config.layer_about("trace_config", self.name)
        (location, at), place = self._before(trace.node_index.node_type, layer)
        if backward:
            return self.values.raw(location, PassType.BACKWARD, at), place
        residual = self.values.raw(location, PassType.FORWARD, at)
        function = traced_activation(self, trace, layer)
        return gradient_at(function, residual, trace.node_index, self.name), place

    def _before(
        self, node_type: NodeType, layer: int
    ) -> tuple[tuple[ActivationLocationType, int | None], Place]:
        """The residual stream that a node reads: its location and layer, and its place."""
        after_attention = self.config.residual_before(node_type) is _L.RESID_POST_ATTN
        if after_attention and not self.dimensions.is_parallel:
            return (_L.RESID_POST_ATTN, layer), (LocationWithinLayer.RESID_POST_ATTN, layer)
        entering = (_L.RESID_POST_MLP, layer - 1) if layer else (_L.RESID_POST_EMBEDDING, None)
        return entering, (LocationWithinLayer.END_OF_PREV_LAYER, layer)
