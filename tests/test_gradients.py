"""Gradients of a corpus: stored as autograd gives them, in sets of their own, after any kill."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ingest_server import Incident, IngestServer
from tiny_gpt2 import LOCATIONS, tiny_gpt2
from tiny_ingest import (
    CORPUS,
    differences,
    file_bytes,
    ingest_corpus,
    snapshot_rows,
    tiny_model,
    tiny_settings,
)
from typer.testing import CliRunner

import actstore
from actstore.cli import app
from actstore.ingest.gradients import GradientCapture, gradient_parts
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import Columns, LogitDiff, NextTokenLogProb, Objective
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.ingest.preview import preview
from actstore.ingest.settings import DEFAULT_GRADIENTS
from actstore.store.errors import ErrorKind, IngestStopped, InvalidInput, StoreConflict, Unavailable
from actstore.store.index import open_unit_index
from actstore.store.keys import key_values
from actstore.store.reader import StoredArray, StoreReader
from actstore.store.verification import verify_store
from actstore.store.vocabulary import ActivationLocationType, PassType

L = ActivationLocationType
BACKWARD = PassType.BACKWARD
LIMIT = 900
NAME = "next_token_log_prob"
DIFF = "logit_diff(5, [40, 41])"
EVERY = tuple(location.label for location in LOCATIONS if not location.is_pair_shaped)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients of the default objective from the first ingest on."""
    return ingest_corpus(tmp_path_factory.mktemp("base") / "s", objective=NAME, limit_tokens=LIMIT)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without gradients."""
    return ingest_corpus(tmp_path_factory.mktemp("plain") / "s", limit_tokens=LIMIT)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """Two objectives, each added as a set of its own."""
    store = shutil.copytree(plain, tmp_path_factory.mktemp("two") / "s")
    for name, objective in (("b-first", DIFF), ("a-second", NAME)):
        run(store, None, set_name=name, objective=objective)
    return store


def run(out: Path, source: Any, *, loaded: LoadedModel | None = None, **choices: Any) -> Any:
    return ingest(loaded or tiny_model(), Corpus(source), out, tiny_settings(**choices))


def rows_of(array: StoredArray, reader: StoreReader, number: int) -> npt.NDArray[np.float64]:
    """Values of one sequence, ``(layer, token, unit)``."""
    for segment in (reader.segment(n) for n in reader.segments):
        index = number - segment.first_sequence
        if 0 <= index < segment.n_sequences:
            start = int(segment.first_token[index]) - segment.first_row
            stop = start + int(segment.length[index])
            windows = [
                array.reader.window(segment.number, layer, start, stop)
                for layer in range(array.spec.layer_count)
            ]
            return np.stack(windows).astype(np.float64).reshape(len(windows), stop - start, -1)
    raise AssertionError(number)


def sequences(reader: StoreReader) -> Iterator[list[int]]:
    for segment in (reader.segment(n) for n in reader.segments):
        for index in range(segment.n_sequences):
            yield segment.sequence_token_ids(index).tolist()


# Values

Gradients = dict[L, npt.NDArray[np.float64]]


class Oracle:
    """transformers' own eager model in float64, one sequence at a time, and autograd."""

    def __init__(self) -> None:
        self.model = tiny_gpt2(vocab_size=tiny_model().dimensions.vocabulary_size).double()
        self.model.set_attn_implementation("eager")
        self._kept: dict[L, list[torch.Tensor]] = {}
        transformer: Any = self.model.transformer
        transformer.drop.register_forward_hook(self._after(L.RESID_POST_EMBEDDING))
        for block in transformer.h:
            block.attn.c_proj.register_forward_pre_hook(self._before(L.ATTN_WEIGHTED_SUM_OF_VALUES))
            block.ln_2.register_forward_pre_hook(self._before(L.RESID_POST_ATTN))
            block.mlp.c_proj.register_forward_pre_hook(self._before(L.MLP_POST_ACT))
            block.register_forward_hook(self._after(L.RESID_POST_MLP))

    def _keep(self, location: L, tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        self._kept.setdefault(location, []).append(tensor)

    def _after(self, location: L) -> Callable[..., None]:
        return lambda _, __, output: self._keep(location, output)

    def _before(self, location: L) -> Callable[..., None]:
        return lambda _, inputs: self._keep(location, inputs[0])

    def gradients(
        self, ids: list[int], objective: Callable[[torch.Tensor], torch.Tensor]
    ) -> Gradients:
        """Location -> ``(layer, token, unit)`` of an objective of ``(token, vocabulary)``."""
        self._kept.clear()
        torch.autograd.backward(
            objective(self.model(torch.tensor([ids]), use_cache=False).logits[0])
        )
        found = {}
        for location, tensors in self._kept.items():
            gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
            assert len(gradients) == len(tensors)
            found[location] = torch.stack(gradients).reshape(len(tensors), len(ids), -1).numpy()
        return found


def log_probability(ids: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    following = torch.tensor(ids[1:], dtype=torch.int64)
    return lambda logits: (
        -torch.nn.functional.cross_entropy(logits[:-1], following, reduction="sum")
    )


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[-1, 5] - (logits[-1, 40] + logits[-1, 41]) / 2


def require_close(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> None:
    """Within 1e-5 of a row's largest; rows that cancel, within that of a thousandth of all."""
    largest = np.abs(expected).max(-1, keepdims=True)
    scale = np.maximum(largest, 1e-3 * largest.max())
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= 1e-5 * scale).all()


def test_stored_gradients_are_those_of_an_independent_autograd(base: Path) -> None:
    oracle, reader = Oracle(), StoreReader(base)
    lengths = set()
    for number, ids in enumerate(sequences(reader)):
        lengths.add(len(ids))
        expected = oracle.gradients(ids, log_probability(ids))
        assert expected.keys() == set(DEFAULT_GRADIENTS)
        for location in DEFAULT_GRADIENTS:
            found = rows_of(reader.array(location, BACKWARD), reader, number)
            require_close(found, expected[location])
            assert not found[:, -1].any(), "nothing is predicted after the last token"
    assert len(lengths) > 3, "The test means ragged batches."


def test_the_last_position_is_that_of_each_sequence(two: Path) -> None:
    oracle, reader = Oracle(), StoreReader(two)
    for number, ids in enumerate(sequences(reader)):
        expected = oracle.gradients(ids, difference)
        for location in DEFAULT_GRADIENTS:
            found = rows_of(reader.array_of("b-first", location), reader, number)
            require_close(found, expected[location])
        last = rows_of(reader.array_of("b-first", L.RESID_POST_MLP), reader, number)[-1]
        assert last[-1].any()
        assert not last[:-1].any()


def test_every_location_is_measured_by_the_selfcheck(tmp_path: Path) -> None:
    report = run(
        tmp_path / "s",
        str(CORPUS),
        objective=NAME,
        gradients=EVERY,
        locations="minimal",
        limit_tokens=LIMIT,
    )
    errors = {name: error for name, error in report.errors.items() if name.endswith("/backward")}
    assert errors.keys() == {f"{name}/backward" for name in EVERY}
    assert all(0 < error < 1e-3 for error in errors.values()), errors
    assert report.objective == NAME
    with actstore.open(tmp_path / "s") as store:
        shown = store.locations["attn_query/backward"].measured_error
        assert shown == errors["attn_query/backward"]


def test_selfcheck_sees_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give = GradientCapture._give

    def skewed(self: GradientCapture, place: Any, gradient: torch.Tensor) -> None:
        give(self, place, gradient * 1.01)

    monkeypatch.setattr(GradientCapture, "_give", skewed)
    report = run(tmp_path / "s", str(CORPUS), objective=NAME, limit_tokens=300)
    assert report.errors["mlp_post_act/backward"] == pytest.approx(0.01, rel=0.01)


def test_forward_values_are_those_of_a_run_without_gradients(base: Path, plain: Path) -> None:
    with_gradients, without = file_bytes(base), file_bytes(plain)
    shards = [path for path in without if path.startswith("arrays/") and "/c." in path]
    assert len(shards) > 6
    assert [path for path in shards if with_gradients[path] != without[path]] == []


def test_a_sequence_of_one_token_has_no_gradient(tmp_path: Path) -> None:
    run(tmp_path / "s", [[7], [5, 6, 7], [9]], objective=NAME, bos="none", gradients=EVERY)
    reader = StoreReader(tmp_path / "s")
    by_length = dict(enumerate(sequences(reader)))
    for location in map(L.__getitem__, map(str.upper, EVERY)):
        for number, ids in by_length.items():
            found = rows_of(reader.array(location, BACKWARD), reader, number)
            assert np.isfinite(found).all()
            assert found.any() == (len(ids) > 1) or location in (L.ATTN_QUERY, L.ATTN_KEY)


def test_gradients_of_a_bfloat16_model_are_float32(tmp_path: Path) -> None:
    loaded = tiny_model(dtype=torch.bfloat16)
    report = run(tmp_path / "s", str(CORPUS), loaded=loaded, objective=NAME, limit_tokens=300)
    reader = StoreReader(tmp_path / "s")
    for (_, pass_type), array in reader.arrays.items():
        wanted = "float32" if pass_type is BACKWARD else "bfloat16"
        assert array.spec.dtype.value == wanted
    assert 0 < report.errors["mlp_post_act/backward"] < 0.5


def test_parts_cover_a_batch_whatever_its_size() -> None:
    for rows, width, vocabulary in ((7, 100, 300), (5, 4096, 50257), (3, 10**6, 10**6)):
        parts = list(gradient_parts(rows, width, vocabulary))
        assert [row for part in parts for row in part] == list(range(rows))
        assert all(len(part) == 1 or len(part) * width <= 8192 for part in parts)


def test_parts_change_no_gradient(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.ingest.gradients._MOST_TOKENS", 40)
    ingest_corpus(tmp_path / "s", objective=NAME, limit_tokens=LIMIT)
    whole, parts = StoreReader(base), StoreReader(tmp_path / "s")
    for place in whole.arrays:
        for number in range(6):
            one, other = (rows_of(r.arrays[place], r, number) for r in (whole, parts))
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-3 * np.abs(one).max())


# The model's own state


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_gpt2()
    model.train()
    loaded = load_model((model, None))
    seen: list[tuple[L, int | None, PassType]] = []
    capture = GradientCapture(loaded, [L.RESID_POST_MLP], [L.MLP_POST_ACT], NextTokenLogProb())

    def sink(location: L, layer: int | None, tensor: torch.Tensor, pass_type: PassType) -> None:
        assert not tensor.requires_grad
        seen.append((location, layer, pass_type))

    before = torch.is_grad_enabled()
    with capture, torch.inference_mode():
        assert not any(parameter.requires_grad for parameter in model.parameters())
        capture.stream(torch.arange(8).reshape(2, 4), [4, 2], None, sink)
        with pytest.raises(InvalidInput, match="being captured already"), capture:
            pass
    assert seen == [
        (L.RESID_POST_MLP, 0, PassType.FORWARD),
        (L.RESID_POST_MLP, 1, PassType.FORWARD),
        (L.MLP_POST_ACT, 1, BACKWARD),
        (L.MLP_POST_ACT, 0, BACKWARD),
    ]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.is_grad_enabled() == before
    torch.autograd.backward(model(torch.arange(4)[None]).logits.sum())
    assert len(seen) == 4


def test_pairs_have_no_stored_gradient() -> None:
    with pytest.raises(InvalidInput, match="attn_qk_probs"):
        GradientCapture(tiny_model(), [], [L.ATTN_QK_PROBS], NextTokenLogProb())
    with pytest.raises(InvalidInput, match="none"):
        GradientCapture(tiny_model(), [L.MLP_POST_ACT], [], NextTokenLogProb())


@dataclass(frozen=True)
class Infinite:
    """An objective whose gradient no number holds."""

    name: ClassVar[str] = "zero"
    columns: ClassVar[tuple[str, ...]] = ()

    def __call__(
        self, logits: torch.Tensor, token_ids: torch.Tensor, lengths: Any, columns: Columns | None
    ) -> torch.Tensor:
        return logits.sum(dim=(1, 2)) * 1e30 * 1e30


def test_a_gradient_that_is_not_finite_stops_before_the_commit(tmp_path: Path) -> None:
    infinite: Objective = Infinite()
    with pytest.raises(IngestStopped) as caught:
        run(tmp_path / "s", str(CORPUS), objective=infinite, gradients="mlp_post_act,logits")
    assert caught.value.kind is ErrorKind.NUMERIC_OVERFLOW
    assert "The gradient at logits has the value inf at token " in str(caught.value)
    assert "--dtype" not in str(caught.value)
    assert StoreReader(tmp_path / "s").segments == []


# Sets


def test_an_added_set_equals_the_same_objective_at_the_first_ingest(base: Path, two: Path) -> None:
    first, added = file_bytes(base), file_bytes(two)
    for location in DEFAULT_GRADIENTS:
        folder = f"arrays/{location}/backward"
        names = [path.removeprefix(folder) for path in first if path.startswith(f"{folder}/c.")]
        assert names
        for name in names:
            assert first[folder + name] == added[f"{folder}@a-second{name}"]
    assert verify_store(base).ok
    assert verify_store(two).ok


def test_objectives_stand_beside_each_other(two: Path, plain: Path) -> None:
    reader = StoreReader(two)
    assert dict(reader.objectives) == {"a-second": NAME, "b-first": DIFF}
    assert reader.objective == NAME
    chosen = StoreReader(two, objective=DIFF)
    assert chosen.objective == DIFF
    for location in DEFAULT_GRADIENTS:
        assert reader.array(location, BACKWARD).spec.objective == NAME
        assert chosen.array(location, BACKWARD).spec.objective == DIFF
        assert reader.array_of("b-first", location).spec == chosen.array(location, BACKWARD).spec
    with pytest.raises(Unavailable, match="logit_diff"):
        StoreReader(two, objective="zero")
    with pytest.raises(Unavailable, match="mlp_post_act/backward@b-first"):
        reader.array_of("base", L.MLP_POST_ACT)
    assert dict(StoreReader(plain).objectives) == {}
    assert StoreReader(plain).objective is None
    before, after = file_bytes(plain, compacted=False), file_bytes(two, compacted=False)
    assert {path: after[path] for path in before} == before


def test_a_set_that_has_only_begun_hides_no_gradients(two: Path, tmp_path: Path) -> None:
    store = shutil.copytree(two, tmp_path / "s")
    for record in (store / "commits" / "a-second").glob("0*.json"):
        record.unlink()
    reader = StoreReader(store)
    assert reader.objective == DIFF
    assert reader.array(L.MLP_POST_ACT, BACKWARD).segments == reader.segments


def test_the_objective_stands_in_every_record(base: Path, two: Path) -> None:
    import zarr

    manifest = StoreReader(base).manifest
    assert manifest.config["objective"] == NAME
    assert StoreReader(two).manifest.config["objective"] is None
    record = StoreReader(two).sets["b-first"]
    assert record.objective == DIFF
    assert record.retention.keys() == {f"{location}/backward" for location in DEFAULT_GRADIENTS}
    for folder, key, objective in (
        (base, "mlp_post_act/backward", NAME),
        (two, "mlp_post_act/backward@b-first", DIFF),
    ):
        array: Any = zarr.open_array(str(folder / "arrays" / key), mode="r")
        assert array.attrs["objective"] == objective
        assert array.dtype == np.float32
    forward: Any = zarr.open_array(str(base / "arrays/mlp_post_act/forward"), mode="r")
    assert "objective" not in forward.attrs


def test_objectives_are_not_mixed(base: Path, two: Path, tmp_path: Path) -> None:
    store = shutil.copytree(two, tmp_path / "s")
    before = file_bytes(store)
    for choices, words in (
        ({"set_name": "b-first", "objective": "logit_diff(6)"}, "logit_diff\\(5, .*logit_diff"),
        ({"set_name": "b-first", "objective": DIFF, "gradients": "z"}, "asks for attn_weighted"),
        ({"set_name": "third", "objective": DIFF, "gradients": "mlp_post"}, "'b-first'.*already"),
        ({"objective": DIFF, "limit_tokens": LIMIT}, "config.objective.*--set"),
    ):
        source = None if "set_name" in choices else str(CORPUS)
        with pytest.raises(StoreConflict, match=words) as caught:
            run(store, source, **choices)
        assert caught.value.kind is ErrorKind.CONFIG_CONFLICT
    with pytest.raises(StoreConflict, match=r"repeat --objective 'next_token_log_prob'"):
        run(base, str(CORPUS), limit_tokens=LIMIT)
    assert file_bytes(store) == before


def test_further_locations_of_an_objective_join_its_first_ones(base: Path, tmp_path: Path) -> None:
    store = shutil.copytree(base, tmp_path / "s")
    run(store, None, set_name="more", objective=NAME, gradients="mlp_pre_act")
    reader = StoreReader(store)
    assert reader.array(L.MLP_PRE_ACT, BACKWARD).spec.key == "mlp_pre_act/backward@more"
    assert reader.array(L.MLP_POST_ACT, BACKWARD).spec.key == "mlp_post_act/backward"
    assert dict(reader.objectives) == {"base": NAME, "more": NAME}


# Reading


def test_raw_and_zone_maps_answer_for_gradients(two: Path) -> None:
    with actstore.open(two) as store:
        gradient = store.raw("mlp_post_act", pass_type="backward", sequences=[0])
        reader = store.reader
        array = reader.array(L.MLP_POST_ACT, BACKWARD)
        np.testing.assert_array_equal(gradient.numpy(), rows_of(array, reader, 0))
        assert store.info().objectives == {"a-second": NAME, "b-first": DIFF}
        listed = store.sql(
            "SELECT max(value), min(value) FROM top_activations "
            "WHERE location = 'mlp_post_act' AND pass = 'backward' AND layer = 1"
        ).fetchall()
    for held in (array, reader.array_of("b-first", L.MLP_POST_ACT)):
        assert list((two / "zones" / held.spec.key).glob("index-*.sections"))
        every = np.concatenate(
            [
                np.where(reader.segment(n).special[:, None], np.nan, window)
                for n in reader.segments
                for window in [held.reader.window(n, 1, 0, held.rows_of(n))]
            ]
        )
        lists = open_unit_index(reader, held).layer_lists(1, "top")
        tops = key_values(lists.keys[:, 0], held.spec.dtype)
        np.testing.assert_array_equal(tops, np.nanmax(every, axis=0))
        if held is array:
            assert listed == [(np.nanmax(every), np.nanmin(every))]


# Targets of the documents

TEXTS = [
    {"text": text, "answer": answer, "wrong": [40, 41]}
    for text, answer in (
        ("the cats sat on the mat", "the"),
        ("a dog", " a"),
        ("they slept then", "e"),
    )
]


def test_every_document_is_differentiated_for_its_own_answer(tmp_path: Path) -> None:
    loaded = tiny_model()
    assert loaded.tokenizer is not None
    expected_name = "logit_diff(answer, wrong)"
    run(tmp_path / "s", TEXTS, objective=LogitDiff("answer", "wrong"), gradients="resid_post_mlp")
    oracle, reader = Oracle(), StoreReader(tmp_path / "s")
    assert reader.objective == expected_name
    segment = reader.segment(0)
    array = reader.array(L.RESID_POST_MLP, BACKWARD)
    for number, ids in enumerate(sequences(reader)):
        record = TEXTS[int(segment.document[number])]
        (answer,) = loaded.tokenizer(record["answer"])["input_ids"]

        def objective(logits: torch.Tensor, answer: int = answer) -> torch.Tensor:
            return logits[-1, answer] - logits[-1, [40, 41]].mean()

        expected = oracle.gradients(ids, objective)[L.RESID_POST_MLP]
        require_close(rows_of(array, reader, number), expected)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("logit_diff(answer)", r"Column 'answer' of document 1 \(memory:1\) is 'two words'"),
        ("probabilities(missing)", "reads the column 'missing'; the documents have .*answer"),
        ("logit_diff(99999)", "token id 99999; the vocabulary"),
    ],
)
def test_missing_targets_are_named_before_anything_is_written(
    tmp_path: Path, objective: str, words: str
) -> None:
    source = [TEXTS[0], {**TEXTS[1], "answer": "two words"}]
    with pytest.raises(InvalidInput, match=words):
        run(tmp_path / "s", source, objective=objective)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_estimates_count_gradients(tmp_path: Path) -> None:
    settings = tiny_settings(objective="logit_diff(answer, wrong)")
    source = [{**record, "text": str(record["text"]) * 9} for record in TEXTS * 4]
    found = preview(tiny_model(), Corpus(source), tmp_path / "s", settings)
    assert found.plan.objective == "logit_diff(answer, wrong)"
    assert found.plan.arrays["mlp_post_act/backward"] == "float32"
    assert not (tmp_path / "s").exists()
    run(tmp_path / "s", source, objective="logit_diff(answer, wrong)")
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert len(files) == found.estimate.files
    for name in ("mlp_post_act/backward", "resid_post_mlp/forward"):
        shards = (tmp_path / "s" / "arrays" / name).glob("c.*")
        assert sum(path.stat().st_size for path in shards) == found.estimate.bytes_by_array[name]
    assert found.estimate.seconds
    assert found.estimate.rerun_seconds


def test_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("def the_answer():\n    return 42\n" * 20)
    words = ["ingest", "demo", str(path), "--out", str(tmp_path / "s"), "--objective", NAME]
    words += ["--locations", "resid_post_embedding", "--gradients", "mlp_post_act", "--context"]
    words += ["32", "--segment-rows", "512", "--limit-tokens", "100"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"objective    {NAME}" in done.stdout
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "s")], catch_exceptions=False)
    assert f"{NAME} (set base)" in shown.stdout
    assert "mlp_post_act/backward" in shown.stdout
    words[words.index(NAME)] = "logit_diff(answer"
    refused = CliRunner().invoke(app, words, catch_exceptions=False)
    assert refused.exit_code == 2
    assert "Unknown objective" in refused.stderr


# Kills


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IngestServer]:
    with IngestServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"objective": NAME}, id="base"),
        pytest.param({"objective": DIFF, "set_name": "diff"}, id="addition"),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(
    server: IngestServer, plain: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    store, undisturbed = tmp_path / "s", tmp_path / "undisturbed"
    if "set_name" in settings:
        for folder in (store, undisturbed):
            shutil.copytree(plain, folder)
    order = {"limit_tokens": LIMIT, **settings}
    assert server.run(undisturbed, settings=order).status == 0
    for incident in (
        Incident("kill", "written", "arrays/mlp_post_act/backward*/c.*", 2),
        Incident("kill", "linked", "zones/resid_post_mlp/backward*", 1),
    ):
        assert server.run(store, settings=order, incidents=(incident,)).was_killed
        assert verify_store(store).ok
    outcome = server.run(store, settings=order)
    assert outcome.status == 0, outcome.message
    assert differences(file_bytes(store), file_bytes(undisturbed)) == []
    assert snapshot_rows(store) == snapshot_rows(undisturbed)
    assert verify_store(store).ok
