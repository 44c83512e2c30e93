"""Who may ask: host names, tokens, sessions, other sites, rates and bodies, attacked."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from served import client_of, make_store

from actstore.query.service.access import Sessions, host_name, local_path
from actstore.query.service.limits import BodyLimit, TokenBuckets
from actstore.query.service.limits import client_of as client_name
from actstore.query.service.settings import ServerSettings, is_loopback, read_token
from actstore.store.errors import InvalidInput

API = "/api/v1"
TOKEN = "0123456789abcdef-a-long-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
GUARDED = ServerSettings(token=TOKEN)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("served") / "store")


@pytest.fixture
def guarded(path: Path) -> Iterator[TestClient]:
    with client_of(path, GUARDED, follow_redirects=False) as found:
        yield found


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    with client_of(path) as found:
        yield found


def kind_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["kind"]


# The token


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN.upper()}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN} {TOKEN}"},
        {"Authorization": "Bearer \xe9\xff"},
        {"Cookie": f"token={TOKEN}"},
        {"Cookie": f"actstore={TOKEN}"},
    ],
)
@pytest.mark.parametrize(
    "address", [f"{API}/store", f"{API}/nothing", "/openapi.json", "/api/docs", "/nothing"]
)
def test_a_missing_or_wrong_token(
    guarded: TestClient, headers: dict[str, str], address: str
) -> None:
    sent = [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
    answer = guarded.get(address, headers=sent)
    assert kind_of(answer) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert TOKEN not in answer.text


def test_two_tokens_are_none(guarded: TestClient) -> None:
    sent = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer x")]
    assert guarded.get(f"{API}/store", headers=sent).status_code == 401


def test_the_right_token(guarded: TestClient) -> None:
    assert guarded.get(f"{API}/store", headers=BEARER).status_code == 200
    lower = {"authorization": f"bearer {TOKEN}"}
    assert guarded.get(f"{API}/store", headers=lower).status_code == 200
    assert guarded.get("/openapi.json", headers=BEARER).json()["security"] == [{"token": []}]


def test_no_token_is_taken_from_an_address(guarded: TestClient) -> None:
    for key in ("token", "access_token", "key"):
        assert guarded.get(f"{API}/store?{key}={TOKEN}").status_code == 401
    answer = guarded.get(f"{API}/store?token={TOKEN}", headers=BEARER)
    assert kind_of(answer) == (422, "invalid_argument")


# Sessions


def log_in(client: TestClient, token: str = TOKEN, **fields: str) -> Any:
    return client.post("/login", data={"token": token, **fields})


def test_a_person_logs_in_and_out(guarded: TestClient) -> None:
    page = guarded.get("/neurons?layer=1", headers={"Accept": "text/html"})
    assert page.status_code == 303
    assert page.headers["location"] == "/login?next=%2Fneurons%3Flayer%3D1"
    form = guarded.get(page.headers["location"])
    assert form.status_code == 200
    assert 'value="/neurons?layer=1"' in form.text
    answer = log_in(guarded, next="/neurons?layer=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/neurons?layer=1")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert TOKEN not in cookie
    assert guarded.get(f"{API}/store").status_code == 200

    name, _, value = cookie.partition(";")[0].partition("=")
    assert guarded.post("/logout").headers["location"] == "/login"
    # The cookie that somebody kept is worth nothing now.
    replayed = {"Cookie": f"{name}={value}"}
    assert guarded.get(f"{API}/store", headers=replayed).status_code == 401


def test_a_session_of_another_server_is_refused(path: Path, guarded: TestClient) -> None:
    cookie = log_in(guarded).headers["set-cookie"].partition(";")[0]
    with client_of(path, GUARDED, follow_redirects=False) as other:
        assert other.get(f"{API}/store", headers={"Cookie": cookie}).status_code == 401
        # Cookies do not tell ports apart: two servers of one host need two names.
        own = log_in(other).headers["set-cookie"].partition("=")[0]
        assert own != cookie.partition("=")[0]
        value = cookie.partition("=")[2]
        forged = {"Cookie": f"{own}={value}"}
        other.cookies.clear()
        assert other.get(f"{API}/store", headers=forged).status_code == 401


def test_wrong_tokens_are_tried_a_few_times_alone(guarded: TestClient) -> None:
    answers = [log_in(guarded, "not the token at all") for _ in range(12)]
    assert [answer.status_code for answer in answers[:10]] == [401] * 10
    assert "not this server" in answers[0].text
    assert kind_of(answers[-1]) == (429, "rate_limited")
    assert "set-cookie" not in answers[0].headers


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil", "x"])
def test_a_login_leads_nowhere_else(guarded: TestClient, target: str) -> None:
    assert local_path(target) == "/"
    assert log_in(guarded, next=target).headers["location"] == "/"
    shown = guarded.get("/login", params={"next": '/"><script>alert(1)</script>'})
    assert "<script>" not in shown.text


def test_sessions_end_and_are_bounded() -> None:
    now = [0.0]
    sessions = Sessions(lambda: now[0], max_sessions=2)
    first, second = sessions.begin(), sessions.begin()
    assert sessions.holds(first)
    third = sessions.begin()
    assert [sessions.holds(one) for one in (first, second, third)] == [False, True, True]
    sessions.end(second)
    assert not sessions.holds(second)
    now[0] = sessions.seconds + 1.0
    assert not sessions.holds(third)


# Names and sites


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:80"])
def test_the_servers_own_names(client: TestClient, host: str) -> None:
    assert client.get(f"{API}/store", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "localhost@evil.example",
        "evil.example/localhost",
        "localhost:80:80",
        "[::1",
        "0.0.0.0",
        "",
    ],
)
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    answer = client.get(f"{API}/store", headers={"Host": host})
    assert kind_of(answer) == (421, "bad_host")


def test_the_host_is_asked_before_the_token(guarded: TestClient) -> None:
    answer = guarded.get(f"{API}/store", headers={**BEARER, "Host": "evil.example"})
    assert answer.status_code == 421
    sent = [("Host", "localhost"), ("Host", "evil.example")]
    assert guarded.get(f"{API}/store", headers=sent).status_code == 421
    # What proxies add is not believed.
    forged = {"Host": "evil.example", "X-Forwarded-Host": "localhost"}
    assert guarded.get(f"{API}/store", headers=forged).status_code == 421


def test_names_follow_the_address() -> None:
    assert "localhost" in ServerSettings().host_names()
    away = ServerSettings(host="10.1.2.3", token=TOKEN, allowed_hosts=("Lab.Example",))
    assert away.host_names() == {"10.1.2.3", "lab.example"}
    everywhere = ServerSettings(host="0.0.0.0", token=TOKEN).host_names()
    assert {"localhost", "127.0.0.1"} < everywhere
    assert "0.0.0.0" not in everywhere
    assert host_name("lab.example.") == "lab.example"


CROSS = {"Sec-Fetch-Site": "cross-site"}


@pytest.mark.parametrize(
    ("method", "headers", "allowed"),
    [
        ("GET", {}, True),
        ("GET", {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, True),
        ("GET", {**CROSS, "Sec-Fetch-Mode": "navigate"}, True),
        ("GET", {**CROSS, "Sec-Fetch-Mode": "no-cors"}, False),
        ("GET", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, False),
        ("GET", {"Origin": "http://evil.example"}, False),
        ("POST", {}, True),
        ("POST", {"Origin": "http://127.0.0.1"}, True),
        ("POST", {"Origin": "null"}, False),
        ("POST", {"Origin": "http://127.0.0.1:8888"}, False),
        ("POST", {**CROSS, "Sec-Fetch-Mode": "navigate"}, False),
    ],
)
def test_what_other_sites_may_ask(
    client: TestClient, method: str, headers: dict[str, str], allowed: bool
) -> None:
    address = f"{API}/sql?q=SELECT 1" if method == "GET" else f"{API}/sql"
    body = None if method == "GET" else {"q": "SELECT 1"}
    answer = client.request(method, address, headers=headers, json=body)
    if allowed:
        assert answer.status_code == 200
    else:
        assert kind_of(answer) == (403, "forbidden")
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_that_was_named_may_read(path: Path) -> None:
    origin = "http://localhost:8888"
    with client_of(path, ServerSettings(cors_origins=(origin,), token=TOKEN)) as found:
        leave = found.options(
            f"{API}/store",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "GET",
                "Access-Control-Request-Headers": "authorization",
            },
        )
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == origin
        headers = {**BEARER, **CROSS, "Sec-Fetch-Mode": "cors"}
        answer = found.get(f"{API}/store", headers={**headers, "Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "ETag" in answer.headers["access-control-expose-headers"]
        other = found.get(f"{API}/store", headers={**headers, "Origin": "http://evil.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers
        refused = found.get(f"{API}/store", headers={"Origin": origin})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin


def test_headers_for_browsers(client: TestClient, guarded: TestClient, path: Path) -> None:
    for answer in (
        client.get(f"{API}/store"),
        client.get("/nothing"),
        guarded.get(f"{API}/store"),
        client.get(f"{API}/store", headers={"Host": "evil.example"}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "script-src 'self';" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "localhost:*" in client.get("/").headers["content-security-policy"]
    assert guarded.get("/").headers["content-security-policy"].endswith("frame-ancestors 'self'")
    framed = ServerSettings(token=TOKEN, frame_ancestors=("https://lab.example",))
    with client_of(path, framed) as found:
        policy = found.get("/").headers["content-security-policy"]
        assert policy.endswith("frame-ancestors 'self' https://lab.example")


# Paths


@pytest.mark.parametrize(
    "address",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/api/docs/../../../../etc/passwd",
        "/api/docs/..%2f..%2fsettings.py",
        "/api/docs/%2e%2e/login.html",
        "/static/..%2f..%2f..%2fetc/passwd",
        "/api/docs/login.html",
        "//etc/passwd",
        "/%00",
        f"{API}/raw/..%2f..%2fstore.json",
        f"{API}/scalars/..%5c..%5cstore.json",
        f"{API}/raw/%2fetc%2fpasswd?token=1",
    ],
)
def test_no_path_is_taken_from_an_address(client: TestClient, address: str, path: Path) -> None:
    answer = client.request("GET", f"http://127.0.0.1{address}")
    assert answer.status_code in (404, 422)
    assert "root:" not in answer.text
    assert str(path) not in answer.text


# Bodies and rates


def test_bodies_above_the_limit(path: Path) -> None:
    settings = ServerSettings(max_body_bytes=1000)
    with client_of(path, settings) as found:
        fits = {"q": f"SELECT 1 -- {'x' * 900}"}
        assert found.post(f"{API}/sql", json=fits).status_code == 200
        large = found.post(f"{API}/sql", json={"q": "x" * 1000})
        assert kind_of(large) == (413, "body_too_large")

        def pieces() -> Iterator[bytes]:
            for _ in range(50):
                yield b"x" * 100

        chunked = found.post(f"{API}/sql", content=pieces())
        assert kind_of(chunked) == (413, "body_too_large")
        lying = found.post(f"{API}/sql", content=b"{}", headers={"Content-Length": "9" * 30})
        assert kind_of(lying) == (413, "body_too_large")
        odd = found.post(f"{API}/sql", content=b"{}", headers={"Content-Length": "-1"})
        assert kind_of(odd) == (413, "body_too_large")
        with_get = found.request("GET", f"{API}/store", content=b"x" * 2000)
        assert with_get.status_code == 413


def test_a_body_without_end_is_not_kept() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the body is too large to get here")

    sent: list[Any] = []
    given = 0

    async def receive() -> dict[str, Any]:
        nonlocal given
        given += 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(app, 1000, 5.0)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert given == 11


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("there is no body")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(app, 1000, 0.01)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert b"body_too_slow" in sent[1]["body"]


def test_a_client_that_asks_too_often_waits(path: Path) -> None:
    with client_of(path, ServerSettings(requests_per_minute=3)) as found:
        answers = [found.get(f"{API}/store") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert kind_of(answers[-1]) == (429, "rate_limited")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20


def test_buckets_fill_again_and_are_bounded() -> None:
    now = [0.0]
    buckets = TokenBuckets(60, lambda: now[0], max_clients=3)
    assert [buckets.take("a") for _ in range(60)] == [0.0] * 60
    assert buckets.take("a") == pytest.approx(1.0)
    assert buckets.take("b") == 0.0
    now[0] = 1.5
    assert buckets.take("a") == 0.0
    assert buckets.take("a") > 0
    for client in "cdefgh":
        buckets.take(client)
    assert len(buckets) == 3


def test_a_network_of_many_addresses_is_one_client() -> None:
    hosts = ("2001:db8::1", "2001:db8::ffff", "2001:db8:0:1::1", "10.0.0.1", "testclient")
    names = [client_name({"client": (host, 1)}) for host in hosts]
    assert names[0] == names[1] != names[2]
    assert names[3:] == ["10.0.0.1", "testclient"]
    assert client_name({}) == ""


# Settings


@pytest.mark.parametrize(
    "options",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": ""},
        {"host": "10.0.0.1"},
        {"host": "lab.example"},
        {"port": 65536},
        {"token": "short"},
        {"token": "a token with a line\nbreak in it"},
        {"max_rows": 0},
        {"body_seconds": 0},
        {"requests_per_minute": 0},
        {"cors_origins": ("*",)},
        {"cors_origins": ("localhost",)},
        {"cors_origins": ("http://a.example/path",)},
        {"frame_ancestors": ("http://a.example; script-src *",), "token": TOKEN},
    ],
)
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        ServerSettings(**options)


def test_settings_keep_their_secret() -> None:
    assert TOKEN not in repr(GUARDED)
    assert ServerSettings().rate is None
    assert ServerSettings(host="10.0.0.1", token=TOKEN).rate is not None
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")))


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(InvalidInput, match="openssl rand"):
        read_token(file)
    file.write_text(f"{TOKEN}\n")
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        with pytest.raises(InvalidInput, match="chmod 600"):
            read_token(file)
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    for content in (b"", b"\n", b"\xff" * 20):
        file.write_bytes(content)
        with pytest.raises(InvalidInput):
            read_token(file)
    with pytest.raises(InvalidInput):
        read_token(tmp_path)
