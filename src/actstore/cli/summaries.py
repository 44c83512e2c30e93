"""What ingest plans, expects and did, in words for people."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from actstore.cli.display import (
    byte_text,
    count_text,
    duration_text,
    fields_table,
    print_table,
)
from actstore.cli.output import console

if TYPE_CHECKING:
    from actstore.ingest.estimate import Estimate
    from actstore.ingest.preview import PlanSummary
    from actstore.ingest.report import IngestReport

__all__ = ["estimate_table", "plan_table", "print_next", "print_report", "refusal"]


def estimate_table(found: "Estimate") -> Table:
    """An estimate as names and values."""
    sizes = sorted(found.bytes_by_array.items(), key=lambda item: -item[1])
    parts = [f"{name.removesuffix('/forward')} {byte_text(size)}" for name, size in sizes]
    parts.append(f"index, catalog and model {byte_text(found.zone_bytes + found.other_bytes)}")
    fields = {
        "to ingest": f"{count_text(found.tokens)} tokens in {count_text(found.sequences)} "
        f"sequences of {count_text(found.documents)} documents; {found.segments} segments",
        "to write": f"{byte_text(found.total_bytes)} in {count_text(found.files)} files",
        "of these": ", ".join(parts),
        "free": byte_text(found.free_bytes),
    }
    if found.seconds is not None and found.rerun_seconds is not None:
        fields["time"] = f"about {duration_text(found.seconds)}"
        fields["without a store"] = (
            f"about {duration_text(found.rerun_seconds)} of forward passes for every question"
        )
    return fields_table(fields)


def print_report(report: "IngestReport") -> None:
    """Print what an ingest did."""
    shown = console()
    dropped = ", ".join(
        f"{count_text(count)} documents dropped ({reason})"
        for reason, count in report.dropped.items()
    )
    fields = {
        "stored": f"{count_text(report.stored)} of {count_text(report.planned)} tokens; "
        f"{count_text(report.missing)} missing; {dropped or 'no document dropped'}",
        "segments": f"{report.committed} of {report.segments} committed, {report.written} by "
        "this run",
    }
    if report.tokens_per_second is not None:
        fields["took"] = (
            f"{duration_text(report.seconds)}, {count_text(round(report.tokens_per_second))} "
            "tokens/s from forward pass to commit"
        )
        fields["wrote"] = byte_text(report.bytes_written)
    if report.objective is not None:
        fields["objective"] = report.objective
    fields["peak memory"] = byte_text(report.peak_memory)
    shown.print(fields_table(fields))
    if report.errors:
        rows = [(location, f"{error:.2e}") for location, error in report.errors.items()]
        print_table(shown, ["self-check", "largest error of a row, relative"], rows)


def print_next(out: Path, missing: int) -> None:
    """Print what to try on a store."""
    folder = shlex.quote(str(out))
    lines = [
        f"actstore info {folder}",
        f"actstore topk {folder} mlp_write_norm -k 10",
        f"actstore examples {folder} mlp_post_act 0:0",
        f'actstore sql {folder} "FROM neurons ORDER BY kurtosis DESC LIMIT 10"',
    ]
    if missing:
        lines.insert(0, f"actstore verify {folder}")
    console().print("next:")
    for line in lines:
        console().print(f"  {line}", soft_wrap=True)


def plan_table(found: "PlanSummary") -> Table:
    """A plan as names and values."""
    dropped = ", ".join(f"{reason}: {count_text(n)}" for reason, n in found.dropped.items())
    config = found.config
    objective = {"objective": found.objective} if found.objective is not None else {}
    return fields_table(
        {
            "documents": f"{count_text(found.documents)}"
            f"{f' (dropped {dropped})' if dropped else ''}",
            "sequences": f"{count_text(found.sequences)} of up to {config['context']} tokens, "
            f"stride {config['stride']}, bos {config['bos']}",
            "tokens": f"{count_text(found.tokens)}{' (limited)' if found.limited else ''}",
            "batches": f"{count_text(found.batches)} of up to "
            f"{count_text(config['batch_tokens'])} tokens; {found.padding_share:.1%} padding",
            "segments": f"{count_text(found.segments)} of {count_text(config['segment_rows'])} "
            f"rows; {count_text(found.segments_committed)} committed already",
            "arrays": ", ".join(f"{key} {dtype}" for key, dtype in found.arrays.items()),
            **objective,
        }
    )


def refusal(found: "Estimate", max_bytes: int | None) -> str:
    """Why ingest would refuse to write this much, or nothing."""
    if max_bytes is not None and found.total_bytes > max_bytes:
        return f"Ingest would refuse: more than --max-bytes {byte_text(max_bytes)}."
    if found.total_bytes > 0.8 * found.free_bytes:
        return "Ingest would refuse: more than 80 % of the free space."
    return ""
