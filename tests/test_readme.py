"""Every python block of the README runs as it stands, and every command it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text() if README.exists() else ""
PYPROJECT = (ROOT / "pyproject.toml").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
OUTPUTS = [code for language, code in BLOCKS if language == "text"]
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ").split("#")[0].strip()
    for language, code in BLOCKS
    if language in ("sh", "bash", "console", "shell")
    for line in code.splitlines()
    if line.strip()
]

# As a reader has it: no interpreter, and lines wide enough that no long option is cut.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "200"}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)


pytestmark = pytest.mark.skipif(not TEXT, reason="there is no README.md yet")


def test_there_is_an_example():
    assert PYTHON, "README.md has no python block"


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number):
    """Blocks run in order in one interpreter, as a reader would type them."""
    code = "\n".join(PYTHON[: number + 1])
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_first_block_prints_what_the_readme_shows():
    """But for peers that happen to be installed."""
    shown, printed = (text.splitlines() for text in (OUTPUTS[0], run("-c", PYTHON[0]).stdout))
    assert [line for line in printed if line in shown] == shown


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[:1] == ["make"]])
def test_make_target_exists(command):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(command.split()[1:]) <= set(targets)


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(python3? -m )?regard\b", c)])
def test_regard_command_exists(command):
    words = command.split()
    if words[0] == "regard":
        module, function = re.search(r'^regard = "([\w.]+):(\w+)"', PYPROJECT, flags=re.MULTILINE).groups()
        done = run("-c", f"from {module} import {function}; {function}()", words[1], "--help")
    else:
        done = run(*words[1:3], "--help")
    assert done.returncode == 0, done.stderr
    for option in re.findall(r"\s(--[\w-]+)", command):
        assert option in done.stdout, f"{option} is not an option: {done.stdout}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXT))))
def test_linked_file_exists(path):
    assert (ROOT / path).exists()
