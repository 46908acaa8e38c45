"""The environment that make creates uses the torch that is there. What stands for torch here is a package of one line."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "environment.py"


def interpreter_with_torch(folder, version):
    """A virtual environment's python that sees a torch of this version."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("")
    (packages / f"torch-{version}.dist-info").mkdir()
    (packages / f"torch-{version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    return folder / "bin" / "python"


def run(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="make is for Unix")
def test_torch_of_an_active_environment_is_used_and_pinned(tmp_path):
    python = interpreter_with_torch(tmp_path / "active", "2.13.0+local")
    made = tmp_path / "made"
    run(python, SCRIPT, made, "no-such-distribution==1")  # would fail if anything were installed
    assert (made / "constraints.txt").read_text() == "torch==2.13.0+local\n"
    found = run(made / "bin" / "python", "-c", "import torch; print(torch.__file__)")
    assert Path(found).is_relative_to(tmp_path / "active")


def test_torch_that_is_missing_broken_or_too_old_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import environment as script

    python = interpreter_with_torch(tmp_path / "one", "2.8.1")
    assert script.torch_of(str(python)) is None
    (dist_info,) = (tmp_path / "one").glob("lib/python*/site-packages/torch-*")
    (dist_info / "METADATA").write_text("Name: torch\nVersion: 2.9.0\n")
    assert script.torch_of(str(python)) == "2.9.0"
    (dist_info.parent / "torch" / "__init__.py").write_text("raise ImportError('libcudart')")
    assert script.torch_of(str(python)) is None
