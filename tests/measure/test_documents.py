"""Documents: where a corpus has them, and the loss of each alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kmixer.data.config import DataConfig, TokenizerConfig
from kmixer.data.documents import held_out_documents
from kmixer.data.token_files import prepare_dataset
from kmixer.errors import InputError
from kmixer.measure import documents as measured
from kmixer.measure.documents import evaluate_documents
from kmixer.models import CausalLM, ModelConfig
from tests.measure.test_fast_weights import V, make

CHAR = TokenizerConfig(kind="char", vocabulary_size=100)
TEXTS = ["one\ntwo", "a much longer text " * 9, "", "x", "last but one\n", "the end"]


def folder_of(path: Path) -> Path:
    path.mkdir()
    for index, content in enumerate(TEXTS):
        (path / f"{index}.txt").write_text(content)
    return path


def records_of(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": content}) + "\n" for content in TEXTS))
    return path


def held_out(data: DataConfig) -> tuple[list[str], str]:
    """The documents of the validation part, and the part as a whole."""
    dataset = prepare_dataset(data, CHAR)
    tokenizer = dataset.tokenizer
    documents = [tokenizer.decode(tokens.tolist()) for tokens in held_out_documents(data, tokenizer)]
    return documents, tokenizer.decode(dataset.validation.tokens.tolist())


def test_the_files_of_a_folder_are_its_documents(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path / "folder"))
    documents, _ = held_out(DataConfig(corpus=folder, validation=["1.txt", "2.txt", "4.txt"]))
    assert documents == [TEXTS[1], TEXTS[4]]


@pytest.mark.parametrize("kind", ["folder", "records"])
@pytest.mark.parametrize("share", [0.04, 0.1, 0.13, 0.5, 0.97])
def test_documents_are_the_validation_part(kind: str, share: float, tmp_path: Path) -> None:
    """Of a fraction: joined they are it, and all but the first are whole."""
    if kind == "folder":
        data = DataConfig(corpus=str(folder_of(tmp_path / "corpus")), validation=share)
        whole = [content for content in TEXTS if content]
    else:
        data = DataConfig(corpus=str(records_of(tmp_path / "corpus.jsonl")), field="text", validation=share)
        whole = [content if content.endswith("\n") else f"{content}\n" for content in TEXTS]
    documents, part = held_out(data)
    joined = "".join(content if content.endswith("\n") else f"{content}\n" for content in documents)
    assert joined.strip("\n") == part.strip("\n")
    assert documents[1:] == whole[len(whole) - len(documents) + 1 :]
    assert whole[len(whole) - len(documents)].endswith(documents[0])


def test_one_text_has_no_documents(text_file: Path) -> None:
    data = DataConfig(corpus=str(text_file), validation=0.1)
    with pytest.raises(InputError, match="is one text, which does not say where a document ends; allowed: a folder"):
        held_out(data)


def documents_of(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def test_every_document_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch, or in pieces with the state carried on, it is what the document alone gives."""
    monkeypatch.setattr(measured, "STREAM_CHUNK", 30)
    monkeypatch.setattr(measured, "TOKENS_PER_BATCH", 50)
    model, lengths = make(tau="null").eval(), [12, 4, 3, 40, 5, 29, 1, 12]
    documents = documents_of(*lengths)
    result = evaluate_documents(model, documents)
    assert (result.documents, result.too_short) == (6, 2)
    alone = [model(tokens[None, :-1], targets=tokens[None, 1:]).losses[0] for tokens in documents if len(tokens) >= 4]
    assert result.lengths == [len(losses) for losses in alone] == [11, 3, 39, 4, 28, 11]
    assert result.tokens == sum(result.lengths)
    assert result.loss == pytest.approx(float(torch.cat(alone).mean()))
    thirds = [torch.tensor_split(losses, [len(losses) // 3, len(losses) * 2 // 3]) for losses in alone]
    for found, parts in zip(result.losses, thirds, strict=True):
        assert found == [pytest.approx(float(part.mean())) for part in parts]
    assert result.thirds == [pytest.approx(float(torch.cat(parts).mean())) for parts in zip(*thirds, strict=True)]
    by_position = [torch.cat([losses[a:b] for losses in alone]) for a, b in ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16))]
    assert result.stretches[:5] == [pytest.approx(float(part.mean())) for part in by_position]
    assert len(result.stretches) == 7


def test_documents_that_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="none of the 2 has 4 tokens or more"):
        evaluate_documents(make(), documents_of(3, 1))
    dense = CausalLM(
        ModelConfig.parse(
            {"width": 8, "layers": 1, "rank": 2, "base_kernel": {"kind": "dense", "size": 16}}, source="test"
        ),
        V,
    )
    assert evaluate_documents(dense, documents_of(17, 9)).documents == 2
    with pytest.raises(InputError, match="one has 18 tokens; the dense base kernel ends at position 16"):
        evaluate_documents(dense, documents_of(18, 9))
