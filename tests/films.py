"""Films made in code: each frame's grey level tells its number."""

import av
import numpy as np

GREY = 8  # from one frame to the next


def write_film(path, frames=30, size=(64, 48), rate=10, codec="libx264", turn=0, keys=0, **options):
    """Writes frames of one grey level each, a white stripe at their left edge."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if keys:
            stream.gop_size = keys
        if turn:
            stream.set_display_rotation(turn)
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), number * GREY % 256, np.uint8)
            pixels[:, :16] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def numbers(frames):
    """Which frames these are, by their grey levels."""
    return [round(np.asarray(frame.image)[8:40, 24:56].mean() / GREY) for frame in frames]
