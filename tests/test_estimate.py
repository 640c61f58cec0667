"""What a question will cost: tokens exactly, seconds by rates that runs have shown."""

import io
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_lfm2vl import (
    CacheOptions,
    ImageOptions,
    Question,
    Session,
    Speeds,
    Usage,
    Worker,
    batch_generate,
    detect,
    estimate,
    generate,
    load,
    read_speeds,
    remember,
)
from mlx_lfm2vl.cli import serve, watch
from mlx_lfm2vl.cli.batch import main as batch_main
from mlx_lfm2vl.cli.benchmark import main as benchmark_main
from mlx_lfm2vl.cli.detect import main as detect_main
from mlx_lfm2vl.cli.generate import main
from mlx_lfm2vl.conversion import report as report_module
from mlx_lfm2vl.conversion import samples as samples_module
from mlx_lfm2vl.conversion.report import report
from mlx_lfm2vl.errors import OutputError
from mlx_lfm2vl.generation import speeds as module
from mlx_lfm2vl.generation.engine import Engine
from mlx_lfm2vl.generation.estimate import position_bytes
from mlx_lfm2vl.generation.generate import generate_step, run
from mlx_lfm2vl.generation.speeds import DECAY, STAGES, Fit, Learner, decode_work, speeds_path
from mlx_lfm2vl.models.cache import cache_nbytes, copy_cache
from mlx_lfm2vl.prompts.constraint import can_constrain

from .films import write_film
from .helpers import FIXTURES, WAIT, answer, cut, save_picture, user

QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def parts(loaded):
    return loaded()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A place of the test's own for what is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx-lfm2vl" / "speed.json"


def cost(**more):
    """What an answer might have cost."""
    values = {
        "prompt_tokens": 300, "processed_tokens": 300, "encoded_patches": 1024,
        "generation_tokens": 21, "vision_time": 0.5, "prompt_time": 0.8, "answer_time": 0.4,
    }  # fmt: skip
    return Usage(**values | more)


# costs from runs


def fitted(runs):
    fit = Fit(len(runs[0][0]))
    for work, seconds in runs:
        fit.add(work, seconds)
    return fit


def test_one_run_shows_a_rate():
    fit = fitted([((1000, 1), 2.0)])
    assert fit.seconds((500, 1)) == pytest.approx(1.0)
    fit = fitted([((10, 10 * 300, 1), 0.5)])
    assert fit.seconds((100, 100 * 900, 1)) == pytest.approx(5.0)


def test_runs_of_different_size_show_what_costs_once():
    fit = fitted([((n, 1), 0.3 + n * 0.001) for n in (100, 1000, 5000)])
    for n in (50, 400, 9000):
        assert fit.seconds((n, 1)) == pytest.approx(0.3 + n * 0.001, rel=0.03)
    runs = [
        (decode_work(tokens, length), 0.1 + (tokens - 1) * (0.02 + 1e-5 * (length + tokens / 2)))
        for tokens, length in ((10, 50), (200, 50), (30, 3000), (300, 5000), (80, 900))
    ]
    fit = fitted(runs)
    for tokens, length in ((20, 100), (250, 2000), (100, 6000)):
        true = 0.1 + (tokens - 1) * (0.02 + 1e-5 * (length + tokens / 2))
        assert fit.seconds(decode_work(tokens, length)) == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_cost(seed):
    """Sizes that are alike tell nothing of what costs once: the rate is what remains."""
    random = np.random.default_rng(seed)
    noise = random.uniform(0.95, 1.05, 12)
    fit = fitted([((1000 + n, 1), n_ * 1.0) for n, n_ in enumerate(noise)])
    assert fit.seconds((8000, 1)) == pytest.approx(8.0, rel=0.2)
    sizes = np.geomspace(100, 8000, 12)
    fit = fitted([((int(s), 1), (0.2 + s * 0.001) * n) for s, n in zip(sizes, noise, strict=True)])
    for size in (100, 1000, 8000):
        assert fit.seconds((size, 1)) == pytest.approx(0.2 + size * 0.001, rel=0.2)


def test_later_runs_count_more():
    runs = [((1000, 1), 2.0)] * 20
    fit = fitted(runs + [((1000, 1), 1.0)] * 20)
    assert fit.seconds((1000, 1)) == pytest.approx(1.0, rel=0.2)
    assert fit.runs < 1 / (1 - DECAY)


def test_no_cost_is_negative():
    fit = fitted([((n, 1), max(0.01, n * 0.001 - 0.3)) for n in (310, 500, 2000)])
    assert min(fit.costs or fit._solve()) >= 0
    assert fit.seconds((10, 1)) >= 0


# what is known


def test_unknown_rates_are_unknown(parts, work):
    found = estimate(*parts, QUESTION, Image.new("RGB", (64, 48)), speeds=Speeds())
    assert found.seconds_vision is found.seconds_prefill is found.seconds_decode is None
    assert found.seconds is None
    found = estimate(*parts, QUESTION, speeds=Speeds())
    assert found.seconds_vision == 0
    assert found.seconds is None


def test_seconds_by_the_rates_of_a_run(parts):
    speeds = Speeds()
    speeds.learn(cost(encoded_patches=1000, vision_time=2.0, prompt_time=2.5, processed_tokens=100,
                      prompt_tokens=100, generation_tokens=11, answer_time=1.0))  # fmt: skip
    picture = Image.new("RGB", (64, 48))
    found = estimate(*parts, QUESTION, picture, speeds=speeds, max_tokens=21)
    assert found.seconds_vision == pytest.approx(found.patches * 0.002)
    assert found.seconds_prefill == pytest.approx(found.prompt_tokens * 0.005)
    assert found.seconds_decode == pytest.approx(20 * 0.1)
    parts_of_it = (found.seconds_vision, found.seconds_prefill, found.seconds_decode)
    assert found.seconds == pytest.approx(sum(parts_of_it))
    together = estimate(*parts, QUESTION, picture, speeds=speeds, together=True)
    assert together.seconds_decode is None


def test_first_questions_are_apart_until_one_is_unknown():
    speeds = Speeds()
    assert speeds.seconds("vision", (1000, 1)) is None
    speeds.learn(cost(vision_time=1.0, prompt_time=1.5), first=STAGES)
    assert speeds.seconds("vision", (1024, 1)) == pytest.approx(1.0)
    speeds.learn(cost(vision_time=0.2, prompt_time=0.3))
    assert speeds.seconds("vision", (1024, 1)) == pytest.approx(0.2)
    assert speeds.seconds("vision", (1024, 1), first=True) == pytest.approx(1.0)
    assert speeds.seconds("prefill", (300, 1), first=True) == pytest.approx(0.5)
    assert speeds.seconds("decode", (0, 0, 1)) == 0


def test_what_was_not_measured_is_not_learnt():
    speeds = Speeds()
    speeds.learn(cost(vision_time=None))
    assert set(speeds.fits) == {"decode"}
    speeds.learn(cost(vision_time=None, encoded_patches=0, generation_tokens=1, answer_time=0.0))
    assert set(speeds.fits) == {"decode", "prefill"}
    speeds.learn(cost(rows=4))
    assert set(speeds.fits) == {"decode", "prefill", "vision", "decode together"}


# the file


def test_rates_are_remembered_by_model_and_machine(parts, cache, monkeypatch):
    model = parts[0]
    assert speeds_path() == cache
    assert read_speeds(model) == Speeds()
    assert not cache.parent.exists()
    assert remember(model, [cost(), cost()]) is None
    found = read_speeds(model)
    assert found.seconds("vision", (1024, 1)) == pytest.approx(0.5)
    assert found.fits["vision"].runs == pytest.approx(1 + DECAY)
    assert read_speeds(load(FIXTURES / "v5", dtype="bfloat16")[0]) == Speeds()
    assert read_speeds(load(FIXTURES / "wide", dtype="float32")[0]) == Speeds()
    other = load(FIXTURES / "v5", dtype="float32")[0]
    assert read_speeds(other).fits.keys() == found.fits.keys()
    monkeypatch.setattr(module, "version", lambda name: "9.9")
    assert read_speeds(model) == Speeds()
    remember(model, [cost(vision_time=0.1)])
    monkeypatch.undo()
    assert len(json.loads(cache.read_text())["speeds"]) == 2
    assert [path.name for path in cache.parent.iterdir() if not path.name.endswith(".lock")] == [
        "speed.json"
    ]


def test_a_path_of_ones_own(parts, tmp_path, cache):
    path = tmp_path / "deep" / "mine.json"
    remember(parts[0], [cost()], path=path)
    assert read_speeds(parts[0], path).fits
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"version": 2, "speeds": {}}', '{"version": 1}',
     '{"version": 1, "speeds": []}', '{"version": 1, "speeds": {"a": 5}}',
     '{"version": 1, "speeds": {"a": {"vision": [1, 2]}}}',
     '{"version": 1, "speeds": {"a": {"vision": [1, 2, 3, 4, 5, 6, NaN]}}}',
     '{"version": 1, "speeds": {"a": {"vision": [1, 2, 3, 4, 5, 6, -1]}}}',
     '{"version": 1, "speeds": {"a": {"vision": [1, 2, 3, 4, 5, 6, "x"]}}}',
     '{"version": 1, "speeds": {"a": {"flying": [1, 2, 3, 4, 5, 6, 7]}}}', b"\xff\xfe",
     "[" * 10_000],
)  # fmt: skip
def test_a_broken_file_is_begun_anew(content, parts, cache):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_speeds(parts[0])
    assert found.fits == {}
    assert str(cache) in found.problem
    assert estimate(*parts, "What?").seconds is None
    said = remember(parts[0], [cost()])
    assert said.startswith(str(cache))
    assert said.endswith("; it is begun anew")
    assert "\n" not in said
    assert read_speeds(parts[0]).problem is None
    assert read_speeds(parts[0]).seconds("vision", (1024, 1)) == pytest.approx(0.5)


def test_a_place_that_cannot_be_written(parts, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file")
    with pytest.raises(OutputError, match=r"speed\.json cannot be written"):
        remember(parts[0], [cost()])
    assert read_speeds(parts[0]).fits == {}


def test_several_write_at_once(parts, cache):
    threads = [threading.Thread(target=remember, args=(parts[0], [cost()])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_speeds(parts[0]).fits["vision"].runs == pytest.approx(
        sum(DECAY**n for n in range(4))
    )


def test_models_that_were_not_used_for_long_are_forgotten(parts, cache, monkeypatch):
    monkeypatch.setattr(module, "MOST_MODELS", 2)
    for name in ("a", "b", "a", "c"):
        monkeypatch.setattr(module, "_key", lambda model, name=name: name)
        remember(parts[0], [cost()])
    assert list(json.loads(cache.read_text())["speeds"]) == ["a", "c"]


# tokens


def film_item(tmp_path):
    return {"type": "video", "video": write_film(tmp_path / "film.mp4", images=9), "frames": 4}


def conversations(tmp_path):
    small, large, thin = (
        {"type": "image", "image": str(save_picture(tmp_path / f"{n}.png", *size))}
        for n, size in enumerate(((40, 50), (200, 130), (5, 300)))
    )
    text = {"type": "text", "text": QUESTION}
    system = {"role": "system", "content": "Be brief."}
    return {
        "text": [user("How many?")],
        "small": [user([small, text])],
        "large": [user([text, large])],
        "thin": [system, user([thin, text])],
        "two": [user([small, large, text])],
        "twice the same": [user([large, large, text])],
        "film": [user([film_item(tmp_path), text])],
        "turns": [system, user([large, text]), answer(), user([text, small, film_item(tmp_path)])],
    }


OPTIONS = [
    ImageOptions(),
    ImageOptions(do_image_splitting=False),
    ImageOptions(max_image_tokens=4, min_image_tokens=4, use_image_special_tokens=False),
]


def answered(parts, question):
    """What a question cost, and its last response."""
    engine = Engine(*parts)
    row = engine.add(question)
    *_, last = run(engine, row)
    return Usage.of(row), last


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "whole", "few"])
def test_tokens_are_those_of_the_run(options, parts, work, tmp_path):
    for name, messages in conversations(tmp_path).items():
        work.clear()
        question = Question(messages, image_options=options, max_tokens=2)
        found = estimate(*parts, question)
        assert (work.views, work.passes) == ([], []), "something went through the model"
        usage, last = answered(parts, question)
        assert found.prompt_tokens == usage.prompt_tokens == last.prompt_tokens, name
        assert found.image_tokens == last.image_tokens, name
        assert found.views == sum(work.views), name
        assert found.patches == usage.encoded_patches, name
        assert found.cached_tokens == usage.reused_tokens == 0
        assert estimate(*parts, question.prepared(parts[1])) == found, name


def test_tokens_with_tools_and_images_beside(parts, tmp_path):
    tools = [{"name": "f", "description": "It does.", "parameters": {}}]
    pictures = [save_picture(tmp_path / "a.png"), Image.new("RGB", (90, 60))]
    found = estimate(*parts, QUESTION, pictures, tools=tools)
    prompt = parts[1](QUESTION, pictures, tools=tools)
    assert found.prompt_tokens == len(prompt.token_ids)
    assert found.max_tokens == 256


def test_only_headers_are_read(parts, tmp_path):
    path = save_picture(tmp_path / "a.png", 300, 200)
    found = estimate(*parts, QUESTION, path)
    cut(path)
    assert estimate(*parts, QUESTION, path) == found


def test_a_session_knows_what_it_will_not_read_again(parts, tmp_path):
    session = Session(*parts, "Be brief.")
    film = write_film(tmp_path / "film.mp4", images=4)

    def check(text, ask):
        found = session.estimate(text, max_tokens=3)
        ask(text, max_tokens=3)
        usage = session.usage
        assert found.prompt_tokens == usage.prompt_tokens
        assert found.cached_tokens == usage.reused_tokens
        assert found.patches == usage.encoded_patches
        return found

    assert check("How are you?", session.ask).cached_tokens == 0
    assert check("Hello?", session.send).cached_tokens > 0
    session.see(save_picture(tmp_path / "a.png", 200, 130))
    assert check("What is it?", session.ask).patches == 0
    session.see_video(film, 3)
    assert check("What happens?", session.send).patches == 0
    assert check("And then?", session.send).patches == 0
    for digest in list(session.prefixes.features):  # what was read needs no features
        session.prefixes.discard(digest)
    assert check("And after that?", session.send).patches == 0
    session.prefixes.clear()
    again = check("Once more?", session.send)
    assert again.cached_tokens == 0
    assert again.patches > 0


@pytest.mark.parametrize(
    "options",
    [CacheOptions(), CacheOptions(kv_bits=8, quantized_kv_start=0),
     CacheOptions(kv_bits=4, kv_group_size=32, quantized_kv_start=0)],
)  # fmt: skip
def test_bytes_of_a_position(options, wide):
    layers = ("conv", "full_attention", "full_attention")
    config = SimpleNamespace(layer_types=layers, num_key_value_heads=2, head_dim=64)
    cache = wide.make_cache(options)
    list(generate_step(range(30), wide, max_tokens=2, prompt_cache=cache, cache_options=options))
    remembered = cache_nbytes([entry for entry in copy_cache(cache) if entry.has_slots])
    assert remembered == cache[0].offset * position_bytes(config, 4, options)


def test_memory_of_weights_and_cache(parts):
    model, processor = parts
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    found = estimate(model, processor, QUESTION, max_tokens=10)
    position = position_bytes(model.config.text_config, 4, CacheOptions())
    assert found.memory == weights + (found.prompt_tokens + 10) * position
    options = CacheOptions(max_kv_size=20)
    found = estimate(model, processor, QUESTION, max_tokens=10, cache_options=options)
    assert found.memory == weights + 20 * position


# what a run tells of itself


def test_times_of_answers(parts):
    picture = Image.new("RGB", (64, 48))
    usage, last = answered(parts, Question(QUESTION, picture, max_tokens=5, measure_vision=True))
    assert 0 < usage.vision_time < usage.prompt_time <= last.time_to_first_token * 1.5
    assert usage.answer_time > 0
    assert (usage.encoded_images, usage.encoded_patches, usage.rows) == (1, 16, 1)
    usage, _ = answered(parts, Question("Hi?", max_tokens=1))
    assert (usage.vision_time, usage.answer_time) == (None, 0.0)
    results = batch_generate(*parts, [Question(f"{n}?", max_tokens=5) for n in range(3)])
    assert {result.usage.rows for result in results} == {3}
    assert all(result.usage.prompt_time > 0 < result.usage.answer_time for result in results)


def test_nothing_is_written_without_being_asked(parts, cache):
    estimate(*parts, QUESTION)
    generate(*parts, QUESTION, max_tokens=2)
    batch_generate(*parts, [Question(QUESTION, max_tokens=2)])
    Session(*parts).ask(QUESTION, max_tokens=2)
    detect(*parts, Image.new("RGB", (64, 48)), "cat", max_tokens=2)
    with Worker(FIXTURES / "v5", "float32") as worker:
        worker.submit(QUESTION, max_tokens=2).result(WAIT)
    assert not cache.parent.exists()


@pytest.fixture
def taught(cache):
    """A model that remembers, and the costs that it has remembered, with the first stages."""
    model, processor = load(FIXTURES / "v5", dtype="float32")
    model.learner, found = Learner(model, pytest.fail), []
    model.learner.learn = found.extend
    return model, processor, found


def test_the_first_answers_teach_and_some_after_them(taught):
    model, processor, found = taught
    questions = [Question(f"{n}?", max_tokens=2) for n in range(35)]
    batch_generate(model, processor, questions, batch_size=3)
    assert len(found) == 8 + len((16, 32))
    assert [first for _, first in found if first] == [{"prefill", "decode", "decode together"}]
    picture = Question(QUESTION, Image.new("RGB", (64, 48)), max_tokens=2)
    batch_generate(model, processor, [picture] * 14)
    usage, first = found[-1]
    assert (len(found), first) == (11, set()), "the first picture was not one to learn from"
    assert usage.vision_time > 0


def test_stages_come_first_each_by_itself(taught):
    model, processor, found = taught
    session = Session(model, processor)
    session.see(Image.new("RGB", (64, 48)))
    assert session.ask(QUESTION, max_tokens=3)
    (seen, first), (_, second), *more = found
    assert (first, second, more) == (
        {"vision", "prefill"}, {"decode", "decode together"}, []
    )  # fmt: skip
    assert 0 < seen.vision_time < seen.prompt_time
    asking = session.stream_ask(QUESTION, max_tokens=3)
    next(asking)
    asking.close()
    assert len(found) == 2, "what nobody waited for teaches nothing"


# commands

MODEL = ("--model", FIXTURES / "v5", "--dtype", "float32", "--prompt", QUESTION, "-m", "3")


@pytest.fixture
def command(capsys):
    def call(main, *flags):
        with pytest.raises(SystemExit) as end:
            main([str(flag) for flag in flags])
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


@pytest.fixture
def photo(tmp_path):
    return save_picture(tmp_path / "photo.png", 200, 130)


def test_a_dry_run_asks_nothing(command, photo, parts, work):
    found = estimate(*parts, QUESTION, str(photo), max_tokens=3)
    code, out, err = command(main, *MODEL, "--image", photo, "--dry-run")
    assert (code, err, work.passes) == (0, "", [])
    tokens, patches = sum(found.image_tokens), found.patches
    assert out.startswith(
        f"prompt: {found.prompt_tokens} tokens, {tokens} of them of 1 image ({found.views} views, "
        f"{patches} patches)\nanswer: at most 3 tokens\nmemory: "
    )
    assert out.endswith("time: unknown; run the benchmark, or any question like it, once\n")
    said = json.loads(command(main, *MODEL, "--image", photo, "--dry-run", "--json")[1])
    assert said["prompt_tokens"] == found.prompt_tokens
    assert said["seconds"] is said["seconds_vision"] is None
    assert command(main, *MODEL, "--chat", "--dry-run")[0] == 2
    code, _, err = command(main, *MODEL, "--image", "no.png", "--dry-run")
    assert code == 2
    assert err.endswith("no.png does not exist\n")


def test_a_run_teaches_the_next_dry_run(command, photo, parts, cache):
    flags = (*MODEL, "--image", photo)
    answered = json.loads(command(main, *flags, "--json")[1])
    said = json.loads(command(main, *flags, "--dry-run", "--json")[1])
    assert said["prompt_tokens"] == answered["prompt_tokens"]
    assert said["image_tokens"] == answered["image_tokens"]
    assert said["seconds_vision"] == pytest.approx(answered["timings"]["vision_s"])
    assert said["seconds"] > 0
    out = command(main, *flags, "--dry-run")[1]
    assert "time: at most " in out
    assert "(images " in out
    names = set(read_speeds(parts[0]).fits)
    assert names == {"first vision", "first prefill", "first decode"}


def serve_one(*flags):
    """The command, whose server answers one question and ends."""

    class Server:
        def __init__(self, service, log):
            self.service = service

        def run(self, sockets):
            asked = self.service.worker.submit(QUESTION, photo_of(flags), max_tokens=3)
            self.service.worker.wait_until_ready(WAIT)
            asked.result(WAIT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "make_server", Server)
        serve.main([*map(str, flags[:4]), "--port", "0"])


def photo_of(flags):
    return str(flags[flags.index("--image") + 1])


def chat(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(f"/image {photo_of(flags)}\n{QUESTION}\n"))
        main([*map(str, flags[:4]), "--chat", "-m", "3"])


def watch_one(*flags):
    words = ["--source", "lavfi:color=size=64x48:duration=0.04", "--ask", QUESTION, "-m", "3"]
    watch.main([*map(str, flags[:4]), *words])


def batch_one(*flags):
    batch_main([*map(str, (*MODEL, *flags[4:])), "-o", f"{photo_of(flags)}.jsonl"])


DOORS = {
    "generate": lambda *flags: main([*map(str, flags), "--prompt", QUESTION, "-m", "3"]),
    "chat": chat,
    "detect": lambda *flags: detect_main([*map(str, flags), "--query", "cat"]),
    "batch": batch_one,
    "watch": watch_one,
    "serve": serve_one,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_command_that_asks_teaches(door, capsys, photo, parts):
    with pytest.raises(SystemExit) as end:
        DOORS[door](*MODEL[:4], "--image", photo)
    assert end.value.code == 0, capsys.readouterr().err
    fits = read_speeds(parts[0]).fits
    assert {"first vision", "first prefill"} <= set(fits)
    assert ("first decode" in fits) == (door != "detect" or not can_constrain())
    assert all(0 < fit.runs <= 2 for fit in fits.values())


def test_answers_of_a_form_teach_nothing_of_decoding(command, parts):
    command(main, *MODEL, "--regex", "aaaaaa")
    assert set(read_speeds(parts[0]).fits) == {"first prefill"}


def test_a_broken_file_costs_one_line(command, photo, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    code, out, err = command(main, *MODEL, "--image", photo, "--dry-run")
    assert (code, "unknown" in out) == (0, True)
    code, out, err = command(main, *MODEL, "--image", photo)
    assert (code, err.count("\n")) == (0, 1)
    assert err.endswith("it is begun anew\n")
    assert command(main, *MODEL, "--image", photo)[2] == ""


def test_without_a_place_to_remember(command, photo, cache):
    cache.parent.parent.write_text("a file")
    code, out, err = command(main, *MODEL, "--image", photo)
    assert (code, err) == (0, "")
    assert out


def test_a_folder(command, tmp_path, parts, work):
    folder, output = tmp_path / "images", tmp_path / "out.jsonl"
    folder.mkdir()
    for number in range(5):
        save_picture(folder / f"{number}.png", 40 + 60 * number, 50, number)
    cut(folder / "4.png")
    (folder / "bad.png").write_text("no picture")
    write_film(folder / "film.mp4", images=9)
    flags = (*MODEL, "--images", folder, "-o", output, "--frames", 3)
    code, out, err = command(batch_main, *flags, "--dry-run")
    assert (code, work.passes, output.exists()) == (0, [], False)
    assert "6 to be answered, 1 that cannot be read" in out
    assert "unknown" in out
    assert command(batch_main, *flags)[0] == 0
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    done = [entry for entry in entries if "text" in entry]
    assert len(done) == 5, "the picture that was cut can be counted, not read"
    assert any(entry["image"].endswith("film.mp4") for entry in done)
    more = estimate(*parts, QUESTION, folder / "4.png")
    prompts = sum(entry["prompt_tokens"] for entry in done) + more.prompt_tokens
    images = sum(entry["image_tokens"] for entry in done) + sum(more.image_tokens)
    assert f"prompts: {prompts} tokens, {images} of them of images (" in out
    assert f"answers: at most {6 * 3} tokens\n" in out
    assert {"first vision", "vision", "prefill", "decode together"} <= set(
        read_speeds(parts[0]).fits
    )
    assert "time: at most" in command(batch_main, *MODEL, "--images", folder, "-o",
                                      tmp_path / "new.jsonl", "--dry-run")[1]  # fmt: skip
    out = command(batch_main, *flags, "--dry-run")[1]
    assert "images: 0 to be answered, 7 done before\n" in out
    assert out.endswith("time: none\n")
    code, _, err = command(batch_main, *flags[:-1], 0)
    assert "frames is 0" in err


@pytest.mark.usefixtures("small_matrix")
def test_the_benchmark_teaches(command, parts):
    flags = ("--model", FIXTURES / "v5", "--dtype", "float32", "--size", "40x30", "--rounds", "1",
             "--max-tokens", "3", "--batch-size", "2")  # fmt: skip
    assert command(benchmark_main, *flags)[0] == 0
    speeds = read_speeds(parts[0])
    assert set(speeds.fits) == {"vision", "prefill", "decode", "decode together"}
    assert estimate(*parts, QUESTION, Image.new("RGB", (64, 48))).seconds > 0


def test_a_report_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(samples_module, "made_images", lambda: [Image.new("RGB", (40, 30))])
    monkeypatch.setattr(samples_module, "TEXTS", ("One two three.",))
    monkeypatch.setattr(report_module, "GREEDY_TOKENS", 2)
    told = []
    report(FIXTURES / "v5", [FIXTURES / "v5"], progress=lambda *pair: told.append(pair))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
