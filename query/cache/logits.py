"""From parts of the residual stream to logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.query.cache.norms import StackNorms
from actstore.query.cache.residual import ResidualStacks
from actstore.query.cache.row import Row
from actstore.query.cache.stacks import invalid
from actstore.store.model.recipes import Recipe, Setting
from actstore.store.vocabulary import ActivationLocationType, WeightLocationType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["LogitLens", "LogitMethods"]

_L = ActivationLocationType
_W = WeightLocationType
_CHUNK_BYTES = 2**26
_NOWHERE = -1


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What the model would predict if it stopped at each residual stream.

    Axes are ``(component, [batch], [position])``, followed by what is said; where a row has
    no token, logits are NaN and numbers -1.

    Attributes:
        labels: one per component, as those of ``accumulated_resid``.
        logits: ``vocabulary``; only without targets and ``top_k``.
        target_logits: the targets' logits.
        target_log_probs: their log-probabilities.
        target_ranks: how many tokens come before them; 0 is the model's first choice.
        top_tokens: the best tokens ``(k,)``, by descending logit, then token id.
        top_logits: their logits.
    """

    labels: list[str]
    logits: "Tensor | None" = None
    target_logits: "Tensor | None" = None
    target_log_probs: "Tensor | None" = None
    target_ranks: "Tensor | None" = None
    top_tokens: "Tensor | None" = None
    top_logits: "Tensor | None" = None


class LogitMethods(ResidualStacks, StackNorms):
    """Methods that read the stream through the final norm and the unembedding."""

    def logit_attrs(
        self,
        residual_stack: "Tensor",
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        *,
        ln: str | None = None,
    ) -> "Tensor":
        """What each part of a stack adds to the logit of a token, or to a difference.

        With ``ln="exact"`` the parts of the unembedding's input sum to the logit (before a
        soft-cap) less :meth:`logit_constant`.

        Args:
            residual_stack: ``(component, [batch], [position], channel)``, sliced by
                ``pos_slice`` already and by ``batch_slice`` not yet.
            tokens: a token's text or number; numbers ``(batch,)``, ``(position,)`` where there
                is no batch axis, or ``(batch, position)``, as they stand after the slices.
            incorrect_tokens: those whose logit is subtracted, in the shape of ``tokens``.
            pos_slice: the positions of the stack.
            batch_slice: the rows wanted of it.
            has_batch_dim: whether the stack has a batch axis.
            ln: ``exact`` (the default), ``cached_scale`` or ``recomputed``.

        Returns:
            ``(component, [batch], [position])``.

        Raises:
            InvalidInput: tokens or stack do not fit the cache, or each other.
        """
        import torch

        choice = self._choice(ln, self._parts_choice)
        view = self._sliced(pos_slice, batch_slice)
        stack = self._sliced_stack(residual_stack, view, batch_slice, has_batch_dim)
        directions = self._fitted(self._directions(tokens, incorrect_tokens), view.leading)
        norm = self._norm_of(view, self._reading(self.n_layers, False, choice))
        is_linear = norm.is_linear
        pulled = norm.pulled_back(directions) if is_linear else directions
        found = []
        try:
            for part in stack.to(torch.float64):
                value = ((part if is_linear else norm(part)) * pulled).sum(-1)
                if norm.scale is not None:
                    value = value / norm.scale[..., 0]
                found.append(self._shown(value))
        except RuntimeError as error:
            raise invalid(f"The tokens do not fit the stack: {error}.") from None
        return torch.stack(found) if found else self._shown(stack[..., 0])

    def logit_constant(self, tokens: Any, incorrect_tokens: Any = None) -> "Tensor":
        """What no part of the stream adds to a token's logit: the final norm's bias, unembedded.

        Args:
            tokens: as for :meth:`logit_attrs`.
            incorrect_tokens: as for :meth:`logit_attrs`.

        Returns:
            The shape of ``tokens``.
        """
        import torch

        directions = self._directions(tokens, incorrect_tokens)
        bias = self._optional(_W.LAYER_NORM_BIAS_FINAL, None)
        if bias is None:
            return self._shown(torch.zeros(directions.shape[:-1]))
        return self._shown(directions @ bias)

    def _directions(self, tokens: Any, incorrect_tokens: Any) -> "Tensor":
        ids = self._token_ids(tokens)
        directions = self._unembedding_columns(ids)
        if incorrect_tokens is None:
            return directions
        others = self._token_ids(incorrect_tokens)
        if others.shape != ids.shape:
            raise invalid(
                f"tokens have shape {tuple(ids.shape)}, incorrect_tokens {tuple(others.shape)}; "
                "give both in one shape."
            )
        return directions - self._unembedding_columns(others)

    def _fitted(self, directions: "Tensor", leading: tuple[int, ...]) -> "Tensor":
        """Directions whose axes stand where the rows' do."""
        shape = tuple(directions.shape[:-1])
        if self._is_lens or shape in ((), leading):
            return directions
        if len(shape) == 1 and len(leading) == 2 and shape[0] == leading[0]:
            return directions[:, None]
        raise invalid(
            f"tokens have shape {shape}, where the rows of this cache have {leading} by these "
            "slices. Give one token, one per row of the batch, or one per row and position."
        )

    def logit_lens(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: Any = None,
        *,
        targets: Any = None,
        top_k: int | None = None,
    ) -> LogitLens:
        """The residual stream before each layer, through the final norm and the unembedding.

        Each stream is normalised by its own statistics, gain, bias and soft-cap included; the
        last component is the model's own prediction. The vocabulary is passed in chunks.

        Args:
            layer: the last stream is its input; None and -1 for the unembedding's.
            incl_mid: also the streams between attention and MLP.
            pos_slice: positions of each row, counted in its own tokens.
            targets: tokens, as for :meth:`logit_attrs`; ``"next"`` for each position's next
                token (the last has none).
            top_k: how many of the best tokens to give.

        Returns:
            All logits without ``targets`` and ``top_k``; else what they ask for.

        Raises:
            InvalidInput: an unknown layer, targets that do not fit, or a result too large.
        """
        import torch

        until = self._until(layer)
        vocabulary = self._view.batch.model.dimensions.vocabulary_size
        if top_k is not None and not 1 <= top_k <= vocabulary:
            raise invalid(f"top_k is {top_k}; use 1 to {vocabulary}.")
        streams = self._streams(until, incl_mid)
        view = self._view.at_positions(pos_slice)
        count = (len(streams.labels),)
        wanted: Tensor | None = None
        if targets is not None and not _is_next(targets):
            ids = self._fitted_ids(self._token_ids(targets), view.leading)
            wanted = ids.expand(view.leading).reshape(len(view.rows), -1)
        floats, numbers = {}, {}
        if targets is not None:
            for name in ("target_logits", "target_log_probs"):
                floats[name] = view.allocate(count, (), "logit_lens")
            numbers["target_ranks"] = _numbers(floats["target_logits"])
        if top_k is not None:
            floats["top_logits"] = view.allocate(count, (top_k,), "logit_lens")
            numbers["top_tokens"] = _numbers(floats["top_logits"])
        if targets is None and top_k is None:
            floats["logits"] = view.allocate(count, (vocabulary,), "logit_lens")
        for place, row, at in view.each():
            stacked = torch.cat([part.give(row, at).expand(slice(None)) for part in streams.parts])
            own = None
            if targets is not None:
                own = _next_tokens(row, at) if wanted is None else wanted[place, : len(at)]
            found = _Lens(row, stacked.flatten(0, 1)).read(own, top_k)
            for name, value in found.items():
                into = (floats if name in floats else numbers)[name]
                shaped = value.reshape(*count, len(at), *value.shape[1:])
                into[:, place, : len(at)] = shaped.to(into.dtype)
        done = {name: view.finished(value, 1) for name, value in {**floats, **numbers}.items()}
        return LogitLens(streams.labels, **done)

    def _fitted_ids(self, ids: "Tensor", leading: tuple[int, ...]) -> "Tensor":
        shape = tuple(ids.shape)
        if shape in ((), leading):
            return ids
        if len(shape) == 1 and len(leading) == 2 and shape[0] == leading[0]:
            return ids[:, None]
        raise invalid(
            f"targets have shape {shape}, where the rows of this cache have {leading}. Give one "
            "token, one per row of the batch, or one per row and position."
        )


def _is_next(targets: Any) -> bool:
    return isinstance(targets, str) and targets == "next"


def _numbers(like: "Tensor") -> "Tensor":
    import torch

    return torch.full(like.shape, _NOWHERE, dtype=torch.int64)


def _next_tokens(row: Row, at: "Tensor") -> "Tensor":
    import torch

    following = torch.cat([row.token_ids[1:], torch.tensor([_NOWHERE])])
    return following[at]


class _Lens:
    """Logits of some streams of one sequence, a chunk of the vocabulary at a time.

    Args:
        row: the sequence.
        streams: ``(stream, channel)``.
    """

    def __init__(self, row: Row, streams: "Tensor") -> None:
        self._streams = streams
        self._recipe: Recipe = next(
            recipe for recipe in row.values.recipes if recipe.target is _L.LOGITS
        )
        self._weights = [row.values.weight(name, None) for name in self._recipe.weights]
        self._at = self._recipe.weights.index(_W.UNEMBEDDING)
        self._setting = Setting(row.values.dimensions, None)
        self._vocabulary = row.values.dimensions.vocabulary_size

    def _chunks(self) -> "Iterator[tuple[int, Tensor]]":
        step = max(1, _CHUNK_BYTES // max(1, 8 * len(self._streams)))
        for start in range(0, self._vocabulary, step):
            weights = list(self._weights)
            weights[self._at] = weights[self._at][:, start : start + step]
            yield start, self._recipe.function([self._streams], weights, self._setting)

    def read(self, targets: "Tensor | None", top_k: int | None) -> "dict[str, Tensor]":
        """What is asked for, by the names of :class:`LogitLens`, ``(stream, ...)``."""
        import torch

        if targets is None and top_k is None:
            return {"logits": torch.cat([logits for _, logits in self._chunks()], -1)}
        found: dict[str, Tensor] = {}
        wanted = None
        if targets is not None:
            wanted = targets.repeat(len(self._streams) // max(1, len(targets)))
            found["target_logits"] = self._of_targets(wanted)
        total = torch.full((len(self._streams),), -torch.inf, dtype=torch.float64)
        before = torch.zeros(len(self._streams), dtype=torch.int64)
        best = torch.empty(len(self._streams), 0, dtype=torch.float64)
        tokens = torch.empty(len(self._streams), 0, dtype=torch.int64)
        for start, logits in self._chunks():
            numbers = torch.arange(start, start + logits.shape[1])
            total = torch.logaddexp(total, logits.logsumexp(-1))
            if wanted is not None:
                own = found["target_logits"][:, None]
                earlier = (logits == own) & (numbers < wanted[:, None])
                before += ((logits > own) | earlier).sum(-1)
            if top_k is not None:
                best = torch.cat([best, logits], -1)
                tokens = torch.cat([tokens, numbers.expand(len(logits), -1)], -1)
                # Stable, and the tokens before are lower: ties stay in order of token id.
                order = best.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
                best, tokens = best.gather(1, order), tokens.gather(1, order)
        if wanted is not None:
            found["target_log_probs"] = found["target_logits"] - total
            found["target_ranks"] = before.masked_fill(wanted == _NOWHERE, _NOWHERE)
        if top_k is not None:
            found |= {"top_logits": best, "top_tokens": tokens}
        return found

    def _of_targets(self, wanted: "Tensor") -> "Tensor":
        import torch

        values = torch.full((len(self._streams),), torch.nan, dtype=torch.float64)
        # From the chunk's own product, so that a token never comes before itself.
        for start, logits in self._chunks():
            inside = (wanted >= start) & (wanted < start + logits.shape[1])
            columns = (wanted[inside] - start)[:, None]
            values[inside] = logits[inside].gather(1, columns)[:, 0]
        return values
