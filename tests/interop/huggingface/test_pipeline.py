"""Text in, text out: the pipeline of transformers, stop strings, streams of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TextIteratorStreamer, pipeline

from kmixer.generation.sampling import Sampling
from kmixer.generation.streaming import generate_text
from kmixer.huggingface import tokenizer_for
from tests.interop.huggingface.models import TOKENIZER, make_model, wrapped

PROMPTS = ["the cat", "on and on it sat"]
NEW = 12


def expected(prompt: str) -> str:
    """What kmixer itself writes, greedily."""
    pieces = generate_text(make_model("conv"), TOKENIZER, prompt, NEW, Sampling(temperature=0.0))
    return prompt + "".join(pieces)


def test_the_pipeline_writes_what_kmixer_writes() -> None:
    write: Any = pipeline("text-generation", model=wrapped("conv"), tokenizer=tokenizer_for(TOKENIZER), device="cpu")
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert [made["generated_text"] for made in write(PROMPTS[0], **options)] == [expected(PROMPTS[0])]
    for batch_size in (1, 2):
        made = write(PROMPTS, batch_size=batch_size, **options)
        assert [row[0]["generated_text"] for row in made] == [expected(prompt) for prompt in PROMPTS]
    torch.manual_seed(1)
    sampled = write(PROMPTS, batch_size=2, max_new_tokens=NEW, do_sample=True)
    torch.manual_seed(1)
    assert write(PROMPTS, batch_size=2, max_new_tokens=NEW, do_sample=True, use_cache=False) == sampled


def test_text_stops_and_comes_in_pieces() -> None:
    model, tokenizer = wrapped("conv"), tokenizer_for(TOKENIZER)
    batch, text = tokenizer(PROMPTS[0], return_tensors="pt"), expected(PROMPTS[0])
    stop = text[len(PROMPTS[0]) + 3 : len(PROMPTS[0]) + 5]
    made = model.generate(**batch, max_new_tokens=NEW, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    ends = text.index(stop, len(PROMPTS[0])) + len(stop)
    assert tokenizer.decode(made[0]) == text[:ends]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(**batch, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert PROMPTS[0] + "".join(streamer) == text


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_model_is_put_where_it_is_asked_for(device_map: str, tmp_path: Path) -> None:
    wrapped("conv").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    batch = tokenizer_for(TOKENIZER)(PROMPTS[0], return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert tokenizer_for(TOKENIZER).decode(made[0]) == expected(PROMPTS[0])
