"""Damage run files in a thousand ways and count how every command that reads a run ends.

    python -m benchmarks.fuzz --cases 1000 --seed 0

Prints a line for every defect, hang and silent acceptance, and the counts. Exit code 1 where there was a defect or a
hang, or with --strict a silent acceptance.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SLOW = ("report", "export")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="damaged files; each is tried by every quick command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow-every", type=int, default=20, help="report and export see every so many of them")
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        from tests.cli.fuzzing import COMMANDS, KINDS, LAB_FILES, RUN_FILES, Bench, Case

        bench = Bench.make(Path(folder) / "bench")
        bench.measure()
        right = {command: bench.unchanged(command) for command in COMMANDS}
        rng = random.Random(options.seed)
        counts: Counter[str] = Counter()
        accepted: Counter[tuple[str, str, str]] = Counter()
        began = time.monotonic()
        for number in range(options.cases):
            file, kind, seed = rng.choice(RUN_FILES + LAB_FILES), rng.choice(KINDS), rng.randrange(1 << 32)
            for command in ("report",) if file in LAB_FILES else COMMANDS:
                if file in RUN_FILES and command in SLOW and number % options.slow_every:
                    continue
                case = Case(command, file, kind, seed)
                verdict = bench.judge(case, right[command])
                counts[verdict.ending] += 1
                if verdict.ending in ("defect", "hang"):
                    print(f"{verdict.ending}: {case}: {verdict.said[:300]!r}", flush=True)
                if verdict.ending == "accepted":
                    accepted[command, file, kind] += 1
    for (command, file, kind), count in sorted(accepted.items()):
        print(f"accepted: {command} after {kind} of {file}: {count}")
    ended = ", ".join(f"{count:,} {ending}" for ending, count in sorted(counts.items()))
    seconds = time.monotonic() - began
    print(f"{options.cases:,} damaged files, {sum(counts.values()):,} commands in {seconds:.0f} s: {ended}")
    return int(counts["defect"] + counts["hang"] + (counts["accepted"] if options.strict else 0) > 0)


if __name__ == "__main__":
    sys.exit(main())
