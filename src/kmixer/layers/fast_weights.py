"""Fast weights: the last matrix of a feed-forward layer goes on learning from what it reads, without a label.

In-place test-time training. What such a layer carries is state as any other; what it has learned ends with it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmixer.errors import InputError, check_choice
from kmixer.layers.norms import NORM_EPS
from kmixer.layers.roles import LOGIT, TABLE, TRANSPOSED_MATRIX, Role
from kmixer.ops.decay.recurrence import decayed_linear_attention
from kmixer.ops.fast_weights import fast_weights, written
from kmixer.ops.fused import normalize, rms_norm
from kmixer.ops.linear import linear_map
from kmixer.state import in_order, map_tensors, owned, parts_between, replaced, rows
from kmixer.trail import counted, ends, every, folded, in_time, joined, stepwise, unmoved

Target = Literal["embed", "hidden"]
Init = Literal["zero", "next"]

# Time constants in tokens that can be learned.
SHORTEST_TAU, LONGEST_TAU = 100.0, 100_000.0
# Standard deviation of the diagonal of W_t, beside a filter of zeros; and its diagonal where the filter is not.
TARGET_STD, NEXT_TARGET = 0.2, 0.1


class FastState(NamedTuple):
    """What fast weights carry: the weights, and what the chunk that is not finished will write.

    weights: F^T (b, f, d), float32 (float64 of float64 models); of the token form S.
    hidden: Z of the unfinished chunk (b, s, f); of the token form that of the last position, at unit length (b, 1, f).
    targets: the same of T (b, s, d); of the token form nothing (b, 0, d).
    position: how many positions a row has read since it began or was reset (b,).
    """

    weights: Tensor
    hidden: Tensor
    targets: Tensor
    position: Tensor


class _Fixed(NamedTuple):
    """W_0 and the bias behind it; and whether what they make of Z is part of what is returned."""

    weight: Tensor
    bias: Tensor | None
    joined: bool

    def of(self, hidden: Tensor) -> Tensor:
        return linear_map(hidden, self.weight, self.bias)


class FastWeights(nn.Module):
    """What a feed-forward layer adds to what its last matrix W_0 makes of its hidden units Z: Z F^T.

        Y_i = Z_i (W_0 + F_i)^T                        chunk i of C positions reads, then writes
        F_{i+1} = lambda F_i + rate V_i^T Z_i          F_0 = 0, lambda = (1 - 1 / tau)^C
        V = filter(T) W_t                              T (b, t, d); the filter stays inside a chunk

    With a chunk of one position, the token form: what is written is read at once, decays are learned by hidden unit,
    and there is no filter:

        y_t = z_t W_0^T + n_t S_t                      n = z / |z|, S_0 = 0
        S_t = diag(g) S_{t-1} + n_{t-1}^T (rate T_t W_t)         g = 1 - 1 / tau

    Rows share nothing. F is state: it begins at zero with every sequence and is never saved with the weights.

    Args:
        width, hidden_width: d and f.
        chunk: C.
        rate: of a token's write, which sums over a chunk.
        tau: after how many tokens F has forgotten to 1 / e, before training: one learned number a layer, between 100
            and 100,000. None never forgets, which only short sequences stand: see `check_stream`.
        target: what T is. "embed": what the stack reads, divided by its root mean square; "hidden": what the layer
            reads.
        taps: of the filter, an odd number; the middle one is of the position itself.
        init: "zero", a filter of zeros (in the token form W_t of zeros): the layer begins as the one without; "next":
            the filter begins at the next token.
        max_norm: F keeps within so many times the norm of W_0; None is no bound.
        reset_every: F and the chunks begin anew after so many tokens; None is never.

    Shapes: hidden (b, t, f), targets (b, t, d), weight W_0 (d, f) to what is added, (b, t, d), and a `FastState`.
    Raises InputError for what is not allowed of these.

    Source: Feng et al. 2026 (arXiv 2604.06169); learned forgetting and the token form are ours.
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        chunk: int = 64,
        rate: float = 0.02,
        tau: float | None = 600.0,
        target: Target = "embed",
        taps: int = 5,
        init: Init = "zero",
        max_norm: float | None = None,
        reset_every: int | None = None,
    ) -> None:
        super().__init__()
        check_fast_weights(chunk, rate, tau, target, taps, init, max_norm, reset_every)
        self.width, self.hidden_width, self.chunk = width, hidden_width, chunk
        self.rate, self.source, self.max_norm, self.reset_every = rate, target, max_norm, reset_every
        self.adapts = True  # see `adapting`
        by_token = chunk == 1
        self.filter = None if by_token else nn.Parameter(torch.zeros(width, taps))
        self.target = nn.Parameter(torch.diag(TARGET_STD * torch.randn(width)))
        self.decay_logit: nn.Parameter | None = None
        if tau is not None:
            fraction = math.log(tau / SHORTEST_TAU) / math.log(LONGEST_TAU / SHORTEST_TAU)
            logit = math.log(fraction / (1 - fraction))
            self.decay_logit = nn.Parameter(torch.full((hidden_width,) if by_token else (), logit))
        with torch.no_grad():
            if init == "next":
                self.target.copy_(NEXT_TARGET * torch.eye(width))
                if self.filter is not None:
                    self.filter[:, taps // 2 + 1] = 1
            elif by_token:
                self.target.zero_()

    def tau(self) -> Tensor:
        """Time constants in tokens: (), or (f,) of the token form; infinite where nothing is forgotten."""
        if self.decay_logit is None:
            return self.target.new_full((self.hidden_width,) if self.chunk == 1 else (), math.inf)
        return SHORTEST_TAU * (LONGEST_TAU / SHORTEST_TAU) ** torch.sigmoid(self.decay_logit)

    def decay(self) -> Tensor:
        """lambda, of a whole chunk: (), or (f,) of the token form."""
        return (1 - 1 / self.tau()) ** self.chunk

    def roles(self) -> dict[str, Role]:
        roles = {"target": TRANSPOSED_MATRIX}
        if self.filter is not None:
            roles["filter"] = TABLE
        return roles if self.decay_logit is None else {**roles, "decay_logit": LOGIT}

    def learned(self) -> dict[str, Any]:
        """Time constants in tokens, where they are learned, and the mean size of every tap of the filter."""
        taus = {} if self.decay_logit is None else {"fast_tau": self.tau().tolist()}
        return taus if self.filter is None else {**taus, "fast_taps": self.filter.abs().mean(0).tolist()}

    def initial_state(self, batch_size: int) -> FastState:
        """The state before the first position: F is zero."""
        d, f, like = self.width, self.hidden_width, self.target
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return FastState(
            like.new_zeros(batch_size, f, d, dtype=dtype),
            like.new_zeros(batch_size, 1 if self.chunk == 1 else 0, f),
            like.new_zeros(batch_size, 0, d),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def forward(
        self,
        hidden: Float[Tensor, "b t f"],
        targets: Float[Tensor, "b t d"],
        weight: Float[Tensor, "d f"],
        state: FastState | None = None,
        *,
        bias: Float[Tensor, " d"] | None = None,
        joined: bool = False,
        reset: Bool[Tensor, "b t"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], FastState]:
        """What is added to Z W_0^T; where `reset` is true, a document begins: F is zero and a chunk begins.

        With `joined`, the sum with Z W_0^T + bias, which saves reading F apart from W_0.

        Raises InputError for `reset` with a trail.
        """
        state = self.initial_state(len(hidden)) if state is None else state
        if hidden.shape[1] == 0:
            state = self._trimmed(state)
            return hidden.new_zeros(len(hidden), 0, self.width), unmoved(state) if trail else state
        fixed = _Fixed(weight, bias, joined)
        if joined and (self.chunk == 1 or not self.adapts):
            y, after = self(hidden, targets, weight, state, reset=reset, trail=trail)
            return fixed.of(hidden) + y, after
        if not self.adapts:
            return self._read(hidden, state), _standing(state, hidden.shape[1]) if trail else state
        if self.source == "embed":
            targets = rms_norm(targets, None, NORM_EPS)
        if reset is None:
            return self._in_groups(hidden, targets, fixed, state, trail=trail)
        if trail:
            raise InputError("reset: got some with trail=True; allowed: one of them")
        pieces = []
        initial = self.initial_state(len(hidden))
        for first, last in parts_between(reset):
            state = replaced(state, initial, reset[:, first])
            part = slice(first, last)
            y, state = self._in_groups(hidden[:, part], targets[:, part], fixed, state, trail=False)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    def _trimmed(self, state: FastState) -> FastState:
        """The state with no more room for an unfinished chunk than its rows have read of one."""
        if self.chunk == 1:
            return state
        most = max((at % self.chunk for at in state.position.tolist()), default=0)
        kept, sources = (owned(part[:, part.shape[1] - most :]) for part in (state.hidden, state.targets))
        return state._replace(hidden=kept, targets=sources)

    def _in_groups(
        self, hidden: Tensor, targets: Tensor, fixed: _Fixed, state: FastState, *, trail: bool
    ) -> tuple[Tensor, Any]:
        """Rows at one place of their chunk together: those that differ, one group after the other."""
        groups: dict[int, list[int]] = {}
        for row, at in enumerate(state.position.tolist()):
            groups.setdefault(at if self.reset_every else at % self.chunk, []).append(row)
        if len(groups) <= 1:
            return self._until_resets(hidden, targets, fixed, state, next(iter(groups), 0), trail=trail)
        members = [*groups.values()]
        answers = [
            self._until_resets(hidden[chosen], targets[chosen], fixed, rows(state, chosen), at, trail=trail)
            for at, chosen in groups.items()
        ]
        y, after = zip(*answers, strict=True)
        return in_order(y, members), joined(after, members, trail=trail)

    def _until_resets(
        self, hidden: Tensor, targets: Tensor, fixed: _Fixed, state: FastState, at: int, *, trail: bool
    ) -> tuple[Tensor, Any]:
        """Rows that have read equally much since their chunk, or with `reset_every` their sequence, began."""
        advance = self._by_token if self.chunk == 1 else self._by_chunk
        until, t = self.reset_every, hidden.shape[1]
        if until is None or at + t < until:
            return advance(hidden, targets, fixed, state, at % self.chunk, trail=trail)
        anew = self.initial_state(len(hidden))
        if at >= until:  # from a state of a longer interval
            state, at = anew, 0
        read: list[Tensor] = []
        pieces: list[tuple[Any, int]] = []
        for first, last in itertools.pairwise([0, *range(until - at, t, until), t]):
            part = slice(first, last)
            y, after = advance(hidden[:, part], targets[:, part], fixed, state, at % self.chunk, trail=trail)
            read.append(y)
            pieces.append((after, last - first))
            state, at = anew, 0 if last < t else at + last - first
        if at == until:
            pieces.append((unmoved(anew) if trail else anew, 0))
        final, _ = pieces.pop()
        for after, length in reversed(pieces if trail else []):
            final = in_time(after, final, length)
        return torch.cat(read, dim=1), final

    def _by_chunk(
        self, hidden: Tensor, targets: Tensor, fixed: _Fixed, state: FastState, begun: int, *, trail: bool
    ) -> tuple[Tensor, Any]:
        """Rows with `begun` positions of a chunk behind them."""
        c, t = self.chunk, hidden.shape[1]
        if begun:
            behind = slice(state.hidden.shape[1] - begun, None)
            hidden = torch.cat([state.hidden[:, behind].to(hidden.dtype), hidden], dim=1)
            targets = torch.cat([state.targets[:, behind].to(targets.dtype), targets], dim=1)
        n = (begun + t) // c
        if n == 0:
            y, after = _read(hidden[:, begun:], state.weights, fixed), state.weights[:, None]
        else:
            whole = n * c
            largest = None if self.max_norm is None else self.max_norm * _norm(fixed.weight.to(state.weights.dtype))
            y, after = fast_weights(
                hidden[:, :whole].unflatten(1, (n, c)),
                targets[:, :whole].unflatten(1, (n, c)),
                cast("Tensor", self.filter),
                self.target,
                state.weights,
                None if self.decay_logit is None else self.decay(),
                rate=self.rate,
                weight=fixed.weight if fixed.joined else None,
                bias=fixed.bias if fixed.joined else None,
                largest=largest,
            )
            y = y.flatten(1, 2)[:, begun:]
            if begun + t > whole:
                y = torch.cat([y, _read(hidden[:, whole:], after[:, n], fixed)], dim=1)
        if trail:
            read = begun + torch.arange(t + 1, device=hidden.device)
            kept, sources = (ends(part, range(t, -1, -1), read % c) for part in (hidden, targets))
            return y, FastState(stepwise(after, read // c), kept, sources, counted(state.position, t))
        rest = slice(n * c, None)
        final = state.weights if n == 0 else owned(after[:, n])
        return y, FastState(final, owned(hidden[:, rest]), owned(targets[:, rest]), state.position + t)

    def _by_token(
        self, hidden: Tensor, targets: Tensor, fixed: _Fixed, state: FastState, begun: int, *, trail: bool
    ) -> tuple[Tensor, Any]:
        """The token form: the operator of K2's decays, whose keys are those of the position before."""
        t, dtype = hidden.shape[1], state.weights.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            units = normalize(hidden.to(dtype), NORM_EPS)
            keys = torch.cat([state.hidden.to(dtype), units], dim=1)
            values = self.rate * written(targets, None, self.target, dtype)
            decay = self.decay().to(dtype)
            y, after = decayed_linear_attention(
                units, keys[:, :t].contiguous(), values, torch.log(decay), state=state.weights
            )
        last = keys.to(hidden.dtype)
        targets = state.targets
        if trail:
            weights = folded(state.weights, decay, keys[:, :t], values, after)
            nothing = every(targets[:, None].expand(-1, t + 1, -1, -1))
            logs = FastState(weights, every(last[:, :, None]), nothing, counted(state.position, t))
            return y.to(hidden.dtype), logs
        return y.to(hidden.dtype), FastState(after, owned(last[:, t:]), targets, state.position + t)

    def _read(self, hidden: Tensor, state: FastState) -> Tensor:
        """What is read while nothing is written."""
        if self.chunk > 1:
            return _read(hidden, state.weights)
        return _read(normalize(hidden.to(state.weights.dtype), NORM_EPS), state.weights).to(hidden.dtype)


def check_fast_weights(
    chunk: int,
    rate: float,
    tau: float | None,
    target: str,
    taps: int,
    init: str,
    max_norm: float | None,
    reset_every: int | None,
) -> None:
    """Raises InputError, one line, for settings of fast weights that are not allowed."""
    check_choice("target", target, get_args(Target))
    check_choice("init", init, get_args(Init))
    if chunk < 1:
        raise InputError(f"chunk: got {chunk}; allowed: 1 position or more")
    if not rate > 0:
        raise InputError(f"rate: got {rate}; allowed: above 0")
    if tau is not None and not SHORTEST_TAU < tau < LONGEST_TAU:
        raise InputError(
            f"tau: got {tau}; allowed: between {SHORTEST_TAU:.0f} and {LONGEST_TAU:.0f} tokens, or null, which forgets "
            "nothing"
        )
    if taps < 1 or taps % 2 == 0 or (init == "next" and taps < 3 and chunk > 1):
        least = 3 if init == "next" else 1
        raise InputError(f"taps: got {taps} with init {init!r}; allowed: an odd number from {least} on")
    if max_norm is not None and (max_norm <= 0 or chunk == 1):
        raise InputError(f"max_norm: got {max_norm} with chunk {chunk}; allowed: above 0, with chunks of 2 or more")
    if reset_every is not None and reset_every < 1:
        raise InputError(f"reset_every: got {reset_every}; allowed: 1 token or more, or null")


def _read(hidden: Tensor, weights: Tensor, fixed: _Fixed | None = None) -> Tensor:
    """hidden (b, t, f) times weights (b, f, d), in the precision of the weights; what is joined is added."""
    with torch.autocast(hidden.device.type, enabled=False):
        y = (hidden.to(weights.dtype) @ weights).to(hidden.dtype)
    return fixed.of(hidden) + y if fixed is not None and fixed.joined else y


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight)


def _standing(state: FastState, t: int) -> Any:
    """The trail of t tokens that change nothing."""
    return map_tensors(lambda tensor: stepwise(tensor[:, None], torch.zeros(t + 1, dtype=torch.int64)), state)
