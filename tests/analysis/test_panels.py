"""Panels draw the numbers that runs recorded, and are left out where there is nothing to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from kmixer.analysis.figures import OVERVIEWS, PANELS, all_figures
from kmixer.analysis.panels import attention, copies, ecology, fast_weights, k2, levels, losses, norms, signal
from kmixer.analysis.panels.rescue import draw_rescue
from kmixer.errors import InputError
from kmixer.experiments.arms import Arm
from kmixer.runs.lab import save_measurement
from kmixer.runs.lab_ecology import RescueRecord
from tests.experiments.records import evaluation, make_record, results_of


def curves(axes: Axes) -> list[list[float]]:
    """The heights of every line."""
    return [np.asarray(line.get_ydata(), dtype=float).tolist() for line in axes.lines]


def images(axes: Axes) -> list[Any]:
    arrays = (image.get_array() for image in axes.images)
    return [array.tolist() for array in arrays if array is not None]


@pytest.fixture
def arm_of(tmp_path: Path) -> Any:
    """An arm of one run with these dynamics at steps 0, 4, 8, ..."""

    def make(*dynamics: dict[str, Any], name: str = "arm", seed: int = 1, **best: Any) -> Arm:
        lines = [evaluation(4 * i, 4.0 - i, dynamics=measured) for i, measured in enumerate(dynamics)]
        return Arm(name, [make_record(tmp_path / f"{name}-{seed}", lines, results_of(seed, 2.0, **best))])

    return make


def test_every_panel_has_its_own_name_and_a_caption() -> None:
    panels = [*OVERVIEWS, *PANELS]
    assert len({panel.name for panel in panels}) == len(panels) == 25
    assert all(panel.caption.endswith(".") for panel in panels)


def test_nothing_recorded_is_nothing_drawn(tmp_path: Path) -> None:
    arm = Arm("arm", [make_record(tmp_path / "run", [evaluation(0, 4.0)])])
    assert all_figures([arm]) == []


def test_loss_curves_have_means_and_bands(tmp_path: Path) -> None:
    arms = [
        Arm(
            name,
            [
                make_record(
                    tmp_path / f"{name}{seed}",
                    [evaluation(0, 9.0), evaluation(4, loss + seed), evaluation(8, loss)],
                    results_of(seed, loss),
                )
                for seed in (1, 2)
            ],
        )
        for name, loss in (("a", 2.0), ("b", 3.0))
    ]
    assert losses.LOSS_CURVES.applies(arms)
    by_units, by_minutes = losses.LOSS_CURVES.draw(arms).axes
    assert curves(by_units) == curves(by_minutes) == [[3.5, 2.0], [4.5, 3.0]]  # without the evaluation before training
    assert by_units.lines[0].get_xdata().tolist() == [4 * 128, 8 * 128]
    assert by_minutes.lines[0].get_xdata().tolist() == [4.0, 8.0]
    band = by_units.collections[0].get_paths()[0].vertices
    assert sorted(set(np.asarray(band)[:, 1].tolist())) == [2.0, 3.0, 4.0]
    assert [text.get_text() for text in by_units.get_legend().get_texts()] == ["a", "b"]
    (points,) = losses.FINAL_LOSSES.draw(arms).axes
    assert curves(points)[0] == [0, 0] and points.lines[0].get_xdata().tolist() == [2.0, 2.0]
    assert [text.get_text() for text in points.get_yticklabels()] == ["a", "b"]
    assert not losses.FINAL_LOSSES.applies(arms[:1])


def test_losses_inside_a_window(arm_of: Any) -> None:
    arm = arm_of({}, loss_by_position=[4.0, 3.0, 2.0, 1.0])
    assert losses.LOSS_BY_POSITION.applies([arm])
    (axes,) = losses.LOSS_BY_POSITION.draw([arm]).axes
    assert curves(axes) == [[4.0, 2.5, 1.0]]  # position 1, positions 2 and 3, position 4
    assert not losses.LOSS_BY_POSITION.applies([arm_of({}, name="other")])


def test_losses_of_stretches_over_training(tmp_path: Path) -> None:
    lines = [evaluation(step, 3.0, stretches=[4.0 - step, 3.0 - step, 2.0]) for step in (0, 1, 2)]
    arm = Arm("arm", [make_record(tmp_path / "run", lines)])
    assert losses.POSITIONS_OVER_TRAINING.applies(arm)
    (axes,) = losses.POSITIONS_OVER_TRAINING.draw(arm).axes
    assert curves(axes) == [[3.0, 2.0], [2.0, 1.0], [2.0, 2.0]]
    assert [line.get_label() for line in axes.lines] == ["position 1", "position 2", "positions 3-4"]
    short = Arm("short", [make_record(tmp_path / "short", lines[:2])])
    assert not losses.POSITIONS_OVER_TRAINING.applies(short)


def test_norms_by_group(tmp_path: Path) -> None:
    norms = [
        {"gradient_norms": {"core": 1.0 + step, "bias": 2.0}, "update_norms": {"core": 0.1, "bias": 0.2 + step}}
        for step in (0, 1)
    ]
    lines = [evaluation(0, 3.0), *(evaluation(step + 1, 3.0, **norms[step]) for step in (0, 1))]
    arm = Arm("arm", [make_record(tmp_path / "run", lines)])
    assert losses.NORMS.applies(arm)
    gradients, updates = losses.NORMS.draw(arm).axes
    assert curves(gradients) == [[1.0, 2.0], [2.0, 2.0]]
    assert curves(updates) == [[0.1, 0.1], [0.2, 1.2]]
    assert not losses.NORMS.applies(Arm("short", [make_record(tmp_path / "short", lines[:2])]))


def test_decays_are_drawn_as_windows_of_the_first_and_the_last(arm_of: Any) -> None:
    arm = arm_of({"decay": [[0.5, 0.9]]}, {"decay": [[0.7, 0.7]]}, {"decay": [[0.75, 1.0]]})
    (axes,) = k2.DECAYS.draw(arm).axes
    assert curves(axes) == [pytest.approx([2.0, 10.0]), pytest.approx([4.0, 1e7])]
    assert not k2.DECAYS.applies(arm_of({"alpha": [[1.0]]}, name="other"))


def test_base_kernels_and_their_shares(arm_of: Any) -> None:
    arm = arm_of(
        {"base_share": [0.1, 0.2], "gate": [0.5, 0.5], "base_kernel": [[0.5, 0.25]]},
        {"base_share": [0.3, 0.4], "gate": [0.6, 0.7], "base_kernel": [[1.0, -1.0]]},
    )
    shares, gates = k2.BASE_SHARES.draw(arm).axes
    assert curves(shares) == [[0.1, 0.3], [0.2, 0.4]]
    assert curves(gates) == [[0.5, 0.6], [0.5, 0.7]]
    (kernel,) = k2.BASE_KERNELS.draw(arm).axes
    assert curves(kernel)[:2] == [[0.5, 0.25], [1.0, -1.0]]
    none = arm_of({"base_kernel": [], "base_share": [0.1]}, name="none")
    assert not k2.BASE_KERNELS.applies(none)
    assert not k2.BASE_SHARES.applies(none)  # one evaluation makes no curve
    assert not k2.BASE_KERNEL_MATRIX.applies(arm)  # the same at every position, and no weights are kept


def test_refinement_of_the_arms_that_have_it(arm_of: Any) -> None:
    plain = arm_of({"decay": [[0.5]]}, name="plain")
    refined = arm_of({"eta": 0.1, "residuals": [1.0, 0.5]}, {"eta": 0.3, "residuals": [0.5, 0.25]}, name="refined")
    left, right = k2.REFINEMENT.draw([plain, refined]).axes
    assert curves(left) == [[0.1, 0.3]]
    assert curves(right) == [[0.5, 0.25]]
    assert not k2.REFINEMENT.applies([plain])


def test_bandwidths_and_locality(arm_of: Any) -> None:
    locality = {"effective_keys": [[2.0, 3.0], [4.0, 5.0]], "distance": [[1.0, 1.5], [2.0, 2.5]]}
    earlier = {"effective_keys": [[9.0, 9.0], [9.0, 9.0]], "distance": [[9.0, 9.0], [9.0, 9.0]]}
    arm = arm_of({"sigma": [[1.0, 2.0]], "locality": earlier}, {"sigma": [[3.0, 5.0]], "locality": locality})
    left, right, *_ = attention.BANDWIDTHS.draw(arm).axes
    assert images(left) == [[[3.0, 5.0]]]
    assert curves(right) == [[1.0, 3.0], [2.0, 5.0]]
    shown = [drawn for axes in attention.LOCALITY.draw(arm).axes for drawn in images(axes)]
    assert [locality["effective_keys"], locality["distance"]] == shown[:2]
    assert not attention.BANDWIDTHS.applies(arm_of({"sigma": [[1.0]]}, name="once"))


def test_columns_by_layer(arm_of: Any) -> None:
    arm = arm_of({"column_residual": [0.5, 0.25]}, {"column_residual": [0.1, 0.05]})
    (axes,) = attention.COLUMNS.draw(arm).axes
    assert curves(axes) == [[0.5, 0.1], [0.25, 0.05]]
    assert not attention.COLUMNS.applies(arm_of({"column_residual": [0.5]}, name="once"))


def test_the_class_token_shows_images_and_what_it_holds(arm_of: Any) -> None:
    token = {"images": [[[[0.0, 1.0], [2.0, 3.0]]]], "rollout": [[0.1, 0.2, 0.3, 0.4]]}
    above, below = attention.CLASS_TOKEN.draw(arm_of({}, class_token=token)).axes
    assert images(above) == [[[0.0, 1.0], [2.0, 3.0]]]
    assert images(below) == [[[0.1, 0.2], [0.3, 0.4]]]
    assert not attention.CLASS_TOKEN.applies(arm_of({}, name="other"))


def test_levels_and_their_approximation(arm_of: Any) -> None:
    last = {"reciprocity": [[0.2, 0.4], [0.6, 0.8]], "fit_error": [[], [0.5, 0.7]], "remainder": [[0.4], [0.0]]}
    last |= {"smallest_eigenvalue": [[0.0, 0.0], [0.0, 0.0]], "kurtosis": [[], [0.0, 0.0]]}
    first = {"level_weights": [[[0.5, 0.5], [0.7, 0.3]]], "levels": [last]}
    arm = arm_of(first, {"level_weights": [[[1.0, 0.0], [0.8, 0.2]]], "levels": [last]})
    weights, shares = levels.LEVEL_WEIGHTS.draw(arm).axes
    assert curves(weights) == [pytest.approx([0.6, 0.9]), pytest.approx([0.4, 0.1])]
    assert curves(shares) == [pytest.approx([0.3, 0.7])]
    errors, remainders = levels.LEVEL_APPROXIMATION.draw(arm).axes
    assert curves(errors) == [pytest.approx([0.6])]
    assert curves(remainders) == [[0.4, 0.0]]
    measured = {name: [[0.0]] for name in last}
    one_level = arm_of({"level_weights": [[[1.0]]], "levels": [measured]}, name="one")
    assert not levels.LEVEL_APPROXIMATION.applies(one_level)
    assert not levels.LEVEL_WEIGHTS.applies(one_level)


WORTH = {
    "layers": [0, 2],
    "lengths": ["0", "1", "over 1"],
    "positions": [5, 2000, 0],
    "right": [None, 0.25, None],
    "loss": [3.0, 2.0, None],
    "loss_without": [3.0, 2.5, None],
}


def test_what_copies_are_worth_by_length_with_counts(arm_of: Any) -> None:
    earlier = WORTH | {"right": [None, 0.1, 1.0]}
    arm = arm_of({"copy_gate": [0.1, 0.1], "copies": earlier}, {"copy_gate": [0.2, 0.6], "copies": WORTH})
    right, loss = copies.COPIES.draw(arm).axes
    assert [bar.get_height() for bar in right.containers[0]] == [0.0, 0.25, 0.0]
    assert [text.get_text() for text in right.texts] == ["5", "2,000", ""]
    assert [text.get_text() for text in loss.get_xticklabels()] == WORTH["lengths"]
    assert curves(loss) == [pytest.approx([3.0, 2.5, np.nan], nan_ok=True), pytest.approx([3, 2, np.nan], nan_ok=True)]
    assert copies.COPIES.applies(arm_of({"copy_gate": [0.1, 0.1], "copies": WORTH}, name="once"))
    assert not copies.COPIES.applies(arm_of({"gate": [0.1]}, name="none"))


def test_copy_gates_by_layer_and_by_length_where_they_know_it(arm_of: Any) -> None:
    arm = arm_of({"copy_gate": [0.1, 0.1], "copies": WORTH}, {"copy_gate": [0.2, 0.6], "copies": WORTH})
    (axes,) = copies.COPY_GATES.draw(arm).axes
    assert curves(axes) == [[0.1, 0.2], [0.1, 0.6]]
    assert [line.get_label() for line in axes.lines] == ["layer 1", "layer 3"]
    by_length = [{"copy_gate": [[0.1, 0.2, g], [0.4, 0.5, g]], "copies": WORTH} for g in (0.3, 0.6)]
    over_training, at_the_end = copies.COPY_GATES.draw(arm_of(*by_length, name="by length")).axes
    assert curves(over_training) == [pytest.approx([0.2, 0.3]), pytest.approx([0.4, 0.5])]
    assert curves(at_the_end) == [[0.1, 0.2, 0.6], [0.4, 0.5, 0.6]]
    assert not copies.COPY_GATES.applies(arm_of(by_length[0], name="once"))
    none = {"copy_gate": [], "copies": WORTH | {"layers": []}}
    assert not copies.COPY_GATES.applies(arm_of(none, none, name="a pointer alone"))


def test_copies_that_do_not_fit_are_one_line(arm_of: Any) -> None:
    for wrong in ({"copies": WORTH}, {"copy_gate": [0.1]}, {"copy_gate": [0.1], "copies": WORTH}):
        with pytest.raises(InputError, match="copy_gate"):
            arm_of(wrong, name=str(len(str(wrong)))).evaluations()
    with pytest.raises(InputError, match=r"copies\.right: it has another length than copies\.lengths"):
        arm_of({"copy_gate": [0.1, 0.2], "copies": WORTH | {"right": [0.5]}}, name="short").evaluations()


ADAPTED = {
    "layers": ["blocks.2", "blocks.5"],
    "moves": [0.2, 0.4],
    "positions": [1, 2, 4],
    "loss": [3.0, 2.0, 1.0],
    "loss_without": [3.0, 2.5, 2.0],
}


def test_fast_weights_by_layer_and_what_they_are_worth(arm_of: Any) -> None:
    first = {"fast_weights": ADAPTED | {"moves": [0.0, 0.0]}, "fast_tau": [600.0, 600.0]}
    arm = arm_of(first, {"fast_weights": ADAPTED, "fast_tau": [500.0, 900.0]})
    moves, taus = fast_weights.FAST_WEIGHTS.draw(arm).axes
    assert curves(moves) == [[0.0, 0.2], [0.0, 0.4]]
    assert [line.get_label() for line in moves.lines] == ADAPTED["layers"]
    assert curves(taus) == [[600.0, 500.0], [600.0, 900.0]]
    loss, worth = fast_weights.ADAPTING.draw(arm).axes
    assert curves(loss) == [ADAPTED["loss_without"], ADAPTED["loss"]]
    assert curves(worth)[1:] == [[0.0, 0.5, 1.0]]
    by_unit = [{"fast_weights": ADAPTED, "fast_tau": [[600.0, 500.0], [1.0, 2.0]]}] * 2
    assert len(fast_weights.FAST_WEIGHTS.draw(arm_of(*by_unit, name="token form")).axes) == 1
    assert not fast_weights.FAST_WEIGHTS.applies(arm_of(first, name="once"))
    assert not fast_weights.ADAPTING.applies(arm_of({"gate": [0.1]}, name="none"))


def test_fast_weights_that_do_not_fit_are_one_line(arm_of: Any) -> None:
    for key, like in (("moves", "layers"), ("loss", "positions"), ("loss_without", "positions")):
        with pytest.raises(InputError, match=rf"fast_weights\.{key}: it has another length than fast_weights\.{like}"):
            arm_of({"fast_weights": ADAPTED | {key: [0.5]}}, name=key).evaluations()


def test_figures_of_several_arms_are_named_after_them(arm_of: Any) -> None:
    arms = [arm_of({"decay": [[0.5]]}, name=name) for name in ("rank=2", "a b/c")]
    drawn = {figure.name: figure.caption for figure in all_figures(arms)}
    assert drawn["decays-rank=2"] == drawn["decays-a-b-c"] == k2.DECAYS.caption
    assert [figure.name for figure in all_figures(arms[:1])] == ["decays"]


def test_growth_of_gradients_stands_in_both_coordinates(tmp_path: Path) -> None:
    run = make_record(tmp_path / "run", [evaluation(0, 4.0)])
    arm = Arm("arm", [run])
    assert not signal.SIGNAL.applies(arm)
    curve = {"name": "trained", "log_growth": [2.0, 0.0], "log_growth_error": [0.1, 0.0], "q": [1.0, 4.0]}
    whole = {"curves": [{**curve, "cosine": [-0.1, 0.5], "log_theory": [1.0, 0.0]}]}
    save_measurement(
        run, "signal", {"name": "x", "trained": True, "positions": 8, "recipe_sha256": run.identity(), **whole}
    )
    assert signal.SIGNAL.applies(arm)
    figure = signal.SIGNAL.draw(arm)
    power, stretched, stream = figure.axes
    assert curves(power) == curves(stretched) == [pytest.approx([np.e**2, 1.0]), pytest.approx([np.e, 1.0])]
    assert power.lines[0].get_xdata().tolist() == [1, 2]
    assert curves(stream) == [[1.0, 4.0], [1e-3, 0.5]]  # a logarithmic axis has no place for less
    assert [text.get_text() for text in power.get_legend().get_texts()] == ["trained", "theory"]
    assert figure.get_suptitle() == "Growth of gradients, arm trained, 8 positions"
    figure.savefig(tmp_path / "signal.svg")


def test_sources_are_a_map_and_a_tree_of_merges(tmp_path: Path) -> None:
    run = make_record(tmp_path / "run", [evaluation(0, 4.0)])
    arm = Arm("arm", [run])
    assert not ecology.ECOLOGY.applies(arm)
    steps = [(0.0, [[0], [1], [2]], False), (0.1, [[0, 2], [1]], True), (0.4, [[0, 1, 2]], False)]
    whole = {
        "sources": ["a", "$b$", "c"],
        "context": "suffix:2",
        "js": [[0.0, 0.3, 0.1], [0.3, 0.0, 0.3], [0.1, 0.3, 0.0]],
        "null": [{"mean": 0.05, "largest": 0.06}] * 3,
        "pairs": [{"first": a, "second": b, "js": 0.3, "differs": b != 2} for a, b in ((0, 1), (0, 2), (1, 2))],
        "path": [{"beta": beta, "cells": cells, "noise": noise} for beta, cells, noise in steps],
        "exact": True,
    }
    model = {"js": whole["js"], "null": whole["null"], "pairs": [{"first": 0, "second": 1, "says": "merged"}]}
    save_measurement(run, "ecology", {"name": "x", "recipe_sha256": run.identity(), **whole, "model": model})
    assert ecology.ECOLOGY.applies(arm)
    figure = ecology.ECOLOGY.draw(arm)
    of_texts, of_model, tree = figure.axes
    assert images(of_texts)[0][0] == [0.05, 0.3, 0.1]
    assert {text.get_text() for text in of_model.texts} == {".0500", ".3000\nmerged", ".3000", ".1000"}
    assert [text.get_text() for text in tree.get_yticklabels()] == ["a", "c", r"\$b\$"]
    joins = [line for line in tree.lines if len({*np.asarray(line.get_xdata()).tolist()}) == 1]
    assert [np.asarray(line.get_xdata())[0] for line in joins] == [0.1, 0.4]
    assert [line.get_color() for line in joins] == ["0.55", "C0"]
    assert [np.asarray(line.get_ydata()).tolist() for line in joins] == [[0.0, 1.0], [0.5, 2.0]]
    figure.savefig(tmp_path / "ecology.svg")


def test_the_rescue_has_bands_over_seeds_and_lines_of_counters() -> None:
    one = {
        "name": "chunks",
        "characters": 30,
        "alphas": [0.0, 1.0],
        "curves": [{"mixer": "one", "shares": [{"discrimination": [-0.1, 0.1]}, {"discrimination": [0.3, 0.5]}]}],
        "counters": [{"context": 3, "shares": [{"discrimination": 0.0}, {"discrimination": 0.6}]}],
    }
    record = RescueRecord.parse({"name": "one", "evaluations": [one, one]}, source="test")
    left, _ = draw_rescue(record).axes
    assert curves(left)[1:] == [[0.0, 0.6], pytest.approx([0.0, 0.4])]
    band = np.asarray(left.collections[0].get_paths()[0].vertices)[:, 1]
    assert sorted({*band.tolist()}) == [-0.1, 0.1, 0.3, 0.5]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["counter, 3 characters", "one"]


def test_norms_are_drawn_by_name(arm_of: Any) -> None:
    def measured(step: int) -> dict[str, Any]:
        names = ["stack.first.mixing_norm", "stack.read_out.norm", "norm"]
        values = {"alpha": [0.5, 1.0 + step, 2.0], "shift": [0.0] * 3}
        return {"norms": {"names": names, **values, "saturation": [0.0, 0.1 * step, 0.2], "input": [0.02, 1.0, 3.0]}}

    arm = arm_of(measured(0), measured(1))
    assert norms.POINTWISE_NORMS.applies(arm)
    figure = norms.draw_pointwise_norms(arm)
    strength, alpha, saturation = figure.axes
    assert curves(strength) == [[0.02, 0.02], [1.0, 1.0], [3.0, 3.0]]
    assert curves(alpha)[1] == [1.0, 2.0]
    assert curves(saturation)[1] == [0.0, 0.1]
    assert not norms.POINTWISE_NORMS.applies(arm_of({}, {}, name="other"))
