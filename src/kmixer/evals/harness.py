"""Language models for lm-evaluation-harness: a state is carried through a document, and contexts are read once.

Needs the library `lm_eval`, and is imported by who uses it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from kmixer.data.tokenizers import Tokenizer, first_of
from kmixer.errors import InputError, shown
from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import generate_tokens, text_of
from kmixer.interop.continuations import ContextStates, document_nats
from kmixer.language_model import LanguageModel, load
from kmixer.version import VERSION

Unknown = Literal["error", "drop"]
PREFIX = "\n"
NEW_TOKENS = 256  # where a task does not say how many


@register_model("kmixer")
class KMixerLM(TemplateLM):  # type: ignore[misc]
    """A model of kmixer as the harness asks it.

    A document is one stream with the state carried, however long it is; a model that ends at a position reads it in
    windows of as many tokens, as the harness's own models do. Continuations are greedy, or drawn where a task says so.

    Args:
        pretrained: a model with its tokenizer, or what `kmixer.load` takes.
        prefix: one token, which a document or a continuation without context begins after; figures depend on it.
        unknown: "error" refuses characters that the tokenizer does not know; "drop" leaves them out, and
            `get_model_info` says how many they were.
        memory: of its copies, see `kmixer.load`.
        device: of the model; a GPU that is not there, which the harness's own command asks for, is passed over.
        batch_size, max_batch_size: the harness gives them; texts are read one by one.

    Raises:
        InputError: a model that cannot be loaded or has no tokenizer, a prefix that is not one token.
    """

    def __init__(
        self,
        pretrained: str | Path | LanguageModel,
        prefix: str = PREFIX,
        unknown: Unknown = "error",
        memory: int | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        model = pretrained if isinstance(pretrained, LanguageModel) else load(pretrained, memory=memory)
        tokenizer: Tokenizer | None = model.tokenizer
        if tokenizer is None:
            raise InputError("this model has no tokenizer, and the harness asks for texts")
        if unknown not in ("error", "drop"):
            raise InputError(f"unknown: got {shown(unknown)}; allowed: error, drop")
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            model = model.to(device)
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._states = ContextStates(self._model)
        self._prefix, self._unknown = prefix, unknown
        self._dropped = 0
        self.counts_what_is_kept = False  # bytes and words of documents, see `KeptTasks`
        tokens = [] if tokenizer.unknown(prefix) else tokenizer.encode(prefix).tolist()
        if len(tokens) != 1:
            raise InputError(
                f"prefix: got {shown(prefix)}, which is {len(tokens) or 'no'} tokens of this model; allowed: a text of "
                "one token"
            )
        self._prefix_token: int = tokens[0]

    @property
    def eot_token_id(self) -> int:
        """What the harness puts before a text that has nothing before it."""
        return self._prefix_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(string).tolist() if string else []

    def kept(self, text: str) -> str:
        """The text without what the tokenizer does not know. Raises InputError where that is refused."""
        unknown = self._tokenizer.unknown(text)
        if not unknown:
            return text
        if self._unknown == "error":
            raise InputError(
                f"a task has {first_of(unknown)}, which the tokenizer does not know; --unknown drop leaves it out"
            )
        return "".join(character for character in text if character not in set(unknown))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of a continuation, whether it is the likeliest) of every (context, continuation)."""
        pairs = []
        for request in requests:
            context, continuation = self._texts(request.args)
            if context:
                pairs.append((request.args, *self._encode_pair(context, continuation)))
                continue
            before, after = [self._prefix_token], self.tok_encode(continuation)
            if after[:1] == before:  # as the harness has it: a text that begins so is its own context
                after = after[1:]
            pairs.append((request.args, before, after))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = []
        for _, context, continuation in self._shown(requests, disable_tqdm):
            before = np.array(context or [self._prefix_token], dtype=np.int64)
            answers.append(self._states.likelihood(before, np.array(continuation, dtype=np.int64)))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of every whole document."""
        answers = []
        prefix = np.array([self._prefix_token], dtype=np.int64)
        for request in self._shown(requests, disable_tqdm):
            (text,) = request.args
            (kept,) = self._texts((text,))
            if kept != text and not self.counts_what_is_kept:
                raise InputError(
                    "the harness's own command counts the bytes of what was dropped; use kmixer eval RUN --tasks"
                )
            answers.append(-document_nats(self._model, prefix, self._tokenizer.encode(kept)))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of every context, up to where its task has it stop."""
        answers = []
        for number, request in enumerate(self._shown(requests, disable_tqdm)):
            text, settings = request.args
            (context,) = self._texts((text,))
            answers.append(self._continued(context or self._prefix, settings, number))
        return answers

    def _continued(self, context: str, settings: dict[str, Any], number: int) -> str:
        stop = settings.get("until") or []
        count = int(settings.get("max_gen_toks", NEW_TOKENS))
        drawn = settings.get("do_sample", False) and settings.get("temperature", 1.0) > 0
        sampling = Sampling(
            *((settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p")) if drawn else (0.0,))
        )
        tokens = torch.tensor([self.tok_encode(context)], device=self._model.embedding.weight.device)
        limit = self._model.config.max_positions
        if limit is not None:
            count = min(count, limit - 1)
            self._states.contexts_cut += tokens.shape[1] > limit - count
            tokens = tokens[:, -(limit - count) :]
        columns = generate_tokens(self._model, tokens, count, sampling, seed=number)
        return "".join(text_of(tokens, columns, self._tokenizer, [stop] if isinstance(stop, str) else stop))

    def _texts(self, texts: tuple[str, ...]) -> list[str]:
        """What is kept of texts; what is not is counted."""
        kept = [self.kept(text) for text in texts]
        self._dropped += sum(map(len, texts)) - sum(map(len, kept))
        return kept

    @staticmethod
    def _shown(requests: Any, disable: bool) -> Any:
        return tqdm(requests, desc="kmixer", disable=disable or None)  # None: only on a terminal

    def get_model_info(self) -> dict[str, Any]:
        """How texts were read, which the harness puts beside its results."""
        limit = self._model.config.max_positions
        return {
            "kmixer": VERSION,
            "prefix": self._prefix,
            "documents": "one stream, state carried" if limit is None else f"windows of {limit} tokens",
            "contexts_cut": self._states.contexts_cut,
            "unknown": self._unknown,
            "characters_dropped": self._dropped,
        }


class KeptTasks(TaskManager):  # type: ignore[misc]
    """Tasks whose bytes and words, which figures are per, are those of what a model keeps of a document."""

    def __init__(self, lm: KMixerLM, **options: Any) -> None:
        super().__init__(**options)
        self._lm = lm

    def load(self, task_list: Any) -> Any:
        loaded = super().load(task_list)
        for task in loaded["tasks"].values():
            for name in ("count_bytes", "count_words"):
                if (count := getattr(task, name, None)) is not None:
                    setattr(task, name, lambda text, count=count: count(self._lm.kept(text)))
        self._lm.counts_what_is_kept = True
        return loaded


def evaluate_tasks(
    lm: KMixerLM, tasks: Sequence[str], include: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """What the harness measures of a model on tasks; what `simple_evaluate` returns.

    Args:
        tasks: names of tasks, groups and tags, of those that the harness knows and of those below `include`.
        include: a folder of tasks in YAML.
        limit: documents of each task.

    Raises InputError for a task that is not known, and as `KMixerLM` does.
    """
    with contextlib.redirect_stdout(sys.stderr):
        manager = _manager_of(lm, tasks, include)
        if unknown := [name for name in tasks if not manager.match_tasks([name])]:
            raise InputError(
                f"--tasks: got {', '.join(map(shown, unknown))}; allowed: what lm-eval ls tasks lists, and tasks of "
                "--include FOLDER"
            )
        results: dict[str, Any] = simple_evaluate(
            lm, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    results["lm_eval"] = importlib.metadata.version("lm_eval")
    return results


def _manager_of(lm: KMixerLM, tasks: Sequence[str], include: Path | None) -> KeptTasks:
    """Knows the tasks: to look through the harness's own thousands takes long, and is left out where it can be."""
    if include is not None:
        if not include.is_dir():
            raise InputError(f"--include: {include} is no folder; give one with tasks in YAML")
        manager = KeptTasks(lm, include_path=str(include), include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager
    return KeptTasks(lm, include_path=None if include is None else str(include))
