"""The sm_90 kernels for rows that start anywhere, in Gluon: there the TMA unit cannot load, as what it reads starts on
16 bytes. Warps take its place, and fill slots of hopper.py's rings, from which others multiply with wgmma, as if all
had come aligned. A float32 x is rounded as it is shifted.

lbg_fused_shift is for few rows. Two groups of warps take K steps by turns: while one group's loads are on their way,
the other's rows are shifted. A group loads the 16 bytes in which 16 of a row begin and those in which they end, puts
them together and writes them to a slot. So L1 and the shifts work beside the products, where aot/kernels.py's one has
its warps do all in turn.

    x, weight ---16 bytes twice, registers---> shift ---> ring ---> wgmma

A tile has up to 64 rows and columns: a thread of a group holds its rows' words of one step, and more of them spill.

lbg_fused_shift_ws is for many rows: hopper.py's consumers that share a tile, persistent, and in place of the warp that
loads four that copy rows to a slot, past registers, and shift them there once they have come.

    x, weight ---from sectors' boundaries on---> ring ---registers, shift---> the same slot ---> wgmma
    float32 x ---the same---> slots of its own ---registers, shift, round---> ring ------------> wgmma

L2 reads sectors of 32 bytes. A row is copied from the first sector on that is its own, which is shared with nothing:
copies from a 16-byte boundary on asked L2 for half as many bytes again, and it bound the kernel. What of a row lies
before that comes from the step before, whose last sector a thread keeps for each of its rows. Shared memory is then
what bounds it: of each 128x256x64 step's 1024 cycles of wgmma it moves 230 KB, with a float32 x 262, where an SM can
move 128; and a copy of 128 bytes that lie in two lines of L2 takes it as long as two. A 16-bit operand all of whose
rows start on sectors stays as it was copied. On an H100 4096x4096x4095 takes 345 us from float16, 604 with the tiles of
aot/kernels.py that it stands in for, and 184 with rows that start on 16 bytes, which the TMA unit loads; with a float32
x 445, 807 with those tiles (of builds with any of these; no command here makes them again).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from aot.hopper import (
    LANES,
    Ring,
    Tiling,
    allocate_barriers,
    allocate_rings,
    consume,
    full_box,
    load_vectors,
    ring_tile,
    stage_of,
)
from aot.kernels import column_parts, four, symbol, tile_position

GROUPS = gl.constexpr(2)
GROUP_WARPS = gl.constexpr(8)
LEAST_ROWS = gl.constexpr(64)  # that wgmma multiplies
NOWHERE = gl.constexpr(1 << 30)  # a column past every K (csrc/dispatch.cpp's kShiftedK)


@gluon.jit(repr=symbol)
def lbg_fused_shift(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_scale,
    stride_shift,
    stride_om,
    stride_on,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    SYMBOL: gl.constexpr,
):
    dtype: gl.constexpr = weight_ptr.dtype.element_ty
    tile_m, tile_n = tile_position(gl.program_id(0), gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N), GROUP_M)
    first_m = full_box(tile_m * TILE_M, M, TILE_M)
    first_n = full_box(tile_n * TILE_N, N, TILE_N)
    full, empty = allocate_barriers(STAGES, 1, 1)
    x_slots = allocate_rows(dtype, STAGES, max(TILE_M, LEAST_ROWS), TILE_K)
    x_ring = Ring(x_slots, full, empty, TILE_K, STAGES)
    weight_ring = Ring(allocate_rows(dtype, STAGES, TILE_N, TILE_K), full, empty, TILE_K, STAGES)
    x = (x_ptr, stride_xm, first_m, M)
    weight = (weight_ptr, stride_wn, first_n, N)
    rows = gl.minimum(M, first_m + TILE_M)  # past a tile's own rows a slot is as it was
    result = (scale_ptr, shift_ptr, out_ptr, stride_om)
    gl.warp_specialize(
        [
            (ring_tile, (x_ring, weight_ring, result, first_m, first_n, rows, N, K, 0, False)),
            (shift_steps, (0, x_ring, weight_ring, x, weight, K, TILE_M)),
            (shift_steps, (1, x_ring, weight_ring, x, weight, K, TILE_M)),
        ],
        [GROUP_WARPS, GROUP_WARPS],
    )


@gluon.jit
def allocate_rows(dtype: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, TILE_K: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TILE_K], dtype)
    return gl.allocate_shared_memory(dtype, [STAGES, ROWS, TILE_K], LAYOUT)


@gluon.jit
def shift_steps(WHO: gl.constexpr, x_ring, weight_ring, x, weight, K, TILE_M: gl.constexpr):
    """Brings in one group's steps of both operands, K ascending. Its next step's are loaded as soon as this one's have
    left their registers: the weight first, which is longer on its way. With x first a float32 one took 48.7 us for 31.5
    at 64x4096x4095, a float16 one 28.3 for 26.9."""
    TILE_K: gl.constexpr = x_ring.TILE_K
    x_rows = rows_of(x, TILE_M, TILE_K)
    weight_rows = rows_of(weight, weight_ring.slots.shape[1], TILE_K)
    weight_words = load_words(weight_rows, weight_ring, K - WHO * TILE_K, WHO * TILE_K)
    x_words = load_words(x_rows, x_ring, K - WHO * TILE_K, WHO * TILE_K)
    step = WHO
    for k in range(WHO * TILE_K, K, GROUPS * TILE_K):
        stage, parity = stage_of(step, x_ring.full)
        mbarrier.wait(x_ring.empty.index(stage), parity ^ 1)
        next_k = k + GROUPS * TILE_K
        store_shifted(weight_ring, stage, weight_words, weight_rows, K - k)
        weight_words = load_words(weight_rows, weight_ring, K - next_k, next_k)
        store_shifted(x_ring, stage, x_words, x_rows, K - k)
        x_words = load_words(x_rows, x_ring, K - next_k, next_k)
        fence_async_shared()
        mbarrier.arrive(x_ring.full.index(stage))
        step += GROUPS


@gluon.constexpr_function
def words_layout(words, warps):
    """A thread has 4 words of a row, 16 bytes, beside those of its neighbours in a warp."""
    return gl.BlockedLayout([1, 4], [32 // (words // 4), words // 4], [warps, 1], [1, 0])


@gluon.jit
def rows_of(operand, ROWS: gl.constexpr, TILE_K: gl.constexpr):
    """Of a tile's rows: pointers to the words of 4 bytes from the last 16-byte boundary on, the column in which every
    16 bytes of them begin, and how many elements of a row's first 16 bytes are not the row's yet.

    What is read beside a row lies in 16 bytes that hold an element of it. Rows past the edge have no columns.
    """
    ptr, stride, first, rows = operand
    WORDS: gl.constexpr = TILE_K * element_bytes(ptr) // 4
    VECTOR: gl.constexpr = elements_in(16, ptr)
    LAYOUT: gl.constexpr = words_layout(WORDS, gl.num_warps())
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    address = (ptr + gl.minimum(row, rows - 1).to(gl.int64) * stride).to(gl.uint64, bitcast=True)
    skip = (address % 16).to(gl.int32) // element_bytes(ptr)
    word = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT)), 0)
    words = gl.expand_dims((address - address % 16).to(gl.pointer_type(gl.uint32), bitcast=True), 1) + word
    words = gl.max_contiguous(gl.multiple_of(words, [1, 16]), [1, 4])
    column = word // 4 * VECTOR - gl.expand_dims(skip, 1)
    return words, gl.where(gl.expand_dims(row < rows, 1), column, NOWHERE), skip


@gluon.jit
def load_words(rows, ring, left, k):
    """(the 16 bytes in which 16 of each row begin, those in which they end) of the step at k, where `left` columns are
    left. A row that starts on 16 bytes ends where it begins."""
    words, column, skip = rows
    PER_WORD: gl.constexpr = ring.TILE_K // column.shape[1]
    words += k // PER_WORD
    left = gl.where(left > 0, left, -NOWHERE)  # K may be 0, and a row's first 16 bytes begin before column 0
    began = gl.load(words, mask=column < left, other=0)
    ended = gl.load(words + 4, mask=gl.expand_dims(skip > 0, 1) & (column < left - 4 * PER_WORD), other=0)
    return began, ended


@gluon.jit
def store_shifted(ring, stage, words, rows, left):
    """Puts each row together, as aot/kernels.py's shift() does, and writes it to a slot, a float32 x rounded; zeros
    past the last column."""
    began, ended = words
    _, _, skip = rows
    ROWS: gl.constexpr = began.shape[0]
    WORDS: gl.constexpr = began.shape[1]
    PER_WORD: gl.constexpr = ring.TILE_K // WORDS
    w0, w1, w2, w3 = four(began)
    w4, w5, w6, w7 = four(ended)
    skip = gl.expand_dims(gl.convert_layout(skip, gl.SliceLayout(1, w0.type.layout)), 1)
    two = skip >= 2 * PER_WORD
    w0, w1, w2 = gl.where(two, w2, w0), gl.where(two, w3, w1), gl.where(two, w4, w2)
    w3, w4, w5 = gl.where(two, w5, w3), gl.where(two, w6, w4), gl.where(two, w7, w5)
    one = skip % (2 * PER_WORD) >= PER_WORD
    w0, w1, w2 = gl.where(one, w1, w0), gl.where(one, w2, w1), gl.where(one, w3, w2)
    w3, w4 = gl.where(one, w4, w3), gl.where(one, w5, w4)
    if PER_WORD == 2:
        chosen = gl.where(skip % 2 == 1, 0x5432, 0x3210)
        w0, w1 = four_bytes(w0, w1, chosen), four_bytes(w1, w2, chosen)
        w2, w3 = four_bytes(w2, w3, chosen), four_bytes(w3, w4, chosen)
    shifted = gl.join(gl.join(w0, w2), gl.join(w1, w3)).reshape((ROWS, WORDS))
    if left < ring.TILE_K:
        here = left - PER_WORD * gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, shifted.type.layout)), 0)
        kept = gl.where(here >= PER_WORD, -1, gl.where(here == 1, 0xFFFF, 0))
        shifted &= kept.to(gl.uint32, bitcast=True)
    slot = ring.slots.index(stage).slice(0, ROWS)
    if PER_WORD == 2:
        slot.reinterpret(gl.uint32, (ROWS, WORDS), of_words(slot.layout)).store(shifted)
    else:
        slot.store(shifted.to(gl.float32, bitcast=True).to(slot.dtype))


@gluon.constexpr_function
def of_words(layout):
    """The same bytes in words of 4."""
    return gl.NVMMASharedLayout(swizzle_byte_width=layout.swizzle_byte_width, element_bitwidth=32, rank=2)


@gluon.jit
def four_bytes(word, following, chosen):
    """Of two words' eight bytes the four that `chosen` names, a digit a byte."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word, following, chosen], dtype=gl.uint32, is_pure=True, pack=1
    )


# ---- many rows

SECTOR = gl.constexpr(32)  # bytes, of L2
SECTOR_WORDS = gl.constexpr(8)
# Rows so far below each other have their first sector's boundary at the same place, whatever their stride.
LINE_ROWS = gl.constexpr(16)
SHIFT_WARPS = gl.constexpr(4)
# Of a float32 x, where it is copied to: slots, and the parts of each, as many words wide as a row of a 16-bit slot.
WIDE_STAGES = gl.constexpr(2)
WIDE_PARTS = gl.constexpr(2)


@gluon.jit(repr=symbol)
def lbg_fused_shift_ws(
    x_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_scale,
    stride_shift,
    stride_om,
    stride_on,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE_PARTS: gl.constexpr,
    SYMBOL: gl.constexpr,
):
    dtype: gl.constexpr = weight_ptr.dtype.element_ty
    x_dtype: gl.constexpr = x_ptr.dtype.element_ty
    # Consumers multiply a step at least: of a K of 0 one of zeros.
    tiling = Tiling(M, N, gl.maximum(K, 1), TILE_M, TILE_N, TILE_K, False, 1, gl.to_tensor(1))
    x_slots = allocate_rows(dtype, STAGES, TILE_M, TILE_K)
    weight_slots = allocate_rows(dtype, STAGES, TILE_N, TILE_K)
    x_parts = x_slots
    if x_dtype != dtype:
        x_parts = allocate_rows(x_dtype, WIDE_STAGES * WIDE_PARTS, TILE_M, TILE_K // WIDE_PARTS)
    rings = allocate_rings(x_slots, weight_slots, tiling, EPILOGUE_PARTS, out_ptr.dtype.element_ty, SHIFT_WARPS)
    x = Rows(x_ptr, stride_xm, M, K)
    weight = Rows(weight_ptr, stride_wn, N, K)
    result = (out_ptr, stride_om)
    gl.warp_specialize(
        [
            (consume, (0, result, rings, tiling, False)),
            (consume, (1, result, rings, tiling, False)),
            (shift_tiles, (x, weight, (scale_ptr, shift_ptr), x_parts, rings, tiling)),
        ],
        [4, SHIFT_WARPS],
        [200, 104],
    )


@gluon.aggregate
class Rows:
    """An operand in global memory."""

    ptr: gl.tensor
    stride: gl.tensor  # elements from one row to the next
    count: gl.tensor
    K: gl.tensor

    @gluon.jit
    def boundary(self, row):
        """(the first sector's boundary in a row, as an address; how many of its elements lie before that)."""
        address = (self.ptr + row.to(gl.int64) * self.stride).to(gl.uint64, bitcast=True)
        before = SECTOR - 1 - (address + SECTOR - 1) % SECTOR
        return address + before, before.to(gl.int32) // element_bytes(self.ptr)

    @gluon.jit
    def moves(self):
        """Whether some of its rows start off a sector's boundary."""
        start = self.ptr.to(gl.uint64, bitcast=True).to(gl.int64)
        return (start | self.stride * element_bytes(self.ptr)) % SECTOR != 0

    @gluon.jit
    def words(self, elements):
        """How many words of 4 bytes so many elements are."""
        return elements // elements_in(4, self.ptr)

    @gluon.jit
    def lines(self, first, WORDS: gl.constexpr):
        """The boundaries in LINE_ROWS rows from `first` on, as pointers to words of 4 bytes."""
        LAYOUT: gl.constexpr = words_layout(WORDS, gl.num_warps())
        address, _ = self.boundary(first + gl.arange(0, LINE_ROWS, gl.SliceLayout(1, LAYOUT)))
        return address.to(gl.pointer_type(gl.uint32), bitcast=True)

    @gluon.jit
    def heads(self, first, ROWS: gl.constexpr):
        """Of rows from `first` on: how many elements lie before the boundary, and the sector before it, of as many rows
        at a time as there are threads. What is read beside a row lies in 16 bytes that hold an element of it."""
        LAYOUT: gl.constexpr = rows_layout(SECTOR_WORDS, gl.num_warps())
        THREADS: gl.constexpr = gl.num_warps() * LANES
        VECTOR: gl.constexpr = elements_in(16, self.ptr)
        row = gl.arange(0, THREADS, gl.SliceLayout(1, LAYOUT))
        address, skip = self.boundary(first + row)
        word = gl.expand_dims(gl.arange(0, SECTOR_WORDS, gl.SliceLayout(0, LAYOUT)), 0)
        words = gl.expand_dims((address - SECTOR).to(gl.pointer_type(gl.uint32), bitcast=True), 1) + word
        words = gl.max_contiguous(gl.multiple_of(words, [1, 16]), [1, 4])
        row = gl.expand_dims(row, 1)
        skip = gl.expand_dims(skip, 1)
        column = skip - 2 * VECTOR + word // 4 * VECTOR  # in which every 16 bytes begin
        in_row = (column > -VECTOR) & (gl.maximum(column, 0) < self.K)  # which may be 0
        sectors = ()
        for block in gl.static_range(0, ROWS, THREADS):
            here = in_row & (row < self.count - first - block)
            sectors = sectors + (gl.load(words + self.words(block) * self.stride, mask=here, other=0),)
        return skip, sectors


@gluon.constexpr_function
def element_bytes(ptr):
    return ptr.dtype.element_ty.primitive_bitwidth // 8


@gluon.constexpr_function
def elements_in(size, ptr):
    """How many elements of what `ptr` points to are in so many bytes."""
    return size // (ptr.dtype.element_ty.primitive_bitwidth // 8)


@gluon.jit
def shift_tiles(x, weight, vectors, x_parts, rings, tiling):
    """Copies the rows of all the CTA's tiles to the ring's slots, and a step later shifts them there. A float32 x is
    copied to slots of its own, and rounded to the ring's."""
    THREADS: gl.constexpr = gl.num_warps() * LANES
    HALF: gl.constexpr = rows_layout(tiling.TILE_K // 4, gl.num_warps())
    ROUNDS: gl.constexpr = x_parts.dtype != rings.x.dtype
    x_moves, weight_moves = x.moves(), weight.moves()
    step = 0
    done = 0
    ahead = first_step(x, weight, gl.program_id(0), tiling)
    copy_step(x, weight, ahead, step, x_parts, rings, tiling)
    ahead = next_step(x, weight, ahead, tiling)
    for tile in range(gl.program_id(0), tiling.whole(), gl.num_programs(0)):
        first_m, first_n = tiling.origin(tile, 0, tiling.TILE_N)
        x_skip, x_before = x.heads(first_m, tiling.TILE_M)
        weight_skip, weight_before = weight.heads(first_n, tiling.TILE_N)
        for k in range(0, tiling.K, tiling.TILE_K):
            copy_step(x, weight, ahead, step + 1, x_parts, rings, tiling)
            ahead = next_step(x, weight, ahead, tiling)
            async_copy.wait_group(1)  # but for the step ahead
            stage, _ = stage_of(step, rings.full)
            weight_slot = words_of(rings.weight, stage)
            if ROUNDS:
                x_before, now = round_rows(rings.x.index(stage), x_parts, step, x_before, x_skip, weight_slot)
            elif x_moves:
                x_slot = words_of(rings.x, stage)
                now = half_rows(x_slot, 0, THREADS).load(HALF)
                x_before, now = shift_rows(x_slot, now, x_before, x_skip, weight_slot)
            else:
                now = half_rows(weight_slot, 0, THREADS).load(HALF)
            if weight_moves:
                weight_before, now = shift_rows(weight_slot, now, weight_before, weight_skip, None)
            if x.K - k < tiling.TILE_K:
                clear(rings.x.index(stage), x.K - k)
                clear(rings.weight.index(stage), x.K - k)
            fence_async_shared()
            mbarrier.arrive(rings.full.index(stage))
            step += 1
        load_vectors(vectors, first_n, done, rings, tiling, tiling.TILE_N)
        done += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.aggregate
class Place:
    """A step: its tile, from which k on, and where the rows and their lines begin."""

    tile: gl.tensor
    k: gl.tensor
    first_m: gl.tensor
    first_n: gl.tensor
    x: gl.tensor
    weight: gl.tensor


@gluon.jit
def first_step(x, weight, tile, tiling):
    first_m, first_n = tiling.origin(tile, 0, tiling.TILE_N)
    x_lines, weight_lines = x.lines(first_m, tiling.TILE_K // 2), weight.lines(first_n, tiling.TILE_K // 2)
    return Place(tile, gl.to_tensor(0), first_m, first_n, x_lines, weight_lines)


@gluon.jit
def next_step(x, weight, place, tiling):
    found = Place(place.tile, place.k + tiling.TILE_K, place.first_m, place.first_n, place.x, place.weight)
    if found.k >= tiling.K:
        tile = place.tile + gl.num_programs(0)
        if tile < tiling.whole():
            found = first_step(x, weight, tile, tiling)
        else:
            found = Place(tile, gl.to_tensor(0), place.first_m, place.first_n, place.x, place.weight)
    return found


@gluon.jit
def copy_step(x, weight, place, step, x_parts, rings, tiling):
    """Has a step copied, if there is one, as a group of its own."""
    if place.tile < tiling.whole():
        stage, parity = stage_of(step, rings.full)
        mbarrier.wait(rings.empty.index(stage), parity ^ 1)
        if x_parts.dtype != rings.x.dtype:
            for part in gl.static_range(WIDE_PARTS):
                slot = words_of(x_parts, step % WIDE_STAGES * WIDE_PARTS + part)
                copy_rows(slot, x, place.x, place.first_m, place.k + part * x_parts.shape[2])
        else:
            copy_rows(words_of(rings.x, stage), x, place.x, place.first_m, place.k)
        copy_rows(words_of(rings.weight, stage), weight, place.weight, place.first_n, place.k)
    async_copy.commit_group()


@gluon.jit
def words_of(slots, stage):
    """A slot in words of 4 bytes."""
    slot = slots.index(stage)
    WORDS: gl.constexpr = slot.shape[1] * slot.dtype.primitive_bitwidth // 32
    return slot.reinterpret(gl.uint32, (slot.shape[0], WORDS), of_words(slot.layout))


@gluon.jit
def copy_rows(slot, operand, lines, first, k):
    """Starts the copies of one operand's rows from `first` on: of what lies k columns past their boundaries."""
    ROWS: gl.constexpr = slot.shape[0]
    WORDS: gl.constexpr = slot.shape[1]
    LAYOUT: gl.constexpr = words_layout(WORDS, gl.num_warps())
    VECTOR: gl.constexpr = elements_in(16, operand.ptr)
    word = gl.expand_dims(gl.arange(0, WORDS, gl.SliceLayout(0, LAYOUT)), 0)
    words = gl.expand_dims(lines, 1) + (word + operand.words(k))
    words = gl.max_contiguous(gl.multiple_of(words, [1, 16]), [1, 4])
    if (operand.K - k >= WORDS // 4 * VECTOR + 2 * VECTOR) & (operand.count >= ROWS):  # all of it, as a rule
        for block in gl.static_range(0, ROWS, LINE_ROWS):
            async_copy.async_load(slot.slice(block, LINE_ROWS), words + operand.words(block) * operand.stride)
    else:
        row = gl.arange(0, LINE_ROWS, gl.SliceLayout(1, LAYOUT))
        _, skip = operand.boundary(first + row)
        in_row = gl.expand_dims(skip, 1) + word // 4 * VECTOR < operand.K - k
        row = gl.expand_dims(row, 1)
        for block in gl.static_range(0, ROWS, LINE_ROWS):
            mask = in_row & (row < operand.count - first - block)
            async_copy.async_load(
                slot.slice(block, LINE_ROWS), words + operand.words(block) * operand.stride, mask=mask
            )


@gluon.constexpr_function
def rows_layout(words, warps):
    """A thread has a row."""
    return gl.BlockedLayout([1, words], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def shift_rows(slot, now, before, skip, next_slot):
    """Moves each row of a slot `skip` elements to the right, behind the end of the sector before it; its last sectors.
    A thread moves a row at a time, and half of it, `now` the first: while one half is stored, the next is on its way,
    for which there are registers, and at last the next slot's first, which is returned too."""
    THREADS: gl.constexpr = gl.num_warps() * LANES
    HALF: gl.constexpr = now.type.layout
    after = ()
    for block in gl.static_range(len(before)):
        left, sector = shifted(before[block], now, skip, True)
        now = half_rows(slot, 2 * block + 1, THREADS).load(HALF)
        half_rows(slot, 2 * block, THREADS).store(left)
        right, sector = shifted(sector, now, skip, True)
        if block + 1 < len(before):
            now = half_rows(slot, 2 * block + 2, THREADS).load(HALF)
        elif next_slot is not None:
            now = half_rows(next_slot, 0, THREADS).load(HALF)
        half_rows(slot, 2 * block + 1, THREADS).store(right)
        after = after + (sector,)
    return after, now


@gluon.jit
def round_rows(slot, parts, step, before, skip, next_slot):
    """The same of a float32 x, from the slot that it was copied to, and rounded to the ring's: a quarter of a row at a
    time."""
    THREADS: gl.constexpr = gl.num_warps() * LANES
    gl.static_assert(slot.shape[0] == THREADS, "a thread has a row")
    COLUMNS: gl.constexpr = parts.shape[2] // 2
    LAYOUT: gl.constexpr = rows_layout(COLUMNS, gl.num_warps())
    QUARTERS: gl.constexpr = 2 * WIDE_PARTS
    first = step % WIDE_STAGES * WIDE_PARTS
    now = half_rows(words_of(parts, first), 0, THREADS).load(LAYOUT)
    sector = before[0]
    for quarter in gl.static_range(QUARTERS):
        moved_words, sector = shifted(sector, now, skip, False)
        if quarter + 1 < QUARTERS:
            part = words_of(parts, first + (quarter + 1) // 2)
            now = half_rows(part, (quarter + 1) % 2, THREADS).load(LAYOUT)
        else:
            now = half_rows(next_slot, 0, THREADS).load(LAYOUT)
        rounded = moved_words.to(gl.float32, bitcast=True).to(slot.dtype)
        slot.slice(quarter * COLUMNS, COLUMNS, dim=1).store(rounded)
    return (sector,), now


@gluon.jit
def half_rows(slot, half: gl.constexpr, THREADS: gl.constexpr):
    """Of as many rows at a time as there are threads, the left half or the right one."""
    WORDS: gl.constexpr = slot.shape[1] // 2
    return slot.slice(half // 2 * THREADS, THREADS).slice(half % 2 * WORDS, WORDS, dim=1)


@gluon.jit
def shifted(before, now, skip, HALVES: gl.constexpr):
    """(`now`, `skip` elements to the right behind the end of `before`; the last sector of `now`), in their layouts.
    With HALVES two elements are a word."""
    ROWS: gl.constexpr = now.shape[0]
    WORDS: gl.constexpr = now.shape[1]
    here = column_parts(now, ROWS, WORDS, WORDS)
    old = column_parts(before, ROWS, SECTOR_WORDS, SECTOR_WORDS)
    COLUMN: gl.constexpr = here[0].type.layout
    words = ()
    for word in gl.static_range(SECTOR_WORDS):
        words = words + (gl.convert_layout(old[word], COLUMN, assert_trivial=True),)
    words = words + here
    sector = gl.convert_layout(side_by_side(here[WORDS - SECTOR_WORDS :]), before.type.layout, assert_trivial=True)
    skip = gl.convert_layout(skip, COLUMN, assert_trivial=True)
    # What a word may still come from, ever fewer to the left of it: of 9 words, 5, 3, 2.
    HALF: gl.constexpr = 2 if HALVES else 1
    words = moved(words, 4, skip & 4 * HALF != 0)
    words = moved(words, 2, skip & 2 * HALF != 0)
    words = moved(words, 1, skip & HALF != 0)
    found = words[1:]
    if HALVES:
        chosen = gl.where(skip & 1 != 0, 0x5432, 0x7654)
        found = ()
        for word in gl.static_range(WORDS):
            found = found + (four_bytes(words[word], words[word + 1], chosen),)
    return gl.convert_layout(side_by_side(found), now.type.layout, assert_trivial=True), sector


@gluon.jit
def moved(words, BY: gl.constexpr, condition):
    """Of words from the BY-th on, where `condition`, what lies BY words before."""
    found = ()
    for word in gl.static_range(BY, len(words)):
        found = found + (gl.where(condition, words[word - BY], words[word]),)
    return found


@gluon.jit
def side_by_side(columns):
    """A tensor of such columns, a power of 2."""
    if len(columns) == 1:
        return columns[0]
    else:
        HALF: gl.constexpr = len(columns) // 2
        ROWS: gl.constexpr = columns[0].shape[0]
        halves = gl.join(side_by_side(columns[:HALF]), side_by_side(columns[HALF:]))
        return halves.permute((0, 2, 1)).reshape((ROWS, 2 * HALF))


@gluon.jit
def clear(slot, left):
    """Zeros from a slot's `left`-th column on, of as many rows at a time as there are registers for."""
    ROWS: gl.constexpr = slot.shape[0]
    AT_ONCE: gl.constexpr = 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    column = gl.expand_dims(gl.arange(0, slot.shape[1], gl.SliceLayout(0, LAYOUT)), 0)
    for first in gl.static_range(0, ROWS, AT_ONCE):
        rows = slot.slice(first, AT_ONCE)
        elements = rows.load(LAYOUT)
        rows.store(gl.where(column < left, elements, gl.zeros_like(elements)))
