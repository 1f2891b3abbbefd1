"""Safetensors files that notice when they were cut short or edited. No pickle is ever read here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kmixer.errors import InputError
from kmixer.files import atomic_write

# How torch.save (zip) and plain pickle begin.
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata atomically, with a sha256 over both."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(metadata, sort_keys=True)
    # One header key: safetensors orders several at random, and equal contents should be equal files.
    header = json.dumps({"metadata": text, "sha256": _digest(plain, text)})
    with atomic_write(path) as file:
        file.write(save(plain, metadata={"kmixer": header}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata. Raises InputError for a file that is missing, damaged, edited, or a pickle."""
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("kmixer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it from a copy") from None
    if _checked(header, path)["sha256"] != _digest(tensors, header["metadata"]):
        raise InputError(f"{path} was changed after it was written (its sha256 differs); restore it from a copy")
    return tensors, json.loads(header["metadata"])


def read_header(path: Path) -> tuple[dict[str, Any], str]:
    """Metadata of a file of tensors, and the sha256 over it and the tensors that its header holds; these stay unread.

    Raises InputError as `load_tensors` does, but for damage in the tensors.
    """
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _checked(json.loads((file.metadata() or {}).get("kmixer", "null")), path)
        metadata = json.loads(header["metadata"])
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); restore it from a copy") from None
    if not isinstance(metadata, dict):
        raise InputError(f"{path} is damaged (its metadata is no group of keys); restore it from a copy")
    return metadata, header["sha256"]


def _refuse_pickle(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    with path.open("rb") as file:
        if file.read(2) in PICKLE_STARTS:
            raise InputError(f"{path} is a pickle or a torch.save file, not safetensors; it is refused unread")


def _checked(header: Any, path: Path) -> dict[str, str]:
    texts = isinstance(header, dict) and all(isinstance(value, str) for value in header.values())
    if not texts or header.keys() != {"metadata", "sha256"}:
        raise InputError(f"{path} was not written by kmixer: its header does not hold metadata and a sha256")
    return header


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
