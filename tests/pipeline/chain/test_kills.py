"""A chain that is killed or stopped at the most difficult places ends like an uninterrupted one."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

from accelerate import Accelerator
from kills import KILLED, attempt, differences, exit_code
from mini import Finished, begun, mini_chain, record_of

from pipeline.common.processes import ProcessGroup

PLACES = [
    "evaluation:2",  # in the comparison at step 0, after that of the Baseline's one segment and its evaluation
    "write.partial:1",
    "step:5",
    "step:1",  # twice in one segment
    "segment:1",  # at the unfreeze
    "write.renamed:1",
    "publish.checkpoint:1",
    "publish.record:1",  # complete, but not in its place
    "publish.renamed:1",  # between stages
]
SIGNALS = [
    ("step:2", signal.SIGUSR1, 143),
    ("write.partial:3", signal.SIGTERM, 143),
    ("evaluation:1", signal.SIGTERM, 143),  # validation at the segment's end
    ("evaluation:2", signal.SIGINT, 130),  # the evaluation with real bitstreams
]


def test_a_chain_killed_at_every_nasty_place(runs: Path, finished: Finished) -> None:
    codes = [exit_code(attempt(runs, "phase1", [], {"HPCM_FAULT": place})) for place in PLACES]
    assert codes == [KILLED] * len(PLACES)
    assert exit_code(attempt(runs, "phase1", [])) == 0
    chain = mini_chain(runs, "phase1")
    assert differences(chain, finished[0]) == []
    assert len(record_of(chain, "phase1").attempts) > 4


def test_a_signal_is_heard_wherever_it_comes(runs: Path, tmp_path: Path, finished: Finished) -> None:
    chain, log = mini_chain(runs, "baseline"), tmp_path / "log"
    for place, signum, code in SIGNALS:
        asked = {"HPCM_FAULT": place, "HPCM_FAULT_SIGNAL": str(signum), "LOG": str(log)}
        assert exit_code(attempt(runs, "baseline", [], asked)) == code
        last = begun(chain, "baseline").attempts[-1]
        assert (last.state, last.reason) == ("interrupted", f"stopped by {signum.name}")
    assert [line[:10] for line in log.read_text().splitlines() if line.startswith("stopped by")] == ["stopped by"] * 4
    assert exit_code(attempt(runs, "baseline")) == 0
    assert differences(chain, finished[0]) == []


def _stop_twice() -> None:
    with ProcessGroup(Accelerator(cpu=True)) as processes:
        os.kill(os.getpid(), signal.SIGTERM)
        assert processes.signum == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)


def test_a_second_signal_ends_the_process_at_once() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_stop_twice)
    process.start()
    assert exit_code(process) == -signal.SIGINT
