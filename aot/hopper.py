"""The sm_90 kernels, in Gluon: warps that load through the TMA unit, and warps that multiply what came with wgmma.

    y[m, n] = relu(gelu((sum_k x[m, k] * weight[n, k]) * scale[n] + shift[n]))

lbg_fused_ring is for few rows, where reading the weight once is the time: a tile a CTA, and as much of the weight on
its way as shared memory holds. With half of that, and two CTAs an SM, it is for small products of more tiles than SMs:
one CTA finishes while the other begins. On an H100 1037x936x96 takes 3.5 us for 4.8 from float16 to float16.

lbg_fused_ws is for many: one CTA an SM walks the tiles. One warp asks for operands, several K steps ahead; two
warpgroups consume them, in one of two ways. Either they share a tile, half of its rows each, and then finish and store
it while the next tile's operands are on their way: a tile twice as large needs fewer bytes of L2. Or they take whole
tiles by turns ("ping-pong"): while one finishes its tile the other multiplies, and of a short K or of few waves of
tiles less time is lost.

Consumers that share a tile take its steps by turns: neither begins a step's products before the other has begun those
before them. Left to themselves they may fall into step: then their products go through the tensor cores at once and end
at once, and both wait, round and begin anew while nothing is multiplied. Whether they did depended on instructions far
from the loop. On an H100, with a float32 x, builds of one source but for those took 993 to 1171 us at 16384x4096x4096
to float32, and 968 to 1000 with turns; to float16, 952 to 1102 and 938 to 958. A 16-bit x, whose products a consumer
begins before it waits for the last ones, gains where K is short: with one group of eight warps in place of the two
consumers, 16384x4096x512 took 147.0 us for 140.9. Where it all takes less than 10 us, two take 4 to 5 % longer.

The tiles that are left for a last wave would keep few SMs busy, each for as long as all of them: where the consumers
share a tile, these are cut into two or four pieces side by side, if all the pieces have a place in that wave. And a
kernel that cuts quarters computes last columns that need but a quarter or half of a tile as such pieces, where those
take no longer than tiles, and first in the CTAs that the last wave leaves without one: 4096x4104x4096 took 194.5 us for
207.6. Which elements are computed together has no part in their bits. (Times in this file are of builds with either,
which no command here makes again.)

Two CTAs of lbg_fused_ws may be a cluster: its tile is twice as high, each computes half of the rows, and both get the
weight from one load. That is for rows that start off 32 bytes, whose every 128 bytes lie in five sectors of L2: L2 then
bounds the kernel, and a third of its bytes are spared. On an H100 4096x4096x4088 takes 200 us for 281, a float32 x 242
for 314; where rows start on 32 bytes, a cluster's tile takes up to 3 % longer than its half, or 6 with a float32 x.

Either rounds a float32 x on its way from shared memory to wgmma, which takes that operand from registers: a consumer
reads the next step's x while this step's is multiplied. Written back to shared memory instead, it would be moved twice
more there, and an SM's 128 bytes a cycle are what the many-rows kernel is bound by: of each 128x256x64 step's 1024
cycles of wgmma, 16-bit operands take 128 KB, a float32 x 160, one that is rounded in shared memory 192.

    16-bit x     TMA ---> x, weight ---> wgmma            float32 x    TMA ---> x ---round, registers---> wgmma
                                                                       TMA ---> weight -----------------> wgmma

A ring's barriers are `full`, which loaders arrive at and consumers wait for, and `empty`, the other way round. Products
are added as in aot/kernels.py, K ascending, 16 at a time: the bits are the same.

Either is launched while the kernel before it in the stream still runs, and waits for that one's end itself: what it
does until then costs no time. So each role waits as it begins, when its warps have their registers: of calls of less
than 20 us that is up to 2 % on an H100. The next kernel may begin as soon as this one has, for it waits for this one's
end, and so for all that this one waits for. A kernel that writes weight may be among those that it waits for, so until
then it only asks L2 for the weight, which is where such a kernel's writes go too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    CachePolicy,
    FractionalEvictionPolicy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from aot.kernels import column_parts, relu_gelu, symbol, tile_position

# ---- few rows

# Tiles of rows up to which the weight's way from DRAM is the time. CTAs of more share rows of the weight, are bound by
# L2, and take longer where all find their first operands there at once: csrc/lbg.h's early().
ASK_TILES_M = gl.constexpr(2)
LINE_BYTES = gl.constexpr(128)  # of L2
LANES = gl.constexpr(32)  # of a warp
# A CTA reads its rows of the weight alone, or together with its neighbours: they need not push x out of L2.
READ_ONCE = gl.constexpr(CachePolicy(l2=FractionalEvictionPolicy("evict_first", 1.0)))


@gluon.jit(repr=symbol)
def lbg_fused_ring(
    x,
    weight,
    scale_ptr,
    shift_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_om,
    weight_ptr,
    stride_wn,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,  # of a float32 x that has barriers of its own; else 0
    OUT_ALIGNED: gl.constexpr,
    SYMBOL: gl.constexpr,
):
    # Neighbours share rows of the larger operand, which then is less often read twice: on an H100 1099x224x12096 takes
    # 21.5 us for 33.6, a float32 x 35.0 for 59.7; but where x is the smaller one, as at 256x4096x4096, 25.7 for 17.4.
    tiles_m, tiles_n = gl.cdiv(M, TILE_M), gl.cdiv(N, TILE_N)
    X_SIZE: gl.constexpr = x.dtype.primitive_bitwidth // weight.dtype.primitive_bitwidth  # of an element, weight's 1
    x_is_larger = N // X_SIZE < M
    tile_m = gl.where(x_is_larger, gl.program_id(0) // tiles_n, gl.program_id(0) % tiles_m)
    tile_n = gl.where(x_is_larger, gl.program_id(0) % tiles_n, gl.program_id(0) // tiles_m)
    first_m = full_box(tile_m * TILE_M, M, TILE_M)
    first_n = full_box(tile_n * TILE_N, N, TILE_N)
    if tiles_m <= ASK_TILES_M:
        ask_l2(weight_ptr, stride_wn, first_n, N, K, TILE_N, whole_power(STAGES * TILE_K))
    x_slots = allocate_slots(x, TILE_M, TILE_K, X_STAGES if X_STAGES else STAGES)
    weight_slots = allocate_slots(weight, TILE_N, TILE_K, STAGES)
    full, empty = allocate_barriers(STAGES, 1 if X_STAGES else 2, 1)
    weight_ring = Ring(weight_slots, full, empty, TILE_K, STAGES)
    x_ring = Ring(x_slots, full, empty, TILE_K, STAGES)
    if X_STAGES:
        x_full, x_empty = allocate_barriers(X_STAGES, 1, 1)
        x_ring = Ring(x_slots, x_full, x_empty, TILE_K, X_STAGES)
    result = (scale_ptr, shift_ptr, out_ptr, stride_om)
    gdc_launch_dependents()
    # Four or eight warps multiply; of two more, one brings in x and one the weight.
    gl.warp_specialize(
        [
            (ring_tile, (x_ring, weight_ring, result, first_m, first_n, M, N, K, X_STAGES, OUT_ALIGNED)),
            (fill_ring, (weight_ring, weight, first_n, N, K, READ_ONCE)),
            (fill_ring, (x_ring, x, first_m, M, K, None)),
        ],
        [1, 1],
    )


@gluon.jit
def ask_l2(ptr, stride, first, rows, K, ROWS: gl.constexpr, DEPTH: gl.constexpr):
    """Has L2 read the first DEPTH of K of ROWS rows, a line by a thread. Past an edge, the last row or column again."""
    LINES: gl.constexpr = DEPTH * ptr.dtype.element_ty.primitive_bitwidth // 8 // LINE_BYTES
    LINE: gl.constexpr = DEPTH // LINES
    ALONG_K: gl.constexpr = min(LINES, LANES)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [LANES // ALONG_K, ALONG_K], [gl.num_warps(), 1], [1, 0])
    row = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)), rows - 1)
    k = gl.minimum(gl.arange(0, LINES, gl.SliceLayout(0, LAYOUT)) * LINE, K - 1)
    line = ptr + (gl.expand_dims(row.to(gl.int64) * stride, 1) + gl.expand_dims(k, 0))
    gl.inline_asm(prefetches, ("l",), (line,))


@gluon.constexpr_function
def whole_power(number):
    """The largest power of 2 in it: what a tensor can have of a size."""
    return 1 << (number.bit_length() - 1)


@gluon.constexpr_function
def prefetches(outputs, inputs):
    return "\n".join(f"prefetch.global.L2 [{address}];" for address in inputs[0])


@gluon.aggregate
class Ring:
    """STAGES slots of shared memory for one operand's [rows of a tile, TILE_K], and the mbarriers that say a slot is
    full or empty. Along K a slot is cut into parts as wide as the swizzle, 128 bytes.

    Both operands have the same barriers, each of which costs a consumer about 30 cycles a step; but a float32 x may
    have its own. Where steps are deep that costs less than it gains: x needs few slots, being in L2, and the weight has
    all the more on its way from DRAM. On an H100 a float32 x takes 12.5 us for 13.3 at 1x4096x4096, 12.9 for 14.0 at
    M=64, 15.4 for 17.0 at M=128 (of builds with either; no command here makes them again).
    """

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    TILE_K: gl.constexpr
    STAGES: gl.constexpr

    @gluon.jit
    def next(self, stage, phase):
        """The slot after `stage`; phase is the parity of the rounds so far."""
        last = stage == self.STAGES - 1
        return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def allocate_slots(desc, ROWS: gl.constexpr, TILE_K: gl.constexpr, STAGES: gl.constexpr):
    PARTS: gl.constexpr = TILE_K // desc.block_shape[1]
    return gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS, ROWS, desc.block_shape[1]], desc.layout)


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr, LOADERS: gl.constexpr, CONSUMERS: gl.constexpr):
    """(full, empty) of one ring: loaders arrive at full, those who consume a tile at empty."""
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=LOADERS)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return full, empty


@gluon.jit
def full_box(first, rows, BOX: gl.constexpr):
    """Where to begin, for BOX rows from `first` on not to run past the last row. Those that are then done twice have
    the same bits both times; the TMA unit takes longer to fill a row in with zeros than to read it."""
    return gl.minimum(first, gl.maximum(rows - BOX, 0))


@gluon.constexpr_function
def box_sizes(most):
    """0, and the sizes that csrc/lbg.h's box_rows() gives a box of at most so many rows."""
    return (0, 1, 2, 4, *range(8, most + 1, 8))


@gluon.jit
def fill_ring(ring, desc, first, rows, K, POLICY: gl.constexpr):
    """Brings one operand's rows from `first` on into its ring, K ascending, as slots come free. A matrix of fewer rows
    than a tile has a smaller box, and the rest of a slot stays as it is: what is multiplied with it is not stored."""
    BOX: gl.constexpr = desc.block_shape[0]
    SIZES: gl.constexpr = box_sizes(BOX)
    PART_K: gl.constexpr = desc.block_shape[1]
    PARTS: gl.constexpr = ring.TILE_K // PART_K
    ROW_BYTES: gl.constexpr = PARTS * desc.nbytes_per_cta // BOX
    gdc_wait()
    stage = 0
    phase = 1  # every slot is free in the first round
    for k in range(0, K, ring.TILE_K):
        full = ring.full.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        if rows > SIZES[-2]:
            mbarrier.expect(full, BOX * ROW_BYTES)
        else:
            for size in gl.static_range(1, len(SIZES) - 1):
                fits = (rows > SIZES[size - 1]) & (rows <= SIZES[size])
                mbarrier.expect(full, SIZES[size] * ROW_BYTES, pred=fits)
        for part in gl.static_range(PARTS):
            slot = ring.slots.index(stage * PARTS + part)
            tma.async_load(desc, [first, k + part * PART_K], full, slot, cache_policy=POLICY)
        stage, phase = ring.next(stage, phase)


@gluon.jit
def ring_tile(
    x,
    weight,
    result,
    first_m,
    first_n,
    M,
    N,
    K,
    X_STAGES: gl.constexpr,
    OUT_ALIGNED: gl.constexpr,
):
    """Multiplies what the rings bring, finishes the tile and stores it."""
    scale_ptr, shift_ptr, out_ptr, stride_om = result
    TILE_M: gl.constexpr = x.slots.shape[1]
    TILE_N: gl.constexpr = weight.slots.shape[1]
    ROUNDS: gl.constexpr = x.slots.dtype != weight.slots.dtype
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE_N, 16])
    gdc_wait()
    # Read before the loop: at its end, nothing would hide that they come from DRAM.
    cols = gl.minimum(first_n + gl.arange(0, TILE_N, gl.SliceLayout(0, ACC)), N - 1)
    scale = gl.expand_dims(gl.load(scale_ptr + cols), 0)
    shift = gl.expand_dims(gl.load(shift_ptr + cols), 0)
    zeros = gl.zeros([TILE_M, TILE_N], gl.float32, ACC)
    if X_STAGES:
        acc = products_by_halves(x, weight, zeros, K)
    elif ROUNDS:
        acc = rounded_products(x, weight, zeros, K)
    else:
        acc = products(x, weight, zeros, K)

    # Through shared memory to a layout in which a thread stores 16 bytes, or a warp neighbours.
    VECTOR: gl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth if OUT_ALIGNED else 1
    ALONG_N: gl.constexpr = min(LANES, TILE_N // VECTOR)
    STORE: gl.constexpr = gl.BlockedLayout([1, VECTOR], [LANES // ALONG_N, ALONG_N], [WARPS, 1], [1, 0])
    y = relu_gelu(acc * scale + shift, out_ptr.dtype.element_ty)
    if ROUNDS:
        y = in_order(y)
    y = gl.convert_layout(y, STORE)
    rows = gl.expand_dims(first_m + gl.arange(0, TILE_M, gl.SliceLayout(1, STORE)), 1)
    if OUT_ALIGNED:
        first_n = gl.multiple_of(first_n, 8)
    cols = gl.expand_dims(first_n + gl.arange(0, TILE_N, gl.SliceLayout(0, STORE)), 0)
    gl.store(out_ptr + rows.to(gl.int64) * stride_om + cols, y, mask=(rows < M) & (cols < N))


@gluon.jit
def products(x, weight, zeros, K):
    """x @ weight.T of what the rings bring, which have the same barriers."""
    PARTS: gl.constexpr = x.TILE_K // x.slots.shape[2]
    acc = warpgroup_mma_init(zeros)
    stage = 0
    phase = 0
    last = 0
    for k in range(0, K, x.TILE_K):
        mbarrier.wait(x.full.index(stage), phase)
        for part in gl.static_range(PARTS):
            operand = weight.slots.index(stage * PARTS + part).permute((1, 0))
            acc = warpgroup_mma(x.slots.index(stage * PARTS + part), operand, acc, is_async=True)
        # This slot's products stay in flight; the slot before is done with.
        acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=PARTS, deps=(acc,)))
        mbarrier.arrive(x.empty.index(last), pred=k > 0)
        last = stage
        stage, phase = x.next(stage, phase)
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon.jit
def rounded_products(x, weight, zeros, K):
    """The same of a float32 x, of which a slot has twice as many parts as of the weight."""
    PARTS: gl.constexpr = x.TILE_K // x.slots.shape[2]
    ACC: gl.constexpr = zeros.type.layout
    DTYPE: gl.constexpr = weight.slots.dtype
    acc = zeros
    stage = 0
    phase = 0
    mbarrier.wait(x.full.index(0), 0)
    parts = load_parts(x, 0, ACC, DTYPE, 0, PARTS)
    for _ in range(x.TILE_K, K, x.TILE_K):
        acc = multiply_parts(parts, x, weight, stage, 0, acc)
        next_stage, next_phase = x.next(stage, phase)
        mbarrier.wait(x.full.index(next_stage), next_phase)
        next_parts = load_parts(x, next_stage, ACC, DTYPE, 0, PARTS)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(x.empty.index(stage))
        parts = next_parts
        stage = next_stage
        phase = next_phase
    acc = multiply_parts(parts, x, weight, stage, 0, acc)
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon.jit
def products_by_halves(x, weight, zeros, K):
    """The same where x has barriers of its own. Half of a slot of x is on its way to registers while the other half is
    rounded and multiplied."""
    PARTS: gl.constexpr = x.TILE_K // x.slots.shape[2]
    HALF: gl.constexpr = PARTS // 2
    ACC: gl.constexpr = zeros.type.layout
    DTYPE: gl.constexpr = x.slots.dtype  # rounded as they are multiplied, not as they are read
    acc = zeros
    stage = 0
    phase = 0
    x_stage = 0
    x_phase = 0
    mbarrier.wait(x.full.index(0), 0)
    first = load_parts(x, 0, ACC, DTYPE, 0, HALF)
    for _ in range(x.TILE_K, K, x.TILE_K):
        second = load_parts(x, x_stage, ACC, DTYPE, HALF, PARTS)
        mbarrier.wait(weight.full.index(stage), phase)
        acc = multiply_parts(first, x, weight, stage, 0, acc)
        next_stage, next_phase = x.next(x_stage, x_phase)
        mbarrier.wait(x.full.index(next_stage), next_phase)
        first = load_parts(x, next_stage, ACC, DTYPE, 0, HALF)
        acc = multiply_parts(second, x, weight, stage, HALF, acc)
        # No sooner: an arrival does not wait for loads that are on their way, but wgmma does for its registers.
        mbarrier.arrive(x.empty.index(x_stage))
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(weight.empty.index(stage))
        stage, phase = weight.next(stage, phase)
        x_stage = next_stage
        x_phase = next_phase
    second = load_parts(x, x_stage, ACC, DTYPE, HALF, PARTS)
    mbarrier.wait(weight.full.index(stage), phase)
    acc = multiply_parts(first, x, weight, stage, 0, acc)
    acc = multiply_parts(second, x, weight, stage, HALF, acc)
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon.jit
def load_parts(x, stage, ACC: gl.constexpr, DTYPE: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr):
    """Parts FIRST to END of a slot of a float32 x as wgmma takes them from registers, in DTYPE: a tensor a part."""
    PARTS: gl.constexpr = x.TILE_K // x.slots.shape[2]
    if FIRST == END:
        return ()
    else:
        part = load_spread(x.slots.index(stage * PARTS + FIRST), ACC).to(DTYPE)
        return (part,) + load_parts(x, stage, ACC, DTYPE, FIRST + 1, END)


@gluon.constexpr_function
def spread_rows(layout):
    """`layout` of rows whose order in_order puts right: of every 8 first the even ones, then the odd."""

    def spread(bases):
        return [[row & ~7 | row << 1 & 6 | row >> 2 & 1, column] for row, column in bases]

    parts = map(spread, (layout.reg_bases, layout.lane_bases, layout.warp_bases, layout.block_bases))
    return gl.DistributedLinearLayout(*parts, layout.shape)


@gluon.jit
def load_spread(slot, ACC: gl.constexpr):
    """A float32 slot as wgmma takes it from registers, its rows spread out: half of a warp reads 32 bytes of 4 rows at
    once, and the swizzle puts those of rows 0 and 1 into the same banks, those of rows 0, 2, 4 and 6 into all."""
    ROWS: gl.constexpr = slot.shape[0]
    COLUMNS: gl.constexpr = slot.shape[1]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    x = slot.load(spread_rows(gl.to_linear_layout(OPERAND, [ROWS, COLUMNS])))
    x = x.reshape((ROWS // 8, 4, 2, COLUMNS)).permute((0, 2, 1, 3)).reshape((ROWS, COLUMNS))
    return gl.convert_layout(x, OPERAND, assert_trivial=True)


@gluon.jit
def in_order(y):
    """A result's rows of an x from load_spread, in x's order: a renaming of registers."""
    ROWS: gl.constexpr = y.shape[0]
    COLUMNS: gl.constexpr = y.shape[1]
    return y.reshape((ROWS // 8, 2, 4, COLUMNS)).permute((0, 2, 1, 3)).reshape((ROWS, COLUMNS))


@gluon.jit
def multiply_parts(parts, x, weight, stage, FIRST: gl.constexpr, acc):
    """Begins acc + x @ weight.T of a slot's parts from FIRST on."""
    X_K: gl.constexpr = x.slots.shape[2]
    WEIGHT_K: gl.constexpr = weight.slots.shape[2]
    WEIGHT_PARTS: gl.constexpr = weight.TILE_K // WEIGHT_K
    for index in gl.static_range(len(parts)):
        operand = weight.slots.index(stage * WEIGHT_PARTS + (FIRST + index) * X_K // WEIGHT_K)
        operand = operand.slice((FIRST + index) * X_K % WEIGHT_K, X_K, dim=1).permute((1, 0))
        acc = warpgroup_mma(parts[index].to(weight.slots.dtype), operand, acc, is_async=True)
    return acc


# ---- many rows

# A thread, of a ws kernel's three warpgroups: all that there are. setmaxnreg moves them from those that load to those
# that hold an accumulator.
WS_REGISTERS = 168
# Of tiles: up to so many, groups of 4 rows of tiles share their operands better in L2 than groups of 8. On an H100, of
# 16 columns a float32 x took 2 to 4 % less time, a float16 one 0.5 %; of 32 both took 2 % more.
FEW_COLUMNS = gl.constexpr(16)
CONSUMERS = gl.constexpr(2)
# What of x may stay in an H100's L2.
L2_BYTES = gl.constexpr(2**25)
# Of a consumer, for parts of its result: one is filled while the other is stored.
OUT_BUFFERS = gl.constexpr(2)


@gluon.jit
def last_wave(tiles, PIECES: gl.constexpr):
    """(last, cut): how many of so many tiles are left for a last wave, and into how many pieces side by side they are
    cut, so that all of them have a place."""
    last = tiles % gl.num_programs(0)
    cut = 1
    for pieces in gl.static_range(2, PIECES + 1, 2):
        cut = gl.where(pieces * last <= gl.num_programs(0), pieces, cut)
    return last, cut


@gluon.jit
def are_beside(rows, tiles, pieces, PIECES: gl.constexpr):
    """Whether the CTAs that the last wave of so many tiles leaves without one are done with as many pieces as there are
    rows of tiles when it is. Two quarters take about as long as a tile, and so does a half."""
    last, cut = last_wave(tiles, PIECES)
    free = gl.num_programs(0) - cut * last
    return (last > 0) & ((2 * rows * cut <= free * pieces) | (rows <= free))


@gluon.jit
def piece_time(pieces):
    """What one of as many pieces of a tile takes, a tile 20: aot/rules.py's piece_share()."""
    return 8 + 12 // pieces


@gluon.jit
def tile_time(tiles, PIECES: gl.constexpr):
    """What so many tiles take, in the same unit."""
    last, cut = last_wave(tiles, PIECES)
    return tiles // gl.num_programs(0) * piece_time(1) + gl.where(last > 0, piece_time(cut), 0)


@gluon.jit
def narrow_columns(
    M,
    N,
    K,
    X_BYTES: gl.constexpr,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    CTAS: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What part of a tile the last columns need, as 4 for a quarter and 2 for a half, if as pieces of their own they
    take no longer than as tiles; else 1. Of a kernel that cuts no quarters 1: a half takes more than two thirds of a
    tile's time."""
    narrow = 1
    if PIECES == 4:
        columns = N % TILE_N
        if (columns > 0) & (2 * columns <= TILE_N):
            rows = gl.cdiv(M, TILE_M)
            tiles = rows * (N // TILE_N)
            pieces = gl.where(4 * columns <= TILE_N, 4, 2)
            beside = are_beside(rows, tiles, pieces, PIECES)
            alone = gl.where(beside, 0, gl.cdiv(rows, gl.num_programs(0)) * piece_time(pieces))
            # Tiles of a row share what they read of x; pieces after them, or beside the last of several waves, read
            # it anew.
            once = gl.where(beside, tiles < gl.num_programs(0), tiles == 0)
            read = read_time(M, K, X_BYTES, TILE_M * TILE_N // CTAS) - gl.where(beside, piece_time(1), 0)
            read = gl.where(once, 0, read)
            time = tile_time(tiles, PIECES) + gl.maximum(alone, read)
            narrow = gl.where(time <= tile_time(tiles + rows, PIECES), pieces, 1)
    return narrow


@gluon.jit
def read_time(M, K, X_BYTES: gl.constexpr, ELEMENTS: gl.constexpr):
    """What all of x takes to come from DRAM, in the same unit; 0 of an x that L2 may still have. In the time that a
    CTA's tile of so many elements takes for one of K, an H100's DRAM brings about as many bytes. With pieces that read
    x anew, to no use, tiles of a cluster took 402 us for 329 at 13282x616x8088 with a float32 x."""
    return gl.where(K > L2_BYTES // X_BYTES // M, M // (ELEMENTS // X_BYTES // piece_time(1)), 0)


@gluon.aggregate
class Tiling:
    M: gl.tensor
    N: gl.tensor
    K: gl.tensor
    TILE_M: gl.constexpr
    TILE_N: gl.constexpr
    TILE_K: gl.constexpr
    IN_TURN: gl.constexpr  # consumers take whole tiles by turns; else they share each, and take its steps by turns
    PIECES: gl.constexpr  # that a tile may be cut into: aot/configs.py's, and so the launcher's
    narrow: gl.tensor  # narrow_columns()

    @gluon.jit
    def steps(self):
        return gl.cdiv(self.K, self.TILE_K)

    @gluon.jit
    def rows(self):
        """Of tiles."""
        return gl.cdiv(self.M, self.TILE_M)

    @gluon.jit
    def columns(self):
        """Columns of whole tiles."""
        return gl.where(self.narrow > 1, self.N // self.TILE_N, gl.cdiv(self.N, self.TILE_N))

    @gluon.jit
    def count(self):
        """Whole tiles."""
        return self.rows() * self.columns()

    @gluon.jit
    def cut(self):
        """Into how many pieces the tiles of the last wave are cut."""
        _, cut = last_wave(self.count(), self.PIECES)
        return cut

    @gluon.jit
    def last(self):
        """Tiles of the last wave."""
        last, _ = last_wave(self.count(), self.PIECES)
        return last

    @gluon.jit
    def whole(self):
        """Tiles that are not cut."""
        return gl.where(self.cut() > 1, self.count() - self.last(), self.count())

    @gluon.jit
    def share(self, pieces):
        """(first, end) of the numbers of this CTA's pieces of a size. One of the last wave's tiles, if those are cut
        into so many, has number 0; those of the last columns, if they need that part of a tile, begin with number 1."""
        begin = gl.where((self.cut() == pieces) & (gl.program_id(0) < pieces * self.last()), 0, 1)
        first, stride = self.edge()
        rows = gl.where(self.narrow == pieces, self.rows(), 0)
        return begin, 1 + gl.where(first < rows, gl.cdiv(rows - first, stride), 0)

    @gluon.jit
    def edge(self):
        """(first, stride) of this CTA's rows of tiles in the last columns, if those are narrow: first come the CTAs
        that the last wave leaves without a tile, and alone if they are done when it is."""
        taken = self.cut() * self.last()
        free = gl.num_programs(0) - taken
        beside = are_beside(self.rows(), self.count(), self.narrow, self.PIECES)
        first = gl.program_id(0) - taken
        first = gl.where(first < 0, gl.where(beside, self.rows(), first + gl.num_programs(0)), first)
        return first, gl.where(beside, gl.maximum(free, 1), gl.num_programs(0))

    @gluon.jit
    def piece(self, number, pieces):
        """(tile, which piece of it) of a number within share(); the tiles of the last columns follow the whole ones."""
        first, stride = self.edge()
        edge = self.count() + first + (number - 1) * stride
        cut = self.whole() + gl.program_id(0) // pieces
        return gl.where(number == 0, cut, edge), gl.where(number == 0, gl.program_id(0) % pieces, 0)

    @gluon.jit
    def origin(self, tile, piece, COLUMNS: gl.constexpr):
        """(first row, first column) of a piece of COLUMNS of the tile-th tile; an edge's begins early enough to be
        whole."""
        tiles_m, tiles_n = self.rows(), self.columns()
        group = gl.where(gl.cdiv(self.N, self.TILE_N) > FEW_COLUMNS, 8, 4)
        if COLUMNS == self.TILE_N:
            tile_m, tile_n = tile_position(tile, tiles_m, tiles_n, group)
        else:
            # An edge's number is no whole tile's, of which there may be none: tile_position() divides by their columns.
            edge = tile - self.count()
            tile_m, tile_n = tile_position(gl.where(edge < 0, tile, 0), tiles_m, gl.maximum(tiles_n, 1), group)
            tile_m, tile_n = gl.where(edge < 0, tile_m, edge), gl.where(edge < 0, tile_n, tiles_n)
        first_n = tile_n * self.TILE_N + piece * COLUMNS
        return full_box(tile_m * self.TILE_M, self.M, self.TILE_M), full_box(first_n, self.N, COLUMNS)


@gluon.aggregate
class Rings:
    """Buffers in shared memory, STAGES of each operand. A float32 x has barriers of its own, as it is done with a step
    before the weight is; a 16-bit x has the weight's.

    In a cluster a slot of the weight is filled in both CTAs at once, by the first of them, when `both_empty` says that
    both are done with it; and x comes in a box for each consumer, half of whose rows are each CTA's.
    """

    x: gl.shared_memory_descriptor
    weight: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor  # OUT_BUFFERS a consumer
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    x_full: gl.shared_memory_descriptor
    x_empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor  # of each consumer: to multiply a tile, or a step of one that they share
    vectors: gl.shared_memory_descriptor  # scale and shift, in parts, of each tile that the consumers hold
    vectors_full: gl.shared_memory_descriptor
    vectors_empty: gl.shared_memory_descriptor
    both_empty: gl.shared_memory_descriptor  # of a cluster: the first CTA's, where the consumers of both arrive
    X_BOXES: gl.constexpr  # in a slot of x

    @gluon.jit
    def scale_and_shift(self, slot, part, PARTS: gl.constexpr):
        return self.vectors.index(2 * PARTS * slot + part), self.vectors.index((2 * slot + 1) * PARTS + part)


@gluon.jit
def allocate_rings(
    x_slots, weight_slots, tiling, EPILOGUE_PARTS: gl.constexpr, OUT_DTYPE: gl.constexpr, LOADER_WARPS: gl.constexpr
):
    """A tile's buffers and barriers, for the slots of its operands."""
    STAGES: gl.constexpr = weight_slots.shape[0]
    SHARED_BY: gl.constexpr = 1 if tiling.IN_TURN else CONSUMERS  # a tile and its operands
    ROWS: gl.constexpr = tiling.TILE_M // SHARED_BY
    COLUMNS: gl.constexpr = tiling.TILE_N // EPILOGUE_PARTS
    SPLIT: gl.constexpr = split_rows(gl.num_ctas())
    OUT_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], OUT_DTYPE, cga_layout=SPLIT)
    out_slots = gl.allocate_shared_memory(OUT_DTYPE, [CONSUMERS * OUT_BUFFERS, ROWS, COLUMNS], OUT_LAYOUT)
    full, empty = allocate_barriers(STAGES, 1, SHARED_BY)
    x_full, x_empty = full, empty
    if x_slots.dtype != weight_slots.dtype:
        x_full, x_empty = allocate_barriers(STAGES, 1, SHARED_BY)
    # Each block of a tile's columns needs its part of scale and shift, for which it would wait if it read it from L2:
    # on an H100 16384x4096x4096 takes 866.9 us for 880.9, 1024x4096x4096 54.1 for 55.6.
    TILES: gl.constexpr = CONSUMERS // SHARED_BY
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0], cga_layout=whole_vector(gl.num_ctas()))
    vectors = gl.allocate_shared_memory(gl.float32, [TILES * 2 * EPILOGUE_PARTS, COLUMNS], VECTOR)
    vectors_full, vectors_empty = allocate_barriers(TILES, LANES * LOADER_WARPS, SHARED_BY)
    turn = mbarrier.allocate_mbarrier(batch=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(consumer), count=1)
    both_empty = empty
    if gl.num_ctas() > 1:
        both_empty = mbarrier.allocate_mbarrier(batch=STAGES, two_ctas=True)
        for stage in gl.static_range(STAGES):
            mbarrier.init(both_empty.index(stage), count=SHARED_BY)  # of each CTA
    return Rings(
        x_slots,
        weight_slots,
        out_slots,
        full,
        empty,
        x_full,
        x_empty,
        turn,
        vectors,
        vectors_full,
        vectors_empty,
        both_empty,
        x_slots.shape[0] // STAGES,
    )


@gluon.jit
def stage_of(step, ring):
    """(buffer, parity) of the step-th use of a ring."""
    return step % ring.shape[0], step // ring.shape[0] & 1


@gluon.jit(repr=symbol)
def lbg_fused_ws(
    x,
    weight,
    weight_piece,  # the same in boxes of the narrowest piece's rows: a tile in two loads took 1 % longer
    scale_ptr,
    shift_ptr,
    out,  # a tensor map, or a pointer where the result's rows do not start on 16-byte boundaries
    M,
    N,
    K,
    stride_om,
    TILE_M: gl.constexpr,
    TILE_N: gl.constexpr,
    TILE_K: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE_PARTS: gl.constexpr,
    OUT_DTYPE: gl.constexpr,
    OUT_BY_TMA: gl.constexpr,
    IN_TURN: gl.constexpr,
    PIECES: gl.constexpr,
    SYMBOL: gl.constexpr,
):
    gl.static_assert(EPILOGUE_PARTS % OUT_BUFFERS == 0, "a tile must leave the buffers as it found them")
    gl.static_assert(gl.num_ctas() == 1 or not IN_TURN, "consumers of a cluster share each tile")
    X_BOXES: gl.constexpr = CONSUMERS if gl.num_ctas() > 1 else 1
    X_BYTES: gl.constexpr = x.dtype.primitive_bitwidth // 8
    narrow = narrow_columns(M, N, K, X_BYTES, TILE_M, TILE_N, gl.num_ctas(), PIECES)
    tiling = Tiling(M, N, K, TILE_M, TILE_N, TILE_K, IN_TURN, PIECES, gl.to_tensor(narrow))
    x_slots = gl.allocate_shared_memory(x.dtype, [STAGES * X_BOXES, TILE_M // X_BOXES, TILE_K], x.layout)
    weight_slots = gl.allocate_shared_memory(weight.dtype, [STAGES, TILE_N, TILE_K], weight.layout)
    rings = allocate_rings(x_slots, weight_slots, tiling, EPILOGUE_PARTS, OUT_DTYPE, 1)
    result = (out, stride_om)
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (consume, (0, result, rings, tiling, OUT_BY_TMA)),
            (consume, (1, result, rings, tiling, OUT_BY_TMA)),
            (load, (x, weight, weight_piece, (scale_ptr, shift_ptr), rings, tiling)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


@gluon.constexpr_function
def whole_vector(ctas):
    """Layouts' cga_layout of a vector that each CTA of a cluster has whole."""
    return {1: [], 2: [[0]]}[ctas]


@gluon.constexpr_function
def split_rows(ctas):
    """Layouts' cga_layout of what a cluster of two CTAs shares: half of the rows each."""
    return {1: [], 2: [[1, 0]]}[ctas]


@gluon.jit
def load(x, weight, weight_piece, vectors, rings, tiling):
    gdc_wait()
    step = 0
    done = 0
    for tile in range(gl.program_id(0), tiling.whole(), gl.num_programs(0)):
        step = load_tile(x, weight, vectors, tile, 0, step, done, rings, tiling, tiling.TILE_N)
        done += 1
    for pieces in gl.static_range(2, tiling.PIECES + 1, 2):
        begin, end = tiling.share(pieces)
        for number in range(begin, end):
            tile, nth = tiling.piece(number, pieces)
            step = load_tile(x, weight_piece, vectors, tile, nth, step, done, rings, tiling, tiling.TILE_N // pieces)
            done += 1


@gluon.jit
def load_tile(x, weight, vectors, tile, piece, step, done, rings, tiling, COLUMNS: gl.constexpr):
    """Brings the operands of a tile, or of a piece of COLUMNS, in, after `done` others; the ring's next step."""
    # What lies past the end of K is read as 0, and so are rows of a matrix smaller than a tile, which are not stored:
    # there is no tail and no mask.
    WIDE: gl.constexpr = x.dtype != weight.dtype
    X_BYTES: gl.constexpr = rings.X_BOXES * x.nbytes_per_cta
    WEIGHT_BYTES: gl.constexpr = COLUMNS // weight.block_shape[0] * weight.nbytes_per_cta
    first_m, first_n = tiling.origin(tile, piece, COLUMNS)
    for k in range(0, tiling.K, tiling.TILE_K):
        stage, parity = stage_of(step, rings.full)
        if WIDE:
            x_full = emptied(rings.x_full, rings.x_empty, stage, parity, X_BYTES)
            load_x(x, first_m, k, x_full, rings, stage)
            full = emptied(rings.full, rings.empty, stage, parity, WEIGHT_BYTES)
        else:
            full = emptied(rings.full, rings.empty, stage, parity, X_BYTES + WEIGHT_BYTES)
            load_x(x, first_m, k, full, rings, stage)
        load_weight(weight, first_n, k, full, rings, stage, parity, COLUMNS)
        step += 1
    load_vectors(vectors, first_n, done, rings, tiling, COLUMNS)
    return step


@gluon.jit
def load_vectors(vectors, first_n, done, rings, tiling, COLUMNS: gl.constexpr):
    """Brings in scale and shift of COLUMNS from first_n on, after `done` others. The tile's last operands are on their
    way, so that as a rule its consumers are done with the vectors before, and will not wait for these."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [LANES], [gl.num_warps()], [0], cga_layout=whole_vector(gl.num_ctas()))
    scale_ptr, shift_ptr = vectors
    slot, parity = stage_of(done, rings.vectors_full)
    PART: gl.constexpr = rings.vectors.shape[1]
    mbarrier.wait(rings.vectors_empty.index(slot), parity ^ 1)
    for part in gl.static_range(COLUMNS // PART):
        columns = first_n + part * PART + gl.arange(0, PART, LINE)
        scale, shift = rings.scale_and_shift(slot, part, tiling.TILE_N // PART)
        async_copy.async_load(scale, scale_ptr + columns, mask=columns < tiling.N)
        async_copy.async_load(shift, shift_ptr + columns, mask=columns < tiling.N)
    async_copy.mbarrier_arrive(rings.vectors_full.index(slot), increment_count=False)


@gluon.jit
def emptied(full, empty, stage, parity, BYTES: gl.constexpr):
    """Waits until this CTA is done with a slot; the barrier that then says that BYTES have come."""
    come = full.index(stage)
    mbarrier.wait(empty.index(stage), parity ^ 1)
    mbarrier.expect(come, BYTES)
    return come


@gluon.jit
def load_x(x, first_m, k, full, rings, stage):
    for box in gl.static_range(rings.X_BOXES):
        tma.async_load(x, [first_m + box * x.block_shape[0], k], full, rings.x.index(stage * rings.X_BOXES + box))


@gluon.jit
def load_weight(weight, first_n, k, full, rings, stage, parity, COLUMNS: gl.constexpr):
    if gl.num_ctas() > 1:
        mbarrier.wait(rings.both_empty.index(stage), parity ^ 1)  # the first CTA alone, which loads for both
    BOX: gl.constexpr = weight.block_shape[0]
    for box in gl.static_range(COLUMNS // BOX):
        slot = rings.weight.index(stage).slice(box * BOX, BOX)
        tma.async_load(weight, [first_n + box * BOX, k], full, slot, multicast=gl.num_ctas() > 1)


@gluon.jit
def x_rows(FIRST_ROW: gl.constexpr, rings, step):
    """One consumer's rows of a step's slot of x."""
    ROWS: gl.constexpr = rings.out.shape[1]
    stage, _ = stage_of(step, rings.x_full)
    if rings.x.shape[1] == ROWS:
        return rings.x.index(stage * rings.X_BOXES + FIRST_ROW // ROWS)
    else:
        return rings.x.index(stage).slice(FIRST_ROW, ROWS, 0)


@gluon.jit
def consume(WHO: gl.constexpr, result, rings, tiling, OUT_BY_TMA: gl.constexpr):
    TURNS: gl.constexpr = CONSUMERS if tiling.IN_TURN else 1
    TURN: gl.constexpr = WHO if tiling.IN_TURN else 0
    gdc_wait()
    step = TURN * tiling.steps()
    done = TURN
    for tile in range(gl.program_id(0) + TURN * gl.num_programs(0), tiling.whole(), TURNS * gl.num_programs(0)):
        if tiling.IN_TURN:
            # A wait tells odd rounds of a ring from even ones, no more: none may begin while the other's steps are out.
            wait_for_turn(WHO, rings, done // TURNS)
        step = consume_tile(WHO, tile, 0, step, done, result, rings, tiling, tiling.TILE_N, OUT_BY_TMA)
        if tiling.IN_TURN:
            step += tiling.steps()  # the other's
        done += TURNS
    for pieces in gl.static_range(2, tiling.PIECES + 1, 2):
        begin, end = tiling.share(pieces)
        for number in range(begin, end):
            tile, nth = tiling.piece(number, pieces)
            step = consume_tile(WHO, tile, nth, step, done, result, rings, tiling, tiling.TILE_N // pieces, OUT_BY_TMA)
            done += TURNS
    if OUT_BY_TMA:
        tma.store_wait(0)


@gluon.jit
def consume_tile(
    WHO: gl.constexpr,
    tile,
    piece,
    step,
    done,
    result,
    rings,
    tiling,
    COLUMNS: gl.constexpr,
    OUT_BY_TMA: gl.constexpr,
):
    """Multiplies, finishes and stores one consumer's rows of a tile, or of a piece of COLUMNS, after `done` others of
    its CTA; the ring's next step."""
    ROWS: gl.constexpr = rings.out.shape[1]
    ACCUMULATOR: gl.constexpr = accumulator_layout(COLUMNS, gl.num_warps(), gl.num_ctas())
    FIRST_ROW: gl.constexpr = 0 if tiling.IN_TURN else WHO * ROWS
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, ACCUMULATOR)
    # The loops count steps: against K itself, each pass would read K again, in the way of what it waits for. On an H100
    # the cluster's tile took 8 % less with a float32 x, 266 to 244 us at 4096x4096x4096 to float32.
    if rings.x.dtype == rings.weight.dtype:
        acc = multiply(WHO, x_rows(FIRST_ROW, rings, step), rings, tiling, zeros, step, COLUMNS, False)
        step += 1
        for _ in range(1, tiling.steps()):
            acc = multiply(WHO, x_rows(FIRST_ROW, rings, step), rings, tiling, acc, step, COLUMNS, True)
            # With this step's product under way, the last one's operands are done with.
            acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
            release(rings, step - 1)
            step += 1
    else:
        acc = zeros
        x = rounded(FIRST_ROW, rings, step, ACCUMULATOR)
        for nth in range(1, tiling.steps()):
            acc = multiply(WHO, x, rings, tiling, acc, step, COLUMNS, nth > 1)
            release_x(rings, step)
            next_x = rounded(FIRST_ROW, rings, step + 1, ACCUMULATOR)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            release(rings, step)
            x = next_x
            step += 1
        acc = multiply(WHO, x, rings, tiling, acc, step, COLUMNS, tiling.steps() > 1)
        release_x(rings, step)
        step += 1
    if tiling.IN_TURN:  # all of this consumer's operands have come
        end_turn(WHO, rings)
    first_m, first_n = tiling.origin(tile, piece, COLUMNS)
    wait_for_vectors(rings, done)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    release(rings, step - 1)
    finish(WHO, acc, done, first_m + FIRST_ROW, first_n, result, rings, tiling, OUT_BY_TMA)
    return step


@gluon.jit
def multiply(WHO: gl.constexpr, x, rings, tiling, acc, step, COLUMNS: gl.constexpr, add):
    """Begins acc + x @ weight.T of one step, of an x in shared memory or in registers; without add, x @ weight.T."""
    # Pieces, which follow all whole tiles, are bound by their loads: turns cost a float32 x 1 % at 4096x4104x4096.
    BY_TURNS: gl.constexpr = not tiling.IN_TURN and COLUMNS == tiling.TILE_N
    stage, parity = stage_of(step, rings.full)
    mbarrier.wait(rings.full.index(stage), parity)
    if BY_TURNS:
        wait_for_turn(WHO, rings, step)
    acc = warpgroup_mma(x, weight_columns(rings, stage, COLUMNS), acc, use_acc=add, is_async=True)
    if BY_TURNS:
        end_turn(WHO, rings)
    return acc


@gluon.jit
def wait_for_turn(WHO: gl.constexpr, rings, turn):
    """Until the other consumer's turn of the same number, or of the one before it, has ended."""
    mbarrier.wait(rings.turn.index(WHO), (turn + 1 + WHO) & 1)


@gluon.jit
def end_turn(WHO: gl.constexpr, rings):
    mbarrier.arrive(rings.turn.index(1 - WHO))


@gluon.jit
def weight_columns(rings, stage, COLUMNS: gl.constexpr):
    """The first COLUMNS of a slot of the weight, K first."""
    return rings.weight.index(stage).slice(0, COLUMNS).permute((1, 0))


@gluon.jit
def rounded(FIRST_ROW: gl.constexpr, rings, step, ACCUMULATOR: gl.constexpr):
    """One consumer's rows of a step's x, in weight's dtype, as wgmma takes them from registers."""
    stage, parity = stage_of(step, rings.x_full)
    mbarrier.wait(rings.x_full.index(stage), parity)
    return load_spread(x_rows(FIRST_ROW, rings, step), ACCUMULATOR).to(rings.weight.dtype)


@gluon.jit
def release_x(rings, step):
    """Gives back a step's float32 x, whose product has begun. No sooner: an arrival does not wait for loads that are on
    their way, and what the TMA unit writes does not queue behind them. wgmma does wait for its registers."""
    stage, _ = stage_of(step, rings.x_empty)
    mbarrier.arrive(rings.x_empty.index(stage))


@gluon.jit
def release(rings, step):
    stage, _ = stage_of(step, rings.empty)
    mbarrier.arrive(rings.empty.index(stage))
    if gl.num_ctas() > 1:
        mbarrier.arrive(rings.both_empty.index(stage))


@gluon.constexpr_function
def accumulator_layout(columns, warps, ctas):
    """How a consumer's warps hold its rows of a tile, in each CTA of a cluster."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16], cga_layout=split_rows(ctas))


@gluon.jit
def wait_for_vectors(rings, done):
    slot, parity = stage_of(done, rings.vectors_full)
    mbarrier.wait(rings.vectors_full.index(slot), parity)


@gluon.jit
def column_vectors(rings, tiling, slot, part):
    """(scale, shift) of a block of a tile's columns."""
    COLUMNS: gl.constexpr = rings.out.shape[2]
    COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator_layout(COLUMNS, gl.num_warps(), gl.num_ctas()))
    scale, shift = rings.scale_and_shift(slot, part, tiling.TILE_N // COLUMNS)
    return scale.load(COLUMN), shift.load(COLUMN)


@gluon.jit
def finish(WHO: gl.constexpr, acc, done, first_m, first_n, result, rings, tiling, OUT_BY_TMA: gl.constexpr):
    """Scales, shifts, activates and stores one consumer's rows of a tile, a block of columns after another.

    By halves, which run the same instructions: two consumers' programs are more than an SM holds of them, and missed
    what they had pushed out of each other, on an H100 a million times at 16384x4096x4096 with a float32 x. Without
    halves a 16-bit x takes 1 to 6 % longer, a float32 x up to 7 % where a tile has few steps, and 17 % at 2048x3072x768
    to float32; but 2 to 3 % less at 16384x4096x4096.
    """
    ROWS: gl.constexpr = rings.out.shape[1]
    PARTS: gl.constexpr = acc.shape[1] // rings.out.shape[2]
    slot, _ = stage_of(done, rings.vectors_full)
    if PARTS < 2 * OUT_BUFFERS:
        finish_parts(WHO, acc, slot, 0, first_m, first_n, result, rings, tiling, OUT_BY_TMA)
    else:
        HALF: gl.constexpr = accumulator_layout(acc.shape[1] // 2, gl.num_warps(), gl.num_ctas())
        left, right = column_parts(acc, ROWS, acc.shape[1], 2)
        right = gl.convert_layout(right, HALF, assert_trivial=True)
        half = gl.convert_layout(left, HALF, assert_trivial=True)
        for first in range(0, PARTS, PARTS // 2):
            finish_parts(WHO, half, slot, first, first_m, first_n, result, rings, tiling, OUT_BY_TMA)
            half = right
    # No sooner: an arrival does not wait for loads that are on their way, and what was stored has had its vectors.
    mbarrier.arrive(rings.vectors_empty.index(slot))


@gluon.jit
def finish_parts(
    WHO: gl.constexpr, acc, slot, first, first_m, first_n, result, rings, tiling, OUT_BY_TMA: gl.constexpr
):
    """finish() of a tile's parts from the first-th on, which acc has."""
    out, stride_om = result
    ROWS: gl.constexpr = rings.out.shape[1]
    COLUMNS: gl.constexpr = rings.out.shape[2]
    PARTS: gl.constexpr = acc.shape[1] // COLUMNS
    PART: gl.constexpr = accumulator_layout(COLUMNS, gl.num_warps(), gl.num_ctas())
    SPLIT: gl.constexpr = split_rows(gl.num_ctas())
    ALONG_N: gl.constexpr = min(LANES, COLUMNS)
    LANE: gl.constexpr = [LANES // ALONG_N, ALONG_N]
    LINES: gl.constexpr = gl.BlockedLayout([1, 1], LANE, [gl.num_warps(), 1], [1, 0], cga_layout=SPLIT)
    parts = column_parts(acc, ROWS, COLUMNS * PARTS, PARTS)
    for part in gl.static_range(PARTS):
        part_n = first_n + (first + part) * COLUMNS
        scale, shift = column_vectors(rings, tiling, slot, first + part)
        acc_part = gl.convert_layout(parts[part], PART, assert_trivial=True)
        y = relu_gelu(acc_part * gl.expand_dims(scale, 0) + gl.expand_dims(shift, 0), rings.out.dtype)
        if rings.x.dtype != rings.weight.dtype:
            y = in_order(y)
        buffer = rings.out.index(WHO * OUT_BUFFERS + part % OUT_BUFFERS)
        if OUT_BY_TMA:
            tma.store_wait(min(OUT_BUFFERS, PARTS) - 1)  # a piece of one part has the buffer of the one before it
            buffer.store(y)
            fence_async_shared()
            tma.async_store(out, [first_m, part_n], buffer)
        else:
            # Through shared memory all the same, so that a warp stores 32 neighbours of a row.
            buffer.store(y)
            m = first_m + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
            n = part_n + gl.arange(0, COLUMNS, gl.SliceLayout(0, LINES))
            inside = gl.expand_dims(m < tiling.M, 1) & gl.expand_dims(n < tiling.N, 0)
            line = gl.expand_dims(m.to(gl.int64) * stride_om, 1)
            gl.store(out + line + gl.expand_dims(n, 0), buffer.load(LINES), mask=inside)
