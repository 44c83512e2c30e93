"""The viewer as people use it: every page and flow in a real Chromium, without a screen."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from viewer_store import DEAD, SET, FakePrompt, add_latents, build

from actstore.query.service.server import background
from actstore.query.session import Store

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

STRICT = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'"

PLACES = {
    "overview": "/",
    "neurons": "/neurons",
    "neuron": "/neurons/1/3",
    "neuron-dead": f"/neurons/{DEAD[0]}/{DEAD[1]}",
    "heads": "/heads",
    "head": "/heads/1/0?sequence=2&query=20",
    "latents": "/latents",
    "latent": f"/latents/{SET}/1/2",
    "sequences": "/sequences",
    "sequence": "/sequences/2",
    "scalars": "/scalars",
    "sql": "/sql?q=SELECT+layer,+neuron,+max,+kurtosis+FROM+neurons+LIMIT+9",
    "prompt": "/prompt",
}

Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if shutil.which(path) is None:
        pytest.fail(
            f"There is no Chromium at {path}, which these tests drive. Install it (on Debian and "
            "Ubuntu: apt-get install chromium), or set CHROMIUM to its path."
        )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = build(tmp_path_factory.mktemp("browser") / "store")
    add_latents(path)
    with Store(path) as store:
        server = background(store, prompt=FakePrompt)
        yield server.url
        server.close()


class Watched:
    """A page with all that went wrong on it."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.origin = origin
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on(
            "console",
            lambda said: (
                self.problems.append(f"console {said.type}: {said.text}")
                if said.type in ("error", "warning")
                else None
            ),
        )
        page.on("request", self._check)

    def _check(self, request: Request) -> None:
        if not request.url.startswith((self.origin + "/", "data:")):
            self.problems.append(f"foreign request: {request.url}")

    def go(self, address: str) -> Page:
        self.page.goto(self.origin + address)
        self.page.wait_for_load_state("networkidle")
        return self.page

    def forgive(self, pattern: str) -> None:
        """Problems that a test has caused on purpose."""
        self.problems = [one for one in self.problems if not re.search(pattern, one)]


@pytest.fixture
def watched(browser: Browser, origin: str) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(15_000)
    page = context.new_page()
    found = Watched(page, origin)
    yield found
    context.close()
    assert not found.problems, found.problems


def with_strict_policy(route: Route) -> None:
    """Answers as the server does, under a policy that allows nothing inline: no style either."""
    response = route.fetch()
    headers = {**response.headers, "content-security-policy": STRICT}
    route.fulfill(response=response, headers=headers)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("place", PLACES)
def test_page_looks_whole(browser: Browser, origin: str, place: str, scheme: Scheme) -> None:
    """Nothing sticks out at the width of a desk or of a phone, in light and in dark."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    context.route("**/*", with_strict_policy)
    watched = Watched(context.new_page(), origin)
    page = watched.go(PLACES[place])
    luminance = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", luminance)[:3])) > 382) == (scheme == "light")
    folder = os.environ.get("ACTSTORE_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{place}-{scheme}.png", full_page=True)
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (place, width)
    assert page.locator("h1").count() == 1
    context.close()
    assert not watched.problems, watched.problems


def test_hover_and_focus_show_token_and_value(watched: Watched) -> None:
    page = watched.go("/neurons/1/3")
    token = page.locator(".strip .t.focus").first
    said = token.get_attribute("data-tip")
    assert said is not None
    tip = page.locator("#tip")
    expect(tip).to_be_hidden()
    token.hover()
    expect(tip).to_have_text(said)
    assert re.fullmatch(r"“.+” · -?[\d.]+ · position \d+ · id \d+ · row \d+", said)
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()
    token.focus()
    expect(tip).to_have_text(said)
    following = token.evaluate(
        "node => { const all = [...node.closest('.strip').querySelectorAll('.t')];"
        " return all[all.indexOf(node) - 1].dataset.tip }"
    )
    page.keyboard.press("ArrowLeft")
    expect(tip).to_have_text(following)
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    expect(page).to_have_url(re.compile("/neurons/1/3$"))


def test_bar_of_a_histogram_says_its_count(watched: Watched) -> None:
    page = watched.go("/neurons/1/3")
    bar = page.locator(".chart .role-mark [aria-label]").nth(5)
    bar.hover()
    expect(page.locator("#tip")).to_have_text(
        re.compile(r"\u2212?[\d.]+ to \u2212?[\d.]+: \d+ rows?")
    )


def test_arrow_keys_go_to_the_neighbours(watched: Watched) -> None:
    page = watched.go("/neurons/0/59")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text("Neuron 1:0")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", level=1)).to_have_text("Neuron 0:59")
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("heading", level=1)).to_have_text("Neuron 0:58")


def test_jump_box_and_the_list_of_keys(watched: Watched) -> None:
    page = watched.go("/")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text("jump")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    page.keyboard.press("/")
    page.keyboard.type("1:5")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Neuron 1:5")


def test_table_is_filtered_sorted_and_paged_without_loading_anew(watched: Watched) -> None:
    page = watched.go("/neurons?size=10")
    page.evaluate("window.stillHere = true")
    status = page.locator("#table [role=status]")
    page.get_by_label("Layer").select_option("1")
    expect(status).to_have_text("1\u201310 of 60 neurons")
    expect(page).to_have_url(re.compile("layer=1"))
    page.get_by_role("link", name="kurtosis").click()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("kurtosis")
    page.get_by_label("Where (SQL)").fill("neuron < 20")
    page.keyboard.press("Enter")
    expect(status).to_have_text("1\u201310 of 20 neurons")
    page.get_by_label("State").select_option("dead")
    expect(status).to_have_text("1\u20131 of 1 neurons")
    assert page.evaluate("window.stillHere")
    page.get_by_label("Where (SQL)").fill("nonsense >")
    page.keyboard.press("Enter")
    expect(page.locator("#table")).to_contain_text("is no predicate")
    page.get_by_label("Where (SQL)").fill("false")
    page.keyboard.press("Enter")
    expect(page.locator("#table")).to_contain_text("No neuron fits")
    watched.forgive("status of 422")


def test_pages_of_the_table_and_the_way_back(watched: Watched) -> None:
    page = watched.go("/neurons?size=10")
    status = page.locator("#table [role=status]")
    page.get_by_role("link", name="next").click()
    expect(status).to_have_text("11\u201320 of 120 neurons")
    page.keyboard.press("ArrowRight")
    expect(status).to_have_text("21\u201330 of 120 neurons")
    page.go_back()
    expect(status).to_have_text("11\u201320 of 120 neurons")
    page.get_by_role("link", name="last").click()
    expect(status).to_have_text("111\u2013120 of 120 neurons")


def test_examples_in_tabs(watched: Watched) -> None:
    page = watched.go("/neurons/1/3")
    page.evaluate("window.stillHere = true")
    for name, kind in (("Random", "random"), ("Bottom", "bottom"), ("By quantile", "quantile")):
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.locator(".tabs [aria-current]")).to_have_text(name)
        expect(page).to_have_url(re.compile(f"examples={kind}"))
        assert page.locator(".strip").count() > 3
    page.get_by_role("link", name="Line breaks").click()
    expect(page.get_by_role("link", name="Without line breaks")).to_be_visible()
    page.get_by_role("link", name="Whole sequences").click()
    expect(page.get_by_role("link", name="Snippets")).to_be_visible()
    assert page.evaluate("window.stillHere")
    token = page.locator(".strip .t").nth(3)
    token.hover()
    expect(page.locator("#tip")).to_be_visible()
    page.reload()
    expect(page.locator(".tabs [aria-current]")).to_have_text("By quantile")


def test_parts_that_take_longer_come_by_themselves(watched: Watched) -> None:
    page = watched.go("/neurons/0/2")
    expect(page.locator("#similar table")).to_be_visible()
    expect(page.locator("#derived table")).to_contain_text("mlp_write_norm")
    page.locator("#similar a").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile("Neuron"))


def test_part_that_fails_says_so_in_its_place(watched: Watched) -> None:
    watched.page.route("**/similar", lambda route: route.abort())
    watched.page.route(
        "**/derived",
        lambda route: route.fulfill(
            status=503,
            content_type="text/html",
            body='<html><body><section id="problem">a damaged page</section></body></html>',
        ),
    )
    page = watched.go("/neurons/0/2")
    expect(page.locator("#similar")).to_contain_text("The server did not answer")
    expect(page.locator("#derived")).to_contain_text("a damaged page")
    expect(page.locator("#examples .strip").first).to_be_visible()
    watched.forgive("Failed to load resource|htmx")


def test_attention_from_a_token(watched: Watched) -> None:
    page = watched.go("/heads/1/0?sequence=2&query=5")
    heading = page.locator("h3").first
    expect(heading).to_contain_text("at 5 attends to")
    page.locator("#query-12").click()
    expect(heading).to_contain_text("at 12 attends to")
    expect(page).to_have_url(re.compile("query=12"))
    picture = page.locator("img[data-rows]")
    size = picture.bounding_box()
    assert size is not None
    rows = int(picture.get_attribute("data-rows") or 0)
    picture.click(position={"x": 3, "y": size["height"] * (20.5 / rows)})
    expect(heading).to_contain_text("at 20 attends to")
    assert picture.evaluate("node => node.naturalWidth") == rows
    page.get_by_role("link", name="next sequence").click()
    expect(page.locator("#attention-title")).to_have_text("Attention over sequence 3")


def test_sequence_by_scalar_and_layer(watched: Watched) -> None:
    page = watched.go("/sequences/2")
    page.get_by_label("Scalar").select_option("mlp_write_norm")
    expect(page.locator("table.grid caption")).to_contain_text("mlp_write_norm")
    page.get_by_label("Layer of the text").select_option("0")
    expect(page).to_have_url(re.compile("layer=0"))
    page.get_by_label("Unit").fill("7")
    page.keyboard.press("Enter")
    expect(page.locator("table.grid caption")).to_contain_text("unit 7")
    page.locator("table.grid td a").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Neuron 0:7")
    page = watched.go("/sequences/2")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", level=1)).to_have_text("Sequence 3")


def test_latents(watched: Watched) -> None:
    page = watched.go("/latents")
    page.get_by_label("State").select_option("live")
    expect(page.locator("#table [role=status]")).to_contain_text("of 11 latents")
    page.locator("#table tbody a").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile("Latent 1:"))
    page.get_by_role("link", name="By quantile").click()
    expect(page.locator(".tabs [aria-current]")).to_have_text("By quantile")


def test_sql_by_keyboard_with_a_chart_and_an_address(watched: Watched) -> None:
    page = watched.go("/sql")
    page.get_by_label("Query").fill(
        "SELECT layer, avg(max) AS mean_max FROM neurons GROUP BY layer ORDER BY layer"
    )
    page.keyboard.press("Control+Enter")
    expect(page.locator("#result [role=status]")).to_contain_text("2 rows in")
    expect(page.locator("#result .chart svg")).to_be_visible()
    expect(page).to_have_url(re.compile(r"/sql\?q=SELECT"))
    page.reload()
    expect(page.locator("#result tbody tr")).to_have_count(2)
    page.get_by_label("Query").fill("DROP TABLE neurons")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#result")).to_contain_text("DROP")
    expect(page.locator("#result table")).to_have_count(0)
    page.get_by_role("link", name="Frequent tokens").click()
    expect(page.locator("#result tbody tr")).to_have_count(25)
    watched.forgive("status of 422")


def test_prompt(watched: Watched) -> None:
    page = watched.go("/prompt")
    page.get_by_label("Text").fill("hello")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#result")).to_contain_text("Strongest units")
    expect(page.locator("#result")).to_contain_text("-7.500")
    page.locator("#result .strip .t").nth(2).hover()
    expect(page.locator("#tip")).to_contain_text("hello")
    page.get_by_role("link", name="1:3").first.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Neuron 1:3")


def test_everything_can_be_read_without_scripts(browser: Browser, origin: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{origin}/neurons/1/3")
    page.get_by_role("link", name="Random", exact=True).click()
    expect(page.locator(".tabs [aria-current]")).to_have_text("Random")
    page.get_by_role("link", name="Neurons that write in the same direction").click()
    expect(page.locator("#similar table")).to_be_visible()
    page.goto(f"{origin}/sql")
    page.get_by_label("Query").fill("SELECT 41 + 1 AS answer")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#result tbody")).to_have_text(re.compile("42"))
    context.close()


def test_every_control_is_reached_by_keyboard(watched: Watched) -> None:
    page = watched.go("/neurons/1/3")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(node => node.matches('.strip .t') ? 'token' : node.rel || node.id ||"
                " node.textContent.trim())(document.activeElement)"
            )
        )
    assert {"Skip to the content", "jump-to", "prev", "next", "SQL", "Random", "token"} <= reached


def test_print_leaves_out_what_paper_cannot_do(watched: Watched) -> None:
    page = watched.go("/neurons/1/3")
    page.emulate_media(media="print", color_scheme="dark")
    expect(page.locator("body > header")).to_be_hidden()
    expect(page.locator(".strip").first).to_be_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
