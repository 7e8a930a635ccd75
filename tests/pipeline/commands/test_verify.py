"""`hpcm verify` with its streams, and the bundled weights of each quality."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mini import Hpcm

from modules.bitstream.file_format import CodedImage
from modules.bitstream.guards import table_index
from modules.bitstream.identity import model_identity
from pipeline.common.errors import UserError
from pipeline.evaluation import conformance
from pipeline.evaluation.conformance import REFERENCE, STREAMS, Outcome
from pipeline.weights import shipped
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.metadata import read_metadata

CASES = {"guards", "noise", "odd", "pixel"}


def test_the_suite_holds_every_bundled_model_and_is_small() -> None:
    references = json.loads((STREAMS / REFERENCE).read_text())
    expected = {f"{path.stem}-{case}.hpcm" for path in shipped.WEIGHTS.glob("*.safetensors") for case in CASES}
    assert set(references) == expected, "make conformance writes the streams anew"
    assert sum(path.stat().st_size for path in STREAMS.iterdir()) < 100_000


def test_every_bundled_checkpoint_records_the_identity_of_its_codec() -> None:
    for path in shipped.WEIGHTS.glob("*.safetensors"):
        assert read_metadata(path)["identity"] == model_identity(load_codec(path)).hex(), path.name


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The streams of one bundled codec, of which two expect another result."""
    references = json.loads((STREAMS / REFERENCE).read_text())
    chosen = {name: fields for name, fields in references.items() if fields["model"] == "lean.safetensors"}
    for name in chosen:
        shutil.copy(STREAMS / name, tmp_path)
    chosen["lean-pixel.hpcm"] |= {"symbols": "0" * 64}
    chosen["lean-odd.hpcm"] |= {"tables": ""}
    (tmp_path / REFERENCE).write_text(json.dumps(chosen))
    return tmp_path


def test_this_machine_reads_the_streams_and_says_where_symbols_differ(suite: Path) -> None:
    outcomes = {
        outcome.name.removesuffix(".hpcm"): outcome for outcome in conformance.verify(torch.device("cpu"), suite)
    }
    assert {name: outcome.fault for name, outcome in outcomes.items()} == {
        "lean-guards": "",
        "lean-noise": "",
        "lean-odd": "the coding tables of this model differ from the reference",
        "lean-pixel": "the symbols differ from the reference",
    }
    assert all(0 < outcome.scale_error < outcome.epsilon for outcome in outcomes.values() if outcome.scale_error)
    assert outcomes["lean-guards"].guard_bytes > 50


def test_the_noisy_stream_has_residuals_beyond_its_tables() -> None:
    model = load_codec("control-0.0067")
    coded = CodedImage.read(STREAMS / "control-0.0067-noise.hpcm")
    trace, tables = model.trace(coded.y, coded.z, (coded.height, coded.width)), model.coding_tables
    assert (trace.symbols.abs() > tables.y.reach[table_index(trace.scales, tables.scales)]).any()


def test_without_a_suite_there_is_nothing_to_say(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="here to compare with"):
        next(conformance.verify(torch.device("cpu"), tmp_path))


@pytest.mark.parametrize("fault", ["", "the symbols differ from the reference"])
def test_the_output_ends_with_pass_or_fail(fault: str, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm) -> None:
    outcomes = [
        Outcome("one.hpcm", "lean.safetensors", (40, 60), 2e-5, 22, 6.5e-6, 3, ""),
        Outcome("two.hpcm", "lean.safetensors", (8, 8), 2e-5, 0, None, None, fault),
    ]
    monkeypatch.setattr(conformance, "verify", lambda device: iter(outcomes))
    printed = hpcm("verify", code=1 if fault else 0)
    assert f"PyTorch {torch.__version__}" in printed.out
    assert ("1 of 2 streams failed" if fault else "pass: 2 streams") in printed.out
    assert "6.5e-06" in printed.out
    assert "the largest scale error is 32% of its stream's ε" in printed.out
    assert printed.err == (f"error: two.hpcm: {fault}\n" if fault else "")
