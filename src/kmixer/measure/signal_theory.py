"""Where mean-field theory applies to a model, and what it needs of it: maps of norms, fixed mixings, strengths.

It applies at the initialisation, to blocks whose mixing does not depend on what is mixed. All others are measured only:
recurrences and sums whose weights are made of the tokens, keys that are values, scores of order one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kmixer.layers import FeedForward, SquaredReluFeedForward
from kmixer.layers.block import Block
from kmixer.layers.exactly import exactly
from kmixer.layers.linear import Linear
from kmixer.layers.measured import Attention, MixesFixed, strength
from kmixer.layers.norms import Derf, DyT, RMSNorm, UnweightedRMSNorm
from kmixer.measure.mean_field import TheoryBlock, advised_alpha, predict
from kmixer.measure.moments import Activation, NormMap, norm_moments
from kmixer.measure.signal import blocks_of

# Standard deviation of the scores of attention up to which all keys are taken for alike: at 2 measured growth is 1.6
# times that of the theory, and the difference goes with the square.
MOST_SCORE_DEVIATION = 0.5
# Below this alpha^2 q a bounded norm is linear, and its branches are that much weaker than those of RMSNorm.
LEAST_DRIVE = 0.01


def norm_map(norm: nn.Module) -> NormMap | None:
    """What a norm does at its initialisation, for the theory; None of a module that it does not know."""
    if exactly(norm, RMSNorm, nn.LayerNorm):
        return NormMap("standard", gain=_gain(norm.weight))
    if exactly(norm, UnweightedRMSNorm):
        return NormMap("standard")
    if exactly(norm, DyT, Derf):
        shift = 0.0 if norm.shift is None else float(norm.shift.detach())
        return NormMap(norm.function, float(norm.alpha.detach()), shift, _gain(norm.gain))
    return None


def theory_blocks(model: nn.Module, n: int) -> list[TheoryBlock] | str:
    """The blocks of a model with fresh weights as the theory sees them, for n positions; or why it does not apply."""
    stack = getattr(model, "stack", model)
    for name, neutral in (("stream_scale", 1.0), ("input_scale", 0.0)):
        scale = getattr(stack, name, None)
        if scale is not None and bool((scale != neutral).any()):
            return f"{name} is not {neutral:g}"
    if getattr(model, "copy_memory", None) is not None:
        return "a copy memory adds to what is mixed"
    blocks = [_theory_block(block, n) for block in blocks_of(model)]
    known = [block for block in blocks if isinstance(block, TheoryBlock)]
    if len(known) == len(blocks):
        return known
    return next(block for block in blocks if isinstance(block, str))


def _theory_block(block: nn.Module, n: int) -> TheoryBlock | str:
    if not isinstance(block, Block):
        return f"{type(block).__name__} is no residual block"
    norms = [norm_map(norm) for norm in (block.mixing_norm, block.feed_forward_norm)]
    mixer, feed_forward = block.mixer, block.feed_forward
    mixing = mixer.fixed_mixing(n) if isinstance(mixer, MixesFixed) else None
    if mixing is None:
        return f"{type(mixer).__name__} mixes by weights that depend on what it mixes"
    if norms[0] is None or norms[1] is None:
        unknown = block.mixing_norm if norms[0] is None else block.feed_forward_norm
        return f"{type(unknown).__name__} is no norm that the theory knows"
    if not (
        exactly(feed_forward, FeedForward, SquaredReluFeedForward)
        and feed_forward.fast is None
        and exactly(feed_forward.up, Linear)
        and exactly(feed_forward.down, Linear)
    ):
        return f"{type(feed_forward).__name__} is no feed-forward layer that the theory knows"
    activation: Activation = "gelu" if isinstance(feed_forward, FeedForward) else "squared_relu"
    strengths = (strength(feed_forward.up.weight), strength(feed_forward.down.weight))
    return TheoryBlock(norms[0], mixing.weights, mixing.strength, norms[1], activation, *strengths)


@torch.no_grad()
def scores_too_large(model: nn.Module, reached: Sequence[Tensor]) -> str | None:
    """Why the keys of an attention cannot be taken for alike, given what enters every block (b, n, d); None if so."""
    for layer, (block, h) in enumerate(zip(blocks_of(model), reached, strict=False), start=1):
        if not isinstance(block, Block) or not isinstance(block.mixer, Attention):
            continue
        weights = block.mixer.attention_weights(block.mixing_norm(h))
        if weights is None:
            continue
        log = weights.double().log().flatten(0, 2)  # scores, but for a constant of each query; -inf is not seen
        seen = log.isfinite()
        count = seen.sum(-1).clamp(min=1)
        log = torch.where(seen, log, 0.0)
        centred = torch.where(seen, log - (log.sum(-1) / count)[:, None], 0.0)
        several = count > 1
        deviation = math.sqrt(float(centred[several].square().sum() / (count[several] - 1).sum().clamp(min=1)))
        if deviation > MOST_SCORE_DEVIATION:
            return (
                f"the scores of layer {layer} have a standard deviation of {deviation:.2f}; "
                f"up to {MOST_SCORE_DEVIATION:g} keys count as alike"
            )
    return None


def weak_branches(blocks: Sequence[TheoryBlock], sizes: Sequence[float]) -> str | None:
    """A warning where a bounded norm hardly sees its input, given q before every block and after the last."""
    weak = []
    for layer, (block, size) in enumerate(zip(blocks, sizes, strict=False), start=1):
        for norm in (block.mixing_norm, block.feed_forward_norm):
            if norm.kind != "standard" and norm.alpha**2 * size < LEAST_DRIVE:
                covariance = torch.full((1, 1), size, dtype=torch.float64)
                weak.append((math.sqrt(float(norm_moments(norm, covariance).value)), layer))
    if not weak:
        return None
    least, layer = min(weak)
    return (
        f"the branches of block {layer} start at {least:.1%} of RMSNorm's, because alpha^2 q is below "
        f"{LEAST_DRIVE:g} there: a larger embedding or match = 'unit' makes up for it"
    )


def advise(blocks: Sequence[TheoryBlock], covariance: Tensor) -> float | None:
    """The largest alpha for the bounded norms of these blocks whose J(L, 0) is at most that of RMSNorm.

    None where no alpha of the grid is, and where the norms are not bounded, not all alike, or have a gain that makes up
    for their alpha. `covariance` (n, n) is of what enters.
    """
    norms = {norm for block in blocks for norm in (block.mixing_norm, block.feed_forward_norm)}
    kind = next(iter(norms)).kind
    if len(norms) != 1 or kind == "standard" or next(iter(norms)).gain != 1:
        return None

    def growth(norm: NormMap) -> float:
        changed = [block._replace(mixing_norm=norm, feed_forward_norm=norm) for block in blocks]
        return float(predict(changed, covariance[None]).growth[0, 0])

    return advised_alpha(lambda alpha: growth(NormMap(kind, alpha)), growth(NormMap("standard")))


def _gain(weight: Tensor | None) -> float:
    """The root mean square of a gain (d); without one 1."""
    return 1.0 if weight is None else math.sqrt(float(weight.detach().double().square().mean()))
