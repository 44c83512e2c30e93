"""What a ranking would do, before it does it: the plan, its bounds and an estimate."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from actstore.query.derived import DerivedScalar
from actstore.query.latent_sets import describe_kept
from actstore.query.planner import choose_plan, count_cells
from actstore.query.questions import Question, QuestionOptions, ask
from actstore.query.zoned import ZonedValues
from actstore.store.unit_grid import PAGE_ROWS

if TYPE_CHECKING:
    from actstore.query.opening import OpenStore

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """How a question would be answered.

    Attributes:
        scalar: what is ranked.
        plan: what would be tried first: ``lists``, ``rows``, ``bounds``, ``column`` or ``scan``.
        fallback: what follows where that does not prove the answer; None for nothing.
        bounded_by: what tells where values can be.
        source: where values come from.
        groups: rankings that are filled.
        segments: segments that hold an allowed row.
        pages: pages of 512 rows x one unit among them.
        pages_expected: pages that are read, at most, if the lists do not answer: one per answer
            where bounds are attained; None where nobody can tell.
        values: values that a scan would look at.
    """

    scalar: str
    plan: str
    fallback: str | None
    bounded_by: str
    source: str
    groups: int
    segments: int
    pages: int
    pages_expected: int | None
    values: int

    def to_json(self) -> dict[str, Any]:
        """The members as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        then = f", then {self.fallback}" if self.fallback else ""
        yield f"{self.scalar}: {self.plan}{then}"
        yield f"  values: {self.source}"
        yield f"  bounds: {self.bounded_by}"
        if self.plan == "scan" or self.fallback == "scan":
            yield f"  a scan looks at {self.values:,} values in {self.segments:,} segments"
        if self.pages_expected is not None:
            yield f"  reads at most about {self.pages_expected:,} of {self.pages:,} pages"


def explain(
    store: "OpenStore", name: str | DerivedScalar, **options: Unpack[QuestionOptions]
) -> Explanation:
    """How ``topk`` would answer; nothing is read but records and ``where``.

    Args:
        store: the open store.
        name: a derived scalar, a location's name, or a declaration.
        options: as for ``topk``.

    Raises:
        InvalidInput: as for ``topk``.
        Unavailable: the store cannot derive the scalar.
    """
    question = ask(store, name, **options)
    groups = question.groups() if question.per != "token" else [question.units]
    plan, fallback = choose_plan(
        question.scored, question.rows, groups, question.k, by_token=question.per == "token"
    )
    source = store.source_of(question.declared)
    if plan == "column":
        source = describe_kept(question.scored.latents.values())
    segments = question.rows.segments(store.reader.segments)
    rows = sum(store.reader.commits["base"][segment].rows for segment in segments)
    units = sum(group.total for group in groups)
    return Explanation(
        scalar=question.declared.name,
        plan=plan,
        fallback=fallback,
        bounded_by=question.scored.bounded_by,
        source=source,
        groups=len(groups),
        segments=len(segments),
        pages=-(-rows // PAGE_ROWS) * units,
        pages_expected=_expected(question, question.scored.zoned, plan, fallback, len(groups)),
        values=count_cells(question.scored, question.rows, [question.units]),
    )


def _expected(
    question: Question, zoned: ZonedValues | None, plan: str, fallback: str | None, groups: int
) -> int | None:
    if zoned is None or not zoned.is_tight or "bounds" not in (plan, fallback):
        return None
    # A page is needed if its bound reaches the k-th value; each attained bound is a value.
    per_group = question.k * len(question.ends)
    if question.rows.rows is not None or question.distinct is not None:
        per_group *= 2
    return int(np.minimum(per_group * groups, 10**12))
