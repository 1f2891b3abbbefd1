"""What `kmixer lab geometry` prints: every number with what it is by chance, and before training."""

from __future__ import annotations

import statistics
from typing import Any

from kmixer.cli.lab_options import headline

NONE = "none found"
MEANING = """\
D: how far the perturbation moves the representations, 0 not at all, up to a rotation, a shift and a scale; null: of
shuffled pairs. D_{k}: the same on the {k} first directions, each of variance 1, so that a representation of few
directions is compared with one of many. It is stability under a perturbation, and no distance from system or text."""
OF_HEADS = """\
Means over seeds, with deviations. R^2 is of the state from what the head reads at its position, on other sequences, by
a linear map and by the mean of the 10 nearest vectors; of unrelated vectors it is 0 or below."""


def print_runs(measured: dict[str, Any]) -> None:
    """A line for every perturbation of a run."""
    k = measured["directions"]
    print(headline(measured))
    for curve in measured["curves"]:
        width, number = curve["width"], measured["windows"]
        trained, untrained = curve["trained"], curve["untrained"]
        independent = number * width / (number + width)
        before = statistics.fmean(one["rank"] for one in untrained)
        ranks = f"rank {trained['rank']:.1f}, untrained {before:.1f}, of unrelated directions {independent:.1f}"
        print(f"\n{curve['name']}: {number:,} windows, width {width}; {ranks}")
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
    print(headline(measured, f"after {measured['steps']} steps"))
    for compared in measured["comparisons"]:
        names = [compared[key] for key in ("system", "mixer", "codes")]
        group = [arm for arm in measured["arms"] if [arm[key] for key in ("system", "mixer", "codes")] == names]
        heads = {head: [arm for arm in group if arm["head"] == head] for head in compared["from_untrained"]}
        _print_encoder(names, heads, measured)
        _print_verdicts(compared, measured)
        _print_decoded(heads)
    print(f"\n{MEANING.format(k=measured['directions'])}\n{OF_HEADS}")


def _print_encoder(names: list[Any], heads: dict[str, list[dict[str, Any]]], measured: dict[str, Any]) -> None:
    rates, begun = measured["rates"], next(iter(heads.values()))
    changed = ", ".join(f"{part:.1%}" for part in begun[0]["changed"])
    kind = "learned codes" if measured["learned"] else "equal bins"
    system, mixer, codes = names
    seeds = f"{len(begun)} seeds" if len(begun) > 1 else "1 seed"
    print(f"\n{system}, {mixer}, {codes} {kind}, {seeds}; noise changes {changed} of the codes")
    columns = "".join(f"{f'D {100 * rate:g} %':>15}" for rate in rates)
    shared = f"D_{measured['directions']}"
    print(f"{'':>10}{columns}{'null':>7}{shared:>8}{'null':>7}{'CKA':>8}{'band':>7}{'rank':>7}{'next value':>16}")
    middle = len(rates) // 2
    _print_moves("untrained", begun, "untrained", None, middle)
    for head, its in heads.items():
        _print_moves(head, its, "trained", [arm["next_value"] for arm in its], middle)
    print(f"next value by repeating the last {begun[0]['repeating']:.4f}, error of the codes {begun[0]['coding']:.4f}")


def _print_moves(name: str, arms: list[dict[str, Any]], which: str, errors: list[float] | None, middle: int) -> None:
    """One line: D at every rate of noise, the rest at the middle one."""

    def over(key: str, rate: int) -> list[float]:
        return [arm[which][key][rate] for arm in arms]

    line = f"{name:>10}"
    for rate in range(len(arms[0][which]["distance"])):
        values = over("distance", rate)
        near = statistics.fmean(values) >= statistics.fmean(over("null", rate)) - statistics.fmean(
            over("null_band", rate)
        )
        line += f"{NONE if near else _with_deviation(values, 3):>15}"
    for key, size in (("null", 7), ("shared", 8), ("shared_null", 7), ("cka", 8), ("cka_band", 7)):
        line += f"{statistics.fmean(over(key, middle)):>{size}.3f}"
    line += f"{statistics.fmean(arm[which]['rank'] for arm in arms):>7.2f}"
    print(line + (f"{_with_deviation(errors, 4):>16}" if errors else ""))


def _print_verdicts(compared: dict[str, Any], measured: dict[str, Any]) -> None:
    """What training and the head change, or that it is no more than what seeds do."""
    rates = measured["rates"]
    at = f"at {100 * rates[len(rates) // 2]:g} %"
    training = ", ".join(f"{head} {_said(value)}" for head, value in compared["from_untrained"].items())
    print(f"D {at} less that of the untrained encoder: {training}")
    if (heads := compared["heads"]) is None:
        return
    for name, key in (("D", "distance"), (f"D_{measured['directions']}", "shared")):
        ratios = " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in heads[key]["ratios"])
        print(f"{name} {at} of ce over mse, by seed: {ratios}; of ce less mse: {_said(heads[key])}")


def _said(compared: dict[str, Any]) -> str:
    """A difference with its interval, where that does not hold 0."""
    interval = compared["interval"]
    if interval is None:
        return f"{compared['difference']:+.3f} (one seed)"
    around = f"({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{NONE} {around}" if interval[0] <= 0 <= interval[1] else f"{compared['difference']:+.3f} {around}"


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
