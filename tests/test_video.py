"""Films as questions: which frames are seen, and that every entrance sees the same."""

import io
import json
import subprocess
import sys
import wave
from dataclasses import replace

import numpy as np
import pytest

from mlx_lfm2vl import (
    ImageError,
    ImageOptions,
    PromptError,
    Session,
    Worker,
    batch_generate,
    generate,
    stream_generate,
)
from mlx_lfm2vl.cli.generate import main
from mlx_lfm2vl.prompts.video import sample_video
from mlx_lfm2vl.serving.prefixes import MOST_STOPS
from mlx_lfm2vl.training.data import read_dataset

from .films import numbers, write_film
from .helpers import FIXTURES, answer, user, write_lines
from .serving import data_url, serving

QUESTION = "What happens?"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("films") / "film.mp4")


@pytest.fixture(scope="module")
def parts(loaded):
    return loaded()


def asking(film, frames=None):
    item = {"type": "video", "video": film}
    if frames is not None:
        item["frames"] = frames
    return [user([item, {"type": "text", "text": QUESTION}])]


def by_hand(frames):
    """The same question with the frames as images."""
    items = []
    for picture, seconds in frames:
        items += [{"type": "text", "text": f"{seconds:.1f} s:"}]
        items += [{"type": "image", "image": picture}]
    return [user([*items, {"type": "text", "text": QUESTION}])]


# which frames


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (30, 4, [0, 10, 19, 29]),
        (30, 2, [0, 29]),
        (30, 1, [0]),
        (30, 30, list(range(30))),
        (30, 1000, list(range(30))),
        (30, None, [round(n * 29 / 15) for n in range(16)]),
        (7, 16, list(range(7))),
        (1, 16, [0]),
    ],
)
def test_frames_are_evenly_chosen(frames, count, expected, tmp_path):
    found = sample_video(write_film(tmp_path / "film.mp4", frames), count)
    assert numbers(found) == expected
    assert [frame.seconds for frame in found] == pytest.approx([n / 10 for n in expected])
    assert {(f.image.size, f.image.mode) for f in found} == {((64, 48), "RGB")}


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mov", "mpeg4"), ("a.webm", "libvpx"),
     ("a.avi", "mpeg4"), ("a.ts", "libx264"), ("a.flv", "flv1")],
)  # fmt: skip
@pytest.mark.parametrize("keys", [5, 250])
def test_containers_and_key_frames(name, codec, keys, tmp_path):
    film = write_film(tmp_path / name, codec=codec, keys=keys)
    for source in (film, str(film), film.read_bytes(), io.BytesIO(film.read_bytes())):
        found = sample_video(source, 4)
        assert numbers(found) == [0, 10, 19, 29]
        assert [round(frame.seconds, 2) for frame in found] == [0, 1, 1.9, 2.9]


@pytest.mark.parametrize("turn", [0, 90, 180, -90])
def test_films_are_turned_upright(turn, tmp_path):
    """By the angle against the clock that the file says; the stripe begins at the left."""
    picture = sample_video(write_film(tmp_path / "film.mp4", turn=turn), 1)[0].image
    edges = {0: np.s_[:, 2], 90: np.s_[-3], 180: np.s_[:, -3], -90: np.s_[2]}
    assert picture.size == ((64, 48) if turn in (0, 180) else (48, 64))
    for other, edge in edges.items():
        assert (np.asarray(picture)[edge].mean() > 200) == (other == turn)


@pytest.mark.parametrize("count", [0, -1, 1025, 2.5, "4", True])
def test_odd_numbers_of_frames(count, film):
    with pytest.raises(PromptError, match=r"frames is .*; it must be a whole number from 1 to"):
        sample_video(film, count)


def damaged(film):
    data = bytearray(film.read_bytes())
    place = data.find(b"mdat") + 40
    data[place : place + 700] = b"\xff" * 700
    return bytes(data)


def sound(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", "none"))
        file.writeframes(b"\0\0" * 8000)


def only_sound(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def test_what_is_no_film(film, tmp_path):
    """One line that names it; playlists are not followed."""
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    (tmp_path / "damaged.mp4").write_bytes(damaged(film))
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{film}\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {film}\n")
    sound(tmp_path / "sound.wav")
    only_sound(tmp_path / "sound.m4a")
    for name, said in (
        ("text.mp4", "cannot be read as a film"),
        ("empty.mp4", "is empty: it has 0 bytes"),
        ("cut.mp4", "cannot be read as a film"),
        ("damaged.mp4", "is damaged"),
        ("list.mp4", "cannot be read as a film"),
        ("concat.mp4", "cannot be read as a film"),
        ("sound.wav", "cannot be read as a film"),
        ("sound.m4a", "has no picture"),
        ("missing.mp4", "does not exist"),
        (".", "it is a folder"),
    ):
        with pytest.raises(ImageError) as error:
            sample_video(tmp_path / name)
        assert said in str(error.value), name
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)
    for source in (b"hello", "data:video/mp4;base64,!", 5):
        with pytest.raises(ImageError):
            sample_video(source)


def test_frames_that_are_too_large_take_no_memory(film, monkeypatch):
    from mlx_lfm2vl.prompts.video import each_frame

    with pytest.raises(ImageError, match="has frames of 64x48 pixels; 3000 are allowed"):
        list(each_frame(film, 4, max_pixels=3000))


def test_without_pyav(film, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ImageError, match=r'film.mp4 needs PyAV .*: pip install "mlx-lfm2vl\[video\]"'
    ):
        sample_video(film)


def test_pyav_is_loaded_for_films_alone(film):
    code = """
import sys
from mlx_lfm2vl.prompts.video import sample_video
import mlx_lfm2vl.generation.generate, mlx_lfm2vl.serving.worker
assert "av" not in sys.modules
sample_video(sys.argv[1], 2)
assert "av" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(film)], check=True)


# what the model reads


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(max_image_tokens=4,
                                                                  min_image_tokens=4)])  # fmt: skip
@pytest.mark.parametrize("size", [(64, 48), (200, 130)])
def test_the_same_as_its_frames_by_hand(size, options, parts, tmp_path):
    _, processor = parts
    film = write_film(tmp_path / "film.mp4", size=size)
    prompt = processor(asking(film, 5), image_options=options)
    expected = processor(by_hand(sample_video(film, 5)), image_options=options)
    assert prompt.token_ids == expected.token_ids
    assert (prompt.pixel_values == expected.pixel_values).all()
    assert prompt.first_turn_length == expected.first_turn_length
    assert len(prompt.images) == 5
    if options.max_image_tokens is not None and size == (64, 48):
        assert [image.image_tokens for image in prompt.images] == [4] * 5
    plan = processor.plan(asking(film, 5), image_options=options)
    assert plan.token_ids == prompt.token_ids
    assert plan.image_tokens == tuple(image.image_tokens for image in prompt.images)
    text = processor.decode(prompt.token_ids)
    assert all(time in text for time in ("0.0 s:", "0.7 s:", "1.4 s:", "2.2 s:", "2.9 s:"))


def test_films_among_other_things(parts, film):
    """Several films, images beside, several turns, other spellings."""
    _, processor = parts
    picture = sample_video(film, 1)[0].image
    first, second = sample_video(film, 2), sample_video(film, 3)
    film_item = {"type": "video_url", "video_url": {"url": data_url(film.read_bytes(), "mp4")}}
    messages = [
        {"role": "system", "content": "Be brief."},
        user([{"type": "image"}, {"type": "video", "path": film, "frames": 2}]),
        answer(),
        user([{"type": "text", "text": "And?"}, {**film_item, "frames": 3}, {"type": "image"}]),
    ]
    expected = [
        messages[0],
        user([{"type": "image"}, *by_hand(first)[0]["content"][:-1]]),
        answer(),
        user([{"type": "text", "text": "And?"}, *by_hand(second)[0]["content"][:-1],
              {"type": "image"}]),
    ]  # fmt: skip
    pictures = [picture, picture]
    prompt = processor(messages, pictures)
    assert prompt.token_ids == processor(expected, pictures).token_ids
    assert prompt.first_turn == len(processor(messages[:2], picture).token_ids)
    with pytest.raises(PromptError, match="has no video; it must be a path, URL or bytes"):
        processor([user([{"type": "video"}])])


def test_a_film_longer_than_the_model_reads(parts, film, monkeypatch):
    model, processor = parts
    text = replace(model.config.text_config, max_position_embeddings=100)
    monkeypatch.setattr(model, "config", replace(model.config, text_config=text))
    said = r"the prompt has \d+ tokens, \d+ of them of 16 images or frames; the model reads 100"
    with pytest.raises(PromptError, match=said):
        generate(model, processor, asking(film), max_tokens=1)
    assert generate(model, processor, "A long question. " * 50, max_tokens=1) is not None


# every entrance

SETTINGS = {"max_tokens": 6, "temperature": 0.0}


def terminal(capsys, *flags):
    base = ["--model", str(FIXTURES / "v5"), "--dtype", "float32", "-m", "6", "--temp", "0"]
    with pytest.raises(SystemExit) as end:
        main([*base, *map(str, flags)])
    said = capsys.readouterr()
    return said.out if end.value.code == 0 else said.err


def test_entrances_agree(parts, film, capsys):
    expected = generate(*parts, by_hand(sample_video(film, 3)), **SETTINGS)
    messages = asking(film, 3)
    assert generate(*parts, messages, **SETTINGS) == expected
    assert "".join(r.text for r in stream_generate(*parts, messages, **SETTINGS)) == expected
    [result] = batch_generate(*parts, [parts[1](messages)], batch_size=2)
    assert result.image_tokens == tuple(i.image_tokens for i in parts[1](messages).images)
    session = Session(*parts)
    session.see_video(film, 3)
    assert session.ask(QUESTION, **SETTINGS) == expected
    with Worker(load=lambda: parts) as worker:
        assert worker.submit(messages, **SETTINGS).result(30) == expected
        talk = worker.session()
        talk.see_video(film, 3)
        assert talk.send(QUESTION, **SETTINGS).result(30) == expected
        talk.see_video(film.parent / "missing.mp4")
        with pytest.raises(ImageError, match="does not exist"):
            talk.ask(QUESTION).result(30)
        assert talk.ask(QUESTION, **SETTINGS).result(30)
    flags = ("--video", film, "--frames", 3)
    assert terminal(capsys, *flags, "--prompt", QUESTION) == expected + "\n"


def test_a_session_reads_a_film_once(parts, film, work, tmp_path):
    expected = generate(*parts, asking(film), **SETTINGS)
    session = Session(*parts)
    work.clear()
    session.see_video(film)
    assert sum(work.views) == 16
    assert len([k for k in session.prefixes.entries if not isinstance(k, str)]) <= MOST_STOPS
    work.clear()
    assert session.ask(QUESTION, **SETTINGS) == expected
    assert session.send(QUESTION, **SETTINGS) == expected
    session.undo()
    session.save(tmp_path / "talk.safetensors")
    again = Session(*parts)
    again.load(tmp_path / "talk.safetensors")
    assert again.ask(QUESTION, **SETTINGS) == expected
    assert again.usage.reused_tokens > again.usage.prompt_tokens / 2
    assert work.views == []
    again.reset()
    again.see_video(film, 2)
    assert again.ask(QUESTION, **SETTINGS) == generate(*parts, asking(film, 2), **SETTINGS)


def test_a_film_in_a_chat(film, capsys, monkeypatch, parts):
    lines = iter([f"/video {film} 3", QUESTION, "/video no.mp4", "/undo", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    said = terminal(capsys, "--chat", "--video", film, "--frames", 2)
    assert said.count("positions") == 2
    assert "no.mp4 does not exist" in said
    assert "5 images waiting again" in said


def test_one_line_at_the_terminal(film, capsys, tmp_path):
    for flags, end in (
        (("--video", tmp_path / "no.mp4"), "no.mp4 does not exist\n"),
        (
            ("--video", film, "--frames", 0),
            "frames is 0; it must be a whole number from 1 to 1024\n",
        ),
    ):
        said = terminal(capsys, *flags, "--prompt", QUESTION)
        assert said.endswith(end)
        assert said.count("\n") == 1


def test_training_on_films(parts, film, tmp_path):
    (tmp_path / "film.mp4").write_bytes(film.read_bytes())
    asked = asking("film.mp4", 3)
    file = write_lines(tmp_path / "train.jsonl", [json.dumps({"messages": [*asked, answer()]})])
    [sample] = read_dataset(file, parts[1], max_length=1000).samples
    prompt = parts[1](asking(film, 3))
    assert sample.token_ids[: len(prompt.token_ids)].tolist() == prompt.token_ids


# the server


@pytest.fixture(scope="module")
def served(film):
    with serving(FIXTURES / "v5", media_root=film.parent, max_images=20) as served:
        yield served


def item(url, frames=None, kind="video_url"):
    more = {} if frames is None else {"frames": frames}
    return {"type": kind, "video_url": {"url": url} if kind == "video_url" else url, **more}


def post(served, *items, path="/v1/chat/completions", **more):
    messages = [user([*items, {"type": "text", "text": QUESTION}])]
    return served.post(path, {"messages": messages, "max_tokens": 6, "temperature": 0, **more})


def test_films_of_requests(served, film, parts):
    url = data_url(film.read_bytes(), "mp4").replace("image/", "video/")
    expected = generate(*served_parts(served), asking(film, 3), **SETTINGS)
    tokens = len(parts[1](asking(film, 3)).token_ids)
    for found in (item(url, 3), item(f"file://{film}", 3), item(url, 3, "input_video")):
        body = post(served, found).json()
        assert body["choices"][0]["message"]["content"] == expected
        assert body["usage"]["prompt_tokens"] == tokens
    count = post(served, item(url), path="/v1/chat/completions/input_tokens").json()
    assert len(count["image_tokens"]) == 16
    asked = [user([{"type": "input_text", "text": QUESTION}, item(url, 3, "input_video")])]
    body = served.post("/v1/responses/input_tokens", {"input": asked}).json()
    assert len(body["image_tokens"]) == 3


def served_parts(served):
    """The server's own checkpoint, which computes in its own type."""
    from .serving import module

    return module.load(str(FIXTURES / "v5"), None, None, lazy=False, adapter_path=None)


def test_bounds_of_films(served, film):
    url = data_url(film.read_bytes(), "mp4")
    for found, status, code in (
        ([item(url, 21)], 400, "too_many_images"),
        ([item(url), item(url, 5)], 400, "too_many_images"),
        ([item(url, 0)], 400, "invalid_value"),
        ([item("data:video/mp4;base64,AAAA")], 400, "invalid_image"),
        ([item("file:///etc/passwd")], 400, "invalid_image"),
        ([item("http://127.0.0.1:1/film.mp4")], 400, "invalid_image"),
        ([item(data_url())], 400, "invalid_image"),
        ([item(url, 4, "video")], 400, "unsupported_parameter"),
    ):
        error = post(served, *found).json()["error"]
        assert (error["code"], post(served, *found).status_code) == (code, status), error
        assert error["param"].startswith("messages[0].content[")
    with serving(FIXTURES / "v5", max_pixels=3000) as small:
        assert post(small, item(url)).status_code == 400
    with serving(FIXTURES / "v5", context=100) as short:
        assert post(short, item(url)).json()["error"]["code"] == "context_length_exceeded"
