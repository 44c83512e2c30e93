"""The vocabulary of the stored tokenizer, read from ``tokenizer.json`` without transformers.

A token has a ``piece``, its spelling inside the tokenizer (``Ġdef``, ``▁the``,
``<0x0A>``), and a ``text``, what it stands for on its own (`` def``, a line feed). Bytes
that are no UTF-8 alone show as U+FFFD.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from actstore.store.model.weights import FOLDER, ModelSnapshot

__all__ = ["TOKENIZER_KEY", "VocabularyPiece", "decode_vocabulary", "vocabulary_pieces"]

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


def decode_vocabulary(tokenizer_json: bytes) -> list[VocabularyPiece]:
    """The vocabulary that a ``tokenizer.json`` describes, added tokens included, by id."""
    tokenizer: dict[str, Any] = json.loads(tokenizer_json)
    vocabulary = tokenizer["model"]["vocab"]
    spelled = (
        {piece: number for number, (piece, _) in enumerate(vocabulary)}
        if isinstance(vocabulary, list)  # Unigram: [piece, score] in the order of the ids
        else vocabulary
    )
    steps = [_step(decoder) for decoder in _decoders(tokenizer.get("decoder"))]
    pieces = {}
    for piece, token_id in spelled.items():
        value: str | bytes = piece
        for step in steps:
            if isinstance(value, str):
                value = step(value)
        text = value if isinstance(value, str) else value.decode("utf-8", errors="replace")
        pieces[token_id] = VocabularyPiece(token_id, piece, text, False)
    for added in tokenizer.get("added_tokens", []):
        content = added["content"]
        pieces[added["id"]] = VocabularyPiece(added["id"], content, content, added["special"])
    return [pieces[token_id] for token_id in sorted(pieces)]


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
