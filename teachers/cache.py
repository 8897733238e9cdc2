"""Where this user keeps what may be found again."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """This program's folder in the user's cache; it need not exist.

    Raises:
        OSError: there is no home folder, and so no cache folder.
    """
    try:
        folder = platformdirs.user_cache_path("distill")
    except RuntimeError as error:
        raise OSError(f"there is no home folder: {error}") from None
    if not folder.is_absolute():
        raise OSError(f"the cache folder {folder} is not an absolute path")
    return folder
