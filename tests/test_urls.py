"""URLs of pictures: whatever a server does, there is a body or one line that names the URL."""

import contextlib
import random
import socket
import ssl
import struct
import threading
import time

import pytest

from mlx_lfm2vl import ImageError
from mlx_lfm2vl.prompts import url_reader
from mlx_lfm2vl.prompts.image_source import load_image
from mlx_lfm2vl.prompts.url_reader import _is_public, read_url

MAX_BYTES = 50_000
SECONDS = 0.3  # for everything that never ends


class Server:
    """Says what a script says: bytes, or seconds to wait; the script is found by the path."""

    def __init__(self):
        self.scripts = {}
        self.requests = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                threading.Thread(target=self.answer, args=(client,), daemon=True).start()

    def answer(self, client):
        with client, contextlib.suppress(OSError):
            client.settimeout(5)
            request = b""
            while b"\r\n\r\n" not in request:
                piece = client.recv(4096)
                if not piece:
                    return
                request += piece
            self.requests.append(request.decode("latin-1"))
            path = self.requests[-1].split()[1]
            for step in self.scripts.get(path, [b"HTTP/1.1 404 Not Found\r\n\r\n"]):
                if isinstance(step, bytes):
                    client.sendall(step)
                elif step is None:  # the connection breaks
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                else:
                    time.sleep(step)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.listener.close()


def read(url, **settings):
    return read_url(url, **{"max_bytes": MAX_BYTES, "seconds": SECONDS, **settings})


def refusal(url, **settings) -> str:
    """The line that names the URL."""
    with pytest.raises(ImageError) as error_info:
        read(url, **settings)
    line = str(error_info.value)
    assert "\n" not in line
    assert line.isprintable()
    assert "cannot be fetched: " in line
    if url.isprintable():
        assert url in line
    return line


def answer(status=b"200 OK", headers=(), body=b"") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *headers, b"", body])


def chunks(rng, body) -> bytes:
    coded = b""
    while body:
        size = rng.randint(1, 20_000)
        coded += b"%x\r\n%s\r\n" % (len(body[:size]), body[:size])
        body = body[size:]
    return coded + b"0\r\n\r\n"


def endless(piece, seconds=0.0):
    def script():
        for _ in range(2000):
            yield piece
            if seconds:
                yield seconds

    return script()


def well(rng, server, number):
    """A good answer of one of many kinds; its script and its body."""
    body = rng.randbytes(rng.choice([1, 100, 20_000, MAX_BYTES]))
    length = b"Content-Length: %d" % len(body)
    kind = rng.randrange(6)
    if kind == 0:
        data = answer(headers=[length], body=body)
    elif kind == 1:
        data = answer(headers=[b"Transfer-Encoding: chunked"], body=chunks(rng, body))
    elif kind == 2:
        data = answer(headers=[], body=body)
    elif kind == 3:
        data = b"HTTP/1.1 100 Continue\r\n\r\n" + answer(headers=[length], body=body)
    elif kind == 4:
        data = answer(headers=[length, *[b"X-%d: y" % n for n in range(60)]], body=body)
    else:
        hops = rng.randint(1, 3)
        for hop in range(hops):
            place = b"/good-%d-%d" % (number, hop)
            full = rng.choice([b"", server.url.encode()]) + place
            to_here = answer(rng.choice([b"301 M", b"302 F", b"307 T"]), [b"Location: " + full])
            server.scripts[f"/good-{number}-{hop - 1}" if hop else f"/{number}"] = [to_here]
        server.scripts[place.decode()] = [answer(headers=[length], body=body)]
        return None, body
    cuts = sorted(rng.sample(range(len(data)), min(len(data), rng.randint(0, 4))))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)], body


def ill(rng, server):
    """An answer that cannot become a body."""
    body = rng.randbytes(rng.randint(1, 1000))
    few = rng.randint(1, 400)
    chunked = [b"Transfer-Encoding: chunked"]
    bad_size = rng.choice([b"zz", b"-1", b"-5", b"", b"7fffffffffffffff", b"1" * 5000, b"\xff"])
    return rng.choice(
        [
            [],
            [None],
            [rng.randbytes(200)],
            [b"HTTP/1.1\r\n\r\n"],
            [b"HTTP/1.1 abc OK\r\n\r\n"],
            [b"HTTP/1.1 200 " + b"x" * 70_000],
            [b"HTTP/7.0 200 OK\r\n\r\n" + body],
            [answer(b"%d Odd\x1b[31m" % rng.choice([204, 206, 304, 400, 404, 418, 500, 999]))],
            [answer(headers=[b"Content-Length: %d" % (len(body) + few)], body=body)],
            [answer(headers=[b"Content-Length: %d" % 10 ** rng.randint(5, 30)], body=body)],
            [answer(headers=[b"X: " + b"y" * 70_000], body=body)],
            [answer(headers=[b"X-%d: y" % n for n in range(150)], body=body)],
            [answer(headers=chunked, body=b"%x\r\n%s" % (len(body) + few, body))],
            [answer(headers=chunked, body=bad_size + b"\r\n" + body), None],
            [answer(headers=chunked, body=b"5\r\nhello")],
            [answer(headers=[b"Content-Length: 1000"], body=body[:9]), None],
            [answer(b"302 Found", [b"Location: " + rng.choice(BAD_PLACES)])],
            [answer(b"301 Moved")],
        ]
    )


BAD_PLACES = [
    b"ftp://127.0.0.1/x",
    b"file:///etc/passwd",
    b"gopher://x",
    b"http://",
    b"http://127.0.0.1:99999/",
    b"http://[::1/",
    b"javascript:1",
    b"http://a b/",
    b"http://user:word@127.0.0.1/",
    b"/again/\xe9 x?y",
    b"\xff",
]


def test_three_hundred_servers(server):
    rng = random.Random(7)
    good = bad = 0
    start = time.monotonic()
    for number in range(300):
        path = f"/{number}"
        if number % 2:
            server.scripts[path] = ill(rng, server)
            refusal(server.url + path)
            bad += 1
            continue
        script, body = well(rng, server, number)
        if script is not None:
            server.scripts[path] = script
        assert read(server.url + path, seconds=5) == body
        good += 1
        if script is not None and number % 3 == 0:  # and with some of its bytes changed
            data = bytearray(b"".join(script))
            for _ in range(3):
                data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
            server.scripts[path] = [bytes(data)]
            with contextlib.suppress(ImageError):
                assert len(read(server.url + path)) <= MAX_BYTES
    assert (good, bad) == (150, 150)
    assert time.monotonic() - start < 12


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (lambda: endless(b"x" * 8192), "more than 50000 bytes"),
        (lambda: [answer(headers=[b"Transfer-Encoding: chunked"], body=b"-1\r\n"),
                  *endless(b"x" * 2**16)], ""),
        (lambda: [answer(headers=[b"Transfer-Encoding: chunked"]), *endless(b"1\r\nx\r\n" * 999)],
         "more than"),
        (lambda: [answer(headers=[b"Transfer-Encoding: chunked"], body=b"0\r\n"),
                  *endless(b"X: y\r\n" * 9999)], "far more than"),
        (lambda: endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 99), "far more than"),
        (lambda: [answer(headers=[b"Content-Length: 900"]), *endless(b"x", 0.05)], "0.3 seconds"),
        (lambda: [answer(headers=[]), *endless(b"x", 0.05)], "0.3 seconds"),
        (lambda: [answer(headers=[]), *endless(b"x", 0.0003)], "0.3 seconds"),
        (lambda: endless(b"H", 0.05), "0.3 seconds"),
        (lambda: [b"HTTP/1.1 200 OK\r\nX:", *endless(b"y", 0.05)], "0.3 seconds"),
        (lambda: [5.0], "0.3 seconds"),
    ],
)  # fmt: skip
def test_servers_without_an_end(steps, expected, server):
    if expected.startswith("more than 5"):
        server.scripts["/endless"] = [answer(), *steps()]
    else:
        server.scripts["/endless"] = steps()
    start = time.monotonic()
    # bytes run out long before so much time, also on a busy machine
    patience = {"seconds": 20.0} if "more than" in expected else {}
    assert expected in refusal(f"{server.url}/endless", **patience)
    assert time.monotonic() - start < (20 if patience else 2)


def test_redirects_share_the_time_and_are_counted(server):
    for hop in range(4):
        server.scripts[f"/hop{hop}"] = [answer(b"302 F", [b"Location: /hop%d" % (hop + 1)])]
    server.scripts["/hop4"] = [answer(body=b"end")]
    assert read(f"{server.url}/hop1") == b"end"
    assert "redirected more than 3 times" in refusal(f"{server.url}/hop0")
    server.scripts["/hop1"] = [0.2, *server.scripts["/hop1"]]
    server.scripts["/hop2"] = [0.2, *server.scripts["/hop2"]]
    assert "0.3 seconds" in refusal(f"{server.url}/hop1")


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x.png",
        "http://127.0.0.1:bad/x.png",
        "http://127.0.0.1:99999/x.png",
        "http://127.0.0.1:-1/",
        "http://127.0.0.1:9/x.png",
        "http://[::1/x.png",
        "http://[zz]/x.png",
        "http://a b/x.png",
        "http://ab/",
        "http://a\0b/x.png",
        "http://" + "a" * 300 + "/x.png",
        "http://a..b/x.png",
        "http://user:word@127.0.0.1/x.png",
        "http://127.0.0.1:9/a b\r\nHost: evil\r\n\r\n",
        "http://127.0.0.1:9/\udcff.png",
        "ftp://127.0.0.1/x.png",
        "file:///etc/passwd",
        "x.png",
        "",
    ],
)
def test_urls_that_lead_nowhere(url):
    refusal(url)


def test_passwords_are_refused_not_ignored(server):
    server.scripts["/x"] = [answer(body=b"found")]
    assert "without a user name" in refusal(f"http://user:word@127.0.0.1:{server.port}/x")


def test_spaces_and_letters_are_quoted(server):
    server.scripts["/a%20b/%C3%A9%25.png?q=%C3%BC%20%7C&z=1"] = [answer(body=b"found")]
    assert read(f"{server.url}/a b/é%25.png?q=ü |&z=1#part") == b"found"
    assert "User-Agent: mlx-lfm2vl\r\n" in server.requests[-1]
    assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in server.requests[-1]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *[(a, True) for a in ("8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8")],
        *[(a, False) for a in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "0.0.0.0")],
        *[(a, False) for a in ("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255")],
        *[(a, False) for a in ("::1", "::", "fe80::1%lo", "fc00::1", "fec0::1", "ff02::1")],
        *[(a, False) for a in ("::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "::7f00:1")],
    ],
)
def test_public_addresses(address, public):
    assert _is_public(address) == public


def test_strangers_reach_no_private_address(server):
    before = len(server.requests)
    hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"]
    for host in hosts:
        line = refusal(f"http://{host}:{server.port}/x.png", addresses="public")
        assert "is not a public address" in line
        refusal(f"http://{host}:{server.port}/x.png", addresses="Public")
    assert len(server.requests) == before


def test_a_redirect_never_leads_from_public_to_private(server, monkeypatch):
    server.scripts["/out"] = [answer(b"302 F", [b"Location: /in"])]
    server.scripts["/in"] = [answer(body=b"secret")]
    assert read(f"{server.url}/out") == b"secret"
    first = iter([True])
    monkeypatch.setattr(url_reader, "_is_public", lambda address: next(first, False))
    assert "is not a public address" in refusal(f"{server.url}/out")


@pytest.fixture
def names(monkeypatch, server):
    """Every name leads to the server; what was looked up."""
    found = []

    def look_up(host, port, *_, **kind):
        if host != "127.0.0.1":
            found.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return found


def test_a_name_is_looked_up_once_and_kept_for_the_server(names, server):
    server.scripts["/x"] = [answer(body=b"found")]
    assert read("http://pictures.example/x") == b"found"
    assert names == ["pictures.example"]
    assert "\r\nHost: pictures.example\r\n" in server.requests[-1]
    assert read("http://bücher.example:81/x") == b"found"
    assert "\r\nHost: xn--bcher-kva.example:81\r\n" in server.requests[-1]


def test_tls_checks_the_name(names, server, monkeypatch):
    server.scripts["/x"] = [answer(body=b"found")]
    # no certificate: the server does not even speak TLS
    refusal("https://pictures.example/x")
    asked = []

    class Context:
        def wrap_socket(self, sock, server_hostname):
            asked.append(server_hostname)
            return sock

    monkeypatch.setattr(ssl, "create_default_context", Context)
    assert read("https://pictures.example/x") == b"found"
    assert asked == ["pictures.example"]


def test_a_silent_name_server(monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(5))
    start = time.monotonic()
    assert "0.3 seconds" in refusal("http://pictures.example/x")
    assert time.monotonic() - start < 1
    done.set()


def test_a_picture_by_its_url(server):
    with pytest.raises(ImageError, match="the server answers 404 Not Found"):
        load_image(f"{server.url}/nothing.png")
    server.scripts["/text.png"] = [answer(body=b"no picture")]
    url = f"HTTP{server.url[4:]}/text.png"
    with pytest.raises(ImageError, match=f"{url} is not an image"):
        load_image(url)
