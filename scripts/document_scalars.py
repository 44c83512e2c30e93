"""Writes docs/scalars.md and docs/scalars/ from the declarations.

Run `python scripts/document_scalars.py` after a change of a declaration.
"""

from pathlib import Path

from actstore.query.derived import FAMILIES, DerivedScalar
from actstore.query.derived.pages import SYMBOL_NOTES, is_rankable, scalar_page
from actstore.store.location_names import PRESETS
from actstore.store.vocabulary import FORWARD_LOCATIONS

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "scalars"

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
values and rounded once to float32. Each has a page with its formula, sources, cost and an example;
`actstore scalars NAME` prints it. *Ranked by* says what `topk` reads: `index` is lists and zone maps, `scan`
looks at every value, `no` is about one node of one sequence. Scalars of latents are ranked in a store that
keeps such latents. Where a value differs from the
Transformer Debugger's, [differences](differences.md) says how. [Your own scalars](your_own_scalars.md) work
like these.

## Symbols

| symbol | meaning |
|---|---|
"""

COST = """
## Cost

**Operations** count a formula as one sum over every axis of its sources, weights and value, with a
multiplication and an addition for each term: an upper bound, since sums can be ordered better. A scalar that
is the raw value costs none; one that rescales it, or multiplies two, costs one operation for each value.
Sources that are scalars add their own. Parts of the model that are run again, for gradients at a node or for
changes along a write, are not counted.

**Bytes** count each raw source once, as float32 (half of it as float16). What is not stored is reconstructed,
and then what it is made from is read in its place. Weights are read once per layer.
"""

TITLES = {
    "raw": "Raw values",
    "mlp": "MLP neurons",
    "attention": "Attention heads",
    "residual": "The residual stream and whole layers",
    "latents": "Autoencoder latents and errors",
    "edges": "Edges between nodes",
}

FAMILY_HEAD = """
| scalar | axes after layer and token | node | ranked by | meaning |
|---|---|---|---|---|
"""


def pages() -> dict[Path, str]:
    """Every page's text."""
    found = {
        FOLDER / f"{declared.name}.md": scalar_page(declared)
        for family in FAMILIES.values()
        for declared in family
    }
    return {DOCS / "scalars.md": _index(), **found}


def _index() -> str:
    locations = "".join(
        f"| `{place.label}` | {_axes(place.axes)} | `{place.lens_name}` | {place.meaning} |\n"
        for place in FORWARD_LOCATIONS
    )
    presets = "".join(
        f"| `{name}` | {', '.join(f'`{place.label}`' for place in places)} |\n"
        for name, places in PRESETS.items()
    )
    symbols = "".join(f"| `{_cell(name)}` | {meaning} |\n" for name, meaning in SYMBOL_NOTES)
    families = "".join(
        f"\n## {TITLES[name]}\n{FAMILY_HEAD}{''.join(map(_row, members))}"
        for name, members in FAMILIES.items()
    )
    head = HEAD + locations + PRESET_HEAD + presets + SCALAR_HEAD + symbols
    return head + COST + families


def _row(declared: DerivedScalar) -> str:
    name = f"[`{declared.name}`](scalars/{declared.name}.md)"
    axes = ("pairs", *declared.axes) if declared.is_flattened else declared.axes
    cells = (name, _axes(axes), declared.node_type, _ranked(declared), _cell(declared.meaning))
    return f"| {' | '.join(cells)} |\n"


def _ranked(declared: DerivedScalar) -> str:
    if not is_rankable(declared):
        return "no"
    if declared.latents is not None:
        return "kept latents" if declared.name == declared.latents.value else "scan"
    source = declared.raw_source
    indexed = source is not None and source.location.is_ranked_by_unit
    return "index, where stored" if indexed else "scan"


def _axes(axes: tuple[str, ...]) -> str:
    return ", ".join(str(axis) for axis in axes)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for old in set(FOLDER.glob("*.md")) - set(written):
        old.unlink()
    for path, text in written.items():
        path.write_text(text)
