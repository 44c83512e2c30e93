"""From captured tensors to committed segments: assembly, checks and the writing thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Queue
from threading import Semaphore, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.store.blobs import LocalBlobs
from actstore.store.commits import CommitRecord
from actstore.store.errors import ErrorKind, IngestStopped
from actstore.store.layout import ArraySpec, StoredDtype
from actstore.store.manifest import SetRecord
from actstore.store.plan import Batch, SegmentPlan
from actstore.store.publishing import publish_segment
from actstore.store.shards import SegmentBuffer
from actstore.store.vocabulary import ActivationLocationType, PassType

__all__ = ["NumericOverflow", "SegmentAssembly", "SegmentWriter", "stored_array"]

_TORCH = {
    StoredDtype.FLOAT16: torch.float16,
    StoredDtype.BFLOAT16: torch.bfloat16,
    StoredDtype.FLOAT32: torch.float32,
}


def stored_array(tensor: torch.Tensor, dtype: StoredDtype) -> npt.NDArray[Any]:
    """A tensor's values in the storage dtype, on the host.

    The cast happens on the tensor's device, so that an accelerator sends half the bytes.
    """
    cast = tensor.detach().to(_TORCH[dtype])
    if dtype is StoredDtype.BFLOAT16:
        return cast.view(torch.uint16).cpu().numpy()
    array: npt.NDArray[Any] = cast.cpu().numpy()
    return array


class NumericOverflow(IngestStopped):
    """A value that the array's dtype cannot hold; the segment was not committed.

    Args:
        message: the value and where it is.
        location: what float32 would help; None where the value itself is not finite.
    """

    def __init__(self, message: str, location: ActivationLocationType | None) -> None:
        super().__init__(message, kind=ErrorKind.NUMERIC_OVERFLOW)
        self.location = location

    def with_command(self, model: str, out: str) -> IngestStopped:
        """The same error with the command that helps."""
        if self.location is None:
            rule = "No dtype holds it: look at the model and at the text around that token."
        else:
            rule = (
                "Store that location as float32, as its own set, then repeat this command: "
                f"actstore ingest {model} --out {out} --set {self.location}-float32 "
                f"--locations {self.location} --dtype float32"
            )
        return IngestStopped(f"{self} {rule}", kind=ErrorKind.NUMERIC_OVERFLOW)


class SegmentAssembly:
    """Fills the buffers of one segment, batch by batch.

    Args:
        specs: the arrays that are kept.
        plan: the segment's rows.
    """

    def __init__(self, specs: Sequence[ArraySpec], plan: SegmentPlan) -> None:
        self.plan = plan
        self.buffers = {spec.key: SegmentBuffer(spec, plan.n_rows) for spec in specs}
        self._specs = {(spec.location, spec.pass_type): spec for spec in specs}
        self._places: list[tuple[int, int]] = []

    def input_ids(self, batch: Batch) -> torch.Tensor:
        """The batch's token ids, right-padded: int64 ``(sequence, token)``.

        Causality keeps the padding from any token before it, and padded rows are dropped.
        """
        ids = np.zeros((len(batch.members), batch.padded_length), np.int64)
        self._places = []
        for row, member in enumerate(batch.members):
            tokens = self.plan.sequence_token_ids(int(member))
            ids[row, : len(tokens)] = tokens
            first = int(self.plan.first_token[member]) - self.plan.first_row
            self._places.append((first, len(tokens)))
        return torch.from_numpy(ids)

    def sink(
        self,
        location: ActivationLocationType,
        layer: int | None,
        tensor: torch.Tensor,
        pass_type: PassType = PassType.FORWARD,
    ) -> None:
        """Store one location and layer of the batch whose ids were asked for last.

        Args:
            location: where the tensor was captured.
            layer: its layer; None outside the blocks.
            tensor: ``(sequence, token, *unit_shape)``.
            pass_type: whether it holds values or gradients.

        Raises:
            IngestStopped: a value is NaN, infinite or too large for the array's dtype.
        """
        spec = self._specs[location, pass_type]
        values = stored_array(tensor, spec.dtype)
        if location.is_pair_shaped:
            self._put_pairs(spec, layer, values, tensor)
            return
        clean = _all_finite(values, spec.dtype)
        for row, (first, length) in enumerate(self._places):
            if not clean and not _all_finite(values[row, :length], spec.dtype):
                self._overflow(spec, layer, tensor[row, :length], values[row, :length], first)
            self.buffers[spec.key].put(layer or 0, first, values[row, :length])

    def _put_pairs(
        self,
        spec: ArraySpec,
        layer: int | None,
        values: npt.NDArray[Any],
        tensor: torch.Tensor,
    ) -> None:
        """Store ``(sequence, token, head, attended)``; attended tokens end with the sequence."""
        for row, (first, length) in enumerate(self._places):
            padded = np.full((length, *spec.unit_shape), spec.dtype.fill, spec.dtype.storage)
            inside = values[row, :length, :, :length]
            padded[:, :, :length] = inside
            ahead = np.triu(np.ones((length, length), bool), 1)[:, None, :]
            # Ahead of the diagonal a score is minus infinity, and that is right.
            seen = np.where(ahead, spec.dtype.storage.type(0), inside)
            if not _all_finite(seen, spec.dtype):
                raw = tensor[row, :length, :, :length].reshape(length, -1)
                self._overflow(spec, layer, raw, seen, first)
            self.buffers[spec.key].put(layer or 0, first, padded)

    def _overflow(
        self,
        spec: ArraySpec,
        layer: int | None,
        raw: torch.Tensor,
        stored: npt.NDArray[Any],
        first: int,
    ) -> None:
        bad = ~np.isfinite(spec.dtype.to_float32(stored)).reshape(len(stored), -1)
        row, column = (int(index) for index in np.argwhere(bad)[0])
        value = float(raw.reshape(len(stored), -1)[row, column])
        place = f"layer {layer}, " if layer is not None else ""
        token = self.plan.first_row + first + row
        is_forward = spec.pass_type is PassType.FORWARD
        raise NumericOverflow(
            f"{spec.location if is_forward else f'The gradient at {spec.location}'} has the value "
            f"{value:g} at {place}token {token}, column {column}, which {spec.dtype} cannot hold. "
            f"Segment {self.plan.number} was not committed.",
            # Gradients are float32 already.
            spec.location if np.isfinite(value) and is_forward else None,
        )


def _all_finite(stored: npt.NDArray[Any], dtype: StoredDtype) -> bool:
    """Whether no stored value is NaN or infinite, from the exponent bits alone."""
    exponent = {
        StoredDtype.FLOAT16: 0x7C00,
        StoredDtype.BFLOAT16: 0x7F80,
        StoredDtype.FLOAT32: 0x7F800000,
    }[dtype]
    bits = np.ascontiguousarray(stored).view(dtype.bits)
    return not bool(((bits & dtype.bits.type(exponent)) == exponent).any())


@dataclass(frozen=True)
class _Job:
    plan_hash: str
    assembly: SegmentAssembly
    done: Callable[[], None]


class SegmentWriter:
    """Publishes segments in a thread, while the next one is captured.

    At most two segments are in memory: the one that is filled and the one that is
    written. An error of the thread stops the run at its next step: what is handed over after
    it is dropped, and every later call raises it again.

    Args:
        blobs: the store.
        set_record: the set whose segments are written.
        arrays: those of its arrays that are written.
        on_commit: called in the thread after each commit.
    """

    def __init__(
        self,
        blobs: LocalBlobs,
        set_record: SetRecord,
        arrays: Sequence[ArraySpec],
        on_commit: Callable[[CommitRecord], None],
    ) -> None:
        self._blobs = blobs
        self._set = set_record
        self._arrays = arrays
        self._on_commit = on_commit
        self._jobs: Queue[_Job | None] = Queue()
        self._room = Semaphore(2)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, name="actstore-writer", daemon=True)
        self._thread.start()

    def reserve(self, plan: SegmentPlan) -> SegmentAssembly:
        """Buffers for the next segment; waits until one of two places is free.

        Raises:
            WriteFailed: the thread could not write an earlier segment.
        """
        self._room.acquire()
        try:
            self._raise()
            return SegmentAssembly(self._arrays, plan)
        except BaseException:
            self._room.release()
            raise

    def submit(self, plan_hash: str, assembly: SegmentAssembly, done: Callable[[], None]) -> None:
        """Hand over a filled segment; ``done`` is called when the thread is through with it.

        Raises:
            WriteFailed: the thread could not write an earlier segment.
        """
        self._jobs.put(_Job(plan_hash, assembly, done))
        self._raise()

    def close(self) -> None:
        """Wait until everything handed over is committed.

        Raises:
            WriteFailed: the thread could not write.
        """
        self._jobs.put(None)
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._commit(job)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                self._error = self._error or error
            try:
                job.done()
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                self._error = self._error or error
            del job
            # Whatever happened: the caller may be waiting, and learns of it by going on.
            self._room.release()

    def _commit(self, job: _Job) -> None:
        if self._error is not None:
            return
        record = publish_segment(
            self._blobs, self._set, job.plan_hash, job.assembly.plan, job.assembly.buffers
        )
        self._on_commit(record)
