"""lm-evaluation-harness with models of kmixer.

kmixer eval RUN --tasks NAME,...                                         the usual way
python -m kmixer.evals run --model kmixer --model_args pretrained=RUN --tasks NAME     the harness's own command
kmixer.evals.KMixerLM(RUN)                                               a model for `lm_eval.simple_evaluate`
"""

from __future__ import annotations

import importlib.util
import sys

from kmixer.errors import InputError, one_line

if importlib.util.find_spec("lm_eval") is None:
    raise ImportError("kmixer.evals needs lm-eval: pip install 'kmixer[evals]'")

from kmixer.interop.lm_eval import KMixerLM, evaluate_tasks

__all__ = ["KMixerLM", "evaluate_tasks"]


def main() -> None:
    """The harness's own command, which knows `--model kmixer` here."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
