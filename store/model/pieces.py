"""The vocabulary of the stored tokenizer, read from ``tokenizer.json`` without transformers.

A token has a ``piece``, its spelling inside the tokenizer (``Ġdef``, ``▁the``,
``<0x0A>``), and a ``text``, what it stands for on its own (`` def``, a line feed). Bytes
that are no UTF-8 alone show as U+FFFD.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from crc32c import crc32c

from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, StoreDamaged
from actstore.store.manifest import FileEntry
from actstore.store.model.weights import FOLDER, ModelSnapshot

__all__ = [
    "TOKENIZER_KEY",
    "Vocabulary",
    "VocabularyPiece",
    "decode_vocabulary",
    "read_vocabulary",
    "vocabulary_pieces",
]

TOKENIZER_KEY = f"{FOLDER}/tokenizer.json"


class VocabularyPiece(NamedTuple):
    """One token of a vocabulary."""

    token_id: int
    piece: str
    text: str
    special: bool


def vocabulary_pieces(root: Path) -> list[VocabularyPiece]:
    """The vocabulary of the store at ``root``, by token id.

    Returns:
        Empty when the model was ingested without a tokenizer. A model may have more
        rows in its embedding than the tokenizer has tokens; those have no piece.

    Raises:
        StoreDamaged: the tokenizer's file is missing or fails its checksum.
    """
    snapshot = ModelSnapshot.read(root)
    if TOKENIZER_KEY not in snapshot.files:
        return []
    return decode_vocabulary(snapshot.read_file(root, TOKENIZER_KEY))


def read_vocabulary(blobs: LocalBlobs, files: Iterable[FileEntry]) -> "Vocabulary | None":
    """The vocabulary of a store, decoded piece by piece as it is asked for.

    Args:
        blobs: the store.
        files: the files that its manifest names.

    Returns:
        None when the model was ingested without a tokenizer.

    Raises:
        StoreDamaged: the tokenizer's file is missing or fails its checksum.
    """
    entry = next((entry for entry in files if entry.path == TOKENIZER_KEY), None)
    if entry is None:
        return None
    data = blobs.read(TOKENIZER_KEY)
    if (len(data), crc32c(data)) != (entry.size, entry.crc32c):
        raise StoreDamaged(
            f"{TOKENIZER_KEY} fails its checksum {entry.crc32c:08x}. Run `actstore verify`.",
            kind=ErrorKind.CHECKSUM_MISMATCH,
        )
    return Vocabulary(data)


class Vocabulary:
    """The tokens that a ``tokenizer.json`` describes, added ones included.

    Args:
        tokenizer_json: the file's bytes.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        tokenizer: dict[str, Any] = json.loads(tokenizer_json)
        vocabulary = tokenizer["model"]["vocab"]
        # Unigram has [piece, score] in the order of the ids, the others piece -> id.
        self._pieces: dict[int, str] = (
            dict(enumerate(piece for piece, _ in vocabulary))
            if isinstance(vocabulary, list)
            else dict(zip(vocabulary.values(), vocabulary, strict=True))
        )
        self._added = {
            added["id"]: VocabularyPiece(added["id"], added["content"], added["content"], special)
            for added in tokenizer.get("added_tokens", [])
            for special in [added["special"]]
        }
        self._steps = [_step(decoder) for decoder in _decoders(tokenizer.get("decoder"))]

    def __iter__(self) -> Iterator[VocabularyPiece]:
        """Every token, by id."""
        for token_id in sorted({*self._pieces, *self._added}):
            piece = self.piece(token_id)
            assert piece is not None
            yield piece

    def piece(self, token_id: int) -> VocabularyPiece | None:
        """One token; None for an id that the tokenizer does not have."""
        if token_id in self._added:
            return self._added[token_id]
        if token_id not in self._pieces:
            return None
        value: str | bytes = self._pieces[token_id]
        for step in self._steps:
            if isinstance(value, str):
                value = step(value)
        text = value if isinstance(value, str) else value.decode("utf-8", errors="replace")
        return VocabularyPiece(token_id, self._pieces[token_id], text, False)

    def text(self, token_id: int) -> str | None:
        """What one token stands for on its own; None for an id that there is not."""
        piece = self.piece(token_id)
        return piece.text if piece else None


def decode_vocabulary(tokenizer_json: bytes) -> list[VocabularyPiece]:
    """The vocabulary that a ``tokenizer.json`` describes, added tokens included, by id."""
    return list(Vocabulary(tokenizer_json))


_Step = Callable[[str], str | bytes]


def _decoders(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for member in decoder["decoders"]:
            yield from _decoders(member)
    else:
        yield decoder


def _step(decoder: Mapping[str, Any]) -> _Step:
    # Fuse and Strip join tokens and trim the ends of a text: neither applies to one token.
    make = _STEPS.get(decoder["type"])
    return make(decoder) if make else lambda piece: piece


def _byte_alphabet() -> dict[str, int]:
    # Byte-level tokenizers spell a printable byte as itself, the rest from U+0100 upward.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(hidden)
    }


_BYTES = _byte_alphabet()
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(_: Mapping[str, Any]) -> _Step:
    def decode(piece: str) -> str | bytes:
        try:
            return bytes(_BYTES[character] for character in piece)
        except KeyError:
            return piece

    return decode


def _byte_fallback(_: Mapping[str, Any]) -> _Step:
    def decode(piece: str) -> str | bytes:
        matched = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(matched[1], 16)]) if matched else piece

    return decode


def _replace(decoder: Mapping[str, Any]) -> _Step:
    pattern, content = decoder["pattern"], decoder["content"]
    if "String" in pattern:
        return lambda piece: piece.replace(pattern["String"], content)
    expression = re.compile(pattern["Regex"])
    return lambda piece: expression.sub(lambda _: content, piece)


def _metaspace(decoder: Mapping[str, Any]) -> _Step:
    return lambda piece: piece.replace(decoder["replacement"], " ")


def _word_piece(decoder: Mapping[str, Any]) -> _Step:
    return lambda piece: piece.removeprefix(decoder["prefix"])


def _word_end(decoder: Mapping[str, Any]) -> _Step:
    suffix = decoder["suffix"]
    return lambda piece: piece.removesuffix(suffix) + " " if piece.endswith(suffix) else piece


_STEPS: dict[str, Callable[[Mapping[str, Any]], _Step]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Replace": _replace,
    "Metaspace": _metaspace,
    "WordPiece": _word_piece,
    "BPEDecoder": _word_end,
}
