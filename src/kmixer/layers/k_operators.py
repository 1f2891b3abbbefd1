"""The three K-Operators layers: K1 mixes channels, K2 mixes time, K0 reads out.

K1 and K2 are blocks, and K0 adds to its input too, (b, t, d). Source: Koneko 2026 (Zenodo 19004569, 19136398).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kmixer.errors import InputError, check_choice
from kmixer.layers.base_kernel import BaseKernel
from kmixer.layers.block import Block
from kmixer.layers.exactly import exactly
from kmixer.layers.feed_forward import FeedForward
from kmixer.layers.linear import linear
from kmixer.layers.measured import FixedMixing, strength
from kmixer.layers.norms import NORM_EPS, Derf, DyT, PointwiseNorm, RMSNorm
from kmixer.layers.roles import BIAS, LOGIT, TRANSPOSED_MATRIX, VECTOR, Role
from kmixer.ops.base_kernel import State as BaseKernelState
from kmixer.ops.decay.recurrence import Backend, decayed_linear_attention
from kmixer.ops.fused import normalize, scaled_norm_add, silu_gate
from kmixer.ops.linear import linear_map
from kmixer.ops.mixing import decayed_and_filtered, mixes
from kmixer.ops.pointwise_norm import Pointwise, keep_and_pointwise_norm
from kmixer.trail import folded

DecayInit = Literal["time_constant", "linear", "fraction"]
# Before the mixing of a block, and before its feed-forward part.
Norms = tuple[nn.Module, nn.Module]

QUERY_KEY_STD = 0.05
# Time constants of the initialisation end at a million positions, and logits at +-13.8.
MIN_FRACTION = 1e-6


class K1Mixer(nn.Module):
    """The mixing of a K1 layer alone, A x + a: position by position, so that its state is None.

    Args:
        width: d.

    Shapes: x (..., d) to (..., d), and None.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = linear(width, width)

    def initial_state(self, batch_size: int) -> None:
        """None."""
        return

    def forward(
        self, x: Float[Tensor, "... d"], state: None = None, *, trail: bool = False
    ) -> tuple[Float[Tensor, "... d"], None]:
        return self.projection(x), None

    def mix(
        self, x: Float[Tensor, "... d"], state: None = None, *, trail: bool = False
    ) -> tuple[Float[Tensor, "... d"], None]:
        """What `forward` does, but for the matrix: nothing."""
        return x, None

    def fixed_mixing(self, t: int) -> FixedMixing:
        """Every position takes itself alone."""
        return FixedMixing(torch.eye(t), strength(self.projection.weight))


class K1(Block):
    """A block that mixes channels: h + A norm(h) + a, then h + FeedForward(norm(h)), position-wise.

    Args:
        width: d.
        mlp_dropout: on the hidden units of the feed-forward part.
        norms: before the mixing and the feed-forward part; None makes two `RMSNorm`.

    Shapes: h (..., d) to (..., d), and a `BlockState` that holds nothing.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), layer K1.
    """

    mixer: K1Mixer
    feed_forward: FeedForward

    def __init__(self, width: int, *, mlp_dropout: float = 0.0, norms: Norms | None = None) -> None:
        mixing, feed_forward = norms or (RMSNorm(width), RMSNorm(width))
        parts = (mixing, K1Mixer(width), feed_forward, FeedForward(width, dropout=mlp_dropout))
        super().__init__(*parts, projecting=K1Mixer)


class K0(nn.Module):
    """h + gain * norm(h) + bias: the read-out.

    Args:
        width: d.
        norm: None makes an `RMSNorm`. Another has no gain and no bias of its own: they would be there twice.

    Shapes: h (..., d) to (..., d).

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), layer K0.
    """

    def __init__(self, width: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(width) if norm is None else norm
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def roles(self) -> dict[str, Role]:
        return {"gain": VECTOR, "bias": BIAS}

    def forward(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        if exactly(self.norm, RMSNorm):
            return scaled_norm_add(h, self.gain * self.norm.weight, self.bias, NORM_EPS)
        if exactly(self.norm, DyT, Derf):
            h, normed = keep_and_pointwise_norm(h, self.joined(self.norm))
            return h + normed
        return h + self.gain * self.norm(h) + self.bias

    def joined(self, norm: PointwiseNorm) -> Pointwise:
        """gain norm(h) + bias as one, of a norm that may have a gain and a bias of its own."""
        weights = norm.weights()
        gain = self.gain if weights.gain is None else self.gain * weights.gain
        bias = self.bias if weights.bias is None else self.bias + self.gain * weights.bias
        return weights._replace(gain=gain, bias=bias)


class K2State(NamedTuple):
    """What a K2 layer carries: S (b, r, d) of the decay path, and the base kernel's state if any."""

    decay: Tensor
    base: BaseKernelState | None


class K2Mixer(nn.Module):
    """The mixing of a K2 layer alone: a base kernel and a decayed low-rank recurrence over the normalised input.

        q, k = normalise(x u), normalise(x v)                 unit vectors of R^r
        S_t = diag(g) S_{t-1} + k_t^T x_t                     g = low + (high - low) sigmoid(l)
        y_t = (alpha * q_t) S_t + sigmoid(gate) (base x)_t    alpha = cap sigmoid(a)
        P (SiLU(G x) * y) + p                                 without an output gate: P y + p

    x is normalised by the caller, and the caller adds the residual.

    Args:
        width: d.
        rank: r, the number of decays.
        base_kernel: a `BaseKernel` of this layer, "shared" when the caller passes one to every
            `forward` call, None for the decay path alone.
        gate_init: initial logit of the base kernel's gate.
        decay_range: (low, high) of the decays, 0 < low < high <= 1. A decay of 1 never forgets
            and ruins long streams.
        decay_init: "time_constant" spaces 1/(1 - g) logarithmically over the whole range;
            "linear" starts g from 0.95 to 0.995, as far as the range allows;
            "fraction" starts sigmoid(l) there, that is g close to high (v0.1 did).
        alpha_cap: upper end of alpha.
        alpha_per_channel: one alpha for each of the r channels instead of one for the layer.
        output_gate: multiply what was mixed by SiLU(G x), G (d, d); the preprints have none.
        copy_gate: hold the gate of Koneko's copy branch, unused and frozen, so that a model
            has all parameters of Koneko's.
        backend: of `decayed_linear_attention`.

    Shapes: x (b, t, d) to (b, t, d), and a `K2State`.
    Raises InputError for a rank below 1, a decay_range or decay_init that is not allowed, and a shared kernel that is
    missing or not asked for.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), layer K2, and Koneko's later code; the output gate is ours.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        base_kernel: BaseKernel | Literal["shared"] | None = None,
        gate_init: float = 0.0,
        decay_range: tuple[float, float] = (0.05, 0.999),
        decay_init: DecayInit = "time_constant",
        alpha_cap: float = 1.0,
        alpha_per_channel: bool = True,
        output_gate: bool = False,
        copy_gate: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"rank: got {rank}; allowed: 1 or more")
        check_choice("decay_init", decay_init, get_args(DecayInit))
        low, high = decay_range
        if not 0 < low < high <= 1:
            raise InputError(f"decay_range: got {decay_range}; allowed: 0 < low < high <= 1")
        self.width, self.rank = width, rank
        self.decay_range, self.alpha_cap = decay_range, alpha_cap
        self.backend: Backend = backend

        self.query = nn.Parameter(QUERY_KEY_STD * torch.randn(width, rank))
        self.key = nn.Parameter(QUERY_KEY_STD * torch.randn(width, rank))
        self.decay_logit = nn.Parameter(initial_decay_logit(rank, low, high, decay_init))
        self.alpha_logit = nn.Parameter(torch.zeros(rank) if alpha_per_channel else torch.zeros(()))
        self.base_kernel = None if base_kernel == "shared" else base_kernel
        self.gate_logit = None if base_kernel is None else nn.Parameter(torch.tensor(float(gate_init)))
        # sigmoid(-2.1972) = 0.1, where Koneko's copy branch starts.
        self.copy_gate_logit = nn.Parameter(torch.tensor(-2.1972), requires_grad=False) if copy_gate else None
        self.output_gate = linear(width, width, bias=False) if output_gate else None
        self.projection = linear(width, width)

    def decay(self) -> Float[Tensor, " r"]:
        """The decays g (r,)."""
        low, high = self.decay_range
        return low + (high - low) * torch.sigmoid(self.decay_logit)

    def alpha(self) -> Tensor:
        """Weights of the decay path: (r,), or () for one per layer."""
        return self.alpha_cap * torch.sigmoid(self.alpha_logit)

    def roles(self) -> dict[str, Role]:
        logits = ("decay_logit", "alpha_logit", "gate_logit", "copy_gate_logit")
        roles = {name: LOGIT for name in logits if getattr(self, name) is not None}
        return {"query": TRANSPOSED_MATRIX, "key": TRANSPOSED_MATRIX, **roles}

    def learned(self) -> dict[str, Any]:
        """Decays, their weights, and where there is a base kernel the gate on it."""
        gate = {} if self.gate_logit is None else {"gate": torch.sigmoid(self.gate_logit).item()}
        return {"decay": self.decay().tolist(), "alpha": self.alpha().reshape(-1).tolist(), **gate}

    def initial_state(self, batch_size: int, base_kernel: BaseKernel | None = None) -> K2State:
        """The state before the first position; `base_kernel` as in `forward`."""
        kernel = self._kernel(base_kernel)
        dtype = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        decay = self.query.new_zeros(batch_size, self.rank, self.width, dtype=dtype)
        return K2State(decay, None if kernel is None else kernel.initial_state(batch_size, self.width))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: K2State | None = None,
        base_kernel: BaseKernel | None = None,
        *,
        added: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], K2State]:
        """Mix. `base_kernel` is the stack's kernel when this layer was made for a shared one; `added` goes to y."""
        y, state = self.mix(x, state, base_kernel, added=added, trail=trail)
        return self.projection(y), state

    def mix(
        self,
        x: Float[Tensor, "b t d"],
        state: K2State | None = None,
        base_kernel: BaseKernel | None = None,
        *,
        added: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], K2State]:
        """What `forward` does, but for the last matrix."""
        y, state = self._mixed(x, state, base_kernel, trail=trail)
        if added is not None:
            y = y + added.to(y.dtype)
        if self.output_gate is not None:
            y = silu_gate(y, self.output_gate(x))
        return y, state

    def _mixed(
        self, x: Tensor, state: K2State | None, base_kernel: BaseKernel | None, *, trail: bool
    ) -> tuple[Tensor, K2State]:
        """The sum of both branches."""
        kernel = self._kernel(base_kernel)
        state = self.initial_state(len(x), base_kernel) if state is None and trail else state
        known = exactly(kernel, BaseKernel) and kernel.streams and type(self) is K2Mixer and self.backend == "auto"
        if known and kernel is not None and self.gate_logit is not None:
            weights = (self.query, self.key, self.decay_logit, self.alpha_logit, self.gate_logit)
            kept = (None, None) if state is None else (state.decay, state.base)
            if mixes(x, weights, kernel.weights[0], self.rank, *kept):
                q, k = self._queries_keys(x)
                lags = torch.sigmoid(self.gate_logit) * kernel.weights[0]
                inputs = (self.alpha() * q, k, x, torch.log(self.decay()), lags, *kept)
                y, *states = decayed_and_filtered(*inputs)
                after = K2State(*states)
                return y, self._trail(k, x, state, after, kernel) if trail and state is not None else after
        y, base, state = self.branches(x, state, base_kernel, trail=trail)
        return y if base is None else y + base, state

    def branches(
        self,
        x: Float[Tensor, "b t d"],
        state: K2State | None = None,
        base_kernel: BaseKernel | None = None,
        *,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b t d"] | None, K2State]:
        """What the two ways of mixing make of the normalised input: decay path, gated base kernel or None."""
        kernel = self._kernel(base_kernel)
        state = self.initial_state(len(x), base_kernel) if state is None and trail else state
        q, k = self._queries_keys(x)
        y, decay_state = decayed_linear_attention(
            self.alpha() * q,
            k,
            x,
            torch.log(self.decay()),
            state=None if state is None else state.decay,
            backend=self.backend,
        )
        base, base_state = None, None
        if kernel is not None:
            assert self.gate_logit is not None
            base, base_state = kernel(x, None if state is None else state.base, torch.sigmoid(self.gate_logit))
        after = K2State(decay_state, base_state)
        return y, base, self._trail(k, x, state, after, kernel) if trail and state is not None else after

    def _trail(self, k: Tensor, x: Tensor, before: K2State, after: K2State, kernel: BaseKernel | None) -> K2State:
        """What has the states after any part of x: keys k, the states before x and after it."""
        decay = folded(before.decay, self.decay(), k, x, after.decay)
        if kernel is None or after.base is None:
            return K2State(decay, None)
        return K2State(decay, kernel.trail(x, before.base, after.base))

    def _queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (b, t, r)."""
        queries_keys = linear_map(x, torch.cat([self.query, self.key], dim=1).T).unflatten(-1, (2, self.rank))
        # Under autocast the product is bfloat16; the recurrence is float32.
        q, k = normalize(queries_keys.to(self.query.dtype), NORM_EPS).unbind(-2)
        return q, k

    @torch.no_grad()
    def branch_energies(self, x: Tensor, state: Any = None, *extra: Any) -> tuple[float, float] | None:
        """Sums of squares of the gated base kernel and of the decay path; None without a base kernel."""
        decay, base, _ = self.branches(x, state, *extra)
        return None if base is None else (float(base.double().square().sum()), float(decay.double().square().sum()))

    def _kernel(self, shared: BaseKernel | None) -> BaseKernel | None:
        expects_shared = self.gate_logit is not None and self.base_kernel is None
        if expects_shared != (shared is not None):
            raise InputError(
                "this K2 layer was made with base_kernel='shared': pass the kernel to every call"
                if expects_shared
                else "this K2 layer was not made with base_kernel='shared': it takes no kernel from outside"
            )
        return self.base_kernel if shared is None else shared


class K2(Block):
    """A block that mixes time: h + mixing(norm(h)), then h + FeedForward(norm(h)).

    Args:
        width, rank: d and r.
        mlp_dropout, residual_dropout: on the hidden units, and on what the mixing adds.
        norms: before the mixing and the feed-forward part; None makes two `RMSNorm`.
        mixing: the keyword arguments of `K2Mixer`.

    Shapes: h (b, t, d) to (b, t, d), and a `BlockState` of a `K2State`.
    Raises InputError as `K2Mixer` does.

    Source: Koneko 2026 (Zenodo 19004569 and 19136398), layer K2.
    """

    mixer: K2Mixer
    feed_forward: FeedForward

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        mlp_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        norms: Norms | None = None,
        **mixing: Any,
    ) -> None:
        mixer = K2Mixer(width, rank, **mixing)
        before_mixing, before_feed_forward = norms or (RMSNorm(width), RMSNorm(width))
        parts = (before_mixing, mixer, before_feed_forward, FeedForward(width, dropout=mlp_dropout))
        super().__init__(*parts, mixing_dropout=residual_dropout, projecting=K2Mixer)


def initial_decay_logit(rank: int, low: float, high: float, init: DecayInit) -> Tensor:
    """Logits (r,) of the decays at the start of training; see `K2Mixer` for the three ways."""
    if init == "fraction":
        fraction = torch.linspace(0.95, 0.995, rank, dtype=torch.float64)
    elif init == "linear":
        first, last = max(low + 1e-4, 0.95), min(high - 1e-4, 0.995)
        if first > last:  # the range lies outside [0.95, 0.995]: start in its middle
            first = last = (low + high) / 2
        fraction = (torch.linspace(first, last, rank, dtype=torch.float64) - low) / (high - low)
    else:
        shortest, longest = 1 / (1 - low), 1 / (1 - min(high, 1 - MIN_FRACTION))
        exponent = torch.linspace(0, 1, rank, dtype=torch.float64)
        decay = 1 - 1 / (shortest * (longest / shortest) ** exponent)
        fraction = (decay - low) / (high - low)
    return torch.logit(fraction.clamp(MIN_FRACTION, 1 - MIN_FRACTION)).to(torch.get_default_dtype())
