"""Damaged run files, over all commands: one line or the right figures, never a defect, never a hang."""

from __future__ import annotations

import io
import json
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmixer.analysis.figures import PANELS
from kmixer.errors import InputError
from kmixer.experiments.arms import Arm
from kmixer.runs import integrity
from kmixer.runs.run_folder import RunFolder
from tests.cli.fuzzing import COMMANDS, KINDS, LAB_FILES, RUN_FILES, Bench, Case, damage


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def right(bench: Bench) -> object:
    return cache(bench.unchanged)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench.make(tmp_path_factory.mktemp("measured"))
    bench.measure()
    return bench


@pytest.mark.parametrize("command", COMMANDS)
def test_damage_is_one_line_or_changes_nothing(command: str, bench: Bench, right: object) -> None:
    cases = st.builds(
        Case,
        command=st.just(command),
        file=st.sampled_from(RUN_FILES),
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 1 << 32),
    )
    examples = 3 if command in ("report", "export") else 15

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(cases)
    def judged(case: Case) -> None:
        verdict = bench.judge(case, right(command))  # type: ignore[operator]
        assert verdict.ending not in ("defect", "hang", "accepted"), (case, verdict.said)

    judged()


# One that is gone is no damage.
cases_of_lab = st.builds(
    Case,
    command=st.just("report"),
    file=st.sampled_from(LAB_FILES),
    kind=st.sampled_from([kind for kind in KINDS if kind != "delete"]),
    seed=st.integers(0, 1 << 32),
)


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(cases_of_lab)
def test_a_damaged_measurement_is_one_line(measured: Bench, case: Case) -> None:
    verdict = measured.judge(case, "")
    if verdict.ending == "accepted":  # where it is drawn, as it was
        verdict = measured.judge(case, measured.unchanged("report"))
    assert verdict.ending in ("refused", "same", "said"), (case, verdict.said)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(cases_of_lab)
def test_a_measurement_that_no_digest_guards_is_drawn_or_one_line(measured: Bench, case: Case) -> None:
    measured.prepare()
    path = measured.run / case.file
    value = json.loads(path.read_text())
    del value[integrity.OWN_DIGEST]
    path.write_text(json.dumps(value, indent=2))
    damage(path, measured.folder / "seed-2" / case.file, case)
    (panel,) = [panel for panel in PANELS if case.file == f"lab-{panel.name}.json"]
    arm = Arm("arm", [RunFolder(measured.run)])
    try:
        if panel.applies(arm):
            panel.draw(arm).savefig(io.BytesIO(), format="svg")
    except InputError as error:
        assert "\n" not in str(error) and case.file in str(error)
