"""Writes docs/scalars.md from the declarations: `python scripts/document_scalars.py`."""

from pathlib import Path

from actstore.query.derived import SCALARS, DerivedScalar, Identity, ScaledBy
from actstore.store.vocabulary import PRESETS, ActivationLocationType

PAGE = Path(__file__).parents[1] / "docs" / "scalars.md"

HEAD = """# Locations and derived scalars

Written by `scripts/document_scalars.py` from the declarations; edit those.

A **location** is a place in the forward pass whose tensor is raw. TransformerLens' names are accepted
wherever a location is named (`mlp_post`, `blocks.3.hook_resid_post`). Every location is readable from every
preset: what is not stored is reconstructed.

| location | axes after layer and token | TransformerLens | meaning |
|---|---|---|---|
"""

PRESET_HEAD = """
| preset | locations that are stored |
|---|---|
"""

SCALAR_HEAD = """
A **derived scalar** is a named function of raw tensors and weights, computed in float64 from the stored
values and rounded once to float32. *Ranked by* says what `topk` reads: `index` is lists and zone maps,
`scan` looks at every value.

| scalar | axes after layer and token | node | ranked by | meaning |
|---|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    locations = "".join(
        f"| `{place.label}` | {_axes(place.axes)} | `{place.lens_name}` | {place.meaning} |\n"
        for place in ActivationLocationType
    )
    presets = "".join(
        f"| `{name}` | {', '.join(f'`{place.label}`' for place in places)} |\n"
        for name, places in PRESETS.items()
    )
    scalars = "".join(_row(scalar) for scalar in SCALARS.values())
    return HEAD + locations + PRESET_HEAD + presets + SCALAR_HEAD + scalars


def _row(scalar: DerivedScalar) -> str:
    source = scalar.raw_source
    place = source.of if source is not None else None
    ranked = (
        "index, where stored"
        if isinstance(scalar.dependence, Identity | ScaledBy)
        and isinstance(place, ActivationLocationType)
        and place.is_ranked_by_unit
        else "scan"
    )
    meaning = scalar.meaning.replace("|", "\\|")
    return (
        f"| `{scalar.name}` | {_axes(scalar.axes)} | {scalar.node_type} | {ranked} | {meaning} |\n"
    )


def _axes(axes: tuple[str, ...]) -> str:
    return ", ".join(str(axis) for axis in axes)


if __name__ == "__main__":
    PAGE.write_text(page())
