"""kmixer lab ecology --rescue: what a share of training texts with brackets is enough for."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmixer.cli.lab_options import deliver, tell
from kmixer.errors import InputError, check_choice, shown
from kmixer.runs.lab_ecology import RescueRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIXERS, ALPHAS, SEEDS, STEPS = "softmax,k2", "0,.1,.25,.5,1", 3, 500
KINDS = {
    "chunks": "chunks of the standard library as they stand",
    "separated": "brackets put in, 6 characters or more apart",
}
MEANING = """\
Loss of texts with unbalanced brackets less that of balanced ones, nats per character; nothing was trained on balance.
A counter of n-grams tells chunks apart too: what a model has beyond it may be nesting, what it has within it is
patterns of neighbours. Where brackets are separated, counters have nothing, and what is told apart is tracked over a
distance. It says nothing about why training finds it."""


def check_rescue(others: dict[str, object]) -> None:
    """Raises InputError for what does not go with it."""
    if given := [name for name, value in others.items() if value]:
        raise InputError(f"--rescue makes its own texts and models; leave {', '.join(given)} out")


def rescue(
    mixers: str | None, alpha: str | None, seeds: int | None, steps: int | None, figure: Path | None, *, as_json: bool
) -> None:
    """Train, and print what every mixer tells apart at every share."""
    from kmixer.analysis.rescue import rescue as measure
    from kmixer.models.mixers.registry import CAUSAL_NAMES

    kinds = list(dict.fromkeys(kind.strip() for kind in (mixers or MIXERS).split(",")))
    for kind in kinds:
        check_choice("--mixers", kind, CAUSAL_NAMES)
    alphas = _shares(alpha or ALPHAS)
    count = 2 * len(kinds) * len(alphas) * (seeds or SEEDS)
    tell(f"{count} trainings of {steps or STEPS} steps; how long they take is said after each")
    measured = measure(kinds, alphas, seeds or SEEDS, steps or STEPS, tell)
    deliver(measured, RescueRecord, _draw, _print, figure=figure, save_in=None, as_json=as_json)


def _shares(text: str) -> list[float]:
    """Shares in their order. Raises InputError for anything but numbers from 0 to 1."""
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise InputError(f"--alpha: got {shown(text)}; allowed: numbers from 0 to 1 with commas between them")
    return shares


def _draw(record: RescueRecord) -> Figure:
    from kmixer.analysis.panels.rescue import draw_rescue

    return draw_rescue(record)


def _print(measured: dict[str, Any]) -> None:
    print(f"{measured['seeds']} seeds, {measured['steps']:,} steps of {measured['batch_size']} texts")
    for evaluation in measured["evaluations"]:
        _print_evaluation(evaluation)
    print(f"\n{MEANING}")


def _print_evaluation(evaluation: dict[str, Any]) -> None:
    alphas, curves = evaluation["alphas"], evaluation["curves"]
    about = f"{evaluation['characters']} characters, {evaluation['training']:,} texts, {evaluation['pairs']:,} pairs"
    print(f"\n{evaluation['name']}: {KINDS[evaluation['name']]}; {about}")
    print(_line("alpha", [f"{alpha:g}" for alpha in alphas]))
    for curve in curves:
        shares = curve["shares"]
        means = [f"{share['mean']:.3f}" if share["differs"] else "none found" for share in shares]
        print(_line(f"{curve['mixer']}, {curve['parameters']:,} parameters", means))
        print(_line("  over seeds", [_range(share["discrimination"]) for share in shares]))
        print(_line("  error over pairs", [f"{max(share['error']):.4f}" for share in shares]))
        print(_line("  nats per bracket", [f"{statistics.fmean(share['at_brackets']):.3f}" for share in shares]))
        if evaluation["null"]:
            print(_line("  pairs ranked right", [_range(share["right"]) for share in shares]))
    for counter in evaluation["counters"]:
        name = f"counter, {_characters(counter['context'])}"
        print(_line(name, [f"{share['discrimination']:.3f}" for share in counter["shares"]]))
        print(_line("  error over pairs", [f"{share['error']:.4f}" for share in counter["shares"]]))
    if evaluation["null"]:
        null = evaluation["null"]
        low, high = null["right"]
        print(f"null, alpha 0: up to {null['discrimination']:.4f} nats, {low:.2f} to {high:.2f} of pairs ranked right")
    for curve in curves:
        beyond = curve["beyond_counters"][-1]
        words = ", ".join(f"{_characters(int(context))} {_signed(value)}" for context, value in beyond.items())
        print(f"{curve['mixer']} at alpha {alphas[-1]:g}, beyond the counter with {words}")
    for difference in evaluation["differences"]:
        last = difference["shares"][-1]
        low, high = last["interval"] or (None, None)
        interval = "one seed" if low is None else f"95 % over seeds {low:+.3f} to {high:+.3f}"
        what = f"{difference['mixer']} less {difference['from']} at alpha {alphas[-1]:g}"
        print(f"{what}: {last['mean']:+.3f} ({interval})")


def _line(name: str, cells: list[str]) -> str:
    return f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells)


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _signed(value: dict[str, float]) -> str:
    inside = abs(value["mean"]) <= value["interval"]
    return "none found" if inside else f"{value['mean']:+.3f} +- {value['interval']:.3f}"


def _characters(count: int) -> str:
    return f"{count} character{'s' * (count > 1)}"
