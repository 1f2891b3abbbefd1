"""Names of weights in files: what a layout renamed still loads, by the format that the file says it has."""

from __future__ import annotations

import re

from torch import Tensor

from kmixer.errors import InputError

# Written into every file of weights; files that say none are of format 1.
FORMAT = 2
# By format: what was renamed after it, as patterns and replacements. The first that matches a name renames it.
RENAMED: dict[int, tuple[tuple[str, str], ...]] = {
    1: (
        # K1 and K2 became blocks around a mixer.
        (r"stack\.(first|last)\.mixing\.", r"stack.\1.mixer.projection."),
        (r"stack\.mixers\.(\d+)\.(mixing_norm|feed_forward_norm|feed_forward)\.", r"stack.blocks.\1.\2."),
        (r"stack\.mixers\.(\d+)\.", r"stack.blocks.\1.mixer."),
        # So did the blocks of the vision transformer, whose two matrices stood in the block itself.
        (r"blocks\.(\d+)\.(up|down)\.", r"blocks.\1.feed_forward.\2."),
    ),
}


def current_names(tensors: dict[str, Tensor], format: object, source: str) -> dict[str, Tensor]:
    """The tensors of a file of this format under the names that they have today.

    Raises InputError for a format that this version does not know.
    """
    if type(format) is not int or not 1 <= format <= FORMAT:
        raise InputError(
            f"{source}: its weights are of format {format!r}, and this version of kmixer reads 1 to {FORMAT}; "
            "install the version that wrote it, or a newer one"
        )
    for version in range(format, FORMAT):
        tensors = {_renamed(name, RENAMED[version]): tensor for name, tensor in tensors.items()}
    return tensors


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        renamed, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return renamed
    return name
