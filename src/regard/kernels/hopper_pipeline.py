"""What the Hopper kernels stand on: TMA copies and rings of shared-memory tiles, alike on Triton 3.6 to 3.9.

A `Ring` hands tiles from one producer to its consumers. Each of its stages has a barrier that says "full" and one that
says "empty"; a barrier's phase flips each time the stage comes round, so that the number of a step is all the state
that either side keeps.

A kernel invalidates the barriers that some of its features leave unused. It would otherwise never touch them again, and
Triton would give their memory to a tile; but the hardware may still write a valid barrier (PTX ISA, mbarrier.inval),
and did, into the output, where several processes took turns on the device.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

if hasattr(tma, "async_atomic_add"):  # Triton 3.9 renamed the copies and added the reduction
    aggregate = gluon.aggregate
    copy_in, copy_out, reduce_out = tma.async_load, tma.async_store, tma.async_atomic_add
    view_as = gl.shared_memory_descriptor.reinterpret
else:
    from triton._C.libtriton import ir
    from triton.experimental.gluon.language._core import builtin
    from triton.language.core import _aggregate as aggregate

    copy_in, copy_out = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

    @builtin
    def reduce_out(tensor_desc, coord, src, _semantic=None):
        """Add a tile of shared memory into global memory (cp.reduce.async.bulk.tensor)."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)

    view_as = gl.shared_memory_descriptor._reinterpret


SIZES = ("batch", "heads", "heads_kv", "group", "seqlen_q", "seqlen_k", "total_q", "total_k", "section")
"""Arguments for whose values no kernel is compiled anew."""

optional = gl.tensor | gl.constexpr  # Triton turns arguments that are 1 or None into constants


def record(cls):
    """A device-side record of the class's annotated fields, made from their values in order."""
    names = tuple(cls.__annotations__)

    def construct(self, *values):
        for name, field in zip(names, values, strict=True):
            setattr(self, name, field if isinstance(field, gl.base_value) else gl.constexpr(field))

    cls.__init__ = gluon.constexpr_function(construct)
    return aggregate(cls)


@record
class Ring:
    """Stages of shared memory between a producer and its consumers."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def tile(self, step):
        """The stage that serves a step."""
        return self.tiles.index(step % self.STAGES)

    @gluon.jit
    def acquire(self, step):
        """Producer: wait until the consumers are done with the stage's last tile."""
        mbarrier.wait(self.empty.index(step % self.STAGES), ((step // self.STAGES) & 1) ^ 1)

    @gluon.jit
    def copy(self, step, desc, coordinates):
        """Producer: have TMA fill the stage, once it is free."""
        self.acquire(step)
        full = self.full.index(step % self.STAGES)
        mbarrier.expect(full, desc.block_type.nbytes)
        copy_in(desc, coordinates, full, self.tile(step))

    @gluon.jit
    def publish(self, step):
        """Producer: say that the stage is full, where it was written by plain stores."""
        mbarrier.arrive(self.full.index(step % self.STAGES))

    @gluon.jit
    def wait(self, step):
        """Consumer: wait for the step's tile."""
        mbarrier.wait(self.full.index(step % self.STAGES), (step // self.STAGES) & 1)

    @gluon.jit
    def release(self, step):
        """Consumer: give the stage back."""
        mbarrier.arrive(self.empty.index(step % self.STAGES))


@gluon.jit
def make_ring(tiles, STAGES: gl.constexpr, PRODUCERS: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring of tiles (STAGES, ...), full once PRODUCERS have filled their part, empty once CONSUMERS released it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=PRODUCERS)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return Ring(tiles, full, empty, STAGES)


@gluon.jit
def make_companion(ring, tiles, PRODUCERS: gl.constexpr):
    """A ring whose stages are filled on their own and go back together with those of ``ring``."""
    full = gl.allocate_shared_memory(gl.int64, [ring.STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(ring.STAGES):
        mbarrier.init(full.index(stage), count=PRODUCERS)
    return Ring(tiles, full, ring.empty, ring.STAGES)


@gluon.jit
def stages_for(desc, STAGES: gl.constexpr):
    """Shared memory for STAGES tiles of a descriptor."""
    return gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)  # noqa: RUF005  (Gluon has no starred lists)


@gluon.jit
def write_record(records, tile, fields):
    """Producer: hand some integers about a tile to the consumers, through a ring of int32 (STAGES, integers)."""
    field = gl.arange(0, records.tiles.shape[1], layout=gl.BlockedLayout([1], [32], [1], [0]))
    record = field * 0
    for i in gl.static_range(len(fields)):
        record = gl.where(field == i, fields[i], record)
    records.acquire(tile)
    records.tile(tile).store(record)
    records.publish(tile)


@gluon.jit
def read_field(records, tile, FIELD: gl.constexpr, WARPS: gl.constexpr = 4):
    """Consumer: an integer of a tile's record. Producer: the same, with one of WARPS.

    The record stays in shared memory until it is released: read where it is needed, nothing of it takes registers in
    the loops.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(records.tile(tile).slice(FIELD, 1).load(layout), 0)


@gluon.jit
def claim_tile(counter_ptr):
    """Producer of a persistent program: the index of its next tile. The first ones are the programs' own numbers."""
    return gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)


@gluon.jit
def leave_counters(counter_ptr):
    """Producer: the last program to run dry leaves the two counters as the next launch needs them."""
    if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)


@gluon.jit
def matrix(tile):
    """A tile as (rows, columns): TMA's boxes have leading dimensions of one, and packed heads among the rows."""
    COLUMNS: gl.constexpr = tile.shape[tile.rank - 1]
    return tile.reshape([tile.numel // COLUMNS, COLUMNS])


@gluon.jit
def anew(index):
    """The index of a tile, by an instruction that the compiler leaves where it is.

    What follows from it, one address for each product of the tile, is then worked out there. Otherwise all of them
    are worked out before the loop and held in registers, which a consumer with large accumulators has not got.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(index)], gl.int32, False, 1)


@gluon.jit
def sequence_bounds(cu_seqlens_ptr, sequence, longest, total, exists):
    """First packed row of a sequence and its length, clamped so that no offset in memory can cause a stray access."""
    start = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + sequence, mask=exists), 0), total)
    stop = gl.minimum(gl.maximum(gl.load(cu_seqlens_ptr + sequence + 1, mask=exists), start), total)
    return start, gl.minimum(stop - start, longest)


@gluon.jit
def place_of(sequence, cu_seqlens_q_ptr, cu_seqlens_k_ptr, kv_lens_ptr, seqlen_q, seqlen_k, total_q, total_k):
    """Of a sequence: its first packed query and how many there are, the same of its keys, its index in the batch for
    TMA, and the rows that a head has in lse.
    """
    start_q = 0 * sequence
    start_k = 0 * sequence
    length_q = seqlen_q + start_q
    length_k = seqlen_k + start_k
    plane = sequence
    rows = seqlen_q
    if cu_seqlens_q_ptr is not None:
        start_q, length_q = sequence_bounds(cu_seqlens_q_ptr, sequence, seqlen_q, total_q, None)
        start_k, length_k = sequence_bounds(cu_seqlens_k_ptr, sequence, seqlen_k, total_k, None)
        plane = 0 * sequence
        rows = total_q
    if kv_lens_ptr is not None:
        length_k = gl.minimum(gl.maximum(gl.load(kv_lens_ptr + sequence), 0), seqlen_k)
    return start_q, length_q, start_k, length_k, plane, rows


@gluon.jit
def no_sequences():
    """Where `seek_sequences` starts."""
    return gl.to_tensor(-32), gl.to_tensor(0), gl.zeros([32], gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def seek_sequences(index, first, before, ends, cu_seqlens_ptr, batch, longest, total, heads, ROWS: gl.constexpr):
    """Producer: go on to the 32 packed sequences with a tile, whose indices only grow.

    Every sequence has a tile for each of ``heads`` and each so many ROWS, and none that is empty. Returns the first of
    the 32, the tiles before them, the tiles up to the end of each, one a lane, and those up to the last, which are more
    than ``index`` if there is such a tile.
    """
    stop = gl.max(ends, 0)
    while (index >= stop) & (first + 32 < batch):
        first += 32
        before = stop
        sequence = first + gl.arange(0, 32, layout=ends.type.layout)
        exists = sequence < batch
        _starts, lengths = sequence_bounds(cu_seqlens_ptr, sequence, longest, total, exists)
        tiles = gl.where(exists, gl.cdiv(lengths, ROWS) * heads, 0)
        ends = before + gl.associative_scan(tiles, 0, _add)
        stop = gl.max(ends, 0)
    return first, before, ends, stop


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def sequence_of(index, first, before, ends):
    """Producer: a tile's sequence, of those that `seek_sequences` found, and its number among the sequence's tiles."""
    passed = ends <= index
    return first + gl.sum(passed.to(gl.int32), 0), index - gl.max(gl.where(passed, ends, before), 0)


@gluon.jit
def store_rows(ptr, start, count, heads, head, values, HEAD_DIM: gl.constexpr):
    """Write the rows of a packed tile that exist: TMA would write past the end of the sequence, into the next one."""
    row = gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, values.type.layout))
    dim = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, values.type.layout))
    place = ((start + row).to(gl.int64) * heads + head) * HEAD_DIM
    inside = (row < count)[:, None] & (dim < HEAD_DIM)[None, :]
    gl.store(ptr + place[:, None] + dim[None, :], values, mask=inside)


@gluon.jit
def clear_rows(rows, valid):
    """Zero a tile's rows past the sequence: their weights are 0, but 0 times what lies there may be NaN."""
    CHUNK: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for chunk in gl.static_range(rows.shape[0] // CHUNK):
        if valid < (chunk + 1) * CHUNK:
            some = rows.slice(chunk * CHUNK, CHUNK, dim=0)
            row = chunk * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, layout))
            kept = some.load(layout)
            some.store(gl.where((row < valid)[:, None], kept, gl.zeros_like(kept)))
    fence_async_shared()


@gluon.jit
def clear_loaded(ring, step, valid):
    """Producer: the same for a stage that TMA fills, once it is full; its columns are a multiple of 64.

    One warp does so by 8 rows of 64 columns. A tile lies in panels of 64 columns, one after the other, and swizzling
    moves nothing from row to row. That the tile is full tells the consumers too little: they must wait for something
    that is published after this.
    """
    tile = ring.tile(step)
    COLUMNS: gl.constexpr = tile.shape[tile.rank - 1]
    CHUNKS: gl.constexpr = tile.numel // COLUMNS // 8
    plain_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    chunks = view_as(tile, tile.dtype, [tile.numel // (8 * 64), 8, 64], plain_layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, layout))
    ring.wait(step)
    for chunk in range(valid // 8, CHUNKS):
        for panel in gl.static_range(COLUMNS // 64):
            some = chunks.index(panel * CHUNKS + chunk)
            kept = some.load(layout)
            some.store(gl.where((row < valid - chunk * 8)[:, None], kept, gl.zeros_like(kept)))
    fence_async_shared()


@gluon.jit
def transposed(ring, step):
    """The step's tile of a ring as (columns, rows)."""
    return matrix(ring.tile(step)).permute((1, 0))
