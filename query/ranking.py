"""The total order of answers, and the k best kept under it.

Value descending (ascending for the least), then layer, token and unit ascending.
-0.0 equals 0.0 and NaN never ranks. Everything that ranks goes through here, so that
lists, branch and bound and scans agree to the last tie.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Candidates", "Ranking"]


@dataclass(frozen=True)
class Candidates:
    """Values with their places; every array is ``(candidate,)``.

    Attributes:
        value: float32 canonical values.
        layer: int64 layers, 0 for a scalar without layers.
        token: int64 global rows.
        unit: int64 columns.
    """

    value: npt.NDArray[np.float32]
    layer: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    unit: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.value)

    def take(self, index: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> "Candidates":
        """The candidates at ``index``."""
        return Candidates(self.value[index], self.layer[index], self.token[index], self.unit[index])

    @classmethod
    def empty(cls) -> "Candidates":
        """No candidate."""
        none = np.empty(0, np.int64)
        return cls(np.empty(0, np.float32), none, none, none)

    @classmethod
    def join(cls, parts: "list[Candidates]") -> "Candidates":
        """All candidates of several groups."""
        if not parts:
            return cls.empty()
        return cls(
            np.concatenate([part.value for part in parts]),
            np.concatenate([part.layer for part in parts]),
            np.concatenate([part.token for part in parts]),
            np.concatenate([part.unit for part in parts]),
        )


class Ranking:
    """The k best candidates seen so far.

    Args:
        k: how many to keep.
        largest: rank by value descending, else ascending.
        groups: ``token -> group`` labels for distinct answers: only the best candidate of
            a group is kept. None keeps all.
    """

    def __init__(self, k: int, largest: bool = True, groups: "Grouping | None" = None) -> None:
        self.k = k
        self.largest = largest
        self._groups = groups
        self.best = Candidates.empty()

    def offer(self, found: Candidates) -> None:
        """Consider candidates; NaN is dropped, repeats are harmless."""
        found = found.take(~np.isnan(found.value))
        if self.is_full and len(found):
            # Most of a page is below the k-th best; comparing is cheaper than sorting.
            floor = self._score(self.best.value[-1:])[0]
            found = found.take(self._score(found.value) >= floor)
        if len(found):
            self.best = self._rank(Candidates.join([self.best, found]))

    @property
    def is_distinct(self) -> bool:
        """Whether only the best candidate of a group is kept."""
        return self._groups is not None

    @property
    def is_full(self) -> bool:
        """Whether k candidates were found, so that worse ones need no look."""
        return self.k > 0 and len(self.best) >= self.k

    @property
    def threshold(self) -> float:
        """Score of the k-th best; minus infinity before there are k."""
        return float(self._score(self.best.value[-1:])[0]) if self.is_full else float("-inf")

    def beats(self, score: float, layer: int, token: int, unit: int) -> bool:
        """Whether something with at most this score, at or after this place, may still enter."""
        if not self.is_full:
            return True
        worst = self.threshold
        if score != worst:
            return score > worst
        last = self.best
        return (layer, token, unit) < (int(last.layer[-1]), int(last.token[-1]), int(last.unit[-1]))

    def _score(self, value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        # Adding zero turns -0.0 into 0.0, so that sorting sees one zero.
        return (value if self.largest else -value) + np.float32(0)

    def _rank(self, found: Candidates) -> Candidates:
        order = np.lexsort((found.unit, found.token, found.layer, -self._score(found.value)))
        found = found.take(order)
        same = np.zeros(len(found), bool)
        same[1:] = (
            (found.layer[1:] == found.layer[:-1])
            & (found.token[1:] == found.token[:-1])
            & (found.unit[1:] == found.unit[:-1])
        )
        found = found.take(~same)
        if self._groups is not None:
            first = np.sort(np.unique(self._groups(found.token), return_index=True)[1])
            found = found.take(first)
        return found.take(slice(0, self.k))


class Grouping:
    """Labels of rows for distinct answers, such as the sequence of each token.

    Args:
        first_token: ascending global rows at which groups begin.
        label: the group that begins there.
    """

    def __init__(self, first_token: npt.NDArray[np.int64], label: npt.NDArray[np.int64]) -> None:
        self._first_token = first_token
        self._label = label

    def __call__(self, token: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The group of each global row."""
        return self._label[np.searchsorted(self._first_token, token, side="right") - 1]
