import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urljoin, urlsplit

import numpy as np
import pytest
from fastapi.testclient import TestClient
from viewer_store import (
    DEAD,
    DEAD_LATENT,
    LAYERS,
    LENGTHS,
    SET,
    FakePrompt,
    add_latents,
    build,
    values,
)

from actstore.query.service.app import create_app
from actstore.query.service.pages.rendering import ASSETS, error_page
from actstore.query.session import Store
from actstore.query.views.sql_result import EXAMPLE_QUERIES
from actstore.store.errors import ErrorKind, Unavailable

ORIGIN = "http://127.0.0.1"
VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr", "source"}


class Page(HTMLParser):
    """A page taken apart: text, elements, links; refuses tags that do not match."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def with_class(self, name: str) -> list[dict[str, str]]:
        return [found for _, found in self.elements if name in found.get("class", "").split()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build(tmp_path_factory.mktemp("pages") / "store")
    add_latents(made)
    return made


@contextmanager
def client_of(path: Path, prompt: Any = None) -> Iterator[TestClient]:
    with (
        Store(path) as store,
        TestClient(
            create_app(store, prompt=prompt), base_url=ORIGIN, raise_server_exceptions=False
        ) as client,
    ):
        client.headers["Accept"] = "text/html,*/*;q=0.8"
        yield client


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    with client_of(path) as found:
        yield found


def page_of(client: TestClient, address: str, status: int = 200) -> Page:
    response = client.get(address)
    assert response.status_code == status, (address, response.text[:2000])
    assert response.headers["content-type"].startswith("text/html"), address
    return Page(response.text)


PLACES = [
    "/",
    "/neurons",
    "/neurons?layer=1&sort=kurtosis&alive=live&promotes=a&where=max>0",
    "/neurons/0/1",
    "/neurons/0/1?examples=random&k=3&lines=true&whole=true&seed=4",
    "/neurons/0/1?examples=quantile",
    "/neurons/0/1/derived",
    "/neurons/0/1/similar",
    f"/neurons/{DEAD[0]}/{DEAD[1]}",
    "/heads",
    "/heads/1/0?sequence=2&query=3",
    "/latents",
    f"/latents/{SET}/1/2",
    f"/latents/{SET}/1/{DEAD_LATENT}",
    "/sequences",
    "/sequences/2",
    "/sequences/2?scalar=mlp_write_norm&layer=0&unit=3&lines=false",
    "/scalars",
    "/sql",
    "/sql?" + urlencode({"q": "SELECT layer, neuron, max FROM neurons LIMIT 5"}),
]


@pytest.mark.parametrize("address", PLACES)
def test_page_is_sound(client: TestClient, path: Path, address: str) -> None:
    page = page_of(client, address)
    assert str(path) not in page.text
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("main")) == 1
    assert len(page.all("h1")) + address.count("/derived") + address.count("/similar") == 1
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    labelled = {found["for"] for found in page.all("label") if "for" in found}
    assert labelled <= set(ids)
    for tag, found in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in found), (tag, found)
        for name in ("aria-labelledby", "hx-target"):
            for wanted in found.get(name, "").split():
                assert wanted.lstrip("#") in ids, (name, wanted)
    assert not page.all("style")
    assert all(found.get("src") for found in page.all("script"))
    assert all("alt" in found for found in page.all("img"))


@pytest.mark.parametrize("address", PLACES)
def test_page_asks_no_other_origin(client: TestClient, address: str) -> None:
    for _, found in page_of(client, address).elements:
        for name in ("href", "src", "action", "hx-get", "hx-post"):
            if name in found:
                target = urlsplit(urljoin(ORIGIN + address, found[name]))
                assert f"{target.scheme}://{target.netloc}" == ORIGIN, found


def test_every_link_leads_somewhere(client: TestClient) -> None:
    """Walks the viewer as a person would, a few links of each kind; JSON twins included."""
    waiting, seen = ["/"], {"/"}
    kinds: dict[str, int] = {}
    while waiting:
        address = waiting.pop(0)
        response = client.get(address)
        assert response.status_code == 200, (address, response.text[:500])
        if not response.headers["content-type"].startswith("text/html"):
            continue
        page = Page(response.text)
        links = [
            found[name]
            for _, found in page.elements
            for name in ("href", "src", "hx-get")
            if name in found
        ]
        for link in links:
            target = urlsplit(urljoin(ORIGIN + address, link))
            found_at = target.path + (f"?{target.query}" if target.query else "")
            shape = (
                re.sub(r"\d+", "#", target.path) + "?" + ",".join(sorted(parse_qs(target.query)))
            )
            if found_at not in seen and kinds.get(shape, 0) < 2 and target.path != "/api/docs":
                kinds[shape] = kinds.get(shape, 0) + 1
                seen.add(found_at)
                waiting.append(found_at)
    assert len(seen) > 60
    assert {"/api/v1/store", "/heads/0/0", "/scalars", "/sql"} <= seen


def test_names_from_the_store_are_text(client: TestClient) -> None:
    markup = client.get("/sequences").text
    assert "&lt;b&gt;bold&lt;/b&gt;&amp;.txt" in markup
    assert "<b>bold" not in markup
    hostile = "<img src=x onerror=alert(1)>"
    markup = client.get("/sql", params={"q": f"SELECT '{hostile}' AS \"{hostile}\""}).text
    assert hostile not in markup
    assert "&lt;img src=x" in markup
    markup = client.get("/neurons", params={"promotes": hostile, "where": "true"}).text
    assert hostile not in markup


def test_overview_shows_counts_and_layers(client: TestClient) -> None:
    page = page_of(client, "/")
    assert f"{sum(LENGTHS)}" in page.text
    assert "1 of 1" in page.text
    neurons = values()["mlp_post_act"]
    ordinary = np.concatenate([np.arange(length) > 0 for length in LENGTHS])
    for layer in range(LAYERS):
        assert f"{float(neurons[layer][ordinary].max()):#.4g}" in page.text


def test_neuron_table_sorts_filters_and_pages(client: TestClient) -> None:
    first = page_of(client, "/neurons?size=10")
    names = re.findall(r"\b[01]:\d+\b", first.text)
    ordinary = np.concatenate([np.arange(length) > 0 for length in LENGTHS])
    best = values()["mlp_post_act"][:, ordinary].max(axis=1)
    order = np.argsort(-best.reshape(-1), kind="stable")[:10]
    assert names[:10] == [f"{n // best.shape[1]}:{n % best.shape[1]}" for n in order]
    assert "1\u201310 of 120 neurons" in first.text
    assert any(found.get("rel") == "next" for found in first.all("a"))
    assert [found for found in first.all("th") if found.get("aria-sort") == "descending"]
    last = page_of(client, "/neurons?size=10&page=12")
    assert not any(found.get("rel") == "next" for found in last.all("a"))
    assert "Go to the last one" in page_of(client, "/neurons?size=10&page=13").text
    assert "No neuron fits" in page_of(client, "/neurons?where=false").text
    assert "dead" in page_of(client, "/neurons?alive=dead").text


def test_table_links_to_the_query_that_made_it(client: TestClient) -> None:
    page = page_of(client, "/neurons?layer=1&sort=min&descending=false&size=7")
    link = next(found["href"] for found in page.all("a") if found["href"].startswith("/sql?q="))
    rows = client.get("/api/v1" + link, headers={"Accept": "application/json"}).json()["rows"]
    assert len(rows) == 7
    shown = re.findall(r"\b1:(\d+)\b", page.text)
    assert shown == [str(row[1]) for row in rows]


def test_neuron_page_has_all_its_parts(client: TestClient) -> None:
    page = page_of(client, "/neurons/1/3?k=4")
    for part in (
        "Activations",
        "Direct effect on the logits",
        "Examples",
        "Derived scalars",
        "Similar neurons",
        "promotes",
        "suppresses",
        "write norm",
        "ordinary rows",
    ):
        assert part in page.text, part
    assert len(page.all("svg")) == 1
    assert len(page.with_class("examples")) == 1
    tips = [found["data-tip"] for found in page.with_class("t")]
    assert tips
    assert all(re.search(r"“.*” · \S+ · position \d+ · id \d+ · row \d+", tip) for tip in tips)
    assert len(page.with_class("focus")) == 4
    loads = [found for found in page.all("section") if found.get("hx-trigger") == "load"]
    assert [found["hx-get"] for found in loads] == [
        "/neurons/1/3/derived",
        "/neurons/1/3/similar",
    ]
    rel = {found["rel"]: found["href"] for found in page.all("a") if "rel" in found}
    assert rel == {"prev": "/neurons/1/2", "next": "/neurons/1/4"}
    hrefs = [found["href"] for found in page.all("a")]
    assert "/api/v1/neurons/1/3" in hrefs


def test_dead_neuron_says_so(client: TestClient) -> None:
    page = page_of(client, f"/neurons/{DEAD[0]}/{DEAD[1]}")
    assert "it is dead on this corpus" in page.text
    latent = page_of(client, f"/latents/{SET}/1/{DEAD_LATENT}")
    assert "there are no examples" in latent.text


def test_missing_activations_are_said_on_purpose(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise Unavailable("mlp_post_act cannot be had here.", kind=ErrorKind.NOT_STORED)

    monkeypatch.setattr(Store, "examples", unavailable)
    page = page_of(client, "/neurons/0/5")
    assert "There are no examples: mlp_post_act cannot be had here." in page.text
    assert "promotes" in page.text


def test_store_that_is_not_complete_says_so(tmp_path: Path) -> None:
    made = build(tmp_path / "part", segment_rows=512, commit=[])
    with client_of(made) as client:
        page = page_of(client, "/")
        assert "No segment is stored yet" in page.text
        assert "0 of 1 segments are stored so far" in page.text
        assert "No sequence is stored yet" in page_of(client, "/sequences").text
        assert "nothing_committed" in page_of(client, "/heads/0/0", 404).text
        for address in ("/neurons", "/neurons/0/1", "/heads", "/scalars", "/sql?q=FROM+neurons"):
            page = page_of(client, address)
            assert str(made) not in page.text, address
        assert "no committed segment" in page_of(client, "/neurons/0/1").text


@pytest.mark.parametrize(
    ("address", "status", "kind"),
    [
        ("/neurons/9/0", 404, "unknown_layer"),
        ("/neurons/0/999", 404, "unknown_unit"),
        ("/neurons/x/0", 422, "invalid_argument"),
        ("/neurons/0/1?examples=best", 422, "invalid_argument"),
        ("/neurons?sort=nothing", 422, "invalid_argument"),
        ("/neurons?where=nothing%3D1", 422, "invalid_sql"),
        ("/neurons?where=1%3D1)%20OR%20(1%3D1", 422, "invalid_sql"),
        ("/neurons?size=100000", 422, "invalid_argument"),
        ("/heads/0/99", 404, "unknown_unit"),
        ("/heads/0/0?sequence=999", 404, "unknown_row"),
        ("/latents/none/0/0", 404, "not_stored"),
        ("/latents?set=none", 404, "not_stored"),
        (f"/latents/{SET}/0/0", 404, "unknown_layer"),
        ("/sequences/999", 404, "unknown_row"),
        ("/sequences/0?scalar=nothing", 404, "unknown_scalar"),
        ("/jump?to=somewhere", 422, "invalid_argument"),
        ("/prompt", 404, "not_stored"),
    ],
)
def test_problem_is_a_page_with_its_kind(
    client: TestClient, address: str, status: int, kind: str
) -> None:
    page = page_of(client, address, status)
    assert kind in page.text
    assert [found for found in page.all("section") if found.get("id") == "problem"]


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ("3:17", "/neurons/3/17"),
        (" n1.2 ", "/neurons/1/2"),
        ("L3N17", "/neurons/3/17"),
        ("h2:1", "/heads/2/1"),
        ("head 2 1", "/heads/2/1"),
        ("s5", "/sequences/5"),
        ("#5", "/sequences/5"),
        ("f1:2", f"/latents/{SET}/1/2"),
    ],
)
def test_jump(client: TestClient, typed: str, place: str) -> None:
    response = client.get("/jump", params={"to": typed}, follow_redirects=False)
    assert response.status_code == 303
    assert response.headers["location"] == place


def test_damaged_shard_is_a_problem_with_its_name_and_never_numbers(
    path: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "store"
    shutil.copytree(path, copied)
    shard = max(
        (file for file in copied.rglob("*") if file.is_file() and "mlp_post_act" in str(file)),
        key=lambda file: file.stat().st_size,
    )
    data = bytearray(shard.read_bytes())
    for at in range(0, len(data) - 64, 64):
        data[at] ^= 0xFF
    shard.write_bytes(bytes(data))
    with client_of(copied) as client:
        response = client.get("/neurons/0/1?examples=random")
        page = Page(response.text)
    assert response.status_code == 503
    assert shard.relative_to(copied).parts[-1] in page.text
    assert str(copied) not in response.text
    assert not page.with_class("strip")
    assert not page.with_class("facts")


def test_store_that_was_replaced_is_refused(path: Path, tmp_path: Path) -> None:
    copied = tmp_path / "store"
    shutil.copytree(path, copied)
    with client_of(copied) as client:
        assert client.get("/neurons/0/1").status_code == 200
        record = copied / "store.json"
        record.write_bytes(record.read_bytes().replace(b'"tiny"', b'"liar"'))
        response = client.get("/neurons/0/1")
    assert response.status_code == 503
    assert "store_changed" in response.text
    assert response.headers["content-type"].startswith("text/html")


def test_pages_are_cached_by_a_tag(client: TestClient) -> None:
    first = client.get("/neurons/0/1")
    again = client.get("/neurons/0/1", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert not again.content
    other = client.get("/neurons/0/2")
    assert other.headers["etag"] != first.headers["etag"]
    assert "etag" not in client.get("/neurons/0/999").headers


def test_files_are_few_and_lasting(client: TestClient) -> None:
    for name in ASSETS:
        response = client.get(f"/assets/{name}")
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]
    for name in ("..%2F..%2Fapp.py", "htmx-LICENSE.txt", "viewer.css%00"):
        assert client.get(f"/assets/{name}").status_code == 404
    markup = client.get("/").text
    links = re.findall(r"/assets/[\w.-]+\?v=([0-9a-f]{12})", markup)
    assert len(set(links)) == 1


def test_pages_without_the_extra_show_tables(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("distribution", "sql_result"):
        monkeypatch.setattr(f"actstore.query.views.{module}.can_draw", lambda: False)
    page = page_of(client, "/neurons/0/3")
    assert not page.all("svg")
    assert "pip install 'actstore[viewer]'" in page.text
    assert "Histogram of mlp_post_act" in page.text
    answer = page_of(client, "/sql?q=SELECT+layer,max(max)+AS+m+FROM+neurons+GROUP+BY+layer")
    assert "pip install 'actstore[viewer]'" in answer.text


# SQL


def test_sql_page_answers_and_can_be_shared(client: TestClient) -> None:
    query = "SELECT layer, neuron, max FROM neurons ORDER BY max DESC LIMIT 3"
    page = page_of(client, "/sql?" + urlencode({"q": query}))
    assert "3 rows in" in page.text
    assert query in page.text
    hrefs = [found["href"] for found in page.all("a")]
    assert any(re.fullmatch(r"/neurons/\d/\d+", href) for href in hrefs)
    assert f"/sql?{urlencode({'q': query})}" in hrefs
    assert f"/api/v1/sql?{urlencode({'q': query, 'format': 'csv'})}" in hrefs
    assert "kurtosis" in page.text


@pytest.mark.parametrize("query", [text for _, text in EXAMPLE_QUERIES])
def test_every_example_query_works(client: TestClient, query: str) -> None:
    page = page_of(client, "/sql?" + urlencode({"q": query}))
    assert re.search(r"\d+ rows? in \d+ ms", page.text)


def test_sql_page_keeps_a_query_that_fails(client: TestClient, path: Path) -> None:
    page = page_of(client, "/sql?" + urlencode({"q": "SELECT nothing FROM neurons"}), 422)
    assert "SELECT nothing FROM neurons" in page.text
    assert any(found.get("role") == "alert" for _, found in page.elements)
    for hostile in (
        "DROP TABLE neurons",
        "SELECT 1; SELECT 2",
        "FROM read_csv('/etc/passwd')",
        "COPY neurons TO '/tmp/x'",
        "ATTACH '/tmp/x'",
    ):
        response = client.get("/sql", params={"q": hostile})
        assert response.status_code == 422, hostile
        assert str(path) not in response.text
    assert "The query has no rows" in page_of(client, "/sql?q=SELECT+1+AS+a+WHERE+false").text


def test_sql_page_says_when_rows_are_left_out(client: TestClient) -> None:
    page = page_of(client, "/sql?q=SELECT+range+FROM+range(5000)")
    assert "the first 1,000 are shown" in page.text


# Prompt


def test_prompt_page_runs_a_text(path: Path) -> None:
    with client_of(path, FakePrompt) as client:
        assert "Type a text" in client.get("/prompt").text
        assert 'href="/prompt"' in client.get("/").text
        response = client.post("/prompt", data={"text": "hello\r\nyou"})
        page = Page(response.text)
        assert response.status_code == 200
        assert "-7.500" in page.text
        assert "/neurons/1/3" in [found.get("href") for found in page.all("a")]
        assert "&lt;b&gt;" in response.text
        assert "hello you" in page.text
        assert "100 %" in page.text or "99.99" in page.text
        assert client.post("/prompt", data={"text": ""}).status_code == 200
        assert client.post("/prompt", data={"text": "x" * 30_000}).status_code == 413
        wrong = client.post("/prompt", data={"text": "x", "scalar": "nothing"})
        assert wrong.status_code == 404
        assert "unknown_scalar" in wrong.text
        foreign = client.post(
            "/prompt", data={"text": "x"}, headers={"Origin": "https://elsewhere.example"}
        )
        assert foreign.status_code == 403


def test_prompt_page_without_a_model_says_how_to_have_one(client: TestClient) -> None:
    assert "--model" in page_of(client, "/prompt", 404).text
    assert client.post("/prompt", data={"text": "x"}).status_code == 404
    assert 'href="/prompt"' not in client.get("/").text


def test_error_page_of_any_problem() -> None:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/x",
        "headers": [],
        "query_string": b"",
        "app": SimpleNamespace(state=SimpleNamespace()),
        "scheme": "http",
        "server": ("127.0.0.1", 80),
    }
    from fastapi import Request

    problem = {"status": 429, "title": "Too Many Requests", "detail": "<wait>", "kind": "busy"}
    response = error_page(Request(scope), problem, {"Retry-After": "5", "Content-Length": "1"})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "5"
    assert "&lt;wait&gt;" in bytes(response.body).decode()
    assert Page(bytes(response.body).decode()).all("h1")


def test_json_twins_name_the_same_numbers(client: TestClient) -> None:
    page = page_of(client, "/neurons/0/4")
    row = json.loads(client.get("/api/v1/neurons/0/4", headers={"Accept": "*/*"}).text)["row"]
    assert f"{row['max']:#.4g}" in page.text
    assert quote("SELECT *").replace("%20", "+") in str(page.all("a"))
