"""Append rows to a paged cache.

    cache[page, slot, head, :] = convert(rows[token, head, :])
    page = kv_indices[kv_indptr[batch_indices[token]] + positions[token] // page_size],  slot = positions[token] % page_size

One warp owns up to 128 vectors of one token (and the same of the second tensor): every lane loads 64 bytes of each before it knows where
they go, so the chain of page-table reads (batch_indices, kv_indptr, kv_indices) hides behind the copy.

Grid: (tokens / 4, vectors of a token / 128), 128 threads. Head dim, head count and page size are run-time values: one compiled kernel
serves every model of a dtype.

Never written: rows whose batch index is negative or not a request, negative positions, positions past the request's last page, pages
outside the cache. Addresses are 64-bit throughout; caches of more than 2^31 elements are ordinary.
Memory bound: tokens * heads * head_dim * (sizeof(row) + sizeof(cache)) bytes.
"""

import typing

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from ..attention.device.args import CUTE_DTYPES
from .variants import FP8_DTYPES, AppendSpec, AppendTile

WARP = 32
WARPS = 4  # tokens per CTA
BYTES_IN_FLIGHT = 64  # per lane and tensor: 2 tensors x 64 bytes = 32 registers


class AppendRows:
    """Copy (or convert) the rows of one or two tensors into their paged caches."""

    def __init__(self, spec: AppendSpec, tile: AppendTile):
        self.spec = spec
        self.tile = tile
        self.row_type = CUTE_DTYPES[spec.row_dtype]
        self.cache_type = CUTE_DTYPES[spec.cache_dtype]
        self.to_fp8 = spec.cache_dtype in FP8_DTYPES and spec.row_dtype != spec.cache_dtype
        self.vectors = min(4, BYTES_IN_FLIGHT * 8 // (tile.vector * self.row_type.width))  # per lane and tensor
        self.vectors_per_warp = WARP * self.vectors

    def abi(self) -> tuple:
        """Stand-ins for ``(first, second, batch_indices, positions, first_cache, second_cache, kv_indices, kv_indptr, stream)``.

        first, second               [tokens, heads, dim]; second and its cache may have another dim, or be None
        batch_indices, positions    [tokens] int32
        first_cache, second_cache   [pages, page_size, heads, dim], any strides that keep vectors aligned
        kv_indices                  [*] int32       kv_indptr   [requests + 1] int32
        """
        tokens, heads, pages, page_size = (cute.sym_int() for _ in range(4))

        def tensor(dtype, *leading):
            aligned = min(self.tile.vector, 128 // dtype.width)
            strides = tuple(cute.sym_int64(divisibility=aligned) for _ in leading)
            dim = cute.sym_int(divisibility=self.tile.vector)
            return make_fake_tensor(dtype, (*leading, dim), (*strides, 1), assumed_align=aligned * dtype.width // 8)

        def integers(length):
            return make_fake_tensor(Int32, (length,), (1,), assumed_align=4)

        second = self.spec.second
        return (
            tensor(self.row_type, tokens, heads),
            tensor(self.row_type, tokens, heads) if second else None,
            integers(tokens),
            integers(tokens),
            tensor(self.cache_type, pages, page_size, heads),
            tensor(self.cache_type, pages, page_size, heads) if second else None,
            integers(cute.sym_int()),
            integers(cute.sym_int()),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        first: cute.Tensor,
        second: typing.Optional[cute.Tensor],
        batch_indices: cute.Tensor,
        positions: cute.Tensor,
        first_cache: cute.Tensor,
        second_cache: typing.Optional[cute.Tensor],
        kv_indices: cute.Tensor,
        kv_indptr: cute.Tensor,
        stream: cuda.CUstream,
    ):
        vectors = first.shape[1] * first.shape[2] // self.tile.vector
        if const_expr(second is not None):
            other = second.shape[1] * second.shape[2] // self.tile.vector
            vectors = vectors if vectors > other else other
        self.kernel(first, second, batch_indices, positions, first_cache, second_cache, kv_indices, kv_indptr).launch(
            grid=[cute.ceil_div(first.shape[0], WARPS), cute.ceil_div(vectors, self.vectors_per_warp), 1],
            block=[WARP, WARPS, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        first: cute.Tensor,
        second: typing.Optional[cute.Tensor],
        batch_indices: cute.Tensor,
        positions: cute.Tensor,
        first_cache: cute.Tensor,
        second_cache: typing.Optional[cute.Tensor],
        kv_indices: cute.Tensor,
        kv_indptr: cute.Tensor,
    ):
        lane, warp, _ = cute.arch.thread_idx()
        group, slab, _ = cute.arch.block_idx()
        token = group * WARPS + warp
        vector = slab * self.vectors_per_warp + lane
        if token < first.shape[0]:
            first_rows = self.load(first, token, vector)
            if const_expr(second is not None):
                second_rows = self.load(second, token, vector)
            page, slot, found = self.find_slot(batch_indices[token], positions[token], first_cache, kv_indices, kv_indptr)
            if found:
                self.store(first_rows, first_cache, page, slot, vector)
                if const_expr(second is not None):
                    self.store(second_rows, second_cache, page, slot, vector)

    @cute.jit
    def find_slot(self, request: Int32, position: Int32, cache: cute.Tensor, kv_indices: cute.Tensor, kv_indptr: cute.Tensor):
        """``(page, slot, found)`` of a token; every value that came from memory is checked before it becomes an index."""
        pages, page_size = cache.shape[0], cache.shape[1]
        found = request >= 0 and request < kv_indptr.shape[0] - 1 and position >= 0
        request = request if found else Int32(0)
        position = position if found else Int32(0)
        page_of_request = position // page_size
        first_page, end_page = kv_indptr[request], kv_indptr[request + 1]
        entry = first_page + page_of_request  # below first_page if the sum wrapped
        found = found and first_page >= 0 and entry >= first_page and entry < end_page and entry < kv_indices.shape[0]
        page = kv_indices[entry if found else Int32(0)]
        found = found and page >= 0 and page < pages
        return page, position - page_of_request * page_size, found

    @cute.jit
    def load(self, rows: cute.Tensor, token: Int32, vector: Int32):
        """This lane's vectors of a token, as a register tensor [vector, vectors]; vectors past the token's end stay undefined."""
        width = self.tile.vector
        per_head = rows.shape[2] // width
        loaded = cute.make_rmem_tensor((width, self.vectors), self.row_type)
        for i in cutlass.range_constexpr(self.vectors):
            v = vector + i * WARP
            if v < rows.shape[1] * per_head:
                cute.autovec_copy(cute.local_tile(rows[token, v // per_head, None], (width,), (v % per_head,)), loaded[None, i])
        return loaded

    @cute.jit
    def store(self, loaded: cute.Tensor, cache: cute.Tensor, page: Int32, slot: Int32, vector: Int32):
        """Convert this lane's vectors and write them to ``cache[page, slot]``."""
        width = self.tile.vector
        per_head = cache.shape[3] // width
        for i in cutlass.range_constexpr(self.vectors):
            v = vector + i * WARP
            if v < cache.shape[2] * per_head:
                converted = self.convert(loaded[None, i])
                cute.autovec_copy(converted, cute.local_tile(cache[page, slot, v // per_head, None], (width,), (v % per_head,)))

    @cute.jit
    def convert(self, values: cute.Tensor):
        """One vector in the cache's dtype."""
        if const_expr(self.row_type is self.cache_type):
            converted = values
        elif const_expr(self.to_fp8 and not self.tile.hardware_fp8):
            converted = self.round_to_fp8(values)
        else:
            converted = cute.make_rmem_tensor(self.tile.vector, self.cache_type)
            converted.store(values.load().to(Float32).to(self.cache_type))
        return converted

    @cute.jit
    def round_to_fp8(self, values: cute.Tensor):
        """Round to nearest even and saturate, on the bits of fp32: sm_80 has no conversion to fp8.

        Normal results: drop the low mantissa bits after adding half of the last kept bit (minus one, plus the kept bit: ties to even).
        Subnormal results: the fp32 adder rounds, once a power of two is added whose last bit weighs as much as the smallest subnormal.
        """
        mantissa, bias, largest = (3, 7, 448.0) if const_expr(self.spec.cache_dtype == "float8_e4m3fn") else (2, 15, 57344.0)
        dropped = 23 - mantissa
        smallest_normal = 2.0 ** (1 - bias)
        subnormal_step = 2.0 ** (24 - bias - mantissa)  # 1 ulp of this fp32 value = 2**(1 - bias - mantissa)
        wide = cute.make_rmem_tensor(self.tile.vector, Float32)
        bits = cute.recast_tensor(wide, Uint32)
        packed = cute.make_rmem_tensor(self.tile.vector // 4, Uint32)
        for i in cutlass.range_constexpr(self.tile.vector):
            wide[i] = values[i].to(Float32)
            sign = (bits[i] >> 24) & 0x80
            is_nan = wide[i] != wide[i]
            bits[i] = bits[i] & 0x7FFFFFFF
            wide[i] = cute.arch.fmin(wide[i], Float32(largest))
            is_normal = wide[i] >= smallest_normal
            kept_bit = (bits[i] >> dropped) & 1
            normal = (bits[i] - ((127 - bias) << 23) + ((1 << (dropped - 1)) - 1) + kept_bit) >> dropped
            wide[i] = wide[i] + subnormal_step
            subnormal = bits[i] & 0xFF
            code = normal if is_normal else subnormal
            code = (Uint32(0x7F) if is_nan else code) | sign
            packed[i // 4] = code if const_expr(i % 4 == 0) else packed[i // 4] | (code << (8 * (i % 4)))
        return cute.recast_tensor(packed, self.cache_type)
