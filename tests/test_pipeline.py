"""What an ingest decides: dtypes, sets, appends, refusals."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_ingest import CORPUS, SEGMENT_ROWS, file_bytes, fresh_copy, tiny_model, tiny_settings

from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.pipeline import ingest
from actstore.ingest.preparation import Corpus
from actstore.ingest.report import IngestReport
from actstore.query.session import Store
from actstore.store.errors import ErrorKind, IngestStopped, InvalidInput, StoreConflict
from actstore.store.verification import verify_store

TEXTS = [text for path in sorted(CORPUS.rglob("*.*")) if (text := path.read_text())]


def run(
    out: Path, source: Any, *, loaded: LoadedModel | None = None, **choices: Any
) -> IngestReport:
    return ingest(loaded or tiny_model(), Corpus(source), out, tiny_settings(**choices))


def amplified(value: float) -> LoadedModel:
    """The tiny model with one neuron of layer 1 near ``value``, whatever the token."""
    loaded = tiny_model()
    loaded.model.get_parameter("transformer.h.1.mlp.c_fc.bias").data[5] = value
    loaded.model.get_parameter("transformer.h.1.mlp.c_proj.weight").data[5] = 0
    assert loaded.tokenizer is not None
    return load_model((loaded.model, loaded.tokenizer))


def dtypes(store: Path) -> dict[str, str]:
    with Store(store) as opened:
        return {a.spec.location.label: a.spec.dtype.value for a in opened.reader.arrays.values()}


def test_the_counts_add_up(tmp_path: Path) -> None:
    report = run(tmp_path / "s", ["", *TEXTS, ""])
    assert report.stored == report.planned > 0
    assert report.missing == 0
    assert dict(report.dropped) == {"empty": 2}
    assert report.committed == report.written == report.segments
    assert set(report.errors) == {"resid_post_embedding", "mlp_post_act", "resid_post_mlp"}
    assert all(0 < error < 6e-4 for error in report.errors.values())


def test_running_a_finished_ingest_again_changes_nothing(tmp_path: Path) -> None:
    store = fresh_copy(tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()}
    report = ingest(tiny_model(), Corpus(str(CORPUS)), store, tiny_settings())
    assert report.written == 0
    assert report.missing == 0
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*") if p.is_file()} == before


def test_a_larger_limit_continues_and_ends_as_one_run_would_read(tmp_path: Path) -> None:
    run(tmp_path / "s", TEXTS, limit_tokens=900)
    report = run(tmp_path / "s", TEXTS, limit_tokens=2000)
    assert 900 < report.stored <= 2000
    assert verify_store(tmp_path / "s").ok
    run(tmp_path / "whole", TEXTS, limit_tokens=2000)
    with Store(tmp_path / "s") as parts, Store(tmp_path / "whole") as whole:
        assert parts.n_sequences == whole.n_sequences
        for number in range(parts.n_sequences):
            one = parts.raw("mlp_post_act", sequences=[number])
            other = whole.raw("mlp_post_act", sequences=[number])
            # Batches are composed per segment, so rounding may differ by an ulp of float16.
            np.testing.assert_allclose(one.numpy(), other.numpy(), atol=2e-3)
    again = run(tmp_path / "s", TEXTS, limit_tokens=2000)
    assert again.written == 0


def test_another_corpus_needs_append(tmp_path: Path) -> None:
    run(tmp_path / "s", TEXTS[:2])
    with pytest.raises(StoreConflict, match="--append") as caught:
        run(tmp_path / "s", ["quite another text, " * 40])
    assert caught.value.kind is ErrorKind.CORPUS_CONFLICT
    report = run(tmp_path / "s", ["quite another text, " * 40], append=True)
    assert report.missing == 0
    assert verify_store(tmp_path / "s").ok
    with Store(tmp_path / "s") as store:
        best = store.topk("mlp_write_norm", k=5)
        assert best.certificate.segments == best.certificate.segments_planned == report.segments
        texts = store.sql("SELECT count(*) FROM documents").fetchall()
        assert texts == [(3,)]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"context": 16}, "context: the store has 32, this run 16"),
        ({"bos": "none"}, "bos"),
        ({"dtype": "float32"}, "dtype"),
        ({"locations": "minimal"}, "mlp_post_act"),
        ({"segment_rows": 1024}, "segment_rows"),
    ],
)
def test_another_config_is_refused_with_what_differs(
    tmp_path: Path, choices: dict[str, Any], words: str
) -> None:
    store = fresh_copy(tmp_path / "s")
    before = file_bytes(store)
    with pytest.raises(StoreConflict, match=words) as caught:
        run(store, str(CORPUS), **choices)
    assert caught.value.kind is ErrorKind.CONFIG_CONFLICT
    assert file_bytes(store) == before


def test_another_model_is_refused(tmp_path: Path) -> None:
    store = fresh_copy(tmp_path / "s")
    with pytest.raises(StoreConflict, match="fingerprint"):
        run(store, str(CORPUS), loaded=tiny_model(seed=1))


def test_the_probe_chooses_float32_where_float16_is_tight(tmp_path: Path) -> None:
    run(tmp_path / "s", TEXTS[:1], loaded=amplified(3e4))
    assert dtypes(tmp_path / "s")["mlp_post_act"] == "float32"
    assert dtypes(tmp_path / "s")["resid_post_embedding"] == "float16"


def test_dtype_rules_per_location(tmp_path: Path) -> None:
    run(tmp_path / "s", TEXTS[:1], dtype="float32,mlp_post=float16")
    assert dtypes(tmp_path / "s") == {
        "resid_post_embedding": "float32",
        "mlp_post_act": "float16",
        "resid_post_mlp": "float32",
    }


def test_an_overflow_names_its_place_and_the_way_out_works(tmp_path: Path) -> None:
    loaded = amplified(1e5)
    with pytest.raises(IngestStopped) as caught:
        run(tmp_path / "s", TEXTS[:2], loaded=loaded, dtype="float16")
    assert caught.value.kind is ErrorKind.NUMERIC_OVERFLOW
    message = str(caught.value)
    assert "mlp_post_act" in message
    assert "layer 1, token" in message
    assert "--set mlp_post_act-float32 --locations mlp_post_act --dtype float32" in message
    with Store(tmp_path / "s") as store:
        assert store.reader.segments == []

    run(
        tmp_path / "s",
        None,
        loaded=loaded,
        set_name="mlp_post_act-float32",
        locations="mlp_post_act",
        dtype="float32",
    )
    report = run(tmp_path / "s", TEXTS[:2], loaded=loaded, dtype="float16")
    assert report.missing == 0
    assert dtypes(tmp_path / "s") == {
        "resid_post_embedding": "float16",
        "mlp_post_act": "float32",
        "resid_post_mlp": "float16",
    }
    assert verify_store(tmp_path / "s").ok
    run(tmp_path / "direct", TEXTS[:2], loaded=loaded, dtype="float16,mlp_post_act=float32")
    with Store(tmp_path / "s") as mended, Store(tmp_path / "direct") as direct:
        assert (
            mended.topk("mlp_write_norm", k=9).rows() == direct.topk("mlp_write_norm", k=9).rows()
        )


def test_a_further_set_adds_locations_without_the_corpus(tmp_path: Path) -> None:
    store = fresh_copy(tmp_path / "s")
    before = file_bytes(store, compacted=False)
    report = run(store, None, set_name="attention", locations="attn_value,attn_qk_probs")
    assert report.missing == 0
    after = file_bytes(store, compacted=False)
    assert {path: after[path] for path in before} == before
    assert verify_store(store).ok
    run(tmp_path / "direct", str(CORPUS), locations="neurons,attn_value,attn_qk_probs")
    with Store(store) as added, Store(tmp_path / "direct") as direct:
        for name in ("attn_value", "attn_qk_probs"):
            one, other = added.raw(name, sequences=[3]), direct.raw(name, sequences=[3])
            assert "stored" in one.source
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_set_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="Ingest the base set first"):
        run(tmp_path / "s", TEXTS, set_name="more", locations="attn_value")


def test_too_much_is_refused_before_anything_is_kept(tmp_path: Path) -> None:
    with pytest.raises(IngestStopped, match="max_bytes=1,000") as caught:
        run(tmp_path / "s", TEXTS, max_bytes=1000)
    assert caught.value.kind is ErrorKind.TOO_LARGE
    assert not (tmp_path / "s").exists()


def test_a_refused_worker_leaves_the_plan_of_the_others(tmp_path: Path) -> None:
    """It reads the corpus while another worker publishes the plan and commits under it."""

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "forward" and done > SEGMENT_ROWS:
            raise KeyboardInterrupt

    def texts() -> Iterator[str]:
        yield TEXTS[0]
        report = ingest(tiny_model(), Corpus(TEXTS), tmp_path / "s", tiny_settings(), stop)
        assert report.interrupted
        assert 0 < report.committed < report.segments
        yield from TEXTS[1:]

    with pytest.raises(IngestStopped, match="max_bytes"):
        run(tmp_path / "s", texts(), max_bytes=1000)
    assert verify_store(tmp_path / "s").ok
    assert run(tmp_path / "s", TEXTS).missing == 0


def test_a_refused_append_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = fresh_copy(tmp_path / "s")
    before = file_bytes(store)
    with pytest.raises(IngestStopped, match="max_bytes"):
        run(store, ["quite another text, " * 40], append=True, max_bytes=10)
    assert file_bytes(store) == before
    assert verify_store(store).temporary == []


def test_an_ingest_leaves_no_file_open(tmp_path: Path) -> None:
    store = fresh_copy(tmp_path / "s")
    counts = []
    for _ in range(3):
        run(store, str(CORPUS))
        gc.collect()
        counts.append(len(os.listdir("/dev/fd")))
    assert counts[1] == counts[2]


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("precious")
    with pytest.raises(InvalidInput, match="thesis"):
        run(tmp_path / "s", TEXTS)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["thesis.tex"]
