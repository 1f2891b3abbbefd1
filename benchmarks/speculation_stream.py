"""Write 100,000 tokens in rounds of draft and model: memory must stay flat, and the state that of reading the text.

    python benchmarks/speculation_stream.py runs/verifier --draft ngram:5 --tokens 100000

After all rounds the same text is read again, in chunks, by the model alone. Every tensor of both states is compared:
the largest difference, as a part of the tensor's largest number. Prints resident memory and kept tokens by tenths, and
JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import kmixer
from kmixer.bench.measure import resident_megabytes
from kmixer.cli.drafting import drafts_of
from kmixer.errors import InputError
from kmixer.generation import Sampling, Speculation
from kmixer.generation.decoder import EagerDecoder
from kmixer.generation.reading import PREFILL_CHUNK
from kmixer.generation.speculative import Rounds
from kmixer.runs.environment import environment
from kmixer.state import State, tensors


def difference(state: State, expected: State) -> float:
    """The largest of all tensors, as a part of the largest number of its tensor; integers must be equal."""
    worst = 0.0
    for own, other in zip(tensors(state), tensors(expected), strict=True):
        if not own.is_floating_point():
            if not torch.equal(own, other):
                raise SystemExit("error: the states differ in positions or tokens")
            continue
        largest = float(other.abs().max())
        worst = max(worst, float((own - other).abs().max()) / largest if largest else float(own.abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draft", required=True, help="a run or a name")
    parser.add_argument("--accept", default="coupled", help="the rule")
    parser.add_argument("--m", type=int, default=4, help="drafted tokens of a round")
    parser.add_argument("--tokens", type=int, default=100_000, help="a multiple of 10 is written")
    parser.add_argument("--prompt", default="KING")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tenth = max(1, arguments.tokens // 10)
    try:
        speculation = Speculation(arguments.accept, arguments.m)
        model = kmixer.load(arguments.run)
        draft = drafts_of(model, arguments.draft, speculation)()
        assert model.tokenizer is not None
        prompt = torch.from_numpy(model.tokenizer.encode(arguments.prompt))[None]
        rounds = Rounds(model, draft, prompt, 10 * tenth, speculation, Sampling(), seed=1)
        new: list[int] = []
        tenths: list[dict[str, Any]] = []
        began = time.perf_counter()
        for column in rounds.columns():
            new.append(int(column))
            if len(new) % tenth == 0:
                rate = tenth / (time.perf_counter() - began)
                tenths.append({"tokens": len(new), "rate": rate, "resident_megabytes": resident_megabytes()})
                print(
                    "{tokens:>10,} tokens  {rate:,.0f} a second  resident {resident_megabytes:.1f} MB".format(
                        **tenths[-1]
                    )
                )
                began = time.perf_counter()
        text = torch.cat([prompt, torch.tensor([new[:-1]])], 1)
        with torch.inference_mode():
            decoder = EagerDecoder(model, model.initial_state(1))
            for piece in text.split(PREFILL_CHUNK, dim=1):
                decoder.advance(piece)
        worst = difference(rounds.state(), decoder.state())
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"state: at most {worst:.2e} of the largest number away from that of reading the text")
    memory = [part["resident_megabytes"] for part in tenths]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    result = {
        "settings": settings,
        "tenths": tenths,
        "memory_spread": max(memory) / min(memory) - 1,
        "state_difference": worst,
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
