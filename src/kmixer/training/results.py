"""results.json: what a finished run gave, for the weights chosen by validation loss and for the last ones."""

from __future__ import annotations

import copy

from kmixer.models.model_folder import WEIGHTS, Model, load_weights, put_weights
from kmixer.runs.run_folder import RunFolder
from kmixer.training.checkpoint import Progress
from kmixer.training.task import Task


def write_results(run: RunFolder, model: Model, task: Task, progress: Progress) -> None:
    """Evaluate both sets of weights on every held-out part, and write them beside the size and cost of the run.

    They are measured once where the last step was the best. The test part, where the recipe holds one out, is measured
    here and nowhere else.
    """
    config = task.recipe.training
    tensors, about = load_weights(run.path)
    last = task.final_measures(model)
    best = last
    if about["step"] != progress.step:
        chosen = copy.deepcopy(model)
        device = next(model.parameters()).device
        put_weights(chosen, {name: tensor.to(device) for name, tensor in tensors.items()}, WEIGHTS)
        best = task.final_measures(chosen)
    run.write_results(
        {
            "recipe": task.recipe.name,
            "seed": config.seed,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": config.steps,
            task.unit: config.steps * task.recipe.units_per_step,
            "flops": 3 * config.steps * task.forward_flops(model),
            "seconds": progress.seconds,
            "best": {"step": about["step"], **best},
            "last": {"step": progress.step, **last},
        }
    )
