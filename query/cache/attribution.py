"""Direct logit attribution: every component's part of a logit, as a table."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actstore.query.cache.logits import LogitMethods
from actstore.query.cache.neurons import NeuronStacks
from actstore.query.cache.stacks import LayerNormChoice, Stack, invalid
from actstore.query.cache.view import View
from actstore.query.columnar import Columnar
from actstore.store.vocabulary import WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["LogitAttribution", "LogitAttributions"]

_LABEL = re.compile(r"L(?P<layer>\d+)(?P<letter>[HN])(?P<unit>\d+)|(?P<block>\d+)_(?P<kind>\w+)")
_UNITS = {"H": "head", "N": "neuron"}
_BY = ("layer", "head", "neuron")


@dataclass(frozen=True, eq=False)
class LogitAttribution(Columnar):
    """One row per sequence, position and component; their values sum to the logit.

    Attributes:
        table: ``sequence, position, component, kind, layer, head, neuron, value``; ``kind`` is
            ``head``, ``neuron``, ``attn_out``, ``mlp_out``, ``embed``, ``pos_embed``, ``bias``
            or ``constant``, the last for what no component adds (the final norm's bias).
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows()

    def __repr__(self) -> str:
        return f"LogitAttribution({len(self)} rows: {', '.join(self.table.column_names)})"

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table


class LogitAttributions(NeuronStacks, LogitMethods):
    """The method that attributes a logit to the model's components."""

    def direct_logit_attribution(
        self,
        target: Any,
        against: Any = None,
        *,
        by: str = "head",
        position: Any = -1,
    ) -> LogitAttribution:
        """What each component adds to a token's logit, as a tidy table.

        The final norm is applied exactly, gain included, so the values of one sequence and
        position sum to the logit, or to the difference (before a soft-cap). One sequence is
        read at a time and projected before anything is expanded.

        Args:
            target: the token's text or number, or one number per sequence.
            against: the token whose logit is subtracted, likewise.
            by: ``layer`` (each attention and MLP), ``head`` (heads and MLPs) or ``neuron``
                (heads and neurons).
            position: as ``pos_slice``; each sequence's last token by default.

        Raises:
            InvalidInput: an unknown token, position or ``by``.
        """
        if by not in _BY:
            raise invalid(f"by is {by!r}; use {', '.join(_BY)}.")
        view = replace(self._view.at_positions(position), dtype="float64", device="cpu")
        rows = len(view.rows)
        targets = self._directions(target, against)
        if targets.ndim > 2 or (targets.ndim == 2 and len(targets) != rows):
            raise invalid(
                f"target has shape {tuple(targets.shape[:-1])}; give one token, or one for each "
                f"of the {rows} sequences."
            )
        directions = targets.expand(rows, targets.shape[-1])
        stack = self._components(by)
        reading = self._reading(self.n_layers, False, LayerNormChoice.EXACT)
        filled = stack.fill(
            view, "direct_logit_attribution", reading, onto_of=lambda place: directions[place]
        )
        values = filled.reshape(len(stack.labels), rows, -1)
        constant = self._constants(directions)
        return LogitAttribution(_table(stack.labels, values, constant, view))

    def _components(self, by: str) -> Stack:
        if by != "layer":
            return self._full_stack(self.n_layers, False, by == "neuron")
        return self._layer_stack(self.n_layers, False, "all", True)

    def _constants(self, directions: "Tensor") -> "Tensor":
        bias = self._optional(WeightLocationType.LAYER_NORM_BIAS_FINAL, None)
        return directions[:, 0] * 0 if bias is None else directions @ bias


def _table(labels: list[str], values: "Tensor", constants: "Tensor", view: View) -> pa.Table:
    """Rows by sequence, position and component.

    Args:
        labels: of the components.
        values: ``(component, row, position)``.
        constants: what each row's logit has beside them, ``(row,)``.
        view: the rows and positions.
    """
    names = [*labels, "constant"]
    parts = []
    for place, positions in enumerate(view.positions):
        own = values[:, place, : len(positions)].T.numpy()
        constant = np.full((len(positions), 1), float(constants[place]))
        parts.append(np.concatenate([own, constant], 1).reshape(-1))
    counts = [len(positions) for positions in view.positions]
    sequences = np.array([view.batch.names[row] for row in view.rows], np.int64)
    position = np.concatenate([np.empty(0, np.int64), *view.positions])
    described = [_described(name) for name in names]
    tile = pa.array(np.tile(np.arange(len(names)), len(position)))

    def component(key: str, kind: pa.DataType) -> pa.Array:
        return pa.array([entry[key] for entry in described], kind).take(tile)

    return pa.table(
        {
            "sequence": pa.array(np.repeat(sequences, counts).repeat(len(names)), pa.int64()),
            "position": pa.array(position.repeat(len(names)), pa.int32()),
            "component": component("component", pa.string()),
            "kind": component("kind", pa.string()),
            "layer": component("layer", pa.int32()),
            "head": component("head", pa.int32()),
            "neuron": component("neuron", pa.int32()),
            "value": pa.array(np.concatenate([np.empty(0), *parts]), pa.float64()),
        }
    )


def _described(label: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "component": label,
        "kind": label,
        "layer": None,
        "head": None,
        "neuron": None,
    }
    matched = _LABEL.fullmatch(label)
    if matched and matched["letter"]:
        unit = _UNITS[matched["letter"]]
        found |= {"kind": unit, "layer": int(matched["layer"]), unit: int(matched["unit"])}
    elif matched:
        found |= {"kind": matched["kind"], "layer": int(matched["block"])}
    return found
