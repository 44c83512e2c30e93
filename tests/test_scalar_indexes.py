"""Indexes of derived scalars: the same answers from less, and never from an index that lies."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_ingest import (
    differences,
    file_bytes,
    fresh_copy,
    ingest_corpus,
    tiny_model,
    tiny_settings,
)
from torch import Tensor
from typer.testing import CliRunner

import actstore
from actstore.cli import app
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.query.derived import SCALARS, DerivedScalar
from actstore.query.derived.registry import rollback
from actstore.query.index_building import build_indexes
from actstore.query.session import Store
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, StoreDamaged
from actstore.store.model.autoencoder_functions import ReLU
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.reader import StoreReader
from actstore.store.snapshot import compact
from actstore.store.verification import verify_store
from actstore.store.vocabulary import (
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
    Dimension,
)

NAME = "next_token_log_prob"
LIMIT = 700
CHOICES: dict[str, Any] = {"locations": "attention", "objective": NAME, "limit_tokens": LIMIT}
PRODUCT = "mlp_act_times_grad"
NORM = "resid_post_mlp_norm"

PLAIN = sorted(
    name
    for name, declared in SCALARS.items()
    if declared.about is None
    and declared.latents is None
    and not declared.is_pair_shaped
    and not declared.is_flattened
    and name not in ("logits", *map(str, OPTIONAL_LOCATIONS))
)

Floats = npt.NDArray[np.float32]
Place = tuple[int, int, int]


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    with rollback():
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "store"
    fresh_copy(path, **CHOICES)
    with Store(path) as store:
        assert store.reader.segments == [0, 1]
    return path


@pytest.fixture(scope="module")
def indexed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = shutil.copytree(plain, tmp_path_factory.mktemp("indexed") / "store")
    with Store(path) as store:
        own = [name for name in PLAIN if bounded_by(store, name) != "zone map"]
        assert {PRODUCT, NORM, "resid_post_mlp", "attn_write_norm_per_sequence_token"} <= set(own)
    build_indexes(path, own)
    return path


@pytest.fixture(scope="module")
def small(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the index of two scalars."""
    path = shutil.copytree(plain, tmp_path_factory.mktemp("small") / "store")
    build_indexes(path, [PRODUCT, NORM])
    return path


def bounded_by(store: Store, name: str | DerivedScalar, **options: Any) -> str:
    found = store.explain(name, **options).bounded_by
    return next(
        kind for kind in ("zone map", "index", "interval", "nothing") if found.startswith(kind)
    )


class Values:
    """Every value of a scalar, ``(layer, row, unit)``, as ``derive`` gives it."""

    def __init__(self, store: Store, declared: DerivedScalar) -> None:
        tensor = store.derive(declared)
        array = tensor.numpy() if tensor.layers is not None else tensor.numpy()[None]
        self.units = array.shape[2:]
        self.array: Floats = array.reshape(*array.shape[:2], -1)
        self.token = tensor.rows.token
        self.ordinary = ~store.row_map.special(tensor.rows)

    def ranked(
        self, score: Floats, k: int, largest: bool, by: str = "value", special: bool = False
    ) -> list[Place]:
        keep = ~np.isnan(score)
        if not special:
            keep[:, ~self.ordinary] = False
        layer, row, unit = np.nonzero(keep)
        token = self.token[row]
        found = score[layer, row, unit] + np.float32(0)
        key = np.abs(found) if by == "magnitude" else found if largest else -found
        order = np.lexsort((unit, token, layer, -key))[:k]
        return [(int(layer[i]), int(token[i]), int(unit[i])) for i in order]

    def at(self, score: Floats, places: list[Place]) -> list[float]:
        row = {int(token): number for number, token in enumerate(self.token)}
        return [float(score[layer, row[token], unit]) + 0.0 for layer, token, unit in places]


def places_of(declared: DerivedScalar, units: tuple[int, ...], found: Any) -> list[Place]:
    """(layer, token, flat unit) of every row of an answer."""
    columns = found.table.to_pydict()
    axes = [axis for axis in declared.ranked_axes if axis is not Dimension.SINGLETON]
    shape = tuple(size for size in units if size != 1 or len(axes) == len(units))
    places = []
    for number in range(len(found)):
        unit = tuple(columns[axis.value][number] for axis in axes)
        flat = int(np.ravel_multi_index(unit, shape)) if unit else 0
        layer = columns["layer"][number] if "layer" in columns else 0
        places.append((layer, columns["token"][number], flat))
    return places


def column(found: Any, name: str = "value") -> list[float]:
    return [value + 0.0 for value in found.column(name)]


# The same answers


@pytest.mark.parametrize("name", PLAIN)
def test_an_index_changes_no_answer_and_spares_the_scan(
    plain: Path, indexed: Path, name: str
) -> None:
    with Store(indexed) as store, Store(plain) as bare:
        declared = SCALARS[name]
        values = Values(store, declared)
        stored = bounded_by(bare, name) == "zone map"
        for options in (
            {"k": 3, "largest": True},
            {"k": 40, "largest": True},
            {"k": 40, "largest": False},
            {"k": 25, "by": "magnitude", "largest": True},
            {"k": 25, "largest": True, "special": True},
        ):
            found = store.topk(name, **options)
            places = values.ranked(values.array, **options)
            assert places_of(declared, values.units, found) == places
            assert column(found) == values.at(values.array, places)
            certificate = found.certificate
            assert certificate.plan in ("lists", "lists+bounds", "bounds")
            kind = "zone map of " if stored else f"index {name}/forward@index-{name}-"
            assert certificate.bounded_by.startswith(kind)
        ordinary = values.array[:, values.ordinary]
        middle = float(np.nanquantile(ordinary, 0.9, method="lower"))
        for ends in ({"above": middle}, {"at_least": middle, "below": math_next(middle)}):
            inside = values.array > middle if "above" in ends else values.array == middle
            inside[:, ~values.ordinary] = False
            layer, row, unit = np.nonzero(inside)
            one = store.filter(name, **ends)
            assert places_of(declared, values.units, one) == list(
                zip(layer.tolist(), values.token[row].tolist(), unit.tolist(), strict=True)
            )
            assert column(one) == (values.array[inside] + np.float32(0)).tolist()
            assert store.count(name, **ends).total == inside.sum()


def math_next(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


@pytest.mark.parametrize(
    "name", [PRODUCT, NORM, "resid_post_mlp", "attn_write_norm_per_sequence_token"]
)
def test_indexed_scalars_are_normalised(plain: Path, indexed: Path, name: str) -> None:
    with Store(plain) as bare, pytest.raises(InvalidInput, match="actstore index"):
        bare.topk(name, normalise="max")
    with Store(indexed) as store:
        declared = SCALARS[name]
        values = Values(store, declared)
        wide = values.array.astype(np.float64)
        scale = np.abs(wide[:, values.ordinary]).max(axis=1, keepdims=True)
        score = (wide / np.where(scale > 0, scale, np.nan)).astype(np.float32)
        for largest in (True, False):
            found = store.topk(name, normalise="max", k=30, largest=largest)
            places = values.ranked(score, 30, largest)
            assert places_of(declared, values.units, found) == places
            assert column(found, "score") == values.at(score, places)
            assert column(found) == values.at(values.array, places)
        centre = wide[:, values.ordinary].mean(axis=1, keepdims=True)
        spread = wide[:, values.ordinary].std(axis=1, keepdims=True)
        found = store.topk(name, normalise="std", k=30)
        near = (wide - centre) / np.where(spread > 0, spread, np.nan)
        places = places_of(declared, values.units, found)
        np.testing.assert_allclose(
            column(found, "score"), values.at(near.astype(np.float32), places), rtol=1e-4
        )
        best = np.sort(near[:, values.ordinary][~np.isnan(near[:, values.ordinary])])[::-1][:30]
        np.testing.assert_allclose(column(found, "score"), best, rtol=1e-4)


def test_a_stored_array_may_be_indexed_all_the_same(plain: Path, tmp_path: Path) -> None:
    path = shutil.copytree(plain, tmp_path / "store")
    with Store(path) as store:
        expected = store.topk("mlp_write_norm", k=50, largest=False).rows()
        # By default what it has already is not made again.
        (built,) = build_indexes(path, ["mlp_write_norm"])
        assert built.parts == ("histogram",)
    (built,) = build_indexes(path, ["mlp_write_norm"], parts=["zones"])
    assert built.parts == ("zones",)
    with Store(path) as store:
        assert bounded_by(store, "mlp_write_norm") == "index"
        assert store.topk("mlp_write_norm", k=50, largest=False).rows() == expected
    assert verify_store(path).ok


def test_parts_are_sets_of_their_own(plain: Path, tmp_path: Path) -> None:
    path = shutil.copytree(plain, tmp_path / "store")
    first, *_ = build_indexes(path, [NORM], parts=["histogram"])
    second, *_ = build_indexes(path, [NORM], parts=["zones"])
    third, *_ = build_indexes(path, [NORM])
    again, *_ = build_indexes(path, [NORM], parts=("histogram", "zones", "zones"))
    assert len({first.set, second.set, third.set}) == 3
    assert (again.set, again.written) == (third.set, 0)
    assert again.parts == third.parts == ("zones", "histogram")
    with Store(path) as store:
        assert bounded_by(store, NORM) == "index"
        assert store.topk(NORM, k=2).certificate.plan == "lists"


@pytest.mark.parametrize("name", ["resid_post_mlp", "attn_query", "mlp_post_act"])
def test_gradients_are_indexed(plain: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(plain, tmp_path / "store")
    with Store(path) as store:
        values = Values(store, store.scalar(name, "backward"))
        stored = bounded_by(store, name, pass_type="backward") == "zone map"
        again = store.index(name, pass_type="backward")
    with again as store:
        kind = bounded_by(store, name, pass_type="backward")
        assert kind == ("zone map" if stored else "index")
        for largest in (True, False):
            found = store.topk(name, pass_type="backward", k=20, largest=largest)
            assert column(found) == values.at(
                values.array, values.ranked(values.array, 20, largest)
            )
        # The value itself has no index of its gradient's.
        assert bounded_by(store, name) != "index"


def test_intervals_without_an_index_give_way_to_a_scan(plain: Path) -> None:
    with Store(plain) as store:
        values = Values(store, SCALARS[PRODUCT])
        plans = set()
        for options in ({"k": 3}, {"k": 200}, {"k": 200, "largest": False}):
            for unit in (None, 3):
                found = store.topk(PRODUCT, neurons=unit, **options)
                score = values.array
                if unit is not None:
                    score = np.full_like(values.array, np.nan)
                    score[:, :, unit] = values.array[:, :, unit]
                places = values.ranked(score, options["k"], bool(options.get("largest", True)))
                assert places_of(SCALARS[PRODUCT], values.units, found) == places
                plans.add(found.certificate.plan)
                assert found.certificate.bounded_by.startswith("interval of mlp_post_act")
        assert "scan" in plans


def test_latents_of_layers_of_different_widths_are_indexed(plain: Path, tmp_path: Path) -> None:
    path = shutil.copytree(plain, tmp_path / "store")
    generator = torch.Generator().manual_seed(0)

    def made(layer: int, latents: int) -> Autoencoder:
        return Autoencoder(
            name=f"a{layer}",
            location=ActivationLocationType.RESID_POST_MLP,
            layer=layer,
            encoder=torch.randn(16, latents, generator=generator),
            decoder=torch.randn(latents, 16, generator=generator),
            latent_bias=torch.zeros(latents),
            input_bias=torch.zeros(16),
            output_bias=torch.zeros(16),
            activation=ReLU(),
        )

    name = "online_autoencoder_act_times_grad"
    with Store(path).add_saes([made(0, 21), made(1, 40)]) as store:
        kept = "autoencoder_latent"
        planned, certificate = store.explain(kept), store.topk(kept).certificate
        assert (planned.plan, planned.source) == (certificate.plan, certificate.source)
        assert planned.plan == "column"
        expected = [store.topk(name, k=60, largest=largest).rows() for largest in (True, False)]
        counted = store.count(name, above=0).rows()
        again = store.index(name)
    with again as store:
        assert bounded_by(store, name) == "index"
        assert [store.topk(name, k=60, largest=one).rows() for one in (True, False)] == expected
        assert store.count(name, above=0).rows() == counted
        # The narrower layer has no units beyond its own.
        found = store.topk(name, layers=0, latents=range(21, 40), special=True)
        assert len(found) == 0


# Building


def test_an_index_is_the_same_whoever_makes_it(plain: Path, small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(plain, tmp_path / "store")
    done: list[tuple[int, int]] = []
    for name in (NORM, PRODUCT):
        (built,) = build_indexes(store, [name], progress=lambda _, a, b: done.append((a, b)))
        assert (built.segments, built.written) == (2, 2)
    assert done[-1][0] == done[-1][1] > 0
    assert not differences(file_bytes(store), file_bytes(small))
    before = file_bytes(store)
    assert [one.written for one in build_indexes(store, [NORM, PRODUCT])] == [0, 0]
    assert file_bytes(store) == before


def test_an_incomplete_index_is_not_used_until_it_is_completed(small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(small, tmp_path / "store")
    ingest_corpus(store, **{**CHOICES, "limit_tokens": LIMIT + 700})
    with Store(store) as opened:
        assert len(opened.reader.segments) > 2
        assert bounded_by(opened, NORM) == "nothing"
        assert bounded_by(opened, PRODUCT) == "interval"
        expected = {name: opened.topk(name, k=70).rows() for name in (NORM, PRODUCT)}
        values = Values(opened, SCALARS[NORM])
        places = values.ranked(values.array, 70, True)
        assert [row["token"] for row in expected[NORM]] == [token for _, token, _ in places]
    built = build_indexes(store, [NORM, PRODUCT])
    assert [one.written for one in built] == [one.segments - 2 for one in built]
    with Store(store) as opened:
        for name, rows in expected.items():
            assert bounded_by(opened, name) == "index"
            assert opened.topk(name, k=70).rows() == rows


def test_an_index_of_values_that_were_replaced_is_not_used(small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(small, tmp_path / "store")
    settings = tiny_settings(set_name="again", locations=("resid_post_mlp",), dtype="bfloat16")
    ingest(tiny_model(), Corpus(None), store, settings)
    with Store(store) as opened:
        # The norms are of coarser numbers now; the products are as they were.
        assert bounded_by(opened, NORM) == "nothing"
        assert bounded_by(opened, PRODUCT) == "index"
        values = Values(opened, SCALARS[NORM])
        found = opened.topk(NORM, k=30)
        places = values.ranked(values.array, 30, True)
        assert column(found) == values.at(values.array, places)
    (built,) = build_indexes(store, [NORM])
    assert built.written == 2
    with Store(store) as opened, Store(small) as before:
        assert bounded_by(opened, NORM) == "index"
        assert opened.topk(NORM, k=30).rows() == found.rows() != before.topk(NORM, k=30).rows()


def test_each_objective_has_an_index_of_its_own(small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(small, tmp_path / "store")
    other = "logit_diff(5, 6)"
    settings = tiny_settings(set_name="other", objective=other, gradients="mlp_post_act")
    ingest(tiny_model(), Corpus(None), store, settings)
    with Store(store) as first, Store(store, objective=other) as second:
        assert bounded_by(first, PRODUCT) == "index"
        assert bounded_by(second, PRODUCT) == "interval"
        # No gradient is in a norm.
        assert bounded_by(second, NORM) == "index"
        expected = [one.topk(PRODUCT, k=30).rows() for one in (first, second)]
    assert expected[0] != expected[1]
    build_indexes(store, [PRODUCT], objective=other)
    with Store(store) as first, Store(store, objective=other) as second:
        assert {bounded_by(first, PRODUCT), bounded_by(second, PRODUCT)} == {"index"}
        assert [one.topk(PRODUCT, k=30).rows() for one in (first, second)] == expected
        assert first.explain(PRODUCT).bounded_by != second.explain(PRODUCT).bounded_by


# Users' scalars

FACTOR = 2.0


def helper(a: Tensor) -> Tensor:
    return a * FACTOR


def declare(function: Callable[..., Tensor]) -> DerivedScalar:
    function.__doc__ = "Something of a neuron"
    return actstore.derived_scalar(
        axes="neuron", sources={"a": "mlp_post_act"}, register=False, name="own", definition="own"
    )(function)


def scaled(low: float, high: float) -> DerivedScalar:
    def own(a: Tensor) -> Tensor:
        return a * low + high

    return declare(own)


def weighted(vector: Any) -> DerivedScalar:
    def own(a: Tensor) -> Tensor:
        return a * torch.as_tensor(vector, dtype=a.dtype)

    return declare(own)


def by_default(factor: float) -> DerivedScalar:
    def own(a: Tensor, *, by: float = factor) -> Tensor:
        return a * by

    return declare(own)


def through_helper() -> DerivedScalar:
    def own(a: Tensor) -> Tensor:
        return helper(a)

    return declare(own)


def one_body() -> DerivedScalar:
    def own(a: Tensor) -> Tensor:
        return a * 3

    return declare(own)


def other_body() -> DerivedScalar:
    def own(a: Tensor) -> Tensor:
        return a * -3

    return declare(own)


def test_a_scalar_of_the_same_name_is_not_answered_from_another_index(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(plain, tmp_path / "store")
    before = torch.arange(24, dtype=torch.bfloat16)
    pairs = [
        (one_body(), other_body()),
        (scaled(1, 12), scaled(11, 2)),
        (weighted(np.arange(24.0)), weighted(np.arange(24.0)[::-1].copy())),
        (weighted(before), weighted(before.flip(0))),
        (by_default(2.0), by_default(-2.0)),
    ]
    for declared, changed in pairs:
        build_indexes(store, [declared], parts=["zones"])
        with Store(store) as opened:
            assert bounded_by(opened, declared) == "index"
            assert bounded_by(opened, changed) == "nothing"
            for one in (declared, changed):
                values = Values(opened, one)
                found = opened.topk(one, k=10)
                assert column(found) == values.at(
                    values.array, values.ranked(values.array, 10, True)
                )
    declared = through_helper()
    build_indexes(store, [declared], parts=["zones"])
    with Store(store) as opened:
        assert bounded_by(opened, through_helper()) == "index"
        monkeypatch.setitem(globals(), "FACTOR", -2.0)
        assert bounded_by(opened, through_helper()) == "nothing"


def test_a_formula_that_nobody_can_tell_from_another_is_not_indexed(
    plain: Path, tmp_path: Path
) -> None:
    store = shutil.copytree(plain, tmp_path / "store")

    class Factor:
        value = 2.0

    def unclear() -> DerivedScalar:
        held = Factor()

        def own(a: Tensor) -> Tensor:
            return a * held.value

        return declare(own)

    with pytest.raises(InvalidInput, match="holds a Factor") as caught:
        build_indexes(store, [unclear()])
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    build_indexes(store, [one_body()])
    with Store(store) as opened:
        # It has an index by name; nobody can tell that it is of this formula.
        assert bounded_by(opened, unclear()) == "nothing"
        assert len(opened.topk(unclear(), k=3)) == 3


# Damage, copies, compaction


def files_of(store: Path) -> list[Path]:
    found = [*store.glob(f"zones/{NORM}/*/*.sections"), *store.glob(f"commits/index-{NORM}-*/*")]
    assert len(found) >= 5
    return sorted(found)


def test_a_flipped_byte_is_named_and_never_a_wrong_answer(small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(small, tmp_path / "store")

    def asked(opened: Store) -> list[Any]:
        return [
            opened.topk(NORM, k=3).rows(),
            opened.topk(NORM, k=300, largest=False).rows(),
            opened.count(NORM, above=3.5).rows(),
            opened.topk(NORM, k=5, normalise="std").rows(),
        ]

    with Store(small) as opened:
        expected = asked(opened)
    raised = 0
    for path in files_of(store):
        content = path.read_bytes()
        key = path.relative_to(store).as_posix()
        for place in range(1, len(content), max(1, len(content) // 6)):
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            report = verify_store(store)
            assert key in [finding.path for finding in report.findings], (key, place)
            try:
                with Store(store) as opened:
                    assert asked(opened) == expected
            except StoreDamaged:
                raised += 1
        path.write_bytes(content)
    assert raised > 10
    assert verify_store(store).ok


def test_files_of_one_segment_in_anothers_place_are_found(small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(small, tmp_path / "store")
    for path in store.glob(f"zones/{NORM}/*/index-*"):
        path.unlink()
    first, second = sorted(store.glob(f"zones/{NORM}/*/0*.sections"))
    second.write_bytes(first.read_bytes())
    report = verify_store(store)
    assert second.relative_to(store).as_posix() in [one.path for one in report.findings]
    with pytest.raises(StoreDamaged), Store(store) as opened:
        opened.topk(NORM, k=300)


def test_compaction_merges_indexes_and_copies_work_anywhere(small: Path, tmp_path: Path) -> None:
    store = shutil.copytree(small, tmp_path / "elsewhere" / "store")
    merged = sorted(store.glob(f"zones/{NORM}/*/index-*"))
    assert merged
    with Store(store) as opened:
        expected = [opened.topk(NORM, k=300, largest=one).rows() for one in (True, False)]
    for path in merged:
        path.unlink()
    with Store(store) as opened:
        assert [opened.topk(NORM, k=300, largest=one).rows() for one in (True, False)] == expected
    with closing(StoreReader(store)) as reader:
        compact(reader)
    assert sorted(store.glob(f"zones/{NORM}/*/index-*")) == merged
    assert not differences(file_bytes(store), file_bytes(small))
    with Store(store) as opened:
        assert [opened.topk(NORM, k=300, largest=one).rows() for one in (True, False)] == expected


# What is refused


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["unflattened_attn_write_norm"], {}, "every pair of tokens"),
        (["attn_write_norm"], {}, "every pair of tokens"),
        (["attn_qk_probs"], {}, "every pair of tokens"),
        (["single_node_write"], {}, "about one node"),
        ([NORM], {"parts": ["moments"]}, "zones or histogram"),
        ([NORM], {"parts": "zone"}, "zones or histogram"),
        ([NORM], {"parts": []}, "zones or histogram"),
        ([NORM], {"pass_type": "sideways"}, "forward, backward"),
        (["mlp_write_norm"], {"pass_type": "backward"}, "no backward value"),
        (["resid_post_mlp_nrom"], {}, "Did you mean"),
        ([], {}, "No scalar is given"),
    ],
)
def test_what_cannot_be_indexed_is_refused(
    plain: Path, tmp_path: Path, names: Sequence[str], options: dict[str, Any], words: str
) -> None:
    before = file_bytes(plain)
    with pytest.raises(InvalidInput, match=words):
        build_indexes(plain, names, **options)
    with pytest.raises(ActstoreError):
        build_indexes(plain, [NORM, *names, "nonsense"], **options)
    assert file_bytes(plain) == before


# Commands


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json"))
    return found


def test_the_commands_say_what_the_library_says(plain: Path, tmp_path: Path) -> None:
    path = shutil.copytree(plain, tmp_path / "store")
    first = answer("index", path, NORM, PRODUCT)["rows"]
    assert [(one["scalar"], one["segments"], one["written"]) for one in first] == [
        (NORM, 2, 2),
        (PRODUCT, 2, 2),
    ]
    assert [one["written"] for one in answer("index", path, NORM, PRODUCT)["rows"]] == [0, 0]
    assert "2 (0 new)" in run("index", path, NORM, "--quiet")
    with Store(path) as store:
        plan = answer("topk", path, PRODUCT, "--plan", "-k", 4)
        assert plan == {"plan": store.explain(PRODUCT, k=4).to_json()}
        assert plan["plan"]["plan"] == "lists"
        found = answer("topk", path, PRODUCT, "--explain", "-k", 4, "--normalise", "std")
        expected = store.topk(PRODUCT, k=4, normalise="std").to_json()
        assert {key: found[key] for key in expected} == expected
        assert found["plan"]["bounded_by"] == found["certificate"]["bounded_by"]
        found = answer("topk", path, PRODUCT, "--combine", "mean", "--neuron", 3, "--neuron", 5)
        assert found == store.topk(PRODUCT, combine="mean", neurons=[3, 5]).to_json()
        found = answer("topk", path, PRODUCT, "--per", "token", "--token", 9, "-k", 2)
        assert found == store.topk(PRODUCT, per="token", tokens=[9], k=2).to_json()
        found = answer("filter", path, NORM, "--above", 3.9, "--layer", 1)
        assert found == store.filter(NORM, above=3.9, layers=1).to_json()
        found = answer("count", path, PRODUCT, "--below", -0.5, "--where", "position > 3")
        assert found == store.count(PRODUCT, below=-0.5, where="position > 3").to_json()
        found = answer("compare", path, PRODUCT, "mlp_post_act", "-k", 3)
        assert found == store.compare([PRODUCT, "mlp_post_act"], k=3).to_json()
    for words in (
        ("topk", path, PRODUCT, "--plan"),
        ("topk", path, PRODUCT, "--explain", "--normalise", "max"),
        ("filter", path, NORM, "--above", 3.9),
        ("count", path, NORM, "--above", 3.9),
        ("compare", path, PRODUCT, "mlp_post_act", "-k", 2),
    ):
        assert run(*words).strip()


@pytest.mark.parametrize(
    "words",
    [
        ("index", "{}", "attn_qk_probs"),
        ("index", "{}"),
        ("index", "{}", NORM, "--part", "moments"),
        ("filter", "{}", NORM),
        ("count", "{}", NORM, "--above", "nan"),
        ("compare", "{}", NORM),
        ("topk", "{}", NORM, "--per", "token"),
        ("topk", "{}", NORM, "--combine", "product"),
        ("topk", "{}", NORM, "--normalise", "mean", "--plan"),
    ],
)
def test_commands_refuse_with_a_kind(plain: Path, words: tuple[str, ...]) -> None:
    filled = [word.replace("{}", str(plain)) for word in words]
    result = CliRunner().invoke(app, [*filled, "--json"], catch_exceptions=False)
    assert result.exit_code == 2
    assert json.loads(result.stderr.splitlines()[-1])["error"]["kind"] == "invalid_argument"
