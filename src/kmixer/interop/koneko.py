"""Checkpoints of the K-Operators author's later code (family c), made into run folders.

The file is a pickle. It is read only through torch's weights-only loader, with the numpy types its
random state needs allowed beside tensors; whatever else it holds is refused.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kmixer.data.token_files import prepare_dataset
from kmixer.data.tokenizers import ByteTokenizer, Tokenizer
from kmixer.errors import InputError
from kmixer.models.causal_lm import CausalLM
from kmixer.models.config import ModelConfig
from kmixer.models.model_folder import put_weights, save_config, save_weights
from kmixer.runs.recipe import Recipe
from kmixer.runs.run_folder import UNKNOWN, RunFolder

# The gate of the copy branch starts here, and stays where the branch is off.
COPY_GATE_INIT = -2.1972
COPY_GATE_TOLERANCE = 1e-3

_NORMS_AND_MLP = {
    "norm1.scale": "mixing_norm.weight",
    "norm2.scale": "feed_forward_norm.weight",
    "mlp.up.weight": "feed_forward.up.weight",
    "mlp.up.bias": "feed_forward.up.bias",
    "mlp.down.weight": "feed_forward.down.weight",
    "mlp.down.bias": "feed_forward.down.bias",
}
_K1 = _NORMS_AND_MLP | {
    "feature_mix.weight": "mixer.projection.weight",
    "feature_mix.bias": "mixer.projection.bias",
}
_K2 = _NORMS_AND_MLP | {
    "u": "mixer.query",
    "v": "mixer.key",
    "decay_logit": "mixer.decay_logit",
    "alpha_logit": "mixer.alpha_logit",
    "k_base_gate_logit": "mixer.gate_logit",
    "rho_logit": "mixer.copy_gate_logit",
    "k_base_kernel": "mixer.base_kernel.weights.0",
    "proj.weight": "mixer.projection.weight",
    "proj.bias": "mixer.projection.bias",
}
_K0 = {"gain": "gain", "bias": "bias", "norm.scale": "norm.weight"}
_OUTSIDE = {
    "emb.weight": "embedding.weight",
    "emb_to_model.weight": "from_embedding.weight",
    "k_stack.shared_k_base_kernel": "stack.shared_kernel.weights.0",
    "norm.scale": "norm.weight",
    "head.norm.scale": "head.norm.weight",
    "head.up.weight": "head.up.weight",
    "head.up.bias": "head.up.bias",
    "head.down.weight": "head.down.weight",
}
# The copy branch's table exists where the branch is off too, and the tied head repeats the embedding.
_UNUSED = ("rosa_emb.weight", "rosa_to_model.weight", "head.head.weight")


def convert(file: Path, recipe: Recipe, out: Path, *, force: bool = False, data_dir: Path | None = None) -> list[str]:
    """Make a run folder from a checkpoint; what the file does not hold comes from the recipe.

    Returns lines that say what was taken from where.

    Raises:
        InputError: a file that is not such a checkpoint or holds more than tensors, a trained copy
            branch, tensors whose shapes disagree with the recipe, or an existing run.
    """
    if not isinstance(recipe.model, ModelConfig):
        raise InputError(f"recipe {recipe.name}: the author's models are of kind 'k-stack'")
    decay = recipe.model.decay
    checkpoint = _read(file)
    tensors = translate(checkpoint["model"], recipe.model.layers, str(file))
    place = RunFolder(out)
    place.check_free(force=force)
    model = CausalLM(recipe.model, recipe.tokenizer.vocabulary_size)
    put_weights(model, tensors, f"{file} does not fit recipe {recipe.name}")
    tokenizer: Tokenizer = ByteTokenizer()
    corpus_sha256 = UNKNOWN  # nothing is read of a text for bytes
    if recipe.tokenizer.kind != "byte":
        dataset = prepare_dataset(recipe.data, recipe.tokenizer, data_dir)
        tokenizer, corpus_sha256 = dataset.tokenizer, dataset.sha256
    if tokenizer.vocabulary_size != model.vocabulary_size:
        raise InputError(
            f"corpus {recipe.data.corpus} gives {tokenizer.vocabulary_size} tokens; {file} has {model.vocabulary_size}"
        )
    about = {
        "corpus_sha256": corpus_sha256,
        "converted_from": file.name,
        "author_step": checkpoint["step"],
        "author_perplexity": checkpoint["best_ppl"],
    }
    run = place.staged()
    run.write_recipe(recipe)
    save_config(run.path, model, tokenizer)
    save_weights(run.path, model, tokenizer, about)
    run.write_environment(torch.device("cpu"), 1, corpus_sha256)
    run.publish(place)
    return [
        f"{file}: {sum(p.numel() for p in model.parameters()):,} parameters, saved at step {checkpoint['step']}, "
        f"perplexity {checkpoint['best_ppl']:.4f} by its author",
        f"from recipe {recipe.name}: decay range {list(decay.range)}, alpha cap {decay.alpha_cap}, "
        f"window {recipe.training.window}, tokenizer {recipe.tokenizer.kind} ({tokenizer.vocabulary_size} tokens)",
        f"run folder {out}",
    ]


def translate(theirs: dict[str, Tensor], layers: int, source: str) -> dict[str, Tensor]:
    """The author's tensors under the names of `CausalLM`. Raises InputError where that cannot be done."""
    ours: dict[str, Tensor] = {}
    stripped = {key.removeprefix("_orig_mod.").removeprefix("module."): tensor for key, tensor in theirs.items()}
    for key, tensor in stripped.items():
        if key in _UNUSED:
            continue
        name = _translate_key(key, layers)
        if name is None:
            raise InputError(
                f"{source}: tensor {key} has no place in a family-(c) model of {layers} K2 layers "
                "with a linear or gelu head; check the recipe's model.layers"
            )
        ours[name] = tensor.float().clone()
        gate = tensor.flatten()[0].item() if key.endswith("rho_logit") and tensor.numel() else COPY_GATE_INIT
        if abs(gate - COPY_GATE_INIT) > COPY_GATE_TOLERANCE:
            raise InputError(
                f"{source}: its copy branch (ROSA) was trained ({key} is {gate:.3f}, untrained "
                f"{COPY_GATE_INIT}); kmixer has no copy branch yet, and without it the model would be another one"
            )
    tied = stripped.get("head.head.weight")
    if tied is not None and "emb.weight" in stripped and not torch.equal(tied, stripped["emb.weight"]):
        raise InputError(f"{source}: head.head.weight differs from emb.weight, so the head is not tied; unknown layout")
    return ours


def _translate_key(key: str, layers: int) -> str | None:
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    match = re.fullmatch(r"k_stack\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    index, rest = int(match[1]), match[2]
    if index in (0, layers + 1):
        place, table = "first" if index == 0 else "last", _K1
    elif index == layers + 2:
        place, table = "read_out", _K0
    else:
        place, table = f"blocks.{index - 1}", _K2
    return f"stack.{place}.{table[rest]}" if rest in table and index <= layers + 2 else None


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} is missing")
    reconstruct = np.empty(0).__reduce__()[0]  # how numpy arrays are rebuilt; its module moved between versions
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), reconstruct]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        what = f"{found[1]}" if found else "something else"
        raise InputError(f"{file} holds more than tensors ({what}): refused, nothing in it was run") from None
    # What torch's unpickler raises on bytes that were never a pickle.
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a checkpoint torch can read ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise InputError(f"{file} is not one of the author's checkpoints (it has no entry 'model')")
    for key, tensor in checkpoint["model"].items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{file}: its entry 'model' holds something other than named tensors")
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise InputError(f"{file}: tensor {key} is {tensor.dtype}, {tensor.layout}; allowed: dense real numbers")
    step, perplexity = checkpoint.get("step"), checkpoint.get("best_ppl")
    if not isinstance(step, int) or not isinstance(perplexity, float):
        raise InputError(f"{file} is not one of the author's checkpoints (entries 'step' and 'best_ppl')")
    return {"model": checkpoint["model"], "step": step, "best_ppl": perplexity}
