"""An index whose making is killed at every step ends as an undisturbed one, byte for byte."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ingest_server import Incident, IngestServer, Moment
from tiny_ingest import differences, file_bytes, fresh_copy, snapshot_rows

from actstore.query.index_building import build_indexes
from actstore.query.session import Store
from actstore.store.verification import verify_store

NORM = "resid_post_mlp_norm"
MOMENTS: tuple[Moment, ...] = ("before", "written", "linked")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IngestServer]:
    with IngestServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_kill_at_every_step_changes_nothing(server: IngestServer, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    fresh_copy(bare, limit_tokens=600)
    store, whole = (shutil.copytree(bare, tmp_path / name) for name in ("store", "whole"))
    (built,) = build_indexes(whole, [NORM])
    assert built.written == 2
    kills = 0
    while True:
        moment = MOMENTS[kills % len(MOMENTS)]
        outcome = server.run(
            store, arguments=("index", str(store), NORM), incidents=(Incident("kill", moment),)
        )
        if not outcome.was_killed:
            assert outcome.status == 0, outcome.output
            break
        kills += 1
        if kills % 4 == 0:
            report = verify_store(store)
            assert report.ok, report.findings
            with Store(store) as opened, Store(bare) as before:
                assert opened.topk(NORM, k=20).rows() == before.topk(NORM, k=20).rows()
    # A record, two files and two commits, and what compaction makes of them.
    assert kills >= 6 * len(MOMENTS)
    assert not differences(file_bytes(store), file_bytes(whole))
    assert snapshot_rows(store) == snapshot_rows(whole)
    assert not verify_store(store).temporary
