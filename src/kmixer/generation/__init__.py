"""Generation: sampling from logits, streaming tokens from a state, and drafts that a model verifies."""

from kmixer.generation.sampling import Sampling
from kmixer.generation.speculation import Speculation
from kmixer.generation.speculative import speculate
from kmixer.generation.streaming import generate_text, generate_tokens

__all__ = ["Sampling", "Speculation", "generate_text", "generate_tokens", "speculate"]
