"""Sessions: what was read is not read again, and answers are those of a run from scratch."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_lfm2vl import (
    CacheOptions,
    ImageError,
    ImageOptions,
    PromptError,
    Sampling,
    Session,
    SnapshotError,
    generate,
    load,
)
from mlx_lfm2vl.options import MOST

from .checkpoints.pictures import picture
from .helpers import FIXTURES

GREEDY = Sampling(temperature=0)


def ask(session, question, tokens=6):
    return session.ask(question, sampling=GREEDY, max_tokens=tokens)


def send(session, message, tokens=6):
    return session.send(message, sampling=GREEDY, max_tokens=tokens)


def from_scratch(loaded, messages, tokens=6, **options):
    return generate(*loaded(), messages, temperature=0, max_tokens=tokens, **options)


def turn(text, *images):
    items = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def said(text):
    return {"role": "assistant", "content": text}


RED, BLUE = picture(60, 40, 1), picture(60, 40, 2)


def test_a_second_question_reads_only_its_text(loaded, work):
    session = Session(*loaded())
    session.see(RED)
    assert sum(work.views) == 1
    first = ask(session, "What is it?")
    work.clear()
    answer = ask(session, "Where is the cat?", tokens=6)
    assert sum(work.views) == 0
    prompt = loaded()[1]([turn("Where is the cat?", RED)])
    new = len(prompt.token_ids) - prompt.images[-1].stop
    assert work.positions == new + 5, "five tokens of the answer are read, the sixth is not"
    assert session.usage.processed_tokens == new
    assert session.usage.reused_tokens == prompt.images[-1].stop
    assert session.usage.encoded_images == 0
    assert session.usage.generation_tokens == 6
    work.clear()
    assert answer == from_scratch(loaded, [turn("Where is the cat?", RED)])
    assert first == from_scratch(loaded, [turn("What is it?", RED)])


def test_seeing_costs_what_it_says(loaded, work):
    session = Session(*loaded(), system="Be brief.")
    session.see(picture(200, 130))
    prompt = loaded()[1]([{"role": "system", "content": "Be brief."}, turn("?", picture(200, 130))])
    assert session.usage.prompt_tokens == prompt.images[0].stop == work.positions
    assert session.usage.encoded_images == 1
    assert sum(work.views) == len(prompt.spatial_shapes)


def test_questions_do_not_enter_the_conversation(loaded):
    session = Session(*loaded())
    session.see(RED)
    ask(session, "Remember the number 7.")
    assert session.messages == []
    assert ask(session, "Which number?") == from_scratch(loaded, [turn("Which number?", RED)])


def test_turns_equal_a_run_from_scratch(loaded, work):
    session = Session(*loaded(), system="Be brief.")
    session.see(RED)
    history = [{"role": "system", "content": "Be brief."}]
    for n, text in enumerate(("What is it?", "And where?", "How many?")):
        work.clear()
        answer = send(session, text)
        history.append(turn(text, *([RED] if n == 0 else [])))
        views, positions = sum(work.views), work.positions
        assert views == 0
        assert answer == from_scratch(loaded, history)
        assert positions == session.usage.processed_tokens + 5
        if n:
            # at the least, everything up to the last image is there
            assert session.usage.reused_tokens >= loaded()[1](history).images[-1].stop
        history.append(said(answer))
    assert len(session.messages) == 7


def test_a_turn_whose_answer_encodes_to_itself_is_not_read_again(loaded, work, monkeypatch):
    """The third turn reads exactly its own text, behind what was said."""
    model, processor = loaded()
    session = Session(model, processor)
    session.see(RED)
    wanted = processor.tokenizer.encode(" The cat sits on the table.")
    eos = processor.tokenizer.eos_token_id

    def speak(settings, seed=None):
        script = iter([*wanted, eos, eos])
        return lambda logprobs: mx.array([next(script)]), []

    monkeypatch.setattr(sys.modules["mlx_lfm2vl.generation.engine"], "from_settings", speak)
    for n, text in enumerate(("What?", "Where?", "Who?")):
        before = session.usage
        answer = session.send(text, max_tokens=50)
        assert answer == " The cat sits on the table."
        if n:
            everything = processor([*session.messages[:-2], session.messages[-2]])
            spoken = before.prompt_tokens + len(wanted) + 1
            assert session.usage.reused_tokens == spoken
            assert session.usage.processed_tokens == len(everything.token_ids) - spoken


def test_undo(loaded, work):
    session = Session(*loaded())
    session.see(RED)
    first = send(session, "What is it?")
    send(session, "And where?")
    session.undo()
    work.clear()
    again = send(session, "How many?")
    assert sum(work.views) == 0
    assert again == from_scratch(loaded, [turn("What is it?", RED), said(first), turn("How many?")])
    session.undo()
    session.undo()
    assert session.messages == []
    work.clear()
    assert send(session, "What is it?") == first
    assert sum(work.views) == 0
    session.undo()
    with pytest.raises(PromptError, match="no turn to undo"):
        session.undo()


def test_fork(loaded, work):
    session = Session(*loaded())
    session.see(RED)
    first = send(session, "What is it?")
    work.clear()
    twin = session.fork()
    answers = send(session, "Left?"), send(twin, "Right?")
    assert sum(work.views) == 0
    history = [turn("What is it?", RED), said(first)]
    assert answers[0] == from_scratch(loaded, [*history, turn("Left?")])
    assert answers[1] == from_scratch(loaded, [*history, turn("Right?")])
    assert len(session.messages) == len(twin.messages) == 4
    assert session.messages != twin.messages


def test_two_images(loaded, work):
    session = Session(*loaded())
    session.see(RED)
    work.clear()
    session.see(BLUE)
    assert sum(work.views) == 1, "the first image was encoded again"
    work.clear()
    answer = ask(session, "What changed?")
    assert sum(work.views) == 0
    assert answer == from_scratch(loaded, [turn("What changed?", RED, BLUE)])


def test_a_changed_image_of_the_same_size_is_not_mistaken(loaded, work):
    session = Session(*loaded())
    session.see(RED)
    ask(session, "What is it?")
    session.reset()
    work.clear()
    session.see(BLUE)
    assert sum(work.views) == 1
    assert session.usage.reused_tokens == 0
    assert ask(session, "What is it?") == from_scratch(loaded, [turn("What is it?", BLUE)])
    session.reset()
    work.clear()
    session.see(RED)
    assert sum(work.views) == 0, "the first image is still known"


@pytest.mark.parametrize(
    "options",
    [
        ImageOptions(max_image_tokens=8, min_image_tokens=8),
        ImageOptions(use_image_special_tokens=False),
        ImageOptions(min_image_tokens=1, max_image_tokens=1),
    ],
)
def test_the_same_image_under_other_options_is_not_mistaken(options, loaded, work):
    session = Session(*loaded())
    session.see(RED)
    session.reset()
    work.clear()
    session.see(RED, options)
    assert sum(work.views) == 1
    scratch = from_scratch(loaded, [turn("What?", RED)], image_options=options)
    assert ask(session, "What?") == scratch


def test_saved_and_loaded_in_a_new_process(loaded, tmp_path):
    session = Session(*loaded(), system="Be brief.")
    session.see(RED)
    send(session, "What is it?")
    session.see(BLUE)
    session.save(tmp_path / "talk.safetensors")
    expected = send(session, "And this?"), ask(session, "Which is red?")
    code = f"""
import json
from mlx_lfm2vl import Sampling, Session, load
session = Session(*load({str(FIXTURES / "v5")!r}, dtype="float32"))
session.load({str(tmp_path / "talk.safetensors")!r})
first = session.send("And this?", sampling=Sampling(temperature=0), max_tokens=6)
usage = session.usage
second = session.ask("Which is red?", sampling=Sampling(temperature=0), max_tokens=6)
print(json.dumps([first, second, usage.encoded_images, usage.reused_tokens]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, encoded, reused = json.loads(run.stdout)
    assert (first, second) == expected
    assert encoded == 0
    assert reused > 0
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]


def test_wrong_files_are_refused_with_their_reason(loaded, tmp_path):
    session = Session(*loaded())
    session.see(RED)
    path = tmp_path / "talk.safetensors"
    session.save(path)
    other = Session(*load(FIXTURES / "text396", dtype="float32"))
    with pytest.raises(SnapshotError, match="belongs to another model"):
        other.load(path)
    half = Session(*load(FIXTURES / "v5", dtype="float16"))
    with pytest.raises(SnapshotError, match="belongs to another model"):
        half.load(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SnapshotError, match="cannot be read as a session"):
        session.load(path)
    mx.save_safetensors(str(path), {"a": mx.zeros((2,))}, {"format": "mlx"})
    with pytest.raises(SnapshotError, match="its format is mlx"):
        session.load(path)
    with pytest.raises(SnapshotError, match="cannot be read"):
        session.load(tmp_path / "missing.safetensors")
    assert ask(session, "What?") == from_scratch(loaded, [turn("What?", RED)])


def test_a_bad_image_leaves_the_session_as_it_was(loaded, tmp_path):
    session = Session(*loaded())
    session.see(RED)
    with pytest.raises(ImageError):
        session.see(tmp_path / "missing.png")
    with pytest.raises(PromptError, match="empty"):
        session.ask(" ")
    assert ask(session, "What?") == from_scratch(loaded, [turn("What?", RED)])


def test_a_stream_left_early_leaves_the_conversation_as_it_was(loaded):
    session = Session(*loaded())
    session.see(RED)
    stream = session.stream_send("What?", sampling=GREEDY)
    next(stream)
    stream.close()
    assert session.messages == []
    pieces = [r.text for r in session.stream_send("What?", sampling=GREEDY, max_tokens=6)]
    assert "".join(pieces) == from_scratch(loaded, [turn("What?", RED)])
    assert len(session.messages) == 2
    pieces = [r.text for r in session.stream_ask("Why?", sampling=GREEDY, max_tokens=6)]
    assert len(session.messages) == 2


def test_snapshots_are_bounded_by_bytes(loaded):
    session = Session(*loaded())
    session.see(RED)
    most = 3 * session.prefixes.nbytes
    session = Session(*loaded(), max_prefix_bytes=most)
    for seed in range(12):
        session.reset()
        session.see(picture(60, 40, seed))
        held = sum(entry.nbytes for entry in session.prefixes.entries.values())
        assert session.prefixes.nbytes == held <= most
    assert len(session.prefixes.entries) == 6, "a cache and the features of each of three images"
    nothing = Session(*loaded(), max_prefix_bytes=0)
    nothing.see(RED)
    assert ask(nothing, "What?") == from_scratch(loaded, [turn("What?", RED)])


def test_sessions_with_bounded_and_quantized_caches(loaded, work):
    for options in (CacheOptions(200), CacheOptions(120, 4)):
        session = Session(*loaded(), cache_options=options)
        session.see(RED)
        work.clear()
        for text in ("What is it?", "And where?", "How many?", "Why?", "When?"):
            send(session, text, tokens=20)
        assert sum(work.views) == 0
        assert all(len(array.shape) < 4 or array.shape[2] <= options.max_kv_size
                   for kept in session.prefixes.entries.values() if kept.length < MOST
                   for entry in kept.value for array in entry.state)  # fmt: skip


def test_image_features_can_be_passed_again(loaded, work):
    model, processor = loaded()
    prompt = processor("What?", RED)
    features = model.encode_images(prompt.pixel_values, prompt.spatial_shapes)
    work.clear()
    answer = generate(
        model, processor, prompt, temperature=0, max_tokens=6, image_features=features
    )
    assert sum(work.views) == 0
    assert answer == from_scratch(loaded, [turn("What?", RED)])
