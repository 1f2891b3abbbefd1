"""The commands do what they say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from kmixer.experiments.sweep import load_ablation, packaged_ablations, read_ablation_file
from kmixer.models import CausalLM
from kmixer.runs.recipe import load_recipe, packaged_recipes
from tests.cli.conftest import Run


def test_train_eval_generate_resume(kmixer_command: Run, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = kmixer_command("train", recipe_file, "--out", run, "--set", "training.steps=4", "--seed", 3)
    assert trained.code == 0, trained
    assert "step      4/4  validation (windows)" in trained.out
    assert re.search(r"Lowest validation loss \d\.\d{4} nats, at step \d", trained.out)
    assert "seed = 3" in (run / "recipe.toml").read_text()

    again = kmixer_command("train", recipe_file, "--out", run, "--set", "training.steps=4", "--seed", 3, "--resume")
    assert again.code == 0, again
    assert "resuming after step 4" in again.out

    for protocol in ("windows", "stream"):
        measured = json.loads(kmixer_command("eval", run, "--json", "--protocol", protocol).out)
        assert measured["protocol"] == protocol
        assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert json.loads(kmixer_command("eval", run, "--json", "--window", 64).out)["window"] == 64
    table = kmixer_command("eval", run).out
    assert "windows of 32, state reset" in table
    assert "bits per byte" in table

    text = kmixer_command("generate", run, "--prompt", "The ", "--max-new-tokens", 30, "--seed", 1)
    assert text.out.startswith("The ")
    assert len(text.out) == 4 + 30 + 1
    assert kmixer_command("generate", run, "--prompt", "The ", "--max-new-tokens", 30, "--seed", 1).out == text.out
    stopped = kmixer_command(
        "generate", run, "--prompt", "The ", "--max-new-tokens", 30, "--seed", 1, "--stop", text.out[10:13]
    )
    assert len(stopped.out) < len(text.out)

    packed = kmixer_command("pack", run, "--out", tmp_path / "run.tar.gz")
    assert packed.code == 0
    assert kmixer_command("unpack", tmp_path / "run.tar.gz", "--out", tmp_path / "again").code == 0
    assert kmixer_command("eval", tmp_path / "again").out == table


def test_recipes_are_listed(kmixer_command: Run) -> None:
    names = packaged_recipes() + packaged_ablations()
    assert list(json.loads(kmixer_command("recipes", "--json").out)) == names
    lines = kmixer_command("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == names


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_recipe_that_is_printed_is_that_recipe(kmixer_command: Run, name: str, tmp_path: Path) -> None:
    printed = tmp_path / "mine.toml"
    printed.write_text(kmixer_command("recipes", name).out)
    assert load_recipe(str(printed)) == load_recipe(name)
    again = kmixer_command("recipes", printed).out
    assert again == printed.read_text()
    assert again.startswith("# ")
    shown = json.loads(kmixer_command("recipes", name, "--json").out)
    assert shown["training"]["steps"] == load_recipe(name).training.steps


@pytest.mark.parametrize("name", packaged_ablations())
def test_an_ablation_that_is_printed_is_that_ablation(kmixer_command: Run, name: str, tmp_path: Path) -> None:
    printed = tmp_path / "mine.toml"
    printed.write_text(kmixer_command("recipes", name).out)
    assert read_ablation_file(printed) == load_ablation(name)
    assert json.loads(kmixer_command("recipes", name, "--json").out) == load_ablation(name).model_dump()


def test_parameters_are_counted_by_part(kmixer_command: Run) -> None:
    counted = json.loads(kmixer_command("params", "k-operators-v2-wikitext2", "--json").out)
    assert counted["total"] == sum(counted["parts"].values()) == 4_081_357
    # Embedding with its projection 524,288 + 16,384; adaptive head 545,280: the published breakdown.
    assert counted["parts"]["embedding"] + counted["parts"]["from_embedding"] == 540_672
    assert counted["parts"]["head"] == 545_280
    assert "4,081,357" in kmixer_command("params", "k-operators-v2-wikitext2").out


def test_corpora_are_listed_and_found(kmixer_command: Run, tmp_path: Path) -> None:
    rows = json.loads(kmixer_command("data", "list", "--json").out)
    assert {row["name"]: row["here"] for row in rows}["python-docs"] is True
    assert kmixer_command("data", "list").out.startswith("tiny-shakespeare")
    assert kmixer_command("data", "get", "python-docs").out.endswith("topics.py\n")


@pytest.mark.parametrize(
    "command", ["train", "eval", "generate", "ngram", "recipes", "params", "convert", "pack", "unpack", "export"]
)
def test_every_command_has_help_with_an_example(kmixer_command: Run, command: str) -> None:
    answer = kmixer_command(command, "--help")
    assert answer.code == 0
    assert f"Example: kmixer {command}" in answer.out


UNTRAINED_GATE = -2.1972


def koneko_checkpoint(
    path: Path,
    *,
    copy_gates: tuple[float, ...] = (UNTRAINED_GATE,) * 3,
    width: int = 8,
    layers: int = 2,
    vocabulary: int = 65,
) -> None:
    """A file with the layout of Koneko's checkpoints, as torch.compile and its optimiser leave it."""
    torch.manual_seed(0)
    r, v, d = 3, vocabulary, width

    def mlp_and_norms() -> dict[str, torch.Tensor]:
        return {
            "norm1.scale": torch.randn(d),
            "norm2.scale": torch.randn(d),
            "mlp.up.weight": torch.randn(2 * d, d),
            "mlp.up.bias": torch.randn(2 * d),
            "mlp.down.weight": torch.randn(d, 2 * d),
            "mlp.down.bias": torch.randn(d),
        }

    k1 = {"feature_mix.weight": torch.randn(d, d), "feature_mix.bias": torch.randn(d)}
    tensors = {"emb.weight": torch.randn(v, d), "rosa_emb.weight": torch.randn(v + 1, d), "norm.scale": torch.randn(d)}
    tensors["head.head.weight"] = tensors["emb.weight"]
    tensors["k_stack.shared_k_base_kernel"] = torch.randn(8)
    for index in range(layers + 2):
        place = f"k_stack.layers.{index}."
        own = k1
        if 0 < index <= layers:
            own = {
                "decay_logit": torch.randn(r),
                "alpha_logit": torch.randn(r),
                "k_base_gate_logit": torch.randn(()),
                "rho_logit": torch.tensor(copy_gates[index - 1]),
                "u": torch.randn(d, r),
                "v": torch.randn(d, r),
                "proj.weight": torch.randn(d, d),
                "proj.bias": torch.randn(d),
            }
        tensors |= {place + name: tensor for name, tensor in (own | mlp_and_norms()).items()}
    place = f"k_stack.layers.{layers + 2}."
    tensors |= {place + name: torch.randn(d) for name in ("gain", "bias", "norm.scale")}
    import numpy as np

    state = np.random.RandomState(0).get_state()
    torch.save(
        {
            "step": 4750,
            "best_ppl": 4.3,
            "model": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()},
            "optimizer": {"state": {}, "param_groups": []},
            "rng_state": {"torch_cpu": torch.random.get_rng_state(), "numpy": state},
        },
        path,
    )


CONVERT = ["--recipe", "k-operators-local-bytes", "--set", "model.width=8", "--set", "model.layers=2"]
CONVERT += ["--set", "model.rank=3", "--set", "tokenizer.kind=char", "--set", "tokenizer.vocabulary_size=65"]


@pytest.fixture
def corpus_of_65_characters(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(map(chr, range(33, 98))) * 400)
    return path


def test_konekos_checkpoints_become_runs(kmixer_command: Run, corpus_of_65_characters: Path, tmp_path: Path) -> None:
    import kmixer

    koneko_checkpoint(tmp_path / "koneko.pt")
    options = [*CONVERT, "--set", f"data.corpus={corpus_of_65_characters}"]
    answer = kmixer_command("convert", tmp_path / "koneko.pt", *options, "--out", tmp_path / "run")
    assert answer.code == 0, answer
    assert "decay range [0.05, 1.0], alpha cap 1.0, window 2048, tokenizer char (65 tokens)" in answer.out
    model = kmixer.load(tmp_path / "run")
    theirs = torch.load(tmp_path / "koneko.pt", weights_only=False)["model"]
    assert torch.equal(model.stack.blocks[1].mixer.query, theirs["_orig_mod.k_stack.layers.2.u"])
    assert torch.equal(
        model.stack.last.mixer.projection.weight, theirs["_orig_mod.k_stack.layers.3.feature_mix.weight"]
    )
    assert torch.equal(model.stack.read_out.gain, theirs["_orig_mod.k_stack.layers.4.gain"])
    assert kmixer_command("eval", tmp_path / "run", "--window", 64).code == 0
    assert (
        "last.safetensors is missing"
        in kmixer_command("train", tmp_path / "run" / "recipe.toml", "--out", tmp_path / "run", "--resume").error()
    )


def test_a_converted_byte_model_is_measured_on_any_text(kmixer_command: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("any text at all. " * 300)
    koneko_checkpoint(tmp_path / "koneko.pt", vocabulary=256)
    options = [*CONVERT[:8], "--set", f"data.corpus={tmp_path / 'corpus.txt'}"]
    answer = kmixer_command("convert", tmp_path / "koneko.pt", *options, "--out", tmp_path / "run")
    assert answer.code == 0, answer
    assert "tokenizer byte (256 tokens)" in answer.out
    assert kmixer_command("eval", tmp_path / "run", "--window", 64).code == 0


@pytest.mark.parametrize(("layers", "gates"), [("all", (0.5, -1.0)), ("last", (UNTRAINED_GATE, 2.0))])
def test_a_trained_copy_branch_becomes_a_copy_memory(
    kmixer_command: Run, corpus_of_65_characters: Path, tmp_path: Path, layers: str, gates: tuple[float, ...]
) -> None:
    import kmixer

    koneko_checkpoint(tmp_path / "koneko.pt", copy_gates=gates)
    options = [*CONVERT, "--set", f"data.corpus={corpus_of_65_characters}", "--set", "model.copy_gate=false"]
    options += ["--set", f"model.copy_memory.layers={layers}", "--out", tmp_path / "run"]
    answer = kmixer_command("convert", tmp_path / "koneko.pt", *options)
    assert answer.code == 0, answer
    memory = kmixer.load(tmp_path / "run").copy_memory
    theirs = torch.load(tmp_path / "koneko.pt", weights_only=False)["model"]
    assert torch.equal(memory.table.weight, theirs["_orig_mod.rosa_emb.weight"])
    assert torch.equal(memory.gate_logit, torch.tensor(gates if layers == "all" else gates[1:]))
    assert kmixer_command("eval", tmp_path / "run", "--window", 64).code == 0


def test_checkpoints_that_do_not_fit_are_named(
    kmixer_command: Run, corpus_of_65_characters: Path, tmp_path: Path
) -> None:
    options = [*CONVERT, "--set", f"data.corpus={corpus_of_65_characters}", "--out", tmp_path / "run"]
    file = tmp_path / "koneko.pt"
    koneko_checkpoint(file, copy_gates=(UNTRAINED_GATE, 0.3))
    assert "its copy branch (ROSA) was trained in K2 layers [1]" in kmixer_command("convert", file, *options).error()
    chosen = [*options, "--set", "model.copy_gate=false", "--set", "model.copy_memory.layers=[0]"]
    assert "its copy branch (ROSA) was trained in K2 layers [1]" in kmixer_command("convert", file, *chosen).error()
    koneko_checkpoint(file)
    assert "its copy branch (ROSA) was not trained" in kmixer_command("convert", file, *chosen).error()
    koneko_checkpoint(file, width=16)
    assert "has shape (65, 16); this model needs (65, 8)" in kmixer_command("convert", file, *options).error()
    koneko_checkpoint(file, layers=3)
    assert "check the recipe's model.layers" in kmixer_command("convert", file, *options).error()
    assert not (tmp_path / "run").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_would_run_code_is_refused(kmixer_command: Run, tmp_path: Path) -> None:
    torch.save({"model": {}, "step": 1, "best_ppl": Trap(tmp_path / "sprung")}, tmp_path / "koneko.pt")
    answer = kmixer_command("convert", tmp_path / "koneko.pt", *CONVERT, "--out", tmp_path / "run")
    assert "holds more than tensors" in answer.error()
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "koneko.pt").write_bytes(b"no checkpoint")
    assert "koneko.pt" in kmixer_command("convert", tmp_path / "koneko.pt", *CONVERT, "--out", tmp_path / "run").error()
    assert "is missing" in kmixer_command("convert", tmp_path / "none.pt", *CONVERT, "--out", tmp_path / "run").error()
    assert not (tmp_path / "run").exists()


def test_the_released_checkpoint_reproduces_its_published_loss(
    kmixer_command: Run, shared_data: Path, tmp_path: Path
) -> None:
    file = shared_data / "author-checkpoint" / "char_shakespeare_v2_rosa_off.pt"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    data = ["--data-dir", shared_data]
    options = ["--recipe", "k-operators-local-shakespeare", "--out", tmp_path / "run"]
    assert kmixer_command("convert", file, *options, *data).code == 0
    published = {64: 4.675, 128: 4.506, 256: 4.418, 512: 4.368, 1024: 4.341, 2048: 4.337}
    for window, perplexity in published.items():
        measured = json.loads(kmixer_command("eval", tmp_path / "run", "--window", window, "--json", *data).out)
        assert measured["perplexity"] == pytest.approx(perplexity, abs=0.002)
    assert measured["loss"] == pytest.approx(1.4671, abs=0.00005)


def test_the_released_checkpoint_with_copies_has_the_loss_of_exact_copies(
    kmixer_command: Run, shared_data: Path, tmp_path: Path
) -> None:
    file = shared_data / "author-checkpoint" / "char_shakespeare_v2.pt"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    options = ["--recipe", "k-operators-copy-shakespeare", "--out", tmp_path / "run", "--data-dir", shared_data]
    answer = kmixer_command("convert", file, *options)
    assert "178,692 parameters" in answer.out, answer
    measured = json.loads(kmixer_command("eval", tmp_path / "run", "--json", "--data-dir", shared_data).out)
    assert measured["window"] == 2048
    assert measured["loss"] == pytest.approx(1.4016, abs=0.0003)


def test_a_diverged_run_ends_with_code_3(
    kmixer_command: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = CausalLM.forward

    def broken(self: CausalLM, *arguments: object, **options: object) -> object:
        output = forward(self, *arguments, **options)  # type: ignore[arg-type]
        return output._replace(losses=output.losses * torch.inf) if self.training else output

    monkeypatch.setattr(CausalLM, "forward", broken)
    answer = kmixer_command("train", recipe_file, "--out", tmp_path / "run")
    assert answer.code == 3
    assert "keeps the best weights and the last good checkpoint" in answer.err
    assert "Traceback" not in answer.err


def test_a_packaged_model_writes_at_once(kmixer_command: Run) -> None:
    answer = kmixer_command("generate", "shakespeare-small", "--prompt", "KING:", "--max-new-tokens", 20, "--seed", 1)
    assert answer.code == 0, answer
    assert answer.out.startswith("KING:")
    assert "shakespeare-small" in kmixer_command("generate", "no-such-model", "--prompt", "x").error()
