"""Time the `cpu` backend beside torch's attention on this machine's processor, ratios in one process.

python benchmarks/forward_cpu.py --out reports/cpu_forward.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import regard


def paired_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of both, taken in turns so that drift hits both, and the ratio ours / theirs."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (ours, theirs):
        function()
    for _ in range(repeats):
        for function, record in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            record.append(1e3 * (time.perf_counter() - start))
    first, second = (statistics.median(record) for record in times)
    return first, second, first / second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    out = parser.parse_args().out
    torch.manual_seed(0)
    rows = []
    kinds = ("plain", "causal", "mask", "gqa", "decode", "window")
    for kind, dtype, head_dim, seqlen in itertools.product(
        kinds, (torch.float32, torch.bfloat16), (64, 128), (128, 1024, 4096)
    ):
        queries = 1 if kind == "decode" else seqlen
        q = torch.randn(1, queries, 8, head_dim, dtype=dtype)
        k, v = (torch.randn(1, seqlen, 2 if kind == "gqa" else 8, head_dim, dtype=dtype) for _ in range(2))
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {"enable_gqa": kind == "gqa"}
        if kind == "causal":
            ours["causal"] = theirs["is_causal"] = True
        if kind == "mask":
            ours["mask"] = theirs["attn_mask"] = torch.rand(1, 1, seqlen, seqlen) > 0.1
        if kind == "window":
            ours |= {"causal": True, "window": (256, 0)}
            position = torch.arange(seqlen)
            distance = position[:, None] - position
            theirs["attn_mask"] = (distance >= 0) & (distance <= 256)
        transposed = [t.transpose(1, 2) for t in (q, k, v)]
        result = regard.attention(q, k, v, backend="cpu", **ours)
        expected = F.scaled_dot_product_attention(*transposed, **theirs).transpose(1, 2)
        torch.testing.assert_close(result, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
        cpu_ms, sdpa_ms, ratio = paired_ratio(
            lambda: regard.attention(q, k, v, backend="cpu", **ours),
            lambda: F.scaled_dot_product_attention(*transposed, **theirs),
            repeats=5 if seqlen == 4096 and kind != "decode" else 40,
        )
        rows.append(dict(kind=kind, dtype=str(dtype), head_dim=head_dim, seqlen=seqlen, cpu_ms=round(cpu_ms, 3),
                         sdpa_ms=round(sdpa_ms, 3), ratio=round(ratio, 3)))  # fmt: skip
        print(rows[-1], flush=True)
    report = dict(processor=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                  torch=torch.__version__, python=platform.python_version(),
                  command="python benchmarks/forward_cpu.py --out reports/cpu_forward.json", rows=rows)  # fmt: skip
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
