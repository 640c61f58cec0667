"""A server in a thread of the tests' own process, and what its tests share."""

import base64
import io
import threading
import time
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import httpx2
import openai
from PIL import Image

from mlx_lfm2vl.cli.serve import _listen, make_server
from mlx_lfm2vl.serving.http import service as module
from mlx_lfm2vl.serving.http.options import ServerOptions
from mlx_lfm2vl.serving.http.service import Service

PICTURE = Path(__file__).parents[1] / "examples" / "demo" / "picture.png"
WAIT = 30
module.load = lru_cache(module.load)  # servers share models, which takes less time


class Served:
    """A running server.

    Attributes:
        service, server: its parts.
        url: without a slash at the end.
        log: an entry for each request.
    """

    def __init__(self, model="demo", **options):
        self.log, self.clients = [], []
        self.service = Service(str(model), ServerOptions(port=0, **options))
        self.server = make_server(self.service, self.log.append)
        listening = _listen(self.service.options)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()

    def client(self, **options):
        """A client that is closed with the server."""
        options = {"max_retries": 0, "api_key": "any", **options}
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **options))
        return self.clients[-1]

    def async_client(self, **options):
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="any", **{"max_retries": 0, **options}
        )

    def get(self, path, **options):
        return httpx2.get(self.url + path, **options)

    def post(self, path, body=None, **options):
        return httpx2.post(self.url + path, json=body, timeout=WAIT, **options)

    def logged(self, request):
        """The entry of a request in the log, which comes after the answer."""
        before = len(self.log)
        answer = request()
        found = []  # an entry of a request before may come late

        def comes():
            found[:] = [e for e in self.log[before:] if e["status"] == answer.status_code]
            return found

        until(comes)
        return answer, found[0]

    def stop(self):
        """A second signal, so that it ends at once."""
        for client in self.clients:
            client.close()
        for _ in range(2):
            self.server.handle_exit(15, None)
        self.thread.join(WAIT)
        self.service.close()
        assert not self.thread.is_alive()


@contextmanager
def serving(model="demo", wait=True, **options):
    """A server, ready unless one does not want to wait."""
    served = Served(model, **options)
    try:
        if wait:
            served.service.worker.wait_until_ready(WAIT)
        yield served
    finally:
        served.stop()


def until(condition, seconds=WAIT):
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.002)


def data_url(image=PICTURE, kind="png"):
    """A file's, encoded bytes' or a picture's `data:` URL."""
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, kind)
        image = file.getvalue()
    data = image if isinstance(image, bytes) else image.read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def see(text="What is in this image?", *urls):
    """A conversation about pictures."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls or [data_url()]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
