"""Stages that move a trained codec to a new architecture."""

import getpass
import os
import stat
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import modules as modules  # sets how threads wait, before PyTorch is imported

# A dependency of CompressAI uses a deprecated function of PyTorch. Users cannot fix that.
warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)


def _find_home() -> None:
    """Where nothing says where home is, as in a container under a foreign user id, use a private temporary folder.

    MLflow and PyTorch ask for it when they are imported, and stop without an answer.
    """
    try:
        Path.home()
        getpass.getuser()
    except (RuntimeError, KeyError, OSError):
        home = Path(tempfile.gettempdir(), f"home-{os.getuid()}")
        with suppress(FileExistsError):
            home.mkdir(mode=0o700)
        status = home.lstat()
        # Somebody else may have made it, to put files there that would be loaded.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            home = Path(tempfile.mkdtemp(prefix="home-"))
        os.environ["HOME"] = str(home)
        os.environ.setdefault("LOGNAME", str(os.getuid()))


_find_home()
