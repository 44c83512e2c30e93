"""Scalars that a user declares: by decorator, by file, by projection, and what is refused."""

import json
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ingest import fresh_copy
from torch import Tensor
from typer.testing import CliRunner

import actstore
from actstore.cli import app
from actstore.query.derived import SCALARS, DerivedScalar, Source
from actstore.query.derived.declaration import General, LayerRule
from actstore.query.derived.loading import load_scalars
from actstore.query.derived.naming import named_source
from actstore.query.derived.registry import rollback
from actstore.query.session import Store
from actstore.query.tensors import LabelledTensor
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_scalar.py"
L = ActivationLocationType


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("own") / "store"
    fresh_copy(path, locations="full", objective="next_token_log_prob")
    return Store(path)


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    with rollback():
        yield


def declare(function: Any = None, **changes: Any) -> DerivedScalar:
    """A scalar of neurons, not registered unless asked for."""

    def own(a: Tensor) -> Tensor:
        """Twice a neuron's activation."""
        return 2 * a

    options = {"axes": "neuron", "sources": {"a": "mlp_post_act"}, "register": False, **changes}
    return actstore.derived_scalar(**options)(own if function is None else function)


def brute_force(found: LabelledTensor, store: Store, k: int) -> list[tuple[int, int, int]]:
    """(layer, token, unit) of the k greatest of all ordinary rows, ties by place."""
    values, special = found.numpy(), special_rows(store)
    cells = [
        (-float(values[layer, row, unit]), layer, int(found.rows.token[row]), unit)
        for layer, row, unit in np.ndindex(*values.shape)
        if not special[row]
    ]
    return [(layer, token, unit) for _, layer, token, unit in sorted(cells)[:k]]


def special_rows(store: Store) -> npt.NDArray[np.bool_]:
    return np.concatenate([store.reader.segment(s).special for s in store.reader.segments])


# The decorator


def test_a_function_becomes_a_scalar_like_any_other(store: Store) -> None:
    @actstore.derived_scalar(
        axes=("neuron",),
        sources={"activation": "mlp_post", "gradient": ("mlp_post_act", "backward")},
        weights={"writes": "mlp_to_residual"},
    )
    def mlp_weighted_attribution(activation: Tensor, gradient: Tensor, writes: Tensor) -> Tensor:
        """Activation times gradient, weighted by what the neuron writes."""
        return activation * gradient * writes.square().sum(-1).sqrt()

    declared: DerivedScalar = mlp_weighted_attribution
    assert SCALARS["mlp_weighted_attribution"] is declared
    assert declared.node_type is NodeType.MLP_NEURON
    assert declared.meaning == "Activation times gradient, weighted by what the neuron writes"
    assert declared.definition == "activation * gradient * writes.square().sum(-1).sqrt()"
    assert declared.origin == str(Path(__file__).resolve())
    expected = (
        store.derive("mlp_act_times_grad", dtype="float64").values
        * torch.stack(
            [
                torch.from_numpy(
                    np.linalg.norm(
                        store.sources.model.weight(
                            WeightLocationType.MLP_TO_RESIDUAL, layer
                        ).astype(np.float64),
                        axis=1,
                    )
                )
                for layer in range(2)
            ]
        )[:, None]
    )
    found = store.derive(declared.name, dtype="float64")
    assert found.dims == ("layer", "token", "neuron")
    torch.testing.assert_close(found.values, expected, rtol=1e-13, atol=0)
    values = store.derive(declared)
    best = store.topk("mlp_weighted_attribution", k=20)
    places = zip(best.column("layer"), best.column("token"), best.column("neuron"), strict=True)
    assert list(places) == brute_force(values, store, 20)
    shown = store.examples(declared, (1, 3), k=3)
    assert shown[0].value == store.derive(declared, tokens=[shown[0].token]).numpy()[1, 0, 3]


def test_a_declaration_needs_no_name_in_the_registry(store: Store) -> None:
    declared = declare()
    assert declared.name not in SCALARS
    doubled = store.derive((declared, "mlp_post_act"), sequences=[2])
    assert np.array_equal(doubled["own"].numpy(), 2 * doubled["mlp_post_act"].numpy())
    assert store.topk(declared, k=3).column("value") == [
        2 * value for value in store.topk("mlp_post_act", k=3).column("value")
    ]
    with pytest.raises(InvalidInput, match="Unknown derived scalar 'own'"):
        store.topk("own")


def test_sources_may_be_other_scalars_layers_and_directions(store: Store) -> None:
    @actstore.derived_scalar(axes="singleton", sources={"entering": ("resid_post_mlp", "previous")})
    def entering_sum(entering: Tensor) -> Tensor:
        """Sum of the stream that enters a layer."""
        return entering.sum(-1, keepdim=True)

    @actstore.derived_scalar(
        axes="channel", sources={"own": "entering_sum", "last": ("resid_post_mlp", -1)}
    )
    def mixed(own: Tensor, last: Tensor) -> Tensor:
        """The two, multiplied."""
        return own * last

    @actstore.derived_scalar(
        axes="singleton", sources={"x": "resid_delta_mlp", "g": "final_residual_grad"}
    )
    def effect(x: Tensor, g: Tensor) -> Tensor:
        """What the layer's write does to the objective, to first order."""
        return (x * g).sum(-1, keepdim=True)

    embedding = store.raw("resid_post_embedding", sequences=[1], dtype="float64").values
    last = store.raw("resid_post_mlp", sequences=[1], layers=1, dtype="float64").values[0]
    first = store.derive("mixed", sequences=[1], layers=0, dtype="float64").values[0]
    torch.testing.assert_close(first, embedding.sum(-1, keepdim=True) * last)
    ours = store.derive("effect", sequences=[1]).numpy()
    theirs = store.derive("mlp_layer_write_to_final_residual_grad", sequences=[1]).numpy()
    assert np.array_equal(ours, theirs)
    assert np.abs(theirs).max() > 0


def test_pairs_come_as_derive_gives_them(store: Store) -> None:
    @actstore.derived_scalar(axes=("attended", "head"), sources={"p": "attn_qk_probs"})
    def surprise(p: Tensor) -> Tensor:
        """Minus the logarithm of the probability."""
        return -p.log()

    probabilities = store.derive("attn_qk_probs", sequences=[0], dtype="float64").numpy()
    with np.errstate(divide="ignore"):
        expected = -np.log(probabilities)
    found = store.derive("surprise", sequences=[0], dtype="float64")
    assert found.dims == ("layer", "token", "attended", "head")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14)
    assert surprise.node_type is NodeType.ATTENTION_HEAD


def test_a_scalar_outside_the_blocks_and_the_frame(store: Store) -> None:
    @actstore.derived_scalar(
        axes="vocabulary", sources={"x": "resid_post_embedding"}, weights={"rows": "embedding"}
    )
    def nearest(x: Tensor, rows: Tensor, frame: Any) -> Tensor:
        """Similarity to every token's embedding."""
        assert frame.layer is None
        assert frame.dimensions.d_model == 16
        return x @ rows.T

    assert not nearest.has_layers
    assert store.derive("nearest", sequences=[0]).dims == ("token", "vocabulary")
    assert nearest.node_type is NodeType.VOCAB_TOKEN


def test_rows_are_taken_out_first_where_a_row_needs_no_neighbours(store: Store) -> None:
    seen: list[int] = []

    def own(a: Tensor) -> Tensor:
        """Twice a neuron's activation."""
        seen.append(len(a))
        return 2 * a

    whole = store.derive(declare(own), tokens=[3]).numpy()
    cut = store.derive(declare(own, row_wise=True), tokens=[3]).numpy()
    assert np.array_equal(whole, cut)
    assert seen[-1] == 1
    assert seen[0] > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": "neurons"}, "did you mean neuron"),
        ({"axes": ()}, "at least one"),
        ({"axes": ("head", "attended")}, "comes first"),
        ({"axes": "attended"}, "another one after it"),
        ({"axes": "token"}, "no axis of a value"),
        ({"axes": "latent"}, "none of its sources speaks of autoencoders"),
        ({"sources": {}}, "no sources"),
        ({"sources": {"a": "mlp_pots_act"}}, "Did you mean mlp_post_act"),
        ({"sources": {"b": "mlp_post_act"}}, r"takes \(a\)"),
        ({"sources": {"a": ("mlp_post_act", "sideways")}}, "forward or backward"),
        ({"sources": {"a": ("mlp_write_norm", "backward")}}, "no backward value"),
        ({"sources": {"a": ("logits", 1)}}, "belongs to no layer"),
        ({"sources": {"a": ("mlp_post_act", "previous")}}, "only resid_post_mlp"),
        ({"sources": {"a": "final_residual_grad"}}, "first source"),
        ({"weights": {"a": "embedding"}}, "a source and a weight"),
        ({"weights": {"w": "embedding"}}, r"weights are \(a, w\)"),
        ({"name": "Own"}, "lower-case"),
        ({"name": "mlp_write_norm", "register": True}, "package's own"),
        ({"name": "mlp_post", "register": True}, "package's own"),
        ({"name": "final_residual_grad", "register": True}, "package's own"),
        ({"name": "resid_post_mlp", "register": True, "replace": True}, "package's own"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        declare(**changes)
    assert caught.value.kind in (ErrorKind.INVALID_ARGUMENT, ErrorKind.UNKNOWN_SCALAR)


def test_a_function_says_what_it_means() -> None:
    def silent(a: Tensor) -> Tensor:
        return a

    with pytest.raises(InvalidInput, match="docstring"):
        declare(silent)

    def greedy(a: Tensor, *rest: Tensor) -> Tensor:
        """Takes anything."""
        return a

    with pytest.raises(InvalidInput, match="its function takes"):
        declare(greedy)


def test_weights_are_known_and_of_a_layer() -> None:
    def weighted(a: Tensor, w: Tensor) -> Tensor:
        """A product."""
        return a @ w

    with pytest.raises(InvalidInput, match="did you mean mlp_to_residual"):
        declare(weighted, weights={"w": "mlp_to_resid"})
    with pytest.raises(InvalidInput, match="belongs to no layer"):
        declare(weighted, sources={"a": ("mlp_post_act", 0)}, weights={"w": "mlp_to_residual"})


# What a formula returns


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda a: a.sum(-1), r"the shape \(\d+,\); its axes are \(token=\d+, neuron=24\)"),
        (lambda a: a[:-1], r"the shape \(\d+, 24\); its axes are \(token=\d+, neuron=24\)"),
        (lambda a: a[:, :3], "neuron=24"),
        (lambda a: a.float(), "float32"),
        (lambda a: a.numpy(), "ndarray, not a tensor"),
        (lambda a: a.mul_(2), "writes into a source"),
    ],
)
@pytest.mark.parametrize("row_wise", [False, True])
def test_a_formula_keeps_to_its_declaration(
    store: Store, formula: Any, words: str, row_wise: bool
) -> None:
    def own(a: Tensor) -> Tensor:
        """Something else."""
        result: Tensor = formula(a)
        return result

    with (
        Store(store.path) as opened,
        pytest.raises(InvalidInput, match=f"own cannot be derived: .*{words}.*test_user_scalars"),
    ):
        opened.derive(declare(own, row_wise=row_wise), tokens=[1, 2, 3, 4])


def test_truth_values_are_numbers(store: Store) -> None:
    def active(a: Tensor) -> Tensor:
        """Whether the neuron is active."""
        return a > 0

    found = store.derive(declare(active), sequences=[0]).numpy()
    expected = store.derive("mlp_post_act", sequences=[0]).numpy() > 0
    assert np.array_equal(found, expected.astype(np.float32))


# The registry


def test_registering_is_explicit_and_can_be_undone() -> None:
    before = list(SCALARS)
    declared = declare()
    with actstore.temporary_scalars(declared):
        assert SCALARS["own"] is declared
        with pytest.raises(InvalidInput, match=r"'own' is taken: it is declared in .*test_user"):
            actstore.register_scalar(declare())
        other = actstore.register_scalar(declare(), replace=True)
        assert SCALARS["own"] is other
        actstore.register_scalar(declare(name="second", sources={"a": "own"}))
        with pytest.raises(InvalidInput, match="second is made from 'own'"):
            actstore.unregister_scalar("own")
        with pytest.raises(InvalidInput, match="made from itself"):
            actstore.register_scalar(declare(sources={"a": "second"}), replace=True)
        actstore.unregister_scalar("second")
        actstore.unregister_scalar(other)
        assert list(SCALARS) == before
    assert list(SCALARS) == before
    for name in ("own", "mlp_write_norm"):
        with pytest.raises(InvalidInput, match="not a scalar that was registered"):
            actstore.unregister_scalar(name)


def test_the_table_of_scalars_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        SCALARS["own"] = declare()  # type: ignore[index]


def test_a_ready_declaration_is_registered_as_it_is(store: Store) -> None:
    ready = DerivedScalar(
        name="mlp_shifted",
        meaning="activation plus one",
        definition="a[t, f] + 1",
        axes=(Dimension.NEURON,),
        node_type=NodeType.MLP_NEURON,
        has_layers=True,
        sources=(Source(L.MLP_POST_ACT),),
        dependence=General(),
        formula=lambda sources, weights, frame: sources[0] + 1,
    )
    assert actstore.register_scalar(ready) is ready
    assert store.derive("mlp_shifted", sequences=[0]).name == "mlp_shifted"
    unknown = DerivedScalar(
        name="of_nothing",
        meaning="nothing",
        definition="nothing",
        axes=(Dimension.NEURON,),
        node_type=NodeType.MLP_NEURON,
        has_layers=True,
        sources=(Source("mlp_shiftde"),),
        dependence=General(),
        formula=lambda sources, weights, frame: sources[0],
    )
    with pytest.raises(InvalidInput, match="Did you mean mlp_shifted"):
        actstore.register_scalar(unknown)


def test_sources_as_users_write_them() -> None:
    assert named_source("z", "x") == Source(L.ATTN_WEIGHTED_SUM_OF_VALUES)
    assert named_source(L.MLP_POST_ACT, "x") == Source(L.MLP_POST_ACT)
    assert named_source("blocks.1.hook_resid_post", "x") == Source(L.RESID_POST_MLP, layer=1)
    assert named_source(("logits", "backward"), "x") == Source(
        L.LOGITS, PassType.BACKWARD, LayerRule.NONE
    )
    # These are not what is stored, and come as `derive` gives them.
    assert named_source("attn_query", "x") == Source("attn_query")
    assert named_source("pattern", "x") == Source("attn_qk_probs")


# Files and the command line


def answer(*words: object, **environment: str) -> Any:
    result = CliRunner().invoke(app, [*map(str, words), "--json"], env=environment)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_example_works_everywhere(store: Store) -> None:
    flags = ("--scalars", EXAMPLE)
    ranked = answer("topk", store.path, "mlp_relative_write", "-k", 5, *flags)
    loaded = SCALARS["mlp_relative_write"]
    values = store.derive("mlp_relative_write")
    rows = [(row["layer"], row["token"], row["neuron"]) for row in ranked["rows"]]
    assert rows == brute_force(values, store, 5)
    derived = answer("derive", store.path, "mlp_erasure", "-s", 1, *flags)
    assert np.allclose(
        [row["values"] for row in derived["rows"] if row["layer"] == 0],
        store.derive("mlp_erasure", sequences=[1]).numpy()[0],
    )
    shown = answer("examples", store.path, "mlp_relative_write", "1:3", "-k", 2, *flags)
    assert len(shown["rows"]) == 2
    # A second load gives the scalars anew.
    assert SCALARS["mlp_relative_write"] is not loaded
    listed = {row["scalar"]: row["origin"] for row in answer("scalars", *flags)["rows"]}
    assert listed["mlp_relative_write"] == str(EXAMPLE)
    assert listed["mlp_write_norm"] is None
    page = CliRunner().invoke(app, ["scalars", "mlp_erasure", "--scalars", str(EXAMPLE)])
    assert page.exit_code == 0
    assert "# `mlp_erasure`" in page.stdout
    assert f"declared in {EXAMPLE}" in page.stdout


def test_files_may_be_named_in_the_environment(store: Store) -> None:
    words = ("topk", store.path, "mlp_erasure", "-k", 1)
    assert len(answer(*words, ACTSTORE_SCALARS=str(EXAMPLE))["rows"]) == 1
    twice = os.pathsep.join([str(EXAMPLE)] * 2)
    assert len(answer(*words, ACTSTORE_SCALARS=twice)["rows"]) == 1


def test_the_example_may_simply_be_run() -> None:
    names = runpy.run_path(str(EXAMPLE))
    assert SCALARS["mlp_erasure"] is names["mlp_erasure"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "There is no file"),
        ("x = 1", "registers no scalar"),
        ("x = ", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (
            "import actstore\nactstore.derived_scalar(axes='x', sources={'a': 'b'})(lambda a: a)",
            "lambda",
        ),
    ],
)
def test_a_file_that_fails_changes_nothing(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(EXAMPLE.read_text())
    first = load_scalars(file)
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidInput, match=words):
        load_scalars(file)
    assert all(SCALARS[one.name] is one for one in first)
    result = CliRunner().invoke(app, ["scalars", "--scalars", str(file)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


# Projections


@settings(max_examples=20)
@given(
    vector=st.lists(st.floats(-1e3, 1e3, allow_nan=False, width=32), min_size=16, max_size=16),
    name=st.sampled_from(["resid_post_mlp", "resid_post_embedding", "mlp_write", "attn_write"]),
    kind=st.sampled_from([list, np.array, torch.tensor]),
)
def test_a_projection_is_a_dot_product(
    store: Store, vector: list[float], name: str, kind: Any
) -> None:
    declared = store.project(name, kind(vector))
    source = store.derive(name, sequences=[0], dtype="float64").numpy()
    expected = source @ np.array(vector)
    found = store.derive(declared, sequences=[0], dtype="float64").numpy()
    if declared.axes[-1] is Dimension.SINGLETON:
        found = found[..., 0]
    scale = np.abs(source).max(initial=0) * np.abs(vector).sum() + 1e-300
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * scale)


def test_a_projection_is_ranked_like_any_scalar(store: Store) -> None:
    vector = torch.linspace(-1, 1, 16, dtype=torch.bfloat16)
    along = store.project("resid_post_mlp", vector, name="along")
    assert along.node_type is NodeType.LAYER
    values = store.derive("along")
    best = store.topk(along, k=20)
    found = list(zip(best.column("layer"), best.column("token"), strict=True))
    expected = brute_force(values, store, 20)
    assert found == [(layer, token) for layer, token, _ in expected]
    assert store.topk("along", k=20).column("token") == best.column("token")
    assert best.certificate.plan == "scan"
    best_of_layer = values.numpy()[1][~special_rows(store)].max()
    assert store.examples("along", (1, 0), k=1)[0].value == best_of_layer
    assert "along" not in SCALARS
    with Store(store.path) as other, pytest.raises(InvalidInput, match="Unknown derived scalar"):
        other.topk("along")


def test_a_projection_of_the_gradient(store: Store) -> None:
    vector = np.arange(16)
    along = store.project("resid_post_mlp", vector, pass_type="backward")
    gradient = store.raw("resid_post_mlp", pass_type="backward", dtype="float64").numpy()
    found = store.derive(along, dtype="float64").numpy()[..., 0]
    np.testing.assert_allclose(found, gradient @ vector, rtol=1e-12, atol=1e-12)


def test_a_projection_may_be_of_some_layers(store: Store) -> None:
    vector = np.ones(16)
    last = store.project("resid_post_mlp", vector, layers=1)
    assert store.derive(last, sequences=[0]).layers == (1,)
    assert set(store.topk(last, k=50).column("layer")) == {1}
    assert store.project("blocks.1.hook_resid_post", vector).layers == (1,)
    for ask in (
        lambda: store.topk(last, layers=0),
        lambda: store.derive(last, layers=0),
        lambda: store.examples(last, (0, 0)),
        lambda: store.project("resid_post_mlp", vector, layers=[2]),
        lambda: store.project("resid_post_embedding", vector, layers=0),
    ):
        with pytest.raises(InvalidInput) as caught:
            ask()
        assert caught.value.kind is ErrorKind.UNKNOWN_LAYER


def test_the_same_vector_has_the_same_name(store: Store) -> None:
    vector = np.linspace(0, 1, 16)
    one, same = (store.project("resid_post_mlp", given) for given in (vector, vector.tolist()))
    assert one.name == same.name
    assert one.name != store.project("resid_post_mlp", -vector).name
    vector[0] = 7
    assert store.derive(same, sequences=[0]).numpy().any()
    store.project("resid_post_mlp", vector, name="mine")
    with pytest.raises(InvalidInput, match="is a projection of this store already"):
        store.project("resid_post_mlp", vector, name="mine")
    assert store.project("resid_post_attn", vector, name="mine", replace=True).name == "mine"
    assert store.derive("mine", sequences=[0]).source.startswith("derived from resid_post_attn")
    with pytest.raises(InvalidInput, match="package's own"):
        store.project("resid_post_mlp", vector, name="mlp_write_norm")


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (np.ones(15), r"16 finite numbers; this one has the shape \(15,\)"),
        (np.ones((1, 16)), "shape"),
        ([1.0] * 15 + [np.nan], "nan at 15"),
        ([1.0] * 15 + [np.inf], "inf at 15"),
        (["a"] * 16, "holds"),
        ([[1, 2], [3]], "ragged"),
        (np.ones(16, complex), "complex"),
        (torch.ones(16, dtype=torch.complex64), "holds"),
        (None, "holds"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(store: Store, vector: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        store.project("resid_post_mlp", vector)


def test_what_cannot_be_projected_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInput, match="ends with the axis singleton"):
        store.project("resid_post_mlp_norm", np.ones(1))
    with pytest.raises(InvalidInput, match="not registered"):
        store.project(declare(), np.ones(24))
    with pytest.raises(InvalidInput, match="pass_type"):
        store.project("resid_post_mlp", np.ones(16), pass_type="sideways")
    with pytest.raises(InvalidInput, match="no backward value"):
        store.project("mlp_write", np.ones(16), pass_type="backward")


def test_a_projection_of_what_the_store_lacks_says_what_is_missing(tmp_path: Path) -> None:
    fresh_copy(tmp_path / "store")
    with Store(tmp_path / "store") as opened:
        along = opened.project("resid_post_mlp", np.ones(16), pass_type="backward")
        with pytest.raises(Unavailable, match="--objective"):
            opened.derive(along, sequences=[0])
