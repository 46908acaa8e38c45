"""The dropout generator of the reference and the one Triton compiles give the same words."""

import pytest
import torch

from regard.backends.reference import _philox

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTERS = [(0, 0, 0), (1, 2, 3), (0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF), (123456789, 987654321, 5)]


@triton.jit
def philox_words(seed_ptr, counters_ptr, words_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    c0 = tl.load(counters_ptr + at)
    c1 = tl.load(counters_ptr + N + at)
    c2 = tl.load(counters_ptr + 2 * N + at)
    word0, word1, word2, word3 = tl.philox(tl.load(seed_ptr), c0, c1, c2, tl.zeros([N], tl.int32))
    tl.store(words_ptr + at, word0)
    tl.store(words_ptr + N + at, word1)
    tl.store(words_ptr + 2 * N + at, word2)
    tl.store(words_ptr + 3 * N + at, word3)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 + 7, 2**63 - 1])
def test_philox_equals_tritons(seed):
    counters = torch.tensor(COUNTERS, dtype=torch.int32, device=DEVICE).T.contiguous()
    words = torch.zeros(4, len(COUNTERS), dtype=torch.int32, device=DEVICE)
    philox_words[(1,)](torch.tensor([seed], device=DEVICE), counters, words, len(COUNTERS))
    expected = _philox(torch.tensor([seed]), *counters.cpu().long())
    assert torch.equal(words.cpu().long() & 0xFFFFFFFF, torch.stack(expected))
