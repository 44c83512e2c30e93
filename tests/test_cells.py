"""Selecting values in an interval against looking at every value."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_builder import build_store, stored_rows

from actstore.query.cells import CellEffort, ValueInterval, select_cells
from actstore.query.selection import RowSelection, UnitSelection
from actstore.query.session import Store
from actstore.store.errors import ErrorKind, InvalidInput

LENGTHS = [60, 120, 5, 90, 128, 33, 100, 77]
TOKENS, NEURONS, LAYERS = sum(LENGTHS), 80, 2


@pytest.fixture(scope="module")
def values() -> npt.NDArray[np.float16]:
    """``(layer, row, neuron)`` with ties, both zeros, infinities and NaN."""
    rng = np.random.default_rng(1)
    found = (np.round(rng.normal(size=(LAYERS, TOKENS, NEURONS)) * 4) / 4).astype(np.float16)
    flat = found.reshape(-1)
    for value in (-0.0, np.nan, np.inf, -np.inf):
        flat[rng.choice(flat.size, 40, replace=False)] = value
    return found


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, values: npt.NDArray[np.float16]
) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        path = build_store(
            tmp_path_factory.mktemp("cells") / "store",
            {"mlp_post_act": values},
            LENGTHS,
            special_token_ids=[2, 7],
        )
    with Store(path) as opened:
        yield opened


NUMBERS = st.sampled_from([None, -0.0, 0.0, 0.25, 1.0, -1.5, 3.0, 60.0])
CHOICES = st.fixed_dictionaries(
    {
        "interval": st.none()
        | st.builds(ValueInterval, NUMBERS, NUMBERS, st.booleans(), st.booleans()),
        "layers": st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted),
        "units": st.none()
        | st.lists(st.integers(0, NEURONS - 1), unique=True, max_size=50).map(sorted),
        "rows": st.none() | st.tuples(st.integers(0, TOKENS), st.integers(1, 300)),
        "special": st.booleans(),
    }
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=CHOICES)
def test_every_value_that_is_wanted_is_found_once(
    store: Store, values: npt.NDArray[np.float16], choice: dict[str, Any]
) -> None:
    tokens = stored_rows(store.path)
    rows = None
    if choice["rows"] is not None:
        start, count = choice["rows"]
        rows = np.sort(tokens)[start : start + count]
    units = None if choice["units"] is None else np.array(choice["units"], np.int64)
    effort = CellEffort()
    batches = select_cells(
        store,
        store.scalar("mlp_post_act"),
        UnitSelection(tuple(choice["layers"]), NEURONS, units),
        RowSelection(store.reader, rows, choice["special"]),
        choice["interval"],
        max_cells=10**9,
        effort=effort,
    )
    found: list[tuple[int, int, int]] = []
    by_token = dict(zip(tokens.tolist(), range(TOKENS), strict=True))
    for batch in batches:
        places = [by_token[token] for token in batch.tokens.tolist()]
        expected = values[batch.layer, places, batch.units].astype(np.float32)
        assert np.array_equal(batch.values, expected, equal_nan=True)
        found += [
            (batch.layer, token, unit)
            for token, unit in zip(batch.tokens.tolist(), batch.units.tolist(), strict=True)
        ]
    assert len(set(found)) == len(found)
    assert len(found) <= effort.cells
    is_special = {
        int(token): bool(store.reader.segment(int(token) // 512).special[int(token) % 512])
        for token in tokens
    }
    allowed = [
        token
        for token in (tokens if rows is None else rows).tolist()
        if choice["special"] or not is_special[token]
    ]
    places = [by_token[token] for token in allowed]
    chosen = np.arange(NEURONS) if units is None else units
    interval: ValueInterval | None = choice["interval"]
    wanted = set()
    for layer in choice["layers"]:
        part = values[layer, places][:, chosen].astype(np.float32)
        inside = np.ones(part.shape, bool) if interval is None else interval.contains(part)
        wanted |= {
            (layer, allowed[row], int(chosen[column])) for row, column in np.argwhere(inside)
        }
    assert set(found) == wanted


def selected(store: Store, units: list[int], interval: ValueInterval | None, **limits: Any) -> int:
    batches = select_cells(
        store,
        store.scalar("mlp_write_norm"),
        UnitSelection((1,), NEURONS, np.array(units, np.int64)),
        RowSelection(store.reader, None, True),
        interval,
        **limits,
    )
    return sum(len(batch.values) for batch in batches)


def test_the_budget_is_checked_before_anything_is_read(store: Store) -> None:
    chunk = TOKENS * 32
    assert selected(store, [3], None, max_cells=chunk) == TOKENS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.query.value_readers.StoredValues.block", None)
        with pytest.raises(InvalidInput) as caught:
            selected(store, [3], None, max_cells=chunk - 1)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    with pytest.raises(InvalidInput, match="more than 600 places"):
        selected(store, [3], ValueInterval(low=-100.0), max_cells=600)


@pytest.mark.parametrize("interval", [None, ValueInterval(low=0.0)])
def test_nothing_is_read_after_the_deadline(store: Store, interval: ValueInterval | None) -> None:
    with pytest.raises(InvalidInput, match="longer") as caught:
        selected(store, [3], interval, max_cells=10**9, deadline=time.monotonic() - 1)
    assert caught.value.kind is ErrorKind.SQL_TIMEOUT


def test_pages_out_of_reach_are_not_read(tmp_path: Path) -> None:
    values = np.zeros((1, 4 * 512, 80))
    values[0, 700, 5] = 9.0
    path = build_store(tmp_path / "s", {"mlp_post_act": values}, [128] * 16, segment_rows=1024)
    with Store(path) as store:
        effort = CellEffort()
        units = UnitSelection((0,), 80)
        rows = RowSelection(store.reader, None, False)
        declared = store.scalar("mlp_post_act")
        batches = list(
            select_cells(
                store,
                declared,
                units,
                rows,
                ValueInterval(low=8.0),
                max_cells=10**6,
                effort=effort,
            )
        )
        assert [batch.values.tolist() for batch in batches if len(batch.values)] == [[9.0]]
        assert effort.pages_read == 1
        assert effort.cells <= 512 * 32
        assert effort.bounded_by.startswith("zone map")
