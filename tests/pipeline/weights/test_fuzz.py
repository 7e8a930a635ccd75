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
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from mini import FOLDER, mini_codec
from PIL import Image

from pipeline.commands.checkpoint_info import CheckpointInfo
from pipeline.data.images import find_images
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


@pytest.fixture
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every official file for the mini codec: building a full one for each case would take hours."""
    monkeypatch.setattr(checkpoints, "nearest_config", lambda tensors: mini_codec(0).config)


@pytest.mark.usefixtures("small_presets")
def test_damaged_official_files(tmp_path: Path) -> None:
    path, contents = tmp_path / "official.pth.tar", []
    tensors = dict(list(codec_tensors(mini_codec(0)).items())[:4])
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"state_dict": tensors}, buffer, _use_new_zipfile_serialization=zipped)
        contents.append(buffer.getvalue())
    for draw in cases(300):
        path.write_bytes(damaged(draw.choice(contents), draw))
        assert outcome(lambda: import_official(path), CheckpointError) == "refused"  # At best it lacks tensors.


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


LINES = [
    "a: &x [*x]", "b: *x", "<<: {seed: 1}", "\tseed: 3", "seed: 3", "seed: [", "? [a]", "- 1", "'", '"\\x"', "---",
    "seed: !!python/name:os.system", "schedule: " + "[" * 500, "schedule: " + "{a: " * 500, "data: 3", "lmbda: .nan",
    "lmbda: 1e999", "seed: " + "9" * 5000, "model: {preset: tiny, phase: [0]}", "%YAML 9", "\x00", "\ufeff", "\u2028",
    "name: ''", "parent: {}", "transfer: {rename: {a: [b]}}", "schedule: [{name: x}]", "optimizer: {betas: [1, 2]}",
    "lr: {default: -1}", "a" * 100_000,
]  # fmt: skip


def test_damaged_recipes(tmp_path: Path) -> None:
    contents = {name: (FOLDER / f"{name}.yaml").read_text() for name in ("common", "baseline", "phase1")}
    for name, content in contents.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    for draw in cases(200):
        name = draw.choice(list(contents))
        lines = contents[name].splitlines()
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(len(lines))
            change = draw.choice(["insert", "replace", "repeat", "indent", "bytes"])
            if change == "insert":
                lines.insert(at, draw.choice(LINES))
            elif change == "replace":
                lines[at] = draw.choice(LINES)
            elif change == "repeat":
                lines.insert(at, lines[at])
            elif change == "indent":
                lines[at] = draw.choice([" ", "\t", "   "]) + lines[at]
        content = "\n".join(lines).encode(errors="surrogatepass")
        (tmp_path / f"{name}.yaml").write_bytes(damaged(content, draw) if change == "bytes" else content)
        assert outcome(lambda: load_recipe(tmp_path), RecipeError) in ("accepted", "refused")
        (tmp_path / f"{name}.yaml").write_text(contents[name])


KINDS = [
    ("png", "RGB"), ("png", "P"), ("png", "I;16"), ("png", "LA"), ("jpg", "RGB"), ("jpg", "CMYK"), ("jpg", "L"),
    ("webp", "RGB"), ("bmp", "P"), ("tiff", "RGB"), ("tiff", "CMYK"), ("tiff", "I;16"), ("ppm", "RGB"),
    ("avif", "RGB"), ("gif", "P"),
]  # fmt: skip


def picture_bytes(suffix: str, mode: str) -> bytes:
    """An encoded picture that is not empty."""
    picture = Image.radial_gradient("L").resize((40, 32))
    picture = picture.convert("I;16") if mode == "I;16" else picture.convert("RGB").convert(mode)
    buffer = io.BytesIO()
    formats = {"jpg": "jpeg", "ppm": "ppm"}
    picture.save(buffer, formats.get(suffix, suffix))
    return buffer.getvalue()


def test_damaged_pictures(tmp_path: Path) -> None:
    contents = [(suffix, picture_bytes(suffix, mode)) for suffix, mode in KINDS]
    for draw in cases(1000):
        suffix, content = draw.choice(contents)
        path = tmp_path / f"picture.{suffix}"
        path.write_bytes(b"" if draw.random() < 0.01 else damaged(content, draw))
        assert outcome(partial(read_picture, path), DataError) in ("accepted", "refused")


def png_of_size(width: int, height: int) -> bytes:
    """A small file that claims to be a large picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bombs_are_skipped_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "sound.png")
    for draw in cases(30):
        size = draw.choice([60_000, 2**20, 2**31 - 1])
        (tmp_path / "bomb.png").write_bytes(png_of_size(size, size - draw.randrange(1000)))
        found = find_images(tmp_path, "train", 64)
        assert found.names == ("sound.png",)
        ((path, reason),) = found.skipped
        assert Path(path).name == "bomb.png"
        assert "pixels" in reason or "cannot be read" in reason or "damaged" in reason
