"""The examples run: a few steps of the tiny training, and the Llama script in its tiny shape."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_tiny = load("train_tiny")


@pytest.fixture
def one_thread():
    """Tensors this small gain nothing from a second thread, and lose much where another process wants the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_tiny_training_learns_and_agrees_with_eager(tmp_path, capsys, one_thread):
    report = train_tiny.main(["--steps", "8", "--out", str(tmp_path)])
    ours, eager = (report["runs"][name]["losses"] for name in ("regard", "eager"))
    assert len(ours) == len(eager) == 8
    assert ours[-1] < ours[0] - 0.1
    assert max(abs(a - b) for a, b in zip(ours, eager, strict=True)) < 1e-4
    assert report["backends"], "no attention of regard's ran"
    assert json.loads((tmp_path / "train_tiny.json").read_text())["runs"] == report["runs"]
    assert "difference" in capsys.readouterr().out


def test_tiny_training_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs pip install '.[examples]'")
    train_tiny.draw(tmp_path / "curves.svg", {"regard": [3.0, 2.0, 1.5], "eager": [3.0, 2.0, 1.6]})
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_eager_attention_of_the_example_is_causal_grouped_attention():
    q, k, v = (torch.randn(2, 7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    outs = [attention(q, k, v) for attention in (train_tiny.causal_regard, train_tiny.causal_eager)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in outs))


def test_compare_tells_curves_apart():
    eager = [3.0, 2.5, 2.6, 2.2, 2.3]
    assert train_tiny.compare([loss + 1e-4 for loss in eager], eager)["largest_difference"] == pytest.approx(1e-4)
    with pytest.raises(AssertionError, match="the curves differ"):
        train_tiny.compare([loss + 0.05 for loss in eager], eager)
    with pytest.raises(AssertionError, match="the loss went from"):
        train_tiny.compare(eager[::-1], eager[::-1])


def test_the_text_is_there_and_its_origin_stated():
    text = train_tiny.TEXT.read_text()
    assert text.startswith("First Citizen:") and 20_000 < len(text) < 100_000
    assert train_tiny.TEXT.name in (EXAMPLES / "README.md").read_text()


# train_llama


@pytest.fixture(scope="module")
def train_llama():
    pytest.importorskip("transformers", reason="train_llama needs transformers")
    return load("train_llama")


def test_llama_steps_agree_across_implementations(train_llama, tmp_path, one_thread):
    report = train_llama.main(["--tiny", "--length", "33", "--steps", "3", "--out", str(tmp_path / "llama.json")])
    part = report["lengths"][33]
    assert set(part["results"]) == {"regard", "sdpa", "eager"}
    assert part["results"]["regard"]["regard_backends"] and not part["results"]["sdpa"]["regard_backends"]
    assert all(result["losses"][2] < result["losses"][0] for result in part["results"].values())
    assert all(min(result["first_gradient_norms_of_q_proj"]) > 0 for result in part["results"].values())
    assert max(distance["losses"] for distance in part["distances_from_regard"].values()) < 1e-5
    written = json.loads((tmp_path / "llama.json").read_text())
    assert written["lengths"]["33"] == json.loads(json.dumps(part))


def test_llama_out_of_memory_is_a_result(train_llama, tmp_path, monkeypatch, capsys):
    measure = train_llama.measure

    def eager_does_not_fit(implementation, *arguments):
        if implementation == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has")
        return measure(implementation, *arguments)

    monkeypatch.setattr(train_llama, "measure", eager_does_not_fit)
    arguments = ["--tiny", "--length", "9", "--steps", "1", "--out", str(tmp_path / "llama.json")]
    results = train_llama.main(arguments)["lengths"][9]["results"]
    assert results["eager"] == {"out_of_memory": "CUDA out of memory. Tried to allocate 8.00 GiB"}
    assert results["sdpa"]["losses"] and "out of memory" in capsys.readouterr().out


def test_llama_results_that_differ_are_an_error(train_llama):
    same = dict(losses=[10.0, 9.0, 8.0], first_gradient_norms_of_q_proj=[1.0, 2.0])
    results = {"regard": same, "sdpa": same | dict(losses=[10.0, 9.1, 8.0])}
    distances = train_llama.distances_from_regard(results)
    assert distances["sdpa"]["losses"] == pytest.approx(0.1 / 9.1) and distances["sdpa"]["gradients"] == 0
    report = {"lengths": {64: {"distances_from_regard": distances}}}
    with pytest.raises(AssertionError, match="regard and sdpa differ at length 64"):
        train_llama.check_distances(report, torch.bfloat16)
    assert train_llama.distances_from_regard({"sdpa": same}) == {}
