"""`Gate`: which pictures of many are worth a question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import Bound

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIZE = (320, 180)  # pixels, in which pictures are compared
CHANGED = 0.002
SETTLE = 0.3
BOUNDS = {
    "changed": Bound(float, 0, 1),
    "settle": Bound(float, 0, 86_400),
    "level": Bound(int, 0, 254),
    "every": Bound(float, 0, 86_400),
    "patience": Bound(float, 0, 86_400),
}


class Gate:
    """Says of each picture whether to ask about it: enough has changed, and has settled.

    What is compared is the area that differs from the picture last asked about. The brightness of
    the whole picture would not do: a line of text changes it less than a lamp that flickers.

    Args:
        changed: the share of the picture that must differ. 0 lets every picture pass.
        settle: seconds for which the picture must then stay as it is, within `changed`.
        level: by how many of 256 grey levels a pixel differs at least, plus one.
        every: seconds from one question to the next, at least.
        patience: seconds after which a picture that never settles is asked about, too.

    Attributes:
        share: of the last picture, how much differs from the one asked about before; 1 of the
            first.

    Raises:
        ConfigError: a number is out of its bounds.
    """

    def __init__(
        self,
        changed: float = CHANGED,
        settle: float = SETTLE,
        level: int = 12,
        *,
        every: float = 0.0,
        patience: float = 3.0,
    ) -> None:
        given = {
            "changed": changed, "settle": settle, "level": level, "every": every,
            "patience": patience,
        }  # fmt: skip
        for name, value in given.items():
            BOUNDS[name].check(name, value)
        self.changed, self.settle, self.level = changed, settle, level
        self.every, self.patience = every, patience
        self.share = 1.0
        self._asked: tuple[Any, float] | None = None  # grey pixels, seconds
        self._last: tuple[Any, float] | None = None
        self._still: tuple[Any, float] | None = None  # since when the picture is as it is
        self._restless = 0.0  # since when it differs from the one asked about

    def __call__(self, image: Image.Image, seconds: float) -> bool:
        """Whether to ask about a picture; it is then the one that others are compared with.

        Args:
            seconds: its time; never less than that of the picture before.
        """
        self._look(image, seconds)
        asked = self._asked
        if not self._differs():
            self._still = None
            return False
        if asked is not None and seconds - asked[1] < self.every:
            return False
        if self.changed and not self._is_settled(seconds):
            return False
        self._take()
        return True

    def take(self, image: Image.Image, seconds: float) -> None:
        """Takes a picture for one that was asked about."""
        self._look(image, seconds)
        self._take()

    def end(self) -> bool:
        """Whether to ask about the last picture, since no other follows in which it could settle.

        It is then the one asked about.
        """
        if self._last is None or not self._differs():
            return False
        self._take()
        return True

    def _look(self, image: Image.Image, seconds: float) -> None:
        self._last = (_grey(image), seconds)
        self.share = 1.0 if self._asked is None else self._difference(self._asked[0])

    def _take(self) -> None:
        self._asked, self._still = self._last, None

    def _differs(self) -> bool:
        if self._last is self._asked:
            return False
        return self._asked is None or not self.changed or self.share > self.changed

    def _is_settled(self, seconds: float) -> bool:
        if self._still is None:
            self._still, self._restless = self._last, seconds
        elif self._difference(self._still[0]) > self.changed:
            self._still = self._last
        assert self._still is not None
        settled = seconds - self._still[1] >= self.settle
        return settled or seconds - self._restless >= self.patience

    def _difference(self, other: np.ndarray[Any, Any]) -> float:
        import numpy as np

        assert self._last is not None
        changed = np.abs(self._last[0] - other) > self.level
        return int(np.count_nonzero(changed)) / changed.size


def _grey(image: Image.Image) -> np.ndarray[Any, Any]:
    """(180, 320) int16 grey levels."""
    import numpy as np
    from PIL.Image import Resampling

    small = image.resize(SIZE, Resampling.BOX, reducing_gap=1.0)
    return np.asarray(small.convert("L"), np.int16)
