"""Boxes: read from any answer, in the right place, with scores; pages, forms, drawings."""

import dataclasses
import io
import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_lfm2vl import AnswerError, ImageError, PromptError, load
from mlx_lfm2vl.errors import OutputError
from mlx_lfm2vl.generation import grounding
from mlx_lfm2vl.generation.grounding import (
    Box,
    box_schema,
    detect,
    detect_messages,
    draw,
    extract,
    layout,
    parse_boxes,
    parse_layout,
    to_coco,
    to_supervision,
    without_duplicates,
)
from mlx_lfm2vl.options import ImageOptions
from mlx_lfm2vl.prompts.json_schema import JSON_STYLE

from .helpers import FIXTURES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

import precision  # noqa: E402
import world  # noqa: E402

SIZE = (400, 200)
ITEM = '{"label": "cat", "bbox": [0.25, 0.5, 0.75, 1.0]}'
WANT = ("cat", 100, 100, 300, 200)

# answers with exactly the box of `WANT`
ANSWERS = {
    "as asked": f"[{ITEM}]",
    "fence": f"```json\n[{ITEM}]\n```",
    "prose": f"Sure [1]! {{Here}} they are: [{ITEM}] That's {{all}}.",
    "torn": f'[{ITEM}, {{"label": "cat", "bbox": [0.1, 0.',
    "torn in a label": f'[{ITEM}, {{"label": "ca',
    "no array": ITEM,
    "lines": ITEM + "\n",
    "wrapped": f'{{"objects": [{ITEM}], "count": 1}}',
    "twice": f"[{ITEM}, {ITEM}]",
    "nearly twice": f'[{ITEM}, {{"label": "cat", "bbox": [0.25, 0.5, 0.755, 1.0]}}]',
    "corners exchanged": '[{"label": "cat", "bbox": [0.75, 1.0, 0.25, 0.5]}]',
    "thousandths": '[{"image_id": 0, "bbox_2d": [250, 500, 750, 1000], "label": "cat"}]',
    "thousandths as bbox": '[{"label": "cat", "bbox": [250, 500, 750, 1000]}]',
    "beyond the edge": '[{"label": "cat", "bbox": [0.25, 0.5, 0.75, 1.02]}]',
    "Python": "[{'label': 'cat', 'bbox': (0.25, 0.5, 0.75, 1.0)}]",
    "other names": '{"name": "cat", "box": [0.25, 0.5, 0.75, 1]}',
    "among rubbish": f'[{{"label": 3, "bbox": [0, 0, 1, 1]}}, {{"bbox": "x"}}, {ITEM}, '
    '{"label": "cat", "bbox": [0, 0, 1]}, {"label": "cat", "bbox": [0, 0, 0, 1]}, '
    '{"label": "cat", "bbox": [0, 0, 1, null]}, {"label": "cat", "bbox": [0, 0, 1, NaN]}, '
    '{"label": "cat", "bbox": [0, 0, 1, 1e999]}, {"label": "cat", "bbox": [0, 0, true, 1]}, '
    '{"label": "cat", "bbox": [-3, 0, 1, 1]}]',
}


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS)
def test_boxes_are_read(text):
    [box] = parse_boxes(text, SIZE)
    assert (box.label, *box.xyxy) == pytest.approx(WANT)
    assert (box.image_size, box.score) == (SIZE, None)


RUBBISH = (
    "", "[]", "none", "{", "}", "[[[", "{" * 5000, "[" * 5000, '{"a":' * 3000, "{'a':" * 3000,
    "{[}]", '{"bbox": [1, 2, 3, 4]', "\0", '{"label": "x"}', "{1: 2}", "{{}}", "{*a}",
    '{"bbox": []}', '{"bbox": {"a": 1}}', "{'bbox': [" + "9" * 5000 + "]}",
)  # fmt: skip


@pytest.mark.parametrize("text", RUBBISH)
def test_rubbish_holds_no_box(text):
    assert parse_boxes(text, SIZE) == []
    assert [box.label for box in parse_boxes(text + ITEM + text, SIZE)] in (["cat"], [])
    assert parse_layout(text, [SIZE]) == []


def test_cut_and_spoilt_answers_never_raise():
    rng = random.Random(0)
    text = f"[{ITEM}, {ITEM.replace('cat', 'dog')}]"
    for cut in range(len(text)):
        assert len(parse_boxes(text[:cut], SIZE)) == (text[:cut].count("}"))
        spoilt = list(text)
        for _ in range(3):
            spoilt[rng.randrange(len(text))] = rng.choice('{}[]",:.0e\\x')
        assert len(parse_boxes("".join(spoilt), SIZE)) <= 2


def test_the_values_tell_the_scale():
    def boxes(*corners, key="bbox"):
        items = [{"label": str(n), key: list(values)} for n, values in enumerate(corners)]
        return [tuple(round(v, 1) for v in b.xyxy) for b in parse_boxes(json.dumps(items), SIZE)]

    assert boxes((0, 0, 1, 1)) == [(0, 0, 400, 200)]
    assert boxes((0, 0, 1, 1), (0, 0, 0.5, 0.5)) == [(0, 0, 400, 200), (0, 0, 200, 100)]
    # a thing in the corner beside others
    assert boxes((0, 0, 2, 2), (500, 0, 1000, 500), (0, 500, 500, 1000)) == [
        (0, 0, 0.8, 0.4), (200, 0, 400, 100), (0, 100, 200, 200)
    ]  # fmt: skip
    assert boxes((0, 0, 1, 1), key="bbox_2d") == [(0, 0, 0.4, 0.2)]
    # one slip among parts of a unit does not shrink the others
    assert boxes((0.5, 0.5, 1, 1), (0, 0, 37, 1), (0, 0, 0.5, 0.5)) == [
        (200, 100, 400, 200), (0, 0, 200, 100)
    ]  # fmt: skip


def test_a_box():
    box = Box("cat", 100, 50, 300, 150, SIZE, 0.5)
    assert box.normalized == (0.25, 0.25, 0.75, 0.75)
    assert (box.center, box.area) == ((200, 100), 20_000)
    assert box.iou(box) == 1
    assert box.iou(dataclasses.replace(box, x1=200, x2=400)) == pytest.approx(1 / 3)
    assert box.iou(Box("cat", 300, 50, 400, 150, SIZE)) == 0
    assert box.expand(0.1).xyxy == (80, 40, 320, 160)
    assert box.expand(9).xyxy == (0, 0, 400, 200)
    assert box.to_dict() == {"label": "cat", "box": [100, 50, 300, 150], "score": 0.5}
    picture = Image.new("RGB", SIZE)
    picture.paste((255, 0, 0), (100, 50, 300, 150))
    cut = box.crop(picture)
    assert (cut.size, cut.getcolors()) == ((200, 100), [(20_000, (255, 0, 0))])
    assert Box("", 0.2, 0.2, 0.4, 0.4, SIZE).crop(picture).size == (1, 1)


def test_of_duplicates_the_surest_stays():
    box = Box("cat", 100, 50, 300, 150, SIZE, 0.5)
    sure, other = dataclasses.replace(box, x2=301, score=0.9), dataclasses.replace(box, label="dog")
    moved = dataclasses.replace(box, x1=110)
    assert without_duplicates([box, other, sure, moved]) == [sure, other, moved]


# ---- wordings and schemas


def test_official_wordings():
    [user] = detect_messages("red car", thousandths=False)
    assert user["content"][0] == {"type": "image"}
    assert user["content"][1]["text"] == world.DETECT.format(query="red car")
    system, user = detect_messages("red {x}", thousandths=True)
    assert "normalized integer coordinates in [0, 1000]" in system["content"]
    assert system["content"].endswith("Return [] if none are visible.")
    assert user["content"][1]["text"] == "Detect all instances of: red {x}."
    assert "image_index=<n> <label> [xmin, ymin, xmax, ymax]\n<content>\n" in grounding.LAYOUT


def test_the_vocabulary_tells_the_model():
    def model(vocab_size):
        text_config = types.SimpleNamespace(vocab_size=vocab_size)
        return types.SimpleNamespace(config=types.SimpleNamespace(text_config=text_config))

    assert [grounding.answers_thousandths(model(n)) for n in (640, 65_536, 128_000)] == [
        False, False, True
    ]  # fmt: skip


@pytest.fixture(scope="module")
def accepts():
    llguidance = pytest.importorskip("llguidance")

    file = FIXTURES / "v5" / "tokenizer.json"
    tokenizer = llguidance.LLTokenizer(file.read_text("utf-8"))

    def check(schema, text):
        whole = json.dumps({**schema, "x-guidance": JSON_STYLE})
        matcher = llguidance.LLMatcher(
            tokenizer, llguidance.LLMatcher.grammar_from_json_schema(whole)
        )
        assert not matcher.get_error()
        ids = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def test_schemas_let_official_answers_through(accepts):
    unit = '[{"label": "ship", "bbox": [0.37, 0.00, 0.80, 0.99]}]'
    whole = '[{"image_id": 0, "bbox_2d": [540, 49, 1000, 774], "label": "cat on the right"}]'
    for thousandths, right, wrong in ((False, unit, whole), (True, whole, unit)):
        schema = box_schema(thousandths)
        assert accepts(schema, right)
        assert accepts(schema, "[]")
        assert accepts(schema, f"{right[:-1]}, {right[1:]}")
        assert not accepts(box_schema(thousandths, max_boxes=1), f"{right[:-1]}, {right[1:]}")
        assert not accepts(schema, wrong)
        assert not accepts(box_schema(thousandths, label="dog"), right)
    assert accepts(box_schema(False, "ship"), unit)
    assert not accepts(box_schema(False), unit.replace("0.80", "1.80"))
    assert not accepts(box_schema(False), unit.replace("0.80", "0.801"))


# ---- the demo model


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def true_box(example, query):
    [scene] = example.scenes
    [thing] = [t for t in scene.shapes if query in (t.kind, t.name)]
    return Box(query, *thing.box, (scene.width, scene.height))


def unique_examples(count, large):
    """Pictures with one thing that has its name alone."""
    number = 0
    while count:
        example = world.make_example("test", number, "detect", large=large)
        number += 1
        names = [thing.name for thing in example.scenes[0].shapes]
        name = next((n for n in names if names.count(n) == 1), None)
        if name is not None:
            count -= 1
            yield example, name


def turned(picture, orientation):
    """The file of a camera that was held so: stored otherwise, with a note how to turn it."""
    back = {
        3: Image.Transpose.ROTATE_180,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    picture.transpose(back[orientation]).save(data, "PNG", exif=exif)
    return data.getvalue()


@pytest.mark.parametrize("large", [False, True], ids=["one view", "tiles"])
def test_boxes_lie_where_things_were_drawn(demo, large):
    hits = total = 0
    for n, (example, name) in enumerate(unique_examples(4 if large else 8, large)):
        [picture] = example.pictures
        views = demo[1].image_processor(picture).spatial_shapes
        assert (len(views) > 1) == large
        wanted = true_box(example, name)
        boxes = detect(*demo, picture, [name])
        assert all(box.image_size == picture.size and box.label == name for box in boxes)
        hits += any(box.iou(wanted) >= 0.5 for box in boxes)
        total += 1
        # the same file as a turned camera writes it: the same pixels, so the same boxes
        if n < (1 if large else 4):
            assert detect(*demo, turned(picture, (6, 3, 5, 8)[n]), [name]) == boxes
    assert hits >= total - 1


def test_labels(demo):
    picture = ROOT / "examples" / "demo" / "picture.png"
    square, cross = ("yellow square", "green cross")
    listed = detect(*demo, picture, [square, cross])
    assert [box.label for box in listed] == [square, cross]
    # each is answered as if it were alone
    assert listed == [*detect(*demo, picture, [square]), *detect(*demo, picture, [cross])]
    assert detect(*demo, picture, square) == listed[:1]
    assert detect(*demo, picture, [square], max_tokens=1) == []
    tiled = detect(*demo, picture, [square], image_options=ImageOptions(do_image_splitting=False))
    assert tiled != listed[:1], "options reach the picture"


def test_an_answer_that_is_cut_has_no_box_that_was_made_up(demo):
    picture = ROOT / "examples" / "demo" / "picture.png"
    whole = detect(*demo, picture, ["yellow square"])
    found = [detect(*demo, picture, ["yellow square"], max_tokens=n) for n in (2, 20, 27, 60)]
    assert found[0] == []
    assert found[-1] == whole
    assert all(boxes in ([], whole) for boxes in found)


def test_without_llguidance_the_model_is_free(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    [box] = detect(*demo, ROOT / "examples" / "demo" / "picture.png", ["yellow square"])
    assert box.label == "yellow square"


def test_a_picture_is_encoded_once(demo, work):
    picture = ROOT / "examples" / "demo" / "picture.png"
    detect(*demo, picture, ["star"])
    once = sum(work.views)
    work.clear()
    detect(*demo, picture, ["star", "ring", "cross"])
    assert sum(work.views) == once > 0


def test_scores_are_the_probabilities_of_the_coordinates(demo):
    import math

    from mlx_lfm2vl import stream_generate

    picture = ROOT / "examples" / "demo" / "picture.png"
    [box] = detect(*demo, picture, ["yellow square"])
    question = world.DETECT.format(query="yellow square")
    text, logs = "", []
    settings = {"temperature": 0.0, **grounding.guided(box_schema(False, "yellow square"))}
    for response in stream_generate(*demo, question, images=picture, **settings):
        inside = '"bbox": [' in text and "]" not in text.rpartition('"bbox": [')[2]
        if inside and any(c.isdigit() for c in response.text):
            logs.append(response.logprobs[response.token].item())
        text += response.text
    assert len(logs) >= 4
    assert box.score == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-5)
    assert 0 < box.score < 1


def test_scores_order_boxes(demo):
    """Fewer pictures than `precision.py` takes, some of which the model sees wrong."""
    found = precision.find(*demo, range(434, 454)).values()
    answers = [answer for some, _ in found for answer in some]
    scored, constant = precision.both({"any": (answers, sum(things for _, things in found))})
    assert scored > constant + 0.03
    assert scored > 0.7


def test_average_precision():
    right = [(0.9, True), (0.8, False), (0.7, True)]
    assert precision.average_precision(right, 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert precision.average_precision([], 2) == 0
    assert precision.average_precision([(1, True)], 2) == 0.5


@pytest.mark.parametrize("labels", ["", " ", [], [""], ["a", 3], None, 3])
def test_nothing_to_look_for(demo, labels):
    with pytest.raises(PromptError, match="say what to look for"):
        detect(*demo, Image.new("RGB", (50, 50)), labels)


def test_an_unreadable_picture(demo):
    with pytest.raises(ImageError):
        detect(*demo, "nowhere.png", "cat")


# ---- pages and forms

PAGE = """image_index=0 title [115, 101, 273, 117]
A title

image_index=0 text [112, 132, 884, 309]
Two lines
[1] image_index=0 is no head here

image_index=1 <label>page_number</label> [493, 924, 506, 935]
3

image_index=7 text [0, 0, 10, 10]
no such page

image_index=0 text [0, 0, 10]
torn
"""


def test_blocks_of_a_page():
    blocks = parse_layout("Here:\n" + PAGE, [(1000, 2000), (500, 500)])
    assert [(b.box.label, b.page, b.text) for b in blocks] == [
        ("title", 0, "A title"),
        ("text", 0, "Two lines\n[1] image_index=0 is no head here"),
        ("page_number", 1, "3"),
    ]
    assert blocks[0].box.xyxy == pytest.approx((115, 202, 273, 234))
    assert blocks[2].box.xyxy == pytest.approx((246.5, 462, 253, 467.5))


@pytest.fixture
def asked(monkeypatch):
    """Gives an answer in place of a model, and keeps what was asked."""

    def answer(text):
        asked = []

        def generate(model, processor, prompt, images=None, **settings):
            asked.append((prompt, images, settings))
            return text

        monkeypatch.setattr(grounding, "generate", generate)
        return asked

    return answer


def test_layout_asks_about_all_pages(asked):
    asked = asked(PAGE)
    pages = [Image.new("RGB", (1000, 2000)), Image.new("RGB", (500, 500))]
    assert len(layout(None, None, pages)) == 3
    [(prompt, images, settings)] = asked
    assert (prompt, len(images), settings["temperature"]) == (grounding.LAYOUT, 2, 0.0)
    assert len(layout(None, None, pages[0])) == 2


def test_fields_are_asked_for_in_yaml(asked):
    asked = asked('```json\n{"colour": "light {brown}", "made in": "1984"}\n```')
    fields = {"colour": "the overall\n colour: of all", "made in": "a year"}
    assert extract(None, None, "x.png", fields) == {"colour": "light {brown}", "made in": "1984"}
    [(messages, _, settings)] = asked
    assert messages == [
        {"role": "system", "content": "colour: the overall colour: of all\nmade in: a year"},
        {"role": "user", "content": [{"type": "image", "image": "x.png"}]},
    ]
    assert settings["temperature"] == 0.0


@pytest.mark.parametrize("text", ["", "none", "[1]", '{"a": "torn'])
def test_an_answer_without_fields_is_told(asked, text):
    asked(text)
    with pytest.raises(AnswerError, match="no JSON object"):
        extract(None, None, "x.png", {"a": "b"})
    with pytest.raises(PromptError, match="fields are"):
        extract(None, None, "x.png", {})


def test_both_run_with_a_model(loaded):
    picture = Image.new("RGB", (64, 48), "red")
    assert layout(*loaded("v5"), picture, max_tokens=3) == []
    with pytest.raises(AnswerError):
        extract(*loaded("v5"), picture, {"a": "b"}, max_tokens=3)


# ---- drawings and other formats

BOXES = [Box("cat", 100, 50, 300, 150, SIZE, 0.5), Box("dog", 0, 0, 40, 200, SIZE, 0.25)]


def test_a_drawing(tmp_path):
    grey = Image.new("RGB", SIZE, (128, 128, 128))
    drawn = np.asarray(draw(grey, BOXES, min_side=0))
    assert drawn.shape == (200, 400, 3)
    # frames stand around the boxes, whose inside stays as it was, but for a name at the top
    inside = drawn[60:140, 110:290]
    assert (inside == 128).all()
    for y, x in ((100, 98), (100, 301), (48, 200), (151, 200)):
        assert (drawn[y, x] != 128).any(), (y, x)
    assert (drawn[100, 98] != drawn[100, 41]).any(), "one colour per label"
    assert (drawn[20:45, 100:160] == 255).any(), "a name above"
    assert draw(grey, [], min_side=0).tobytes() == grey.tobytes()
    assert draw(grey, [], min_side=800).size == (800, 400)
    assert draw(grey, [Box("x" * 200, 390, 195, 400, 200, SIZE)]).size == (400, 200)
    # a turned picture is drawn upright
    plain = Image.new("RGB", SIZE, (128, 128, 128))
    assert draw(turned(plain, 6), BOXES).tobytes() == draw(plain, BOXES).tobytes()


def test_coco():
    data = to_coco({"a.png": (SIZE, BOXES), "b.png": ((10, 20), [])})
    assert [image["file_name"] for image in data["images"]] == ["a.png", "b.png"]
    assert data["images"][1] == {"id": 2, "file_name": "b.png", "width": 10, "height": 20}
    assert data["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    first, second = data["annotations"]
    assert first == {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [100, 50, 200, 100], "area": 20_000,
        "iscrowd": 0, "score": 0.5,
    }  # fmt: skip
    assert (second["id"], second["category_id"]) == (2, 2)


def test_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(OutputError, match="pip install supervision"):
        to_supervision(BOXES)
    stub = types.SimpleNamespace(Detections=lambda **values: values)
    monkeypatch.setitem(sys.modules, "supervision", stub)
    values = to_supervision(BOXES)
    assert values["xyxy"].tolist() == [[100, 50, 300, 150], [0, 0, 40, 200]]
    assert values["confidence"].tolist() == [0.5, 0.25]
    assert values["data"]["class_name"].tolist() == ["cat", "dog"]
    assert to_supervision([])["xyxy"].shape == (0, 4)


# ---- the command line


def run(capsys, *arguments):
    from mlx_lfm2vl.cli.detect import main

    with pytest.raises(SystemExit) as ended:
        main(["--model", "demo", *map(str, arguments)])
    streams = capsys.readouterr()
    return ended.value.code, streams.out, streams.err


PICTURE = ROOT / "examples" / "demo" / "picture.png"


def test_one_picture_at_the_command_line(tmp_path, capsys, demo):
    target = tmp_path / "new" / "out.png"
    code, out, err = run(
        capsys, "--image", PICTURE, "--query", "yellow square", "ring", "--draw", target, "--json"
    )
    assert (code, err) == (0, "")
    entry = json.loads(out)
    boxes = detect(*demo, PICTURE, ["yellow square", "ring"])
    assert entry["boxes"] == [box.to_dict() for box in boxes] != []
    assert (entry["image"], entry["width"], entry["height"]) == (str(PICTURE), 345, 236)
    with Image.open(target) as image:
        assert image.size == (345, 236)
    assert [path.name for path in target.parent.iterdir()] == ["out.png"]
    code, out, _ = run(capsys, "--image", PICTURE, "--query", "yellow square")
    assert out.startswith(f"{PICTURE}: yellow square [")
    assert run(capsys, "--image", PICTURE, "--query", "ring")[1] == f"{PICTURE}: nothing found\n"


def test_a_folder_at_the_command_line(tmp_path, capsys):
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/a.png"):
        (photos / name).write_bytes(PICTURE.read_bytes())
    (photos / "torn.png").write_bytes(PICTURE.read_bytes()[:100])
    drawn, coco = tmp_path / "drawn", tmp_path / "boxes.json"
    code, out, err = run(
        capsys,
        "--image",
        photos,
        "--query",
        "green cross",
        "--draw",
        drawn,
        "--json",
        "--coco",
        coco,
    )
    assert code == 0
    assert [json.loads(line)["image"] for line in out.splitlines()] == [
        str(photos / "a.png"), str(photos / "sub" / "a.png")
    ]  # fmt: skip
    assert err.count("\n") == 1
    assert "torn.png" in err
    assert len(list(drawn.iterdir())) == 2
    data = json.loads(coco.read_text())
    assert len(data["images"]) == len(data["annotations"]) == 2


def test_bad_input_at_the_command_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments in (
        ["--image", tmp_path / "none.png", "--query", "x"],
        ["--image", PICTURE, "--query", " "],
        ["--image", PICTURE, "--query", "ring", "--draw", tmp_path / "file" / "out.png"],
    ):
        code, _, err = run(capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1), err
