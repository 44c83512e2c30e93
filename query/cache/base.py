"""What all methods of a cache share: its rows, its arguments, its two ways of speaking."""

from typing import TYPE_CHECKING, Any

from actstore.query.cache.anatomy import Anatomy, NormPlace
from actstore.query.cache.row import optional_weight
from actstore.query.cache.stacks import LayerNormChoice, Reading, as_tensor, invalid
from actstore.query.cache.tokens import token_number
from actstore.query.cache.view import View
from actstore.query.reading import torch_dtype
from actstore.store.errors import ErrorKind
from actstore.store.vocabulary import WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TRANSFORMER_LENS", "CacheBase"]

TRANSFORMER_LENS = "transformer_lens"
"""The ``compat`` that answers as TransformerLens does."""


class CacheBase:
    """Rows and positions of a batch, and how to speak of them.

    Args:
        view: the rows and positions.
        compat: ``transformer_lens`` or None.

    Raises:
        InvalidInput: another ``compat``.
    """

    def __init__(self, view: View, compat: str | None = None) -> None:
        if compat not in (None, TRANSFORMER_LENS):
            raise invalid(f"compat is {compat!r}; use None or {TRANSFORMER_LENS!r}.")
        self._view = view
        self.compat = compat

    @property
    def _anatomy(self) -> Anatomy:
        return self._view.anatomy

    @property
    def _is_lens(self) -> bool:
        return self.compat is not None

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self._anatomy.n_layers

    def _until(self, layer: int | None) -> int:
        """The layer whose input is meant; None and -1 are the unembedding's."""
        if layer is None or (layer == -1 and not isinstance(layer, bool)):
            return self.n_layers
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise invalid(f"layer is {layer!r}; give a whole number.", ErrorKind.UNKNOWN_LAYER)
        if not 0 <= int(layer) <= self.n_layers:
            raise invalid(
                f"layer is {layer}; use 0 to {self.n_layers}, where {self.n_layers}, -1 and None "
                "are the input of the unembedding.",
                ErrorKind.UNKNOWN_LAYER,
            )
        return int(layer)

    def _block(self, layer: Any) -> int:
        """A block's number; below 0 from the end."""
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise invalid(f"layer is {layer!r}; give a whole number.", ErrorKind.UNKNOWN_LAYER)
        found = int(layer) + self.n_layers if int(layer) < 0 else int(layer)
        if not 0 <= found < self.n_layers:
            raise invalid(
                f"There is no layer {layer}; this model has 0 to {self.n_layers - 1}.",
                ErrorKind.UNKNOWN_LAYER,
            )
        return found

    def _refuse_mlp_at_end(self, until: int, mlp_input: bool) -> None:
        if mlp_input and until == self.n_layers:
            raise invalid(
                "mlp_input asks for the stream that a block's MLP reads, and there is no block "
                f"{until}. Name a layer from 0 to {self.n_layers - 1}.",
                ErrorKind.UNKNOWN_LAYER,
            )

    def _choice(self, ln: str | None, default: LayerNormChoice) -> LayerNormChoice:
        if ln is None:
            return default
        try:
            return LayerNormChoice(ln)
        except ValueError:
            raise invalid(f"ln is {ln!r}; use {', '.join(LayerNormChoice)}.") from None

    def _reading(self, until: int, mlp_input: bool, choice: LayerNormChoice) -> Reading:
        """The norm before a layer's attention or MLP, or before the unembedding."""
        if until == self.n_layers:
            return Reading(NormPlace.FINAL, None, choice)
        place = NormPlace.MLP if mlp_input else NormPlace.ATTENTION
        return Reading(place, until, choice)

    @property
    def _parts_choice(self) -> LayerNormChoice:
        """How parts of the stream are read unless the caller says otherwise."""
        return LayerNormChoice.CACHED_SCALE if self._is_lens else LayerNormChoice.EXACT

    # Tokens and weights

    def tokens_to_residual_directions(self, tokens: Any) -> "Tensor":
        """Columns of the unembedding, ``(*tokens, channel)``, as upstream's model gives them.

        Args:
            tokens: a token's text or number, or whole numbers in an array of any shape; one
                number in an array of any shape counts as one token.

        Raises:
            InvalidInput: a text that is not one token, or a number outside the vocabulary.
        """
        return self._shown(self._unembedding_columns(self._token_ids(tokens)))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> "Tensor":
        """Sum of the output biases of the blocks before ``layer``, ``(channel,)``.

        Args:
            layer: blocks below it count.
            mlp_input: let attention of ``layer`` itself count too.
            include_mlp_biases: let the MLPs' biases count.
        """
        import torch

        until = self._until(layer)
        self._refuse_mlp_at_end(until, mlp_input)
        weights = WeightLocationType
        total = torch.zeros(self._view.batch.model.dimensions.d_model, dtype=torch.float64)
        for number in range(until + mlp_input):
            names = [weights.ATTN_OUTPUT_BIAS]
            if include_mlp_biases and number < until:
                names.append(weights.MLP_OUTPUT_BIAS)
            for name in names:
                bias = self._optional(name, number)
                total = total if bias is None else total + bias
        return self._shown(total)

    def _optional(self, name: WeightLocationType, layer: int | None) -> "Tensor | None":
        return optional_weight(self._view.batch.weight, name, layer)

    def _token_ids(self, tokens: Any) -> "Tensor":
        import torch

        if isinstance(tokens, str):
            number = token_number(tokens, self._view.batch)
            return torch.tensor(number)
        ids = as_tensor(tokens, "Tokens")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
            raise invalid(f"Tokens are {tokens!r}; give a text or whole numbers.")
        ids = ids.to(torch.int64)
        size = self._view.batch.model.dimensions.vocabulary_size
        outside = ids[(ids < 0) | (ids >= size)]
        if outside.numel():
            raise invalid(
                f"There is no token {int(outside[0])}; the vocabulary has 0 to {size - 1}.",
                ErrorKind.TOKEN_OUT_OF_VOCABULARY,
            )
        return ids.reshape(()) if ids.numel() == 1 else ids

    def _unembedding_columns(self, ids: "Tensor") -> "Tensor":
        unembedding = self._view.batch.weight(WeightLocationType.UNEMBEDDING, None)
        return unembedding.T[ids]

    def _shown(self, tensor: "Tensor") -> "Tensor":
        return tensor.to(self._view.device, torch_dtype(self._view.dtype))
