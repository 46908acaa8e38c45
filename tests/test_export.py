"""Exported libraries: the kit's cases through C, what they refuse, and what is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton: got none installed, needs triton to compile kernels")

from regard import ConfigError
from regard.config import architecture
from regard.export.kernels import FEATURES, SLOTS, Variant, parse_features
from regard.export.library import HEADER, LIBRARY, SOURCE

HERE = Path(__file__).parent / "export"
DRIVERS = {"sm80": "libcuda.so.1", "gfx1100": "libamdhip64.so"}
OK, INVALID, UNSUPPORTED, DRIVER = range(4)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="compiler: got none, needs a C compiler on the PATH")
with_fake_driver = pytest.mark.skipif(
    torch.cuda.is_available(), reason="driver: got a real one, needs none beside a fake"
)

FEATURE_SETS = (
    "plain,causal,window,mask,mask+causal,bias,softcap,alibi,alibi+causal,sinks,varlen,varlen+causal,kv_lens,"
    "kv_lens+causal,paged+causal,varlen+alibi+softcap+sinks"
)
CASES = [
    "odd_lengths", "more_queries_than_keys", "one_query", "one_key", "one_query_one_key", "mqa", "gqa_7_to_1",
    "strides_heads_outside", "strides_head_dim_sliced", "strides_sequence_sliced", "strides_qkv_packed", "layout_bhsd",
    "causal_square", "causal_bottom_right", "causal_fully_masked_rows", "window_left", "window_right", "window_both",
    "window_causal_overrides_right", "window_wider_than_keys", "window_fully_masked_rows", "window_gqa_one_query",
    "mask_bhqk", "mask_b11k", "mask_1h1k", "mask_causal", "bias_bhqk", "bias_1hqk", "bias_b11k_minus_inf",
    "softcap", "alibi_h", "alibi_bh_causal", "sinks", "varlen", "varlen_causal_gqa", "varlen_alibi_softcap_sinks",
    "kv_lens", "kv_lens_causal", "nan_query",
]  # fmt: skip

GRADIENT_SETS = "plain,causal,mask,varlen+causal,kv_lens+causal"
GRADIENT_CASES = [
    "odd_lengths", "gqa_7_to_1", "strides_qkv_packed", "mask_b11k", "varlen_causal_gqa", "kv_lens_causal",
]  # fmt: skip


def command_line(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-m", "regard", "export", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def export(folder, arch, *options, others=(), head_dim="32", features="plain", dtype="float16"):
    """A library of these kernels, and beside it what stands in for its driver."""
    done = command_line(
        folder, "--arch", ",".join([arch, *others]), "--dtype", dtype, "--head-dim", head_dim, "--features", features,
        *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    driver = folder / DRIVERS[arch]
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-Wl,-soname,{driver.name}", "-o", str(driver), str(HERE / "fake_driver.c")],
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return export(tmp_path_factory.mktemp("sm80"), "sm80", features=FEATURE_SETS)


def through_c(folder, **asked):
    """What `through_c.py` answers."""
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "through_c.py")], input=json.dumps({"folder": str(folder), **asked}),
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@with_fake_driver
def test_conformance_through_c(library):
    wanted = {**dict.fromkeys(CASES), "still loaded": 0}
    assert through_c(library, dtype="float16", names=CASES) == wanted


@with_fake_driver
@pytest.mark.parametrize(
    "head_dim, features, dtype, name",
    [
        ("40:24", "window+mask+bias+softcap+alibi+sinks+kv_lens", "float16", "everything_but_dropout"),
        ("64", "paged+causal", "float32", "paged_decode"),
        ("192:128", "causal", "bfloat16", "head_dim_v_smaller"),
    ],
)
def test_other_head_dims_and_dtypes_through_c(tmp_path, head_dim, features, dtype, name):
    folder = export(tmp_path, "sm80", head_dim=head_dim, features=features, dtype=dtype)
    assert through_c(folder, dtype=dtype, names=[name])[name] is None


@pytest.fixture(scope="module")
def trainable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainable")
    return export(folder, "sm80", "--backward", features=GRADIENT_SETS)


def check_random_calls(folder, backward=False):
    """Run `fuzz.c` on a library: launches are what their calls say, and the C code does nothing undefined."""
    (driver,) = (folder / name for name in DRIVERS.values() if (folder / name).exists())
    program = folder / "fuzz"
    command = ["cc", "-std=c11", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    probe = [*command, "-x", "c", "-", "-o", str(program)]
    if subprocess.run(probe, input="int main(void) { return 0; }", text=True, capture_output=True).returncode:
        pytest.skip("compiler: got one without its sanitizers, needs libasan and libubsan")
    sources = [f"-I{folder}", str(HERE / "fuzz.c"), str(driver), f"-Wl,-rpath,{folder}", "-ldl", "-lm"]
    subprocess.run([*command, "-o", str(program), *sources], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    served, *_, served_backward, _, _ = map(int, done.stdout.split())
    assert served > 5_000 and (served_backward > 5_000) == backward


@with_fake_driver
def test_random_calls(library, trainable):
    check_random_calls(library)
    check_random_calls(trainable, backward=True)


@with_fake_driver
def test_gradients_through_c(trainable):
    wanted = {**dict.fromkeys(GRADIENT_CASES), "still loaded": 0}
    assert through_c(trainable, dtype="float16", names=GRADIENT_CASES, backward=True) == wanted


@with_fake_driver
def test_what_is_refused_of_gradients(trainable, library):
    refused = {
        "grads.struct_size: got 8": dict(struct_size=8),
        "grad_out: got an address 8 past a multiple of 16, needs a multiple": dict(grad_out=8),
        "scratch: got an address 2 past a multiple of 4": dict(scratch=2),
        "dk_strides[0]: got 0, needs at least 32": dict(dk_strides=(0, 64, 32)),
        "dv_strides[2]: got 16, needs at least 32": dict(dv_strides=(12800, 64, 16)),
        "dq_strides[1]: got 0, needs at least 32": dict(dq_strides=(19200, 0, 32)),
        **{f"{name}: got null": dict.fromkeys([name], 0) for name in ("grad_out", "dq", "dk", "dv", "scratch")},
        "dk_strides[1]: got 63, needs a multiple of 16": dict(dk_strides=(12800, 63, 32)),
        "dq_strides[0]: got -16": dict(dq_strides=(-16, 192, 32)),
    }
    no_keys, no_queries = dict(seqlen_k=0, k=0, v=0), dict(seqlen_q=0, q=0, out=0, lse=0)
    served = [
        dict(grads={}), dict(**PACKED, causal=1, grads={}), dict(no_keys, grads=dict(dk=0, dv=0)),
        dict(no_queries, grads=dict(grad_out=0, dq=0, scratch=0)),
    ]  # fmt: skip
    unknown = dict(causal=1, sinks=4, grads={})
    asked = [*(dict(grads=fields) for fields in refused.values()), *served, unknown]
    answered = through_c(trainable, overrides=asked)["calls"]
    for (status, said, launches), expected in zip(answered, refused, strict=False):
        assert (status, launches) == (INVALID, 0) and said.startswith(expected), said
    assert [(status, launches) for status, _, launches in answered[-5:-1]] == [(OK, 3), (OK, 3), (OK, 2), (OK, 1)]
    status, said, _ = answered[-1]
    assert status == UNSUPPORTED and "a backward of float16 head_dim 32 causal sinks, needs one of float16" in said
    ((status, said, _),) = through_c(library, overrides=[dict(grads={})])["calls"]
    assert (status, said) == (UNSUPPORTED, "kernel: got a backward, needs a library with kernels for it")


def check_places(folder, word, text, backward=False, **fields):
    """Calls from threads where another context or device than the library's, 1, is current, or (0) no context; ``text``
    is the driver's of an invalid argument."""
    found = through_c(folder, fields=fields, backward=backward)
    launches = 1 + 2 * backward
    refused = [DRIVER, f"launching the kernel: error 1 of the driver, {text}"]
    entering, leaving = (
        [DRIVER, f"{what} {word}: error 4 of the driver, something else"]
        for what in ("entering the library's", "going back to the thread's")
    )
    assert (found.pop("closed elsewhere"), found.pop("still loaded")) == ([OK, "", 0, 2, 2], 0)
    opened = found.pop("opened without")
    for place in (0, 2):
        assert found.pop(f"{place}, launch error 0") == [OK, "", launches, 2, place]
        assert found.pop(f"{place}, launch error 1") == [*refused, 0, 2, place]
        for launch_error in (0, 1):
            assert found.pop(f"{place}, launch error {launch_error}, switch 1 fails") == [*entering, 0, 1, place]
        assert found.pop(f"{place}, launch error 0, switch 2 fails") == [*leaving, launches, 2, 1]
        assert found.pop(f"{place}, launch error 1, switch 2 fails") == [*refused, 0, 2, 1]
    for name, said in found.items():  # in the library's own place: nothing is switched
        expected = [*refused, 0] if "launch error 1" in name else [OK, "", launches]
        assert name.startswith("1, ") and said == [*expected, 0, 1]
    return opened


@with_fake_driver
def test_every_thread_launches_where_the_library_is(library, trainable):
    for folder, backward in ((library, False), (trainable, True)):
        status, said, *after = check_places(folder, "context", "invalid argument", backward)
        assert (status, after) == (DRIVER, [0, 0, 0])
        assert said.startswith("context: got none that is current in this thread, needs one: cudaSetDevice")


@with_fake_driver
def test_on_amd(tmp_path):
    folder = export(tmp_path, "gfx1100", features="causal,paged+causal", head_dim="32,64,128")
    # what a launch in Python knows beforehand, strides and that a page is a multiple of 16 keys, is not missed
    assert [kernel["spilled_bytes"] for kernel in json.loads(description(folder))["kernels"]] == [0] * 6
    names = ["causal_bottom_right", "paged_decode", "paged_odd_page"]
    assert through_c(folder, dtype="float16", names=names) == {**dict.fromkeys(names), "still loaded": 0}
    too_long = dict(causal=1, batch=20_000, q_strides=(192 * 1000, 192, 32))
    too_many = dict(PAGED, block_table_stride=2**29)
    answered = through_c(folder, overrides=[too_long, too_many])["calls"]
    assert [(status, said.split(":")[0]) for status, said, _ in answered] == [
        (UNSUPPORTED, "q"), (UNSUPPORTED, "block_table"),
    ]  # fmt: skip
    assert all("needs at most 2147483646" in said for _, said, _ in answered)
    check_random_calls(folder)
    assert check_places(folder, "device", "hipErrorInvalidValue", causal=1)[0] == OK  # threads begin with device 0


NOTHING = dict(q=0, k=0, v=0, out=0, lse=0)
PACKED = dict(cu_seqlens_q=4, cu_seqlens_k=4, total_q=150, total_k=300)
PAGED = dict(causal=1, kv_lens=4, block_table=4, block_table_stride=9, num_pages=50, page_size=16)
MORE_ADDRESSES = {
    "lse": {}, "alibi_slopes": {}, "sinks": {}, "kv_lens": {}, "cu_seqlens_q": dict(PACKED),
    "cu_seqlens_k": dict(PACKED), "block_table": dict(PAGED),
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, status, said",
    [
        (dict(struct_size=8), INVALID, "struct_size: got 8, needs"),
        (dict(dtype=0), INVALID, "dtype: got 0"),
        (dict(dtype=4), INVALID, "dtype: got 4"),
        (dict(batch=-1), INVALID, "batch: got -1"),
        (dict(seqlen_q=-5), INVALID, "seqlen_q: got -5"),
        (dict(seqlen_k=-5), INVALID, "seqlen_k: got -5"),
        (dict(seqlen_q=2**30, seqlen_k=2**30), INVALID, "seqlen_q, seqlen_k: got"),
        (dict(batch=2**30), INVALID, "batch, heads_q, seqlen_q: got"),
        (dict(heads_q=0), INVALID, "heads_q: got 0"),
        (dict(heads_kv=0), INVALID, "heads_kv: got 0"),
        (dict(heads_kv=4), INVALID, "heads_kv: got 4, needs a divisor of heads_q 6"),
        (dict(head_dim=0), INVALID, "head_dim: got 0"),
        (dict(head_dim_v=-1), INVALID, "head_dim_v: got -1"),
        (dict(softmax_scale=-0.5), INVALID, "softmax_scale: got -0.5"),
        (dict(softmax_scale=float("nan")), INVALID, "softmax_scale: got"),
        (dict(softcap=-1.0), INVALID, "softcap: got -1"),
        (dict(softcap=1e-9), INVALID, "softcap: got 1e-09"),
        (dict(softcap=5000.0), INVALID, "softcap: got 5000, needs 0 or 1e-06 to 4096"),
        (dict(softcap=200.0, dtype=3), INVALID, "softcap: got 200, needs 0 or 1e-06 to 128"),
        (dict(window_left=-2), INVALID, "window_left: got -2"),
        (dict(window_right=-2), INVALID, "window_right: got -2"),
        (dict(cu_seqlens_q=4), INVALID, "cu_seqlens_q, cu_seqlens_k: got one"),
        (dict(PACKED, kv_lens=4), INVALID, "kv_lens, block_table: got one together with cu_seqlens"),
        (dict(PACKED, block_table=4), INVALID, "kv_lens, block_table: got one together with cu_seqlens"),
        (dict(PACKED, mask=16), INVALID, "mask, bias: got one together with cu_seqlens"),
        (dict(PACKED, bias=16), INVALID, "mask, bias: got one together with cu_seqlens"),
        (dict(PACKED, total_q=2**31 - 1024), INVALID, "total_q: got 2147482624, needs 0 to 2147482623"),
        (dict(seqlen_q=2**30, seqlen_k=2**30 - 1024), INVALID, "seqlen_q, seqlen_k: got"),
        (dict(PACKED, total_q=-1), INVALID, "total_q: got -1"),
        (dict(PACKED, total_k=-1), INVALID, "total_k: got -1"),
        (dict(PAGED, kv_lens=0), INVALID, "kv_lens: got null"),
        (dict(PAGED, page_size=0), INVALID, "page_size: got 0"),
        (dict(PAGED, num_pages=0), INVALID, "num_pages: got 0"),
        (dict(PAGED, block_table_stride=-1), INVALID, "block_table_stride: got -1"),
        (dict(alibi_slopes=4, alibi_batch_stride=-1), INVALID, "alibi_batch_stride: got -1"),
        *((dict.fromkeys([name], 0), INVALID, f"{name}: got null") for name in NOTHING),
        *((dict.fromkeys([name], 8), INVALID, f"{name}: got an address") for name in ("q", "k", "v", "out")),
        (dict(q_strides=(19200, 190, 32)), INVALID, "q_strides[1]: got 190, needs a multiple of 16"),
        (dict(out_strides=(19200, 192, -32)), INVALID, "out_strides[2]: got -32, needs at least 32"),
        (dict(out_strides=(0, 192, 32)), INVALID, "out_strides[0]: got 0, needs at least 32"),
        (dict(out_strides=(19200, 192, 16)), INVALID, "out_strides[2]: got 16, needs at least 32"),
        (dict(v_strides=(2**62, 64, 32)), UNSUPPORTED, "v: got 9223372036854800384 bytes from its first"),
        (dict(PACKED, total_q=2**31 - 1), INVALID, "total_q: got 2147483647, needs 0 to 2147482623"),
        (dict(PACKED, total_k=2**31 - 1), INVALID, "total_k: got 2147483647, needs 0 to 2147482623"),
        (dict(PACKED, seqlen_q=0), INVALID, "seqlen_q: got 0 of 150 packed rows, needs the longest"),
        (dict(PACKED, seqlen_k=0), INVALID, "seqlen_k: got 0 of 300 packed rows, needs the longest"),
        *(
            (dict(fields, **{name: 2}), INVALID, f"{name}: got an address 2 past a multiple of 4, needs")
            for name, fields in MORE_ADDRESSES.items()
        ),
        (dict(k_strides=(12800, 2**24, 32)), INVALID, "k_strides[1]: got 16777216, needs at most"),
        (dict(mask=16, mask_strides=(0, 0, 199)), INVALID, "mask_strides[2]: got 199, needs a multiple of 16"),
        (dict(mask=8), INVALID, "mask: got an address"),
        (dict(head_dim=48), UNSUPPORTED, "kernel: got a call of float16 head_dim 48, needs one of float16 head_dim 32"),
        (dict(head_dim_v=64), UNSUPPORTED, "kernel: got a call of float16 head_dim 32 head_dim_v 64"),
        (dict(dtype=2), UNSUPPORTED, "kernel: got a call of bfloat16 head_dim 32"),
        (dict(sinks=4, causal=1), UNSUPPORTED, "kernel: got a call of float16 head_dim 32 causal sinks"),
        (dict(PAGED, causal=0), UNSUPPORTED, "kernel: got a call of float16 head_dim 32 paged"),
    ],
)  # fmt: skip
def test_what_is_refused(refusals, fields, status, said):
    found, sentence, launches = refusals[json.dumps(fields)]
    assert (found, launches) == (status, 0) and sentence.startswith(said), sentence


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(causal=1),
        dict(window_right=2**31 - 1),
        dict(window_left=2**31 - 1, causal=1),
        dict(k_strides=(-7, 64, 32), q_strides=(5, 192, 32), out_strides=(5, 192, 32), v_strides=(1, 64, 32), batch=1),
        dict(PACKED, q_strides=(5, 192, 32)),
        dict(PAGED),
        dict(mask=16, mask_strides=(0, 208, 0)),
    ],
)
def test_what_is_launched(refusals, fields):
    assert refusals[json.dumps(fields)][::2] == [OK, 1]


@pytest.mark.parametrize("fields", [dict(batch=0), dict(seqlen_q=0), dict(PACKED, total_q=0)])
def test_nothing_to_write_launches_nothing(refusals, fields):
    assert refusals[json.dumps({**fields, **NOTHING})][::2] == [OK, 0]


def test_no_keys_need_no_memory_of_keys(refusals):
    assert refusals[json.dumps(dict(seqlen_k=0, k=0, v=0))][::2] == [OK, 1]


@pytest.fixture(scope="module")
def answers(library):
    if torch.cuda.is_available():
        pytest.skip(with_fake_driver.kwargs["reason"])
    asked = []
    for test in (test_what_is_refused, test_what_is_launched, test_nothing_to_write_launches_nothing):
        ((_, values),) = (mark.args for mark in test.pytestmark if mark.name == "parametrize")
        asked += [value[0] if isinstance(value, tuple) else value for value in values]
    asked = [*asked, *({**fields, **NOTHING} for fields in asked[-3:]), dict(seqlen_k=0, k=0, v=0)]
    found = through_c(library, overrides=asked)
    return {**found, "calls": dict(zip(map(json.dumps, asked), found["calls"], strict=True))}


@pytest.fixture(scope="module")
def refusals(answers):
    return answers["calls"]


def test_failures_of_the_driver(answers):
    image, launching = answers["failures"]
    assert image[0] == UNSUPPORTED and image[1].startswith("arch: no kernel is for this device, or its driver is older")
    assert image[1].endswith("(its error 209); needs one of sm80")
    assert launching == [DRIVER, "launching the kernel: error 1 of the driver, invalid argument"]


@with_fake_driver
def test_kernels_that_need_more_than_the_device_has(library):
    """Of shared memory: an sm80 kernel may ask for more than a device of compute capability 8.6 has."""
    needed = sorted({each["shared_bytes"] for each in json.loads(description(library))["kernels"]})
    ((status, said, _),) = through_c(library, overrides=[{}], most_shared=needed[0] - 1)["calls"]
    assert (status, said) == (UNSUPPORTED, "kernel: got a call, needs a library with kernels for it")


@with_fake_driver
def test_the_newest_architecture_that_the_device_takes(tmp_path):
    folder = export(tmp_path, "sm80", features="plain,causal", others=("sm89",))
    kinds = [(each["arch"], each["features"]) for each in json.loads(description(folder))["kernels"]]
    assert kinds == [("sm89", []), ("sm89", ["causal"]), ("sm80", []), ("sm80", ["causal"])]
    answered = through_c(folder, overrides=[{}, dict(causal=1)], refused=1)
    assert [status for status, *_ in answered["calls"]] == [OK, OK]


def test_a_machine_without_the_driver(library):
    code = """
import sys; sys.path[:0] = sys.argv[2:]
from pathlib import Path
from library import Library
opened = Library(Path(sys.argv[1]))
print(opened.open(), opened.error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(library / LIBRARY), str(HERE)], capture_output=True, text=True, check=True
    )
    if not done.stdout.startswith("0"):  # there is one here
        assert done.stdout.startswith("3 libcuda.so.1: not found") or done.stdout.startswith("3 cuInit"), done.stdout


def test_the_struct_is_what_other_languages_take_it_for(answers):
    assert answers["size"] == answers["expected"]


def test_what_has_to_be_set_is_left_such_that_it_is_refused(answers):
    assert answers["unset"] == [
        "batch", "seqlen_q", "seqlen_k", "q_strides", "k_strides", "v_strides", "out_strides", "window_left",
        "window_right", "mask_strides", "bias_strides", "total_q", "total_k", "block_table_stride",
    ]  # fmt: skip


def test_source_and_header_are_clean(library, tmp_path):
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    subprocess.run(
        ["cc", "-std=c11", *warnings, "-c", str(library / SOURCE), "-o", str(tmp_path / "attention.o")], check=True
    )
    for language in ("c", "c++"):
        subprocess.run(["cc", "-x", language, *warnings, "-fsyntax-only", str(library / HEADER)], check=True)


def test_the_documented_call_compiles(library, tmp_path):
    (block,) = re.findall(r"```c\n(.*?)```", (HERE.parents[1] / "docs" / "c_abi.md").read_text(), re.DOTALL)
    (tmp_path / "call.c").write_text(block)
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{library}"]
    subprocess.run([*command, str(tmp_path / "call.c")], check=True)


def description(folder):
    code = "import sys, ctypes; c = ctypes.CDLL(sys.argv[1]); c.regard_description.restype = ctypes.c_char_p; print(c.regard_description().decode())"
    command = [sys.executable, "-c", code, str(folder / LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_description(library):
    said = json.loads(description(library))
    assert {"regard", "triton"} < set(said) and len(said["kernels"]) == len(FEATURE_SETS.split(","))
    assert said["kernels"][2]["features"] == ["window"] and said["kernels"][2]["arch"] == "sm80"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="device: got cpu, needs cuda")
@pytest.mark.parametrize(
    "check, features, options, names",
    [("forward", FEATURE_SETS, [], CASES), ("backward", GRADIENT_SETS, ["--backward"], GRADIENT_CASES)],
)
def test_conformance_on_this_gpu(tmp_path, check, features, options, names):
    code = """
import sys
from pathlib import Path
import torch, regard
from library import OK, ExportedBackend, Library
from regard.testing import CASES, checks
library = Library(Path(sys.argv[1]))
torch.zeros(1, device="cuda")
assert library.open() == OK, library.error
regard.register(ExportedBackend(library, stream=lambda: torch.cuda.current_stream().cuda_stream))
for case in CASES:
    if case.name in sys.argv[3:]:
        print(getattr(checks, f"check_{sys.argv[2]}")("exported", case, "cuda", torch.float16))
"""
    arch = architecture(torch.device("cuda"))
    done = command_line(
        tmp_path, "--arch", arch, "--dtype", "float16", "--head-dim", "32", "--features", features, *options
    )
    assert done.returncode == 0, done.stderr
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / LIBRARY), check, *names],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": passed: ") == len(names), done.stdout


def test_every_slot_is_filled_and_every_feature_is_known_to_the_source():
    source = Path(sys.modules["regard.export"].__file__).with_name(SOURCE).read_text()
    filled = set(re.findall(r"values\[SLOT_(\w+)\]\.", source))
    filled |= {f"{name}{i}" for name in re.findall(r"strides\(values, SLOT_(\w+_)0", source) for i in range(3)}
    assert filled == set(SLOTS)
    assert set(re.findall(r"\bFEATURE_([a-z]\w*)", source)) == set(FEATURES)


def test_features_in_words():
    assert parse_features("plain") == ()
    assert parse_features("sinks+causal") == ("sinks", "causal")


def test_what_a_feature_implies_is_not_asked_for_twice():
    assert Variant(torch.float16, 64, 64, ("kv_lens", "paged", "causal", "window")).features == ("window", "paged")


@pytest.mark.parametrize("text", ["", "causal,mask", "dropout", "causal+", "varlen+kv_lens", "varlen+mask"])
def test_features_that_cannot_be(text):
    with pytest.raises(ConfigError, match="features: got"):
        parse_features(text)


PLAIN = ["--arch", "sm80", "--dtype", "float16", "--head-dim", "16", "--features", "plain"]


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o555)
    places = ["file"] + ["locked", "locked/inside"] * (os.geteuid() != 0)
    for place in places:
        done = command_line(tmp_path / place, *PLAIN)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"folder: got '{tmp_path / place}' (" in done.stderr and "that can be made and written to" in done.stderr


def test_equal_kernels_are_compiled_once_and_a_compiler_that_fails_is_named(tmp_path):
    twice = ["--features", "sinks+causal, causal+sinks,causal+causal+sinks"]
    done = command_line(tmp_path, *PLAIN[:-2], *twice, "--compiler", "false")
    assert done.returncode == 2 and "compiler: got 'false', which failed on" in done.stderr
    assert (tmp_path / "regard_kernels.h").read_text().count("static const unsigned char image_") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--arch", "gfx1100,sm90"], "arch: got gfx1100, sm90, needs architectures of one vendor"),
        (["--arch", "sm70"], "arch: got 'sm70', needs one of sm80"),
        (["--arch", "sm90", "--dtype", "int8"], "dtype: got 'int8', needs one of float16"),
        (["--arch", "sm90", "--head-dim", "big"], "head_dim: got 'big', needs a number"),
        (["--arch", "sm90", "--head-dim", "0"], "head_dim: got 0"),
        (["--arch", "sm90", "--head-dim", "64:"], "head_dim: got '64:', needs a number"),
        (["--arch", "sm90", "--head-dim", "300"], "head_dim: got 300, needs at most 256"),
        (["--arch", "sm90", "--backward", "--features", "paged"], "flash: backward: got a gradient through a paged KV cache"),
        (["--arch", "sm90", "--features", "dropout"], "features: got 'dropout', needs 'plain', or some of"),
        (["--arch", "sm80", "--dtype", "float16", "--head-dim", "16", "--features", "plain", "--compiler", "no-such-cc"],
         "compiler: got 'no-such-cc', needs a C compiler"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(tmp_path, arguments, said):
    done = command_line(tmp_path / "out", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
