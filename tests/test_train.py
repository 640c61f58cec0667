"""Training: one exact step, and runs that can be stopped, killed, resumed and shared."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lfm2vl import TrainError, load
from mlx_lfm2vl.checkpoints.adapters import PARTS, trainable_linears
from mlx_lfm2vl.checkpoints.names import mlx_name
from mlx_lfm2vl.models.layers import random_seed
from mlx_lfm2vl.training.data import Batch, collate, read_dataset
from mlx_lfm2vl.training.options import TrainingOptions
from mlx_lfm2vl.training.trainer import loss_sum, make_optimizer, prepare, step

from .checkpoints.pictures import TRAINED
from .helpers import FIXTURES, save_case, stored, write_lines

EVERYTHING = tuple(PARTS)
FULL = TrainingOptions(
    fine_tune_type="full",
    train=EVERYTHING,
    learning_rate=1e-3,
    schedule="constant",
    weight_decay=0.1,
    max_grad_norm=1.0,
)


def fresh():
    """A model whose weights may change."""
    return load(FIXTURES / "v5", dtype="float32")[0]


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def learned(model) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(model.trainable_parameters())}


def gradients(model, batch) -> tuple[float, dict[str, np.ndarray]]:
    """The sum of losses, and its gradients."""
    loss, grads = nn.value_and_grad(model, loss_sum)(model, batch)
    mx.eval(loss, grads)
    return loss.item(), {name: np.array(array) for name, array in tree_flatten(grads)}


def furthest(ours, expected) -> float:
    """The largest error of a tensor, over the tensor's largest value."""
    assert ours.keys() == expected.keys()
    return max(
        float(np.abs(ours[name] - value).max() / max(np.abs(value).max(), 1e-6))
        for name, value in expected.items()
    )


@pytest.fixture(scope="module")
def cases(loaded, tmp_path_factory):
    """The samples of the official steps."""
    folder = tmp_path_factory.mktemp("cases")
    entries = [save_case(folder, case, reply) for case, reply in TRAINED.items()]
    path = write_lines(folder / "train.jsonl", entries)
    return read_dataset(path, loaded()[1], max_length=4096)


@pytest.fixture
def beside(loaded):
    """Lays samples side by side."""
    return lambda samples: collate(samples, loaded()[1].image_processor)


# a step


@pytest.fixture(scope="module")
def official():
    """What the official implementation did, tensors by our names and in our layout."""
    with np.load(FIXTURES / "training_step.npz") as arrays:
        found = dict(arrays)
    for kind in ("gradient", "change"):
        tensors = {}
        for key in [key for key in found if key.startswith(f"{kind}.")]:
            name, value = mlx_name(key.removeprefix(f"{kind}.")), found.pop(key)
            tensors[name] = value.swapaxes(1, 2) if name.endswith("conv.conv.weight") else value
        found[kind] = tensors
    return found


@pytest.fixture
def official_batch(cases, beside, official):
    """The official batch as ours, with the official pixels, which may differ by a grey level."""
    batch = beside(cases.samples)
    ids = official["input_ids"]
    pixels = []
    names = dict(zip(map(bytes, (row[:30].tobytes() for row in ids)), TRAINED, strict=True))
    for row in batch.token_ids:
        case = stored("v5", names[row[:30].astype(ids.dtype).tobytes()])
        pixels += [case["pixel_values"]] if "pixel_values" in case else []
    assert np.abs(np.concatenate(pixels).astype(int) - batch.pixel_values).max() <= 1
    return replace(batch, pixel_values=np.concatenate(pixels))


def test_the_same_tokens_count_as_officially(cases, official):
    for sample, ids, mask, labels in zip(
        cases.samples,
        official["input_ids"],
        official["attention_mask"],
        official["labels"],
        strict=True,
    ):
        assert sample.token_ids.tolist() == ids[mask].tolist()
        assert np.where(sample.assistant_mask, sample.token_ids, -100).tolist() == (
            labels[mask].tolist()
        )
        assert (labels[~mask] == -100).all()
    assert len({len(sample) for sample in cases.samples}) == len(cases.samples)


# key biases shift all scores of a softmax alike, so that their gradients are rounding alone
def is_noise(name: str) -> bool:
    return name.endswith("k_proj.bias")


def test_gradients_are_the_official_ones(official, official_batch):
    model = fresh()
    loss, grads = gradients(model, official_batch)
    count = (official["labels"][:, 1:] != -100).sum()
    assert len(official_batch.targets) == count
    assert loss / count == pytest.approx(official["losses"][0], rel=1e-5)
    expected = official["gradient"]
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
        # float32 sums in another order, forwards and backwards through all layers
        scale = 1.0 if is_noise(name) else np.abs(value).max()
        assert np.abs(grads[name] / count - value).max() < 1e-4 * scale, name
    noise = [np.abs(value).max() for name, value in expected.items() if is_noise(name)]
    assert len(noise) == 2
    assert max(noise) < 1e-8


def test_steps_are_the_official_ones(official, official_batch):
    model = fresh()
    before = weights_of(model)
    prepare(model, FULL)
    optimizer = make_optimizer(FULL)
    for loss, norm in zip(official["losses"], official["norms"], strict=True):
        ours = step(model, optimizer, [official_batch], FULL.max_grad_norm)
        mx.eval(ours, model.parameters(), optimizer.state)
        assert ours[0].item() == pytest.approx(loss, rel=1e-5)
        assert ours[1].item() == pytest.approx(norm, rel=1e-4)
    after, compared = weights_of(model), 0
    for name, change in official["change"].items():
        # AdamW divides a gradient by its own size: where one is rounding alone, so is its sign
        clear = np.abs(official["gradient"][name]) > 1e-6
        assert clear.any() != is_noise(name)
        error = np.abs(after[name] - before[name] - change)[clear]
        # changes are kept in half precision: near 3e-3, half a unit is 1e-6. Some gradients change
        # their sign from step to step, and then AdamW enlarges the rounding of what is left
        assert (error >= 2e-6).sum() <= 1e-3 * error.size, name
        assert (error < 1e-5).all(), name
        assert (error < 1e-4 * np.abs(before[name]).max()).all(), name
        assert is_noise(name) or np.abs(change[clear]).max() > 2e-3, name
        compared += clear.sum()
    assert compared > 0.99 * sum(value.size for value in after.values())


def projected(model, adapters, grads, scale):
    """What the gradients of whole weights W + scale · B · A are for A and B, by the chain rule."""
    result = {}
    for name in grads:
        path = name.removesuffix(".weight")
        if f"{path}.lora_a" in adapters:
            a, b, grad = adapters[f"{path}.lora_a"], adapters[f"{path}.lora_b"], grads[name]
            result[f"{path}.lora_a"] = scale * grad.T @ b.T
            result[f"{path}.lora_b"] = scale * a.T @ grad.T
    return result


def shaken(model):
    """B of an adapter begins at zero, where the gradient of A is zero, too."""
    mx.random.seed(5)

    def shake(name, array):
        return 0.1 * mx.random.normal(array.shape) if name.endswith("lora_b") else array

    model.update(tree_map_with_path(shake, model.trainable_parameters()))


def test_a_lora_step_is_the_projection_of_a_full_one(cases, beside):
    batch = beside(cases.samples)
    options = replace(
        FULL, fine_tune_type="lora", optimizer="sgd", learning_rate=0.1, rank=4, scale=2.0
    )
    options = replace(options, weight_decay=0.0, max_grad_norm=0.0)
    model, whole = fresh(), fresh()
    prepare(model, options)
    shaken(model)
    before = learned(model)
    merged = {}
    for name, module in trainable_linears(whole, EVERYTHING, -1):
        update = 2.0 * before[f"{name}.lora_a"] @ before[f"{name}.lora_b"]
        merged[f"{name}.weight"] = module.weight + mx.array(update).T
    assert len(merged) == len(before) / 2 > 30
    whole.load_weights(list(merged.items()), strict=False)
    loss, grads = gradients(whole, batch)
    expected = projected(model, before, grads, 2.0)
    adapted_loss, adapted = gradients(model, batch)
    assert adapted_loss == pytest.approx(loss, rel=1e-5)
    assert furthest(adapted, expected) < 1e-4
    optimizer = make_optimizer(options)
    mx.eval(step(model, optimizer, [batch], options.max_grad_norm), model.parameters())
    count = len(batch.targets)
    changes = {name: value - before[name] for name, value in learned(model).items()}
    assert furthest(changes, {name: -0.1 / count * expected[name] for name in expected}) < 1e-3
    assert (
        furthest(
            learned(model),
            {name: before[name] - 0.1 / count * expected[name] for name in expected},
        )
        < 1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("part", EVERYTHING)
def test_only_chosen_parts_learn(kind, part, cases, beside):
    model = fresh()
    batch = beside([next(sample for sample in cases.samples if sample.patches)])
    options = replace(FULL, fine_tune_type=kind, train=(part,))
    prepare(model, options)
    before, optimizer = weights_of(model), make_optimizer(options)
    # the second step moves A, whose gradient is zero while B is
    losses = [step(model, optimizer, [batch], 1.0)[0].item() for _ in range(2)]
    assert losses[1] < losses[0]
    after = weights_of(model)
    changed = {name for name, value in after.items() if (value != before[name]).any()}
    expected = {name for name in after if name.startswith(f"{PARTS[part]}.")}
    if kind != "full":
        kinds = ("lora_a", "lora_b", "m") if kind == "dora" else ("lora_a", "lora_b")
        expected = {name for name in expected if name.rpartition(".")[2] in kinds}
    assert changed == expected


def test_last_layers_alone(cases, beside):
    model = fresh()
    prepare(model, replace(FULL, fine_tune_type="lora", num_layers=1))
    names = {name.split(".lora_")[0] for name in learned(model)}
    assert any(name.startswith("multi_modal_projector.") for name in names)
    for layers in ("language_model.model.layers.3.", "vision_tower.encoder.layers.1."):
        assert any(name.startswith(layers) for name in names)
        names = {name for name in names if not name.startswith(layers)}
    assert all(name.startswith("multi_modal_projector.") for name in names)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpointed_gradients_are_the_same(kind, cases, beside):
    batch = beside(cases.samples)
    options = replace(FULL, fine_tune_type=kind, dropout=0.5 if kind == "lora" else 0.0)
    results = []
    for again in (False, True):
        model = fresh()
        mx.random.seed(3)
        prepare(model, options)
        if kind == "lora":
            shaken(model)
        if again:
            model.gradient_checkpointing_enable()
        model.train()
        mx.random.seed(4)
        calls = []
        for layers in (model.layers, model.vision_tower.encoder.layers):
            for layer in layers:
                count_calls(layer, calls)
        results.append((*gradients(model, batch), random_seed(), len(calls)))
    (loss, expected, chance, once), (same_loss, found, same_chance, twice) = results
    assert twice == 2 * once
    assert same_loss == loss
    assert furthest(found, expected) < 1e-6
    # a dropped input stays dropped when it is computed again, and chance continues as without
    assert same_chance == chance
    assert (chance == 4) == (kind == "full")


def count_calls(layer, calls):
    """Notes each call of a layer."""
    kind = type(layer)

    class Counted(kind):
        def __call__(self, *args):
            calls.append(self)
            return kind.__call__(self, *args)

    layer.__class__ = Counted


def test_checkpointing_holds_fewer_activations(loaded):
    peaks = []
    ids = np.full((4, 256), 200, np.int32)
    positions = np.arange(16, dtype=np.int32)
    batch = Batch(ids, positions, ids.reshape(-1)[positions], None, (), ids.size)
    for again in (False, True):
        model = fresh()
        prepare(model, replace(FULL, train=("language",)))
        model.train()
        if again:
            model.gradient_checkpointing_enable()
        mx.eval(model.parameters())
        mx.clear_cache()
        mx.reset_peak_memory()
        start = mx.get_active_memory()
        gradients(model, batch)
        peaks.append(mx.get_peak_memory() - start)
    assert peaks[1] < 0.85 * peaks[0]


def test_answers_are_not_computed_twice(loaded):
    from mlx_lfm2vl import generate

    model, processor = fresh(), loaded()[1]
    expected = generate(model, processor, "What?", max_tokens=5, temperature=0.0)
    model.gradient_checkpointing_enable()
    model.eval()
    mx.random.seed(9)
    assert generate(model, processor, "What?", max_tokens=5, temperature=0.0) == expected
    assert random_seed() == 9


def test_accumulated_batches_are_one_large_batch(cases, beside):
    options = replace(FULL, optimizer="sgd", learning_rate=0.1)
    results = []
    for parts in ([cases.samples], [cases.samples[:1], cases.samples[1:3], cases.samples[3:]]):
        model = fresh()
        prepare(model, options)
        loss, norm = step(model, make_optimizer(options), [beside(part) for part in parts], 1.0)
        results.append((loss.item(), norm.item(), weights_of(model)))
    (loss, norm, whole), (same_loss, same_norm, parts) = results
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert same_norm == pytest.approx(norm, rel=1e-5)
    assert furthest(parts, whole) < 1e-6  # float32 sums in another order
    assert furthest(whole, weights_of(fresh())) > 1e-3


def test_padding_changes_nothing(cases, beside):
    model = fresh()
    loss, grads = gradients(model, beside(cases.samples))
    alone = [gradients(model, beside([sample])) for sample in cases.samples]
    assert loss == pytest.approx(sum(pair[0] for pair in alone), rel=1e-6)
    total = {name: sum(pair[1][name] for pair in alone) for name in grads}
    grads, total = ({n: v for n, v in g.items() if not is_noise(n)} for g in (grads, total))
    assert furthest(grads, total) < 1e-4
    # nor do the tokens that stand in it
    batch = beside(cases.samples)
    ids = batch.token_ids.copy()
    for row in ids:
        row[len(row) - list(row[::-1] != 0).index(True) :] = 333
    assert (ids != batch.token_ids).any()
    other_loss, other = gradients(model, replace(batch, token_ids=ids))
    assert other_loss == loss
    assert furthest({n: other[n] for n in grads}, grads) < 1e-6


def test_masked_tokens_get_no_gradient(cases, beside):
    model = fresh()
    sample = next(sample for sample in cases.samples if sample.patches == 0)
    batch = beside([sample])
    ids = mx.array(batch.token_ids)

    counts = np.zeros(ids.shape, np.bool_)
    counts[0, : len(sample)] = sample.assistant_mask
    counted = counts[:, 1:]
    assert counted.sum() == len(batch.targets) == sample.assistant_mask.sum()
    losses = nn.losses.cross_entropy(model(ids).logits[:, :-1], ids[:, 1:])
    expected = (losses * mx.array(counted)).sum().item()
    assert loss_sum(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert losses.sum().item() > 1.5 * expected
    # the last token is only ever a target: as an input it comes after all that counts
    last = len(sample) - 1
    assert not sample.assistant_mask[last]  # the line feed after the end mark
    _, grads = gradients(model, batch)
    changed = batch.token_ids.copy()
    changed[0, last] = 333
    _, same = gradients(model, replace(batch, token_ids=changed))
    assert furthest(same, grads) < 1e-6
    # a target that counts does make a difference
    targets = batch.targets.copy()
    targets[-1] = 333
    _, other = gradients(model, replace(batch, targets=targets))
    assert furthest(other, grads) > 1e-2


def test_a_batch_of_nothing_changes_nothing(cases, beside):
    batch, empty = beside(cases.samples[:2]), beside([])
    model = fresh()
    prepare(model, FULL)
    loss, norm = step(model, make_optimizer(FULL), [batch, empty], 1.0)
    other = fresh()
    prepare(other, FULL)
    same = step(other, make_optimizer(FULL), [batch], 1.0)
    assert loss.item() == same[0].item()
    assert norm.item() == pytest.approx(same[1].item(), rel=1e-6)
    weights = weights_of(model)
    loss, norm = step(model, make_optimizer(replace(FULL, weight_decay=0.0)), [empty], 1.0)
    assert (loss.item(), norm.item()) == (0, 0)
    assert furthest(weights_of(model), weights) == 0


def test_warmup_and_decay():
    def rates(**changes):
        options = replace(FULL, iters=10, learning_rate=1.0, **changes)
        optimizer = make_optimizer(options)
        parameter = {"w": mx.zeros(1)}
        found = []
        for _ in range(11):
            optimizer.apply_gradients({"w": mx.ones(1)}, parameter)
            found.append(round(optimizer.learning_rate.item(), 4))
        return found

    assert rates(schedule="constant", warmup=2) == [0.5, 0.75, *[1.0] * 9]
    assert rates(schedule="linear") == pytest.approx([1 - 0.09 * i for i in range(11)])
    cosine = rates(schedule="cosine", warmup=4)
    assert cosine[:5] == [0.25, 0.4375, 0.625, 0.8125, 1.0]
    assert cosine[7] == pytest.approx(0.55)
    assert cosine[10] == pytest.approx(0.1)
    assert sorted(cosine[4:], reverse=True) == cosine[4:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "qlora"}, "fine_tune_type is 'qlora'; it must be one of full"),
        ({"optimizer": "adamax"}, "optimizer is 'adamax'"),
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"train": ("language", "audio")}, "choose among language, projector, vision"),
        ({"train": ()}, "choose among"),
        ({"train": ("vision", "vision")}, "choose among .*, each once"),
        ({"iters": 0}, "iters is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        *(
            ({name: value}, f"{name} is {value}")
            for name in ("learning_rate", "weight_decay", "max_grad_norm", "scale", "dropout")
            for value in (float("inf"), float("nan"), -1.0)
        ),
        ({"learning_rate": 1e39}, "learning_rate is 1e"),  # infinite in float32
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"warmup": 1000}, "warmup is 1000; it must be below the 1000 iters"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "adam has no weight_decay; adamw has"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(TrainError, match=message):
        TrainingOptions(**changes)
