"""Naming a scalar of one's own: one function under a decorator, in one's own file.

    import actstore

    @actstore.derived_scalar(
        axes="neuron", sources={"write": "mlp_write_norm", "stream": "resid_post_attn_norm"}
    )
    def mlp_relative_write(write, stream):
        "What a neuron writes, relative to the stream that it writes to."
        return write / stream

From then on ``store.derive``, ``store.topk`` and ``store.examples`` know it by its name; the
command line does with ``--scalars FILE.py``.
"""

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.query.derived.declaration import (
    DerivedScalar,
    Direction,
    Formula,
    Frame,
    General,
    Identity,
    LatentWrites,
    LayerRule,
    Source,
)
from actstore.query.derived.nodes import ABOUT_OF, direction_source
from actstore.query.derived.registry import SCALARS, parse_scalar, register_scalar
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.model.recipes import WeightName
from actstore.store.vocabulary import (
    ActivationLocationType,
    Dimension,
    NodeType,
    PassType,
    WeightLocationType,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SourceName", "derived_scalar", "named_source", "node_type_of"]

SourceName = str | ActivationLocationType | Source | tuple[str | int | ActivationLocationType, ...]
"""A scalar or location by name, alone or with ``backward`` and a layer: ``previous`` or a number."""

_NODE_TYPES = {
    Dimension.HEAD: NodeType.ATTENTION_HEAD,
    Dimension.KV_HEAD: NodeType.ATTENTION_HEAD,
    Dimension.HEAD_CHANNEL: NodeType.V_CHANNEL,
    Dimension.NEURON: NodeType.MLP_NEURON,
    Dimension.CHANNEL: NodeType.RESIDUAL_STREAM_CHANNEL,
    Dimension.VOCABULARY: NodeType.VOCAB_TOKEN,
    Dimension.SINGLETON: NodeType.LAYER,
}
_FRAME = "frame"


def derived_scalar(
    *,
    axes: str | Sequence[str],
    sources: Mapping[str, SourceName],
    weights: Mapping[str, str | WeightName | LatentWrites] | None = None,
    name: str | None = None,
    definition: str | None = None,
    row_wise: bool = False,
    replace: bool = False,
    register: bool = True,
) -> "Callable[[Callable[..., Tensor]], DerivedScalar]":
    """Declare a scalar by a function of named tensors.

    The function is called for one whole sequence and one layer at a time, with its sources
    and weights as float64 tensors by keyword, and returns float64 ``(token, *axes)``. It must
    not write to what it is given. The first line of its docstring is what people read. A
    parameter ``frame`` gets the layer, the model's sizes and the config: see
    :class:`actstore.query.derived.declaration.Frame`.

    Args:
        axes: the axes after the token axis: ``neuron``, ``head``, ``latent``, ``channel``,
            ``("attended", "head")`` …, or ``singleton`` for one value per token, whose tensor
            is ``(token, 1)``. The last one says the type of the nodes.
        sources: parameter -> what it gets: a scalar or location by name, with the values that
            ``derive`` gives for it; ``(name, "backward")`` for the gradient, ``(name, layer)``
            for a fixed layer, negative ones counted from the last, ``("resid_post_mlp",
            "previous")`` for what enters the layer, or one of the directions
            (``final_residual_grad``).
        weights: parameter -> a weight of the value's own layer, by its name in
            :class:`actstore.store.vocabulary.WeightLocationType`, such as ``mlp_to_residual``.
        name: the scalar's name; the function's by default.
        definition: the formula in plain text; by default what the function returns.
        row_wise: say that a row's value has the same bits whatever its neighbours are, as in
            elementwise products; not in matrix products. Then asked rows are taken out first.
        replace: take the place of a scalar that was registered under this name.
        register: make it known by its name.

    Returns:
        A decorator that turns the function into its declaration.

    Raises:
        InvalidInput: an unknown axis, source or weight, parameters that do not fit, no
            docstring, or a name that is taken.

    >>> @derived_scalar(axes="neuron", sources={"a": "mlp_post_act"}, register=False)
    ... def mlp_squared(a):
    ...     "Square of a neuron's activation."
    ...     return a * a
    >>> mlp_squared, mlp_squared.definition
    (DerivedScalar('mlp_squared', axes=['neuron']), 'a * a')
    """

    def declare(function: "Callable[..., Tensor]") -> DerivedScalar:
        label = function.__name__ if name is None else name
        declared = _declaration(function, label, axes, sources, weights or {}, definition, row_wise)
        return register_scalar(declared, replace=replace) if register else declared

    return declare


def _declaration(
    function: "Callable[..., Tensor]",
    name: str,
    axes: str | Sequence[str],
    sources: Mapping[str, SourceName],
    weights: Mapping[str, str | WeightName | LatentWrites],
    definition: str | None,
    row_wise: bool,
) -> DerivedScalar:
    if not sources:
        raise _refused(name, "it has no sources. Name at least one, such as mlp_post_act")
    both = sources.keys() & weights.keys()
    if both:
        raise _refused(name, f"{', '.join(sorted(both))} is a source and a weight")
    takes_frame = _check_parameters(function, name, (*sources, *weights))
    meaning = (inspect.getdoc(function) or "").strip().split("\n")[0].rstrip(".")
    if not meaning:
        raise _refused(name, "it has no docstring; its first line is what people read")
    inputs = tuple(named_source(source, name) for source in sources.values())
    if inputs[0].of in set(Direction):
        raise _refused(
            name, f"its first source is {inputs[0].of}; name what is projected on it first"
        )
    found_axes = _axes(axes, name)
    has_layers = any(one.layer in (LayerRule.SAME, LayerRule.PREVIOUS) for one in inputs)
    found_weights = tuple(_weight(weight, name) for weight in weights.values())
    if not has_layers and any(
        not isinstance(weight, WeightLocationType) or weight.has_layers for weight in found_weights
    ):
        raise _refused(name, "it belongs to no layer, so that its weights have none either")
    latents = _latents(name, inputs)
    code = function.__code__
    return DerivedScalar(
        name=name,
        meaning=meaning,
        definition=definition or _returned(function) or meaning,
        axes=found_axes,
        node_type=node_type_of(found_axes, name, inputs, latents),
        has_layers=has_layers,
        sources=inputs,
        dependence=General(),
        weights=found_weights,
        formula=_by_keyword(function, (*sources,), (*weights,), takes_frame),
        row_wise=row_wise,
        about=_about(name, inputs),
        only_node_layer=any(
            one.only_node_layer for one, rule in _scalars(inputs) if rule is LayerRule.SAME
        ),
        latents=latents,
        origin=str(Path(code.co_filename).resolve())
        if Path(code.co_filename).is_file()
        else code.co_filename,
    )


def _by_keyword(
    function: "Callable[..., Tensor]",
    sources: tuple[str, ...],
    weights: tuple[str, ...],
    takes_frame: bool,
) -> Formula:
    def formula(
        tensors: "Sequence[Tensor]", matrices: "Sequence[Tensor]", frame: Frame
    ) -> "Tensor":
        given: dict[str, Any] = {
            **dict(zip(sources, tensors, strict=True)),
            **dict(zip(weights, matrices, strict=True)),
        }
        return function(**given, **({_FRAME: frame} if takes_frame else {}))

    return formula


def _check_parameters(
    function: "Callable[..., Tensor]", name: str, wanted: tuple[str, ...]
) -> bool:
    """Whether the function takes the frame; its other parameters must be these."""
    found = inspect.signature(function).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    usable = {label for label, one in found.items() if one.kind in by_name}
    needed = {
        label
        for label, one in found.items()
        if one.kind not in by_name or one.default is inspect.Parameter.empty
    }
    if set(wanted) - usable or needed - {*wanted, _FRAME}:
        raise _refused(
            name,
            f"its function takes ({', '.join(found)}), and its sources and weights are "
            f"({', '.join(wanted)}). Give them the same names",
        )
    return _FRAME in usable and _FRAME not in wanted


def named_source(source: SourceName, name: str) -> Source:
    """A source as the user wrote it.

    Args:
        source: a name, with ``backward`` or a layer rule after it if wanted.
        name: the scalar that it is for, for messages.

    Raises:
        InvalidInput: an unknown scalar, pass or layer.

    >>> named_source(("mlp_post", "backward"), "example")
    Source(of=ActivationLocationType.MLP_POST_ACT, pass_type=<PassType.BACKWARD: 'backward'>, \
layer=<LayerRule.SAME: 'same'>)
    """
    if isinstance(source, Source):
        return source
    of, *rest = source if isinstance(source, tuple) else (source,)
    text = str(of)
    pass_type = PassType.FORWARD
    layer: LayerRule | int | None = None
    for word in rest:
        if word in set(PassType):
            pass_type = PassType(str(word))
        elif word in (LayerRule.PREVIOUS, LayerRule.SAME, LayerRule.NODE):
            layer = LayerRule(str(word))
        elif isinstance(word, int) and not isinstance(word, bool):
            layer = word
        else:
            raise _refused(
                name,
                f"the source {source!r} has {word!r}; use forward or backward, and previous, "
                "same, node or a layer's number",
            )
    if text in set(Direction):
        return direction_source(Direction(text))
    declared, named_layer = parse_scalar(text)
    if pass_type is PassType.BACKWARD and declared.gradient is None:
        raise _refused(name, f"its source {declared.name} has no backward value")
    if not declared.has_layers:
        if layer is not None:
            raise _refused(name, f"its source {declared.name} belongs to no layer")
        layer = LayerRule.NONE
    rule = layer if layer is not None else named_layer
    is_location = isinstance(declared.dependence, Identity)
    return Source(
        declared.sources[0].of if is_location else declared.name,
        pass_type,
        LayerRule.SAME if rule is None else rule,
    )


def _axes(axes: str | Sequence[str], name: str) -> tuple[Dimension, ...]:
    usable = [one for one in Dimension if one not in (Dimension.LAYER, Dimension.TOKEN)]
    found = []
    for axis in (axes,) if isinstance(axes, str) else axes:
        if axis not in usable:
            raise _refused(name, f"{axis!r} is no axis of a value;{_close(str(axis), usable)}")
        found.append(Dimension(axis))
    if not found or len(set(found)) != len(found):
        raise _refused(name, f"its axes are {list(axes)}; give at least one, each once")
    if Dimension.ATTENDED in found[1:] or found == [Dimension.ATTENDED]:
        raise _refused(
            name, "the attended axis comes first, and another one after it: singleton, if none"
        )
    return tuple(found)


def node_type_of(
    axes: tuple[Dimension, ...],
    name: str,
    sources: Sequence[Source],
    latents: NodeType | None,
) -> NodeType:
    """What the last axis indexes.

    Raises:
        InvalidInput: latents that no source is made of.
    """
    if axes[-1] is Dimension.LATENT:
        if latents is None:
            raise _refused(name, "it has latents, and none of its sources speaks of autoencoders")
        return latents
    queries = (ActivationLocationType.ATTN_QUERY, ActivationLocationType.ATTN_KEY)
    if axes[-1] is Dimension.HEAD_CHANNEL and any(
        str(source.of) in map(str, queries) for source in sources
    ):
        return NodeType.QK_CHANNEL
    return _NODE_TYPES[axes[-1]]


def _scalars(sources: Sequence[Source]) -> list[tuple[DerivedScalar, LayerRule | int]]:
    names = [(str(source.of), source.layer) for source in sources]
    return [(SCALARS[label], layer) for label, layer in names if label in SCALARS]


def _about(name: str, sources: Sequence[Source]) -> str | None:
    members = {ABOUT_OF[Direction(one.of)] for one in sources if one.of in set(Direction)}
    about: str | None = _only(name, "about", members | {one.about for one, _ in _scalars(sources)})
    return about


def _latents(name: str, sources: Sequence[Source]) -> NodeType | None:
    found: NodeType | None = _only(name, "of", {one.latents for one, _ in _scalars(sources)})
    return found


def _only(name: str, word: str, found: set[Any]) -> Any:
    members = sorted(str(one) for one in found - {None})
    if len(members) > 1:
        raise _refused(name, f"its sources are {word} {' and '.join(members)}; keep to one")
    return next(iter(found - {None}), None)


def _weight(weight: str | WeightName | LatentWrites, name: str) -> WeightName | LatentWrites:
    if isinstance(weight, ActivationLocationType | LatentWrites):
        return weight
    if weight not in set(WeightLocationType):
        raise _refused(name, f"{weight!r} is no weight;{_close(str(weight), WeightLocationType)}")
    return WeightLocationType(weight)


def _close(word: str, known: Any) -> str:
    names = [str(one) for one in known]
    close = difflib.get_close_matches(word, names)
    hint = f" did you mean {' or '.join(close)}?" if close else ""
    return f"{hint} Known are {', '.join(names)}"


def _returned(function: "Callable[..., Tensor]") -> str | None:
    """What a function returns, as text, if that is one expression."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return None
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return ast.unparse(found[0]) if len(found) == 1 and found[0] is not None else None


def _refused(name: str, reason: str) -> InvalidInput:
    return _invalid(f"{name} cannot be declared: {reason}.")


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, kind=ErrorKind.INVALID_ARGUMENT)
