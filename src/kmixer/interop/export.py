"""Exporting the decoding step of a run: explicit state in and out, to run without kmixer, or without torch.

step.onnx or step.pt2    the step; batch size b is free
step.json                names, shapes and dtypes of what goes in and comes out
tokenizer.json           the run's
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import Dim, ExportedProgram

from kmixer.data.tokenizers import Tokenizer
from kmixer.errors import InputError
from kmixer.files import atomic_write, write_json
from kmixer.interop.exported_step import StepModule
from kmixer.interop.folders import check_free, whole_folder
from kmixer.models.causal_lm import CausalLM
from kmixer.models.model_folder import TOKENIZER
from kmixer.version import VERSION

Format = Literal["onnx", "torch"]

STEP = "step.json"
FILES: dict[Format, str] = {"onnx": "step.onnx", "torch": "step.pt2"}
# The first with RMSNormalization as one operator: the step has 28 of them in 8 layers.
OPSET = 23


def export(model: CausalLM, tokenizer: Tokenizer, out: Path, format: Format, *, force: bool = False) -> Path:
    """Write the one-token step of a model into a new folder, at once or not at all.

    Args:
        model: one that streams: base kernel `toeplitz`, `conv` or none.
        tokenizer: written beside the step.
        out: the folder to make.
        format: "onnx" for any ONNX runtime; "torch" for `torch.export.load`.
        force: replace the export that is in `out`.

    Returns:
        The file of the step.

    Raises:
        InputError: a model that does not stream, missing packages, or a folder that holds something.
    """
    _check_packages(format)
    check_free(out, STEP, (STEP, TOKENIZER, *FILES.values()), force=force)
    step = StepModule(model).cpu()
    content = _serialise(step, format)
    with whole_folder(out) as new:
        with atomic_write(new / FILES[format]) as file:
            file.write(content)
        write_json(new / STEP, describe(step, format))
        write_json(new / TOKENIZER, tokenizer.to_json())
    return out / FILES[format]


def describe(step: StepModule, format: Format) -> dict[str, Any]:
    """The content of step.json: what the step takes and gives, in order. "b" is the batch size."""
    state = [
        {
            "input": f"state.{name}",
            "output": f"next.{name}",
            "shape": ["b", *tensor.shape[1:]],
            "dtype": "float32",
            "initial": 0.0,
        }
        for name, tensor in zip(step.state_names(), step.initial_state(1), strict=True)
    ]
    return {
        "format": format,
        "file": FILES[format],
        "kmixer": VERSION,
        "vocabulary_size": step.vocabulary_size,
        "token": {"input": "token", "shape": ["b", 1], "dtype": "int64"},
        "logits": {"output": "logits", "shape": ["b", step.vocabulary_size], "dtype": "float32"},
        "state": state,
        **({} if step.copies is None else {"copy_memory": _describe_copies(step.copies.memory)}),
    }


def _describe_copies(memory: int | None) -> dict[str, Any]:
    """What a step with a copy memory takes more, for whoever calls it to know without looking further."""
    meanings = {
        "copied": "the token after the most recent earlier occurrence of the longest suffix of all tokens up to this "
        "one that has occurred before, or -1 where none has",
        "length": "the number of tokens of that suffix, or 0",
    }
    return {
        "memory": memory,
        "remembered": "all tokens"
        if memory is None
        else f"{memory} tokens at most: when so many are remembered, the older half is dropped before the next",
        "inputs": [
            {"input": name, "shape": ["b", 1], "dtype": "int64", "meaning": meaning}
            for name, meaning in meanings.items()
        ],
    }


@torch.no_grad()
def trace(step: StepModule) -> ExportedProgram:
    """The step as a program for every batch size."""
    token, state, *matches = step.example(2)
    b = {0: Dim("b")}
    shapes = (b, (b,) * len(state), *(b for _ in matches))
    program = torch.export.export(step, (token, state, *matches), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # what is given away should not carry paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _serialise(step: StepModule, format: Format) -> bytes:
    program = trace(step)
    if format == "torch":
        program.example_inputs = None  # the one part of the file that would be a pickle
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()
    names, matches = step.state_names(), [] if step.copies is None else ["copied", "length"]
    free = {0: Dim.DYNAMIC}
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["token", *(f"state.{name}" for name in names), *matches],
            output_names=["logits", *(f"next.{name}" for name in names)],
            dynamic_shapes=({0: "b"}, (free,) * len(names), *(free for _ in matches)),  # names the program's axis
            verbose=False,
        )
    assert exported is not None
    return exported.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on torchvision, which is not used, and on its own use of its own trees."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _check_packages(format: Format) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise InputError(f"--format onnx needs {' and '.join(missing)}: pip install 'kmixer[export]'")
