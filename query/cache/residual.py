"""The residual stream, accumulated and taken apart by layer."""

from typing import TYPE_CHECKING, Any

from actstore.query.cache.base import CacheBase
from actstore.query.cache.row import Row
from actstore.query.cache.stacks import LayerNormChoice, Stack, invalid
from actstore.store.vocabulary import ActivationLocationType

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["ResidualStacks"]

_L = ActivationLocationType


class ResidualStacks(CacheBase):
    """Methods that stack residual streams, and what attention and MLPs write."""

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
        *,
        ln: str | None = None,
    ) -> "Tensor | tuple[Tensor, list[str]]":
        """The residual stream before each layer, up to one: the logit lens' input.

        Args:
            layer: the last stream is its input; None and -1 for the unembedding's.
            incl_mid: also the streams between attention and MLP.
            apply_ln: pass each through the norm that reads the last one.
            pos_slice: positions of each row, counted in its own tokens.
            mlp_input: end with what the MLP of ``layer`` reads.
            return_labels: also the labels ``0_pre, 0_mid, ..., final_post``.
            ln: ``recomputed`` (the default: each is a whole stream, with statistics of its
                own), ``exact`` or ``cached_scale`` (the last stream's statistics).

        Returns:
            ``(component, [batch], [position], channel)``.

        Raises:
            InvalidInput: an unknown layer, or mid streams of a model that has none.
        """
        until = self._until(layer)
        at_end = until == self.n_layers
        if not self._is_lens:
            self._refuse_mlp_at_end(until, mlp_input)
        stack = self._streams(until, incl_mid, mlp_input)
        default = LayerNormChoice.RECOMPUTED
        if self._is_lens and not at_end:
            default = LayerNormChoice.CACHED_SCALE
        choice = self._choice(ln, default)
        reading = self._reading(until, mlp_input, choice) if apply_ln else None
        found = stack.fill(self._view.at_positions(pos_slice), "accumulated_resid", reading)
        return (found, stack.labels) if return_labels else found

    def _streams(self, until: int, incl_mid: bool, mlp_input: bool = False) -> Stack:
        stack = Stack()
        for number in range(until + 1):
            if number == self.n_layers:
                stack.add_stream("final_post", _stream(number), number)
                continue
            stack.add_stream(f"{number}_pre", _stream(number), number)
            if (incl_mid and number < until) or (mlp_input and number == until):
                stack.add_stream(f"{number}_mid", _middle(number), number)
        return stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
        *,
        ln: str | None = None,
    ) -> "Tensor | tuple[Tensor, list[str]]":
        """What the embeddings, attentions and MLPs wrote into a layer's input.

        With ``mode="all"`` the components sum to that input.

        Args:
            layer: whose input; None and -1 for the unembedding's.
            mlp_input: take the input of its MLP.
            mode: ``all``, ``attn`` or ``mlp``; the embeddings stay.
            apply_ln: read each component through the norm that reads the sum.
            pos_slice: positions of each row, counted in its own tokens.
            incl_embeds: begin with the embeddings.
            return_labels: also the labels ``embed, pos_embed, 0_attn_out, 0_mlp_out, ...``.
            ln: ``exact`` (the default: the components sum to the norm's output less its bias),
                ``cached_scale`` or ``recomputed``.

        Returns:
            ``(component, [batch], [position], channel)``.

        Raises:
            InvalidInput: an unknown layer or mode, or nothing is left to stack.
        """
        until = self._until(layer)
        self._refuse_mlp_at_end(until, mlp_input)
        if mode not in ("all", "attn", "mlp"):
            raise invalid(f"mode is {mode!r}; use all, attn or mlp.")
        stack = self._layer_stack(until, mlp_input, mode, incl_embeds)
        if not stack.labels:
            raise invalid(
                f"Nothing writes before layer {until} when mode is {mode!r} and incl_embeds is "
                f"{incl_embeds}. Take a later layer, or include the embeddings."
            )
        choice = self._choice(ln, self._parts_choice)
        reading = self._reading(until, mlp_input, choice) if apply_ln else None
        found = stack.fill(self._view.at_positions(pos_slice), "decompose_resid", reading)
        return (found, stack.labels) if return_labels else found

    def _layer_stack(self, until: int, mlp_input: bool, mode: str, incl_embeds: bool) -> Stack:
        stack = Stack()
        if incl_embeds:
            self._add_embeddings(stack)
        for number in range(until):
            if mode != "mlp":
                stack.add_stream(f"{number}_attn_out", _raw(_L.RESID_DELTA_ATTN, number), number)
            if mode != "attn":
                stack.add_stream(f"{number}_mlp_out", _raw(_L.RESID_DELTA_MLP, number), number)
        if mlp_input and mode != "mlp" and self._mlp_reads_attention:
            stack.add_stream(f"{until}_attn_out", _raw(_L.RESID_DELTA_ATTN, until), until)
        return stack

    @property
    def _mlp_reads_attention(self) -> bool:
        # Upstream adds attention's output even where the MLP does not read it.
        return self._is_lens or not self._anatomy.is_parallel

    def _add_embeddings(self, stack: Stack) -> None:
        stack.add_stream("embed", Row.embedding, -1)
        if self._anatomy.has_position_embedding:
            stack.add_stream("pos_embed", Row.position_embedding, -1)


def _stream(layer: int) -> "Callable[[Row], Tensor]":
    return lambda row: row.residual(layer)


def _middle(layer: int) -> "Callable[[Row], Tensor]":
    return lambda row: row.middle(layer)


def _raw(location: ActivationLocationType, layer: int) -> "Callable[[Row], Tensor]":
    return lambda row: row.raw(location, layer)
