"""Kill a chain again and again, restart it until it ends, and compare it with one that was never touched.

    python tests/pipeline/soak.py --kills 100 --seed 0

Half of the chains read their data in worker processes. A kill falls on a chosen place
(pipeline/common/fault_injection.py) or on a moment drawn at random. Exits 1 where anything differs.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kills import KILLED, attempt, differences, exit_code  # (after the path is set)
from mini import mini_chain

PLACES = {
    "step": 6, "write.partial": 6, "write.renamed": 6, "segment": 2, "stage": 1, "evaluation": 3,
    "publish.checkpoint": 1, "publish.record": 1, "outbox": 15,
}  # fmt: skip
"""Where to kill, and at which pass of the place at the latest."""

WORKERS = (0, 2)
"""Data workers, chain by chain in turn."""


def _settings(workers: int) -> list[str]:
    return [f"data.workers={workers}"]


class Soak:
    """Chains that are killed and restarted, and the tally."""

    def __init__(self, folder: Path, stage: str, seed: int):
        self.folder, self.stage, self.draw = folder, stage, random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.starts = self.chains = self.stages = 0
        self.different: list[str] = []

    def run(self, kills: int) -> None:
        """Kill that often."""
        references = []
        for workers in WORKERS:
            began = time.time()
            references.append(mini_chain(self.folder / f"reference-{workers}", self.stage))
            assert exit_code(attempt(references[-1].runs, self.stage, _settings(workers)), 1200) == 0
            self.longest = time.time() - began
        while sum(self.kills.values()) < kills:
            runs = self.folder / f"chain-{self.chains}"
            workers = WORKERS[self.chains % len(WORKERS)]
            code = self._one_chain(runs, _settings(workers), kills)
            chain = mini_chain(runs, self.stage)
            reference = references[self.chains % len(WORKERS)]
            found = [f"exit code {code}"] if code else differences(chain, reference)
            self.different += [f"chain {self.chains}: {line}" for line in found]
            self.chains, self.stages = self.chains + 1, self.stages + len(chain.tasks)
            self.tell()
            shutil.rmtree(runs)

    def _one_chain(self, runs: Path, settings: list[str], kills: int) -> int:
        """Run, kill and restart a chain until it ends by itself; returns its exit code."""
        while True:
            enough = sum(self.kills.values()) >= kills
            place = self.draw.choice([*PLACES, "at random", "at random"])
            number = self.draw.randint(1, PLACES.get(place, 1))
            fault = {} if enough or place == "at random" else {"HPCM_FAULT": f"{place}:{number}"}
            process = attempt(runs, self.stage, settings, fault)
            self.starts += 1
            if place == "at random" and not enough:
                process.join(self.draw.uniform(0, self.longest / 4))
                process.kill()
            code = exit_code(process, 1200)
            if code != KILLED:
                return code
            self.kills[place] += 1
            if sum(self.kills.values()) % 10 == 0:
                self.tell()

    def tell(self) -> None:
        """Print the tally."""
        places = ", ".join(f"{place} {count}" for place, count in sorted(self.kills.items()))
        print(
            f"{sum(self.kills.values())} kills ({places}), {self.starts} starts, {self.chains} chains: "
            f"of {self.stages} stages, other files or metrics than untouched: {'; '.join(self.different) or 'none'}",
            flush=True,
        )


def main() -> None:
    """Read the options, run, exit 1 where a chain differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stage", default="phase4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options.stage, options.seed)
        soak.run(options.kills)
    sys.exit(bool(soak.different))


if __name__ == "__main__":
    main()
