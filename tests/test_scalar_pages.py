"""The scalars' pages: their examples run, and what they and the list of differences claim holds."""

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from passes import random_autoencoder
from tiny_ingest import fresh_copy, tiny_model

import actstore
from actstore.prompt import Prompt
from actstore.query.derived import FAMILIES, SCALARS, DerivedScalar
from actstore.query.derived.costs import SYMBOLS, bytes_read, operations
from actstore.query.derived.evaluation import evaluate
from actstore.query.derived.pages import SYMBOL_NOTES, example, is_rankable, scalar_page
from actstore.query.session import Store
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import InvalidInput
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.vocabulary import (
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

L = ActivationLocationType
FORWARD, BACKWARD = PassType.FORWARD, PassType.BACKWARD
OF_OTHER_MODELS = {location.label for location in OPTIONAL_LOCATIONS}
"""Raw values that GPT-2 does not have: they came after the specification."""
VALUE = "K·C" if Dimension.KV_HEAD in L.ATTN_VALUE.axes else "H·C"
ATTENTION_LATENT = NodeType.ATTENTION_AUTOENCODER_LATENT


@pytest.fixture(scope="module")
def copies(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Stores of their own for autoencoders of each location."""
    folder = tmp_path_factory.mktemp("latents")
    found = {}
    for location in (L.MLP_POST_ACT, L.RESID_DELTA_MLP, L.RESID_DELTA_ATTN):
        shutil.copytree(store.path, folder / location.label)
        found[location.label] = Store(folder / location.label)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("pages") / "store"
    fresh_copy(path, locations="full", objective="next_token_log_prob", limit_tokens=500)
    return Store(path)


def autoencoders_for(declared: DerivedScalar) -> list[Autoencoder]:
    """Such as the example of a scalar of latents speaks of."""
    residual = "wrt_residual" in declared.name or "residual_mlp" in declared.name
    location = L.RESID_DELTA_MLP if residual else L.MLP_POST_ACT
    if declared.latents is ATTENTION_LATENT:
        location = L.RESID_DELTA_ATTN
    channels = 24 if location is L.MLP_POST_ACT else 16
    return [random_autoencoder(location, layer, channels) for layer in range(2)]


@pytest.mark.parametrize("name", [name for name in SCALARS if name not in OF_OTHER_MODELS])
def test_the_example_of_every_page_runs(store: Store, copies: dict[str, Store], name: str) -> None:
    declared = SCALARS[name]
    names: dict[str, object] = {"store": store, "actstore": actstore}
    if declared.latents is not None:
        autoencoders = autoencoders_for(declared)
        names["autoencoders"] = autoencoders
        names["store"] = copies[autoencoders[0].location.label]
    code = example(declared)
    assert code in scalar_page(declared)
    exec(compile(code, name, "exec"), names)  # noqa: S102 - our own page
    values = names["values"]
    assert isinstance(values, LabelledTensor)
    assert f"values.dims  # {values.dims}" in code
    assert values.name == name
    assert not values.values.isnan().all()
    assert ("store.topk" in code) == is_rankable(declared)


def test_a_ranking_of_what_is_about_one_node_says_so(store: Store) -> None:
    for declared in SCALARS.values():
        if not is_rankable(declared):
            with pytest.raises(InvalidInput, match="is about one node of one sequence"):
                store.topk(declared.name, k=1)


def test_every_symbol_of_a_definition_is_explained() -> None:
    known = {word for names, _ in SYMBOL_NOTES for word in re.findall(r"[A-Za-z_]\w*", names)}
    words = {"sum_d", "sum_f", "sum_n", "sum_c", "sum_k", "sum_h", "sqrt", "ReLU", "MLP"}
    for declared in SCALARS.values():
        for symbol in re.findall(r"\b([A-Z]\w*|sum_\w+)\b", declared.definition):
            assert symbol in known | words or symbol.startswith("W_"), declared.name


@pytest.mark.parametrize(
    ("name", "count", "read"),
    [
        ("mlp_post_act", "no", "4·F"),
        ("mlp_write_norm", "F", "4·F"),
        ("mlp_write", "2·F·D", "4·F"),
        ("mlp_act_times_grad", "F", "4·(F + F)"),
        ("mlp_write_to_final_residual_grad", "2·F·D", "4·(F + D)"),
        ("attn_write", "2·U·H·C·D", f"4·(U·H + {VALUE})"),
        ("attn_write_norm", "2·U·H + 2·U·H·C·D", f"4·(U·H + {VALUE})"),
        ("autoencoder_latent", "2·F·N", "4·F"),
        ("attn_input_layer_norm_scale", "no", "4"),
    ],
)
def test_costs_follow_from_the_declaration(name: str, count: str, read: str) -> None:
    assert (operations(SCALARS[name]), bytes_read(SCALARS[name])) == (count, read)


def test_weights_have_the_axes_that_costs_count() -> None:
    from actstore.query.derived.costs import axes_of_weight
    from actstore.store.model.dimensions import ModelDimensions

    sizes = ModelDimensions(3, 5, 7, 11, 13, 17, 19, 1e-5, "gelu", 1.0)
    for weight in WeightLocationType:
        if weight is not WeightLocationType.POSITION_EMBEDDING:
            axes = axes_of_weight(weight)
            found = tuple(sizes.size(_same(axis)) for axis in axes)
            assert found == sizes.weight_shape(weight), weight
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)


def _same(axis: Dimension) -> Dimension:
    """In GPT-2 every head has keys and values of its own."""
    return Dimension.HEAD if axis is Dimension.KV_HEAD else axis


# What docs/differences.md claims


def test_there_are_as_many_scalars_as_specified() -> None:
    assert {name: len(members) for name, members in FAMILIES.items()} == {
        "raw": 17 + len(OF_OTHER_MODELS),
        "attention": 14,
        "mlp": 6,
        "residual": 15,
        "latents": 24 + 6 + 8,
        "edges": 16,
    }
    assert sum(map(len, FAMILIES.values())) == len(SCALARS) == 106 + len(OF_OTHER_MODELS)


def test_the_node_type_follows_from_the_last_axis() -> None:
    expected = {
        Dimension.HEAD: NodeType.ATTENTION_HEAD,
        Dimension.NEURON: NodeType.MLP_NEURON,
        Dimension.CHANNEL: NodeType.RESIDUAL_STREAM_CHANNEL,
        Dimension.SINGLETON: NodeType.LAYER,
        Dimension.VOCABULARY: NodeType.VOCAB_TOKEN,
    }
    seen = Counter[Dimension]()
    for declared in SCALARS.values():
        last = declared.axes[-1]
        seen[last] += 1
        if last is Dimension.LATENT:
            assert declared.node_type is declared.latents
        elif last is Dimension.HEAD_CHANNEL:
            assert declared.node_type in (NodeType.QK_CHANNEL, NodeType.V_CHANNEL)
        else:
            assert declared.node_type is expected[last], declared.name
    assert min(seen.values()) > 1


def test_forward_and_backward_values_are_what_they_say(store: Store) -> None:
    values = store.sources.sequence(store.row_map.sequence(0))

    def value(name: str, pass_type: PassType, layer: int | None = 1) -> torch.Tensor:
        return evaluate(SCALARS[name], values, layer, pass_type=pass_type)

    entering = "previous_layer_resid_post_mlp"
    for kind in (FORWARD, BACKWARD):
        assert torch.equal(value(entering, kind), values.raw(L.RESID_POST_MLP, kind, 0))
        embedding = values.raw(L.RESID_POST_EMBEDDING, kind, None)
        assert torch.equal(value(entering, kind, 0), embedding)
    assert not torch.equal(value(entering, FORWARD), value(entering, BACKWARD))
    gradient = values.raw(L.ATTN_QK_PROBS, BACKWARD, 1).transpose(1, 2)
    first, second = torch.tril_indices(*gradient.shape[:2])
    found = value("flattened_attn_post_softmax", BACKWARD)
    assert torch.equal(found, gradient[first, second])
    output = values.weight(WeightLocationType.ATTN_TO_RESIDUAL, 1)
    norms = torch.einsum("khc,hcd->khd", values.raw(L.ATTN_VALUE, FORWARD, 1), output).norm(dim=-1)
    torch.testing.assert_close(
        value("attn_write_norm", BACKWARD), (gradient / norms)[first, second], rtol=1e-12, atol=0
    )
    assert found.abs().max() > 0
    with pytest.raises(InvalidInput, match="always_one has no backward value"):
        value("always_one", BACKWARD, None)


@pytest.mark.parametrize("location", [L.RESID_DELTA_MLP, L.RESID_DELTA_ATTN, L.MLP_POST_ACT])
def test_offline_latents_are_the_online_ones(location: L) -> None:
    channels = 24 if location is L.MLP_POST_ACT else 16
    prompt = Prompt(
        tiny_model(dtype=torch.float64),
        [5, 9, 40, 3, 17, 8],
        autoencoders=[random_autoencoder(location, layer, channels) for layer in range(2)],
    )
    offline = prompt.derive("autoencoder_latent", dtype="float64").values
    online = prompt.derive("online_autoencoder_latent", dtype="float64").values
    assert offline.abs().max() > 0
    torch.testing.assert_close(offline, online, rtol=0, atol=1e-10 * float(online.abs().max()))


def test_every_test_that_the_list_of_differences_names_exists() -> None:
    folder = Path(__file__).parent
    page = folder.parent / "docs" / "differences.md"
    rows = re.findall(
        r"^\| (\d+) \|.*`(test_\w+\.py)::(test_\w+)` \|$", page.read_text(), re.MULTILINE
    )
    assert [int(number) for number, _, _ in rows] == list(range(1, 19))
    for _, file, test in rows:
        assert f"\ndef {test}(" in (folder / file).read_text(), f"{file}::{test}"
