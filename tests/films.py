"""Films made in code: of images, or of grey levels that tell the frames' numbers."""

import av
import numpy as np
from PIL import Image

GREY = 8  # from one frame to the next


def grey_frame(number, size=(64, 48)):
    """One grey level, and a white stripe at the left edge."""
    image = Image.new("RGB", size, (number * GREY % 256,) * 3)
    image.paste("white", (0, 0, 16, size[1]))
    return image


def write_film(
    path, images=30, size=(64, 48), rate=10, codec="libx264", turn=0, keys=0, bit_rate=None,
):  # fmt: skip
    """Writes images, all of one size, or so many grey frames."""
    if isinstance(images, int):
        images = [grey_frame(number, size) for number in range(images)]
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=rate)
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuv420p"
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        if keys:
            stream.gop_size = keys
        if turn:
            stream.set_display_rotation(turn)
        for image in images:
            film.mux(stream.encode(av.VideoFrame.from_image(image)))
        film.mux(stream.encode())
    return path


def numbers(frames):
    """Which grey frames these are."""
    return [round(np.asarray(frame.image)[8:40, 24:56].mean() / GREY) for frame in frames]
