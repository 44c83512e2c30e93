"""Names of the places in a forward pass, as people who know TransformerLens write them.

A name is a full one (``blocks.3.hook_resid_post``), a shorthand (``resid_post3``,
``scale0ln1``) or a tuple (``("resid_post", 3)``, ``("scale", 0, "ln1")``). Layers below 0
count from the end in tuples.
"""

import re
from collections.abc import Sequence

from actstore.store.errors import ErrorKind, InvalidInput

__all__ = ["HookName", "UnknownHook", "block_name", "full_name", "split_name"]

HookName = str | tuple[str] | tuple[str, int | None] | tuple[str, int | None, str | None]
"""What stands between the brackets: a name, or its parts."""

_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_SUBLAYERS = {
    "a": "attn",
    "attention": "attn",
    "m": "mlp",
    "b": "",
    "block": "",
    "blocks": "",
}
_OF_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_OF_MLP = ("pre", "post", "mid", "pre_linear")
_OF_NORMS = ("scale", "normalized")

_SHORTHAND = re.compile(r"([a-z_]+?)(\d+)([a-z][a-z0-9_.]*)?")
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class UnknownHook(InvalidInput, KeyError):
    """A name that stands for no place of this model; a mapping's missing key."""

    def __str__(self) -> str:
        # KeyError would show the message quoted.
        return str(self.args[0])


def block_name(layer: int, rest: str) -> str:
    """The full name of a place in a block.

    >>> block_name(3, "hook_resid_post")
    'blocks.3.hook_resid_post'
    """
    return f"blocks.{layer}.{rest}"


def split_name(name: str) -> tuple[int | None, str]:
    """A full name's layer, None outside the blocks, and the rest.

    >>> split_name("blocks.3.attn.hook_z")
    (3, 'attn.hook_z')
    """
    matched = _OF_BLOCK.fullmatch(name)
    return (int(matched[1]), matched[2]) if matched else (None, name)


def full_name(key: object, n_layers: int) -> str:
    """The full name that a key stands for; whether the model has it is another question.

    Args:
        key: a full name, a shorthand, or a tuple of name, layer and sublayer.
        n_layers: blocks of the model.

    Raises:
        UnknownHook: not a name, or a layer outside the model.

    >>> full_name("resid_pre0", 12)
    'blocks.0.hook_resid_pre'
    >>> full_name(("scale", -1, "ln2"), 12)
    'blocks.11.ln2.hook_scale'
    >>> full_name("normalized", 12)
    'ln_final.hook_normalized'
    """
    if isinstance(key, str):
        return _of_text(key, n_layers)
    if not isinstance(key, Sequence) or not 1 <= len(key) <= 3 or not isinstance(key[0], str):
        raise _unknown(f"{key!r} is no name of an activation.")
    name, layer, sublayer = (*key, None, None)[:3]
    if layer is None:
        return _of_text(name, n_layers) if sublayer is None else _joined(name, None, sublayer)
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise _unknown(f"The layer of {key!r} is no whole number.")
    return _joined(name, _checked(int(layer), n_layers, key), sublayer)


def _of_text(text: str, n_layers: int) -> str:
    if "." in text or text.startswith("hook_") or text == "logits":
        layer, _ = split_name(text)
        if layer is not None:
            _checked(layer, n_layers, text)
        return text
    matched = _SHORTHAND.fullmatch(text)
    if matched is None:
        return _joined(text, None, None)
    name, layer, sublayer = matched[1], int(matched[2]), matched[3]
    return _joined(name, _checked(layer, n_layers, text), sublayer)


def _joined(name: str, layer: int | None, sublayer: str | None) -> str:
    name = name.removeprefix("hook_")
    name = _ALIASES.get(name, name)
    if name in _OF_ATTENTION:
        sublayer = "attn"
    elif name in _OF_MLP:
        sublayer = "mlp"
    elif sublayer is not None:
        sublayer = _SUBLAYERS.get(sublayer, sublayer)
    if layer is None:
        if name in _OF_NORMS and not sublayer:
            sublayer = "ln_final"
        return f"{sublayer}.hook_{name}" if sublayer else f"hook_{name}"
    return block_name(layer, f"{sublayer}.hook_{name}" if sublayer else f"hook_{name}")


def _checked(layer: int, n_layers: int, key: object) -> int:
    found = layer + n_layers if layer < 0 else layer
    if not 0 <= found < n_layers:
        raise UnknownHook(
            f"{key!r} names layer {layer}; this model has layers 0 to {n_layers - 1}.",
            kind=ErrorKind.UNKNOWN_LAYER,
        )
    return found


def _unknown(message: str) -> UnknownHook:
    return UnknownHook(
        f"{message} Use a name such as 'blocks.0.hook_resid_post', 'resid_post0' or "
        "('resid_post', 0).",
        kind=ErrorKind.UNKNOWN_LOCATION,
    )
