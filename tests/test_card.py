"""Model cards, licences and files for transformers: what others read of a folder."""

import json
import shutil

import pytest
import yaml

import mlx_lfm2vl
from mlx_lfm2vl import ConvertError, Quantization, convert, fuse
from mlx_lfm2vl.cli.convert import main
from mlx_lfm2vl.conversion import card as module
from mlx_lfm2vl.conversion.plan import make_plan, write_plan

from .helpers import FIXTURES, make_adapters

HEAD = """---
license: other
license_name: lfm1.0
license_link: LICENSE
language: [en, ja]
tags: [liquid, edge, mlx]
base_model: LiquidAI/LFM2.5-VL-450M
library_name: transformers
model-index: []
---
# The original
"""


def head_of(folder) -> dict:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def licensed(copied):
    folder = copied("v5")
    (folder / "README.md").write_text(HEAD)
    (folder / "LICENSE").write_text("You may.")
    (folder / "NOTICE.txt").write_text("By us.")
    return folder


@pytest.mark.parametrize("to_hf", [False, True])
def test_what_holds_of_the_source_stays(licensed, to_hf, tmp_path):
    out = convert(licensed, tmp_path / "out", to_hf=to_hf)
    head = head_of(out)
    assert head["library_name"] == ("transformers" if to_hf else "mlx")
    assert head["license"] == "other"
    assert (head["license_name"], head["license_link"]) == ("lfm1.0", "LICENSE")
    assert head["language"] == ["en", "ja"]
    assert head["base_model"] == "LiquidAI/LFM2.5-VL-450M"
    assert set(head["tags"]) == {"liquid", "edge", "lfm2_vl"} | (set() if to_hf else {"mlx"})
    assert "model-index" not in head
    assert (out / "LICENSE").read_text() == "You may."
    assert (out / "NOTICE.txt").exists()
    assert ("from transformers import" in (out / "README.md").read_text()) == to_hf
    # and of the next one
    again = convert(out, tmp_path / "again")
    assert head_of(again)["license_name"] == "lfm1.0"
    assert (again / "LICENSE").exists()


def test_base_models_are_repositories(copied, tmp_path, monkeypatch):
    folder = copied("v5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    folder.rename(tmp_path / "my" / "model")
    convert("my/model", "out")
    assert "base_model" not in head_of(tmp_path / "out")
    plan = make_plan(tmp_path / "my" / "model", None, origin="LiquidAI/LFM2-VL-450M")
    write_plan(plan, tmp_path / "named")
    assert head_of(tmp_path / "named")["base_model"] == "LiquidAI/LFM2-VL-450M"


@pytest.mark.parametrize("head", ["---\n{[\n---\n", "---\n- a\n- b\n---\n", "no head", "\xff"])
def test_odd_cards_of_the_source(head, copied, tmp_path):
    folder = copied("v5")
    (folder / "README.md").write_text(head, encoding="latin-1")
    if head.startswith(("---\n{", "\xff")):
        with pytest.raises(ConvertError, match=r"the head of .*README\.md cannot be read"):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        assert "license" not in head_of(convert(folder, tmp_path / "out"))


def test_fused_models_name_their_adapters(tmp_path):
    make_adapters(tmp_path / "adapters", train=("projector",))
    for to_hf in (False, True):
        out = fuse(None, tmp_path / "adapters", tmp_path / f"{to_hf}", to_hf=to_hf)
        assert f"the adapters `{tmp_path / 'adapters'}`" in (out / "README.md").read_text()
        assert head_of(out)["library_name"] == ("transformers" if to_hf else "mlx")


PROCESSOR = {  # as transformers 5.23 saves it
    *("data_format", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize"),
    *("downsample_factor", "encoder_patch_size", "image_mean", "image_processor_type", "image_std"),
    *("max_image_tokens", "max_num_patches", "max_pixels_tolerance", "max_tiles"),
    *("min_image_tokens", "min_tiles", "resample", "rescale_factor", "return_row_col_info", "size"),
    *("tile_size", "use_thumbnail"),
}


def test_processor_files_for_transformers(copied, tmp_path):
    """Of the first checkpoints, whose own files build another image processor."""
    folder = copied("first")
    remote = {"auto_map": {"AutoProcessor": "processing_lfm2_vl.Lfm2VlProcessor"}}
    kind = {"image_processor_type": "Siglip2ImageProcessor"}
    for name in ("processor_config", "preprocessor_config", "tokenizer_config", "config"):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **remote, **kind}))
    out = convert(folder, tmp_path / "out", to_hf=True)
    written = json.loads((out / "processor_config.json").read_text())
    assert written.keys() == {"image_processor", "processor_class"}
    assert written["processor_class"] == "Lfm2VlProcessor"
    settings = written["image_processor"]
    assert settings.keys() == PROCESSOR
    assert settings["image_processor_type"] == "Lfm2VlImageProcessor"
    assert (settings["use_thumbnail"], settings["max_num_patches"]) == (False, 16)
    assert not (out / "preprocessor_config.json").exists()
    assert not any("auto_map" in path.read_text() for path in out.glob("*.json"))
    before, after = (mlx_lfm2vl.load(f)[1].image_processor.config for f in (folder, out))
    assert before == after


class FakeApi:
    """What would reach the Hub."""

    calls: list = []  # noqa: RUF012

    def create_repo(self, **options):
        FakeApi.calls.append(("create", options))

    def upload_folder(self, *, folder_path, repo_id):
        files = {p.name for p in __import__("pathlib").Path(folder_path).iterdir()}
        FakeApi.calls.append(("upload", repo_id, files))


def test_uploads_are_the_folder_as_it_is(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    FakeApi.calls.clear()
    out = tmp_path / "out"
    arguments = ["--hf-path", str(FIXTURES / "v5"), "--mlx-path", str(out)]
    with pytest.raises(SystemExit) as info:
        main([*arguments, "--upload-repo", "me/mine"])
    assert info.value.code == 0
    convert(FIXTURES / "v5", tmp_path / "same" / "out")
    same = (tmp_path / "same" / "out" / "README.md").read_text()
    assert (out / "README.md").read_text() == same
    (made, options), (kind, repository, files) = FakeApi.calls
    assert (made, options) == ("create", {"repo_id": "me/mine", "exist_ok": True})
    assert (kind, repository) == ("upload", "me/mine")
    assert files == {path.name for path in out.iterdir()}
    assert "https://huggingface.co/me/mine" in capsys.readouterr().out


def test_refused_uploads(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    for error in (LocalTokenNotFoundError("no\ntoken"), HFValidationError("bad"), OSError()):

        def refuse(self, error=error, **options):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
        with pytest.raises(ConvertError, match="could not be uploaded to a/b") as info:
            module.upload(tmp_path, "a/b")
        assert "\n" not in str(info.value)


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    from functools import partial

    import huggingface_hub

    api = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_x")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    with pytest.raises(ConvertError, match="could not be uploaded to a/b"):
        module.upload(tmp_path, "a/b")


def test_the_report_joins_the_card(tmp_path):
    out = convert(FIXTURES / "v5", tmp_path / "out", Quantization(group_size=32))
    before = (out / "README.md").read_text()
    module.add_report(out, "| a table |")
    assert (out / "README.md").read_text() == f"{before}\n## Fidelity\n\n| a table |\n"
    shutil.rmtree(out)
