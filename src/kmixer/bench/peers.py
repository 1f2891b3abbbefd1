"""Models of other libraries beside ours, of equal size: training steps and decoding, all timed in turn.

A peer is one line of `PEERS`. Weights are fresh and tokens random: speed does not depend on them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from kmixer.bench.measure import Roofs, time_in_turn
from kmixer.bench.models import Precision
from kmixer.generation.decoder import open_decoder
from kmixer.models import CausalLM, ModelConfig, TransformerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY = 256
TOKENS_PER_STEP = 2048
DECODED = 32  # tokens that are timed as one


class Size(NamedTuple):
    """A size of models: our width, layers and rank, and the heads of attention."""

    width: int
    layers: int
    rank: int
    heads: int


SIZES = {
    "0.17M": Size(64, 6, 4, 4),
    "0.84M": Size(128, 8, 16, 4),
    "4M": Size(256, 10, 16, 4),
    "25M": Size(512, 17, 16, 8),
    "87M": Size(768, 27, 16, 12),
}
OURS = "kmixer K-Stack"
# What transformers calls what is carried on, the newest name first.
CACHES = ("cache", "past_key_values", "cache_params")


class Recurrent(nn.Module):
    """Embedding, layers of torch's LSTM or GRU, tied read-out."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = kind(width, width, layers, batch_first=True)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.layers(self.embedding(tokens), state)
        return F.linear(hidden, self.embedding.weight), state


@dataclass(frozen=True)
class Peer:
    """A kind of model.

    Attributes:
        name: the library, and the model.
        build: a model of a size with so many layers that sees so many positions.
        fitted: it has as many layers as come nearest to our number of parameters, not ours.
        needs: a library that is not always there.
    """

    name: str
    build: Callable[[Size, int, int], nn.Module]
    fitted: bool = True
    needs: str | None = None


def _k_stack(size: Size, layers: int, positions: int) -> nn.Module:
    return CausalLM(ModelConfig(width=size.width, layers=layers, rank=size.rank), VOCABULARY)


def _transformer(size: Size, layers: int, positions: int) -> nn.Module:
    return CausalLM(TransformerConfig(width=size.width, layers=layers, heads=size.heads), VOCABULARY)


def _lstm(size: Size, layers: int, positions: int) -> nn.Module:
    return Recurrent(nn.LSTM, size.width, layers)


def _gru(size: Size, layers: int, positions: int) -> nn.Module:
    return Recurrent(nn.GRU, size.width, layers)


def _gpt2(size: Size, layers: int, positions: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_positions": positions, "n_embd": size.width, "n_layer": layers, "n_head": size.heads}
    shape |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}  # as ours; with dropout it is far slower
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, **shape))


def _mamba2(size: Size, layers: int, positions: int) -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    heads = {"num_heads": 2 * size.width // 32, "head_dim": 32, "n_groups": 1, "state_size": 64}
    config = Mamba2Config(vocab_size=VOCABULARY, hidden_size=size.width, num_hidden_layers=layers, **heads)
    config.tie_word_embeddings = True
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return Mamba2ForCausalLM(config)


PEERS = (
    Peer(OURS, _k_stack, fitted=False),
    Peer("kmixer transformer", _transformer),
    Peer("torch LSTM", _lstm),
    Peer("torch GRU", _gru),
    Peer("transformers GPT-2", _gpt2, needs="transformers"),
    Peer("transformers Mamba-2", _mamba2, needs="transformers"),
)


def present() -> list[Peer]:
    """The peers whose libraries are installed, ours first."""
    return [peer for peer in PEERS if peer.needs is None or importlib.util.find_spec(peer.needs) is not None]


def build(peer: Peer, size: Size, positions: int) -> nn.Module:
    """A model of about as many parameters as ours."""
    layers = size.layers
    if peer.fitted:
        with torch.device("meta"):
            one, two = (counted(peer.build(size, n, positions)) for n in (1, 2))
            asked = counted(PEERS[0].build(size, size.layers, positions))
        layers = max(1, 1 + round((asked - one) / (two - one)))
    torch.manual_seed(0)
    return peer.build(size, layers, positions)


def counted(model: nn.Module) -> int:
    """Parameters, but for a table of positions."""
    return sum(tensor.numel() for name, tensor in model.named_parameters() if not name.endswith("wpe.weight"))


def training_step(model: nn.Module, tokens: Tensor, precision: Precision) -> Callable[[], object]:
    """A call that makes one step on a batch (b, window + 1): forward, backward, clipping, AdamW."""
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = _loss(model, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, by each library's own way."""
    if isinstance(model, CausalLM):
        losses = model(tokens, targets=targets).losses
        assert losses is not None
        return losses.mean()
    output = model(tokens)
    logits = output[0] if isinstance(model, Recurrent) else output.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def decoding_step(model: nn.Module, prompt: Tensor) -> Callable[[], object]:
    """A call that decodes DECODED tokens greedily, after a prompt (b, t) and after those of the calls before it."""
    model.eval()
    step = _steps(model, prompt)
    token = prompt[:, -1]

    @torch.inference_mode()
    def decode() -> None:
        nonlocal token
        for _ in range(DECODED):
            token = step(token).argmax(-1)

    return decode


@torch.inference_mode()
def _steps(model: nn.Module, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits (b, v) after one token (b,) more, by each library's own way."""
    if isinstance(model, CausalLM):
        return open_decoder(model, model(prompt).state).step
    if isinstance(model, Recurrent):
        carried = model(prompt)[1]

        def recurrent(token: Tensor) -> Tensor:
            nonlocal carried
            logits, carried = model(token[:, None], carried)
            return logits[:, -1]  # type: ignore[no-any-return]

        return recurrent
    output = model(prompt, use_cache=True)
    key = next(name for name in CACHES if name in output)

    def cached(token: Tensor) -> Tensor:
        nonlocal output
        output = model(token[:, None], use_cache=True, **{key: output[key]})
        return output.logits[:, -1]  # type: ignore[no-any-return]

    return cached


def bench_peers(
    names: list[str],
    windows: list[int],
    precisions: list[Precision],
    context: int,
    rounds: int,
    roofs: Roofs,
    without: tuple[str, ...] = (),
) -> Iterator[dict[str, Any]]:
    """A row for every size, kind of work and model: tokens per second, and this over that of ours.

    Where torch cannot train a model so, the row has no figures, and why under `refused`.

    Args:
        names: of `SIZES`.
        windows: tokens of the windows of training, in batches of TOKENS_PER_STEP or of one.
        precisions: of training; decoding is float32.
        context: tokens before those that are decoded.
        rounds: in which all models take turns.
        roofs: of this machine, for the share of its rate of products that training reaches.
        without: names of peers to leave out.
    """
    peers = [peer for peer in present() if peer.name not in without]
    for size_name in names:
        size = SIZES[size_name]
        positions = max([*windows, context + DECODED * (rounds + 1)])
        models = {peer.name: build(peer, size, positions) for peer in peers}
        row = functools.partial(_rows, size_name, models)
        for window in windows:
            tokens = torch.randint(VOCABULARY, (max(1, TOKENS_PER_STEP // window), window + 1))
            for precision in precisions:
                steps = {peer.name: training_step(models[peer.name], tokens, precision) for peer in peers}
                refused = {name: why for name, step in steps.items() if (why := _why_not(step)) is not None}
                steps = {name: step for name, step in steps.items() if name not in refused}
                timed = time_in_turn(steps, rounds)
                of = {"what": "train", "window": window, "precision": precision}
                yield from row(timed, tokens.shape[0] * window, of, roofs.matmul(precision))
                for name, why in refused.items():
                    nothing = dict.fromkeys(("tokens_per_second", "of_ours", "part_of_roof"))
                    about = {"size": size_name, "model": name, "parameters": counted(models[name]), "refused": why}
                    yield {**of, **about, **nothing}
        prompt = torch.randint(VOCABULARY, (1, context))
        calls = {peer.name: decoding_step(models[peer.name], prompt) for peer in peers}
        of = {"what": "decode", "window": context, "precision": "float32"}
        yield from row(time_in_turn(calls, rounds), DECODED, of, None)


def _why_not(step: Callable[[], object]) -> str | None:
    """What torch says where it cannot make a step at all, as an LSTM in bfloat16 on a processor without it."""
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _rows(
    size: str,
    models: dict[str, nn.Module],
    timed: dict[str, dict[str, float]],
    tokens: int,
    of: dict[str, Any],
    flops: float | None,
) -> Iterator[dict[str, Any]]:
    for name, times in timed.items():
        parameters, rate = counted(models[name]), tokens / times["seconds"]
        yield {
            **of,
            "size": size,
            "model": name,
            "parameters": parameters,
            "tokens_per_second": rate,
            "of_ours": 1 / times["relative"],
            "part_of_roof": None if flops is None else rate * 6 * parameters / flops,
        }


def draw_peers(rows: list[dict[str, Any]]) -> Figure:
    """Tokens per second over ours against parameters, a panel for each kind of work."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["of_ours"] is not None]
    works = list(dict.fromkeys((row["what"], row["window"], row["precision"]) for row in rows))
    figure = Figure(figsize=(3.4 * len(works) + 1.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(works), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row["model"] for row in rows))
    for axes, (what, window, precision) in zip(panels, works, strict=True):
        for name in names:
            of_work = [
                row for row in rows if (row["what"], row["window"], row["precision"]) == (what, window, precision)
            ]
            points = [(row["parameters"], row["of_ours"]) for row in of_work if row["model"] == name]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, marker="o", markersize=4, label=name)
        title = "training, windows of" if what == "train" else "decoding after"
        axes.set_title(f"{title} {window:,}, {precision}", loc="left", fontsize=9)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("parameters")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"tokens per second, of {OURS}")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right center", fontsize=8)
    return figure
