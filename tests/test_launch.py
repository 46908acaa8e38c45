"""A repeated launch says what a new one would, and whatever a kernel can notice makes a new one."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from regard import AttentionConfig, AttentionInputs
from regard.backends import flash, hopper
from regard.backends.launch import Launch
from regard.backends.padded_rows import with_padded_rows

B, S, H, HK, D = 2, 32, 4, 2, 16
CONFIG = AttentionConfig(
    batch=B, seqlen_q=S, seqlen_k=S, heads_q=H, heads_kv=HK, head_dim=D, dtype=torch.bfloat16, device="cuda",
    arch="sm90", causal=True, alibi=True, sinks=True, kv_lens=True,
)  # fmt: skip


def rows(*shape, apart=48, start=0, dtype=torch.bfloat16):
    """A tensor whose rows are so many elements apart; the first starts at element ``start`` of aligned memory."""
    return torch.randn(*shape[:-1], apart).to(dtype)[..., start : start + shape[-1]]


def vector(size, start=0, dtype=torch.float32):
    return torch.randn(size + 8).to(dtype)[start : start + size]


def lengths(start=0):
    return torch.randint(1, S, (B + 8,), dtype=torch.int32)[start : start + B]


def mask(start=0, apart=48):
    return (torch.rand(B, 1, S, apart) > 0.5)[..., start : start + S]


PLAIN = dict(
    q=lambda: rows(B, S, H, D), k=lambda: rows(B, S, HK, D), v=lambda: rows(B, S, HK, D), sinks=lambda: vector(H),
    alibi_slopes=lambda: vector(H), kv_lens=lengths,
)  # fmt: skip
HEADS = {"q": H, "k": HK, "v": HK}
CHANGES = {
    **{f"{name} strides": {name: lambda n=n: rows(B, n, S, D).transpose(1, 2)} for name, n in HEADS.items()},
    **{f"{name} unaligned": {name: lambda n=n: rows(B, S, n, D, start=4)} for name, n in HEADS.items()},
    "k expanded": dict(k=lambda: rows(B, S, 1, D).expand(B, S, HK, D)),
    "sinks strides": dict(sinks=lambda: vector(2 * H)[::2]),
    "sinks dtype": dict(sinks=lambda: vector(H, dtype=torch.bfloat16)),
    "no sinks": dict(sinks=lambda: None),
    "slopes by batch": dict(alibi_slopes=lambda: vector(B * H).view(B, H)),
    "no slopes": dict(alibi_slopes=lambda: None),
    "lengths unaligned": dict(kv_lens=lambda: lengths(start=1)),
    "no lengths": dict(kv_lens=lambda: None),
}  # fmt: skip
CHANGES_OF_FLASH = CHANGES | {
    "sinks unaligned": dict(sinks=lambda: vector(H, start=1)),
    "slopes unaligned": dict(alibi_slopes=lambda: vector(H, start=1)),
    "mask": dict(mask=mask),
    "mask strides": dict(mask=lambda: mask(apart=64)),
    "mask for all rows": dict(mask=lambda: mask()[:, :, :1].expand(B, 1, S, S)),
    "mask unaligned": dict(mask=lambda: mask(start=1)),
    "bias": dict(bias=lambda: rows(1, H, S, S)),
    "bias strides": dict(bias=lambda: rows(1, H, S, S, apart=64)),
    "bias dtype": dict(bias=lambda: rows(1, H, S, S, dtype=torch.float32)),
    "bias unaligned": dict(bias=lambda: rows(1, H, S, S, start=1)),
    "dropout": dict(dropout_seed=lambda: torch.randint(2**62, (1,))),
    "pages": dict(block_table=lambda: torch.zeros(B, 2, dtype=torch.int32)),
    "page table strides": dict(block_table=lambda: torch.zeros(B, 3, dtype=torch.int32)[:, :2]),
}


def given(changes):
    return AttentionInputs(**{name: make() for name, make in (PLAIN | changes).items()})


class Compiled:
    """Stands for a compiled kernel: keeps what it is launched with."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *values: self.launched.append((grid[0], values))


@pytest.fixture
def made(monkeypatch):
    """The launches that went through the JIT, and their kernels."""
    made = []
    monkeypatch.setattr(Launch, "run", lambda self, device: made.append((self, Compiled())) or made[-1][1])
    monkeypatch.setattr(hopper, "tile_counter", lambda device: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    return made


def forward(backend, inputs):
    """Run it, and return the launch that a new call would make into the same memory."""
    out, lse = backend.forward(CONFIG, inputs)
    if backend.name == "hopper":
        return hopper.forward_launch(CONFIG, inputs, out, lse, torch.zeros(2, dtype=torch.int32), 132)
    return flash.forward_launches(CONFIG, with_padded_rows(inputs), out, lse)[0]


def assert_says(value, wanted, name):
    assert type(value) is type(wanted), name
    if isinstance(wanted, torch.Tensor):
        assert (value.dtype, value.stride()) == (wanted.dtype, wanted.stride()), name
        assert value is wanted or torch.equal(value.nan_to_num(), wanted.nan_to_num()), name
    elif hasattr(wanted, "base"):  # a descriptor
        assert_says(value.base, wanted.base, name)
        assert {**vars(value), "base": None} == {**vars(wanted), "base": None}, name
    else:
        assert value == wanted, name


@pytest.mark.parametrize(
    "backend, changes", [(hopper.HopperBackend(), CHANGES), (flash.FlashBackend(), CHANGES_OF_FLASH)],
    ids=["hopper", "flash"],
)  # fmt: skip
def test_one_difference_makes_another_launch_and_none_a_repetition(made, backend, changes):
    CONFIG.prepared.clear()
    changes = {"plain": {}, **changes}
    for number, (name, change) in enumerate(changes.items(), 1):
        forward(backend, given(change))
        assert len(made) == number, name
    for (name, change), (launch, compiled) in zip(changes.items(), made, strict=True):
        wanted = forward(backend, given(change))
        ((programs, values),) = compiled.launched
        assert programs == wanted.programs == launch.programs and wanted.options == launch.options
        for argument, value in zip(wanted.kernel.arg_names, values, strict=True):
            assert_says(value, wanted.arguments[argument], f"{name}: {argument}")
    assert len(made) == len(changes)
    CONFIG.prepared.clear()


def test_a_float32_launch_of_flash_is_of_one_matmul_precision(made):
    config = dataclasses.replace(CONFIG, dtype=torch.float32)
    precision = torch.get_float32_matmul_precision()
    try:
        for wanted in ("highest", "high", "medium", "highest"):
            torch.set_float32_matmul_precision(wanted)
            flash.FlashBackend().forward(config, AttentionInputs(*[torch.randn(B, S, n, D) for n in HEADS.values()]))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert [launch.arguments["PRECISION"] for launch, _ in made] == ["ieee", "tf32x3", "tf32"]
    assert len(made[0][1].launched) == 1
