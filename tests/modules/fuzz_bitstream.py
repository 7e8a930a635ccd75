"""Gives the codec mutated coded images and counts its answers. `make fuzz` runs it for some minutes.

There are four targets: the file, with all checks; the strings in a file with correct checksums, half of them without
the comparison of symbols, so that garbage runs through the whole decoder; the guards at the head of a latent; and the
range coder alone.
"""

import math
import re
import resource
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from modules import HPCM, preset_config
from modules.bitstream import coding
from modules.bitstream.file_format import BitstreamError, CodedImage, LatentHeader
from modules.bitstream.guards import Guards, step_sizes
from modules.bitstream.rans import SymbolReader
from modules.bitstream.tables import CodingTables
from modules.image_codec import ImageCodec

HEADROOM = 2**30
"""Bytes of memory that the fuzzed process may take in addition to those that it has at the start."""

GUARD_HEAD = 33
"""Bytes of a coded latent before its guards."""


def mini_codec(phase: int = 4) -> ImageCodec:
    """A codec that decodes an image in milliseconds."""
    attention = {"cross-attention": {"heads": 4}, "rwkv": {"hidden_rate": 1}}
    kinds = {"attention": attention, "prior": {"rwkv": {"hidden_rate": 1}}}
    return ImageCodec(HPCM(preset_config("tiny", phase, M=16, N=8, widths=(8, 8, 16), **kinds)))


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """`data` with one to three changes: bits, overwritten, removed and inserted bytes, truncation, or other bytes."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at, length, kind = int(random.integers(len(changed) + 1)), int(random.integers(1, 9)), random.integers(7)
        removed = min(length, len(changed) - at) if kind < 5 else 0
        if kind == 0 and removed:
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[:] = random.bytes(int(random.integers(200)))
        else:
            fill = [random.bytes(length), b"", bytes(length), b"\xff" * length][random.integers(4)]
            changed[at : at + removed] = fill
    return bytes(changed)


def fuzz_file(coded: CodedImage, count: int, random: np.random.Generator) -> Counter[str]:
    """Parse mutated files. The result must be an error or the image that was written."""
    data, tally = coded.pack(), Counter[str]()
    for _ in range(count):
        try:
            assert CodedImage.parse(mutate(data, random)) == coded
            tally["file: unchanged"] += 1
        except BitstreamError as error:
            tally[f"file: {_kind(error)}"] += 1
    return tally


def fuzz_strings(codec: ImageCodec, coded: CodedImage, count: int, random: np.random.Generator) -> Counter[str]:
    """Decode mutated strings, half of them at another size, in files whose checksums are right.

    The answer is an error or an image. With the comparison of symbols on, it is the image that was coded, or another
    part of it: what changed is ε where nothing is moved, the cut out of the padded image, or bytes that nobody reads.
    """
    tally, finish, matches, expected = Counter[str](), SymbolReader.finish, Guards.matches, codec.decode(coded).x_hat
    for number in range(count):
        parts = {name: getattr(coded, name) for name in ("y", "z")}
        for name in [("y",), ("z",), ("y", "z")][random.integers(3)]:
            mutated = mutate(parts[name], random)
            # Whole words, else not even the coder starts. Half of the streams do not end before the last symbol.
            parts[name] = mutated + bytes(-(len(mutated) - (name == "y")) % 4 + 4096 * int(random.integers(2)))
        size = random.integers(1, 200, 2).tolist() if random.integers(2) else (coded.height, coded.width)
        forged = CodedImage(coded.identity, *size, **parts)
        if number % 2:
            SymbolReader.finish, Guards.matches = (lambda *_: None), (lambda *_: True)  # type: ignore[method-assign]
        try:
            x_hat = codec.decode(CodedImage.parse(forged.pack())).x_hat
            assert x_hat.shape == (1, 3, *size)
            common = (..., *(slice(min(sides)) for sides in zip(size, expected.shape[2:], strict=True)))
            assert number % 2 or torch.allclose(x_hat[common], expected[common], atol=1e-4)
            tally["strings: any image, comparison off" if number % 2 else "strings: the image"] += 1
        except BitstreamError as error:
            tally[f"strings: {_kind(error)}"] += 1
        finally:
            SymbolReader.finish, Guards.matches = finish, matches  # type: ignore[method-assign]
    return tally


def fuzz_guards(coded: CodedImage, symbols: int, count: int, random: np.random.Generator) -> Counter[str]:
    """Read mutated guards of a latent. Accepted guards must have exactly one offset for the run of every symbol."""
    tally, guarded = Counter[str](), GUARD_HEAD + LatentHeader.of(coded.y).guard_bytes
    for _ in range(count):
        head = bytearray(mutate(coded.y[:guarded], random))
        if random.integers(2) and len(head) > 9:  # a length that fits, so that the list itself is read
            head[5:9] = max(len(head) - GUARD_HEAD, 0).to_bytes(4, "little")
        try:
            guards, rest = Guards.parse(bytes(head), symbols)
        except BitstreamError as error:
            tally[f"guards: {_kind(error)}"] += 1
            continue
        for offsets, size in zip(guards.offsets, step_sizes(symbols), strict=True):
            assert not offsets.values.any() or -(-size >> offsets.log2_run) == len(offsets.values)
        assert len(rest) <= len(head)
        tally["guards: accepted"] += 1
    return tally


def fuzz_coder(tables: CodingTables, count: int, random: np.random.Generator) -> Counter[str]:
    """Read symbols from any bytes."""
    tally = Counter[str]()
    for _ in range(count):
        indexes = torch.from_numpy(random.integers(0, tables.byte, int(random.integers(1, 400))))
        fill = [random.bytes, lambda length: b"\xff" * length, lambda length: bytes(length)][random.integers(3)]
        string = random.bytes(4 * int(random.integers(6))) + fill(4 * int(random.integers(30)))
        try:
            reader = SymbolReader(string, tables, len(indexes))
            assert reader.take(indexes).abs().max() < 2**30
            reader.finish(int(random.integers(2**32)))
            tally["coder: symbols"] += 1
        except BitstreamError as error:
            tally[f"coder: {_kind(error)}"] += 1
    return tally


def _kind(error: BitstreamError) -> str:
    return re.split("[:;]|[0-9]", str(error))[0].strip()


def fuzz(count: int, seed: int = 0) -> Counter[str]:
    """`count` mutations: 44 % of files, 6 % of strings, 30 % of guards, 20 % of what the coder reads."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    codec = mini_codec()
    exact = coding.in_float64(codec.model)
    image = torch.rand(1, 3, 40, 72)
    coded = codec.encode(image, icc_profile=b"a profile", epsilon=1e-3)
    symbols = math.prod(codec.model.latent_shapes(40, 72)[0])
    tally = fuzz_file(coded, count * 44 // 100, random)
    with mock.patch.object(coding, "in_float64", return_value=exact):  # One copy serves all files.
        for one in (coded, codec.encode(image, epsilon=0)):  # One without guards has none that could fit no other size.
            tally += fuzz_strings(codec, one, count * 3 // 100, random)
    tally += fuzz_guards(coded, symbols, count * 3 // 10, random)
    return tally + fuzz_coder(codec.model.coding_tables.y, count * 2 // 10, random)


def main() -> None:
    """Fuzz under a limit of memory and print the tally."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    mini_codec().model.compress(torch.rand(1, 3, 8, 8))  # Threads and libraries are there before the limit is set.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    tally = fuzz(count, seed)
    for outcome, times in sorted(tally.items()):
        print(f"{times:8} {outcome}")
    print(f"{tally.total():8} in all")


if __name__ == "__main__":
    main()
