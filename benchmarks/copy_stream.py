"""Stream a million tokens of text that does not repeat through a model that copies: memory must stay flat.

    python benchmarks/copy_stream.py runs/copying --text plays.txt --memory 65536 --tokens 1000000
    python benchmarks/copy_stream.py runs/copying --text stories.txt articles.txt --memory 65536 --drop-unknown

Reads the beginning of the texts, one after the other, as one sequence with the state carried throughout. They must be
long enough: what is read again would be copied. As the tenths are different text, each is then also read alone, from an
empty state, to compare with. Prints resident memory and cross-entropy by tenths, and JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import kmixer
from kmixer.bench.measure import resident_megabytes
from kmixer.data.reading import Block, text_source
from kmixer.data.tokenizers import ByteTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.language_model import LanguageModel
from kmixer.measure.evaluation import stream_losses
from kmixer.runs.environment import environment

CHUNKS = 25  # forward passes a tenth


def read_tokens(sources: list[str], tokenizer: Tokenizer, count: int, *, drop_unknown: bool) -> tuple[Tensor, int]:
    """The first tokens of the texts, in memory as a mapped file would count while it is read; characters dropped."""
    encode = tokenizer.encoder()
    pieces, dropped = [], 0
    for block in _blocks(sources, raw=isinstance(tokenizer, ByteTokenizer)):
        if isinstance(tokenizer, ByteTokenizer) or isinstance(block, bytes):
            pieces.append(torch.from_numpy(ByteTokenizer().encode(block)))
        else:
            unknown = tokenizer.unknown(block) if drop_unknown else []
            known = block.translate(dict.fromkeys(map(ord, unknown)))
            dropped += len(block) - len(known)
            pieces.append(torch.from_numpy(encode(known, False)))
        if sum(map(len, pieces)) >= count:
            return torch.cat(pieces)[:count].clone(), dropped
    raise InputError(
        f"the texts have {sum(map(len, pieces)):,} tokens; {count:,} are needed: give more text or fewer --tokens"
    )


def _blocks(sources: list[str], *, raw: bool) -> Iterator[Block]:
    for source in sources:
        with text_source(source, raw=raw) as blocks:
            yield from blocks


def mean_loss(model: LanguageModel, tokens: Tensor) -> float:
    sums = [float(block.double().sum()) for block in stream_losses(model, tokens)]
    return sum(sums) / (len(tokens) - 1)


def stream_by_tenths(model: LanguageModel, tokens: Tensor, length: int) -> list[dict[str, float]]:
    """Mean loss of every tenth, of `length` tokens, and resident memory at its end."""
    tenths: list[dict[str, float]] = []
    total = 0.0
    for number, block in enumerate(stream_losses(model, tokens, chunk=length // CHUNKS), start=1):
        total += float(block.double().sum())
        if number % CHUNKS == 0:
            tenths.append(
                {
                    "tokens": (len(tenths) + 1) * length,
                    "loss": total / length,
                    "resident_megabytes": resident_megabytes(),
                }
            )
            print("{tokens:>10,} tokens  loss {loss:.4f}  resident {resident_megabytes:.1f} MB".format(**tenths[-1]))
            total = 0.0
    return tenths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="a multiple of 250 is read")
    parser.add_argument("--memory", type=int, help="tokens that are remembered; default: as the model was trained")
    parser.add_argument("--drop-unknown", action="store_true", help="drop characters that the tokenizer does not know")
    arguments = parser.parse_args()
    try:
        model = kmixer.load(arguments.run, memory=arguments.memory)
        if model.config.copy_memory is None or model.tokenizer is None:
            raise InputError(f"{arguments.run} has no copy memory; benchmarks/stream.py measures it")
        length = max(1, arguments.tokens // (10 * CHUNKS)) * CHUNKS
        tokens, dropped = read_tokens(
            arguments.text, model.tokenizer, 10 * length + 1, drop_unknown=arguments.drop_unknown
        )
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    remembered = model.config.copy_memory.memory
    print(f"memory of {'all' if remembered is None else f'{remembered:,}'} tokens; {dropped:,} characters dropped")
    with torch.no_grad():
        tenths = stream_by_tenths(model, tokens, length)
        for index, tenth in enumerate(tenths):
            tenth["loss_alone"] = mean_loss(model, tokens[index * length : (index + 1) * length + 1])
    worse = [tenth["loss"] - tenth["loss_alone"] for tenth in tenths]
    print("loss minus that of the tenth alone  " + "  ".join(f"{value:+.4f}" for value in worse))
    resident = [tenth["resident_megabytes"] for tenth in tenths]
    result = {
        "memory": remembered,
        "dropped_characters": dropped,
        "tenths": tenths,
        "memory_spread": max(resident) / min(resident) - 1,
        "loss_of_last_tenth_minus_second": tenths[-1]["loss"] - tenths[1]["loss"],
        "the_same_beside_each_alone": worse[-1] - worse[1],
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
