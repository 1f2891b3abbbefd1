"""What a copy memory adds to an exported step, of operators that every runtime has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.layers.copy_memory import BUCKET_STARTS, CopyMemory
from kmixer.layers.pointer import Pointer


def bucket_of(lengths: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """`bucket_of` of the copy memory by comparisons, as ONNX has no search."""
    return (lengths[:, None] >= torch.tensor(BUCKET_STARTS, device=lengths.device)).sum(-1)


class CopyStep(nn.Module):
    """What is added to what the layers mix, by layer, for copied tokens (b,) and buckets of lengths (b,)."""

    vectors: Tensor
    length_vector: Tensor | None
    gates: Tensor

    def __init__(self, memory: CopyMemory) -> None:
        super().__init__()
        self.layers, self.memory = memory.layers, memory.memory
        self.register_buffer("vectors", memory.from_table(memory.table.weight))  # (v + 1, d)
        self.register_buffer("length_vector", memory.length_vector)
        self.register_buffer("gates", memory.gates_of_buckets().T.contiguous())  # (buckets, layers)

    def forward(self, copied: Int[Tensor, " b"], bucket: Int[Tensor, " b"]) -> dict[int, Float[Tensor, "b d"]]:
        if not self.layers:
            return {}
        vectors = F.embedding(copied + 1, self.vectors)
        if self.length_vector is not None:
            vectors = vectors + F.embedding(bucket, self.length_vector)
        gates = F.embedding(bucket, self.gates)
        return {layer: gates[:, index, None] * vectors for index, layer in enumerate(self.layers)}


class PointerStep(nn.Module):
    """`Pointer` on one position."""

    def __init__(self, pointer: Pointer) -> None:
        super().__init__()
        self.length_logit, self.direction = pointer.length_logit, pointer.direction

    def forward(
        self,
        logits: Float[Tensor, "b v"],
        hidden: Float[Tensor, "b d"],
        copied: Int[Tensor, " b"],
        bucket: Int[Tensor, " b"],
    ) -> Float[Tensor, "b v"]:
        logit = F.embedding(bucket, self.length_logit[:, None]) + (hidden * self.direction).sum(-1, keepdim=True)
        copied = copied[:, None]
        rest = torch.where(copied < 0, 0.0, -_log_sum(logit, torch.zeros_like(logit)))
        share = torch.where(copied < 0, -torch.inf, -_log_sum(-logit, torch.zeros_like(logit)))
        mixed = logits.log_softmax(-1) + rest
        at = copied.clamp(min=0)
        return mixed.scatter(-1, at, _log_sum(mixed.gather(-1, at), share))


def _log_sum(x: Tensor, y: Tensor) -> Tensor:
    """log(e^x + e^y), the smaller of them possibly -inf, from operators that keep their precision in any runtime.

    onnxruntime's sigmoid is exact to 1e-7 absolutely: far below 0, its logarithm is no logsigmoid.
    """
    return torch.maximum(x, y) + torch.log1p(torch.exp(-(x - y).abs()))
