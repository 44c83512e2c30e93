"""Rankings of every derived scalar against sorting all its values."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_gpt2 import tiny_gpt2

import actstore
from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.derived.registry import requires_gradient
from actstore.query.session import Store
from actstore.store.errors import InvalidInput
from actstore.store.vocabulary import OPTIONAL_LOCATIONS, Dimension

PLAIN = sorted(
    name
    for name, declared in SCALARS.items()
    if declared.about is None
    and declared.latents is None
    and name not in ("logits", *map(str, OPTIONAL_LOCATIONS))
)
ABOUT = sorted(name for name, declared in SCALARS.items() if declared.about is not None)

Row = tuple[float, int, int, tuple[int, ...]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    generator = torch.Generator().manual_seed(11)
    lengths = [7, 1, 12, 3, 9]
    corpus = [torch.randint(1, 53, (length,), generator=generator).tolist() for length in lengths]
    return actstore.ingest(
        (tiny_gpt2(seed=2), None),
        corpus,
        tmp_path_factory.mktemp("ranked") / "store",
        locations="attention",
        objective="next_token_log_prob",
        segment_rows=512,
    )


def every_value(store: Store, declared: DerivedScalar) -> list[Row]:
    """(value, layer, token, unit) of everything that may rank, in no order."""
    found: list[Row] = []
    tensor = store.derive(declared)
    array = tensor.numpy() if tensor.layers is not None else tensor.numpy()[None]
    special = store.row_map.special(tensor.rows)
    for layer, values in enumerate(array):
        for row, units in enumerate(values):
            if special[row]:
                continue
            token, position = int(tensor.rows.token[row]), int(tensor.rows.position[row])
            for unit in np.ndindex(units.shape):
                full = unit
                if tensor.attended is not None:
                    full = (int(tensor.attended[row]), *unit)
                elif declared.is_pair_shaped:
                    attended = unit[declared.axes.index(Dimension.ATTENDED)]
                    if attended > position:
                        continue
                value = float(units[unit])
                if not np.isnan(value):
                    found.append((value, layer, token, full))
    return found


def columns(store: Store, declared: DerivedScalar, **options: Any) -> list[Row]:
    found = store.topk(declared, **options).table.to_pydict()
    rows: list[Row] = []
    axes = [axis for axis in declared.ranked_axes if axis is not Dimension.SINGLETON]
    for number, value in enumerate(found["value"]):
        unit = []
        for axis in axes:
            if axis is Dimension.ATTENDED:
                position = found["position"][number]
                first = found["token"][number] - position
                unit.append(found["attended_token"][number] - first)
            else:
                unit.append(found[str(axis)][number])
        layer = found["layer"][number] if "layer" in found else 0
        rows.append((value, layer, found["token"][number], tuple(unit)))
    return rows


def expected(rows: list[Row], k: int, sign: int, axes: tuple[Dimension, ...]) -> list[Row]:
    kept = [place for place, axis in enumerate(axes) if axis is not Dimension.SINGLETON]
    ordered = sorted(rows, key=lambda row: (-sign * (row[0] + 0.0), *row[1:]))[:k]
    return [
        (value, layer, token, tuple(unit[place] for place in kept))
        for value, layer, token, unit in ordered
    ]


@pytest.mark.parametrize("name", PLAIN)
def test_topk_equals_sorting_every_value(store: Store, name: str) -> None:
    declared = SCALARS[name]
    rows = every_value(store, declared)
    for largest, sign in ((True, 1), (False, -1)):
        found = columns(store, declared, k=17, largest=largest)
        assert found == expected(rows, 17, sign, declared.ranked_axes)
    if declared.has_layers:
        found = columns(store, declared, k=5, layers=1)
        inside = [row for row in rows if row[1] == 1]
        assert found == expected(inside, 5, 1, declared.ranked_axes)


def test_gradients_have_lists_and_zone_maps_of_their_own(store: Store) -> None:
    gradients = [name for name in PLAIN if requires_gradient(SCALARS[name])]
    assert "mlp_act_times_grad" in gradients
    assert "attn_act_times_grad" in gradients
    certificate = store.topk("mlp_act_times_grad", k=3).certificate
    assert certificate.plan == "bounds"
    assert certificate.bounded_by == "interval of mlp_post_act/forward and mlp_post_act/backward"
    assert store.topk("resid_post_mlp", k=3).certificate.bounded_by == "nothing"


@pytest.mark.parametrize("name", ["mlp_post_act", "attn_query", "attn_qk_probs", "attn_write_norm"])
def test_gradients_rank_like_values(store: Store, name: str) -> None:
    declared = store.scalar(name, "backward")
    assert declared.name == f"{name}_gradient"
    rows = every_value(store, declared)
    for largest, sign in ((True, 1), (False, -1)):
        found = columns(store, declared, k=9, largest=largest)
        assert found == expected(rows, 9, sign, declared.ranked_axes)
    stored = name == "mlp_post_act"
    certificate = store.topk(name, pass_type="backward").certificate
    assert (certificate.plan != "scan") == stored
    raw = store.raw("mlp_post_act", pass_type="backward").numpy()
    best = store.topk("mlp_post_act", pass_type="backward", k=1, special=True).rows()[0]
    assert best["value"] == raw.max()


def test_a_scalar_without_a_backward_value_says_so(store: Store) -> None:
    with pytest.raises(InvalidInput, match="no backward value"):
        store.topk("mlp_write_norm", pass_type="backward")
    with pytest.raises(InvalidInput, match="use forward, backward"):
        store.derive("mlp_write_norm", pass_type="sideways")


@pytest.mark.parametrize("name", ABOUT)
def test_a_scalar_about_one_node_has_no_ranking_and_says_what_to_do(
    store: Store, name: str
) -> None:
    with pytest.raises(InvalidInput, match=r"Prompt"):
        store.topk(name)


def test_examples_of_a_head_show_the_pairs(store: Store) -> None:
    declared = SCALARS["unflattened_attn_write_norm"]
    rows = [row for row in every_value(store, declared) if (row[1], row[3]) == (1, (0, 1))]
    best: npt.NDArray[Any] = np.array(sorted((row[0] for row in rows), reverse=True)[:3])
    found = store.examples(declared.name, unit=(1, 0, 1), k=3, distinct=None)
    assert np.array_equal(
        np.array([one.value for one in found], np.float32), best.astype(np.float32)
    )
