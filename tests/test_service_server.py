"""A real server on loopback: in the background, from the command line, under several clients."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import typer
from served import VALUES, make_store
from store_builder import commit_segments
from typer.testing import CliRunner

import actstore
from actstore.cli.serving import serve
from actstore.query.service.server import BackgroundServer, background
from actstore.query.service.settings import ServerSettings
from actstore.query.service.sql_limits import SqlLimits
from actstore.store.errors import InvalidInput

API = "/api/v1"
TOKEN = "0123456789abcdef-a-long-token"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("served") / "store")


@pytest.fixture(scope="module")
def store(path: Path) -> Iterator[actstore.Store]:
    with actstore.open(path) as found:
        yield found


@pytest.fixture(scope="module")
def server(store: actstore.Store) -> Iterator[BackgroundServer]:
    settings = ServerSettings(max_body_bytes=5000, sql=SqlLimits(seconds=1))
    with background(store, settings) as found:
        yield found


def raw(server: BackgroundServer, request: bytes) -> bytes:
    """What a server says to these bytes."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname or "", address.port or 0), 60) as one:
        one.sendall(request)
        one.settimeout(60)
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = one.recv(65536)
            if not piece:
                break
            answer += piece
        return answer


def test_a_server_in_the_background_answers_until_it_is_closed(store: actstore.Store) -> None:
    with background(store) as one, background(store) as other:
        assert one.url != other.url
        for found in (one, other):
            answer = httpx.get(f"{found.url}{API}/store", timeout=120)
            assert answer.json()["tokens"] == store.n_tokens
            assert "server" not in answer.headers
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{one.url}{API}/store", timeout=120)
    # The store is the caller's still.
    assert len(store.topk("mlp_post_act", k=2)) == 2


def test_an_address_that_is_taken(server: BackgroundServer, store: actstore.Store) -> None:
    port = urlsplit(server.url).port or 0
    with pytest.raises(InvalidInput, match=f"port {port}"):
        background(store, ServerSettings(port=port))


def test_large_bodies_over_a_socket(server: BackgroundServer) -> None:
    head = b"POST /api/v1/sql HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    declared = raw(server, head + b"Content-Length: 1000000\r\n\r\n{")
    assert b" 413 " in declared.splitlines()[0]
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    chunked = raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 6)
    assert b" 413 " in chunked.splitlines()[0]
    assert b"body_too_large" in chunked or b"application/problem+json" in chunked


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /api/v1/store HTTP/1.0\r\n\r\n",
        b"GET /api/v1/store HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /api/v1/store HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/api/v1/store HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /api/v1/store HTTP/1.1\r\nHost: local host\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_odd_requests_over_a_socket(server: BackgroundServer, request_bytes: bytes) -> None:
    answer = raw(server, request_bytes + b"\r\n\r\n")
    assert answer.split(b" ", 2)[1] in (b"400", b"421")
    assert httpx.get(f"{server.url}{API}/store", timeout=120).status_code == 200


def test_dots_in_a_path_over_a_socket(server: BackgroundServer, path: Path) -> None:
    address = urlsplit(server.url)
    for target in ("/../../../etc/passwd", "/api/docs/../../../etc/passwd", "/..%2f..%2fetc"):
        connection = http.client.HTTPConnection(address.hostname or "", address.port)
        connection.request("GET", target)
        answer = connection.getresponse()
        assert answer.status == 404
        text = answer.read()
        assert b"root:" not in text
        assert str(path).encode() not in text
        connection.close()


def test_many_clients_and_a_query_that_never_ends(
    server: BackgroundServer, store: actstore.Store
) -> None:
    expected = store.topk("mlp_write_norm", k=5, layers=1).to_json()["rows"]
    slow = "SELECT count(*) FROM range(100000000) a, range(100000) b"

    def ask(number: int) -> int:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            for turn in range(5):
                kind = (number + turn) % 4
                if kind == 0:
                    rows = client.get(f"{API}/topk/mlp_write_norm?k=5&layer=1").json()["rows"]
                    assert rows == expected
                elif kind == 1:
                    answer = client.get(f"{API}/neurons?sort=-max&limit=3&layer={number % 2}")
                    assert len(answer.json()["rows"]) == 3
                elif kind == 2:
                    where = f"position > {number}"
                    answer = client.get(f"{API}/topk/mlp_post_act", params={"where": where})
                    assert answer.status_code == 200
                else:
                    assert client.get(f"{API}/scalars/mlp_write_norm?sequence=1").is_success
        return number

    files = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(13) as pool:
        runaway = pool.submit(httpx.get, f"{server.url}{API}/sql", params={"q": slow}, timeout=120)
        assert sorted(pool.map(ask, range(12))) == list(range(12))
        answer = runaway.result()
    assert answer.status_code == 422
    assert answer.json()["kind"] == "sql_timeout"
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > files + 12 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(os.listdir("/proc/self/fd")) <= files + 12


def test_quick_answers_do_not_wait_for_slow_ones(server: BackgroundServer) -> None:
    slow = "SELECT count(*) FROM range(100000000) a, range(100000) b"

    def run_away(_: int) -> int:
        return httpx.get(f"{server.url}{API}/sql", params={"q": slow}, timeout=120).status_code

    with ThreadPoolExecutor(8) as pool:
        runaways = [pool.submit(run_away, number) for number in range(8)]
        time.sleep(0.5)
        for address in ("/store", "/neurons/0/1", "/topk/mlp_post_act?k=1", "/sequences/1"):
            assert httpx.get(f"{server.url}{API}{address}", timeout=120).status_code == 200
        # They hold two processes for a second each, one after the other.
        assert not all(one.done() for one in runaways)
        assert {one.result() for one in runaways} == {422}


def test_new_segments_show_with_reload(tmp_path: Path) -> None:
    path = make_store(tmp_path / "store", commit=[0])
    with actstore.open(path) as store, background(store, ServerSettings(reload=True)) as found:
        assert httpx.get(f"{found.url}{API}/store", timeout=120).json()["segments_committed"] == 1
        commit_segments(path, VALUES)
        deadline = time.monotonic() + 120
        seen = 1
        while seen == 1 and time.monotonic() < deadline:
            time.sleep(0.1)
            seen = httpx.get(f"{found.url}{API}/store", timeout=120).json()["segments_committed"]
        assert seen == 2


# The command line

RUN = "import typer; from actstore.cli.serving import serve; typer.run(serve)"


def test_the_command_prints_its_address_and_stops_on_ctrl_c(path: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    running = subprocess.Popen(
        [sys.executable, "-c", RUN, str(path), "--token-file", str(token)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    try:
        url = running.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}{API}/store", timeout=120).status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}{API}/store", headers=headers, timeout=120).status_code == 200
        assert (
            httpx.get(f"{url}{API}/sql?q=SELECT 1", headers=headers, timeout=120).status_code == 200
        )
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err
    assert TOKEN not in err


@pytest.fixture(scope="module")
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(serve)
    return app


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "token is needed"),
        (["--token-file", "/nonexistent/token"], "openssl rand"),
        (["--cors", "*"], "every web page"),
        (["--port", "70000"], "0 to 65535"),
        (["--objective", "nothing_of_it"], "objective"),
    ],
)
def test_the_command_says_what_is_wrong(
    command: typer.Typer, path: Path, options: list[str], message: str
) -> None:
    found = CliRunner().invoke(command, [str(path), *options])
    assert found.exit_code in (2, 3)
    assert message in " ".join(found.output.split())


def test_the_command_names_the_missing_extra(path: Path) -> None:
    code = f"import sys; sys.modules['fastapi'] = None\n{RUN}"
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "pip install 'actstore[server]'" in " ".join(found.stderr.split())


def test_the_other_commands_do_not_pay_for_the_server() -> None:
    code = textwrap.dedent(
        """
        import sys
        import actstore.cli.serving
        import actstore.query.session
        import actstore.query.service
        loaded = [name for name in ("fastapi", "uvicorn", "starlette") if name in sys.modules]
        assert not loaded, loaded
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True)
