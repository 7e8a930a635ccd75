"""A chain that passed its checks is not checked again until an input of the checks changes."""

from pathlib import Path

import pytest
from mini import mini_chain

from pipeline.chain import passed_checks, precheck
from pipeline.chain.precheck import StageError


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the targets of the chains that were checked, with an empty cache."""
    names: list[str] = []
    check = precheck.check_stages
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(precheck, "check_stages", lambda tasks: (names.append(tasks[-1].stage.name), check(tasks)))
    return names


def test_a_chain_is_checked_again_when_what_is_checked_changes(
    checked: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini_chain(runs, "phase1").plan()
    mini_chain(runs, "phase1", ["data.batch_size=5", "phase1.schedule.frozen.steps=77"]).plan()
    assert checked == ["phase1"]
    mini_chain(runs, "phase1", ["data.crop=256"]).plan()
    mini_chain(runs, "phase2").plan()
    assert checked == ["phase1", "phase1", "phase2"]
    monkeypatch.setattr(passed_checks, "_code", lambda: "other")
    mini_chain(runs, "phase1").plan()
    assert checked[3:] == ["phase1"]


def test_what_fails_is_not_remembered(checked: list[str], runs: Path) -> None:
    for _ in range(2):
        with pytest.raises(StageError, match=r"lr\['g_x\.\*'\]: selects no"):
            mini_chain(runs, "baseline", ['baseline.schedule.0.lr={"g_x.*": 1.0e-3, default: 1.0e-3}']).plan()
    assert checked == ["baseline", "baseline"]
