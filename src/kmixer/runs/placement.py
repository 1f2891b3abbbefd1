"""Where a run in training is written: a staged folder first, and its place once it has shown that it works."""

from __future__ import annotations

from kmixer.runs.run_folder import RunFolder


class Placement:
    """A run on its way to its place.

    `folder` is where it is written now. A new run in an empty place moves there with its first checkpoint. One that
    replaces another waits until it has made what a user would keep, its first evaluation after training began: if it
    fails or is stopped before, the old run is as it was.
    """

    def __init__(self, place: RunFolder, folder: RunFolder) -> None:
        self.place, self.folder = place, folder
        self.replaces = folder.path != place.path and place.exists()

    @classmethod
    def of_new_run(cls, place: RunFolder) -> Placement:
        """A staged run. For who holds the place."""
        return cls(place, place.staged())

    @property
    def published(self) -> bool:
        return self.folder.path == self.place.path

    def saved(self, *, evaluated_after: int) -> None:
        """A checkpoint was written, and the last evaluation was after so many steps."""
        if not self.published and (evaluated_after > 0 or not self.replaces):
            self.folder.publish(self.place)
            self.folder = self.place

    def keeps(self) -> str:
        """What a user has there when training fails now, in a few words; empty where it is nothing."""
        if self.published:
            return f"{self.place.path} keeps the best weights and the last good checkpoint"
        return f"{self.place.path} keeps the run that was there" if self.replaces else ""
