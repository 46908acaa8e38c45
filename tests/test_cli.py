"""The command line: what it prints, what it exits with, and that a mistake is one sentence and never a traceback."""

import json

import pytest

pytest.importorskip("typer", reason="the command line needs typer")

from typer.testing import CliRunner

import regard
from regard.cli import app


def run(*arguments):
    """The result of a command line, wide enough that no sentence is folded."""
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "400", "TERM": "dumb"})


def refused(*arguments):
    """The one sentence a command line is refused with."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_version_is_the_packages():
    assert run("--version").output == f"regard {regard.__version__}\n"


def test_no_command_shows_the_commands():
    assert all(name in run().output for name in ("info", "explain", "generate"))


def test_info_lists_versions_devices_and_backends():
    output = run("info").output
    import torch

    assert torch.__version__ in output
    assert "cpu" in output
    assert all(name in output for name in regard.list_backends())


def test_info_as_json():
    facts = json.loads(run("info", "--json").output)
    assert facts["versions"]["regard"] == regard.__version__
    assert facts["devices"][-1]["arch"] == "cpu"
    assert [each["name"] for each in facts["backends"]] == regard.list_backends()
    assert {"transformers", "gguf", "gemma3-270m"} <= {each["name"] for each in facts["optional"]}


@pytest.mark.parametrize("arch", ["gfx1100", "sm90", "sm80", "gfx942"])
def test_explain_needs_no_such_device(arch):
    facts = json.loads(run("explain", "--arch", arch, "--causal", "--window", "1024,0", "--json").output)
    assert facts["config"]["arch"] == arch
    assert facts["config"]["device"] == "cuda"
    assert facts["config"]["window"] == [1024, 0]
    assert facts["chosen"]["backend"] not in ("cpu", "reference")


def test_explain_prints_every_backend_and_every_reason():
    result = run("explain", "--arch", "gfx1100", "--head-dim", 512, "--dropout", 0.5)
    config = regard.AttentionConfig(1, 2048, 2048, 16, 16, 512, device="cuda", arch="gfx1100", dropout_p=0.5)
    explanation = regard.explain(config)
    assert config.describe() in result.output
    assert explanation.chosen.why in result.output
    for name, reasons in explanation.entries:
        assert name in result.output
        for reason in reasons:
            assert str(reason) in result.output


def test_explain_covers_every_field_of_a_config():
    arguments = (
        "--arch sm90 --dtype fp16 --batch 2 --seqlen-q 128 --seqlen-k 256 --heads 8 --heads-kv 2 --head-dim 64 "
        "--head-dim-v 32 --softmax-scale 0.5 --causal --window none,3 --softcap 20 --alibi --sinks --mask 128,256 "
        "--bias 2,1,1,256 --bias-grad --dropout 0.1 --page-size 16 --lse --grad --deterministic --json"
    )
    found = json.loads(run("explain", *arguments.split()).output)["config"]
    expected = dict(
        batch=2, seqlen_q=128, seqlen_k=256, heads_q=8, heads_kv=2, head_dim=64, head_dim_v=32, dtype="float16",
        device="cuda", arch="sm90", softmax_scale=0.5, causal=True, window=[None, 3], softcap=20.0,
        mask_shape=[1, 1, 128, 256], bias_shape=[2, 1, 1, 256], bias_dtype="float16", bias_requires_grad=True,
        alibi=True, sinks=True, dropout_p=0.1, varlen=False, total_q=None, total_k=None, kv_lens=True, page_size=16,
        return_lse=True, requires_grad=True, deterministic=True, transformed=False, q_strides=None, k_strides=None,
        v_strides=None,
    )  # fmt: skip
    assert found == expected
    packed = json.loads(run("explain", "--arch", "cpu", "--varlen", "--batch", 3, "--seqlen-q", 10, "--json").output)
    assert (packed["config"]["total_q"], packed["config"]["total_k"]) == (30, 30)


def test_explain_says_when_the_asked_for_backend_cannot():
    assert "reference: chosen by name" in run("explain", "--backend", "reference").output
    output = run("explain", "--backend", "flash", "--arch", "sm90", "--head-dim", 512).output
    assert "flash was asked for and cannot serve this call" in output
    facts = json.loads(run("explain", "--backend", "flash", "--arch", "sm90", "--head-dim", 512, "--json").output)
    assert facts["chosen"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--arch sm9", "arch: got 'sm9', needs cpu, sm and digits"),
        ("--arch a100", "arch: got 'a100'"),
        ("--dtype int8", "dtype: got 'int8', needs bfloat16, float16, float32, float64"),
        ("--heads 7 --heads-kv 2", "heads_q: got 7 query heads, 2 key/value heads"),
        ("--head-dim 0", "head_dim: got 0"),
        ("--batch -1", "batch: got -1"),
        ("--window 3", "window: got '3', needs LEFT,RIGHT"),
        ("--window a,b", "window: got 'a,b'"),
        ("--window -1,0", "window: got (-1, 0)"),
        ("--softcap nan", "softcap: got nan"),
        ("--softmax-scale inf", "softmax_scale: got inf"),
        ("--dropout 1", "dropout_p: got 1.0"),
        ("--mask 1,2,3,4,5", "mask: got '1,2,3,4,5'"),
        ("--mask 1,,3,4", "mask: got '1,,3,4'"),
        ("--mask 1,1,5,2048", "mask: got shape (1, 1, 5, 2048)"),
        ("--bias x", "bias: got 'x'"),
        ("--page-size 0", "page_size: got 0"),
        ("--backend falsh", "backend: got 'falsh', needs 'auto' or one of"),
    ],
)
def test_bad_options_are_one_sentence(arguments, sentence):
    assert sentence in refused("explain", *arguments.split())


def test_what_typer_refuses_is_no_traceback_either():
    for arguments in (["explain", "--batch", "two"], ["explain", "--no-such-option"], ["generate"], ["nonsense"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_mistakes_in_generate_are_found_before_a_model_is_loaded(tmp_path):
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "folder").mkdir()
    gguf = tmp_path / "text.gguf"
    assert "model: got 'gemma4', needs gemma3-270m, the path of a GGUF file or" in refused(
        "generate", "--model", "gemma4", "hello"
    )
    assert "which does not exist" in refused("generate", "--model", tmp_path / "missing.gguf", "hello")
    assert "without a config.json" in refused("generate", "--model", tmp_path / "folder", "hello")
    assert "prompt: got ' '" in refused("generate", "--model", gguf, " ")
    assert "max_new_tokens: got 0" in refused("generate", "--model", gguf, "--max-new-tokens", 0, "hello")
    assert "temperature: got -1.0" in refused("generate", "--model", gguf, "--temperature", -1, "hello")
    assert "backend: got 'fast'" in refused("generate", "--model", gguf, "--backend", "fast", "hello")
    assert "compare: got 'sdpa', needs 'eager'" in refused("generate", "--model", gguf, "--compare", "sdpa", "hello")
    assert "needs greedy generation" in refused(
        "generate", "--model", gguf, "--compare", "eager", "--temperature", 1, "hello"
    )
    assert "device: got 'tpu'" in refused("generate", "--model", gguf, "--device", "tpu", "hello")
    assert "device: got 'cuda:99'" in refused("generate", "--model", gguf, "--device", "cuda:99", "hello")
    assert "dtype: got 'int4'" in refused("generate", "--model", gguf, "--dtype", "int4", "hello")
