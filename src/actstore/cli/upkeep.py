"""Commands that look after a store: `verify` and `compact`."""

import typer
from rich.text import Text

from actstore.cli.display import byte_text, count_text, visible
from actstore.cli.options import AsReport, Quiet, StorePath
from actstore.cli.output import console, print_json, reports_errors
from actstore.cli.progress import PhaseProgress

__all__ = ["compact", "verify"]


@reports_errors
def verify(store: StorePath, as_json: AsReport = False, quiet: Quiet = False) -> None:
    """Read every byte of a store against its checksum; exit 1 if something is wrong."""
    from actstore.store.verification import verify_store

    with PhaseProgress("files", quiet=quiet) as progress:
        report = verify_store(store, lambda done, total: progress("verify", done, total))
        progress("verify", report.files, report.files)
    if as_json:
        print_json(report.to_json())
    else:
        shown = console()
        read = f"{count_text(report.files)} files, {byte_text(report.bytes)} read"
        if report.findings:
            for one in report.findings:
                # Not a table: a name that is cut short names nothing.
                line = f"{one.problem:>8}  {visible(one.path)}  ({visible(one.detail)})"
                shown.print(line, soft_wrap=True)
            count = len(report.findings)
            noun = "file is" if count == 1 else "files are"
            shown.print(Text(f"{read}; {count} {noun} damaged, missing or unknown", "bold red"))
        else:
            shown.print(f"{read}; all sound")
        if report.temporary:
            shown.print(
                f"{count_text(len(report.temporary))} temporary files of writers that are at work "
                f"or died; the next ingest removes those of the dead: "
                f"{visible(report.temporary[0])} …"
            )
    if not report.ok:
        raise typer.Exit(1)


@reports_errors
def compact(store: StorePath, as_json: AsReport = False) -> None:
    """Merge what queries need of all segments into one index and one catalog."""
    from dataclasses import asdict

    from actstore.store.reader import StoreReader
    from actstore.store.snapshot import compact as compact_store

    reader = StoreReader(store)
    try:
        result = compact_store(reader)
    finally:
        reader.close()
    if as_json:
        print_json(asdict(result))
        return
    shown = console()
    kept = [*result.indexes, *([result.snapshot] if result.snapshot else [])]
    for path in kept:
        shown.print(f"{byte_text((store / path).stat().st_size):>10}  {visible(path)}")
    removed = len(result.removed)
    shown.print(
        f"{len(kept)} files cover all {count_text(len(reader.segments))} segments; "
        f"{removed} superseded {'file' if removed == 1 else 'files'} removed"
    )
