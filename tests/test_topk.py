"""Top-k and examples against brute force over the stored arrays."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_builder import build_store, commit_segments, stored_rows

from actstore.query.session import Store
from actstore.store.errors import InvalidInput, StoreDamaged, Unavailable
from actstore.store.index_file import publish_index

SEGMENT = 512
LAYERS, NEURONS = 2, 40
SPECIAL_TOKEN = 7


def hard_values(rng: np.random.Generator, tokens: int) -> npt.NDArray[np.float32]:
    """Units of every awkward kind, ``(layer, token, neuron)``."""
    values = rng.standard_normal((LAYERS, tokens, NEURONS)).astype(np.float32)
    values[:, :, 1] = 0.25  # constant
    values[:, :, 2] = -np.abs(values[:, :, 2])  # all negative
    values[:, :, 3] = rng.integers(-1, 2, (LAYERS, tokens))  # ties everywhere
    values[:, rng.random(tokens) < 0.02, 4] = np.inf
    values[:, rng.random(tokens) < 0.02, 4] = -np.inf
    values[:, rng.random(tokens) < 0.3, 5] = np.nan
    values[:, :, 6] = np.nan
    values[:, :, 7] = np.where(rng.random((LAYERS, tokens)) < 0.5, 0.0, -0.0)
    values[:, 100:120, 8] = 9.0  # a burst: more than a segment's list holds, all tied
    values[0, :, 9] = np.linspace(-3, 3, tokens)  # the best all in the last segment
    values[:, :, 10] = 0
    values[:, :, 11] = -np.inf
    values[:, 512:1024, 12] = -np.inf
    values[:, ::3, 13] = -3e38  # minus infinity as float16, and when scaled
    return values


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Store, "Truth"]]:
    made: dict[str, tuple[Store, Truth]] = {}
    for name, dtype, indexed in [
        ("float16", "float16", False),
        ("float32", "float32", True),
        ("partly indexed", "float16", True),
    ]:
        rng = np.random.default_rng(len(made))
        lengths = [int(n) for n in rng.integers(1, 120, 28)]
        tokens = sum(lengths)
        values: dict[str, npt.ArrayLike] = {
            "mlp_post_act": hard_values(rng, tokens),
            "resid_post_mlp": rng.standard_normal((LAYERS, tokens, 8)),
        }
        path = build_store(
            tmp_path_factory.mktemp("topk") / "store",
            values,
            lengths,
            dtype=dtype,
            segment_rows=SEGMENT,
            special_token_ids=(SPECIAL_TOKEN,),
            columns=[{"score": n % 5, "name": f"d{n}"} for n in range(len(lengths))],
            commit=[0, 1] if name == "partly indexed" else "all",
            shuffle=3 if dtype == "float32" else None,
        )
        if indexed:
            store = Store(path)
            publish_index(store.reader, next(iter(store.reader.arrays.values())))
            store.close()
        if name == "partly indexed":
            commit_segments(path, values)
        store = Store(path)
        made[name] = (store, Truth(store))
    return made


class Truth:
    """The store's arrays as zarr-python reads them, ranked by sorting everything."""

    def __init__(self, store: Store) -> None:
        self.store = store
        root = store.reader.root / "arrays"

        def read(path: str) -> npt.NDArray[Any]:
            return np.asarray(zarr.open_array(root / path, mode="r")[:])

        self.raw = read("mlp_post_act/forward").astype(np.float32)
        self.resid = read("resid_post_mlp/forward").astype(np.float32)
        token_id = read("token_id")
        self.rows = np.sort(stored_rows(store.reader.root))
        self.token_id = token_id
        self.sequence = np.full(len(token_id), -1)
        self.position = np.full(len(token_id), -1)
        self.document = np.full(len(token_id), -1)
        for plan in store.reader.plans:
            table = plan.sequences()
            for number, (first, length, document) in enumerate(
                zip(table["first_token"], table["length"], table["document"], strict=True)
            ):
                self.sequence[first : first + length] = number
                self.position[first : first + length] = np.arange(length)
                self.document[first : first + length] = document
        self.special = (self.position == 0) | (token_id == SPECIAL_TOKEN)

    def rank(
        self,
        coefficients: npt.NDArray[np.float64],
        *,
        k: int,
        allowed: npt.NDArray[np.bool_],
        pairs: npt.NDArray[np.bool_],
        largest: bool,
        by: str,
        distinct: str | None,
        values: npt.NDArray[np.float32] | None = None,
    ) -> list[tuple[int, int, int, float]]:
        raw = self.raw if values is None else values
        with np.errstate(invalid="ignore", over="ignore"):
            value = (raw.astype(np.float64) * coefficients[:, None, :]).astype(np.float32)
        keep = ~np.isnan(value) & pairs[:, None, :]
        keep[:, ~allowed, :] = False
        layer, token, unit = np.nonzero(keep)
        found = value[layer, token, unit] + np.float32(0)
        score = np.abs(found) if by == "magnitude" else (found if largest else -found)
        order = np.lexsort((unit, token, layer, -score))
        answer = []
        seen: set[int] = set()
        for index in order:
            if distinct is not None:
                label = (self.sequence if distinct == "sequence" else self.document)[token[index]]
                if int(label) in seen:
                    continue
                seen.add(int(label))
            answer.append(
                (int(layer[index]), int(token[index]), int(unit[index]), float(found[index]))
            )
            if len(answer) == k:
                break
        return answer


queries = st.fixed_dictionaries(
    {
        "k": st.sampled_from([1, 3, 8, 20, 100, 2000]),
        "layers": st.sampled_from([None, 0, [1], [0, 1]]),
        "neurons": st.none()
        | st.lists(st.integers(0, 13), min_size=1, max_size=4, unique=True)
        | st.lists(st.integers(0, NEURONS - 1), min_size=1, max_size=6, unique=True),
        "largest": st.booleans(),
        "special": st.booleans(),
        "distinct": st.sampled_from([None, None, "sequence", "document"]),
        "by": st.sampled_from(["value", "value", "value", "magnitude"]),
        "where": st.sampled_from(
            [
                None,
                None,
                "position > 20",
                "score = 3",
                "score < 2 and position % 7 = 1",
                "token = 5",
                "false",
            ]
        ),
        "units": st.sampled_from([None, None, [(0, 3), (1, 4), (1, 9)], [(1, 2)]]),
    }
)


def allowed_rows(truth: Truth, where: str | None, special: bool) -> npt.NDArray[np.bool_]:
    allowed = np.zeros(len(truth.token_id), bool)
    allowed[truth.rows] = True
    score = truth.document % 5
    predicate = {
        None: np.ones(len(allowed), bool),
        "position > 20": truth.position > 20,
        "score = 3": score == 3,
        "score < 2 and position % 7 = 1": (score < 2) & (truth.position % 7 == 1),
        "token = 5": np.arange(len(allowed)) == 5,
        "false": np.zeros(len(allowed), bool),
    }[where]
    allowed &= predicate
    return allowed if special else allowed & ~truth.special


def pair_mask(query: dict[str, Any], units: int = NEURONS) -> npt.NDArray[np.bool_]:
    layers = query["layers"]
    wanted = [0, 1] if layers is None else [layers] if isinstance(layers, int) else layers
    mask = np.zeros((LAYERS, units), bool)
    mask[wanted] = True
    if query["neurons"] is not None:
        chosen = np.zeros(units, bool)
        chosen[query["neurons"]] = True
        mask &= chosen
    if query["units"] is not None:
        pairs = np.zeros((LAYERS, units), bool)
        for layer, unit in query["units"]:
            pairs[layer, unit] = True
        mask &= pairs
    return mask


def got(result: Any) -> list[tuple[int, int, int, float]]:
    return [
        (row["layer"], row["token"], row["neuron"], row["value"] + 0.0) for row in result.rows()
    ]


@settings(deadline=None, max_examples=250)
@given(
    query=queries,
    which=st.sampled_from(["float16", "float32", "partly indexed"]),
    scalar=st.sampled_from(["mlp_post_act", "mlp_write_norm", "signed"]),
)
def test_topk_equals_brute_force(
    stores: dict[str, tuple[Store, Truth]], query: dict[str, Any], which: str, scalar: str
) -> None:
    store, truth = stores[which]
    if query["by"] == "magnitude":
        query["largest"] = True
    name = "mlp_write_norm" if scalar == "signed" else scalar
    with pytest.MonkeyPatch.context() as patch:
        if scalar == "mlp_post_act":
            coefficients = np.ones((LAYERS, NEURONS))
        elif scalar == "mlp_write_norm":
            from actstore.query.derived import scalar as declared

            coefficients = np.stack(
                [store.coefficients(declared(name), layer) for layer in range(LAYERS)]
            )
            assert coefficients.std() > 0
        else:
            # No declared coefficient is negative or zero yet; the search must not care.
            rng = np.random.default_rng(5)
            coefficients = rng.choice([-1.5, -1.0, 0.0, 0.0, 1.0, 3.25e-7], (LAYERS, NEURONS))
            patch.setattr(Store, "coefficients", lambda _, __, layer: coefficients[layer])
        result = store.topk(name, **query)
    expected = truth.rank(
        coefficients,
        k=query["k"],
        allowed=allowed_rows(truth, query["where"], query["special"]),
        pairs=pair_mask(query),
        largest=query["largest"],
        by=query["by"],
        distinct=query["distinct"],
    )
    assert got(result) == expected
    certificate = result.certificate
    # Where more answers are asked for than there are pages, a scan costs less than a search.
    plans = ("lists", "lists+bounds", "bounds", "rows", *(["scan"] if query["k"] >= 128 else []))
    assert certificate.plan in plans
    assert certificate.rows == allowed_rows(truth, query["where"], query["special"]).sum()
    assert certificate.rows + sum(certificate.rows_excluded.values()) == len(truth.rows)


@settings(deadline=None, max_examples=40)
@given(query=queries)
def test_a_scan_equals_brute_force(
    stores: dict[str, tuple[Store, Truth]], query: dict[str, Any]
) -> None:
    store, truth = stores["float32"]
    query = {**query, "by": "value", "units": None, "neurons": None}
    arguments = {key: value for key, value in query.items() if key not in ("units", "neurons")}
    result = store.topk("resid_post_mlp", channels=[0, 3, 5], **arguments)
    expected = truth.rank(
        np.ones((LAYERS, 8)),
        k=query["k"],
        allowed=allowed_rows(truth, query["where"], query["special"]),
        pairs=pair_mask({**query, "neurons": [0, 3, 5]}, 8),
        largest=query["largest"],
        by="value",
        distinct=query["distinct"],
        values=truth.resid,
    )
    found = [(r["layer"], r["token"], r["channel"], r["value"] + 0.0) for r in result.rows()]
    assert found == expected
    assert result.certificate.plan == "scan"


@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_per_group_answers_are_each_groups_own(
    stores: dict[str, tuple[Store, Truth]], per: str
) -> None:
    store, truth = stores["float16"]
    result = got(store.topk("mlp_post_act", k=3, per=per, neurons=range(12)))
    expected = []
    for layer in range(LAYERS):
        for units in [list(range(12))] if per == "layer" else [[n] for n in range(12)]:
            expected += truth.rank(
                np.ones((LAYERS, NEURONS)),
                k=3,
                allowed=allowed_rows(truth, None, False),
                pairs=pair_mask({"layers": layer, "neurons": units, "units": None}),
                largest=True,
                by="value",
                distinct=None,
            )
    assert result == expected


def test_many_groups_are_answered_by_one_scan(stores: dict[str, tuple[Store, Truth]]) -> None:
    store, truth = stores["float16"]
    # Deeper than any list is proven, and more groups than are searched one by one.
    result = store.topk("mlp_post_act", k=200, per="neuron")
    assert result.certificate.plan == "scan"
    expected = []
    for layer in range(LAYERS):
        for neuron in range(NEURONS):
            expected += truth.rank(
                np.ones((LAYERS, NEURONS)),
                k=200,
                allowed=allowed_rows(truth, None, False),
                pairs=pair_mask({"layers": layer, "neurons": [neuron], "units": None}),
                largest=True,
                by="value",
                distinct=None,
            )
    assert got(result) == expected


def test_a_selective_predicate_reads_the_rows(stores: dict[str, tuple[Store, Truth]]) -> None:
    store, truth = stores["float32"]
    result = store.topk("mlp_post_act", k=500, where="score = 3 AND position = 7")
    assert result.certificate.plan == "rows"
    assert result.certificate.pages_read == 0
    allowed = allowed_rows(truth, "score = 3", False) & (truth.position == 7)
    expected = truth.rank(
        np.ones((LAYERS, NEURONS)),
        k=500,
        allowed=allowed,
        pairs=np.ones((LAYERS, NEURONS), bool),
        largest=True,
        by="value",
        distinct=None,
    )
    assert got(result) == expected


def test_before_the_first_commit_there_is_no_answer(tmp_path: Path) -> None:
    path = build_store(tmp_path / "store", {"mlp_post_act": np.zeros((1, 90, 4))}, [90], commit=[])
    with Store(path) as store:
        with pytest.raises(Unavailable, match="no committed segment"):
            store.topk("mlp_post_act")
        with pytest.raises(Unavailable, match="no committed segment"):
            store.examples("mlp_post_act", (0, 1))


@pytest.mark.parametrize("k", [5, 20, 1000])
def test_quantiles_of_few_rows_are_all_of_them(
    stores: dict[str, tuple[Store, Truth]], k: int
) -> None:
    store, _ = stores["float16"]
    rows = store.sql("SELECT token FROM tokens WHERE NOT special LIMIT 7").fetchall()
    where = f"token IN ({', '.join(str(row[0]) for row in rows)})"
    found = store.examples("mlp_post_act", (0, 0), k=k, kind="quantile", distinct=None, where=where)
    assert len(found) == min(k, 7)
    shares = [example.quantile for example in found]
    assert shares == sorted(shares, key=lambda share: -(share or 0))
    assert (shares[0] or 0) > 0.8
    assert (shares[-1] or 1) < 0.2


def test_rows_carry_their_place_and_text(stores: dict[str, tuple[Store, Truth]]) -> None:
    store, truth = stores["float32"]
    result = store.topk("mlp_write_norm", k=30)
    for row in result.rows():
        assert row["sequence"] == truth.sequence[row["token"]]
        assert row["position"] == truth.position[row["token"]]
        assert row["text"] == store.texts([truth.token_id[row["token"]]])[0]
    assert result.to_arrow().num_rows == len(result.df()) == len(result.pl()) == 30


def test_text_is_read_when_it_is_looked_at(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1, 600, 4))
    path = build_store(tmp_path / "store", {"mlp_post_act": values}, [100] * 6)
    with Store(path) as store:
        sound = store.topk("mlp_post_act", k=5)
        tokenizer = path / "model" / "tokenizer.json"
        tokenizer.write_bytes(tokenizer.read_bytes().replace(b"BPE", b"BPF"))
        found = store.topk("mlp_post_act", k=5)
        assert found.column("value") == sound.column("value")
        for look in (found.rows, found.to_arrow, lambda: found.column("text")):
            with pytest.raises(StoreDamaged, match=r"tokenizer\.json"):
                look()
    with pytest.raises(StoreDamaged):
        sound.rows()


def test_an_answer_outlives_its_store_and_survives_pickling(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1, 600, 4))
    path = build_store(tmp_path / "store", {"mlp_post_act": values}, [100] * 6)
    with Store(path) as store:
        expected = store.topk("mlp_post_act", k=5).rows()
        found = store.topk("mlp_post_act", k=5)
    assert found.rows() == expected
    assert all(row["text"] for row in expected)
    copy = pickle.loads(pickle.dumps(found))
    assert copy.rows() == expected
    assert copy.certificate == found.certificate


def test_units_by_sql_equal_units_by_pairs(stores: dict[str, tuple[Store, Truth]]) -> None:
    store, _ = stores["float16"]
    pairs = [
        (row[0], row[1])
        for row in store.sql("SELECT layer, neuron FROM neurons WHERE write_norm > 3").fetchall()
    ]
    assert 0 < len(pairs) < LAYERS * NEURONS
    by_sql = store.topk("mlp_write_norm", k=15, units="write_norm > 3")
    assert got(by_sql) == got(store.topk("mlp_write_norm", k=15, units=pairs))


@settings(deadline=None, max_examples=60)
@given(
    unit=st.tuples(st.integers(0, LAYERS - 1), st.integers(0, 12)),
    kind=st.sampled_from(["top", "bottom"]),
    k=st.sampled_from([1, 4, 50]),
    distinct=st.sampled_from([None, "sequence"]),
    special=st.booleans(),
)
def test_ranked_examples_equal_brute_force(
    stores: dict[str, tuple[Store, Truth]],
    unit: tuple[int, int],
    kind: str,
    k: int,
    distinct: str | None,
    special: bool,
) -> None:
    store, truth = stores["float16"]
    found = store.examples(
        "mlp_post_act", unit, k=k, kind=kind, distinct=distinct, special=special, window=(3, 2)
    )
    expected = truth.rank(
        np.ones((LAYERS, NEURONS)),
        k=k,
        allowed=allowed_rows(truth, None, special),
        pairs=pair_mask({"layers": unit[0], "neurons": [unit[1]], "units": None}),
        largest=kind == "top",
        by="value",
        distinct=distinct,
    )
    assert [(e.token, e.value + 0.0) for e in found] == [(t, v) for _, t, _, v in expected]
    for example in found:
        inside = np.arange(example.first_token, example.first_token + len(example.values))
        assert (truth.sequence[inside] == example.sequence).all()
        np.testing.assert_array_equal(
            np.array(example.values, np.float32), truth.raw[unit[0], inside, unit[1]]
        )
        assert inside[example.focus] == example.token
        assert example.focus == min(3, example.position)


def test_random_and_quantile_examples(stores: dict[str, tuple[Store, Truth]]) -> None:
    store, truth = stores["float32"]
    allowed = np.flatnonzero(allowed_rows(truth, None, False))
    column = truth.raw[0, :, 0]
    drawn = store.examples("mlp_post_act", (0, 0), k=12, kind="random", seed=4)
    again = store.examples("mlp_post_act", (0, 0), k=12, kind="random", seed=4)
    other = store.examples("mlp_post_act", (0, 0), k=12, kind="random", seed=5)
    tokens = [example.token for example in drawn]
    assert tokens == [example.token for example in again]
    assert tokens != [example.token for example in other]
    assert set(tokens) <= set(allowed.tolist())
    assert len({example.sequence for example in drawn}) == len(drawn) == 12

    ranked = sorted(allowed.tolist(), key=lambda token: (-column[token], token))
    spread = store.examples("mlp_post_act", (0, 0), k=4, kind="quantile", distinct=None)
    places = [ranked.index(example.token) for example in spread]
    assert places == [(2 * i + 1) * len(ranked) // 8 for i in range(4)]
    for example, place in zip(spread, places, strict=True):
        assert example.quantile == pytest.approx(1 - (place + 0.5) / len(ranked))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"k": 0}, InvalidInput, "k is 0"),
        ({"layers": 2}, InvalidInput, "0 to 1"),
        ({"layers": [-1]}, InvalidInput, "layers names -1"),
        ({"neurons": 40}, InvalidInput, "0 to 39"),
        ({"heads": 1}, InvalidInput, "chosen by: neurons"),
        ({"per": "head"}, InvalidInput, "layer, token, neuron"),
        ({"by": "size"}, InvalidInput, "value or magnitude"),
        ({"distinct": "token"}, InvalidInput, "sequence or document"),
        ({"where": "nonsense > 2"}, InvalidInput, "nonsense"),
        ({"where": "1; DROP TABLE tokens"}, InvalidInput, "DROP TABLE"),
        ({"units": "nonsense"}, InvalidInput, "nonsense"),
        ({"units": [3, 4]}, InvalidInput, "units holds 3"),
        ({"k": 2.5}, InvalidInput, "k is 2.5"),
        ({"where": 5}, InvalidInput, "where is 5"),
        ({"layers": 1.0}, InvalidInput, "layers names 1.0"),
        ({"by": "magnitude", "largest": False}, InvalidInput, "magnitude"),
    ],
)
def test_bad_questions_are_refused(
    stores: dict[str, tuple[Store, Truth]],
    arguments: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    store, _ = stores["float16"]
    with pytest.raises(error, match=words):
        store.topk("mlp_post_act", **arguments)


def test_an_unknown_scalar_names_close_ones(stores: dict[str, tuple[Store, Truth]]) -> None:
    with pytest.raises(InvalidInput, match="mlp_write_norm"):
        stores["float16"][0].topk("mlp_write_nrom")


def test_a_scan_over_budget_is_refused(stores: dict[str, tuple[Store, Truth]]) -> None:
    with pytest.raises(InvalidInput, match="max_cells=100"):
        stores["float16"][0].topk("resid_post_mlp", max_cells=100)


def test_a_flipped_bit_of_a_zone_map_never_prunes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = build_store(
        tmp_path / "store", {"mlp_post_act": hard_values(rng, 900)}, [90] * 10, segment_rows=SEGMENT
    )
    zone = path / "zones/mlp_post_act/forward/000001.sections"
    content = zone.read_bytes()
    for place in range(100, len(content), len(content) // 23):
        flipped = bytearray(content)
        flipped[place] ^= 1
        zone.write_bytes(flipped)
        store = Store(path)
        try:
            answer = got(store.topk("mlp_post_act", k=50, neurons=[9, 0]))
        except StoreDamaged:
            continue
        finally:
            store.close()
        # A flip in a part that the question does not need must not change the answer.
        zone.write_bytes(content)
        with Store(path) as sound:
            assert answer == got(sound.topk("mlp_post_act", k=50, neurons=[9, 0]))
