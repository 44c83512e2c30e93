"""Setting values or gradients of a pass to constants.

Rules: spec/derived_scalars.md h.4. Padding is never ablated, and neither is the part of
scores and probabilities above the diagonal: tokens see no later ones, whatever is ablated.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from actstore.ingest.hooks import Place
from actstore.ingest.model import LoadedModel
from actstore.ingest.splicing import Splice
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.nodes import Ablation, ActivationIndex
from actstore.store.vocabulary import ActivationLocationType, Dimension, PassType

__all__ = ["Ablations", "check_index", "unknown_location"]

_TOKENS = (Dimension.TOKEN, Dimension.ATTENDED)


class Ablations:
    """The ablations of one pass, in the order given.

    Args:
        ablations: what to set; of several at one value the last holds.
        loaded: the model.
        splices: the autoencoders in the pass.
        lengths: tokens of each sequence of the batch.

    Raises:
        InvalidInput: an index lies outside the model, a sequence or an autoencoder.
    """

    def __init__(
        self,
        ablations: Iterable[Ablation],
        loaded: LoadedModel,
        splices: Mapping[Place, Splice],
        lengths: Sequence[int],
    ) -> None:
        self._lengths = torch.tensor(list(lengths), device=loaded.device)
        self._at: dict[tuple[Place, PassType], list[Ablation]] = {}
        # The latents of a lone autoencoder go by two names and are ablated once.
        names = {name: splice.latents[0] for splice in splices.values() for name in splice.latents}
        for ablation in ablations:
            index = ablation.index
            check_index(index, loaded, splices, lengths)
            place = (index.activation_location_type, index.layer_index)
            key = (names.get(place, place), index.pass_type)
            self._at.setdefault(key, []).append(ablation)

    def places(self, pass_type: PassType) -> set[Place]:
        """The places where something is set."""
        return {place for place, kind in self._at if kind is pass_type}

    def apply(self, place: Place, pass_type: PassType, tensor: torch.Tensor) -> torch.Tensor:
        """A place's values or gradient with its ablations; the tensor itself without any.

        Args:
            place: where.
            pass_type: whether ``tensor`` is values or a gradient.
            tensor: (batch, token, *unit axes).
        """
        for ablation in self._at.get((place, pass_type), ()):
            tensor = tensor.masked_fill(self._mask(ablation.index, tensor), ablation.value)
        return tensor

    def shifted(self, place: Place, residual: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """What to add to a residual stream so that their sum is ablated.

        Args:
            place: where the sum stands; its forward ablations apply.
            residual: (batch, token, channel).
            delta: what would be added.
        """
        for ablation in self._at.get((place, PassType.FORWARD), ()):
            mask = self._mask(ablation.index, delta)
            delta = torch.where(mask, ablation.value - residual, delta)
        return delta

    def _mask(self, index: ActivationIndex, tensor: torch.Tensor) -> torch.Tensor:
        location = index.activation_location_type
        axes = (Dimension.TOKEN, *location.axes)
        chosen = index.tensor_index_by_dim
        place = [
            torch.arange(size, device=tensor.device).view(-1, *[1] * (len(axes) - 1 - number))
            for number, size in enumerate(tensor.shape[1:])
        ]
        mask = place[0] < self._lengths.view(-1, *[1] * len(axes))
        for axis, along in zip(axes, place, strict=True):
            if chosen[axis] is not None:
                mask = mask & (along == chosen[axis])
        if location.is_pair_shaped:
            mask = mask & (place[axes.index(Dimension.ATTENDED)] <= place[0])
        return mask


def check_index(
    index: ActivationIndex,
    loaded: LoadedModel,
    splices: Mapping[Place, Splice],
    lengths: Sequence[int],
) -> None:
    """Check that every sequence of a batch has what an index points at.

    Raises:
        InvalidInput: it does not: no such location, layer, token, or unit.
    """
    location, layer = index.activation_location_type, index.layer_index
    latents = {
        name: splice.autoencoder.n_latents for splice in splices.values() for name in splice.latents
    }
    errors = {splice.error for splice in splices.values()}
    present = {name for name, _ in (*latents, *errors)} | loaded.architecture.taps.keys()
    if location not in present:
        raise unknown_location(location, present, loaded)
    layers: set[int | None] = {None}
    if location.is_online:
        layers = {where for name, where in (*latents, *errors) if name is location}
    elif location.has_layers:
        layers = set(range(loaded.dimensions.n_layers))
    if layer not in layers:
        found = ", ".join(map(str, sorted(one for one in layers if one is not None)))
        raise InvalidInput(
            f"Layer {layer} of {location}: there are layers {found}. Name one of them.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    chosen = index.tensor_index_by_dim
    for axis, at in chosen.items():
        if axis in _TOKENS:
            size = min(lengths)
        elif axis is Dimension.LATENT:
            size = latents[location, layer]
        else:
            size = loaded.dimensions.size(axis)
        if at is not None and at >= size:
            shortest = " in the shortest sequence" if axis in _TOKENS and len(lengths) > 1 else ""
            raise InvalidInput(
                f"{str(axis).capitalize()} {at} of {location}: there are {size}{shortest}, counted "
                f"from 0. Choose one below {size}.",
                kind=ErrorKind.UNKNOWN_UNIT,
            )
    token, attended = chosen[Dimension.TOKEN], chosen.get(Dimension.ATTENDED)
    if token is not None and attended is not None and attended > token:
        raise InvalidInput(
            f"{location} at token {token}, attended {attended}: a token attends to itself and "
            f"earlier ones. Choose an attended token up to {token}.",
            kind=ErrorKind.UNKNOWN_UNIT,
        )


def unknown_location(
    location: ActivationLocationType,
    present: Iterable[ActivationLocationType],
    loaded: LoadedModel,
) -> InvalidInput:
    """The error for a location that a pass does not have."""
    known = ", ".join(str(one) for one in ActivationLocationType if one in set(present))
    advice = "Name one of these, or pass its autoencoders" if location.is_online else "Name one"
    reason = "" if location.is_online else f" ({loaded.architecture.why_absent(location)})"
    return InvalidInput(
        f"This pass has no {location}{reason}; it has {known}. {advice}.",
        kind=ErrorKind.UNKNOWN_LOCATION,
    )
