"""Session files that were changed: taken over whole, or refused in one line; never half."""

import copy
import json
import random

import mlx.core as mx
import pytest
from safetensors import safe_open

from mlx_lfm2vl import CacheOptions, Session, SnapshotError

from .checkpoints.pictures import picture
from .helpers import VALUES, places


@pytest.fixture(scope="module", params=["plain", "rotating"])
def saved(request, loaded, tmp_path_factory):
    """(path, metadata, arrays) of a session with a turn and an image that waits."""
    options = CacheOptions() if request.param == "plain" else CacheOptions(160, 20)
    session = Session(*loaded(), system="Be brief.", cache_options=options)
    session.see(picture(60, 40, 1))
    session.send("What is it?", max_tokens=4, temperature=0)
    session.see(picture(60, 40, 2))
    path = tmp_path_factory.mktemp("saved") / "talk.safetensors"
    session.save(path)
    with safe_open(str(path), framework="mlx") as file:
        metadata = file.metadata()
    return path, metadata, mx.load(str(path)), options


@pytest.mark.parametrize("seed", range(2))
def test_100_changed_sessions(seed, saved, loaded, tmp_path):
    path, metadata, arrays, options = saved
    chance, refused = random.Random(seed), 0
    expected = None
    for _ in range(50):
        data, changed = json.loads(metadata["data"]), dict(arrays)
        for _ in range(chance.randint(1, 2)):
            if chance.random() < 0.3:
                name = chance.choice(list(changed))
                array = changed.pop(name)
                if chance.random() < 0.7:
                    changed[name] = chance.choice([
                        array[:1], array.astype(mx.float16), mx.zeros((2, 2)), array[None],
                        mx.concatenate([array, array]), mx.zeros(array.shape, mx.uint8),
                    ])  # fmt: skip
            else:
                *way, last = chance.choice([place for place in places(data) if place])
                owner = data
                for key in way:
                    owner = owner[key]
                owner[last] = copy.deepcopy(chance.choice(VALUES))
                try:
                    json.dumps(data)
                except ValueError:
                    data = json.loads(metadata["data"])
        odd = tmp_path / "odd.safetensors"
        mx.save_safetensors(str(odd), changed, {**metadata, "data": json.dumps(data)})
        session = Session(*loaded(), cache_options=options)
        try:
            session.load(odd)
        except SnapshotError as error:
            refused += 1
            line = str(error)
        else:
            line = None
        if line is not None:
            assert line.startswith(f"{odd} is damaged: ")
            assert "\n" not in line
            assert session.messages == session.pending == []
            assert session.prefixes.entries == {}
            session.load(path)
        # whatever was taken over can be asked, and what was refused has left nothing
        answer = session.ask("And now?", max_tokens=3, temperature=0)
        if expected is None:
            fresh = Session(*loaded(), cache_options=options)
            fresh.load(path)
            expected = fresh.ask("And now?", max_tokens=3, temperature=0)
        assert isinstance(answer, str)
    assert refused > 25
    again = Session(*loaded(), cache_options=options)
    again.load(path)
    assert again.ask("And now?", max_tokens=3, temperature=0) == expected
    assert again.usage.encoded_images == 0


def test_other_files_are_refused(loaded, tmp_path):
    for number, content in enumerate((b"", b"{}", b"\x00" * 100, b"PK\x03\x04", b"\xff" * 9)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(content)
        with pytest.raises(SnapshotError, match="cannot be read as a session"):
            Session(*loaded()).load(path)
    with pytest.raises(SnapshotError):
        Session(*loaded()).load(tmp_path)
