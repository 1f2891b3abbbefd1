"""Safetensors files that notice when they were cut short or edited. No pickle is ever read here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kmixer.errors import SHOWN_CHARACTERS, InputError, one_line
from kmixer.files import atomic_write, open_to_read, parse_json, plain_text

# How torch.save (zip) and plain pickle begin.
PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

# The header of a model of 10,000 tensors has 1 MB.
HEADER_BYTES = 1 << 24


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
    with _opened(path) as file:
        header = _header(file, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header["sha256"] != _digest(tensors, header["metadata"]):
        raise InputError(f"{path} was changed after it was written (its sha256 differs); restore it from a copy")
    return tensors, _metadata(header, path)


def save_plain(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors atomically as the library of transformers has them, which says nothing about them."""
    with atomic_write(path) as file:
        file.write(
            save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, {"format": "pt"})
        )


def load_plain(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file. Raises InputError for one that is missing, cut short, or a pickle."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def digest_of(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """The sha256 that a file of these would hold in its header."""
    return _digest(tensors, json.dumps(metadata, sort_keys=True))


def read_header(path: Path) -> tuple[dict[str, Any], str]:
    """Metadata of a file of tensors, and the sha256 over it and the tensors that its header holds; these stay unread.

    Raises InputError as `load_tensors` does, but for damage in the tensors.
    """
    with _opened(path) as file:
        header = _header(file, path)
    return _metadata(header, path), header["sha256"]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of tensors as the library opens it. Raises InputError for one that is missing, damaged, or a pickle."""
    with open_to_read(path) as opened:
        start = opened.read(8)
        if start[:2] in PICKLE_STARTS:
            raise InputError(f"{path} is a pickle or a torch.save file, not safetensors; it is refused unread")
        # The first eight bytes are the length of the header, which the library reads whole.
        if len(start) < 8 or int.from_bytes(start, "little") > min(HEADER_BYTES, os.fstat(opened.fileno()).st_size - 8):
            raise InputError(f"{path} is damaged (it has no header of a possible length); restore it from a copy")
        # A name that is not UTF-8 is no name for torch; the open file has another.
        name = path if plain_text(str(path)) == str(path) else Path(f"/dev/fd/{opened.fileno()}")
        try:
            with safe_open(name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged ({one_line(str(error), SHOWN_CHARACTERS)}); restore it") from None


def _header(file: Any, path: Path) -> dict[str, str]:
    header = parse_json((file.metadata() or {}).get("kmixer", "null"), f"{path}: its header")
    if (
        not isinstance(header, dict)
        or header.keys() != {"metadata", "sha256"}
        or not all(isinstance(value, str) for value in header.values())
    ):
        raise InputError(f"{path} was not written by kmixer: its header does not hold metadata and a sha256")
    return header


def _metadata(header: dict[str, str], path: Path) -> dict[str, Any]:
    metadata = parse_json(header["metadata"], f"{path}: its metadata")
    if not isinstance(metadata, dict):
        raise InputError(f"{path} was not written by kmixer: its metadata are no JSON object")
    return metadata


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():  # an empty one may have strides that no view allows
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
