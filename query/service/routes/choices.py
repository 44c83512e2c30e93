"""What a question may answer with, and how it ranks: the options of the Python calls as keys."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, Query

from actstore.query.service.resources import Ask
from actstore.query.service.routes.parameters import (
    Distinct,
    Indices,
    Layers,
    PassName,
    Rows,
    Special,
    WhereTokens,
    unit_numbers,
)
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["AskedChoice", "AskedRanking", "Choice", "K", "RankingChoice", "Units", "chosen_units"]

_PAIRS = re.compile(r"\d{1,9}:\d{1,9}(?:,\d{1,9}:\d{1,9})*")

K = Annotated[int, Query(ge=1, description="number of answers")]
Units = Annotated[
    str | None,
    Query(
        max_length=20_000,
        description="SQL predicate over neurons (heads, latents), or layer:unit pairs "
        "separated by commas",
    ),
]


@dataclass(frozen=True)
class Choice:
    """Layers, units and rows that may answer."""

    layer: Layers = None
    neuron: Indices = None
    head: Indices = None
    latent: Indices = None
    channel: Indices = None
    attended: Indices = None
    token: Rows = None
    where: WhereTokens = None
    units: Units = None
    special: Special = False
    pass_type: PassName = "forward"

    def options(self) -> dict[str, Any]:
        """The arguments of the Python call."""
        return {
            "layers": self.layer,
            "neurons": self.neuron,
            "heads": self.head,
            "latents": self.latent,
            "channels": self.channel,
            "attended": self.attended,
            "tokens": self.token,
            "where": self.where,
            "units": chosen_units(self.units),
            "special": self.special,
            "pass_type": self.pass_type,
        }


@dataclass(frozen=True)
class RankingChoice(Choice):
    """What may answer, and how the answers are ranked."""

    k: K = 20
    per: Annotated[
        str | None, Query(max_length=40, description="k answers for each layer, neuron … or token")
    ] = None
    distinct: Distinct = "none"
    largest: Annotated[bool, Query(description="false for the least values")] = True
    by: Annotated[
        Literal["value", "magnitude"], Query(description="magnitude: by absolute value")
    ] = "value"
    normalise: Annotated[
        Literal["max", "std"] | None, Query(description="make units comparable")
    ] = None
    combine: Annotated[
        Literal["sum", "mean", "max", "min"] | None,
        Query(description="one score per token from all the units that are named"),
    ] = None

    def options(self) -> dict[str, Any]:
        """The arguments of the Python call."""
        return {
            **super().options(),
            "k": self.k,
            "per": self.per,
            "distinct": None if self.distinct == "none" else self.distinct,
            "largest": self.largest,
            "by": self.by,
            "normalise": self.normalise,
            "combine": self.combine,
        }

    def require_few(self, ask: Ask, name: str) -> None:
        """Refuse more answers than one response may have, before they are searched for.

        Raises:
            InvalidInput: there would be more rows than the server gives.
        """
        ask.limit(self.k, "k")
        if self.per is None:
            return
        groups = self._groups(ask, name)
        if groups * self.k > ask.settings.max_rows:
            raise InvalidInput(
                f"{self.k} answers for each of {groups:,} are {groups * self.k:,} rows; this "
                f"server gives {ask.settings.max_rows:,} at most. Ask for fewer, or use the "
                "Python call.",
                kind=ErrorKind.TOO_LARGE,
            )

    def _groups(self, ask: Ask, name: str) -> int:
        """Groups that have k answers each, at most."""
        declared = ask.store.scalar(name, self.pass_type)
        if self.per == "token":
            named = [] if self.token is None else [len(set(self.token))]
            if self.where is not None:
                named.append(len(ask.store.rows_where(self.where)))
            # Without either the question itself is refused.
            return min(named, default=0)
        layers = len(self.layer or ask.store.layers_of(declared))
        if self.per == "layer":
            return layers
        units = int(np.prod(ask.store.unit_shape(declared)))
        chosen = [one for one in (self.neuron, self.head, self.latent) if one is not None]
        return layers * min([units, *map(len, chosen)])


AskedChoice = Annotated[Choice, Depends()]
AskedRanking = Annotated[RankingChoice, Depends()]


def chosen_units(text: str | None) -> str | list[tuple[int, int]] | None:
    """A predicate as it is; pairs as numbers, which no predicate looks like."""
    if text is None or not _PAIRS.fullmatch(text):
        return text
    return [(layer, unit) for layer, unit in map(unit_numbers, text.split(","))]
