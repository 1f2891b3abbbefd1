"""One decoding step of a language model as a module of its own, with its constants folded.

    logits, state = step(token, state)        token (b, 1) int64, logits (b, v), state a flat tuple of tensors
    logits, state = step(token, state, copied, length)        (b, 1) int64, of a model with a copy memory

This is what `kmixer export` writes: a call on a single position has no chunks, no masks, no dropout and
no sigmoids of parameters. It works on (b, d), which matrix products with bias want.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.interop.exported_copies import CopyStep, PointerStep, bucket_of
from kmixer.layers.base_kernel import BaseKernel
from kmixer.layers.k_operators import K2
from kmixer.layers.norms import NORM_EPS
from kmixer.models.causal_lm import CausalLM
from kmixer.models.heads import AdaptiveHead, GeluHead, LinearHead, UntiedHead
from kmixer.models.k_stack import KStack
from kmixer.models.known_parts import K_STACK, unknown_part
from kmixer.models.stack_config import NOTHING
from kmixer.ops.fused import linear_dropout_add, rms_norm

StepState = tuple[Tensor, ...]


class StepModule(nn.Module):
    """The decoding step of a model in evaluation mode, in float32, on copies of its weights.

    Equals `model(token, state)` for one position; `state` is that of the model's stack, flattened, in the order of
    `state_names`. All of it is zeros before the first token. What a copy memory remembers is left to the caller: the
    step takes what `suffix_matches` gives for the token, `copied` (-1 for nothing) and `length`.

    Folded: the embedding with its projection and the first K1 layer, which sees one token only, into a
    table (v, d); decays, alpha, gates and base kernel taps into constants.

    Raises InputError for a model without a step of constant size: a base kernel that ends at a position, or attention;
    and for one with a part that is not exactly one of those that are known here.
    """

    entered: Tensor
    embedded: Tensor | None
    eta: Tensor | None

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        if not isinstance(model.stack, KStack):
            raise InputError("this model is a transformer, which has no step of constant size to export; a k-stack has")
        limit = model.config.max_positions
        if limit is not None:
            raise InputError(
                f"{model.config.limited_by} ends at position {limit}, so this model has no step to export; "
                "use a model with a toeplitz or conv base kernel, or none: they stream"
            )
        if part := unknown_part(model, (LinearHead, UntiedHead, GeluHead, AdaptiveHead), K_STACK):
            raise InputError(f"{part} is none of the parts that an export knows, so this model has no step to export")
        for name, kernel in model.named_modules():
            if isinstance(kernel, BaseKernel) and kernel.kind not in ("toeplitz", "conv"):
                raise InputError(f"{name} is a {kernel.kind} base kernel, which ends: there is no step to export")
        model = copy.deepcopy(model).float().eval().requires_grad_(False)
        stack = model.stack
        assert isinstance(stack, KStack)
        refined = stack.refined
        embedded = model.entering(model.embedding.weight)
        self.passes = stack.passes
        self.register_buffer("entered", stack.first(embedded)[0])
        self.register_buffer("embedded", embedded if refined else None)
        self.register_buffer("eta", stack.eta() if refined else None)
        self.first = stack.first if refined else None
        self.mixers = nn.ModuleList()
        for block in stack.blocks:
            assert isinstance(block, K2)
            self.mixers.append(K2Step(block, block.mixer.base_kernel or stack.shared_kernel))
        self.last, self.read_out = stack.last, stack.read_out
        self.norm, self.head = model.norm, model.head
        self.pointer = None if model.pointer is None else PointerStep(model.pointer)
        self.copies: CopyStep | None = None
        if model.copy_memory is not None and (model.copy_memory.layers or self.pointer is not None):
            self.copies = CopyStep(model.copy_memory)
        self.embedding = model.embedding.weight  # the table of a tied head
        self.vocabulary_size = model.vocabulary_size

    def state_names(self) -> list[str]:
        """`PASS.layerINDEX.decay` and, where there is a base kernel, `PASS.layerINDEX.base`, in order."""
        return [
            f"{step}.layer{index}.{part}"
            for step in range(self.passes)
            for index, mixer in enumerate(self._mixers())
            for part in (("decay",) if mixer.taps is None else ("decay", "base"))
        ]

    def initial_state(self, batch_size: int) -> StepState:
        """The state before the first token: zeros."""
        return tuple(
            self.entered.new_zeros(batch_size, length, self.entered.shape[1])
            for _ in range(self.passes)
            for mixer in self._mixers()
            for length in ((mixer.rank,) if mixer.taps is None else (mixer.rank, mixer.taps.shape[1] - 1))
        )

    def example(self, batch_size: int) -> tuple[Tensor | StepState, ...]:
        """What `forward` takes first."""
        token = torch.zeros(batch_size, 1, dtype=torch.int64)
        return token, self.initial_state(batch_size), *(() if self.copies is None else (token - 1, token.clone()))

    def forward(
        self,
        token: Int[Tensor, "b 1"],
        state: StepState,
        copied: Int[Tensor, "b 1"] | None = None,
        length: Int[Tensor, "b 1"] | None = None,
    ) -> tuple[Float[Tensor, "b v"], StepState]:
        token = token.squeeze(1)
        before, after = iter(state), list[Tensor]()
        added: Mapping[int, Tensor] = NOTHING
        if self.copies is not None:
            if copied is None or length is None:
                raise InputError(
                    "copied and length: missing; this model has a copy memory: give what matches the token"
                )
            copied, bucket = copied.squeeze(1), bucket_of(length.squeeze(1))
            added = self.copies(copied, bucket)
        entered = F.embedding(token, self.entered)
        if self.eta is None:
            h = self._pass(entered, before, after, added)
        else:
            assert self.embedded is not None
            assert self.first is not None
            h = F.embedding(token, self.embedded)
            for step in range(self.passes):
                refined = self._pass(self.first(h)[0] if step else entered, before, after, added)
                h = h + self.eta * (refined - h)
        hidden = self.norm(h)
        logits = self.head(hidden, self.embedding)
        if self.pointer is not None:
            logits = self.pointer(logits, hidden, copied, bucket)
        return logits, tuple(after)

    def _pass(self, h: Tensor, before: Iterator[Tensor], after: list[Tensor], added: Mapping[int, Tensor]) -> Tensor:
        for layer, mixer in enumerate(self._mixers()):
            h, *state = mixer(h, next(before), None if mixer.taps is None else next(before), added.get(layer))
            after += [tensor for tensor in state if tensor is not None]
        return self.read_out(self.last(h)[0])

    def _mixers(self) -> Iterator[K2Step]:
        for mixer in self.mixers:
            assert isinstance(mixer, K2Step)
            yield mixer


class K2Step(nn.Module):
    """A K2 layer on one position: h (b, d), S (b, r, d) and the last inputs of its base kernel (b, lags - 1, d)."""

    query_scale: Tensor
    key_scale: Tensor
    decay: Tensor
    taps: Tensor | None

    def __init__(self, layer: K2, kernel: BaseKernel | None) -> None:
        super().__init__()
        mixer = layer.mixer
        self.rank = mixer.rank
        self.mixing_norm = layer.mixing_norm
        self.query, self.key = mixer.query, mixer.key
        # alpha q / |q| = RMSNorm(q) alpha / sqrt(r): one fused operation where normalising and scaling are
        # six. The guard goes under the root instead of below it: the same for every |q| above 1e-5.
        self.eps = NORM_EPS**2 / self.rank
        unit = torch.full((self.rank,), 1 / math.sqrt(self.rank))
        self.register_buffer("query_scale", mixer.alpha() * unit)
        self.register_buffer("key_scale", unit)
        # By way of the logarithm, as the layer has it: a decay near 1 that is rounded otherwise
        # drifts from the layer's by its rounding at every step.
        self.register_buffer("decay", mixer.decay().log().exp()[:, None])
        taps = None
        if kernel is not None:
            assert mixer.gate_logit is not None
            taps = (torch.sigmoid(mixer.gate_logit) * kernel.weights[0]).flip(0)[None]
        self.register_buffer("taps", taps)  # (1, lags), oldest first
        self.output_gate, self.projection = mixer.output_gate, mixer.projection
        self.feed_forward_norm, self.feed_forward = layer.feed_forward_norm, layer.feed_forward

    def forward(
        self, h: Tensor, state: Tensor, inputs: Tensor | None, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.mixing_norm(h)
        query = rms_norm(x @ self.query, self.query_scale, self.eps)
        key = rms_norm(x @ self.key, self.key_scale, self.eps)
        row = x[:, None, :]
        state = self.decay * state + key[:, :, None] * row
        y = query[:, None, :] @ state
        if self.taps is not None:
            assert inputs is not None
            inputs = torch.cat([inputs, row], dim=1)
            y = y + self.taps @ inputs
            inputs = inputs[:, 1:]
        mixed = y.squeeze(1) if added is None else y.squeeze(1) + added
        if self.output_gate is not None:
            mixed = mixed * F.silu(self.output_gate(x))
        h = linear_dropout_add(h, mixed, self.projection.weight, self.projection.bias, 0.0)
        return h + self.feed_forward(self.feed_forward_norm(h)), state, inputs
