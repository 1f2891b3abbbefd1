"""Hierarchical attention as a layer: queries and keys at several resolutions, made by trained downsampling."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.errors import InputError, check_choice
from kmixer.layers.depthwise_convolution import DepthwiseConvolution
from kmixer.layers.heads import (
    after,
    check_takes_state,
    heads_apart,
    identity_values,
    in_groups,
    last_rows,
    merge_heads,
    split_heads,
)
from kmixer.layers.linear import linear
from kmixer.layers.measured import LevelScores
from kmixer.layers.roles import LOGIT, TABLE, TRANSPOSED_MATRIX, Matrix, Role
from kmixer.layers.rotary import check_heads, rotation
from kmixer.ops.attention.hierarchical import Backend, hierarchical_attention
from kmixer.ops.attention.softmax import softmax_attention
from kmixer.ops.downsampling import filter_and_halve, lag
from kmixer.state import common_position, owned
from kmixer.trail import counted, ends, last_inputs, unmoved

Downsampling = Literal["depthwise", "dense", "average"]
Fusion = Literal["score", "output"]


# Of the sum of fixed weights: a third is written with three digits.
WEIGHTS_TOLERANCE = 0.002


class HierarchicalCache(NamedTuple):
    """What the layer carries, one entry a level where it is a tuple.

    keys: (b, h, rows, e) of each level; values: (b, h, s, e), one per level for output fusion; query: the last
    query row (b, h, 1, e) of each level, which later positions still use; tails: the last K - 1 rows
    (b, K - 1, d) of the level below each coarse level; position (b,): tokens that each row has seen, where those that
    have seen fewer have padding before their rows.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    tails: tuple[Tensor, ...]
    convolution: Tensor | None  # the last K - 1 inputs of the convolution head
    position: Tensor


class Downsample(nn.Module):
    """x_l[k] = sum_{r < K} W_r x_{l-1}[2k - r]: half as many rows, each of its own past only.

    Left-anchored: row k stands for the positions from 2k on and holds nothing later than 2k. Weights start as an
    average, so that a level starts as a blur.

    Args:
        width: d.
        taps: K.
        kind: "depthwise" has K weights per channel and then a (d, d) matrix; "dense" K matrices; "average" nothing
            that is trained. Matrices are kept as they multiply rows from the right: x W.

    Raises InputError for another kind.
    """

    def __init__(self, width: int, taps: int, kind: Downsampling) -> None:
        super().__init__()
        check_choice("downsampling", kind, get_args(Downsampling))
        self.taps = taps
        self.filter = nn.Parameter(torch.full((width, taps), 1 / taps)) if kind == "depthwise" else None
        self.mixing = nn.Parameter(torch.eye(width)) if kind == "depthwise" else None
        self.matrices = nn.Parameter(torch.eye(width).repeat(taps, 1, 1) / taps) if kind == "dense" else None

    def roles(self) -> dict[str, Role]:
        roles = {"filter": TABLE, "mixing": TRANSPOSED_MATRIX, "matrices": TABLE}
        return {name: role for name, role in roles.items() if getattr(self, name) is not None}

    def forward(self, x: Float[Tensor, "b n d"], tail: Float[Tensor, "b p d"], start: int) -> Float[Tensor, "b m d"]:
        """The rows [(start + 1) / 2] to [(start + n - 1) / 2], for rows x from `start` on and the K - 1 before them."""
        first = start % 2  # an odd row begins no cell
        if x.shape[1] <= first:
            return x[:, :0]
        if self.matrices is not None:
            whole = torch.cat([tail, x], dim=1)[:, first:]
            terms = (lag(whole, self.taps, r) @ matrix.to(x.dtype) for r, matrix in enumerate(self.matrices))
            return functools.reduce(torch.add, terms)
        if self.taps > 1:
            tail = tail[:, first:]
        else:
            x = x[:, first:]
        if self.filter is None or self.mixing is None:
            return filter_and_halve(tail, x, x.new_full((x.shape[-1], self.taps), 1 / self.taps))
        return filter_and_halve(tail, x, self.filter.to(x.dtype), self.mixing.to(x.dtype))


def _logits_of(weights: tuple[float, ...], levels: int) -> Tensor:
    """Logits whose softmax is these weights; minus infinity for a weight of zero."""
    if len(weights) != levels or min(weights) < 0 or not abs(sum(weights) - 1) <= WEIGHTS_TOLERANCE:
        raise InputError(
            f"fixed_weights: got {list(weights)} for {levels} levels; allowed: as many, none negative, that add to 1"
        )
    return torch.tensor(weights).log()


class HierarchicalAttention(nn.Module):
    """out(sum_j softmax_j(sum_l alpha_l q^l_[i / 2^l] . k^l_[j / 2^l] / sqrt(e)) v_j) in every head.

    Level 0 is x, level l a trained causal downsampling of level l - 1 by two; every level has queries and keys
    of its own, alpha is a softmax over the levels, one per head. x is normalised by the caller, and the caller adds
    the residual. With one level it is softmax attention.

    Args:
        width: d.
        heads: h; the head width e = d / h is even where positions rotate.
        levels: L.
        taps: K of the downsampling and of the convolution head.
        downsampling: see `Downsample`.
        fusion: "score" adds scores before one softmax; "output" adds the outputs of one attention a level, whose
            coarse rows hold for all positions of their cell.
        fixed_weights: alpha of the levels in every head, not trained; None trains them from equal ones on.
        convolution_head: g * attention + (1 - g) * a causal depthwise convolution of x, g = sigmoid of one logit a
            head, in the place of attention.
        causal: position i sees the positions up to i. Coarse levels hold no later positions in either case.
        rotary: rotate queries and keys by the first position of their cell.
        bias: of all matrices.
        backend: of `hierarchical_attention` for score fusion, where all positions are computed at once. Later positions
            after a state are fewer queries than keys, for which it is "auto".

    Shapes: x (b, t, d) to (b, t, d), and a `HierarchicalCache`.
    Raises InputError where heads does not divide width into such a head width, for unknown names and other settings
    that do not fit, and for a state without causal.

    Source: Cirrincione 2026 (arXiv 2604.08829), abstract: levels by trained causal downsampling, level-specific
    scores, convex weights. Our reading: all indexing, the options, and where positions enter.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        levels: int = 3,
        taps: int = 4,
        downsampling: Downsampling = "depthwise",
        fusion: Fusion = "score",
        fixed_weights: tuple[float, ...] | None = None,
        convolution_head: bool = False,
        causal: bool = True,
        rotary: bool = True,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_heads(width, heads, rotary=rotary)
        check_choice("fusion", fusion, get_args(Fusion))
        if levels < 1 or taps < 1:
            raise InputError(f"levels: got {levels}, taps: got {taps}; allowed: 1 or more")
        self.heads, self.head_width = heads, width // heads
        self.levels, self.taps, self.fusion = levels, taps, fusion
        self.causal, self.rotary = causal, rotary
        self.backend: Backend = backend
        self.downsample = nn.ModuleList(Downsample(width, taps, downsampling) for _ in range(levels - 1))
        # Only outputs have values of coarse levels to be made of.
        self.value_levels = levels if fusion == "output" else 1
        self.query_key_value = nn.ModuleList(
            linear(width, (3 if level < self.value_levels else 2) * width, bias=bias) for level in range(levels)
        )
        logits = torch.zeros(levels) if fixed_weights is None else _logits_of(fixed_weights, levels)
        self.level_logit = nn.Parameter(logits.repeat(heads, 1), requires_grad=fixed_weights is None)
        average = torch.full((taps,), 1 / taps)
        self.convolution = DepthwiseConvolution(width, taps, average) if convolution_head else None
        self.convolution_logit = nn.Parameter(torch.zeros(heads)) if convolution_head else None
        self.out = linear(width, width, bias=bias)

    def roles(self) -> dict[str, Role]:
        roles = {"level_logit": LOGIT}
        if self.convolution_logit is not None:
            roles["convolution_logit"] = LOGIT
        for level in range(self.levels):
            parts = 3 if level < self.value_levels else 2
            roles[f"query_key_value.{level}.weight"] = Role("core", decays=True, matrix=Matrix(parts=parts))
        return roles

    def level_weights(self) -> Float[Tensor, "h l"]:
        """alpha: the convex weights of the levels in every head."""
        return torch.softmax(self.level_logit, dim=-1)

    def initial_state(self, batch_size: int) -> HierarchicalCache:
        """The state before the first position."""
        like, width = self.out.weight, self.heads * self.head_width
        empty = like.new_empty(batch_size, self.heads, 0, self.head_width)
        tail = like.new_zeros(batch_size, self.taps - 1, width)
        return HierarchicalCache(
            keys=(empty,) * self.levels,
            values=(empty,) * self.value_levels,
            query=(empty,) * self.levels,
            tails=(tail,) * (self.levels - 1),
            convolution=None if self.convolution is None else self.convolution.initial_tail(batch_size),
            position=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: HierarchicalCache | None = None,
        *,
        added: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], HierarchicalCache]:
        check_takes_state(self.causal, state)
        start = 0 if state is None else common_position(state.position)
        state = self.initial_state(x.shape[0]) if state is None else state
        t = x.shape[1]
        if t == 0:
            return x, unmoved(state) if trail else state
        if start is None:
            return in_groups(self, x, state, state.position, added, trail=trail)
        rows, tails = self._levels_of(x, state, start)
        queries, keys, values = [], [], []
        for level, (q, k, *new_values) in enumerate(self._project(rows, start)):
            seen = -(-start >> level)
            values += [after(last_rows(state.values[level], seen), v) for v in new_values]
            keys.append(after(last_rows(state.keys[level], seen), k))
            # A position inside a cell that began before this call still uses that cell's query.
            begun = start % (1 << level) != 0
            queries.append(after(state.query[level], q) if begun else q)
        y = self._fuse(queries, keys, values, start, t)
        y, convolution = self._convolve(y, x, state.convolution)
        if trail:
            return self.out(merge_heads(y, added)), self._trail(state, rows, queries, keys, values, start)
        kept = tuple(q[:, :, -1:].clone() for q in queries)  # views would keep all queries in memory
        caches = tuple(map(owned, keys)), tuple(map(owned, values))
        state = HierarchicalCache(*caches, kept, tails, convolution, state.position + t)
        return self.out(merge_heads(y, added)), state

    @torch.no_grad()
    def attention_weights(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t t"] | None:
        """What every position takes of every other, in every head; all of it in memory. None with output fusion."""
        if self.fusion == "output":
            return None
        rows, _ = self._levels_of(x, self.initial_state(x.shape[0]))
        projected = self._project(rows, 0)
        queries, keys = [parts[0] for parts in projected], [parts[1] for parts in projected]
        values, alpha = identity_values(keys[0]), self.level_weights()
        return hierarchical_attention(queries, keys, values, alpha, t=x.shape[1], causal=self.causal)

    def learned(self) -> dict[str, list[list[float]]]:
        """The weights of the levels in every head."""
        return {"level_weights": self.level_weights().tolist()}

    @torch.no_grad()
    def score_levels(self, x: Float[Tensor, "b t d"]) -> list[LevelScores]:
        """Rows, unmasked scores, weights and forms of every level; positions rotate the scores, not the forms."""
        rows, _ = self._levels_of(x, self.initial_state(len(x)))
        levels = []
        for level, (level_rows, (q, k, *_)) in enumerate(zip(rows, self._project(rows, 0), strict=True)):
            projection = self.query_key_value[level]
            assert isinstance(projection, nn.Linear)
            queries, keys, *_ = projection.weight.double().unflatten(0, (-1, self.heads, self.head_width))
            weight = self.level_weights()[:, level].double() * self.head_width**-0.5
            levels.append(LevelScores(level_rows, (q @ k.mT).double(), weight, queries.mT @ keys))
        return levels

    def _levels_of(
        self, x: Tensor, state: HierarchicalCache, start: int = 0
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The new rows of every level, for x from position `start` on, and the tails after them."""
        rows, tails = [x], []
        for module, tail in zip(self.downsample, state.tails, strict=True):
            tail = tail.to(rows[-1].dtype)
            rows_below = rows[-1]
            rows.append(module(rows_below, tail, start))
            whole = torch.cat([tail, rows_below[:, max(0, rows_below.shape[1] - self.taps + 1) :]], dim=1)
            tails.append(whole[:, whole.shape[1] - self.taps + 1 :].clone())  # a view would keep all of `whole`
            start = -(-start // 2)
        return rows, tuple(tails)

    def _trail(
        self,
        state: HierarchicalCache,
        rows: list[Tensor],
        queries: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        start: int,
    ) -> HierarchicalCache:
        """The trail over new rows of every level, from all keys and values and the new queries; see `kmixer.trail`."""
        x = rows[0]
        positions = torch.arange(start, start + x.shape[1] + 1, device=x.device)
        seen = [-(-positions >> level) for level in range(self.levels)]  # rows of each level, by the tokens read
        later = [(counts[-1] - counts).tolist() for counts in seen]
        whole = [
            after(last, q[:, :, q.shape[2] - rows[level].shape[1] :])
            for level, (last, q) in enumerate(zip(state.query, queries, strict=True))
        ]
        tail = torch.full_like(positions, self.taps - 1)
        below = zip(state.tails, rows, later, strict=False)
        return HierarchicalCache(
            keys=tuple(map(ends, keys, later, seen)),
            values=tuple(map(ends, values, later, seen)),
            query=tuple(map(ends, whole, later, (counts.clamp(max=1) for counts in seen))),
            tails=tuple(ends(torch.cat([t.to(x.dtype), r], dim=1), after_it, tail) for t, r, after_it in below),
            convolution=None if state.convolution is None else last_inputs(state.convolution, x),
            position=counted(state.position, x.shape[1]),
        )

    def _project(self, rows: list[Tensor], start: int) -> list[tuple[Tensor, ...]]:
        """Of every level queries, keys and, where it has them, values (b, h, n, e) of its rows from `start` on."""
        positions = torch.arange(start, start + rows[0].shape[1], device=rows[0].device)
        angles = rotation(positions, self.head_width, rows[0].dtype) if self.rotary else None
        levels = []
        for level, level_rows in enumerate(rows):
            projected = self.query_key_value[level](level_rows)
            parts, first = projected.shape[-1] // level_rows.shape[-1], -start % (1 << level)
            of_cells = None if angles is None else angles.every(1 << level, first)
            rotated = 2 if self.rotary else 0
            levels.append(heads_apart(projected, self.heads, parts, rotated=rotated, angles=of_cells))
        return levels

    def _fuse(self, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], start: int, t: int) -> Tensor:
        """y (b, h, t, e) of the last t positions."""
        alpha = self.level_weights()
        if self.fusion == "score":
            backend: Backend = self.backend if start == 0 else "auto"
            return hierarchical_attention(queries, keys, values[0], alpha, t=t, causal=self.causal, backend=backend)
        alpha, y = alpha.to(values[0].dtype), None
        positions = torch.arange(start, start + t, device=alpha.device)
        for level, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            attended = softmax_attention(q, k, v.to(k.dtype), causal=self.causal)
            spread = attended[:, :, (positions >> level) - (start >> level)]
            weighted = alpha[:, level, None, None] * spread
            y = weighted if y is None else y + weighted
        assert y is not None
        return y

    def _convolve(self, y: Tensor, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """g y + (1 - g) convolution(x), and the last K - 1 inputs."""
        if self.convolution is None or self.convolution_logit is None:
            return y, None
        assert tail is not None
        filtered, tail = self.convolution(x, tail)
        g = torch.sigmoid(self.convolution_logit)[:, None, None].to(y.dtype)
        return g * y + (1 - g) * split_heads(filtered, self.heads), tail
