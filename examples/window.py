"""A window that shows a picture and answers questions about it.

    python examples/window.py --image examples/photos/coffee.png

The model lives in a `Worker`. The window never waits for it; it looks every 30 ms what is new.
"""

from __future__ import annotations

import argparse
import tkinter as tk
from tkinter import ttk

from PIL import Image, ImageTk

from mlx_lfm2vl import AnswerCancelled, PendingAnswer, Worker
from mlx_lfm2vl.prompts.image_source import load_image

POLL = 30  # milliseconds
GAP = 12  # pixels


class Window:
    """The picture on the left, the conversation on the right."""

    def __init__(
        self, root: tk.Tk, worker: Worker, image: Image.Image, max_tokens: int, close_after: bool
    ) -> None:
        self.root, self.worker, self.image = root, worker, image
        self.max_tokens, self.close_after = max_tokens, close_after
        self.request: PendingAnswer | None = None
        self.shown = 0  # characters of the answer
        root.title("LFM2-VL")
        root.geometry("960x560")
        root.minsize(560, 320)
        root.columnconfigure(0, weight=3, uniform="halves")
        root.columnconfigure(1, weight=2, uniform="halves")
        root.rowconfigure(0, weight=1)

        self.canvas = tk.Canvas(root, background="#202124", highlightthickness=0)
        self.canvas.grid(row=0, column=0, sticky="nsew")
        self.canvas.bind("<Configure>", self.draw)

        side = ttk.Frame(root, padding=GAP)
        side.grid(row=0, column=1, sticky="nsew")
        side.columnconfigure(0, weight=1)
        side.rowconfigure(1, weight=1)
        self.question = ttk.Entry(side, font="TkTextFont")
        self.question.bind("<Return>", self.ask)
        self.question.focus()
        self.ask_button = ttk.Button(side, text="Ask", width=6, command=self.ask)
        self.stop_button = ttk.Button(side, text="Stop", width=6, command=self.stop)
        self.answer = tk.Text(
            side, wrap="word", font="TkTextFont", relief="flat", padx=GAP, pady=GAP, width=1
        )
        self.answer.configure(state="disabled", spacing2=3, highlightthickness=0)
        self.status = ttk.Label(side, foreground="#5f6368")
        self.question.grid(row=0, column=0, sticky="ew", ipady=3)
        self.ask_button.grid(row=0, column=1, padx=(GAP // 2, 0))
        self.stop_button.grid(row=0, column=2, padx=(GAP // 2, 0))
        self.answer.grid(row=1, column=0, columnspan=3, sticky="nsew", pady=GAP)
        self.status.grid(row=2, column=0, columnspan=3, sticky="w")
        self.stop_button.state(["disabled"])

    def draw(self, event: tk.Event[tk.Canvas]) -> None:
        """Fits the picture into its half."""
        scale = min(event.width / self.image.width, event.height / self.image.height)
        size = (max(1, int(self.image.width * scale)), max(1, int(self.image.height * scale)))
        self.photo = ImageTk.PhotoImage(self.image.resize(size))  # kept, for Tk does not
        self.canvas.delete("all")
        self.canvas.create_image(event.width // 2, event.height // 2, image=self.photo)

    def ask(self, event: object = None) -> None:
        question = self.question.get().strip()
        if self.request is not None or not question:
            return
        self.request = self.worker.submit(question, self.image, max_tokens=self.max_tokens)
        self.shown = 0
        self.answer.configure(state="normal")
        self.answer.delete("1.0", "end")
        self.answer.configure(state="disabled")
        self.ask_button.state(["disabled"])
        self.stop_button.state(["!disabled"])
        self.status["text"] = "Looking…"
        self.poll()

    def stop(self) -> None:
        if self.request is not None:
            self.request.cancel()

    def poll(self) -> None:
        """Shows what is new, and comes back until the request has ended."""
        request = self.request
        if request is None:
            return
        done, text = request.done, request.text  # in this order, or the last words may be missing
        self.answer.configure(state="normal")
        self.answer.insert("end", text[self.shown :])
        self.answer.configure(state="disabled")
        self.answer.see("end")
        self.shown = len(text)
        if done:
            self.finish(request)
        else:
            self.root.after(POLL, self.poll)

    def finish(self, request: PendingAnswer) -> None:
        self.request = None
        self.ask_button.state(["!disabled"])
        self.stop_button.state(["disabled"])
        try:
            request.result()
        except AnswerCancelled:
            self.status["text"] = "Stopped"
        except Exception as error:  # noqa: BLE001 - whatever it is, the user reads it
            self.status["text"] = f"{type(error).__name__}: {error}"
        else:
            last = request.responses[-1]
            self.status["text"] = f"{last.generation_tokens} tokens, {last.generation_tps:.0f}/s"
        if self.close_after:
            print(self.status["text"])
            self.root.destroy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="LiquidAI/LFM2.5-VL-450M", help="folder or repository")
    parser.add_argument("--image", required=True, help="path or URL")
    parser.add_argument("--prompt", help="asked at once")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--close-after-answer", action="store_true")
    args = parser.parse_args()
    image = load_image(args.image).convert("RGB")
    with Worker(args.model) as worker:
        root = tk.Tk()
        window = Window(root, worker, image, args.max_tokens, args.close_after_answer)
        window.question.insert(0, args.prompt or "What is in this image?")
        if args.prompt:
            root.after_idle(window.ask)
        root.mainloop()


if __name__ == "__main__":
    main()
