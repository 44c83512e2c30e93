"""Every benchmark at size 1: that it runs and what it reports, never how fast it was."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

from actstore.query.derived import SCALARS
from actstore.store.vocabulary import OPTIONAL_LOCATIONS

ROOT = Path(__file__).resolve().parents[1]


def load_package() -> ModuleType:
    """The ``benchmarks`` folder as a package, without putting the root on the path."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks"] = package
        spec.loader.exec_module(package)
    return sys.modules["benchmarks"]


benchmarks = load_package()
harness = import_module("benchmarks.harness")
peer_corpus = import_module("benchmarks.peer_corpus")
peer_engine = import_module("benchmarks.peer_engine")
peer_questions = import_module("benchmarks.peer_questions")
stores = import_module("benchmarks.stores")

DERIVED = {
    name
    for name, declared in SCALARS.items()
    if declared.about is None
    and declared.latents is None
    and name not in ("logits", *map(str, OPTIONAL_LOCATIONS))
}

PEERS = (
    "memmap + numpy",
    "torch streaming",
    "zarr-python",
    "DuckDB over Parquet",
    "DuckDB's own file",
)


def peer_ratios(*, model: bool) -> set[str]:
    """Every peer over us on every question, and us over our own reads."""
    left_out = {q for q in peer_questions.QUESTIONS if (q.gradient if model else q.over == "store")}
    asked = [question for question in peer_questions.QUESTIONS if question not in left_out]
    alone = [question.name for question in asked]
    if not model:
        alone += [f"{q.name}; before its index" for q in asked if q.gradient]
        columns = [q for q in asked if q.over in ("neuron", "count") and not q.gradient]
        alone += [f"{q.name}; column copy" for q in columns]
    return {
        f"{question.name}: {peer} over actstore, {state}"
        for question in asked
        for peer in PEERS
        for state in ("cold", "warm")
    } | {f"{name}: actstore over its reads at once, cold" for name in alone}


EXPECTED = {
    "write": {"shards, share of the raw rate", "segment, share of the raw rate"},
    "rows": {
        f"{what}, {state}"
        for what in (
            "window over pread",
            "scattered over preads",
            "scattered over announced preads",
        )
        for state in ("cold", "warm")
    },
    "topk": {
        f"{scan} over top-20, {stage}, {state}"
        for scan in ("zarr-python scan", "own verified scan")
        for stage in ("before compact", "compacted")
        for state in ("cold", "warm")
    }
    | {"scan of all neurons over top-20 of all, warm"},
    "hooks": {
        f"tiny: {case} over bare{clock}"
        for case in ("neurons", "attention", "full", "neurons, into segment buffers")
        for clock in ("", ", CPU")
    },
    "memory": {"2,048 tokens: ingest over allowed", "ingest, larger corpus over smaller"},
    "ingest": {
        "end to end over bare forward",
        "end to end over bare forward, CPU",
        "segments over bare forward",
    },
    "derive": {f"{name}: store / model" for name in DERIVED},
    "segments": {f"top-20, {state}, ten times the segments" for state in ("cold", "warm")},
    "service": set(),
    "cache": {
        f"{what}: peak / bound"
        for what in (
            "full decomposition, last token",
            "full decomposition, every position",
            "neurons, last token",
            "neurons, every position",
            "accumulated_resid, last token",
        )
    },
    "peers": peer_ratios(model=False),
    "peer_model": peer_ratios(model=True),
}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other are most of a tiny model's time on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # A peer that happens to be there would be compared with.
    monkeypatch.delenv("DATASETTE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_runs_at_size_1_and_reports_its_ratios(name: str) -> None:
    module = import_module(f"benchmarks.{name}")
    assert module.FULL_SIZE > 1
    result = module.run(1)
    assert (result.benchmark, result.size) == (name, 1)
    assert {ratio.name for ratio in result.ratios} == EXPECTED[name]
    assert all(np.isfinite(ratio.value) and ratio.value > 0 for ratio in result.ratios)
    assert all(seconds > 0 for timing in result.timings for seconds in timing.seconds)

    fields = json.loads(json.dumps(result.to_json()))
    assert [entry["name"] for entry in fields["ratios"]] == [r.name for r in result.ratios]
    table = harness.render(result)
    for part in (*result.timings, *result.ratios):
        assert part.name in table
    # A published report must not say whose machine it was, or where files lay.
    assert str(ROOT) not in table
    assert "/tmp" not in json.dumps(fields)


def test_all_repetitions_of_all_cases_run_in_one_order_fixed_by_the_seed() -> None:
    def order(seed: int) -> list[str]:
        ran: list[str] = []
        cases = [
            harness.Case(
                name,
                lambda name=name: ran.append(name),
                lambda name=name: ran.append(f"prepare {name}"),
                lambda name=name: ran.append(f"finish {name}"),
            )
            for name in ("one", "two")
        ]
        timings = harness.interleave(cases, 4, seed)
        assert {name: len(timing.seconds) for name, timing in timings.items()} == {
            "one": 4,
            "two": 4,
        }
        return ran

    first = order(0)
    assert first == order(0)
    assert first != order(1)
    steps = [first[start : start + 3] for start in range(0, len(first), 3)]
    assert all(step == [f"prepare {step[1]}", step[1], f"finish {step[1]}"] for step in steps)


def test_ratios_of_rates_are_per_unit_of_work() -> None:
    slow = harness.Timing("slow", (4.0, 2.0, 6.0), work=2.0, unit="B")
    fast = harness.Timing("fast", (1.0, 1.0, 1.0), work=1.0, unit="B")
    ratio = harness.compare("slow over fast", slow, fast, aim=2.0)
    assert (ratio.value, ratio.met) == (2.0, True)
    assert ratio.low <= ratio.value <= ratio.high
    assert harness.compare("again", slow, fast, aim=2.5, at_least=True).met is False
    assert harness.compare("no aim", slow, fast).met is None


def test_evicting_a_file_leaves_its_bytes_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 256)
    harness.evict([tmp_path], harness.Options())
    assert path.read_bytes() == bytes(range(256)) * 256
    assert harness.is_cached(path) in (True, None)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--keep-caches", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "write", "--size", "1", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (fields,) = json.loads(report.read_text())
    assert fields["benchmark"] == "write"
    assert "share of the raw rate" in done.stdout


def small_corpus(folder: Path) -> Any:
    """2 x 512 tokens of 40 neurons, with gradients."""
    return peer_corpus.synthetic_corpus(folder, 1024, 40, 64, 512, seed=0, grad=True, costs={})


def test_activations_are_written_in_pieces_that_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, rows in (("one", 4096 + 10), ("two", 4096 + 10), ("longer", 2 * 4096)):
        stores.write_activations(tmp_path / name, rows, 24, seed=3)
    one, two, longer = (
        np.fromfile(tmp_path / name, np.float16).reshape(-1, 24)
        for name in ("one", "two", "longer")
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[:4096], longer[:4096])
    assert not np.array_equal(one[4096:], one[:10])
    values = longer.astype(np.float32) / longer.astype(np.float32).std(axis=0)
    # GELU's floor, and bursts well beyond what noise reaches.
    assert values.min() > -1
    assert values.max() > 8


def test_every_form_of_a_corpus_holds_the_same_values(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    again = peer_corpus.corpus_of_store(corpus.store, tmp_path / "again")
    np.testing.assert_array_equal(again.values(), corpus.values())
    for name in ("sequence", "position", "document", "special"):
        np.testing.assert_array_equal(getattr(again, name), getattr(corpus, name))
    assert peer_corpus.write_parquet(corpus) > 0
    assert peer_corpus.write_table(corpus) > 0
    with duckdb.connect(str(corpus.table), read_only=True) as connection:
        rows = connection.sql(
            "SELECT value, grad FROM activations ORDER BY neuron, sequence, position"
        ).fetchnumpy()
    ordinary = ~corpus.special
    np.testing.assert_array_equal(rows["value"], corpus.values()[0, ordinary].T.reshape(-1))
    np.testing.assert_array_equal(rows["grad"], corpus.gradient_values()[0, ordinary].T.reshape(-1))


def test_the_reads_of_a_query_can_be_issued_again(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    (place,) = peer_questions.draw_places(corpus, 1, seed=0)
    engine = peer_engine.EngineSide(corpus)
    with peer_engine.traced_reads() as reads:
        engine.ask(peer_questions.QUESTIONS[0], place)
    engine.close()
    assert all(path.startswith(str(corpus.store)) for path, _, _ in reads)
    again = peer_engine.ReadsAtOnce(reads, corpus)
    with peer_engine.traced_reads() as repeated:
        again.run()
    again.close()
    assert repeated == reads
    assert (again.count, again.bytes) == (len(reads), sum(size for _, _, size in reads))


def test_a_wrong_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peer_engine.EngineSide.ask
    monkeypatch.setattr(
        peer_engine.EngineSide, "ask", lambda *arguments: right(*arguments) + np.float32(1)
    )
    with pytest.raises(AssertionError, match="actstore on one neuron, top 20"):
        import_module("benchmarks.peers").run(1)
