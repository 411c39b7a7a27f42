"""Run mypy on the package: `python -m tests.typecheck`.

The repository root is the package `tinsmith`, whatever the clone's folder is called; mypy takes a
package's name from its folder, so it is shown one of the right name.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOMS = ("primitives", "envs", "algorithms", "engines", "actors", "gateway", "cli", "chaos")


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "tinsmith"
        package.mkdir()
        for name in ("__init__.py", *ROOMS):
            (package / name).symlink_to(root / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml")]
        return subprocess.run(
            [*command, "--cache-dir", str(root / ".mypy_cache"), "-p", "tinsmith"], cwd=scratch
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
