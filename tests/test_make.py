"""`make install` with a Python that is too old."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_old_python_is_told_and_the_next_try_with_a_right_one_works(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = script(tmp_path / "old", 'test "$1" = -V && echo Python 3.8.10 || exit 1')
    # In place of an installation: an environment whose pip notes what it is asked for.
    right = script(
        tmp_path / "right",
        f"""if test "$2" = venv; then
            rm -rf "$4" && mkdir -p "$4/bin" && ln -s {sys.executable} "$4/bin/python"
            printf '#!/bin/sh\\necho "$@" > asked\\n' > "$4/bin/pip" && chmod +x "$4/bin/pip"
        else exec {sys.executable} "$@"; fi""",
    )

    def install(python: Path) -> subprocess.CompletedProcess[str]:
        command = ["make", "install", f"PYTHON={python}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    failed = install(old)
    assert failed.returncode
    assert "this needs Python 3.11 or newer" in failed.stderr
    assert "Python 3.8.10" in failed.stderr
    script(tmp_path / ".venv" / "bin" / "python", "exit 1")  # what an old Python made before it was told of
    assert install(right).returncode == 0
    assert "--editable" in (tmp_path / "asked").read_text()
    assert (tmp_path / ".venv" / ".ready").is_file()
