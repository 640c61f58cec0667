"""Makes what the official implementation finds probable, for `choices.json`.

Needs what `make_checkpoints.py` needs:

    python tests/checkpoints/make_choices.py

Each option is forced behind the prompt in a pass of its own; its score is the sum of the
log-probabilities of its tokens and of the end of the turn. The scores become probabilities by a
softmax.
"""

from __future__ import annotations

import json

import torch
from make_checkpoints import HERE, as_pictures
from pictures import picture
from transformers import AutoProcessor, Lfm2VlForConditionalGeneration

QUESTIONS = {
    "text": ("Is it red?", False, ["yes", "no", "Perhaps", "maybe", "no, it is not"]),
    "image": ("What is it?", True, ["a circle", "a square", "a", "☃ snow"]),
}


@torch.no_grad()
def main() -> None:
    model = Lfm2VlForConditionalGeneration.from_pretrained(HERE / "v5", attn_implementation="eager")
    model = model.float().eval()
    processor = AutoProcessor.from_pretrained(HERE / "v5")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = {}
    for name, (text, has_image, options) in QUESTIONS.items():
        content = [{"type": "text", "text": text}]
        if has_image:
            content.insert(0, {"type": "image", "image": picture(60, 40, 1)})
        messages = as_pictures([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        scores = []
        for option in options:
            ids = [*processor.tokenizer.encode(option, add_special_tokens=False), end]
            whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
            given = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
            logprobs = model(**given).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            scores.append(logprobs[range(len(ids)), ids].sum())
        probabilities = torch.stack(scores).softmax(0).tolist()
        found[name] = {
            "question": text,
            "has_image": has_image,
            "scores": torch.stack(scores).tolist(),
            "probabilities": dict(zip(options, probabilities, strict=True)),
        }
    (HERE / "choices.json").write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
