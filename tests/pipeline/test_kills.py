"""A chain that is killed at the nastiest places ends as one that was never touched."""

import shutil
from pathlib import Path

from kills import KILLED, attempt, differences, exit_code, stage_runs
from mini import mini_chain

PLACES = [
    "evaluation:2",  # in the comparison at step 0, after that of the Baseline's one phase and its evaluation
    "write.partial:1",
    "step:5",
    "step:1",  # twice in one phase
    "phase:1",  # at the unfreeze
    "write.renamed:1",
    "outbox:3",  # sent, but not noted as sent
    "publish.checkpoint:1",
    "publish.record:1",  # between stages
]


def test_a_chain_killed_at_every_nasty_place(runs: Path, empty_store: Path, tmp_path: Path) -> None:
    settings = ["data.workers=1"]
    untouched, chain = mini_chain(tmp_path / "untouched", "phase1", settings), mini_chain(runs, "phase1", settings)
    untouched.runs.mkdir()
    shutil.copy(empty_store / "mlflow.db", untouched.runs)
    assert exit_code(attempt(untouched.runs, "phase1", settings)) == 0
    codes = [exit_code(attempt(runs, "phase1", settings, {"HPCM_FAULT": place})) for place in PLACES]
    assert codes == [KILLED] * len(PLACES)
    assert exit_code(attempt(runs, "phase1", settings)) == 0
    assert differences(chain, untouched) == []
    (run,) = stage_runs(chain)[1]["phase1"]
    assert len([tag for tag in run.data.tags if tag.startswith("hpcm.attempt.")]) > 4
