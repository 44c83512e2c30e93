"""Results that carry their own labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.query.rows import Rows
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LabelledTensor", "LabelledTensors"]


@dataclass(frozen=True, eq=False)
class LabelledTensor:
    """A tensor with the names of its axes and what stands along them.

    Attributes:
        name: the location or derived scalar.
        values: the tensor.
        dims: names of its axes: ``layer`` (where there are layers), ``token``, unit axes.
        layers: layer numbers along ``layer``; None outside the blocks.
        rows: what stands along ``token``, or the query tokens along ``pair``.
        source: where the values came from.
        attended: positions of the attended tokens along ``pair``, of a flattened scalar.
    """

    name: str
    values: "Tensor"
    dims: tuple[str, ...]
    layers: tuple[int, ...] | None
    rows: Rows
    source: str
    attended: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        assert len(self.dims) == self.values.ndim, f"{self.dims} for {self.values.shape}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(self.values.shape)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Lengths of the axes by name."""
        return MappingProxyType(dict(zip(self.dims, self.values.shape, strict=True)))

    @property
    def coordinates(self) -> Mapping[str, npt.NDArray[np.int64]]:
        """What stands along the axes: ``layer``, and per row ``token, sequence, position``.

        A flattened scalar's rows are pairs; ``attended`` is the other token's position.
        """
        rows = {
            "token": self.rows.token,
            "sequence": self.rows.sequence,
            "position": self.rows.position,
        }
        layer = {} if self.layers is None else {"layer": np.array(self.layers, np.int64)}
        pairs = {} if self.attended is None else {"attended": self.attended}
        return MappingProxyType({**layer, **rows, **pairs})

    def numpy(self) -> npt.NDArray[Any]:
        """The values as a numpy array, without a copy."""
        array: npt.NDArray[Any] = self.values.numpy()
        return array

    def layer(self, number: int) -> "LabelledTensor":
        """One layer, without its axis.

        Raises:
            InvalidInput: the layer is not among these.
        """
        if self.layers is None or number not in self.layers:
            raise InvalidInput(
                f"{self.name} here has no layer {number}; it has {self.layers or 'none'}.",
                kind=ErrorKind.UNKNOWN_LAYER,
            )
        values = self.values[self.layers.index(number)]
        return replace(self, values=values, dims=self.dims[1:], layers=None)

    def sequence(self, number: int) -> "LabelledTensor":
        """The rows of one sequence.

        Raises:
            InvalidInput: the sequence is not among these.
        """
        places = np.flatnonzero(self.rows.sequence == number)
        if not len(places):
            raise InvalidInput(
                f"{self.name} here has no row of sequence {number}; it has those of "
                f"{sorted(set(self.rows.sequence.tolist()))[:10]}.",
                kind=ErrorKind.UNKNOWN_ROW,
            )
        rows = Rows(
            *(part[places] for part in (self.rows.token, self.rows.sequence, self.rows.position))
        )
        index = self.values.new_tensor(places).long()
        axis = self.dims.index("token" if self.attended is None else "pair")
        attended = None if self.attended is None else self.attended[places]
        return replace(
            self, values=self.values.index_select(axis, index), rows=rows, attended=attended
        )

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        dtype = str(self.values.dtype).removeprefix("torch.")
        return f"{self.name}({axes}) {dtype}, {self.source}"


class LabelledTensors(Mapping[str, LabelledTensor]):
    """Several derived scalars of the same rows, by name."""

    def __init__(self, tensors: Mapping[str, LabelledTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> LabelledTensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return "\n".join(repr(tensor) for tensor in self._tensors.values())
