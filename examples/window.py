"""A window that shows a camera, a screen, a film or a picture and answers questions about it.

    python examples/window.py --source camera --prompt "What is on the table?"
    python examples/window.py --image examples/photos/coffee.png

Of a source, the question is asked again whenever the picture has changed, until one stops it; while
it pauses, the picture stands still and can be asked about. The model lives in a `Worker`. The
window never waits for it; it looks every 30 ms what is new.
"""

from __future__ import annotations

import argparse
import tkinter as tk
from tkinter import ttk

from PIL import Image, ImageTk

from mlx_lfm2vl import AnswerCancelled, Frames, Gate, Lfm2VlError, PendingAnswer, Worker, frames
from mlx_lfm2vl.prompts.image_source import load_image

POLL = 30  # milliseconds
GAP = 12  # pixels


class Window:
    """The picture, under it the question, under that the answer."""

    def __init__(
        self,
        root: tk.Tk,
        worker: Worker,
        shown: Image.Image | Frames,
        max_tokens: int,
        close_after: bool,
    ) -> None:
        self.root, self.worker = root, worker
        self.source = shown if isinstance(shown, Frames) else None
        self.image = shown if isinstance(shown, Image.Image) else None
        self.max_tokens, self.close_after = max_tokens, close_after
        self.gate = Gate()
        self.wanted = False  # a question is to be asked as soon as there is a picture
        self.watching = self.paused = False
        self.request: PendingAnswer | None = None
        self.shown = 0  # characters of the answer
        self.build()
        self.poll()

    def build(self) -> None:
        root = self.root
        root.title("LFM2-VL")
        root.geometry("720x640")
        root.minsize(420, 360)
        root.columnconfigure(0, weight=1)
        root.rowconfigure(0, weight=3)
        root.rowconfigure(2, weight=1)
        self.canvas = tk.Canvas(root, background="#202124", highlightthickness=0)
        self.canvas.grid(row=0, sticky="nsew")
        self.canvas.bind("<Configure>", self.draw)

        bar = ttk.Frame(root, padding=GAP)
        bar.grid(row=1, sticky="ew")
        bar.columnconfigure(0, weight=1)
        self.question = ttk.Entry(bar, font="TkTextFont")
        self.question.grid(row=0, column=0, sticky="ew", ipady=3)
        self.question.bind("<Return>", self.ask)
        self.question.focus()
        self.ask_button, self.stop_button, self.pause_button = (
            ttk.Button(bar, text=text, width=8, command=command)
            for text, command in (("Ask", self.ask), ("Stop", self.stop), ("Pause", self.pause))
        )
        self.ask_button.grid(row=0, column=1, padx=(GAP // 2, 0))
        self.stop_button.grid(row=0, column=2, padx=(GAP // 2, 0))
        if self.source is not None:
            self.pause_button.grid(row=0, column=3, padx=(GAP // 2, 0))

        self.answer = tk.Text(root, wrap="word", font="TkTextFont", relief="flat", height=1)
        self.answer.configure(padx=GAP, pady=GAP, spacing2=3, highlightthickness=0)
        self.answer.configure(state="disabled")
        self.answer.grid(row=2, sticky="nsew", padx=GAP)
        self.status = ttk.Label(root, foreground="#5f6368", padding=GAP)
        self.status.grid(row=3, sticky="w")
        self.update_buttons()

    def update_buttons(self) -> None:
        busy = self.request is not None or self.wanted
        self.ask_button.state(["disabled" if busy else "!disabled"])
        self.stop_button.state(["!disabled" if busy or self.watching else "disabled"])
        self.pause_button.configure(text="Continue" if self.paused else "Pause")

    def draw(self, event: object = None) -> None:
        """Fits the picture into its place."""
        width, height = self.canvas.winfo_width(), self.canvas.winfo_height()
        if self.image is None or min(width, height) < 2:
            return
        scale = min(width / self.image.width, height / self.image.height)
        size = (max(1, int(self.image.width * scale)), max(1, int(self.image.height * scale)))
        self.photo = ImageTk.PhotoImage(self.image.resize(size))  # kept, for Tk does not
        self.canvas.delete("all")
        self.canvas.create_image(width // 2, height // 2, image=self.photo)

    def ask(self, event: object = None) -> None:
        """Asks now, and of a source again whenever the picture has changed."""
        if self.request is None and self.question.get().strip():
            self.wanted, self.watching = True, self.source is not None
            self.update_buttons()

    def stop(self) -> None:
        self.wanted = self.watching = False
        if self.request is not None:
            self.request.cancel()
        self.update_buttons()

    def pause(self) -> None:
        self.paused = not self.paused
        self.update_buttons()

    def poll(self) -> None:
        """Shows what is new, asks if there is reason to, and comes back."""
        changed = self.look()
        self.read_answer()
        question = self.question.get().strip()
        again = self.watching and changed and not self.paused
        if self.request is None and self.image is not None and question and (self.wanted or again):
            self.request = self.worker.submit(question, self.image, max_tokens=self.max_tokens)
            self.wanted, self.shown = False, 0
            self.write("", clear=True)
            self.status["text"] = "Looking…"
            self.update_buttons()
        self.root.after(POLL, self.poll)

    def look(self) -> bool:
        """Takes the newest frame of a source; whether it is worth a question."""
        if self.source is None:
            return False
        try:
            frame = self.source.poll(0)
        except Lfm2VlError as error:
            self.fail(error)
            return False
        if frame is None or self.paused:
            return False
        self.image = frame.image
        self.draw()
        if self.wanted:
            self.gate.take(frame.image, frame.seconds)
        return self.request is None and self.gate(frame.image, frame.seconds)

    def read_answer(self) -> None:
        """Shows what is new of an answer, and how it ended."""
        request = self.request
        if request is None:
            return
        done, text = request.done, request.text  # in this order, or the last words may be missing
        self.write(text[self.shown :])
        self.shown = len(text)
        if not done:
            return
        self.request = None
        try:
            request.result()
        except AnswerCancelled:
            self.status["text"] = "Stopped"
        except Exception as error:  # noqa: BLE001 - whatever it is, the user reads it
            self.fail(error)
        else:
            last = request.responses[-1]
            self.status["text"] = f"{last.generation_tokens} tokens, {last.generation_tps:.0f}/s"
        self.update_buttons()
        self.end()

    def fail(self, error: Exception) -> None:
        """Tells what went wrong, and tries no more by itself."""
        self.status["text"] = f"{type(error).__name__}: {error}"
        self.source, self.wanted, self.watching = None, False, False
        self.update_buttons()
        self.end()

    def end(self) -> None:
        if self.close_after:
            self.close_after = False
            print(self.status["text"])
            self.root.after_idle(self.root.destroy)

    def write(self, text: str, clear: bool = False) -> None:
        self.answer.configure(state="normal")
        if clear:
            self.answer.delete("1.0", "end")
        self.answer.insert("end", text)
        self.answer.configure(state="disabled")
        self.answer.see("end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="LiquidAI/LFM2.5-VL-450M", help="folder or repository")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", help="path or URL")
    what.add_argument("--source", help="camera[:N], screen[:N], a film or an rtsp:// URL")
    parser.add_argument("--prompt", help="asked at once")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--close-after-answer", action="store_true")
    args = parser.parse_args()
    try:
        if args.source is not None:
            shown = frames(args.source, realtime=True)
        else:
            shown = load_image(args.image)
    except Lfm2VlError as error:
        parser.error(str(error))
    with Worker(args.model) as worker:
        root = tk.Tk()
        window = Window(root, worker, shown, args.max_tokens, args.close_after_answer)
        window.question.insert(0, args.prompt or "What is in this image?")
        if args.prompt:
            root.after_idle(window.ask)
        root.mainloop()
    if args.source is not None:
        shown.close()


if __name__ == "__main__":
    main()
