"""What a backward pass differentiates: one number per sequence.

An objective has a name, canonical text that :func:`parse_objective` turns back into it.
It stands in ``store.json``, set records and the attributes of arrays of gradients, so
that nobody takes the gradient of one thing for that of another.

Targets are token ids, or the name of one of the documents' own columns. Formulas:
spec/derived_scalars.md h.3, at the last position of *each* sequence, never at padding.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, ClassVar, Protocol

import torch

from actstore.ingest.target_tokens import checked_token_id, resolve_target
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = [
    "OBJECTIVES",
    "LogitDiff",
    "LogitMinusMean",
    "NextTokenLogProb",
    "Objective",
    "Probabilities",
    "Target",
    "Zero",
    "parse_objective",
    "resolve_target",
]

Target = int | tuple[int, ...] | str
"""A token id, several, or the name of a document column that holds them."""

Columns = Sequence[Mapping[str, object]]
"""Each sequence's column values as token ids: an int or several, under the column's name."""


class Objective(Protocol):
    """A differentiable number per sequence; larger is more of what it measures."""

    @property
    def name(self) -> str:
        """Canonical text, which :func:`parse_objective` reads."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The document columns that it reads."""
        ...

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        """The objective of every sequence of a batch.

        Args:
            logits: (batch, token, vocabulary), padded on the right.
            token_ids: int64 (batch, token), padded alike.
            lengths: tokens of each sequence.
            columns: each sequence's values of ``self.columns``; None where it has none.

        Returns:
            (batch,), at least float32; the last position is that of each sequence.

        Raises:
            InvalidInput: a target is missing or outside the vocabulary.
        """
        ...


@dataclass(frozen=True)
class NextTokenLogProb:
    """Sum over positions of the log-probability of the token that follows.

    A sequence of one token has nothing to predict: its objective and gradient are zero.
    """

    word: ClassVar[str] = "next_token_log_prob"
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Canonical text."""
        return self.word

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        """See :meth:`Objective.__call__`."""
        before = _wide(logits[:, :-1])
        following = token_ids[:, 1:].to(logits.device)
        # Gather and normaliser: a whole tensor of log-probabilities is never made.
        chosen = before.gather(2, following[..., None])[..., 0]
        log_probability = chosen - before.logsumexp(dim=2)
        position = torch.arange(following.shape[1], device=logits.device)
        last = torch.as_tensor(lengths, device=logits.device) - 1
        counts = position[None, :] < last[:, None]
        return torch.where(counts, log_probability, 0).sum(dim=1)


@dataclass(frozen=True)
class LogitDiff:
    """Mean target logit minus mean distractor logit at the last position.

    Attributes:
        target: the tokens that the objective is for.
        distractor: the tokens that it is against; None for none.
    """

    word: ClassVar[str] = "logit_diff"
    target: Target
    distractor: Target | None = None

    def __post_init__(self) -> None:
        _normalise(self)

    @property
    def name(self) -> str:
        """Canonical text."""
        return _spell(self.word, self.target, self.distractor)

    @property
    def columns(self) -> tuple[str, ...]:
        """The document columns that it reads."""
        return _named(self.target, self.distractor)

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        """See :meth:`Objective.__call__`."""
        last = _last(logits, lengths)
        value = _of_targets(last, self.target, columns, torch.Tensor.mean)
        if self.distractor is not None:
            value = value - _of_targets(last, self.distractor, columns, torch.Tensor.mean)
        return value


@dataclass(frozen=True)
class LogitMinusMean:
    """Mean target logit minus the mean of all logits at the last position.

    Attributes:
        target: the tokens that the objective is for.
    """

    word: ClassVar[str] = "logit_minus_mean"
    target: Target

    def __post_init__(self) -> None:
        _normalise(self)

    @property
    def name(self) -> str:
        """Canonical text."""
        return _spell(self.word, self.target)

    @property
    def columns(self) -> tuple[str, ...]:
        """The document columns that it reads."""
        return _named(self.target)

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        """See :meth:`Objective.__call__`."""
        last = _last(logits, lengths)
        return _of_targets(last, self.target, columns, torch.Tensor.mean) - last.mean(dim=1)


@dataclass(frozen=True)
class Probabilities:
    """Sum of the targets' probabilities at the last position.

    Attributes:
        target: the tokens.
    """

    word: ClassVar[str] = "probabilities"
    target: Target

    def __post_init__(self) -> None:
        _normalise(self)

    @property
    def name(self) -> str:
        """Canonical text."""
        return _spell(self.word, self.target)

    @property
    def columns(self) -> tuple[str, ...]:
        """The document columns that it reads."""
        return _named(self.target)

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        """See :meth:`Objective.__call__`."""
        probability = torch.softmax(_last(logits, lengths), dim=1)
        return _of_targets(probability, self.target, columns, torch.Tensor.sum)


@dataclass(frozen=True)
class Zero:
    """Zero; so is its every gradient."""

    word: ClassVar[str] = "zero"
    columns: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Canonical text."""
        return self.word

    def __call__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: Sequence[int],
        columns: Columns | None,
    ) -> torch.Tensor:
        """See :meth:`Objective.__call__`."""
        return 0 * _wide(logits).sum(dim=(1, 2))


_Kind = type[NextTokenLogProb | LogitDiff | LogitMinusMean | Probabilities | Zero]

OBJECTIVES: dict[str, _Kind] = {
    kind.word: kind for kind in (NextTokenLogProb, LogitDiff, LogitMinusMean, Probabilities, Zero)
}
"""Every objective by the word that its name begins with."""

_USAGES = (
    "next_token_log_prob, logit_diff(TARGET), logit_diff(TARGET, DISTRACTOR), "
    "logit_minus_mean(TARGET), probabilities(TARGET), zero"
)


def parse_objective(text: str) -> Objective:
    """The objective that a name stands for.

    Args:
        text: a known word, with its targets in parentheses: token ids (``5``, ``[5, 40]``)
            or the name of a document column, quoted where it is no plain word.

    Raises:
        InvalidInput: there is no such objective, or its targets are not of that form; the
            message lists the known ones.

    >>> parse_objective("logit_diff( answer, [9, 61] )").name
    'logit_diff(answer, [9, 61])'
    >>> parse_objective("next_token_log_prob")
    NextTokenLogProb()
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _unknown(text) from None
    word, given = (tree.func, tree.args) if isinstance(tree, ast.Call) else (tree, [])
    has_keywords = isinstance(tree, ast.Call) and bool(tree.keywords)
    if not isinstance(word, ast.Name) or word.id not in OBJECTIVES or has_keywords:
        raise _unknown(text)
    targets = [_parsed_target(argument, text) for argument in given]
    kind: Callable[..., Objective] = OBJECTIVES[word.id]
    try:
        return kind(*targets)
    except TypeError:
        raise _invalid(
            f"The objective {text!r} has {len(targets)} targets, and {word.id} takes another "
            f"number of them. Known objectives: {_USAGES}."
        ) from None


def _normalise(objective: Any) -> None:
    """Bring an objective's targets into their one form, or refuse them."""
    for name in ("target", "distractor"):
        value = getattr(objective, name, None)
        if value is None and name == "distractor":
            continue
        is_column = isinstance(value, str) and value
        members = list(value) if isinstance(value, list | tuple) else [value]
        if not is_column and not (members and all(_is_id(member) for member in members)):
            raise _invalid(
                f"{name} of {objective.word} is {value!r}; give a token id, a list of token ids, "
                "or the name of a document column."
            )
        if not is_column:
            # One of several is one: equal objectives have equal names.
            value = members[0] if len(members) == 1 else tuple(members)
        object.__setattr__(objective, name, value)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _named(*targets: Target | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target for target in targets if isinstance(target, str)))


def _spell(word: str, *targets: Target | None) -> str:
    return f"{word}({', '.join(_spell_target(one) for one in targets if one is not None)})"


def _spell_target(target: Target) -> str:
    if isinstance(target, str):
        is_plain = re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", target) and not iskeyword(target)
        return target if is_plain else repr(target)
    return str(list(target)) if isinstance(target, tuple) else str(target)


def _parsed_target(argument: ast.expr, text: str) -> Any:
    if isinstance(argument, ast.Name):
        return argument.id
    try:
        return ast.literal_eval(argument)
    except (ValueError, SyntaxError, TypeError):
        raise _unknown(text) from None


def _wide(logits: torch.Tensor) -> torch.Tensor:
    # Half precision loses most of a log-probability's digits.
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _last(logits: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The logits at each sequence's own last position, (batch, vocabulary)."""
    last = torch.as_tensor(lengths, device=logits.device) - 1
    return _wide(logits[torch.arange(len(last), device=logits.device), last])


def _of_targets(
    values: torch.Tensor,
    target: Target,
    columns: Columns | None,
    fold: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A fold over each sequence's targets, (batch,), of (batch, vocabulary)."""
    ids = _ids(target, len(values), columns)
    for token_id in (member for members in ids for member in members):
        checked_token_id(token_id, values.shape[1], f"The target {_spell_target(target)}")
    return torch.stack([fold(row[list(of)]) for row, of in zip(values, ids, strict=True)])


def _ids(target: Target, count: int, columns: Columns | None) -> list[tuple[int, ...]]:
    if not isinstance(target, str):
        return [target if isinstance(target, tuple) else (target,)] * count
    if columns is None or len(columns) != count:
        raise _invalid(
            f"The objective reads the column {target!r}, and no columns were given for the "
            f"{count} sequences. Ingest a corpus that has it, or name token ids."
        )
    found = []
    for values in columns:
        if target not in values:
            raise _invalid(
                f"The objective reads the column {target!r}; there is only "
                f"{', '.join(values) or 'none'}."
            )
        value = values[target]
        members = tuple(value) if isinstance(value, Iterable) else (value,)
        if not members or not all(_is_id(member) for member in members):
            raise _invalid(f"The column {target!r} has {value!r} where token ids are needed.")
        found.append(members)
    return found


def _unknown(text: str) -> InvalidInput:
    return _invalid(
        f"Unknown objective {text!r}. Known objectives: {_USAGES}; a target is a token id, a list "
        "of them, or the name of a document column, in quotes where it is no plain word."
    )


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
