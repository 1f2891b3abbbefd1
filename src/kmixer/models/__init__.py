"""Models: strict configurations, the K-Stack and the transformer, and the language model around them."""

from kmixer.models.causal_lm import CausalLM, Output, count_parameters
from kmixer.models.flops import count_flops
from kmixer.models.k_stack import KStack, ModelConfig
from kmixer.models.matched import transformer_like
from kmixer.models.transformer import Transformer, TransformerConfig

__all__ = [
    "CausalLM",
    "KStack",
    "ModelConfig",
    "Output",
    "Transformer",
    "TransformerConfig",
    "count_flops",
    "count_parameters",
    "transformer_like",
]
