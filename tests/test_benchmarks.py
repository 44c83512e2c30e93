"""Every benchmark at size 1: that it runs and what it reports, never how fast it was."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

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

DERIVED = {
    name
    for name, declared in SCALARS.items()
    if declared.about is None
    and declared.latents is None
    and name not in ("logits", *map(str, OPTIONAL_LOCATIONS))
}

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
}


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for each other are most of a tiny model's time on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
