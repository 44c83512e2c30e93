"""The command `derive`: a scalar on whole sequences, as a table, JSON or a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from actstore.cli.display import print_table, visible
from actstore.cli.options import (
    AsJson,
    Backward,
    Layers,
    OfObjective,
    Scalar,
    ScalarFiles,
    StorePath,
    load_scalar_files,
)
from actstore.cli.output import cannot_write, console, print_json, reports_errors
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from actstore.query.tensors import LabelledTensor

__all__ = ["derive"]

_JSON_VALUES = 5_000_000
"""Values that `derive --json` prints at most; a file holds any number."""


@reports_errors
def derive(
    store: StorePath,
    scalar: Scalar,
    sequence: Annotated[
        list[int], typer.Option("--sequence", "-s", metavar="N", help="A sequence; repeatable.")
    ],
    layer: Layers = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the values to an .npz file."),
    ] = None,
    backward: Backward = False,
    objective: OfObjective = None,
    scalar_files: ScalarFiles = None,
    as_json: AsJson = False,
) -> None:
    """Compute a scalar on whole sequences, from what is stored."""
    from actstore.query.session import Store

    if out is not None and out.suffix != ".npz":
        raise InvalidInput(
            f"--out is {str(out)!r}; its name must end in .npz.", kind=ErrorKind.INVALID_ARGUMENT
        )
    load_scalar_files(scalar_files)
    with Store(store, objective=objective) as opened:
        tensor = opened.derive(
            scalar,
            sequences=sequence,
            layers=layer or None,
            pass_type="backward" if backward else "forward",
        )
        texts = opened.texts(opened.row_map.token_ids(tensor.rows))
    certificate = {
        "scalar": tensor.name,
        "source": tensor.source,
        "dims": list(tensor.dims),
        "shape": list(tensor.shape),
    }
    if out is not None:
        _write_npz(out, tensor)
    if as_json:
        rows = [] if out is not None else _derived_rows(tensor, texts)
        written = {} if out is None else {"out": str(out)}
        print_json({"rows": rows, "certificate": {**certificate, **written}})
    elif out is not None:
        console().print(f"{visible(repr(tensor))} -> {visible(str(out))}")
    else:
        _print_derived(console(), tensor, texts)


def _derived_rows(tensor: "LabelledTensor", texts: list[str]) -> list[dict[str, Any]]:
    """One row per layer and token, with its values as nested lists."""
    values = tensor.numpy()
    if values.size > _JSON_VALUES:
        raise InvalidInput(
            f"{tensor.name} has {values.size:,} values here, more than the {_JSON_VALUES:,} that "
            "JSON is made for. Write them with --out FILE.npz, or ask for fewer.",
            kind=ErrorKind.TOO_LARGE,
        )
    has_layers = tensor.layers is not None
    rows = tensor.rows
    return [
        {
            **({"layer": layer} if has_layers else {}),
            "token": int(rows.token[index]),
            "sequence": int(rows.sequence[index]),
            "position": int(rows.position[index]),
            "text": texts[index],
            "values": (values[number, index] if has_layers else values[index]).tolist(),
        }
        for number, layer in enumerate(tensor.layers or (None,))
        for index in range(len(rows))
    ]


def _print_derived(shown: "Console", tensor: "LabelledTensor", texts: list[str]) -> None:
    """One line per token: its one value, or the strongest of its units, for each layer."""
    import numpy as np

    values = tensor.numpy()
    by_layer = values if tensor.layers is not None else values[None]
    flat = by_layer.reshape(*by_layer.shape[:2], -1)
    unit_shape = by_layer.shape[2:]
    scalar_like = flat.shape[2] == 1
    # All NaN is the value of no unit.
    magnitude = np.where(np.isnan(flat), -1, np.abs(flat))
    best = magnitude.argmax(2)
    strongest = np.take_along_axis(flat, best[..., None], 2)[..., 0]
    names = ["" if layer is None else f"layer {layer}" for layer in tensor.layers or (None,)]
    columns = ["token", "position", "text"]
    for name in names:
        columns += [name or "value"] if scalar_like else [f"{name} strongest".strip(), "at"]
    rows: list[list[Any]] = []
    for index, text in enumerate(texts):
        row: list[Any] = [int(tensor.rows.token[index]), int(tensor.rows.position[index]), text]
        for number in range(len(names)):
            row.append(float(strongest[number, index]))
            if not scalar_like:
                at = np.unravel_index(int(best[number, index]), unit_shape)
                row.append(":".join(str(int(place)) for place in at))
        rows.append(row)
    print_table(shown, columns, rows)
    shown.print(Text(visible(repr(tensor)), "dim"))
    if not scalar_like:
        shown.print(
            Text("The strongest unit of each token; all values with --json or --out.", "dim")
        )


def _write_npz(out: Path, tensor: "LabelledTensor") -> None:
    import numpy as np

    arrays: dict[str, Any] = {
        "name": np.array(tensor.name),
        "dims": np.array(tensor.dims),
        "values": tensor.numpy(),
        **tensor.coordinates,
    }
    try:
        np.savez(out, **arrays)
    except OSError as error:
        raise cannot_write(out, error) from error
