"""A small store for the tests of the viewer: known values, a dead neuron, latents, odd names."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from store_builder import build_store

from actstore.query.rows import Rows
from actstore.query.session import Store
from actstore.query.tensors import LabelledTensor
from actstore.store.model.autoencoder_functions import ReLU
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.vocabulary import ActivationLocationType

LAYERS, NEURONS, CHANNELS = 2, 60, 8
LENGTHS = [40, 33, 40, 25, 40, 12, 40, 30, 40, 40]
DEAD = (1, 7)
SOURCES = ["<b>bold</b>&.txt", *(f"doc-{number}.txt" for number in range(1, len(LENGTHS)))]
LATENTS = 12
DEAD_LATENT = 11
SET = "points"


def values(seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """float16 values of the store, ``(layer, token, unit)``."""
    rng = np.random.default_rng(seed)
    tokens = sum(LENGTHS)
    neurons = rng.normal(size=(LAYERS, tokens, NEURONS)).astype(np.float16)
    neurons[DEAD[0], :, DEAD[1]] = -np.abs(neurons[DEAD[0], :, DEAD[1]])
    return {
        "mlp_post_act": neurons,
        "resid_post_embedding": rng.normal(size=(tokens, CHANNELS)).astype(np.float16),
        "resid_post_mlp": rng.normal(size=(LAYERS, tokens, CHANNELS)).astype(np.float16),
    }


def build(path: Path, **options: Any) -> Path:
    """The store, without latents."""
    return build_store(path, values(), LENGTHS, sources=SOURCES, **options)


def add_latents(path: Path) -> None:
    """Latents of one layer of the residual stream; the last one is dead."""
    generator = torch.Generator().manual_seed(1)
    encoder = torch.randn(CHANNELS, LATENTS, generator=generator)
    bias = torch.full((LATENTS,), -1.0)
    bias[DEAD_LATENT] = -1e6
    made = Autoencoder(
        name="tiny",
        location=ActivationLocationType.RESID_POST_MLP,
        layer=1,
        encoder=encoder,
        decoder=encoder.T.contiguous(),
        latent_bias=bias,
        input_bias=torch.zeros(CHANNELS),
        output_bias=torch.zeros(CHANNELS),
        activation=ReLU(),
    )
    with Store(path) as store:
        store.add_saes([made], name=SET).close()


class FakePrompt:
    """A pass of three tokens with known values."""

    objective_value = None

    def __init__(self, text: str) -> None:
        self.token_ids = (1, 2, 3)
        self.tokens = ("<b>", " x", text[:5])

    def _labelled(self, name: str, found: torch.Tensor, dims: tuple[str, ...]) -> LabelledTensor:
        at = np.arange(3)
        layers = (0, 1) if "layer" in dims else None
        return LabelledTensor(name, found, dims, layers, Rows(at, np.zeros_like(at), at), "test")

    def derive(self, names: str, **_: Any) -> LabelledTensor:
        found = torch.zeros(2, 3, 4)
        found[1, 2, 3] = -7.5
        return self._labelled(names, found, ("layer", "token", "neuron"))

    def raw(self, location: str, **_: Any) -> LabelledTensor:
        return self._labelled(location, torch.eye(3, 48) * 20, ("token", "vocabulary"))
