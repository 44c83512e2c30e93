"""The derived scalars, and which of them a store can give."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from actstore.query.derived import SCALARS
from actstore.query.derived.registry import FAMILIES
from actstore.query.views.sequence_grid import can_derive
from actstore.store.errors import ActstoreError

if TYPE_CHECKING:
    from actstore.query.session import Store

__all__ = ["ScalarEntry", "ScalarList"]


@dataclass(frozen=True)
class ScalarEntry:
    """A scalar in the list.

    Attributes:
        name, meaning, definition: as it is declared.
        axes: ``layer``, ``token`` and what follows.
        available: whether this store can give it.
        source: where its values come from.
        about: what a question has to name; empty for most.
        in_grid: whether a sequence's page can show it.
    """

    name: str
    meaning: str
    definition: str
    axes: tuple[str, ...]
    available: bool
    source: str
    about: str
    in_grid: bool


@dataclass(frozen=True)
class ScalarList:
    """Scalars by family.

    Attributes:
        families: name -> entries; those that were registered are under ``own``.
        available: how many of them the store can give.
        total: how many there are.
    """

    families: tuple[tuple[str, tuple[ScalarEntry, ...]], ...]
    available: int
    total: int

    @classmethod
    def of(cls, store: "Store") -> Self:
        """Every scalar, as an open store sees it."""
        built_in = {one.name: family for family, members in FAMILIES.items() for one in members}
        grouped: dict[str, list[ScalarEntry]] = {}
        for name in SCALARS:
            grouped.setdefault(built_in.get(name, "own"), []).append(_entry(store, name))
        entries = [entry for members in grouped.values() for entry in members]
        return cls(
            tuple((family, tuple(members)) for family, members in grouped.items()),
            sum(entry.available for entry in entries),
            len(entries),
        )


def _entry(store: "Store", name: str) -> ScalarEntry:
    declared = SCALARS[name]
    available = can_derive(store, declared)
    try:
        source = store.source_of(declared)
        if declared.latents is not None:
            # Without autoencoders there are no latents, whatever they would read.
            available = available and bool(store.layers_of(declared))
    except ActstoreError as error:
        available, source = False, str(error)
    axes = (*(("layer",) if declared.has_layers else ()), "token", *map(str, declared.axes))
    return ScalarEntry(
        name=name,
        meaning=declared.meaning,
        definition=declared.definition,
        axes=axes,
        available=available,
        source=source,
        about=declared.about or "",
        in_grid=available
        and declared.about is None
        and declared.latents is None
        and not declared.is_flattened
        and len(declared.axes) <= 1
        and "vocabulary" not in axes,
    )
