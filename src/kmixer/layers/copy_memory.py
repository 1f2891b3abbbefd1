"""Copy memory: what followed the last time these tokens were seen, added to what the mixing layers mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kmixer.errors import InputError, check_choice
from kmixer.layers.linear import INITIAL_STD, linear
from kmixer.layers.roles import EMBEDDING, LOGIT, Role
from kmixer.ops.suffix_automaton import SuffixState, initial_state, suffix_matches, trail_of

# sigmoid(-2.1972) = 0.1: how much of a copy a layer takes before it has learned to.
INITIAL_GATE = -2.1972

MatchLength = Literal["unused", "gate", "embedding", "both"]
# Lengths of matches that are one bucket: 0, 1, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-32, and more.
BUCKET_STARTS = (1, 2, 3, 4, 5, 7, 9, 13, 17, 33)
BUCKETS = len(BUCKET_STARTS) + 1


class Copies(NamedTuple):
    """The tokens (b, t) that may follow next, -1 where nothing was seen before, and how long their matches are.

    `second` has those of the second memory, where there is one.
    """

    tokens: Tensor
    lengths: Tensor
    second: Copies | None = None


def nothing_seen(tokens: Int[Tensor, "b t"]) -> Copies:
    """What is told of tokens none of which was seen before."""
    return Copies(torch.full_like(tokens, -1, dtype=torch.int64), torch.zeros_like(tokens, dtype=torch.int64))


def cut_copies(copies: Copies, part: slice) -> Copies:
    """What is told of some of the positions."""
    second = None if copies.second is None else cut_copies(copies.second, part)
    return Copies(copies.tokens[:, part], copies.lengths[:, part], second)


def bucket_of(lengths: Int[Tensor, "*places"]) -> Int[Tensor, "*places"]:
    """The bucket of each length of a match, 0 to 10."""
    return torch.bucketize(lengths, torch.tensor(BUCKET_STARTS, device=lengths.device), right=True)


class CopyMemory(nn.Module):
    """For every position and layer a vector of the token that followed the last occurrence of its longest suffix.

        c_t, l_t = suffix_matches(x_0 .. x_t)        the copied token, and the length of the match
        R_t = W E[c_t + 1] + L[bucket of l_t]        E (v + 1, e), whose row 0 stands for no match
        y_t <- y_t + sigmoid(rho + beta[bucket of l_t]) R_t

    in every chosen layer, before its last matrix and any gate; rho and beta are the layer's own. W is there where e is
    not d, L and beta where `match_length` asks for them. Gradients reach everything but the tokens.

    Args:
        vocabulary_size: v.
        width: d, of the layers.
        layers: which of the mixing layers take copies, from 0.
        embedding_width: e; None is d.
        memory: how many tokens are remembered, an even number; None remembers all. See `suffix_matches`.
        match_length: what knows how long the match is: the gate, the vector, both or neither.
        longest: of longer matches the last so many tokens count; None: matches of any length.
        second: m, for a second memory beside this one, of the longest match of at most m tokens, with a table and gates
            of its own; what both make is added.

    Raises InputError for a `match_length` that is not one of these.

    Source: RWKV-8's ROSA and the later code of Koneko 2026; what knows the length of the match is ours.
    """

    def __init__(
        self,
        vocabulary_size: int,
        width: int,
        layers: Sequence[int],
        *,
        embedding_width: int | None = None,
        memory: int | None = None,
        match_length: MatchLength = "unused",
        second: int | None = None,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("match_length", match_length, get_args(MatchLength))
        self.vocabulary_size, self.layers = vocabulary_size, tuple(layers)
        self.memory, self.longest = memory, longest
        e = embedding_width or width
        self.table = nn.Embedding(vocabulary_size + 1, e)
        nn.init.normal_(self.table.weight, std=INITIAL_STD)
        self.from_table = linear(e, width, bias=False) if e != width else nn.Identity()
        self.gate_logit = nn.Parameter(torch.full((len(self.layers),), INITIAL_GATE))
        in_gate, in_vector = match_length in ("gate", "both"), match_length in ("embedding", "both")
        self.length_gate = nn.Parameter(torch.zeros(len(self.layers), BUCKETS)) if in_gate else None
        self.length_vector = nn.Parameter(torch.zeros(BUCKETS, width)) if in_vector else None
        self.second: CopyMemory | None = None
        if second is not None:
            self.second = CopyMemory(
                vocabulary_size,
                width,
                layers,
                embedding_width=embedding_width,
                memory=memory,
                match_length=match_length,
                longest=second,
            )
        if not self.layers:  # what nobody reads is not trained
            self.requires_grad_(False)

    def roles(self) -> dict[str, Role]:
        roles = {f"from_table.{name}": EMBEDDING for name, _ in self.from_table.named_parameters()}
        roles["gate_logit"] = LOGIT
        if self.length_gate is not None:
            roles["length_gate"] = LOGIT
        if self.length_vector is not None:
            roles["length_vector"] = EMBEDDING
        return roles

    def initial_state(self, batch_size: int) -> SuffixState:
        """The state before the first token: nothing remembered."""
        return initial_state(batch_size, self.table.weight.device)

    def copies(
        self, tokens: Int[Tensor, "b t"], state: SuffixState | None = None, *, trail: bool = False
    ) -> tuple[Copies, SuffixState]:
        """What may follow each of the tokens, and the state after the last, or the trail; without gradients.

        Raises InputError for a token that is not in the vocabulary, and for a state that is not of this memory.
        """
        second = None if self.second is None else self.second.copies(tokens, state)[0]
        copied, lengths, after = suffix_matches(
            tokens, state, self.memory, longest=self.longest, vocabulary_size=self.vocabulary_size
        )
        return Copies(copied, lengths, second), trail_of(tokens, state, self.memory) if trail else after

    def forward(self, copies: Copies) -> dict[int, Float[Tensor, "b t d"]]:
        """What is added to what a layer mixes, by the number of the layer."""
        if not self.layers:
            return {}
        vectors = self.vectors(copies)
        added = {layer: gate * vectors for layer, gate in zip(self.layers, self.gates(copies.lengths), strict=True)}
        if self.second is None:
            return added
        more = self.second(copies.second or nothing_seen(copies.tokens))
        return {layer: added[layer] + more[layer] for layer in self.layers}

    def vectors(self, copies: Copies) -> Float[Tensor, "b t d"]:
        """R above."""
        vectors: Tensor = self.from_table(self.table(copies.tokens + 1))
        return vectors if self.length_vector is None else vectors + self.length_vector[bucket_of(copies.lengths)]

    def gates(self, lengths: Int[Tensor, "b t"]) -> list[Tensor]:
        """The gate of every chosen layer: one number, or (b, t, 1) where it knows the length of the match."""
        gates = torch.sigmoid(self._gate_logits())
        return list(gates if self.length_gate is None else gates[:, bucket_of(lengths)].unsqueeze(-1))

    def gates_of_buckets(self) -> Float[Tensor, "layers buckets"]:
        """The gates of the chosen layers, at every length of a match."""
        logits = self._gate_logits()
        return torch.sigmoid(logits if logits.ndim == 2 else logits[:, None].expand(-1, BUCKETS))

    def learned(self) -> dict[str, Any]:
        """The gates by layer; by length of the match too, where they know it."""
        return {"copy_gate": torch.sigmoid(self._gate_logits()).tolist()}

    def _gate_logits(self) -> Tensor:
        """(layers,), or (layers, buckets) where the gates know the length of the match."""
        return self.gate_logit if self.length_gate is None else self.gate_logit[:, None] + self.length_gate


def chosen_layers(layers: Literal["all", "last", "none"] | Sequence[int], count: int) -> tuple[int, ...]:
    """The numbers of the layers that take copies, of so many.

    Raises InputError for a layer that is not there, or is named twice.
    """
    if isinstance(layers, str):
        return {"all": tuple(range(count)), "last": (count - 1,), "none": ()}[layers]
    if len(set(layers)) < len(layers) or not all(0 <= layer < count for layer in layers):
        raise InputError(f"copy_memory.layers: got {list(layers)}; allowed: different numbers from 0 to {count - 1}")
    return tuple(sorted(layers))
