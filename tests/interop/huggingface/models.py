"""Small language models of every kind, for what is done with them under transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kmixer.data.tokenizers import CharTokenizer
from kmixer.huggingface import KMixerForCausalLM, to_huggingface
from kmixer.models import CausalLM
from kmixer.models.model_folder import SavedConfig

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
VOCABULARY = TOKENIZER.vocabulary_size

STACKS: dict[str, dict[str, Any]] = {
    "conv": {"base_kernel": {"kind": "conv", "size": 4}, "output_gate": True},
    "toeplitz, gelu": {
        "base_kernel": {"kind": "toeplitz", "size": 40, "shared": False},
        "head": {"kind": "gelu", "multiplier": 2},
    },
    "low rank": {"base_kernel": {"kind": "low_rank", "size": 48, "rank": 2}},
    "dense": {"base_kernel": {"kind": "dense", "size": 48, "shared": False}, "copy_gate": True},
    "none, adaptive": {
        "base_kernel": {"kind": "none"},
        "embedding_width": 8,
        "head": {"kind": "adaptive", "cutoffs": [5, 15]},
    },
    "refined": {"layers": 1, "refinement": {"steps": 2}, "head": {"kind": "untied"}},
    "unrefined, factorised": {"embedding_width": 8, "refinement": {"steps": 0}},
    "copies": {"copy_memory": {"layers": "all", "memory": 20, "match_length": "gate", "pointer": True}},
    "fast weights": {"fast_weights": {"layers": "every", "chunk": 4, "target": "embed"}},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "k2 blocks": {"mixers": "k2", "k2": {"rank": 3}},
    "softmax": {"mixers": "softmax"},
    "gaussian": {"mixers": "gaussian"},
    "hierarchical": {"mixers": "hierarchical", "hierarchical": {"levels": 3}},
    "a mixture": {"mixers": ["softmax", "k2"], "k2": {"rank": 3}, "windows": "SL", "window": 6, "layers": 3}
    | {"mixers": ["softmax", "gaussian", "k2"], "windows": "SLL"},
    "nanochat": {"blocks": "nanochat", "value_embeddings": True, "head": {"kind": "untied", "soft_cap": 15.0}},
}
KINDS = [*STACKS, *TRANSFORMERS]
# That read no further than this; the others stream.
ENDS = {"low rank": 48, "dense": 48}


def make_model(kind: str) -> CausalLM:
    """A model away from its initialisation, so that every path matters."""
    torch.manual_seed(0)
    whole = {"width": 16, "layers": 2}
    values = (
        {**whole, "rank": 3, **STACKS[kind]}
        if kind in STACKS
        else {**whole, "kind": "transformer", "heads": 2, **TRANSFORMERS[kind]}
    )
    config = SavedConfig.parse({"vocabulary_size": VOCABULARY, "model": values}, source="test")
    model = CausalLM(config.model, VOCABULARY)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@functools.cache
def wrapped(kind: str) -> KMixerForCausalLM:
    """The same as a class of transformers, for what changes nothing in it."""
    return to_huggingface(make_model(kind))


def make_tokens(t: int, b: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(t))


def filled_up(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows (1, t) of several lengths as one batch, filled up at the left."""
    longest = max(row.shape[1] for row in rows)
    shape = (len(rows), longest)
    tokens, mask = torch.full(shape, VOCABULARY), torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, longest - row.shape[1] :], mask[index, longest - row.shape[1] :] = row[0], 1
    return {"input_ids": tokens, "attention_mask": mask}
