"""A top-k question, checked: what is ranked, among which rows and units, in which order."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

from actstore.query.choices import Indices, allowed_rows, choose_units, require_rankable
from actstore.query.derived import DerivedScalar
from actstore.query.ranking import Grouping, Ranking
from actstore.query.scored import Normalisation, Scored, score
from actstore.query.selection import RowSelection, UnitSelection
from actstore.query.zone_transforms import Combination
from actstore.store.errors import ErrorKind, InvalidInput

if TYPE_CHECKING:
    from enum import StrEnum

    from actstore.query.opening import OpenStore

__all__ = ["By", "Question", "QuestionOptions", "ask", "require_distinct"]

By = Literal["value", "magnitude"]
_FEW_UNITS = 32
"""Units of a layer that are read from a copy by column, where there is one."""

_Choice = TypeVar("_Choice", bound="StrEnum")


class QuestionOptions(TypedDict, total=False):
    """The options of a top-k question; see :func:`actstore.query.topk.topk`."""

    k: int
    layers: Indices
    neurons: Indices
    heads: Indices
    latents: Indices
    channels: Indices
    attended: Indices
    tokens: Indices
    where: str | None
    units: str | Sequence[tuple[int, int]] | None
    per: str | None
    distinct: str | None
    largest: bool
    by: By
    normalise: str | None
    combine: str | None
    special: bool
    pass_type: str


@dataclass(frozen=True)
class Question:
    """A validated top-k question.

    Attributes:
        declared: the scalar.
        plain: its values.
        scored: what is ranked: the values, normalised or combined if that was asked for.
        k: answers wanted (per group with ``per``).
        units: layers and units that may answer.
        chosen: the units that were named, of a combined score its members.
        rows: rows that may answer.
        per: what has k answers each; None for all together.
        distinct: ``sequence`` or ``document`` for at most one answer each.
        ends: for each end of the order that is looked at, whether it is the greatest.
        by: ``value`` or ``magnitude``.
        normalise, combine: as given.
    """

    store: "OpenStore"
    declared: DerivedScalar
    plain: Scored
    scored: Scored
    k: int
    units: UnitSelection
    chosen: UnitSelection
    rows: RowSelection
    per: str | None
    distinct: str | None
    ends: tuple[bool, ...]
    by: By
    normalise: Normalisation | None
    combine: Combination | None

    def ranking(self, largest: bool) -> Ranking:
        """An empty ranking for this question."""
        return Ranking(self.k, largest, self._grouping())

    def _grouping(self) -> Grouping | None:
        if self.distinct is None:
            return None
        first, label = self.store.row_groups(self.distinct)
        return Grouping(first, label)

    def groups(self) -> list[UnitSelection]:
        """The units of each ranking."""
        units = self.units
        if self.per is None:
            return [units]
        if self.per == "layer":
            return [units.only_layer(layer) for layer in units.layers]
        return [units.only(layer, int(unit)) for layer in units.layers for unit in units.of(layer)]


def ask(
    store: "OpenStore",
    name: str | DerivedScalar,
    *,
    k: int = 20,
    layers: Indices = None,
    neurons: Indices = None,
    heads: Indices = None,
    latents: Indices = None,
    channels: Indices = None,
    attended: Indices = None,
    tokens: Indices = None,
    where: str | None = None,
    units: "str | Sequence[tuple[int, int]] | None" = None,
    per: str | None = None,
    distinct: str | None = None,
    largest: bool = True,
    by: By = "value",
    normalise: str | None = None,
    combine: str | None = None,
    special: bool = False,
    pass_type: str = "forward",
) -> Question:
    """Check a question; the arguments are those of :func:`actstore.query.topk.topk`.

    Raises:
        InvalidInput: an argument that cannot be used.
        Unavailable: the store cannot derive the scalar, or nothing is committed.
    """
    wanted = _positive(k)
    if by not in ("value", "magnitude"):
        raise _invalid(f"by is {by!r}; use value or magnitude.")
    if by == "magnitude" and not largest:
        # The least magnitudes are not at the ends of the lists.
        raise _invalid("by='magnitude' ranks the greatest magnitudes; drop largest=False.")
    require_distinct(distinct)
    scale = _choice(Normalisation, normalise, "normalise")
    how = _choice(Combination, combine, "combine")
    declared = store.scalar(name, pass_type)
    require_rankable(declared)
    store.require_committed()
    arguments = {
        "neurons": neurons,
        "heads": heads,
        "latents": latents,
        "channels": channels,
        "attended": attended,
    }
    chosen = choose_units(store, declared, layers, arguments, units)
    few = all(len(chosen.of(layer)) < _FEW_UNITS for layer in chosen.layers)
    plain = scored = score(store, declared, few_units=few)
    if scale is not None:
        scored = scored.normalised(scale)
    asked = chosen
    if how is not None:
        pairs = [(layer, int(unit)) for layer in chosen.layers for unit in chosen.of(layer)]
        if not pairs or per not in (None, "token"):
            raise _invalid(
                "combine makes one score of a group of units: name some, and leave out `per`."
            )
        scored = scored.combined(pairs, how)
        asked = UnitSelection((0,), 1)
    rows = RowSelection(store.reader, allowed_rows(store, where, tokens), special)
    _check_per(declared, per, distinct, rows)
    return Question(
        store=store,
        declared=declared,
        plain=plain,
        scored=scored,
        k=wanted,
        units=asked,
        chosen=chosen,
        rows=rows,
        per=per,
        distinct=distinct,
        ends=(True, False) if by == "magnitude" else (bool(largest),),
        by=by,
        normalise=scale,
        combine=how,
    )


def _check_per(
    declared: DerivedScalar, per: str | None, distinct: str | None, rows: RowSelection
) -> None:
    axes = declared.ranked_axes
    own = [axes[0].value] if len(axes) == 1 else []
    if per not in (None, "layer", "token", *own):
        allowed = ", ".join(["layer", "token", *own])
        raise _invalid(f"per is {per!r}; {declared.name} allows: {allowed}.")
    if per == "token" and rows.rows is None:
        raise _invalid("per='token' answers for some tokens: name them with `tokens` or `where`.")
    if per == "token" and distinct is not None:
        raise _invalid("per='token' has answers of one token each; leave out `distinct`.")


def _choice(kind: "type[_Choice]", value: str | None, name: str) -> "_Choice | None":
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError:
        raise _invalid(f"{name} is {value!r}; use {', '.join(kind)}.") from None


def _positive(k: Any) -> int:
    try:
        number = operator.index(k)
    except TypeError:
        number = 0
    if number < 1:
        raise _invalid(f"k is {k!r}; it must be an integer of at least 1.")
    return number


def require_distinct(distinct: str | None) -> None:
    """Check the name of what answers are distinct by.

    Raises:
        InvalidInput: it is neither None, ``sequence`` nor ``document``.
    """
    if distinct not in (None, "sequence", "document"):
        raise _invalid(f"distinct is {distinct!r}; use sequence or document.")


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
