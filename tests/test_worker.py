"""The worker: find, convert once, load, generate with a stream, compare; on tiny models made here and on the real one."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the worker needs transformers: pip install 'regard[worker]'")

import tokenizers
import transformers
from typer.testing import CliRunner

import regard
from regard import ConfigError
from regard.cli import app
from regard.worker import models
from regard.worker.generate import Request, compare, encode, generate, tune_threads

CPU = torch.device("cpu")
WINDOW, CONTEXT = 8, 96
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)


def byte_tokenizer(chat_template=None):
    """Every byte is a token, so that one character may take several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        chat_template=chat_template,
    )  # fmt: skip


def tiny_config():
    return transformers.Gemma3TextConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
        max_position_embeddings=CONTEXT, bos_token_id=2, eos_token_id=1, pad_token_id=0,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Gemma 3 with windows of 8 and a byte tokenizer, as a Hugging Face folder."""
    made = tmp_path_factory.mktemp("tiny-gemma3")
    torch.manual_seed(3)
    model = transformers.Gemma3ForCausalLM(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # as initialised every choice would hang by a thread
    model.save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def loaded(folder):
    return models.load(models.find(str(folder)), device=CPU, dtype=torch.float32)


@pytest.fixture(autouse=True)
def on_the_reference():
    """Quick and exact on a CPU; what is chosen automatically is the last test's matter."""
    with regard.use_backend("reference"):
        yield


@pytest.fixture
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(loaded, prompt, **options):
    pieces = []
    return generate(loaded, Request(prompt, **options), pieces.append), pieces


def command(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], env={"COLUMNS": "300", "TERM": "dumb"})


def greedy_by_transformers(loaded, tokens, count):
    output = loaded.model.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tuple(output[0, len(tokens) :].tolist())


class TestGenerate:
    def test_greedy_tokens_are_those_of_transformers(self, loaded):
        result, _ = run(loaded, "Sliding windows slide.", max_new_tokens=30)
        expected = greedy_by_transformers(loaded, result.prompt_tokens, 30)
        assert result.new_tokens == expected[: len(result.new_tokens)]
        assert result.stopped == "max_new_tokens" or result.new_tokens[-1] == 1

    def test_text_streams_as_it_comes(self, loaded):
        result, pieces = run(loaded, "Grüße, 世界", max_new_tokens=40, temperature=3.0)
        tokens = [*result.prompt_tokens, *result.new_tokens]
        whole = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        assert whole == "Grüße, 世界" + "".join(pieces)
        assert len([piece for piece in pieces if piece]) > 3

    def test_a_character_of_several_tokens_is_never_split(self, loaded):
        from regard.worker.generate import _Detokenizer

        tokens = loaded.tokenizer("né 世界 🙂!", add_special_tokens=False)["input_ids"]
        detokenizer = _Detokenizer(loaded.tokenizer, tokens[:1])
        pieces = [detokenizer.push(token) for token in tokens[1:]]
        assert [piece for piece in pieces if piece] == ["é", " ", "世", "界", " ", "🙂", "!"]
        assert detokenizer.rest() == ""
        cut = _Detokenizer(loaded.tokenizer, ())
        assert [cut.push(token) for token in tokens[-5:-2]] == ["", "", ""]
        assert cut.rest() == "\ufffd"

    def test_figures_are_of_this_run(self, loaded):
        result, _ = run(loaded, "four", max_new_tokens=5)
        assert len(result.prompt_tokens) == 5  # and <bos>
        assert 0 < result.prefill_seconds <= result.time_to_first_token
        assert result.prefill_rate == 5 / result.prefill_seconds
        assert result.decode_rate == (len(result.new_tokens) - 1) / result.decode_seconds
        assert result.peak_memory is None or 2**20 < result.peak_memory < 2**40
        assert run(loaded, "four", max_new_tokens=1)[0].decode_rate is None

    def test_every_kind_of_layer_is_named_with_its_window(self, loaded):
        result, _ = run(loaded, "a prompt longer than the window", max_new_tokens=4)
        kinds = {(use.phase, use.kind): use for use in result.uses}
        steps = len(result.new_tokens) - 1
        for phase, passes in (("prefill", 1), ("decode", steps)):
            sliding, full = kinds[phase, f"sliding window={WINDOW}, causal"], kinds[phase, "full, causal"]
            assert (sliding.layers, full.layers) == (3, 1)
            assert (sliding.calls, full.calls) == (3 * passes, passes)
            assert sliding.selection.backend == "reference"
        assert len(kinds) == 4
        assert kinds["prefill", f"sliding window={WINDOW}, causal"].config.band == (WINDOW - 1, 0)
        assert kinds["decode", f"sliding window={WINDOW}, causal"].config.seqlen_k == WINDOW
        assert kinds["decode", "full, causal"].config.seqlen_k == len(result.prompt_tokens) + steps

    def test_a_short_prompt_does_not_hide_the_window(self, loaded):
        result, _ = run(loaded, "hi", max_new_tokens=2)
        assert f"sliding window={WINDOW}, causal" in {use.kind for use in result.uses}

    def test_generation_ends_at_a_stop_token(self, loaded):
        free, _ = run(loaded, "stop", max_new_tokens=8)
        at = next(i for i, token in enumerate(free.new_tokens) if i and token not in free.new_tokens[:i])
        stopping = dataclasses.replace(loaded, stop_tokens=frozenset({free.new_tokens[at]}))
        result, _ = run(stopping, "stop", max_new_tokens=8)
        assert result.stopped == "stop token"
        assert result.new_tokens == free.new_tokens[: at + 1]

    def test_generation_ends_with_the_context(self, loaded):
        unstoppable = dataclasses.replace(loaded, stop_tokens=frozenset())
        result, _ = run(unstoppable, "x" * (CONTEXT - 5), max_new_tokens=50)
        assert result.stopped == "context length"
        assert len(result.prompt_tokens) + len(result.new_tokens) == CONTEXT

    def test_a_temperature_draws_and_a_seed_repeats(self, loaded):
        draws = {run(loaded, "dice", max_new_tokens=12, temperature=2.0, seed=seed)[0].new_tokens for seed in range(4)}
        assert len(draws) == 4
        again = run(loaded, "dice", max_new_tokens=12, temperature=2.0, seed=3)[0].new_tokens
        assert again in draws

    def test_a_prompt_longer_than_the_context_is_refused(self, loaded):
        with pytest.raises(ConfigError, match=f"prompt: got {CONTEXT} tokens, needs fewer than {CONTEXT}"):
            encode(loaded, Request("x" * (CONTEXT - 1)))
        assert len(encode(loaded, Request("x" * (CONTEXT - 2)))) == CONTEXT - 1

    @pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1}, {"temperature": float("nan")}])
    def test_malformed_requests(self, options):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Request("hello", **options)
        with pytest.raises(ConfigError, match="prompt"):
            Request("\n ")

    def test_the_chat_template_is_used_where_there_is_one(self, loaded):
        chatty = dataclasses.replace(loaded, tokenizer=byte_tokenizer(CHAT_TEMPLATE))
        text = loaded.tokenizer.decode(encode(chatty, Request("hi")))
        assert text == "<bos>[user]hi[model]"
        assert loaded.tokenizer.decode(encode(chatty, Request("hi", chat=False))) == "<bos>hi"
        assert loaded.tokenizer.decode(encode(loaded, Request("hi"))) == "<bos>hi"
        with pytest.raises(ConfigError, match="chat: got .* which has no chat template"):
            encode(loaded, Request("hi", chat=True))


class TestThreads:
    @pytest.mark.parametrize(("milliseconds", "best"), [({1: 4, 2: 2, 4: 1}, 4), ({1: 2, 2: 20, 4: 1}, 1)])
    def test_the_fastest_number_is_kept(self, loaded, keep_threads, milliseconds, best):
        class Sleeper:
            device = CPU

            def __call__(self, **kwargs):
                time.sleep(5e-3 * milliseconds[torch.get_num_threads()])

        torch.set_num_threads(4)
        assert tune_threads(dataclasses.replace(loaded, model=Sleeper())) == best
        assert torch.get_num_threads() == best

    def test_a_number_that_is_no_power_of_two_is_tried_too(self, loaded, keep_threads):
        tried = []

        class Sleeper:
            device = CPU

            def __call__(self, **kwargs):
                tried.append(torch.get_num_threads())
                time.sleep(0.02 / tried[-1])

        torch.set_num_threads(3)
        assert tune_threads(dataclasses.replace(loaded, model=Sleeper())) == 3
        assert sorted(set(tried)) == [1, 2, 3]


class TestCompare:
    def test_eager_gives_the_same_tokens(self, loaded):
        result, _ = run(loaded, "compare me with eager, please", max_new_tokens=20)
        comparison = compare(loaded, result)
        assert comparison.differs_at is None
        assert comparison.largest_difference <= 1e-4 * comparison.largest_logit
        assert loaded.model.config._attn_implementation == "regard"

    def test_a_long_prompt_is_compared_in_pieces(self, loaded, monkeypatch):
        from regard.worker import generate as module

        result, _ = run(loaded, "y" * 70, max_new_tokens=3)
        whole = compare(loaded, result)
        monkeypatch.setattr(module, "_COMPARISON_CHUNK", 16)
        pieces = compare(loaded, result)
        assert pieces.differs_at is None
        assert pieces.largest_logit == pytest.approx(whole.largest_logit, rel=1e-4)

    def test_the_first_other_token_is_named(self, loaded):
        result, _ = run(loaded, "tampered", max_new_tokens=6)
        right = result.new_tokens[2]
        wrong = (right + 1) % 256
        tampered = dataclasses.replace(result, new_tokens=(*result.new_tokens[:2], wrong, *result.new_tokens[3:]))
        comparison = compare(loaded, tampered)
        assert (comparison.differs_at, comparison.chosen, comparison.expected) == (2, wrong, right)


class Deaf:
    """A backend that attends to nothing."""

    name = "deaf"

    def unsupported_reasons(self, config):
        return ()

    def required_kv_layout(self, config):
        return config.kv_layout

    def forward(self, config, inputs):
        return torch.zeros_like(inputs.q), None

    def backward(self, *args):
        raise NotImplementedError


@pytest.mark.usefixtures("keep_threads")
class TestCommand:
    def test_text_goes_to_stdout_and_figures_to_stderr(self, loaded, folder):
        result = command("--model", folder, "--max-new-tokens", 6, "--compare", "eager", "hello")
        assert result.exit_code == 0, result.output
        _, pieces = run(loaded, "hello", max_new_tokens=6)
        assert result.stdout == "".join(pieces) + "\n"
        for words in ("time to first token", "CPU threads", "prefill", "decode", "peak memory", f"sliding window={WINDOW}, causal",
                      "full, causal", "reference: chosen by name", "the same tokens as eager", "largest logit"):  # fmt: skip
            assert words in result.stderr

    def test_a_wrong_backend_is_found_out(self, folder):
        regard.register(Deaf(), priority=-1)
        try:
            result = command("--model", folder, "--backend", "deaf", "--compare", "eager", "hello there")
        finally:
            regard.unregister("deaf")
        assert result.exit_code == 1
        assert "differs from eager at new token" in result.stderr
        assert "deaf: chosen by name" in result.stderr

    def test_a_backend_that_cannot_serve_says_why(self, folder):
        class Picky(Deaf):
            name = "picky"

            def unsupported_reasons(self, config):
                return (regard.Reason("mood", "a Monday", "a Friday"),)

        regard.register(Picky(), priority=-1)
        try:
            result = command("--model", folder, "--backend", "picky", "hello")
        finally:
            regard.unregister("picky")
        assert result.exit_code == 2
        assert "mood: got a Monday, needs a Friday" in result.stderr
        assert "Traceback" not in result.output

    def test_a_prompt_too_long_is_one_sentence(self, folder):
        result = command("--model", folder, "z" * 200)
        assert result.exit_code == 2
        assert "Error: prompt: got 201 tokens, needs fewer than 96" in result.stderr
        assert "zzz" not in result.stderr

    def test_a_broken_folder_is_one_sentence(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
        result = command("--model", tmp_path, "hello")
        assert result.exit_code == 2
        stages, error = result.stderr.splitlines()
        assert stages == "loading the weights"
        assert error.startswith("Error: model: got")
        assert "no-such-model" in error
        assert error.endswith("needs a folder transformers can load")

    def test_a_missing_extra_says_what_to_install(self, folder, monkeypatch):
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
        for model in (folder, "gemma3-270m"):
            result = command("--model", model, "hello")
            assert result.exit_code == 2
            assert "needs pip install 'regard[worker]'" in result.stderr


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The smallest Gemma 3 that is a GGUF file, with a chat template and an end-of-turn token."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need gguf: pip install 'regard[worker]'")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config = tiny_config()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(WINDOW)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("llama")
    words = ["<end_of_turn>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz▁"]
    tokens = [*SPECIAL, *words]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3] * 5 + [6] * 256 + [1] * 27)
    for add, token in ((writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2),
                       (writer.add_unk_token_id, 3), (writer.add_eot_token_id, 4)):  # fmt: skip
        add(token)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {
        "token_embd": (len(tokens), config.hidden_size),
        "output_norm": (config.hidden_size,),
    }
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers):
        names |= {
            f"blk.{layer}.attn_q": (heads, config.hidden_size),
            f"blk.{layer}.attn_k": (kv, config.hidden_size),
            f"blk.{layer}.attn_v": (kv, config.hidden_size),
            f"blk.{layer}.attn_output": (config.hidden_size, heads),
            f"blk.{layer}.ffn_gate": (config.intermediate_size, config.hidden_size),
            f"blk.{layer}.ffn_up": (config.intermediate_size, config.hidden_size),
            f"blk.{layer}.ffn_down": (config.hidden_size, config.intermediate_size),
            f"blk.{layer}.attn_q_norm": (config.head_dim,),
            f"blk.{layer}.attn_k_norm": (config.head_dim,),
            f"blk.{layer}.attn_norm": (config.hidden_size,),
            f"blk.{layer}.post_attention_norm": (config.hidden_size,),
            f"blk.{layer}.ffn_norm": (config.hidden_size,),
            f"blk.{layer}.post_ffw_norm": (config.hidden_size,),
        }
    generator = torch.Generator().manual_seed(5)
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=generator) / 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestConversion:
    def test_once_and_then_from_the_cache(self, gguf_file, tmp_path):
        source, stages = models.find(str(gguf_file)), []
        folder = models.convert(source, tmp_path, lambda *stage: stages.append(stage))
        assert models.is_converted(folder, source)
        assert [child.name for child in tmp_path.iterdir()] == [folder.name]
        counted = [(done, total) for stage, done, total in stages if stage == "dequantising the weights"]
        assert counted == [(done, len(counted)) for done in range(1, len(counted) + 1)]
        assert len(counted) == 2 + 4 * 13
        stages.clear()
        assert models.convert(source, tmp_path, lambda *stage: stages.append(stage)) == folder
        assert stages == []

    def test_the_result_is_the_files_model(self, gguf_file, tmp_path):
        from gguf import GGUFReader

        source = models.find(str(gguf_file))
        loaded = models.load(source, device=CPU, dtype=torch.float32, cache_dir=tmp_path)
        assert loaded.context_length == CONTEXT
        assert loaded.has_chat_template
        assert loaded.stop_tokens == {1, 4}
        assert loaded.model.config.sliding_window == WINDOW
        stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(gguf_file).tensors}
        layer = loaded.model.model.layers[2]
        expected = stored["blk.2.attn_q.weight"].bfloat16().float()
        assert torch.equal(layer.self_attn.q_proj.weight, expected)
        norm = (stored["blk.2.attn_norm.weight"] - 1).bfloat16().float()  # GGUF holds 1 + the weight
        assert torch.equal(layer.input_layernorm.weight, norm)
        assert loaded.tokenizer("abc")["input_ids"][0] == 2
        assert loaded.tokenizer.decode(loaded.tokenizer("ab cd")["input_ids"], skip_special_tokens=True) == "ab cd"
        result, _ = run(loaded, "abc", max_new_tokens=3)
        assert compare(loaded, result).differs_at is None

    @pytest.mark.parametrize(
        "stage", ["reading the tokenizer", "dequantising the weights", "saving the converted weights"]
    )
    def test_an_interrupted_conversion_is_not_taken_for_a_finished_one(self, gguf_file, tmp_path, stage):
        def interrupt(reached, done, total):
            if reached == stage:
                raise KeyboardInterrupt

        import gguf

        reader = gguf.GGUFReader
        source = models.find(str(gguf_file))
        with pytest.raises(KeyboardInterrupt):
            models.convert(source, tmp_path, interrupt)
        assert list(tmp_path.iterdir()) == []
        assert gguf.GGUFReader is reader
        assert models.is_converted(models.convert(source, tmp_path), source)

    def test_a_folder_without_its_marker_is_made_again(self, gguf_file, tmp_path):
        source = models.find(str(gguf_file))
        folder = models.convert(source, tmp_path)
        (folder / models.MARKER).unlink()
        (folder / "model.safetensors").write_bytes(b"half of it")
        assert not models.is_converted(folder, source)
        assert models.convert(source, tmp_path) == folder
        assert (folder / "model.safetensors").stat().st_size > 1000
        (folder / models.MARKER).write_text(json.dumps({"identity": "another file"}))
        assert not models.is_converted(folder, source)

    def test_another_file_of_the_same_name_has_its_own_folder(self, gguf_file, tmp_path):
        other = tmp_path / gguf_file.name
        other.write_bytes(gguf_file.read_bytes())
        first, second = models.find(str(gguf_file)), models.find(str(other))
        assert first.name == second.name
        assert first.identity != second.identity
        os.utime(other, ns=(0, 0))
        assert models.find(str(other)).identity != second.identity

    def test_files_that_are_no_gguf(self, gguf_file, tmp_path):
        (tmp_path / "text.gguf").write_text("hello")
        with pytest.raises(ConfigError, match="begins with b'hell'"):
            models.convert(models.find(str(tmp_path / "text.gguf")), tmp_path / "cache")
        (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:300])
        with pytest.raises(ConfigError, match="a GGUF file that transformers can convert"):
            models.convert(models.find(str(tmp_path / "cut.gguf")), tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, gguf_file, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cache_dir"):
            models.convert(models.find(str(gguf_file)), tmp_path / "file")

    def test_the_default_cache_follows_xdg(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert models.default_cache_dir() == tmp_path / "regard"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert models.default_cache_dir() == Path.home() / ".cache" / "regard"


@pytest.mark.slow
def test_gemma_answers(request, keep_threads):
    """The real model; its conversion is kept in pytest's cache."""
    for package in (models.PACKAGED_MODELS["gemma3-270m"], "gguf", "accelerate"):
        pytest.importorskip(package, reason=f"gemma3-270m needs {package}: {models.INSTALL_HINT}")
    cache = request.config.cache.mkdir("regard-models")
    with regard.use_backend("auto"):
        result = command("--cache-dir", cache, "--max-new-tokens", 8, "--compare", "eager",
                         "The capital of France is the city of")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(" Paris")
    assert "sliding window=512, causal" in result.stderr
    assert "the same tokens as eager" in result.stderr
