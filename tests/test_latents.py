"""Latents of autoencoders that a store keeps, against dense values computed here."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import append_plan, build_store, commit_segments
from tiny_ingest import fresh_copy, ingest_corpus
from typer.testing import CliRunner

from actstore.cli import app
from actstore.query import latent_ingest, latent_search
from actstore.query.derived.config import DstConfig
from actstore.query.latent_ingest import add_autoencoders, complete_latents
from actstore.query.results import TopK
from actstore.query.session import Store
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import (
    ActstoreError,
    ErrorKind,
    IngestStopped,
    InvalidInput,
    StoreConflict,
    StoreDamaged,
    Unavailable,
)
from actstore.store.latent_sections import LIST_LENGTH, SegmentLatents, latent_sections
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoder_functions import Activation, Identity, ReLU
from actstore.store.model.autoencoder_functions import TopK as Best
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.snapshot import compact
from actstore.store.verification import verify_store
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

L = ActivationLocationType
Floats = npt.NDArray[np.float32]
Triples = list[tuple[float, int, int, int]]

LATENT = "mlp_autoencoder_latent"


def made(
    location: ActivationLocationType,
    layer: int,
    width: int,
    latents: int,
    activation: Activation,
    seed: int = 0,
) -> Autoencoder:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Autoencoder(
        name=f"{location}-{layer}",
        location=location,
        layer=layer,
        encoder=random(width, latents),
        decoder=random(latents, width),
        latent_bias=random(latents) - 2,
        input_bias=random(width) * 0.1,
        output_bias=random(width),
        activation=activation,
    )


def neurons() -> list[Autoencoder]:
    """Two layers of different widths; in the second every latent may be negative."""
    return [
        made(L.MLP_POST_ACT, 0, 24, 80, ReLU(), 1),
        made(L.MLP_POST_ACT, 1, 24, 33, Best(5, rectified=False), 2),
    ]


def heads() -> list[Autoencoder]:
    return [made(L.RESID_DELTA_ATTN, 1, 16, 50, Best(4), 3)]


def outputs() -> list[Autoencoder]:
    return [made(L.RESID_DELTA_MLP, layer, 16, 20, ReLU(), 4 + layer) for layer in (0, 1)]


def in_use(autoencoders: list[Autoencoder]) -> DstConfig:
    return DstConfig(autoencoders=Autoencoders(autoencoders))


class World:
    """The tests' corpus with the latents of three kinds of autoencoders."""

    def __init__(self, path: Path) -> None:
        fresh_copy(path)
        bare = Store(path)
        self.path = path
        with bare:
            self.dense = bare.derive(LATENT, config=in_use(neurons()))
            self.special = bare.row_map.special(self.dense.rows)
        self.store = bare.add_saes([*neurons(), *heads()])

    @property
    def values(self) -> Floats:
        """Canonical values ``(layer, row, latent)``; NaN where the second layer has no latent."""
        found: Floats = self.dense.numpy()
        return found

    def expected(
        self,
        k: int,
        *,
        largest: bool = True,
        layers: tuple[int, ...] = (0, 1),
        latents: list[int] | None = None,
        special: bool = False,
        rows: npt.NDArray[np.bool_] | None = None,
        magnitude: bool = False,
        distinct: bool = False,
    ) -> Triples:
        """The answer by sorting everything."""
        allowed = np.ones(len(self.special), bool) if rows is None else rows
        allowed = allowed if special else allowed & ~self.special
        kept = self.values[list(layers)][:, allowed]
        chosen = np.arange(kept.shape[2]) if latents is None else np.array(latents, np.int64)
        layer, row, one = np.nonzero(~np.isnan(kept[:, :, chosen]))
        places = np.flatnonzero(allowed)[row]
        value, layer, latent = kept[layer, row, chosen[one]], np.array(layers)[layer], chosen[one]
        token = self.dense.rows.token[places]
        key = np.abs(value) if magnitude else value
        order = np.lexsort((latent, token, layer, (-key if largest else key) + np.float32(0)))
        if distinct:
            groups = self.dense.rows.sequence[places][order]
            order = order[np.sort(np.unique(groups, return_index=True)[1])]
        order = order[:k]
        columns = (part[order].tolist() for part in (value, layer, token, latent))
        return list(zip(*columns, strict=True))


def entries(found: TopK) -> Triples:
    columns = (found.column(name) for name in ("value", "layer", "token", "latent"))
    return list(zip(*columns, strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("latents") / "store")


def raised(call: Callable[[], object]) -> ActstoreError:
    with pytest.raises(ActstoreError) as caught:
        call()
    return caught.value


# Reads


@pytest.mark.parametrize("autoencoders", [neurons(), heads(), outputs()])
def test_kept_latents_are_the_canonical_values(
    autoencoders: list[Autoencoder], tmp_path: Path
) -> None:
    bare = Store(fresh_copy(tmp_path / "store"))
    name = autoencoders[0].node_type.value
    computed = bare.derive(name, config=in_use(autoencoders))
    kept = bare.add_saes(autoencoders)
    read = kept.derive(name)
    assert read.source.startswith("stored float32 (latents of sae-")
    assert computed.source.startswith("derived from")
    assert np.array_equal(read.numpy(), computed.numpy(), equal_nan=True)
    assert read.layers == computed.layers
    # Whoever asks for more than is kept gets it computed.
    wide = kept.derive(name, sequences=[2], dtype="float64")
    assert not torch.equal(wide.values.nan_to_num(), wide.values.float().double().nan_to_num())
    # Other autoencoders have other latents.
    others = [made(one.location, 1, one.channel_in, 7, ReLU(), 9) for one in autoencoders[:1]]
    assert kept.derive(name, sequences=[2], config=in_use(others)).shape[-1] == 7


def test_kept_values_are_read_and_not_computed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("an autoencoder ran")

    monkeypatch.setattr(Autoencoder, "encode", refuse)
    world.store.derive(LATENT, tokens=[5, 3, 700])
    world.store.topk(LATENT, k=3, latents=[7])
    world.store.examples(LATENT, (0, 7), k=2, kind="quantile")
    with pytest.raises(AssertionError, match="ran"):
        world.store.derive(LATENT, tokens=[5], dtype="float64")


@settings(max_examples=30)
@given(data=st.data())
def test_any_rows_and_latents_are_read_alike(world: World, data: st.DataObject) -> None:
    tokens = world.dense.rows.token.tolist()
    rows = data.draw(
        st.none()
        | st.lists(st.sampled_from(tokens), max_size=40)
        | st.integers(0, len(tokens) - 30).map(lambda start: tokens[start : start + 30])
    )
    layer = data.draw(st.sampled_from([0, 1]))
    width = neurons()[layer].n_latents
    latents = data.draw(st.none() | st.lists(st.integers(0, width - 1), max_size=4))
    found = world.store.latents("mlp_post_act", layer=layer, tokens=rows, latents=latents)
    wanted = tokens if rows is None else rows
    place = {token: number for number, token in enumerate(tokens)}
    expected = world.values[layer, [place[token] for token in wanted], :width].copy()
    if latents is not None:
        expected[:, np.setdiff1d(np.arange(width), latents)] = 0
    assert np.array_equal(found.sparse().to_dense().numpy(), expected)
    assert np.all(found.value != 0)
    order = list(zip(found.index.tolist(), found.latent.tolist(), strict=True))
    assert order == sorted(order)
    assert found.table.column("token").to_pylist() == [wanted[row] for row in found.index]
    assert found.table.column("value").to_pylist() == found.value.tolist()


def test_sets_are_found_by_name_and_by_location(world: World) -> None:
    by_location = world.store.latents("resid_delta_attn", sequences=[3])
    assert by_location.name.startswith("sae-")
    by_name = world.store.latents(by_location.name, sequences=[3])
    assert by_name.table == by_location.table
    assert repr(by_name).startswith(f"Latents({by_name.name}, layer 1: ")
    assert raised(lambda: world.store.latents()).kind is ErrorKind.INVALID_ARGUMENT
    assert raised(lambda: world.store.latents("mlp_post_act")).kind is ErrorKind.UNKNOWN_LAYER
    assert isinstance(raised(lambda: world.store.latents("resid_post_mlp")), Unavailable)
    for unknown in (50, -1, "a"):
        found = raised(
            lambda one=unknown: world.store.latents("resid_delta_attn", latents=one)  # type: ignore[misc]
        )
        assert found.kind is ErrorKind.UNKNOWN_UNIT
    small = Store(world.path, max_result_bytes=1000)
    assert (
        raised(lambda: small.latents("resid_delta_attn", sequences=[0, 1, 2])).kind
        is ErrorKind.TOO_LARGE
    )


def test_store_keeps_the_autoencoders(world: World, tmp_path: Path) -> None:
    moved = Store(shutil.copytree(world.path, tmp_path / "elsewhere"))
    kept = moved.autoencoders("mlp_post_act")
    assert [one.fingerprint for one in kept] == [one.fingerprint for one in neurons()]
    # What is not kept is computed with them.
    norm = moved.derive("mlp_autoencoder_write_norm", sequences=[4])
    expected = world.store.derive(
        "mlp_autoencoder_write_norm", sequences=[4], config=in_use(neurons())
    )
    assert np.array_equal(norm.numpy(), expected.numpy(), equal_nan=True)
    assert entries(moved.topk(LATENT, k=9)) == world.expected(9)
    assert moved.verify().ok


def test_two_sets_of_one_kind_are_told_apart(tmp_path: Path) -> None:
    bare = Store(fresh_copy(tmp_path / "store"))
    one = bare.add_saes(neurons()[:1], name="a")
    both = one.add_saes(neurons()[1:], name="b")
    # Other layers of one location go together.
    assert both.derive(LATENT).layers == (0, 1)
    other = made(L.MLP_POST_ACT, 1, 24, 12, ReLU(), 8)
    more = both.add_saes([other], name="c")
    error = raised(lambda: more.derive(LATENT))
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert "'b'" in str(error)
    assert "'c'" in str(error)
    chosen = more.derive(LATENT, config=DstConfig(autoencoders=more.autoencoders("c")))
    assert chosen.layers == (1,)
    assert chosen.source == "stored float32 (latents of c)"
    # A kind that is not ambiguous is not concerned.
    assert more.add_saes(heads()).derive("attention_autoencoder_latent").layers == (1,)


# Ranking


@pytest.mark.parametrize("hurried", [False, True])
def test_topk_is_what_sorting_everything_gives(
    world: World, hurried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hurried:
        monkeypatch.setattr(latent_search, "_LEAST_CELLS", 1)
        monkeypatch.setattr(latent_search, "_ENTRIES_OF_A_CELL", 10**9)
        monkeypatch.setattr(latent_search, "_FEW_LATENTS", 0)
    plans = set()
    choices: Iterator[Any] = product(
        (1, 20, 700), (True, False), ((0,), (1,), (0, 1)), (None, [7], [3, 30, 32])
    )
    for k, largest, layers, latents in choices:
        special = (k + len(layers)) % 2 == 0
        found = world.store.topk(
            LATENT, k=k, largest=largest, layers=layers, latents=latents, special=special
        )
        expected = world.expected(
            k, largest=largest, layers=layers, latents=latents, special=special
        )
        assert entries(found) == expected, (k, largest, layers, latents)
        assert found.certificate.source.startswith("stored float32 (latents of")
        plans.add(found.certificate.plan)
    assert plans == ({"column", "scan"} if hurried else {"column"})


def test_zeros_are_values_and_come_in_the_order_of_rows(world: World) -> None:
    rare = int(np.argmin((world.values[0] != 0).sum(0)))
    fired = int((world.values[0][~world.special, rare] != 0).sum())
    found = world.store.topk(LATENT, k=fired + 50, layers=0, latents=rare)
    assert entries(found) == world.expected(fired + 50, layers=(0,), latents=[rare])
    assert found.column("value")[fired:] == [0.0] * 50
    least = world.store.topk(LATENT, k=30, layers=0, largest=False)
    assert set(least.column("value")) == {0.0}
    assert entries(least) == world.expected(30, layers=(0,), largest=False)


def test_predicates_distinct_groups_and_magnitudes(world: World) -> None:
    position = world.dense.rows.position
    few = world.store.topk(LATENT, k=40, where="position = 3")
    assert entries(few) == world.expected(40, rows=position == 3)
    assert few.certificate.plan == "rows"
    one = world.store.topk(LATENT, k=200, where="position = 3", latents=[5], largest=False)
    assert entries(one) == world.expected(200, rows=position == 3, latents=[5], largest=False)
    magnitude = world.store.topk(LATENT, k=60, by="magnitude")
    assert entries(magnitude) == world.expected(60, magnitude=True)
    distinct = world.store.topk(LATENT, k=95, latents=[7], distinct="sequence")
    assert entries(distinct) == world.expected(95, latents=[7], distinct=True)
    for latents in ([3, 7], None):
        each = world.store.topk(LATENT, k=3, per="latent", layers=1, latents=latents)
        chosen = range(33) if latents is None else latents
        expected = [
            entry for one in chosen for entry in world.expected(3, layers=(1,), latents=[one])
        ]
        assert entries(each) == expected
    pairs = world.store.topk(LATENT, k=15, units=[(0, 3), (1, 4)])
    assert {(layer, latent) for _, layer, _, latent in entries(pairs)} <= {(0, 3), (1, 4)}


def test_predicate_over_many_rows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_search, "_FEW_ROWS", 0)
    position = world.dense.rows.position
    for where, rows in (("position % 2 = 1", position % 2 == 1), ("position = 5", position == 5)):
        found = world.store.topk(LATENT, k=100, where=where)
        assert found.certificate.plan == "column"
        assert entries(found) == world.expected(100, rows=rows)


def test_units_by_sql_over_the_sets_in_use(world: World) -> None:
    table = world.store.sql(
        "SELECT layer, latent FROM latents WHERE location = 'mlp_post_act' AND firing_rate < 0.02"
    ).fetchall()
    assert table
    found = world.store.topk(LATENT, k=40, units="firing_rate < 0.02")
    both = [
        entry
        for layer in (0, 1)
        for entry in world.expected(
            40, layers=(layer,), latents=[latent for of, latent in table if of == layer]
        )
    ]
    both.sort(key=lambda entry: (-entry[0] + 0.0, *entry[1:]))
    assert entries(found) == both[:40]


def test_only_the_layers_that_have_one(world: World) -> None:
    found = world.store.topk("attention_autoencoder_latent", k=4)
    assert set(found.column("layer")) == {1}
    error = raised(lambda: world.store.topk("attention_autoencoder_latent", layers=0))
    assert error.kind is ErrorKind.UNKNOWN_LAYER


def test_scalars_of_kept_autoencoders_are_ranked_by_a_scan(world: World) -> None:
    found = world.store.topk("mlp_autoencoder_write_norm", k=5, layers=0)
    dense = world.store.derive("mlp_autoencoder_write_norm", layers=0).numpy()[0]
    best = np.sort(dense[~world.special].reshape(-1))[::-1][:5]
    assert found.column("value") == best.tolist()
    assert found.certificate.plan == "scan"


@pytest.mark.parametrize("kind", ["top", "bottom", "random", "quantile"])
def test_examples(world: World, kind: str) -> None:
    found = world.store.examples(LATENT, (0, 7), k=4, kind=kind)
    place = {token: number for number, token in enumerate(world.dense.rows.token.tolist())}
    for one in found:
        rows = [place[one.first_token] + number for number in range(len(one.values))]
        assert list(one.values) == world.values[0, rows, 7].tolist()
    if kind == "top":
        best = world.expected(4, layers=(0,), latents=[7], distinct=True)
        assert [one.token for one in found] == [token for _, _, token, _ in best]
        assert found.certificate.plan == "column"


# Statistics


def test_table_of_latents_is_what_the_dense_values_say(world: World) -> None:
    rows = world.store.sql(
        "SELECT * EXCLUDE (\"set\") FROM latents WHERE location = 'mlp_post_act' "
        "ORDER BY layer, latent"
    ).to_arrow_table()
    ordinary = world.values[:, ~world.special].astype(np.float64)
    assert rows.num_rows == 80 + 33
    for row in rows.to_pylist():
        values = ordinary[row["layer"], :, row["latent"]]
        special = world.values[row["layer"], world.special, row["latent"]]
        mean, deviation = values.mean(), values - values.mean()
        variance = (deviation**2).mean()
        assert row["count"] == len(values)
        assert row["active"] == (values != 0).sum()
        assert row["firing_rate"] == (values != 0).mean()
        assert row["dead"] is not (values != 0).any()
        assert (row["max"], row["min"]) == (values.max(), values.min())
        assert row["mean"] == pytest.approx(mean, rel=1e-12, abs=1e-300)
        assert row["variance"] == pytest.approx(variance, rel=1e-10, abs=1e-300)
        if variance:
            third, fourth = ((deviation**power).mean() for power in (3, 4))
            assert row["skewness"] == pytest.approx(third / variance**1.5, rel=1e-8)
            assert row["kurtosis"] == pytest.approx(fourth / variance**2, rel=1e-8)
        else:
            assert row["skewness"] is None
        fired = special[special != 0]
        assert row["special_max"] == (fired.max() if len(fired) else None)
        autoencoder = neurons()[row["layer"]]
        decoder = autoencoder.decoder.double()[row["latent"]]
        assert row["decoder_norm"] == pytest.approx(float(decoder.norm()), rel=1e-12)
    write = world.store.derive("mlp_autoencoder_write_norm", dtype="float64", layers=0).numpy()
    latent = world.store.derive(LATENT, dtype="float64", layers=0).numpy()
    for row in rows.to_pylist()[:80]:
        some = np.argmax(latent[0, :, row["latent"]])
        ratio = write[0, some, row["latent"]] / max(latent[0, some, row["latent"]], 1e-300)
        assert row["write_norm"] == pytest.approx(ratio, rel=1e-9) or row["dead"]


def test_write_norms_are_of_what_reaches_the_residual_stream(tmp_path: Path) -> None:
    reading_heads = made(L.ATTN_WEIGHTED_SUM_OF_VALUES, 0, 16, 10, ReLU(), 11)
    transcoder = replace(
        made(L.RESID_POST_ATTN, 1, 16, 9, ReLU(), 12), writes_to=(L.RESID_DELTA_MLP, 1)
    )
    elsewhere = replace(
        transcoder,
        writes_to=(L.MLP_PRE_ACT, 1),
        decoder=torch.ones(9, 24),
        output_bias=torch.zeros(24),
    )
    path = fresh_copy(tmp_path / "store")
    with Store(path) as bare:
        computed = bare.derive("autoencoder_latent", config=in_use([transcoder]))
        weight = bare.sources.weight(WeightLocationType.ATTN_TO_RESIDUAL, 0)
    for name, one in (("z", reading_heads), ("into", transcoder), ("pre", elsewhere)):
        add_autoencoders(path, [one], name=name)
    with Store(path) as kept:
        norms = {
            name: np.array(
                kept.sql(
                    f"SELECT write_norm FROM latents WHERE set = '{name}' ORDER BY latent"
                ).fetchall(),
                np.float64,
            )[:, 0]
            for name in ("z", "into", "pre")
        }
        config = DstConfig(autoencoders=kept.autoencoders("into"))
        read = kept.derive("autoencoder_latent", config=config)
        assert read.source.endswith("(latents of into)")
        assert np.array_equal(read.numpy(), computed.numpy())
    through = reading_heads.decoder.double().reshape(10, 2, 8)
    written = torch.einsum("nhc,hcd->nd", through, weight)
    assert norms["z"] == pytest.approx(written.norm(dim=-1).numpy(), rel=1e-12)
    assert norms["into"] == pytest.approx(transcoder.decoder.double().norm(dim=-1).numpy())
    assert np.isnan(norms["pre"]).all()


def test_lists_are_the_first_of_all_values_above_zero(world: World) -> None:
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for layer, latent, rank, token, value in world.store.sql(
        "SELECT layer, latent, rank, token, value FROM top_latents "
        "WHERE location = 'mlp_post_act' ORDER BY ALL"
    ).fetchall():
        listed = found.setdefault((layer, latent), [])
        listed.append((token, value))
        assert len(listed) == rank
    assert len(found) > 50
    for (layer, latent), listed in found.items():
        assert len(listed) >= min(
            LIST_LENGTH, int((world.values[layer, ~world.special, latent] > 0).sum())
        )
        expected = world.expected(len(listed), layers=(layer,), latents=[latent])
        assert listed == [(token, value) for value, _, token, _ in expected]


@settings(max_examples=60)
@given(data=st.data())
def test_summary_of_a_segment(data: st.DataObject) -> None:
    rows, latents = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 5)))
    number = st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.0, -1.5, 1e-40])
    dense = np.array(
        data.draw(st.lists(number, min_size=rows * latents, max_size=rows * latents)), np.float32
    ).reshape(rows, latents)
    special = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    cut = data.draw(st.integers(0, rows))
    parts = [SegmentLatents.of(part) for part in (dense[:cut], dense[cut:])]
    found = latent_sections(SegmentLatents.join(parts), special)
    top = low = 0
    for latent in range(latents):
        column = dense[:, latent]
        first, last = found["latent_offsets"][latent : latent + 2]
        assert found["latent_rows"][first:last].tolist() == np.flatnonzero(column).tolist()
        assert np.array_equal(found["latent_values"][first:last], column[column != 0])
        ordinary, others = column[~special], column[special]
        counts = [(ordinary != 0).sum(), (ordinary > 0).sum(), (others != 0).sum()]
        assert found["counts"][latent].tolist() == counts
        extremes = [
            part[part != 0].max(initial=-np.inf) if end else part[part != 0].min(initial=np.inf)
            for part in (ordinary, others)
            for end in (True, False)
        ]
        assert found["extremes"][latent].tolist() == extremes
        kept = np.flatnonzero(~special)
        best = sorted((-float(column[row]), row) for row in kept if column[row] > 0)[:LIST_LENGTH]
        worst = sorted((float(column[row]), row) for row in kept if column[row] < 0)[:LIST_LENGTH]
        for name, start, listed in (("top", top, best), ("low", low, worst)):
            stop = start + len(listed)
            assert found[f"{name}_rows"][start:stop].tolist() == [row for _, row in listed]
        top, low = top + len(best), low + len(worst)
    assert (len(found["top_rows"]), len(found["low_rows"])) == (top, low)


# Adding


def files_of(path: Path) -> dict[str, bytes]:
    """What belongs to sets of latents."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for folder in ("latents", "commits")
        for file in sorted((path / folder).rglob("*"))
        if file.is_file() and ".partial-" not in file.name
    }


def test_adding_again_changes_nothing(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    before = {file: file.stat() for file in path.rglob("*") if file.is_file()}
    told: list[tuple[str, int, int]] = []
    added = add_autoencoders(
        path, [*heads(), *neurons()[::-1]], progress=lambda *what: told.append(what)
    )
    assert [one.written for one in added] == [0, 0]
    assert all(one.segments == 6 for one in added)
    assert told == []
    after = {file: file.stat() for file in path.rglob("*") if file.is_file()}
    assert {file: (s.st_ino, s.st_mtime_ns) for file, s in before.items()} == {
        file: (s.st_ino, s.st_mtime_ns) for file, s in after.items()
    }


def test_progress_counts_tokens(tmp_path: Path) -> None:
    path = fresh_copy(tmp_path / "store")
    told: list[tuple[str, int, int]] = []
    Store(path).add_saes(heads(), progress=lambda *what: told.append(what))
    assert told[-1] == ("encode", 2538, 2538)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


@cache
def undisturbed(base: Path) -> dict[str, bytes]:
    path = base / "undisturbed"
    Store(fresh_copy(path)).add_saes(neurons())
    return files_of(path)


def add_and_die(path: Path, number: int, moment: str) -> None:
    """Add latents in this process and be killed at the publication of one file."""
    seen = 0
    link = os.link

    def dying(source: Any, target: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        link(source, target)
        if seen == number and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    os.link = dying  # type: ignore[assignment]
    add_autoencoders(path, neurons())


@pytest.mark.parametrize(("number", "moment"), [(1, "after"), (3, "before"), (4, "after"), (6, "before"), (7, "after"), (9, "before")])  # fmt: skip
def test_killed_run_leaves_a_sound_store_and_is_finished_by_the_next(
    number: int, moment: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = fresh_copy(tmp_path / "store")
    process = multiprocessing.get_context("fork").Process(
        target=add_and_die, args=(path, number, moment)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    report = verify_store(path)
    assert report.ok, report.findings
    with Store(path) as opened:
        # What is not committed does not exist, whatever files are there.
        for one in opened.info().latents.values():
            assert one.segments == len(list((path / "commits" / one.name).glob("0*.json")))
    add_autoencoders(path, neurons())
    assert files_of(path) == undisturbed(tmp_path_factory.getbasetemp())
    assert verify_store(path).ok
    assert not [name for name in path.rglob("*") if ".partial-" in name.name]


def test_incomplete_set_answers_from_what_it_has_and_computes_the_rest(
    world: World, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    name = world.store.latents("mlp_post_act", layer=0, tokens=[0]).name
    for segment in (2, 5):
        (path / "commits" / name / f"{segment:06d}.json").unlink()
        for file in (path / "latents" / name).glob(f"{segment:06d}.*"):
            file.unlink()
    with Store(path) as opened:
        assert opened.info().latents[name].segments == 4
        assert np.array_equal(opened.derive(LATENT).numpy(), world.values, equal_nan=True)
        found = opened.topk(LATENT, k=30)
        assert entries(found) == world.expected(30)
        assert found.certificate.plan == "scan"
        error = raised(lambda: opened.latents("mlp_post_act", layer=0))
        assert error.kind is ErrorKind.NOT_STORED
    assert complete_latents(path, name=name)[0].written == 2
    with Store(path) as opened:
        assert opened.topk(LATENT, k=30).certificate.plan == "column"
    assert files_of(path) == files_of(world.path)


def work(path: Path) -> None:
    add_autoencoders(path, neurons())


def test_two_workers_finish_one_set(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = fresh_copy(tmp_path / "store")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert files_of(path) == undisturbed(tmp_path_factory.getbasetemp())
    assert verify_store(path).ok


def test_appended_segments_are_completed(tmp_path: Path) -> None:
    values = {"mlp_post_act": np.random.default_rng(0).normal(size=(2, 1400, 24))}
    path = build_store(
        tmp_path / "store", {"mlp_post_act": values["mlp_post_act"][:, :800]}, [100] * 8
    )
    store = Store(path).add_saes(neurons(), name="mine")
    assert store.n_tokens == 800
    append_plan(path, [100] * 6)
    commit_segments(path, values)
    with Store(path) as opened:
        assert opened.n_tokens == 1400
        assert opened.info().latents["mine"].segments == 2
        computed = opened.derive(LATENT, config=in_use(neurons())).numpy()
        assert opened.sql("SELECT max(count) FROM latents").fetchall() == [(800 - 8,)]
    (added,) = complete_latents(path)
    assert (added.segments, added.written) == (4, 2)
    with Store(path) as opened:
        read = opened.derive(LATENT)
        assert read.source == "stored float32 (latents of mine)"
        assert np.array_equal(read.numpy(), computed, equal_nan=True)
        assert opened.sql("SELECT max(count) FROM latents").fetchall() == [(1400 - 14,)]
    assert verify_store(path).ok


def test_latents_of_values_that_were_replaced_are_no_answer(tmp_path: Path) -> None:
    path = fresh_copy(tmp_path / "store")
    Store(path).add_saes(neurons(), name="narrow")
    ingest_corpus(path, set_name="wide", locations=("mlp_post_act",), dtype="float32")
    with Store(path) as opened:
        computed = opened.derive(LATENT, config=in_use(neurons()))
        read = opened.derive(LATENT)
        assert read.source.startswith("derived from mlp_post_act (stored float32")
        assert np.array_equal(read.numpy(), computed.numpy(), equal_nan=True)
        kept = opened.latents("narrow", layer=0).sparse().to_dense().numpy()
        assert not np.array_equal(kept, computed.numpy()[0])
        assert opened.topk(LATENT, k=3).certificate.plan == "scan"
    assert complete_latents(path) == []
    for call in (
        lambda: complete_latents(path, name="narrow"),
        lambda: add_autoencoders(path, neurons(), name="narrow"),
    ):
        assert isinstance(raised(call), StoreConflict)
    add_autoencoders(path, neurons())
    with Store(path) as opened:
        read = opened.derive(LATENT)
        assert read.source.startswith("stored float32 (latents of sae-")
        assert np.array_equal(read.numpy(), computed.numpy(), equal_nan=True)
        assert opened.topk(LATENT, k=3, units="firing_rate > 0").certificate.plan == "column"


# Damage


def test_flipped_bit_in_any_file_is_found(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    sets = {folder.name for folder in (path / "latents").iterdir()}
    files = [file for file in (path / "latents").rglob("*") if file.is_file()]
    files += [file for name in sets for file in (path / "commits" / name).iterdir()]
    rng = np.random.default_rng(1)
    for file in files:
        whole = file.read_bytes()
        place = int(rng.integers(len(whole)))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        report = verify_store(path)
        assert file.relative_to(path).as_posix() in {one.path for one in report.findings}
        file.write_bytes(whole)
    assert verify_store(path).ok


def test_flipped_bit_is_an_error_or_the_right_answer(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    name = world.store.latents("mlp_post_act", layer=0, tokens=[0]).name
    rng = np.random.default_rng(2)
    errors = 0
    expected = world.expected(20, layers=(0,), latents=[7])
    for number in range(40):
        file = path / "latents" / name / f"{number % 6:06d}.0.sections"
        whole = file.read_bytes()
        place = int(rng.integers(len(whole)))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            with Store(path) as opened:
                assert entries(opened.topk(LATENT, k=20, layers=0, latents=7)) == expected
                rows = opened.latents("mlp_post_act", layer=0)
            dense = rows.sparse().to_dense().numpy()
            assert np.array_equal(dense, world.values[0])
        except StoreDamaged:
            errors += 1
        file.write_bytes(whole)
    assert errors > 10


def test_exchanged_and_missing_files_are_found(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    name = world.store.latents("mlp_post_act", layer=0, tokens=[0]).name
    one, other = (path / "latents" / name / f"00000{n}.0.sections" for n in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with Store(path) as opened:
        error = raised(lambda: opened.topk(LATENT, k=3, layers=0, latents=7))
        assert error.kind is ErrorKind.MALFORMED_FILE
    assert len(verify_store(path).findings) == 2
    one.write_bytes(first)
    other.unlink()
    with Store(path) as opened:
        error = raised(lambda: opened.topk(LATENT, k=3, layers=0, latents=7))
        assert error.kind is ErrorKind.MISSING_FILE
    assert [found.problem for found in verify_store(path).findings] == ["missing"]
    other.write_bytes(second)
    (path / "latents" / name / "stray").write_bytes(b"x")
    assert [found.problem for found in verify_store(path).findings] == ["unknown"]


def test_damaged_autoencoder_is_never_used(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    (file,) = (path / "latents").glob("*/autoencoder-0.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(bytes(whole))
    with Store(path) as opened:
        error = raised(lambda: opened.autoencoders("mlp_post_act"))
        assert error.kind is ErrorKind.CHECKSUM_MISMATCH
        assert isinstance(raised(lambda: opened.derive(LATENT, tokens=[0])), StoreDamaged)


# What is refused


def test_autoencoders_that_do_not_fit_are_refused(world: World) -> None:
    def added(*autoencoders: Autoencoder, **choices: Any) -> ActstoreError:
        return raised(lambda: world.store.add_saes(autoencoders, **choices))

    assert added().kind is ErrorKind.INVALID_ARGUMENT
    wide = made(L.MLP_POST_ACT, 0, 25, 5, ReLU())
    assert "24" in str(added(wide))
    assert added(made(L.MLP_POST_ACT, 2, 24, 5, ReLU())).kind is ErrorKind.UNKNOWN_LAYER
    assert added(*neurons(), neurons()[0]).kind is ErrorKind.INVALID_ARGUMENT
    assert added(*neurons(), *heads(), name="both").kind is ErrorKind.INVALID_ARGUMENT
    for name in ("base", "../x", "", ".hidden", "a b"):
        assert added(*heads(), name=name).kind is ErrorKind.INVALID_ARGUMENT
    assert isinstance(raised(lambda: complete_latents(world.path, name="none")), InvalidInput)
    assert raised(lambda: world.store.add_saes(["nowhere"])).kind is ErrorKind.MISSING_FILE


def test_name_of_another_set_is_refused(tmp_path: Path) -> None:
    path = fresh_copy(tmp_path / "store")
    Store(path).add_saes(heads(), name="mine")
    error = raised(lambda: Store(path).add_saes(neurons(), name="mine"))
    assert isinstance(error, StoreConflict)
    # Also where a killed run left an autoencoder and no record.
    blobs = LocalBlobs(path)
    blobs.publish("latents/dead/autoencoder-1.safetensors", [b"something else"])
    error = raised(lambda: Store(path).add_saes(heads(), name="dead"))
    assert isinstance(error, StoreConflict)


def test_latents_that_are_not_finite_stop_before_the_commit(tmp_path: Path) -> None:
    path = fresh_copy(tmp_path / "store")
    huge = made(L.MLP_POST_ACT, 0, 24, 8, Identity()).to(torch.float64)
    tensors = {name: value * 1e200 for name, value in huge.tensors.items()}
    fields: dict[str, Any] = {"name": "wild", "activation": Identity(), **tensors}
    wild = Autoencoder(location=huge.location, layer=0, **fields)
    error = raised(lambda: Store(path).add_saes([wild], name="wild"))
    assert isinstance(error, IngestStopped)
    assert error.kind is ErrorKind.NUMERIC_OVERFLOW
    assert "token 0" in str(error)
    assert not list((path / "commits" / "wild").glob("0*.json"))
    assert verify_store(path).ok


def test_location_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    values = {"mlp_post_act": np.random.default_rng(0).normal(size=(2, 100, 24))}
    path = build_store(tmp_path / "store", values, [50, 50])
    error = raised(lambda: Store(path).add_saes([made(L.MLP_PRE_LINEAR, 0, 24, 5, ReLU())]))
    assert isinstance(error, Unavailable)
    assert not (path / "latents").exists()


# The rest of the store


def test_info_compaction_and_a_second_compaction(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.path, tmp_path / "store"))
    with Store(path) as opened:
        info = opened.info()
        assert sorted(one.location for one in info.latents.values()) == [
            "mlp_post_act",
            "resid_delta_attn",
        ]
        for name, one in info.latents.items():
            assert one.segments == 6 == info.coverage[name]
            kept = (path / "latents" / name).iterdir()
            assert one.bytes == sum(file.stat().st_size for file in kept)
        json.dumps(info.to_json())
        assert compact(opened.reader).removed == ()
        assert opened.sql("SELECT count(*) FROM latents").fetchall() == [(80 + 33 + 50,)]


def test_adding_imports_no_torch_before_a_tensor_is_needed() -> None:
    assert "torch" not in vars(latent_ingest)
    assert "torch" not in vars(latent_search)


def test_command_line(tmp_path: Path) -> None:
    path = fresh_copy(tmp_path / "store")
    arrays = {
        "W_enc": heads()[0].encoder.numpy(),
        "W_dec": heads()[0].decoder.numpy(),
        "b_enc": heads()[0].latent_bias.numpy(),
        "b_dec": heads()[0].output_bias.numpy(),
        "threshold": np.full(50, 0.1, np.float32),
    }
    np.savez(tmp_path / "params.npz", **arrays)  # type: ignore[arg-type]
    runner = CliRunner()
    add = ["add-saes", str(path), str(tmp_path / "params.npz"), "--location", "resid_delta_attn"]
    add += ["--layer", "1", "--name", "gemma", "--json"]
    first = runner.invoke(app, add)
    assert first.exit_code == 0, first.output
    (row,) = json.loads(first.stdout)["rows"]
    assert (row["set"], row["written"], row["segments"]) == ("gemma", 6, 6)
    again = runner.invoke(app, ["add-saes", str(path), "--json"])
    assert json.loads(again.stdout)["rows"][0]["written"] == 0
    shown = runner.invoke(app, ["info", str(path)])
    assert "gemma" in shown.stdout
    ranked = runner.invoke(
        app,
        ["topk", str(path), "attention_autoencoder_latent", "--latent", "7", "-k", "3", "--json"],
    )
    assert ranked.exit_code == 0, ranked.output
    assert json.loads(ranked.stdout)["certificate"]["plan"] == "column"
    table = runner.invoke(app, ["add-saes", str(path)])
    assert "6 (0 new)" in table.stdout
    wrong = runner.invoke(app, [*add, "--name", "base"])
    assert wrong.exit_code == 2
