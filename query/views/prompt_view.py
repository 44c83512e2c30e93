"""What a text that a person typed does in the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from actstore.query.derived import SCALARS, DerivedScalar, scalar
from actstore.query.views.colours import Scale
from actstore.query.views.sequence_grid import Grid, column_of, grid_of, unit_path
from actstore.query.views.strips import TokenStrip, strip_of
from actstore.store.errors import ActstoreError, ErrorKind, InvalidInput, Unavailable
from actstore.store.vocabulary import Dimension

if TYPE_CHECKING:
    from actstore.query.tensors import LabelledTensor

__all__ = ["NextToken", "PromptPass", "PromptView", "TopNode"]

DEFAULT_SCALAR = "mlp_write_norm"


class PromptPass(Protocol):
    """A text that was run through a model, as :class:`actstore.Prompt` gives it."""

    token_ids: Sequence[int]
    objective_value: float | None

    @property
    def tokens(self) -> Sequence[str]:
        """The tokens' texts; empty without a tokenizer."""
        ...

    def raw(self, location: str, **options: Any) -> "LabelledTensor":
        """A location's values."""
        ...

    def derive(self, names: str, **options: Any) -> "LabelledTensor":
        """A derived scalar's values."""
        ...


@dataclass(frozen=True)
class NextToken:
    """A token that the model expects after the text."""

    token_id: int
    text: str
    probability: float


@dataclass(frozen=True)
class TopNode:
    """A unit at a token, with its value.

    Attributes:
        layer: its layer; None outside the blocks.
        unit: its number; None where a layer has one alone.
        position: of the token.
        text: of the token.
        value: the scalar's.
    """

    layer: int | None
    unit: int | None
    position: int
    text: str
    value: float


@dataclass(frozen=True)
class PromptView:
    """A text and what the model made of it.

    Attributes:
        strip: the tokens, coloured by their strongest value in any layer.
        grid: tokens by layers.
        scalar: whose values are shown.
        scalars: the names that can be chosen.
        top: the units of greatest magnitude.
        expected: the tokens that the model expects next, most probable first.
        missing: why there are no values; empty where there are.
        unit_path: where the units of the scalar have pages; empty where they have none.
    """

    strip: TokenStrip
    grid: Grid | None
    scalar: str
    scalars: tuple[str, ...]
    top: tuple[TopNode, ...]
    expected: tuple[NextToken, ...]
    missing: str
    unit_path: str

    @classmethod
    def of(
        cls,
        prompt: PromptPass,
        texts: "Texts",
        *,
        name: str = DEFAULT_SCALAR,
        k: int = 15,
    ) -> Self:
        """The view of a text that was run.

        Args:
            prompt: the pass.
            texts: decoded pieces of token ids.
            name: a derived scalar with values per token.
            k: units in the ranking.

        Raises:
            InvalidInput: there is no such scalar, or it has none per token.
        """
        declared = scalar(name)
        choices = prompt_scalars()
        if declared.name not in choices:
            raise InvalidInput(
                f"{declared.name} has no values per token and unit; choose one of "
                f"{', '.join(choices)}.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        pieces = list(prompt.tokens) or texts(prompt.token_ids)
        values: dict[int | None, npt.NDArray[np.float32]] = {}
        missing = ""
        try:
            values = _by_layer(prompt.derive(declared.name))
        except (Unavailable, InvalidInput) as error:
            missing = str(error)
        columns = {layer: column_of(found, None, declared) for layer, found in values.items()}
        grid = grid_of(columns, None) if columns else None
        strongest = (
            [
                max((cell.value for cell in row if cell.value is not None), key=abs, default=None)
                for row in grid.rows
            ]
            if grid
            else [None] * len(pieces)
        )
        return cls(
            strip=strip_of(
                pieces,
                strongest,
                grid.scale if grid else Scale(1.0),
                token_ids=list(prompt.token_ids),
            ),
            grid=grid,
            scalar=declared.name,
            scalars=choices,
            top=_top(values, pieces, k),
            expected=_expected(prompt, texts),
            missing=missing,
            unit_path=unit_path(declared),
        )


class Texts(Protocol):
    """Decodes token ids."""

    def __call__(self, token_ids: Sequence[int], /) -> list[str]:
        """The decoded pieces."""
        ...


def prompt_scalars() -> tuple[str, ...]:
    """The scalars of a pass with one value per token and unit, which need no gradient."""
    return tuple(
        declared.name
        for declared in SCALARS.values()
        if declared.about is None
        and declared.latents is None
        and not declared.is_flattened
        and len(declared.axes) <= 1
        and Dimension.VOCABULARY not in declared.axes
        and not _needs_gradient(declared)
    )


def _needs_gradient(declared: DerivedScalar) -> bool:
    from actstore.query.derived.registry import requires_gradient

    return requires_gradient(declared)


def _by_layer(found: "LabelledTensor") -> dict[int | None, npt.NDArray[np.float32]]:
    """Layer -> ``(token, unit)``."""
    values = found.numpy()
    if found.layers is None:
        return {None: values.reshape(len(values), -1)}
    return {layer: values[at].reshape(values.shape[1], -1) for at, layer in enumerate(found.layers)}


def _top(
    values: dict[int | None, npt.NDArray[np.float32]], texts: Sequence[str], k: int
) -> tuple[TopNode, ...]:
    nodes: list[TopNode] = []
    for layer, found in values.items():
        size = np.abs(np.nan_to_num(found, nan=0.0))
        # Position 0 is unlike all others in most models, and would fill the list.
        size[0] = 0
        best = np.argsort(-size, axis=None, kind="stable")[:k]
        for position, unit in zip(*np.unravel_index(best, found.shape), strict=True):
            if size[position, unit] > 0:
                single = found.shape[1] == 1
                nodes.append(
                    TopNode(
                        layer,
                        None if single else int(unit),
                        int(position),
                        texts[position],
                        float(found[position, unit]),
                    )
                )
    nodes.sort(key=lambda node: -abs(node.value))
    return tuple(nodes[:k])


def _expected(prompt: PromptPass, texts: Texts, count: int = 8) -> tuple[NextToken, ...]:
    try:
        logits = prompt.raw("logits").numpy()[-1].astype(np.float64)
    except ActstoreError:
        return ()
    weights = np.exp(logits - logits.max())
    shares = weights / weights.sum()
    best = np.argsort(-shares, kind="stable")[:count].tolist()
    return tuple(
        NextToken(one, text, float(shares[one]))
        for one, text in zip(best, texts(best), strict=True)
    )
