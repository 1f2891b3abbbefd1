"""Multi-head softmax attention with rotary positions: the baseline of every comparison, and its reduced forms."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.depthwise_convolution import DepthwiseConvolution
from kmixer.layers.exactly import exactly
from kmixer.layers.heads import (
    after,
    angles_after,
    check_takes_state,
    heads_apart,
    identity_values,
    kept,
    mask_of_each,
    merge_heads,
    seen_before,
    split_heads,
)
from kmixer.layers.linear import Linear, linear
from kmixer.layers.measured import FixedMixing, strength
from kmixer.layers.norms import NORM_EPS
from kmixer.layers.roles import Matrix, Role
from kmixer.layers.rotary import check_heads
from kmixer.ops.attention.softmax import softmax_attention
from kmixer.ops.linear import linear_map
from kmixer.state import known_position
from kmixer.trail import cached, counted, last_inputs, unmoved

# Channels of the input that decide how much of a value embedding each head takes.
GATE_CHANNELS = 32


class KeyValueCache(NamedTuple):
    """What softmax attention carries: rotated keys and values (b, h, s, e) it may still look at.

    `position` (b,) is the number of positions that each row has seen, which is the position of the next one; a row
    that has seen fewer than s has padding before them. `tail` (b, K - 1, d) are the last inputs of the convolution,
    where there is one.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    tail: Tensor | None = None


class SoftmaxAttention(nn.Module):
    """Softmax attention: out(sum_j softmax_j(R_i q_i . R_j k_j / sqrt(e)) v_j) in every head, over the allowed j.

    x is normalised by the caller, and the caller adds the residual: unlike a K2 layer, which is a
    whole block with its feed-forward part, this is the mixer alone, so that one block can hold
    this mixer or another.

    Args:
        width: d.
        heads: h; the head width e = d / h is even where positions rotate.
        causal: position i sees the positions up to i.
        window: of these the last `window` only, itself included.
        window_inclusive: count the window without position i itself.
        rotary: rotate queries and keys by their positions, R above.
        query_key_norm: x / sqrt(mean(x^2) + 1e-8) of every query and key after rotation.
        tie_query_key: one matrix for both.
        value_projection: without it the values are slices of x.
        convolution: K: queries and keys are of a causal depthwise convolution of x with K taps, which starts as
            the identity; the values are of x. None has none.
        value_embedding: take a value embedding in `forward`, through a gate 2 sigmoid(G x_:32) a head.
        bias: of all matrices.

    Shapes: x (b, t, d) to (b, t, d), and a `KeyValueCache` of at most window - 1 positions, or all.
    Raises InputError where heads does not divide width into such a head width, and for a state without causal.

    Sources: Vaswani et al. 2017; rotary positions: Su et al. 2021.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = True,
        window: int | None = None,
        window_inclusive: bool = False,
        rotary: bool = True,
        query_key_norm: bool = False,
        tie_query_key: bool = False,
        value_projection: bool = True,
        convolution: int | None = None,
        value_embedding: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_heads(width, heads, rotary=rotary)
        if window is not None and (window < 1 or not causal):
            raise InputError(f"window: got {window} with causal={causal}; it is 1 or more, and goes with causal=True")
        if convolution is not None and convolution < 1:
            raise InputError(f"convolution: got {convolution}; allowed: 1 tap or more, or None")
        self.heads, self.head_width = heads, width // heads
        self.causal, self.rotary, self.query_key_norm = causal, rotary, query_key_norm
        self.reach = None if window is None else window + window_inclusive
        # Which of the projections are queries, keys and values; None is x itself.
        self.parts = (0, 0 if tie_query_key else 1, (1 if tie_query_key else 2) if value_projection else None)
        matrices = 3 - tie_query_key - (not value_projection)
        self.query_key_value = linear(width, matrices * width, bias=bias)
        identity = torch.eye(convolution or 1)[0]
        self.convolution = None if convolution is None else DepthwiseConvolution(width, convolution, identity)
        self.gate = linear(min(GATE_CHANNELS, width), heads, bias=False) if value_embedding else None
        self.out = linear(width, width, bias=bias)

    def roles(self) -> dict[str, Role]:
        map_ = self.query_key_value
        parts = map_.out_features // map_.in_features
        return {"query_key_value.weight": Role("core", decays=True, matrix=Matrix(parts=parts))}

    def initial_state(self, batch_size: int) -> KeyValueCache:
        """The state before the first position: an empty cache."""
        empty = self.out.weight.new_empty(batch_size, self.heads, 0, self.head_width)
        tail = None if self.convolution is None else self.convolution.initial_tail(batch_size)
        return KeyValueCache(empty, empty, torch.zeros(batch_size, dtype=torch.int64, device=empty.device), tail)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: KeyValueCache | None = None,
        value_embedding: Float[Tensor, "b t d"] | None = None,
        *,
        added: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], KeyValueCache]:
        check_takes_state(self.causal, state)
        start = 0 if state is None else known_position(state.position)
        state = self.initial_state(x.shape[0]) if state is None else state
        t = x.shape[1]
        if t == 0:
            return x, unmoved(state) if trail else state
        queries, keys, values, tail = self._project(x, state, start)
        if self.gate is not None:
            if value_embedding is None:
                raise InputError("value_embedding: got none; a layer with value_embedding=True takes one")
            gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (b, t, h)
            values = values + gate.transpose(1, 2).unsqueeze(-1) * split_heads(value_embedding, self.heads)
        keys, values = (
            after(seen_before(past, state.position, start), new)
            for past, new in ((state.keys, keys), (state.values, values))
        )
        if start is None:
            mask = mask_of_each(state.position, t, keys.shape[2], self.reach)
            y = F.scaled_dot_product_attention(queries, keys, values.to(keys.dtype), attn_mask=mask)
        else:
            y = softmax_attention(queries, keys, values.to(keys.dtype), causal=self.causal, reach=self.reach)
        if trail:
            most = None if self.reach is None else self.reach - 1
            keys, values = (cached(part, state.position, t, most) for part in (keys, values))
            tail = None if state.tail is None else last_inputs(state.tail, x)
            cache = KeyValueCache(keys, values, counted(state.position, t), tail)
        else:
            cache = KeyValueCache(kept(keys, self.reach), kept(values, self.reach), state.position + t, tail)
        return self.out(merge_heads(y, added)), cache

    @torch.no_grad()
    def attention_weights(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t t"]:
        """What every position takes of every other, in every head; all of it in memory."""
        queries, keys, _, _ = self._project(x, self.initial_state(len(x)), 0)
        return softmax_attention(queries, keys, identity_values(keys), causal=self.causal, reach=self.reach)

    def fixed_mixing(self, t: int) -> FixedMixing | None:
        """What it does while all scores are alike: the mean of the values that a position may look at.

        None with a value embedding, which is added to the values.
        """
        if self.gate is not None or not exactly(self.out, Linear) or not exactly(self.query_key_value, Linear):
            return None
        lag = torch.arange(t)[:, None] - torch.arange(t)
        seen = lag >= 0 if self.causal else torch.ones_like(lag, dtype=torch.bool)
        if self.reach is not None:
            seen = seen & (lag < self.reach)
        value, width = self.parts[2], self.out.in_features
        of_values = 1.0 if value is None else strength(self.query_key_value.weight[value * width : (value + 1) * width])
        return FixedMixing(seen / seen.sum(1, keepdim=True), strength(self.out.weight) * of_values)

    def _project(
        self, x: Tensor, state: KeyValueCache, start: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values (b, h, t, e), and the tail of the convolution; `start` as of `angles_after`."""
        tail = state.tail
        if self.convolution is None:
            projected = self.query_key_value(x)
        else:
            assert tail is not None
            filtered, tail = self.convolution(x, tail)
            projected = self._project_apart(filtered, x)
        query, key, value = self.parts
        angles = angles_after(state.position, start, x.shape[1], self.head_width, x.dtype) if self.rotary else None
        parts, rotated = projected.shape[-1] // x.shape[-1], key + 1 if self.rotary else 0
        heads = heads_apart(projected, self.heads, parts, rotated=rotated, angles=angles)
        queries, keys = heads[query], heads[key]
        if self.query_key_norm:
            queries, keys = (F.rms_norm(tensor, (self.head_width,), eps=NORM_EPS) for tensor in (queries, keys))
        if value is not None:
            return queries, keys, heads[value], tail
        # A view, where a caller may fill the same memory again, which autograd would not allow.
        values = split_heads(x if torch.is_grad_enabled() else x.clone(), self.heads)
        return queries, keys, values, tail

    def _project_apart(self, filtered: Tensor, x: Tensor) -> Tensor:
        """Queries and keys of the filtered inputs, values of the inputs themselves, side by side."""
        map_, width = self.query_key_value, x.shape[-1] * (1 + self.parts[1])
        if not exactly(map_, Linear):
            return torch.cat([map_(filtered)[..., :width], map_(x)[..., width:]], dim=-1)
        bias = map_.bias
        parts = [
            linear_map(part, map_.weight[rows], None if bias is None else bias[rows])
            for part, rows in ((filtered, slice(width)), (x, slice(width, None)))
        ]
        return torch.cat(parts, dim=-1)
