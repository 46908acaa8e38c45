"""Make a virtual environment that has torch: the one this machine already has, or else a newly installed one.

    python3 .ci/environment.py .venv torch==2.13.0

A torch that the running interpreter sees, from the system, the user's site or a virtual environment that is active, is
used as it is. ``constraints.txt`` in the new environment pins it, so that no later ``pip install`` brings another.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

OLDEST = (2, 9)


def main(folder: Path, requirement: str) -> None:
    """Create the environment in ``folder``, installing ``requirement`` if no torch is to be seen."""
    python = create(folder, "--system-site-packages")
    if torch_of(python) is None and torch_of(sys.executable) is not None:
        share_packages(python)  # of a virtual environment: --system-site-packages means those of its base
    if torch_of(python) is None:
        python = create(folder)
        subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
    version = torch_of(python)
    if version is None:
        sys.exit(f"{requirement} was installed, but {python} cannot import a torch of {OLDEST} or newer")
    (folder / "constraints.txt").write_text(f"torch=={version}\n")


def create(folder: Path, *options: str) -> str:
    """Make an empty environment, in place of any that is there, and return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", *options, folder], check=True)
    return str(folder / "bin" / "python")


def torch_of(python: str) -> str | None:
    """The version of the torch that an interpreter imports, or None if there is none or it is too old."""
    code = "import importlib.metadata, torch; print(importlib.metadata.version('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    version = re.match(r"(\d+)\.(\d+)", found.stdout)
    if found.returncode != 0 or version is None or tuple(map(int, version.groups())) < OLDEST:
        return None
    return found.stdout.strip()


def share_packages(python: str) -> None:
    """Let the environment see the packages of the running interpreter, after its own."""
    code = "import site; print(site.getsitepackages()[0])"
    own = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    shared = [path for path in sys.path if path.endswith("-packages")]
    Path(own, "shared_packages.pth").write_text("\n".join(shared) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
