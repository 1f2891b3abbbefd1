"""Gaussian kernel attention as a layer: heads are slices of the input, and one matrix mixes what they average."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.errors import InputError, check_choice
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
from kmixer.layers.linear import linear
from kmixer.layers.norms import NORM_EPS
from kmixer.layers.roles import LOGIT, Role
from kmixer.layers.rotary import check_heads
from kmixer.ops.attention.gaussian import Backend, as_softmax, gaussian_attention
from kmixer.state import known_position
from kmixer.trail import cached, counted, unmoved

ValueSource = Literal["kernel", "pre_rope"]


class GaussianCache(NamedTuple):
    """What the layer carries: the keys (b, h, s, e) it may still look at, which are the values too.

    `values` is None unless they are another tensor than the keys. `position` (b,) is the number of tokens that each
    row has seen; a row that has seen fewer than s has padding before them.
    """

    keys: Tensor
    values: Tensor | None
    position: Tensor


class GaussianAttention(nn.Module):
    """out(concat_h(sum_j W^h_ij x^h_j)), W^h_ij ~ exp(-|x^h_i - x^h_j|^2 / (2 sigma_h^2)) over the allowed j.

    x^h is the h-th slice of the input's channels, rotated by its position and normalised where these are
    asked for; there is no query, key or value matrix. x is normalised by the caller, and the caller adds
    the residual. Every token's best key is itself and the weights are symmetric before the mask, so a
    head cannot look at the previous token more than at its own: the layer smooths, it does not copy.

    Args:
        width: d.
        heads: h; the head width e = d / h is even where positions rotate.
        causal: position i sees the positions up to i.
        window, window_inclusive, exclude_self: see `gaussian_attention`.
        rotary: rotate keys by their positions.
        head_norm: x / sqrt(mean(x^2) + 1e-8) in every head after rotation.
        value_source: "kernel" averages the rotated slices, as the paper's formula says;
            "pre_rope" the slices before rotation.
        initial_sigma: bandwidth every head starts with; sqrt(e) when None, the size of a normalised slice.
        bias: of the output matrix.
        backend: of `gaussian_attention`.

    Shapes: x (b, t, d) to (b, t, d), and a `GaussianCache` of at most window - 1 positions, or all.
    Raises InputError where heads does not divide width, for another value_source, for an initial_sigma that is not
    positive, and for a state without causal.

    Parameters: d^2 + h (+ d). `log_sigma` takes no weight decay and no matrix optimiser.
    Source: Kundu et al. 2026 (arXiv 2605.02144).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool = True,
        window: int | None = None,
        window_inclusive: bool = False,
        exclude_self: bool = False,
        rotary: bool = True,
        head_norm: bool = True,
        value_source: ValueSource = "kernel",
        initial_sigma: float | None = None,
        bias: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_heads(width, heads, rotary=rotary)
        check_choice("value_source", value_source, get_args(ValueSource))
        if initial_sigma is not None and not initial_sigma > 0:
            raise InputError(f"initial_sigma: got {initial_sigma}; allowed: more than 0")
        self.heads, self.head_width = heads, width // heads
        self.causal, self.window, self.window_inclusive = causal, window, window_inclusive
        self.reach = None if window is None else window + window_inclusive
        self.exclude_self, self.rotary, self.head_norm = exclude_self, rotary, head_norm
        self.value_source = value_source
        self.backend: Backend = backend
        sigma = math.sqrt(self.head_width) if initial_sigma is None else initial_sigma
        self.log_sigma = nn.Parameter(torch.full((heads,), math.log(sigma)))
        self.out = linear(width, width, bias=bias)

    def roles(self) -> dict[str, Role]:
        return {"log_sigma": LOGIT}

    def initial_state(self, batch_size: int) -> GaussianCache:
        """The state before the first position: an empty cache."""
        empty = self.out.weight.new_empty(batch_size, self.heads, 0, self.head_width)
        position = torch.zeros(batch_size, dtype=torch.int64, device=empty.device)
        return GaussianCache(empty, empty if self.keeps_values else None, position)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: GaussianCache | None = None,
        *,
        added: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], GaussianCache]:
        check_takes_state(self.causal, state)
        start = 0 if state is None else known_position(state.position)
        state = self.initial_state(x.shape[0]) if state is None else state
        t = x.shape[1]
        if t == 0:
            return x, unmoved(state) if trail else state
        new, values = self._heads_of(x, state.position, start)
        keys = after(seen_before(state.keys, state.position, start), new)
        if values is not None:
            assert state.values is not None
            values = after(seen_before(state.values, state.position, start), values)
        if start is None:
            y = self._attend_in_each(new, keys, keys if values is None else values, state.position)
        else:
            y = self._attend(new, keys, values)
        if trail:
            most = None if self.reach is None else self.reach - 1
            of_values = None if values is None else cached(values, state.position, t, most)
            state = GaussianCache(cached(keys, state.position, t, most), of_values, counted(state.position, t))
        else:
            kept_values = None if values is None else kept(values, self.reach)
            state = GaussianCache(kept(keys, self.reach), kept_values, state.position + t)
        return self.out(merge_heads(y, added)), state

    @torch.no_grad()
    def attention_weights(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t t"]:
        """What every position takes of every other, in every head; all of it in memory."""
        keys, _ = self._heads_of(x, self.initial_state(len(x)).position, 0)
        return self._attend(keys, keys, identity_values(keys))

    def sigma(self) -> Float[Tensor, " h"]:
        """The bandwidth of each head."""
        return torch.exp(self.log_sigma)

    def learned(self) -> dict[str, list[float]]:
        """The bandwidths."""
        return {"sigma": self.sigma().tolist()}

    @property
    def keeps_values(self) -> bool:
        """Whether the values are not the keys."""
        return self.rotary and self.value_source == "pre_rope"

    def _attend(self, x: Tensor, keys: Tensor, values: Tensor | None) -> Tensor:
        return gaussian_attention(
            x,
            self.log_sigma,
            keys=keys,
            values=values,
            causal=self.causal,
            window=self.window,
            window_inclusive=self.window_inclusive,
            exclude_self=self.exclude_self,
            backend=self.backend,
        )

    def _attend_in_each(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """The same for rows that stand at other positions, as softmax attention under a mask of each."""
        mask = mask_of_each(position, x.shape[2], keys.shape[2], self.reach, exclude_self=self.exclude_self)
        with torch.autocast(x.device.type, enabled=False):
            queries, features = as_softmax(x, keys, self.log_sigma, causal=False)
            values = F.pad(values.to(queries.dtype), (0, queries.shape[-1] - values.shape[-1]))
            y = F.scaled_dot_product_attention(queries, features, values, attn_mask=mask, scale=1.0)
            return y[..., : self.head_width].to(x.dtype)

    def _heads_of(self, x: Tensor, position: Tensor, start: int | None) -> tuple[Tensor, Tensor | None]:
        """Keys (b, h, t, e), and values where they are others; `start` as of `angles_after`."""
        if not torch.is_grad_enabled():
            x = x.clone()  # they may be views: a caller may fill the same memory again, which autograd would not allow
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        angles = angles_after(position, start, x.shape[1], self.head_width, x.dtype) if self.rotary else None
        keys = self._normalised(*heads_apart(x, self.heads, 1, rotated=int(self.rotary), angles=angles))
        return keys, self._normalised(split_heads(x, self.heads)) if self.keeps_values else None

    def _normalised(self, heads: Tensor) -> Tensor:
        return F.rms_norm(heads, (self.head_width,), eps=NORM_EPS) if self.head_norm else heads
