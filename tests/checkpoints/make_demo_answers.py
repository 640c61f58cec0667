"""Makes demo_answers.json: what the official implementation answers with the demo weights.

Needs Python with transformers 5.23, PyTorch and torchvision, and the demo model in the layout of
transformers:

    python -m mlx_lfm2vl.convert --hf-path demo --mlx-path demo-hf --to-hf
    python tests/checkpoints/make_demo_answers.py demo-hf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import Lfm2VlForConditionalGeneration, Lfm2VlProcessor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "demo"))
import world  # noqa: E402

EACH = 4  # pictures per task


def main() -> None:
    folder = sys.argv[1]
    model = Lfm2VlForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Lfm2VlProcessor.from_pretrained(folder)
    answers: dict[str, list[str]] = {}
    for task in world.TASKS:
        if task == "call":  # the template of a call is this package's own matter
            continue
        answers[task] = []
        for number in range(EACH):
            example = world.make_example("test", number, task)
            messages = world.messages_of(example, example.pictures)[:1]
            inputs = processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=200, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            answers[task].append(processor.decode(new, skip_special_tokens=True))
    path = HERE / "demo_answers.json"
    path.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
