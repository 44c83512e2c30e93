"""Running a segment's batches and filling its buffers: one pass, or both."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from actstore.ingest.capture import Capture
from actstore.ingest.gradients import GradientCapture, PassSink, gradient_parts
from actstore.ingest.model import LoadedModel
from actstore.ingest.objectives import Objective
from actstore.ingest.targets import DocumentTargets
from actstore.ingest.writer import SegmentAssembly
from actstore.store.layout import ArraySpec
from actstore.store.plan import Plan
from actstore.store.segment_plan import Batch
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["Recorder"]


class Recorder:
    """Runs a model over batches for the arrays of a set. Use as a context manager.

    Args:
        loaded: the model.
        arrays: what is wanted; where there is none, nothing is run.
        objective: what the backward arrays are the gradients of; None without any.
        plans: all plans of the store, whose documents may have targets.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        arrays: Sequence[ArraySpec],
        objective: Objective | None,
        plans: Sequence[Plan],
    ) -> None:
        self._loaded = loaded
        places: dict[PassType, list[ActivationLocationType]] = {one: [] for one in PassType}
        for spec in arrays:
            places[spec.pass_type].append(spec.location)
        self._capture: Capture | None = None
        self._gradients: GradientCapture | None = None
        self._targets: DocumentTargets | None = None
        if places[PassType.BACKWARD]:
            assert objective is not None, "gradients are of something"
            self._gradients = GradientCapture(
                loaded, places[PassType.FORWARD], places[PassType.BACKWARD], objective
            )
            vocabulary = loaded.dimensions.vocabulary_size
            self._targets = DocumentTargets(objective, plans, loaded.tokenizer, vocabulary)
        elif places[PassType.FORWARD]:
            self._capture = Capture(loaded, places[PassType.FORWARD])
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for capture in (self._capture, self._gradients):
                if capture is not None:
                    stack.enter_context(capture)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def record(self, assembly: SegmentAssembly, batch: Batch) -> None:
        """Run a batch and put what is wanted of it into the assembly.

        Raises:
            IngestStopped: a value cannot be stored.
        """
        self.run(assembly, batch, assembly.sink)

    def run(self, assembly: SegmentAssembly, batch: Batch, sink: PassSink) -> None:
        """Run a batch of the assembly's segment and hand everything to ``sink``."""
        if self._capture is not None:

            def forward(
                location: ActivationLocationType, layer: int | None, tensor: torch.Tensor
            ) -> None:
                sink(location, layer, tensor, PassType.FORWARD)

            self._capture.stream(assembly.input_ids(batch), forward)
        if self._gradients is None or self._targets is None:
            return
        rows, width = len(batch.members), batch.padded_length
        for part in gradient_parts(rows, width, self._loaded.dimensions.vocabulary_size):
            members = batch.members[part.start : part.stop]
            lengths = assembly.plan.length[members].tolist()
            columns = self._targets.of(assembly.plan, members.tolist())
            ids = assembly.input_ids(Batch(members, width))
            self._gradients.stream(ids, lengths, columns, sink)
