"""What single attention heads write."""

from typing import TYPE_CHECKING, Any

from actstore.query.cache.base import CacheBase
from actstore.query.cache.row import Row
from actstore.query.cache.stacks import Stack
from actstore.query.cache.writes import HeadWrites
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from actstore.query.cache.norm import Norm

__all__ = ["HeadStacks"]


class HeadStacks(CacheBase):
    """Methods that take attention apart by head."""

    def compute_head_results(self) -> None:
        """Nothing: what heads write is computed when asked for, and never kept.

        ``cache["result", layer]`` has it at any time, ``(batch, position, head, channel)``.
        """

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
        *,
        ln: str | None = None,
        project_output_onto: Any = None,
    ) -> "Tensor | tuple[Tensor, list[str]]":
        """What every head before a layer writes into the residual stream.

        Output biases are no head's. Where writes pass a norm before they are added, heads are
        taken after it, so that they sum to what is added.

        Args:
            layer: heads of the blocks before it; None and -1 for all.
            return_labels: also the labels ``L0H0, L0H1, ...``.
            incl_remainder: end with the input of ``layer`` less all these heads.
            pos_slice: positions of each row, counted in its own tokens.
            apply_ln: read each through the norm that reads the input of ``layer``.
            ln: ``exact`` (the default), ``cached_scale`` or ``recomputed``.
            project_output_onto: directions ``(channel,)`` or ``(channel, direction)``; the
                channels are never made.

        Returns:
            ``(component, [batch], [position], channel)``; ``direction``, or nothing, in place
            of the channels with a projection.

        Raises:
            InvalidInput: an unknown layer, or directions of another width.
        """
        until = self._until(layer)
        stack = Stack()
        for number in range(until):
            self._add_heads(stack, number)
        if incl_remainder:
            # Upstream's index -1 means the last stream where the first is meant.
            stack.remainder_of = self.n_layers if self._is_lens and until == 0 else until
        choice = self._choice(ln, self._parts_choice)
        reading = self._reading(until, False, choice) if apply_ln else None
        view = self._view.at_positions(pos_slice)
        found = stack.fill(view, "stack_head_results", reading, project_output_onto)
        return (found, stack.labels) if return_labels else found

    def _add_heads(self, stack: Stack, layer: int) -> None:
        labels = [f"L{layer}H{head}" for head in range(self._view.batch.model.dimensions.n_heads)]

        def give(row: Row, at: "Tensor") -> HeadWrites:
            z = row.raw(ActivationLocationType.ATTN_WEIGHTED_SUM_OF_VALUES, layer)[at]
            return HeadWrites(z, row.values.weight(WeightLocationType.ATTN_TO_RESIDUAL, layer))

        stack.add(labels, give, layer, self._post_norm("attn", layer))

    def _post_norm(self, kind: str, layer: int) -> "Callable[[Row, Tensor], Norm] | None":
        """The norm after a block's writes; upstream takes heads and neurons before it."""
        if self._is_lens or not self._anatomy.has_post_norms:
            return None
        return lambda row, at: row.post_norm(kind, layer, at)
