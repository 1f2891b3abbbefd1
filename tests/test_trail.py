"""A trail has the state after any part of what was read, by row: every base kernel, stack and copy memory.

Of mixers alone, tests/models/test_mixers.py says the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kmixer.errors import InputError
from kmixer.layers.block import Block
from kmixer.models import CausalLM, ModelConfig, TransformerConfig
from kmixer.ops.base_kernel import KINDS
from kmixer.state import State, join, map_tensors, nbytes, rows
from tests.models.laws import assert_close, assert_owns_its_memory, draw_rows
from tests.models.test_copying_models import MODELS as COPYING
from tests.models.test_copying_models import make as make_copying

VOCABULARY = 4
BLOCKS = {"kind": "transformer", "width": 12, "layers": 2, "heads": 3}
STACK = {"width": 12, "layers": 2, "rank": 3}
KERNELS: dict[str, dict[str, Any]] = {
    kind: {"kind": kind, "size": 100, "rank": 2 if kind == "low_rank" else None} for kind in KINDS
}
MODELS: dict[str, dict[str, Any]] = {
    **{f"{kind}, shared": {**STACK, "base_kernel": kernel} for kind, kernel in KERNELS.items()},
    **{f"{kind}, a layer": {**STACK, "base_kernel": {**kernel, "shared": False}} for kind, kernel in KERNELS.items()},
    "refined": {**STACK, "refinement": {"steps": 3}, "base_kernel": {"kind": "conv", "size": 4}},
    "value embeddings and windows": {
        **BLOCKS,
        "blocks": "nanochat",
        "mixers": "softmax",
        "windows": "SL",
        "window": 4,
        "value_embeddings": True,
    },
    "fast weights": {**STACK, "fast_weights": {"chunk": 5, "layers": "every", "max_norm": 0.5}},
    "fast weights, refined": {**STACK, "refinement": {"steps": 2}, "fast_weights": {"chunk": 4, "reset_every": 7}},
    "fast weights by token": {**STACK, "fast_weights": {"chunk": 1, "target": "hidden"}},
    "fast weights of nanochat": {**BLOCKS, "blocks": "nanochat", "fast_weights": {"chunk": 3, "tau": None}},
    "mixers of all kinds": {**BLOCKS, "layers": 4, "mixers": ["softmax", "gaussian", "hierarchical", "k2"]},
}


def make_model(kind: str) -> CausalLM:
    if kind in COPYING:
        return make_copying(kind)
    torch.manual_seed(0)
    values = MODELS[kind]
    config = (TransformerConfig if "kind" in values else ModelConfig).parse(values, source="test")
    model = CausalLM(config, VOCABULARY).double().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("kind", [*MODELS, *COPYING])
@settings(max_examples=6)
@given(data=st.data())
@torch.no_grad()
def test_it_is_reading_so_much_for_every_model(kind: str, data: st.DataObject) -> None:
    model = make_model(kind).to(data.draw(st.sampled_from([torch.float64, torch.float32])))
    positions, n, lengths = draw_rows(data)
    tokens = torch.randint(VOCABULARY, (len(positions), 60), generator=torch.Generator().manual_seed(n))

    def read(row: int, first: int, last: int, state: State) -> State:
        return model(tokens[row : row + 1, first:last], state).state if last > first else state

    begun = [read(row, 0, p, model.initial_state(1)) for row, p in enumerate(positions)]
    state = join(begun)
    before = map_tensors(lambda tensor: tensor.clone(), state)
    chunk = torch.cat([tokens[row : row + 1, p : p + n] for row, p in enumerate(positions)])
    output, plain = model(chunk, state, trail=True), model(chunk, state)
    assert torch.equal(output.logits, plain.logits)
    assert plain.trail is None
    assert_close(output.state, plain.state)
    kept = output.trail.at(torch.tensor(lengths))
    ways = enumerate(zip(positions, lengths, strict=True))
    assert_close(kept, join([read(row, p, p + k, begun[row]) for row, (p, k) in ways]))
    assert_owns_its_memory(kept)
    assert nbytes(kept) <= nbytes(join([state, state])) + nbytes(plain.state)
    assert_close(state, before)
    model.check_state(kept, len(positions))
    again = model(chunk, kept, trail=True).trail.at(torch.tensor(lengths).flip(0))
    mine = [model(chunk[row : row + 1, :k], rows(kept, [row])).state for row, k in enumerate(reversed(lengths))]
    assert_close(again, join(mine))


@pytest.mark.parametrize("kind", [*MODELS, *COPYING])
@torch.no_grad()
def test_a_chunk_without_tokens_leaves_the_state(kind: str) -> None:
    model = make_model(kind)
    state = join([model(torch.ones(1, n, dtype=torch.int64)).state for n in (3, 7)])
    output = model(torch.ones(2, 0, dtype=torch.int64), state, trail=True)
    assert_close(output.trail.at(torch.tensor([0, 0])), state)
    assert_close(output.state, state)


@torch.no_grad()
def test_losses_have_a_trail_too() -> None:
    model, tokens = make_model("conv, shared"), torch.ones(2, 5, dtype=torch.int64)
    output = model(tokens, targets=tokens, trail=True)
    assert torch.equal(output.losses, model(tokens, targets=tokens).losses)
    assert_close(output.trail.at(torch.tensor([2, 2])), model(tokens[:, :2]).state)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1]), r"lengths: got \(1,\) torch.int64; allowed: torch.int64, one for each of the 2 rows"),
        (torch.tensor([1.0, 1.0]), r"lengths: got \(2,\) torch.float32; allowed"),
        (torch.tensor([[1, 1]]), r"lengths: got \(1, 2\) torch.int64; allowed"),
        (torch.tensor([4, 1]), r"lengths: got \[4, 1\]; allowed: 0 to 3, the tokens that were read"),
        (torch.tensor([0, -1]), r"lengths: got \[0, -1\]; allowed: 0 to 3"),
    ],
    ids=str,
)
def test_other_lengths_are_refused(lengths: Tensor, message: str) -> None:
    trail = make_model("conv, shared")(torch.ones(2, 3, dtype=torch.int64), trail=True).trail
    with pytest.raises(InputError, match=f"^{message}"):
        trail.at(lengths)


class Mean(torch.nn.Module):
    """A mixer that has no trail."""

    def initial_state(self, batch_size: int) -> None: ...

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        return x, None


def test_a_mixer_without_a_trail_is_refused_by_name() -> None:
    model = make_model("mixers of all kinds")
    model.stack.blocks[1].mixer = Mean()  # type: ignore[union-attr]
    tokens = torch.ones(1, 3, dtype=torch.int64)
    assert model(tokens).trail is None
    with pytest.raises(
        InputError, match=r"^trail: Mean gives none; allowed: layers whose forward takes trail=True;.*$"
    ):
        model(tokens, trail=True)


def test_a_block_without_a_trail_is_refused_by_name() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, state: Any = None, *extra: Any) -> Any:
            return self.block(x, state, *extra)

    for kind in ("conv, a layer", "mixers of all kinds"):
        model = make_model(kind)
        blocks: Any = model.stack.blocks
        blocks[1] = Wrapped(blocks[1])
        with pytest.raises(InputError, match=r"^trail: Wrapped gives none; allowed"):
            model(torch.ones(1, 3, dtype=torch.int64), trail=True)
