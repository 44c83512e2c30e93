"""The facts of the demonstration: its text, its model, the neurons it shows.

The text is the Python standard library's own source, which every machine with Python
already has, and the model is a small GPT-2 trained on it that ships with the package,
so that the demonstration needs no network.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["DEMO_MODEL", "TELLING_NEURONS", "TellingNeuron", "standard_library_files"]

DEMO_MODEL: Final[Path] = Path(__file__).resolve().parent / "model"
"""Folder of the shipped model, as `transformers` loads it with `from_pretrained`."""

# Tests and data tables are most of the bytes and little of the prose; idlelib, lib2to3,
# turtledemo and ensurepip are applications; site-packages differs between machines.
_LEFT_OUT: Final = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "ensurepip",
        "site-packages",
    }
)


@dataclass(frozen=True, slots=True)
class TellingNeuron:
    """A neuron of the shipped model whose strongest contexts have something in common.

    Attributes:
        layer: Index of the block, from 0.
        neuron: Index within the block's MLP, after the nonlinearity (`mlp_post`).
        title: What the strongest contexts share, in a few words.
    """

    layer: int
    neuron: int
    title: str


TELLING_NEURONS: Final[tuple[TellingNeuron, ...]] = (
    TellingNeuron(3, 184, "inside a name between double underscores: `__eq__`"),
    TellingNeuron(2, 70, "the `for` of a comprehension"),
    TellingNeuron(1, 471, "`None` as the default of a keyword argument"),
    TellingNeuron(2, 361, "inside the name of a function that is being defined"),
    TellingNeuron(2, 431, "the message of a raised exception"),
    TellingNeuron(1, 432, "the comma within `isinstance(...)`"),
)
"""Neurons of the shipped model that the demonstration shows, the plainest first."""


def standard_library_files() -> list[Path]:
    """List the Python source files that the demonstration reads.

    These are the running interpreter's standard library without its tests, encodings,
    bundled applications and installed packages. The list and the text differ between
    Python versions, so nothing exact should rest on either.

    Returns:
        Absolute paths of `.py` files, sorted by path.

    Raises:
        FileNotFoundError: This Python has no standard library on disk as source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(root).parts)
    )
    if not files:
        raise FileNotFoundError(f"no Python source under {root}")
    return files
