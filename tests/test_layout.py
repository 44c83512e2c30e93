"""The folders at the top are the package: in a checkout, in the sdist and in the wheel.

``store/``, ``ingest/`` and ``query/`` are mapped to ``actstore.store`` and so on: by links
in a checkout, by the build's own table in a wheel. Neither may drop or double a file.
"""

import ast
import importlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import actstore

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ingest", "query", "store")
TEXT = "The ferry left the north quay at seven, an hour before the fog.\n" * 40


# The checkout


@pytest.mark.parametrize("name", FOLDERS)
def test_package_is_the_folder_at_the_top(name: str) -> None:
    module = importlib.import_module(f"actstore.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py", (
        f"actstore.{name} is not {name}/ of this checkout. Links need `core.symlinks=true`, and "
        "the package an editable install: scripts/test makes one."
    )


@pytest.mark.parametrize("name", FOLDERS)
def test_link_is_relative_and_leads_to_the_folder(name: str) -> None:
    link = ROOT / "src" / "actstore" / name
    assert link.is_symlink(), f"{link.relative_to(ROOT)} is a copy; it must be a link."
    assert os.readlink(link) == f"../../{name}"


def modules() -> list[str]:
    """Every module of the package by name, without importing any."""
    found = ["actstore"]
    for folder in [*FOLDERS, "cli"]:
        top = ROOT / "src" / "actstore" / folder
        for path in sorted(top.resolve().rglob("*.py")):
            parts = path.relative_to(top.resolve()).with_suffix("").parts
            names = [part for part in parts if part != "__init__"]
            found.append(".".join(["actstore", folder, *names]))
    return found


def packages() -> list[str]:
    return [name for name in modules() if source(name).name == "__init__.py"]


def source(name: str) -> Path:
    path = ROOT / "src" / Path(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def public_names(tree: ast.Module) -> set[str]:
    """What a module defines, and what it imports by name from the package itself."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("actstore."):
            own = {name for name in modules() if name.startswith(f"{node.module}.")}
            names |= {
                alias.asname or alias.name
                for alias in node.names
                if f"{node.module}.{alias.name}" not in own
            }
    return {name for name in names if not name.startswith("_")}


def exported(tree: ast.Module) -> list[str] | None:
    """The value of ``__all__``, or None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            value: list[str] = ast.literal_eval(node.value)
            return value
    return None


@pytest.mark.parametrize("name", packages())
def test_package_exports_all_that_it_offers_and_nothing_else(name: str) -> None:
    tree = ast.parse(source(name).read_text(encoding="utf-8"))
    names = exported(tree)
    if names is None:
        assert not public_names(tree), f"{name} offers names and has no __all__."
        return
    missing = public_names(tree) - set(names)
    assert not missing, f"{name} offers {sorted(missing)} and does not export them."
    assert len(set(names)) == len(names)
    # Constants, then classes, then functions, as ruff sorts them.
    order = sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert names == order, f"{name}.__all__ is not sorted."


@pytest.mark.parametrize("name", modules())
def test_what_a_module_exports_exists(name: str) -> None:
    if name.endswith("__main__"):
        assert exported(ast.parse(source(name).read_text(encoding="utf-8"))) is None
        return
    module = importlib.import_module(name)
    for exported_name in getattr(module, "__all__", ()):
        assert hasattr(module, exported_name), f"{name}.__all__ names {exported_name}."


def test_no_second_copy_of_the_package_is_imported() -> None:
    """From the checkout's root ``import store`` works too, and makes every class twice."""
    doubles = [
        name
        for name in sys.modules
        if name.split(".")[0] in FOLDERS
        and str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT))
    ]
    assert not doubles, f"Imported by its bare name: {doubles}"


# The distributions


def package_files() -> set[str]:
    """What a wheel must hold below ``actstore/``: all files of the folders, links not followed."""
    found = set()
    for top, name in [(ROOT / "src" / "actstore", ""), *((ROOT / f, f"{f}/") for f in FOLDERS)]:
        for folder, folders, files in os.walk(top):
            folders[:] = [f for f in folders if f != "__pycache__"]
            base = Path(folder).relative_to(top)
            found |= {f"actstore/{name}{(base / file).as_posix()}" for file in files}
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # Without further options `build` makes the wheel from the sdist.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_wheel_from_the_sdist_holds_the_folders_and_nothing_else(
    distributions: tuple[Path, Path],
) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
        assert len(set(names)) == len(names)
        found = {name for name in names if ".dist-info/" not in name}
        for name in found:
            original = ROOT / "src" / name
            assert archive.read(name) == original.read_bytes(), f"{name} has other contents."
        licences = [name for name in names if name.endswith("licenses/LICENSE")]
    expected = package_files()
    assert found == expected, (
        f"The wheel lacks {sorted(expected - found)} and adds {sorted(found - expected)}. "
        "New facade files go into both only-include lists of pyproject.toml."
    )
    assert licences
    assert {"actstore/py.typed", "actstore/ingest/demo/model/model.safetensors"} <= found


def test_sdist_holds_what_building_and_testing_need(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert not [m.name for m in members.values() if m.issym() or m.islnk()]
    for path in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "store/reader.py",
        "src/actstore/__init__.py",
        "tests/test_layout.py",
        "tests/data/corpus/world.txt",
        "scripts/test",
    ):
        assert path in members, f"The sdist lacks {path}."
    assert not [path for path in members if "__pycache__" in path or path.startswith("runs/")]


@pytest.fixture(scope="module")
def clean(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which sees this one's packages but not its checkout.

    The dependencies come through a ``.pth`` file, so that torch is not installed twice. The
    files of such a folder that start editable installs are not run.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--disable-pip-version-check", str(distributions[1])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(clean: Path, *command: str) -> str:
    """Run a program of the clean environment, far from the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(clean / "bin" / command[0]), *command[1:]],
        cwd=clean,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_wheel_is_what_gets_imported(clean: Path) -> None:
    printed = run(
        clean,
        "python",
        "-c",
        "import actstore, actstore.store.reader as r; print(actstore.__file__, r.__file__,"
        " actstore.__version__)",
    ).split()
    assert all(str(clean) in path for path in printed[:2]), printed
    assert str(ROOT) not in " ".join(printed)
    assert printed[2] == actstore.__version__


def test_installed_command_line_answers(clean: Path) -> None:
    assert "Usage: actstore" in run(clean, "actstore", "--help")
    assert run(clean, "actstore", "--version").strip() == f"actstore {actstore.__version__}"
    scalars = run(clean, "actstore", "scalars")
    assert "mlp_write_norm" in scalars
    assert "resid_post_mlp" in run(clean, "python", "-m", "actstore.cli", "locations")


def test_installed_wheel_ingests_and_answers(clean: Path) -> None:
    """The shipped model's files came along, and all of the path works."""
    (clean / "text.txt").write_text(TEXT)
    run(clean, "actstore", "ingest", "demo", "text.txt", "--out", "store", "--context", "64")
    assert "mlp_post_act" in run(clean, "actstore", "info", "store")
    assert '"certificate"' in run(
        clean, "actstore", "topk", "store", "mlp_post_act", "-k", "3", "--json"
    )
    run(clean, "actstore", "verify", "store")
