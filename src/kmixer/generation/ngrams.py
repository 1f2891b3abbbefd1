"""N-gram counts of a text and the next token that they predict, smoothed after Witten and Bell (1991).

    P_o(y | context) = (c(context, y) + u P_{o-1}(y | shorter context)) / (sum_y c + u)

for the last o tokens of a context, o = 0 .. order - 1, where c counts what followed in the text and u how many
different tokens did; P_{-1} is uniform. A context that the text has not leaves P as it is one token shorter.

Contexts lie in sorted arrays and are found by bisection: one of o tokens has the key (number of its last o - 1 tokens
among those contexts) * v + its first token, so that a key is 64 bits at any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.measure.texts import own_text
from kmixer.runs.run_folder import RunFolder
from kmixer.tensor_files import load_tensors, save_tensors

LARGEST_ORDER = 16
# In the metadata of a file.
KIND, VERSION = "ngram", 1
# Arrays of a context length, and their types.
ARRAYS = {"keys": torch.int64, "starts": torch.int64, "followers": torch.int32, "counts": torch.int64}

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Contexts:
    """All contexts of one length: what followed context i stands at starts[i] .. starts[i + 1]."""

    keys: Integers  # (n,), sorted
    starts: Integers  # (n + 1,)
    followers: npt.NDArray[np.int32]  # tokens, sorted within a context
    counts: Integers

    def totals(self) -> Integers:
        """How often each context was followed by anything (n,)."""
        sums = np.concatenate([[0], self.counts.cumsum()])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]


class Ngrams:
    """Counts of one text, for contexts of up to order - 1 tokens.

    Args:
        unigrams: how often each token occurs (v,).
        contexts: of 1 .. order - 1 tokens.
        about: what else is known, JSON: "tokenizer" as `Tokenizer.to_json` gives it.
    """

    def __init__(self, unigrams: Integers, contexts: Sequence[Contexts], about: dict[str, Any] | None = None) -> None:
        self.unigrams, self.contexts, self.about = unigrams, tuple(contexts), about or {}
        self.order, self.vocabulary_size = len(contexts) + 1, len(unigrams)
        used = np.count_nonzero(unigrams)
        self._unigram_row = (unigrams + used / len(unigrams)) / (unigrams.sum() + used)
        self._totals = [level.totals() for level in self.contexts]

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """Of the counted text, as `Tokenizer.to_json` gives it."""
        return self.about.get("tokenizer")

    def row(self, context: Sequence[int]) -> npt.NDArray[np.float64]:
        """P of the next token (v,) after these tokens, of which the last order - 1 count; it sums to 1."""
        row, number, v = self._unigram_row.copy(), 0, self.vocabulary_size
        for level, totals, token in zip(self.contexts, self._totals, reversed(context), strict=False):
            key = number * v + token
            number = int(level.keys.searchsorted(key))
            if number == len(level.keys) or level.keys[number] != key:
                break
            start, stop = int(level.starts[number]), int(level.starts[number + 1])
            whole = int(totals[number]) + stop - start
            row *= (stop - start) / whole
            row[level.followers[start:stop]] += level.counts[start:stop] / whole
        return row

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically, with a sha256 over all of it."""
        tensors = {"unigrams": torch.from_numpy(self.unigrams)}
        for length, level in enumerate(self.contexts, 1):
            for name in ARRAYS:
                tensors[f"{length}.{name}"] = torch.from_numpy(getattr(level, name))
        known = {"kind": KIND, "version": VERSION, "order": self.order, "about": self.about}
        save_tensors(path, tensors, known)

    @classmethod
    def load(cls, path: Path) -> Ngrams:
        """Read what `save` wrote. Raises InputError, one line, for a file that is damaged or another."""
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != KIND or metadata.get("version") != VERSION:
            raise InputError(f"{path} holds no n-gram counts of this version; make them with kmixer ngram")
        order, about = metadata.get("order"), metadata.get("about")
        known = isinstance(about, dict) and isinstance(about.get("tokenizer", {}), dict)
        if not isinstance(order, int) or not 1 <= order <= LARGEST_ORDER or not known:
            raise InputError(f"{path} is damaged (its metadata are not those of n-gram counts); make it again")
        names = {"unigrams": torch.int64}
        names |= {f"{length}.{name}": dtype for length in range(1, order) for name, dtype in ARRAYS.items()}
        if {name: tensor.dtype for name, tensor in tensors.items()} != names or any(
            tensor.ndim != 1 for tensor in tensors.values()
        ):
            raise InputError(f"{path} is damaged (it holds other arrays than counts of order {order}); make it again")
        contexts = [Contexts(*(tensors[f"{length}.{name}"].numpy() for name in ARRAYS)) for length in range(1, order)]
        if not _consistent(tensors["unigrams"].numpy(), contexts):
            raise InputError(f"{path} is damaged (its counts do not fit together); make it again")
        return cls(tensors["unigrams"].numpy(), contexts, about)


def count_ngrams(
    tokens: Tensor | npt.NDArray[Any], vocabulary_size: int, order: int, about: dict[str, Any] | None = None
) -> Ngrams:
    """Count a text.

    Of 1.5 million characters, at order 5, in a second and with 75 bytes of memory a token.

    Args:
        tokens: (n,), of any integer type, from 0 to vocabulary_size - 1.
        order: 1 to 16: how many tokens a gram has; contexts have one less.
        about: see `Ngrams`.

    Raises InputError for an empty text, tokens outside the vocabulary, or another order.
    """
    if not 1 <= order <= LARGEST_ORDER:
        raise InputError(f"order: got {order}; allowed: 1 to {LARGEST_ORDER}")
    x = np.asarray(tokens).astype(np.int64)
    if x.ndim != 1 or len(x) == 0:
        raise InputError(f"tokens: got shape {x.shape}; allowed: (n,), one token or more")
    if x.min() < 0 or x.max() >= vocabulary_size:
        raise InputError(f"tokens: got {x.min()} to {x.max()}; allowed: 0 to {vocabulary_size - 1}")
    contexts = []
    numbers = np.zeros(len(x), dtype=np.int64)  # of the context before every token from the o-th on
    for length in range(1, order):
        following = x[length:]
        keys, numbers = np.unique(numbers[1:] * vocabulary_size + x[: len(following)], return_inverse=True)
        pairs, counts = np.unique(numbers * vocabulary_size + following, return_counts=True)
        starts = np.searchsorted(pairs, np.arange(len(keys) + 1) * vocabulary_size)
        followers = (pairs % vocabulary_size).astype(np.int32)
        contexts.append(Contexts(keys, starts.astype(np.int64), followers, counts.astype(np.int64)))
    return Ngrams(np.bincount(x, minlength=vocabulary_size), contexts, about)


def count_run(
    run: RunFolder, tokenizer: Tokenizer, order: int, corpus: str | None = None, data_dir: Path | None = None
) -> Ngrams:
    """Count the training part of a run's text.

    Args:
        run: the run folder.
        tokenizer: of its model.
        order: see `count_ngrams`.
        corpus: a file, a folder or a name in the place of the recipe's, where the text was moved.
        data_dir: where corpora are looked for first.

    Raises InputError where the text is gone, or is not what the run was trained on.
    """
    recipe, dataset = own_text(run, tokenizer, corpus, data_dir)
    about = {"corpus": recipe.data.corpus, "corpus_sha256": dataset.sha256, "tokenizer": tokenizer.to_json()}
    return count_ngrams(dataset.train.tokens, tokenizer.vocabulary_size, order, about)


def _consistent(unigrams: Integers, contexts: Sequence[Contexts]) -> bool:
    """Whether every number points to what is there, and contexts are sorted."""
    v, before = len(unigrams), 1
    if v == 0 or unigrams.min() < 0 or unigrams.sum() == 0:
        return False
    for level in contexts:
        n, pairs = len(level.keys), len(level.followers)
        if (
            len(level.starts) != n + 1
            or len(level.counts) != pairs
            or level.starts[0] != 0
            or level.starts[-1] != pairs
        ):
            return False
        if n and (level.keys[0] < 0 or level.keys[-1] >= before * v or (np.diff(level.keys) <= 0).any()):
            return False
        if (np.diff(level.starts) <= 0).any() or (pairs and level.counts.min() < 1):
            return False
        if pairs and (level.followers.min() < 0 or level.followers.max() >= v):
            return False
        before = n
    return True
