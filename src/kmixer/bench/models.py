"""Training steps, decoding and memory of whole models, beside a transformer of equal size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kmixer.bench.measure import peak_of, peak_resident_bytes, time_calls
from kmixer.errors import InputError
from kmixer.generation.decoder import open_decoder
from kmixer.generation.prepared import PreparedDecoder
from kmixer.models import CausalLM, ModelConfig, transformer_like
from kmixer.runs.recipe import LanguageRecipe, TrainingConfig, load_language_recipe
from kmixer.training.optimizers import build_optimizers
from kmixer.training.process import settle_process

ModelName = Literal["recipe", "transformer"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainingSpeed:
    """Training steps of a model on its recipe's batch."""

    recipe: str
    model: ModelName
    parameters: int
    batch_size: int
    window: int
    precision: Precision
    first_call_seconds: float
    step_seconds: float
    tokens_per_second: float
    part_of_roof: float | None  # None where no roof was measured


@dataclass(frozen=True)
class DecodingSpeed:
    """Greedy decoding after a context."""

    recipe: str
    model: ModelName
    batch_size: int
    context: int
    prepared: bool
    seconds_to_first_token: float
    tokens_per_second: float
    second_half_over_first: float  # of the seconds: 1 where time per token does not grow


@dataclass(frozen=True)
class TrainingMemory:
    """The peak of a process that trains, less that of importing."""

    recipe: str
    settings: list[str]
    model: ModelName
    peak_bytes: int


def build(recipe: LanguageRecipe, model: ModelName) -> CausalLM:
    """The recipe's model, or the transformer of equal width, depth and parameters."""
    torch.manual_seed(0)
    vocabulary = recipe.tokenizer.vocabulary_size
    if model == "recipe":
        return CausalLM(recipe.model, vocabulary)
    if not isinstance(recipe.model, ModelConfig):
        raise InputError(f"recipe {recipe.name} is a transformer already; time it with --model recipe")
    return CausalLM(transformer_like(recipe.model, vocabulary), vocabulary)


def training_step(
    network: CausalLM, config: TrainingConfig, tokens: Tensor, precision: Precision = "float32"
) -> Callable[[], None]:
    """A call that makes one step on a batch (b, window + 1): forward, backward, clipping, optimiser."""
    optimizers = build_optimizers(network, config)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            losses = network(tokens[:, :-1], targets=tokens[:, 1:]).losses
            assert losses is not None
            loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def bench_train(
    recipe: LanguageRecipe,
    model: ModelName,
    precision: Precision,
    repeats: int,
    flops: float | None = None,
    longest: float = float("inf"),
) -> TrainingSpeed:
    """Seconds of a training step (forward, backward, clipping, optimiser) on the recipe's batch.

    The roof is 6 floating-point operations a parameter and token at the measured matmul rate `flops`.
    Where the first step takes more than `longest` seconds, it is the only one.
    """
    config = recipe.training
    network = build(recipe, model)
    tokens = torch.randint(network.vocabulary_size, (config.batch_size, config.window + 1))
    timing = time_calls(training_step(network, config, tokens, precision), repeats, longest)
    parameters = sum(p.numel() for p in network.parameters())
    rate = config.batch_size * config.window / timing.median
    return TrainingSpeed(
        recipe=recipe.name,
        model=model,
        parameters=parameters,
        batch_size=config.batch_size,
        window=config.window,
        precision=precision,
        first_call_seconds=timing.first,
        step_seconds=timing.median,
        tokens_per_second=rate,
        part_of_roof=None if flops is None else rate * 6 * parameters / flops,
    )


@torch.inference_mode()
def bench_decode(recipe: LanguageRecipe, model: ModelName, batch_size: int, context: int, tokens: int) -> DecodingSpeed:
    """Tokens per second of greedy decoding after a context, and the time to the first token of it."""
    network = build(recipe, model).eval()
    prompt = torch.randint(network.vocabulary_size, (batch_size, context))
    first = time_calls(lambda: network(prompt), 3).median
    output = network(prompt)
    state = output.state
    assert output.logits is not None
    token = output.logits[:, -1].argmax(-1)
    decoder = open_decoder(network, state)
    halves = []
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(tokens // 2):
            token = decoder.step(token).argmax(-1)
        halves.append(time.perf_counter() - began)
    return DecodingSpeed(
        recipe=recipe.name,
        model=model,
        batch_size=batch_size,
        context=context,
        prepared=isinstance(decoder, PreparedDecoder),
        seconds_to_first_token=first,
        tokens_per_second=tokens // 2 * 2 * batch_size / sum(halves),
        second_half_over_first=halves[1] / halves[0],
    )


def bench_memory(recipe: str, settings: list[str], model: ModelName) -> TrainingMemory:
    """Peak resident memory of a process that makes two training steps, less that of importing."""
    program = "from kmixer.bench.models import print_peak; import sys; print_peak(*sys.argv[1:])"
    return TrainingMemory(recipe, settings, model, peak_of(program, recipe, model, *settings))


def print_peak(recipe: str, model: ModelName, *settings: str) -> None:
    """The process `bench_memory` starts."""
    settle_process()
    before = peak_resident_bytes()
    bench_train(load_language_recipe(recipe, list(settings)), model, "float32", 1)
    print(peak_resident_bytes() - before)
