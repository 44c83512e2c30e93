"""Every shape of question against brute force over the values that ``derive`` gives.

Normalised and combined scores, the best units of each token, thresholds, comparisons and plans,
over stores of every storage dtype with segments that are partly filled, pages of special rows
alone, dead units, ties, NaN and infinities.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import VOCABULARY, append_plan, build_store, commit_segments

from actstore.query.session import Store
from actstore.store.column_copies import copy_columns
from actstore.store.errors import ErrorKind, InvalidInput

LAYERS, NEURONS, CHANNELS = 2, 40, 8
SPECIAL_TOKEN = 7
SCALARS = ("mlp_post_act", "mlp_write_norm", "mlp_act_times_grad", "resid_post_mlp")
KINDS = ("float16", "bfloat16", "float32")

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Place = tuple[int, int, int]


def hard_values(rng: np.random.Generator, tokens: int) -> Floats:
    """Units of every awkward kind, ``(layer, token, neuron)``."""
    values = rng.standard_normal((LAYERS, tokens, NEURONS)).astype(np.float32)
    values[:, :, 1] = 0.1  # constant, and no binary fraction
    values[:, :, 2] = -np.abs(values[:, :, 2])
    values[:, :, 3] = rng.integers(-1, 2, (LAYERS, tokens))  # ties everywhere
    values[:, rng.random(tokens) < 0.02, 4] = np.inf
    values[:, rng.random(tokens) < 0.02, 4] = -np.inf
    values[:, rng.random(tokens) < 0.3, 5] = np.nan
    values[:, :, 6] = np.nan
    values[:, :, 7] = np.where(rng.random((LAYERS, tokens)) < 0.5, 0.0, -0.0)
    values[:, :, 8] = rng.integers(-2, 2, (LAYERS, tokens)) / 4
    values[:, 100:120, 8] = 9.0  # more ties than a list holds
    values[0, :, 9] = np.linspace(-3, 3, tokens)  # the best all in the last segment
    values[:, :, 10] = 0  # dead
    values[:, :, 11] = -np.inf
    values[:, 512:1024, 12] = np.nan  # nothing in a whole segment
    values[:, ::3, 13] = -3e38  # minus infinity as float16
    values[1, :, 14] *= 1e-40  # subnormal
    values[:, :, 39] = np.round(values[:, :, 39])  # in the last, narrower chunk
    return values


@dataclass
class Truth:
    """All values of a store's scalars, and what is known of its rows; row by global row."""

    store: Store
    found: dict[str, Floats] = field(default_factory=dict)

    @cached_property
    def rows(self) -> int:
        """Beyond the greatest global row."""
        return int(self.store.derive("resid_post_mlp").rows.token.max()) + 1

    def column(self, name: str) -> npt.NDArray[Any]:
        table = self.store.sql(f"SELECT token, {name} FROM tokens").fetchnumpy()
        found = np.full(self.rows, -1, np.asarray(table[name]).dtype)
        found[np.asarray(table["token"])] = np.asarray(table[name])
        return found

    @cached_property
    def committed(self) -> Mask:
        return self.column("token") >= 0

    @cached_property
    def special(self) -> Mask:
        mask: Mask = (self.position == 0) | (self.column("token_id") == SPECIAL_TOKEN)
        return mask

    @cached_property
    def position(self) -> npt.NDArray[np.int64]:
        return self.column("position")

    @cached_property
    def sequence(self) -> npt.NDArray[np.int64]:
        return self.column("sequence")

    @cached_property
    def document(self) -> npt.NDArray[np.int64]:
        table = self.store.sql("SELECT sequence, document FROM sequences").fetchnumpy()
        of = dict(zip(table["sequence"].tolist(), table["document"].tolist(), strict=True))
        return np.array([of.get(number, -1) for number in self.sequence.tolist()])

    def values(self, name: str) -> Floats:
        """Float32 ``(layer, row, unit)``; NaN where nothing is committed."""
        if name not in self.found:
            tensor = self.store.derive(name)
            array = tensor.numpy()
            whole = np.full((len(array), self.rows, array.shape[-1]), np.nan, np.float32)
            whole[:, tensor.rows.token] = array
            self.found[name] = whole
        return self.found[name]

    def allowed(self, query: dict[str, Any]) -> Mask:
        """``(row,)`` what may answer."""
        rows = np.arange(self.rows)
        mask: Mask = {
            None: np.ones(self.rows, bool),
            "position > 20": self.position > 20,
            "score = 3": self.document % 5 == 3,
            "score < 2 and position % 7 = 1": (self.document % 5 < 2) & (self.position % 7 == 1),
            "false": np.zeros(self.rows, bool),
        }[query["where"]]
        mask = mask & self.committed
        if query["tokens"] is not None:
            mask &= np.isin(rows, query["tokens"])
        return mask if query["special"] else mask & ~self.special

    def normalised(self, name: str, how: str | None) -> Floats:
        """``values`` in units of each unit's own, over ordinary committed rows."""
        if how is None:
            return self.values(name)
        key = f"{name} by {how}"
        if key not in self.found:
            self.found[key] = self._normalised(name, how)
        return self.found[key]

    def _normalised(self, name: str, how: str) -> Floats:
        values = self.values(name)
        ordinary = self.committed & ~self.special
        wide = values.astype(np.float64)
        over = wide[:, ordinary]
        if how == "max":
            centre = np.zeros((len(wide), wide.shape[2]))
            scale = np.where(np.isnan(over), -1, np.abs(over)).max(axis=1)
        else:
            centre, scale = self._deviations(name, over)
        known = np.isfinite(scale) & (scale > 0)
        scale = np.where(known, scale, np.nan)
        with np.errstate(invalid="ignore", over="ignore"):
            score = (wide - centre[:, None]) / scale[:, None]
        return score.astype(np.float32)

    def _deviations(
        self, name: str, over: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and standard deviation as the store merged them, once they are near the truth."""
        reader = self.store.reader
        (array,) = [one for one in reader.arrays.values() if one.spec.key == "mlp_post_act/forward"]
        index = self.store.unit_index(array)
        parts = [index.statistics(layer) for layer in range(LAYERS)]
        c = np.ones((LAYERS, NEURONS))
        if name == "mlp_write_norm":
            declared = self.store.scalar(name)
            c = np.stack([self.store.coefficients(declared, layer) for layer in range(LAYERS)])
        mean = np.stack([part.mean for part in parts]) * c
        deviation = np.sqrt(np.stack([part.variance for part in parts]) * c**2)
        finite = ~np.isinf(over).any(axis=1) & ~np.isnan(over).all(axis=1)
        for layer, unit in np.argwhere(finite):
            column = over[layer, :, unit]
            column = column[~np.isnan(column)]
            wide = np.abs(column).max()
            if not 1e-15 < wide < 1e15:
                # Squares are summed in float32, which ends before these.
                continue
            assert math.isclose(mean[layer, unit], column.mean(), abs_tol=1e-6 * wide)
            assert math.isclose(deviation[layer, unit], column.std(), abs_tol=1e-5 * wide)
        # What is constant has no spread at all, however its values round.
        assert (deviation[:, [1, 10]] == 0).all()
        return mean, deviation


def make_store(path: Path, kind: str) -> Store:
    rng = np.random.default_rng(KINDS.index(kind))
    lengths = [int(n) for n in rng.integers(1, 120, 20)]
    ids = [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]
    rows = 512
    if kind == "bfloat16":
        # Pages of special rows alone, and one whose segment has other pages.
        rows = 1024
        lengths[6:6] = [120] * 12
        ids[6:6] = [[SPECIAL_TOKEN] * 120] * 12
    further = [int(n) for n in rng.integers(1, 120, 9)] if kind == "float16" else []
    tokens = sum(lengths) + sum(further)
    activations = hard_values(rng, tokens)
    gradients = rng.standard_normal(activations.shape).astype(np.float32)
    gradients[:, rng.random(tokens) < 0.02, 15] = np.inf
    gradients[:, :, 16] = 0
    values: dict[str, npt.ArrayLike] = {
        "mlp_post_act": activations,
        "mlp_post_act/backward": gradients,
        "resid_post_mlp": np.round(rng.standard_normal((LAYERS, tokens, CHANNELS)) * 8) / 8,
    }
    columns = [{"score": n % 5, "name": f"d{n}"} for n in range(len(lengths) + len(further))]
    build_store(
        path,
        values,
        lengths,
        dtype=kind,
        segment_rows=rows,
        context=120,
        token_ids=ids,
        special_token_ids=(SPECIAL_TOKEN,),
        columns=columns[: len(lengths)],
        shuffle=3 if kind == "float32" else None,
    )
    if further:
        # The first plan's last segment stays partly filled.
        append_plan(path, further, columns=columns[len(lengths) :])
        commit_segments(path, values)
    if kind == "float32":
        copy_columns(path, "mlp_post_act")
    return Store(path)


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    folder = tmp_path_factory.mktemp("shapes")
    return {kind: Truth(make_store(folder / kind, kind)) for kind in KINDS}


def test_the_stores_have_what_they_are_for(truths: dict[str, Truth]) -> None:
    for truth in truths.values():
        reader = truth.store.reader
        assert len(reader.segments) >= 3
        rows = [reader.commits["base"][segment].rows for segment in reader.segments]
        assert min(rows) < reader.segment_rows
    assert truths["float32"].store.reader.column_copies
    reader = truths["bfloat16"].store.reader
    ordinary = ~np.concatenate([reader.segment(s).special for s in reader.segments])
    pages = [ordinary[start : start + 512].any() for start in range(0, len(ordinary), 512)]
    assert not all(pages)
    float16 = truths["float16"].store.reader
    assert float16.commits["base"][0].rows != 512 or len(float16.plans) == 2


# Questions

WHERE = st.sampled_from(
    [None, None, None, "position > 20", "score = 3", "score < 2 and position % 7 = 1", "false"]
)
TOKENS = st.none() | st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True)
PAIRS = st.sampled_from(
    [None, None, [(0, 3), (1, 5)], [(0, 0), (0, 39), (1, 0), (1, 20)], [(1, 2)], [(0, 7), (0, 10)]]
)
UNITS = st.none() | st.lists(st.integers(0, NEURONS - 1), min_size=1, max_size=6, unique=True)

questions = st.fixed_dictionaries(
    {
        "k": st.sampled_from([1, 3, 8, 20, 100, 3000]),
        "layers": st.sampled_from([None, None, 0, [1]]),
        "neurons": UNITS,
        "units": PAIRS,
        "largest": st.booleans(),
        "by": st.sampled_from(["value", "value", "magnitude"]),
        "distinct": st.sampled_from([None, None, "sequence", "document"]),
        "where": WHERE,
        "tokens": TOKENS,
        "special": st.booleans(),
    }
)


def chosen(query: dict[str, Any], units: int) -> Mask:
    """``(layer, unit)`` what may answer."""
    mask = np.zeros((LAYERS, units), bool)
    layers = query["layers"]
    mask[[0, 1] if layers is None else layers] = True
    if query["neurons"] is not None:
        mask &= np.isin(np.arange(units), query["neurons"])
    if query["units"] is not None:
        pairs = np.zeros_like(mask)
        for layer, unit in query["units"]:
            pairs[layer, unit] = True
        mask &= pairs
    return mask


def in_order(score: Floats, query: dict[str, Any], keep: Mask) -> list[Place]:
    """Places by score under the order of rankings, ``(layer, token, unit)``."""
    layer, token, unit = np.nonzero(keep & ~np.isnan(score))
    found = score[layer, token, unit] + np.float32(0)
    key = np.abs(found) if query["by"] == "magnitude" else found if query["largest"] else -found
    order = np.lexsort((unit, token, layer, -key))
    return [(int(layer[i]), int(token[i]), int(unit[i])) for i in order]


def best(truth: Truth, score: Floats, query: dict[str, Any], keep: Mask) -> list[Place]:
    """The places that answer a question."""
    labels = {"sequence": truth.sequence, "document": truth.document}.get(query["distinct"] or "")
    answer: list[Place] = []
    seen: set[int] = set()
    for place in in_order(score, query, keep):
        if labels is not None:
            label = int(labels[place[1]])
            if label in seen:
                continue
            seen.add(label)
        answer.append(place)
        if len(answer) == query["k"]:
            break
    return answer


def keep_of(truth: Truth, query: dict[str, Any], units: int) -> Mask:
    keep: Mask = chosen(query, units)[:, None, :] & truth.allowed(query)[None, :, None]
    return keep


def usable(truth: Truth, query: dict[str, Any], name: str) -> dict[str, Any]:
    """A question's arguments, with rows and units that exist."""
    query = dict(query)
    if query.get("by") == "magnitude":
        query["largest"] = True
    if query["tokens"] is not None:
        query["tokens"] = [row for row in query["tokens"] if truth.committed[row]] or None
    if name == "resid_post_mlp":
        query["units"] = None
        query["neurons"] = None if query["neurons"] is None else [n % 8 for n in query["neurons"]]
    return query


def arguments(query: dict[str, Any], name: str) -> dict[str, Any]:
    if name != "resid_post_mlp":
        return query
    renamed = {key: value for key, value in query.items() if key not in ("neurons", "units")}
    return renamed | {"channels": query["neurons"]}


def same(found: Any, expected: Any) -> bool:
    """Equal numbers, -0.0 and 0.0 alike."""
    one, other = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return one.shape == other.shape and bool((one == other).all())


def check(found: Any, places: list[Place], value: Floats, score: Floats | None = None) -> None:
    """Fail unless an answer holds these places, with these values and scores."""
    columns = found.table.to_pydict()
    unit = next(columns[name] for name in ("neuron", "channel") if name in columns)
    got = list(zip(columns["layer"], columns["token"], unit, strict=True))
    assert got == places
    at = tuple(np.array(places, np.int64).reshape(-1, 3).T)
    assert same(columns["value"], value[at])
    if score is not None:
        assert same(columns["score"], score[at])


# Plain and normalised


@settings(deadline=None, max_examples=60)
@given(query=questions, kind=st.sampled_from(KINDS), name=st.sampled_from(SCALARS))
def test_rankings_equal_brute_force(
    truths: dict[str, Truth], query: dict[str, Any], kind: str, name: str
) -> None:
    truth = truths[kind]
    query = usable(truth, query, name)
    values = truth.values(name)
    found = truth.store.topk(name, **arguments(query, name))
    places = best(truth, values, query, keep_of(truth, query, values.shape[2]))
    check(found, places, values)
    assert found.certificate.rows == truth.allowed(query).sum()


@settings(deadline=None, max_examples=80)
@given(
    query=questions,
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(["mlp_post_act", "mlp_write_norm"]),
    how=st.sampled_from(["max", "std"]),
)
def test_normalised_rankings_equal_brute_force(
    truths: dict[str, Truth], query: dict[str, Any], kind: str, name: str, how: str
) -> None:
    truth = truths[kind]
    query = usable(truth, query, name)
    score = truth.normalised(name, how)
    found = truth.store.topk(name, normalise=how, **query)
    places = best(truth, score, query, keep_of(truth, query, NEURONS))
    check(found, places, truth.values(name), score)


def test_units_without_a_scale_have_no_score(truths: dict[str, Truth]) -> None:
    for truth in truths.values():
        for how, without in [("max", [4, 6, 7, 10, 11]), ("std", [1, 4, 6, 7, 10, 11])]:
            for unit in without:
                found = truth.store.topk(
                    "mlp_post_act", normalise=how, neurons=unit, special=True, by="magnitude"
                )
                assert len(found) == 0, (how, unit)


def test_what_has_no_statistics_says_how_to_get_them(truths: dict[str, Truth]) -> None:
    with pytest.raises(InvalidInput, match="actstore index") as caught:
        truths["float16"].store.topk("mlp_act_times_grad", normalise="max")
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


# Combined


def combined(score: Floats, pairs: list[tuple[int, int]], how: str) -> Floats:
    """``(1, row, 1)``: one score per row, NaN where any part of it is."""
    parts = [score[layer, :, unit] for layer, unit in pairs]
    with np.errstate(invalid="ignore", over="ignore"):
        if how in ("max", "min"):
            whole = parts[0]
            for part in parts[1:]:
                whole = np.maximum(whole, part) if how == "max" else np.minimum(whole, part)
        else:
            total = np.zeros(score.shape[1])
            for part in parts:
                total = total + part.astype(np.float64)
            whole = (total / len(parts) if how == "mean" else total).astype(np.float32)
    return whole[None, :, None]


GROUPS = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 15) | st.integers(0, NEURONS - 1)),
    min_size=1,
    max_size=5,
    unique=True,
)


@settings(deadline=None, max_examples=90)
@given(
    query=questions,
    group=GROUPS,
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(["mlp_post_act", "mlp_write_norm", "mlp_act_times_grad"]),
    how=st.sampled_from(["sum", "mean", "max", "min"]),
    normalise=st.sampled_from([None, None, "max", "std"]),
)
def test_combined_scores_equal_brute_force(
    truths: dict[str, Truth],
    query: dict[str, Any],
    group: list[tuple[int, int]],
    kind: str,
    name: str,
    how: str,
    normalise: str | None,
) -> None:
    truth = truths[kind]
    if name == "mlp_act_times_grad":
        normalise = None
    query = usable(truth, query, name) | {"units": group, "layers": None, "neurons": None}
    score = combined(truth.normalised(name, normalise), sorted(group), how)
    found = truth.store.topk(name, combine=how, normalise=normalise, **query)
    keep = truth.allowed(query)[None, :, None]
    places = best(truth, score, query, keep)
    columns = found.table.to_pydict()
    assert columns["token"] == [token for _, token, _ in places]
    assert same(columns["value"], [score[place] for place in places])


def test_a_group_of_a_scalar_that_is_scanned(truths: dict[str, Truth]) -> None:
    truth = truths["float32"]
    query = {"k": 30, "by": "value", "largest": True, "distinct": None}
    query |= {"where": None, "tokens": None, "special": False}
    score = combined(truth.values("resid_post_mlp"), [(0, 1), (0, 6), (1, 1), (1, 6)], "sum")
    found = truth.store.topk("resid_post_mlp", channels=[1, 6], combine="sum", k=30)
    places = best(truth, score, query, truth.allowed(query)[None, :, None])
    assert found.certificate.plan == "scan"
    assert found.column("token") == [token for _, token, _ in places]
    assert same(found.column("value"), [score[place] for place in places])


@pytest.mark.parametrize(
    "options",
    [
        {"combine": "sum", "units": []},
        {"combine": "sum", "per": "layer", "neurons": [1]},
        {"combine": "product", "neurons": [1]},
        {"normalise": "median"},
        {"per": "token"},
        {"per": "token", "tokens": [5], "distinct": "sequence"},
    ],
)
def test_shapes_that_make_no_sense_are_refused(
    truths: dict[str, Truth], options: dict[str, Any]
) -> None:
    for ask in (truths["float16"].store.topk, truths["float16"].store.explain):
        with pytest.raises(InvalidInput) as caught:
            ask("mlp_post_act", **options)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


# The best units of each token


@settings(deadline=None, max_examples=35)
@given(
    query=questions,
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(SCALARS),
    normalise=st.sampled_from([None, None, "max"]),
)
def test_the_best_units_of_each_token_equal_brute_force(
    truths: dict[str, Truth], query: dict[str, Any], kind: str, name: str, normalise: str | None
) -> None:
    truth = truths[kind]
    query = usable(truth, query, name) | {"distinct": None}
    if name in ("mlp_act_times_grad", "resid_post_mlp"):
        normalise = None
    if query["where"] is None and query["tokens"] is None:
        query["tokens"] = np.flatnonzero(truth.committed)[::29].tolist()
    score, values = truth.normalised(name, normalise), truth.values(name)
    keep = keep_of(truth, query, values.shape[2])
    of_token: dict[int, list[Place]] = {}
    for place in in_order(score, query, keep):
        of_token.setdefault(place[1], []).append(place)
    expected = [place for token in sorted(of_token) for place in of_token[token][: query["k"]]]
    found = truth.store.topk(name, per="token", normalise=normalise, **arguments(query, name))
    check(found, expected, values, score if normalise else None)
    assert found.certificate.plan == "rows"


def test_the_best_of_tokens_over_budget_is_refused(truths: dict[str, Truth]) -> None:
    with pytest.raises(InvalidInput, match="max_cells=100") as caught:
        truths["float16"].store.topk("mlp_post_act", per="token", where="true", max_cells=100)
    assert caught.value.kind is ErrorKind.TOO_LARGE


# Thresholds

ENDS = st.sampled_from(
    [0.0, -0.0, math.inf, -math.inf, 0.25, -0.25, 0.5, 1, -1, 9.0, 1e-42, 3e38, -3e38, 1e300]
)
intervals = st.fixed_dictionaries(
    {
        "low": st.none() | ENDS | st.integers(0, 10**6),
        "high": st.none() | ENDS | st.integers(0, 10**6),
        "low_open": st.booleans(),
        "high_open": st.booleans(),
    }
)


@settings(deadline=None, max_examples=90)
@given(
    query=questions,
    interval=intervals,
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(SCALARS),
)
def test_thresholds_equal_brute_force(
    truths: dict[str, Truth],
    query: dict[str, Any],
    interval: dict[str, Any],
    kind: str,
    name: str,
) -> None:
    truth = truths[kind]
    values = truth.values(name)
    query = {
        key: value
        for key, value in usable(truth, query, name).items()
        if key in ("layers", "neurons", "units", "where", "tokens", "special")
    }
    ends: dict[str, float] = {}
    keep = keep_of(truth, query, values.shape[2]) & ~np.isnan(values)
    wide = values.astype(np.float64)
    for side, names in (("low", ("above", "at_least")), ("high", ("below", "at_most"))):
        end = interval[side]
        if isinstance(end, int) and end > 1:
            # A value of the store's own: exactly on the edge.
            end = float(values.reshape(-1)[end % values.size])
            end = 0.0 if math.isnan(end) else end
        if end is None:
            continue
        is_open = interval[f"{side}_open"]
        ends[names[0] if is_open else names[1]] = end
        if side == "low":
            keep &= wide > end if is_open else wide >= end
        else:
            keep &= wide < end if is_open else wide <= end
    if not ends:
        with pytest.raises(InvalidInput, match="No threshold"):
            truth.store.filter(name, **arguments(query, name))
        return
    found = truth.store.filter(name, **ends, **arguments(query, name))
    places = [(int(a), int(b), int(c)) for a, b, c in np.argwhere(keep)]
    check(found, places, values)
    counts = truth.store.count(name, **ends, **arguments(query, name))
    assert counts.total == len(places)
    unit = "channel" if name == "resid_post_mlp" else "neuron"
    by_unit = {(row["layer"], row[unit]): row["count"] for row in counts.rows()}
    amounts = keep.sum(axis=1)
    assert by_unit == {(int(a), int(b)): int(amounts[a, b]) for a, b in np.argwhere(amounts)}
    assert found.certificate.rows == truth.allowed(query).sum()


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({}, "No threshold"),
        ({"above": 1, "at_least": 1}, "Two ends"),
        ({"below": 1, "at_most": 2}, "Two ends"),
        ({"above": math.nan}, "above is nan"),
        ({"above": True}, "above is True"),
        ({"above": "1"}, "above is '1'"),
        ({"above": 10**400}, "above is 1000"),
    ],
)
def test_thresholds_that_are_none_are_refused(
    truths: dict[str, Truth], ends: dict[str, Any], words: str
) -> None:
    for ask in (truths["float16"].store.filter, truths["float16"].store.count):
        with pytest.raises(InvalidInput, match=words) as caught:
            ask("mlp_post_act", **ends)
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


def test_too_many_values_are_refused(truths: dict[str, Truth]) -> None:
    store = truths["float16"].store
    with pytest.raises(InvalidInput, match="More than 10 values"):
        store.filter("mlp_post_act", above=0, limit=10)
    with pytest.raises(InvalidInput, match="in more than 100 places"):
        store.count("mlp_post_act", above=0, max_cells=100)
    for limit in (0, -1, None, 1.5, True):
        with pytest.raises(InvalidInput, match="limit is"):
            store.filter("mlp_post_act", above=0, limit=limit)


# Comparisons


@settings(deadline=None, max_examples=60)
@given(
    query=questions,
    kind=st.sampled_from(KINDS),
    names=st.permutations(["mlp_post_act", "mlp_write_norm", "mlp_act_times_grad"]),
    count=st.sampled_from([2, 3]),
)
def test_comparisons_equal_brute_force(
    truths: dict[str, Truth], query: dict[str, Any], kind: str, names: list[str], count: int
) -> None:
    truth = truths[kind]
    names = names[:count]
    query = usable(truth, query, names[0])
    query["k"] = min(query["k"], 100)
    keep = keep_of(truth, query, NEURONS)
    ranked = {name: best(truth, truth.values(name), query, keep) for name in names}
    places = list(dict.fromkeys(place for name in names for place in ranked[name]))
    found = truth.store.compare(names, **query)
    columns = found.to_arrow().to_pydict()
    got = list(zip(columns["layer"], columns["token"], columns["neuron"], strict=True))
    assert got == places
    for name in names:
        rank = {place: number + 1 for number, place in enumerate(ranked[name])}
        assert columns[f"{name}_rank"] == [rank.get(place) for place in places]
        expected = np.array([truth.values(name)[place] for place in places], np.float32)
        np.testing.assert_array_equal(np.array(columns[name], np.float32), expected)
    assert list(found.certificates) == names


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["mlp_post_act"], {}),
        ([], {}),
        ("mlp_post_act", {}),
        (["mlp_post_act", "mlp_post_act"], {}),
        (["mlp_post_act", "resid_post_mlp"], {}),
        (["mlp_post_act", "mlp_write_norm"], {"per": "layer"}),
        (["mlp_post_act", "mlp_write_norm"], {"normalise": "max"}),
    ],
)
def test_what_cannot_be_compared_is_refused(
    truths: dict[str, Truth], names: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        truths["float16"].store.compare(names, **options)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


# Plans


@settings(deadline=None, max_examples=60)
@given(
    query=questions,
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(SCALARS),
    per=st.sampled_from([None, None, "layer", "token", "neuron"]),
)
def test_a_plan_is_what_the_certificate_then_says(
    truths: dict[str, Truth], query: dict[str, Any], kind: str, name: str, per: str | None
) -> None:
    truth = truths[kind]
    query = usable(truth, query, name)
    if per == "token":
        query |= {"distinct": None, "where": query["where"] or "score = 3"}
    elif per == "neuron":
        query |= {"neurons": query["neurons"] or list(range(CHANNELS)), "distinct": None}
    query["per"] = "layer" if per == "neuron" and name == "resid_post_mlp" else per
    if not chosen(query, CHANNELS if name == "resid_post_mlp" else NEURONS).any():
        return
    planned = truth.store.explain(name, **arguments(query, name))
    certificate = truth.store.topk(name, **arguments(query, name)).certificate
    steps = {planned.plan, planned.fallback} - {None}
    if planned.plan == "lists" and (planned.fallback == "bounds" or planned.groups > 32):
        # Of many groups the lists may leave few, which are searched one by one.
        steps |= {"bounds", "lists+bounds"}
    assert certificate.plan in steps
    assert planned.bounded_by == certificate.bounded_by
    assert json.dumps(planned.to_json(), allow_nan=False)
    assert planned.plan in str(planned)
    assert planned.segments <= certificate.segments


@pytest.mark.parametrize(
    ("name", "options", "plan", "bounded_by"),
    [
        ("mlp_post_act", {"k": 3, "neurons": [0]}, "lists", "zone map of mlp_post_act/forward"),
        ("mlp_post_act", {"k": 9, "neurons": [0], "special": True}, "lists", "zone map"),
        ("mlp_act_times_grad", {"k": 3}, "bounds", "interval of mlp_post_act/forward and"),
        ("resid_post_mlp", {"k": 3}, "scan", "nothing"),
        ("mlp_act_times_grad", {"k": 3, "tokens": [40]}, "rows", "interval"),
    ],
)
def test_every_plan_is_reached(
    truths: dict[str, Truth], name: str, options: dict[str, Any], plan: str, bounded_by: str
) -> None:
    planned = truths["float16"].store.explain(name, **options)
    assert planned.plan == plan
    assert planned.bounded_by.startswith(bounded_by)
    found = truths["float16"].store.topk(name, **options).certificate
    assert found.plan in (plan, f"{plan}+bounds", planned.fallback)


def test_loose_bounds_give_way_to_a_scan(truths: dict[str, Truth]) -> None:
    truth = truths["float16"]
    # One unit: every page's product of extremes is above nearly all of its products.
    options: dict[str, Any] = {"neurons": [0], "k": 60}
    planned = truth.store.explain("mlp_act_times_grad", **options)
    assert (planned.plan, planned.fallback) == ("bounds", "scan")
    found = truth.store.topk("mlp_act_times_grad", **options)
    assert found.certificate.plan == "scan"
    query = {"by": "value", "largest": True, "distinct": None, "k": 60, "where": None}
    query |= {"tokens": None, "special": False, "layers": None, "neurons": [0], "units": None}
    values = truth.values("mlp_act_times_grad")
    check(found, best(truth, values, query, keep_of(truth, query, NEURONS)), values)
    # Without the budget for a scan the bounds go to the end.
    bounded = truth.store.topk("mlp_act_times_grad", max_cells=10, **options)
    assert bounded.certificate.plan == "bounds"
    assert bounded.rows() == found.rows()
