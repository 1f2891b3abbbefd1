"""Generation: sampling from logits, and streaming tokens from a state."""

from kmixer.generation.sampling import Sampling
from kmixer.generation.speculation import Speculation
from kmixer.generation.streaming import generate_text, generate_tokens

__all__ = ["Sampling", "Speculation", "generate_text", "generate_tokens"]
