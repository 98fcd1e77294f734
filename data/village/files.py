"""How the village is kept on disk: records line by line, and folders that are whole or not there."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to fill, which takes the place of `folder` when that has gone well. Another
    process may have been faster, with the same bytes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
