"""Speculative decoding by rule: how much is kept, what is spent for it, what the text loses, and the speed.

    python benchmarks/speculation.py runs/verifier --draft runs/draft --draft ngram:5 --plot speculation.svg

The runs have equal tokenizers; a verifier of width 128 and a draft of width 32 are what this was made for. Every rule
continues the same prompt of the validation part, with the same seed: once to count and to measure the divergence of
what is emitted, and `--repeats` times beside plain decoding, timed in turn. Prints Markdown tables, and JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kmixer
from kmixer.bench.speculation import SpeculationSizes, bench_acceptance
from kmixer.cli.drafting import drafts_of
from kmixer.errors import InputError
from kmixer.generation import Sampling, Speculation, generate_tokens
from kmixer.generation.drafts import Draft
from kmixer.generation.speculative import Rounds
from kmixer.language_model import LanguageModel
from kmixer.measure.texts import held_out
from kmixer.runs.environment import environment
from kmixer.runs.run_folder import RunFolder

RULES: tuple[dict[str, Any], ...] = (
    {"rule": "coupled"},
    {"rule": "exact"},
    {"rule": "block"},
    *({"rule": "bounded", "bound": bound} for bound in (0.03, 0.1, 0.3)),
    *({"rule": "cactus", "delta": delta} for delta in (0.1, 0.5, 1.0)),
    *({"rule": "cactus", "delta": delta, "exact_gamma": True} for delta in (0.1, 1.0)),
    *({"rule": "interp", "mix": mix} for mix in (0.25, 0.5)),
    {"rule": "typical"},
)
COLUMNS = (
    "rule", "kept", "emitted", "acceptance", "spent, mean / max", "KL(h, q), mean / max", "nats", "times plain"
)  # fmt: skip


def measure(
    model: LanguageModel,
    make_draft: Callable[[], Draft],
    prompt: torch.Tensor,
    tokens: int,
    m: int,
    sampling: Sampling,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a rule."""

    def rounds(settings: dict[str, Any], **more: Any) -> Rounds:
        speculation = Speculation(tokens=m, **settings, **more)
        return Rounds(model, make_draft(), prompt, tokens, speculation, sampling, seed=1, tally=bool(more))

    seconds: dict[int, list[float]] = {number: [] for number in range(-1, len(RULES))}
    for _ in range(repeats):
        plain = generate_tokens(model, prompt, tokens + 1, sampling, seed=1)
        next(plain)  # the prompt is read
        seconds[-1].append(seconds_of(plain))
        for number, settings in enumerate(RULES):
            timed = rounds(settings)
            timed.state()
            seconds[number].append(seconds_of(timed.columns()))
    rows = []
    for number, settings in enumerate(RULES):
        counted = rounds(settings, measure="law")
        deque(counted.columns(), maxlen=0)
        gains = [plain / own for plain, own in zip(seconds[-1], seconds[number], strict=True)]
        rows.append(settings | counted.result(prompt).to_json() | {"gain": statistics.median(gains)})
    return rows


def seconds_of(columns: Any) -> float:
    began = time.perf_counter()
    deque(columns, maxlen=0)
    return time.perf_counter() - began


def name_of(row: dict[str, Any]) -> str:
    given = [f"{row[key]:g}" for key in ("bound", "delta", "mix") if key in row]
    return " ".join([row["rule"], *given, *(["exact gamma"] if row.get("exact_gamma") else [])])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""

    def pair(row: dict[str, Any], name: str) -> str:
        mean, largest = row[f"{name}_mean"], row[f"{name}_max"]
        return "-" if mean is None else f"{mean:.3f} / {largest:.2f}"

    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        figures = [f"{row['mean_kept']:.2f}", f"{row['mean_emitted']:.2f}", f"{row['acceptance'] or 0:.3f}"]
        more = [pair(row, "spent"), pair(row, "output_divergence"), f"{row['verifier_nll']:.3f}", f"{row['gain']:.2f}"]
        lines.append(f"| {' | '.join([name_of(row), *figures, *more])} |")
    return "\n".join(lines)


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Speed against the mean divergence of what is emitted: a panel a draft, a line a rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(rows), 4), layout="constrained")
    for axes, (draft, of_draft) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in of_draft:
            name = row["rule"] + (", exact gamma" if row.get("exact_gamma") else "")
            series.setdefault(name, []).append((row["output_divergence_mean"] or 0.0, row["gain"]))
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_title(f"draft {draft}", loc="left")
        axes.set_xlabel("KL(h, q) of what is emitted, nats a token")
        axes.set_ylabel("times plain decoding")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the verifier")
    parser.add_argument("--draft", action="append", required=True, help="a run or a name; may be given again")
    parser.add_argument("--m", type=int, default=8, help="drafted tokens of a round")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=2500)
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--positions", type=int, default=3000, help="of the acceptance on the text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="an .svg or .png file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sampling = Sampling(arguments.temperature)
    rows: dict[str, list[dict[str, Any]]] = {}
    accepted = {}
    try:
        sizes = SpeculationSizes(context=arguments.context, positions=arguments.positions)
        model = kmixer.load(arguments.run)
        assert model.tokenizer is not None
        _, held = held_out(RunFolder(arguments.run), model.tokenizer)
        text = torch.from_numpy(np.asarray(held.tokens[: sizes.context + sizes.positions]).astype(np.int64))
        for draft in arguments.draft:
            make_draft = drafts_of(model, draft, Speculation())
            accepted[draft] = bench_acceptance(model, make_draft(), text, Speculation(), sampling, sizes)
            print(f"\n{draft}: " + ", ".join(f"{key} {value}" for key, value in accepted[draft].items()))
            prompt = text[None, : sizes.context]
            rows[draft] = measure(model, make_draft, prompt, arguments.tokens, arguments.m, sampling, arguments.repeats)
            print(table(rows[draft]))
        if arguments.plot is not None:
            plot(rows, arguments.plot)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    result = {"settings": settings, "sizes": dataclasses.asdict(sizes), "acceptance": accepted, "rules": rows}
    print(json.dumps(result | {"environment": environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
