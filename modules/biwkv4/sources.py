"""The folder of Bi-WKV4's C++ and CUDA sources."""

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parents[1] / "_cuda"  # a wheel's copy of cuda/

SOURCES = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "cuda"
