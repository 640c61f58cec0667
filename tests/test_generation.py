"""Decoding, prefill in pieces, seeds, ends of answers; mlx-lm as the oracle of the text model."""

import json

import mlx.core as mx
import mlx_lm.models.lfm2
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step as mlx_lm_generate_step
from PIL import Image

from mlx_lfm2vl import GenerationResponse, PromptError, generate, stream_generate
from mlx_lfm2vl.generation.generate import generate_step

from .helpers import TOLERANCE, relative


def picture(width=200, height=130, seed=0) -> Image.Image:
    random = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(random)


@pytest.fixture(params=["text", "image", "two images"])
def case(request, loaded):
    """(model, prompt ids, embeddings) with and without images."""
    model, processor = loaded()
    count = {"text": 0, "image": 1, "two images": 2}[request.param]
    prompt = processor(
        "Count from one to ten, slowly.", images=[picture(seed=i) for i in range(count)]
    )
    return model, prompt.token_ids, model.embed_prompt(prompt)


def test_incremental_equals_whole(case):
    """Prefill of prompt and answer gives the logits that decoding gave."""
    model, ids, embeddings = case
    steps = list(generate_step(ids, model, max_tokens=20, input_embeddings=embeddings))
    answer = [token for token, _ in steps]
    decoded = mx.stack([logprobs for _, logprobs in steps])
    whole = mx.concatenate([embeddings, model.embed(answer)[0]])[None]
    logits = model(inputs_embeds=whole).logits[0, len(ids) - 1 : -1]
    again = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert relative(decoded, again) < TOLERANCE
    assert mx.argmax(again, axis=-1).tolist() == answer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_prefill_in_pieces_equals_whole(case, size):
    model, ids, embeddings = case

    def run(step_size):
        cache = model.make_cache()
        steps = generate_step(
            ids,
            model,
            max_tokens=8,
            input_embeddings=embeddings,
            prompt_cache=cache,
            prefill_step_size=step_size,
        )
        return [(token, logprobs) for token, logprobs in steps], cache

    (pieces, cache), (whole, reference) = run(size), run(100_000)
    assert [token for token, _ in pieces] == [token for token, _ in whole]
    for (_, ours), (_, theirs) in zip(pieces, whole, strict=True):
        assert relative(ours, theirs) < TOLERANCE
    for ours, theirs in zip(cache, reference, strict=True):
        assert ours.offset == theirs.offset == len(ids) + 7
        for a, b in zip(ours.state, theirs.state, strict=True):
            used = min(a.shape[2], b.shape[2]) if a.ndim == 4 else None
            if used is not None:
                a, b = a[:, :, : ours.offset], b[:, :, : ours.offset]
            assert relative(a, b) < TOLERANCE


def text_oracle(model, fixtures):
    """mlx-lm's own LFM2 with the weights of our language model."""
    config = json.loads((fixtures / "v5" / "config.json").read_text())["text_config"]
    config.setdefault("block_dim", config["hidden_size"])
    oracle = mlx_lm.models.lfm2.Model(mlx_lm.models.lfm2.ModelArgs.from_dict(config))
    oracle.load_weights(tree_flatten(model.language_model.parameters()), strict=True)
    return oracle


def test_text_model_equals_mlx_lm(loaded, fixtures):
    model, processor = loaded()
    oracle = text_oracle(model, fixtures)
    ids = mx.array([processor("Where do short convolutions look?").token_ids])
    assert relative(model.language_model(ids), oracle(ids)) < TOLERANCE
    ours, theirs = model.make_cache(), oracle.make_cache()
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        assert (
            relative(model.language_model(part, cache=ours), oracle(part, cache=theirs)) < TOLERANCE
        )


def test_mlx_lm_drives_the_language_model(case):
    """mlx-lm's generate_step runs on model.language_model and gives our tokens."""
    model, ids, embeddings = case
    theirs = [
        token
        for token, _ in mlx_lm_generate_step(
            mx.array(ids), model.language_model, max_tokens=12, input_embeddings=embeddings
        )
    ]
    ours = [
        token for token, _ in generate_step(ids, model, max_tokens=12, input_embeddings=embeddings)
    ]
    assert ours == theirs


def test_steps_are_those_of_mlx_lm_with_sampler_and_penalty(loaded):
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    from mlx_lfm2vl.generation import sampling

    model, processor = loaded()
    ids = processor("Once upon a time").token_ids
    mx.random.seed(3)
    theirs = mlx_lm_generate_step(
        mx.array(ids),
        model.language_model,
        max_tokens=15,
        sampler=make_sampler(0.8, min_p=0.05),
        logits_processors=make_logits_processors(repetition_penalty=1.3),
    )
    theirs = [token for token, _ in theirs]
    mx.random.seed(3)
    ours = generate_step(
        ids,
        model,
        max_tokens=15,
        sampler=sampling.make_sampler(0.8, min_p=0.05),
        logits_processors=sampling.make_logits_processors(None, 1.3),
    )
    assert [token for token, _ in ours] == theirs


def test_no_more_steps_than_tokens(loaded, work):
    """The last token launches no step, and only last positions meet the vocabulary."""
    model, processor = loaded()
    ids = processor("Once upon a time").token_ids
    model.language_model.decode_step = None
    assert len(list(generate_step(ids, model, max_tokens=5))) == 5
    assert work.passes == [len(ids), 1, 1, 1, 1]
    assert work.projected == [1] * 5
    assert work.traces == 1, "a step is traced once, and then replayed"
    list(generate_step(ids[:9], model, max_tokens=30))
    assert work.traces == 1, "for the next answer, too"


def test_seed_makes_sampling_repeatable(loaded):
    model, processor = loaded()

    def answer(seed):
        return generate(model, processor, "Hello", temperature=5.0, seed=seed, max_tokens=20)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_responses_tell_what_happened(loaded):
    model, processor = loaded()
    responses = list(
        stream_generate(
            model, processor, "What?", picture(), max_tokens=6, temperature=0, measure_vision=True
        )
    )
    assert all(isinstance(response, GenerationResponse) for response in responses)
    assert [response.generation_tokens for response in responses] == [1, 2, 3, 4, 5, 6]
    assert [response.finish_reason for response in responses] == [None] * 5 + ["length"]
    last = responses[-1]
    prompt = processor("What?", picture())
    assert last.prompt_tokens == len(prompt.token_ids)
    assert last.image_tokens == (sum(r * c for r, c in prompt.spatial_shapes) // 4,)
    assert 0 < last.vision_time <= last.time_to_first_token
    assert last.generation_tps > 0
    assert last.logprobs.shape == (model.config.text_config.vocab_size,)
    text = "".join(response.text for response in responses)
    assert text == processor.decode([r.token for r in responses], skip_special_tokens=True)


def test_an_eos_token_ends_the_answer(loaded, monkeypatch):
    model, processor = loaded()
    free = list(stream_generate(model, processor, "Hello", max_tokens=8, temperature=0))
    eos = free[3].token
    first = [r.token for r in free].index(eos)
    monkeypatch.setattr(
        processor,
        "generation_config",
        type(processor.generation_config)(eos_token_ids=(10_000, eos)),
    )
    ended = list(stream_generate(model, processor, "Hello", max_tokens=8, temperature=0))
    assert len(ended) == first + 1
    assert ended[-1].finish_reason == "stop"
    assert "".join(r.text for r in ended) == processor.decode([r.token for r in free[:first]], True)


def test_stop_texts_end_the_answer_and_are_not_shown(loaded):
    model, processor = loaded()
    whole = generate(model, processor, "Hello", max_tokens=30, temperature=0)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    responses = list(
        stream_generate(
            model, processor, "Hello", max_tokens=30, temperature=0, stop=["never seen", stop]
        )
    )
    assert "".join(r.text for r in responses) == whole[: whole.index(stop)]
    assert responses[-1].finish_reason == "stop"
    for n in range(len(responses)):
        shown = "".join(r.text for r in responses[:n])
        assert whole.startswith(shown), "text was shown that had to be taken back"


def test_a_prepared_prompt_is_the_same_question(loaded):
    model, processor = loaded()
    prompt = processor("What?", picture())
    direct = generate(model, processor, "What?", picture(), max_tokens=5, temperature=0)
    assert generate(model, processor, prompt, max_tokens=5, temperature=0) == direct
    with pytest.raises(PromptError, match="holds its images"):
        generate(model, processor, prompt, picture())
    with pytest.raises(PromptError, match="max_tokens is 0"):
        generate(model, processor, prompt, max_tokens=0)


def test_default_sampling_is_the_checkpoints(loaded):
    model, processor = loaded()
    recommended = processor.generation_config.sampling
    ours = generate(model, processor, "Hello", max_tokens=12, seed=5)
    stated = generate(
        model,
        processor,
        "Hello",
        max_tokens=12,
        seed=5,
        temperature=recommended.temperature,
        min_p=recommended.min_p,
        repetition_penalty=recommended.repetition_penalty,
    )
    assert ours == stated


def test_weights_are_read_when_needed_and_in_any_thread(fixtures):
    """A text-only question never reads the vision tower; a lazy model may change threads."""
    from concurrent.futures import ThreadPoolExecutor

    from mlx_lfm2vl import load

    model, processor = load(fixtures / "v5", dtype="float16")
    here = generate(*load(fixtures / "v5", dtype="float16"), "Hello", temperature=0, max_tokens=5)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(
            generate, model, processor, "Hello", temperature=0, max_tokens=5
        ).result()
    assert here == there


def test_conv_state_does_not_keep_the_prompt_alive(loaded):
    model, _ = loaded()
    hidden = model.config.text_config.hidden_size
    conv = next(layer.conv for layer in model.layers if not layer.is_attention_layer)
    cache = model.make_cache()
    conv_cache = next(c for c in cache if not hasattr(c, "keys"))
    from mlx_lfm2vl.models.lfm2 import Masks

    x = mx.random.normal((1, 50_000, hidden))
    out = conv(x, Masks(None), conv_cache)
    mx.eval(out, conv_cache.state)
    del out, x
    before = mx.get_active_memory()
    conv_cache.arrays = []
    assert before - mx.get_active_memory() < 64 * 1024
