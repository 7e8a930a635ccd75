"""Where the C++ and CUDA sources of Bi-WKV4 lie."""

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "_cuda"  # where a wheel keeps what a source tree has in cuda/

SOURCES = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "cuda"
