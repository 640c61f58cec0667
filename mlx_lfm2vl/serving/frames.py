"""`frames`: pictures of cameras, screens, films, streams and folders, one after the other."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ImageError, SourceError, one_line, reason
from .folder import SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

POLL = 0.2  # seconds: between looks at a folder, and for which nothing else waits longer
STALL = 10.0  # seconds without a picture that are worth a line
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between tries to open a source again
NETWORK_TIMEOUT = 10.0  # seconds in which a stream must be opened, and each piece of it come
FRAME_RATES = (30, 25, 15)  # many cameras refuse FFmpeg's default, 29.97
SCREEN_RATE = 10  # pictures in a second
OLD = 2.0  # seconds after which nobody writes to a file any more

CAMERA = re.compile(r"camera(?::([0-9]{1,3}))?")
SCREEN = re.compile(r"screen(?::([0-9]{1,3}))?(?:@([0-9]{1,5}(?:,[0-9]{1,5}){3}))?")
STREAM = re.compile(r"(?:rtsps?|https?)://.", re.I)
FORMS = "camera[:N], screen[:N][@x,y,w,h], a film, a folder, rtsp://…, http(s)://… or lavfi:…"
Kind = Literal["camera", "screen", "stream", "lavfi", "folder", "film"]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Frame:
    """A picture of a source.

    Attributes:
        image: RGB, upright.
        seconds: since the source's beginning; never less than those of the frame before.
        number: from 0; frames that were dropped are counted, too.
        path: the file in a folder.
    """

    image: Image.Image
    seconds: float
    number: int
    path: str | None = None


@dataclass(frozen=True)
class Source:
    """Where frames come from.

    Attributes:
        kind: of what sort it is.
        name: what messages call it; paths are whole, URLs without passwords.
        target: a path, URL, filter graph or number.
        region: (x, y, width, height) of a screen; None is all of it.
    """

    kind: Kind
    name: str
    target: Any
    region: tuple[int, ...] | None = None

    @property
    def is_live(self) -> bool:
        """Whether it does not wait for those who look."""
        return self.kind in ("camera", "screen", "stream")

    @classmethod
    def of(cls, source: str | Path) -> Source:
        """What a text names; a SourceError if that is nothing."""
        text = str(source)
        if (camera := CAMERA.fullmatch(text)) is not None:
            return cls("camera", text, int(camera[1] or 0))
        if (screen := SCREEN.fullmatch(text)) is not None:
            region = None if screen[2] is None else tuple(map(int, screen[2].split(",")))
            if region is not None and 0 in region[2:]:
                raise SourceError(f"{text} is empty; width and height must be 1 or more")
            return cls("screen", text, int(screen[1] or 0), region)
        if STREAM.match(text) is not None:
            return cls("stream", one_line(re.sub(r"//[^/]*@", "//", text)), text)
        if text.startswith("lavfi:"):
            return cls("lavfi", one_line(text), text.removeprefix("lavfi:"))
        path = os.path.abspath(os.path.expanduser(text))
        if not text or "\0" in text or not os.path.exists(path):
            raise SourceError(f"{one_line(text)} does not exist; a source is {FORMS}")
        if not (os.path.isdir(path) or os.path.isfile(path)):
            raise SourceError(f"{one_line(text)} is neither a film nor a folder")
        return cls("folder" if os.path.isdir(path) else "film", one_line(path), path)


def frames(
    source: str | Path | Source,
    *,
    realtime: bool = False,
    start: int = 0,
    known: Collection[str] = (),
    tell: Tell | None = None,
) -> Frames:
    """The frames of a source, one after the other.

        with frames("camera") as camera:
            for frame in camera:
                print(frame.number, frame.seconds, frame.image.size)

    Cameras, screens and streams do not wait: a thread captures them, the newest frame wins, and
    older ones that nobody has taken are dropped and counted. When they break off, they are opened
    again and again, with pauses that grow to 30 seconds. Films give every frame as fast as one
    takes them, and folders each picture once, as they appear; hidden files are left out.

    Args:
        source: `camera[:N]` (avfoundation on macOS, v4l2 on Linux), `screen[:N][@x,y,w,h]`, the
            path of a film or folder, an `rtsp://` or `http(s)://` URL, or `lavfi:` and a filter
            graph of FFmpeg, such as `lavfi:testsrc`, which is a film. N counts from 0.
        realtime: films play at their own speed, and the newest frame wins there, too.
        start: number of the first frame: of a film, those before it are passed over.
        known: names of files in a folder that are passed over.
        tell: called with a line if a source breaks off, returns, stalls or is damaged.

    Raises:
        SourceError: there is no such source or a library is missing; while iterating: it cannot be
            opened, for want of a permission perhaps.
    """
    found = source if isinstance(source, Source) else Source.of(source)
    if found.kind != "folder":
        _require("mss" if found.kind == "screen" else "av")
    return Frames(_Reader(found, realtime, start, known, tell if tell is not None else _nobody))


def _nobody(line: str) -> None:
    pass


def _require(library: str) -> None:
    if find_spec(library) is None:
        raise SourceError(f'{library} must be installed: pip install "mlx-lfm2vl[video]"')


class Frames(Iterator[Frame]):
    """Frames on their way; see `frames`.

    Attributes:
        source: where they come from.
        ended: whether no more will come.
    """

    def __init__(self, reader: _Reader) -> None:
        self.source, self.ended = reader.source, False
        self._reader = reader
        self._newest: _Newest | None = None
        self._seen, self._told = time.monotonic(), False
        if reader.source.is_live or (reader.realtime and reader.source.kind != "folder"):
            self._newest = _Newest(reader)
        weakref.finalize(self, reader.closed.set)  # the thread does not know this object

    @property
    def dropped(self) -> int:
        """How many frames nobody has taken in time."""
        return 0 if self._newest is None else self._newest.dropped

    def poll(self, seconds: float = POLL) -> Frame | None:
        """The next frame; None if none comes within so many seconds, or if they have ended."""
        if self.ended:
            return None
        if self._newest is None:
            frame = next(self._reader.frames, self)
            self.ended = frame is self
            return frame if isinstance(frame, Frame) else None
        frame, self.ended = self._newest.take(seconds)
        now = time.monotonic()
        if frame is not None:
            self._seen, self._told = now, False
        elif now - self._seen >= STALL and not self._told and not self.ended:
            self._told = True
            self._reader.tell(
                f"{self.source.name} gives no picture for {STALL:.0f} s; waiting"
                f"{_permission(self.source.kind)}"
            )
        return frame

    def __next__(self) -> Frame:
        while not self.ended:
            frame = self.poll()
            if frame is not None:
                return frame
        raise StopIteration

    def close(self) -> None:
        """Lets go of the source."""
        self._reader.closed.set()
        self.ended = True
        if self._newest is not None:
            self._newest.thread.join(1.0)  # more only if it waits for a network
        else:
            self._reader.frames.close()

    def __enter__(self) -> Frames:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Newest:
    """A thread that captures frames, and the last one that nobody has taken."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.dropped = 0
        self.frame: Frame | None = None
        self.error: Exception | None = None
        self.ended = False
        self.news = threading.Condition()
        self.thread = threading.Thread(target=self.fill, name="mlx_lfm2vl.frames", daemon=True)
        self.thread.start()

    def fill(self) -> None:
        """Captures until the end."""
        error: Exception | None = None
        try:
            for frame in self.reader.frames:
                if frame is not None:
                    with self.news:
                        self.dropped += self.frame is not None
                        self.frame = frame
                        self.news.notify()
                if self.reader.closed.is_set():
                    break
            self.reader.frames.close()
        except Exception as raised:  # noqa: BLE001 - its place is in the thread of who looks
            error = raised
        with self.news:
            self.error, self.ended = error, True
            self.news.notify()

    def take(self, seconds: float) -> tuple[Frame | None, bool]:
        """The newest frame, if one comes in time, and whether there will be no other."""
        with self.news:
            self.news.wait_for(lambda: self.frame is not None or self.ended, seconds)
            frame, self.frame = self.frame, None
            if frame is None and self.error is not None:
                raise self.error
            return frame, self.ended and frame is None


class _Reader:
    """Reads a source.

    Attributes:
        closed: set when nobody wants more.
        frames: what is read, in order; None while there is nothing new.
    """

    def __init__(
        self, source: Source, realtime: bool, start: int, known: Collection[str], tell: Tell
    ) -> None:
        self.source, self.name = source, source.name
        self.realtime, self.start, self.known, self.tell = realtime, start, known, tell
        self.closed = threading.Event()
        kind, target = source.kind, source.target
        if source.is_live:
            images = {"camera": self.camera, "screen": self.screen, "stream": self.stream}[kind]
            self.frames: Any = self.live(images)
        elif kind == "folder":
            self.frames = self.folder(target)
        elif kind == "lavfi":
            self.frames = self.film(target, kind)
        else:
            self.frames = self.film(f"file:{target}", None)  # its name may look like a protocol's

    # ---- live sources

    def live(self, images: Callable[[], Iterator[Image.Image]]) -> Iterator[Frame]:
        """The pictures of a source that is opened again when it breaks off."""
        begun, numbers, pause = time.monotonic(), count(self.start), 0.0
        seen = told = False
        while not self.closed.is_set():
            opened = time.monotonic()
            try:
                for image in images():
                    if told:
                        self.tell(f"{self.name} is back")
                    seen, told = True, False
                    yield Frame(image, time.monotonic() - begun, next(numbers))
                return
            except SourceError as error:
                if not seen:
                    raise
                if not told and not self.closed.is_set():
                    self.tell(f"{error}; trying again until it is back")
                told = True
            lasted = time.monotonic() - opened > LONGEST_PAUSE
            pause = FIRST_PAUSE if lasted else min(max(FIRST_PAUSE, 2 * pause), LONGEST_PAUSE)
            self.closed.wait(pause)

    def camera(self) -> Iterator[Image.Image]:
        """The pictures of a camera, at the first frame rate that it takes."""
        number = self.source.target
        macos = sys.platform == "darwin"
        device = str(number) if macos else f"/dev/video{number}"
        if not macos and not os.path.exists(device):
            raise SourceError(f"{self.name} is not there: {device} does not exist")
        kind = "avfoundation" if macos else "v4l2"
        for rate in FRAME_RATES:
            try:
                container = self.open(device, kind, {"framerate": str(rate)})
                break
            except SourceError:
                if rate == FRAME_RATES[-1]:
                    raise
        with container:
            yield from (_upright(frame) for frame in self.decoded(container))
        raise SourceError(f"{self.name} has broken off")

    def stream(self) -> Iterator[Image.Image]:
        """The pictures of a stream; it ends if it is a film, whose length is known."""
        url = self.source.target
        options = {"rtsp_transport": "tcp"} if url.lower().startswith("rtsp") else {}
        with self.open(url, None, options) as container:
            yield from (_upright(frame) for frame in self.decoded(container))
            endless = container.duration is None
        if endless:
            raise SourceError(f"{self.name} has broken off")

    def screen(self) -> Iterator[Image.Image]:
        """The pictures of a screen, or of a part of it."""
        import mss
        from PIL import Image

        if not _may_capture_screen():
            raise SourceError(f"{self.name} cannot be captured{_permission('screen')}")
        try:
            with mss.MSS() as shots:
                place = self.place(shots.monitors[1:])
                while not self.closed.is_set():
                    begun = time.monotonic()
                    shot = shots.grab(place)
                    yield Image.frombytes("RGB", shot.size, bytes(shot.bgra), "raw", "BGRX")
                    self.closed.wait(max(0.0, begun + 1 / SCREEN_RATE - time.monotonic()))
        except mss.ScreenShotError as error:
            raise SourceError(f"{self.name} cannot be captured: {reason(error)}") from None

    def place(self, screens: list[dict[str, int]]) -> dict[str, int]:
        """Where to capture, in the coordinates of all screens together."""
        number, region = self.source.target, self.source.region
        if number >= len(screens):
            raise SourceError(f"{self.name} is not there; the number of screens is {len(screens)}")
        whole = {side: screens[number][side] for side in ("left", "top", "width", "height")}
        if region is None:
            return whole
        x, y, width, height = region
        if x + width > whole["width"] or y + height > whole["height"]:
            size = f"{whole['width']}x{whole['height']}"
            raise SourceError(f"{self.name} does not lie inside the screen, which has {size}")
        return {
            "left": whole["left"] + x,
            "top": whole["top"] + y,
            "width": width,
            "height": height,
        }

    # ---- what waits

    def film(self, url: str, kind: str | None) -> Iterator[Frame | None]:
        """The frames of a film, at its own speed if it is to play so."""
        seconds, first, begun = 0.0, None, None
        with self.open(url, kind) as container:
            [stream, *_] = container.streams.video
            stream.thread_type = "AUTO"
            for number, frame in enumerate(self.decoded(container)):
                moment = frame.time if frame.time is not None else number / (stream.base_rate or 25)
                first = moment if first is None else first
                seconds = max(seconds, float(moment - first))
                if number < self.start:
                    yield None  # so that one may stop meanwhile
                    continue
                now = time.monotonic()
                begun = now - seconds if begun is None else begun
                if self.realtime and self.closed.wait(max(0.0, begun + seconds - now)):
                    return
                yield Frame(_upright(frame), seconds, number)

    def folder(self, path: str) -> Iterator[Frame | None]:
        """The pictures of a folder, each once, when nobody writes to them any more."""
        from ..prompts.image_source import load_image

        begun, numbers, done = time.monotonic(), count(self.start), set(self.known)
        looks: dict[str, tuple[int, int, bool]] = {}  # size, time and whether it cannot be read
        while not self.closed.is_set():
            names = self.pictures(path)
            done.intersection_update(names)
            looks = {name: look for name, look in looks.items() if name in names}
            for name in sorted(names - done):
                file = os.path.join(path, name)
                if not _is_complete(file, looks, name):
                    continue
                try:
                    image = load_image(file)
                except ImageError as error:
                    self.tell(str(error))
                    looks[name] = (*looks[name][:2], True)
                    continue
                done.add(name)
                yield Frame(image, time.monotonic() - begun, next(numbers), file)
            self.closed.wait(POLL)
            yield None

    def pictures(self, path: str) -> set[str]:
        """The names of the pictures in a folder."""
        try:
            with os.scandir(path) as entries:
                names = [entry.name for entry in entries]
        except OSError as error:
            raise SourceError(f"{self.name} cannot be searched: {reason(error)}") from None
        return {n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")}

    # ---- PyAV

    def open(self, url: str, kind: str | None, options: dict[str, str] | None = None) -> Any:
        """A container with pictures."""
        import av

        timeout = (NETWORK_TIMEOUT, NETWORK_TIMEOUT) if self.source.kind == "stream" else None
        try:
            container = av.open(url, format=kind, options=options, timeout=timeout)
        except (av.FFmpegError, ValueError) as error:
            hint = _permission(self.source.kind, isinstance(error, PermissionError))
            raise SourceError(f"{self.name} cannot be opened: {_why(error)}{hint}") from None
        if not container.streams.video:
            container.close()
            raise SourceError(f"{self.name} holds no pictures")
        return container

    def decoded(self, container: Any) -> Iterator[Any]:
        """The frames of a container; damaged ones are left out, and told once."""
        import av

        damaged = False
        while not self.closed.is_set():
            try:
                for packet in container.demux(container.streams.video[0]):
                    try:
                        found = packet.decode()
                    except av.FFmpegError as error:
                        if not damaged:
                            self.tell(f"{self.name} is damaged: {reason(error)}; continuing")
                        damaged, found = True, []
                    yield from found
                return
            except av.error.BlockingIOError:  # a camera has no picture yet
                self.closed.wait(0.01)
            except av.FFmpegError as error:
                raise SourceError(f"{self.name} has broken off: {_why(error)}") from None


def _why(error: Exception) -> str:
    import av

    is_late = isinstance(error, av.error.ExitError)
    return f"nothing comes within {NETWORK_TIMEOUT:g} s" if is_late else reason(error)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _is_complete(file: str, looks: dict[str, tuple[int, int, bool]], name: str) -> bool:
    """Whether a file is as it was at the last look, or old; not if it could not be read then."""
    try:
        found = os.stat(file)
    except OSError:  # it has gone
        return False
    before, now = looks.get(name), (found.st_size, found.st_mtime_ns)
    same = before is not None and before[:2] == now
    bad = same and before is not None and before[2]
    looks[name] = (*now, bad)
    return not bad and (same or time.time() - found.st_mtime > OLD)


def _may_capture_screen() -> bool:
    """Whether macOS lets this program see other windows; without it, it shows the desktop alone."""
    if sys.platform != "darwin":
        return True
    graphics = ctypes.CDLL("/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics")
    allowed, request = (
        getattr(graphics, f"CG{name}ScreenCaptureAccess") for name in ("Preflight", "Request")
    )
    allowed.restype = request.restype = ctypes.c_bool
    return bool(allowed() or request())  # the second one shows a dialogue


def _permission(kind: Kind, refused: bool = False) -> str:
    """What the reason may be, as the end of a message; `refused`: the system says so."""
    if sys.platform != "darwin":
        return "; your user must be in the group video" if refused else ""
    names = {"camera": "Camera", "screen": "Screen Recording"}
    if kind not in names:
        return ""
    place = f"System Settings, Privacy & Security, {names[kind]}"
    return f"; if your terminal is not allowed to, allow it in {place}, and start that again"
