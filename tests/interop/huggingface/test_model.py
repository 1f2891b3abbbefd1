"""A model under transformers is the model: its logits after a way through a folder, its losses, its state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kmixer.errors import InputError
from kmixer.generation.reading import PREFILL_CHUNK
from kmixer.huggingface import KMixerConfig, KMixerForCausalLM, to_huggingface
from tests.interop.huggingface.models import KINDS, VOCABULARY, filled_up, make_model, make_tokens, wrapped

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@torch.no_grad()
def test_a_model_comes_back_from_a_folder_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, tokens = make_model(kind), make_tokens(30, b=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    to_huggingface(model).save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is KMixerForCausalLM
    assert not back.training
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert torch.equal(back(tokens, logits_to_keep=3).logits, model(tokens).logits[:, -3:])
    assert {name for name, parameter in back.model.named_parameters() if parameter.requires_grad} == trained
    assert back.model.config == model.config
    assert back.generation_config.pad_token_id == VOCABULARY


@kinds
@torch.no_grad()
def test_a_state_goes_on_and_stays_as_it_was(kind: str) -> None:
    model, tokens = wrapped(kind), make_tokens(30, b=2)
    whole = model(tokens).logits
    head = model(tokens[:, :17])
    for _ in range(2):
        tail = model(tokens[:, 17:], state=head.state).logits
        torch.testing.assert_close(torch.cat([head.logits, tail], 1), whole, rtol=1e-4, atol=1e-4)


# Parts of these are torch's own, whose last bit goes by how many rows there are.
BY_ROWS = ("none, adaptive", "a mixture")


@kinds
@torch.no_grad()
def test_rows_that_are_filled_up_are_the_rows_alone(kind: str) -> None:
    model, rows = wrapped(kind), [make_tokens(9), make_tokens(17), make_tokens(9) % 7]
    output = model(**filled_up(rows))
    assert torch.equal(output.logits[[0, 2], -9:], model(torch.cat([rows[0], rows[2]])).logits)
    assert torch.equal(output.logits, model(filled_up(rows)["input_ids"]).logits)  # where the mask was forgotten
    following = torch.tensor([[1], [2], [3]])
    after = model(following, state=output.state).logits
    for index, row in enumerate(rows):
        alone, made = model(row), output.logits[index : index + 1, -row.shape[1] :]
        torch.testing.assert_close(made, alone.logits, rtol=1e-5, atol=1e-5)
        assert kind in BY_ROWS or torch.equal(made, alone.logits)
        assert not output.logits[index, : -row.shape[1]].any()
        expected = model(following[index : index + 1], state=alone.state).logits
        torch.testing.assert_close(after[index : index + 1], expected, rtol=1e-4, atol=1e-4)


@kinds
def test_the_loss_is_the_cross_entropy_of_the_logits(kind: str) -> None:
    model, batch = to_huggingface(make_model(kind)), filled_up([make_tokens(12), make_tokens(8), make_tokens(12)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[2, 5] = -100
    output = model(**batch, labels=labels)
    labels = labels.clone()
    labels[1, 4] = -100  # the first token of a row that is filled up has nothing before it, as in the row alone
    targets = labels[:, 1:].flatten()
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    count = int((targets != -100).sum())
    of_all = model(**batch, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(of_all, expected / 2, rtol=1e-5, atol=1e-5)
    model.train()
    trained = model(**batch, labels=labels)
    assert trained.logits is None and trained.state is None  # the loss is made piece by piece
    trained.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def test_a_long_prompt_is_read_in_pieces() -> None:
    model, tokens = wrapped("conv"), make_tokens(PREFILL_CHUNK + 5)
    whole = model.model(tokens)
    for wanted in (1, 5, 7):
        logits = model(tokens, logits_to_keep=wanted).logits
        torch.testing.assert_close(logits, whole.logits[:, -wanted:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1, 0], [1, 1, 1]], "zeros inside or at the end of a row; .*padding_side = 'left'"),
        ([[1, 0, 1], [1, 1, 1]], "zeros inside or at the end"),
        ([[0, 0, 0], [1, 1, 1]], "row 0 has no token"),
        ([[1, 1], [1, 1]], r"got shape \(2, 2\); allowed: \(2, 3\)"),
    ],
)
def test_another_mask_is_refused(mask: list[list[int]], said: str) -> None:
    with pytest.raises(InputError, match=f"^attention_mask: .*{said}"):
        wrapped("conv")(make_tokens(3, b=2), attention_mask=torch.tensor(mask))


def test_what_a_model_cannot_read_is_one_line() -> None:
    model = wrapped("dense")
    with pytest.raises(InputError, match="tokens: got 29; allowed: 0 to 27"):
        model(torch.tensor([[VOCABULARY + 1]]))
    with pytest.raises(InputError, match="filled up after a state"):
        state = model(make_tokens(3, b=2)).state
        model(make_tokens(2, b=2), state=state, attention_mask=torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(InputError, match="the dense base kernel ends at position 48"):
        model.generate(make_tokens(40), max_new_tokens=10, do_sample=False)
    with pytest.raises(InputError, match="inputs_embeds: got some"):
        model(make_tokens(3), inputs_embeds=torch.zeros(1, 3, 16))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("auto", [KMixerForCausalLM, AutoModelForCausalLM])
def test_a_missing_or_foreign_tensor_is_refused(auto: Any, tmp_path: Path) -> None:
    wrapped("conv").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(InputError, match=r"missing tensors: model\.norm\.weight; restore model.safetensors from"):
        auto.from_pretrained(tmp_path)
    wrapped("conv").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update(extra=torch.zeros(3)))
    with pytest.raises(InputError, match=r"unexpected tensors: .*extra"):
        auto.from_pretrained(tmp_path)
    wrapped("conv").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises((RuntimeError, InputError), match="mismatch"):
        auto.from_pretrained(tmp_path)


def test_a_model_of_a_configuration_has_fresh_weights_of_kmixer() -> None:
    config = wrapped("conv").config
    torch.manual_seed(3)
    fresh = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    assert all(torch.equal(one, other) for one, other in zip(fresh.parameters(), make_fresh(config), strict=True))


def make_fresh(config: KMixerConfig) -> Any:
    from kmixer.models import CausalLM

    return CausalLM(config.saved().model, VOCABULARY).parameters()  # type: ignore[arg-type]


def test_a_configuration_says_what_tools_ask_for(tmp_path: Path) -> None:
    wrapped("dense").config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is KMixerConfig
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCABULARY, 16, 2)
    assert config.max_position_embeddings == 48
    assert not config.tie_word_embeddings
    with pytest.raises(InputError, match="weights are of format 99"):
        KMixerConfig(**{**config.to_dict(), "weights_format": 99})
    with pytest.raises(InputError, match="rank"):
        KMixerConfig(kmixer={**config.kmixer, "rank": "many"}, vocab_size=3)


@torch.no_grad()
def test_other_precisions_run(tmp_path: Path) -> None:
    wrapped("conv").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    tokens = make_tokens(12)
    expected = wrapped("conv")(tokens).logits
    torch.testing.assert_close(model(tokens).logits.float(), expected, rtol=0.1, atol=0.2)
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_kmixer_itself_does_not_import_transformers() -> None:
    program = "import sys, kmixer, kmixer.cli.main; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
