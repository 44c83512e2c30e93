"""Names of locations: ours, TransformerLens' and presets, resolved to locations."""

import re
from collections.abc import Collection

from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.vocabulary import (
    FORWARD_LOCATIONS,
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
)

__all__ = ["PRESETS", "parse_location", "parse_locations"]

_L = ActivationLocationType
_MINIMAL = (_L.RESID_POST_EMBEDDING, _L.RESID_POST_MLP)
_NEURONS = (*_MINIMAL, _L.MLP_POST_ACT)

PRESETS: dict[str, tuple[ActivationLocationType, ...]] = {
    "minimal": _MINIMAL,
    "neurons": _NEURONS,
    "attention": (
        *_NEURONS,
        _L.ATTN_QUERY,
        _L.ATTN_KEY,
        _L.ATTN_VALUE,
        _L.RESID_POST_ATTN,
        _L.ATTN_INPUT_LAYER_NORM_SCALE,
        _L.MLP_INPUT_LAYER_NORM_SCALE,
        _L.RESID_FINAL_LAYER_NORM_SCALE,
    ),
    "full": tuple(
        location
        for location in FORWARD_LOCATIONS
        if location not in (*OPTIONAL_LOCATIONS, _L.LOGITS) and not location.is_pair_shaped
    ),
}
"""Named sets of locations; a set is stored in the order of the enumeration.

Of a model that lacks one of them a preset has the others, and ``full`` has the optional
ones too where a model has them: see :func:`parse_locations`.
"""

_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_ALIASES: dict[str, tuple[ActivationLocationType, int | None]] = {
    "embed": (_L.RESID_POST_EMBEDDING, None),
    "resid_mid": (_L.RESID_POST_ATTN, None),
    "resid_post": (_L.RESID_POST_MLP, None),
    "attn_out": (_L.RESID_DELTA_ATTN, None),
    "mlp_out": (_L.RESID_DELTA_MLP, None),
    "pre": (_L.MLP_PRE_ACT, None),
    "mlp_pre": (_L.MLP_PRE_ACT, None),
    "post": (_L.MLP_POST_ACT, None),
    "mlp_post": (_L.MLP_POST_ACT, None),
    "q": (_L.ATTN_QUERY, None),
    "k": (_L.ATTN_KEY, None),
    "rot_q": (_L.ATTN_QUERY, None),
    "rot_k": (_L.ATTN_KEY, None),
    "v": (_L.ATTN_VALUE, None),
    "pre_linear": (_L.MLP_PRE_LINEAR, None),
    "z": (_L.ATTN_WEIGHTED_SUM_OF_VALUES, None),
    "pattern": (_L.ATTN_QK_PROBS, None),
    "attn_scores": (_L.ATTN_QK_LOGITS, None),
    "attn": (_L.ATTN_QK_PROBS, None),
}


def parse_location(name: str) -> tuple[ActivationLocationType, int | None]:
    """Resolve a location by its own or by a TransformerLens name.

    Args:
        name: ``mlp_post_act``, ``mlp_post``, ``post``, ``hook_resid_post``,
            ``blocks.3.hook_resid_post`` …

    Returns:
        The location, and the layer if the name holds one.

    Raises:
        InvalidInput: no such location; the message lists the known ones.

    >>> parse_location("blocks.3.hook_resid_post")
    (ActivationLocationType.RESID_POST_MLP, 3)
    """
    text = name.strip().lower()
    layer: int | None = None
    matched = _BLOCK_NAME.fullmatch(text)
    if matched:
        layer, text = int(matched[1]), matched[2]
        if text == "hook_resid_pre":
            return (_L.RESID_POST_EMBEDDING, None) if layer == 0 else (_L.RESID_POST_MLP, layer - 1)
    for location in FORWARD_LOCATIONS:
        if text in (location.label, location.lens_name):
            return location, layer
    short = text.rsplit(".", 1)[-1].removeprefix("hook_")
    if short in _ALIASES:
        return _ALIASES[short][0], layer
    known = ", ".join(location.label for location in FORWARD_LOCATIONS)
    raise InvalidInput(
        f"Unknown location {name!r}. Known locations: {known}; presets: {', '.join(PRESETS)}; "
        "TransformerLens names (mlp_post, blocks.3.hook_resid_post) are accepted too.",
        kind=ErrorKind.UNKNOWN_LOCATION,
    )


def parse_locations(
    names: str | list[str] | tuple[str, ...],
    present: Collection[ActivationLocationType] | None = None,
) -> tuple[ActivationLocationType, ...]:
    """Resolve presets and names (a comma-separated string or a list) to distinct locations.

    Args:
        names: presets and locations.
        present: the locations that a model has; presets leave out the others. What is named
            by itself stays, so that its absence is no silent one.

    Raises:
        InvalidInput: a name is unknown, or none is given.

    >>> [str(location) for location in parse_locations("minimal,mlp_post")]
    ['resid_post_embedding', 'mlp_post_act', 'resid_post_mlp']
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    chosen: set[ActivationLocationType] = set()
    for part in parts:
        preset = PRESETS.get(part.strip())
        if preset is not None:
            if present is not None:
                more = OPTIONAL_LOCATIONS if part.strip() == "full" else ()
                preset = tuple(place for place in (*preset, *more) if place in present)
            chosen.update(preset)
        elif part.strip():
            chosen.add(parse_location(part)[0])
    if not chosen:
        raise InvalidInput(
            f"No location given in {names!r}. Name a preset ({', '.join(PRESETS)}) or locations.",
            kind=ErrorKind.UNKNOWN_LOCATION,
        )
    return tuple(location for location in FORWARD_LOCATIONS if location in chosen)
