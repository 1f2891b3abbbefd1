"""Peak memory and time of preparing a corpus, with and without blanks: they must not grow with the text.

    python benchmarks/data_memory.py
    python benchmarks/data_memory.py --megabytes 16 64 --kinds char bpe

Every text and tokenizer is prepared in a process of its own, with a fresh cache. Prints megabytes and seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("char", "byte", "bpe", "sentencepiece")
PROGRAM = """
import resource, sys, time
from kmixer.data.config import DataConfig, TokenizerConfig
from kmixer.data.token_files import prepare_dataset
kind, path = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
prepare_dataset(DataConfig(corpus=path), TokenizerConfig(kind=kind, vocabulary_size=256 if kind == "byte" else 1000))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{peak / 1024:8.0f} MB, of which {before / 1024:.0f} before, in {time.perf_counter() - began:6.1f} s")
"""


def write_text(path: Path, megabytes: int, blanks: bool) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 10))) for _ in range(20_000)]
    with path.open("w") as file:
        for _ in range(4 * megabytes):
            text = " ".join(rng.choices(words, k=50_000)) if blanks else "".join(rng.choices("ACGT", k=1 << 18))
            file.write(text[: (1 << 18) - 1] + "\n" if blanks else text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for blanks in (False, True):
            for megabytes in arguments.megabytes:
                path = Path(folder) / "text.txt"
                write_text(path, megabytes, blanks)
                for kind in arguments.kinds:
                    with tempfile.TemporaryDirectory(dir=folder) as cache:
                        answer = subprocess.run(
                            [sys.executable, "-c", PROGRAM, kind, str(path)],
                            env={**os.environ, "XDG_CACHE_HOME": cache},
                            capture_output=True,
                            text=True,
                            check=True,
                        )
                    what = "with blanks" if blanks else "one line"
                    print(f"{megabytes:4} MB {what:12} {kind:14} {answer.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
