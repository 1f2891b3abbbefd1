"""States as files: what is written comes back; what is damaged, of other weights or made up is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import kmixer
from kmixer.errors import InputError
from kmixer.serve.sessions import Standing
from kmixer.serve.state_files import from_bytes, to_bytes
from kmixer.state import tensors

DIGEST = "d" * 64


def standing(model: kmixer.LanguageModel) -> Standing:
    tokens = torch.arange(40)[None] % 65
    with torch.no_grad():
        state = model(tokens).state
    return Standing(state, 40, (3,), (1, 2, 3))


@pytest.mark.parametrize("which", ["model", "copying"])
def test_a_state_comes_back_as_it_was(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    before = standing(model)
    after = from_bytes(to_bytes(before, DIGEST), DIGEST, model)
    assert (after.position, after.unread, after.tail) == (40, (3,), (1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(tensors(before.state), tensors(after.state), strict=True))


def changed(content: bytes, about: dict[str, Any] | None = None, **parts: torch.Tensor | None) -> bytes:
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["kmixer"])
    tensors = {name: tensor for name, tensor in {**load(content), **parts}.items() if tensor is not None}
    return save(tensors, metadata={"kmixer": json.dumps({**metadata, **(about or {})})})


def test_what_is_no_state_of_these_weights_is_refused(
    model: kmixer.LanguageModel, copying: kmixer.LanguageModel
) -> None:
    good = to_bytes(standing(model), DIGEST)
    wrong = [b"", b"x" * 7, b"\xff" * 100, good[:-1], good[: len(good) // 2], good + b"x", save({"a": torch.zeros(1)})]
    first = next(tensors(standing(model).state))
    wrong += [
        changed(good, {"digest": "other"}),
        changed(good, {"position": -1}),
        changed(good, {"position": "1"}),
        changed(good, {"position": 1 << 60}),
        changed(good, {"unread": [65]}),
        changed(good, {"unread": [1.5]}),
        changed(good, {"tail": None}),
        changed(good, None, more=torch.zeros(1)),
        changed(good, None, **{"state.0": None}),
        changed(good, None, **{"state.0": torch.full_like(first, torch.nan)}),
        changed(good, None, **{"state.0": first.double()}),
        changed(good, None, **{"state.0": first[..., :-1].contiguous()}),
        changed(good, None, **{"state.0": torch.cat([first, first])}),
    ]
    for content in wrong:
        with pytest.raises(InputError) as refused:
            from_bytes(content, DIGEST, model)
        assert str(refused.value).startswith("state: ")
        assert "\n" not in str(refused.value)
    good = to_bytes(standing(copying), DIGEST)
    *_, remembered, position = tensors(standing(copying).state)
    last = len(list(tensors(standing(copying).state))) - 1
    for name, tensor in (
        (f"state.{last}", position + 1),
        (f"state.{last - 1}", remembered + 65),
        (f"state.{last - 1}", remembered[:, :-1].contiguous()),
    ):
        with pytest.raises(InputError):
            from_bytes(changed(good, None, **{name: tensor}), DIGEST, copying)
