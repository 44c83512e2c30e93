"""Sixty-four clients at once for half a minute, or as long as ``ACTSTORE_LOAD_SECONDS`` says."""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import viewer_store
from load_clients import (
    RUNAWAY,
    descendants,
    open_files,
    questions_of,
    resident_bytes,
    run_load,
    runaway_question,
    running_server,
)

SECONDS = float(os.environ.get("ACTSTORE_LOAD_SECONDS", "30"))
CLIENTS = 64
WARM_SECONDS = 10.0
SETTLE_SECONDS = 60

ALLOWED_GROWTH = 48 * 2**20
"""Resident bytes of the server after the load, above those after the warm-up: what arenas of
its threads differ by from one minute to the next, whatever the load lasts."""

ALLOWED_CHILD_BYTES = 3 * 2**28
"""Of each SQL process after the load: its code, the open store, and the 512 MiB of one query."""

SQL_PROCESSES = 2


@dataclass
class Footprint:
    """What a server holds while nobody asks."""

    resident: int
    children: list[int]
    files: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, process: int) -> "Footprint":
        return cls(
            resident_bytes(process),
            descendants(process),
            Counter(name.partition(":")[0] for name in open_files(process)),
        )


def settled(process: int) -> Footprint:
    """What the server holds once connections are closed and queries have ended."""
    until = time.monotonic() + SETTLE_SECONDS
    last = Footprint.of(process)
    while True:
        time.sleep(1.0)
        found = Footprint.of(process)
        is_calm = (found.files, found.children) == (last.files, last.children)
        if (is_calm and len(found.children) <= SQL_PROCESSES) or time.monotonic() > until:
            return found
        last = found


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@pytest.mark.timeout(600 + 2 * SECONDS)
def test_sixty_four_clients_at_once(tmp_path: Path) -> None:
    path = viewer_store.build(tmp_path / "store")
    mix = questions_of(viewer_store.LAYERS, viewer_store.NEURONS)
    runaway = runaway_question()
    with running_server(path) as (running, url):
        run_load(url, mix, clients=CLIENTS, seconds=WARM_SECONDS, runaway=runaway, seed=1)
        before = settled(running.pid)
        found = run_load(url, mix, clients=CLIENTS, seconds=SECONDS, runaway=runaway, seed=2)
        after = settled(running.pid)

        assert {kind: tally.wrong for kind, tally in found.items() if tally.wrong} == {}
        asked = {question.kind for question in (*mix, runaway)}
        assert {kind for kind, tally in found.items() if tally.seconds} == asked
        may_be_refused = {kind for kind in asked if "SQL" in kind or "where" in kind}
        assert {kind for kind, tally in found.items() if tally.refused} <= may_be_refused
        assert found[RUNAWAY].answers["422 sql_timeout"] > 0

        assert after.resident - before.resident < ALLOWED_GROWTH
        assert 0 < len(after.children) <= SQL_PROCESSES
        assert all(resident_bytes(child) < ALLOWED_CHILD_BYTES for child in after.children)
        # Each SQL process has two pipes; there may be one process more or fewer than before.
        assert after.files["socket"] == before.files["socket"]
        assert after.files["pipe"] - 2 * len(after.children) == (
            before.files["pipe"] - 2 * len(before.children)
        )
        assert after.files.total() - after.files["pipe"] <= (
            before.files.total() - before.files["pipe"]
        )

        again = run_load(url, mix, clients=1, seconds=0.5, seed=3)
        each = [replace(one, paths=one.paths[:1]) for one in mix]
        for one in each:
            again |= run_load(url, [one], clients=1, seconds=0.01)
        assert {kind for kind, tally in again.items() if tally.answers["200"]} == asked - {RUNAWAY}
        assert {kind: tally.wrong for kind, tally in again.items() if tally.wrong} == {}

        children = descendants(running.pid)
        assert children
        running.send_signal(signal.SIGINT)
        out, error = running.communicate(timeout=120)
        assert (running.returncode, out) == (0, ""), error
        assert "Traceback" not in error
        assert "internal" not in error
        assert not any(is_there(child) for child in children)
