"""What is typed on the command line, turned into values: counts, sizes, units, pairs."""

import re
from collections.abc import Sequence
from decimal import Decimal

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["byte_size", "keep_rules", "token_count", "unit_numbers", "window_sizes", "worker_share"]

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgb]?)", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "b": 3, "t": 4}


def token_count(text: str | None, option: str = "--limit-tokens") -> int | None:
    """A number of tokens: ``120000``, ``120k``, ``1.5M``, ``2G``.

    Raises:
        InvalidInput: it is no such number.

    >>> token_count("120k"), token_count("1.5M"), token_count("1_000")
    (120000, 1500000, 1000)
    """
    if text is None:
        return None
    matched = _COUNT.fullmatch(_plain(text))
    return _whole(matched, 1000, text, option, "a number such as 5000, 120k or 2M")


def byte_size(text: str | None, option: str = "--max-bytes") -> int | None:
    """A number of bytes: ``10GB`` and ``10G`` are decimal, ``10GiB`` is binary.

    Raises:
        InvalidInput: it is no such number.

    >>> byte_size("10GB"), byte_size("1.5 MiB"), byte_size("512")
    (10000000000, 1572864, 512)
    """
    if text is None:
        return None
    matched = _SIZE.fullmatch(_plain(text))
    base = 1024 if matched and matched[3] else 1000
    return _whole(matched, base, text, option, "a size such as 500MB, 10GB or 1TiB")


def keep_rules(rules: Sequence[str]) -> dict[str, str]:
    """``location=retention`` pairs.

    Raises:
        InvalidInput: one has no ``=``.

    >>> keep_rules(["mlp_post_act=raw"])
    {'mlp_post_act': 'raw'}
    """
    kept = {}
    for rule in rules:
        location, separator, retention = rule.partition("=")
        if not separator or not location or not retention:
            raise _invalid(f"--keep is {rule!r}; write location=raw or location=none.")
        kept[location.strip()] = retention.strip()
    return kept


def worker_share(text: str) -> tuple[int, int]:
    """``i/n``: worker i of n, counted from 0.

    Raises:
        InvalidInput: it is not of that form.

    >>> worker_share("1/4")
    (1, 4)
    """
    matched = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not matched:
        raise _invalid(f"--worker is {text!r}; write i/n, for instance 0/4 for the first of four.")
    return int(matched[1]), int(matched[2])


def unit_numbers(text: str) -> tuple[int, ...]:
    """``layer:unit``, with more numbers where a unit has more axes.

    Raises:
        InvalidInput: it is not of that form.

    >>> unit_numbers("3:712")
    (3, 712)
    """
    if not re.fullmatch(r"\d+([:/,.]\d+)*", text.strip()):
        raise _invalid(f"The unit is {text!r}; write layer:unit, for instance 3:712.")
    return tuple(int(number) for number in re.split(r"[:/,.]", text.strip()))


def window_sizes(text: str) -> tuple[int, int]:
    """``before,after``: tokens shown around a row.

    Raises:
        InvalidInput: it is not of that form.

    >>> window_sizes("20,10")
    (20, 10)
    """
    matched = re.fullmatch(r"(\d+)\s*,\s*(\d+)", text.strip())
    if not matched:
        raise _invalid(f"--window is {text!r}; write before,after, for instance 20,10.")
    return int(matched[1]), int(matched[2])


def _plain(text: str) -> str:
    return text.strip().replace("_", "")


def _whole(
    matched: "re.Match[str] | None", base: int, text: str, option: str, expected: str
) -> int:
    number = Decimal(matched[1]) * base ** _POWERS[matched[2].lower()] if matched else Decimal(-1)
    if number < 1 or number != int(number):
        raise _invalid(f"{option} is {text!r}; write {expected}.")
    return int(number)


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
