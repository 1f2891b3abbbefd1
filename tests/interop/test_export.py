"""The exported step is the model, one token at a time, in torch and in onnxruntime."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

import kmixer
from kmixer.data.tokenizers import CharTokenizer
from kmixer.errors import InputError
from kmixer.interop.export import describe, export
from kmixer.interop.exported_step import StepModule
from kmixer.models import CausalLM, ModelConfig
from kmixer.models.causal_lm import RememberingState
from kmixer.ops import suffix_matches
from kmixer.runs.recipe import LanguageRecipe
from kmixer.training.loop import train
from tests.changed_parts import change
from tests.cli.conftest import kmixer_command  # noqa: F401
from tests.training.test_loop import make_recipe

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz .")
MODELS: dict[str, dict[str, Any]] = {
    "conv": {"base_kernel": {"kind": "conv", "size": 8}, "copy_gate": True},
    "toeplitz of each layer": {"base_kernel": {"kind": "toeplitz", "size": 40, "shared": False}},
    "no base kernel": {"base_kernel": {"kind": "none"}, "decay": {"alpha": "per_layer", "alpha_cap": 0.8}},
    "refined": {"layers": 1, "refinement": {"steps": 2}, "head": {"kind": "gelu", "multiplier": 2, "dropout": 0.5}},
    "adaptive": {"embedding_width": 8, "head": {"kind": "adaptive", "cutoffs": [5, 15]}},
    "factorised": {"embedding_width": 8, "rank": 1, "refinement": {"steps": 0}},
    "no copies": {"copy_memory": {"layers": "none"}},
    "dyt": {"norm": {"kind": "dyt"}, "embedding_scale": 5.0},
    "derf, refined": {"norm": {"kind": "derf", "bias": True}, "refinement": {"steps": 2}, "embedding_scale": 2.0},
}
# With a copy memory, of every kind of layers and of match length.
COPYING: dict[str, dict[str, Any]] = {
    "copies": {"copy_memory": {}},
    "copies, factorised, gated": {
        "embedding_width": 8,
        "output_gate": True,
        "copy_memory": {"layers": [0], "memory": 10, "match_length": "gate"},
    },
    "copies, refined, a pointer": {
        "refinement": {"steps": 2},
        "copy_memory": {"layers": "last", "memory": 40, "match_length": "both", "pointer": True},
    },
    "copies, adaptive, a pointer": {
        "head": {"kind": "adaptive", "cutoffs": [5, 15]},
        "copy_memory": {"match_length": "embedding", "pointer": True},
    },
    "a pointer alone": {"copy_memory": {"layers": "none", "memory": 2, "pointer": True}},
}
models = pytest.mark.parametrize("kind", [*MODELS, *COPYING])
# Of a token, the state, and where there is a copy memory what it copies and the length of the match.
Step = Callable[..., tuple[Tensor, Any]]


def make_model(kind: str) -> CausalLM:
    torch.manual_seed(0)
    values = {"width": 16, "layers": 2, "rank": 3, "dropout": {"embedding": 0.5}, **(MODELS | COPYING)[kind]}
    model = CausalLM(ModelConfig.parse(values, source="test"), TOKENIZER.vocabulary_size)
    for parameter in model.parameters():  # away from the near-zero initialisation, so that every path matters
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return model.eval()


def make_tokens(t: int, b: int = 1) -> Tensor:
    """Four tokens, which repeat, and then any."""
    generator = torch.Generator().manual_seed(t)
    few = torch.randint(4, (b, t // 2), generator=generator) * 7
    return torch.cat([few, torch.randint(TOKENIZER.vocabulary_size, (b, t - t // 2), generator=generator)], dim=1)


@torch.no_grad()
def stream(step: Step, state: Any, tokens: Tensor, kind: str = "") -> tuple[Tensor, Any]:
    """Logits (b, t, v) and the last state of a step called once a token, with its matches where the kind has them."""
    matches: tuple[Tensor, ...] = ()
    if kind in COPYING:
        matches = suffix_matches(tokens, memory=COPYING[kind]["copy_memory"].get("memory"))[:2]
    logits = []
    for t in range(tokens.shape[1]):
        row, state = step(tokens[:, t : t + 1], state, *(match[:, t : t + 1] for match in matches))
        logits.append(row)
    return torch.stack(logits, dim=1), state


def tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if leaf is not None]


@functools.cache
def model_stream(kind: str, t: int, b: int = 1) -> tuple[Tensor, list[Tensor]]:
    """What the model itself gives, one token at a time."""
    model = make_model(kind)

    def step(token: Tensor, state: Any) -> tuple[Tensor, Any]:
        output = model(token, state)
        return output.logits[:, 0], output.state

    logits, state = stream(step, None, make_tokens(t, b))
    return logits, tensors(of_stack(state))


def of_stack(state: Any) -> Any:
    return state.stack if isinstance(state, RememberingState) else state


@models
def test_the_step_is_the_model(kind: str) -> None:
    model = make_model(kind)
    step = StepModule(model)
    logits, state = stream(step, step.initial_state(3), make_tokens(60, b=3), kind)
    expected, expected_state = model_stream(kind, 60, b=3)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(state), expected_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(step.initial_state(3)), tensors(of_stack(model.initial_state(3))))
    assert len(step.state_names()) == len(set(step.state_names())) == len(state)


def test_the_step_leaves_the_model_as_it_was() -> None:
    model = make_model("conv").double().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    StepModule(model)
    assert model.training
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "copy_gate" not in name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def torch_step(folder: Path, about: dict[str, Any]) -> Step:
    return torch.export.load(io.BytesIO((folder / about["file"]).read_bytes())).module()


def onnx_step(folder: Path, about: dict[str, Any]) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / about["file"]), options)
    inputs = [part["input"] for part in about["state"]]
    inputs += [part["input"] for part in about["copy_memory"]["inputs"]] if "copy_memory" in about else []
    outputs = ["logits", *(part["output"] for part in about["state"])]

    def step(token: Tensor, state: Any, *matches: Tensor) -> tuple[Tensor, Any]:
        feeds = dict(zip(["token", *inputs], [token, *state, *matches], strict=True))
        logits, *after = map(torch.from_numpy, session.run(outputs, {k: x.numpy() for k, x in feeds.items()}))
        return logits, after

    return step


@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize(
    ("kind", "t"),
    [
        ("conv", 1000),
        ("toeplitz of each layer", 1000),
        ("refined", 60),
        ("adaptive", 60),
        ("no copies", 20),
        *((kind, 100) for kind in COPYING),
    ],
)
def test_the_exported_step_is_the_model(kind: str, t: int, format: Any, tmp_path: Path) -> None:
    export(make_model(kind), TOKENIZER, tmp_path / "out", format)
    about = json.loads((tmp_path / "out" / "step.json").read_text())
    step = (torch_step if format == "torch" else onnx_step)(tmp_path / "out", about)
    for b, length in ((1, t), (4, 20)):
        state = tuple(torch.zeros(b, *part["shape"][1:]) for part in about["state"])
        logits, after = stream(step, state, make_tokens(length, b), kind)
        expected, expected_state = model_stream(kind, length, b)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(list(after), expected_state, rtol=1e-4, atol=1e-4)


def test_an_exported_program_holds_no_pickle(tmp_path: Path) -> None:
    file = export(make_model("conv"), TOKENIZER, tmp_path / "out", "torch")
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            content = archive.read(member)
            assert not content.startswith((b"PK", b"\x80")), f"{member} is an archive or a pickle of its own"
            assert content == b"" or not member.endswith((".pt", ".pkl"))
    assert torch.export.load(io.BytesIO(file.read_bytes())).example_inputs is None


@pytest.mark.parametrize("part", ["stack.first.mixer", "stack.blocks.1.feed_forward", "norm", "head"])
def test_a_model_with_an_unknown_part_is_refused(part: str, tmp_path: Path) -> None:
    model = make_model("conv")
    change(model.get_submodule(part))
    with pytest.raises(InputError, match=rf"^{part} \(Changed\w+\) is none of the parts that an export knows, so this"):
        export(model, TOKENIZER, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_an_export_says_what_it_takes_and_gives() -> None:
    about = describe(StepModule(make_model("conv")), "onnx")
    assert about["file"] == "step.onnx"
    assert about["vocabulary_size"] == TOKENIZER.vocabulary_size
    assert about["logits"]["shape"] == ["b", TOKENIZER.vocabulary_size]
    assert [(part["input"], part["output"], part["shape"]) for part in about["state"]] == [
        ("state.0.layer0.decay", "next.0.layer0.decay", ["b", 3, 16]),
        ("state.0.layer0.base", "next.0.layer0.base", ["b", 7, 16]),
        ("state.0.layer1.decay", "next.0.layer1.decay", ["b", 3, 16]),
        ("state.0.layer1.base", "next.0.layer1.base", ["b", 7, 16]),
    ]


@pytest.mark.parametrize("memory", [None, 8])
def test_an_export_says_what_it_takes_of_a_copy_memory(memory: int | None) -> None:
    values = {"width": 8, "layers": 2, "rank": 2, "copy_memory": {"memory": memory}}
    model = CausalLM(ModelConfig.parse(values, source="test"), TOKENIZER.vocabulary_size)
    about = describe(StepModule(model), "onnx")["copy_memory"]
    assert about["memory"] == memory
    inputs = [(part["input"], part["shape"], part["dtype"]) for part in about["inputs"]]
    assert inputs == [("copied", ["b", 1], "int64"), ("length", ["b", 1], "int64")]
    assert all("copy_memory" not in describe(StepModule(make_model(kind)), "onnx") for kind in ("conv", "no copies"))


def test_a_step_with_a_copy_memory_asks_for_matches() -> None:
    step = StepModule(make_model("copies"))
    with pytest.raises(InputError, match=r"^copied and length: missing; "):
        step(torch.zeros(1, 1, dtype=torch.int64), step.initial_state(1))


@pytest.mark.parametrize("kernel", [{"kind": "dense", "size": 20}, {"kind": "low_rank", "size": 20, "rank": 2}])
def test_models_that_do_not_stream_are_refused(kernel: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig.parse({"width": 8, "layers": 1, "rank": 2, "base_kernel": kernel}, source="test")
    model = CausalLM(config, TOKENIZER.vocabulary_size)
    with pytest.raises(InputError, match=f"the {kernel['kind']} base kernel ends at position 20, so this model has no"):
        export(model, TOKENIZER, tmp_path / "out", "torch")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^--format onnx needs onnx and onnxscript: pip install 'kmixer\[export\]'$"):
        export(make_model("conv"), TOKENIZER, tmp_path / "out", "onnx")


def test_nothing_but_an_export_is_replaced_and_that_by_force_only(tmp_path: Path) -> None:
    model, out = make_model("conv"), tmp_path / "out"
    out.mkdir()
    file = export(model, TOKENIZER, out, "torch")  # into an empty folder
    before = file.read_bytes()
    with pytest.raises(InputError, match="holds an export; add --force to replace it, or choose --out"):
        export(make_model("no base kernel"), TOKENIZER, out, "torch")
    assert file.read_bytes() == before
    export(make_model("no base kernel"), TOKENIZER, out, "torch", force=True)
    assert file.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").touch()
    for taken in (out, file):
        with pytest.raises(InputError, match="exists and is not an export alone; choose another --out"):
            export(model, TOKENIZER, taken, "torch", force=True)


EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_generate.py"


def example() -> dict[str, Any]:
    """What the example defines."""
    return runpy.run_path(str(EXAMPLE))


@given(st.lists(st.integers(0, 2), max_size=80), st.sampled_from([None, 2, 4, 6, 10, 26, 1000]))
def test_the_examples_copies_are_those_of_the_library(text: list[int], memory: int | None) -> None:
    copies = example()["Copies"](memory)
    tokens = torch.tensor(text, dtype=torch.int64)[None]
    copied, lengths, _ = suffix_matches(tokens, memory=memory)
    assert [copies(token) for token in text] == list(zip(copied[0].tolist(), lengths[0].tolist(), strict=True))


@pytest.mark.parametrize("copy_memory", [None, {"memory": 20, "match_length": "both", "pointer": True}])
def test_the_command_exports_what_the_example_runs_without_torch(
    copy_memory: dict[str, Any] | None,
    kmixer_command: Any,  # noqa: F811
    text_file: Path,
    tmp_path: Path,
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    values = make_recipe(text_file, steps=2).model_dump()
    values["model"]["copy_memory"] = copy_memory
    train(LanguageRecipe.parse(values, source="test"), run)
    answer = kmixer_command("export", run, "--out", out)
    assert answer.code == 0, answer
    assert answer.out.startswith(f"{out / 'step.onnx'} (")
    assert answer.err == ""
    assert {path.name for path in out.iterdir()} == {"step.onnx", "step.json", "tokenizer.json"}
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()

    script = f"import sys; sys.modules['torch'] = None; sys.argv = ['x', {str(out)!r}, 'The ', '50', '1']; "
    script += f"exec(compile(open({str(EXAMPLE)!r}).read(), 'example', 'exec'))"
    generated = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert generated.startswith("The ")
    assert len(generated) == len("The ") + 50 + 1
    assert set(generated) <= set(kmixer.load(run).tokenizer.characters) | {"\n"}
    assert len(EXAMPLE.read_text().splitlines()) <= 70


@pytest.mark.parametrize("format", ["tensorflow", "ONNX"])
def test_an_unknown_format_is_wrong_input(kmixer_command: Any, format: str, tmp_path: Path) -> None:  # noqa: F811
    answer = kmixer_command("export", tmp_path, "--out", tmp_path / "out", "--format", format)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert "'onnx', 'torch'" in answer.err.splitlines()[-1]
