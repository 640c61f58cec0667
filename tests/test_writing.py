"""What is written is complete or not there; nothing of anybody's is lost, nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlx_lfm2vl import ConvertError, Lfm2VlError, Quantization, convert, fuse
from mlx_lfm2vl.checkpoints import writing
from mlx_lfm2vl.checkpoints.weights import open_checkpoint
from mlx_lfm2vl.checkpoints.writing import (
    WORKSPACE,
    complete_file,
    complete_folder,
    remove_leftovers,
    write_json,
)
from mlx_lfm2vl.cli.convert import main
from mlx_lfm2vl.errors import OutputError

from .helpers import FIXTURES, make_adapters

V5 = FIXTURES / "v5"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones, too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def workspaces(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# what --force may replace


def spoiled(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Sources and targets of which --force would destroy something."""
    source = folder / "par" / "src"
    shutil.copytree(V5, source, ignore=shutil.ignore_patterns("cases"))
    (folder / "link").symlink_to(folder / "par")
    (folder / "photos").mkdir()
    (folder / "photos" / "holiday.jpg").write_bytes(b"jpg")
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (other / "model.safetensors").write_bytes(b"weights")
    mixed = folder / "mixed"
    shutil.copytree(source, mixed)
    (mixed / "thesis").mkdir()
    (mixed / "thesis" / "chapter.md").write_text("years of work")
    lent = folder / "lent"  # a source that only points to weights in the target
    shutil.copytree(source, lent)
    shutil.copytree(source, folder / "owner")
    (lent / "model.safetensors").unlink()
    (lent / "model.safetensors").symlink_to(folder / "owner" / "model.safetensors")
    (folder / "file").write_text("a file")
    return {
        "the parent of the source": (source, folder / "par"),
        "the source": (source, source),
        "a link to the parent": (source, folder / "link"),
        "a way around": (source, folder / "par" / ".." / "par" / "src"),
        "photos": (source, folder / "photos"),
        "another model": (source, folder / "other"),
        "a model with a folder": (source, mixed),
        "the owner of the weights": (lent, folder / "owner"),
        "a file": (source, folder / "file"),
        "the folder of everything": (source, folder),
    }


def test_force_destroys_nothing(tmp_path):
    cases = spoiled(tmp_path)
    before = contents(tmp_path)
    assert len(before) > 30
    for name, (source, target) in cases.items():
        with pytest.raises(ConvertError) as info:
            convert(source, target, force=True)
        assert "\n" not in str(info.value), name
        assert contents(tmp_path) == before, name


def test_force_spares_the_adapters(tmp_path):
    home = tmp_path / "home"
    make_adapters(home, train=("projector",))
    for path in FIXTURES.glob("wide/*.*"):
        shutil.copy(path, home)
    before = contents(tmp_path)
    with pytest.raises(ConvertError, match="which is read"):
        fuse(FIXTURES / "wide", home, home, force=True)
    assert contents(tmp_path) == before


def test_force_replaces_a_model(tmp_path):
    out, link = tmp_path / "out", tmp_path / "link"
    convert(V5, out)
    with pytest.raises(ConvertError, match="is there already; give another folder, or --force"):
        convert(V5, out)
    (out / ".DS_Store").write_bytes(b"a Mac was here")
    link.symlink_to(out)
    convert(V5, link, dtype="bfloat16", force=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert link.is_symlink()
    assert not (out / ".DS_Store").exists()
    assert workspaces(tmp_path) == []
    (tmp_path / "empty").mkdir()
    convert(V5, tmp_path / "empty", force=True)
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize(
    "path", ["~nosuchuser/x", "a\0b", "x" * 300, "{file}/below", "{file}", "/proc/nothing/x"]
)
@pytest.mark.parametrize("force", [False, True])
def test_impossible_targets(path, force, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConvertError) as info:
        convert(V5, path.format(file=file), force=force)
    assert "\n" not in str(info.value)
    assert contents(tmp_path) == {"file": b"precious"}


# kills

LOOP = """
import itertools, sys
from pathlib import Path
from mlx_lfm2vl import convert, fuse
source, adapters, out = map(Path, sys.argv[2:])
def ready(done, count):
    if done == 1:
        print("in the middle", flush=True)
for dtype in itertools.cycle(["float32", "bfloat16"]):
    options = {"dtype": dtype, "force": True, "progress": ready}
    if sys.argv[1] == "convert":
        convert(source, out, **options)
    else:
        fuse(source, adapters, out, **options)
"""


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    """A small model and adapters for it."""
    folder = tmp_path_factory.mktemp("killable")
    make_adapters(folder / "adapters", train=("projector",))
    return FIXTURES / "wide", folder / "adapters"


def killed(command: str, arguments: list[str], out: Path, delay: float) -> None:
    """Runs a command over and over, and kills it a while after its first tensor."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, command, *arguments, str(out)],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(times, killable, tmp_path):
    """The folder is there and complete each time; the next run removes what is left."""
    arguments = [str(path) for path in killable]
    left = Counter()

    def kill(command: str) -> None:
        folder = tmp_path / command
        for delay in np.random.default_rng(len(command)).uniform(0.0, 0.15, times):
            killed(command, arguments, folder / "out", delay)
            open_checkpoint(folder / "out")
            assert len(workspaces(folder)) <= 1, "the next run left what it found"
            left[command] += len(workspaces(folder))

    for command in ("convert", "fuse"):
        convert(FIXTURES / "wide", tmp_path / command / "out")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill, ("convert", "fuse")))
    for command in ("convert", "fuse"):
        assert left[command] > 0, "it was never killed in the middle"
        convert(V5, tmp_path / command / "elsewhere")
        names = sorted(path.name for path in (tmp_path / command).iterdir())
        assert names == ["elsewhere", "out"]


@pytest.fixture
def without_exchange(monkeypatch):
    """A disk that cannot swap two names in one step."""
    monkeypatch.setattr(writing, "_exchange", lambda one, other: False)


def test_killed_between_two_renames(tmp_path):
    """On a disk that cannot swap, the next run puts back what was moved away."""
    code = """
import os, signal, sys
from pathlib import Path
from mlx_lfm2vl import convert
from mlx_lfm2vl.checkpoints import writing
writing._exchange = lambda one, other: False
rename = Path.rename
def killing(self, target):
    if writing.WORKSPACE in self.parent.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killing
convert(sys.argv[1], sys.argv[2], force=True)
"""
    out = tmp_path / "out"
    convert(V5, out)
    before = contents(out)
    run = subprocess.run([sys.executable, "-c", code, str(V5), str(out)], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(ConvertError, match="is there already"):
        convert(V5, out)
    assert contents(out) == before
    remove_leftovers(tmp_path)
    assert workspaces(tmp_path) == []


@pytest.mark.parametrize("name", ["out", "old", "x" * 255])
def test_a_disk_that_cannot_swap(name, without_exchange, tmp_path):
    out = tmp_path / name
    convert(V5, out)
    convert(V5, out, dtype="bfloat16", force=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_workspaces_of_living_processes_stay(tmp_path):
    code = f"""
import sys
from pathlib import Path
from mlx_lfm2vl.checkpoints.writing import complete_folder
with complete_folder(Path({str(tmp_path)!r}) / "slow", 0) as folder:
    (folder / "a").write_text("a")
    print("ready", flush=True)
    sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    foreign = tmp_path / f".x{WORKSPACE}link"
    foreign.symlink_to(V5)
    convert(V5, tmp_path / "out")
    assert len(workspaces(tmp_path)) == 2
    process.communicate(b"go on\n")
    assert process.returncode == 0
    assert (tmp_path / "slow" / "a").read_text() == "a"
    assert (V5 / "config.json").exists()
    assert workspaces(tmp_path) == [foreign.name]


# single files, errors on the way


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": "ä"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ä"\n}\n'
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def fail(error):
        with complete_file(path) as new:
            assert new.name == "x.json"
            new.write_text("half")
            raise error

    for error in (RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    with pytest.raises(OutputError, match=r"x\.json/y could not be written to"):
        write_json(path / "y", {})
    with pytest.raises(ConvertError), complete_file(path / "y", ConvertError):
        pass
    assert contents(tmp_path) == {"x.json": path.read_bytes()}
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failure_keeps_what_was_there(tmp_path, without_exchange):
    target = tmp_path / "t"
    target.mkdir()
    (target / "old").write_text("old")

    def fail(error):
        with complete_folder(target, 0) as folder:
            (folder / "new").write_text("new")
            raise error

    for error in (ConvertError("no"), OSError("no"), KeyboardInterrupt()):
        kind = ConvertError if isinstance(error, OSError) else type(error)
        with pytest.raises(kind):
            fail(error)
        assert contents(tmp_path) == {"t/old": b"old"}


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of half a megabyte, if this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(tiny_disk, monkeypatch):
    """Also if the free space is misjudged."""
    convert(V5, tiny_disk / "out", Quantization(bits=4, group_size=32))
    before = contents(tiny_disk)
    usage = shutil.disk_usage(tiny_disk)
    for free in (usage.free, 1 << 30):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        for source in ("v5", "wide", "untied"):
            with pytest.raises(ConvertError) as info:
                convert(FIXTURES / source, tiny_disk / "out", force=True)
            assert "\n" not in str(info.value)
            assert contents(tiny_disk) == before
    with pytest.raises(OutputError):
        write_json(tiny_disk / "x.json", {"x": "x" * (1 << 20)})
    assert contents(tiny_disk) == before


# sources that are wrong on purpose


def _odd(rng: np.random.Generator) -> object:
    """A value that nobody expects."""
    values = [None, True, -1, 0, 7, 1.5, 10**12, "", "x", "../../etc/passwd", [], [1], {}, {"a": 1}]
    return values[rng.integers(len(values))]


def _mutate(data: object, rng: np.random.Generator) -> object:
    """Replaces, removes or adds something at a random place."""
    if isinstance(data, dict) and data and rng.random() < 0.85:
        key = sorted(data)[rng.integers(len(data))]
        if rng.random() < 0.15:
            return {k: v for k, v in data.items() if k != key}
        return {**data, key: _mutate(data[key], rng)}
    return _odd(rng)


def test_odd_indices_and_quantizations(tmp_path, capsys):
    """An answer or one line, and no file of the user's changed; 100 cases."""
    rng = np.random.default_rng(11)
    shards = tmp_path / "shards"
    shutil.copytree(FIXTURES / "noprefix", shards, ignore=shutil.ignore_patterns("cases"))
    packed = tmp_path / "packed"
    convert(V5, packed, Quantization(group_size=32, recipe="lfm2_4bit"))
    outcomes = {0: 0, 2: 0}
    for n in range(100):
        folder, file = [(shards, writing.INDEX), (packed, "config.json")][n % 2]
        whole = (folder / file).read_text()
        data = json.loads(whole)
        if file == "config.json":
            for key in ("quantization", "quantization_config"):
                changed = _mutate(data["quantization"], rng)
                data[key] = changed if key == "quantization" else data["quantization"]
        else:
            data = _mutate(data, rng)
        (folder / file).write_text(json.dumps(data))
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as info:
            main(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "out"), "--dry-run"])
        told = capsys.readouterr()
        assert info.value.code in (0, 2), data
        assert told.err.count("\n") == (info.value.code == 2), (data, told.err)
        assert contents(tmp_path) == before
        outcomes[info.value.code] += 1
        (folder / file).write_text(whole)
    assert min(outcomes.values()) > 10, outcomes


WEIGHTS = "model.safetensors"


def _index(folder: Path, text: str) -> None:
    (folder / writing.INDEX).write_text(text)


def _typed(folder: Path, dtype: str) -> None:
    """Declares one float tensor of the file to be of another type of the same width."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = "model.language_model.embedding_norm.weight"
    begin, end = header[name]["data_offsets"]
    width = {"F64": 8, "I32": 4, "U32": 4, "C64": 8}.get(dtype, 1)
    header[name] |= {"dtype": dtype, "shape": [(end - begin) // width]}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _linked(folder: Path, target: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(target)


def _folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


ODD_WEIGHTS = {
    "a folder": (_folder, "is no file"),
    "a broken link": (lambda f: _linked(f, "gone"), "is a broken link"),
    "a device": (lambda f: _linked(f, "/dev/zero"), "is no file"),
    "a pipe": (_pipe, "is no file"),
    **{
        kind: (lambda f, kind=kind: _typed(f, kind), f"{kind}, which MLX cannot read")
        for kind in ("F64", "F8_E4M3", "F8_E5M2")
    },
    "integers": (lambda f: _typed(f, "I32"), "it must be a floating-point type"),
    **{
        f"index of {value!r}": (
            lambda f, value=value: _index(f, json.dumps({"weight_map": {"w": value}})),
            "the file of w is",
        )
        for value in (1, None, ["a"], {}, "", "../../x.safetensors", "/etc/passwd", "a\0b", "..")
    },
    "a long name": (
        lambda f: _index(f, json.dumps({"weight_map": {"w": "x" * 999}})),
        "is missing",
    ),
    "a deep index": (lambda f: _index(f, "[" * 100_000), "not valid JSON"),
    "a long number": (lambda f: _index(f, '{"a": ' + "1" * 5000 + "}"), "not valid JSON"),
    "no index": (lambda f: (f / writing.INDEX).mkdir(), "is no regular file"),
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_odd_weights(kind, copied, tmp_path):
    folder = copied()
    spoil, message = ODD_WEIGHTS[kind]
    spoil(folder)
    with pytest.raises(Lfm2VlError, match=message) as info:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(info.value)
    assert str(folder) in str(info.value) or kind == "integers"
    assert not (tmp_path / "out").exists()


def test_links_out_of_a_source(copied, tmp_path):
    """Nothing but model files is copied, and none from elsewhere."""
    secret = tmp_path / "secret"
    secret.write_text("password")
    folder = copied()
    (folder / "notes.txt").symlink_to(secret)
    (folder / "diary.txt").write_text("dear diary")
    (folder / "inside.json").symlink_to("tokenizer.json")
    convert(folder, tmp_path / "out")
    assert not {"notes.txt", "diary.txt"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "inside.json").read_bytes() == (V5 / "tokenizer.json").read_bytes()
    for name in ("merges.txt", "special_tokens_map.json", "LICENSE"):
        (folder / name).symlink_to(secret)
        with pytest.raises(ConvertError, match=f"{name} is a link to .*secret, outside"):
            convert(folder, tmp_path / "other")
        assert not (tmp_path / "other").exists()
        (folder / name).unlink()


def test_the_download_cache_is_made_of_links(tmp_path):
    repository = tmp_path / "models--Some--Model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in V5.iterdir() if path.is_file()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    convert(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        V5 / "tokenizer.json"
    ).read_bytes()
