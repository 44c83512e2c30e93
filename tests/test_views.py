import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_builder import build_store, stored_rows
from viewer_store import (
    DEAD,
    DEAD_LATENT,
    LATENTS,
    LAYERS,
    LENGTHS,
    NEURONS,
    SET,
    add_latents,
    build,
    values,
)

from actstore.query import notebooks
from actstore.query.service.pages.templating import colour_class, environment, style_sheet
from actstore.query.session import Store
from actstore.query.views.charts import (
    ChartSuggestion,
    distribution_chart,
    draw,
    draw_distribution,
    suggest,
    suggested_chart,
)
from actstore.query.views.colours import STEPS, Scale, ramp
from actstore.query.views.derived_values import derived_at_examples
from actstore.query.views.distribution import BINS, Distribution
from actstore.query.views.heads import HeadTable, HeadView, attention_pattern, pattern_image
from actstore.query.views.latents import LatentCard, LatentQuery, LatentTable
from actstore.query.views.neuron_card import EXAMPLE_KINDS, NeuronCard, similar_entries
from actstore.query.views.neuron_table import SORTS, NeuronQuery, NeuronTable
from actstore.query.views.overview import Overview
from actstore.query.views.scalar_list import ScalarList
from actstore.query.views.sequence_grid import SequenceView, scalars_of_tokens
from actstore.query.views.sequence_list import SequenceList
from actstore.query.views.sql_result import SqlResult
from actstore.query.views.strips import strip_of
from actstore.query.views.text import number, percent, pieces, spelled
from actstore.store.errors import ErrorKind, InvalidInput, Unavailable
from actstore.store.histograms import Histogram
from actstore.store.vocabulary import Dimension, WeightLocationType


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = build(tmp_path_factory.mktemp("views") / "store")
    add_latents(path)
    with Store(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store of residual streams alone."""
    resid = {"resid_post_mlp": values()["resid_post_mlp"]}
    path = build_store(tmp_path_factory.mktemp("bare") / "store", resid, LENGTHS)
    with Store(path) as opened:
        yield opened


def ordinary() -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Tokens that are not at position 0."""
    return np.concatenate([np.arange(length) > 0 for length in LENGTHS])


# Colours and text


@given(st.floats(allow_nan=False), st.floats(min_value=1e-3, max_value=1e6))
def test_step_has_the_sign_of_the_value_and_grows_with_it(value: float, limit: float) -> None:
    scale = Scale(limit)
    step = scale.step(value)
    assert step is not None
    assert -STEPS <= step <= STEPS
    assert step * value >= 0
    assert scale.step(-value) == -step
    assert abs(step) <= abs(scale.step(value * 2) or 0)


def test_scale_leaves_out_what_is_no_number() -> None:
    assert Scale.over([1.0, -3.0, math.nan, math.inf, None]).limit == 3.0
    assert Scale.over([]).limit == 1.0
    assert Scale(1.0).step(math.nan) is None
    assert Scale(1.0).step(math.inf) == STEPS
    with pytest.raises(ValueError, match="positive"):
        Scale(0.0)


@given(st.lists(st.none() | st.floats(min_value=-1e9, max_value=1e9), max_size=12))
def test_ramp_keeps_order(given_values: list[float | None]) -> None:
    steps = ramp(given_values)
    known = sorted(
        (value, step)
        for value, step in zip(given_values, steps, strict=True)
        if value is not None and step is not None
    )
    assert [step for _, step in known] == sorted(step for _, step in known)
    assert [step is None for step in steps] == [value is None for value in given_values]


@given(st.text(max_size=30))
def test_pieces_hold_the_whole_text_and_show_no_control_character(text: str) -> None:
    found = pieces(text)
    assert "".join(piece.raw for piece in found) == text
    shown = "".join(piece.text for piece in found)
    assert shown
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u200b-\u200f\u2028\u2029]", shown)


def test_spaces_and_line_breaks_are_seen() -> None:
    assert spelled(" the") == "␣the"
    assert spelled("\n        x") == "↵␣\u00d78x"
    assert spelled("\u202e") == "\\u202e"
    assert spelled("") == "∅"


def test_numbers_for_people() -> None:
    assert [number(value) for value in (None, 3, 0.0, -0.17, 12345.6, 2.5e-7, math.nan)] == [
        "—",
        "3",
        "0",
        "-0.1700",
        "12,346",
        "2.500e-07",
        "NaN",
    ]
    assert [percent(share) for share in (None, 0.0, 1.0, 0.5, 0.999999)] == [
        "—",
        "0 %",
        "100 %",
        "50 %",
        "99.9999 %",
    ]


def channels(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def luminance(rgb: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(theme: int) -> None:
    blocks = re.findall(r"\.actstore \{([^{}]*--paper:[^{}]*)\}", style_sheet())
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[theme]))
    ink, paper = channels(colours["ink"]), channels(colours["paper"])
    for name in ("up", "down", "ramp"):
        for step in range(1, STEPS + 1):
            share = step / STEPS
            mixed = [
                share * a + (1 - share) * b
                for a, b in zip(channels(colours[name]), paper, strict=True)
            ]
            assert contrast(ink, mixed) >= 4.5, (name, step)
    for name in ("ink", "muted", "link", "warn", "bad"):
        assert contrast(channels(colours[name]), paper) >= 4.5, name
        assert contrast(channels(colours[name]), channels(colours["shade"])) >= 4.5, name
    assert contrast(channels(colours["warn"]), channels(colours["warn-shade"])) >= 4.5


def test_style_sheet_has_a_class_for_every_step() -> None:
    names = {colour_class(step) for step in range(-STEPS, STEPS + 1)} - {"level"}
    assert names <= set(re.findall(r"& \.((?:up|down)-\d)", style_sheet()))
    assert "url(" not in style_sheet()
    assert "@import" not in style_sheet()


# Store, neurons


def test_overview_has_the_layers_statistics(store: Store) -> None:
    view = Overview.of(store)
    assert view.heat is not None
    assert view.heat.layers == tuple(range(LAYERS))
    assert view.heat_locations == ("mlp_post_act",)
    neurons = values()["mlp_post_act"][:, ordinary()].astype(np.float64)
    names = [name for name, _ in view.heat.columns]
    for layer, cells in enumerate(view.heat.rows):
        found = dict(zip(names, (cell.value for cell in cells), strict=True))
        assert found["max"] == neurons[layer].max()
        assert found["mean"] == pytest.approx(neurons[layer].mean(), abs=1e-6)
        assert found["positive"] == pytest.approx((neurons[layer] > 0).mean())
        assert found["dead"] == (1 / NEURONS if layer == DEAD[0] else 0)
    assert Overview.of(store, "nonsense").heat == view.heat


def test_overview_of_an_empty_store(tmp_path: Path) -> None:
    with Store(build(tmp_path / "store", commit=[])) as empty:
        view = Overview.of(empty)
    assert view.heat is None
    assert view.covered == 0


@pytest.mark.parametrize("sort", SORTS)
def test_neuron_table_sorts_by_every_column(store: Store, sort: str) -> None:
    for descending in (True, False):
        query = NeuronQuery(sort=sort, descending=descending, size=500)
        rows = NeuronTable.of(store, query).rows
        assert len(rows) == LAYERS * NEURONS
        keys = [(row.layer, row.neuron) if sort == "neuron" else getattr(row, sort) for row in rows]
        assert keys == sorted(keys, reverse=descending)


def test_neuron_table_pages_cover_all_neurons_once(store: Store) -> None:
    seen = []
    for page in range(1, 7):
        view = NeuronTable.of(store, NeuronQuery(page=page, size=25))
        seen += [(row.layer, row.neuron) for row in view.rows]
        assert view.pages == 5
    assert sorted(seen) == [(layer, n) for layer in range(LAYERS) for n in range(NEURONS)]


def test_neuron_table_filters(store: Store) -> None:
    dead = NeuronTable.of(store, NeuronQuery(alive="dead"))
    assert [(row.layer, row.neuron) for row in dead.rows] == [DEAD]
    one = NeuronTable.of(store, NeuronQuery(layer=1, where="neuron < 3 -- a comment"))
    assert {(row.layer, row.neuron) for row in one.rows} == {(1, 0), (1, 1), (1, 2)}
    wanted = "' OR 1=1 --"
    assert NeuronTable.of(store, NeuronQuery(promotes=wanted)).total == 0
    letter = NeuronTable.of(store, NeuronQuery(promotes="a", size=500))
    assert letter.total > 0
    assert all(any("a" in text for text in row.promoted) for row in letter.rows)


def test_neuron_table_refuses_what_is_not_there(store: Store) -> None:
    with pytest.raises(InvalidInput, match="layer is 9"):
        NeuronTable.of(store, NeuronQuery(layer=9))
    with pytest.raises(InvalidInput, match="sort is"):
        NeuronQuery(sort="1; DROP TABLE neurons")
    with pytest.raises(InvalidInput, match="pages count from 1"):
        NeuronQuery(page=0)
    for hostile in ("1=1) OR (1=1", "true; SELECT 1", "true ORDER BY 1", ""):
        query = NeuronQuery(where=hostile or "layer =")
        with pytest.raises(InvalidInput) as caught:
            NeuronTable.of(store, query)
        assert caught.value.kind is ErrorKind.INVALID_SQL


def test_query_parameters_say_what_differs() -> None:
    query = NeuronQuery(layer=3, descending=False)
    assert query.parameters(page=2) == {"layer": "3", "descending": "false", "page": "2"}
    assert NeuronQuery().parameters() == {}


@pytest.mark.parametrize("kind", EXAMPLE_KINDS)
def test_neuron_card_agrees_with_the_values(store: Store, kind: str) -> None:
    card = NeuronCard.of(store, 1, 3, kind=kind, k=5)  # type: ignore[arg-type]
    column = values()["mlp_post_act"][1, :, 3]
    mine = column[ordinary()]
    assert card.statistics.max == mine.max()
    assert card.statistics.min == mine.min()
    assert card.statistics.count == len(mine)
    assert card.distribution is not None
    assert card.distribution.total == len(mine)
    assert len(card.strips) == 5
    rows = stored_rows(store.path)
    for strip in card.strips:
        assert strip.focus is not None
        assert strip.focus.value == strip.value
        for token in strip.tokens:
            place = int(np.flatnonzero(rows == token.row)[0])
            assert token.value == column[place]
            assert token.step == card.scale.step(token.value)
    if kind == "top":
        assert card.strips[0].value == mine.max()
    if kind == "bottom":
        assert card.strips[0].value == mine.min()
    shares = [strip.quantile for strip in card.strips]
    assert all(share is None for share in shares) == (kind != "quantile")


def test_neuron_card_of_a_dead_neuron(store: Store) -> None:
    card = NeuronCard.of(store, *DEAD)
    assert card.statistics.dead
    assert card.statistics.firing_rate == 0
    assert card.strips


def test_neuron_card_without_activations(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise Unavailable("mlp_post_act cannot be had.", kind=ErrorKind.NOT_STORED)

    monkeypatch.setattr(Store, "examples", unavailable)
    card = NeuronCard.of(store, 0, 1)
    assert card.missing == "mlp_post_act cannot be had."
    assert card.distribution is None
    assert card.promoted
    assert not card.strips


def test_neuron_card_of_reconstructed_activations(
    bare: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = NeuronCard.of(bare, 0, 1, k=3)
    assert card.statistics.max is None
    assert len(card.strips) == 3
    assert card.scale.limit == max(
        abs(token.value or 0) for strip in card.strips for token in strip.tokens
    )
    monkeypatch.setattr("actstore.query.views.neuron_card._RECONSTRUCTED_ROWS", 100)
    large = NeuronCard.of(bare, 0, 1)
    assert "actstore index" in large.missing
    assert not large.strips


def test_neighbours_go_across_layers(store: Store) -> None:
    assert NeuronCard.of(store, 0, 0).previous is None
    assert NeuronCard.of(store, 0, NEURONS - 1).next == (1, 0)
    assert NeuronCard.of(store, 1, 0).previous == (0, NEURONS - 1)
    assert NeuronCard.of(store, LAYERS - 1, NEURONS - 1).next is None


def test_similar_entries_by_brute_force(store: Store) -> None:
    rows = np.concatenate(
        [
            store.sources.weight(WeightLocationType.MLP_TO_RESIDUAL, layer).numpy()
            for layer in range(LAYERS)
        ]
    )
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows[NEURONS + 3]
    cosines[NEURONS + 3] = -np.inf
    best = np.argsort(-cosines)[:4]
    found = similar_entries(store, 1, 3, k=4)
    assert [one.layer * NEURONS + one.neuron for one in found] == best.tolist()
    assert [one.cosine for one in found] == pytest.approx(cosines[best].tolist())


def test_derived_scalars_at_the_examples(store: Store) -> None:
    table = derived_at_examples(store, "mlp_post_act", Dimension.NEURON, 0, 2, k=3)
    by_name = {row.name: row for row in table.rows}
    assert by_name["mlp_post_act"].values == tuple(token.value for token in table.tokens)
    assert by_name["mlp_write_norm"].values
    assert by_name["mlp_act_times_grad"].missing
    assert not by_name["mlp_act_times_grad"].values


# Distribution and charts


@given(st.lists(st.floats(width=32), max_size=60))
def test_distribution_counts_every_value_once(given_values: list[float]) -> None:
    found = Distribution.of_values(np.array(given_values, np.float32))
    assert found.total + found.not_finite == len(given_values)
    assert list(found.edges) == sorted(found.edges)


def test_distribution_of_a_kept_histogram() -> None:
    values_ = np.random.default_rng(3).normal(size=1000).astype(np.float32)
    kept = Distribution.of_histogram(Histogram.of_values(values_, nan=2))
    assert kept.is_estimated
    assert kept.not_finite == 2
    assert kept.total == pytest.approx(1000, abs=BINS)
    assert (kept.edges[0], kept.edges[-1]) == (values_.min(), values_.max())
    assert Distribution.of_histogram(Histogram.of_values(values_[:0])).total == 0


def test_no_bar_mixes_signs() -> None:
    found = Distribution.of_values(np.array([-0.1, 5.0, 2.0], np.float32))
    assert 0.0 in found.edges


def test_histogram_is_drawn_without_scripts_and_styles() -> None:
    drawing = Distribution.of_values(np.arange(-3, 9, dtype=np.float32)).drawing("x")
    assert drawing.svg.startswith("<svg")
    assert not re.search(r"<script|<style|style=|https?://(?!www\.w3\.org)", drawing.svg)
    assert "rows" in drawing.columns
    assert sum(int(row[2].replace(",", "")) for row in drawing.rows) == 12


def test_histogram_is_drawn_as_the_chart_that_altair_checks() -> None:
    for values_ in (np.arange(-3, 9), np.zeros(70), np.linspace(0.1, 9, 5000)):
        found = Distribution.of_values(values_.astype(np.float32))
        assert draw_distribution(found, "x y") == draw(distribution_chart(found, "x y"))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"name": ["a", "b"], "n": [1, 2]}, ChartSuggestion("bar", "name", "n")),
        ({"x": [1, 2, 3], "y": [0.5, 0.1, 0.2]}, ChartSuggestion("line", "x", "y")),
        ({"x": [3, 1, 2], "y": [0.5, 0.1, 0.2]}, ChartSuggestion("scatter", "x", "y")),
        ({"x": list(range(20))}, ChartSuggestion("histogram", "x", None)),
        ({"x": [1]}, None),
        ({"name": ["a", "b"]}, None),
    ],
)
def test_chart_fits_the_columns(
    columns: dict[str, list[object]], expected: ChartSuggestion | None
) -> None:
    table = pa.table(columns)
    found = suggest(table)
    assert found == expected
    if found is not None:
        assert draw(suggested_chart(table, found)).startswith("<svg")


def test_chart_of_hostile_labels_is_escaped() -> None:
    table = pa.table({"name": ["<script>alert(1)</script>", "b"], "n": [1.0, math.nan]})
    svg = draw(suggested_chart(table, ChartSuggestion("bar", "name", "n")))
    assert "<script" not in svg


# Sequences, heads, latents, scalars


def test_sequence_grid_has_the_strongest_neuron(store: Store) -> None:
    view = SequenceView.of(store, 2)
    assert view.scalar == "mlp_post_act"
    assert view.grid is not None
    first = view.first_row
    places = [int(np.flatnonzero(stored_rows(store.path) == first + at)[0]) for at in range(3)]
    for at, place in enumerate(places):
        for layer in range(LAYERS):
            row = values()["mlp_post_act"][layer, place].astype(np.float32)
            cell = view.grid.rows[at][layer]
            assert cell.unit == np.abs(row).argmax()
            assert cell.value == row[cell.unit]
    assert view.strip.tokens[1].value == view.grid.rows[1][LAYERS - 1].value


def test_sequence_grid_of_one_unit_and_of_none(store: Store) -> None:
    view = SequenceView.of(store, 0, scalar="mlp_write_norm", layer=0, unit=5)
    assert view.grid is not None
    assert {cell.unit for row in view.grid.rows for cell in row} == {5}
    norms = SequenceView.of(store, 0, scalar="resid_post_mlp_norm")
    assert norms.grid is not None
    assert norms.grid.units == 1
    assert norms.unit_path == ""
    with pytest.raises(InvalidInput, match="unit is 999"):
        SequenceView.of(store, 0, unit=999)
    with pytest.raises(InvalidInput, match="layer is 7"):
        SequenceView.of(store, 0, layer=7)


def test_every_scalar_of_the_list_can_be_shown(store: Store) -> None:
    names = scalars_of_tokens(store)
    assert {"mlp_post_act", "mlp_write_norm", "resid_post_attn_norm"} <= set(names)
    for name in names:
        assert SequenceView.of(store, 1, scalar=name).grid is not None, name


def test_sequence_whose_scalar_cannot_be_had_says_so(store: Store) -> None:
    view = SequenceView.of(store, 0, scalar="mlp_act_times_grad")
    assert view.grid is None
    assert "mlp_post_act/backward" in view.missing
    assert len(view.strip.tokens) == view.length


def test_sequences_are_listed_with_their_beginnings(store: Store) -> None:
    view = SequenceList.of(store)
    assert view.total == len(LENGTHS)
    assert [row.length for row in view.rows] == [
        store.row_map.sequence(number).length for number in range(len(LENGTHS))
    ]
    assert [row.source for row in SequenceList.of(store, find="BOLD").rows] == ["<b>bold</b>&.txt"]


def test_attention_is_a_distribution_over_earlier_tokens(store: Store) -> None:
    pattern = attention_pattern(store, 1, 1, 3)
    length = store.row_map.sequence(3).length
    assert pattern.shape == (length, length)
    assert np.isnan(pattern[np.triu_indices(length, 1)]).all()
    assert np.nansum(pattern, axis=1) == pytest.approx(np.ones(length), abs=1e-4)
    view = HeadView.of(store, 1, 1, 3, 4)
    assert view.attends is not None
    assert view.attended_by is not None
    assert [token.value for token in view.attends.tokens[:5]] == pattern[4, :5].tolist()
    assert all(token.value is None for token in view.attends.tokens[5:])
    assert [token.value for token in view.attended_by.tokens[4:]] == pattern[4:, 4].tolist()
    query, key, share = view.strongest[0]
    assert share == pattern[query, key]
    assert key not in (0, query)


def test_pattern_as_png_has_the_probabilities_as_opacity() -> None:
    pattern = np.array([[1.0, np.nan], [0.25, 0.75]], np.float32)
    image = pattern_image(pattern, (1, 2, 3))
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (2, 2)
    start = image.index(b"IDAT") + 4
    size = struct.unpack(">I", image[start - 8 : start - 4])[0]
    lines = zlib.decompress(image[start : start + size])
    assert lines == bytes([0, 1, 2, 3, 255, 1, 2, 3, 0, 0, 1, 2, 3, 128, 1, 2, 3, 221])


def test_heads_and_their_neighbours(store: Store) -> None:
    table = HeadTable.of(store)
    assert len(table.rows) == LAYERS
    heads = len(table.rows[0])
    view = HeadView.of(store, 0, heads - 1, None, None)
    assert view.next == (1, 0)
    assert view.query == view.length - 1
    with pytest.raises(InvalidInput, match="head is"):
        HeadView.of(store, 0, heads, None, None)
    with pytest.raises(InvalidInput, match="query is"):
        HeadView.of(store, 0, 0, 0, 4096)


def test_head_without_its_inputs_says_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise Unavailable("attn_qk_probs cannot be had.", kind=ErrorKind.NOT_STORED)

    monkeypatch.setattr(Store, "raw", unavailable)
    view = HeadView.of(store, 1, 0, None, None)
    assert view.missing == "attn_qk_probs cannot be had."
    assert view.attends is None


@pytest.mark.parametrize("kind", ["top", "random", "quantile"])
def test_latent_card_agrees_with_the_latents(store: Store, kind: str) -> None:
    dense = store.latents(SET).sparse().to_dense().numpy()
    rows = store.row_map.all()
    mine = dense[rows.position > 0, 2]
    card = LatentCard.of(store, SET, 1, 2, kind=kind, k=4)  # type: ignore[arg-type]
    assert card.active == np.count_nonzero(mine)
    assert card.facts["max"] == mine.max()
    by_row = dict(zip(rows.token.tolist(), dense[:, 2].tolist(), strict=True))
    for strip in card.strips:
        assert strip.value
        assert [token.value for token in strip.tokens] == [
            by_row[token.row] for token in strip.tokens if token.row is not None
        ]
    if kind == "top":
        assert card.strips[0].value == mine.max()


def test_dead_latent_has_no_examples(store: Store) -> None:
    card = LatentCard.of(store, SET, 1, DEAD_LATENT)
    assert card.facts["dead"]
    assert card.active == 0
    assert card.distribution is None
    assert not card.strips


def test_latent_table(store: Store) -> None:
    table = LatentTable.of(store, LatentQuery(SET, sort="firing_rate"))
    assert table.total == LATENTS
    rates = [row.firing_rate or 0 for row in table.rows]
    assert rates == sorted(rates, reverse=True)
    dead = LatentTable.of(store, LatentQuery(SET, alive="dead"))
    assert [row.latent for row in dead.rows] == [DEAD_LATENT]
    with pytest.raises(Unavailable):
        LatentTable.of(store, LatentQuery("none"))
    with pytest.raises(InvalidInput, match="latent is 99"):
        LatentCard.of(store, SET, 1, 99)


def test_scalars_say_whether_they_can_be_had(store: Store, bare: Store) -> None:
    full = {one.name: one for _, members in ScalarList.of(store).families for one in members}
    assert full["mlp_write_norm"].available
    assert not full["mlp_act_times_grad"].available
    assert full["autoencoder_latent"].available
    latents = [one.name for _, all_ in ScalarList.of(bare).families for one in all_]
    assert latents == list(full)
    assert ScalarList.of(store).available > ScalarList.of(bare).available


# SQL


def test_sql_cells_lead_to_what_they_name() -> None:
    table = pa.table(
        {"layer": [1], "neuron": [3], "sequence": [9], "text": [" x"], "none": pa.nulls(1)}
    )
    row = SqlResult.of(table).rows[0]
    assert [cell.path for cell in row] == ["", "/neurons/1/3", "/sequences/9", "", ""]
    assert row[3].shown == "␣x"
    assert row[4].is_null


def test_sql_result_with_equal_names_and_with_nothing() -> None:
    twice = pa.Table.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"])
    assert SqlResult.of(twice).suggestion is None
    assert len(SqlResult.of(twice).rows) == 2
    assert SqlResult.of(pa.table({"a": pa.array([], pa.int64())})).rows == ()


# Notebooks


def test_notebook_fragments_stand_alone(store: Store) -> None:
    card = NeuronCard.of(store, 0, 1, k=3)
    fragments = [
        notebooks.store_html(store),
        notebooks.topk_html(store.topk("mlp_post_act", k=3)),
        notebooks.examples_html(store.examples("mlp_post_act", (0, 1), k=3)),
        notebooks.neuron_html(card),
        notebooks.strips_html(card.strips[0], "one"),
    ]
    for html in fragments:
        assert html is not None
        assert "<style>" in html
        assert not re.search(r"<script|href=|src=", html)
        assert '<div class="actstore">' in html


def test_notebook_without_templates_falls_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    real = builtins.__import__

    def missing(name: str, *args: object, **options: object) -> object:
        if name == "actstore.query.service.pages.templating":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return real(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    assert notebooks.store_html(store) is None


def test_view_refuses_other_addresses(store: Store) -> None:
    for path in ("https://elsewhere.example/", "//elsewhere.example/", "neurons"):
        with pytest.raises(InvalidInput, match="path is"):
            notebooks.view(store, path)


def test_strip_escapes_tokens() -> None:
    strip = strip_of(["<script>", '"&'], [1.0, math.nan], Scale(1.0))
    html = notebooks.strips_html(strip)
    assert html is not None
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert strip.tokens[1].step is None


def test_every_template_compiles() -> None:
    made = environment()
    for name in made.list_templates():
        made.get_template(name)
