"""Prompts to embeddings: an image stays one object, and any part of a prompt can be embedded."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl import Prompt, PromptError

from .checkpoints.pictures import picture

SIZES = [(40, 50), (200, 130), (40, 50), (90, 60)]


@pytest.fixture
def case(loaded):
    """A model and a prompt of text, four images (one of them tiled), and text between them."""
    model, processor = loaded()
    content = [{"type": "text", "text": "Compare"}]
    for seed, size in enumerate(SIZES):
        image = processor.image_processor(picture(*size, seed=seed))
        content += [{"type": "image", "image": image}, {"type": "text", "text": f"{seed} and"}]
    return model, processor([{"role": "user", "content": content}])


def equal(ours, theirs) -> bool:
    # sums of a batch may be done in another order
    return np.allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


def whole(model, prompt) -> mx.array:
    """By the oldest way: all images, then all tokens."""
    features = model.encode_images(prompt.pixel_values, prompt.spatial_shapes)
    return model.embed(prompt.token_ids, features)[0]


def test_a_prompt_holds_its_images(case, loaded):
    model, prompt = case
    assert [placed.image.layout.rows > 0 for placed in prompt.images] == [False, True, False, False]
    position = 0
    for placed, size in zip(prompt.images, SIZES, strict=True):
        assert position < placed.start < placed.stop
        inside = prompt.token_ids[placed.start : placed.stop]
        assert inside.count(model.config.image_token_id) == placed.image_tokens
        between = prompt.token_ids[position : placed.start]
        assert model.config.image_token_id not in between
        processor = loaded()[1].image_processor
        assert len(inside) == processor.count_image_tokens(*size)
        assert placed.views == len(placed.image.spatial_shapes)
        assert placed.digest == placed.image.digest
        position = placed.stop
    assert len({placed.digest for placed in prompt.images}) == 4
    pixels = np.concatenate([placed.image.pixel_values for placed in prompt.images])
    assert np.array_equal(prompt.pixel_values, pixels)
    assert prompt.pixel_values is prompt.pixel_values
    assert len(prompt.spatial_shapes) == sum(placed.views for placed in prompt.images)
    bare = Prompt([1, 2, 3])
    assert (bare.images, bare.pixel_values, bare.spatial_shapes) == ((), None, ())
    assert bare.first_turn_length == 3


def test_parts_join_to_the_whole(case, work):
    model, prompt = case
    expected = whole(model, prompt)
    assert equal(model.embed_prompt(prompt), expected)
    length = len(prompt.token_ids)
    bounds = sorted({0, length, *(p for i in prompt.images for p in (i.start, i.stop))})
    parts = [model.embed_prompt(prompt, a, b) for a, b in pairwise(bounds)]
    assert [len(part) for part in parts] == np.diff(bounds).tolist()
    assert equal(mx.concatenate(parts), expected)
    first, second = prompt.images[0], prompt.images[1]
    assert equal(model.embed_prompt(prompt, second.start), expected[second.start :])
    middle = slice(first.stop, second.stop)
    assert equal(model.embed_prompt(prompt, middle.start, middle.stop), expected[middle])
    work.clear()
    assert model.embed_prompt(prompt, first.stop, second.start).shape[0] > 0
    assert model.embed_prompt(prompt, 5, 5).shape == (0, expected.shape[1])
    assert work.views == [], "text needs no vision tower"


@pytest.mark.parametrize("moved", [(1, 0), (0, -1), (1, -1)])
def test_a_part_may_not_cut_an_image(case, moved):
    model, prompt = case
    image = prompt.images[1]
    with pytest.raises(PromptError, match=f"cut through the image at {image.start}"):
        model.embed_prompt(prompt, image.start + moved[0], image.stop + moved[1])
    for start, stop in ((-1, None), (3, 2), (0, len(prompt.token_ids) + 1)):
        with pytest.raises(PromptError, match="no part of a prompt"):
            model.embed_prompt(prompt, start, stop)


def test_known_features_are_not_encoded_again(case, work):
    model, prompt = case
    expected, features = whole(model, prompt), {}
    stop = prompt.images[1].stop
    work.clear()
    assert equal(model.embed_prompt(prompt, 0, stop, features), expected[:stop])
    assert list(features) == [placed.digest for placed in prompt.images[:2]]
    assert sum(work.views) == sum(placed.views for placed in prompt.images[:2])
    work.clear()
    assert equal(model.embed_prompt(prompt, features=features), expected)
    assert sum(work.views) == sum(placed.views for placed in prompt.images[2:])
    work.clear()
    assert equal(model.embed_prompt(prompt, features=features), expected)
    assert work.views == []
    for placed in prompt.images:
        assert features[placed.digest].shape == (placed.image_tokens, expected.shape[1])
    # what is found is what is used
    features = {digest: mx.zeros_like(found) for digest, found in features.items()}
    zeros = model.embed_prompt(prompt, features=features)
    assert mx.abs(zeros).sum(axis=-1).tolist().count(0) == sum(len(f) for f in features.values())


def test_features_of_a_store_that_forgets_at_once(case):
    class Forgetful(dict):
        def __setitem__(self, key, value):
            self.clear()
            super().__setitem__(key, value)

    model, prompt = case
    store = Forgetful()
    assert equal(model.embed_prompt(prompt, features=store), whole(model, prompt))
    assert list(store) == [prompt.images[-1].digest]


def test_an_image_that_comes_twice_is_encoded_once_for_a_store(loaded, work):
    model, processor = loaded()
    prompt = processor("Same?", [picture(40, 50), picture(90, 60), picture(40, 50)])
    features = {}
    embeddings = model.embed_prompt(prompt, features=features)
    assert sum(work.views) == len(features) == 2
    assert equal(embeddings, whole(model, prompt))


def test_neighbouring_views_of_one_shape_go_together(loaded, work):
    model, processor = loaded()
    prompt = processor("Same?", [picture(40, 50, seed=i) for i in range(3)])
    for features in (None, {}):
        work.clear()
        model.embed_prompt(prompt, features=features)
        assert work.views == [3]


def test_features_given_for_the_whole_prompt(case, work):
    model, prompt = case
    expected = whole(model, prompt)
    features = model.encode_images(prompt.pixel_values, prompt.spatial_shapes)
    work.clear()
    start, stop = prompt.images[1].start, prompt.images[2].stop
    assert equal(model.embed_prompt(prompt, image_features=features), expected)
    part = model.embed_prompt(prompt, start, stop, image_features=features)
    assert equal(part, expected[start:stop])
    assert work.views == []
    for wrong in (features[:-1], mx.concatenate([features, features])):
        with pytest.raises(PromptError, match=f"but {len(wrong)} image features were given"):
            model.embed_prompt(prompt, start, stop, image_features=wrong)


def test_an_image_that_does_not_fit_its_place(case):
    model, prompt = case
    first = prompt.images[0]
    other = replace(prompt, images=(replace(first, image=prompt.images[1].image),))
    with pytest.raises(PromptError, match="image features were given"):
        model.embed_prompt(other, 0, first.stop)


@pytest.mark.parametrize("wrong", [-1, 435, 1 << 40, -(1 << 40), 5.0, None, "cat"])
def test_ids_outside_the_vocabulary(case, wrong, work):
    model, prompt = case
    assert model.config.text_config.vocab_size == 435
    message = rf"token id {wrong!r} is not in the vocabulary of 435 tokens, 0 to 434"
    with pytest.raises(PromptError, match=message):
        model.embed([5, wrong, 6])
    with pytest.raises(PromptError, match=message):
        model.embed_prompt(Prompt([5, wrong, 6]))
    ids = [*prompt.token_ids, wrong]
    with pytest.raises(PromptError, match=message):
        model.embed_prompt(replace(prompt, token_ids=ids))
    assert work.views == []
    expected = model.embed(mx.array([[0, 434]]))
    for ids in ([0, 434], list(np.array([0, 434]))):
        assert equal(model.embed_prompt(Prompt(ids)), expected[0])
    for array in (np.array([[0, 434]]), np.array([[0, 434]], np.uint16)):
        assert equal(model.embed(array), expected)


def user(*parts):
    items = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": items}


def test_where_the_first_answer_begins(loaded):
    processor = loaded()[1]
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "A cat."}
    first = [system, user(picture(40, 50), "What?", picture(200, 130))]
    alone = processor(first)
    assert alone.first_turn == alone.first_turn_length == len(alone.token_ids)
    later = [*first, answer, user("Where?", picture(90, 60)), answer, user("Why?")]
    for count in (3, 4, 6):
        prompt = processor(later[:count])
        assert prompt.first_turn == len(alone.token_ids) < len(prompt.token_ids)
        assert prompt.token_ids[: prompt.first_turn] == alone.token_ids
    continued = processor(
        [*first, answer], add_generation_prompt=False, continue_final_message=True
    )
    assert continued.first_turn == len(alone.token_ids) < len(continued.token_ids)
    assert continued.token_ids[: continued.first_turn] == alone.token_ids
    closed = processor(first, add_generation_prompt=False)
    assert closed.first_turn == len(closed.token_ids) < len(alone.token_ids)
    # there is no question before it
    begun = processor([answer, user("Where?")])
    assert begun.first_turn == len(begun.token_ids)


def test_the_first_turn_is_rendered_with_tools_and_variables(copied):
    from mlx_lfm2vl import load

    folder = copied()
    (folder / "chat_template.jinja").write_text(
        "{{ tools | tojson }}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    given = {"tools": [{"name": "look"}], "template_variables": {"mood": "merry"}}
    prompt, alone = (load(folder)[1](messages, **given) for messages in (talk, talk[:1]))
    assert prompt.first_turn == len(alone.token_ids) < len(prompt.token_ids)


@pytest.mark.parametrize(
    "template",
    [
        # shows how many messages there are, so that no shorter conversation is a beginning
        "{{ bos_token }}{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ],
    ids=["counts", "refuses"],
)
def test_a_template_whose_beginnings_differ(template, copied):
    from mlx_lfm2vl import load

    folder = copied()
    (folder / "chat_template.jinja").write_text(template)
    processor = load(folder)[1]
    talk = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Why?"},
    ]
    prompt = processor(talk)
    assert prompt.first_turn == len(prompt.token_ids)


def test_the_first_turn_is_rendered_at_the_same_moment(copied, monkeypatch):
    """A template that prints the time, to the microsecond."""
    from mlx_lfm2vl import load

    folder = copied()
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    processor = load(folder)[1]
    talk = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    prompt = processor(talk)
    assert prompt.first_turn < len(prompt.token_ids)
