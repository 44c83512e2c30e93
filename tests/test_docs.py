"""The README's and the pages' code runs, and what they name exists."""

import re
import runpy
from pathlib import Path

import pytest
from tiny_ingest import fresh_copy
from typer.main import get_command

from actstore.cli import app
from actstore.query.derived import SCALARS
from actstore.query.derived.registry import rollback
from actstore.query.session import Store

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}actstore (.+)$", re.MULTILINE)


def test_the_tour_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = SNIPPET.findall((ROOT / "README.md").read_text())
    assert len(snippets) >= 5
    texts = [f"def f{n}(x):\n    return x + {n}\n\n\n" * 30 for n in range(20)]
    names: dict[str, object] = {"texts": texts}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)  # noqa: S102 - our own page
    store = names["store"]
    assert isinstance(store, Store)
    store.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_pages_exist(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for line in COMMAND.findall(page.read_text()):
        words = line.split("#")[0].split()
        assert words[0] in commands, line
        known = {option for p in commands[words[0]].params for option in p.opts + p.secondary_opts}
        for word in words[1:]:
            if re.fullmatch(r"--?[a-z][a-z-]*", word):
                assert word in known, f"{line}: {word}"


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:store|ingest|query|tests|src)/[\w/.]+)`", text))
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_pages_of_scalars_are_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "document_scalars.py"))
    message = "run: python scripts/document_scalars.py"
    pages = script["pages"]()
    for path, text in pages.items():
        assert path.is_file(), f"{path.name} is not there; {message}"
        assert path.read_text() == text, f"{path.name}; {message}"
    assert set((ROOT / "docs" / "scalars").iterdir()) == set(pages) - {ROOT / "docs/scalars.md"}


def test_the_page_about_scalars_of_your_own_runs(tmp_path: Path) -> None:
    fresh_copy(tmp_path / "store", locations="full", objective="next_token_log_prob")
    snippets = SNIPPET.findall((ROOT / "docs" / "your_own_scalars.md").read_text())
    assert len(snippets) == 3
    with rollback(), Store(tmp_path / "store") as store:
        names: dict[str, object] = {"store": store}
        for snippet in snippets:
            exec(compile(snippet, "your_own_scalars.md", "exec"), names)  # noqa: S102 - our own page
        assert "mlp_weighted_attribution" in SCALARS
    assert "mlp_weighted_attribution" not in SCALARS


def test_the_page_about_queries_runs(tmp_path: Path) -> None:
    fresh_copy(tmp_path / "store", locations="full", objective="next_token_log_prob")
    snippets = SNIPPET.findall((ROOT / "docs" / "queries.md").read_text())
    assert len(snippets) >= 8
    names: dict[str, object] = {"store": Store(tmp_path / "store")}
    for snippet in snippets:
        exec(compile(snippet, "queries.md", "exec"), names)  # noqa: S102 - our own page
    store = names["store"]
    assert isinstance(store, Store)
    assert store.topk("mlp_act_times_grad", k=1).certificate.bounded_by.startswith("index")
    store.close()
