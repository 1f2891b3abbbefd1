"""The K-Stack: K1 -> K2 x layers -> K1 -> K0, passed once or refined towards an equilibrium."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from kmixer.config import StrictConfig, Width
from kmixer.layers import K0, K1, K2, BaseKernel
from kmixer.layers.block import BlockState
from kmixer.layers.roles import LOGIT, Role
from kmixer.models.mixers.k2 import BaseKernelConfig, DecayConfig, build_base_kernel, decay_options
from kmixer.models.stack_config import NOTHING, StackConfig, adapting_to, added_to, has_fast_weights
from kmixer.ops.precision import narrowed
from kmixer.trail import asked_for

# For every refinement pass, the state of every block, both K1 among them.
KStackState = tuple[tuple[BlockState, ...], ...]


class RefinementConfig(StrictConfig):
    """The equilibrium loop h <- h + eta (KStack(h) - h)."""

    steps: Annotated[int, Field(ge=0, le=1 << 10)] = 1  # 0 is one plain pass; eta stays a parameter, unused
    initial_eta: Annotated[float, Field(gt=0, lt=1)] = 0.3


class ModelConfig(StackConfig):
    """K1 -> K2 x layers -> K1 -> K0 between an embedding and a head."""

    kind: Literal["k-stack"] = "k-stack"
    rank: Width  # r
    base_kernel: BaseKernelConfig = BaseKernelConfig()
    decay: DecayConfig = DecayConfig()
    refinement: RefinementConfig | None = None  # None has no eta
    output_gate: bool = False  # a gate on what every K2 mixes, by SiLU of a linear map
    copy_gate: bool = False  # hold the unused gate of Koneko's copy branch in every K2

    @property
    def max_positions(self) -> int | None:
        return self.base_kernel.size if self.base_kernel.kind in ("dense", "low_rank") else None

    @property
    def limited_by(self) -> str:
        return f"the {self.base_kernel.kind} base kernel"


class KStack(nn.Module):
    """The stack of a `ModelConfig`, from hidden vectors (b, t, d) to hidden vectors.

    With refinement, n steps of h <- h + eta (KStack(h) - h) share the weights; eta = sigmoid(e) is
    learned and gradients pass through all steps. Each step has a state of its own: its input at
    position t depends on positions up to t only, so a refined stack streams like a plain one.

    Source: Koneko 2026 (Zenodo 19004569).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kernel, decay, dropout = config.base_kernel, config.decay, config.dropout
        self.passes = max(1, config.refinement.steps) if config.refinement else 1
        self.refined = config.refinement is not None and config.refinement.steps > 0
        self.eta_logit: nn.Parameter | None = None
        if config.refinement is not None:
            eta = config.refinement.initial_eta
            self.eta_logit = nn.Parameter(torch.tensor(math.log(eta / (1 - eta))), requires_grad=self.refined)
        self.shared_kernel = build_base_kernel(kernel) if kernel.shared else None
        norms, width = config.norm, config.width
        self.first = K1(width, mlp_dropout=dropout.mlp, norms=norms.before_branches(width))
        self.blocks = nn.ModuleList(
            K2(
                width,
                config.rank,
                norms=norms.before_branches(width),
                base_kernel="shared" if self.shared_kernel else build_base_kernel(kernel),
                gate_init=kernel.gate_init,
                output_gate=config.output_gate,
                mlp_dropout=dropout.mlp,
                residual_dropout=dropout.residual,
                copy_gate=config.copy_gate,
                **decay_options(decay),
            )
            for _ in range(config.layers)
        )
        self.last = K1(width, mlp_dropout=dropout.mlp, norms=norms.before_branches(width))
        self.read_out = K0(width, norms.for_read_out(width))

    def roles(self) -> dict[str, Role]:
        return {} if self.eta_logit is None else {"eta_logit": LOGIT}

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of layer once, for every layer of it, batch size and length.

        Layers with fast weights, which read positions, stay as they are.
        """
        for layer, _ in self._blocks():
            if not has_fast_weights(layer):
                layer.compile(dynamic=True, fullgraph=True, backend=backend)

    def eta(self) -> Tensor:
        """Step size of the refinement, in (0, 1)."""
        assert self.eta_logit is not None
        return torch.sigmoid(self.eta_logit)

    def initial_state(self, batch_size: int) -> KStackState:
        """The state before the first position."""
        layers = tuple(block.initial_state(batch_size, *extra) for block, extra in self._blocks())  # type: ignore[operator]
        return (layers,) * self.passes

    def forward(
        self,
        h: Float[Tensor, "b t d"],
        state: KStackState | None = None,
        tokens: Int[Tensor, "b t"] | None = None,
        added: Mapping[int, Float[Tensor, "b t d"]] = NOTHING,
        *,
        source: Float[Tensor, "b t d"] | None = None,
        trail: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], KStackState]:
        """All blocks, in every pass. Nothing here reads `tokens`; `added` goes to what K2 layer 0, 1, ... mixes.

        `source` is what fast weights learn from, in all passes: h where it is None.
        """
        h = narrowed(h)
        source = h if source is None else source
        if not self.refined:
            h, layers = self._pass(h, state[0] if state else None, added, source, trail=trail)
            return h, (layers,)
        states = []
        for step in range(self.passes):
            refined, layers = self._pass(h, state[step] if state else None, added, source, trail=trail)
            eta = self.eta()
            h = narrowed(h + eta * (refined - h).to(eta.dtype))  # whose gradient is a sum over all of h
            states.append(layers)
        return h, tuple(states)

    def _pass(
        self,
        h: Tensor,
        state: tuple[BlockState, ...] | None,
        added: Mapping[int, Tensor],
        source: Tensor,
        *,
        trail: bool,
    ) -> tuple[Tensor, tuple[BlockState, ...]]:
        states = []
        for index, (block, extra) in enumerate(self._blocks()):
            # The first block is a K1, and there is no layer -1.
            more = {**added_to(index - 1, added), **adapting_to(block, source), **asked_for(block, trail)}
            h, block_state = block(h, state[index] if state else None, *extra, **more)
            states.append(block_state)
        return self.read_out(h), tuple(states)

    def _blocks(self) -> Iterator[tuple[nn.Module, tuple[BaseKernel, ...]]]:
        """Every block, and what it takes beside its input: between the K1 layers the shared kernel, if there is one."""
        shared = () if self.shared_kernel is None else (self.shared_kernel,)
        yield self.first, ()
        for block in self.blocks:
            yield block, shared
        yield self.last, ()
