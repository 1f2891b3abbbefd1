"""A causal language model around a stack of mixing layers: embedding, stack, norm, head."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from kmixer.errors import InputError
from kmixer.layers.attach import put_fast_weights
from kmixer.layers.copy_memory import Copies, CopyMemory, chosen_layers, cut_copies
from kmixer.layers.linear import INITIAL_STD, linear
from kmixer.layers.pointer import Pointer
from kmixer.layers.roles import EMBEDDING, LOGIT, Role
from kmixer.models.heads import build_head
from kmixer.models.k_stack import KStack, ModelConfig
from kmixer.models.transformer import Transformer, TransformerConfig, build_norm
from kmixer.ops.fused import dropout
from kmixer.ops.suffix_automaton import SuffixState
from kmixer.state import State, check_state, parts_between, replaced
from kmixer.trail import Trail, asked_for


def kind_of(values: Any) -> str:
    """Which configuration nested values are of."""
    return str(values.get("kind", "k-stack") if isinstance(values, dict) else getattr(values, "kind", "k-stack"))


LanguageModelConfig = Annotated[
    Annotated[ModelConfig, Tag("k-stack")] | Annotated[TransformerConfig, Tag("transformer")], Discriminator(kind_of)
]


# Of the matrices of a decoding step: float32, or rounded to 16 or 8 bits; see kmixer.generation.prepared.
DecodedIn = Literal["float32", "bfloat16", "int8"]


class Output(NamedTuple):
    """What a model returns: logits (b, t, v), or losses (b, t) in nats where targets were given."""

    state: State  # of the stack, see KStack and Transformer; with a copy memory a `RememberingState`
    logits: Tensor | None = None
    losses: Tensor | None = None
    trail: Trail | None = None  # the states after any part of the tokens, where it was asked for


class RememberingState(NamedTuple):
    """What a model with a copy memory carries: the state of its stack, and the tokens that it remembers."""

    stack: State
    memory: SuffixState


class CausalLM(nn.Module):
    """Next-token model: embedding -> (e -> d) -> (scale) -> dropout -> stack -> norm -> head.

    Nothing encodes positions here.

    With a copy memory, the mixing layers are told what followed the last time the tokens before were seen.

    Args:
        config: the model's configuration, whose kind says which stack: `KStack` or `Transformer`.
        vocabulary_size: v.
    """

    decoded_in: DecodedIn = "float32"

    def __init__(self, config: LanguageModelConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocabulary_size = vocabulary_size
        embedding_width = config.embedding_width or config.width
        self.embedding = nn.Embedding(vocabulary_size, embedding_width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_STD)
        factorised = embedding_width != config.width
        self.from_embedding = linear(embedding_width, config.width, bias=False) if factorised else nn.Identity()
        scale = config.embedding_scale
        self.embedding_scale = nn.Parameter(torch.tensor(scale)) if scale else None
        self.stack: KStack | Transformer = (
            KStack(config) if isinstance(config, ModelConfig) else Transformer(config, vocabulary_size)
        )
        self.copy_memory = _build_copy_memory(config, vocabulary_size)
        pointer = config.copy_memory is not None and config.copy_memory.pointer
        self.pointer = Pointer(config.width) if pointer else None
        self.norm = build_norm(config, "final")
        self.head = build_head(config.head, config.width, embedding_width, vocabulary_size, config.norm)
        if config.fast_weights is not None:  # last, so that the other weights are those of the model without
            put_fast_weights(
                self.stack.blocks, config.fast_weights.chosen(config.layers), **config.fast_weights.options()
            )
        self._initial: tuple[torch.dtype, torch.device, State] | None = None  # what states are compared with

    def roles(self) -> dict[str, Role]:
        scale = {} if self.embedding_scale is None else {"embedding_scale": LOGIT}
        return scale | {f"from_embedding.{name}": EMBEDDING for name, _ in self.from_embedding.named_parameters()}

    def entering(self, embedded: Float[Tensor, "... e"]) -> Float[Tensor, "... d"]:
        """What enters the stack, of rows of the embedding."""
        entering = self.from_embedding(embedded)
        return entering if self.embedding_scale is None else self.embedding_scale * entering

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch.compile translate each kind of layer once."""
        self.stack.compile_layers(backend)

    def initial_state(self, batch_size: int) -> State:
        """The state before the first token of `batch_size` sequences."""
        state = self.stack.initial_state(batch_size)
        return (
            state if self.copy_memory is None else RememberingState(state, self.copy_memory.initial_state(batch_size))
        )

    def check_state(self, state: State, batch: int) -> None:
        """Raises InputError, one line, for a state that this model did not return for a batch of this size."""
        like = self.embedding.weight
        if self._initial is not None and self._initial[:2] == (like.dtype, like.device):
            try:
                check_state(state, self._initial[2], batch)
                return
            except InputError:  # parts may have been exchanged since
                pass
        self._initial = (like.dtype, like.device, self.initial_state(0))
        check_state(state, self._initial[2], batch)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        state: State = None,
        targets: Int[Tensor, "b t"] | None = None,
        *,
        copies: Copies | None = None,
        reset: Bool[Tensor, "b t"] | None = None,
        trail: bool = False,
    ) -> Output:
        """Logits of the next token at every position, and the state after the last.

        `model(tokens)` equals `model(tokens[:, :k])` followed by `model(tokens[:, k:], state)` for
        every k. With `targets`, the cross-entropy of each target takes the place of the logits. `copies` are told in
        the place of those that the copy memory makes of the tokens, which it remembers all the same. With `trail`,
        `output.trail.at(lengths)` is the state after the first lengths[i] tokens of each row i. Where `reset` is true a
        document begins: its row stands before the first token again, and sees nothing of what came before.

        Raises InputError past the window of a model whose base kernel has one, for tokens outside the vocabulary, for
        a state that is not of this model and batch, for copies that no copy memory takes, for a trail where a mixer
        has none, and for resets of another shape or with a trail.
        """
        check_tokens(tokens, self.vocabulary_size)
        if state is not None:
            self.check_state(state, len(tokens))
        if reset is not None:
            return self._in_documents(tokens, state, targets, copies, reset, trail=trail)
        embedded = self.entering(self.embedding(tokens))
        more = asked_for(self.stack, trail)
        if self.training and self.config.dropout.embedding:
            if self.config.fast_weights is not None:
                more["source"] = embedded
            embedded = dropout(embedded, self.config.dropout.embedding)
        if self.copy_memory is None:
            if copies is not None:
                raise InputError("copies: got some; this model has no copy memory, leave them out")
            hidden, state = self.stack(embedded, state, tokens, **more)
        else:
            stack_state, memory = (None, None) if state is None else cast("RememberingState", state)
            remembered, memory = self.copy_memory.copies(tokens, memory, **asked_for(self.stack, trail))
            copies = remembered if copies is None else copies
            added = self.copy_memory(copies)
            hidden, stack_state = self.stack(embedded, stack_state, tokens, added, **more)
            state = RememberingState(stack_state, memory)
        walked = None
        if trail:  # which the layers gave in the place of their states
            walked = Trail(state, *tokens.shape)
            state = walked.at(torch.full((len(tokens),), tokens.shape[1], device=tokens.device))
        hidden = self.norm(hidden)
        if targets is None:
            logits = self.head(hidden, self.embedding.weight)
            if self.pointer is not None and copies is not None:
                logits = self.pointer(logits, hidden, copies)
            return Output(state, logits=logits, trail=walked)
        losses = self.head.losses(hidden, targets, self.embedding.weight)
        if self.pointer is not None and copies is not None:
            losses = self.pointer.losses(losses, targets, hidden, copies)
        return Output(state, losses=losses, trail=walked)

    def _in_documents(
        self,
        tokens: Tensor,
        state: State,
        targets: Tensor | None,
        copies: Copies | None,
        reset: Tensor,
        *,
        trail: bool,
    ) -> Output:
        """The call, cut before every position where any row begins a document."""
        if reset.shape != tokens.shape or trail:
            given = "with trail=True" if trail else f"of shape {tuple(reset.shape)}"
            raise InputError(f"reset: got some {given}; allowed: {tuple(tokens.shape)} as the tokens, without a trail")
        initial = self.initial_state(len(tokens))
        outputs = []
        for first, last in parts_between(reset):
            if first < last and (begun := reset[:, first]).any():
                state = initial if state is None else replaced(state, initial, begun)
            part = slice(first, last)
            told = None if copies is None else cut_copies(copies, part)
            outputs.append(self(tokens[:, part], state, None if targets is None else targets[:, part], copies=told))
            state = outputs[-1].state
        logits, losses = (
            None if getattr(outputs[0], name) is None else torch.cat([getattr(output, name) for output in outputs], 1)
            for name in ("logits", "losses")
        )
        return Output(state, logits=logits, losses=losses)


def _build_copy_memory(config: ModelConfig | TransformerConfig, vocabulary_size: int) -> CopyMemory | None:
    settings = config.copy_memory
    if settings is None:
        return None
    return CopyMemory(
        vocabulary_size,
        config.width,
        chosen_layers(settings.layers, config.layers),
        embedding_width=config.embedding_width,
        memory=settings.memory,
        match_length=settings.match_length,
        second=settings.second,
    )


def check_tokens(tokens: Tensor, vocabulary_size: int) -> None:
    """Raises InputError, one line, for what is not (batch, time) numbers of tokens.

    Their values are looked at on a CPU outside of torch.compile; on a GPU that would wait for the device, which has
    an assertion of its own.
    """
    if tokens.ndim != 2:
        raise InputError(f"tokens: got shape {tuple(tokens.shape)}; allowed: (batch, time)")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(f"tokens: got {tokens.dtype}; allowed: torch.int64, the numbers that a tokenizer gives")
    if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
        numbers = tokens.flatten().tolist() if tokens.numel() == 1 else [int(token) for token in torch.aminmax(tokens)]
        lowest, highest = numbers[0], numbers[-1]
        if lowest < 0 or highest >= vocabulary_size:
            wrong = lowest if lowest < 0 else highest
            raise InputError(f"tokens: got {wrong}; allowed: 0 to {vocabulary_size - 1}, this model's vocabulary")


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each part that has any; a shared tensor counts once, where it is owned.

    Parts are the direct children of the model, those of its stack, and those of a block, all blocks together.
    """
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if "blocks" in path:
            blocks = path.index("blocks")
            path = [*path[:blocks], path[blocks + 2]]
        else:
            path = path[: 2 if path[0] == "stack" else 1]
        part = ".".join(path)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
