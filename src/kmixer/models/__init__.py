"""Models: strict configurations, the K-Stack, and the language model around it."""

from kmixer.models.causal_lm import CausalLM, Output, count_parameters
from kmixer.models.config import ModelConfig
from kmixer.models.k_stack import KStack

__all__ = ["CausalLM", "KStack", "ModelConfig", "Output", "count_parameters"]
