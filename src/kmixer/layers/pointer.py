"""A pointer output: the copied token itself gets a share of the probability, by how long its match is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.layers.copy_memory import BUCKETS, Copies, bucket_of
from kmixer.layers.roles import LOGIT, VECTOR, Role

# sigmoid(-3) = 0.05: the share that a copied token gets before anything is learned.
INITIAL_LOGIT = -3.0


class Pointer(nn.Module):
    """p = (1 - g_t) softmax(logits) + g_t onehot(c_t), g_t = sigmoid(a[bucket of l_t] + w . h_t), and 0 where c_t = -1.

    Args:
        width: d, of the hidden vectors h that the head reads.

    Source: pointer networks as a mixture with a language model's softmax (Merity et al. 2016), with the one token of
    a copy memory in the place of attention.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.length_logit = nn.Parameter(torch.full((BUCKETS,), INITIAL_LOGIT))
        self.direction = nn.Parameter(torch.zeros(width))

    def roles(self) -> dict[str, Role]:
        return {"length_logit": LOGIT, "direction": VECTOR}

    def forward(self, logits: Float[Tensor, "b t v"], hidden: Float[Tensor, "b t d"], copies: Copies) -> Tensor:
        """log p (b, t, v), which are logits too."""
        share, rest = self._log_shares(hidden, copies)
        plain = logits.float() if logits.dtype == torch.bfloat16 else logits
        mixed = plain.log_softmax(-1) + rest.unsqueeze(-1)
        at = copies.tokens.clamp(min=0).unsqueeze(-1)
        return mixed.scatter(-1, at, torch.logaddexp(mixed.gather(-1, at), share.unsqueeze(-1)))

    def losses(
        self,
        losses: Float[Tensor, "b t"],
        targets: Int[Tensor, "b t"],
        hidden: Float[Tensor, "b t d"],
        copies: Copies,
    ) -> Float[Tensor, "b t"]:
        """-log p of the targets, from the losses of the softmax alone."""
        share, rest = self._log_shares(hidden, copies)
        hit = share.masked_fill(copies.tokens != targets, -torch.inf)
        return -torch.logaddexp(rest - losses, hit)

    def _log_shares(self, hidden: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
        """log g and log(1 - g), (b, t)."""
        logit = self.length_logit[bucket_of(copies.lengths)] + (hidden * self.direction).sum(-1)
        nothing = copies.tokens < 0
        return F.logsigmoid(logit).masked_fill(nothing, -torch.inf), F.logsigmoid(-logit).masked_fill(nothing, 0.0)
