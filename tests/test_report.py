"""What a conversion lost: answers after images first, texts apart, against direct computations."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlx_lfm2vl
from mlx_lfm2vl import ConvertError, DataError, Quantization, convert, stream_generate
from mlx_lfm2vl.cli.convert import main
from mlx_lfm2vl.conversion import report as module
from mlx_lfm2vl.conversion import samples as samples_module
from mlx_lfm2vl.conversion.report import (
    GREEDY_TOKENS,
    as_json,
    as_table,
    cosine,
    first_difference,
    kl_divergence,
    plot,
    report,
)
from mlx_lfm2vl.conversion.samples import (
    QUESTION,
    TEXTS,
    Samples,
    made_images,
    read_conversations,
    samples,
)

from .helpers import FIXTURES, SMALL, tensors

V5 = FIXTURES / "v5"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Folders of v5 as it is, in 4 and in 8 bits, and what the report says about them."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        few(patch)
        return folder, _compared(folder)


def few(patch):
    """Fewer samples: the first two images and two texts."""
    images, texts = list(made_images())[:2], TEXTS[:2]
    patch.setattr(samples_module, "made_images", lambda: iter(images))
    patch.setattr(samples_module, "TEXTS", texts)


def _compared(folder):
    convert(V5, folder / "four", Quantization(bits=4, **SMALL))
    convert(V5, folder / "eight", Quantization(bits=8, **SMALL))
    return report(V5, [FIXTURES / "mlx", folder / "four", folder / "eight"])


def test_equal_models(compared):
    result = compared[1][0]
    assert result.top1_agreement == result.text_top1_agreement == 1
    assert result.mean_kl == result.p99_kl == result.text_mean_kl == result.text_p99_kl == 0
    assert result.image_cosine == pytest.approx(1, abs=1e-6)
    assert set(result.first_difference) == {None}
    assert result.bits_per_weight["language model"] == 32
    assert result.tokens_per_second > 0


def test_numbers_are_those_of_a_direct_computation(compared):
    """The reference's greedy answers after images, and both models' opinions of each token."""
    folder, (_, worse, better) = compared
    assert worse.mean_kl > better.mean_kl > 0
    assert worse.text_mean_kl > better.text_mean_kl > 0
    assert worse.file_bytes == (folder / "four" / "model.safetensors").stat().st_size
    right, processor = mlx_lfm2vl.load(V5, dtype="float32")
    other, _ = mlx_lfm2vl.load(folder / "four", dtype="float32")
    divergences, agree = [], []
    for image in list(made_images())[:2]:
        prompt = processor(QUESTION, image)
        steps = stream_generate(right, processor, prompt, temperature=0, max_tokens=GREEDY_TOKENS)
        answer = [step.token for step in steps]
        logits = []
        for model in (right, other):
            features = model.encode_images(prompt.pixel_values, prompt.spatial_shapes)
            # one token after the other, through the cache
            cache, x, found = model.make_cache(), model.embed(prompt.token_ids, features), []
            for token in answer:
                found.append(model(inputs_embeds=x, cache=cache).logits[0, -1])
                x = model.language_model.embed(mx.array([[token]]))
            logits.append(np.array(mx.stack(found), np.float64))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
        divergences += list((np.exp(p) * (p - q)).sum(-1))
        agree += list(p.argmax(-1) == q.argmax(-1))
    assert len(agree) > 10
    assert worse.mean_kl == pytest.approx(np.mean(divergences), rel=1e-3)
    assert worse.top1_agreement == pytest.approx(np.mean(agree))
    stored = sum(a.nbytes for k, a in tensors(folder / "four").items() if k.startswith("language"))
    weights = sum(a.size for k, a in tree_flatten(right.parameters()) if k.startswith("language"))
    assert worse.bits_per_weight["language model"] == pytest.approx(8 * stored / weights)


def test_texts_are_scored_apart(compared):
    ids_of = mlx_lfm2vl.load(V5)[1].tokenizer.encode
    right, other = (mlx_lfm2vl.load(f, dtype="float32")[0] for f in (V5, compared[0] / "four"))
    divergences = []
    for text in TEXTS[:2]:
        ids = mx.array([ids_of(text, add_special_tokens=True)])
        p, q = (np.asarray(model(ids).logits[0, :-1], np.float64) for model in (right, other))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        divergences += list((np.exp(p) * (p - q)).sum(-1))
    assert compared[1][1].text_mean_kl == pytest.approx(np.mean(divergences), rel=1e-3)


def test_a_worse_vision_tower_shows_after_images_only(tmp_path, monkeypatch):
    few(monkeypatch)
    convert(FIXTURES / "wide", tmp_path / "tower", Quantization(
        group_size=32, recipe=str(_patterns(tmp_path, {"vision_tower.*": 2, "*": False}))
    ))  # fmt: skip
    (result,) = report(FIXTURES / "wide", [tmp_path / "tower"])
    assert result.mean_kl > 1e-3
    assert result.text_mean_kl < 1e-9
    assert result.image_cosine < 0.9999


def _patterns(folder, patterns):
    (folder / "p.json").write_text(json.dumps(patterns))
    return folder / "p.json"


def test_answers_end_at_their_end_token(monkeypatch):
    """What comes after it parts nothing, and is not scored."""
    tokens = iter([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 6], [5]])
    monkeypatch.setattr(
        module, "generate_step", lambda *a, **k: ((token, None) for token in next(tokens))
    )
    model, processor = mlx_lfm2vl.load(V5)
    prompt = processor("Count!")
    answers = [module._answer(model, prompt, None, (7,)) for _ in range(4)]
    assert answers == [[5, 6, 7], [5, 6, 7], [5, 6, 6], [5]]
    assert [first_difference(answers[0], other) for other in answers[1:]] == [None, 2, 1]


def test_built_in_samples():
    """Shapes, a word, and an image that is tiled; texts in several languages and forms."""
    chosen = samples(None)
    _, processor = mlx_lfm2vl.load(V5)
    views = [len(processor(talk).spatial_shapes) for talk in chosen.conversations]
    assert len(views) == 3
    assert max(views) > 5
    assert chosen.texts == list(TEXTS)


def test_small_parts():
    p, q = (mx.log(mx.array([row])) for row in ([0.5, 0.5], [0.25, 0.75]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-5)
    assert cosine(mx.array([[3.0, 4.0]]), mx.array([[4.0, 3.0]])).item() == pytest.approx(0.96)
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1], [1]) is None


def conversation(*items, answer=None):
    messages = [{"role": "user", "content": list(items)}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


TEXT = {"type": "text", "text": "What?"}


def test_samples(tmp_path):
    """Images, texts, and conversations in every form that training takes."""
    folder = tmp_path / "samples"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (40, 30), "red").save(folder / name)
    (folder / "note.txt").write_text("The cat sits on the table.")
    url = "data:image/png;base64,x"
    lines = [
        {"messages": conversation({"type": "image", "image": "sub/b.png"}, TEXT, answer="A cup.")},
        {"messages": conversation({"type": "image"}, TEXT), "images": ["sub/b.png"]},
        {"messages": conversation({"type": "image_url", "image_url": {"url": url}}, TEXT)},
        {"messages": [{"role": "user", "content": "Hello"}], "images": None},
    ]
    file = folder / "talks.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    talks, answers = zip(*read_conversations(file), strict=True)
    assert answers == ("A cup.", None, None, None)
    assert [len(talk) for talk in talks] == [1, 1, 1, 1]
    located = [talk[0]["content"][0]["image"] for talk in talks[:3]]
    assert located == [str(folder / "sub" / "b.png")] * 2 + [url]
    built_in = samples(None)
    both = samples(folder)
    assert len(both.conversations) == len(built_in.conversations) + 1 + 4
    assert both.texts == [*built_in.texts, "The cat sits on the table."]
    assert samples(file).conversations[-4:] == list(talks)


@pytest.mark.parametrize(
    "line",
    [
        "no json", "[]", "{}", '{"messages": []}', '{"messages": 5}', '{"messages": [{}]}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        '{"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]}',
        '{"messages": [{"role": "user", "content": [5]}]}', "[" * 100_000, "1" * 5000,
    ],
)  # fmt: skip
def test_bad_conversations(line, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n' + line)
    with pytest.raises(DataError, match=r"x\.jsonl line 2 ") as info:
        samples(file)
    assert "\n" not in str(info.value)


def test_no_samples(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConvertError, match=r"holds no image, no \.txt file"):
            samples(path)
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"x\.txt cannot be read"):
        samples(tmp_path)


def test_other_vocabularies():
    few = Samples([], ["Hello"])
    right = module._run(V5, few, None, int)
    with pytest.raises(ConvertError, match="makes other tokens of the same samples"):
        module._run(FIXTURES / "text396", few, right, int)


def test_as_a_plot(compared, tmp_path, monkeypatch):
    results = compared[1]
    plot(results, tmp_path / "fidelity.png")
    with Image.open(tmp_path / "fidelity.png") as image:
        assert image.width > 800
        assert len(image.getcolors(1 << 24)) > 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConvertError, match="the plot needs matplotlib"):
        plot(results, tmp_path / "other.png")


@pytest.fixture
def command(compared, monkeypatch, capsys):
    """Runs `report` with results that are there already."""
    asked = []
    monkeypatch.setattr(module, "report", lambda *a: asked.append(a[:3]) or compared[1])

    def run(*arguments):
        with pytest.raises(SystemExit) as info:
            main(["report", str(V5), "a", "b", *map(str, arguments)])
        return info.value.code, capsys.readouterr(), asked

    return run


def test_command(command, compared, tmp_path):
    code, told, asked = command("--samples", tmp_path)
    assert (code, told.out) == (0, as_table(compared[1]) + "\n")
    assert asked == [(str(V5), ["a", "b"], str(tmp_path))]
    assert "| four |" in told.out
    assert told.out.index("after images") < told.out.index("texts")
    code, told, _ = command("--json", "--plot", tmp_path / "x.png")
    assert (code, told.out) == (0, as_json(compared[1]) + "\n")
    assert json.loads(told.out)[1]["mean_kl"] > 0
    assert (tmp_path / "x.png").exists()


def test_a_plot_without_a_place_is_refused_before_the_work(command, tmp_path):
    for path in (tmp_path / "nope" / "x.png", tmp_path):
        code, told, asked = command("--plot", path)
        assert (code, asked) == (2, [])
        assert told.err.count("\n") == 1
        assert "the plot cannot be written to" in told.err
