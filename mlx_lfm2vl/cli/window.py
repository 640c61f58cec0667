"""A small window with the picture that is watched, and the last answer under it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import Lfm2VlError

if TYPE_CHECKING:
    from ..serving.frames import Frame

POLL = 40  # milliseconds between looks at what is new
SIDE = 480  # pixels of the picture at most


class Window:
    """Runs in the main thread, as windows must, while the work is done in another.

    Attributes:
        is_closed: whether its user has closed it.

    Raises:
        Lfm2VlError: there is no tkinter, or no screen.
    """

    def __init__(self, title: str) -> None:
        try:
            import tkinter as tk
        except ImportError:
            raise Lfm2VlError("--show needs tkinter, which this Python lacks") from None
        try:
            self.root = tk.Tk()
        except tk.TclError as error:
            raise Lfm2VlError(f"--show needs a screen: {error}") from None
        self.is_closed = False
        self.frame: Frame | None = None
        self.text, self.error = "", None
        self.root.title(title)
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self.picture, self.answer = tk.Label(self.root), tk.Label(self.root, wraplength=SIDE)
        self.picture.pack()
        self.answer.pack(padx=12, pady=12)
        self.photo: Any = None

    def close(self) -> None:
        """Asks the work to end, and the window with it."""
        self.is_closed = True

    def look(self, frame: Frame) -> None:
        """Shows a frame soon; from any thread."""
        self.frame = frame

    def say(self, text: str) -> None:
        """Shows an answer soon; from any thread."""
        self.text = text

    def run(self, work: Callable[[], None]) -> None:
        """Shows what is new until the work is done; raises what it raised."""
        errors: list[BaseException] = []

        def call() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - its place is in the main thread
                errors.append(error)

        thread = threading.Thread(target=call, name="mlx_lfm2vl.watch")
        thread.start()
        self._poll(thread)
        self.root.mainloop()
        thread.join()
        if errors:
            raise errors[0]

    def _poll(self, thread: threading.Thread) -> None:
        from PIL import ImageTk

        frame, self.frame = self.frame, None
        if frame is not None:
            small = frame.image.copy()
            small.thumbnail((SIDE, SIDE))
            self.photo = ImageTk.PhotoImage(small)  # kept, for Tk does not
            self.picture.configure(image=self.photo)
        self.answer.configure(text=self.text)
        if thread.is_alive():
            self.root.after(POLL, self._poll, thread)
        else:
            self.root.destroy()
