"""kmixer analyze and report: what was learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kmixer.cli.options import DataDir, Json
from kmixer.errors import InputError


def analyze(
    target: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, a model folder, or a packaged model's name.")
    ],
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Measure on this text instead; - is standard input.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Where the run's own data is now, if it was moved.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; default: the recipe's, or 1024.")
    ] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
) -> None:
    """Measure what a model's weights learned: decays and shares, bandwidths and locality, copies, fast weights, loss by
    position.

    Example: kmixer analyze runs/shakespeare-quick-seed42 --json
    """
    from kmixer.analysis.analyze import analyze as measure

    measured = measure(target, text, corpus, window, data_dir)
    if as_json:
        print(json.dumps(measured))
        return
    if "decay" in measured:
        _print_decays(measured)
    if "locality" in measured:
        _print_attention(measured)
    if "levels" in measured:
        _print_levels(measured)
    if "copies" in measured:
        _print_copies(measured["copies"], measured["copy_gate"])
    if "fast_weights" in measured:
        _print_fast_weights(measured["fast_weights"], measured.get("fast_tau"))
    if "class_token" in measured:
        _print_class_token(measured["class_token"]["rollout"])
    losses = measured.get("loss_by_position", [])
    if not losses:
        return
    marks = [position for position in (1, 4, 16, 64, 256, 1024, len(losses)) if position <= len(losses)]
    print("loss at position " + "  ".join(f"{mark}: {losses[mark - 1]:.3f}" for mark in dict.fromkeys(marks)))


def _print_decays(measured: dict[str, Any]) -> None:
    """One line per layer with decays; base kernels by lag, and the refinement."""
    shares, gates = measured.get("base_share"), measured.get("gate")
    print("layer   gate  base share   alpha                effective windows 1 / (1 - decay), positions")
    for layer, alpha in enumerate(measured["alpha"]):
        share = f"{gates[layer]:6.3f}  {shares[layer]:10.3f}" if shares and gates else f"{'-':>6}  {'-':>10}"
        windows = sorted(measured["effective_window"][layer])
        shown = windows if len(windows) <= 6 else [windows[i * (len(windows) - 1) // 5] for i in range(6)]
        span = f"{min(alpha):.3f}" if len(alpha) == 1 else f"{min(alpha):.3f} to {max(alpha):.3f}"
        print(f"{layer + 1:>5}  {share}   {span:18}   " + "  ".join(f"{value:,.1f}" for value in shown))
    for index, kernel in enumerate(measured.get("base_kernel", [])):
        print(f"base kernel {index + 1} by lag: " + "  ".join(f"{weight:.3f}" for weight in kernel[:8]))
    if "eta" in measured:
        print(f"eta {measured['eta']:.4f}; residuals " + "  ".join(f"{value:.4f}" for value in measured["residuals"]))


def _print_attention(measured: dict[str, Any]) -> None:
    """One line an attention layer, one number per head."""
    rows = {"sigma": measured.get("sigma"), **measured["locality"]}
    for name, layers in rows.items():
        if layers is not None:
            print(f"{name.replace('_', ' ')}, a line per layer, a number per head:")
            for layer, heads in enumerate(layers):
                print(f"{layer + 1:>5}  " + "  ".join(f"{value:8.3f}" for value in heads))


def _print_levels(measured: dict[str, Any]) -> None:
    """Level weights, and what the scores of each level are like: a number per head."""
    for layer, (weights, levels) in enumerate(zip(measured["level_weights"], measured["levels"], strict=True)):
        print(f"layer {layer + 1}: weights of the levels, a line per head:")
        for head in weights:
            print("       " + "  ".join(f"{value:8.3f}" for value in head))
        for name in ("reciprocity", "smallest_eigenvalue", "kurtosis", "fit_error", "remainder"):
            for level, heads in enumerate(levels[name]):
                what = f"levels 0 to {level}" if name in ("fit_error", "remainder") else f"level {level}"
                print(f"       {name.replace('_', ' ')}, {what}: " + "  ".join(f"{value:.3f}" for value in heads))


def _print_copies(copies: dict[str, Any], gates: list[Any]) -> None:
    """Gates: one line, or one per layer where they know the length of the match; what copies are worth by length."""
    lengths, by_length = copies["lengths"], bool(gates) and isinstance(gates[0], list)
    if gates and not by_length:
        shown = zip(copies["layers"], gates, strict=True)
        print("copy gates by layer " + "  ".join(f"{layer + 1}: {gate:.3f}" for layer, gate in shown))
    if by_length:
        print("copy gates by length of the match, a line per layer:")
        print("       " + "".join(f"{name:>8}" for name in lengths))
        for layer, row in zip(copies["layers"], gates, strict=True):
            print(f"{layer + 1:>5}  " + "".join(f"{gate:8.3f}" for gate in row))
    print("length of match  positions  copy is next    loss  without copies   worth")
    columns = [copies[name] for name in ("positions", "right", "loss", "loss_without")]
    rows = list(zip(lengths, *columns, strict=True))
    if sum(copies["positions"]):
        rows.append(("all", sum(copies["positions"]), *(_mean(values, copies["positions"]) for values in columns[1:])))
    for name, count, right, loss, without in rows:
        if count:
            share = "-" if right is None else f"{right:.1%}"
            print(f"{name:>15}  {count:>9,}  {share:>12}  {loss:6.3f}  {without:14.3f}  {without - loss:+6.3f}")


def _print_fast_weights(measured: dict[str, Any], taus: list[Any] | None) -> None:
    """How far the weights moved, a line per layer; what adapting was worth by position."""
    for index, (layer, move) in enumerate(zip(measured["layers"], measured["moves"], strict=True)):
        tau = taus[index] if taus and index < len(taus) else None  # of the token form, one per hidden unit
        forgets = f", forgets in {tau:,.0f} tokens" if isinstance(tau, float) else ""
        print(f"fast weights of {layer}: moved {move:.3f} of the norm of its matrix at a window's end{forgets}")
    print("position up to    loss  without adapting   worth")
    rows = zip(measured["positions"], measured["loss"], measured["loss_without"], strict=True)
    for position, loss, without in rows:
        print(f"{position:>14,}  {loss:6.3f}  {without:16.3f}  {without - loss:+6.3f}")


def _mean(values: list[float | None], counts: list[int]) -> float | None:
    """Of all positions that have a value, from the means of so many."""
    known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None and count]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


def _print_class_token(rollouts: list[list[float]]) -> None:
    """What the class token holds of each patch, as the image lies."""
    print(f"class token, per cent held of each patch, mean over {len(rollouts)} images, all layers:")
    means = [100 * sum(patch) / len(rollouts) for patch in zip(*rollouts, strict=True)]
    side = round(len(means) ** 0.5)
    for row in range(side):
        print("       " + "  ".join(f"{value:5.1f}" for value in means[row * side : (row + 1) * side]))


def report(
    paths: Annotated[list[Path], typer.Argument(help="Run folders and sweeps.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; default report.html in the first folder.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Write every figure into this folder too, SVG and PNG.")] = None,
) -> None:
    """Write one HTML page about runs and sweeps: curves, table, learned dynamics, samples.

    Example: kmixer report runs/shakespeare-quick-sweep --figures figures
    """
    from kmixer.analysis.report import write_report

    if out is not None and out.suffix != ".html":
        raise InputError(f"--out: got {out}; allowed: a file that ends in .html")
    page = out or paths[0] / "report.html"
    write_report(paths, page, figures)
    print(page)
