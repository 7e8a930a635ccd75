"""Kill a chain many times, restart it until it ends, and compare it with an uninterrupted one.

    python tests/pipeline/soak.py --kills 100 --seed 0

A kill happens at a chosen place (pipeline/common/fault_injection.py) or at a random moment. Between the attempts things
change, as a user may change them: a stage is rebuilt with --force or --fresh, another recipe runs in the same folder
for a while, the folder of runs is renamed or replaced by a copy of itself. Half of the chains read their data in worker
processes. In the end the chain must have the bytes and metrics of an uninterrupted one, and its audit must find every
file as it was recorded. Exits 1 if anything differs.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kills import KILLED, attempt, differences, exit_code  # (after the path is set)
from mini import STAGES, mini_chain

from pipeline.evidence.audit import audit

PLACES = {
    "step": 6, "write.partial": 6, "write.renamed": 6, "segment": 2, "stage": 1, "evaluation": 3,
    "publish.checkpoint": 1, "publish.record": 1, "publish.superseded": 1, "publish.renamed": 1, "abandon": 1,
}  # fmt: skip
"""The places at which to kill, each with the largest number of passes before the kill."""

EVENTS = ("force", "fresh", "recipe", "move", "copy")
"""What may be changed before an attempt. About every other attempt changes nothing."""
GIVING_WORK = ("force", "recipe", "recipe")
"""What is changed before an attempt at a finished chain, which would have nothing to do."""
OF_EVENT = {"force": "publish.superseded", "fresh": "abandon"}
"""The place that only this event passes. Every other of its attempts is killed there."""
OTHER_RECIPE = "optimizer.clip_norm=0.5"

WORKERS = (0, 2)
"""Data workers, chain by chain in turn."""


class Soak:
    """Kills and restarts chains, and counts the results."""

    def __init__(self, folder: Path, stage: str, seed: int):
        self.folder, self.stage, self.draw = folder, stage, random.Random(seed)
        self.stages = STAGES[: STAGES.index(stage) + 1]
        self.kills: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.starts = self.chains = 0
        self.different: list[str] = []

    def run(self, kills: int, seconds: float) -> None:
        """Kill for this number of times, or for this time."""
        references, end = [], time.time() + seconds
        for workers in WORKERS:
            began = time.time()
            references.append(mini_chain(self.folder / f"reference-{workers}", self.stage))
            assert exit_code(attempt(references[-1].runs, self.stage, [f"data.workers={workers}"]), 1200) == 0
            self.longest = time.time() - began
        while sum(self.kills.values()) < kills and time.time() < end:
            workers = WORKERS[self.chains % len(WORKERS)]
            goal = min(kills, sum(self.kills.values()) + kills // 4 + 1)
            runs, code = self._one_chain(self.folder / f"chain-{self.chains}", [f"data.workers={workers}"], goal, end)
            reference = references[self.chains % len(WORKERS)]
            found = [f"exit code {code}"] if code else differences(mini_chain(runs, self.stage), reference)
            chains, problems = audit(runs)
            found += [*problems, *(line for chain in chains for stage in chain.stages for line in stage.problems)]
            self.different += [f"chain {self.chains}: {line}" for line in found]
            self.chains += 1
            self.report()
            shutil.rmtree(runs)

    def _one_chain(self, runs: Path, settings: list[str], kills: int, end: float) -> tuple[Path, int]:
        """Run, kill and restart a chain until it was killed often enough and ends by itself.

        Returns its folder, which may have moved, and its exit code.
        """
        finished = False
        while True:
            enough = sum(self.kills.values()) >= kills or time.time() > end
            event = "" if enough else self.draw.choice(GIVING_WORK if finished else [*EVENTS, *[""] * len(EVENTS)])
            if event in ("move", "copy") and runs.exists():
                runs = self._moved(runs, event)
            stage, changes, options = self._attempted(event)
            place = self.draw.choice([*PLACES, "at random", "at random"])
            if event in OF_EVENT and self.draw.random() < 0.5:
                place = OF_EVENT[event]
            number = self.draw.randint(1, PLACES.get(place, 1))
            fault = {} if enough or place == "at random" else {"HPCM_FAULT": f"{place}:{number}"}
            process = attempt(runs, stage, [*settings, *changes], fault, options)
            self.starts, self.events[event or "plain"] = self.starts + 1, self.events[event or "plain"] + 1
            if place == "at random" and not enough:
                process.join(self.draw.uniform(0, self.longest / 4))
                process.kill()
            code = exit_code(process, 1200)
            if code not in (0, KILLED) or (code == 0 and enough):
                return runs, code
            finished = code == 0
            if code == KILLED:
                self.kills[place] += 1
                if sum(self.kills.values()) % 10 == 0:
                    self.report()

    def _attempted(self, event: str) -> tuple[str, Sequence[str], Sequence[str]]:
        """The stage to run to, changed settings and options of an attempt."""
        if event == "force":
            return self.draw.choice(self.stages), (), ("--force",)
        if event == "fresh":
            return self.stage, (), ("--fresh",)
        if event == "recipe":
            return self.draw.choice(self.stages), (f"{self.draw.choice(self.stages)}.{OTHER_RECIPE}",), ()
        return self.stage, (), ()

    def _moved(self, runs: Path, event: str) -> Path:
        target = runs.with_name(f"{runs.name}-{self.starts}")
        if event == "move":
            return runs.rename(target)
        shutil.copytree(runs, target)
        shutil.rmtree(runs)
        return target

    def report(self) -> None:
        """Print the tally."""
        places, events = (
            ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))
            for counter in (self.kills, self.events)
        )
        print(
            f"{sum(self.kills.values())} kills ({places}), {self.starts} starts ({events}), {self.chains} chains: "
            f"other files or metrics than untouched, or not as recorded: {'; '.join(self.different) or 'none'}",
            flush=True,
        )


def main() -> None:
    """Read the options and run. Exits 1 if a chain differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=600, help="begin no further attempts to kill after that")
    parser.add_argument("--stage", default="phase4")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options.stage, options.seed)
        soak.run(options.kills, 60 * options.minutes)
    sys.exit(bool(soak.different))


if __name__ == "__main__":
    main()
