"""Benchmarks, run by hand: ``python -m benchmarks NAME`` from the repository's root.

Each compares with a floor that is measured in the same run: what a disk, a plain ``pread``
or a bare forward pass would take. Ratios travel between machines, seconds do not.
"""

BENCHMARKS = (
    "write",
    "rows",
    "topk",
    "hooks",
    "memory",
    "ingest",
    "derive",
    "cache",
    "segments",
    "peers",
    "peer_model",
    "service",
)
"""The benchmarks' names; each is a module with ``FULL_SIZE`` and ``run(size, options)``."""
