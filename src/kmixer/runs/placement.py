"""Where a run in training is written: a staged folder first, and its place once it has shown that it works."""

from __future__ import annotations

from kmixer.runs.run_folder import RunFolder


class Placement:
    """A run on its way to its place.

    `folder` is where it is written now. A new run in an empty place moves there with its first checkpoint. One that
    replaces another waits until it has made what a user would keep, its first evaluation after training began: if it
    fails or is stopped before, the old run is as it was.
    """

    def __init__(self, target: RunFolder, folder: RunFolder) -> None:
        self.target, self.folder = target, folder
        self.replaces = folder.path != target.path and target.exists()

    @classmethod
    def of_new_run(cls, target: RunFolder) -> Placement:
        """A staged run. For who holds the place."""
        return cls(target, target.staged())

    @property
    def published(self) -> bool:
        return self.folder.path == self.target.path

    def saved(self, *, evaluated_after: int) -> None:
        """A checkpoint was written, and the last evaluation was after so many steps."""
        if not self.published and (evaluated_after > 0 or not self.replaces):
            self.folder.publish(self.target)
            self.folder = self.target

    def keeps(self) -> str:
        """What a user has there when training fails now, in a few words; empty where it is nothing."""
        if self.published:
            return f"{self.target.path} keeps the best weights and the last good checkpoint"
        return f"{self.target.path} keeps the run that was there" if self.replaces else ""
