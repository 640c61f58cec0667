"""Makes what the official implementation does when it is trained a few steps.

Needs what `make_checkpoints.py` needs:

    python tests/checkpoints/make_training_step.py

`training_step.npz`, of the checkpoint `v5`: the padded batch, its labels, loss and gradient norm of
each step, the gradients of the first one, and how far the last one's weights are from the
checkpoint's.
"""

from __future__ import annotations

import numpy as np
import torch
from make_checkpoints import HERE, as_pictures
from pictures import CASES, TRAINED, messages
from transformers import AutoProcessor, Lfm2VlForConditionalGeneration

STEPS = 3
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0


def labels_of(ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """The ids between an assistant's opening and the end of its turn; -100 elsewhere."""
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels = torch.full_like(ids, -100)
    for row, tokens in enumerate(ids.tolist()):
        inside = False
        for place, token in enumerate(tokens):
            if inside:
                labels[row, place] = token
                inside = token != end
            elif tokens[max(0, place + 1 - len(opening)) : place + 1] == opening:
                inside = True
    return labels


def main() -> None:
    folder = HERE / "v5"
    model = Lfm2VlForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    model = model.float().train()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    conversations = []
    for case, answer in TRAINED.items():
        assert case in CASES
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        conversations.append([*as_pictures(messages(case)), reply])
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    labels = labels_of(inputs["input_ids"], processor.tokenizer)
    arrays = {
        "input_ids": inputs["input_ids"].numpy().astype(np.int32),
        "attention_mask": inputs["attention_mask"].numpy().astype(np.bool_),
        "labels": labels.numpy().astype(np.int32),
    }
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            for name, weight in model.named_parameters():
                arrays[f"gradient.{name}"] = weight.grad.numpy().copy()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item())
        optimizer.step()
    for name, weight in model.named_parameters():
        change = (weight.detach() - start[name]).numpy()
        # half the bits: an error of 2e-6 where weights are about 0.2
        arrays[f"change.{name}"] = change.astype(np.float16)
    arrays["losses"] = np.array(losses, np.float64)
    arrays["norms"] = np.array(norms, np.float64)
    np.savez_compressed(HERE / "training_step.npz", **arrays)


if __name__ == "__main__":
    main()
