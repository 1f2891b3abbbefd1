"""Damaged run files, over all commands: one line or the right figures, never a defect, never a hang."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.fuzzing import COMMANDS, KINDS, RUN_FILES, Bench, Case


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def right(bench: Bench) -> object:
    return cache(bench.unchanged)


@pytest.mark.parametrize("command", COMMANDS)
def test_damage_is_one_line_or_changes_nothing(command: str, bench: Bench, right: object) -> None:
    cases = st.builds(
        Case,
        command=st.just(command),
        file=st.sampled_from(RUN_FILES),
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 1 << 32),
    )
    examples = 3 if command in ("report", "export") else 25

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases)
    def judged(case: Case) -> None:
        verdict = bench.judge(case, right(command))  # type: ignore[operator]
        assert verdict.ending not in ("defect", "hang", "accepted"), (case, verdict.said)

    judged()
