"""Checkpoints that strangers wrote: nothing in them runs, and damage never passes for weights."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kmixer.errors import InputError
from kmixer.interop.koneko import read_checkpoint, translate
from kmixer.models import ModelConfig
from tests.cli.test_commands import koneko_checkpoint

CONFIG = ModelConfig(width=8, layers=2, rank=3)


class Reduced:
    """What a pickle rebuilds by calling a function: how a crafted file names what it wants to be called."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def checkpoint(model: Any, **entries: Any) -> dict[str, Any]:
    return {"model": model, "step": 1, "best_ppl": 4.0} | entries


@pytest.fixture
def file(tmp_path: Path) -> Path:
    koneko_checkpoint(tmp_path / "koneko.pt")
    return tmp_path / "koneko.pt"


def test_a_file_that_would_write_to_an_address_is_refused(tmp_path: Path) -> None:
    """An array of objects, their bytes as integers, a tensor on those: its numbers are addresses, and it can write."""
    objects = np.array(["a", "b"], dtype=object)
    addresses = Reduced(np.ndarray, ((2,), np.dtype(np.int64), objects))
    tensor = Reduced(torch._utils._rebuild_device_tensor_from_numpy, (addresses, torch.int64, "cpu", False))
    path = tmp_path / "crafted.pt"
    torch.save(checkpoint({"emb.weight": tensor}), path)

    reconstruct = np.empty(0).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype, type(np.dtype(object)), type(np.dtype(np.int64)), reconstruct]
    with torch.serialization.safe_globals(allowed):
        crafted = torch.load(path, weights_only=True)["model"]["emb.weight"]
    assert crafted.dtype == torch.int64  # it works where numpy is allowed ...
    assert (crafted > 1 << 20).all()

    with pytest.raises(InputError, match=r"crafted\.pt is not a checkpoint torch can read"):
        read_checkpoint(path)  # ... and not here


@pytest.mark.parametrize(
    "call",
    [
        (np.ndarray, ((1 << 40,),)),
        (np.dtype, ("O",)),
        (np.empty(0).__reduce__()[0], (np.ndarray, (1 << 40,), b"b")),
    ],
)
def test_nothing_of_numpy_is_called(call: tuple[Any, ...], tmp_path: Path) -> None:
    """An array of terabytes would be made, or refused by numpy; standing for itself it is nothing."""
    torch.save(checkpoint({"emb.weight": torch.ones(2)}, rng_state=Reduced(*call)), tmp_path / "file.pt")
    assert torch.equal(read_checkpoint(tmp_path / "file.pt")["model"]["emb.weight"], torch.ones(2))
    torch.save(checkpoint({"emb.weight": Reduced(*call)}), tmp_path / "file.pt")
    with pytest.raises(InputError, match="something other than named tensors"):
        read_checkpoint(tmp_path / "file.pt")


def assert_no_flip_changes_weights(file: Path, flips: int) -> None:
    """Every flip of a bit is refused, or the weights are the same."""
    whole, right = file.read_bytes(), read_checkpoint(file)
    damaged_file = file.with_name("damaged.pt") if file.parent.stat().st_mode & 0o200 else file
    rng = random.Random(0)
    refused = 0
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged_file.write_bytes(damaged)
        try:
            found = read_checkpoint(damaged_file)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert found["step"] == right["step"]
        assert found["best_ppl"] == right["best_ppl"]
        assert found["model"].keys() == right["model"].keys()
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in right["model"].items())
    assert refused > flips / 2


def test_a_flipped_bit_is_refused_or_changes_no_weight(file: Path) -> None:
    assert_no_flip_changes_weights(file, 300)


def test_the_released_checkpoints(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "author-checkpoint").glob("*.pt"))
    if not files:
        pytest.skip("the released checkpoints are not there")
    for released in files:
        assert read_checkpoint(released)["step"] > 0
        copy = tmp_path / "koneko.pt"
        copy.write_bytes(released.read_bytes())
        assert_no_flip_changes_weights(copy, 20)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.empty(3, device="meta"), "has no values on the processor"),
        (torch.zeros(1).expand(1 << 20, 1 << 20), r"has shape \(1048576, 1048576\), more than the file holds of it"),
        (torch.zeros(3, dtype=torch.int64), "is torch.int64"),
        (torch.eye(3).to_sparse(), "torch.sparse_coo; allowed: dense real numbers"),
        (torch.zeros(3, dtype=torch.complex64), "is torch.complex64"),
        ("text", "something other than named tensors"),
    ],
)
def test_tensors_that_are_no_weights(tensor: Any, message: str, tmp_path: Path) -> None:
    torch.save(checkpoint({"emb.weight": tensor}), tmp_path / "file.pt")
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "file.pt")


def test_many_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(10_000)
    torch.save(checkpoint({f"name{index}": tensor for index in range(10)}), tmp_path / "file.pt")
    with pytest.raises(InputError, match="would need many times its size"):
        read_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "x" * 1_000_000])
def test_names_reach_the_terminal_quoted_and_cut(name: str, tmp_path: Path) -> None:
    torch.save(checkpoint({name: torch.zeros(3, dtype=torch.int64)}), tmp_path / "file.pt")
    for read in (
        lambda: read_checkpoint(tmp_path / "file.pt"),
        lambda: translate({name: torch.zeros(1)}, CONFIG, "source"),
    ):
        with pytest.raises(InputError) as raised:
            read()
        assert len(str(raised.value)) < 700
        assert not any(character < " " for character in str(raised.value))


def repickled(path: Path, pickled: bytes) -> Path:
    """A checkpoint with these bytes in the place of its pickle."""
    torch.save(checkpoint({}), path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w") as target:
        for entry in whole.infolist():
            target.writestr(entry, pickled if entry.filename.endswith("data.pkl") else whole.read(entry))
    return path


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02c" + b"A" * 200_000 + b"\nname\n.",
        b"\x80\x02X" + (200_000).to_bytes(4, "little") + b"A" * 200_000 + b")R.",
        b"\x80\x02" + b"]" * 5_000_000 + b".",
    ],
)
def test_a_text_too_long_for_torch_is_refused_before_torch_reads_it(pickled: bytes, tmp_path: Path) -> None:
    """torch would search its own message for minutes: the time grows with the square of the text."""
    with pytest.raises(InputError, match=r"; allowed: [\d,]+") as raised:
        read_checkpoint(repickled(tmp_path / "x.pt", pickled))
    assert len(str(raised.value)) < 700


def test_compressed_archives_are_refused(file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(InputError, match="its parts are compressed or overlap"):
        read_checkpoint(tmp_path / "x.pt")


def test_names_that_become_one_are_refused() -> None:
    with pytest.raises(InputError, match="two of its tensors have one name"):
        translate({"emb.weight": torch.zeros(1), "_orig_mod.emb.weight": torch.ones(1)}, CONFIG, "source")
