"""What `examples/` holds works as it is."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import nbformat
import pytest
from nbclient import NotebookClient

read_notebook: Any = nbformat.read
"""nbformat is not typed."""

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nbformat.NotebookNode]:
    folder = tmp_path_factory.mktemp("notebook")
    found = read_notebook(EXAMPLES / "quickstart.ipynb", as_version=4)
    kernels = folder / "kernels" / "python3"
    kernels.mkdir(parents=True)
    # This interpreter, whatever kernels are installed beside it.
    (kernels / "kernel.json").write_text(
        f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"],'
        ' "display_name": "Python 3", "language": "python"}'
    )
    os.environ["JUPYTER_PATH"] = str(folder)
    client = NotebookClient(found, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    yield found
    shutil.rmtree(folder, ignore_errors=True)


def outputs(notebook: nbformat.NotebookNode, begins: str) -> dict[str, str]:
    """What the cell that ends with a name or a call of it shows, by media type."""
    for cell in notebook.cells:
        last = cell.source.splitlines()[-1]
        if cell.cell_type == "code" and (last == begins or last.startswith(f"{begins}(")):
            return dict(cell.outputs[-1].data) if cell.outputs else {}
    raise AssertionError(begins)


def test_notebook_runs_and_shows_itself(notebook: nbformat.NotebookNode) -> None:
    assert "tokens" in outputs(notebook, "store")["text/html"]
    assert "mlp_post_act" in outputs(notebook, "best")["text/html"]
    assert 'class="strip' in outputs(notebook, "store.examples")["text/html"]
    assert "promotes" in outputs(notebook, "store.neuron")["text/html"]
    assert any("vega" in shown.lower() for shown in outputs(notebook, "notebooks.chart").values())
    assert "<iframe" in outputs(notebook, "viewer")["text/html"]


def test_notebook_is_kept_without_outputs() -> None:
    found = read_notebook(EXAMPLES / "quickstart.ipynb", as_version=4)
    for cell in found.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_one_command_leads_to_a_neuron_page(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "viewer"),
        str(tmp_path / "store"),
        "--limit-tokens=8k",
        "--no-open",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with urlopen(address) as response:
                page = response.read().decode()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    assert "<h1>Neuron " in page
    assert "Examples" in page
