"""Problems: every kind has a status, and no answer shows a path or a number it may not."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient
from served import VALUES, client_of, make_store
from store_builder import commit_segments

import actstore
from actstore.query.service.identity import StoreIdentity
from actstore.query.service.models import Problem
from actstore.query.service.problems import (
    STATUSES,
    HttpKind,
    ServiceError,
    error_of,
    public_text,
)
from actstore.query.service.prompting import Turns
from actstore.query.service.resources import PROBLEMS
from actstore.query.service.settings import ServerSettings
from actstore.store.errors import ErrorKind, InvalidInput, StoreDamaged

if TYPE_CHECKING:
    from actstore.query.service.state import StoreHolder

API = "/api/v1"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("served") / "store")


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    with client_of(path) as found:
        yield found


def problem(answer: Any, status: int, kind: str) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers
    found = Problem.model_validate(answer.json())
    assert (found.status, found.kind) == (status, kind)
    return found


def test_every_kind_of_error_has_a_status() -> None:
    assert {*ErrorKind, *HttpKind} == set(STATUSES)
    documented = {*PROBLEMS, 405, 408, 409, 500}
    assert {status.value for status in STATUSES.values()} <= documented


@pytest.mark.parametrize(
    ("address", "status", "kind"),
    [
        ("/api/v2/store", 404, "not_found"),
        (f"{API}/", 404, "not_found"),
        (f"{API}/neurons/1/99", 404, "unknown_unit"),
        (f"{API}/neurons/7/0", 404, "unknown_unit"),
        (f"{API}/topk/nothing", 404, "unknown_scalar"),
        (f"{API}/raw/nothing", 404, "unknown_location"),
        (f"{API}/raw/mlp_post_act?layer=9&token=1", 404, "unknown_layer"),
        (f"{API}/sequences/99", 404, "unknown_row"),
        (f"{API}/scalars/mlp_write_norm?sequence=99", 404, "unknown_row"),
        (f"{API}/raw/attn_query/backward", 404, "not_found"),
        (f"{API}/topk/mlp_act_times_grad", 404, "not_stored"),
        (f"{API}/latents/0/0", 404, "unknown_unit"),
        (f"{API}/prompt", 404, "not_found"),
        (f"{API}/neurons/x/1", 422, "invalid_argument"),
        (f"{API}/neurons/-1/1", 422, "invalid_argument"),
        (f"{API}/neurons/{10**30}/1", 422, "invalid_argument"),
        (f"{API}/neurons?colour=red", 422, "invalid_argument"),
        (f"{API}/neurons?sort=colour", 422, "invalid_argument"),
        (f"{API}/neurons?sort=promoted", 422, "invalid_argument"),
        (f"{API}/neurons?limit=0", 422, "invalid_argument"),
        (f"{API}/neurons?limit=1&limit=2", 422, "invalid_argument"),
        (f"{API}/neurons?where=)", 422, "invalid_sql"),
        (f"{API}/neurons?where=1)%3B DROP TABLE neurons%3B--", 422, "invalid_sql"),
        (f"{API}/topk/mlp_post_act?where=colour > 1", 422, "invalid_sql"),
        (f"{API}/topk/mlp_post_act?per=colour", 422, "invalid_argument"),
        (f"{API}/topk/mlp_post_act?head=1", 422, "invalid_argument"),
        (f"{API}/topk/mlp_post_act?by=magnitude&largest=false", 422, "invalid_argument"),
        (f"{API}/examples/mlp_post_act", 422, "invalid_argument"),
        (f"{API}/examples/mlp_post_act?unit=1", 404, "unknown_unit"),
        (f"{API}/examples/mlp_post_act?unit=one", 422, "invalid_argument"),
        (f"{API}/scalars/mlp_write_norm?sequence=1&token=1", 422, "invalid_argument"),
        (f"{API}/sql", 422, "invalid_argument"),
        (f"{API}/sql?q=SELEC", 422, "invalid_sql"),
        (f"{API}/sql?q=CREATE TABLE t(a INT)", 422, "invalid_sql"),
        (f"{API}/store?format=yaml", 422, "invalid_argument"),
    ],
)
def test_a_wrong_question_has_a_kind(
    client: TestClient, address: str, status: int, kind: str
) -> None:
    problem(client.get(address), status, kind)


def test_a_wrong_method_names_the_right_ones(client: TestClient) -> None:
    answer = client.delete(f"{API}/store")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        (ServerSettings(max_rows=5), "/topk/mlp_post_act?k=6"),
        (ServerSettings(max_rows=5), "/topk/mlp_post_act?per=neuron&k=1"),
        (ServerSettings(max_rows=5), "/neurons?limit=6"),
        (ServerSettings(max_rows=5), "/examples/mlp_post_act?unit=1:1&k=6"),
        (ServerSettings(max_json_values=100), "/raw/mlp_post_act?sequence=1"),
        (ServerSettings(max_result_bytes=1000), "/raw/mlp_post_act?sequence=1&format=npy"),
        (ServerSettings(max_result_bytes=1000), "/scalars/mlp_write_norm?sequence=1"),
    ],
)
def test_what_is_too_large_is_refused(path: Path, settings: ServerSettings, address: str) -> None:
    with client_of(path, settings) as found:
        problem(found.get(API + address), 413, "too_large")


def test_a_limit_on_answers_is_none_on_rankings(path: Path) -> None:
    # A ranking looks at whole sequences, of which it returns k values.
    with client_of(path, ServerSettings(max_result_bytes=1000)) as found:
        assert found.get(f"{API}/topk/resid_pre_mlp?k=2").status_code in (200, 404)
        assert found.get(f"{API}/topk/mlp_write_norm?k=2").status_code == 200


def test_a_body_that_is_no_question(client: TestClient) -> None:
    address = f"{API}/sql"
    found = problem(client.post(address, json={"query": "SELECT 1"}), 422, "invalid_argument")
    assert found.errors is not None
    assert {tuple(one.where) for one in found.errors} == {("body", "q"), ("body", "query")}
    for content in (b"", b"{", b"[]", b'{"q": 3}', b"\xff\xfe", b'{"q":"SELECT \\ud800"}'):
        answer = client.post(address, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, content


def test_nothing_is_committed(tmp_path: Path) -> None:
    path = make_store(tmp_path / "empty", commit=[])
    with client_of(path) as found:
        assert found.get(f"{API}/store").json()["tokens"] == 0
        for address in ("/topk/mlp_post_act", "/sequences/0", "/raw/mlp_post_act?token=0"):
            answer = found.get(API + address)
            problem(answer, 404, "nothing_committed")
            assert str(tmp_path) not in answer.text


def test_a_segment_that_is_not_committed_is_no_zero(tmp_path: Path) -> None:
    path = make_store(tmp_path / "part", commit=[0])
    with client_of(path) as found:
        problem(found.get(f"{API}/sequences/5"), 404, "not_stored")
        problem(found.get(f"{API}/scalars/mlp_write_norm?sequence=5"), 404, "not_stored")


def test_a_damaged_file_is_named_and_gives_no_number(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    shards = [one for one in (path / "arrays").rglob("*") if one.is_file()]
    largest = max(shards, key=lambda one: ("mlp_post_act" in str(one), one.stat().st_size))
    data = bytearray(largest.read_bytes())
    data[: len(data) // 2] = bytes(byte ^ 0xFF for byte in data[: len(data) // 2])
    largest.write_bytes(data)
    with client_of(path) as found:
        answer = found.get(f"{API}/raw/mlp_post_act")
        detail = problem(answer, 503, "checksum_mismatch").detail
        assert str(largest.relative_to(path)) in detail
        assert str(tmp_path) not in answer.text
        assert "values" not in answer.json()
        # What does not need the file is answered still.
        assert found.get(f"{API}/store").status_code == 200


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    with client_of(path) as found:
        shutil.rmtree(path / "arrays")
        answer = found.get(f"{API}/raw/mlp_post_act?token=1")
        assert "arrays/" in problem(answer, 503, "missing_file").detail
        assert str(tmp_path) not in answer.text


def test_another_store_in_its_place_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    other = make_store(tmp_path / "other", seed=9)
    with client_of(path) as found:
        tag = found.get(f"{API}/store").headers["etag"]
        shutil.move(path, tmp_path / "away")
        shutil.move(other, path)
        for address in ("/topk/mlp_post_act?k=1", "/neurons", "/sql?q=SELECT 1"):
            problem(found.get(API + address), 503, "store_changed")
        known = found.get(f"{API}/store", headers={"If-None-Match": tag})
        problem(known, 503, "store_changed")
        # Putting it back does not help: what was read meanwhile is not known.
        shutil.move(path, other)
        shutil.move(tmp_path / "away", path)
        problem(found.get(f"{API}/store"), 503, "store_changed")


def test_a_store_that_lost_a_segment_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    with client_of(path) as found:
        assert found.get(f"{API}/store").status_code == 200
        next((path / "commits" / "base").glob("0*.json")).unlink()
        detail = problem(found.get(f"{API}/store"), 503, "store_changed").detail
        assert detail.startswith("commits/base/0")


def test_a_store_changed_while_a_request_runs_gives_no_number(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    with client_of(path) as found:
        app: Any = found.app
        served = type(app.state.store)
        own = served.topk

        def swapping(self: Any, *arguments: Any, **options: Any) -> Any:
            answer = own(self, *arguments, **options)
            os.replace(path / "store.json", path / "store.json.old")
            return answer

        served.topk = swapping
        try:
            problem(found.get(f"{API}/topk/mlp_post_act"), 503, "store_changed")
        finally:
            served.topk = own


def test_a_copy_put_back_is_the_same_store(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store")
    with client_of(path) as found:
        for name in ("store.json", "commits/base/000000.json"):
            content = (path / name).read_bytes()
            (path / name).unlink()
            (path / name).write_bytes(content)
        assert found.get(f"{API}/store").status_code == 200


def test_growth_is_seen_when_the_store_is_renewed(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", commit=[0])
    with client_of(path) as found:
        before = found.get(f"{API}/store")
        commit_segments(path, VALUES)
        same = found.get(f"{API}/store")
        assert same.json()["segments_committed"] == 1
        assert same.headers["etag"] == before.headers["etag"]
        app: Any = found.app
        holder: StoreHolder = app.state.holder
        assert holder.renew()
        after = found.get(f"{API}/store")
        assert after.json()["segments_committed"] == 2
        assert after.headers["etag"] != before.headers["etag"]
        assert found.get(f"{API}/sequences/5").status_code == 200
        assert not holder.renew()


def test_a_set_that_is_ahead_of_the_base_is_no_growth(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", commit=[0])
    ahead = path / "commits" / "further"
    with actstore.open(path) as store:
        # The opening passes over it, and so would the next one.
        ahead.mkdir()
        (ahead / "000001.json").write_bytes(b"{}")
        identity = StoreIdentity(store.reader)
        assert not identity.has_grown
        (ahead / "000002.json").write_bytes(b"{}")
        assert identity.has_grown


def test_an_opening_stays_open_while_a_request_may_read_it(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", commit=[0])
    with client_of(path) as found:
        app: Any = found.app
        holder: StoreHolder = app.state.holder
        commit_segments(path, VALUES)
        number = holder.begin()
        first = holder.current
        closed: list[Any] = []
        first.release = lambda: closed.append(first)  # type: ignore[method-assign]
        assert holder.renew()
        assert not closed
        holder.end(number)
        assert closed == [first]


def test_too_many_texts_at_once_are_told_to_wait() -> None:
    turns = Turns(waiting=0)
    refused: list[HttpKind] = []

    def ask() -> None:
        try:
            with turns.take():
                pass
        except ServiceError as error:
            refused.append(error.kind)

    with turns.take():
        asking = threading.Thread(target=ask)
        asking.start()
        asking.join()
    assert refused == [HttpKind.BUSY]
    ask()
    assert refused == [HttpKind.BUSY]


def test_texts_run_one_after_the_other() -> None:
    turns, inside = Turns(), []

    def run(name: str) -> None:
        with turns.take():
            inside.append(name)
            assert len(inside) == 1
            inside.remove(name)

    threads = [threading.Thread(target=run, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []


def test_a_bug_is_a_problem_without_its_message(path: Path) -> None:
    def broken(text: str) -> Any:
        raise ZeroDivisionError(f"secret of {text}")

    with client_of(path, prompt=broken) as found:
        answer = found.post(f"{API}/prompt", json={"text": "x"})
        problem(answer, 500, "internal")
        assert "secret" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_messages_show_no_path() -> None:
    roots = [Path("/data/runs/gpt2")]
    text = (
        "/data/runs/gpt2/arrays/x/c/0 fails; /home/me/.cache/y.duckdb too, '/etc/passwd' is '3/4'"
    )
    shown = public_text(text, roots)
    assert shown == "arrays/x/c/0 fails; y.duckdb too, 'passwd' is '3/4'"
    damaged = StoreDamaged(text, kind=ErrorKind.MISSING_FILE)
    assert error_of(damaged, roots).status_code == 503
    hidden = SimpleNamespace(text=error_of(InvalidInput(text, kind=ErrorKind.INVALID_SQL), roots))
    assert b"/home" not in hidden.text.body
