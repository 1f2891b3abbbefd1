"""Speculative decoding on a run: what a chunk costs, how often a draft is right, and the gain, predicted and measured.

A section measures one part and returns its rows; `bench_speculation` runs them all.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kmixer.errors import InputError
from kmixer.generation.acceptance import acceptance, coupled_acceptance
from kmixer.generation.chunks import open_reader
from kmixer.generation.decoder import EagerDecoder
from kmixer.generation.drafts import Draft
from kmixer.generation.reading import PREFILL_CHUNK
from kmixer.generation.sampling import Sampling, one_hot
from kmixer.generation.speculation import Speculation
from kmixer.generation.speculative import Rounds
from kmixer.generation.streaming import before_last, generate_tokens
from kmixer.generation.tally import SpeculationResult, rule_of
from kmixer.generation.tempo import FIRST, Costs, gain_of, measure_costs
from kmixer.models.causal_lm import CausalLM

# Numbers of all rows where acceptance takes v^2 of a row.
LAW_NUMBERS = 1 << 28


@dataclass(frozen=True)
class SpeculationSizes:
    """How much is measured."""

    context: int = 256  # tokens of the prompt, from the text
    positions: int = 3000  # at which the draft is compared with the model
    tokens: int = 400  # generated, by every number of drafted tokens
    drafted: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)  # m
    repeats: int = 3

    def check(self) -> None:
        """Raises InputError for a size that is none."""
        for name, value in dataclasses.asdict(self).items():
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise InputError(f"{name}: got {value}; allowed: 1 or more")


def bench_speculation(
    model: CausalLM,
    make_draft: Callable[[], Draft],
    text: Int[Tensor, " t"],
    speculation: Speculation,
    sampling: Sampling,
    sizes: SpeculationSizes,
) -> list[dict[str, Any]]:
    """Rows of every section: "cost" by n tokens read, "acceptance" on the text, "gain" by m drafted tokens.

    Args:
        model: in evaluation mode.
        make_draft: a draft of its own for every decoding.
        text: held out; a prompt, and then what draft and model are compared on, as far as it goes.
        speculation, sampling: how it is decoded; the number of tokens in `speculation` is not used.
        sizes: how much.

    Raises:
        InputError: a text that is no longer than the prompt, or a model that ends before so many tokens.
    """
    if len(text) <= sizes.context:
        raise InputError(
            f"bench speculate: got a text of {len(text):,} tokens; allowed: more than --context, {sizes.context:,}"
        )
    prompt = text[None, : sizes.context]
    costs, cost_rows = bench_costs(model, prompt, sampling, sizes.drafted)
    right = bench_acceptance(model, make_draft(), text[: sizes.context + sizes.positions], speculation, sampling, sizes)
    return [*cost_rows, right, *bench_gain(model, make_draft, prompt, speculation, sampling, sizes, costs, right)]


def bench_costs(
    model: CausalLM, prompt: Tensor, sampling: Sampling, drafted: tuple[int, ...]
) -> tuple[Costs, list[dict[str, Any]]]:
    """Seconds of reading n tokens, and of the filters and rows of n, beside a step and a draw."""
    counts = sorted({1, *(m + 1 for m in drafted)})
    with torch.inference_mode():
        reader = open_reader(model, before_last(model, prompt))
        costs = measure_costs(reader, prompt[:, -1], sampling, counts)
        logits = reader.advance(prompt[:, -1:].repeat(1, counts[-1]))
        rows = []
        for n in counts:
            began = time.perf_counter()
            sampling.rows(logits[:, :n])
            filtered = time.perf_counter() - began
            relative = costs.read[n] / costs.plain
            rows.append(
                {"section": "cost", "n": n, "seconds": costs.read[n], "relative": relative, "rows_seconds": filtered}
            )
    return costs, [{"section": "cost", "n": 0, "seconds": costs.plain, "relative": 1.0}, *rows]


def bench_acceptance(
    model: CausalLM,
    draft: Draft,
    text: Int[Tensor, " t"],
    speculation: Speculation,
    sampling: Sampling,
    sizes: SpeculationSizes,
) -> dict[str, Any]:
    """How much of the draft's probability is kept where both have read the text, at every position behind the prompt.

    Returns a row: "proposed", at which part of the positions the draft has anything to say, and of those the mean
    acceptance: "exact" is sum_n min(p_n, q_n), "coupled" that of equal random numbers, "independent" sum_n p_n q_n,
    that two draws are equal, "rule" that of the chosen rule.
    """
    limit = model.config.max_positions
    text = text if limit is None else text[:limit]
    start = sizes.context
    p, at = _forced_rows(draft, text, start, sampling, model.vocabulary_size)
    with torch.inference_mode():
        decoder = EagerDecoder(model, model.initial_state(1))
        logits = torch.cat([decoder.advance(piece) for piece in text[None].split(PREFILL_CHUNK, dim=1)], 1)
        q = sampling.rows(logits[0, start - 1 : -1])[at]
    few = slice(0, max(16, LAW_NUMBERS // q.shape[-1] ** 2))
    exact = torch.minimum(p, q).sum(-1)
    coupled = coupled_acceptance(p[few], q[few])
    if speculation.rule in ("exact", "block") or sampling.temperature == 0:
        chosen = exact
    elif speculation.rule == "coupled":
        chosen = coupled
    else:
        chosen = acceptance(rule_of(speculation, sampling), p[few], q[few])
    figures = {"exact": exact, "coupled": coupled, "independent": (p * q).sum(-1), "rule": chosen}
    return {
        "section": "acceptance",
        "positions": len(text) - start,
        "proposed": len(at) / max(1, len(text) - start),
        **{name: float(values.mean()) if len(at) else None for name, values in figures.items()},
    }


def bench_gain(
    model: CausalLM,
    make_draft: Callable[[], Draft],
    prompt: Int[Tensor, "1 t"],
    speculation: Speculation,
    sampling: Sampling,
    sizes: SpeculationSizes,
    costs: Costs,
    right: dict[str, Any],
) -> list[dict[str, Any]]:
    """Tokens per second by m beside plain decoding, timed in turn; predicted from costs and a first run's draft."""
    _decode(model, make_draft(), prompt, _with(speculation, FIRST), sampling, FIRST)  # warms up
    first = _decode(model, make_draft(), prompt, _with(speculation, FIRST), sampling, sizes.tokens)
    draft = first.seconds.draft / max(1, first.drafted)
    overhead = (first.seconds.rule + first.seconds.rollback) / max(1, first.rounds)
    seconds: dict[Any, list[float]] = {}
    ms: tuple[Any, ...] = (*sizes.drafted, "auto")
    for _ in range(sizes.repeats):
        seconds.setdefault("plain", []).append(_plain_seconds(model, prompt, sampling, sizes.tokens))
        for m in ms:
            rounds = Rounds(model, make_draft(), prompt, sizes.tokens, _with(speculation, m), sampling, seed=0)
            rounds.state()  # the prompt is read
            began = time.perf_counter()
            deque(rounds.columns(), maxlen=0)
            seconds.setdefault(m, []).append(time.perf_counter() - began)
    rows = []
    for m in ms:
        result = _decode(model, make_draft(), prompt, _with(speculation, m), sampling, sizes.tokens)
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[m], strict=True)]
        figures = result.to_json()
        spent = {f"{name}_seconds": value for name, value in figures.pop("seconds").items()}
        rows.append(
            {
                **figures,
                **spent,
                "section": "gain",
                "m": m,
                "predicted": None if m == "auto" else _predicted(costs, m, right, draft, overhead),
                "measured": statistics.median(ratios),
                "tokens_per_second": sizes.tokens / statistics.median(seconds[m]),
                "plain_tokens_per_second": sizes.tokens / statistics.median(seconds["plain"]),
                "draft_token_seconds": draft,
                "overhead_seconds": overhead,
            }
        )
    return rows


def _predicted(costs: Costs, m: int, right: dict[str, Any], draft: float, overhead: float) -> float | None:
    """The gain of a draft that proposes at part of the rounds only, the others being plain steps."""
    if right["rule"] is None:
        return None
    share = right["proposed"]
    emitted = sum(right["rule"] ** i for i in range(m + 1))
    seconds = emitted * costs.plain / gain_of(costs, m, right["rule"], draft, overhead)
    return (share * emitted + 1 - share) * costs.plain / (share * seconds + (1 - share) * costs.plain)


def _with(speculation: Speculation, m: Any) -> Speculation:
    return dataclasses.replace(speculation, tokens=m)


def _decode(
    model: CausalLM, draft: Draft, prompt: Tensor, speculation: Speculation, sampling: Sampling, count: int
) -> SpeculationResult:
    rounds = Rounds(model, draft, prompt, count, speculation, sampling, seed=0, tally=True)
    return rounds.result(torch.stack(list(rounds.columns()), 1))


def _plain_seconds(model: CausalLM, prompt: Tensor, sampling: Sampling, count: int) -> float:
    """Of so many tokens, after one that waits for the prompt."""
    columns = generate_tokens(model, prompt, count + 1, sampling, seed=0)
    next(columns)
    began = time.perf_counter()
    deque(columns, maxlen=0)
    return time.perf_counter() - began


def _forced_rows(
    draft: Draft, text: Tensor, start: int, sampling: Sampling, vocabulary_size: int
) -> tuple[Tensor, Tensor]:
    """The draft's rows for the tokens from `start` on, having read those before; and which of them it has one for."""

    def draw(logits: Tensor, index: int) -> tuple[Tensor, Tensor]:
        rows = sampling.rows(logits)
        return rows.argmax(-1), rows

    proposals, at = [], []
    nothing_kept = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        draft.start(text[None, :start])
        for index, token in enumerate(text[start:].split(1)):
            proposed, rows = draft.propose(1, draw)
            if proposed.shape[1]:
                proposals.append(one_hot(proposed[0, 0], vocabulary_size) if rows is None else rows[0, 0])
                at.append(index)
            draft.commit(nothing_kept, token)
    p = torch.stack(proposals) if proposals else torch.zeros(0, vocabulary_size, dtype=torch.float64)
    return p, torch.tensor(at, dtype=torch.int64)
