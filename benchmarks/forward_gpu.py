"""Measure the `flash` forward on a GPU beside torch's attention, and write the figures and how to repeat them.

    python benchmarks/forward_gpu.py --out reports/h200_forward.json

Every cell is checked against float32 attention before it is timed; times are medians of device-event timings on random
bf16 data. Sections: FA2 (torch's FLASH backend) over lengths and head dims, a window against full causal, an additive
bias against torch's EFFICIENT backend, memory of a long call, and eager attention (time and memory).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

import regard

TOKENS = 16384
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def milliseconds(function: Callable[[], Any], rep: int = 60) -> float:
    return do_bench(function, warmup=15, rep=rep, return_mode="median")


def random_qkv(batch: int, seqlen: int, heads: int, head_dim: int) -> list[torch.Tensor]:
    return [torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, **kwargs: Any
) -> torch.Tensor:
    """Torch's attention on (B, S, H, D) tensors, by one named backend."""
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), **kwargs).transpose(1, 2)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention as models write it without a fused kernel: the scores are materialised."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


def check(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> None:
    """Compare one sequence and two heads with float32 attention: at most twice the error of torch's own bf16 result."""
    few = [t[:1, :, :2] for t in (q, k, v)]
    exact = torch_attention(*(t.float() for t in few), SDPBackend.MATH, **kwargs)
    same_dtype = torch_attention(
        *few,
        SDPBackend.MATH,
        **{
            name: t.bfloat16() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for name, t in kwargs.items()
        },
    )
    error = (out[:1, :, :2].float() - exact).abs().max().item()
    allowed = 2 * (same_dtype.float() - exact).abs().max().item() + 1e-3
    if not error <= allowed:  # NaN is never allowed
        raise SystemExit(f"wrong result: error {error:.3e}, allowed {allowed:.3e}, shape {tuple(q.shape)}, {kwargs}")


def peak_bytes(function: Callable[[], Any]) -> int:
    """Device memory a call allocates beyond what was allocated before it, its result included."""
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def against_fa2() -> list[dict[str, Any]]:
    rows = []
    for head_dim, causal, seqlen in itertools.product((64, 128, 256), (False, True), LENGTHS):
        batch, heads = TOKENS // seqlen, 2048 // head_dim
        q, k, v = random_qkv(batch, seqlen, heads, head_dim)
        if seqlen <= 4096:
            check(regard.attention(q, k, v, causal=causal, backend="flash"), q, k, v, is_causal=causal)
        flops = 4 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1)
        flash = milliseconds(lambda: regard.attention(q, k, v, causal=causal, backend="flash"))
        fa2 = milliseconds(lambda: torch_attention(q, k, v, SDPBackend.FLASH_ATTENTION, is_causal=causal))
        cudnn = milliseconds(lambda: torch_attention(q, k, v, SDPBackend.CUDNN_ATTENTION, is_causal=causal))
        rows.append(
            dict(head_dim=head_dim, causal=causal, seqlen=seqlen, flash_tflops=round(flops / flash / 1e9),
                 fa2_tflops=round(flops / fa2 / 1e9), cudnn_tflops=round(flops / cudnn / 1e9),
                 ratio_to_fa2=round(fa2 / flash, 3), ratio_to_cudnn=round(cudnn / flash, 3))
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def window() -> list[dict[str, Any]]:
    rows = []
    for head_dim in (64, 128):
        q, k, v = random_qkv(1, 16384, 2048 // head_dim, head_dim)
        full = milliseconds(lambda: regard.attention(q, k, v, causal=True, backend="flash"))
        banded = milliseconds(lambda: regard.attention(q, k, v, causal=True, window=(1024, 0), backend="flash"))
        rows.append(dict(head_dim=head_dim, full_ms=full, window_1024_ms=banded, ratio=round(full / banded, 2)))
        print(rows[-1], flush=True)
    return rows


def additive_bias() -> list[dict[str, Any]]:
    rows = []
    for head_dim, seqlen in itertools.product((64, 128), (1024, 4096)):
        batch, heads = TOKENS // seqlen, 2048 // head_dim
        q, k, v = random_qkv(batch, seqlen, heads, head_dim)
        bias = torch.randn(1, heads, seqlen, seqlen, device="cuda", dtype=torch.bfloat16)
        out = regard.attention(q, k, v, bias=bias, backend="flash")
        check(out, q, k, v, attn_mask=bias[:, :2].float())
        flash = milliseconds(lambda: regard.attention(q, k, v, bias=bias, backend="flash"))
        expanded = bias.expand(batch, -1, -1, -1)
        efficient = milliseconds(
            lambda: torch_attention(q, k, v, SDPBackend.EFFICIENT_ATTENTION, attn_mask=expanded), rep=100
        )
        rows.append(dict(head_dim=head_dim, seqlen=seqlen, flash_ms=flash, efficient_ms=efficient,
                         ratio=round(efficient / flash, 2)))  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def long_call_memory() -> dict[str, Any]:
    q, k, v = random_qkv(1, 16384, 16, 128)
    added = peak_bytes(lambda: regard.attention(q, k, v, causal=True, return_lse=True, backend="flash"))
    inputs = 3 * q.numel() * q.element_size()
    result = q.numel() * q.element_size() + 16 * 16384 * 4
    row = dict(seqlen=16384, peak_bytes=added + inputs, tensors_bytes=inputs + result,
               ratio=round((added + inputs) / (inputs + result), 4))  # fmt: skip
    print(row, flush=True)
    return row


def against_eager() -> list[dict[str, Any]]:
    rows = []
    for head_dim, causal, batch, seqlen in itertools.product((32, 64, 128), (False, True), (1, 8), (512, 2048, 8192)):
        q, k, v = random_qkv(batch, seqlen, 8, head_dim)
        ours, theirs = (
            (lambda: regard.attention(q, k, v, causal=causal, backend="flash")),
            (lambda: eager(q, k, v, causal)),
        )
        row = dict(head_dim=head_dim, causal=causal, batch=batch, seqlen=seqlen,
                   speedup=round(milliseconds(theirs, 30) / milliseconds(ours, 30), 2),
                   memory_saved_percent=round(100 * (1 - peak_bytes(ours) / peak_bytes(theirs)), 1))  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--commit", default="", help="commit to record where git is not there to ask")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    commit = (
        arguments.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    fa2 = against_fa2()
    ratios = {
        "D 64 and 128": [row["ratio_to_fa2"] for row in fa2 if row["head_dim"] < 256],
        "D 256": [row["ratio_to_fa2"] for row in fa2 if row["head_dim"] == 256],
    }
    report = dict(
        gpu=torch.cuda.get_device_name(),
        driver=subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        ).stdout.strip(),
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
        commit=commit,
        command="python benchmarks/forward_gpu.py --out reports/h200_forward.json",
        fa2_geometric_mean={name: round(geometric_mean(values), 3) for name, values in ratios.items()},
        fa2_worst_cell={name: min(values) for name, values in ratios.items()},
        fa2=fa2,
        window=window(),
        bias=additive_bias(),
        memory=long_call_memory(),
        eager=against_eager(),
    )  # fmt: skip
    print(report["fa2_geometric_mean"], report["fa2_worst_cell"])
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
