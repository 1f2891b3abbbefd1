"""kmixer: attention-free and kernel-based sequence models, with explicit state.

>>> import kmixer
>>> model = kmixer.LanguageModel.from_recipe("k-operators-local-shakespeare")
>>> sum(p.numel() for p in model.parameters())
174468
"""

from kmixer.errors import DivergedError, InputError
from kmixer.language_model import LanguageModel, load
from kmixer.models.causal_lm import Output
from kmixer.version import VERSION

__version__ = VERSION
__all__ = ["DivergedError", "InputError", "LanguageModel", "Output", "load"]
