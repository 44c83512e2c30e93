"""Stored values are read as they are; the others follow from them by recipes."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from golden_store import PROMPTS, build_golden_store, location_values
from hypothesis import given
from hypothesis import strategies as st
from store_builder import build_store, stored_rows
from tiny_gpt2 import LOCATIONS

from actstore.query.reading import read_rows
from actstore.query.session import Store
from actstore.query.sources import Sources
from actstore.store.errors import ErrorKind, Unavailable
from actstore.store.location_names import PRESETS
from actstore.store.model.architecture import architecture_of
from actstore.store.model.dimensions import ACTIVATION_FUNCTIONS
from actstore.store.model.recipes import RECIPES, Setting
from actstore.store.vocabulary import ActivationLocationType, PassType

L = ActivationLocationType
MLP = L.MLP_POST_ACT


def golden(path: Path, locations: Iterable[L], dtype: str = "float32") -> Store:
    return Store(build_golden_store(path / "store", locations, dtype))


def assert_close(
    found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], tolerance: float
) -> None:
    """Equal within a share of the greatest magnitude of the whole tensor; infinities match."""
    assert found.shape == expected.shape
    finite = np.isfinite(expected)
    assert np.array_equal(found[~finite], expected[~finite])
    scale = np.abs(expected[finite]).max()
    assert np.abs(found[finite] - expected[finite]).max() <= tolerance * scale


# What float32 and float16 rounding of the stored values leaves, times about three.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-7), ("float16", 4e-3)])
@pytest.mark.parametrize("kept", ["minimal", "neurons", "attention", "mlp_post_act alone"])
def test_every_location_is_readable_and_equals_the_reference(
    tmp_path: Path, kept: str, dtype: str, tolerance: float
) -> None:
    with golden(tmp_path, PRESETS.get(kept, (MLP,)), dtype) as store:
        for location in LOCATIONS:
            for sequence, prompt in enumerate(PROMPTS):
                found = store.raw(location.label, sequences=[sequence], dtype="float64")
                assert_close(found.numpy(), location_values(location, prompt), tolerance)
                assert (found.source == f"stored {dtype}") == (
                    location.label in store.info().locations
                )


def test_reconstruction_says_what_it_rests_on(tmp_path: Path) -> None:
    with golden(tmp_path, PRESETS["neurons"]) as store:
        assert store.raw("mlp_pre", sequences=[0]).source == (
            "reconstructed from resid_post_embedding, resid_post_mlp"
        )
        assert store.locations["resid_delta_mlp"].source == "reconstructed from mlp_post_act"
        assert store.locations["mlp_post_act"].source == "stored float32"
        assert store.derive("mlp_layer_write_norm", sequences=[0]).source == (
            "derived from resid_delta_mlp (reconstructed from mlp_post_act)"
        )
        kinds = {entry.kind for entry in store.locations.values()}
        assert kinds == {"stored", "reconstructed", "not obtainable"}
        assert store.locations["resid_post_embedding"].steps in (0, 1)
        assert (store.locations["attn_qk_probs"].steps or 0) >= 2


def test_the_tokens_are_a_source_too(tmp_path: Path) -> None:
    with golden(tmp_path, [MLP]) as store:
        embedding = store.raw("resid_post_embedding", sequences=[0, 1])
        assert embedding.source == "reconstructed from token_id"
        expected = np.concatenate([location_values(L.RESID_POST_EMBEDDING, p) for p in PROMPTS])
        assert np.array_equal(embedding.numpy(), expected.astype(np.float32))


def test_reconstruction_repeats_the_model_rather_than_subtract(tmp_path: Path) -> None:
    with golden(tmp_path, [*PRESETS["neurons"], L.RESID_POST_ATTN]) as store:
        routes = store.sources.routes
        for layer in range(3):
            recipe = routes[L.RESID_DELTA_ATTN, layer]
            assert recipe is not None
            assert [source.of for source in recipe.inputs] == [L.ATTN_WEIGHTED_SUM_OF_VALUES]
            assert routes[L.RESID_POST_MLP, layer] is None


def test_without_weights_differences_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sources, "_has_weight", lambda self, name: False)
    with golden(tmp_path, [*PRESETS["minimal"], L.RESID_POST_ATTN]) as store:
        for location in (L.RESID_DELTA_ATTN, L.RESID_DELTA_MLP, L.MLP_INPUT_LAYER_NORM_SCALE):
            found = store.raw(location.label, sequences=[1], dtype="float64").numpy()
            assert_close(found, location_values(location, "p1"), 1e-6)
        assert store.locations["mlp_pre_act"].kind == "needs a model"
        assert store.locations["mlp_pre_act"].source == "needs a model"
        with pytest.raises(Unavailable) as caught:
            store.raw("mlp_pre_act", sequences=[0])
        assert caught.value.kind is ErrorKind.NOT_STORED
        message = str(caught.value)
        assert "it would need resid_post_attn with the weights" in message
        assert "mlp_to_hidden" in message
        assert "Stored: resid_post_attn/forward" in message
        with pytest.raises(Unavailable, match="mlp_post_act/forward is not stored"):
            store.derive("mlp_write_norm", sequences=[0])


def test_gradients_are_never_made_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {
        "mlp_post_act": rng.normal(size=(2, 30, 6)),
        "mlp_post_act/backward": rng.normal(size=(2, 30, 6)),
    }
    path = build_store(tmp_path / "store", values, [30], dtype="float32")
    with Store(path) as store:
        gradient = store.raw("mlp_post_act", sequences=[0], pass_type="backward")
        assert np.array_equal(gradient.numpy(), values["mlp_post_act/backward"].astype(np.float32))
        assert store.locations["mlp_post_act/backward"].kind == "stored"
        with pytest.raises(Unavailable, match="resid_post_mlp/backward is not stored"):
            store.raw("resid_post_mlp", sequences=[0], pass_type="backward")


def test_a_value_depends_on_nothing_else_that_was_asked(tmp_path: Path) -> None:
    with golden(tmp_path, PRESETS["neurons"]) as store:
        for name in ("mlp_pre_act", "attn_qk_probs", "resid_delta_attn", "logits"):
            together = store.raw(name, sequences=[1, 0], dtype="float64")
            for sequence in (0, 1):
                with Store(store.path) as fresh:
                    alone = fresh.raw(name, sequences=[sequence], dtype="float64").numpy()
                part = together.sequence(sequence).numpy()
                if name == "attn_qk_probs":
                    part = part[..., : alone.shape[-1]]
                assert np.array_equal(part, alone)
    with Store(store.path) as fresh:
        backwards = fresh.raw("mlp_pre_act", sequences=[1], layers=[2, 0, 1], dtype="float64")
        forwards = fresh.raw("mlp_pre_act", sequences=[1], dtype="float64")
        for layer in range(3):
            assert np.array_equal(backwards.layer(layer).numpy(), forwards.layer(layer).numpy())


def test_rows_of_a_reconstruction_are_rows_of_the_whole_sequence(tmp_path: Path) -> None:
    with golden(tmp_path, PRESETS["minimal"]) as store:
        whole = store.raw("mlp_post_act", dtype="float64")
        tokens = [39, 3, 17, 3]
        some = store.raw("mlp_post_act", tokens=tokens, dtype="float64")
        assert np.array_equal(some.numpy(), whole.numpy()[:, tokens])
        assert some.coordinates["sequence"].tolist() == [1, 0, 1, 0]
        assert some.coordinates["position"].tolist() == [22, 3, 0, 3]


def test_a_chain_through_a_deep_model_needs_no_deep_stack(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(120, 3, 4)) / 10
    path = build_store(tmp_path / "store", {"mlp_post_act": values}, [3], dtype="float32")
    with Store(path) as store:
        last = store.raw("resid_post_mlp", sequences=[0], layers=[119], dtype="float64")
        assert np.isfinite(last.numpy()).all()
        before = store.raw("resid_post_mlp", sequences=[0], layers=[118], dtype="float64")
        written = sum(
            store.raw(name, sequences=[0], layers=[119], dtype="float64").numpy()
            for name in ("resid_delta_attn", "resid_delta_mlp")
        )
        np.testing.assert_allclose(last.numpy() - before.numpy(), written, rtol=1e-6, atol=1e-9)


def _tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_activation_functions_are_those_of_the_config(name: str) -> None:
    values = torch.linspace(-6, 6, 97, dtype=torch.float64)
    recipe = next(row for row in RECIPES["gpt2"] if row.target is MLP)

    class Dimensions:
        activation_function = name

    class Setting:
        dimensions = Dimensions()

    found = recipe.function([values], [], Setting())  # type: ignore[arg-type]
    expected = [ACTIVATIONS[name](value) for value in values.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_scores_are_scaled_by_layer_where_the_model_says_so() -> None:
    recipe = next(row for row in RECIPES["gpt2"] if row.target is L.ATTN_QK_LOGITS)

    config = {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_head": 2,
        "scale_attn_by_inverse_layer_idx": True,
    }
    dimensions = architecture_of(config).dimensions(config)
    query, key = torch.randn(2, 4, 2, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    found = recipe.function([query, key], [], Setting(dimensions, 3))
    for row in range(4):
        for head in range(2):
            for attended in range(4):
                expected = float(query[row, head] @ key[attended, head]) / 8
                if attended > row:
                    expected = -np.inf
                assert float(found[row, head, attended]) == pytest.approx(expected)


# They fill a segment to its last row, so that rows run on across segments.
ROW_LENGTHS = [200, 90, 333, 150, 40, 512, 7, 480, 236]


@pytest.fixture(scope="module")
def two_segments(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, npt.NDArray[np.float32]]:
    """A store of two full segments of 2048 rows, and its values by row."""
    lengths = ROW_LENGTHS * 2
    values = np.random.default_rng(1).normal(size=(2, sum(lengths), 3)).astype(np.float32)
    path = build_store(
        tmp_path_factory.mktemp("rows") / "store",
        {"mlp_post_act": values},
        lengths,
        dtype="float32",
        segment_rows=2048,
    )
    by_row = np.full((2, 2 * 2048, 3), np.nan, np.float32)
    by_row[:, stored_rows(path)] = values
    return Store(path), by_row


@given(data=st.data())
def test_read_rows_equals_indexing(
    two_segments: tuple[Store, npt.NDArray[np.float32]], data: st.DataObject
) -> None:
    store, by_row = two_segments
    filled = np.flatnonzero(~np.isnan(by_row[0, :, 0]))
    parts = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(filled) - 1), st.integers(1, 400), st.booleans()),
            min_size=1,
            max_size=4,
        )
    )
    runs = [filled[start : start + count] for start, count, _ in parts]
    rows = np.concatenate(
        [run[::-1] if reverse else run for run, (_, _, reverse) in zip(runs, parts, strict=True)]
    )
    for layer in range(2):
        found = read_rows(store.reader.array(MLP), layer, rows)
        assert np.array_equal(found, by_row[layer, rows])


def test_rows_run_on_across_segments(
    two_segments: tuple[Store, npt.NDArray[np.float32]],
) -> None:
    store, by_row = two_segments
    for rows in (np.arange(1900, 2300), np.arange(4096), np.arange(2047, 2049)):
        found = read_rows(store.reader.array(MLP), 1, rows)
        assert np.array_equal(found, by_row[1, rows])


def test_sources_tell_forward_and_backward_apart(
    two_segments: tuple[Store, npt.NDArray[np.float32]],
) -> None:
    sources = two_segments[0].sources
    assert sources.kind(MLP, PassType.FORWARD) == "stored"
    assert sources.kind(MLP, PassType.BACKWARD) == "needs a model"
    assert sources.describe(MLP, PassType.BACKWARD) == "needs a model"
    assert sources.kind(L.LOGITS, PassType.FORWARD) == "reconstructed"
