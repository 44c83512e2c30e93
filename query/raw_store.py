"""What one pass recorded, in memory, and two passes combined.

Formulas and names: derived_scalars.md (c.2, c.8).
"""

import os
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from actstore.query.containers import ActivationsAndMetadata, Layer, one_device
from actstore.query.tensor_files import load_activations, save_activations
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged, Unavailable
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LocationAndPassType",
    "PromptCombo",
    "PromptId",
    "RawActivationStore",
    "combine_prompts",
]

LocationAndPassType = tuple[ActivationLocationType, PassType]


class RawActivationStore:
    """What one pass recorded: (location, pass) -> tensors by layer.

    Args:
        activations: all on one device; tensors ``(token, *unit axes)`` in the order of
            :func:`actstore.store.nodes.index_axes`.

    Raises:
        InvalidInput: a name, pass or layer does not fit its key.
    """

    def __init__(self, activations: Mapping[LocationAndPassType, ActivationsAndMetadata]) -> None:
        held = dict(activations)
        for (location, pass_type), values in held.items():
            if (values.dst, values.pass_type) != (location.label, pass_type):
                raise _invalid(f"{values!r} stands under {location}, {pass_type}.")
            if location.has_layers == (None in values.activations_by_layer_index):
                raise _invalid(f"{location} with the layers {values.layer_indices} does not fit.")
        one_device(
            "A store",
            (one for each in held.values() for one in each.activations_by_layer_index.values()),
        )
        self._held: Mapping[LocationAndPassType, ActivationsAndMetadata] = MappingProxyType(held)

    @classmethod
    def from_nested_dict_of_activations(
        cls, nested: Mapping[LocationAndPassType, Mapping[Layer, "Tensor"]]
    ) -> Self:
        """From {(location, pass): {layer: tensor}}."""
        return cls(
            {
                (location, pass_type): ActivationsAndMetadata(location.label, pass_type, tensors)
                for (location, pass_type), tensors in nested.items()
            }
        )

    @property
    def activations(self) -> Mapping[LocationAndPassType, ActivationsAndMetadata]:
        """Everything, read-only."""
        return self._held

    def get_activations_and_metadata(
        self, location: ActivationLocationType, pass_type: PassType = PassType.FORWARD
    ) -> ActivationsAndMetadata:
        """One location's tensors of one pass.

        Raises:
            Unavailable: it was not recorded; the message names what was.
        """
        try:
            return self._held[location, pass_type]
        except KeyError:
            raise Unavailable(
                f"{location} {pass_type} is not here; there are "
                f"{', '.join(f'{of} {kind}' for of, kind in self._held) or 'no tensors'}. "
                "Record it in the pass.",
                kind=ErrorKind.NOT_STORED,
            ) from None

    def save_to_file(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; see :func:`actstore.query.tensor_files.write_tensors`."""
        save_activations(path, "raw_activation_store", self._held.values())

    @classmethod
    def load_from_file(cls, path: str | os.PathLike[str], device: str = "cpu") -> Self:
        """Read what :meth:`save_to_file` wrote, bit for bit.

        Raises:
            NotAStore: there is no such file, or it has a newer format.
            StoreDamaged: the file is damaged, or of another kind.
        """
        loaded = load_activations(path, "raw_activation_store", device)
        locations = {location.label: location for location in ActivationLocationType}
        unknown = [values.dst for values in loaded if values.dst not in locations]
        if unknown:
            raise StoreDamaged(
                f"{os.fspath(path)} holds the unknown locations {unknown}.",
                kind=ErrorKind.MALFORMED_FILE,
            )
        return cls({(locations[values.dst], values.pass_type): values for values in loaded})

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"RawActivationStore({', '.join(f'{of} {kind}' for of, kind in self._held)})"


class PromptId(StrEnum):
    """Which of two prompts."""

    MAIN = "main"
    BASELINE = "baseline"


class PromptCombo(StrEnum):
    """What is taken of two prompts before a formula."""

    MAIN = "main"
    BASELINE = "baseline"
    SUBTRACT_BASELINE = "subtract_baseline"


def combine_prompts(
    stores: Mapping[PromptId, RawActivationStore],
    combo: PromptCombo | Mapping[LocationAndPassType, PromptCombo],
) -> RawActivationStore:
    """The raw values that formulas read when two prompts are compared.

    Args:
        stores: what was recorded of each prompt.
        combo: one for all, or one per (location, pass); only those named are taken then.

    Returns:
        Per (location, pass) the main prompt's tensors, the baseline's, or main - baseline.

    Raises:
        InvalidInput: a prompt is missing, or the two differ in layers or shapes.
        Unavailable: a location is not in a store that it is to be taken from.
    """
    if set(stores) != set(PromptId):
        raise _invalid(f"The prompts are {', '.join(stores)}; give {' and '.join(PromptId)}.")
    main, baseline = stores[PromptId.MAIN], stores[PromptId.BASELINE]
    if not isinstance(combo, Mapping):
        source = baseline if combo is PromptCombo.BASELINE else main
        combo = dict.fromkeys(source.activations, combo)
    combined = {}
    for (location, pass_type), chosen in combo.items():
        first = baseline if chosen is PromptCombo.BASELINE else main
        values = first.get_activations_and_metadata(location, pass_type)
        if chosen is PromptCombo.SUBTRACT_BASELINE:
            values = _subtract(values, baseline.get_activations_and_metadata(location, pass_type))
        combined[location, pass_type] = values
    return RawActivationStore(combined)


def _subtract(
    main: ActivationsAndMetadata, baseline: ActivationsAndMetadata
) -> ActivationsAndMetadata:
    for layer, tensor in main.activations_by_layer_index.items():
        other = baseline.activations_by_layer_index.get(layer)
        if other is not None and other.shape != tensor.shape:
            raise _invalid(
                f"{main.dst} is {tuple(tensor.shape)} for the main prompt and "
                f"{tuple(other.shape)} for the baseline. Use prompts of one length."
            )
    return main - baseline


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
