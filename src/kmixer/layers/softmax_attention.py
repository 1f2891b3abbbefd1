"""Causal multi-head softmax attention with rotary positions: the baseline of every comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.feed_forward import linear

# Longest wavelength of the rotations, in units of 2 pi positions (Su et al. 2021).
ROTARY_BASE = 10_000.0


class KeyValueCache(NamedTuple):
    """What softmax attention carries: rotated keys and values (b, h, t, e) of the t positions seen so far."""

    keys: Tensor
    values: Tensor

    @property
    def position(self) -> int:
        """The number of positions seen, which is the position of the next one."""
        return self.keys.shape[2]


class SoftmaxAttention(nn.Module):
    """Causal softmax attention: out(sum_{j <= i} softmax_j(R_i q_i . R_j k_j / sqrt(e)) v_j) in every head.

    x is normalised by the caller, and the caller adds the residual: unlike a K2 layer, which is a
    whole block with its feed-forward part, this is the mixer alone, so that one block can hold
    this mixer or another.

    Args:
        width: d.
        heads: h; the head width e = d / h is even, because rotations act on pairs of channels.
        dropout: probability of dropping an attention weight in training.

    Shapes: x (b, t, d) to (b, t, d), and a `KeyValueCache` that grows by t positions.
    Raises InputError where heads does not divide width into an even head width.

    Sources: Vaswani et al. 2017; rotary positions: Su et al. 2021.
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.head_width = heads, width // heads
        self.dropout = dropout
        self.query_key_value = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False)

    def initial_state(self, batch_size: int) -> KeyValueCache:
        """The state before the first position: an empty cache."""
        empty = self.out.weight.new_empty(batch_size, self.heads, 0, self.head_width)
        return KeyValueCache(empty, empty)

    def forward(
        self, x: Float[Tensor, "b t d"], state: KeyValueCache | None = None
    ) -> tuple[Float[Tensor, "b t d"], KeyValueCache]:
        if state is None:
            state = self.initial_state(x.shape[0])
        if x.shape[1] == 0:
            return x, state
        past, t = state.position, x.shape[1]
        # (b, t, 3 d) -> three of (b, h, t, e)
        parts = self.query_key_value(x).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        positions = torch.arange(past, past + t, device=x.device)
        queries, keys = rotate(parts[:2], positions).unbind(0)
        values = parts[2]
        if past:  # the cache in the dtype of autocast, where that is on
            keys = torch.cat([state.keys.to(keys.dtype), keys], dim=2)
            values = torch.cat([state.values.to(values.dtype), values], dim=2)
        # is_causal aligns its triangle to the upper left, which is right for an empty cache only;
        # a single new position sees everything and needs no mask.
        mask = None if past == 0 or t == 1 else lower_right_mask(t, past + t, x.device)
        y = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=past == 0 and t > 1,
        )
        return self.out(y.transpose(1, 2).flatten(2)), KeyValueCache(keys, values)


def check_heads(width: int, heads: int) -> None:
    """Raises InputError where heads does not divide width into an even head width."""
    if width % heads or width // heads % 2:
        raise InputError(
            f"heads: got {heads} for width {width}; heads must divide width, and width / heads must be even"
        )


def rotate(x: Float[Tensor, "*batch t e"], positions: Int[Tensor, " t"]) -> Float[Tensor, "*batch t e"]:
    """Rotate channels (i, i + e/2) of every position p by the angle p / 10000^(2 i / e).

    The product of a rotated query and a rotated key depends on their distance only. Angles and
    tables are float64 for float64 inputs and float32 for every other dtype: an angle in bfloat16
    would be off by whole turns from position 256 on.

    Args:
        x: queries or keys (..., t, e), e even.
        positions: (t,), counted from the start of the sequence.

    Returns:
        The rotated vectors, in the dtype of x.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=dtype) / half
    angle = positions[:, None].to(dtype) * ROTARY_BASE**-exponent
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def lower_right_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """True where the last `queries` of `keys` positions may look: (queries, keys), itself and before."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
