"""Imports point down only: api -> config, registry, ops -> backends -> kernels; and importing regard stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import regard

PACKAGE = Path(regard.__file__).parent

# A module may import modules of lower levels, and those of its own level and folder.
LEVELS = {
    "errors": 0, "tracing": 0, "lengths": 1, "kernels": 1, "config": 2, "registry": 3, "backends": 4, "plans": 4,
    "ops": 5, "api": 6, "testing": 7,
}  # fmt: skip
TOP = 8  # everything else: cli, integrations, worker, bench, export, distributed
HEAVY = ("transformers", "triton", "typer", "rich", "pytest", "gguf", "huggingface_hub")


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path):
    """Absolute names of the modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "regard":  # from regard import ops: a module, or a name re-exported by the package
                yield from (f"regard.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part(module):
    names = module.split(".")
    return names[1] if len(names) > 1 else None


def level(module):
    """Of a regard module; a public name imported from the package itself counts as the api."""
    name = part(module)
    exists = (PACKAGE / f"{name}.py").exists() or (PACKAGE / str(name)).is_dir()
    return LEVELS.get(name, TOP) if exists else LEVELS["api"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = ".".join(["regard", *path.relative_to(PACKAGE).with_suffix("").parts])
    for module in imported(path):
        if module.split(".")[0] != "regard":
            continue
        if part(module) == part(own):
            continue
        assert level(module) < level(own) or TOP == level(module) == level(own), f"{own} imports {module}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").rglob("*.py")), ids=lambda path: path.name)
def test_kernels_never_import_torch(path):
    roots = {module.split(".")[0] for module in imported(path)}
    assert "torch" not in roots and "transformers" not in roots
    assert all(part(module) == "kernels" for module in imported(path) if module.startswith("regard"))


def test_third_party_imports_are_declared():
    """These belong to extras or to the command line: only their own folders import them."""
    owners = {
        "transformers": {"integrations", "worker", "bench"},
        "typer": {"cli", "worker", "bench", "export"},
        "gguf": {"worker"},
        "jinja2": {"bench"},
        "matplotlib": {"bench"},
    }
    for path in modules():
        for module in imported(path):
            allowed = owners.get(module.split(".")[0])
            assert allowed is None or path.relative_to(PACKAGE).parts[0].removesuffix(".py") in allowed, (
                f"{path} imports {module}"
            )


def in_fresh_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_runs_without_anything_but_torch():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))  # None: importing it fails
import torch, regard
q = torch.randn(1, 4, 2, 8)
regard.attention(q, q, q, causal=True)
explanation = regard.explain(q, q, q, causal=True)
print(*(reason.code for reason in explanation.reasons("flash")))
"""
    assert in_fresh_python(code) == ["device"]


def test_importing_costs_little_beyond_torch():
    """torch._dynamo and triton take two seconds to import, which only torch.compile and a kernel's launch may ask for."""
    code = """
import sys, regard
print(*(name for name in ("torch",) if name in sys.modules))
import torch
q = torch.randn(1, 4, 2, 8)
regard.attention(q, q, q, causal=True)
print(*(name for name in ("torch._dynamo", "triton", "sympy") if name in sys.modules))
"""
    assert in_fresh_python(code) == []


def test_help_on_usage_needs_no_torch():
    code = """
import sys
from typer.testing import CliRunner
from regard import cli
for command in ("explain", "bench", "report", "profile", "export"):
    assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0
print(*(name for name in ("torch", "transformers") if name in sys.modules))
"""
    assert in_fresh_python(code) == []


def test_submodules_and_exports_do_not_shadow_each_other():
    code = """
import regard.registry
print(regard.registry.__name__, regard.registry.registry.list_backends() == regard.list_backends())
print(regard.registry.__name__, regard.attention.__module__, regard.api.__name__, hasattr(regard, "no_such_name"))
"""
    assert in_fresh_python(code) == ["regard.registry", "True", "regard.registry", "regard.api", "regard.api", "False"]


def test_the_kit_needs_no_pytest():
    code = "import sys, regard.testing; print(*(name for name in ('pytest', 'hypothesis') if name in sys.modules))"
    assert in_fresh_python(code) == []


def test_every_public_name_is_there_and_documented():
    for name in (
        "attention varlen_attention paged_attention merge explain register unregister set_default use_backend "
        "list_backends record_selections can_use_flash_attention AttentionConfig AttentionBackend Reason"
    ).split():
        assert getattr(regard, name).__doc__, name
