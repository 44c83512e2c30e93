"""A target's value as token ids, checked against the vocabulary."""

import json

from actstore.ingest.tokenization import Tokenizer
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["checked_token_id", "resolve_target"]


def resolve_target(
    value: object, tokenizer: Tokenizer | None, vocabulary_size: int, what: str
) -> tuple[int, ...]:
    """A column's value as token ids.

    Args:
        value: a token id, a list of them, their JSON text (lists are kept as that), or a
            text that the tokenizer encodes to exactly one token.
        tokenizer: None where the corpus brings token ids.
        vocabulary_size: rows of the model's embedding.
        what: where the value stands, for the message.

    Raises:
        InvalidInput: the value is none of these.
    """
    if isinstance(value, str):
        listed = _listed(value)
        if listed is None:
            return (_one_token(value, tokenizer, vocabulary_size, what),)
        value = listed
    members = list(value) if isinstance(value, list | tuple) else [value]
    ids = tuple(
        _one_token(member, tokenizer, vocabulary_size, what)
        if isinstance(member, str)
        else checked_token_id(member, vocabulary_size, what)
        for member in members
    )
    if not ids:
        raise _invalid(f"{what} is an empty list; a target needs at least one token.")
    return ids


def _listed(text: str) -> list[object] | None:
    """The list that a column's text stands for, if it does."""
    if not text.startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def checked_token_id(value: object, vocabulary_size: int, what: str) -> int:
    """A token id that the vocabulary has.

    Args:
        value: the id.
        vocabulary_size: rows of the model's embedding.
        what: where it stands, for the message.

    Raises:
        InvalidInput: it is no whole number, or outside the vocabulary.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(
            f"{what} is {value!r}; a target is a token id, a list of token ids, or a text that is "
            "one token."
        )
    if not 0 <= value < vocabulary_size:
        raise InvalidInput(
            f"{what} is token id {value}; the vocabulary has {vocabulary_size} tokens, 0 to "
            f"{vocabulary_size - 1}. Use the tokenizer that belongs to the model.",
            kind=ErrorKind.TOKEN_OUT_OF_VOCABULARY,
        )
    return value


def _one_token(text: str, tokenizer: Tokenizer | None, vocabulary_size: int, what: str) -> int:
    if tokenizer is None:
        raise _invalid(f"{what} is the text {text!r}, and there is no tokenizer. Give a token id.")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) != 1:
        raise _invalid(
            f"{what} is {text!r}, which is {len(ids)} tokens ({ids}); a target text must be "
            "exactly one. Mind the space before a word, or give token ids."
        )
    return checked_token_id(ids[0], vocabulary_size, what)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
