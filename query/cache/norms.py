"""Norms applied to stacks that the caller holds."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actstore.query.cache.base import CacheBase
from actstore.query.cache.norm import Norm
from actstore.query.cache.selections import pick
from actstore.query.cache.stacks import LayerNormChoice, Reading, as_tensor, invalid
from actstore.query.cache.view import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StackNorms"]


class StackNorms(CacheBase):
    """Methods that pass a stack of parts through a norm of the model."""

    def apply_ln_to_stack(
        self,
        residual_stack: "Tensor",
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
        *,
        ln: str | None = None,
    ) -> "Tensor":
        """A stack of parts as the norm before a layer reads them.

        Args:
            residual_stack: ``(component, [batch], [position], channel)``, sliced by
                ``pos_slice`` already and by ``batch_slice`` not yet.
            layer: the layer; None and -1 for the unembedding.
            mlp_input: take the norm before its MLP.
            pos_slice: the positions of the stack.
            batch_slice: the rows wanted of it.
            has_batch_dim: whether the stack has a batch axis.
            recompute_ln: the same as ``ln="recomputed"``.
            ln: ``exact`` (the default: centred, divided by the denominator of what the model
                read, times the gain), ``cached_scale`` (without the gain) or ``recomputed``
                (the norm itself, with each component's own statistics).

        Returns:
            The stack's shape, less what ``batch_slice`` drops.

        Raises:
            InvalidInput: an unknown layer or slice, or a stack of another shape.
        """
        import torch

        until = self._until(layer)
        if not self._is_lens:
            self._refuse_mlp_at_end(until, mlp_input)
        default = self._parts_choice
        if recompute_ln and not (self._is_lens and until < self.n_layers):
            default = LayerNormChoice.RECOMPUTED
        view = self._sliced(pos_slice, batch_slice)
        stack = self._sliced_stack(residual_stack, view, batch_slice, has_batch_dim)
        reading = self._reading(until, mlp_input, self._choice(ln, default))
        norm = self._norm_of(view, reading)
        try:
            parts = [self._shown(norm(part)) for part in stack.to(torch.float64)]
        except RuntimeError as error:
            raise invalid(f"The stack does not fit the cache: {error}.") from None
        return torch.stack(parts) if parts else self._shown(stack)

    def _sliced(self, pos_slice: Any, batch_slice: Any) -> View:
        view = self._view.at_positions(pos_slice)
        return view if batch_slice is None else view.at_rows(batch_slice)

    def _sliced_stack(
        self, stack: "Tensor", view: View, batch_slice: Any, has_batch_dim: bool
    ) -> "Tensor":
        import torch

        stack = as_tensor(stack, "The stack")
        channels = self._view.batch.model.dimensions.d_model
        if stack.ndim < 2 or stack.shape[-1] != channels:
            raise invalid(
                f"The stack has shape {tuple(stack.shape)}; it is (component, *rows, {channels})."
            )
        if has_batch_dim and batch_slice is not None:
            picks = pick(batch_slice, stack.shape[1], "row of the stack")
            stack = stack.index_select(1, torch.from_numpy(picks.indices))
            stack = stack.squeeze(1) if picks.drops_axis else stack
        if tuple(stack.shape[1:-1]) != view.leading and not self._is_lens:
            raise invalid(
                f"The stack's rows have shape {tuple(stack.shape[1:-1])}, where this cache has "
                f"{view.leading} by these slices. Pass the pos_slice that the stack was made with."
            )
        return stack

    def _norm_of(self, view: View, reading: Reading) -> Norm:
        """A norm over all of a view's rows; NaN where there is no token."""
        weight = self._view.batch.weight
        gain, bias = weight(reading.place.gain, reading.layer), None
        scale: Tensor | None = None
        if reading.choice is LayerNormChoice.RECOMPUTED:
            bias = self._optional(reading.place.bias, reading.layer)
        else:
            scale = self._scales(view, reading)
        epsilon = self._view.batch.model.dimensions.layer_norm_epsilon
        own_gain = None if reading.choice is LayerNormChoice.CACHED_SCALE else gain
        return Norm(self._anatomy.centres, epsilon, scale, own_gain, bias)

    def _scales(self, view: View, reading: Reading) -> "Tensor":
        exact = replace(view, dtype="float64", device="cpu")
        scale = exact.allocate((), (1,), "The norm's denominator")
        for place, row, at in exact.each():
            scale[place, : len(at)] = row.scale(reading.place, reading.layer)[at]
        return exact.finished(scale, 0)
