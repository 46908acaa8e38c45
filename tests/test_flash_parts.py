"""Products over the head dim made part by part, as on gfx1100, against the reference; only an interpreter runs them here."""

import pytest
import torch

from regard.backends import flash_launches
from regard.kernels import tuning
from regard.testing import Case, check_backward, check_forward

TABLES = (tuning.FORWARD, tuning.BACKWARD_KEYS, tuning.BACKWARD_QUERIES)
CASES = [
    Case("whole_parts", batch=1, head_dim=256, causal=True, seqlen_q=41, seqlen_k=85, heads_q=4),
    Case(
        "a_cut_part_and_an_absent_one", batch=1, head_dim=130, head_dim_v=72, window=(30, 6), seqlen_q=71, seqlen_k=69
    ),
    Case("one_side_in_parts", batch=1, head_dim=24, head_dim_v=200, seqlen_q=19, seqlen_k=83, bias="1hqk", sinks=True),
    Case("packed", lens_q=(9, 0, 33), lens_k=(67, 5, 12), head_dim=111, causal=True, dropout_p=0.2),
    Case(
        "masked_and_padded",
        head_dim=96,
        mask="b1qk",
        kv_lens=(50, 7),
        softcap=4.0,
        alibi="h",
        strides="head_dim_every_other",
    ),
]


@pytest.fixture(autouse=True)
def tiles_of_gfx1100(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("device: got cuda, needs cpu (the interpreter, which takes any architecture's tiles)")
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", "gfx1100")


def test_gfx1100_has_tiles_with_parts():
    assert all(table["gfx1100", 2, dim][-1].tile.dims < dim for table in TABLES for dim in (128, 256))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case):
    assert check_backward("flash", case, "cpu", torch.float16).status == "passed"


def test_pages():
    case = Case("pages", head_dim=256, kv_lens=(50, 20), page_size=16, seqlen_k=64, seqlen_q=3, causal=True)
    assert check_forward("flash", case, "cpu", torch.bfloat16).status == "passed"
