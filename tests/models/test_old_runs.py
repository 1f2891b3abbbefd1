"""Run folders, model folders and checkpoints of older layouts load, and give what the code that wrote them gave.

`old_runs` was written by kmixer 0.1.0 before K1 and K2 became blocks: format 1 of weights. `logits.safetensors` holds
inputs, and the logits that the same code gave for them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kmixer
from kmixer import native
from kmixer.data.batches import random_windows
from kmixer.errors import InputError
from kmixer.models.causal_lm import CausalLM
from kmixer.models.model_folder import load_classifier, load_weights, save_weights
from kmixer.models.vision import VisionTransformer
from kmixer.models.weight_names import FORMAT, current_names
from kmixer.runs.archive import pack, unpack
from kmixer.runs.run_folder import CHECKPOINT, RunFolder
from kmixer.tensor_files import load_tensors, save_tensors
from kmixer.training import language
from kmixer.training.loop import train

OLD = Path(__file__).parent / "old_runs"
LANGUAGE = ("k-stack", "transformer", "nanochat", "shakespeare-small")
CLASSIFIERS = ("vit", "sequence-classifier")


def load(name: str) -> CausalLM | Any:
    if name in CLASSIFIERS:
        return load_classifier(OLD / name)[0]
    return kmixer.load(OLD / name if (OLD / name).exists() else name)


def this_machine() -> dict[str, str]:
    """What decides how a product of matrices is rounded."""
    library, cpus = native.kernels(), Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    return {
        "kernels": "" if library is None else Path(library._name).name,
        "torch": torch.__version__,
        "processor": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""),
    }


@pytest.mark.parametrize("name", [*LANGUAGE, *CLASSIFIERS])
def test_the_logits_are_those_of_the_code_that_wrote_it(name: str) -> None:
    recorded, machine = load_tensors(OLD / "logits.safetensors")
    model, inputs = load(name), recorded[f"{name}/inputs"]
    with torch.no_grad():
        logits: Tensor = model(inputs) if name in CLASSIFIERS else model(inputs).logits
    if machine == this_machine():
        assert torch.equal(logits, recorded[f"{name}/logits"])
    else:  # another processor adds in another order
        torch.testing.assert_close(logits, recorded[f"{name}/logits"], rtol=1e-4, atol=1e-5)


def test_the_folders_hold_weights_of_the_old_format() -> None:
    names = set()
    for name in (*LANGUAGE[:3], *CLASSIFIERS):
        tensors, metadata = load_tensors(OLD / name / "model.safetensors")
        assert "format" not in metadata
        names |= tensors.keys()
    assert {"stack.first.mixing.weight", "stack.mixers.0.query", "stack.mixers.1.feed_forward.up.bias"} <= names
    assert {"blocks.1.up.weight", "stack.blocks.3.mixer.query"} <= names


@pytest.mark.parametrize("name", ["k-stack", "vit"])
def test_what_is_saved_again_is_of_the_present_format(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / name, tmp_path / "run")
    model = load(name)
    save_weights(folder, model, None if isinstance(model, VisionTransformer) else model.tokenizer, {})
    tensors, metadata = load_tensors(folder / "model.safetensors")
    assert metadata["format"] == FORMAT
    assert tensors.keys() == model.state_dict().keys()
    assert load_weights(folder)[0].keys() == tensors.keys()


@pytest.mark.parametrize("format", [FORMAT + 1, 0, "2", None, 1.0, True])
def test_a_format_that_is_not_known_is_named(format: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "vit", tmp_path / "run")
    tensors, metadata = load_tensors(folder / "model.safetensors")
    save_tensors(folder / "model.safetensors", tensors, metadata | {"format": format})
    with pytest.raises(InputError, match=f"its weights are of format {format!r}, and this version .* reads 1 to") as no:
        load_classifier(folder)
    assert "\n" not in str(no.value)


def test_names_of_today_are_left_as_they_are() -> None:
    model = load("k-stack")
    assert current_names(model.state_dict(), FORMAT, "here").keys() == model.state_dict().keys()


def test_an_old_checkpoint_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(shutil.copytree(OLD / "k-stack", tmp_path / "run"))
    monkeypatch.chdir(OLD)  # where its corpus is
    assert load_tensors(run.checkpoint)[1]["step"] == 6
    # The old code drew no window that reached the last token, and so other windows from the same seed.
    monkeypatch.setattr(language, "random_windows", lambda tokens, *drawn: random_windows(tokens[:-1], *drawn))
    result = train(run.read_recipe(), run.path, resume=True)
    assert (result.finished, result.step) == (True, 12)
    # The old code came to 3.1957 from here, in the same twelve steps.
    assert result.best["loss"] == pytest.approx(3.1957261831396155, rel=1e-4)
    tensors, metadata = load_tensors(run.checkpoint)
    assert metadata["format"] == FORMAT
    assert "optimizer/stack.blocks.0.mixer.query/momentum_buffer" in tensors, sorted(tensors)


def test_an_old_run_is_packed_and_unpacked(tmp_path: Path) -> None:
    run = shutil.copytree(OLD / "k-stack", tmp_path / "run")
    pack(run, tmp_path / "run.tar.gz")
    unpack(tmp_path / "run.tar.gz", tmp_path / "again")
    assert (tmp_path / "again" / CHECKPOINT).read_bytes() == (run / CHECKPOINT).read_bytes()


def test_a_checkpoint_of_a_format_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(shutil.copytree(OLD / "k-stack", tmp_path / "run"))
    monkeypatch.chdir(OLD)
    tensors, metadata = load_tensors(run.checkpoint)
    save_tensors(run.checkpoint, tensors, metadata | {"format": FORMAT + 1})
    with pytest.raises(InputError, match=f"last.safetensors: its weights are of format {FORMAT + 1}, and this version"):
        train(run.read_recipe(), run.path, resume=True)
