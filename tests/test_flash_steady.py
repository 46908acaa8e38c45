"""The forward whose interior keeps the maxima of the edges, and the tiles that come again, against the reference."""

import math

import pytest
import torch

pytest.importorskip("triton")

import regard
from regard import AttentionConfig, AttentionInputs
from regard.backends import flash, flash_launches
from regard.kernels import forward, tuning
from regard.kernels.scores import GROWTH
from regard.testing import Case, check_forward

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # NumPy's

CASES = [
    Case("plain", head_dim=64, seqlen_q=70, seqlen_k=200),
    Case("whole_tiles", head_dim=64, seqlen_q=64, seqlen_k=256, layout="bhsd"),
    Case("one_key", head_dim=64, seqlen_k=1),
    Case("no_keys", head_dim=64, seqlen_k=0),
    Case("causal", head_dim=64, seqlen_q=200, seqlen_k=200, causal=True),
    Case("causal_first_row_ends_with_a_block", head_dim=64, seqlen_q=129, seqlen_k=192, causal=True),
    Case("causal_more_queries_than_keys", head_dim=64, seqlen_q=190, seqlen_k=66, causal=True),
    Case("causal_fewer_queries_than_keys", head_dim=64, seqlen_q=66, seqlen_k=300, causal=True),
    Case("window", head_dim=64, seqlen_q=300, seqlen_k=300, window=(150, 0)),
    Case("band", head_dim=64, seqlen_q=200, seqlen_k=260, window=(140, 70), sinks=True),
    Case("left", head_dim=64, seqlen_q=200, seqlen_k=260, window=(140, None)),
    Case("right", head_dim=64, seqlen_q=200, seqlen_k=260, window=(None, 7)),
    Case("packed", head_dim=64, lens_q=(70, 0, 133), lens_k=(167, 5, 212), causal=True),
    Case("lengths", head_dim=64, seqlen_q=70, seqlen_k=300, kv_lens=(250, 0), causal=True),
    Case("pages", head_dim=64, kv_lens=(150, 220), page_size=16, seqlen_k=256, seqlen_q=130),
    Case("dropout", head_dim=64, seqlen_k=200, dropout_p=0.2),
    Case("narrow", head_dim=40, head_dim_v=24, seqlen_q=70, seqlen_k=200, heads_q=4, heads_kv=2),
    Case("wide", head_dim=128, seqlen_q=70, seqlen_k=200, causal=True),
    Case("large_scores", head_dim=64, seqlen_q=70, seqlen_k=300, logits=40.0),
    Case("nan_query", head_dim=64, seqlen_k=200, nan_query=True),
]


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """The tiles of sm90 for long calls, all of which keep maxima."""
    if torch.cuda.is_available():
        pytest.skip("device: got cuda, needs cpu (the interpreter, which takes any architecture's tiles)")
    monkeypatch.setattr(flash_launches, "_INTERPRETER_ARCH", "sm90")
    steady = {
        entry: tuple(rule._replace(min_seqlen_k=0) for rule in rules if rule.tile.steady or not rule.min_seqlen_k)
        for entry, rules in tuning.FORWARD.items()
    }
    monkeypatch.setattr(tuning, "FORWARD", steady)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward(case, monkeypatch):
    made = []

    def forward_launches(*given, launches=flash.forward_launches):
        made.append(launches(*given))
        return made[-1]

    monkeypatch.setattr(flash, "forward_launches", forward_launches)
    check_forward("flash", case, dtype=torch.bfloat16)
    assert {launches[0].arguments["STEADY"] for launches in made} == ({True} if case.seqlen_k else set())


def rising(units):
    """A call whose first key scores so many units of log2 above all others, which score 0."""
    q, k = torch.zeros(1, 150, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 200, 1, 64, dtype=torch.bfloat16)
    q[..., 0] = 1
    v = torch.randn(1, 200, 1, 64).bfloat16()
    k[:, 0, :, 0] = units
    config = AttentionConfig.from_tensors(q, k, v, softmax_scale=0.6931471805599453)
    return config, AttentionInputs(q, k, v)


@pytest.fixture
def came_again(monkeypatch):
    """Whether each tile came again, in the order of the launch."""
    found = []

    def has_grown(row_sum, has_grown=forward.has_grown):
        found.append(bool(has_grown(row_sum)))
        return found[-1]

    monkeypatch.setattr(forward, "has_grown", has_grown)
    return found


@pytest.mark.parametrize(("units", "again"), [(40, False), (50, True), (3000, True)])
def test_tiles_whose_sums_grow_too_far_come_again(units, again, came_again):
    config, inputs = rising(units)
    inputs.q[:, :128] = 0  # the first tile: all its scores are alike
    out, lse = flash.FlashBackend().forward(config, inputs)
    assert came_again == [False, again]
    assert again == (units > math.log2(GROWTH.value))
    expected, expected_lse = regard.attention(*inputs[:3], softmax_scale=config.softmax_scale, return_lse=True,
                                              backend="reference")  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [dict(softcap=5.0), dict(bias_shape=(1, 1, 1, 200), bias_dtype=torch.bfloat16), dict(mask_shape=(1, 1, 1, 200)),
     dict(alibi=True), dict(dtype=torch.float16), dict(softmax_scale=-1.0)],
    ids=str,
)  # fmt: skip
def test_maxima_follow_where_they_must(given):
    config = AttentionConfig(
        **{
            **dict(batch=1, seqlen_q=70, seqlen_k=200, heads_q=1, heads_kv=1, head_dim=64, dtype=torch.bfloat16),
            **given,
        }
    )
    assert not flash_launches._keeps_maxima(config)
