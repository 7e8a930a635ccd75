"""The program's own files and folders: written completely, as new files, and never through links."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.common.figure_style import new_figure, save
from pipeline.common.files import FileError, replacing
from pipeline.common.folder_lock import held
from pipeline.common.memory import memory_limit, too_large
from pipeline.common.tables import shortest


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file to which links are made. It must stay as it is."""
    (tmp_path / "victim").write_text("mine")
    yield tmp_path / "victim"
    assert (tmp_path / "victim").read_text() == "mine"


def test_of_two_writers_at_once_the_last_one_wins_with_a_whole_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as last, replacing(tmp_path / "a") as first:
        last.write_text("of the last")
        first.write_text("of the first")
    assert (tmp_path / "a").read_text() == "of the last"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_figure_is_not_written_through_a_link(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "figure.png").symlink_to(victim)
    save(new_figure(1)[0], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_partial_file_that_another_program_replaced_is_not_taken(tmp_path: Path, victim: Path) -> None:
    def write() -> None:
        with replacing(tmp_path / "a.json") as partial:
            partial.unlink()
            partial.symlink_to(victim)

    with pytest.raises(FileError, match=r"a.json: cannot be written: .*replaced"):
        write()
    assert not (tmp_path / "a.json").exists()


def test_a_link_in_the_place_of_the_lock_is_not_written_through(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="lock"), held(tmp_path / "chain"):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with (
        pytest.raises(FileError, match=rf"{tmp_path}/lock: cannot be locked: .*; choose another folder"),
        held(tmp_path),
    ):
        pass


def test_different_numbers_are_written_differently() -> None:
    assert [shortest(value) for value in (0.013, 0.0018, 1.0, 0.0130000001)] == ["0.013", "0.0018", "1", "0.0130000001"]


def test_a_dollar_in_a_label_is_not_a_formula(tmp_path: Path) -> None:
    figure, (axes,) = new_figure(1)
    axes.plot([0, 1], label="costs $^{$")  # no formula: as one, it would be an error
    axes.set_title("$\\frac{$")
    axes.legend()
    save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_more_than_half_the_memory_is_refused() -> None:
    assert too_large(0.4 * memory_limit()) == ""
    assert "of memory; " in too_large(0.6 * memory_limit())
