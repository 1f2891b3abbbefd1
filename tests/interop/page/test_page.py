"""A page computes what the model does: its list of operations, read in NumPy and, where Node is, in JavaScript."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kmixer
from kmixer.data.tokenizers import BytePairTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.generation import generate_tokens
from kmixer.generation.sampling import Sampling
from kmixer.interop.operation_list import operation_list
from kmixer.interop.page import write_page
from kmixer.interop.page.file import SCRIPTS
from kmixer.models import CausalLM, ModelConfig
from tests.interop.page.numpy_step import logits_of

HERE = Path(__file__).parent
PAGE = Path(kmixer.__file__).parent / "interop" / "page"
CHARACTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz .\n<&é😀")
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")

MODELS: dict[str, dict[str, Any]] = {
    "conv": {"base_kernel": {"kind": "conv", "size": 8}},
    "one lag": {"base_kernel": {"kind": "conv", "size": 1}},
    "toeplitz of each layer": {"base_kernel": {"kind": "toeplitz", "size": 40, "shared": False}, "rank": 17},
    "no base kernel": {"base_kernel": {"kind": "none"}, "decay": {"alpha": "per_layer", "alpha_cap": 0.8}},
    "refined": {"layers": 1, "refinement": {"steps": 2}, "head": {"kind": "gelu", "multiplier": 2, "dropout": 0.5}},
    "factorised, gated": {"embedding_width": 8, "output_gate": True, "rank": 1},
    "copies": {"copy_memory": {"memory": 10}},
    "copies, all": {"copy_memory": {"layers": "last", "memory": None, "match_length": "both", "pointer": True}},
    "dyt": {"norm": {"kind": "dyt"}, "embedding_scale": 5.0},
    "derf, refined": {"norm": {"kind": "derf", "bias": True}, "refinement": {"steps": 2}, "embedding_scale": 2.0},
}


def small_model(name: str, vocabulary_size: int) -> CausalLM:
    """A model with weights far from their first values, so that every part of it counts."""
    torch.manual_seed(3)
    config = ModelConfig.model_validate({"width": 34, "layers": 2, "rank": 4, **MODELS[name]})
    model = CausalLM(config, vocabulary_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def repeating_tokens(count: int, vocabulary_size: int) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.cat([torch.randint(vocabulary_size, (count // 3,))] * 3)[: count - count % 3]


def in_node(page: Path, **asked: Any) -> dict[str, Any]:
    """What the scripts of the page make of it."""
    assert NODE is not None
    asked = {"page": str(page), "texts": [], "tokens": [], **asked}
    command = [NODE, str(HERE / "in_node.js"), *(str(PAGE / name) for name in SCRIPTS)]
    ended = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def scaled_difference(ours: Any, theirs: torch.Tensor) -> float:
    expected = theirs.double().numpy()
    return float(np.abs(np.asarray(ours) - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", MODELS)
def test_the_list_is_the_model(name: str) -> None:
    model = small_model(name, 34)
    tokens = repeating_tokens(60, 34)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert scaled_difference(logits_of(operation_list(model), tokens), expected) < 1e-5
    assert scaled_difference(logits_of(operation_list(model, half=True), tokens), expected) < 0.05


@needs_node
@pytest.mark.parametrize("name", MODELS)
def test_a_page_computes_the_model(name: str, tmp_path: Path) -> None:
    model = small_model(name, CHARACTERS.vocabulary_size)
    page = write_page(model, CHARACTERS, tmp_path / "page.html", name="a <b>")
    tokens = repeating_tokens(300, CHARACTERS.vocabulary_size)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    answer = in_node(page, tokens=tokens.tolist(), again=290, write=40)
    assert scaled_difference(answer["logits"], expected) < 1e-4
    bits = -torch.log_softmax(expected[:-1].double(), -1).gather(-1, tokens[1:, None])[:, 0] / np.log(2)
    assert answer["bits"][0] is None
    np.testing.assert_allclose(answer["bits"][1:], bits.numpy(), atol=1e-3, rtol=1e-4)
    written = [int(column) for column in generate_tokens(model, tokens[None], 40, Sampling(0.0))]
    assert answer["written"] == written


@needs_node
@pytest.mark.parametrize("half", [False, True])
def test_the_packaged_model_on_a_page(half: bool, tmp_path: Path) -> None:
    """500 tokens to 1e-4, and the text that it writes at temperature 0."""
    model = kmixer.load("shakespeare-small-copy")
    assert model.tokenizer is not None
    page = write_page(model, model.tokenizer, tmp_path / "page.html", half=half)
    tokens = torch.from_numpy(model.tokenizer.encode("KING:\nWhat say you, my lord, to the king of Naples?\n" * 11))[
        :500
    ]
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    answer = in_node(page, tokens=tokens.tolist(), write=100)
    difference = np.abs(np.asarray(answer["logits"]) - expected.numpy()).max()
    assert difference < (0.1 if half else 1e-4)
    if not half:
        assert answer["written"] == [int(column) for column in generate_tokens(model, tokens[None], 100, Sampling(0.0))]


@needs_node
def test_drawing_follows_the_probabilities(tmp_path: Path) -> None:
    """One seed, one text; and tokens come as often as they are likely: a model whose logits depend on nothing."""
    model = small_model("no base kernel", CHARACTERS.vocabulary_size)
    with torch.no_grad():
        model.norm.weight.zero_()
    page = write_page(model, CHARACTERS, tmp_path / "page.html")
    first, again, other = (in_node(page, tokens=[0], write=50, seed=seed, temperature=1) for seed in (5, 5, 6))
    assert first["written"] == again["written"] != other["written"]
    many = in_node(page, tokens=[0], write=4000, seed=7, temperature=1)["written"]
    counts = np.bincount(many, minlength=CHARACTERS.vocabulary_size)
    assert np.abs(counts / 4000 - 1 / CHARACTERS.vocabulary_size).max() < 0.015


TRAINED = ["the theme of them, then: 'tis isn't 1234 -- naïve café\n\n  don't; 北京 😀\r\n" * 20]
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CHARACTERS,
    "byte": ByteTokenizer(),
    "bpe": BytePairTokenizer.train(TRAINED, 320),
}


@needs_node
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_tokens_are_those_of_the_tokenizer(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    alphabet = st.sampled_from(CHARACTERS.characters) if kind == "char" else st.characters(exclude_categories=["Cs"])
    texts = data.draw(st.lists(st.text(alphabet, max_size=40), min_size=40, max_size=40))
    if kind != "char":
        texts += [TRAINED[0][:300], "a" * 700, " " * 600 + "x", "they're  the\u0085re\ufeff '", ""]
    page = write_page(small_model("conv", tokenizer.vocabulary_size), tokenizer, tmp_path / "p.html", force=True)
    answer = in_node(page, texts=texts)
    assert answer["encoded"] == [tokenizer.encode(text).tolist() for text in texts]
    assert answer["decoded"] == texts


def test_the_file_asks_for_nothing(tmp_path: Path) -> None:
    """Its policy allows the scripts that it has, by their digests, and no address stands in it."""
    prompt = "\n<b & é"
    page = write_page(
        small_model("conv", CHARACTERS.vocabulary_size), CHARACTERS, tmp_path / "page.html", name="<i>&", prompt=prompt
    )
    content = page.read_text(encoding="utf-8")
    policy = re.search(r'content="(default-src [^"]*)"', content)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    for tag in ("script", "style"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", content, re.S)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert "<title>&lt;i&gt;&amp; - kmixer</title>" in content
    assert "\n\n&lt;b &amp; é</textarea>" in content
    assert not re.search(r"https?:|src=|href=|@import|url\(", content)


def test_what_a_page_refuses(tmp_path: Path) -> None:
    model, out = small_model("conv", CHARACTERS.vocabulary_size), tmp_path / "page.html"
    with pytest.raises(InputError, match="does not know 'X'"):
        write_page(model, CHARACTERS, out, prompt="X")
    out.write_text("mine")
    with pytest.raises(InputError, match="there is a file already"):
        write_page(model, CHARACTERS, out)
    assert out.read_text() == "mine"
    dense = CausalLM(
        ModelConfig.model_validate({"width": 8, "layers": 1, "rank": 2, "base_kernel": {"kind": "dense", "size": 8}}), 5
    )
    with pytest.raises(InputError, match=r"no list of operations: .* dense base kernel, which ends"):
        operation_list(dense.eval())
    adapting = CausalLM(ModelConfig.model_validate({"width": 8, "layers": 1, "rank": 2, "fast_weights": {}}), 5)
    with pytest.raises(InputError, match="fast weights, which a list of operations does not describe"):
        operation_list(adapting.eval())
    with pytest.raises(InputError, match="training mode"):
        operation_list(model.train())
    with pytest.raises(InputError, match="not float32"):
        operation_list(small_model("conv", CHARACTERS.vocabulary_size).double())
