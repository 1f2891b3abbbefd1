"""What `kmixer lab geometry` prints: every number with what it is by chance, and before training."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

NONE = "none found"
MEANING = """\
D: how far the perturbation moves the representations, 0 not at all, up to a rotation, a shift and a scale; null: of
shuffled pairs. D_{k}: the same on the {k} first directions, each of variance 1, so that a representation of few directions
is compared with one of many. It is stability under a perturbation, and no distance from the system or the text."""
OF_HEADS = """\
Means over seeds, with deviations. R^2 is of the state from what the head reads at its position, on other sequences, by a
linear map and by the mean of the 10 nearest vectors; of unrelated vectors it is 0 or below."""


def print_runs(measured: dict[str, Any]) -> None:
    """A line for every perturbation of a run."""
    k = measured["directions"]
    for curve in measured["curves"]:
        width, number = curve["width"], measured["windows"]
        trained, untrained = curve["trained"], curve["untrained"]
        independent = number * width / (number + width)
        before = statistics.fmean(one["rank"] for one in untrained)
        print(
            f"\n{curve['name']}: {number:,} windows, width {width}; rank {trained['rank']:.1f}, untrained {before:.1f},"
        )
        print(f"{independent:.1f} of unrelated directions")
        print(
            f"{'perturbed':>10}{'changed':>9}{'D':>12}{'error':>8}{'null':>7}{'untrained':>11}{'difference':>12}"
            f"{f'D_{k}':>8}{'null':>7}{'untrained':>11}{'CKA':>12}{'band':>7}"
        )
        for i, name in enumerate(measured["perturbations"]):
            distances = [one["distance"][i] for one in untrained]
            shared = statistics.fmean(one["shared"][i] for one in untrained)
            error = curve["distance_error"][i]
            difference = trained["distance"][i] - statistics.fmean(distances)
            print(
                f"{name:>10}{curve['changed'][i]:>9.1%}{moved(trained, i):>12}{error:>8.3f}{trained['null'][i]:>7.3f}"
                f"{statistics.fmean(distances):>11.3f}{_beyond(difference, 2 * error + _spread(distances)):>12}"
                f"{trained['shared'][i]:>8.3f}{trained['shared_null'][i]:>7.3f}{shared:>11.3f}"
                f"{_beyond(trained['cka'][i], trained['cka_band'][i]):>12}{trained['cka_band'][i]:>7.3f}"
            )
    print(f"\n{MEANING.format(k=k)}")


def print_heads(measured: dict[str, Any]) -> None:
    """A table for every encoder: its heads beside what it was before training."""
    arms, rates = measured["arms"], measured["rates"]
    for system, mixer, codes in dict.fromkeys((arm["system"], arm["mixer"], arm["codes"]) for arm in arms):
        group = [arm for arm in arms if (arm["system"], arm["mixer"], arm["codes"]) == (system, mixer, codes)]
        heads = {
            head: [arm for arm in group if arm["head"] == head] for head in dict.fromkeys(a["head"] for a in group)
        }
        changed = ", ".join(f"{part:.1%}" for part in group[0]["changed"])
        kind = "learned codes" if measured["learned"] else "equal bins"
        print(
            f"\n{system}, {mixer}, {codes} {kind}, {len(next(iter(heads.values())))} seeds; noise changes {changed} of them"
        )
        columns = [f"D {100 * rate:g} %" for rate in rates]
        print(
            " " * 10
            + "".join(f"{name:>15}" for name in columns)
            + f"{'null':>7}{'D_' + str(measured['directions']):>8}{'null':>7}{'CKA':>8}{'band':>7}{'rank':>7}{'next value':>16}"
        )
        _print_moves("untrained", next(iter(heads.values())), "untrained", None, len(rates) // 2)
        for head, its in heads.items():
            _print_moves(head, its, "trained", [arm["next_value"] for arm in its], len(rates) // 2)
        print(
            f"next value by repeating the last {group[0]['repeating']:.4f}, error of the codes {group[0]['coding']:.4f}"
        )
        for compared in measured["comparisons"]:
            if (compared["system"], compared["mixer"], compared["codes"]) == (system, mixer, codes):
                print(_verdict(compared, measured))
        _print_decoded(heads)
    print(f"\n{MEANING.format(k=measured['directions'])}\n{OF_HEADS}")


def _print_moves(name: str, arms: list[dict[str, Any]], which: str, errors: list[float] | None, middle: int) -> None:
    def over(value: Callable[[dict[str, Any]], float]) -> list[float]:
        return [value(arm[which]) for arm in arms]

    count = len(arms[0][which]["distance"])
    line = f"{name:>10}"
    for i in range(count):
        values = over(lambda moves, i=i: moves["distance"][i])
        null, band = (
            statistics.fmean(over(lambda moves, key=key, i=i: moves[key][i])) for key in ("null", "null_band")
        )
        near = statistics.fmean(values) >= null - band
        line += f"{NONE if near else _with_deviation(values, 3):>15}"
    for key, size in (("null", 7), ("shared", 8), ("shared_null", 7), ("cka", 8), ("cka_band", 7)):
        line += f"{statistics.fmean(over(lambda moves, key=key: moves[key][middle])):>{size}.3f}"
    line += f"{statistics.fmean(over(lambda moves: moves['rank'])):>7.2f}"
    print(line + (f"{_with_deviation(errors, 4):>16}" if errors else ""))


def _verdict(compared: dict[str, Any], measured: dict[str, Any]) -> str:
    """What the heads differ by, or that they don't beyond what seeds do."""
    rates = measured["rates"]
    at = f"{100 * rates[len(rates) // 2]:g} %"
    ratios, shared = (
        " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in compared[key])
        for key in ("ratios", "shared_ratios")
    )
    interval = compared["interval"]
    if interval is None:
        said = "one seed, so no more can be said"
    elif interval[0] <= 0 <= interval[1]:
        said = f"difference: {NONE} (95 % interval {interval[0]:+.3f} to {interval[1]:+.3f})"
    else:
        said = f"difference {compared['difference']:+.3f} (95 % interval {interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"ce over mse at {at}, by seed: D {ratios}, D_{measured['directions']} {shared}; {said}"


def _print_decoded(heads: dict[str, list[dict[str, Any]]]) -> None:
    variables = list(next(iter(heads.values()))[0]["decoded"])
    if not variables:
        return
    print("R^2, linear and nearest".ljust(24) + "".join(f"{variable:>16}" for variable in variables))
    rows = [("untrained", next(iter(heads.values())), "untrained_"), *((head, its, "") for head, its in heads.items())]
    for name, arms, prefix in rows:
        cells = (
            " ".join(
                f"{statistics.fmean(arm['decoded'][variable][prefix + way] for arm in arms):6.2f}"
                for way in ("linear", "nearest")
            )
            for variable in variables
        )
        print(f"{name:>24}" + "".join(f"{cell:>16}" for cell in cells))


def moved(moves: dict[str, Any], i: int) -> str:
    """D, where it is below what shuffled pairs give."""
    near = moves["distance"][i] >= moves["null"][i] - moves["null_band"][i]
    return NONE if near else f"{moves['distance'][i]:.3f}"


def _beyond(value: float, band: float) -> str:
    return NONE if abs(value) <= band else f"{value:.3f}"


def _spread(values: list[float]) -> float:
    """Two deviations of several values; 0 of one."""
    return 2 * statistics.stdev(values) if len(values) > 1 else 0.0


def _with_deviation(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
