"""The measured processes of the memory benchmark: ``python -m benchmarks.child TASK …``.

Prints one line of JSON. A process of its own for each task, since a peak never falls.
"""

import argparse
import json
from pathlib import Path

from actstore.ingest.pipeline import ingest, peak_memory
from actstore.ingest.settings import IngestSettings
from actstore.store.reader import StoreReader
from benchmarks.models import bare_forward, demo_model, random_model, standard_library


def main() -> None:
    """Ingest into a store, or run the bare model over the batches of one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.child")
    parser.add_argument("task", choices=["ingest", "forward"])
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--segment-rows", type=int, required=True)
    arguments = parser.parse_args()
    loaded = demo_model()[0] if arguments.model == "demo" else random_model(arguments.model)
    settings = IngestSettings(
        segment_rows=arguments.segment_rows, limit_tokens=arguments.tokens, batch_tokens=4096
    )
    if arguments.task == "ingest":
        ingest(loaded, standard_library(loaded), arguments.store, settings)
    reader = StoreReader(arguments.store)
    if arguments.task == "forward":
        from actstore.ingest.writer import SegmentAssembly

        for number in reader.segments:
            segment = reader.segment(number)
            assembly = SegmentAssembly((), segment)
            for batch in segment.batches:
                bare_forward(loaded, assembly.input_ids(batch))
    arrays = reader.sets["base"].arrays
    segment_bytes = sum(
        spec.shard_bytes(shard, spec.segment_rows)
        for spec in arrays
        for shard in range(spec.shards)
    )
    tokens = sum(record.rows for record in reader.commits["base"].values())
    print(
        json.dumps({"peak": peak_memory(), "tokens": tokens, "segment_bytes": segment_bytes}),
        flush=True,
    )


if __name__ == "__main__":
    main()
