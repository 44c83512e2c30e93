"""The package's own functions: `ingest`, `open`, `estimate`, and what importing it costs."""

import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gpt2 import tiny_gpt2
from tiny_ingest import CORPUS, tiny_tokenizer

import actstore
from actstore.store import errors

SMALL: dict[str, Any] = {"segment_rows": 512, "batch_tokens": 256}
TEXTS = [f"the {n} cats and {n * 3} dogs sat on the mat, and then they slept" for n in range(40)]


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    return tiny_gpt2(vocab_size=len(tokenizer)), tokenizer


def test_what_is_exported() -> None:
    assert actstore.__all__ == sorted(actstore.__all__, key=_sort_key)
    for name in actstore.__all__:
        assert hasattr(actstore, name)
    for name in errors.__all__:
        assert getattr(actstore, name) is getattr(errors, name)
        assert name in actstore.__all__
    assert actstore.__version__ == version("actstore")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        actstore.__getattr__("nothing")


def test_the_folder_and_the_function_share_a_name() -> None:
    import actstore.ingest.pipeline as by_path
    from actstore.ingest.pipeline import peak_memory

    assert by_path.peak_memory is peak_memory
    assert callable(actstore.ingest)
    assert actstore.ingest.pipeline is by_path  # type: ignore[attr-defined]
    assert list(inspect.signature(actstore.ingest).parameters)[:3] == ["model", "corpus", "out"]


def _sort_key(name: str) -> tuple[bool, str]:
    return name[0].islower() or name[0] == "_", name


def test_ingest_gives_an_open_store(model: tuple[Any, Any], tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    store = actstore.ingest(
        model,
        TEXTS,
        str(tmp_path / "s"),
        progress=lambda phase, done, total: heard.append((phase, done, total)),
        **SMALL,
    )
    assert isinstance(store, actstore.Store)
    with store:
        info = store.info()
        assert info.is_complete
        assert info.documents == len(TEXTS)
        assert set(info.locations) == {"resid_post_embedding", "mlp_post_act", "resid_post_mlp"}
        assert {phase for phase, _, _ in heard} >= {"plan", "forward"}
        assert heard[-1][1] == heard[-1][2] == info.tokens
        best = store.topk("mlp_post_act", k=3).rows()
    with actstore.open(tmp_path / "s") as again:
        assert again.topk("mlp_post_act", k=3).rows() == best


def test_every_choice_reaches_the_store(model: tuple[Any, Any], tmp_path: Path) -> None:
    records = [{"body": text, "label": n, "unwanted": 1} for n, text in enumerate(TEXTS)]
    choices: dict[str, Any] = {
        "locations": ["mlp_post", "resid_post"],
        "keep": {"q": "raw", "resid_post": "none"},
        "text_column": "body",
        "columns": ["label"],
        "bos": "sequence",
        "context": 16,
        "stride": 8,
        "dtype": "float32",
        "limit_tokens": 600,
        "shuffle": 3,
        **SMALL,
    }
    expected = actstore.estimate(model, records, tmp_path / "s", measure=False, **choices)
    assert isinstance(expected, actstore.Estimate)
    assert expected.seconds is None
    assert not (tmp_path / "s").exists()
    with actstore.ingest(model, records, tmp_path / "s", max_bytes=10**9, **choices) as store:
        info = store.info()
        config = store.reader.manifest.config
        plan = store.reader.plans[0].config
        assert set(info.locations) == {"mlp_post_act", "attn_query"}
        assert {entry.dtype for entry in info.locations.values()} == {"float32"}
        assert (config["context"], config["stride"], config["bos"]) == (16, 8, "sequence")
        assert (plan.limit_tokens, plan.shuffle) == (600, 3)
        assert 500 < info.tokens <= 600
        columns = store.sql("FROM documents").columns
        assert columns == ["document", "source", "n_tokens", "label"]
        assert expected.tokens == info.tokens
        assert expected.sequences == info.sequences


def test_append_and_further_sets(model: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "s"
    with actstore.ingest(model, TEXTS[:20], out, **SMALL) as store:
        first = store.info().tokens
    with pytest.raises(actstore.StoreConflict):
        actstore.ingest(model, TEXTS[20:], out, **SMALL)
    with actstore.ingest(model, TEXTS[20:], out, append=True, **SMALL) as store:
        second = store.info().tokens
    assert second > first
    with actstore.ingest(model, None, out, locations="attn_key", set_name="keys") as store:
        assert store.raw("attn_key", sequences=[0], layers=[1]).shape[0] == 1
        assert store.info().coverage["keys"] == store.info().segments_committed


def test_an_estimate_is_within_two_percent(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    wide = (tiny_gpt2(vocab_size=len(tokenizer), n_inner=1024), tokenizer)
    ids = np.random.default_rng(0).integers(1, len(tokenizer), (512, 32)).tolist()
    choices: dict[str, Any] = {"segment_rows": 2048, "batch_tokens": 4096}
    heard: list[str] = []
    found = actstore.estimate(
        wide, ids, tmp_path / "s", progress=lambda phase, *_: heard.append(phase), **choices
    )
    assert {"plan", "measure"} <= set(heard)
    assert found.seconds is not None
    assert found.rerun_seconds is not None
    assert min(found.rerun_seconds, found.seconds) > 0
    actstore.ingest(wide, ids, tmp_path / "s", **choices).close()
    files = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    assert written > 50e6
    assert abs(found.total_bytes - written) < 0.02 * written
    assert found.files == len(files)
    zones = (tmp_path / "s" / "zones").glob("*/*/0*.sections")
    assert abs(found.zone_bytes - sum(path.stat().st_size for path in zones)) < 4096


def test_an_estimate_counts_what_remains(model: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "s"
    with actstore.ingest(model, TEXTS[:30], out, **SMALL) as store:
        stored = store.info().tokens
    before = sorted(path for path in out.rglob("*"))
    more = actstore.estimate(model, TEXTS, out, measure=False, **SMALL)
    whole = actstore.estimate(model, TEXTS, measure=False, **SMALL)
    assert 0 < more.tokens == whole.tokens - stored
    assert more.array_bytes < whole.array_bytes
    assert sorted(path for path in out.rglob("*")) == before
    with pytest.raises(actstore.StoreConflict):
        actstore.estimate(model, TEXTS[5:], out, measure=False, **SMALL)


def test_pairs_are_estimated_from_their_sample(model: tuple[Any, Any], tmp_path: Path) -> None:
    choices: dict[str, Any] = {"locations": "pattern", **SMALL}
    at_most = actstore.estimate(model, TEXTS, measure=False, **choices)
    found = actstore.estimate(model, TEXTS, **choices)
    actstore.ingest(model, TEXTS, tmp_path / "s", **choices).close()
    shards = (tmp_path / "s" / "arrays").glob("attn_qk_probs/forward/c.*")
    written = sum(path.stat().st_size for path in shards)
    assert found.array_bytes < at_most.array_bytes
    assert abs(found.array_bytes - written) < 0.2 * written


def test_unknown_objective_lists_the_known_ones(model: tuple[Any, Any], tmp_path: Path) -> None:
    for call in (actstore.ingest, actstore.estimate):
        with pytest.raises(actstore.InvalidInput, match="next_token_log_prob") as caught:
            call(model, TEXTS, tmp_path / "s", objective="loss")
        assert caught.value.kind is actstore.ErrorKind.INVALID_ARGUMENT


def test_errors_come_typed(model: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(actstore.NotAStore):
        actstore.open(tmp_path)
    with pytest.raises(FileNotFoundError):
        actstore.open(tmp_path / "absent")
    with pytest.raises(actstore.InvalidInput, match="mlp_poost"):
        actstore.ingest(model, TEXTS, tmp_path / "s", locations="mlp_poost")
    with pytest.raises(actstore.IngestStopped) as caught:
        actstore.ingest(model, str(CORPUS), tmp_path / "s", max_bytes=1000, **SMALL)
    assert caught.value.kind is actstore.ErrorKind.TOO_LARGE
    assert not (tmp_path / "s").exists()


def test_ctrl_c_is_not_swallowed(model: tuple[Any, Any], tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "forward":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
        actstore.ingest(model, TEXTS, tmp_path / "s", progress=interrupt, **SMALL)
    with actstore.ingest(model, TEXTS, tmp_path / "s", **SMALL) as store:
        assert store.info().is_complete


def test_importing_costs_neither_torch_nor_transformers() -> None:
    script = "import sys, actstore; print({'torch', 'transformers', 'zarr'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert shown.stdout.strip() == b"set()"
