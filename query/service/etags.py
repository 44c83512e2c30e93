"""Strong entity tags: what an answer follows from, named before it is computed.

An answer follows from the opening (code, store, records), the request's canonical address
and the form it takes. So a client that has it is told so without any work.
"""

import hashlib
from collections.abc import Iterable
from urllib.parse import urlencode

__all__ = ["CACHE_CONTROL", "entity_tag", "is_known"]

CACHE_CONTROL = "private, no-cache"
"""Keep it, and ask each time whether it still holds: the store may have been renewed."""


def entity_tag(state: str, path: str, query: Iterable[tuple[str, str]], form: str) -> str:
    """The tag of an answer.

    Args:
        state: names the opening.
        path: of the request.
        query: its parameters; their order does not matter, but for repeats of one.
        form: the representation.

    >>> one = entity_tag("s", "/a", [("k", "1"), ("layer", "2")], "json")
    >>> one == entity_tag("s", "/a", [("layer", "2"), ("k", "1")], "json")
    True
    >>> one == entity_tag("s", "/a", [("k", "1"), ("layer", "2")], "csv")
    False
    """
    kept = [pair for pair in query if pair[0] != "format"]
    ordered: list[tuple[str, str]] = sorted(kept, key=_name)
    canonical = urlencode(ordered)
    digest = hashlib.sha256(f"{state}\0{path}\0{canonical}\0{form}".encode())
    return f'"{digest.hexdigest()[:32]}"'


def _name(pair: tuple[str, str]) -> str:
    return pair[0]


def is_known(tag: str, if_none_match: str | None) -> bool:
    """Whether a client that sends ``If-None-Match`` has the answer.

    >>> is_known('"a"', 'W/"b", "a"'), is_known('"a"', 'W/"a"'), is_known('"a"', "*")
    (True, True, False)
    """
    if if_none_match is None:
        return False
    # `*` asks whether anything is there at all, which only the answer itself can say.
    return tag in {one.strip().removeprefix("W/") for one in if_none_match.split(",")}
