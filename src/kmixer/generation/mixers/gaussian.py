"""Gaussian attention in a prepared decoding step."""

from __future__ import annotations

import torch

from kmixer.generation.live_cache import LiveCache
from kmixer.generation.operations import ATTEND, Mixed, Place, Program
from kmixer.layers import GaussianAttention
from kmixer.layers.gaussian_attention import GaussianCache


def gaussian_operations(program: Program, mixer: GaussianAttention, normed: int, mixed: int, place: Place) -> Mixed:
    """Attention alone: heads are slices of the normed input."""
    live = LiveCache(
        GaussianCache,
        mixer.heads,
        mixer.head_width,
        torch.exp(-2 * mixer.log_sigma),
        mixer.reach,
        rotary=mixer.rotary,
        dtype=program.cache_dtype,
        apart=mixer.keeps_values,
        source=normed,
        gaussian=True,
        normalise=mixer.head_norm,
        normalise_values=mixer.head_norm,
        exclude_self=mixer.exclude_self,
    )
    program.live.append(live)
    program.add(ATTEND, normed, mixed, inputs=place.width, attention=live.where)
    return Mixed(mixer.out)
