"""Watching: frames, the gate, what is asked and written, and what goes wrong meanwhile."""

import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mlx_lfm2vl import (
    ConfigError,
    Gate,
    PromptError,
    SourceError,
    Worker,
    detect,
    frames,
    generate,
    load,
    watch,
)
from mlx_lfm2vl.cli import watch as command
from mlx_lfm2vl.serving import frames as module
from mlx_lfm2vl.serving import watch as watch_module
from mlx_lfm2vl.serving.frames import Frames, Source

from . import films
from .checkpoints.pictures import picture
from .helpers import FIXTURES, WAIT
from .helpers import Gate as Held

write_film = partial(films.write_film, rate=25, codec="mpeg4", bit_rate=4_000_000)
ROOT = Path(__file__).parents[1]
V5 = FIXTURES / "v5"
EVENTS = (70, 150, 230)  # frames of the film in which something appears
SETTLED = [frame + 8 for frame in (0, *EVENTS)]  # 0.3 s later
QUESTION = ("--model", V5, "--ask", "What is it?", "-m", "2")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """300 frames with noise, a lamp that flickers, a cursor that blinks, and three events."""
    rng, images = np.random.default_rng(0), []
    noise = rng.normal(0, 6, (8, 360, 640, 3)).astype(np.int16)
    for number in range(300):
        image = Image.new("RGB", (640, 360), (200, 200, 200))
        draw = ImageDraw.Draw(image)
        if number >= EVENTS[0]:
            draw.text((40, 40), "error: the disk is full", fill="black", font_size=26)
        if number >= EVENTS[1]:
            draw.rectangle((500, 100, 550, 140), fill="yellow")
        if number >= EVENTS[2]:
            draw.ellipse((300, 200, 350, 250), fill=(120, 120, 160))
        if number // 15 % 2:
            draw.rectangle((20, 300, 23, 318), fill="black")
        light = np.roll(noise[number % 8], number, 0) + round(2 * np.sin(number / 7))
        images.append(Image.fromarray((image + light).clip(0, 255).astype(np.uint8)))
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", images)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """30 frames, each different from all others."""
    images = [Image.fromarray(picture(64, 48, number)) for number in range(30)]
    return write_film(tmp_path_factory.mktemp("short") / "short.mkv", images)


@pytest.fixture(scope="module")
def worker():
    with Worker(V5, "float32") as worker:
        yield worker


@pytest.fixture
def run(capfd):
    """Runs the command in this process; returns (exit code, lines, lines of standard error)."""

    def call(*arguments, flags=QUESTION):
        with pytest.raises(SystemExit) as end:
            command.main([str(part) for part in (*flags, *arguments)])
        out, err = capfd.readouterr()
        return end.value.code, out.splitlines(), err.splitlines()

    return call


def entries(path):
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def numbers(path):
    return [entry["frame"] for entry in entries(path)]


def of_color(shade, size=(64, 36)):
    return Image.new("RGB", size, (shade, shade, shade))


# ---- the gate


@pytest.fixture(scope="module")
def looked(film):
    """What the gate asks about in the film, the gate, and the mean brightness of each frame."""
    gate, asked, means = Gate(), [], []
    with frames(film) as source:
        for frame in source:
            means.append(np.asarray(frame.image.convert("L")).mean())
            if gate(frame.image, frame.seconds):
                asked.append(frame.number)
    return asked, gate, means


def test_the_gate_finds_each_event_and_little_else(looked):
    asked, gate, _ = looked
    assert asked == SETTLED
    assert not gate.end()
    assert len(asked) / 300 < 0.03


def test_mean_brightness_finds_no_event(looked):
    """Why the gate compares areas: the lamp changes the mean more than any event does."""
    _, _, means = looked
    threshold = np.ptp(means[: EVENTS[0]])  # lower ones find the lamp instead
    asked, found = means[0], []
    for number, mean in enumerate(means):
        if abs(mean - asked) > threshold:
            asked = mean
            found.append(number)
    assert found == []


def test_a_change_is_asked_about_when_it_has_settled():
    gate = Gate(settle=0.3)
    shades = [0, 0, 0, 0, 50, 50, 100, 100, 100, 100, 100, 0, 100]
    asked = [i for i, shade in enumerate(shades) if gate(of_color(shade), i / 10)]
    assert asked == [3, 9]
    assert gate.share == 0
    assert gate(of_color(0), 1.3) is False, "it has just come"
    assert gate.share == 1
    assert gate.end(), "no other follows in which it could settle"
    assert not gate.end()


def test_a_picture_that_never_settles_is_asked_about_when_patience_ends():
    gate = Gate(settle=0.3, patience=1)
    assert [i for i in range(31) if gate(of_color(8 * i), i / 10)] == [10, 22]


@pytest.mark.parametrize(
    ("pixels", "levels", "asked"),
    [(115, 14, False), (116, 14, True), (5000, 12, False), (5000, 13, True)],
)
def test_how_much_must_change(pixels, levels, asked):
    """More than 0.2 % of 320x180 pixels by more than 12 grey levels."""
    gate = Gate(settle=0)
    gate.take(Image.new("L", (320, 180), 100), 0)
    changed = np.full(320 * 180, 100, np.uint8)
    changed[:pixels] += levels
    assert gate(Image.fromarray(changed.reshape(180, 320)), 1) is asked


def test_slow_changes_add_up():
    """Each picture is like the one before, but not like the one that was asked about."""
    gate = Gate(settle=0)
    asked = [shade for shade in range(0, 60, 4) if gate(of_color(shade), shade)]
    assert asked == [0, 16, 32, 48]


def test_every_and_zero_change():
    gate = Gate(changed=0, every=0.5)
    assert [i for i in range(13) if gate(of_color(0), i / 10)] == [0, 5, 10]
    gate = Gate(settle=0, every=1)
    assert [i for i in range(5) if gate(of_color(50 * i), i * 0.6)] == [0, 2, 4]


@pytest.mark.parametrize(
    "wrong", [{"changed": 1.5}, {"settle": -1}, {"level": 0.5}, {"every": "1"}]
)
def test_gates_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} is .* must be "):
        Gate(**wrong)


# ---- frames


def test_a_film_gives_every_frame(short):
    with frames(short) as source:
        found = list(source)
    assert [frame.number for frame in found] == list(range(30))
    assert [frame.seconds for frame in found] == pytest.approx(
        [i / 25 for i in range(30)], abs=2e-3
    )
    assert {(frame.image.mode, frame.image.size) for frame in found} == {("RGB", (64, 48))}
    later = list(frames(short, start=20))
    assert [frame.number for frame in later] == list(range(20, 30))
    assert all(map(np.array_equal, *([f.image for f in part] for part in (found[20:], later))))


def test_a_film_is_upright(tmp_path):
    image = Image.new("RGB", (64, 32))
    image.paste("white", (0, 0, 64, 8))
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write turned films")
        stream.set_display_rotation(90)
        film.mux(stream.encode(av.VideoFrame.from_image(image)))
        film.mux(stream.encode())
    [frame] = frames(path)
    assert frame.image.size == (32, 64)
    columns = np.asarray(frame.image.convert("L")).mean(0)
    assert columns[:6].min() > 180, "counterclockwise: what was above is at the left"
    assert columns[10:].max() < 80


def test_a_film_in_real_time_drops_what_nobody_takes():
    with frames("lavfi:testsrc=size=64x48:rate=100:duration=0.5", realtime=True) as source:
        begun, found = time.monotonic(), []
        for frame in source:
            found.append(frame)
            time.sleep(0.1)
    assert time.monotonic() - begun > 0.4
    assert found[-1].number == 49, "the last one is never dropped"
    assert len(found) + source.dropped == 50
    assert 2 <= len(found) <= 8


def test_a_forgotten_source_is_let_go(monkeypatch):
    source = frames("lavfi:testsrc=size=64x48:rate=100", realtime=True)
    thread = source._newest.thread
    next(source)
    del source
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("no/such.mp4", "no/such.mp4 does not exist; a source is camera"),
        ("screen@1,2", "screen@1,2 does not exist; a source is camera"),
        ("screen@0,0,0,9", "screen@0,0,0,9 is empty; width and height must be 1 or more"),
        ("gopher://host/film", "gopher://host/film does not exist; a source is"),
        ("", " does not exist; a source is"),
        ("/dev/null", "/dev/null is neither a film nor a folder"),
        ("lavfi:nonsense", "lavfi:nonsense cannot be opened: "),
        ("rtsp://me:secret@127.0.0.1:9/x", "rtsp://127.0.0.1:9/x cannot be opened: "),
        (__file__, f"{__file__} cannot be opened: Invalid data"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be(source, told):
    with pytest.raises(SourceError) as error:
        next(frames(source))
    assert told in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "library"), [("camera", "av"), (__file__, "av"), ("screen", "mss")]
)
def test_missing_libraries(source, library, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=rf'^{library} .*pip install "mlx-lfm2vl\[video\]"'):
        frames(source)


def test_sound_is_no_film(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        film.mux(stream.encode(sound))
    with pytest.raises(SourceError, match=r"sound.wav holds no pictures$"):
        next(frames(path))


def test_a_damaged_film_continues_and_a_torn_one_ends(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    whole = write_film(tmp_path / "a.mp4", [*map(Image.fromarray, noise)], codec="libx264")
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    whole.write_bytes(data)
    told = []
    found = list(frames(whole, tell=told.append))
    assert 10 <= len(found) < 20
    assert len(told) == 1
    assert "a.mp4 is damaged: Invalid data" in told[0]
    torn = write_film(tmp_path / "b.avi", [*map(Image.fromarray, noise)])
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    assert 5 <= len(list(frames(torn))) < 20
    whole.write_bytes(data[:middle])
    with pytest.raises(SourceError, match=r"a.mp4 cannot be opened"):
        next(frames(whole))


def test_a_folder_gives_each_picture_once_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.02)
    for name in ("b.png", "a.png", ".hidden.png"):
        of_color(50).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    told = []
    with frames(tmp_path, known={"a.png"}, tell=told.append) as source:
        assert os.path.basename(next(source).path) == "b.png"
        data = (tmp_path / "a.png").read_bytes()
        with (tmp_path / "c.png").open("wb", buffering=0) as file:
            for start in range(0, len(data), 20):  # somebody writes slowly, but never rests
                file.write(data[start : start + 20])
                assert source.poll() is None
        frame = next(source)
        assert (os.path.basename(frame.path), frame.number) == ("c.png", 1)
        (tmp_path / "d.png").write_bytes(data[: len(data) // 2])
        while not told:
            assert source.poll() is None
        assert [source.poll() for _ in range(4)] == [None] * 4
        [line] = told
        assert "d.png is damaged" in line
        (tmp_path / "d.png").write_bytes(data)
        assert os.path.basename(next(source).path) == "d.png"
        shutil.rmtree(tmp_path)
        with pytest.raises(SourceError, match="cannot be searched: No such file"):
            next(source)


def test_cameras_take_the_first_frame_rate_that_works(monkeypatch):
    opened, tried = av.open, []

    def open_camera(device, format, options, timeout):
        tried.append((device, format, options["framerate"]))
        if options["framerate"] != "15":
            raise av.error.ArgumentError(22, "Invalid argument", device)
        return opened("testsrc=size=64x48:rate=100", format="lavfi")

    monkeypatch.setattr(av, "open", open_camera)
    monkeypatch.setattr(sys, "platform", "darwin")
    with frames("camera:1") as camera:
        assert next(camera).image.size == (64, 48)
    assert tried == [("1", "avfoundation", rate) for rate in ("30", "25", "15")]


@pytest.mark.parametrize(
    ("platform", "told"),
    [
        ("darwin", "if your terminal is not allowed to, allow it in System Settings, Privacy & "
         "Security, Camera, and start that again"),
        ("linux", "your user must be in the group video"),
    ],
)  # fmt: skip
def test_permissions_are_explained(platform, told, monkeypatch):
    def refuse(device, **options):
        raise av.error.PermissionError(13, "Permission denied", device)

    monkeypatch.setattr(av, "open", refuse)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    with pytest.raises(SourceError) as error:
        next(frames("camera"))
    assert str(error.value) == f"camera cannot be opened: Permission denied; {told}"


def test_macos_is_asked_whether_screens_may_be_captured(monkeypatch):
    monkeypatch.setattr(module, "_may_capture_screen", lambda: False)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SourceError, match="Privacy & Security, Screen Recording, and start that"):
        next(frames("screen"))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has cameras")
def test_a_camera_that_is_not_there():
    with pytest.raises(SourceError, match=r"^camera:63 is not there: /dev/video63 does not exist$"):
        next(frames("camera:63"))


class Script:
    """A camera that does what a test says; in place of av.open."""

    def __init__(self, monkeypatch, *steps):
        monkeypatch.setattr(os.path, "exists", lambda path: True)
        monkeypatch.setattr(av, "open", self.open)
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
        self.steps, self.opened, self.duration = list(steps), 0, None
        self.streams = self
        self.video = [None]
        self.left = threading.Semaphore(0)

    def open(self, device, **options):
        self.opened += 1
        step = self.steps.pop(0) if self.steps else []
        if isinstance(step, Exception):
            raise step
        self.step = iter(step)
        return self

    def demux(self, stream):
        for item in self.step:
            if callable(item):
                item()
            elif isinstance(item, Exception):
                raise item
            else:
                yield Packet(item)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


class Packet:
    rotation = 0

    def __init__(self, image):
        self.image = image

    def decode(self):
        return [self]

    def to_image(self):
        return self.image


def test_a_camera_that_breaks_off_is_opened_again(monkeypatch):
    gone = av.error.OSError(19, "No such device")
    later = av.error.BlockingIOError(11, "Resource temporarily unavailable")
    taken = threading.Semaphore(0)
    wait = partial(taken.acquire, timeout=WAIT)
    one, two, three = map(of_color, (10, 20, 30))
    script = Script(
        monkeypatch, [one, wait, later, two, wait, gone], gone, gone, gone, gone, gone, gone,
        [three, wait], gone, gone, gone, [one, wait],
    )  # fmt: skip
    told, found = [], []
    with frames("camera", tell=told.append) as camera:
        for frame in camera:
            found.append((frame.number, frame.image.getpixel((0, 0))[0]))
            taken.release()
            if len(found) == 4:
                break
    assert found == [(0, 10), (1, 20), (2, 30), (3, 10)]
    again = "trying again until it is back"
    assert told == [
        f"camera has broken off: No such device; {again}", "camera is back",
        f"camera has broken off; {again}", "camera is back",
    ]  # fmt: skip
    assert script.opened == 12, "the first frame rate of a camera is tried again, then the others"


def test_a_source_that_stalls_is_told_once(monkeypatch):
    monkeypatch.setattr(module, "STALL", 0.05)
    resume, taken = threading.Event(), threading.Event()
    hold = partial(resume.wait, WAIT)
    Script(monkeypatch, [of_color(1), hold, of_color(2), partial(taken.wait, WAIT)])
    told = []
    with frames("camera", tell=told.append) as camera:
        next(camera)
        for _ in range(10):
            assert camera.poll(0.02) is None
        assert told == ["camera gives no picture for 0 s; waiting"]
        resume.set()
        assert next(camera).number == 1
        taken.set()


class Streams(http.server.BaseHTTPRequestHandler):
    """Films over HTTP, each once, of unknown length or not."""

    def do_GET(self):
        data = self.server.films.pop(0)
        self.send_response(200)
        if self.path == "/film.mkv":
            self.send_header("Content-Length", len(data))
        self.end_headers()
        self.wfile.write(data)
        if self.path == "/slow.ts":
            self.wfile.flush()
            assert self.server.done.wait(WAIT)

    def log_message(self, *args):
        pass


def test_streams(tmp_path, monkeypatch):
    """One of unknown length is opened again, also of another size; one with a length ends."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    films = []
    for number, size in enumerate(((64, 48), (96, 64))):
        images = [of_color(50 * number + i, size) for i in range(30)]
        path = write_film(tmp_path / f"{number}.ts", images, codec="mpeg2video")
        films.append(path.read_bytes())
    slow = films[0]
    whole = write_film(tmp_path / "film.mkv", [of_color(i) for i in range(30)])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Streams)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url, server.films, told, sizes = f"http://127.0.0.1:{server.server_port}", films, [], []
    with frames(f"{url}/live.ts", tell=told.append) as stream:
        for frame in stream:
            sizes.append(frame.image.size)
            if frame.image.size == (96, 64):
                break
    assert sizes[0] == (64, 48)
    assert told == [
        f"{url}/live.ts has broken off: Input/output error; trying again until it is back",
        f"{url}/live.ts is back",
    ]
    server.films = [whole.read_bytes()]
    with frames(f"{url}/film.mkv") as stream:
        assert list(stream)[-1].number == 29
    monkeypatch.setattr(module, "NETWORK_TIMEOUT", 1)
    server.films, server.done, told = [slow], threading.Event(), []
    with frames(f"{url}/slow.ts", tell=told.append) as stream:
        next(stream)
        while not told:
            stream.poll()
    again = "trying again until it is back"
    assert told == [f"{url}/slow.ts has broken off: nothing comes within 1 s; {again}"]
    server.done.set()
    server.shutdown()
    server.server_close()


# ---- asking


def scripted(monkeypatch, *images, numbers=None):
    """Lets `watch` see these pictures, 0.1 s apart, as fast as it takes them."""
    source = [module.Frame(image, i / 10, i) for i, image in enumerate(images)]

    class Played(Frames):
        def __init__(self):
            self.source, self.ended, self.left = Source("lavfi", "script", ""), False, list(source)

        dropped = 0

        def poll(self, seconds=0):
            self.ended = not self.left
            return self.left.pop(0) if self.left else None

        def close(self):
            pass

    monkeypatch.setattr(watch_module, "frames", lambda *args, **options: Played())


def test_answers_are_those_of_generate_and_detect(tmp_path):
    model, processor = load("demo")
    worker = Worker(load=lambda: (model, processor))
    image = Image.open(ROOT / "examples" / "demo" / "picture.png").convert("RGB")
    image.save(tmp_path / "picture.png")

    def first(*args, **options):
        return next(iter(watch(worker, tmp_path, *args, **options)))

    question = "What is in this image?"
    seen = first(question, max_tokens=20, temperature=0)
    assert seen.answer == generate(model, processor, question, image, max_tokens=20, temperature=0)
    assert (seen.path, seen.frame, seen.changed) == (str(tmp_path / "picture.png"), 0, 1)
    seen = first(detect=["yellow square", "green cross"])
    boxes = detect(model, processor, image, ["yellow square", "green cross"])
    assert boxes
    assert seen.boxes == boxes
    assert seen.to_dict()["boxes"] == [box.to_dict() for box in boxes]
    assert seen.answer == "; ".join(map(str, boxes))
    seen = first(question, system="Be brief.", choice=["yes", "no"])
    assert seen.answer in ("yes", "no")
    form = {"type": "object", "properties": {"n": {"enum": [7]}}, "required": ["n"]}
    assert first(question, schema=form).to_dict()["value"] == {"n": 7}
    small = image.copy()
    small.thumbnail((100, 100))
    seen = first(question, max_side=100, max_tokens=20, temperature=0)
    assert seen.answer == generate(model, processor, question, small, max_tokens=20, temperature=0)
    assert seen.image.size == image.size
    worker.close()


def test_the_newest_frame_is_answered_and_nothing_waits(monkeypatch, worker):
    """While an answer grows, frames come and go; the one after it is about the last of them."""
    held, forty, done = Held(), threading.Event(), threading.Event()
    waiting = []

    def hold(tokens, logits):
        if not forty.is_set():
            held.opened = forty
        waiting.append((len(worker._thread.waiting), worker.active))
        return held(tokens, logits)

    def wait_until_asked():
        assert held.entered.wait(WAIT)

    steps = [of_color(0), wait_until_asked, *(of_color(3 * i) for i in range(1, 81))]
    Script(monkeypatch, [*steps, forty.set, partial(done.wait, WAIT)])
    found = []
    for sighting in watch(worker, "camera", "?", changed=0, max_tokens=1, logits_processors=[hold]):
        found.append(sighting)
        if len(found) == 2:
            done.set()
            break
    assert [sighting.frame for sighting in found] == [0, 80]
    assert found[1].dropped == 79
    assert np.asarray(found[1].image).max() == 240
    assert set(waiting) == {(0, 1)}, "one answer grows, no question waits"


def memory():
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_stays_flat():
    """Over 2,000 frames of a source that is faster than the model."""
    sizes = []
    graph = "lavfi:testsrc2=size=160x120:rate=600:duration=3.34"
    watching = watch(
        "demo", graph, "What is it?", realtime=True, changed=0, max_tokens=4,
        look=lambda frame: sizes.append((frame.number, memory())),
    )  # fmt: skip
    asked = [sighting.frame for sighting in watching]
    assert watching.frames + watching.dropped >= 2000
    assert watching.dropped > 0
    assert asked == sorted(set(asked))
    early = max(size for number, size in sizes if 500 <= number < 1000)
    late = max(size for number, size in sizes if number >= 1500)
    assert late - early < 16e6, f"{(late - early) / 1e6:.1f} MB more"


def test_what_a_source_does_is_told(monkeypatch, worker):
    scripted(monkeypatch, *[of_color(0)] * 4, *[of_color(99, (32, 32))] * 2)
    told = []
    watching = watch(worker, "lavfi:script", "?", max_tokens=1, tell=told.append)
    assert [sighting.frame for sighting in watching] == [3, 5], "the last one could not settle"
    assert told == [
        "lavfi:script: the picture has 32x32 pixels now, not 64x36", "script has ended"
    ]  # fmt: skip
    assert (watching.frames, watching.asked) == (6, 2)


def test_until_and_stopped(monkeypatch, worker):
    scripted(monkeypatch, *[of_color(50 * i) for i in range(5)])
    watching = watch(worker, "lavfi:x", "?", changed=0, until="YES", choice=["yes"])
    assert [sighting.answer for sighting in watching] == ["yes"]
    stop = []
    scripted(monkeypatch, *[of_color(50 * i) for i in range(5)])
    watching = watch(
        worker, "lavfi:x", "?", changed=0, max_tokens=1, stopped=lambda: bool(stop)
    )  # fmt: skip
    assert [stop.append(sighting.frame) for sighting in watching] == [None]
    held = Held()

    def stopped():
        return held.entered.is_set()

    scripted(monkeypatch, of_color(0))
    watching = watch(
        worker, "lavfi:x", "?", changed=0, logits_processors=[held], stopped=stopped
    )  # fmt: skip
    assert list(watching) == [], "the answer on its way is cancelled"
    held.opened.set()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "watch takes either a question or what to detect"),
        ({"ask": "?", "detect": "cat"}, "watch takes either a question or what to detect"),
        ({"ask": " "}, "the question is empty; ask something"),
        ({"detect": "cat", "seed": 3}, "seed cannot be used with detect, which decides it itself"),
        ({"ask": "?", "max_side": 3}, "max_side is 3; it must be a whole number from 16 to "),
        ({"ask": "?", "max_tokens": 0}, "max_tokens is 0; it must be "),
        ({"ask": "?", "changed": 7}, "changed is 7; it must be a number from 0 to 1"),
    ],
)
def test_questions_that_make_no_sense(arguments, told, short):
    with pytest.raises((PromptError, ConfigError)) as error:
        watch("no/such/model", short, **arguments)
    assert str(error.value).startswith(told)


def test_a_model_that_is_not_there(short):
    from mlx_lfm2vl import ModelNotFoundError

    with pytest.raises(ModelNotFoundError):
        list(watch("./no/such/model", short, "?"))


def test_a_model_that_takes_long_does_not_keep_one_who_stops(monkeypatch, short):
    """The interpreter's end waits for nothing that is being loaded."""
    monkeypatch.setattr(watch_module, "PATIENCE", 0.05)
    release, entered = threading.Event(), threading.Event()

    def slowly(*args, **options):
        entered.set()
        assert release.wait(WAIT)
        return load(V5)

    monkeypatch.setattr("mlx_lfm2vl.serving.worker.load_model", slowly)
    assert list(watch("any", short, "?", changed=0, stopped=entered.is_set)) == []
    release.set()


# ---- the command


def test_the_command_writes_one_line_for_each_event(film, run, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ("--source", film, "--jsonl", out, "--save", tmp_path / "seen")
    code, lines, told = run(*flags)
    assert code == 0
    assert numbers(out) == SETTLED
    assert [int(line.split()[2]) for line in lines] == SETTLED
    assert told == [f"{film} has ended", "300 frames, 4 questions, 0 dropped"]
    for entry, line in zip(entries(out), lines, strict=True):
        assert entry["source"] == str(film)
        assert entry["seconds"] == pytest.approx(entry["frame"] / 25, abs=2e-3)
        assert line.endswith(f": {command.one_line(entry['answer'])}")
        with Image.open(entry["image"]) as saved:
            assert saved.size == (640, 360)
    assert len(list((tmp_path / "seen").iterdir())) == 4, "nothing is left half-written"
    first = b"".join(out.read_bytes().splitlines(keepends=True)[:2])
    out.write_bytes(first)
    run(*flags)
    assert out.read_bytes().startswith(first)
    assert numbers(out) == SETTLED, "what is asked does not depend on where it was interrupted"
    before = out.read_bytes()
    assert run(*flags)[:2] == (0, [])
    assert out.read_bytes() == before, "nothing is written twice"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_answers_that_nobody_reads_are_kept(short, tmp_path):
    """Whether the reader has gone or the disk of the output is full."""
    for number, output in enumerate(("reader", "/dev/full")):
        out = tmp_path / f"{number}.jsonl"
        reader, writer = os.pipe()
        os.close(reader)
        if number:
            os.close(writer)
            writer = os.open(output, os.O_WRONLY)
        words = ["--source", short, "--jsonl", out, "--changed", "0"]
        command = [sys.executable, "-m", "mlx_lfm2vl.watch", *map(str, (*QUESTION, *words))]
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert ended.returncode == (2 if number else 1)
        assert "Traceback" not in ended.stderr
        assert numbers(out) == [0]


def test_a_torn_line_is_mended_and_other_questions_are_begun_anew(short, run, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = ("--source", short, "--jsonl", out, "--changed", "0")
    assert run(*flags)[0] == 0
    whole = out.read_bytes()
    assert numbers(out) == list(range(30))
    lines = whole.splitlines(keepends=True)
    for torn in (lines[25][:40], b"{", b"\0\0\0"):
        out.write_bytes(b"".join(lines[:25]) + torn)
        run(*flags)
        assert numbers(out) == list(range(30))
    run(*flags[:4], "--ask", "Which colour?")
    assert numbers(out) == [*range(30), 29], "only the last one, for nothing ever settles"
    assert len({entry["settings"] for entry in entries(out)}) == 2
    for foreign in (b"my notes", b'{"mine": 1}\n', b'{"time": 5}\n', b"[" * 9999 + b"\n"):
        out.write_bytes(foreign)
        code, _, [told] = run(*flags)
        assert code == 2
        assert told.endswith("out.jsonl, line 1 is no entry of this program; pass another file")
        assert out.read_bytes() == foreign


def start(*arguments):
    words = [sys.executable, "-m", "mlx_lfm2vl.watch", *map(str, (*QUESTION, *arguments))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process, path, count):
    end = time.monotonic() + WAIT
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)


def test_killed_and_started_again(short, run, tmp_path):
    """A film continues after its last line; every frame has one line in the end."""
    out = tmp_path / "out.jsonl"
    flags = ("--source", short, "--jsonl", out, "--changed", "0")
    process = start(*flags)
    wait_for_lines(process, out, random.Random(0).randint(3, 12))
    process.kill()
    process.communicate()
    assert 3 <= out.read_bytes().count(b"\n") < 30
    run(*flags)
    assert numbers(out) == list(range(30))


def test_a_folder_killed_continued_and_interrupted(tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "out.jsonl"
    folder.mkdir()
    for number in range(4):
        of_color(number).save(folder / f"{number}.png")
    process = start("--source", folder, "--jsonl", out)
    wait_for_lines(process, out, 4)
    process.kill()
    process.communicate()
    (folder / "0.png").unlink()
    for number in (5, 4):
        of_color(number).save(folder / f"{number}.png")
    process = start("--source", folder, "--jsonl", out)
    wait_for_lines(process, out, 6)
    process.send_signal(signal.SIGINT)
    lines, told = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert told == "2 frames, 2 questions, 0 dropped\n"
    assert len(lines.splitlines()) == 2
    assert [Path(entry["file"]).name for entry in entries(out)] == [f"{n}.png" for n in range(6)]
    assert numbers(out) == list(range(6))


def test_only_answers_that_differ(monkeypatch, run, tmp_path):
    out = tmp_path / "out.jsonl"
    scripted(monkeypatch, *[of_color(20 * i) for i in range(5)])
    flags = ("--source", "lavfi:x", "--changed", "0", "--on-change", "--jsonl", out)
    assert len(run(*flags, "--choice", "yes")[1]) == 1
    scripted(monkeypatch, *[of_color(20 * i) for i in range(5)])
    assert run(*flags, "--choice", "yes")[1] == [], "nor from the last one of the run before"
    same, other = ({"boxes": [{"label": name, "box": [at]}], "answer": f"{at}"} for name, at in
                   (("cat", 1), ("dog", 1)))  # fmt: skip
    moved = {"boxes": [{"label": "cat", "box": [2]}], "answer": "2"}
    assert watch_module.gist(same) == watch_module.gist(moved) != watch_module.gist(other)


def test_programs_get_the_answer(monkeypatch, run, tmp_path):
    scripted(monkeypatch, of_color(0), of_color(99))
    out = tmp_path / "got $(touch x) `touch x`"
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        "names = ('ANSWER', 'FRAME', 'SECONDS', 'IMAGE')\n"
        "got = [os.environ['MLX_LFM2VL_' + name] for name in names]\n"
        "print(json.dumps([got, json.load(sys.stdin)]), file=open(sys.argv[1], 'a'))\n"
        "print('said')\n"
        "sys.exit(3)\n"
    )
    code, lines, told = run(
        "--source", "lavfi:x", "--changed", "0", "--choice", "yes", "--save", tmp_path / "seen",
        "--exec", f"{sys.executable} {program} '{out}'", "-m", "9",
    )  # fmt: skip
    assert code == 0
    assert len(lines) == 2, "what the program prints goes to standard error"
    problem = f"--exec {sys.executable} failed with code 3"
    summary = "2 frames, 2 questions, 0 dropped"
    assert told == ["said", problem, "said", problem, "script has ended", summary]
    calls = [json.loads(line) for line in out.read_text().splitlines()]
    for number, (variables, entry) in enumerate(calls):
        assert variables == ["yes", str(number), str(number / 10), entry["image"]]
        assert (entry["answer"], entry["frame"], entry["source"]) == ("yes", number, "lavfi:x")


def test_programs_that_fail(tmp_path, monkeypatch):
    entry = {"answer": "a\0b", "frame": 1}
    assert command.execute(["true"], entry) is None, "that reads no input"
    assert command.execute(["no-such-program"], entry) == (
        "cannot run no-such-program: no-such-program: No such file or directory"
    )
    assert command.execute([str(tmp_path)], entry).endswith(": Permission denied")
    assert command.execute(["cat"], {"answer": "x" * 1_000_000}).startswith("cannot run cat: ")
    monkeypatch.setattr(command, "COMMAND_SECONDS", 0.5)
    begun, pid = time.monotonic(), tmp_path / "pid"
    line = f"sleep 60 & echo $! > {pid}; wait"
    assert command.execute(["sh", "-c", line], entry) == (
        "sh was ended, for it took more than 0.5 s"
    )
    assert time.monotonic() - begun < 10
    child = Path("/proc") / pid.read_text().strip() / "cmdline"
    end = time.monotonic() + WAIT
    while child.exists() and child.read_bytes():  # a zombie has none
        assert time.monotonic() < end, "its children end with it"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "--ask is missing; ask something, or say what to --detect"),
        (("--ask", "?", "--detect", "cat"), "watch takes either a question or what to detect"),
        (("--detect", "cat", "--temp", "1"), "sampling cannot be used with detect"),
        (("--ask", "?", "--every", "soon"), "argument --every: soon must look like 300ms, "),
        (("--ask", "?", "--changed", "2"), "argument --changed: 2 must look like 0.2% or 0.002"),
        (("--ask", "?", "--exec", "say 'a"), "argument --exec: say 'a: no closing quotation"),
        (("--ask", "?", "--exec", ""), "argument --exec: there is no command"),
        (("--ask", "?", "--exec", "./gone a"), "argument --exec: ./gone is no program that can be"),
        (("--ask", "?", "--every", "-1s"), "argument --every: -1s must look like 300ms, 1s or 2m"),
        (("--ask", "?", "--changed", "-1%"), "argument --changed: -1% must look like 0.2%"),
        (("--ask", "?", "--max-side", "-5"), "max_side is -5; it must be a whole number from 16"),
        (("--ask", "?", "--until", ""), "until is empty, which every answer contains; say at what"),
        (("--ask", "?", "--save", __file__), f"{__file__} cannot be made a folder: File exists"),
        (("--ask", "?", "--save", "/dev/null/x"), "/dev/null/x cannot be made a folder: Not a dir"),
        (("--ask", "?", "--source", "nothing"), "nothing does not exist; a source is camera[:N]"),
        (("--ask", "?", "--source", ".", "--save", "../" + Path().resolve().name),
         "--save is the folder that is watched; its pictures would be asked about"),
        (("--ask", "?", "--jsonl", "/no/such/x"), "/no/such/x cannot be written: No such file"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense(arguments, told, short, run):
    code, lines, err = run("--source", short, "--model", "no/model", *arguments, flags=())
    assert (code, lines, len(err)) == (2, [], 1)
    assert err[0].startswith(f"mlx-lfm2vl-watch: error: {told}")


@pytest.mark.parametrize(
    "asked",
    [
        {"ask": "What is it?", "max_tokens": 3, "system": "Be brief."},
        {"ask": "Is it?", "choice": ["yes", "no"], "max_side": 32},
        {"detect": ["cat", "red dog"]},
        {"detect": "cat"},
    ],
)
def test_a_picture_costs_what_was_told(asked, short, worker, monkeypatch):
    """Tokens and patches are those of the first answer."""
    answers, submit = [], Worker.submit

    def keep(self, *args, **options):
        answers.append(submit(self, *args, **options))
        return answers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "submit", keep)
        next(iter(watch(worker, short, changed=0, **asked)))
    worker._thread.prefixes.clear()
    usages = [answer.usage for answer in answers]
    found = watch("no/model", short, **asked).estimate(*load(V5, dtype="float32"))
    assert found.prompt_tokens == sum(usage.processed_tokens for usage in usages)
    assert found.patches == sum(usage.encoded_patches for usage in usages) > 0
    assert found.max_tokens >= sum(usage.generation_tokens for usage in usages)
    assert len(found.image_tokens) == 1


def sources(short, folder):
    of_color(0, (64, 48)).save(folder / "a.png")
    return {
        "film": short, "folder": folder, "lavfi": "lavfi:testsrc=size=64x48",
        "screen": "screen@0,0,64,48",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["film", "folder", "lavfi", "screen"])
def test_a_dry_run_of_each_source(kind, short, run, tmp_path, monkeypatch, work, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if kind == "screen":
        request.getfixturevalue("display")
        pytest.importorskip("mss")
    (tmp_path / "seen").mkdir()
    flags = ("--source", sources(short, tmp_path / "seen")[kind], "--dry-run")
    opened = threading.active_count()
    code, lines, told = run(*flags, "--jsonl", tmp_path / "out.jsonl")
    assert (code, told, work.passes) == (0, [], [])
    assert not (tmp_path / "out.jsonl").exists()
    assert threading.active_count() == opened, "the source is closed"
    assert [line.split(":")[0] for line in lines] == ["prompt", "answer", "memory", "time"]
    assert "of them of 1 image (1 view, 16 patches)" in lines[0]
    assert lines[3].startswith("time: unknown")


def test_a_dry_run_tells_how_many_frames_a_second(short, run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run("--source", short, "--changed", "0")
    lines = run("--source", short, "--dry-run")[1]
    assert lines[3].startswith("time: at most ")
    found = watch("no/model", short, "What is it?", max_tokens=2).estimate(
        *load(V5, dtype="float32")
    )
    assert lines[4] == f"rate: at least {1 / found.seconds:.2g} frames a second"


def test_a_source_without_a_picture_costs_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(watch_module, "PICTURE", 0.1)
    code, lines, told = run("--source", tmp_path, "--dry-run")
    assert (code, lines) == (2, [])
    assert told == [
        f"mlx-lfm2vl-watch: error: {tmp_path} gives no picture by which to tell the cost"
    ]


def test_times_and_shares():
    assert [command.seconds(text) for text in ("1s", "300ms", "2m", "1h", "0.5")] == [
        1, 0.3, 120, 3600, 0.5
    ]  # fmt: skip
    assert [command.share(text) for text in ("0.2%", "0.002", "100%", "0")] == [0.002, 0.002, 1, 0]


def test_screens_and_windows(display, short, tmp_path):
    """The window that --show opens is seen on a screen that is watched."""
    pytest.importorskip("mss")
    words = [sys.executable, "-m", "mlx_lfm2vl.watch", *map(str, QUESTION)]
    source = ["--source", "lavfi:color=c=red:size=480x480:rate=5:duration=60", "--realtime"]
    shown = subprocess.Popen([*words, *source, "--show"], stderr=subprocess.PIPE, text=True)
    try:
        with frames("screen@0,0,400,400") as screen:
            end = time.monotonic() + WAIT
            while (red := np.asarray(next(screen).image)[100, 100].tolist())[0] < 200:
                assert time.monotonic() < end
                assert shown.poll() is None
        assert max(red[1:]) < 20
        shown.send_signal(signal.SIGINT)
        assert re.search(r"\d+ frames?, \d question", shown.communicate(timeout=WAIT)[1])
        assert shown.returncode == 130
    finally:
        shown.kill()
    for wrong, told in (("screen:9", "the number of screens is 1"),
                        ("screen@0,0,9999,9", "the screen, which has 1100x700")):  # fmt: skip
        with pytest.raises(SourceError, match=told):
            next(frames(wrong))
