"""lm-evaluation-harness with models of kmixer.

kmixer eval RUN --tasks NAME,...                                         the usual way
python -m kmixer.evals run --model kmixer --model_args pretrained=RUN --tasks NAME     the harness's own command
kmixer.evals.KMixerLM(RUN)                                               a model for `lm_eval.simple_evaluate`
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("lm_eval") is None:
    raise ImportError("kmixer.evals needs lm-eval: pip install 'kmixer[evals]'")

from kmixer.evals.harness import KMixerLM, evaluate_tasks

__all__ = ["KMixerLM", "evaluate_tasks"]
