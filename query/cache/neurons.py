"""What single neurons write, and the whole stream taken apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from actstore.query.cache.heads import HeadStacks
from actstore.query.cache.residual import ResidualStacks
from actstore.query.cache.row import Row
from actstore.query.cache.selections import Picks, pick
from actstore.query.cache.stacks import Stack
from actstore.query.cache.writes import Dense, NeuronWrites
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NeuronStacks"]

_L = ActivationLocationType
_W = WeightLocationType


class NeuronStacks(HeadStacks, ResidualStacks):
    """Methods that take MLPs apart by neuron."""

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        *,
        project_output_onto: Any = None,
    ) -> "Tensor":
        """What the neurons of one layer write into the residual stream.

        Args:
            layer: the layer; below 0 from the end.
            neuron_slice: which neurons; a whole number drops the axis.
            pos_slice: positions of each row, counted in its own tokens.
            project_output_onto: directions ``(channel,)`` or ``(channel, direction)``; the
                channels are never made.

        Returns:
            ``([batch], [position], [neuron], channel)``; ``direction``, or nothing, in place of
            the channels with a projection.

        Raises:
            InvalidInput: an unknown layer or neuron, or directions of another width.
        """
        number = self._block(layer)
        neurons = self._neurons(neuron_slice)
        stack = Stack()
        self._add_neurons(stack, number, neurons)
        view = self._view.at_positions(pos_slice)
        found = stack.fill(view, "get_neuron_results", None, project_output_onto)
        if neurons.drops_axis:
            return found.squeeze(0)
        return found.movedim(0, len(view.leading))

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        *,
        mlp_input: bool = False,
        ln: str | None = None,
        project_output_onto: Any = None,
    ) -> "Tensor | tuple[Tensor, list[str]]":
        """What every neuron before a layer writes into the residual stream.

        Args:
            layer: neurons of the blocks before it; None and -1 for all.
            pos_slice: positions of each row, counted in its own tokens.
            neuron_slice: which neurons of each layer; a whole number is that one.
            return_labels: also the labels ``L0N0, L0N1, ...``.
            incl_remainder: end with the stream less all these neurons.
            apply_ln: read each through the norm that reads the stream.
            mlp_input: take the stream that the MLP of ``layer`` reads.
            ln: ``exact`` (the default), ``cached_scale`` or ``recomputed``.
            project_output_onto: directions ``(channel,)`` or ``(channel, direction)``; the
                channels are never made.

        Returns:
            ``(component, [batch], [position], channel)``; ``direction``, or nothing, in place
            of the channels with a projection.

        Raises:
            InvalidInput: an unknown layer or neuron, or directions of another width.
        """
        until = self._until(layer)
        self._refuse_mlp_at_end(until, mlp_input)
        neurons = self._neurons(neuron_slice)
        stack = Stack()
        for number in range(until):
            self._add_neurons(stack, number, neurons)
        if incl_remainder:
            stack.remainder_of = self.n_layers if self._is_lens and until == 0 else until
            if mlp_input:
                stack.remainder = lambda row: row.mlp_input(until)
        choice = self._choice(ln, self._parts_choice)
        reading = self._reading(until, mlp_input, choice) if apply_ln else None
        view = self._view.at_positions(pos_slice)
        found = stack.fill(view, "stack_neuron_results", reading, project_output_onto)
        return (found, stack.labels) if return_labels else found

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        *,
        ln: str | None = None,
        project_output_onto: Any = None,
    ) -> "Tensor | tuple[Tensor, list[str]]":
        """A layer's input as the sum of heads, neurons or MLPs, embeddings and biases.

        Args:
            layer: whose input; None and -1 for the unembedding's.
            mlp_input: take the input of its MLP.
            expand_neurons: one component per neuron; per MLP otherwise.
            apply_ln: read each through the norm that reads the sum.
            pos_slice: positions of each row, counted in its own tokens.
            return_labels: also the labels: heads ``L0H0``, neurons ``L0N0`` or ``0_mlp_out``,
                ``embed``, ``pos_embed``, ``bias``.
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
        stack = self._full_stack(until, mlp_input, expand_neurons)
        choice = self._choice(ln, self._parts_choice)
        reading = self._reading(until, mlp_input, choice) if apply_ln else None
        view = self._view.at_positions(pos_slice)
        what = "get_full_resid_decomposition"
        found = stack.fill(view, what, reading, project_output_onto)
        return (found, stack.labels) if return_labels else found

    def _full_stack(self, until: int, mlp_input: bool, expand_neurons: bool) -> Stack:
        self._refuse_mlp_at_end(until, mlp_input)
        attentions = until + (mlp_input and self._mlp_reads_attention)
        stack = Stack()
        for number in range(attentions):
            self._add_heads(stack, number)
        for number in range(until):
            if expand_neurons:
                self._add_neurons(stack, number, self._neurons(None))
            else:
                self._add_mlp(stack, number)
        self._add_embeddings(stack)
        biases = [("attn", _W.ATTN_OUTPUT_BIAS, number) for number in range(attentions)]
        if expand_neurons:
            biases += [("mlp", _W.MLP_OUTPUT_BIAS, number) for number in range(until)]

        def bias(row: Row, at: "Tensor") -> Dense:
            return Dense(self._summed_biases(row, at, biases)[None])

        stack.add(["bias"], bias, -1)
        return stack

    def _summed_biases(
        self, row: Row, at: "Tensor", biases: Sequence[tuple[str, WeightLocationType, int]]
    ) -> "Tensor":
        import torch

        channels = self._view.batch.model.dimensions.d_model
        total = torch.zeros(len(at), channels, dtype=torch.float64)
        for kind, name, layer in biases:
            found = row.optional(name, layer)
            post_norm = self._post_norm(kind, layer)
            if post_norm is None:
                total = total if found is None else total + found
                continue
            if found is not None:
                total = total + post_norm(row, at)(found.expand(len(at), channels))
        return total

    def _neurons(self, given: Any) -> Picks:
        return pick(given, self._view.batch.model.dimensions.d_mlp, "neuron")

    def _add_neurons(self, stack: Stack, layer: int, neurons: Picks) -> None:
        import torch

        chosen = torch.from_numpy(neurons.indices)
        labels = [f"L{layer}N{neuron}" for neuron in neurons.indices]

        def give(row: Row, at: "Tensor") -> NeuronWrites:
            activations = row.raw(_L.MLP_POST_ACT, layer)[at]
            weight = row.values.weight(_W.MLP_TO_RESIDUAL, layer)
            if len(chosen) == len(weight):
                return NeuronWrites(activations, weight)
            return NeuronWrites(activations[:, chosen], weight[chosen])

        stack.add(labels, give, layer, self._post_norm("mlp", layer))

    def _add_mlp(self, stack: Stack, layer: int) -> None:
        stack.add_stream(f"{layer}_mlp_out", lambda row: row.raw(_L.RESID_DELTA_MLP, layer), layer)
