"""Sinkhorn attention as a layer: softmax attention whose weights are brought nearer to doubly stochastic."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.heads import check_takes_state, heads_apart, identity_values, merge_heads
from kmixer.layers.linear import linear
from kmixer.layers.roles import LOGIT, Matrix, Role
from kmixer.layers.rotary import check_heads, rotation
from kmixer.ops.attention.sinkhorn import check_iterations, column_residual, sinkhorn_attention
from kmixer.ops.attention.softmax import softmax_attention


class SinkhornAttention(nn.Module):
    """out(sum_j W_ij v_j) in every head: exp(q_i . k_j / sqrt(e)) with rows and columns brought to 1 in turn is W.

    Sinkformer-type normalisation. One half-step is softmax attention. Rows add to 1 after any odd number of them, so
    that an output is always a mean of values; columns nearly do where the scores are small. A key's normaliser is a sum
    over all queries: the layer sees both ways, has no state, and changes an output when any position changes.

    x is normalised by the caller, and the caller adds the residual.

    Args:
        width: d.
        heads: h; the head width e = d / h is even where positions rotate.
        iterations: n half-steps, odd.
        causal: position i sees the positions up to i; with one iteration only.
        rotary: rotate queries and keys by their positions.
        bias: of all matrices.
        tolerance: in evaluation, go on until no column is further than this from adding to 1; see `sinkhorn_attention`.
        tie_query_key: one matrix for both: the scores are symmetric.
        learned_temperature: a factor of the scores in every head, which starts at 1 and is trained.

    Shapes: x (b, t, d) to (b, t, d), and None.
    Raises InputError where heads does not divide width into such a head width, for an even number of iterations, for
    causal with more than one, for a tolerance that is not positive, and for a state.

    Source: Sander et al. 2022 (arXiv 2110.11773). It does not reproduce the Sinkhorn transformer of Fraiman 2026
    (arXiv 2603.25860), whose architecture is not published.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        iterations: int = 5,
        causal: bool = False,
        rotary: bool = False,
        bias: bool = False,
        tolerance: float | None = None,
        tie_query_key: bool = False,
        learned_temperature: bool = False,
    ) -> None:
        super().__init__()
        check_heads(width, heads, rotary=rotary)
        check_iterations(iterations)
        if causal and iterations > 1:
            raise InputError(
                "sinkhorn needs all queries to normalise a key; allowed: causal = false, or iterations = 1"
            )
        if tolerance is not None and (causal or not tolerance > 0):
            raise InputError(f"tolerance: got {tolerance} with causal={causal}; allowed: more than 0, without causal")
        self.heads, self.head_width = heads, width // heads
        self.iterations, self.causal, self.rotary, self.tolerance = iterations, causal, rotary, tolerance
        self.parts = 2 if tie_query_key else 3  # matrices; the first is of the queries, the last of the values
        self.query_key_value = linear(width, self.parts * width, bias=bias)
        self.log_temperature = nn.Parameter(torch.zeros(heads)) if learned_temperature else None
        self.out = linear(width, width, bias=bias)

    def roles(self) -> dict[str, Role]:
        temperature = {} if self.log_temperature is None else {"log_temperature": LOGIT}
        return {"query_key_value.weight": Role("core", decays=True, matrix=Matrix(parts=self.parts)), **temperature}

    def learned(self) -> dict[str, list[float]]:
        """The temperatures of the heads, where they are learned; a high one flattens the weights."""
        return {} if self.log_temperature is None else {"temperature": torch.exp(self.log_temperature).tolist()}

    def initial_state(self, batch_size: int) -> None:
        """There is no state."""

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: object = None,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        added: Float[Tensor, "b t d"] | None = None,
    ) -> tuple[Float[Tensor, "b t d"], None]:
        """All positions at once. `mask` is True where a position counts: what is left is as it would be alone."""
        check_takes_state(False, state)
        if x.shape[1] == 0:
            return x, None
        queries, keys, values = self._project(x)
        return self.out(merge_heads(self._attend(queries, keys, values, mask), added)), None

    @torch.no_grad()
    def attention_weights(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b h t t"]:
        """What every position takes of every other, in every head; all of it in memory."""
        queries, keys, _ = self._project(x)
        return self._attend(queries, keys, identity_values(keys), None)

    def column_residual(self, x: Float[Tensor, "b t d"]) -> float:
        """max_j |sum_i W_ij - 1|, mean over heads and rows of the batch: 0 where W is doubly stochastic."""
        return float(column_residual(self.attention_weights(x).double()).mean())

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        values = values.to(keys.dtype)
        if self.causal:
            if mask is not None:
                raise InputError("mask: a causal layer takes none; padding at the end changes nothing there")
            return softmax_attention(queries, keys, values, causal=True)
        tolerance = None if self.training else self.tolerance
        return sinkhorn_attention(queries, keys, values, iterations=self.iterations, mask=mask, tolerance=tolerance)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, divided by the temperature, keys and values (b, h, t, e)."""
        projected = self.query_key_value(x)
        positions = torch.arange(x.shape[1], device=x.device)
        angles = rotation(positions, self.head_width, x.dtype) if self.rotary else None
        rotated = self.parts - 1 if self.rotary else 0
        heads = heads_apart(projected, self.heads, self.parts, rotated=rotated, angles=angles)
        queries, keys, values = heads[0], heads[-2], heads[-1]
        if self.log_temperature is not None:
            queries = queries * torch.exp(-self.log_temperature)[:, None, None].to(queries.dtype)
        return queries, keys, values
