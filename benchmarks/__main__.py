"""``python -m benchmarks NAME [--size S] [--json FILE]``."""

import argparse
import json
from importlib import import_module
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.harness import Options, can_drop_caches, render


def main() -> None:
    """Run one benchmark, or all, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--size", type=int, help="1 is a few seconds; the full size by default")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument(
        "--keep-caches",
        action="store_true",
        help="cold reads evict the files involved, and never the kernel's whole page cache",
    )
    arguments = parser.parse_args()
    drop_caches = can_drop_caches() and not arguments.keep_caches
    options = Options(arguments.seed, drop_caches, arguments.threads)
    results = []
    for name in BENCHMARKS if arguments.name == "all" else (arguments.name,):
        module = import_module(f"benchmarks.{name}")
        result = module.run(arguments.size or module.FULL_SIZE, options)
        results.append(result.to_json())
        print(render(result), end="\n\n", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
