"""What `kmixer lab ecology` measures: which sources of text differ beyond noise, and which a model tells apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmixer.data.corpora import find_corpus
from kmixer.data.tokenizers import CharTokenizer, Tokenizer, first_of
from kmixer.errors import InputError
from kmixer.language_model import LanguageModel, load
from kmixer.layers.adapting import adapting
from kmixer.measure.ecology import (
    ENUMERATED,
    Merge,
    Numbers,
    divergences,
    greedy_path,
    partitions,
    path_over_beta,
    singles,
    states_in,
)
from kmixer.measure.ecology_models import SPLITS as MODEL_SPLITS
from kmixer.measure.ecology_models import model_followers
from kmixer.measure.ecology_sources import (
    GROUPS,
    SPLITS,
    Context,
    Ecology,
    Shared,
    followers_of,
    shared_contexts,
    standard_error,
)
from kmixer.measure.signal import INTERVAL
from kmixer.runs.lab import identity_of
from kmixer.runs.run_folder import RunFolder

# Tokens of a block, at least.
BLOCK = 10
# A second of one core makes so many numbers of a table, of which a token counts as COUNTED; what takes longer than LONG
# seconds is said before.
A_SECOND, COUNTED, LONG = 1e7, 40, 10.0
# h of two cells of one size, so that beta* = JS / EVEN.
EVEN = math.log(2)
# A model separates a pair above this percentile of the splits of one source.
PERCENTILE = 95


@dataclass(frozen=True)
class Asked:
    """How to measure."""

    context: str = "suffix:2"
    min_count: int = 30
    blocks: int = 200
    letters: bool = False
    window: int = 64
    adapt: bool = True
    seed: int = 0


def ecology_of_texts(
    sources: Sequence[str],
    asked: Asked,
    model: Path | None = None,
    data_dir: Path | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Files, folders or corpora beside each other; with a model, which of the pairs it tells apart.

    `told` is given a line where something takes long. Raises InputError for sources that cannot be compared.
    """
    context = Context.parse(asked.context)
    if len(sources) < 2:
        given = f"got {sources[0]} alone" if sources else "got none"
        raise InputError(f"sources: {given}; allowed: two texts or more, files, folders or names of corpora")
    language = None if model is None else _model(model, asked)
    texts = [_read(source, asked, data_dir) for source in sources]
    names = _names(sources)
    tokens, vocabulary = _encoded(names, texts, language, asked)
    shared = shared_contexts(tokens, vocabulary, context, asked.min_count)
    followers, v = followers_of(tokens, shared, asked.blocks)
    sets = (2 * SPLITS + GROUPS) * (1 << min(len(names), ENUMERATED)) * len(shared.marginal) * v
    _tell(told, (sets + COUNTED * sum(map(len, tokens))) / A_SECOND)
    ecology = Ecology(followers, shared.marginal, v, asked.blocks, SPLITS, asked.seed)
    measured = {
        "name": ", ".join(names) if model is None else model.name,
        "sources": names,
        "tokens": len(tokens[0]),
        "unit": "characters" if language is None else "tokens",
        "letters": asked.letters,
        "context": asked.context,
        "contexts": len(shared.marginal),
        "coverage": shared.coverage,
        "min_count": asked.min_count,
        "blocks": asked.blocks,
        "followers": v,
        "seed": asked.seed,
        **_measured(ecology, names),
    }
    if language is not None and model is not None:
        measured["model"] = _of_model(language, tokens, shared, asked, measured["pairs"], told)
        run = RunFolder(model)
        measured |= identity_of(run) if run.exists() else {}
    return measured


def _tell(told: Callable[[str], None], seconds: float) -> None:
    if seconds > LONG:
        told(f"this will take about {seconds / 60:.1f} minutes")


def _model(path: Path, asked: Asked) -> LanguageModel:
    if asked.letters:
        raise InputError("--letters changes the texts, which a model reads as they are; leave one of them out")
    model = load(path)
    if model.config.fast_weights is not None and asked.adapt:
        raise InputError(
            f"{path} adapts to what it reads, so that it has no one encoding for all sources; --adapt off freezes it"
        )
    if model.config.fast_weights is None and not asked.adapt:
        raise InputError(f"--adapt off: {path} has no fast weights, so that nothing in it adapts; leave it out")
    return model


def _read(source: str, asked: Asked, data_dir: Path | None) -> str:
    text = "".join(block for block in find_corpus(source, data_dir).read() if isinstance(block, str))
    return re.sub(r"[\W\d_]+", " ", text.lower()) if asked.letters else text


def _names(sources: Sequence[str]) -> list[str]:
    """The last parts of paths, where these differ."""
    short = [Path(source).stem or source for source in sources]
    return [
        name if short.count(name) == 1 else f"{source} ({index})"
        for index, (name, source) in enumerate(zip(short, sources, strict=True), 1)
    ]


def _encoded(names: list[str], texts: list[str], model: LanguageModel | None, asked: Asked) -> tuple[list[Tensor], int]:
    """Tokens (n,) of every source, cut to the shortest, and how many kinds there are."""
    shortest = min(map(len, texts))
    texts = [text[:shortest] for text in texts]
    tokenizer: Tokenizer = CharTokenizer("".join(texts))
    if model is not None:
        assert model.tokenizer is not None
        tokenizer = model.tokenizer
    encoded = []
    for name, text in zip(names, texts, strict=True):
        if unknown := tokenizer.unknown(text):
            raise InputError(f"{name}: the model's tokenizer does not know {first_of(unknown)}; leave such text out")
        encoded.append(torch.from_numpy(tokenizer.encode(text)).long())
    n = min(map(len, encoded))
    if n < BLOCK * asked.blocks:
        name = names[[len(x) for x in encoded].index(n)]
        raise InputError(
            f"{name} has {n:,} tokens; {asked.blocks} blocks need {BLOCK * asked.blocks:,} or more: give a longer text "
            "or lower --blocks"
        )
    return [x[:n] for x in encoded], tokenizer.vocabulary_size


def _measured(ecology: Ecology, names: list[str]) -> dict[str, Any]:
    """Matrix, pairs, path over beta and the excess of every cut, each with its null."""
    w, prior, null = len(names), ecology.prior, ecology.null
    exact = w <= ENUMERATED
    path = (path_over_beta if exact else greedy_path)(ecology.losses, prior)
    pairs = _pairs(w)
    cuts = partitions(w) if exact else np.array([[*merge.cells, *[0] * (w - len(merge.cells))] for merge in path])
    masks = np.unique(np.concatenate([singles(w), pairs.sum(1), cuts.ravel()]))
    masks = masks[masks > 0]
    left_out, without_noise = ecology.left_out(masks), ecology.corrected()
    alone = ecology.losses(singles(w)).sum()

    def error(cells: Sequence[int]) -> float:
        """Of the excess of cells."""
        columns = np.searchsorted(masks, [cell for cell in cells if cell])
        states = np.searchsorted(masks, [1 << state for cell in cells for state in states_in(cell)])
        return float(standard_error(left_out[:, columns].sum(1) - left_out[:, states].sum(1)))

    def of_cut(cells: Sequence[int]) -> dict[str, Any]:
        chosen = np.array([cell for cell in cells if cell])
        excess = ecology.losses(chosen).sum() - alone
        return {
            "cells": [list(states_in(cell)) for cell in chosen.tolist()],
            "excess": float(excess),
            "corrected": float(without_noise(chosen).sum() - alone),
            "error": error(chosen.tolist()),
            "differs": bool(excess > ecology.largest_noise(chosen).sum()),
        }

    values = divergences(ecology.losses, prior, pairs)
    corrected = divergences(without_noise, prior, pairs)
    rows = [
        {
            "first": _index(first),
            "second": _index(second),
            "js": float(values[i]),
            "corrected": float(corrected[i]),
            "error": error([first | second]) * w / 2,
            "gain": float(values[i] * 2 / w),  # the excess of the cell, as part of the whole
            "beta": float(values[i] / EVEN),
            "beta_corrected": float(corrected[i] / EVEN),
            "largest_null": float(max(null[:, _index(first)].max(), null[:, _index(second)].max())),
        }
        for i, (first, second) in enumerate(pairs.tolist())
    ]
    for row in rows:
        row["differs"] = row["js"] > row["largest_null"]
    return {
        "js": _matrix(w, pairs, values),
        "null": _null(null),
        "splits": len(null),
        "pairs": rows,
        "exact": exact,
        "path": [_step(ecology, *both) for both in zip([None, *path[:-1]], path, strict=True)],
        "cuts": [of_cut(cells) for cells in cuts.tolist()],
    }


def _step(ecology: Ecology, before: Merge | None, merge: Merge) -> dict[str, Any]:
    """A partition of the path, and what of its beta noise would make."""
    step: dict[str, Any] = {
        "beta": merge.beta,
        "beta_corrected": merge.beta,
        "noise": False,
        "cells": [list(states_in(cell)) for cell in merge.cells],
        "excess": merge.excess,
        "complexity": merge.complexity,
    }
    if before is not None and (simpler := before.complexity - merge.complexity) > 0:
        old, new = np.array(before.cells), np.array(merge.cells)
        corrected = ecology.corrected()
        more = ecology.largest_noise(new).sum() - ecology.largest_noise(old).sum()
        step["beta_corrected"] = float((corrected(new).sum() - corrected(old).sum()) / simpler)
        step["noise"] = bool(merge.excess - before.excess <= more)
    return step


def _of_model(
    model: LanguageModel,
    tokens: list[Tensor],
    shared: Shared,
    asked: Asked,
    of_data: list[dict[str, Any]],
    told: Callable[[str], None],
) -> dict[str, Any]:
    """The model's own laws at the same contexts, and what it separates of what the data do."""
    with adapting(model, asked.adapt):
        followers = model_followers(
            model, tokens, shared, asked.blocks, asked.window, lambda seconds: _tell(told, seconds)
        )
    w, v = len(tokens), model.vocabulary_size
    ecology = Ecology(followers, shared.marginal, v, asked.blocks, MODEL_SPLITS, asked.seed)
    pairs, null = _pairs(w), ecology.null
    values = divergences(ecology.losses, ecology.prior, pairs)
    masks = np.unique(np.concatenate([singles(w), pairs.sum(1)]))
    left_out = ecology.left_out(masks)
    rows = []
    for value, (first, second), of_pair in zip(values.tolist(), pairs.tolist(), of_data, strict=True):
        both, one, other = (left_out[:, np.searchsorted(masks, mask)] for mask in (first | second, first, second))
        error = float(standard_error(both - one - other)) * w / 2
        limit = max(float(np.percentile(null[:, _index(state)], PERCENTILE)) for state in (first, second))
        rows.append(
            {
                "first": _index(first),
                "second": _index(second),
                "js": value,
                "error": error,
                "limit": limit,
                "says": _says(of_pair["differs"], value, error, limit),
            }
        )
    return {
        "js": _matrix(w, pairs, values),
        "null": _null(null),
        "splits": len(null),
        "window": asked.window,
        "laws": min(len(of_source.contexts) for of_source in followers),
        "coverage": ecology.coverage,
        "pairs": rows,
    }


def _says(differs: bool, value: float, error: float, limit: float) -> str:
    """Of a pair of sources: whether data separate it, and whether the model does."""
    if not differs:
        return "nothing to separate"
    if value > limit:
        return "separated"
    return "merged" if value + INTERVAL * error <= limit else "unclear"


def _null(null: Numbers) -> list[dict[str, float]]:
    """Of every source, over splits (s, w): JS, and the largest beta*."""
    return [
        {
            "mean": float(of_source.mean()),
            "largest": float(of_source.max()),
            "largest_beta": float(of_source.max() / EVEN),
        }
        for of_source in null.T
    ]


def _pairs(w: int) -> np.ndarray:
    return np.array([(1 << a, 1 << b) for a in range(w) for b in range(a + 1, w)])


def _index(single: int) -> int:
    return single.bit_length() - 1


def _matrix(w: int, pairs: np.ndarray, values: Numbers) -> list[list[float]]:
    matrix = np.zeros((w, w))
    for value, (first, second) in zip(values, pairs.tolist(), strict=True):
        a, b = _index(first), _index(second)
        matrix[a, b] = matrix[b, a] = value
    rows: list[list[float]] = matrix.tolist()
    return rows
