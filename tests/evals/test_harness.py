"""lm-evaluation-harness on local tasks, offline: its figures are those of `kmixer eval`, and of the model's logits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import kmixer
from kmixer.data.tokenizers import CharTokenizer
from kmixer.errors import InputError
from kmixer.language_model import LanguageModel
from kmixer.models import ModelConfig
from tests.cli.conftest import Run, kmixer_command  # noqa: F401
from tests.interop.test_continuations import MODELS

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed (pip install 'kmixer[evals]')", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # of foreign libraries
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when they are imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets

    from kmixer.evals import KMixerLM, evaluate_tasks
    from kmixer.evals.__main__ import main

NAME = "shakespeare-small"
LETTERS = "\n abcdefghijklmnopqrstuvwxyz.,"
ROLLING, CHOICE, UNTIL = "texts", "choices", "continuations"
TASKS: dict[str, dict[str, Any]] = {
    ROLLING: {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    CHOICE: {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    UNTIL: {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def texts(text: str) -> list[str]:
    plain = re.sub(r"[^\n abcdefghijklmnopqrstuvwxyz.,]", "", text.lower())
    return [plain[start : start + 300] for start in range(0, 1200, 300)]


@pytest.fixture
def tasks(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three tasks over local files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    documents = {
        ROLLING: [{"text": text} for text in texts],
        CHOICE: [
            {"context": text[:60], "choices": [text[60:66], text[70:73], "zqxzqx"], "answer": index % 2}
            for index, text in enumerate(texts)
        ],
        UNTIL: [{"context": text[:40], "target": "the"} for text in texts],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        where = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**where, "test_split": "test", **task}))
    return folder


def make_model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    tokenizer = CharTokenizer(LETTERS)
    config = ModelConfig.parse({"width": 16, "layers": 2, "rank": 3, **MODELS[name]}, source="test")
    return LanguageModel(config, tokenizer.vocabulary_size, tokenizer).double().eval()


@torch.no_grad()
def nats(model: LanguageModel, before: str, after: str) -> float:
    """-ln p of a text after another, from the logits of one call."""
    assert model.tokenizer is not None
    tokens = torch.from_numpy(model.tokenizer.encode(before + after))
    logits = model(tokens[None, :-1]).logits
    assert logits is not None
    rows = logits[0].double().log_softmax(-1)
    return float(-rows.gather(1, tokens[1:, None])[-len(after) :].sum())


@pytest.mark.parametrize("name", ["conv", "copies", "fast weights", "ends"])
def test_figures_are_those_of_the_models_logits(name: str, tasks: Path, texts: list[str]) -> None:
    model = make_model(name)
    lm = KMixerLM(model)
    results = evaluate_tasks(lm, list(TASKS), tasks)["results"] if name != "ends" else {}
    if name == "ends":  # of 20 positions: the harness's own windows
        from lm_eval.utils import get_rolling_token_windows

        results = evaluate_tasks(lm, [ROLLING], tasks)["results"]
        total = 0.0
        for text in texts:
            tokens = lm.tok_encode(text)
            for inputs, targets in get_rolling_token_windows(tokens, lm.eot_token_id, 20, 1):
                shown = model.tokenizer.decode([*inputs, targets[-1]])  # type: ignore[union-attr]
                total += nats(model, shown[: -len(targets)], shown[-len(targets) :])
    else:
        total = sum(nats(model, "\n", text) for text in texts)
        right = 0
        for index, text in enumerate(texts):
            choices = [text[60:66], text[70:73], "zqxzqx"]
            right += int(np.argmin([nats(model, text[:60], choice) for choice in choices])) == index % 2
        assert results[CHOICE]["acc,none"] == right / len(texts)
        expected = []
        for text in texts:
            whole = model.generate(text[:40], 12, temperature=0.0, stop=["\n", "."])
            expected.append(whole[40:])
        assert (
            lm.generate_until([Request((text[:40], TASKS[UNTIL]["generation_kwargs"])) for text in texts]) == expected
        )
        assert results[UNTIL]["exact_match,none"] == sum(text == "the" for text in expected) / len(texts)
    assert results[ROLLING]["bits_per_byte,none"] == pytest.approx(total / 1200 / math.log(2), abs=1e-9)
    assert lm.get_model_info()["documents"] == (
        "windows of 20 tokens" if name == "ends" else "one stream, state carried"
    )


class Request:
    """What the harness asks, of which the arguments are read."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.args = arguments


@pytest.mark.parametrize("name", [NAME, "shakespeare-small-copy"])
def test_a_stream_is_that_of_kmixer_eval(
    name: str,
    tasks: Path,
    texts: list[str],
    kmixer_command: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    answer = kmixer_command("eval", name, "--tasks", f"{ROLLING},{CHOICE}", "--include", tasks, "--json")
    assert answer.code == 0, answer
    measured = json.loads(answer.out)
    total = 0.0
    for text in texts:
        (tmp_path / "one.txt").write_text("\n" + text)
        stream = json.loads(
            kmixer_command("eval", name, "--text", tmp_path / "one.txt", "--protocol", "stream", "--json").out
        )
        assert stream["tokens"] == len(text)
        total += stream["loss"] * stream["tokens"]
    assert measured["results"][ROLLING]["bits_per_byte,none"] == pytest.approx(total / 1200 / math.log(2), abs=1e-9)
    assert measured["read"]["prefix"] == "\n"
    table = kmixer_command("eval", name, "--tasks", ROLLING, "--include", tasks, "--limit", 2).out
    assert table.startswith("lm-eval ") and "bits_per_byte" in table and "one stream" in table


def test_characters_that_are_not_known(tasks: Path, texts: list[str]) -> None:
    clean = KMixerLM(make_model("conv"))
    expected = evaluate_tasks(clean, [ROLLING, CHOICE], tasks)["results"]
    for name in (ROLLING, CHOICE):
        file = tasks.parent / f"{name}.jsonl"
        documents = [json.loads(line) for line in file.read_text().splitlines()]
        for document in documents:
            document |= {key: document[key].replace(" ", " #é") for key in ("text", "context") if key in document}
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    with pytest.raises(InputError, match="a task has '#', 'é', which the tokenizer does not know; --unknown drop"):
        evaluate_tasks(KMixerLM(make_model("conv")), [ROLLING], tasks)
    lm = KMixerLM(make_model("conv"), unknown="drop")
    assert evaluate_tasks(lm, [ROLLING, CHOICE], tasks)["results"] == expected
    assert lm.get_model_info()["characters_dropped"] > 0
    with pytest.raises(InputError, match="counts the bytes of what was dropped; use kmixer eval RUN --tasks"):
        KMixerLM(make_model("conv"), unknown="drop").loglikelihood_rolling([Request(("a#",))])


def test_edges_of_requests() -> None:
    model = make_model("conv")
    lm = KMixerLM(model, unknown="drop")
    asked = [("", "the"), ("", "\nthe"), ("and ", " the"), ("#", "the"), ("and", "#")]
    found = [answer[0] for answer in lm.loglikelihood([Request(pair) for pair in asked])]
    expected = [
        nats(model, "\n", "the"),
        nats(model, "\n", "the"),
        nats(model, "and", "  the"),
        nats(model, "\n", "the"),
    ]
    assert found == pytest.approx([*(-value for value in expected), 0.0])
    assert lm.loglikelihood_rolling([Request(("",))]) == [0.0]
    drawn = {"until": "q", "max_gen_toks": 5, "do_sample": True, "temperature": 1.0, "top_k": 3}
    answers = [lm.generate_until([Request(("the", drawn))] * 2) for _ in range(2)]
    assert answers[0] == answers[1] and all(len(text) <= 5 for text in answers[0])
    ends = KMixerLM(make_model("ends"))
    assert len(ends.generate_until([Request(("the " * 20, {"max_gen_toks": 8}))])[0]) == 8
    assert ends.get_model_info()["contexts_cut"] == 1


def test_what_is_wrong_is_one_line(kmixer_command: Run, tasks: Path) -> None:  # noqa: F811
    command = ("eval", NAME, "--tasks")
    assert "--include: nowhere is no folder" in kmixer_command(*command, ROLLING, "--include", "nowhere").error()
    assert "prefix: got 'no'" in kmixer_command(*command, ROLLING, "--include", tasks, "--prefix", "no").error()
    with pytest.raises(InputError, match="got 'no-such-task'; allowed: what lm-eval ls tasks lists"):
        evaluate_tasks(KMixerLM(make_model("conv")), ["no-such-task"], tasks)
    with pytest.raises(InputError, match="unknown: got 'keep'; allowed: error, drop"):
        KMixerLM(make_model("conv"), unknown="keep")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tokenizer"):
        KMixerLM(kmixer.LanguageModel.from_recipe("shakespeare-quick"))


def test_the_harness_own_command(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "--model", "kmixer", "--model_args", f"pretrained={NAME}", "--tasks", ROLLING]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments, "--include_path", str(tasks), "--limit", "1"])
    main()
    assert "bits_per_byte" in capsys.readouterr().out


def test_one_window_of_the_harness_own_model_is_the_stream(tasks: Path) -> None:
    """`HFLM` around the same model and the same tokens, where its window holds a whole text."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Regex as Pattern
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
    from transformers.modeling_outputs import CausalLMOutput

    model = make_model("conv")

    class Config(PretrainedConfig):  # type: ignore[misc]
        model_type = "wrapped"
        max_position_embeddings = 512

    class Wrapped(PreTrainedModel):  # type: ignore[misc]
        config_class = Config

        def __init__(self) -> None:
            super().__init__(Config(vocab_size=len(LETTERS)))
            self.model = model

        def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.model(input_ids).logits)

    assert isinstance(model.tokenizer, CharTokenizer)
    characters = model.tokenizer.characters
    library = Tokenizer(
        models.WordLevel({character: index for index, character in enumerate(characters)}, characters[0])
    )
    library.pre_tokenizer = pre_tokenizers.Split(Pattern(r"[\s\S]"), "isolated")
    library.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="\n", pad_token="\n")
    other = HFLM(pretrained=Wrapped(), tokenizer=tokenizer, max_length=512, prefix_token_id=0, dtype=torch.float64)
    ours = evaluate_tasks(KMixerLM(model), [ROLLING, CHOICE], tasks)["results"]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(other, tasks=[ROLLING, CHOICE], task_manager=manager)["results"]
    assert ours[ROLLING]["bits_per_byte,none"] == pytest.approx(theirs[ROLLING]["bits_per_byte,none"], abs=1e-6)
    assert ours[CHOICE]["acc,none"] == theirs[CHOICE]["acc,none"]
