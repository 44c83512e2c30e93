"""JSON records that carry their own checksum.

A record is one canonical JSON object (sorted keys, no spaces) with a member
``crc32c`` over the canonical bytes of the rest, so that one flipped byte anywhere
in the file is found by whoever reads it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crc32c import crc32c

from actstore.store.errors import ErrorKind, StoreDamaged

__all__ = ["canonical_json", "decode_record", "encode_record", "newer_format", "well_formed"]

_MEMBER = b'"crc32c":"'


def canonical_json(value: object) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, no NaN, UTF-8."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def encode_record(fields: dict[str, Any]) -> bytes:
    r"""Serialise ``fields`` with their checksum.

    >>> encode_record({"b": 1, "a": "x"})
    b'{"a":"x","b":1,"crc32c":"d78c9188"}\n'
    """
    body = {key: value for key, value in fields.items() if key != "crc32c"}
    checksum = f"{crc32c(canonical_json(body)):08x}"
    return canonical_json({**body, "crc32c": checksum}) + b"\n"


def decode_record(data: bytes, name: str) -> dict[str, Any]:
    """Parse and verify a record.

    Args:
        data: the file's bytes.
        name: the file's path inside the store, for the message.

    Returns:
        The fields without ``crc32c``.

    Raises:
        StoreDamaged: the bytes are not what ``encode_record`` wrote.
    """
    with well_formed(name):
        fields = json.loads(data)
        checksum = fields.pop("crc32c")
    # Comparing bytes, not fields: a flip that JSON forgives (a space, a case) counts too.
    try:
        same = _is_intact(data, checksum) or encode_record(fields) == data
    except (ValueError, TypeError, RecursionError):
        # A digit turned into an exponent parses as infinity, which no record can hold.
        same = False
    if not same:
        raise StoreDamaged(
            f"{name} fails its checksum {checksum}. Run `actstore verify`.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    result: dict[str, Any] = fields
    return result


def _is_intact(data: bytes, checksum: object) -> bool:
    """Whether the bytes around the one checksum of a record have that checksum.

    Three times as fast as encoding the fields again, which decides where this says no: a store
    has a record per segment.
    """
    before, found, after = data.partition(_MEMBER)
    digits, rest = after[:8], after[8:]
    if not found or _MEMBER in rest or rest[:1] != b'"' or rest[-2:] != b"}\n":
        return False
    # Its comma is the one after it, or the one before it where it comes last.
    rest = rest[2:-1] if rest[1:2] == b"," else rest[1:-1]
    before = before[:-1] if rest == b"}" and before.endswith(b",") else before
    computed = f"{crc32c(rest, crc32c(before)):08x}"
    return computed == checksum and computed.encode() == digits


@contextmanager
def well_formed(name: str) -> Iterator[None]:
    """Report what goes wrong inside as a malformed file: one that is not what its place calls for.

    A sound record of another sort passes its own checksum, and then lacks the fields that are
    asked for or has them in another shape.

    Args:
        name: the file's path inside the store, for the message.

    Raises:
        StoreDamaged: a field is missing or has another type or value.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StoreDamaged(
            f"{name} is not a record of this format. Run `actstore verify`.",
            kind=ErrorKind.MALFORMED_FILE,
        ) from error


def newer_format(data: bytes, name: str, known: int) -> int | None:
    """The format that a record claims, if it is above ``known`` and not merely damaged.

    A newer format may lay its record out otherwise, so only its number is looked for. A
    record that is sound once the number is put right was damaged just there.
    """
    claimed = re.search(rb'"format":\s*(\d+)', data)
    if claimed is None or int(claimed[1]) <= known:
        return None
    repaired = data[: claimed.start(1)] + str(known).encode() + data[claimed.end(1) :]
    try:
        decode_record(repaired, name)
    except StoreDamaged:
        return int(claimed[1])
    return None
