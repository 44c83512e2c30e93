"""From a token's text to its number."""

from actstore.query.cache.batch import Batch
from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["token_number"]


def token_number(text: str, batch: Batch) -> int:
    """The one token that decodes to a text.

    Raises:
        InvalidInput: none does, several do, or there is no tokenizer.
    """
    texts = batch.texts(range(batch.model.dimensions.vocabulary_size))
    found = [number for number, known in enumerate(texts) if known == text]
    if len(found) == 1:
        return found[0]
    if all(known is None for known in texts):
        reason = "there is no tokenizer here"
    elif found:
        reason = f"{len(found)} tokens read so: {', '.join(map(str, found[:5]))}"
    else:
        reason = "no token reads so (a word's first token begins with a space)"
    raise InvalidInput(
        f"{text!r} is not one token: {reason}. Give a token's number.",
        kind=ErrorKind.INVALID_ARGUMENT,
    )
