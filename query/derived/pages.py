"""A scalar's page, written from its declaration: for the docs and for `actstore scalars NAME`."""

from collections.abc import Iterator

from actstore.query.derived.costs import axes_of_weight, bytes_read, operations, size_text
from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    LatentWrites,
    LayerRule,
    Source,
)
from actstore.query.derived.nodes import DIRECTION_SYMBOLS, DIRECTIONS
from actstore.query.derived.registry import (
    FAMILIES,
    SCALARS,
    is_built_in,
    requires_gradient,
)
from actstore.store.nodes import index_axes
from actstore.store.vocabulary import (
    OPTIONAL_LOCATIONS,
    ActivationLocationType,
    NodeType,
    PassType,
)

__all__ = ["SYMBOL_NOTES", "example", "family_of", "is_rankable", "scalar_page"]

SYMBOL_NOTES = (
    ("t, q, k", "a token; a token and one that it attends to"),
    ("d, f, h, c, n, v", "channel, neuron, head, head channel, latent, vocabulary token"),
    ("T", "tokens of the sequence"),
    (
        "D, F, H, K, C, N, V, U",
        "how many channels, neurons … there are; K heads of keys and values, U attended tokens",
    ),
    ("a, p, V, z", "`mlp_post_act`, `attn_qk_probs`, `attn_value`, `attn_weighted_sum_of_values`"),
    ("W_out, W_O, W_in, W_E, W_U", "the model's weights; `W_out[f]` is what neuron f writes"),
    ("LN1, LN2, LN_final", "the model's norms, with what they multiply by and add"),
    ("w[n], enc[n]", "what latent n writes to the residual stream; its encoder's row"),
    ("grad(x)", "gradient of the pass' objective, or of the traced node, with respect to x"),
    ("G", f"{DIRECTIONS[Direction.FINAL_RESIDUAL_GRAD]}; before the traced node in a trace"),
    ("G_node", DIRECTIONS[Direction.FINAL_ACTIVATION_RESIDUAL_GRAD]),
    ("G_attr", DIRECTIONS[Direction.SUBNODE_ATTRIBUTION_GRAD]),
    ("r", "the residual stream that the node in question reads"),
    ("A(r)", "a node's attribution as a function of it: its activation times its gradient"),
    ("|x|", "L2 norm over channels"),
)
"""Symbols of the definitions."""

_ABOUT = {
    "trace_config": "the traced node",
    "node_index_for_attribution": "the node at one end of the edges",
    "activation_index_for_fake_grad": "the neuron or latent whose input direction is meant",
}


def family_of(declared: DerivedScalar) -> str:
    """The family that a scalar belongs to; ``own`` for a user's."""
    return next((name for name, members in FAMILIES.items() if declared in members), "own")


def is_rankable(declared: DerivedScalar) -> bool:
    """Whether ``topk`` answers for it: a corpus has no one node that a scalar is about."""
    return declared.about is None


def scalar_page(declared: DerivedScalar) -> str:
    """The page of one scalar, in Markdown."""
    facts = "".join(f"- **{name}**: {text}\n" for name, text in _facts(declared))
    tree = "\n".join(_tree(declared, 0))
    code = example(declared)
    command = _command(declared)
    shown = f"\nOn the command line:\n\n    {command}\n" if command else ""
    return (
        f"# `{declared.name}`\n\n{_sentence(declared.meaning)}\n\n"
        f"```text\n{declared.definition}\n```\n\n{facts}\n"
        f"## Sources\n\n{tree}\n\n"
        f"## Example\n\n```python\n{code}\n```\n{shown}"
    )


def _facts(declared: DerivedScalar) -> Iterator[tuple[str, str]]:
    yield "family", family_of(declared)
    yield "shape", f"({', '.join(_dims(declared))})"
    yield "node type", f"`{declared.node_type}`, the last axis"
    gradient = declared.gradient
    yield (
        "passes",
        "forward"
        if gradient is None
        else f'forward; backward (`pass_type="backward"`): `{gradient.definition}`',
    )
    yield "layers", _layers(declared)
    if declared.weights:
        yield "weights", ", ".join(_weight(weight) for weight in declared.weights)
    yield "config", _config(declared)
    if requires_gradient(declared):
        yield "needs", "the gradients of a backward pass, stored or of a prompt"
    yield "`topk`", _ranking(declared)
    size = size_text(declared.ranked_axes)
    yield (
        "cost per token and layer",
        (
            f"{_at_most(declared)} operations; reads {bytes_read(declared)} bytes as float32; "
            f"makes {size} value{'' if size == '1' else 's'}"
        ),
    )
    yield "name", _origin(declared)


def _at_most(declared: DerivedScalar) -> str:
    count = operations(declared)
    return count if count == "no" else f"at most {count}"


def _dims(declared: DerivedScalar) -> tuple[str, ...]:
    layers = ("layer",) if declared.has_layers else ()
    return (*layers, "pair" if declared.is_flattened else "token", *map(str, declared.axes))


def _layers(declared: DerivedScalar) -> str:
    if not declared.has_layers:
        return "none: it belongs to no layer"
    if declared.only_node_layer:
        return "that of the node it is about"
    if declared.latents is not None:
        return "those that have such an autoencoder"
    return "all" if declared.layers is None else ", ".join(map(str, declared.layers))


def _weight(weight: object) -> str:
    if isinstance(weight, LatentWrites):
        return f"what each latent writes ({size_text(axes_of_weight(weight))})"
    assert isinstance(weight, str | ActivationLocationType)
    return f"`{weight}` ({size_text(axes_of_weight(weight))})"  # type: ignore[arg-type]


def _config(declared: DerivedScalar) -> str:
    parts = []
    if declared.about is not None:
        parts.append(f"`{declared.about}`: {_ABOUT[declared.about]}")
    if declared.latents is not None:
        parts.append(
            "`autoencoders`; nothing in a store that keeps such latents (`store.add_saes`)"
        )
    return "; ".join(parts) or "nothing"


def _ranking(declared: DerivedScalar) -> str:
    if not is_rankable(declared):
        return "no: it is about one node of one sequence; ask `derive`"
    if declared.latents is not None:
        kept = "bounds of each latent and segment" if _is_kept(declared) else "a scan"
        return f"in a store that keeps such latents (`store.add_saes`): {kept}"
    source = declared.raw_source
    if source is not None and source.location.is_ranked_by_unit:
        return (
            f"lists, then bounds from zone maps, where `{source.location}` is stored; else a scan"
        )
    return "scan: every value is looked at, under `max_cells`"


def _is_kept(declared: DerivedScalar) -> bool:
    return declared.latents is not None and declared.name == declared.latents.value


def _origin(declared: DerivedScalar) -> str:
    if not is_built_in(declared):
        return f"declared in {declared.origin or 'this process'}"
    source = declared.raw_source or declared.sources[0]
    location = source.of
    is_raw = isinstance(location, ActivationLocationType) and location.label == declared.name
    text = f"Transformer Debugger's `{declared.name.upper()}`"
    if location in OPTIONAL_LOCATIONS:
        text = "ours; of models that have it"
    if is_raw and not source.location.is_online:
        text += f"; TransformerLens' `{source.location.lens_name}`"
    return text


# Sources


def _tree(declared: DerivedScalar, depth: int) -> Iterator[str]:
    for source in declared.sources:
        yield f"{'  ' * depth}- {_source(source)}"
        if isinstance(source.of, str) and source.of in SCALARS:
            yield from _tree(SCALARS[source.of], depth + 1)
    if declared.choose_sources is not None:
        yield f"{'  ' * depth}- these are the usual ones: the config says which"


def _source(source: Source) -> str:
    if isinstance(source.of, str) and source.of in set(Direction):
        direction = Direction(source.of)
        return f"{DIRECTION_SYMBOLS[direction]}, {DIRECTIONS[direction]}"
    place = {
        LayerRule.SAME: "same layer",
        LayerRule.PREVIOUS: "the layer before; before layer 0 the embedding",
        LayerRule.NODE: "the node's layer",
        LayerRule.NONE: "outside the blocks",
    }
    layer = (
        f"layer {source.layer}" if isinstance(source.layer, int) else place[LayerRule(source.layer)]
    )
    axes = (
        index_axes(source.of)[1:]
        if isinstance(source.of, ActivationLocationType)
        else SCALARS[source.of].axes
    )
    kind = "location" if isinstance(source.of, ActivationLocationType) else "scalar"
    passes = "" if source.pass_type is PassType.FORWARD else ", its gradient"
    return f"{kind} `{source.of}`{passes} ({', '.join(map(str, axes))}), {layer}"


# Examples


def example(declared: DerivedScalar) -> str:
    """Python that derives a scalar, and ranks it where that is possible.

    ``store`` is an open store; ``autoencoders``, where named, a list of those that fit.
    """
    lines = []
    config = ""
    if declared.latents is not None:
        lines.append("# autoencoders = [actstore.load_autoencoder(…), …]")
        lines.append("store = store.add_saes(autoencoders)")
    if declared.about is not None:
        node, member = _node(declared)
        if "ActivationLocationType" in node:
            lines += ["from actstore.store.vocabulary import ActivationLocationType", ""]
        lines.append(f"node = {node}")
        lines.append(f"config = actstore.DstConfig({member})")
        config = ", config=config"
    name = declared.name
    lines.append(f'values = store.derive("{name}", sequences=[0]{config})')
    lines.append(f"values.dims  # {_dims(declared)}")
    if is_rankable(declared):
        lines.append(f'store.topk("{name}", k=5).rows()')
    return "\n".join(lines)


def _node(declared: DerivedScalar) -> tuple[str, str]:
    node_type = NodeType.MLP_NEURON
    traced_latent = declared.about == "trace_config" and declared.only_node_layer
    if traced_latent and declared.latents is not None:
        node_type = declared.latents
    upstream = "in_edge" in declared.name or declared.name.startswith("single_node")
    layer, token = (0 if upstream else 1), ("None" if traced_latent else "1")
    kind = f"actstore.NodeType.{node_type.name}"
    node = f"actstore.NodeIndex({kind}, ({token}, 3), {layer})"
    if declared.about == "trace_config":
        return node, "trace_config=actstore.TraceConfig(node)"
    if declared.about == "node_index_for_attribution":
        return node, "node_index_for_attribution=node"
    index = "actstore.ActivationIndex(ActivationLocationType.MLP_POST_ACT, (None, 3), 1)"
    return index, "activation_index_for_fake_grad=node"


def _command(declared: DerivedScalar) -> str | None:
    if not is_rankable(declared):
        return None
    own = "" if is_built_in(declared) else " --scalars FILE.py"
    return f"actstore topk STORE {declared.name}{own} -k 5"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
