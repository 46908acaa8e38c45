"""The tile table is complete, reachable and well-formed."""

import itertools

import pytest

from regard.kernels import tuning

TRITON_VERSIONS = [(3, minor) for minor in range(6, 10)]
ENTRIES = list(itertools.product(tuning.ARCHITECTURES, (2, 4), tuning.HEAD_DIMS))
TABLES = {"forward": tuning.FORWARD, "keys": tuning.BACKWARD_KEYS, "queries": tuning.BACKWARD_QUERIES}
RULES = [(name, entry, rule) for name, table in TABLES.items() for entry, rules in table.items() for rule in rules]


def calls(
    seqlens_k, triton_versions=tuple(TRITON_VERSIONS), by_tma=(False, True), steady=(False, True), rows=(1, 17, 512)
):
    """Every kind of call with these."""
    flags = (False, True)
    kinds = itertools.product(flags, seqlens_k, triton_versions, flags, by_tma, steady, rows, flags)
    return itertools.starmap(tuning.Call, kinds)


def power_of_two(value):
    return value & (value - 1) == 0


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_call_has_a_tile(table, entry):
    for call in calls((0, 1, 512, 2**20), (*TRITON_VERSIONS, (4, 0))):
        assert isinstance(tuning.select_tile(TABLES[table], *entry, call), tuning.Tile)


@pytest.mark.parametrize("table", TABLES)
def test_the_table_has_no_entry_that_nothing_asks_for(table):
    assert set(TABLES[table]) <= set(ENTRIES)


@pytest.mark.parametrize(("table", "entry", "rule"), RULES, ids=str)
def test_every_rule_is_the_first_that_applies_somewhere(table, entry, rule):
    rules = TABLES[table][entry]
    found = (next((r for r in rules if r.applies(call)), None) for call in calls({512, rule.min_seqlen_k}))
    assert any(first is rule for first in found)


@pytest.mark.parametrize(("table", "entry", "rule"), RULES, ids=str)
def test_tiles_are_what_a_kernel_can_be_launched_with(table, entry, rule):
    tile = rule.tile
    assert all(map(power_of_two, (tile.block_m, tile.block_n, tile.num_warps, tile.dims)))
    assert min(tile.block_m, tile.block_n, tile.dims) >= 16, "a matrix instruction's smallest extent"
    assert tile.block_m <= 256 and tile.block_n <= 256, "the launcher's bound on 32-bit offsets inside a tile"
    assert 1 <= tile.num_warps <= 16
    assert 0 <= tile.num_stages <= 5
    assert tile.block_n % tile.row_sums == 0
    assert tile.programs >= 1


@pytest.mark.parametrize(("table", "entry", "rule"), RULES, ids=str)
def test_a_tile_is_by_tma_only_where_the_call_and_the_gpu_can(table, entry, rule):
    arch, _, _ = entry
    assert not rule.tile.by_tma or arch in ("sm90", "sm100", "sm120")
    assert not any(tuning.select_tile(TABLES[table], *entry, c).by_tma for c in calls((512,), by_tma=(False,)))


@pytest.mark.parametrize(("table", "entry", "rule"), RULES, ids=str)
def test_maxima_stay_only_where_the_call_allows_it(table, entry, rule):
    assert not rule.tile.steady or (table == "forward" and not rule.tile.one_loop)
    found = calls((512, 2**20), steady=(False,))
    assert not any(tuning.select_tile(TABLES[table], *entry, call).steady for call in found)


@pytest.mark.parametrize(
    ("arch", "served_by"),
    [
        *[(arch, arch) for arch in tuning.ARCHITECTURES],
        ("sm86", "sm89"),
        ("sm121", "sm120"),
        ("gfx1101", "gfx1100"),
        ("gfx1200", "gfx1201"),
    ],
)
def test_architectures_and_aliases_resolve(arch, served_by):
    assert tuning.table_architecture(arch) == served_by


@pytest.mark.parametrize("arch", ["cpu", "sm70", "sm75", "gfx908", "gfx1030", "gfx9", ""])
def test_unknown_architecture_has_no_entry(arch):
    assert tuning.table_architecture(arch) is None


def test_a_head_dim_is_served_by_the_next_larger_entry():
    assert [tuning.table_head_dim(d) for d in (1, 64, 65, 80, 128, 129, 256)] == [64, 64, 128, 128, 128, 256, 256]


def test_padded_head_dims_are_powers_of_two_a_matrix_instruction_takes():
    padded = {d: tuning.padded_head_dim(d) for d in range(1, 257)}
    assert all(power_of_two(p) and p >= max(d, 16) and (p < 2 * d or p == 16) for d, p in padded.items())
