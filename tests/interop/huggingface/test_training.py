"""Trainer of transformers trains a model of kmixer, and goes on bit for bit after a break; adapters of PEFT work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import kmixer
from kmixer.generation.prepared import why_not_prepared
from kmixer.huggingface import KMixerForCausalLM, to_huggingface, tokenizer_for
from tests.interop.huggingface.models import KINDS, TOKENIZER, filled_up, make_model, make_tokens

TEXTS = ["the cat sat on the mat.", "a dog.", "the dog ate the cat on a mat.", "on and on the cat sat."]


def make_trainer(model: Any, folder: Path, **settings: Any) -> Trainer:
    tokenizer = tokenizer_for(TOKENIZER)
    examples = [tokenizer(text) for text in TEXTS * 4]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=6,
        save_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return Trainer(
        model,
        arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=examples,
        eval_dataset=examples[:4],
        processing_class=tokenizer,
    )


def fresh() -> KMixerForCausalLM:
    """A model with dropout, so that what is drawn matters too."""
    model = make_model("conv")
    dropout = model.config.dropout.model_copy(update={"embedding": 0.1, "mlp": 0.1})
    torch.manual_seed(0)
    values = {**model.config.model_dump(mode="json"), "dropout": dropout.model_dump()}
    config = to_huggingface(model).config
    config.kmixer = values
    return KMixerForCausalLM(config)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = make_trainer(fresh(), tmp_path / "whole")
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 0.1
    resumed = make_trainer(fresh(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name

    whole.save_model(str(tmp_path / "tuned"))
    loaded, tokens = kmixer.load(tmp_path / "tuned"), make_tokens(12)
    whole.model.eval()
    assert torch.equal(loaded(tokens).logits, whole.model(tokens).logits)
    assert loaded.tokenizer is not None and loaded.tokenizer.to_json() == TOKENIZER.to_json()


def with_adapters(model: KMixerForCausalLM) -> Any:
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_called_in_every_part(kind: str) -> None:
    """With adapters the model is what it is with the weights that they are merged into, and all of them learn."""
    tokens = make_tokens(20, b=2)
    plain = to_huggingface(make_model(kind))
    with torch.no_grad():
        expected = plain(tokens).logits
    adapted = with_adapters(to_huggingface(make_model(kind))).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # they begin with nothing
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert adapters
    torch.manual_seed(1)
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.2)
    adapted(tokens, labels=tokens).loss.backward()
    assert [name for name, parameter in adapters.items() if parameter.grad is None or not parameter.grad.any()] == []
    with torch.no_grad():
        changed = adapted(tokens).logits
        assert (changed - expected).abs().max() > 1e-2
        merged = adapted.merge_and_unload()(tokens).logits
        torch.testing.assert_close(changed, merged, rtol=1e-3, atol=1e-3)


def test_adapters_learn_and_generate(tmp_path: Path) -> None:
    adapted = with_adapters(fresh())
    assert why_not_prepared(adapted.get_base_model().model) is not None
    fixed = {name: p.clone() for name, p in adapted.named_parameters() if "lora_" not in name}
    trainer = make_trainer(adapted, tmp_path, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.02
    assert all(torch.equal(adapted.get_parameter(name), parameter) for name, parameter in fixed.items())
    adapted.eval()
    batch = filled_up([make_tokens(9), make_tokens(6)])
    made = adapted.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, adapted.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False))
