"""The trained models inside the package: small, whole, and able to write at once."""

from __future__ import annotations

import pytest
import torch

import kmixer
from kmixer.models import count_parameters
from kmixer.models.model_folder import PACKAGED, packaged_models

LINES = """ROMEO:
But, soft! what light through yonder window breaks?
It is the east, and Juliet is the sun.
"""


@pytest.mark.parametrize("name", packaged_models())
def test_it_is_small_and_says_where_it_comes_from(name: str) -> None:
    assert sum(path.stat().st_size for path in (PACKAGED / name).iterdir()) < 1_000_000
    model = kmixer.load(name)
    assert not model.training
    assert model.about["recipe"] == name
    assert {"step", "validation", "corpus_sha256"} <= model.about.keys()


def test_shakespeare_small_reads_and_writes_shakespeare() -> None:
    model = kmixer.load("shakespeare-small")
    assert sum(count_parameters(model).values()) <= 200_000
    tokens = torch.from_numpy(model.tokenizer.encode(LINES))[None]
    with torch.no_grad():
        whole = model(tokens)
        head = model(tokens[:, :30])
        tail = model(tokens[:, 30:], head.state)
    torch.testing.assert_close(torch.cat([head.logits, tail.logits], 1), whole.logits, rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.cross_entropy(whole.logits[0, :-1], tokens[0, 1:]).item()
    assert loss < 2.0  # nats per character; log 65 = 4.17 knows nothing, and these lines are in the training part
    text = model.generate("KING:", max_new_tokens=200, temperature=0.8, seed=1)
    assert text.startswith("KING:")
    assert len(text) == 205
    assert text == model.generate("KING:", max_new_tokens=200, temperature=0.8, seed=1)
