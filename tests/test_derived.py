"""Declarations of derived scalars, and their values against the reference's."""

import subprocess
import sys
from typing import Any

import golden_store
import numpy as np
import numpy.typing as npt
import pytest
import torch
from golden_store import PROMPTS, build_golden_store, location_values
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actstore.query.derived import (
    SCALARS,
    Coefficient,
    DerivedScalar,
    General,
    Identity,
    ScaledBy,
    Source,
    parse_scalar,
    scalar,
)
from actstore.query.derived.declaration import LayerRule
from actstore.query.derived.evaluation import evaluate
from actstore.query.derived.registry import requires_gradient
from actstore.query.session import Store
from actstore.query.value_readers import derived_value
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.location_names import PRESETS
from actstore.store.model.dimensions import ModelDimensions
from actstore.store.model.recipes import RECIPES, WeightName
from actstore.store.nodes import index_axes
from actstore.store.vocabulary import (
    FORWARD_LOCATIONS,
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

L = ActivationLocationType


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The reference's values of the preset ``full`` in float32."""
    path = tmp_path_factory.mktemp("derived") / "store"
    return Store(build_golden_store(path, PRESETS["full"]))


class FakeValues:
    """Raw values and coefficients that a test chose."""

    dimensions = ModelDimensions(3, 2, 1, 2, 4, 8, 8, 1e-5, "gelu", 1.0)
    recipes = RECIPES["gpt2"]

    def __init__(
        self, values: npt.NDArray[np.float32], coefficients: npt.NDArray[np.float64] | None = None
    ) -> None:
        self._values = torch.from_numpy(values.astype(np.float64))
        self._coefficients = coefficients
        self.asked: list[tuple[ActivationLocationType, PassType, int | None]] = []

    def raw(
        self, location: ActivationLocationType, pass_type: PassType, layer: int | None
    ) -> torch.Tensor:
        self.asked.append((location, pass_type, layer))
        return self._values

    def has(self, location: ActivationLocationType, layer: int | None) -> bool:
        return True

    def weight(self, name: WeightName, layer: int | None) -> torch.Tensor:
        raise AssertionError("no weights here")

    def coefficients(self, declared: DerivedScalar, layer: int | None) -> npt.NDArray[np.float64]:
        assert self._coefficients is not None
        return self._coefficients


def test_every_location_is_a_raw_scalar_of_its_own_shape() -> None:
    for location in FORWARD_LOCATIONS:
        declared = SCALARS[location.label]
        assert declared.axes == index_axes(location)[1:]
        assert declared.node_type is location.node_type
        assert declared.has_layers == location.has_layers
        assert [source.of for source in declared.sources] == [location]
        assert (declared.raw_source is None) == location.is_pair_shaped


def test_only_queries_and_keys_are_scaled_among_the_raw_scalars() -> None:
    scaled = {
        location
        for location in FORWARD_LOCATIONS
        if isinstance(SCALARS[location.label].dependence, ScaledBy)
    }
    assert scaled == {L.ATTN_QUERY, L.ATTN_KEY}


def test_names_of_transformer_lens_resolve() -> None:
    assert scalar("mlp_post").name == "mlp_post_act"
    assert scalar("Resid_Mid").name == "resid_post_attn"
    assert parse_scalar("blocks.2.attn.hook_z") == (SCALARS["attn_weighted_sum_of_values"], 2)
    assert parse_scalar("mlp_write_norm") == (SCALARS["mlp_write_norm"], None)


def test_an_unknown_name_names_the_close_and_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as caught:
        scalar("mlp_write_nrom")
    assert caught.value.kind is ErrorKind.UNKNOWN_SCALAR
    assert "Did you mean mlp_write_norm" in str(caught.value)
    assert all(name in str(caught.value) for name in SCALARS)
    with pytest.raises(InvalidInput, match="names layer 3"):
        scalar("blocks.3.hook_resid_post")


def test_listing_and_opening_do_not_import_torch(store: Store) -> None:
    program = (
        "import sys\n"
        "from actstore.query.session import Store\n"
        "from actstore.query.derived import SCALARS, scalar\n"
        f"store = Store({str(store.path)!r})\n"
        "repr(store); store.info(); store.locations\n"
        "store.coefficients(scalar('mlp_write_norm'), 1)\n"
        "bad = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def declare(**changes: Any) -> DerivedScalar:
    members: dict[str, Any] = {
        "name": "example",
        "meaning": "an example",
        "definition": "2 * a[t, f]",
        "axes": (Dimension.NEURON,),
        "node_type": NodeType.MLP_NEURON,
        "has_layers": True,
        "sources": (Source(L.MLP_POST_ACT),),
        "dependence": General(),
        "formula": lambda sources, weights, frame: sources[0] * 2,
    }
    return DerivedScalar(**{**members, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "Example"},
        {"name": "two words"},
        {"axes": ()},
        {"sources": ()},
        {"definition": " "},
        {"layers": (2, 1)},
        {"formula": None},
        {"dependence": Identity()},
        {"dependence": ScaledBy(Coefficient.WRITE_NORM)},
        {
            "dependence": Identity(),
            "formula": None,
            "sources": (Source(L.RESID_POST_MLP, layer=LayerRule.PREVIOUS),),
        },
        {
            "dependence": Identity(),
            "formula": None,
            "weights": (WeightLocationType.MLP_TO_RESIDUAL,),
        },
        {"has_layers": False},
        {"sources": (Source(L.LOGITS, layer=LayerRule.NONE),)},
    ],
)
def test_an_inconsistent_declaration_is_refused(changes: dict[str, Any]) -> None:
    assert declare().name == "example"
    with pytest.raises(InvalidInput):
        declare(**changes)


def test_a_source_must_fit_its_layers() -> None:
    with pytest.raises(InvalidInput):
        Source(L.LOGITS)
    with pytest.raises(InvalidInput):
        Source(L.MLP_POST_ACT, layer=LayerRule.NONE)
    with pytest.raises(InvalidInput):
        Source(L.MLP_POST_ACT, layer=LayerRule.PREVIOUS)


def test_sources_find_their_layers() -> None:
    previous = Source(L.RESID_POST_MLP, layer=LayerRule.PREVIOUS)
    assert previous.place(2, 3) == (L.RESID_POST_MLP, 1)
    assert previous.place(0, 3) == (L.RESID_POST_EMBEDDING, None)
    assert Source(L.RESID_POST_MLP, layer=-1).place(0, 3) == (L.RESID_POST_MLP, 2)
    assert Source(L.RESID_POST_MLP, layer=1).place(None, 3) == (L.RESID_POST_MLP, 1)
    assert Source(L.MLP_POST_ACT).place(2, 3) == (L.MLP_POST_ACT, 2)


def test_a_scalar_may_be_made_from_another_scalar() -> None:
    declared = declare(sources=(Source("mlp_write_norm"),))
    values = FakeValues(np.array([[1, -2, 0, 4]], np.float32), np.array([3.0, 0.5, 1.0, 1.0]))
    assert evaluate(declared, values, 1).tolist() == [[6.0, -2.0, 0.0, 8.0]]
    assert values.asked == [(L.MLP_POST_ACT, PassType.FORWARD, 1)]


@given(
    raw=hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32, allow_subnormal=True)),
    coefficients=hnp.arrays(np.float64, 4, elements=st.floats(allow_nan=False)),
    name=st.sampled_from(["mlp_write_norm", "mlp_post_act"]),
)
def test_tensors_and_arrays_give_the_same_bits(
    raw: npt.NDArray[np.float32], coefficients: npt.NDArray[np.float64], name: str
) -> None:
    factors = coefficients if name == "mlp_write_norm" else np.ones(4)
    by_tensor = evaluate(scalar(name), FakeValues(raw, factors), 0).to(torch.float32).numpy()
    by_array = derived_value(raw, factors)
    missing = np.isnan(by_array)
    assert np.array_equal(np.isnan(by_tensor), missing)
    assert np.array_equal(by_tensor[~missing].view(np.int32), by_array[~missing].view(np.int32))


@pytest.mark.parametrize("name", ["mlp_write_norm", "attn_query", "attn_key", "mlp_post_act"])
def test_derive_gives_the_bits_of_the_array_path(store: Store, name: str) -> None:
    declared = scalar(name)
    assert declared.raw_source is not None
    array = store.reader.array(declared.raw_source.location)
    derived = store.derive(name).numpy()
    for layer in range(golden_store.LAYERS):
        raw = array.spec.dtype.to_float32(array.reader.window(0, layer, 0, 40))
        expected = derived_value(raw, store.coefficients(declared, layer))
        assert np.array_equal(
            derived[layer].reshape(40, -1).view(np.int32), expected.view(np.int32)
        )


REFERENCE = (
    "mlp_write_norm",
    "resid_delta_mlp_from_mlp_post_act",
    "attn_write_norm_per_sequence_token",
    "resid_post_embedding_norm",
    "resid_post_attn_norm",
    "resid_post_mlp_norm",
    "attn_layer_write_norm",
    "mlp_layer_write_norm",
    "previous_layer_resid_post_mlp",
    "always_one",
)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("sequence", [0, 1])
def test_values_equal_the_reference(store: Store, name: str, sequence: int) -> None:
    # The reference derives from float64 activations, the store kept them in float32.
    expected = golden_store.load("dst", PROMPTS[sequence], name)
    found = store.derive(name, sequences=[sequence], dtype="float64")
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=4e-7 * np.abs(expected).max())
    rounded = store.derive(name, sequences=sequence)
    assert np.array_equal(rounded.numpy(), found.numpy().astype(np.float32))


def test_mlp_write_equals_the_reference(store: Store) -> None:
    path = golden_store.DATA / "dst" / "logit_diff" / "p0" / "MLP_WRITE.first_3_tokens.FORWARD.npz"
    found = store.derive("mlp_write", tokens=[0, 1, 2], dtype="float64")
    assert found.dims == ("layer", "token", "neuron", "channel")
    with np.load(path) as expected:
        for layer in (0, 2):
            values = expected[f"layer_{layer}"]
            np.testing.assert_allclose(
                found.layer(layer).numpy(), values, rtol=0, atol=1e-7 * np.abs(values).max()
            )


@pytest.mark.parametrize("location", [L.ATTN_QUERY, L.ATTN_KEY])
def test_queries_and_keys_carry_the_factor_when_derived(
    store: Store, location: ActivationLocationType
) -> None:
    expected = golden_store.load("raw", "p1", location.name)
    derived = store.derive(location.label, sequences=[1]).numpy()
    np.testing.assert_allclose(derived, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    stored = location_values(location, "p1").astype(np.float32)
    assert np.array_equal(store.raw(location.label, sequences=[1]).numpy(), stored)


def test_a_layer_writes_its_neurons_sum_and_its_bias(store: Store) -> None:
    writes = store.derive("mlp_write", sequences=[0], dtype="float64").numpy().sum(2)
    without = store.derive("resid_delta_mlp_from_mlp_post_act", sequences=[0], dtype="float64")
    np.testing.assert_allclose(without.numpy(), writes, rtol=1e-9, atol=1e-9)
    for layer in range(golden_store.LAYERS):
        bias = store.sources.model.weight(WeightLocationType.MLP_OUTPUT_BIAS, layer)
        delta = store.raw("resid_delta_mlp", sequences=[0], layers=layer).numpy()[0]
        np.testing.assert_allclose(without.numpy()[layer] + bias, delta, atol=2e-6)


FORWARD = sorted(
    name
    for name, declared in SCALARS.items()
    if not requires_gradient(declared) and declared.about is None and declared.latents is None
    if name not in {place.label for place in OPTIONAL_LOCATIONS}
)
"""Those that a store without gradients and autoencoders has."""


@pytest.mark.parametrize("name", FORWARD)
def test_rows_have_the_values_of_their_sequence(store: Store, name: str) -> None:
    tokens = [39, 2, 20, 2]
    whole = store.derive(name, dtype="float64")
    some = store.derive(name, tokens=tokens, dtype="float64")
    along = whole.rows.token
    places = np.concatenate([np.flatnonzero(along == token) for token in tokens])
    axis = whole.dims.index("pair" if whole.attended is not None else "token")
    expected = whole.values.index_select(axis, torch.from_numpy(places)).numpy()
    assert np.array_equal(some.rows.token, along[places])
    if whole.attended is not None and some.attended is not None:
        assert np.array_equal(some.attended, whole.attended[places])
    # A narrower question has fewer attended tokens on its axis.
    cut = tuple(slice(size) for size in some.shape)
    assert np.array_equal(some.numpy(), expected[cut], equal_nan=True)


def test_the_coefficients_are_those_of_the_readout(store: Store) -> None:
    weights = store.sources.model.weight(WeightLocationType.MLP_TO_RESIDUAL, 1)
    found = store.coefficients(scalar("mlp_write_norm"), 1)
    np.testing.assert_allclose(found, np.linalg.norm(weights, axis=1), rtol=1e-14)
    assert store.coefficients(scalar("attn_query"), 2).tolist() == [8**-0.25] * 32
    assert store.coefficients(scalar("logits"), 0).tolist() == [1.0] * 211
