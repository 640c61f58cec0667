"""Asks several questions about one image, and shows each answer as it comes.

    python examples/many_questions.py --image examples/photos/coffee.png \\
        "What is on the table?" "Which colours do you see?"
"""

from __future__ import annotations

import argparse

from mlx_lfm2vl import Session, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="LiquidAI/LFM2.5-VL-450M", help="folder or repository")
    parser.add_argument("--image", required=True, help="path or URL")
    parser.add_argument("--max-tokens", type=int, default=200, help="of each answer")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    args = parser.parse_args()
    session = Session(*load(args.model))
    session.see(args.image)  # encoded and read once, here
    for question in args.questions:
        print(f"Q: {question}\nA: ", end="")
        for response in session.stream_ask(question, max_tokens=args.max_tokens):
            print(response.text, end="", flush=True)
        print("\n")


if __name__ == "__main__":
    main()
