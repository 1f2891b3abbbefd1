"""A run goes to a Hugging Face folder and comes back; what is damaged or of another model is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kmixer
from kmixer.data.tokenizers import CharTokenizer
from kmixer.huggingface import from_huggingface, to_huggingface, tokenizer_for
from kmixer.runs.run_folder import RunFolder
from kmixer.training.loop import train
from tests.cli.conftest import Run, kmixer_command  # noqa: F401  (a fixture)
from tests.interop.huggingface.models import TOKENIZER, make_model, make_tokens
from tests.training.test_loop import make_recipe

TEXT = "The quick\nbrown"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    train(make_recipe(folder / "corpus.txt", steps=2), folder / "run")
    return folder / "run"


@pytest.fixture
def exported(run: Path, tmp_path: Path, kmixer_command: Run) -> Path:  # noqa: F811
    out = tmp_path / "exported"
    answer = kmixer_command("export", run, "--format", "huggingface", "--out", out, "--license", "mit")
    assert answer.code == 0, answer
    assert answer.out.startswith(f"{out / 'model.safetensors'} (")
    return out


@torch.no_grad()
def test_a_run_is_a_folder_for_transformers_and_back(
    run: Path,
    exported: Path,
    tmp_path: Path,
    kmixer_command: Run,  # noqa: F811
) -> None:
    expected = kmixer.load(run)
    assert expected.tokenizer is not None
    tokens = torch.from_numpy(expected.tokenizer.encode(TEXT))[None]
    logits = expected(tokens).logits

    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    assert tokenizer(TEXT)["input_ids"] == tokens[0].tolist()
    assert torch.equal(model(tokens).logits, logits)
    for loaded in (kmixer.load(exported), from_huggingface(exported)):
        assert torch.equal(loaded(tokens).logits, logits)
        assert loaded.about == expected.about

    answer = kmixer_command("import", exported, "--out", tmp_path / "back")
    assert (answer.code, answer.out) == (0, f"run folder {tmp_path / 'back'}\n"), answer
    assert torch.equal(kmixer.load(tmp_path / "back")(tokens).logits, logits)
    before, after = RunFolder(run), RunFolder(tmp_path / "back")
    assert after.read_recipe() == before.read_recipe()
    assert after.results() == before.results()
    for file in after.path.iterdir():
        assert file.read_bytes() == (run / file.name).read_bytes(), file.name
    assert kmixer_command("eval", after.path, "--json").out == kmixer_command("eval", run, "--json").out
    assert kmixer_command("report", after.path).code == 0


def test_a_folder_of_transformers_is_a_model(tmp_path: Path, kmixer_command: Run) -> None:  # noqa: F811
    """As after further training elsewhere: no run tells of these weights."""
    model, tokens = make_model("copies"), make_tokens(20)
    to_huggingface(model).save_pretrained(tmp_path / "saved")
    assert "tokenizer_config.json is missing" in kmixer_command("import", tmp_path / "saved", "--out", "x").error()
    tokenizer_for(TOKENIZER).save_pretrained(tmp_path / "saved")
    answer = kmixer_command("import", tmp_path / "saved", "--out", tmp_path / "model")
    assert (answer.code, answer.out) == (0, f"model folder {tmp_path / 'model'}\n"), answer
    loaded = kmixer.load(tmp_path / "model")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.about == {"imported_from": "saved"}
    again = kmixer_command("export", tmp_path / "model", "--format", "huggingface", "--out", tmp_path / "again")
    assert again.code == 0, again
    assert "--license NAME" in again.out
    assert torch.equal(kmixer.load(tmp_path / "again")(tokens).logits, model(tokens).logits)


def test_the_card_tells_the_facts_of_the_run(run: Path, exported: Path) -> None:
    card, results = ModelCard.load(exported / "README.md"), RunFolder(run).results()
    assert results is not None
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("kmixer", "text-generation", "mit")
    measured = results["best"]["validation"][0]
    values = [(result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert {(name, measured[name]) for name in ("loss", "perplexity", "bits_per_byte")} <= {*values}
    assert all("the state" in result.metric_name for result in card.data.eval_results)  # reset when, or never
    assert f"{measured['loss']:.4f}" in card.content
    assert RunFolder(run).environment()["corpus_sha256"] in card.content
    assert f"{results['parameters']:,} parameters" in card.content
    assert card.content.index("import kmixer.huggingface") < card.content.index("from_pretrained")


def test_the_same_run_is_the_same_folder(run: Path, exported: Path, tmp_path: Path, kmixer_command: Run) -> None:  # noqa: F811
    again = tmp_path / "elsewhere" / "exported"
    kmixer_command("export", run, "--format", "huggingface", "--out", again, "--license", "mit")
    files = [path.relative_to(exported) for path in exported.rglob("*") if path.is_file()]
    assert len(files) == 13
    assert all((exported / file).read_bytes() == (again / file).read_bytes() for file in files)


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def other_tokenizer_file(folder: Path) -> None:
    tokenizer_for(CharTokenizer("abc"))._tokenizer.save(str(folder / "tokenizer.json"))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut_short, "model.safetensors is damaged"),
    "a number": (
        change_tensors(lambda tensors: tensors["model.norm.weight"].add_(1)),
        "model.safetensors was changed after it was exported; restore it",
    ),
    "not finite": (
        change_tensors(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
        "tensor model.norm.weight holds numbers that are not finite",
    ),
    "a missing tensor": (change_tensors(lambda tensors: tensors.pop("model.norm.weight")), "was changed after it was"),
    "a foreign tensor": (
        change_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
        "tensor extra is not below model.",
    ),
    "another tokenizer": (
        change_json("tokenizer_config.json", kmixer={"kind": "byte"}),
        "tokenizer_config.json is of another model: it has 256 tokens",
    ),
    "no tokenizer of ours": (change_json("tokenizer_config.json", kmixer=3), "does not describe a tokenizer"),
    "another tokenizer.json": (other_tokenizer_file, "tokenizer.json has other tokens than tokenizer_config.json"),
    "no tokenizer.json": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "another configuration": (change_json("config.json", kmixer={"width": 8}), "config.json: model.layers is missing"),
    "a later format": (change_json("config.json", weights_format=99), "its weights are of format 99"),
    "several files": (
        lambda folder: (folder / "model.safetensors.index.json").touch(),
        "the weights are in several files; save them with a larger max_shard_size",
    ),
    "another architecture": (change_json("config.json", model_type="gpt2"), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_one_line(
    damage: str,
    exported: Path,
    tmp_path: Path,
    kmixer_command: Run,  # noqa: F811
) -> None:
    change, said = DAMAGES[damage]
    change(exported)
    for command in (("import", exported, "--out", tmp_path / "out"), ("generate", exported, "--prompt", "The")):
        assert said in kmixer_command(*command).error()
    assert not (tmp_path / "out").exists()


def test_without_the_records_of_the_run_a_missing_tensor_is_named(exported: Path, kmixer_command: Run) -> None:  # noqa: F811
    shutil.rmtree(exported / "kmixer")
    change_tensors(lambda tensors: tensors.pop("model.norm.weight"))(exported)
    said = kmixer_command("import", exported, "--out", exported.parent / "out").error()
    assert "tensor norm.weight is missing" in said


def test_nothing_but_an_export_is_replaced_and_that_by_force_only(
    run: Path,
    exported: Path,
    kmixer_command: Run,  # noqa: F811
) -> None:
    export = ("export", run, "--format", "huggingface", "--out", exported)
    assert "holds an export; add --force" in kmixer_command(*export).error()
    assert kmixer_command(*export, "--force").code == 0
    assert "license" not in (exported / "README.md").read_text().split("---")[1]
    (exported / "notes.txt").touch()
    assert "exists and is not an export alone" in kmixer_command(*export, "--force").error()
    assert "holds a run; add --resume" in kmixer_command("import", exported, "--out", run).error()
    assert "goes with --format huggingface" in kmixer_command("export", run, "--out", "x", "--license", "mit").error()
    assert "is not a Hugging Face folder" in kmixer_command("import", run, "--out", "x").error()
