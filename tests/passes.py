"""What tests of passes over prompts share: short spellings, random inputs, comparisons."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from actstore.ingest.live_pass import LivePass
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_functions import Normalisation, ReLU
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.nodes import (
    Ablation,
    ActivationIndex,
    AttentionTraceType,
    NodeIndex,
    PreOrPostAct,
    TraceConfig,
)
from actstore.store.vocabulary import ActivationLocationType, NodeType, PassType


def trace_of(
    node_type: NodeType,
    indices: tuple[int | None, ...],
    layer: int,
    act: PreOrPostAct = PreOrPostAct.PRE,
    detach: bool = True,
    kind: AttentionTraceType | None = None,
    downstream: TraceConfig | None = None,
) -> TraceConfig:
    return TraceConfig(NodeIndex(node_type, indices, layer), act, detach, kind, downstream)


def ablate(
    location: ActivationLocationType,
    indices: tuple[int | None, ...],
    layer: int | None,
    value: float = 0.0,
    pass_type: PassType = PassType.FORWARD,
) -> Ablation:
    return Ablation(ActivationIndex(location, indices, layer, pass_type), value)


def random_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(53, (length,), generator=generator).tolist()
    return ids


def random_autoencoder(
    location: ActivationLocationType,
    layer: int,
    channels: int,
    seed: int = 0,
    normalisation: Normalisation = Normalisation.NONE,
) -> Autoencoder:
    generator = torch.Generator().manual_seed(seed + 10 * layer)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Autoencoder(
        name=f"{location} {layer}",
        location=location,
        layer=layer,
        encoder=random(channels, 11),
        decoder=random(11, channels),
        latent_bias=random(11),
        input_bias=random(channels),
        output_bias=random(channels),
        activation=ReLU(),
        normalisation=normalisation,
    )


def both_kinds(
    location: ActivationLocationType = ActivationLocationType.MLP_POST_ACT,
) -> Autoencoders:
    channels = 24 if location is ActivationLocationType.MLP_POST_ACT else 16
    return Autoencoders(
        [random_autoencoder(location, layer, channels) for layer in range(2)]
        + [
            random_autoencoder(ActivationLocationType.RESID_DELTA_ATTN, layer, 16, seed=1)
            for layer in range(2)
        ]
    )


def assert_close(
    found: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for place, tensor in expected.items():
        finite = torch.where(tensor.isinf(), 0, tensor)
        scale = float(finite.abs().max())
        torch.testing.assert_close(
            found[place], tensor, rtol=0, atol=tolerance * scale, msg=str(place)
        )


def assert_same_value(found: LivePass, expected: LivePass) -> None:
    if expected.objective_value is None:
        assert found.objective_value is None
    else:
        assert found.objective_value == pytest.approx(expected.objective_value, rel=1e-11)
