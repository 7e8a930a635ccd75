"""The time left of a run, and the lines that are printed without a terminal."""

from collections.abc import Iterator

import pytest

from pipeline.commands import progress
from pipeline.commands.display import duration
from pipeline.commands.progress import ProgressWatcher
from pipeline.recipes.schema import Segment

FROZEN = Segment.model_validate(
    {"name": "frozen", "train": "new", "objective": "rate-distortion", "steps": 100, "lr": {"default": 1e-4}}
)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3900, "1 h 5 min"), (187200, "2 d 4 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("every_line", "steps"), [(False, [40, 80, 100]), (True, [*range(10, 101, 10)])])
def test_without_a_terminal_a_line_is_printed_now_and_then(
    every_line: bool, steps: list[int], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = ProgressWatcher(1100, every_line)
    watcher.segment(FROZEN, 0)
    for step in range(1, 101):
        clock[0] += 0.9
        watcher.step({"loss": 1.5} if step % 10 == 0 else None)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in steps]
    assert "left at this speed: segment 54 s, chain 16 min" in next(line for line in lines if " 40/" in line)


def test_the_speed_is_that_of_the_latest_steps_of_the_segment(clock: list[float]) -> None:
    watcher = ProgressWatcher(400)
    watcher.segment(FROZEN, 40)
    for step in range(60):
        clock[0] += 100 if step < 10 else 2
        watcher.step(None)
    assert watcher.time_left == "left at this speed: segment 0 s, chain 11 min"
    clock[0] += 1000  # an evaluation
    watcher.segment(FROZEN, 0)
    watcher.step(None)
    assert watcher.time_left == ""
    clock[0] += 3
    watcher.step(None)
    assert watcher.time_left == "left at this speed: segment 5 min, chain 17 min"


def test_a_long_evaluation_is_seen_without_a_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    watcher = ProgressWatcher()
    for done in range(24):
        watcher.image(done, 24)
        clock[0] += 11
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"  validation: image {number} of 24" for number in (4, 7, 10, 13, 16, 19, 22)]
