"""Damaged, unusual and hostile files. Each gives a short error or a named skip, and no code in it is executed.

All cases follow from a fixed seed; FUZZ=20000 tries as many of each kind instead of what `make test` has time for.
"""

import io
import json
import os
import pickle
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mini import FOLDER, mini_codec
from PIL import Image

from pipeline.commands.checkpoint_info import CheckpointInfo
from pipeline.data.pictures import DataError, read_picture
from pipeline.recipes.loading import RecipeError, load_recipe
from pipeline.weights import checkpoints
from pipeline.weights.checkpoints import CheckpointError, codec_tensors, import_official, load_codec

COUNT = int(os.environ.get("FUZZ", "0"))


def cases(count: int) -> Iterator[random.Random]:
    """A source of random numbers for each case."""
    return (random.Random(case) for case in range(COUNT or count))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Content cut off, with bits flipped, bytes overwritten, taken out or put in."""
    damage = bytearray(content)
    kind = draw.choice(["cut", "flip", "overwrite", "remove", "insert"])
    # Half of the damage falls on the beginning, where formats say what follows.
    span = len(damage) if draw.random() < 0.5 else min(len(damage), 400)
    at = draw.randrange(span)
    length = draw.choice([1, 1, 2, 4, 8, 64])
    if kind == "cut":
        del damage[at:]
    elif kind == "flip":
        for _ in range(length):
            damage[draw.randrange(span)] ^= 1 << draw.randrange(8)
    elif kind == "overwrite":
        damage[at : at + length] = draw.choice([b"\0", b"\xff", draw.randbytes(1)]) * length
    elif kind == "remove":
        del damage[at : at + length]
    else:
        damage[at:at] = draw.randbytes(length)
    return bytes(damage)


def outcome(work: Callable[[], object], expected: type[Exception]) -> str:
    """`accepted`, or `refused` with a message of one screen. Other exceptions are not caught."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except expected as error:
        lines = str(error).splitlines()
        return "refused" if 0 < len(lines) < 24 else f"a message of {len(lines)} lines"
    return "accepted"


def official_files() -> dict[str, bytes]:
    """The first tensors of a codec in both forms of PyTorch's files."""
    tensors, contents = dict(list(codec_tensors(mini_codec(0)).items())[:4]), {}
    for name in ("zip", "legacy"):
        buffer = io.BytesIO()
        torch.save({"state_dict": tensors}, buffer, _use_new_zipfile_serialization=name == "zip")
        contents[f"{name}.pth.tar"] = buffer.getvalue()
    return contents


def recipes() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in FOLDER.glob("*.yaml")}


def pictures() -> dict[str, bytes]:
    """Encoded pictures that are not empty, in all formats."""
    contents, picture = {}, Image.radial_gradient("L").resize((40, 32))
    modes = {"png": "RGB P I;16 LA", "jpeg": "RGB CMYK L", "webp": "RGB", "tiff": "RGB CMYK I;16", "avif": "RGB"}
    for form, names in {**modes, "bmp": "P", "ppm": "RGB", "gif": "P"}.items():
        for mode in names.split():
            buffer = io.BytesIO()
            (picture.convert(mode) if mode == "I;16" else picture.convert("RGB").convert(mode)).save(buffer, form)
            contents[f"{mode}.{form}"] = buffer.getvalue()
    return contents


@pytest.mark.parametrize(
    ("contents", "read", "expected", "count"),
    [
        (official_files, import_official, CheckpointError, 300),
        (recipes, lambda path: load_recipe(path.parent), RecipeError, 200),
        (pictures, read_picture, DataError, 1000),
    ],
)
def test_damaged_files(
    contents: Callable[[], dict[str, bytes]], read: Callable[[Path], object], expected: type[Exception], count: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Every official file is taken for the mini codec: building a full one for each case would take hours.
    monkeypatch.setattr(checkpoints, "nearest_config", lambda tensors: mini_codec(0).config)
    sound = contents()
    for name, content in sound.items():
        (tmp_path / name).write_bytes(content)
    for draw in cases(count):
        name = draw.choice(list(sound))
        (tmp_path / name).write_bytes(damaged(sound[name], draw))
        assert outcome(partial(read, tmp_path / name), expected) in ("accepted", "refused")
        (tmp_path / name).write_bytes(sound[name])


class Call:
    """Pickles as a call of something."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.reduced  # type: ignore[return-value]


def hostile(draw: random.Random, mark: Path) -> bytes:
    """A pickle that leaves a mark where any of it is run."""
    code = f"open({str(mark)!r}, 'w').close()"
    calls: list[object] = [
        Call(eval, code), Call(exec, code), Call(os.system, f"touch {mark}"), Call(os.mkdir, str(mark)),
        Call(open, str(mark), "w"), Call(Path.touch, mark), Call(getattr, Call(eval, code), "close"),
    ]  # fmt: skip
    call = draw.choice(calls)
    places: list[object] = [
        call, [call], {"state_dict": call}, {"state_dict": {"g_a.weight": call}}, {"state_dict": {}, "epoch": call},
        {"state_dict": {"g_a.weight": torch.zeros(2)}, "optimizer": [call]},
    ]  # fmt: skip
    content, protocol = draw.choice(places), draw.randrange(2, 6)
    if draw.random() < 0.3:
        return pickle.dumps(content, protocol)
    if draw.random() < 0.2:  # The oldest opcodes, which need no GLOBAL before REDUCE.
        return b"(S" + repr(code).encode() + b"\nibuiltins\nexec\n."
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=draw.random() < 0.7)
    return buffer.getvalue()


def test_hostile_pickles(tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth.tar", tmp_path / "ran"
    for draw in cases(600):
        content = hostile(draw, mark)
        path.write_bytes(damaged(content, draw) if draw.random() < 0.3 else content)
        assert outcome(lambda: import_official(path), CheckpointError) == "refused"
        assert not mark.exists()


def test_damaged_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoints.write(path, {"a": torch.arange(40.0), "b": torch.zeros(3, 5)}, {"inputs": {"recipe": "0" * 64}})
    content, whole = path.read_bytes(), checkpoints.read(path)
    for draw in cases(1000):
        changed = damaged(content, draw)
        path.write_bytes(changed)
        if outcome(lambda: checkpoints.read(path), CheckpointError) == "accepted":
            # Only where the damage changed nothing that is read, such as a space in the header.
            read = checkpoints.read(path)
            assert read.metadata == whole.metadata
            assert all(torch.equal(read.tensors[name], tensor) for name, tensor in whole.tensors.items())


def falsified(header: dict[str, object], draw: random.Random) -> dict[str, object]:
    """A header with a false entry for one tensor."""
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = dict(header[name])  # type: ignore[call-overload]
    huge = draw.choice([2**31, 2**40, 2**62, 2**64, 10**30, -1])
    false = {
        "dtype": draw.choice(["F64", "F16", "BF16", "I8", "BOOL", "C64", "F8_E4M3", "F4", "F32 ", "", 7, None]),
        "shape": draw.choice([[huge], [huge, huge], [0], [], [1] * 100, "40", [1.5], None]),
        "data_offsets": draw.choice([[0, huge], [huge, huge], [8, 0], [1, 2], [0], "00", None]),
    }
    key = draw.choice(list(false))
    return {**header, name: {**entry, key: false[key]}}


def test_false_headers(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoints.write(path, {"a": torch.arange(40.0), "b": torch.zeros(3, 5)}, {})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    for draw in cases(600):
        text = json.dumps(falsified(header, draw)).encode()
        length_field = len(text) if draw.random() < 0.8 else draw.choice([0, 2**31, 2**63, 2**64 - 1, len(text) + 1])
        path.write_bytes(struct.pack("<Q", length_field) + text + body)
        assert outcome(lambda: checkpoints.read(path), CheckpointError) == "refused"


def test_well_formed_checkpoints_of_no_codec(tmp_path: Path) -> None:
    model, path = mini_codec(0), tmp_path / "checkpoint.safetensors"
    tensors, config = codec_tensors(model), model.config.to_dict()
    for draw in cases(30):
        name = draw.choice(list(tensors))
        changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda t: torch.full_like(t, float("nan")), lambda t: torch.full_like(t, float("-inf")),
            lambda t: t.int(), lambda t: t.bool(), lambda t: t.to(torch.complex64), lambda t: t[None],
        ]  # fmt: skip
        odd, wrong = dict(tensors), dict(config)
        if draw.random() < 0.5:
            odd[name] = draw.choice(changes)(tensors[name])
        else:
            values = [0, -8, 2**40, 1.5, "16", None, [], [0, 0, 0], [10**9] * 3, {}, True]
            key = draw.choice(["M", "N", "widths", "depths", "attn_s3", "y_spatial_prior_s3", "attn_s1", "context_net"])
            wrong[key] = draw.choice(values)
        checkpoints.write(path, odd, {"config": wrong})
        assert outcome(lambda: load_codec(path), CheckpointError) == "refused"


BOMB = "a: &a [x, x]\n" + "\n".join(f"a{n}: &a{n or ''} [*a{n - 1 or ''}, *a{n - 1 or ''}]" for n in range(1, 40))
ODD: list[Any] = [None, 0, -1, 1e400, "x", [], {}, True, [1], {"a": 1}, "\x1b[31mred\x07", 10**30, float("nan")]
STAGES = ["[1]", "model: 3", "model: {preset: [1], phase: x}", "lmbda: x\nmetric: {}", ": :", "&a [*a]",
    "!!python/object/apply:os.system ['x']", 'parent: "\\e[31m"',
    f"{BOMB}\nmodel: *a39\nlmbda: *a39\nparent: *a39"]  # fmt: skip


def test_forged_metadata_is_described_or_refused(tmp_path: Path) -> None:
    path, known = tmp_path / "checkpoint.safetensors", {"config": mini_codec(0).config.to_dict(), "name": "one"}
    quality = {"bpp": 1.0, "psnr_db": 30.0, "ms_ssim": None, "rd_loss": 2.0}
    fields = ["config", "name", "stage", "inputs", "quality", "identity", "exported_from", "lmbda", "metric"]
    forged = [{**known, field: value} for field in fields for value in ODD]
    forged += [{**known, "quality": {**quality, field: value}} for field in quality for value in ODD]
    forged += [{**known, "config": {**known["config"], "attn_s3": value}} for value in ODD]
    forged += [{**known, "stage": stage} for stage in STAGES]
    for metadata in forged:
        checkpoints.write(path, {"weight": torch.zeros(2)}, metadata)

        def describe() -> None:
            info = CheckpointInfo.read(path)
            assert len(json.dumps(info.to_json())) < 10_000
            assert "\x1b" not in info.table().plain()

        assert outcome(describe, CheckpointError) in ("accepted", "refused")
