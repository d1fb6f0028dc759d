"""Prototype: long products with loads that go on where a chunk or a tile ends."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def fetch(
    g,
    pid,
    programs,
    tiles,
    across,
    along,
    w_ptr,
    x_ptr,
    ws,
    xs,
    w_off,
    x_off,
    count,
    K: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    S: gl.constexpr,
    GROUP: gl.constexpr,
    X_ROWS: gl.constexpr,
):
    KT: gl.constexpr = K // BK
    tile = pid + g // KT * programs
    k = g % KT * BK
    column, token = place(tile, across, along, BM, BN, GROUP)
    there = tile < tiles
    w_at = w_ptr + column.to(gl.int64) * K + k
    x_at = x_ptr + token.to(gl.int64) * K + k
    s = g % S
    async_copy.async_copy_global_to_shared(ws.index(s), w_at + w_off, mask=(w_off >= 0) & there)
    rows = gl.expand_dims(gl.arange(0, BN, layout=X_ROWS), 1)
    async_copy.async_copy_global_to_shared(xs.index(s), x_at + x_off, mask=(rows < count - token) & there)
    async_copy.commit_group()


@gluon.jit
def place(tile, across, along, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    group = tile // (GROUP * across)
    height = gl.minimum(along - group * GROUP, GROUP)
    height = gl.maximum(height, 1)
    token = group * GROUP + tile % (GROUP * across) % height
    column = tile % (GROUP * across) // height
    return column * BM, token * BN


@gluon.jit
def long_kernel(
    w_ptr,
    x_ptr,
    o_ptr,
    columns,
    count,
    K: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    S: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    CHUNK: gl.constexpr = K // 8
    TILES: gl.constexpr = CHUNK // BK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LOAD)
    COLS: gl.constexpr = gl.SliceLayout(0, LOAD)
    ws = gl.allocate_shared_memory(gl.bfloat16, [S, BM, BK], SH)
    xs = gl.allocate_shared_memory(gl.bfloat16, [S, BN, BK], SH)
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    across = columns // BM
    along = (count + BN - 1) // BN
    tiles = across * along
    d = gl.expand_dims(gl.arange(0, BK, layout=COLS), 0)
    w_off = gl.expand_dims(gl.arange(0, BM, layout=ROWS), 1) * K + d
    x_off = gl.expand_dims(gl.arange(0, BN, layout=ROWS), 1) * K + d
    for g in gl.static_range(S - 1):
        fetch(g, pid, programs, tiles, across, along, w_ptr, x_ptr, ws, xs, w_off, x_off, count, K, BM, BN, BK, S, GROUP, ROWS)
    g = 0
    for tile in range(pid, tiles, programs):
        total = gl.zeros((BM, BN), gl.float32, ACC)
        for pair in range(4):
            half = gl.zeros((BM, BN), gl.float32, ACC)
            for two in gl.static_range(2):
                acc = warpgroup_mma_init(gl.zeros((BM, BN), gl.float32, ACC))
                for i in range(TILES):
                    async_copy.wait_group(S - 2)
                    fence_async_shared()
                    s = g % S
                    acc = warpgroup_mma(ws.index(s), xs.index(s).permute((1, 0)), acc, use_acc=i > 0, is_async=True)
                    acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
                    fetch(
                        g + S - 1,
                        pid,
                        programs,
                        tiles,
                        across,
                        along,
                        w_ptr,
                        x_ptr,
                        ws,
                        xs,
                        w_off,
                        x_off,
                        count,
                        K,
                        BM,
                        BN,
                        BK,
                        S,
                        GROUP,
                        ROWS,
                    )
                    g += 1
                done = warpgroup_mma_wait(0, deps=(acc,))
                if two == 0:
                    half = done
                else:
                    total = total + gl.fma(done, gl.full((BM, BN), 1.0, gl.float32, ACC), half)
        column, token = place(tile, across, along, BM, BN, GROUP)
        m = column + gl.arange(0, BM, layout=gl.SliceLayout(1, ACC))
        n = token + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
        at = o_ptr + gl.expand_dims(n, 0).to(gl.int64) * columns + gl.expand_dims(m, 1)
        gl.store(at, total.to(o_ptr.dtype.element_ty), mask=gl.expand_dims(n, 0) < count)


@gluon.jit
def part_kernel(w_ptr, x_ptr, p_ptr, columns, count, step, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
                S: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr):
    """A chunk of a tile: its weights are on their way before it waits for the launch before."""
    CHUNK: gl.constexpr = K // 8
    TILES: gl.constexpr = CHUNK // BK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LOAD)
    COLS: gl.constexpr = gl.SliceLayout(0, LOAD)
    ws = gl.allocate_shared_memory(gl.bfloat16, [S, BM, BK], SH)
    xs = gl.allocate_shared_memory(gl.bfloat16, [S, BN, BK], SH)
    across = columns // BM
    tiles = across * ((count + BN - 1) // BN)
    tile = gl.program_id(0) % tiles
    part = gl.program_id(0) // tiles
    column, token = tile % across * BM, tile // across * BN
    d = gl.expand_dims(gl.arange(0, BK, layout=COLS), 0)
    w_off = gl.expand_dims(gl.arange(0, BM, layout=ROWS), 1) * K + d
    rows = gl.expand_dims(gl.arange(0, BN, layout=ROWS), 1)
    x_off = rows * K + d
    w_at = w_ptr + column.to(gl.int64) * K + part * CHUNK
    x_at = x_ptr + token.to(gl.int64) * K + part * CHUNK
    inside = rows < count - token
    for g in gl.static_range(S - 1):
        async_copy.async_copy_global_to_shared(ws.index(g), w_at + g * BK + w_off, mask=(w_off >= 0) & (g < TILES))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for g in gl.static_range(S - 1):
        async_copy.async_copy_global_to_shared(xs.index(g), x_at + g * BK + x_off, mask=inside & (g < TILES))
        async_copy.commit_group()  # the first has all weights
    acc = warpgroup_mma_init(gl.zeros((BM, BN), gl.float32, ACC))
    for i in range(TILES):
        async_copy.wait_group(S - 2)
        fence_async_shared()
        s = i % S
        acc = warpgroup_mma(ws.index(s), xs.index(s).permute((1, 0)), acc, use_acc=i > 0, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        h = i + S - 1
        async_copy.async_copy_global_to_shared(ws.index(h % S), w_at + h * BK + w_off, mask=(w_off >= 0) & (h < TILES))
        async_copy.async_copy_global_to_shared(xs.index(h % S), x_at + h * BK + x_off, mask=inside & (h < TILES))
        async_copy.commit_group()
    total = warpgroup_mma_wait(0, deps=(acc,))
    m = column + gl.arange(0, BM, layout=gl.SliceLayout(1, ACC))
    n = token + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
    at = p_ptr + part.to(gl.int64) * step + gl.expand_dims(n, 0).to(gl.int64) * columns + gl.expand_dims(m, 1)
    gl.store(at, total, mask=gl.expand_dims(n, 0) < count)


@gluon.jit
def fetch_unit(g, pid, programs, units, tiles, across, w_ptr, x_ptr, ws, xs, w_off, x_off, rows, count, K: gl.constexpr,
               BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, S: gl.constexpr):
    TILES: gl.constexpr = K // 8 // BK
    unit = pid + g // TILES * programs
    k = unit // tiles * (K // 8) + g % TILES * BK
    column, token = unit % tiles % across * BM, unit % tiles // across * BN
    there = unit < units
    s = g % S
    async_copy.async_copy_global_to_shared(ws.index(s), w_ptr + (column.to(gl.int64) * K + k) + w_off, mask=(w_off >= 0) & there)
    inside = (rows < count - token) & there
    async_copy.async_copy_global_to_shared(xs.index(s), x_ptr + (token.to(gl.int64) * K + k) + x_off, mask=inside)
    async_copy.commit_group()


@gluon.jit
def unit_kernel(w_ptr, x_ptr, p_ptr, columns, count, step, K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
                S: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr):
    """Chunks of tiles in turn, with loads that go on from one to the next."""
    TILES: gl.constexpr = K // 8 // BK
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    SH: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, LOAD)
    COLS: gl.constexpr = gl.SliceLayout(0, LOAD)
    ws = gl.allocate_shared_memory(gl.bfloat16, [S, BM, BK], SH)
    xs = gl.allocate_shared_memory(gl.bfloat16, [S, BN, BK], SH)
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    across = columns // BM
    tiles = across * ((count + BN - 1) // BN)
    units = tiles * 8
    d = gl.expand_dims(gl.arange(0, BK, layout=COLS), 0)
    w_off = gl.expand_dims(gl.arange(0, BM, layout=ROWS), 1) * K + d
    rows = gl.expand_dims(gl.arange(0, BN, layout=ROWS), 1)
    x_off = rows * K + d
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for j in gl.static_range(S - 1):
        fetch_unit(j, pid, programs, units, tiles, across, w_ptr, x_ptr, ws, xs, w_off, x_off, rows, count, K, BM, BN, BK, S)
    g = 0
    for unit in range(pid, units, programs):
        acc = warpgroup_mma_init(gl.zeros((BM, BN), gl.float32, ACC))
        for i in range(TILES):
            async_copy.wait_group(S - 2)
            fence_async_shared()
            s = g % S
            acc = warpgroup_mma(ws.index(s), xs.index(s).permute((1, 0)), acc, use_acc=i > 0, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            fetch_unit(g + S - 1, pid, programs, units, tiles, across, w_ptr, x_ptr, ws, xs, w_off, x_off, rows, count, K, BM, BN, BK, S)
            g += 1
        total = warpgroup_mma_wait(0, deps=(acc,))
        column, token = unit % tiles % across * BM, unit % tiles // across * BN
        m = column + gl.arange(0, BM, layout=gl.SliceLayout(1, ACC))
        n = token + gl.arange(0, BN, layout=gl.SliceLayout(0, ACC))
        part = unit // tiles
        at = p_ptr + part.to(gl.int64) * step + gl.expand_dims(n, 0).to(gl.int64) * columns + gl.expand_dims(m, 1)
        gl.store(at, total, mask=gl.expand_dims(n, 0) < count)
