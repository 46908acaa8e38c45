"""The tile table: which block sizes each kernel runs with, as data.

A pure function of the problem and the architecture, so that it can be read and tested without a GPU and nothing is
tuned at run time. `tests/arch` compiles every entry for its target and records registers, shared memory and spills.
"""

from __future__ import annotations

from typing import Any, NamedTuple

HEAD_DIMS = (64, 128, 256)
"""Head dims the table distinguishes; a head dim uses the next larger entry."""

ARCHITECTURES = ("sm80", "sm89", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")

_ALIASES = {
    "sm86": "sm89",
    "sm87": "sm89",
    "sm103": "sm100",
    "sm121": "sm120",
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
    "gfx1103": "gfx1100",
    "gfx1150": "gfx1100",
    "gfx1151": "gfx1100",
    "gfx1200": "gfx1201",
}

MANY_ROWS = 1 << 31

MOST_SPLITS = 128
_LEAST_KEYS = 1024  # of a tile that is split: below, merging costs what it saves
_LEAST_SPLIT_KEYS = 256
_SMALL_OUTPUT = 512  # rows of it, in all heads
_SMALL_OUTPUT_SPLIT_KEYS = 128
_ROWS_MERGED_PER_KEY = 8  # while a tile attends to one key more: splits must save more keys than merging costs


class Tile(NamedTuple):
    """A tile of BLOCK_M queries by BLOCK_N keys, the warps that work on it and the depth of its load pipeline.

    dims: head dims of a product over the head dim that are multiplied at once. A tile with more of them is not held in
    registers while others stream past it, but read again, part by part, for each.
    row_sums: parts that the forward keeps the sum of a row's weights in to the end. Of an accumulator of mma or wgmma a
    thread has two columns in eight: two of eight parts are its own, and nothing moves between threads before the end.
    by_tma: tiles of Q, K, V and dO are brought by TMA, which costs no thread addresses, bounds or registers. The call's
    tensors must be such as it can read.
    one_loop: the forward masks its interior too, in one loop with the edges.
    steady: the forward keeps the maxima of the edges, see `forward.steady_softmax`. The call must allow it.
    terms_together: the pass for dK and dV brings both row terms of its queries in one load, see `load_row_terms`.
    programs: that a multiprocessor should have at a time; keys are split for as many.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    dims: int = 256
    row_sums: int = 1
    by_tma: bool = False
    one_loop: bool = False
    steady: bool = False
    terms_together: bool = False
    programs: int = 2


class Call(NamedTuple):
    """What rules look at.

    causal: whether the right side of the band is bounded.
    seqlen_k: keys a query may reach: the longest sequence's length, or the window's.
    triton_version: (major, minor).
    aligned: whether Triton can tell that rows start at multiples of 16 bytes.
    by_tma: whether TMA can bring the tiles.
    steady: whether the forward's maxima may stay.
    rows: of a sequence's queries, in all heads that share a tile.
    paged: whether keys lie in pages.
    """

    causal: bool
    seqlen_k: int
    triton_version: tuple[int, int]
    aligned: bool = True
    by_tma: bool = False
    steady: bool = False
    rows: int = MANY_ROWS
    paged: bool = False


class Rule(NamedTuple):
    """A tile and when it applies: one by TMA only where that can bring the tiles, a steady one only where maxima may
    stay. Of several rules the first wins.
    """

    tile: Tile
    causal: bool | None = None
    min_seqlen_k: int = 0
    min_triton: tuple[int, int] = (3, 6)
    aligned: bool | None = None
    max_rows: int = MANY_ROWS
    paged: bool | None = None

    def applies(self, call: Call) -> bool:
        """Whether a call falls under this rule."""
        return (
            self.causal in (None, call.causal)
            and call.seqlen_k >= self.min_seqlen_k
            and call.triton_version >= self.min_triton
            and self.aligned in (None, call.aligned)
            and self.tile.by_tma <= call.by_tma
            and self.tile.steady <= call.steady
            and call.rows <= self.max_rows
            and self.paged in (None, call.paged)
        )


def _rules(*tile: int, **options: int) -> tuple[Rule, ...]:
    return (Rule(Tile(*tile, **options)),)


TileTable = dict[tuple[str, int, int], tuple[Rule, ...]]
"""(architecture, bytes per element, head dim) -> rules"""

FORWARD: TileTable = {
    # mma.sync: Triton lays the warps along the queries, without shared rows, only where BLOCK_M >= head dim. With rows
    # shared, and in layouts of other kinds, row sums in parts take more registers and more steps between threads.
    ("sm80", 2, 64): _rules(128, 64, 4, 3),
    ("sm80", 2, 128): _rules(128, 64, 8, 2, row_sums=8),
    ("sm80", 2, 256): _rules(64, 64, 8, 2),
    ("sm89", 2, 64): _rules(128, 64, 8, 2, row_sums=8),
    ("sm89", 2, 128): _rules(128, 32, 8, 2, row_sums=8),
    ("sm89", 2, 256): _rules(64, 64, 8, 1),
    # Measured on an H200: two or more small programs on a multiprocessor overlap one's softmax with the other's
    # products.
    # Rows that cannot be copied asynchronously go through registers, where Triton 3.6's wgmma gives wrong results for
    # some pairs of head dims (40 with 24); 32 queries a tile select the older matrix instruction, which does not.
    # Where maxima stay TMA pays at every head dim, and programs of twice as many queries do at 64: there is less to
    # overlap. Without, TMA is slower at 64 and not measured at 256. A window of 1024 makes short programs, of which one
    # more fits beside a shorter pipeline.
    ("sm90", 2, 64): (
        Rule(Tile(128, 64, 8, 3, row_sums=8, by_tma=True, steady=True), causal=False, min_seqlen_k=1024),
        Rule(Tile(128, 64, 8, 3, row_sums=8, by_tma=True, steady=True), causal=True, min_seqlen_k=2048),
        Rule(Tile(64, 64, 4, 2, row_sums=8, by_tma=True, steady=True), causal=True, min_seqlen_k=1025),
        Rule(Tile(32, 64, 4, 2), aligned=False),
        Rule(Tile(64, 128, 4, 3, row_sums=8), max_rows=128, paged=True),
        Rule(Tile(64, 64, 4, 3, row_sums=8), max_rows=64),
        Rule(Tile(64, 64, 4, 3, row_sums=8, steady=True), min_seqlen_k=1025),
        Rule(Tile(128, 64, 8, 3, row_sums=8), causal=True, min_seqlen_k=8192),
        Rule(Tile(64, 64, 4, 3, row_sums=8)),
    ),
    # By TMA, registers hold no addresses, and one masked loop is faster.
    ("sm90", 2, 128): (
        Rule(Tile(64, 64, 4, 3, row_sums=8, by_tma=True, steady=True), min_seqlen_k=1024),
        Rule(Tile(64, 64, 4, 3, row_sums=8, by_tma=True, one_loop=True), causal=True),
        Rule(Tile(64, 64, 4, 3, row_sums=8, by_tma=True)),
        Rule(Tile(32, 64, 4, 2), aligned=False),
        Rule(Tile(64, 64, 4, 3, row_sums=8, steady=True), min_seqlen_k=2048),
        Rule(Tile(64, 64, 4, 3, row_sums=8)),
    ),
    ("sm90", 2, 256): (
        Rule(Tile(32, 64, 4, 2), max_rows=64),
        Rule(Tile(128, 64, 8, 2, by_tma=True, steady=True), min_seqlen_k=1024),
        Rule(Tile(32, 32, 4, 2), aligned=False),
        Rule(Tile(128, 64, 8, 2, steady=True), min_seqlen_k=2048),
        Rule(Tile(128, 64, 8, 2), min_seqlen_k=1024),
        Rule(Tile(128, 32, 8, 3)),
    ),
    ("sm100", 2, 64): _rules(128, 64, 8, 3),
    ("sm100", 2, 128): _rules(128, 64, 8, 2),
    ("sm100", 2, 256): _rules(128, 32, 8, 2),
    ("sm120", 2, 64): _rules(128, 64, 8, 2, row_sums=8),
    ("sm120", 2, 128): _rules(128, 32, 8, 2, row_sums=8),
    ("sm120", 2, 256): _rules(64, 64, 8, 1),
    ("gfx90a", 2, 64): _rules(128, 64, 4, 1),
    ("gfx90a", 2, 128): _rules(128, 64, 4, 1),
    ("gfx90a", 2, 256): _rules(128, 32, 8, 1),
    ("gfx942", 2, 64): _rules(128, 64, 4, 1),
    ("gfx942", 2, 128): _rules(128, 64, 4, 1),
    ("gfx942", 2, 256): _rules(128, 32, 8, 1),
    ("gfx950", 2, 64): _rules(128, 64, 4, 1),
    ("gfx950", 2, 128): _rules(128, 64, 4, 1),
    ("gfx950", 2, 256): _rules(128, 32, 8, 1),
    # WMMA: 16 query rows a warp, or several warps compute the same rows. Triton 3.9 transposes V in registers where the
    # tile has 32 keys or more; else, and in 3.6, V is read from LDS two bytes at a time. gfx11 keeps an operand twice,
    # in both halves of a wave: 16 rows of Q with 256 head dims take half of the registers, hence the parts of it.
    ("gfx1100", 2, 64): _rules(128, 64, 8, 1),
    ("gfx1100", 2, 128): _rules(128, 64, 8, 1, 64),
    ("gfx1100", 2, 256): _rules(128, 64, 8, 1, 32),
    ("gfx1201", 2, 64): _rules(128, 64, 8, 1),
    ("gfx1201", 2, 128): _rules(128, 64, 8, 1),
    ("gfx1201", 2, 256): (Rule(Tile(128, 32, 8, 1), min_triton=(3, 9)), Rule(Tile(128, 16, 8, 1))),
}

FEW_ROWS = 16
"""As many as one matrix instruction multiplies."""


def _few(*tile: int, programs: int = 2, **call: Any) -> Rule:
    return Rule(Tile(*tile, programs=programs), max_rows=FEW_ROWS, **call)


# Few rows are bound by memory: a tile of more would only take room from keys on their way. Addresses of paged keys come
# from memory first, which programs side by side hide. Measured on an H200; elsewhere what shared memory or registers
# have room for.
_FEW_ROWS_RULES: dict[str, dict[int, tuple[Rule, ...]]] = {
    "sm80": {64: (_few(16, 64, 2, 3),), 128: (_few(16, 64, 4, 3, programs=1),), 256: (_few(16, 64, 4, 2, programs=1),)},
    "sm89": {64: (_few(16, 64, 2, 3),), 128: (_few(16, 64, 4, 2, programs=1),), 256: (_few(16, 32, 4, 2, programs=1),)},
    "sm90": {
        64: (_few(16, 128, 4, 3, programs=4, paged=True), _few(16, 64, 2, 3)),
        128: (
            _few(16, 64, 2, 3, programs=4, paged=True),
            _few(16, 128, 4, 3, programs=1, min_seqlen_k=1024),
            _few(16, 64, 4, 4, programs=1),
        ),
        256: (_few(16, 64, 4, 2, paged=True), _few(16, 64, 4, 3, programs=1)),
    },
    "gfx9": {64: (_few(16, 64, 4, 1),), 128: (_few(16, 64, 4, 1),), 256: (_few(16, 32, 4, 1),)},
    "gfx1100": {64: (_few(16, 64, 4, 1),), 128: (_few(16, 32, 4, 1),), 256: (_few(16, 32, 4, 1, 128),)},
    "gfx1201": {64: (_few(16, 64, 4, 1),), 128: (_few(16, 32, 4, 1),), 256: (_few(16, 32, 4, 1),)},
}
_ALIKE = {"sm100": "sm90", "sm120": "sm89", "gfx90a": "gfx9", "gfx942": "gfx9", "gfx950": "gfx9"}

for (_arch, _, _head_dim), _wider in tuple(FORWARD.items()):
    FORWARD[_arch, 2, _head_dim] = (*_FEW_ROWS_RULES[_ALIKE.get(_arch, _arch)][_head_dim], *_wider)

# float32 products run on the plain FMA units unless torch's matmul precision allows tf32: small tiles, few registers.
# Fewer than 64 queries also keep Triton 3.6 off sm100's tcgen05, where it rounds float32 to tf32 unasked.
_FLOAT32 = {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 32, 4, 1)}
_FLOAT32_RDNA = {64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)}
_FLOAT32_CDNA = {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)}  # these have float32 MFMA
_FLOAT32_TILES = {"sm": _FLOAT32, "gfx9": _FLOAT32_CDNA, "gfx1": _FLOAT32_RDNA}


def _float32_rules(tiles_of: dict[str, dict[int, tuple[int, int, int, int]]]) -> TileTable:
    """Entries for 4-byte elements from tiles by family of architectures and head dim."""
    return {
        (arch, 4, head_dim): _rules(*tile)
        for arch in ARCHITECTURES
        for family, tiles in tiles_of.items()
        if arch.startswith(family)
        for head_dim, tile in tiles.items()
    }


FORWARD.update(_float32_rules(_FLOAT32_TILES))

# The passes of the backward. KEYS: dK and dV, whose accumulators are as long as the tile has keys; QUERIES: dQ.
# Rows through registers: as in the forward, with few enough rows of either kind.
_UNALIGNED = Rule(Tile(32, 32, 4, 2), aligned=False)
BACKWARD_KEYS: TileTable = {
    ("sm80", 2, 64): _rules(64, 128, 8, 2),
    ("sm80", 2, 128): _rules(64, 64, 8, 2),
    ("sm80", 2, 256): _rules(32, 64, 8, 2),
    ("sm89", 2, 64): _rules(32, 128, 8, 2),
    ("sm89", 2, 128): _rules(32, 64, 8, 2),
    ("sm89", 2, 256): _rules(32, 32, 8, 1),
    # Measured on an H200, and so below: small programs, of which several fit a multiprocessor.
    ("sm90", 2, 64): (_UNALIGNED, Rule(Tile(64, 64, 4, 2, terms_together=True))),
    ("sm90", 2, 128): (_UNALIGNED, Rule(Tile(64, 64, 4, 2, terms_together=True))),
    ("sm90", 2, 256): (Rule(Tile(64, 64, 8, 2, by_tma=True)), _UNALIGNED, Rule(Tile(64, 64, 8, 2))),
    ("sm100", 2, 64): _rules(64, 128, 8, 2),
    ("sm100", 2, 128): _rules(64, 128, 8, 2),
    ("sm100", 2, 256): _rules(32, 64, 8, 2),
    ("sm120", 2, 64): _rules(32, 128, 8, 2),
    ("sm120", 2, 128): _rules(32, 64, 8, 2),
    ("sm120", 2, 256): _rules(32, 32, 8, 1),
    ("gfx90a", 2, 64): _rules(64, 64, 4, 1),
    ("gfx90a", 2, 128): _rules(32, 64, 4, 1),
    ("gfx90a", 2, 256): _rules(16, 64, 8, 1),
    ("gfx942", 2, 64): _rules(64, 64, 4, 1),
    ("gfx942", 2, 128): _rules(32, 64, 4, 1),
    ("gfx942", 2, 256): _rules(16, 64, 8, 1),
    ("gfx950", 2, 64): _rules(64, 64, 4, 1),
    ("gfx950", 2, 128): _rules(32, 64, 4, 1),
    ("gfx950", 2, 256): _rules(16, 64, 8, 1),
    ("gfx1100", 2, 64): _rules(16, 64, 8, 1),
    ("gfx1100", 2, 128): _rules(16, 64, 8, 1, 64),
    ("gfx1100", 2, 256): _rules(16, 64, 16, 1, 64),
    ("gfx1201", 2, 64): _rules(32, 64, 8, 1),
    ("gfx1201", 2, 128): _rules(16, 64, 8, 1),
    ("gfx1201", 2, 256): _rules(16, 64, 8, 1, 64),
}
BACKWARD_QUERIES: TileTable = {
    ("sm80", 2, 64): _rules(128, 64, 8, 2),
    ("sm80", 2, 128): _rules(64, 64, 8, 2),
    ("sm80", 2, 256): _rules(64, 32, 8, 1),
    ("sm89", 2, 64): _rules(64, 64, 8, 2),
    ("sm89", 2, 128): _rules(64, 32, 8, 2),
    ("sm89", 2, 256): _rules(32, 32, 8, 1),
    ("sm90", 2, 64): (_UNALIGNED, Rule(Tile(64, 64, 4, 3))),
    ("sm90", 2, 128): (_UNALIGNED, Rule(Tile(64, 64, 4, 2), causal=True), Rule(Tile(128, 32, 8, 3))),
    ("sm90", 2, 256): (Rule(Tile(128, 32, 8, 2, by_tma=True)), _UNALIGNED, Rule(Tile(128, 32, 8, 2))),
    ("sm100", 2, 64): _rules(128, 64, 8, 2),
    ("sm100", 2, 128): _rules(128, 64, 8, 2),
    ("sm100", 2, 256): _rules(64, 32, 8, 2),
    ("sm120", 2, 64): _rules(64, 64, 8, 2),
    ("sm120", 2, 128): _rules(64, 32, 8, 2),
    ("sm120", 2, 256): _rules(32, 32, 8, 1),
    ("gfx90a", 2, 64): _rules(128, 64, 8, 1),
    ("gfx90a", 2, 128): _rules(64, 32, 4, 1),
    ("gfx90a", 2, 256): _rules(64, 16, 4, 1),
    ("gfx942", 2, 64): _rules(128, 64, 8, 1),
    ("gfx942", 2, 128): _rules(64, 32, 4, 1),
    ("gfx942", 2, 256): _rules(64, 16, 4, 1),
    ("gfx950", 2, 64): _rules(128, 64, 8, 1),
    ("gfx950", 2, 128): _rules(64, 32, 4, 1),
    ("gfx950", 2, 256): _rules(64, 16, 4, 1),
    ("gfx1100", 2, 64): _rules(64, 32, 8, 1),
    ("gfx1100", 2, 128): _rules(128, 32, 8, 1, 64),
    ("gfx1100", 2, 256): _rules(64, 32, 8, 1, 64),
    ("gfx1201", 2, 64): _rules(64, 64, 8, 1),
    ("gfx1201", 2, 128): _rules(64, 32, 8, 1),
    ("gfx1201", 2, 256): _rules(32, 16, 8, 1),
}
_BACKWARD_FLOAT32 = {
    "sm": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "gfx9": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
    "gfx1": {64: (16, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
}
for _table in (BACKWARD_KEYS, BACKWARD_QUERIES):
    _table.update(_float32_rules(_BACKWARD_FLOAT32))


def table_architecture(arch: str) -> str | None:
    """The architecture whose entries serve ``arch``, or None where there is no entry to go by."""
    arch = _ALIASES.get(arch, arch)
    return arch if arch in ARCHITECTURES else None


def table_head_dim(head_dim: int) -> int:
    """The head-dim entry that covers ``head_dim``, at most 256."""
    return next(entry for entry in HEAD_DIMS if head_dim <= entry)


def select_tile(table: TileTable, arch: str, itemsize: int, head_dim: int, call: Call) -> Tile:
    """A kernel's tile.

    Args:
        table: of the kernel.
        arch: an architecture with entries, see `table_architecture`.
        itemsize: bytes per element of q, k and v.
        head_dim: the larger of D and Dv, 1 to 256.
        call: what else decides.
    """
    rules = table[arch, itemsize, table_head_dim(head_dim)]
    return next(rule.tile for rule in rules if rule.applies(call))


def padded_head_dim(head_dim: int) -> int:
    """Extent of a tile's head-dim axis: the next power of two a matrix instruction accepts."""
    return max(16, 1 << (head_dim - 1).bit_length())


def key_splits(tiles: int, keys: int, rows: int, programs: int) -> int:
    """Parts in which the forward takes the keys of a query tile, so that few tiles fill the device too; 1 where whole.

    Args:
        tiles: of the call.
        keys: that one of them sees, at most.
        rows: of the output, in all heads; writing and merging the parts of each takes time.
        programs: that the device works on at a time.
    """
    if keys < _LEAST_KEYS or tiles == 0:
        return 1
    least = _SMALL_OUTPUT_SPLIT_KEYS if rows <= _SMALL_OUTPUT else _LEAST_SPLIT_KEYS
    splits = max(1, min(programs // tiles, keys // least, MOST_SPLITS))
    return splits if (keys - keys // splits) * _ROWS_MERGED_PER_KEY > rows else 1
