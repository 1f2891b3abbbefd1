"""Two ecologies: shares of texts with brackets, models of one size, and counters as the null."""

from __future__ import annotations

import pytest
import torch

from kmixer.analysis.rescue import summarised
from kmixer.data.brackets import OPEN, VOCABULARY, Pairs, chunk_pairs, library_text, separated_pairs
from kmixer.experiments.rescue import Setting, configs, count, kept_share, run_rescue
from kmixer.models.causal_lm import CausalLM
from kmixer.models.matched import size_of

TINY = Setting(steps=2, batch_size=4, training=60, measured=20, width=16, heads=2)


def test_a_share_of_the_texts_keeps_its_brackets_and_larger_shares_hold_smaller_ones() -> None:
    texts = torch.full((200, 5), OPEN)
    kept = {alpha: (kept_share(texts, alpha, 3) == OPEN).all(1) for alpha in (0.0, 0.1, 0.5, 1.0)}
    assert [int(of_share.sum()) for of_share in kept.values()] == [0, 20, 100, 200]
    assert not (kept[0.1] & ~kept[0.5]).any()
    assert not (kept_share(texts, 0.0, 3) >= OPEN).any()
    assert torch.equal(kept_share(texts, 0.1, 3), kept_share(texts, 0.1, 3))
    assert not torch.equal(kept_share(texts, 0.1, 3), kept_share(texts, 0.1, 4))


def test_models_are_of_one_size() -> None:
    sizes = [size_of(CausalLM(config, VOCABULARY)) for config in configs(["softmax", "k2"], Setting()).values()]
    assert max(sizes) / min(sizes) < 1.02


def test_counters_tell_chunks_apart_and_not_separated_brackets() -> None:
    text = library_text()
    told = []
    for make in (chunk_pairs, separated_pairs):
        pairs = make(text, 3200, 0)
        held_out = Pairs(*(part[:200] for part in pairs))
        told.append(count(pairs.balanced[200:], held_out, (1, 3)))
    for context, of_chunks in told[0].items():
        assert of_chunks.numbers()["discrimination"] > 0.1
        numbers = told[1][context].numbers()
        assert abs(numbers["discrimination"]) < 4 * numbers["error"]
    blind = count(kept_share(pairs.balanced[200:], 0.0, 0), held_out, (1,))[1].numbers()
    assert (blind["discrimination"], blind["right"]) == (pytest.approx(0, abs=1e-12), 0.5)


def test_every_mixer_share_and_seed_is_measured_beside_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kmixer.experiments.rescue.library_text", lambda: library_text()[:300_000])
    lines: list[str] = []
    results = run_rescue(["softmax", "k2"], [0.0, 1.0], [0, 1], TINY, lines.append)
    assert len(lines) == 2 * 2 * 2 * 2 and "0 trainings left" in lines[-1]
    assert [result["name"] for result in results] == ["chunks", "separated"]
    for result in results:
        assert (result["training"], result["pairs"]) == (60, 20)
        assert [counter["context"] for counter in result["counters"]] == (
            [1, 2, 3] if result["characters"] == 30 else [1, 3, 5]
        )
        for curve in result["curves"]:
            assert [len(share["discrimination"]) for share in curve["shares"]] == [2, 2]
            for share, beyond, of_counter in zip(
                curve["shares"], curve["beyond_counters"], result["counters"][0]["shares"], strict=True
            ):
                mean = sum(share["discrimination"]) / 2
                assert beyond["1"]["mean"] == pytest.approx(mean - of_counter["discrimination"])
                assert beyond["1"]["interval"] > 0
    again = run_rescue(["softmax", "k2"], [1.0], [1], TINY)
    assert again[1]["curves"][1]["shares"][0]["discrimination"][0] == pytest.approx(
        results[1]["curves"][1]["shares"][1]["discrimination"][1]
    )


def test_what_lies_within_the_null_is_not_told_apart() -> None:
    def share(*values: float) -> dict[str, list[float]]:
        return {
            "discrimination": list(values),
            "error": [0.001] * len(values),
            "right": [0.4, 0.7],
            "at_brackets": [0.0],
        }

    curves = [
        {"mixer": name, "shares": [share(0.01, -0.02), share(0.015, 0.017), share(up, up + 0.02)]}
        for name, up in (("one", 0.2), ("two", 0.1))
    ]
    result = {"alphas": [0.0, 0.1, 1.0], "curves": curves, "counters": []}
    told = summarised(result)
    assert told["null"] == {"discrimination": 0.02, "right": [0.4, 0.7]}
    assert [of_share["differs"] for of_share in told["curves"][0]["shares"]] == [False, False, True]
    assert told["differences"][0]["mixer"] == "two"
    assert told["differences"][0]["shares"][2]["mean"] == pytest.approx(-0.1)
    without = summarised({**result, "alphas": [0.05, 0.1, 1.0]})
    assert without["null"] is None
    assert [of_share["differs"] for of_share in without["curves"][0]["shares"]] == [True, True, True]
