"""The tests that tests/README.md names exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_promise_has_its_test() -> None:
    missing, path = [], ""
    for named in re.findall(r"`([\w/.…]+\.py)?(?:::(test_\w+))?`", (TESTS / "README.md").read_text()):
        path = named[0] or path
        if path and not (TESTS / path).is_file():
            missing.append(path)
        elif named[1] and f"def {named[1]}(" not in (TESTS / path).read_text():
            missing.append(f"{path}::{named[1]}")
    assert missing == []
