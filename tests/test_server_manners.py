"""The server under load, left alone by its clients, told to end, and asked by strangers."""

import asyncio
import http.server
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import openai
import pytest
from PIL import Image

from mlx_lfm2vl.cli.serve import main
from mlx_lfm2vl.generation.engine import Engine
from mlx_lfm2vl.serving.http import app, body, running, service

from .serving import PICTURE, WAIT, data_url, see, serving, until

ENDLESS = {"max_tokens": 100_000, "logit_bias": {"4": -100}, "temperature": 0}  # 4 ends answers


@pytest.fixture(scope="module")
def served():
    with serving(max_batch=4, context=200_000) as served:
        yield served


@pytest.fixture
def gate(served):
    """Keeps the worker busy until it is opened."""
    entered, opened = threading.Event(), threading.Event()

    def processor(tokens, logits):
        entered.set()
        assert opened.wait(WAIT)
        return logits

    served.service.worker.submit("?", max_tokens=1, logits_processors=[processor])
    assert entered.wait(WAIT)
    yield opened
    opened.set()


def is_quiet(served):
    thread = served.service.worker._thread
    return not (served.service.answers or served.service.runs or thread.active or thread.waiting)


def ask(client, text="Hello", **settings):
    return client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": text}], **settings
    )


# ---- clients that leave


def test_a_stream_that_is_closed_ends_its_answer(served):
    stream = ask(served.client(), stream=True, **ENDLESS)
    for _, chunk in zip(range(5), stream, strict=False):
        assert chunk.choices
    [run] = served.service.runs
    stream.close()
    until(lambda: is_quiet(served), 5)
    assert run.choices[0].pending.done
    assert len(run.choices[0].pending.responses) < 2000


def test_an_answer_that_nobody_waits_for_ends(served):
    with pytest.raises(openai.APITimeoutError):
        ask(served.client(timeout=0.5), **ENDLESS)
    until(lambda: is_quiet(served), 5)


def test_a_client_that_leaves_while_its_image_is_read(served, monkeypatch):
    opened = threading.Event()
    monkeypatch.setattr(served.service.images, "_bytes", lambda part: opened.wait(WAIT))
    with pytest.raises(openai.APITimeoutError):
        served.client(timeout=0.3).chat.completions.create(model="demo", messages=see())
    until(lambda: served.service.answers == 0, 5)
    opened.set()


def test_random_cancels_leave_nothing_behind(served):
    chance = random.Random(3)

    async def one(client, n):
        settings = {**ENDLESS, "max_tokens": 20, "stream": n % 2 == 0}
        messages = see(f"{n % 7}?") if n % 3 else [{"role": "user", "content": f"{n % 7}?"}]
        task = asyncio.create_task(
            client.chat.completions.create(model="demo", messages=messages, **settings)
        )
        await asyncio.sleep(chance.random() * 0.2)
        if chance.random() < 0.5:
            task.cancel()
        try:
            answer = await task
            if settings["stream"]:
                async for _ in answer:
                    if chance.random() < 0.1:
                        break
                await answer.close()
        except asyncio.CancelledError:
            return

    async def many():
        async with served.async_client(timeout=WAIT) as client:
            for start in range(0, 100, 20):
                await asyncio.gather(*(one(client, n) for n in range(start, start + 20)))

    before = ask(served.client(), max_tokens=8, temperature=0).choices[0].message.content
    asyncio.run(many())
    until(lambda: is_quiet(served))
    after = ask(served.client(), max_tokens=8, temperature=0).choices[0].message.content
    assert after == before


# ---- load


def test_a_full_queue_answers_at_once():
    with serving(max_batch=1, queue=1, context=200_000) as served:
        client = served.client()
        streams = [ask(client, stream=True, **ENDLESS) for _ in range(2)]
        next(iter(streams[0]))
        for _ in range(20):
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "queue_full"
        assert served.get("/health").status_code == 200
        for stream in streams:
            threading.Timer(0.3, stream.close).start()
        assert ask(served.client(max_retries=5), max_tokens=1).usage.completion_tokens == 1


def test_work_leaves_the_loop_free(served, monkeypatch):
    """What may take long is done in other threads than the one that answers everybody."""
    threads = {}

    def watch(place, name):
        plain = getattr(place, name)

        def watched(*arguments, **settings):
            threads.setdefault(name, set()).add(threading.current_thread())
            return plain(*arguments, **settings)

        monkeypatch.setattr(place, name, watched)

    for place, name in (
        (body, "parse"), (app, "read_chat"), (app.ChatWriter, "whole"), (app.ChatWriter, "end"),
        (served.service.images, "_bytes"), (served.service.images, "_process"),
        (service, "make_question"),
    ):  # fmt: skip
        watch(place, name)
    messages = see("?", data_url(Image.new("RGB", (70, 50), "teal")))  # not remembered yet
    for stream in (False, True):
        request = {"messages": messages, "max_tokens": 1, "stream": stream}
        assert served.post("/v1/chat/completions", request).status_code == 200
    assert len(threads) == 7
    assert all(served.thread not in found for found in threads.values())


def test_too_much_time(monkeypatch):
    with serving(request_timeout=0.5, context=200_000) as served:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(served.client(), **ENDLESS)
        assert caught.value.status_code == 504
        assert caught.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.APIError, match="no answer within") as late:
            list(ask(served.client(), stream=True, **ENDLESS))
        assert late.value.code == "timeout"
        until(lambda: is_quiet(served), 5)


def test_a_stream_shows_that_it_lives(served, gate, monkeypatch):
    monkeypatch.setattr(running, "KEEPALIVE", 0.05)
    request = {"messages": see(), "stream": True, "max_tokens": 1}
    with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=request) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["role"]
        found = [next(lines) for _ in range(6)]
        assert ": keepalive waiting" in found
        gate.set()
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]


def test_progress_of_a_long_prompt(monkeypatch):
    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "prefill_step_size", 64)
    seen = []
    with serving() as served:
        pending = served.service.worker.submit("word " * 300, max_tokens=1)
        while not pending.done:
            seen.append(pending.progress)
            time.sleep(0.002)
    done = [part for part in dict.fromkeys(seen) if part is not None]
    assert len(done) > 2
    assert done == sorted(done)
    assert {total for _, total in done} == {pending.usage.prompt_tokens}


def test_what_goes_wrong_in_a_stream_is_its_last_event(served, gate):
    client = served.client()
    for create, settings in (
        (client.chat.completions.create, {"messages": see("Hello")}),
        (client.responses.create, {"input": "Hello"}),
    ):
        with create(model="demo", stream=True, **settings) as stream:
            next(iter(stream))
            for run in served.service.runs:
                run.cancel("a test ends it")
            with pytest.raises(openai.APIError, match="a test ends it"):
                list(stream)


def test_an_answer_takes_one_place(served, monkeypatch):
    """Also while its request is still being read; others would be refused too early."""
    run, seen = served.service.run, []

    async def looking(*arguments):
        made = await run(*arguments)
        seen.append(served.service.answers)
        return made

    until(lambda: served.service.answers == 0)
    monkeypatch.setattr(served.service, "run", looking)
    for n in (1, 3):
        body = {"messages": see(), "n": n, "max_tokens": 40}
        assert served.post("/v1/chat/completions", body).status_code == 200
    assert seen == [1, 3]


def test_an_error_of_the_server_is_told_without_details(served, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.service.images, "read", broken)
    body = {"messages": see()}
    answer, entry = served.logged(lambda: served.post("/v1/chat/completions", body))
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret" in entry["error"]


# ---- the end


@pytest.fixture
def connect():
    """Makes clients and closes them."""
    clients = []

    def make(url):
        clients.append(openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@contextmanager
def program(*flags):
    """The command as a process, and its URL once it answers."""
    command = [sys.executable, "-m", "mlx_lfm2vl.serve", "--model", "demo", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", process.stderr.readline())[0]
        until(lambda: httpx2.get(f"{url}/health").status_code == 200)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_lets_answers_end(connect):
    with program("--context", "200000") as (process, url):
        client = connect(url)
        stream = ask(client, stream=True, **{**ENDLESS, "max_tokens": 400})
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="about to end"):
            ask(client)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait(WAIT) == 0
        lines = process.stderr.read().splitlines()
        assert any("/v1/chat/completions 200" in line for line in lines)
        assert not any("Traceback" in line for line in lines)


def test_sigterm_does_not_wait_for_ever(connect):
    with program("--context", "200000", "--timeout-graceful", "0.3", "--log-json") as (
        process, url,
    ):  # fmt: skip
        client = connect(url)
        stream = ask(client, stream=True, **ENDLESS)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server ends"):
            list(stream)
        assert process.wait(WAIT) == 0
        for line in process.stderr.read().splitlines():
            assert json.loads(line)["status"] in (200, 503)


def test_a_second_signal_ends_at_once(connect):
    with program("--context", "200000", "--timeout-graceful", "1000") as (process, url):
        client = connect(url)
        stream = ask(client, stream=True, **ENDLESS)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        until(lambda: httpx2.get(f"{url}/health").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        with pytest.raises((openai.APIError, httpx2.HTTPError)):
            list(stream)


# ---- strangers

PNG = PICTURE.read_bytes()


def bomb(side):
    """A small file of many pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "png")
    return file.getvalue()


def chat(messages, **more):
    return json.dumps({"messages": messages, **more}).encode()


def with_image(url):
    return chat(see("?", url))


HELLO = [{"role": "user", "content": "a"}]
DEEP = json.loads('{"items":' * 300 + "{}" + "}" * 300)
HOSTILE = {
    "nothing": (b"", 400),
    "broken": (b'{"messages": [', 400),
    "no object": (b"[]", 400),
    "a number": (b"1", 400),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', 400),
    "half a character": (chat([{"role": "user", "content": "\ud800"}]), 400),
    "deep": (b'{"messages": ' + b"[" * 1_000_000, 400),
    "deep and whole": (b'{"messages": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
    "a long number": (b'{"n": ' + b"9" * 100_000 + b"}", 400),
    "NaN": (b'{"temperature": NaN}', 400),
    "endless": (b'{"temperature": 1e999, "messages": [{"role":"user","content":"a"}]}', 400),
    "no messages": (b"{}", 400),
    "messages as a text": (chat("Hello"), 400),
    "an empty conversation": (chat([]), 400),
    "a message as a text": (chat(["Hello"]), 400),
    "an unknown role": (chat([{"role": "root", "content": "a"}]), 400),
    "no content": (chat([{"role": "user"}]), 400),
    "content of a wrong type": (chat([{"role": "user", "content": 3}]), 400),
    "an unknown item": (chat([{"role": "user", "content": [{"type": "input_audio"}]}]), 400),
    "an image without URL": (chat([{"role": "user", "content": [{"type": "image_url"}]}]), 400),
    "an image of the system": (chat([{**see()[0], "role": "system"}]), 400),
    "an empty image": (with_image("data:image/png;base64,"), 400),
    "no base64": (with_image("data:image/png;base64,%%%"), 400),
    "no image": (with_image("data:image/png;base64,AAAA"), 400),
    "half an image": (with_image(data_url(PNG[: len(PNG) // 2])), 400),
    "a large image": (with_image(data_url(bomb(11_000))), 413),
    "a bomb": (with_image(data_url(bomb(20_000))), 400),
    "a path": (with_image("/etc/passwd"), 400),
    "a file": (with_image("file:///etc/passwd"), 400),
    "gopher": (with_image("gopher://127.0.0.1"), 400),
    "this machine": (with_image("http://127.0.0.1:1/a.png"), 400),
    "this machine's name": (with_image("http://localhost:1/a.png"), 400),
    "this machine in hexadecimal": (with_image("http://0x7f000001/a.png"), 400),
    "this machine in IPv6": (with_image("http://[::ffff:127.0.0.1]/a.png"), 400),
    "metadata": (with_image("http://169.254.169.254/latest/meta-data"), 400),
    "a password": (with_image("http://me:secret@example.com/a.png"), 400),
    "many images": (chat(see("?", *[data_url()] * 17)), 400),
    "very many tiles": (
        chat(see("?"), image_options={"tile_size": 2048, "max_tiles": 100, "min_tiles": 100}), 400,
    ),
    "a very large view": (
        chat(see("?"), image_options={"max_image_tokens": 16384, "min_image_tokens": 16384}), 400,
    ),
    "a long prompt": (chat([{"role": "user", "content": "word " * 40_000}]), 400),
    "a deep schema": (
        chat(HELLO, response_format={"type": "json_schema", "json_schema": {"schema": DEEP}}), 400,
    ),
    "a large grammar": (
        chat([{"role": "user", "content": "a"}], regex="((a{1,1000}){1,1000}){1,1000}"), 200,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def strict():
    with serving(max_body=2_000_000) as served:
        yield served


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies(strict, name):
    content, status = HOSTILE[name]
    headers = {"content-type": "application/json"}
    answer, entry = strict.logged(
        lambda: strict.post("/v1/chat/completions", content=content, headers=headers)
    )
    assert answer.status_code == status, answer.text
    if status == 200:
        return
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"].splitlines()) == 1
    assert len(error["message"]) < 1000
    assert "error" not in entry, "a traceback"
    request = {"messages": HELLO, "max_tokens": 1}
    answer, _ = strict.logged(lambda: strict.post("/v1/chat/completions", request))
    assert answer.json()["usage"]["completion_tokens"] == 1


def test_bodies_that_are_too_large_or_of_another_kind(strict):
    def parts():
        for _ in range(100):
            yield b" " * 100_000

    headers = {"content-type": "application/json"}
    for content in (b" " * 2_000_001, parts()):
        try:
            answer = strict.post("/v1/chat/completions", content=content, headers=headers)
        except httpx2.WriteError:
            continue  # told while it was still being sent
        assert answer.status_code == 413
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = strict.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 415
    assert strict.get("/v1/chat/completions").status_code == 405
    assert strict.get("/v1/embeddings").status_code == 404
    assert strict.get("/../../etc/passwd").status_code == 404


def test_a_slow_body(strict, monkeypatch):
    monkeypatch.setattr(body.read_body, "__defaults__", (0.3,))
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        connection.sendall(head.encode())
        connection.settimeout(WAIT)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert strict.service.answers == 0


def test_names_and_origins(strict):
    for host, status in (
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("", 421),
        ("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:8080", 200),
        (socket.gethostname(), 200),
    ):  # fmt: skip
        assert strict.get("/health", headers={"host": host}).status_code == status, host
    origin = {"origin": "https://evil.example"}
    assert "access-control-allow-origin" not in strict.get("/v1/models", headers=origin).headers
    with serving(cors_origins=("https://good.example",), allowed_hosts=("good.example",)) as open_:
        assert open_.get("/health", headers={"host": "good.example"}).status_code == 200
        allowed = open_.get("/v1/models", headers={"origin": "https://good.example"}).headers
        assert allowed["access-control-allow-origin"] == "https://good.example"
        refused = open_.get("/v1/models", headers=origin).headers
        assert "access-control-allow-origin" not in refused


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(302 if "redirect" in self.path else 200)
        if "redirect" in self.path:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/a.png")
        self.end_headers()
        if "endless" in self.path:
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                return
        elif "redirect" not in self.path:
            self.wfile.write(PNG)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.daemon_threads = [], True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls(strict, site, monkeypatch):
    """No private address is reached: by its number, by a name, by a redirect."""
    from mlx_lfm2vl.prompts import url_reader

    def status(url, served=strict):
        return served.post("/v1/chat/completions", {"messages": see("?", url)}).status_code

    port = site.server_port
    address, find = f"http://127.0.0.1:{port}", socket.getaddrinfo

    def names(host, *arguments, **options):
        return find("127.0.0.1" if host.endswith(".example") else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", names)
    assert status(f"{address}/a.png") == status(f"http://name.example:{port}/a.png") == 400
    assert site.asked == []
    # as if the first address were public
    monkeypatch.setattr(url_reader, "_is_public", lambda ip: not site.asked)
    assert status(f"{address}/redirect") == 400
    assert site.asked == ["/redirect"]
    monkeypatch.undo()
    with serving(image_urls="any", max_body=300_000) as served:
        assert status(f"{address}/a.png", served) == 200
        assert status(f"{address}/redirect", served) == 200
        assert status(f"{address}/endless", served) == 400
    with serving(image_urls="off") as served:
        assert status("https://example.com/a.png", served) == 400


def test_files_only_under_the_media_root(strict, tmp_path):
    root, secret = tmp_path / "media", tmp_path / "secret.png"
    root.mkdir()
    (root / "a b.png").write_bytes(PNG)
    secret.write_bytes(PNG)
    (root / "link.png").symlink_to(secret)
    with serving(media_root=root) as served:

        def status(url):
            request = {"messages": see("?", url), "max_tokens": 1}
            return served.post("/v1/chat/completions", request).status_code

        assert status(f"file://{root}/a%20b.png") == status("file:a%20b.png") == 200
        for url in (f"file://{secret}", "file:../secret.png", f"file://{root}/../secret.png",
                    f"file://{root}/link.png", "file:link.png", "file:missing.png", "file:%00",
                    str(root / "a b.png")):  # fmt: skip
            assert status(url) == 400, url


def test_base64_as_clients_send_it(strict):
    url = data_url()
    spaced = url[:60] + "\n" + url[60:]
    safe = "data:image/png;base64," + url.partition(",")[2].replace("+", "-").replace("/", "_")
    for variant in (
        url.rstrip("="),
        spaced,
        safe,
        url.replace("base64", "BASE64"),
        url.upper()[:5] + url[5:],
    ):
        request = {"messages": see("?", variant)}
        answer = strict.post("/v1/chat/completions/input_tokens", request)
        assert answer.json()["image_tokens"] == [76]


# ---- the command line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--port", "70000"], "--port is 70000"),
        (["--max-batch", "0"], "--max-batch"),
        (["--media-root", "/nowhere"], "is no folder"),
        (["--cors-origin", "example.com"], "must look like https://"),
        (["--max-body", "much"], "must look like 64MB"),
        (["--api-key", "caf\u00e9"], "--api-key"),
        (["--model", "/nowhere", "--port", "0"], "/nowhere"),
        (["--host", "256.1.1.1", "--no-api-key"], "cannot be listened at"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as left:
        main(flags)
    assert left.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line
    assert line.startswith("mlx-lfm2vl-serve: error: ")


def test_a_port_in_use_and_a_missing_extra(served, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["--port", served.url.rpartition(":")[2]])
    assert "cannot be listened at" in capsys.readouterr().err
    monkeypatch.setattr("mlx_lfm2vl.cli.serve.NEEDED", ("starlette", "no_such_server"))
    with pytest.raises(SystemExit):
        main([])
    assert "pip install 'mlx-lfm2vl[server]'" in capsys.readouterr().err
