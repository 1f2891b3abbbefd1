"""Labelled token sequences: ListOps, images as sequences of pixels, reviews as sequences of bytes.

Tokens (n, t) are from 1 on; 0 pads the end.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kmixer.data.config import SequenceDataConfig
from kmixer.data.examples import ExampleDataset, Examples, digest, find_file, split_examples
from kmixer.data.images import find_arrays, read_arrays
from kmixer.data.listops import SHORT, TOKEN_OF, ListOps, draw_trees, evaluate, symbols
from kmixer.errors import InputError
from kmixer.files import user_cache
from kmixer.tensor_files import load_tensors, save_tensors

# Rec. 601: what the eye makes of red, green and blue.
LUMINANCE = (0.299, 0.587, 0.114)


def load_sequences(config: SequenceDataConfig, data_dir: Path | None = None) -> ExampleDataset:
    """Find or make a dataset of labelled sequences, cut to `config.length` tokens.

    "listops" and "listops-short" are generated from `config.seed` and kept in the cache folder; "scifar" is the
    grey pixels of `cifar10` row by row; "imdb" the bytes of reviews in imdb_train.jsonl.xz and imdb_test.jsonl.xz.

    Raises:
        InputError: a dataset that is not there, or a file that does not hold what it should.
    """
    if config.dataset in ("listops", "listops-short"):
        return _listops(config)
    load = _pixels if config.dataset == "scifar" else _reviews
    return load(config, data_dir)


def _listops(config: SequenceDataConfig) -> ExampleDataset:
    task = ListOps() if config.dataset == "listops" else SHORT
    if config.examples is not None:
        task = replace(task, train=config.examples)
    key = json.dumps([repr(task), config.seed, config.length])
    file = user_cache() / "examples" / f"listops-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if not file.is_file():
        trees = draw_trees(task, config.seed)
        tensors: dict[str, Tensor] = {}
        for part, count in task.parts.items():
            chosen = list(islice(trees, count))
            rows = [[TOKEN_OF[symbol] for symbol in symbols(tree)] for tree in chosen]
            tensors[f"{part}/inputs"] = padded(rows, config.length)
            tensors[f"{part}/labels"] = torch.tensor([evaluate(tree) for tree in chosen])
        save_tensors(file, tensors, {"task": repr(task), "seed": config.seed})
    tensors, _ = load_tensors(file)
    train, validation, test = (Examples(tensors[f"{part}/inputs"], tensors[f"{part}/labels"]) for part in task.parts)
    return ExampleDataset(train, validation, test, digest(train))


def _pixels(config: SequenceDataConfig, data_dir: Path | None) -> ExampleDataset:
    pixels, labels, test = read_arrays(find_arrays("cifar10", data_dir))

    def tokens(images: Tensor) -> Tensor:
        grey = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(LUMINANCE)).round().clamp(0, 255)
        return grey.flatten(1)[:, : config.length].short() + 1

    chosen = slice(None, config.examples)
    examples = Examples(tokens(pixels)[chosen], labels[chosen])
    return split_examples(examples, config.validation, 0.0, Examples(tokens(test.inputs), test.labels))


def _reviews(config: SequenceDataConfig, data_dir: Path | None) -> ExampleDataset:
    train, test = (_read_reviews(_find_reviews(part, data_dir), config.length) for part in ("train", "test"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))[: config.examples]
    return split_examples(Examples(train.inputs[order], train.labels[order]), config.validation, 0.0, test)


def _find_reviews(part: str, data_dir: Path | None) -> Path:
    name = f"imdb_{part}.jsonl.xz"
    return find_file(
        f"dataset imdb: {name}",
        name,
        data_dir,
        "put it there (a line a review, with label and text), give its folder with --data-dir, or use dataset "
        "listops, which needs no file",
    )


def _read_reviews(path: Path, length: int) -> Examples:
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            reviews = [json.loads(line) for line in file]
        rows = [[byte + 1 for byte in review["text"].encode()[:length]] for review in reviews]
        labels = torch.tensor([int(review["label"]) for review in reviews])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, lzma.LZMAError) as error:
        raise InputError(f"{path} does not hold reviews with label and text: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no review")
    return Examples(padded(rows, length), labels)


def padded(rows: Iterable[list[int]], length: int) -> Tensor:
    """Rows of tokens, cut to a length, as one tensor (n, t) with 0 after their ends; int16."""
    tensors = [torch.tensor(row[:length], dtype=torch.int16) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
