"""A mixer beside the baseline: its operator by every way to compute it, its layer, and a block; forward and backward.

All of one shape are timed in turn, so that what slows the machine slows all of them. Layers and blocks have the
settings that a configuration has by default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kmixer.bench.measure import peak_of, peak_resident_bytes, time_in_turn
from kmixer.bench.operators import Operator, Way, operator_of
from kmixer.errors import InputError
from kmixer.layers.rotary import check_heads
from kmixer.models.mixers.card import Place
from kmixer.models.mixers.registry import BASELINE, CARDS
from kmixer.models.transformer import TransformerConfig, build_block

# Largest difference from the definition in float64 that a way may show before it is timed.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Shape:
    """What is timed: b sequences of t positions, h heads of width / h channels, and what a position sees."""

    t: int
    width: int
    heads: int
    batch: int
    causal: bool = True
    window: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"t": self.t, "width": self.width, "b": self.batch, "causal": self.causal, "window": self.window}


def bench_mixer(name: str, shape: Shape, windows: tuple[int | None, ...], repeats: int) -> list[dict[str, Any]]:
    """Rows for the past in each window that it has, and for both ways, of those that the mixer sees: see `bench_shape`.

    Raises InputError for a mixer that is not in the registry, and a window that it has not.
    """
    if name not in CARDS:
        raise InputError(f"mixer: got {name!r}; allowed: {', '.join(sorted(CARDS))}")
    if not CARDS[name].has_window and windows != (None,):
        raise InputError(f"--window: mixer {name} has no window")
    check_heads(shape.width, shape.heads)
    shapes = [] if CARDS[name].refuses_causal else [replace(shape, window=window) for window in windows]
    if CARDS[name].sees_both_ways:
        shapes.append(replace(shape, causal=False))
    return [row for case in shapes for row in bench_shape(name, case, repeats)]


def bench_shape(name: str, shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """A row for each way of the operator, the layer and the block, of the baseline and of the mixer.

    "seconds" of forward and backward; "relative" to the baseline's first row of the kind; of ways "error", the largest
    difference from the definition in float64, and "times_faster" than the definition; of blocks "cache", the numbers
    that a token more adds to the state.
    """
    torch.manual_seed(0)
    mixers = list(dict.fromkeys((BASELINE, name)))
    return [
        *_operators(mixers, shape, repeats),
        *_modules("layer", {mixer: _layer(mixer, shape) for mixer in mixers}, shape, repeats),
        *(_blocks(mixers, shape, repeats) if shape.causal else []),
    ]


def _operators(mixers: list[str], shape: Shape, repeats: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], object]] = {}
    about: dict[str, dict[str, Any]] = {}
    definitions: dict[str, str] = {}
    for mixer in mixers:
        operator = operator_of(mixer)
        if operator is None:
            continue
        inputs = _inputs(operator, shape)
        errors = _errors(operator, inputs, shape)
        for what, error in errors.items():
            calls[what] = lambda way=operator.ways[what], inputs=inputs: _step(way, inputs, shape)  # type: ignore[misc]
            about[what] = {"error": error}
            definitions[what] = next(iter(operator.ways))
    timed = time_in_turn(calls, repeats)
    return [
        {
            "what": what,
            **shape.to_json(),
            **about[what],
            **times,
            "times_faster": timed[definitions[what]]["seconds"] / times["seconds"],
        }
        for what, times in timed.items()
    ]


def _inputs(operator: Operator, shape: Shape) -> list[Tensor]:
    return operator.inputs(shape.batch, shape.heads, shape.t, shape.width // shape.heads)


def _errors(operator: Operator, inputs: list[Tensor], shape: Shape) -> dict[str, float]:
    """Of every way that can run here; raises RuntimeError for one that is wrong."""
    errors: dict[str, float] = {}
    definition = next(iter(operator.ways.values()))
    with torch.no_grad():
        exact = definition([z.double() for z in inputs], shape.causal, shape.window)
        for what, way in operator.ways.items():
            try:
                error = float((way(inputs, shape.causal, shape.window).double() - exact).abs().max())
            except InputError:  # this way cannot run here
                continue
            if error > TOLERANCE:
                raise RuntimeError(f"{what} differs from the definition by {error:.1e}: not timed")
            errors[what] = error
    return errors


def _step(way: Way, inputs: list[Tensor], shape: Shape) -> None:
    way(inputs, shape.causal, shape.window).sum().backward()


def _layer(mixer: str, shape: Shape) -> nn.Module:
    card = CARDS[mixer]
    layer: nn.Module = card.build(card.settings(), shape.heads, _place(mixer, shape))
    return layer


def _place(mixer: str, shape: Shape) -> Place:
    return Place(shape.width, causal=shape.causal, window=shape.window if CARDS[mixer].has_window else None)


def _modules(kind: str, modules: dict[str, nn.Module], shape: Shape, repeats: int) -> list[dict[str, Any]]:
    x = torch.randn(shape.batch, shape.t, shape.width, requires_grad=True)
    calls: dict[str, Callable[[], object]] = {
        f"{mixer} {kind}": lambda module=module: module(x)[0].sum().backward()  # type: ignore[misc]
        for mixer, module in modules.items()
    }
    return [{"what": what, **shape.to_json(), **times} for what, times in time_in_turn(calls, repeats).items()]


def _blocks(mixers: list[str], shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """Whole blocks of nanochat: norm, mixer, relu^2 feed-forward."""
    blocks: dict[str, nn.Module] = {}
    caches = []
    for mixer in mixers:
        windows = {} if _place(mixer, shape).window is None else {"windows": "S", "window": shape.window}
        values = {"width": shape.width, "layers": 1, "heads": shape.heads, "mixers": [mixer], "blocks": "nanochat"}
        block = build_block(TransformerConfig.parse(values | windows, source="bench"), 0)
        blocks[mixer] = block
        caches.append(CARDS[mixer].state_numbers(block.mixer)[0])
    rows = _modules("block", blocks, shape, repeats)
    return [row | {"cache": cache} for row, cache in zip(rows, caches, strict=True)]


def add_peaks(name: str, rows: list[dict[str, Any]], heads: int) -> None:
    """Give the rows of a mixer's own operator "peak_bytes", which a fresh process adds to its peak for one step."""
    operator = operator_of(name)
    program = "from kmixer.bench.mixer import print_peak; import sys; print_peak(*sys.argv[1:])"
    for row in rows:
        if operator is not None and row["what"] in operator.ways:
            sizes = [row["t"], row["width"], heads, row["b"], int(row["causal"]), row["window"] or 0]
            row["peak_bytes"] = peak_of(program, name, row["what"], *map(str, sizes))


def print_peak(name: str, what: str, *numbers: str) -> None:
    """The process that `add_peaks` starts."""
    t, width, heads, batch, causal, window = map(int, numbers)
    shape = Shape(t, width, heads, batch, bool(causal), window or None)
    operator = operator_of(name)
    assert operator is not None
    small = replace(shape, t=16)
    _step(operator.ways[what], _inputs(operator, small), small)  # what the first call loads
    inputs = _inputs(operator, shape)
    before = peak_resident_bytes()
    _step(operator.ways[what], inputs, shape)
    print(peak_resident_bytes() - before)
