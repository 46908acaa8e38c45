"""Training steps of a Llama of 1.2 billion parameters with attention by `regard`, by torch's sdpa and by eager code.

    python examples/train_llama.py --out FILE

Random weights in the shape of Llama-3.2-1B with a vocabulary of 32000, bfloat16, one sequence, no gradient
checkpointing, AdamW. Every implementation starts from the same seed and sees the same tokens. Reports the median step
time, the peak memory, the losses and the norms of the attention layers' first gradients; out of memory is a result too.
``--tiny`` runs two small layers in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import regard
from regard.integrations.transformers import register

IMPLEMENTATIONS = ("regard", "sdpa", "eager")
LOSSES_COMPARED = 3  # later ones drift apart, as rounding differences pass through more and more updates
# What the rounding of activations amounts to: one unit in the last place of the loss, a few of a sum over gradients.
LOSS_TOLERANCE = {torch.bfloat16: 2**-8, torch.float32: 1e-5}
GRADIENT_TOLERANCE = {torch.bfloat16: 2**-5, torch.float32: 1e-3}

SHAPE = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=32000, tie_word_embeddings=True, use_cache=False,
)  # fmt: skip
TINY = SHAPE | dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=97,
)  # fmt: skip


def measure(
    implementation: str, shape: dict[str, Any], length: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Train on one sequence of random tokens; the first step, which compiles kernels, is left out of the median."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=length)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype_on(device))
        model.train()
        tokens = torch.randint(config.vocab_size, (1, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    projections = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    losses, seconds, gradient_norms = [], [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with regard.record_selections() as record:
        for _ in range(steps):
            synchronize(device)
            started = time.perf_counter()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            if not gradient_norms:
                gradient_norms = [weight.grad.float().norm().item() for weight in projections]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
            losses.append(loss.item())
    return dict(
        losses=losses,
        first_gradient_norms_of_q_proj=gradient_norms,
        median_step_seconds=statistics.median(seconds[1:] or seconds),
        step_seconds=seconds,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        parameters=sum(p.numel() for p in model.parameters()),
        regard_backends=sorted({selection.backend for _, selection in record}),
        regard_why=sorted({selection.why for _, selection in record}),
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure_or_say_why_not(implementation: str, *arguments: Any) -> dict[str, Any]:
    """`measure`, where running out of device memory is a result; leaves no memory behind."""
    try:
        return measure(implementation, *arguments)
    except torch.OutOfMemoryError as error:
        return dict(out_of_memory=str(error).split(". GPU")[0])
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def distances_from_regard(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How far the first losses and the first gradients' norms of each implementation are from regard's, relatively."""
    ran = {name: result for name, result in results.items() if "losses" in result}
    ours = ran.pop("regard", None)
    if ours is None:
        return {}

    def furthest(values: list[float], reference: list[float]) -> float:
        return max(abs(value - wanted) / abs(wanted) for value, wanted in zip(values, reference, strict=True))

    gradients = "first_gradient_norms_of_q_proj"
    return {
        name: dict(
            losses=furthest(ours["losses"][:LOSSES_COMPARED], result["losses"][:LOSSES_COMPARED]),
            gradients=furthest(ours[gradients], result[gradients]),
        )
        for name, result in ran.items()
    }


def check_distances(report: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise an AssertionError where losses or gradients differ by more than the rounding of the dtype."""
    for length, part in report["lengths"].items():
        for name, distance in part["distances_from_regard"].items():
            agree = distance["losses"] <= LOSS_TOLERANCE[dtype] and distance["gradients"] <= GRADIENT_TOLERANCE[dtype]
            assert agree, f"regard and {name} differ at length {length}, relatively: {distance}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON. Returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--length", type=int, nargs="+", default=[8192], help="tokens of the sequence; several: each")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--tiny", action="store_true", help="two small layers on the CPU, to try the script")
    parser.add_argument("--commit", default="", help="commit to record")
    chosen = parser.parse_args(arguments)
    device = torch.device("cpu" if chosen.tiny else "cuda")
    if not chosen.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny runs on the CPU")
    register()
    report: dict[str, Any] = dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__, transformers=transformers.__version__, commit=chosen.commit,
        shape=TINY if chosen.tiny else SHAPE, lengths={},
    )  # fmt: skip
    print("length  attention   step (ms)   peak (GiB)   first losses")
    for length in chosen.length:
        results = {}
        for name in chosen.implementation:
            result = results[name] = measure_or_say_why_not(name, report["shape"], length, chosen.steps, device)
            print(f"{length:6d}  {name:9s} {describe(result)}", flush=True)
        distances = distances_from_regard(results)
        for name, distance in distances.items():
            apart = ", ".join(f"{what} {value:.1e}" for what, value in distance.items())
            print(f"{'':8s}{name} from regard, relatively: {apart}")
        report["lengths"][length] = dict(results=results, distances_from_regard=distances)
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    check_distances(report, dtype_on(device))
    return report


def describe(result: dict[str, Any]) -> str:
    if "out_of_memory" in result:
        return f"  out of memory: {result['out_of_memory']}"
    peak = result["peak_memory_bytes"]
    memory = f"{peak / 2**30:10.2f}" if peak is not None else f"{'-':>10s}"
    losses = " ".join(f"{loss:.5f}" for loss in result["losses"][:LOSSES_COMPARED])
    served = f"   by {', '.join(result['regard_backends'])}" if result["regard_backends"] else ""
    return f"{1e3 * result['median_step_seconds']:11.1f} {memory}     {losses}{served}"


if __name__ == "__main__":
    main()
