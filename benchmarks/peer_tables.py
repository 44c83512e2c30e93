"""Markdown tables of the peers' reports: ``python -m benchmarks.peer_tables FILE…``."""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any, Literal

__all__ = ["aim_table", "read_table", "tables", "timing_table"]

_SIDES = (
    "actstore",
    "actstore, SQL",
    "memmap + numpy",
    "torch streaming",
    "zarr-python",
    "DuckDB over Parquet",
    "DuckDB's own file",
)


def tables(report: dict[str, Any]) -> str:
    """All tables of a report, and what indexes cost."""
    costs = json.dumps(report["facts"].get("costs", {}), indent=1, ensure_ascii=False)
    head = f"{report['parameters']['array']}; load {report['machine']['load_average']}"
    parts = [*(timing_table(report, state) for state in ("cold", "warm")), read_table(report)]
    return "\n\n".join([head, *parts, aim_table(report), costs])


def timing_table(report: dict[str, Any], state: Literal["cold", "warm"]) -> str:
    """A row a question, a column a side: median wall time, and median CPU time in brackets."""
    timings = {entry["name"]: entry for entry in report["timings"]}
    questions = _questions(report)
    sides = [side for side in _SIDES if any(f"{q}: {side}, {state}" in timings for q in questions)]
    floors = ["its reads at once", "values at disk rate"] if state == "cold" else []
    lines = _head([state, *sides, *floors])
    for question, facts in questions.items():
        cells = [_cell(timings.get(f"{question}: {side}, {state}")) for side in sides]
        if state == "cold":
            cells.append(_cell(timings.get(f"{question}: its reads at once, cold")))
            cells.append(_duration(facts["floor, s: those bytes at the disk's rate"]))
        lines.append(_row([question, *cells]))
    return "\n".join(lines)


def read_table(report: dict[str, Any]) -> str:
    """A row a question: our plan, pages and reads, and what each side had from the disk."""
    questions = _questions(report)
    moved = [facts["bytes from disk, cold"] for facts in questions.values()]
    sides = [side for side in _SIDES if any(side in counts for counts in moved)]
    lines = _head(["from disk, cold", "plan", "pages, mean (most)", "reads", *sides])
    for question, facts in questions.items():
        pages = f"{facts.get('pages read, mean', '')} ({facts.get('pages read, most', '')})"
        counts = facts["bytes from disk, cold"]
        cells = [_size(counts[side]) if side in counts else "" for side in sides]
        plan = ", ".join(facts.get("plans", ()))
        lines.append(_row([question, plan, pages, f"{facts['reads, mean']:.0f}", *cells]))
    return "\n".join(lines)


def aim_table(report: dict[str, Any]) -> str:
    """What was asked for, what was found."""
    lines = _head(["aim", "found", "asked", ""])
    for aim in report["facts"].get("aims", ()):
        unit = aim["unit"]
        met = "met" if aim["met"] else "missed"
        lines.append(
            _row([aim["what"], f"{aim['found']:.3g} {unit}", f"≤ {aim['at most']} {unit}", met])
        )
    for ratio in report["ratios"]:
        if ratio["aim"] is not None:
            met = "met" if ratio["met"] else "missed"
            value = f"{ratio['value']:.3g} ({ratio['low']:.3g} to {ratio['high']:.3g})"
            sign = "≥" if ratio["at_least"] else "≤"
            lines.append(_row([ratio["name"], value, f"{sign} {ratio['aim']:g}", met]))
    return "\n".join(lines)


def _questions(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: facts
        for name, facts in report["facts"].items()
        if isinstance(facts, dict) and "bytes of all values asked about" in facts
    }


def _head(names: list[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(timing: dict[str, Any] | None) -> str:
    """Median wall time, and the median of CPU time behind it."""
    if timing is None:
        return ""
    return f"{_duration(timing['median'])} ({_duration(median(timing['cpu']))})"


def _duration(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def _size(count: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def main() -> None:
    """Print the tables of every report in the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_tables")
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        for report in json.loads(file.read_text()):
            print(tables(report), end="\n\n")


if __name__ == "__main__":
    main()
