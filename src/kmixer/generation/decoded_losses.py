"""The losses of a text as it is decoded: what a decoder makes of it, whose matrices may be rounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kmixer.generation.decoder import open_decoder
from kmixer.layers.adapting import check_stream
from kmixer.models.causal_lm import CausalLM
from kmixer.ops.cross_entropy import cross_entropies

CHUNK = 1024


def decoded_losses(model: CausalLM, tokens: Int[Tensor, " n"]) -> Iterator[Float[Tensor, "1 t"]]:
    """Cross-entropies in nats of one stream of tokens, each after those before it, in constant memory.

    What `stream_losses` gives for the model itself. Raises InputError where that does.
    """
    check_stream(model)
    decoder = open_decoder(model, model.initial_state(1))
    for start in range(0, len(tokens) - 1, CHUNK):
        both = tokens[start : start + CHUNK + 1].long()[None]
        with torch.inference_mode():
            yield cross_entropies(decoder.advance(both[:, :-1]), both[:, 1:])
