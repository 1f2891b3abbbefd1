"""Where a session stands, as a safetensors file that is bound to the weights it was made with."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kmixer.errors import InputError, one_line
from kmixer.files import parse_json
from kmixer.models.causal_lm import CausalLM, RememberingState, check_tokens
from kmixer.ops import suffix_matches
from kmixer.serve.sessions import TAIL, Standing
from kmixer.state import State, map_tensors, tensors

LARGEST_POSITION = 1 << 48
MOST_UNREAD = 1 << 20


def to_bytes(standing: Standing, digest: str) -> bytes:
    """The file."""
    parts = {f"state.{index}": tensor.contiguous() for index, tensor in enumerate(tensors(standing.state))}
    about = {"digest": digest, "position": standing.position, "unread": standing.unread, "tail": standing.tail}
    return save(parts, metadata={"kmixer": json.dumps(about)})


def from_bytes(content: bytes, digest: str, model: CausalLM) -> Standing:
    """What a file holds, which anybody may have written. Raises InputError for one that this model did not make."""
    about = _metadata(content)
    if about.get("digest") != digest:
        raise InputError("state: it is of other weights; give one that a server of this model has written")
    try:
        parts = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"state: it is no safetensors file ({one_line(str(error), 200)}); give it whole") from None
    initial = model.initial_state(1)
    count = len(list(tensors(initial)))
    if parts.keys() != {f"state.{index}" for index in range(count)}:
        raise InputError(f"state: it holds other names than state.0 to state.{count - 1}; give it as it was written")
    given = iter(parts[f"state.{index}"] for index in range(count))
    state = map_tensors(lambda _: next(given), initial)
    model.check_state(state, 1)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors(state) if tensor.is_floating_point()):
        raise InputError("state: it holds numbers that are not finite; give it as it was written")
    position = _number(about, "position")
    _check_counts(state, position, model)
    tokens = {name: _tokens(about, name, model.vocabulary_size) for name in ("unread", "tail")}
    return Standing(state, position, tokens["unread"], tokens["tail"][-TAIL:])


def _metadata(content: bytes) -> dict[str, Any]:
    """What stands in the header of the file."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = parse_json(content[8 : 8 + length].decode(), "state: its header") if len(content) >= 8 + length else {}
    except UnicodeDecodeError:
        header = {}
    text = header.get("__metadata__", {}).get("kmixer") if isinstance(header, dict) else None
    about = parse_json(text, "state: its metadata") if isinstance(text, str) else None
    if not isinstance(about, dict):
        raise InputError("state: it was not written by kmixer serve; give what GET of a session's state returned")
    return about


def _number(about: dict[str, Any], name: str) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 <= value <= LARGEST_POSITION:
        raise InputError(f"state: its {name} is no number of tokens; give it as it was written")
    return value


def _tokens(about: dict[str, Any], name: str, vocabulary_size: int) -> tuple[int, ...]:
    value = about.get(name)
    if not isinstance(value, list) or len(value) > MOST_UNREAD or not all(type(token) is int for token in value):
        raise InputError(f"state: its {name} are no tokens; give it as it was written")
    if not all(0 <= token < vocabulary_size for token in value):
        raise InputError(f"state: its {name} are of another vocabulary; give it as it was written")
    return tuple(value)


def _check_counts(state: State, position: int, model: CausalLM) -> None:
    """Raises InputError where positions and remembered tokens do not fit each other."""
    if isinstance(state, RememberingState):
        memory = state.memory
        check_tokens(memory.tokens[..., 0], model.vocabulary_size)
        if int(memory.position) != position:
            raise InputError("state: its copy memory stands elsewhere; give it as it was written")
        assert model.copy_memory is not None
        suffix_matches(torch.zeros(1, 0, dtype=torch.int64), memory, model.copy_memory.memory)
        return
    counts: list[Tensor] = [tensor for tensor in tensors(state) if not tensor.is_floating_point()]
    if any(int(value) < 0 for count in counts for value in count.flatten()):
        raise InputError("state: it holds a position below 0; give it as it was written")
