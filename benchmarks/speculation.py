"""Speculative decoding by rule: how much is kept, what is spent for it, what the text loses, and the speed.

    python benchmarks/speculation.py runs/verifier --draft runs/draft --draft ngram:5 --figure speculation.svg

The runs have equal tokenizers; a verifier of width 128 and a draft of width 32 are what this was made for. Every rule
continues the same prompts, taken at even distances from the validation part, with the same seed: once to count and to
measure the divergence of what is emitted, and `--repeats` times beside plain decoding, timed in turn. Prints Markdown
tables of means over the prompts with their 95 % intervals, and JSON.
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
from matplotlib.figure import Figure

import kmixer
from kmixer.analysis.figure_files import check_figure, write_figure
from kmixer.bench.speculation import SpeculationSizes, bench_acceptance
from kmixer.cli.drafting import drafts_of
from kmixer.errors import InputError
from kmixer.experiments.statistics import half_interval
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
    prompts: list[torch.Tensor],
    tokens: int,
    m: int,
    sampling: Sampling,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a rule: its settings, and of every figure the values of all prompts."""
    rows: list[dict[str, Any]] = [{"settings": settings, "gain": []} for settings in RULES]
    for prompt in prompts:

        def rounds(settings: dict[str, Any], prompt: torch.Tensor = prompt, **more: Any) -> Rounds:
            speculation = Speculation(tokens=m, **settings, **more)
            return Rounds(model, make_draft(), prompt, tokens, speculation, sampling, seed=1, tally=bool(more))

        seconds: list[list[float]] = []
        for _ in range(repeats):
            plain = generate_tokens(model, prompt, tokens + 1, sampling, seed=1)
            next(plain)  # the prompt is read
            seconds.append([seconds_of(plain)])
            for settings in RULES:
                timed = rounds(settings)
                timed.state()
                seconds[-1].append(seconds_of(timed.columns()))
        for number, (row, settings) in enumerate(zip(rows, RULES, strict=True), start=1):
            counted = rounds(settings, measure="law")
            deque(counted.columns(), maxlen=0)
            row["gain"].append(statistics.median(taken[0] / taken[number] for taken in seconds))
            for name, value in counted.result(prompt).to_json().items():
                row.setdefault(name, []).append(value)
    return rows


def seconds_of(columns: Any) -> float:
    began = time.perf_counter()
    deque(columns, maxlen=0)
    return time.perf_counter() - began


def name_of(settings: dict[str, Any]) -> str:
    given = [f"{settings[key]:g}" for key in ("bound", "delta", "mix") if key in settings]
    return " ".join([settings["rule"], *given, *(["exact gamma"] if settings.get("exact_gamma") else [])])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""

    def mean(row: dict[str, Any], name: str, digits: int) -> str:
        half = half_interval(row[name])
        more = "" if half is None else f" ± {half:.{digits}f}"
        return f"{statistics.fmean(row[name]):.{digits}f}{more}"

    def pair(row: dict[str, Any], name: str) -> str:
        if row[f"{name}_mean"][0] is None:
            return "-"
        return f"{statistics.fmean(row[f'{name}_mean']):.3f} / {max(row[f'{name}_max']):.2f}"

    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        figures = [mean(row, "mean_kept", 2), mean(row, "mean_emitted", 2), mean(row, "acceptance", 3)]
        more = [pair(row, "spent"), pair(row, "output_divergence"), mean(row, "verifier_nll", 3), mean(row, "gain", 2)]
        lines.append(f"| {' | '.join([name_of(row['settings']), *figures, *more])} |")
    return "\n".join(lines)


def draw(rows: dict[str, list[dict[str, Any]]]) -> Figure:
    """Speed against the mean divergence of what is emitted: a panel a draft, a line a rule."""
    figure = Figure(figsize=(5 * len(rows), 4), layout="constrained")
    for axes, (draft, of_draft) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        series: dict[str, list[tuple[float, float]]] = {}
        for row in of_draft:
            name = row["settings"]["rule"] + (", exact gamma" if row["settings"].get("exact_gamma") else "")
            spent = statistics.fmean(value or 0.0 for value in row["output_divergence_mean"])
            series.setdefault(name, []).append((spent, statistics.fmean(row["gain"])))
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_title(f"draft {draft}", loc="left")
        axes.set_xlabel("KL(h, q) of what is emitted, nats per token")
        axes.set_ylabel("times plain decoding")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the verifier")
    parser.add_argument("--draft", action="append", required=True, help="a run or a name; may be given again")
    parser.add_argument("--m", type=int, default=8, help="drafted tokens of a round")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=2500)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--positions", type=int, default=3000, help="of the acceptance on the text")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--figure", type=Path, help="an .svg or .png file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sampling = Sampling(arguments.temperature)
    rows: dict[str, list[dict[str, Any]]] = {}
    accepted = {}
    try:
        check_figure(arguments.figure)
        sizes = SpeculationSizes(context=arguments.context, positions=arguments.positions)
        model = kmixer.load(arguments.run)
        assert model.tokenizer is not None
        _, held = held_out(RunFolder(arguments.run), model.tokenizer)
        tokens = torch.from_numpy(np.asarray(held.tokens).astype(np.int64))
        text = tokens[: sizes.context + sizes.positions]
        starts = range(0, len(tokens) - sizes.context, (len(tokens) - sizes.context) // arguments.prompts)
        prompts = [tokens[None, start : start + sizes.context] for start in starts[: arguments.prompts]]
        for draft in arguments.draft:
            make_draft = drafts_of(model, draft, Speculation())
            accepted[draft] = bench_acceptance(model, make_draft(), text, Speculation(), sampling, sizes)
            print(f"\n{draft}: " + ", ".join(f"{key} {value}" for key, value in accepted[draft].items()))
            rows[draft] = measure(
                model, make_draft, prompts, arguments.tokens, arguments.m, sampling, arguments.repeats
            )
            print(table(rows[draft]))
        if arguments.figure is not None:
            write_figure(draw(rows), arguments.figure)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    result = {"settings": settings, "sizes": dataclasses.asdict(sizes), "acceptance": accepted, "rules": rows}
    print(json.dumps(result | {"environment": environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
