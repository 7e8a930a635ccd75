"""Commands work without a home folder."""

import os
import pwd
import stat
from pathlib import Path

import pytest

import pipeline


def unknown(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run without a home folder in variables and in the user database. Returns the folder of temporary files."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "")
    return tmp_path


def test_a_private_folder_serves_as_home(homeless: Path) -> None:
    for _ in range(2):
        pipeline._find_home()
        home = Path.home()
        assert home == homeless / f"home-{os.getuid()}"
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(homeless: Path) -> None:
    made_by_others = homeless / f"home-{os.getuid()}"
    made_by_others.mkdir()
    made_by_others.chmod(0o777)
    pipeline._find_home()
    assert Path.home() != made_by_others
    assert Path.home().is_relative_to(homeless)
