"""The recorded outputs of the Transformer Debugger, by the script that compares folders."""

import json
import shutil
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "data" / "tiny_a"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "parity_tdb.py"
    spec = util.spec_from_file_location("parity_tdb", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["parity_tdb"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("through", ["prompt", "disk"])
def test_every_recorded_scalar_is_equal(
    script: ModuleType, through: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = script.main([str(FOLDER), "--through", through])
    printed = capsys.readouterr().out
    assert code == 0, printed
    names = {
        entry["dst_value"] for entry in json.loads((FOLDER / "manifest.json").read_text())["dst"]
    }
    assert len(names) == 105
    traced = {line.split()[3] for line in printed.splitlines() if "not through a store" in line}
    for name in names:
        assert f" {name}." in printed or traced, name


def test_a_wrong_value_and_a_missing_array_are_bad_news(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(FOLDER, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = next(one for one in manifest["dst"] if one["dst_value"] == "mlp_write_norm")
    manifest["dst"] = [entry]
    manifest["runs"] = {
        key: run for key, run in manifest["runs"].items() if run["run"] == entry["run"]
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / Path(*Path(entry["file"]).parts[1:])
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    next(iter(arrays.values())).flat[3] += 1e-6
    np.savez(path, **arrays)
    assert script.main([str(folder)]) == 1
    assert "FAILS" in capsys.readouterr().out
    entry["config"] = {"node_index_for_attribution": None}
    entry["dst_value"] = "single_node_write"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert script.main([str(folder)]) == 1
    assert "refused" in capsys.readouterr().out
