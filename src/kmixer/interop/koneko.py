"""Checkpoints of Koneko's later code (family c), made into run folders.

The file is a pickle. It is read only through torch's weights-only loader. Beside tensors it holds numpy's random state,
which nothing here needs: its arrays are read as `Inert`. Nothing of numpy can be called by a file, since a file that
builds arrays can write to any address. Whatever else a file holds is refused.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
import zipfile
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmixer.data.token_files import prepare_dataset
from kmixer.data.tokenizers import ByteTokenizer, Tokenizer
from kmixer.errors import InputError, shown, shown_name
from kmixer.files import open_to_read
from kmixer.layers.copy_memory import INITIAL_GATE, chosen_layers
from kmixer.models.causal_lm import CausalLM
from kmixer.models.k_stack import ModelConfig
from kmixer.models.model_folder import put_weights, save_config, save_weights
from kmixer.runs.integrity import RUN
from kmixer.runs.recipe import LanguageRecipe
from kmixer.runs.run_folder import UNKNOWN, RunFolder

# The gate of a layer's copy branch starts at `INITIAL_GATE`, and stays there where the branch is off.
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
# The copy branch's table and its map exist where the branch is off too.
_COPIES = {"rosa_emb.weight": "copy_memory.table.weight", "rosa_to_model.weight": "copy_memory.from_table.weight"}
_TIED = "head.head.weight"  # the tied head repeats the embedding
_GATE = re.compile(r"stack\.blocks\.(\d+)\.mixer\.copy_gate_logit")


def convert(
    file: Path, recipe: LanguageRecipe, out: Path, *, force: bool = False, data_dir: Path | None = None
) -> list[str]:
    """Make a run folder from a checkpoint; what the file does not hold comes from the recipe.

    Returns lines that say what was taken from where.

    Raises:
        InputError: a file that is not such a checkpoint or holds more than tensors, a copy branch that was trained
            where the recipe has none or the other way about, tensors whose shapes disagree with the recipe, or an
            existing run.
    """
    if not isinstance(recipe.model, ModelConfig):
        raise InputError(f"recipe {recipe.name}: Koneko's models are of kind 'k-stack'")
    decay = recipe.model.decay
    checkpoint = read_checkpoint(file)
    tensors = translate(checkpoint["model"], recipe.model, str(file))
    target = RunFolder(out)
    target.check_free(force=force)
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
        "koneko_step": checkpoint["step"],
        "koneko_perplexity": checkpoint["best_ppl"],
    }
    with target.held():
        target.check_free(force=force)  # again: another process may have made a run there meanwhile
        run = target.staged()
        run.write_recipe(recipe.with_whole_path())
        save_config(run.path, model, tokenizer)
        save_weights(run.path, model, tokenizer, about | {RUN: run.identity()})
        run.write_environment(torch.device("cpu"), 1, corpus_sha256)
        run.publish(target)
    return [
        f"{file}: {sum(p.numel() for p in model.parameters()):,} parameters, saved at step {checkpoint['step']}, "
        f"perplexity {checkpoint['best_ppl']:.4f} by its own account",
        f"from recipe {recipe.name}: decay range {list(decay.range)}, alpha cap {decay.alpha_cap}, "
        f"window {recipe.training.window}, tokenizer {recipe.tokenizer.kind} ({tokenizer.vocabulary_size} tokens)",
        f"run folder {out}",
    ]


def translate(theirs: dict[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """Koneko's tensors under the names of `CausalLM`. Raises InputError where that cannot be done."""
    layers = config.layers
    ours: dict[str, Tensor] = {}
    stripped = {key.removeprefix("_orig_mod.").removeprefix("module."): tensor for key, tensor in theirs.items()}
    if len(stripped) < len(theirs):
        raise InputError(f"{source}: two of its tensors have one name but for _orig_mod. and module.")
    for key, tensor in stripped.items():
        if key == _TIED or (key in _COPIES and config.copy_memory is None):
            continue
        name = _translate_key(key, layers)
        if name is None:
            raise InputError(
                f"{source}: tensor {shown_name(key)} has no place in a family-(c) model of {layers} K2 layers "
                "with a linear or gelu head; check the recipe's model.layers"
            )
        ours[name] = tensor.float().clone()
    _settle_copy_gates(ours, config, source)
    tied = stripped.get(_TIED)
    if tied is not None and "emb.weight" in stripped and not torch.equal(tied, stripped["emb.weight"]):
        raise InputError(f"{source}: head.head.weight differs from emb.weight, so the head is not tied; unknown layout")
    return ours


def _settle_copy_gates(ours: dict[str, Tensor], config: ModelConfig, source: str) -> None:
    """The gates of the layers' copy branches where the recipe has them: in its copy memory, or unused in the layers.

    Raises InputError where a gate was trained that the recipe leaves out, or none that it takes.
    """
    names = {int(match[1]): name for name in ours if (match := _GATE.fullmatch(name))}
    trained = {
        layer
        for layer, name in names.items()
        if ours[name].numel() == 1 and abs(ours[name].item() - INITIAL_GATE) > COPY_GATE_TOLERANCE
    }
    memory = config.copy_memory
    chosen = () if memory is None else chosen_layers(memory.layers, config.layers)
    if left_out := sorted(trained - set(chosen)):
        raise InputError(
            f"{source}: its copy branch (ROSA) was trained in K2 layers {left_out}, and the recipe has none there; "
            "without it the model would be another one: convert it with a recipe that has model.copy_memory, such as "
            "k-operators-copy-shakespeare"
        )
    if memory is None:
        return
    if not trained:
        raise InputError(
            f"{source}: its copy branch (ROSA) was not trained, and the recipe has one; convert it with a recipe "
            "without model.copy_memory, such as k-operators-local-shakespeare"
        )
    if names.keys() >= set(chosen):
        ours["copy_memory.gate_logit"] = torch.stack([ours[names[layer]].reshape(()) for layer in chosen])
    for layer in names if not config.copy_gate else ():
        del ours[names[layer]]


def _translate_key(key: str, layers: int) -> str | None:
    if key in _OUTSIDE or key in _COPIES:
        return _OUTSIDE.get(key) or _COPIES[key]
    match = re.fullmatch(r"k_stack\.layers\.(0|[1-9][0-9]{0,5})\.(.+)", key)
    if match is None:
        return None
    index, rest = int(match[1]), match[2]
    if index in (0, layers + 1):
        prefix, table = "first" if index == 0 else "last", _K1
    elif index == layers + 2:
        prefix, table = "read_out", _K0
    else:
        prefix, table = f"blocks.{index - 1}", _K2
    return f"stack.{prefix}.{table[rest]}" if rest in table and index <= layers + 2 else None


class Inert:
    """What stands for numpy's types while a file is read: takes any arguments, keeps nothing, does nothing."""

    def __new__(cls, *_: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# The names under which numpy 1 and 2 pickle an array.
NUMPY_NAMES = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
CHECKPOINT_BYTES = 1 << 34
# Koneko's files have 57 KB, and texts of 2,496 letters. torch searches its messages in time quadratic in texts in them.
PICKLE_BYTES = 1 << 22
TEXT_CHARACTERS = 10_000
MAX_STEP = 10**15
# A tied head stores its tensor once and names it twice.
TIMES_STORED = 2
_UNREADABLE = (
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    MemoryError,
    AssertionError,
    OverflowError,
    ArithmeticError,
)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Entries "model", named tensors, "step" and "best_ppl" of a checkpoint of Koneko's.

    Raises InputError, one line, for a file that is damaged, holds anything else, or is made to do harm.
    """
    with open_to_read(file, CHECKPOINT_BYTES) as opened:
        size = _check_archive(opened, file)
        try:
            with torch.serialization.safe_globals([(Inert, name) for name in NUMPY_NAMES]):
                checkpoint = torch.load(opened, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
            what = shown_name(named[1]) if named else "something else"
            raise InputError(f"{file} holds more than tensors ({what}): refused, nothing in it was run") from None
        # What torch's unpickler raises on bytes that are no pickle of a checkpoint.
        except _UNREADABLE as error:
            raise InputError(f"{file} is not a checkpoint torch can read ({type(error).__name__})") from None
    model = dict.get(checkpoint, "model") if isinstance(checkpoint, dict) else None
    if not isinstance(checkpoint, dict) or not isinstance(model, dict):
        raise InputError(f"{file} is not one of Koneko's checkpoints (it has no entry 'model')")
    tensors = dict(dict.items(model))  # what a file made of an OrderedDict may hide its methods
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{file}: its entry 'model' holds something other than named tensors")
        _check_tensor(tensor, f"{file}: tensor {shown_name(key)}")
    if sum(tensor.nbytes for tensor in tensors.values()) > TIMES_STORED * size:
        raise InputError(f"{file}: its tensors share what it stores, and would need many times its size")
    step, perplexity = dict.get(checkpoint, "step"), dict.get(checkpoint, "best_ppl")
    if type(step) is not int or type(perplexity) is not float:
        raise InputError(f"{file} is not one of Koneko's checkpoints (entries 'step' and 'best_ppl')")
    if not (0 <= step <= MAX_STEP and math.isfinite(perplexity)):
        raise InputError(f"{file}: got step {shown(step)}, best_ppl {perplexity}; allowed: numbers of a training run")
    return {"model": tensors, "step": step, "best_ppl": perplexity}


def _check_archive(opened: BufferedReader, file: Path) -> int:
    """Read all of a zip file against its checksums, which torch does not look at; its size.

    Raises InputError for a file that is damaged or no such archive, and for one whose entries are compressed or
    overlap: torch writes none, and a small file could unpack to any size.
    """
    size = opened.seek(0, 2)
    opened.seek(0)
    try:
        with zipfile.ZipFile(opened) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
                sum(entry.file_size for entry in entries) > size
            ):
                raise InputError(f"{file} is not a checkpoint torch has written (its parts are compressed or overlap)")
            if len({entry.filename for entry in entries}) < len(entries):
                raise InputError(f"{file} is damaged: two of its parts have one name; restore it from a copy")
            damaged = archive.testzip()
            if damaged is None:
                for entry in entries:
                    if entry.filename.endswith("data.pkl"):
                        _check_texts(archive, entry, file)
    # zipfile raises all of these on damage: of a header, a flag, a method, a name; pickletools a ValueError.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not a checkpoint torch can read ({type(error).__name__})") from None
    if damaged is not None:
        raise InputError(f"{file} is damaged (the checksum of {shown_name(damaged)} differs); restore it from a copy")
    opened.seek(0)
    return size


def _check_texts(archive: zipfile.ZipFile, pickled: zipfile.ZipInfo, file: Path) -> None:
    """Raises InputError for a pickle or a text in it that is too long, and ValueError for what is no pickle."""
    if pickled.file_size > PICKLE_BYTES:
        raise InputError(f"{file}: its list of tensors has {pickled.file_size:,} bytes; allowed: {PICKLE_BYTES:,}")
    for _, text, _ in pickletools.genops(archive.read(pickled)):
        if isinstance(text, str) and len(text) > TEXT_CHARACTERS:
            raise InputError(f"{file}: got the text {shown(text)}; allowed: {TEXT_CHARACTERS:,} characters")


def _check_tensor(tensor: Tensor, what: str) -> None:
    """Raises InputError for anything but a dense tensor of real numbers that all stand in the file."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.device.type != "cpu":
        raise InputError(f"{what} has no values on the processor")
    if tensor.layout != torch.strided or not tensor.is_floating_point():
        raise InputError(f"{what} is {tensor.dtype}, {tensor.layout}; allowed: dense real numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise InputError(f"{what} has shape {tuple(tensor.shape)}, more than the file holds of it")
