"""What `--to-hf` writes loads in transformers, and what its processor returns goes into our model.

Runs where PyTorch and torchvision are installed besides transformers; elsewhere
`test_there_and_back_is_the_identity` and `test_official_inputs.py` compare with files that the
official code wrote.
"""

import json

import pytest
from PIL import Image

from mlx_lfm2vl import convert, generate, load

from .checkpoints.pictures import messages
from .helpers import FIXTURES, close, stored

pytest.importorskip("torch", reason="needs PyTorch")


@pytest.mark.parametrize("name", ["first", "v5", "mlx", "noprefix", "untied", "text396"])
def test_to_hf_loads_in_transformers(name, tmp_path):
    import torch
    from transformers import Lfm2VlForConditionalGeneration

    convert(FIXTURES / name, tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "hf", to_hf=True)
    model, told = Lfm2VlForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    ours, processor = load(FIXTURES / name, dtype="float32")
    prompt = processor("Count the cats.")
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt.token_ids]),
            max_new_tokens=8,
            do_sample=False,
            # plain greedy: the recommended penalty, which is written along, applies there otherwise
            repetition_penalty=1.0,
            eos_token_id=None,
        )
    answer = processor.decode(out[0, len(prompt.token_ids) :].tolist(), skip_special_tokens=True)
    assert generate(ours, processor, prompt, temperature=0, max_tokens=8) == answer


@pytest.mark.parametrize("form", ["np", "pt"])
@pytest.mark.parametrize("case", ["small", "interleaved", "text"])
def test_the_processors_output_goes_in_as_it_is(form, case, loaded):
    from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor, PreTrainedTokenizerFast

    folder = FIXTURES / "v5"
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    names = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {key: value for key, value in names.items() if key.startswith(("bos", "eos", "image"))}
    processor = Lfm2VlProcessor(
        Lfm2VlImageProcessor(**settings),
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens),
        chat_template=(folder / "chat_template.jinja").read_text(),
    )
    conversation = messages(case)
    for item in conversation[0]["content"]:
        if item["type"] == "image":
            item["image"] = Image.fromarray(item["image"])
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors=form,
    )
    close(loaded("v5")[0](**inputs).logits[0], stored("v5", case)["logits"])
