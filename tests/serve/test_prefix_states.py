"""States of prefixes: the longest that is known, up to so many bytes, least recently used out first."""

from __future__ import annotations

import torch

from kmixer.serve.prefix_states import BLOCK, PrefixStates, block_hashes


def state(value: int) -> torch.Tensor:
    return torch.full((1, 25), value, dtype=torch.float32)  # 100 bytes


def test_hashes_are_of_whole_blocks_and_of_all_before_them() -> None:
    tokens = torch.arange(3 * BLOCK + 5)
    hashes = block_hashes(tokens)
    assert len(hashes) == 3
    assert block_hashes(tokens[: 2 * BLOCK]) == hashes[:2]
    assert block_hashes(tokens[: BLOCK - 1]) == block_hashes(tokens[:0]) == []
    other = tokens.clone()
    other[0] = 9
    assert not set(block_hashes(other)) & set(hashes)


def test_the_longest_prefix_is_found_and_the_least_recently_used_goes() -> None:
    kept = PrefixStates(300)
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
    kept = PrefixStates(0)
    kept.put(b"a", state(1))
    assert (len(kept), kept.nbytes, kept.longest([b"a"])) == (0, 0, (0, None))
