"""The Hopper backward in one pass, without a GPU: which tiles its programs take, and where the sums of dQ lie.

`test_hopper_gradients.py` has the whole kernel.
"""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gluon_on_cpu import HOPPER, INTEGERS, Pointer, cdiv, plain
from hopper_calls import DEVICE, config

from regard import AttentionInputs
from regard.backends import hopper
from regard.kernels import hopper_backward as kernels
from regard.kernels import hopper_tuning

# --- Which tiles the programs take

tile_of = plain(kernels.tile_of, gl=INTEGERS)
HEAD_DIMS = ((64, 64), (128, 128), (96, 96), (40, 40), (64, 128), (128, 32))


@pytest.mark.parametrize("section", [1, 2, 3, 7, 100])
def test_every_tile_has_one_index(section):
    for batch, heads_kv, blocks_n in itertools.product((1, 2, 5), (1, 2, 3, 8), (1, 2, 3, 16)):
        total = batch * heads_kv * blocks_n
        tiles = [tile_of(index, blocks_n, batch, heads_kv, section) for index in range(total)]
        everything = itertools.product(range(0, blocks_n * 128, 128), range(heads_kv), range(batch))
        assert sorted(tiles) == sorted(everything)
        heads = [sequence * heads_kv + head_k for _, head_k, sequence in tiles]
        for start in range(0, batch * heads_kv, section):
            mine = slice(start * blocks_n, (start + section) * blocks_n)
            assert {head // section for head in heads[mine]} == {start // section}, "a section's heads stay together"
            keys = [first_key for first_key, *_ in tiles[mine]]
            assert keys == sorted(keys), "with a causal bound the longest come first"


class Taken:
    """A ring that notes what is copied to it."""

    def __init__(self):
        self.copies = []

    def copy(self, step, _desc, place):
        assert step == len(self.copies)
        self.copies.append(tuple(map(int, place)))


class Told(list):
    """A ring that notes of what the consumers are told."""

    publish = list.append


def numbers(values):
    return Pointer(torch.tensor(values, dtype=torch.int32))


def schedule(called, programs, section=3, **pointers):
    """What programs that take turns load: their records, how many tiles they claim, of every one its keys' places, and
    the blocks of queries (sequence, head, block) that come with them.
    """
    index = itertools.count(programs)
    numbers = ("EXISTS", "FIRST_KEY", "HEAD_K", "SEQUENCE", "START_Q", "START_K", "LENGTH_K", "SHIFT", "LOW",
               "FULL_LOW", "FULL_HIGH", "HIGH")  # fmt: skip
    found = []

    def write_record(_records, tile, fields):
        record = {name: int(fields[getattr(kernels, name).value]) for name in numbers[: len(fields)]}
        found[-1].records.append(SimpleNamespace(**record))
        assert tile == len(found[-1].records) - 1

    def load_block(_call, step, plane, head, block, start_q, length_q, rows):
        assert step == len(found[-1].blocks)
        found[-1].blocks.append(tuple(map(int, (plane, head, block, start_q, length_q, rows))))

    def claim_tile(_counter):
        found[-1].claims += 1
        return next(index)

    left, right = called.band
    block_m = hopper_tuning.backward_block_m(called.head_dim, called.head_dim_v)
    absent = dict.fromkeys(("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "kv_lens_ptr", "k_desc", "v_desc", "records"))
    for number in range(programs):
        found.append(SimpleNamespace(records=[], blocks=[], keys=Taken(), values=Taken(), told=Told(), claims=0))
        language = SimpleNamespace(**{**vars(HOPPER["gl"]), "program_id": lambda _axis, number=number: number})
        load_tiles = plain(
            kernels.load_tiles, gl=language, write_record=write_record, load_block=load_block,
            claim_tile=claim_tile, leave_counters=lambda _counter: None,
            clear_loaded=lambda _ring, _step, _valid: None,
        )  # fmt: skip
        call = SimpleNamespace(
            **{**absent, **pointers}, batch=called.batch, heads=called.heads_q, heads_kv=called.heads_kv,
            seqlen_q=called.seqlen_q, seqlen_k=called.seqlen_k, total_q=called.total_q, total_k=called.total_k,
            section=section, counter_ptr=None, window_left=left, right_reach=None if right is None else right + 1,
            BLOCK_M=block_m, keys=found[-1].keys, values=found[-1].values, terms=found[-1].told, queries=None, grads=None,
        )  # fmt: skip
        load_tiles(call)
    return found


def check_schedule(called, taken, tiles):
    """Every tile of ``tiles`` is taken once; its keys come once where some query sees them, with all such blocks."""
    group = called.heads_q // called.heads_kv
    seen = []
    for program in taken:
        *records, last = program.records
        assert program.claims == len(records), "nothing is claimed that is no tile"
        assert last.EXISTS == 0 and not hasattr(last, "HEAD_K"), "and then there are no more"
        assert program.keys.copies == program.values.copies
        assert program.told == list(range(len(program.blocks)))
        copies, blocks = iter(program.keys.copies), iter(program.blocks)
        for tile in records:
            assert tile.EXISTS == 1
            seen.append((tile.SEQUENCE, tile.HEAD_K, tile.FIRST_KEY))
            plane = 0 if called.varlen else tile.SEQUENCE
            if tile.LOW < tile.HIGH:
                assert next(copies) == (plane, tile.HEAD_K, tile.START_K + tile.FIRST_KEY, 0)
            for head, block in itertools.product(range(group), range(tile.LOW, tile.HIGH)):
                length_q = tile.LENGTH_K - tile.SHIFT
                rows = called.total_q if called.varlen else called.seqlen_q
                assert next(blocks) == (plane, tile.HEAD_K * group + head, block, tile.START_Q, length_q, rows)
        assert not list(copies) and not list(blocks)
    assert sorted(seen) == sorted(tiles)


@pytest.mark.parametrize("programs", [1, 4, 12])
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(window=(50, 0)), dict(seqlen_q=40, window=(0, 0))],
                         ids=["plain", "causal", "window", "keys that no query sees"])  # fmt: skip
def test_every_key_tile_is_taken_once(options, programs):
    called = config(batch=3, **options)
    taken = schedule(called, programs)
    check_schedule(called, taken, itertools.product(range(3), range(2), (0, 128)))


PACKED = {
    "few": ((300, 0, 1, 199), (130, 128, 0, 42)),
    "one": ((5,), (300,)),
    "none with keys": ((3, 4), (0, 0)),
    "many": ((1,) * 100, tuple(257 * (number % 5 == 2) for number in range(100))),
    "many without keys": ((7,) * 113, (*(0,) * 70, 130, *(0,) * 40, 1, 129)),
    "a warp's": ((2,) * 64, (0, 128) * 32),
    "a warp's and one": ((2,) * 33, (40,) * 33),
}


@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize("lengths", PACKED)
def test_every_packed_key_tile_is_taken_once(lengths, programs):
    lengths_q, lengths_k = PACKED[lengths]
    starts_q, starts_k = ([0, *itertools.accumulate(each)] for each in (lengths_q, lengths_k))
    called = config(batch=len(lengths_q), varlen=True, seqlen_q=max(lengths_q), seqlen_k=max(lengths_k),
                    total_q=starts_q[-1], total_k=starts_k[-1], causal=True)  # fmt: skip
    taken = schedule(
        called, programs, section=1, cu_seqlens_q_ptr=numbers(starts_q), cu_seqlens_k_ptr=numbers(starts_k)
    )
    tiles = [
        (sequence, head, first) for sequence, head in itertools.product(range(len(lengths_k)), range(2))
        for first in range(0, lengths_k[sequence], 128)
    ]  # fmt: skip
    check_schedule(called, taken, tiles)
    for tile in (tile for program in taken for tile in program.records[:-1]):
        assert starts_q[tile.SEQUENCE] == tile.START_Q and starts_k[tile.SEQUENCE] == tile.START_K


def test_keys_past_kv_lens_are_not_read_but_get_their_zeros():
    called = config(batch=3, kv_lens=True)
    lengths = (0, 70, 10**6)
    taken = schedule(called, 2, kv_lens_ptr=numbers(lengths))
    check_schedule(called, taken, itertools.product(range(3), range(2), (0, 128)))
    for tile in (tile for program in taken for tile in program.records[:-1]):
        assert min(lengths[tile.SEQUENCE], called.seqlen_k) == tile.LENGTH_K
        assert (tile.LOW < tile.HIGH) == (tile.FIRST_KEY < tile.LENGTH_K)


# --- Where the sums of dQ lie


def read_field(records, _tile, field):
    return records[field]


first_sum = plain(kernels.first_sum, gl=INTEGERS, read_field=read_field)
blocks_of_sums = plain(kernels.blocks_of_sums, gl=INTEGERS)


def places_of_sums(called, starts=None):
    """Of all blocks of queries of all heads, their place in the sums, as the kernel reckons it."""
    block_m = hopper_tuning.backward_block_m(called.head_dim, called.head_dim_v)
    call = SimpleNamespace(BLOCK_M=block_m, cu_seqlens_q_ptr=starts, batch=called.batch, heads=called.heads_q,
                           heads_kv=called.heads_kv, seqlen_q=called.seqlen_q, total_q=called.total_q)  # fmt: skip
    group = called.heads_q // called.heads_kv
    places = []
    for sequence, head_k, member in itertools.product(range(called.batch), range(called.heads_kv), range(group)):
        start, stop = (0, called.seqlen_q) if starts is None else starts[sequence : sequence + 2]
        fields = {"HEAD_K": head_k, "SEQUENCE": sequence, "START_Q": start}
        call.records = {getattr(kernels, name).value: value for name, value in fields.items()}
        first = first_sum(call, 0) + member * blocks_of_sums(call)
        places += range(first, first + cdiv(stop - start, block_m))
    return places


def check_places(called, places):
    rows, columns = hopper.query_sums_shape(called)
    block_m = hopper_tuning.backward_block_m(called.head_dim, called.head_dim_v)
    block = block_m * max(64, 1 << (called.head_dim - 1).bit_length()) / columns  # two parts, with the padded columns
    assert len(set(places)) == len(places), "no two blocks overlap"
    assert min(places, default=0) >= 0 and (max(places, default=-1) + 1) * block <= rows, "they lie inside"
    return rows / block


@pytest.mark.parametrize("head_dims", HEAD_DIMS)
def test_sums_of_batches_lie_side_by_side(head_dims):
    for batch, group, seqlen_q in itertools.product((1, 3), (1, 4), (1, 64, 65, 128, 300)):
        called = config(*head_dims, batch=batch, heads_q=2 * group, seqlen_q=seqlen_q)
        places = places_of_sums(called)
        assert check_places(called, places) == len(places), "and there is no gap"


@pytest.mark.parametrize("head_dims", HEAD_DIMS)
def test_sums_of_packed_sequences_do_not_overlap(head_dims):
    chance = random.Random(0)
    somewhere = [
        [chance.choice((0, 1, 63, 64, 65, 127, 128, 129, chance.randrange(700))) for _ in range(chance.randint(1, 12))]
        for _ in range(300)
    ]
    for lengths in [[0], [0, 0, 0], [1] * 200, [64] * 5, [127] * 9, [129] * 9, [127, 1, 127, 129], *somewhere]:
        starts = [0, *itertools.accumulate(lengths)]
        called = config(*head_dims, batch=len(lengths), heads_q=4, varlen=True, total_q=starts[-1], total_k=7,
                        seqlen_q=max(lengths))  # fmt: skip
        check_places(called, places_of_sums(called, starts))


def as_threads_hold_it(product):
    """Of a warpgroup's product (64, N), what each thread holds: (tiles of 8 columns, threads, 4), from PTX ISA, wgmma,
    accumulator fragment of m64nNk16.
    """
    thread, register = torch.arange(128)[:, None], torch.arange(product.shape[1] // 2)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    column = thread % 4 * 2 + register // 4 * 8 + register % 2
    return product[row, column].unflatten(1, (-1, 4)).transpose(0, 1)


@pytest.mark.parametrize("columns", [32, 64])
def test_what_a_warpgroup_adds_lies_as_its_threads_hold_it(columns):
    """16 bytes of one thread after the other's, so that no two of them meet in a bank of shared memory."""
    dq = torch.arange(64 * columns).view(64, columns)
    stored, placed = [], []
    add_query_gradient = plain(
        kernels.add_query_gradient, fence_async_shared=lambda: None, tma=SimpleNamespace(store_wait=lambda _: None),
        reduce_out=lambda _desc, place, _part: placed.append(place),
        view_as=lambda *_: SimpleNamespace(store=stored.append),
    )  # fmt: skip
    shape = (columns // 2, 128)
    call = SimpleNamespace(dq_desc=SimpleNamespace(block_type=SimpleNamespace(shape=shape), layout=None),
                           stages_out=SimpleNamespace(index=lambda _: None))  # fmt: skip
    add_query_gradient(call, 1, dq, 7)
    assert placed == [[15 * shape[0], 0]] and stored[0].shape == shape
    assert torch.equal(stored[0].flatten(), as_threads_hold_it(dq).flatten())


def padded(columns):
    return max(64, 1 << (columns - 1).bit_length())


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("head_dims", HEAD_DIMS)
def test_finishing_undoes_the_order_of_the_sums(head_dims, packed):
    """And what lies between the sequences' blocks, or past their ends, is not used."""
    lengths = (70, 0, 130, 1, 128) if packed else (150, 150)
    starts = [0, *itertools.accumulate(lengths)]
    options = dict(varlen=True, total_q=starts[-1], total_k=9) if packed else {}
    called = config(*head_dims, batch=len(lengths), seqlen_q=max(lengths), heads_q=2, softmax_scale=0.375,
                    **options)  # fmt: skip
    block_m = hopper_tuning.backward_block_m(*head_dims)
    columns = padded(called.head_dim) // (1 if block_m == 128 else 2)
    sums = torch.full(hopper.query_sums_shape(called), math.nan)
    truth = torch.randn(starts[-1], 2, called.head_dim, generator=torch.Generator().manual_seed(0))
    blocks = [(sequence, head, block) for sequence, head in itertools.product(range(len(lengths)), range(2))
              for block in range(cdiv(lengths[sequence], block_m))]  # fmt: skip
    for (sequence, head, block), place in zip(blocks, places_of_sums(called, starts if packed else None), strict=True):
        whole = torch.full((block_m, padded(called.head_dim)), math.nan)
        part = truth[starts[sequence] : starts[sequence + 1], head][block * block_m :][:block_m]
        whole[: len(part), : called.head_dim] = part
        for half in range(2):
            mine = whole[half * 64 :][:64] if block_m == 128 else whole[:, half * columns :][:, :columns]
            sums.view(-1, 64 * columns)[2 * place + half] = as_threads_hold_it(mine).flatten()
    offsets = torch.tensor(starts, dtype=torch.int32, device=DEVICE) if packed else None
    dq = torch.full(truth.shape if packed else (2, 150, *truth.shape[1:]), math.inf, device=DEVICE)
    given = AttentionInputs(dq, dq, dq, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
    hopper.finish_launch(called, given, sums.to(DEVICE), dq).run(dq.device)
    assert torch.equal(dq.view(truth.shape).cpu(), truth * 0.375)
