"""What `--to-hf` writes loads in transformers with equal weights and greedy tokens.

Runs where PyTorch and torchvision are installed besides transformers; elsewhere
`test_there_and_back_is_the_identity` compares with files that the official code wrote.
"""

import pytest

from mlx_lfm2vl import convert, generate, load

from .conftest import FIXTURES

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
            torch.tensor([prompt.token_ids]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    answer = processor.decode(out[0, len(prompt.token_ids) :].tolist(), skip_special_tokens=True)
    assert generate(ours, processor, prompt, temperature=0, max_tokens=8) == answer
