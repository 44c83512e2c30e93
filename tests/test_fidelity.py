"""What is stored is what the model computes, at the row that it belongs to.

The reference is a forward pass of its own: in float64 from the weights, one sequence at a
time and without padding, hooks or batches; and the stock model of transformers where it
shows its insides. The corpus is shuffled and ragged, and is read again here by hand.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pyarrow import parquet
from tiny_gpt2 import LOCATIONS
from tiny_ingest import CORPUS, SEGMENT_ROWS, tiny_model, tiny_settings, tiny_tokenizer

import actstore
from actstore.ingest.model import LoadedModel
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.ingest.reference import independent_forward
from actstore.ingest.report import IngestReport
from actstore.query.session import Store
from actstore.store.plan import SegmentPlan
from actstore.store.selfcheck import read_selfchecks
from actstore.store.vocabulary import ActivationLocationType

L = ActivationLocationType
CONTEXT = 32
SEED = 3
PAIRS = ("attn_qk_logits", "attn_qk_probs")


@pytest.fixture(autouse=True, scope="module")
def _without_fsync() -> Iterator[None]:
    """What is durable is tested elsewhere; waiting for the disk is most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@dataclass(frozen=True)
class Ingested:
    """A store of the shuffled corpus, and the model it was made with."""

    loaded: LoadedModel
    path: Path
    store: Store
    report: IngestReport

    def segments(self) -> Iterator[SegmentPlan]:
        """Every committed segment."""
        for number in self.store.reader.segments:
            yield self.store.reader.segment(number)

    def values(self, location: L, layer: int, segment: SegmentPlan) -> npt.NDArray[np.float32]:
        """A segment's stored values, float32 ``(row, *unit)``."""
        array = self.store.reader.array(location)
        stored = array.reader.window(segment.number, layer, 0, segment.n_rows)
        return array.spec.dtype.to_float32(stored).reshape(len(stored), *array.spec.unit_shape)


def ingested(folder: Path, run: torch.dtype = torch.float32, **choices: Any) -> Ingested:
    loaded = tiny_model(dtype=run)
    settings = tiny_settings(shuffle=SEED, **{"locations": ("full", *PAIRS), **choices})
    report = ingest(loaded, Corpus(str(CORPUS)), folder / "store", settings)
    return Ingested(loaded, folder / "store", actstore.open(folder / "store"), report)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    found = ingested(tmp_path_factory.mktemp("float32"), dtype="float32")
    yield found
    found.store.close()


@pytest.fixture(scope="module")
def float16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    found = ingested(tmp_path_factory.mktemp("float16"))
    yield found
    found.store.close()


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    folder = tmp_path_factory.mktemp("bfloat16")
    # No pairs: with them attention runs step by step, and the stock model's would be fused.
    found = ingested(folder, torch.bfloat16, locations="full")
    yield found
    found.store.close()


Reference = dict[tuple[int, L, int], npt.NDArray[np.float64]]


@pytest.fixture(scope="module")
def reference(float32: Ingested) -> Reference:
    """(segment, location, layer) -> float64 ``(row, *unit)``, from single sequences."""
    found: Reference = {}
    for segment in float32.segments():
        for index in range(segment.n_sequences):
            ids = torch.tensor(segment.sequence_token_ids(index), dtype=torch.int64)
            start = int(segment.first_token[index]) - segment.first_row
            for location, layers in independent_forward(float32.loaded, ids[None]).items():
                for layer, tensor in enumerate(layers):
                    values = tensor[0].numpy()
                    if location.is_pair_shaped:
                        padded = np.full((*values.shape[:-1], CONTEXT), np.nan)
                        padded[..., : len(ids)] = values
                        values = padded
                    key = segment.number, location, layer
                    if key not in found:
                        found[key] = np.full((segment.n_rows, *values.shape[1:]), np.inf)
                    found[key][start : start + len(ids)] = values
    return found


def stored_locations(found: Ingested) -> list[L]:
    return [location for location, _ in found.store.reader.arrays]


def row_scale(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest finite magnitude of every row, with axes to divide by."""
    finite = np.where(np.isfinite(values), np.abs(values), 0)
    scale: npt.NDArray[np.float64] = finite.max(axis=tuple(range(1, values.ndim)), keepdims=True)
    return scale


def test_every_location_with_a_token_axis_is_compared(float32: Ingested) -> None:
    assert stored_locations(float32) == [place for place in LOCATIONS if place is not L.LOGITS]
    assert len(float32.store.reader.segments) > 4
    assert float32.report.missing == 0


@pytest.mark.parametrize(
    "location", [place for place in LOCATIONS if place is not L.LOGITS], ids=str
)
def test_float32_equals_an_independent_forward_pass(
    float32: Ingested, reference: Reference, location: L
) -> None:
    worst = 0.0
    for segment in float32.segments():
        for layer in range(float32.store.reader.array(location).spec.layer_count):
            expected = reference[segment.number, location, layer]
            found = float32.values(location, layer, segment)
            special = ~np.isfinite(expected)
            np.testing.assert_array_equal(found[special], expected[special].astype(np.float32))
            error = np.abs(np.where(special, 0, found - np.where(special, 0, expected)))
            worst = max(worst, float((error / row_scale(expected)).max()))
    assert worst <= 1e-5, f"{location} differs by {worst:.2g} of a row's largest magnitude."


@pytest.mark.parametrize(
    "location", [place for place in LOCATIONS if place is not L.LOGITS], ids=str
)
def test_float16_is_the_float32_value_rounded_once(
    float16: Ingested, float32: Ingested, reference: Reference, location: L
) -> None:
    array = float16.store.reader.array(location)
    assert array.spec.dtype == "float16"
    for segment in float16.segments():
        for layer in range(array.spec.layer_count):
            found = float16.values(location, layer, segment)
            exact = float32.values(location, layer, segment)
            np.testing.assert_array_equal(found, exact.astype(np.float16).astype(np.float32))
            expected = reference[segment.number, location, layer]
            finite = np.isfinite(expected)
            # Half a unit in the last of 11 bits, or half the step of subnormal numbers.
            magnitude = np.abs(np.where(finite, expected, 0))
            rounding = np.maximum(magnitude * 2.0**-11, 2.0**-25)
            bound = np.broadcast_to(1e-5 * row_scale(expected), expected.shape) + rounding
            assert (np.abs(found[finite] - expected[finite]) <= bound[finite]).all()


def test_bfloat16_model_is_stored_bit_by_bit(bfloat16: Ingested) -> None:
    """Against the stock model on the batches of the plan; later layers rest on earlier ones."""
    assert {array.spec.dtype for array in bfloat16.store.reader.arrays.values()} == {"bfloat16"}
    model = bfloat16.loaded.model
    compared = 0
    for segment in bfloat16.segments():
        for batch in segment.batches:
            ids = torch.zeros(len(batch.members), batch.padded_length, dtype=torch.int64)
            for row, member in enumerate(batch.members):
                tokens = segment.sequence_token_ids(int(member))
                ids[row, : len(tokens)] = torch.from_numpy(tokens.copy())
            with torch.inference_mode():
                hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for row, member in enumerate(batch.members):
                start = int(segment.first_token[member]) - segment.first_row
                length = int(segment.length[member])
                for location, layer, state in (
                    (L.RESID_POST_EMBEDDING, 0, hidden[0]),
                    (L.RESID_POST_MLP, 0, hidden[1]),
                ):
                    bits = bfloat16.store.reader.array(location).reader.window(
                        segment.number, layer, start, start + length
                    )
                    expected = state[row, :length].view(torch.uint16).numpy()
                    np.testing.assert_array_equal(bits, expected)
                    compared += bits.size
    assert compared == 2 * 16 * bfloat16.report.stored


def test_residuals_and_patterns_equal_those_of_stock_transformers(float32: Ingested) -> None:
    model = copy.deepcopy(float32.loaded.model)
    model.set_attn_implementation("eager")
    norm = model.get_submodule("transformer.ln_f")
    for segment in float32.segments():
        for index in range(0, segment.n_sequences, 5):
            ids = torch.tensor(segment.sequence_token_ids(index)[None], dtype=torch.int64)
            start = int(segment.first_token[index]) - segment.first_row
            rows = slice(start, start + ids.shape[1])
            with torch.inference_mode():
                seen = model(ids, output_hidden_states=True, output_attentions=True)
                last = float32.values(L.RESID_POST_MLP, 1, segment)[rows]
                normed = norm(torch.from_numpy(last.copy()))
            for expected, found in (
                (seen.hidden_states[0], float32.values(L.RESID_POST_EMBEDDING, 0, segment)[rows]),
                (seen.hidden_states[1], float32.values(L.RESID_POST_MLP, 0, segment)[rows]),
                (seen.hidden_states[2], normed.numpy()),
            ):
                scale = row_scale(expected[0].double().numpy())
                assert (np.abs(found - expected[0].numpy()) <= 1e-5 * scale).all()
            for layer in range(2):
                pattern = float32.values(L.ATTN_QK_PROBS, layer, segment)[rows]
                # Stored as (token, head, attended); transformers gives (head, token, attended).
                stock = seen.attentions[layer][0].transpose(0, 1).numpy()
                np.testing.assert_allclose(pattern[..., : ids.shape[1]], stock, atol=1e-6)
                assert np.isnan(pattern[..., ids.shape[1] :]).all()


def test_selfcheck_measures_what_is_there(float32: Ingested, float16: Ingested) -> None:
    """The error that a store says of itself: real, kept, and no larger than its dtype's."""
    exact, rounded = (read_selfchecks(found.store.reader.blobs) for found in (float32, float16))
    assert exact == {f"{at}/forward": error for at, error in float32.report.errors.items()}
    assert set(exact) == {f"{place}/forward" for place in stored_locations(float32)}
    assert max(exact.values()) <= 1e-5
    assert 2.0**-13 <= max(rounded.values()) <= 2.0**-10


# Rows


@dataclass(frozen=True)
class Text:
    """A document of the corpus, read by hand.

    Attributes:
        source: its name, from the corpus' folder on.
        stream: its token ids with the BOS before them.
        columns: what its record says besides the text.
    """

    source: str
    stream: list[int]
    columns: dict[str, Any]


def read_corpus() -> list[Text]:
    """The documents in order, without empty ones."""
    tokenizer = tiny_tokenizer()
    texts: list[tuple[str, str, dict[str, Any]]] = []
    for path in sorted(CORPUS.iterdir()):
        if path.suffix != ".jsonl":
            texts.append((path.name, path.read_text(encoding="utf-8"), {}))
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(line)
            texts.append((f"{path.name}:{number}", record.pop("text"), record))
    return [
        Text(source, [0, *tokenizer.encode(text, add_special_tokens=False)], columns)
        for source, text, columns in texts
        if text
    ]


def test_corpus_is_ragged() -> None:
    lengths = [len(text.stream) for text in read_corpus()]
    assert min(lengths) == 2
    assert max(lengths) > 5 * CONTEXT
    assert sum(lengths) > 4 * SEGMENT_ROWS


def test_shuffled_rows_map_to_their_own_tokens(float32: Ingested) -> None:
    """Every row's sequence, document, position and token id, through the SQL tables."""
    texts = read_corpus()
    store = float32.store
    documents = store.sql(
        "SELECT document, source, n_tokens, topic, rank FROM documents ORDER BY document"
    ).fetchall()
    assert documents == [
        (
            number,
            text.source,
            len(text.stream),
            text.columns.get("topic"),
            text.columns.get("rank"),
        )
        for number, text in enumerate(texts)
    ]
    pieces = {
        (number, start): text.stream[start : start + CONTEXT]
        for number, text in enumerate(texts)
        for start in range(0, len(text.stream), CONTEXT)
    }
    starts = {
        int(sequence): int(start)
        for plan in store.reader.plans
        for sequence, start in zip(
            plan.sequences()["sequence"], plan.sequences()["start"], strict=True
        )
    }
    rows = store.sql(
        "SELECT sequence, document, position, token, token_id, special FROM tokens "
        "ORDER BY sequence, position"
    ).fetchall()
    found: dict[tuple[int, int], list[int]] = {}
    first_rows: dict[int, int] = {}
    for sequence, document, position, token, token_id, special in rows:
        first_rows.setdefault(sequence, token)
        assert token == first_rows[sequence] + position, "A sequence's rows follow one another."
        found.setdefault((document, starts[sequence]), []).append(token_id)
        assert special == (position == 0 or token_id == 0)
    assert found == pieces
    assert len(first_rows) == len(pieces)
    in_order = [key for key, _ in sorted(found.items(), key=lambda item: item[0])]
    assert list(found) != in_order, "The test means to see a shuffled corpus."


def test_every_form_of_the_rows_says_the_same(float32: Ingested) -> None:
    """Plan, parts, ``token_id`` and SQL: four ways to learn what a row is."""
    import zarr

    token_ids = np.asarray(zarr.open_array(float32.path / "arrays" / "token_id", mode="r")[:])
    table = float32.store.sql(
        "SELECT token, sequence, position, token_id, special, document FROM tokens ORDER BY token"
    ).fetchall()
    parts = [
        tuple(row.values())
        for path in sorted(float32.path.glob("catalog/parts/*.parquet"))
        for row in parquet.read_table(path).to_pylist()
    ]
    assert table == parts
    assert {row[0]: row[3] for row in table} == {
        int(token): int(token_ids[token]) for token in np.flatnonzero(token_ids >= 0)
    }
    for segment in float32.segments():
        planned = np.concatenate(
            [segment.sequence_token_ids(index) for index in range(segment.n_sequences)]
        )
        first = segment.first_row
        np.testing.assert_array_equal(token_ids[first : first + segment.n_rows], planned)


def test_shuffle_moves_rows_and_no_values(float32: Ingested, tmp_path: Path) -> None:
    """The same sequences in the corpus' order: the same activations at other rows."""
    settings = tiny_settings(locations=("mlp_post_act",), dtype="float32", batch_tokens=1)
    ingest(float32.loaded, Corpus(str(CORPUS)), tmp_path / "ordered", settings)
    with actstore.open(tmp_path / "ordered") as ordered:
        places = [
            {
                (document, start): (first, length)
                for plan in store.reader.plans
                for sequences in [plan.sequences()]
                for document, start, first, length in zip(
                    *(sequences[name].tolist() for name in COLUMNS), strict=True
                )
            }
            for store in (ordered, float32.store)
        ]
        assert places[0].keys() == places[1].keys()
        assert places[0] != places[1]
        for key, (first, length) in places[0].items():
            there = places[1][key][0]
            here = ordered.raw("mlp_post_act", tokens=range(first, first + length)).numpy()
            other = float32.store.raw("mlp_post_act", tokens=range(there, there + length)).numpy()
            # Batches differ, and float32 sums with them.
            np.testing.assert_allclose(here, other, rtol=0, atol=1e-5 * np.abs(other).max())


COLUMNS = ("document", "start", "first_token", "length")
