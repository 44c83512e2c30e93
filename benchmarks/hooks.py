"""What capture costs over a bare forward pass of the same batch."""

from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from actstore.ingest.capture import Capture, Sink
from actstore.ingest.model import LoadedModel
from actstore.ingest.writer import SegmentAssembly
from actstore.store.blobs import LocalBlobs
from actstore.store.layout import ArraySpec, StoredDtype
from actstore.store.location_names import parse_locations
from actstore.store.plan import SegmentPlan
from actstore.store.plan_record import PlanConfig
from actstore.store.planning import build_plan
from actstore.store.token_stream import TokenizedDocument
from actstore.store.vocabulary import ActivationLocationType, PassType
from benchmarks.harness import Case, Options, Ratio, Result, Timing, compare, interleave, scratch
from benchmarks.models import bare_forward, demo_model, random_model

FULL_SIZE = 2
"""1: a tiny model; 2: the shipped model and one of GPT-2 small's shape."""

_SINK = "neurons, into segment buffers"


def run(size: int, options: Options | None = None) -> Result:
    """Time hooked passes of the presets against the bare model's."""
    options = options or Options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if size == 1:
        studies = [("tiny", random_model("tiny"), 4, 64, 3)]
    else:
        demo, name = demo_model()
        studies = [
            (name, demo, 16, 256, 11),
            ("GPT-2 small's shape, random", random_model("gpt2-small"), 1, 256, 11),
        ]
    timings: list[Timing] = []
    ratios: list[Ratio] = []
    for name, loaded, sequences, width, repetitions in studies:
        found = _measure(loaded, sequences, width, repetitions, options)
        tokens = sequences * width
        named = {
            case: Timing(f"{name}: {case}", timing.seconds, tokens, "tokens", timing.cpu)
            for case, timing in found.items()
        }
        timings += named.values()
        for case, timing in named.items():
            if case != "bare":
                aim = 1.05 if case == "neurons" else None
                bare = named["bare"]
                ratios += [
                    compare(f"{name}: {case} over bare", timing, bare, aim=aim),
                    compare(f"{name}: {case} over bare, CPU", timing.on_cpu, bare.on_cpu, aim=aim),
                ]
    return Result(
        "hooks",
        size,
        {
            "batches": ", ".join(
                f"{name}: {rows} x {width}" for name, _, rows, width, _ in studies
            ),
            "bare": "the base model under its own attention, without the head",
            "presets": "into a sink that drops everything; neurons is residual + MLP",
            "torch threads": torch.get_num_threads(),
        },
        tuple(timings),
        tuple(ratios),
    )


def _measure(
    loaded: LoadedModel, sequences: int, width: int, repetitions: int, options: Options
) -> dict[str, Timing]:
    with scratch() as folder:
        plan = _segment_plan(folder, loaded, sequences, width)
    assembly = SegmentAssembly(_specs(loaded, plan), plan)
    batches = cycle(plan.batches)
    ids = assembly.input_ids(plan.batches[0])
    exits = ExitStack()

    def dropped(_: ActivationLocationType, __: int | None, ___: torch.Tensor) -> None:
        pass

    def streaming(preset: str, sink: Sink | None) -> Case:
        capture: list[Capture] = []

        def enter() -> None:
            capture.append(exits.enter_context(Capture(loaded, parse_locations(preset))))
            # Entering checks the model, which leaves the allocator in another state.
            stream()

        def leave() -> None:
            capture.clear()
            exits.pop_all().close()

        def stream() -> None:
            if sink is None:
                # Every batch has its rows of the segment, as in an ingest.
                capture[0].stream(assembly.input_ids(next(batches)), assembly.sink)
            else:
                capture[0].stream(ids, sink)

        return Case(_SINK if sink is None else preset, stream, enter, leave)

    def bare() -> None:
        bare_forward(loaded, ids)

    cases = [Case("bare", bare, bare)]
    cases += [streaming(preset, dropped) for preset in ("neurons", "attention", "full")]
    cases.append(streaming("neurons", None))
    with exits:
        return interleave(cases, repetitions, options.seed)


def _specs(loaded: LoadedModel, plan: SegmentPlan) -> tuple[ArraySpec, ...]:
    rows = -(-plan.n_rows // 512) * 512
    dimensions = loaded.dimensions
    return tuple(
        ArraySpec(
            location,
            PassType.FORWARD,
            dimensions.n_layers if location.has_layers else None,
            dimensions.unit_shape(location),
            StoredDtype.FLOAT16,
            rows,
        )
        for location in parse_locations("neurons")
    )


def _segment_plan(folder: Path, loaded: LoadedModel, sequences: int, width: int) -> SegmentPlan:
    """A segment of four batches of full sequences."""
    vocabulary = loaded.dimensions.vocabulary_size
    rows = max(4 * sequences * width, 512)
    config = PlanConfig(
        context=width,
        vocabulary_size=vocabulary,
        segment_rows=rows,
        batch_tokens=sequences * width,
    )
    rng = np.random.default_rng(0)
    documents = (
        TokenizedDocument(rng.integers(0, vocabulary, width).astype(np.int32), f"{number}", {})
        for number in range(4 * sequences)
    )
    outcome = build_plan(LocalBlobs(folder), config, documents, [], append=False)
    return outcome.plans[0].segment(0)
