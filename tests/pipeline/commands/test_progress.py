"""The estimated time left of a run, and the lines that are printed without a terminal."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from mini import mini_chain
from rich.console import Console

from pipeline.commands import display, progress
from pipeline.commands.display import closing_table
from pipeline.commands.progress import Forecast, ProgressWatcher, _values, duration, to_train
from pipeline.evidence.rate_distortion import points_table
from pipeline.evidence.report_tables import quality_table
from pipeline.recipes.schema import Segment


def segment(name: str, steps: int, objective: str = "rate-distortion", train: str = "all") -> Segment:
    return Segment.model_validate(
        {"name": name, "train": train, "objective": objective, "steps": steps, "lr": {"default": 1e-4}}
    )


ALIGN, RELEASE = segment("align", 10, "align", "new"), segment("release", 100)
TODO = [("phase1", ALIGN), ("phase1", RELEASE), ("phase2", ALIGN), ("phase2", RELEASE)]


def test_what_is_left_follows_from_the_speed_of_each_sort_of_segment() -> None:
    forecast = Forecast(TODO)
    forecast.begin(ALIGN, 0)
    assert forecast.left() is None
    for step in range(10):
        forecast.step(2.0 * step)
    left = forecast.left()
    assert left is not None
    # Nothing is known of the release. It trains everything, so a step is taken to be 2.5 times as long.
    assert (left.segment, left.stage, left.chain) == (0, 500, 500 + 20 + 500)
    forecast.begin(RELEASE, 40)
    for step in range(20):
        forecast.step(100 + 6.0 * step)
    left = forecast.left()
    assert left is not None
    # The evaluation after the first align took from 18 to 100.
    assert (left.segment, left.stage, left.chain) == (240, 240, 240 + 20 + 82 + 600)
    forecast.begin(ALIGN, 0)
    forecast.step(224)
    left = forecast.left()
    assert left is not None
    # So did the end of the first stage, from 214 to 224, and the last stage ends too.
    assert left.stage == left.chain == 9 * 2 + 82 + 600 + 10


def test_equal_segments_of_two_stages_are_told_apart_and_stages_found_done_are_passed_over() -> None:
    forecast = Forecast([("phase1", RELEASE), ("phase2", RELEASE), ("phase3", ALIGN), ("phase4", ALIGN)])
    forecast.begin(RELEASE, 0)
    forecast.step(0.0)
    forecast.begin(RELEASE, 0)
    assert forecast.todo[0][0] == "phase2"
    forecast.begin(ALIGN, 0)
    assert forecast.todo[0][0] == "phase3"
    forecast.begin(segment("unheard-of", 3), 0)
    assert forecast.todo[0][0] == "phase3"


def test_only_stages_to_be_trained_count(finished: tuple) -> None:
    chain, _ = finished
    assert to_train(chain.plan()) == []
    assert [name for name, _ in to_train(chain.plan(), force=True)] == ["phase4"] * 3


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
def test_without_a_terminal_there_is_a_line_now_and_then(
    every_line: bool, steps: list[int], clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = ProgressWatcher(TODO, every_line)
    watcher.segment(RELEASE, 0)
    for step in range(1, 101):
        clock[0] += 0.8
        watcher.step({"loss": 1.5} if step % 10 == 0 else None)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, *lines = [line.split() for line in printed.err.splitlines()]
    assert " ".join(first) == "the training will take about 3 min, and evaluations some more"
    assert [line[1] for line in lines] == [f"{step}/100" for step in steps]
    assert "left: segment 0 s, stage 0 s, chain 1 min" in printed.err.splitlines()[-1]


def test_a_long_evaluation_is_seen_without_a_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    watcher = ProgressWatcher(TODO)
    for done in range(24):
        watcher.image(done, 24)
        clock[0] += 11
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"  validation: image {number} of 24" for number in (4, 7, 10, 13, 16, 19, 22)]


def test_a_line_leaves_no_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    for name in ("console", "errors"):
        terminal = Console(file=screen, force_terminal=True, width=100, highlight=False)
        for module in (display, progress):
            monkeypatch.setattr(module, name, terminal)
    with ProgressWatcher(TODO) as watcher:
        watcher.segment(RELEASE, 0)
        watcher.image(0, 5)
        watcher.note("transfer: 3 copied")
    printed = screen.getvalue()
    assert "validation" in printed
    (line,) = [line for line in printed.split("\n") if "transfer: 3 copied" in line]
    assert "━" not in line.rpartition("\x1b[2K")[2]


def test_estimated_and_coded_rates_carry_their_names() -> None:
    assert _values({"loss": 1.5, "bpp": 0.25}) == "loss 1.5000  estimated 0.2500 bpp"
    tables = closing_table(mini_chain(Path("nowhere"), "baseline")), quality_table([]), points_table("", {})
    assert all("coded bpp" in table.columns and "bpp" not in table.columns for table in tables)
