"""``ActivationCache``: the activations of many sequences under TransformerLens' names.

    cache = store.cache(sequences=[0, 1, 2])
    cache["resid_post", 3]                           # (batch, position, channel)
    cache.accumulated_resid(apply_ln=True)
    cache.direct_logit_attribution(target=1437, by="head")

Nothing is read before it is asked for, and nothing is kept: a call goes through its
sequences one by one, and through the layers of each once.
"""

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from actstore.query.cache.attribution import LogitAttributions
from actstore.query.cache.names import HookName, UnknownHook, full_name
from actstore.query.cache.stacks import invalid
from actstore.query.cache.view import View
from actstore.query.reading import torch_dtype
from actstore.store.errors import ErrorKind

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ActivationCache"]

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_PAIRED = ("attn.hook_attn_scores", "attn.hook_pattern")


class ActivationCache(LogitAttributions, Mapping[Any, "Tensor"]):
    """Activations by name, as a mapping, and the questions people ask of them.

    Results are ``(batch, position, ...)`` in float32 unless :meth:`to` says otherwise. Rows of
    unequal length are padded at their end with NaN; :attr:`mask` says where tokens are.
    ``pos_slice`` counts in each row's own tokens, so that -1 is its last one.

    A key is a full name (``blocks.3.hook_resid_post``), a shorthand (``resid_post3``) or a
    tuple (``("resid_post", 3)``, ``("scale", -1, "ln2")``). Iteration gives the full names in
    the order of the forward pass; ``logits`` and ``("result", layer)`` are computed when asked
    for.

    Args:
        view: rows and positions of a batch.
        compat: ``transformer_lens`` to answer as TransformerLens 2.18 does where we differ on
            purpose; see docs/activation_cache.md.

    Raises:
        InvalidInput: another ``compat``.
    """

    def __init__(self, view: View, compat: str | None = None) -> None:
        super().__init__(view, compat)

    # A mapping

    def __getitem__(self, key: HookName) -> "Tensor":
        """An activation, ``([batch], [position], *unit axes)``.

        Attention scores and patterns are ``([batch], head, [position], attended)``; past a
        row's last token the attended axis holds NaN.

        Raises:
            UnknownHook: no activation of this model is named so.
            Unavailable: it cannot be had from what is stored.
        """
        name = self._known(key)
        return self._hooked(self._view, name)

    def _known(self, key: object) -> str:
        name = full_name(key, self.n_layers)
        if not self._anatomy.has(name):
            raise UnknownHook(
                f"{key!r} is {name!r}, which this model does not have. The names of its "
                "activations are those of `list(cache)`.",
                kind=ErrorKind.UNKNOWN_LOCATION,
            )
        return name

    def _hooked(self, view: View, name: str) -> "Tensor":
        is_paired = name.endswith(_PAIRED)
        result: Tensor | None = None
        for place, row, at in view.each():
            value = row.hook(name)[at]
            if result is None:
                shape = (*value.shape[1:-1], view.longest) if is_paired else value.shape[1:]
                result = view.allocate((), tuple(shape), name)
            target = result[place, : len(at)]
            if is_paired:
                target = target[..., : value.shape[-1]]
            target.copy_(value)
        if result is None:
            result = view.allocate((), (), name)
        found = view.finished(result, 0)
        if is_paired and view.has_position_dim:
            # (position, head, attended) -> (head, position, attended)
            axis = int(view.has_batch_dim)
            found = found.movedim(axis + 1, axis)
        return found

    def __contains__(self, key: object) -> bool:
        try:
            self._known(key)
        except UnknownHook:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return self._anatomy.hooks()

    def __len__(self) -> int:
        return sum(1 for _ in self._anatomy.hooks())

    def keys(self) -> KeysView[Any]:
        """Full names, in the order of the forward pass."""
        return KeysView(self)

    def values(self) -> "ValuesView[Tensor]":
        """The activations in that order; each is read when the iteration comes to it."""
        return ValuesView(self)

    def items(self) -> "ItemsView[Any, Tensor]":
        """Names and activations."""
        return ItemsView(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        rows = ", ".join(f"{len(positions)}" for positions in self._view.positions[:5])
        more = ", ..." if len(self._view.positions) > 5 else ""
        spoken = f", compat={self.compat!r}" if self.compat else ""
        return (
            f"<ActivationCache: {len(self)} activations of {len(self._view.positions)} sequences "
            f"({rows}{more} tokens), {self._view.dtype} on {self._view.device}{spoken}>"
        )

    # What it speaks of

    @property
    def has_batch_dim(self) -> bool:
        """Whether results have a batch axis."""
        return self._view.has_batch_dim

    @property
    def has_embed(self) -> bool:
        """Whether ``hook_embed`` is there; always."""
        return True

    @property
    def has_pos_embed(self) -> bool:
        """Whether ``hook_pos_embed`` is there."""
        return self._anatomy.has_position_embedding

    @property
    def mask(self) -> "Tensor":
        """Where results have a token, bool ``([batch], [position])``."""
        return self._view.mask()

    @property
    def sequences(self) -> tuple[int, ...]:
        """The rows' sequences."""
        return tuple(self._view.batch.names[row] for row in self._view.rows)

    # Other forms of it

    def to(self, device: Any = None, dtype: Any = None) -> "ActivationCache":
        """The same cache with results on another device or in another dtype.

        Args:
            device: such as ``cuda``; a dtype may stand here too.
            dtype: ``float64``, ``float32``, ``bfloat16`` or ``float16``, or torch's.

        Returns:
            A new cache; with ``compat`` this one, changed, as upstream does.

        Raises:
            InvalidInput: another dtype.
        """
        if device is not None and dtype is None and str(device).removeprefix("torch.") in _DTYPES:
            device, dtype = None, device
        view = self._view
        if dtype is not None:
            name = str(dtype).removeprefix("torch.")
            torch_dtype(name)
            view = replace(view, dtype=name)
        if device is not None:
            view = replace(view, device=str(device))
        return self._changed(view)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ActivationCache":
        """A cache of some rows; a whole number drops the batch axis.

        Raises:
            InvalidInput: not a slice, no such row, or no batch axis.
        """
        if self._is_lens and not self.has_batch_dim:
            raise invalid("Cannot index into a cache without a batch dim.")
        return self._new(self._view.at_rows(batch_slice))

    def apply_slice_to_pos_dim(self, pos_slice: Any) -> "ActivationCache":
        """A cache of some positions, counted in each row's own tokens.

        A whole number drops the position axis; attended tokens stay.

        Raises:
            InvalidInput: not a slice, no such position, or no position axis.
        """
        return self._new(self._view.at_positions(pos_slice))

    def remove_batch_dim(self) -> "ActivationCache":
        """The cache of one row without its batch axis.

        Returns:
            A new cache; with ``compat`` this one, changed, as upstream does.

        Raises:
            InvalidInput: there are several rows.
        """
        if not self.has_batch_dim:
            return self
        if len(self._view.rows) != 1:
            raise invalid(
                f"This cache has {len(self._view.rows)} rows, so its batch axis cannot go. Take "
                "one of them with apply_slice_to_batch_dim."
            )
        return self._changed(replace(self._view, has_batch_dim=False))

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Nothing: values carry no graph, and no global switch is thrown.

        Raises:
            InvalidInput: ``mode`` is true, which cannot be.
        """
        if mode:
            raise invalid(
                "The values of a cache carry no graph. Take gradients from a prompt with an "
                "objective, and leave torch.set_grad_enabled to yourself."
            )

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> "Tensor":
        """One activation of every layer before ``layer``.

        Args:
            activation_name: such as ``resid_post``, ``pattern``, ``scale``.
            layer: blocks before it; None and -1 for all.
            sublayer_type: such as ``ln1``, for ``scale`` and ``normalized``.

        Returns:
            ``(layer, [batch], [position], *unit axes)``.

        Raises:
            InvalidInput: ``layer`` is 0, or there is no such activation.
        """
        import torch

        until = self._until(layer)
        if until == 0:
            raise invalid("No block stands before layer 0. Take a later layer.")
        names = [self._known((activation_name, number, sublayer_type)) for number in range(until)]
        return torch.stack([self._hooked(self._view, name) for name in names])

    def _new(self, view: View) -> "ActivationCache":
        return ActivationCache(view, self.compat)

    def _changed(self, view: View) -> "ActivationCache":
        if not self._is_lens:
            return self._new(view)
        self._view = view
        return self
