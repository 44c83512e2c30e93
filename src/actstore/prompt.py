"""A text that is run through a model now, and asked like a stored one.

    prompt = actstore.Prompt("gpt2", "The Eiffel Tower is in", objective="logit_diff(6342, 10598)")
    prompt.derive("mlp_act_times_grad")

The model runs once, forward and, with an objective or a trace, backward; the derived
scalars are those of a store, computed by the same code.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from actstore.ingest.live_pass import LivePass, run_pass
from actstore.ingest.model import LoadedModel, load_model
from actstore.ingest.objectives import Objective, parse_objective
from actstore.ingest.tokenization import resolve_bos
from actstore.query import raw_store
from actstore.query.cache import ActivationCache, PassBatch, View
from actstore.query.derived import DerivedScalar, parse_scalar
from actstore.query.derived.config import DstConfig
from actstore.query.derived.evaluation import evaluate
from actstore.query.pass_values import PassValues
from actstore.query.reading import choose_layers, choose_scalar_layers, torch_dtype
from actstore.query.rows import Rows
from actstore.query.tensors import LabelledTensor, LabelledTensors
from actstore.store.errors import ErrorKind, InvalidInput
from actstore.store.location_names import parse_location
from actstore.store.model.autoencoder_families import Autoencoders
from actstore.store.model.autoencoders import Autoencoder
from actstore.store.nodes import Ablation, NodeIndex, TraceConfig
from actstore.store.vocabulary import ActivationLocationType, PassType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Prompt", "RawActivationStore"]

Layers = int | Iterable[int] | None


class Prompt:
    """One text, run through a model.

    Args:
        model: as for :func:`actstore.ingest`; or a model that is loaded already.
        prompt: a text, or token ids as the model sees them.
        objective: what is differentiated: its name, such as ``next_token_log_prob`` or
            ``logit_diff(answer, distractor)``, or one of :mod:`actstore.ingest.objectives`.
        trace: a node whose activation is differentiated instead.
        ablations: values and gradients that are set to constants.
        autoencoders: spliced into the pass, and what scalars of latents speak of.
        columns: the values that the objective's column names stand for: token ids, or texts
            that are one token each.
        bos: BOS before a text: ``auto`` (if the tokenizer has one), ``document`` or ``none``.
        device: where to run a model that is loaded here.
        dtype: what to run it in.
        revision: branch, tag or commit of a hub model.

    Attributes:
        token_ids: the tokens, as they ran.
        objective_value: the objective, or the traced activation; None without a backward pass.

    Raises:
        InvalidInput: the model, prompt, objective, node or ablation cannot be used.
        Unavailable: a traced latent's autoencoder is not given.
    """

    def __init__(
        self,
        model: Any,
        prompt: str | Sequence[int],
        *,
        objective: Objective | str | None = None,
        trace: TraceConfig | None = None,
        ablations: Iterable[Ablation] = (),
        autoencoders: Autoencoders | Iterable[Autoencoder] = (),
        columns: Mapping[str, object] | None = None,
        bos: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        loaded = (
            model
            if isinstance(model, LoadedModel)
            else load_model(model, device=device, dtype=dtype, revision=revision)
        )
        self._loaded = loaded
        families = (
            autoencoders if isinstance(autoencoders, Autoencoders) else Autoencoders(autoencoders)
        )
        self.token_ids = _token_ids(loaded, prompt, bos)
        parsed = parse_objective(objective) if isinstance(objective, str) else objective
        self._pass: LivePass = run_pass(
            loaded,
            [self.token_ids],
            objective=parsed,
            trace=trace,
            ablations=ablations,
            autoencoders=families if len(families) else None,
            columns=None if columns is None else [_resolved(loaded, columns)],
        )[0]
        self.objective_value = self._pass.objective_value
        self._config = DstConfig(
            autoencoders=families if len(families) else None, trace_config=trace
        )
        positions = np.arange(len(self.token_ids))
        self._rows = Rows(positions, np.zeros_like(positions), positions)

    @cached_property
    def values(self) -> PassValues:
        """The recorded values, with the model's weights, as derived scalars read them."""
        held = {key: tensor.cpu() for key, tensor in self._pass.values.items()}
        return PassValues(held, self._loaded.weights())

    @cached_property
    def raw_store(self) -> "RawActivationStore":
        """The recorded values as a container; pairs are ``(token, attended, head)``."""
        nested: dict[tuple[ActivationLocationType, PassType], dict[int | None, Tensor]] = {}
        for (location, pass_type, layer), tensor in self._pass.values.items():
            ordered = tensor.transpose(1, 2) if location.is_pair_shaped else tensor
            nested.setdefault((location, pass_type), {})[layer] = ordered
        return RawActivationStore.from_nested_dict_of_activations(nested)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens' texts; empty where the model has no tokenizer."""
        tokenizer = self._loaded.tokenizer
        if tokenizer is None:
            return ()
        return tuple(str(tokenizer.decode([token_id])) for token_id in self.token_ids)

    def config(self, config: DstConfig | None = None) -> DstConfig:
        """A question's config, with this pass' trace and autoencoders where it names none."""
        if config is None:
            return self._config
        return replace(
            config,
            autoencoders=config.autoencoders or self._config.autoencoders,
            trace_config=config.trace_config or self._config.trace_config,
        )

    def raw(
        self,
        location: str,
        *,
        layers: Layers = None,
        pass_type: str = "forward",
        dtype: str = "float32",
    ) -> LabelledTensor:
        """A location's values as the pass recorded them; see :meth:`Store.raw`.

        Raises:
            InvalidInput: an unknown location or layer.
            Unavailable: the pass did not record it.
        """
        found, named = _location(location)
        kind = PassType(pass_type)
        if layers is None and named is None and kind is PassType.BACKWARD:
            chosen: Sequence[int | None] = self.values.layers(found, kind) or (
                range(self.values.dimensions.n_layers) if found.has_layers else (None,)
            )
        else:
            count = self.values.dimensions.n_layers
            chosen = choose_layers(found.label, found.has_layers, count, named, layers)
        tensors = [self.values.raw(found, kind, layer) for layer in chosen]
        axes = tuple(str(axis) for axis in found.axes)
        return self._labelled(found.label, ("token", *axes), chosen, tensors, dtype)

    @overload
    def derive(
        self,
        names: str | DerivedScalar,
        *,
        layers: Layers = None,
        dtype: str = "float32",
        config: DstConfig | None = None,
        pass_type: str = "forward",
    ) -> LabelledTensor: ...

    @overload
    def derive(
        self,
        names: list[str] | tuple[str, ...],
        *,
        layers: Layers = None,
        dtype: str = "float32",
        config: DstConfig | None = None,
        pass_type: str = "forward",
    ) -> LabelledTensors: ...

    def derive(
        self,
        names: str | DerivedScalar | list[str] | tuple[str, ...],
        *,
        layers: Layers = None,
        dtype: str = "float32",
        config: DstConfig | None = None,
        pass_type: str = "forward",
    ) -> LabelledTensor | LabelledTensors:
        """Derived scalars of the prompt; see :meth:`Store.derive`.

        Args:
            names: a derived scalar, or several.
            layers: all at which it exists by default.
            dtype: ``float64`` for the unrounded values; narrower ones round the float32.
            config: the node that a scalar is about, and other autoencoders.
            pass_type: ``backward`` for the backward values of those that have any.

        Raises:
            InvalidInput: an unknown scalar or layer, or a config that does not fit.
            Unavailable: the pass did not record a source.
        """
        if isinstance(names, str | DerivedScalar):
            return self._derive(names, layers, dtype, self.config(config), PassType(pass_type))
        found = {}
        for name in names:
            outside = not parse_scalar(name)[0].has_layers
            found[name] = self._derive(
                name,
                None if outside else layers,
                dtype,
                self.config(config),
                PassType(pass_type),
            )
        return LabelledTensors(found)

    def _derive(
        self,
        name: str | DerivedScalar,
        layers: Layers,
        dtype: str,
        config: DstConfig,
        pass_type: PassType,
    ) -> LabelledTensor:
        declared, named = (name, None) if isinstance(name, DerivedScalar) else parse_scalar(name)
        count = self.values.dimensions.n_layers
        chosen = choose_scalar_layers(declared, count, config, named, layers)
        tensors = [
            evaluate(declared, self.values, layer, config=config, pass_type=pass_type)
            for layer in chosen
        ]
        first = "pair" if declared.is_flattened else "token"
        dims = (first, *(str(axis) for axis in declared.axes))
        return self._labelled(declared.name, dims, chosen, tensors, dtype)

    def postprocess(
        self,
        name: str,
        nodes: NodeIndex | Sequence[NodeIndex],
        *,
        config: DstConfig | None = None,
    ) -> "Tensor":
        """What nodes write and read, as vectors; see :func:`actstore.query.postprocess`.

        Args:
            name: ``residual_write``, ``token_write``, ``residual_read``, ``token_read`` or
                ``token_pair_attribution``.
            nodes: one node or several.
            config: other autoencoders than this pass'.

        Returns:
            float64 ``(node, channel)``, ``(node, vocabulary)`` or ``(node, attended)``; without
            the first axis for one node.

        Raises:
            InvalidInput: an unknown postprocessor, or a node that it is not defined for.
        """
        from actstore.query.postprocess import postprocess

        return postprocess(name, nodes, self.values, self.config(config))

    def cache(
        self, *others: "Prompt", dtype: str = "float32", compat: str | None = None
    ) -> ActivationCache:
        """The prompt as an activation cache of one row; see :meth:`Store.cache`.

        Args:
            others: further prompts of the same model, as further rows.
            dtype: of its results.
            compat: ``transformer_lens`` to answer as TransformerLens does.

        Raises:
            InvalidInput: a prompt ran through another model, or another dtype or ``compat``.
        """
        prompts = (self, *others)
        if any(prompt._loaded is not self._loaded for prompt in others):
            raise InvalidInput(
                "The prompts of one cache run through one model. Load it once, with "
                "actstore.ingest.model.load_model, and give it to each Prompt.",
                kind=ErrorKind.INVALID_ARGUMENT,
            )
        batch = PassBatch(
            tuple(prompt.values for prompt in prompts),
            tuple(prompt.token_ids for prompt in prompts),
            self._loaded.weights(),
            self._loaded.tokenizer,
        )
        return ActivationCache(View.whole(batch, dtype), compat)

    def _labelled(
        self,
        name: str,
        dims: tuple[str, ...],
        layers: Sequence[int | None],
        tensors: Sequence["Tensor"],
        dtype: str,
    ) -> LabelledTensor:
        import torch

        widths = [max(sizes) for sizes in zip(*(one.shape for one in tensors), strict=True)]
        stacked = torch.full((len(tensors), *widths), torch.nan, dtype=torch.float64)
        for target, tensor in zip(stacked, tensors, strict=True):
            target[tuple(slice(size) for size in tensor.shape)] = tensor
        if dtype != "float64":
            stacked = stacked.to(torch.float32).to(torch_dtype(dtype))
        rows, attended = self._rows, None
        if dims[0] == "pair":
            first, attended = np.tril_indices(len(self.token_ids))
            rows = Rows(first, np.zeros_like(first), first)
        numbers = tuple(layer for layer in layers if layer is not None)
        if not numbers:
            return LabelledTensor(name, stacked[0], dims, None, rows, "a fresh pass", attended)
        labels = ("layer", *dims)
        return LabelledTensor(name, stacked, labels, numbers, rows, "a fresh pass", attended)

    def __repr__(self) -> str:
        value = "" if self.objective_value is None else f", objective {self.objective_value:.6g}"
        return f"<Prompt: {len(self.token_ids)} tokens through {self._loaded.name}{value}>"


class RawActivationStore(raw_store.RawActivationStore):
    """The container of what one pass recorded, which a model can fill."""

    @classmethod
    def from_model(cls, model: Any, prompt: str | Sequence[int], **options: Any) -> Self:
        """Run a model over a prompt and keep everything it recorded.

        Args:
            model: as for :class:`Prompt`.
            prompt: a text, or token ids.
            options: those of :class:`Prompt`: objective, trace, ablations, autoencoders …
        """
        return cls(Prompt(model, prompt, **options).raw_store.activations)


def _location(name: str) -> tuple[ActivationLocationType, int | None]:
    for location in ActivationLocationType:
        if location.is_online and location.label == name:
            return location, None
    return parse_location(name)


def _token_ids(loaded: LoadedModel, prompt: str | Sequence[int], bos: str) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(int(token_id) for token_id in prompt)
    if loaded.tokenizer is None:
        raise InvalidInput(
            "This model has no tokenizer, so a text cannot be run. Give token ids.",
            kind=ErrorKind.INVALID_ARGUMENT,
        )
    _, first = resolve_bos(bos, loaded.tokenizer)
    ids = loaded.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    return tuple(ids) if first is None else (first, *ids)


def _resolved(loaded: LoadedModel, columns: Mapping[str, object]) -> dict[str, object]:
    from actstore.ingest.objectives import resolve_target

    size = loaded.dimensions.vocabulary_size
    return {
        name: resolve_target(value, loaded.tokenizer, size, f"The column {name!r}")
        for name, value in columns.items()
    }
