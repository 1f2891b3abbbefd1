"""States that are kept: the longest that is known, up to so many bytes, least recently used out first."""

from __future__ import annotations

import numpy as np
import torch

from kmixer.generation.kept_states import BLOCK, KeptStates, names_at, names_of_blocks


def state(value: int) -> torch.Tensor:
    return torch.full((1, 25), value, dtype=torch.float32)  # 100 bytes


def test_names_are_of_whole_blocks_and_of_all_before_them() -> None:
    tokens = np.arange(3 * BLOCK + 5)
    names = names_of_blocks(tokens)
    assert len(names) == 3
    assert names_at(tokens, [BLOCK, 3 * BLOCK])[0] == names[0]
    assert names_of_blocks(tokens[: 2 * BLOCK]) == names[:2]
    assert names_of_blocks(tokens[: BLOCK - 1]) == names_of_blocks(tokens[:0]) == []
    other = tokens.copy()
    other[0] = 9
    assert not set(names_of_blocks(other)) & set(names)


def test_the_longest_prefix_is_found_and_the_least_recently_used_goes() -> None:
    kept = KeptStates[torch.Tensor](300)
    names = [bytes([index]) for index in range(5)]
    for index in range(3):
        kept.put(names[index], state(index))
    assert kept.nbytes == 300
    assert kept.longest(names[:3])[0] == 3
    assert kept.longest([names[0], names[4]])[0] == 1  # used: the next to go is 1
    kept.put(names[3], state(3))
    assert len(kept) == 3
    assert kept.longest([names[1]]) == (0, None)
    count, found = kept.longest([names[0], names[1]])
    assert count == 1
    assert torch.equal(found, state(0))  # type: ignore[arg-type]
    kept.put(names[0], state(9))
    assert kept.nbytes == 300


def test_without_memory_nothing_is_kept() -> None:
    kept = KeptStates[torch.Tensor](0)
    kept.put(b"a", state(1))
    assert (len(kept), kept.nbytes, kept.longest([b"a"])) == (0, 0, (0, None))


def test_the_newest_stay_whatever_their_size_where_that_is_asked() -> None:
    kept = KeptStates[torch.Tensor](50, at_least=1)
    for index in range(3):
        kept.put(bytes([index]), state(index))
        assert (len(kept), kept.nbytes) == (1, 100)
    assert kept.longest([b"\x00", b"\x01"]) == (0, None)
    assert kept.longest([b"\x01", b"\x02"])[0] == 2

    kept = KeptStates[torch.Tensor](50)
    kept.put(b"large", state(1))
    assert (len(kept), kept.nbytes) == (0, 0)
