"""Models: strict configurations, the K-Stack and the language model around it, the transformer baseline."""

from kmixer.models.causal_lm import CausalLM, Output, count_parameters
from kmixer.models.config import ModelConfig
from kmixer.models.flops import count_flops
from kmixer.models.k_stack import KStack
from kmixer.models.transformer import Transformer, TransformerConfig, transformer_like

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
