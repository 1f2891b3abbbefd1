"""Models of about equal size from other libraries beside ours: training steps and decoding on a CPU, one thread.

    pip install transformers
    python benchmarks/peers.py --out docs/benchmarks/peers.json

About 0.8 M parameters, positions aside: the recipe `k-operators-v2-shakespeare` with a base kernel that streams,
GPT-2 and Mamba of transformers, an LSTM of torch. Random tokens of a vocabulary of 65. Every figure is a median over
rounds in which the models take turns; ratios to ours are the claim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from kmixer.files import write_json
from kmixer.generation.streaming import generate_tokens
from kmixer.models import CausalLM
from kmixer.runs.recipe import load_language_recipe
from kmixer.runs.run_folder import environment
from kmixer.training.process import settle_process

VOCABULARY, WIDTH = 65, 128
TOKENS_PER_STEP = 2048


class Lstm(nn.Module):
    """Embedding, LSTM layers, tied read-out."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, layers, batch_first=True)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.lstm(self.embedding(tokens), state)
        return F.linear(hidden, self.embedding.weight), state


def ours() -> CausalLM:
    recipe = load_language_recipe(
        "k-operators-v2-shakespeare", ["model.base_kernel.kind=conv", "model.base_kernel.size=8"]
    )
    return CausalLM(recipe.model, VOCABULARY)


def gpt2(positions: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
        n_positions=positions,
        n_embd=WIDTH,
        n_layer=4,
        n_head=4,
    )
    return GPT2LMHeadModel(config)


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=7, bos_token_id=None, eos_token_id=None)
    )


def losses_of(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the targets, by each library's own way."""
    if name == "kmixer":
        losses: Tensor = model(inputs, targets=targets).losses
        return losses.mean()
    output = model(inputs)
    logits = output[0] if name == "torch LSTM" else output.logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training_step(name: str, model: nn.Module, window: int) -> Callable[[], None]:
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(VOCABULARY, (TOKENS_PER_STEP // window, window + 1))
    model.train()

    def step() -> None:
        losses_of(name, model, tokens[:, :-1], tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.inference_mode()
def decode(name: str, model: nn.Module, prompt: Tensor, count: int) -> float:
    """Seconds per token of greedy decoding after a prompt, the prompt not counted."""
    model.eval()
    if name == "kmixer":
        assert isinstance(model, CausalLM)
        from kmixer.generation.sampling import Sampling

        tokens = generate_tokens(model, prompt, count + 1, Sampling(temperature=0))
        next(tokens)
        began = time.perf_counter()
        for _ in tokens:
            pass
        return (time.perf_counter() - began) / count
    if name == "torch LSTM":
        logits, state = model(prompt)
        began = time.perf_counter()
        for _ in range(count):
            logits, state = model(logits[:, -1:].argmax(-1), state)
        return (time.perf_counter() - began) / count
    key = "cache_params" if name == "transformers Mamba" else "past_key_values"
    output = model(prompt, use_cache=True)
    began = time.perf_counter()
    for _ in range(count):
        output = model(output.logits[:, -1:].argmax(-1), use_cache=True, **{key: output[key]})
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settle_process()
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        "kmixer": ours(),
        "transformers GPT-2": gpt2(2 * options.context),
        "transformers Mamba": mamba(),
        "torch LSTM": Lstm(6),
    }
    rows: dict[str, dict[str, Any]] = {
        name: {"parameters": sum(p.numel() for p in model.parameters())} for name, model in models.items()
    }
    for window in (256, 1024):
        steps = {name: training_step(name, model, window) for name, model in models.items()}
        times = in_turn(steps, options.rounds)
        for name in models:
            rows[name][f"trained_tokens_per_second_window_{window}"] = TOKENS_PER_STEP / times[name]
    prompt = torch.randint(VOCABULARY, (1, options.context))
    decoded: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            decoded[name].append(decode(name, model, prompt, 128))
    for name in models:
        rows[name]["decoded_tokens_per_second"] = 1 / statistics.median(decoded[name])
    for name, row in rows.items():
        print(f"{name:20}", "  ".join(f"{key} {value:,.0f}" for key, value in row.items()))
    if options.out is not None:
        write_json(options.out, {"environment": environment(torch.device("cpu")), "rows": rows})
    else:
        print(json.dumps(rows, indent=2))


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of every call, in rounds of one call after the other; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
