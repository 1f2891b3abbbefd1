"""Stream a million tokens through a run's model: memory must stay flat, and the loss must not grow.

    python benchmarks/stream.py runs/shakespeare-quick --tokens 1000000

Reads the beginning of the validation part of the run's corpus ten times over as one sequence, with the
state carried throughout: every tenth is the same text, so that their losses compare. Prints resident
memory and cross-entropy by tenths, and JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import kmixer
from kmixer.bench.measure import resident_megabytes
from kmixer.data.token_files import prepare_dataset
from kmixer.measure.evaluation import stream_losses
from kmixer.runs.environment import environment
from kmixer.runs.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    model = kmixer.load(arguments.run)
    split = prepare_dataset(RunFolder(arguments.run).read_recipe().data, model.tokenizer, arguments.data_dir).validation
    length = arguments.tokens // 10
    if len(split.tokens) < length:
        raise SystemExit(
            f"the validation part has {len(split.tokens)} tokens; --tokens {10 * len(split.tokens)} at most"
        )
    tokens = torch.cat([split.tokens[:length]] * 10 + [split.tokens[:1]])

    tenths = []
    bounds = [length * i for i in range(1, 11)]
    total, count, seen = 0.0, 0, 0
    with torch.no_grad():
        for block in stream_losses(model, tokens, chunk=max(1, length // 25)):
            total += block.double().sum().item()
            count += block.numel()
            seen += block.numel()
            if seen >= bounds[len(tenths)]:
                tenths.append({"tokens": seen, "loss": total / count, "resident_megabytes": resident_megabytes()})
                print(
                    f"{seen:>10,} tokens  loss {total / count:.4f}  resident {tenths[-1]['resident_megabytes']:.1f} MB"
                )
                total, count = 0.0, 0
    memory = [tenth["resident_megabytes"] for tenth in tenths]
    result = {
        "tenths": tenths,
        "memory_spread": max(memory) / min(memory) - 1,
        "loss_of_last_tenth_minus_second": tenths[-1]["loss"] - tenths[1]["loss"],
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
