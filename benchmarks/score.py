"""Score a large log on one core: tokens per second beside those of eval, and resident memory over time.

    python benchmarks/score.py --megabytes 100
    python benchmarks/score.py --megabytes 8 --tokens-of-eval 500000

Writes a log of regular lines with 20 planted anomalies among them, trains a small byte model on other such lines (or
takes --run), measures the speed of `kmixer eval --text` by windows and as a stream on the beginning of the log, and
then scores all of it line by line, as `kmixer score` does. Prints ten lines and JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import kmixer
from kmixer.bench.measure import resident_megabytes
from kmixer.data.batches import random_windows
from kmixer.data.reading import Block, text_source
from kmixer.data.token_files import tokenise
from kmixer.data.tokenizers import ByteTokenizer
from kmixer.language_model import LanguageModel
from kmixer.measure.evaluation import Protocol, evaluate
from kmixer.measure.score import Summary, score_lines
from kmixer.runs.recipe import load_language_recipe

ANOMALIES = 20
WORDS = ["kernel panic", "out of memory", "disk error on device", "connection refused by peer", "checksum mismatch"]


def regular_line(rng: random.Random) -> str:
    action = rng.choice(["opened", "closed", "read", "wrote"])
    return f"worker {rng.randrange(8)} {action} file {rng.randrange(100)} in {rng.randrange(10)} ms\n"


def write_log(path: Path, megabytes: float) -> list[int]:
    """A log of that size; the numbers of its anomalous lines, from 1."""
    rng = random.Random(1)
    block = [regular_line(rng) for _ in range(20_000)]
    lines = round(megabytes * 1e6 / (sum(map(len, block)) / len(block)))
    planted = set(rng.sample(range(1000, lines), ANOMALIES))
    with path.open("w") as file:
        for number in range(lines):
            regular = block[rng.randrange(len(block))]
            file.write(f"{rng.choice(WORDS)} {rng.randrange(1000)}\n" if number in planted else regular)
    return sorted(number + 1 for number in planted)


def train_small() -> LanguageModel:
    rng = random.Random(0)
    torch.manual_seed(0)
    settings = ["model.width=48", "model.layers=2", "model.rank=4", "model.decay.range=[0.05,0.95]"]
    recipe = load_language_recipe("shakespeare-quick", settings)
    tokenizer = ByteTokenizer()
    model = LanguageModel(recipe.model, 256, tokenizer).train()
    tokens = torch.from_numpy(tokenizer.encode("".join(regular_line(rng) for _ in range(4000))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 200)
        x, y = random_windows(tokens, 128, 8, generator)
        losses = model(x, targets=y).losses
        assert losses is not None
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return model.eval()


def beginning(blocks: Iterator[Block], length: int) -> Iterator[Block]:
    for block in blocks:
        yield block[:length]
        length -= len(block)
        if length <= 0:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--tokens-of-eval", type=int, default=2_000_000)
    parser.add_argument("--run", type=Path, help="A byte or character model; default: a small one, trained first.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = kmixer.load(arguments.run) if arguments.run else train_small()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    raw = isinstance(tokenizer, ByteTokenizer)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        planted = write_log(log, arguments.megabytes)
        speeds: dict[str, float] = {}
        with text_source(str(log), raw=raw) as blocks:
            split = tokenise(beginning(blocks, arguments.tokens_of_eval), tokenizer)
        protocols: tuple[Protocol, ...] = ("windows", "stream")
        for protocol in protocols:
            began = time.perf_counter()
            tokens = evaluate(model, split, protocol, 1024).tokens
            speeds[protocol] = tokens / (time.perf_counter() - began)
        del split
        summary, rows = Summary(ANOMALIES), []
        size, began, then, before = log.stat().st_size, time.perf_counter(), time.perf_counter(), 0
        with text_source(str(log), raw=raw) as blocks:
            for line in score_lines(model, tokenizer, blocks):
                summary.add(line)
                if summary.bytes >= size * (len(rows) + 1) / 10:
                    now = time.perf_counter()
                    speed = (summary.tokens - before) / (now - then)
                    rows.append({"bytes": summary.bytes, "speed": speed, "resident_megabytes": resident_megabytes()})
                    then, before = now, summary.tokens
                    print(
                        f"{summary.bytes:>12,} bytes  {speed:>9,.0f} tokens/s  {resident_megabytes():7.1f} MB",
                        flush=True,
                    )
        speed = summary.tokens / (time.perf_counter() - began)
    print(json.dumps({
        "megabytes": arguments.megabytes,
        "score": speed,
        "eval": speeds,
        "eval_over_score": {protocol: value / speed for protocol, value in speeds.items()},
        "resident_megabytes": [row["resident_megabytes"] for row in rows],
        "anomalies_among_the_most_surprising": len(
            set(planted) & {line.number for line in summary.most_surprising()}
        ),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
