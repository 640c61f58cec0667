"""The server side by side with mlx-vlm's: the same checkpoint, the same requests, one run.

    python benchmarks/serving.py --model FOLDER --mlx-vlm-python OTHER_ENV/bin/python

Both run all the time, take turns, and are asked by the same plain HTTP client, greedily: one
answer alone, a second question of one client, and eight clients at once about one picture.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from mlx_lfm2vl.measuring.stages import made_picture

CLIENTS, TOKENS, LONG, ROUNDS = 8, 32, 32, 3
PEER = "mlx-vlm"
PATIENCE = 1200  # seconds


class Client:
    """Asks one server."""

    def __init__(self, model: str, port: int) -> None:
        self.model, self.port = model, port

    def request(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, path, text, {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask(self, messages: list[Any], max_tokens: int = TOKENS) -> dict[str, Any]:
        """Text, tokens, and seconds to the first and the last of them."""
        body = {
            "model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        begun = time.perf_counter()
        response = self.request("/v1/chat/completions", body)
        assert response.status == 200, response.read()
        text, times, tokens = "", [], 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            part = "".join(c["delta"].get("content") or "" for c in event["choices"])
            if part:
                times.append(time.perf_counter() - begun)
            text += part
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return {"text": text, "first": times[0], "last": times[-1], "tokens": tokens}


@contextmanager
def serving(python: str, module: str, model: str) -> Iterator[Client]:
    """A server, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", module, "--model", model, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = Client(model, port)
    try:
        while True:
            assert process.poll() is None, f"{module} has ended"
            try:
                if client.request("/health").status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        client.ask([{"role": "user", "content": "Hello"}], 4)  # weights are read, steps compiled
        yield client
    finally:
        process.terminate()
        process.wait()


def picture(width: int, height: int) -> str:
    """A `data:` URL of a drawn photo."""
    return "data:image/jpeg;base64," + base64.b64encode(made_picture(width, height)).decode()


def see(url: str, text: str) -> list[dict[str, Any]]:
    items = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": items}]


def stream(client: Client) -> dict[str, float]:
    answer = client.ask([{"role": "user", "content": "Tell a long story."}], LONG)
    return {"one stream, tokens/s": (answer["tokens"] - 1) / (answer["last"] - answer["first"])}


def turns(client: Client) -> dict[str, float]:
    conversation = see(picture(420, 300), "What is in this image?")
    first = client.ask(conversation)
    second = client.ask(see(picture(420, 300), "What colours do you see?"))
    conversation += [{"role": "assistant", "content": first["text"]}]
    conversation += [{"role": "user", "content": "Which of them is the brightest?"}]
    return {
        "first question to first token, s": first["first"],
        "second question to first token, s": second["first"],
        "second turn of a conversation to first token, s": client.ask(conversation)["first"],
    }


def crowd(client: Client) -> dict[str, float]:
    url, begun = picture(410, 310), time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        questions = [f"Question {n}: what do you see?" for n in range(CLIENTS)]
        answers = list(pool.map(lambda text: client.ask(see(url, text)), questions))
    return {
        f"{CLIENTS} clients, one picture, {TOKENS} tokens each, s": time.perf_counter() - begun,
        "- tokens": sum(answer["tokens"] for answer in answers),
        "- first token, median, s": statistics.median(answer["first"] for answer in answers),
    }


STAGES = {"stream": (stream, ROUNDS), "turns": (turns, 1), "crowd": (crowd, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mlx-vlm-python", help="Python of an environment with mlx-vlm")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    rivals = {"mlx_lfm2vl": (sys.executable, "mlx_lfm2vl.serve")}
    if args.mlx_vlm_python:
        rivals[PEER] = (args.mlx_vlm_python, "mlx_vlm.server")
    with ExitStack() as running:
        clients = [running.enter_context(serving(*rival, args.model)) for rival in rivals.values()]
        print("| |", " | ".join(rivals), "| ratio |")
        for stage, rounds in (STAGES[name] for name in args.stages):
            found = [[stage(client) for client in clients] for _ in range(rounds)]
            for row in found[0][0]:
                values = [
                    statistics.median(each[rival][row] for each in found)
                    for rival in range(len(clients))
                ]
                cells = " | ".join(f"{value:.3g}" for value in values)
                print(f"| {row} | {cells} | {values[0] / values[-1]:.3g} |", flush=True)


if __name__ == "__main__":
    main()
