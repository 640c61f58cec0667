"""Films as questions: evenly chosen frames, upright, with their times; read by PyAV."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ..errors import ImageError, PromptError, reason
from ..options import Bound
from .image_source import RawImage, open_source, source_name, told

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FRAMES = 16
MOST_FRAMES = 1024
FRAMES = Bound(int, 1, MOST_FRAMES)
MAX_PIXELS = 1 << 27  # of a frame
MAX_FILM_BYTES = 1 << 40  # of a file; what comes by memory or network has the bounds of images
# demuxers of one file alone: playlists would open what they name
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
INDEXED = ("mov", "matroska")  # in which one can jump to a frame; others are decoded all through
# x' = ax + cy, y' = bx + dy, y downwards: (a, b, c, d) -> Pillow's `Transpose`
TURNS = {
    (0, -1, 1, 0): "ROTATE_90", (-1, 0, 0, -1): "ROTATE_180", (0, 1, -1, 0): "ROTATE_270",
    (-1, 0, 0, 1): "FLIP_LEFT_RIGHT", (1, 0, 0, -1): "FLIP_TOP_BOTTOM",
    (0, 1, 1, 0): "TRANSPOSE", (0, -1, -1, 0): "TRANSVERSE",
}  # fmt: skip


class Frame(NamedTuple):
    """One picture of a film, upright in RGB, and its seconds from the first one."""

    image: Image.Image
    seconds: float


def sample_video(video: RawImage, count: int | None = None) -> list[Frame]:
    """Evenly chosen frames of a film, the first and the last among them.

    Args:
        video: a path, an http(s) or data URL, encoded bytes, or a binary file object.
        count: how many, 16 by default; a shorter film gives all it has.

    Raises:
        PromptError: `count` makes no sense.
        ImageError: PyAV is missing, or the film cannot be read or has no picture.
    """
    return list(each_frame(video, count))


def each_frame(
    video: RawImage, count: int | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[Frame]:
    """`sample_video`, of which only one frame is in memory at a time.

    Args:
        max_pixels: of a frame; larger ones are refused before memory is taken for them.
    """
    if count is None:
        count = DEFAULT_FRAMES
    FRAMES.check("frames", count, PromptError)
    name = source_name(video)
    with told(name, "cannot be read as a film"):
        file = open_source(video, MAX_FILM_BYTES)
    with file:
        with _opened(file, name, max_pixels) as (container, stream):
            times, keys = _index(container, stream)
        if not times:
            raise ImageError(f"{name} has no picture")  # not one frame of it
        last = len(times) - 1
        wanted = sorted({times[round(n * last / max(1, count - 1))] for n in range(count)})
        with _opened(file, name, max_pixels) as (container, stream):
            for frame in _frames_at(container, stream, wanted, keys):
                yield Frame(_upright(frame), float((frame.pts - times[0]) * stream.time_base))


@contextmanager
def _opened(file: BinaryIO, name: str, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """A film from its beginning, and the stream of its pictures."""
    try:
        import av
    except ImportError:
        raise ImageError(
            f'{name} needs PyAV to be read as a film: pip install "mlx-lfm2vl[video]"'
        ) from None
    what = "cannot be read as a film"
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        file.seek(0)
        with av.open(file, options=options, metadata_errors="replace") as container:
            covers = av.stream.Disposition.attached_pic
            found = [s for s in container.streams.video if not s.disposition & covers]
            if not found:
                raise ImageError(f"{name} has no picture")
            stream, what = found[0], "is damaged"
            if stream.width * stream.height > max_pixels:
                size = f"{stream.width}x{stream.height}"
                raise ImageError(f"{name} has frames of {size} pixels; {max_pixels} are allowed")
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(max_pixels)}  # sizes may change
            yield container, stream
    except av.FFmpegError as error:
        raise ImageError(f"{name} {what}: {reason(error)}") from None


def _index(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames and of those that can be decoded by themselves, without decoding."""
    packets = [p for p in container.demux(stream) if p.pts is not None and not p.is_discard]
    return sorted({p.pts for p in packets}), sorted({p.pts for p in packets if p.is_keyframe})


def _frames_at(
    container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int]
) -> Iterator[Any]:
    """The frames at these times, ascending; the last one there is, if the film ends before."""
    jumps = container.format.name.startswith(INDEXED)
    frames, frame, told_last = container.decode(stream), None, None
    for time in wanted:
        key = keys[max(0, bisect_right(keys, time) - 1)] if keys else time
        if jumps and frame is not None and frame.pts < key <= time:
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        while frame is None or frame.pts < time:
            following = next((f for f in frames if f.pts is not None), None)
            if following is None:
                if frame is not told_last:
                    yield frame
                return
            frame = following
        yield frame
        told_last = frame


def _upright(frame: Any) -> Image.Image:
    """The picture as a player shows it: phones film lying and write down how to turn it."""
    from PIL import Image

    picture: Image.Image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")  # 9 int32, of which 4 say where x and y lead
    if matrix is None:
        return picture
    a, b, _, c, d = (n / 65536 for n in struct.unpack("=9i", bytes(matrix))[:5])
    turn = TURNS.get((round(a), round(b), round(c), round(d)))
    return picture if turn is None else picture.transpose(Image.Transpose[turn])
