"""Makes measuring/reference.json: what the official implementation computes with the demo model.

Needs Python with transformers 5.23, PyTorch and torchvision, and the demo model in the layout of
transformers:

    python -m mlx_lfm2vl.convert --hf-path demo --mlx-path demo-hf --to-hf
    python tests/checkpoints/make_demo_reference.py demo-hf
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from transformers import Lfm2VlForConditionalGeneration, Lfm2VlProcessor

sys.path.insert(0, str(Path(__file__).parents[2]))
from mlx_lfm2vl.measuring.reference import CASES, FILE, Case, draw, sampled

MARGIN = 1.0  # of each token's logit over the next one's: what types round to never decides


def main() -> None:
    folder = sys.argv[1]
    model = Lfm2VlForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Lfm2VlProcessor.from_pretrained(folder)
    weights = (FILE.parents[1] / "demo" / "model.safetensors").read_bytes()
    found = {
        "weights": hashlib.sha256(weights).hexdigest(),
        "cases": [compute(model, processor, case) for case in CASES],
    }
    FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")


@torch.no_grad()
def compute(model, processor, case: Case) -> dict[str, list]:
    content = [
        {"type": "image", "image": torch.from_numpy(draw(case.side)).permute(2, 0, 1)},
        {"type": "text", "text": case.question},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    features = model.model.get_image_features(
        pixel_values=inputs["pixel_values"],
        spatial_shapes=inputs["spatial_shapes"],
        pixel_attention_mask=inputs["pixel_attention_mask"],
    )
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    length = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        max_new_tokens=40,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = out.sequences[0, length:].tolist()
    print(processor.decode(answer), features.shape)
    for logits in out.logits:
        first, second = logits[0].topk(2).values.tolist()
        assert first - second > MARGIN, f"a token is chosen by {first - second}"
    return {
        "token_ids": inputs["input_ids"][0].tolist(),
        "features": short(features),
        "logits": short(out.logits[0][0]),
        "answer": answer,
    }


def short(array: torch.Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in sampled(array.numpy())]


if __name__ == "__main__":
    main()
