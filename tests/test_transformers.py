"""Tiny random transformers models: what `attn_implementation="regard"` computes against what eager computes."""

import copy
import functools
import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

import regard  # noqa: E402
from regard.integrations.transformers import Visibility, attention_forward, register, visibility_mask  # noqa: E402
from regard.testing import assert_close  # noqa: E402

VOCABULARY, LENGTH, WINDOW = 97, 13, 6
BACKENDS = [name for name in ("cpu", "reference") if name in regard.list_backends()]

register()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on two threads, and a hundred times slower where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fast_backend():
    """The fastest backend without an interpreter."""
    with regard.use_backend(BACKENDS[0]):
        yield


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
LOCAL_AND_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ENCODER = {**SHAPE, "num_hidden_layers": 3}
BART = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}  # fmt: skip

MODELS = {
    "llama": ("Llama", "ForCausalLM", SHAPE),
    "qwen3": ("Qwen3", "ForCausalLM", SHAPE),
    "mistral": ("Mistral", "ForCausalLM", {**SHAPE, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", "ForCausalLM", {**SHAPE, **LOCAL_AND_FULL, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", "ForCausalLM", {**SHAPE, **LOCAL_AND_FULL}),
    # every expert serves every token, so that rounding never changes which ones do
    "gpt_oss": ("GptOss", "ForCausalLM", {**SHAPE, **LOCAL_AND_FULL, "num_local_experts": 2, "num_experts_per_tok": 2}),
    "llama4": ("Llama4Text", "ForCausalLM", {**SHAPE, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 40,
               "num_local_experts": 1, "layer_types": ["chunked_attention", "full_attention"]}),
    "bert": ("Bert", "Model", ENCODER),
    "modernbert": ("ModernBert", "Model", {**ENCODER, "local_attention": WINDOW, "global_attn_every_n_layers": 2}),
    "t5": ("T5", "ForConditionalGeneration", {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 12, "d_ff": 24,
           "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}),
    "bart": ("Bart", "ForConditionalGeneration", {**SHAPE, **BART, "decoder_start_token_id": 0}),
}  # fmt: skip
DECODERS = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4"]
ENCODERS = ["bert", "modernbert"]
SEQ2SEQ = ["t5", "bart"]


@functools.cache
def model(name):
    family, head, settings = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    made = getattr(transformers, (family if name != "gemma3" else "Gemma3").removesuffix("Text") + head)(config).eval()
    for parameter_name, parameter in made.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return made


def run(name, implementation, made=None, **inputs):
    """The model's logits, or an encoder's hidden states."""
    made = made or model(name)
    made.set_attn_implementation(implementation)
    outputs = made(**inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def tokens(batch=2, length=LENGTH, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(side, batch=2, length=LENGTH, hidden=5):
    """A 2-D mask whose last sequence is short by ``hidden`` tokens, on one side or in the middle."""
    if side == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    first = {"left": 0, "right": length - hidden, "middle": 3}[side]
    mask[-1, first : first + hidden] = 0
    return mask


def inputs_for(name, side):
    mask = padding(side)
    if name in SEQ2SEQ:
        # eager lets a fully padded row see everything and regard lets it see nothing, so the decoder is not padded
        return {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens(length=7, seed=1)}
    return {"input_ids": tokens(), "attention_mask": mask}


def real_rows(output, inputs):
    """The rows of real tokens: those of padding mean nothing."""
    mask = inputs["attention_mask"]
    return output if mask is None or output.shape[1] != mask.shape[1] else output[mask.bool()]


def assert_equal(actual, expected, peak=None):
    """Equal but for the rounding of a few layers in float32, relative to the largest value."""
    peak = expected.abs().max().item() if peak is None else peak
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * peak)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["none", "right", "left", "middle"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_eager(name, side, backend):
    inputs = inputs_for(name, side)
    with torch.no_grad(), regard.use_backend(backend), regard.record_selections() as calls:
        actual, expected = run(name, "regard", **inputs), run(name, "eager", **inputs)
    assert_equal(real_rows(actual, inputs), real_rows(expected, inputs))
    assert calls and {selection.backend for _, selection in calls} == {backend}


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_the_truth_as_eager(name):
    inputs = inputs_for(name, "left")
    rounded = copy.deepcopy(model(name)).bfloat16()
    with torch.no_grad():
        actual, baseline = (run(name, implementation, rounded, **inputs) for implementation in ("regard", "eager"))
        reference = run(name, "eager", rounded.float(), **inputs)
    print(assert_close(*(real_rows(output, inputs) for output in (actual, reference, baseline)), name=name))


def test_automatic_choice_serves_a_model():
    inputs = {"input_ids": tokens(1, 5)}
    with torch.no_grad(), regard.use_backend("auto"), regard.record_selections() as calls:
        assert_equal(run("llama", "regard", **inputs), run("llama", "eager", **inputs))
    assert calls and not any(selection.strict for _, selection in calls)


@pytest.mark.parametrize("name", [name for name in [*DECODERS, *ENCODERS] if name != "llama4"])  # chunks are no band
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_no_call_gets_a_quadratic_mask(name, side):
    with regard.record_selections() as calls:
        run(name, "regard", **inputs_for(name, side))
    for config, _ in calls:
        assert config.bias_shape is None
        assert config.mask_shape in ([None] if side == "none" else [None, (2, 1, 1, LENGTH)])
    masked = [config for config, _ in calls if config.mask_shape is not None]
    by_length = [config for config, _ in calls if config.kv_lens]
    if side == "left":
        assert len(masked) == len(calls)
    elif name == "bert" and side == "right":
        assert len(by_length) == len(calls) and not masked


@pytest.mark.parametrize("name", ["gemma3", "mistral", "modernbert"])
def test_local_layers_are_windows(name):
    with regard.record_selections() as calls:
        run(name, "regard", **inputs_for(name, "none"))
    expected = {"gemma3": {(WINDOW - 1, 0), None}, "mistral": {(WINDOW - 1, 0)}, "modernbert": {(3, 3), None}}[name]
    assert {config.window for config, _ in calls} == expected


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_attended_to(name, side):
    """Fails if the mask function is not registered: then no mask arrives at all."""
    mask = padding(side)
    other = torch.where(mask.bool(), tokens(), tokens(seed=1))
    with torch.no_grad():
        one, two = (run(name, "regard", input_ids=ids, attention_mask=mask) for ids in (tokens(), other))
    torch.testing.assert_close(one[mask.bool()], two[mask.bool()], rtol=0, atol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_pieces_equal_eager(name, side, cache):
    """Prefill in two pieces, then two tokens one by one: caches partly filled, windows cropped."""
    mask = padding(side, length=16)
    ids = tokens(length=16)

    def pieces(implementation):
        made = model(name)
        made.set_attn_implementation(implementation)
        store = transformers.DynamicCache(config=made.config)
        if cache == "static":
            store = transformers.StaticCache(config=made.config, max_cache_len=24)
        outputs = []
        for first, last in itertools.pairwise([0, 8, 14, 15, 16]):
            seen = None if mask is None else mask[:, :last]
            outputs.append(made(ids[:, first:last], attention_mask=seen, past_key_values=store).logits)
        return torch.cat(outputs, dim=1)

    with torch.no_grad():
        actual, expected = pieces("regard"), pieces("eager")
        whole = run(name, "regard", input_ids=ids, attention_mask=mask)
    rows = slice(None) if mask is None else mask.bool()
    assert_equal(actual[rows], expected[rows])
    if cache == "dynamic":
        assert_equal(actual[rows], whole[rows])


def generate(name, implementation, **options):
    made = model(name)
    made.set_attn_implementation(implementation)
    ids, mask = tokens(), padding("left")
    return made.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_greedy_generation_equals_eager(name, cache):
    actual, expected = (generate(name, i, cache_implementation=cache) for i in ("regard", "eager"))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_beam_search_equals_eager(name):
    actual, expected = (generate(name, i, num_beams=3, num_return_sequences=2) for i in ("regard", "eager"))
    assert torch.equal(actual, expected)


def test_static_cache_is_bounded_by_kv_lens():
    made = model("llama")
    made.set_attn_implementation("regard")
    store = transformers.StaticCache(config=made.config, max_cache_len=64)
    made(tokens(length=9), past_key_values=store)
    with regard.record_selections() as calls:
        made(tokens(length=1), attention_mask=torch.ones(2, 10), past_key_values=store)
    assert calls and all(config.kv_lens and config.mask_shape is None for config, _ in calls)


def prefix_mask():
    """Bidirectional over the first five tokens, causal after: no band."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:5, :5] = True
    return mask[None, None].expand(2, 1, -1, -1)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_users_own_mask_alone_decides(name, kind):
    additive = torch.where(prefix_mask(), 0.0, torch.finfo(torch.float32).min)
    mine = prefix_mask() if kind == "bool" else additive
    with torch.no_grad():
        expected = run(name, "eager", input_ids=tokens(), attention_mask=additive)
        actual = run(name, "regard", input_ids=tokens(), attention_mask=mine)
    assert_equal(actual, expected)


def test_unknown_mask_functions_are_materialised():
    """Gemma 3's images, for one: blocks of tokens that see each other both ways."""
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1]])
    config = transformers.LlamaConfig(**SHAPE)
    arguments = {"inputs_embeds": torch.zeros(1, 10, 4), "attention_mask": None, "past_key_values": None}
    masks = {}
    for implementation in ("sdpa", "regard"):
        config._attn_implementation = implementation
        masks[implementation] = masking_utils.create_causal_mask(config, **arguments, block_sequence_ids=blocks)
    assert torch.equal(masks["regard"].mask, masks["sdpa"]) and masks["sdpa"].shape == (1, 1, 10, 10)


@pytest.mark.parametrize("name", [*DECODERS, "modernbert", *SEQ2SEQ])
def test_gradients_equal_eagers(name):
    inputs = inputs_for(name, "left")
    parameters = dict(model(name).named_parameters())
    gradients = {}
    for implementation in ("regard", "eager"):
        output = real_rows(run(name, implementation, **inputs), inputs)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        gradients[implementation] = torch.autograd.grad(
            (output * weights).sum(), list(parameters.values()), allow_unused=True
        )
    # relative to the largest of all: the gradient of a key projection's bias, for one, is zero but for rounding
    peak = max(gradient.abs().max().item() for gradient in gradients["eager"] if gradient is not None)
    reached = 0
    for parameter, actual, expected in zip(parameters, gradients["regard"], gradients["eager"], strict=True):
        assert (actual is None) == (expected is None), parameter
        if actual is not None:
            assert_equal(actual, expected, peak)
            reached += expected.count_nonzero() > 0
    assert reached > 10


PACKED = [4, 1, 8]


@pytest.mark.parametrize(
    ("name", "given"),
    # GPT-OSS itself does not look for packing in position_ids
    [*itertools.product(["llama", "gemma3"], ["position_ids", "cu_seq_lens"]), ("gpt_oss", "cu_seq_lens")],
)
def test_packed_sequences_do_not_see_each_other(name, given):
    ids = tokens(batch=1, length=sum(PACKED))
    inputs = {"position_ids": torch.cat([torch.arange(length) for length in PACKED])[None], "use_cache": False}
    if given == "cu_seq_lens":
        offsets = torch.tensor([0, *itertools.accumulate(PACKED)], dtype=torch.int32)
        inputs.update(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=8, max_length_k=8)
    with torch.no_grad(), regard.record_selections() as calls:
        actual = run(name, "regard", input_ids=ids, **inputs)
    assert calls and all(config.varlen for config, _ in calls)
    with torch.no_grad():
        alone = [run(name, "eager", input_ids=piece) for piece in ids.split(PACKED, dim=1)]
    assert_equal(actual, torch.cat(alone, dim=1))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_compiles_into_one_graph(name, side):
    torch._dynamo.reset()
    inputs = inputs_for(name, side)
    with torch.no_grad():
        expected = run(name, "eager", **inputs, use_cache=False)
        model(name).set_attn_implementation("regard")
        actual = torch.compile(model(name), fullgraph=True, backend="eager")(**inputs, use_cache=False).logits
    assert_equal(real_rows(actual, inputs), real_rows(expected, inputs))


def test_compiled_decoding_into_a_static_cache_takes_one_graph(monkeypatch):
    expected = generate("llama", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = model("llama").forward
    compiled = torch.compile(plain, fullgraph=True, backend="eager")

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return (compiled if kwargs["input_ids"].shape[1] == 1 else plain)(*args, **kwargs)

    monkeypatch.setattr(model("llama"), "forward", forward)
    assert torch.equal(generate("llama", "regard", cache_implementation="static"), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# The mask function on its own


def shown(visibility, batch):
    """The dense mask a `Visibility` stands for, by its documentation."""
    sq, sk = visibility.q_length, visibility.kv_length
    lengths = torch.full((batch,), sk) if visibility.kv_lens is None else visibility.kv_lens
    key = torch.arange(sk)
    distance = key - (torch.arange(sq)[:, None] + lengths[:, None, None] - sq)
    visible = (key < lengths[:, None])[:, None, :].expand(batch, sq, sk)
    left, right = visibility.window or (None, None)
    visible = visible if left is None else visible & (distance >= -left)
    visible = visible if right is None else visible & (distance <= right)
    visible = visible & (distance <= 0) if visibility.causal else visible
    visible = visible[:, None]
    return visible if visibility.mask is None else visible & visibility.mask


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(4),
    "sliding_both": masking_utils.sliding_window_bidirectional_mask_function(3),
    "wide": masking_utils.sliding_window_causal_mask_function(40),
    "wide_both": masking_utils.sliding_window_bidirectional_mask_function(40),
    "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "ahead": lambda b, h, q, kv: kv >= q,
    "before": lambda b, h, q, kv: kv < q,
    "odd": lambda b, h, q, kv: (kv + q) % 2 == 0,
    "later": lambda b, h, q, kv: (kv <= q) & (q >= 3),
    "switch": lambda b, h, q, kv: torch.where(q > 4, kv <= q, kv >= 0),
}
PLACES = {  # q_length, kv_length, q_offset, kv_offset
    "prefill": (7, 7, 0, 0),
    "decode": (1, 8, 7, 0),
    "continued": (3, 9, 6, 0),
    "static": (1, 16, 9, 0),
    "static_prefill": (5, 16, 0, 0),
    "static_tensor": (1, 16, torch.tensor(9), 0),
    "static_continued": (4, 16, torch.tensor(6), 0),
    "cropped": (1, 8, 12, 5),
    "cropped_static": (3, 8, 10, 5),
    "ahead_of_keys": (2, 6, 8, 1),
}


def padding_masks(length):
    """2-D padding masks of two sequences: absent, hiding nothing, left, right, holes, and shorter than the keys."""
    masks = {name: torch.ones(2, length, dtype=torch.bool) for name in ("real", "left", "right", "holes")}
    masks["left"][1, :6] = False
    masks["right"][1, -3:] = False
    masks["holes"][0, 2::3] = False
    return {"none": None, **masks, "short": masks["real"][:, :-2], "short_left": masks["left"][:, :-2]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_visibility_is_what_the_mask_function_says(function, place):
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    for pads, mask in padding_masks(kv_offset + kv_length).items():
        arguments = {
            "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
            "kv_offset": kv_offset, "mask_function": FUNCTIONS[function], "attention_mask": mask,
        }  # fmt: skip
        dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        visibility = visibility_mask(**arguments)
        assert torch.equal(shown(visibility, 2), dense.expand(2, 1, -1, -1)), pads
        assert torch.equal(visibility.materialise(), dense), pads


@pytest.mark.parametrize("function", ["causal", "bidirectional", "sliding", "sliding_both", "wide", "wide_both"])
def test_known_functions_are_not_materialised(function):
    visibility = visibility_mask(batch_size=1, q_length=7, kv_length=7, mask_function=FUNCTIONS[function])
    assert isinstance(visibility, Visibility)
    assert (visibility.left, visibility.right) == {
        "causal": (None, 0), "bidirectional": (None, None), "sliding": (3, 0), "sliding_both": (3, 3),
        "wide": (None, 0), "wide_both": (None, None),
    }[function]  # fmt: skip


def test_chunks_are_causal_inside_the_first():
    config = transformers.Llama4TextConfig(attention_chunk_size=8)
    chunked = masking_utils.chunked_causal_mask_function(8, torch.tensor([0]))
    arguments = {"batch_size": 1, "mask_function": chunked, "local_size": 8, "config": config}
    inside = visibility_mask(q_length=8, kv_length=8, **arguments)
    assert isinstance(inside, Visibility) and inside.causal and inside.window is None
    assert visibility_mask(q_length=9, kv_length=9, **arguments).mask.shape == (1, 1, 9, 9)


def test_static_decoding_counts_the_filled_keys():
    visibility = visibility_mask(batch_size=2, q_length=1, kv_length=64, q_offset=torch.tensor(9), device="cpu")
    assert visibility.kv_lens.tolist() == [10, 10] and visibility.kv_lens.dtype == torch.int32
    cropped = visibility_mask(
        batch_size=1, q_length=1, kv_length=8, q_offset=12, kv_offset=5, mask_function=FUNCTIONS["sliding"]
    )
    assert cropped.kv_lens is None and cropped.window == (3, 0)


@pytest.mark.parametrize("function", ["causal", "bidirectional"])
def test_padding_of_no_sequence_is_none(function):
    nothing = torch.ones(0, 7, dtype=torch.bool)
    visibility = visibility_mask(
        batch_size=0, q_length=7, kv_length=7, mask_function=FUNCTIONS[function], attention_mask=nothing
    )
    assert shown(visibility, 0).shape == (0, 1, 7, 7)


def test_a_caller_that_needs_a_tensor_gets_one():
    mask = visibility_mask(batch_size=2, q_length=7, kv_length=7, allow_is_causal_skip=False)
    assert torch.equal(mask, torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7))


def test_a_visibility_stands_in_for_its_mask():
    visibility = visibility_mask(batch_size=2, q_length=7, kv_length=7)
    dense = visibility.materialise()
    assert visibility.ndim == dense.ndim and visibility.shape == dense.shape and visibility.dtype == torch.bool
    assert torch.equal(visibility[:, :, :, :3], dense[:, :, :, :3])
    assert torch.equal(~visibility, ~dense) and torch.equal(visibility.logical_not(), ~dense)
    assert torch.equal(torch.cat([visibility, dense], dim=-1), torch.cat([dense, dense], dim=-1))
    assert torch.equal(visibility & dense, dense) and torch.equal(dense & visibility, dense)
    assert visibility.contiguous() is visibility
    moved = visibility_mask(batch_size=2, q_length=7, kv_length=7, attention_mask=padding("left", length=7)).to("meta")
    assert isinstance(moved, Visibility) and moved.mask.device.type == "meta"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}),  # adds the mask
        ("Mpt", {"d_model": 32, "n_layers": 1, "n_heads": 2}),  # fills where it is true
        ("RoFormer", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}),
    ],
)
def test_models_that_apply_the_mask_themselves_are_refused(family, settings):
    """transformers lets them have any attn_implementation; a bool mask added to the scores is a wrong answer."""
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **settings)
    made = getattr(transformers, f"{family}Model")._from_config(config, attn_implementation="regard").eval()
    with pytest.raises(regard.ConfigError, match="attention interface"):
        made(input_ids=tokens(), attention_mask=padding("left"))


# The attention function on its own


class Layer(torch.nn.Module):
    is_causal = True


def qkv(q_length=5, kv_length=5, heads=4, heads_kv=2):
    torch.manual_seed(0)
    return torch.randn(2, heads, q_length, 8), *torch.randn(2, 2, heads_kv, kv_length, 8)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("output_attentions", True),
        ("head_mask", torch.ones(4)),
        ("layer_head_mask", torch.ones(4)),
        ("indices", torch.zeros(2, 5, 3)),
        ("block_indices", torch.zeros(2, 5, 3)),
        ("sinks", torch.zeros(2, 4, 5, 1)),
        ("cache", object()),
        ("alibi", torch.zeros(4)),
        ("something_new", 1),
    ],
)
def test_keywords_with_meaning_are_refused(keyword, value):
    with pytest.raises(regard.ConfigError, match=keyword):
        attention_forward(Layer(), *qkv(), None, **{keyword: value})
    attention_forward(Layer(), *qkv(), None, **{keyword: None})


def test_an_unknown_keyword_of_a_models_call_is_refused():
    with pytest.raises(regard.ConfigError, match="mystery_gate"):
        run("llama", "regard", input_ids=tokens(), mystery_gate=torch.ones(1))


def test_keywords_without_meaning_pass():
    plain, _ = attention_forward(Layer(), *qkv(), None)
    passing = {"use_cache": True, "position_ids": torch.arange(5)[None], "num_items_in_batch": torch.tensor(3)}
    assert torch.equal(attention_forward(Layer(), *qkv(), None, **passing)[0], plain)


def test_every_keyword_reaches_the_computation():
    """Each against the formula written out, all at once."""
    q, k, v = qkv()
    sinks, position_bias = torch.randn(4), torch.randn(1, 4, 5, 5)
    arguments = {"scaling": 0.3, "softcap": 1.5, "s_aux": sinks, "position_bias": position_bias, "sliding_window": 3}
    out, weights = attention_forward(Layer(), q, k, v, None, **arguments)
    assert out.shape == (2, 5, 4, 8) and weights is None
    scores = 1.5 * torch.tanh(q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3 / 1.5) + position_bias
    distance = torch.arange(5)[:, None] - torch.arange(5)
    scores = scores.masked_fill((distance < 0) | (distance > 2), float("-inf"))
    scores = torch.cat([scores, sinks[:, None, None].expand(2, 4, 5, 1)], dim=-1)
    expected = (scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    for dropped in arguments:
        less = {name: value for name, value in arguments.items() if name != dropped}
        assert not torch.allclose(attention_forward(Layer(), q, k, v, None, **less)[0], expected), dropped


def test_position_bias_adds_to_every_kind_of_mask():
    q, k, v = qkv()
    bias, hidden = torch.randn(1, 4, 5, 5), torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    additive = torch.where(hidden, 0.0, float("-inf"))
    described = visibility_mask(batch_size=2, q_length=5, kv_length=5)
    outs = [attention_forward(Layer(), q, k, v, m, position_bias=bias)[0] for m in (described, hidden, additive)]
    expected = regard.attention(q, k, v, layout="bhsd", causal=True, bias=bias).transpose(1, 2)
    for out in outs:
        torch.testing.assert_close(out, expected)


def test_dropout_is_for_training_only():
    layer, inputs = Layer(), qkv()
    torch.manual_seed(0)
    plain, _ = attention_forward(layer.eval(), *inputs, None)
    assert torch.equal(attention_forward(layer, *inputs, None, dropout=0.5)[0], plain)
    assert not torch.allclose(attention_forward(layer.train(), *inputs, None, dropout=0.5)[0], plain)


def test_is_causal_counts_without_a_mask():
    q, k, v = qkv()
    causal, full = (
        regard.attention(q, k, v, layout="bhsd", causal=c).transpose(1, 2) for c in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(attention_forward(Layer(), q, k, v, None)[0], causal)
    torch.testing.assert_close(attention_forward(Layer(), q, k, v, None, is_causal=False)[0], full)
    bidirectional = Layer()
    bidirectional.is_causal = False
    torch.testing.assert_close(attention_forward(bidirectional, q, k, v, None)[0], full)
    torch.testing.assert_close(attention_forward(bidirectional, q, k, v, None, is_causal=True)[0], causal)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("attention_mask", {"attention_mask": torch.ones(2, 5)}),
        ("attention_mask", {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.long)}),
        ("mask", {"attention_mask": torch.ones(2, 1, 5, 4, dtype=torch.bool)}),
        ("key", {"attention_mask": visibility_mask(batch_size=2, q_length=5, kv_length=6)}),
        ("query", {"attention_mask": visibility_mask(batch_size=2, q_length=4, kv_length=5, q_offset=1)}),
        ("cu_seq_lens_k", {"cu_seq_lens_q": torch.tensor([0, 10])}),
        ("attention_mask", {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool),
                            "cu_seq_lens_q": torch.tensor([0, 10]), "cu_seq_lens_k": torch.tensor([0, 10])}),
        ("position_bias", {"position_bias": torch.zeros(1, 4, 5, 5),
                           "cu_seq_lens_q": torch.tensor([0, 10]), "cu_seq_lens_k": torch.tensor([0, 10])}),
    ],
)  # fmt: skip
def test_bad_input_is_named(argument, change):
    with pytest.raises(regard.ConfigError, match=rf"^{argument}"):
        attention_forward(Layer(), *qkv(), **{"attention_mask": None, **change})


def test_causal_without_a_mask_needs_as_many_queries_as_keys():
    with pytest.raises(regard.ConfigError, match="attention_mask"):
        attention_forward(Layer(), *qkv(q_length=3), None)
    decoded, _ = attention_forward(Layer(), *qkv(q_length=1), None)
    assert decoded.shape == (2, 1, 4, 8)


@pytest.mark.parametrize("name", ["", "flash_regard", "my/regard", "sdpa_regard", "eager"])
def test_names_that_transformers_would_redirect_are_refused(name):
    with pytest.raises(regard.ConfigError, match="name"):
        register(name)


def test_register_takes_another_name_and_comes_twice():
    register("mine")
    register("mine")
    with torch.no_grad():
        torch.testing.assert_close(run("llama", "mine", input_ids=tokens()), run("llama", "regard", input_ids=tokens()))
