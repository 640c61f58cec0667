"""`doctor` sees what is wrong with a machine; each kind of fault is made here on purpose."""

import json
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import pytest
import yaml
from mlx.utils import tree_flatten

from mlx_lfm2vl.checkpoints.hub import DEMO_FOLDER
from mlx_lfm2vl.cli.doctor import as_text, main
from mlx_lfm2vl.measuring import diagnosis, health
from mlx_lfm2vl.measuring.diagnosis import NOTE, OK, WRONG, CachedModel
from mlx_lfm2vl.measuring.machine import Chip
from mlx_lfm2vl.models import layers, lfm2

pytestmark = pytest.mark.usefixtures("small_matrix")
CPU, M2, M3, M5 = (
    Chip("some processor"),
    Chip("Apple M2 Max", "applegpu_g14s"),
    Chip("Apple M3", "applegpu_g15g"),
    Chip("Apple M5", "applegpu_g17g"),
)


@pytest.fixture(scope="module")
def whole(small_matrix):
    return diagnosis.diagnose(None, progress=lambda stage: None)


@pytest.fixture
def instead(monkeypatch):
    """Nothing is looked at; the command finds what a test gives."""

    def use(found):
        monkeypatch.setattr(diagnosis, "diagnose", lambda model, **_: found)

    return use


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out, exit_info.value.code


def states(findings):
    return {finding.name: finding.state for finding in findings}


def test_all_is_well_here(whole):
    assert whole.is_well, as_text(whole)
    assert {
        "prompt ids",
        *(f"{stage}, {dtype}" for dtype in health.TOLERANCES for stage in ("image features",
          "logits", "greedy tokens")),
        "default device against CPU",
        "batch against single",
        "8 bits against float",
        "4 bits against float",
    } <= states(whole.findings).keys()  # fmt: skip
    assert all(finding.cure == "" for finding in whole.findings if finding.state == OK)
    assert whole.stages is not None
    assert whole.stages.model == "demo"
    assert whole.packages["mlx"] == whole.machine.mlx


def test_what_is_printed(capsys, whole, instead):
    instead(whole)
    out, code = run(capsys)
    assert code == 0
    assert out.endswith("all is well\n")
    for text in (whole.machine.device_name, whole.machine.mlx, "640x480", "tok/s"):
        assert text in out
    lines = [line for line in out.splitlines() if line.startswith(f"{OK} ")]
    assert len(lines) == len(whole.findings)
    out, code = run(capsys, "--json")
    assert (json.loads(out), code) == (asdict(whole), 0)


def test_what_is_wrong_is_printed_with_its_cure(capsys, whole, instead):
    fault = health.Finding(WRONG, "logits", "off by 2", "buy a Mac")
    instead(diagnosis.replace(whole, findings=[*whole.findings, fault], stages=None))
    out, code = run(capsys)
    assert code == 1
    assert "WRONG logits" in out
    assert "off by 2; buy a Mac" in out
    assert out.endswith("\nwrong: 1\n")
    assert run(capsys, "--json")[1] == 1


# ---- faults


def broken(monkeypatch, change):
    """Every model that is loaded from now on has a fault."""
    load = health.load

    def loaded(*arguments):
        model, processor = load(*arguments)
        change(model)
        return model, processor

    monkeypatch.setattr(health, "load", loaded)


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.0.mlp.fc1.bias",
        "vision_tower.embeddings.position_embedding.weight",
        "multi_modal_projector.linear_2.weight",
        "language_model.model.layers.0.conv.conv.weight",
        "language_model.model.layers.1.self_attn.k_layernorm.weight",
        "language_model.model.layers.5.feed_forward.w2.weight",
        "language_model.model.embedding_norm.weight",
    ],
)
def test_a_broken_weight(name, monkeypatch):
    """One weight that is off by 2 percent."""

    def change(model):
        arrays = dict(tree_flatten(model.parameters()))
        model.load_weights([(name, arrays[name] * 1.02)], strict=False)

    broken(monkeypatch, change)
    found = states(health.check_stored("float32", CPU))
    assert found["logits, float32"] == WRONG
    assert (found["image features, float32"] == WRONG) == (not name.startswith("language"))


def test_a_damaged_file(monkeypatch, tmp_path):
    shutil.copytree(DEMO_FOLDER, tmp_path / "demo")
    file = tmp_path / "demo" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(health, "DEMO_FOLDER", tmp_path / "demo")
    assert states(health.check_weights()) == {"demo weights": WRONG}


def test_a_wrong_activation(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(layers.ACTIVATIONS, "gelu_pytorch_tanh", nn.gelu)
        assert states(health.check_stored("float32", CPU))["image features, float32"] == WRONG
    with monkeypatch.context() as patch:
        patch.setitem(layers.ACTIVATIONS, "gelu", layers.gelu_tanh)
        assert states(health.check_stored("float32", CPU))["image features, float32"] == WRONG
    monkeypatch.setattr(lfm2, "swiglu", lambda gate, up: nn.gelu(gate) * up)
    assert states(health.check_stored("float32", CPU))["logits, float32"] == WRONG


def test_a_backend_that_answers_something_else(monkeypatch):
    """Away from the CPU a kernel is wrong, or only an answer."""
    on_cpu, project, here = health.on_cpu, lfm2.Lfm2ForCausalLM.logits, [True]

    @contextmanager
    def elsewhere():
        here[0] = False
        with on_cpu():
            yield
        here[0] = True

    def logits(self, hidden):
        right = project(self, hidden)
        return right[..., ::-1] if here[0] else right

    monkeypatch.setattr(health, "on_cpu", elsewhere)
    with monkeypatch.context() as patch:
        patch.setattr(lfm2.Lfm2ForCausalLM, "logits", logits)
        assert states(health.check_cpu(CPU)) == {"default device against CPU": WRONG}
    compute = health.compute

    def swapped(*arguments):
        right = compute(*arguments)
        return right._replace(answer=right.answer[::-1]) if here[0] else right

    monkeypatch.setattr(health, "compute", swapped)
    assert states(health.check_cpu(CPU)) == {"default device against CPU": WRONG}
    assert states(health.check_stored("bfloat16", CPU)) == {
        "image features, bfloat16": OK,
        "logits, bfloat16": OK,
        "greedy tokens, bfloat16": WRONG,
    }


def test_a_batch_whose_rows_are_swapped(monkeypatch):
    batch = health.batch_generate
    monkeypatch.setattr(health, "batch_generate", lambda *given: batch(*given)[::-1])
    assert states(health.check_batch()) == {"batch against single": WRONG}


def test_products_of_integers_that_are_wrong(monkeypatch):
    product = nn.QuantizedLinear.__call__
    monkeypatch.setattr(nn.QuantizedLinear, "__call__", lambda self, x: product(self, x) * 1.001)
    assert states(health.check_quantized(8, CPU)) == {"8 bits against float": WRONG}


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(lfm2, "swiglu", lambda gate, up: gate * float("nan"))
    assert states(health.check_stored("float16", CPU))["logits, float16"] == WRONG


def test_an_error_is_a_finding_and_the_rest_is_looked_at(monkeypatch):
    def fail(*_):
        raise RuntimeError("[metal::load] no kernel")

    monkeypatch.setattr(health, "compute", fail)
    found = health.examine(CPU, lambda name: None)
    assert states(found)["float16"] == states(found)["4 bits"] == WRONG
    assert states(found)["demo weights"] == states(found)["batch against single"] == OK
    assert "no kernel" in found[-1].text


def test_tolerances(monkeypatch):
    """TF32 is allowed where a chip has it, and nowhere else."""
    assert health.tolerance("float32", M3) == health.TOLERANCES["float32"]
    assert health.tolerance("float32", M5) == health.TOLERANCES["float16"]
    exact = diagnosis.replace(M5, tf32=False)
    assert health.tolerance("float32", exact) == health.TOLERANCES["float32"]


# ---- advice


def test_advice():
    assert states(diagnosis.advise(CPU, "cpu", "Linux")) == {"device": OK}
    assert states(diagnosis.advise(CPU, "cpu", "Darwin")) == {"device": WRONG}
    assert states(diagnosis.advise(M3, "gpu", "Darwin")) == {"device": OK}
    assert states(diagnosis.advise(M2, "gpu", "Darwin")) == {"device": OK, "type": NOTE}
    assert states(diagnosis.advise(M5, "gpu", "Darwin")) == {"device": OK, "float32": NOTE}
    assert "--dtype float16" in diagnosis.advise(M2, "gpu", "Darwin")[-1].cure
    assert "MLX_ENABLE_TF32=0" in diagnosis.advise(M5, "gpu", "Darwin")[-1].cure


@pytest.mark.parametrize(
    ("mlx", "state"), [("0.32.0", WRONG), ("0.31.9", WRONG), ("0.32.1", OK), ("0.33.0.dev1", OK)]
)
def test_floor_of_mlx(mlx, state):
    assert diagnosis.check_floor(mlx).state == state
    floor = ".".join(map(str, diagnosis.FLOOR))
    assert f'"mlx>={floor}' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_memory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(800))
    other = CachedModel("somebody/large", "x", 5000)
    name = str(tmp_path)
    assert states(diagnosis.check_memory(name, tmp_path, [], 1000)) == {"memory": OK}
    (found,) = diagnosis.check_memory(name, tmp_path, [], 999)
    assert (found.state, "-q" in found.cure) == (WRONG, True)
    (found,) = diagnosis.check_memory(None, None, [other], 999)
    assert (found.state, "somebody/large" in found.text) == (NOTE, True)
    (found,) = diagnosis.check_memory("a/b", None, [], 999)
    assert (found.state, "a/b" in found.cure) == (NOTE, True)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A download cache with an LFM2-VL model, another model, and broken ones."""
    configs = {"LiquidAI/small": '{"model_type": "lfm2_vl"}', "a/other": '{"model_type": "x"}'}
    broken = {"a/broken": "[", "a/deep": '{"a":' * 100_000}
    for name, config in {**configs, **broken}.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_bytes(bytes(700))
        (folder.parents[1] / "refs").mkdir()
        (folder.parents[1] / "refs" / "main").write_text("1")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(tmp_path))
    return tmp_path


def test_models_of_the_cache(cached):
    (model,) = diagnosis.cached_models()
    assert (model.name, model.nbytes) == ("LiquidAI/small", 700)
    assert diagnosis.find("LiquidAI/small", [model]) == Path(model.folder)
    assert diagnosis.find("LiquidAI/large", [model]) is None
    shutil.rmtree(cached)
    assert list(diagnosis.cached_models()) == []


def test_a_model_that_is_asked_for(monkeypatch, fixtures, tmp_path):
    """It is timed if it is here and whole; whatever is wrong with it is one line."""
    monkeypatch.setattr(diagnosis, "examine", lambda *_: [])
    monkeypatch.setattr(diagnosis, "cached_models", lambda: [])

    def look(model):
        return diagnosis.diagnose(str(model), progress=lambda stage: None)

    found = look(fixtures / "v5")
    assert found.is_well
    assert found.stages.model == str(fixtures / "v5")
    found = look(tmp_path)
    assert states(found.findings)["stages"] == WRONG
    assert found.stages is None
    found = look("LiquidAI/nowhere")
    assert (found.is_well, found.stages) == (True, None)
    monkeypatch.setattr(diagnosis, "memory_for_models", lambda machine: 10)
    found = look(fixtures / "v5")
    assert (found.is_well, found.stages) == (False, None)


def test_probe(monkeypatch, tmp_path):
    given = []

    def child(command, env, **_):
        given.append((command[2:5], env.get("MLX_MAX_OPS_PER_BUFFER")))
        result = {"images": [{"decode_tps": len(given)}]}
        return SimpleNamespace(returncode=code, stdout=json.dumps(result), stderr="no GPU")

    monkeypatch.setattr(subprocess, "run", child)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    code = 0
    found = diagnosis.probe_buffers(tmp_path, lambda name: None)
    assert found == {"20": 1, "default": 2, "300": 3}
    assert [value for _, value in given] == ["20", None, "300"]
    assert given[0][0] == ["mlx_lfm2vl.benchmark", "--model", str(tmp_path)]
    code = 1
    with pytest.raises(RuntimeError, match="the probe failed: no GPU"):
        diagnosis.probe_buffers(tmp_path, lambda name: None)


def test_the_device_stays_as_it_was():
    before = mx.default_device()
    with pytest.raises(RuntimeError, match="no"), health.on_cpu():
        raise RuntimeError("no")
    assert mx.default_device() == before


def test_the_workflow_asks_the_doctor_of_a_mac_first():
    file = Path(__file__).parents[1] / ".github" / "workflows" / "test.yml"
    job = yaml.safe_load(file.read_text())["jobs"]["test"]
    assert any("macos" in machine["os"] for machine in job["strategy"]["matrix"]["include"])
    *_, doctor, test = job["steps"]
    assert doctor["if"] == "runner.os == 'macOS'"
    assert doctor["run"].endswith("-m mlx_lfm2vl.doctor\n")
    assert test["run"] == "make test-all"
