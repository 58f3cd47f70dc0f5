"""The one argument list every attention kernel takes, as compile-time stand-ins.

``launch.py`` passes exactly these, in this order, for every kernel of both architectures; what a spec does not need is ``None`` and
disappears at compile time. Extents and strides are symbolic, so one compiled kernel serves every batch, cache and view.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from ..spec import AttentionSpec

CUTE_DTYPES = {
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "float32": cutlass.Float32,
    "float8_e4m3fn": cutlass.Float8E4M3FN,
    "float8_e5m2": cutlass.Float8E5M2,
}


def fake_args(spec: AttentionSpec, split_kv: bool) -> tuple:
    """Stand-ins for (tensors..., scalars..., stream), the signature of every attention kernel's ``__call__``.

    q               [total_q, num_qo_heads, head_dim_qk]
    k, v            [pages, page_size, num_kv_heads, head_dim]; ragged and single pass [1, tokens, num_kv_heads, head_dim]
    out             [total_q, num_qo_heads, head_dim_vo]
    lse             [total_q, num_qo_heads] fp32 or None
    qo_indptr       [batch + 1] int32; None for decode and for a single request
    kv_indptr       [batch + 1] int32, in pages (paged) or tokens (ragged); None for a single request
    kv_indices      [*] int32, paged only
    kv_last_page_len[batch] int32, paged only
    mask            packed bits uint8; mask_indptr [batch + 1] int32 in bytes; None without custom_mask
    sinks           [num_qo_heads] fp32 or None
    k_scale, v_scale[num_kv_heads] fp32 or None; for 8-bit q k_scale is [num_qo_heads], the product of the scales of q and k
    out_partial     [num_splits, total_q, num_qo_heads, head_dim_vo] fp32 (normalised), lse_partial [num_splits, total_q, num_qo_heads]
                    fp32 base 2; None unless split_kv
    status          [4] int32: [0] is set to 1 when a page id was outside the cache, [1:3] are a work queue (zero between launches)
    sm_scale        natural softmax scale (times float q/k scales)      out_scale   multiplies the output (float v scale)
    soft_cap        logits cap, > 0 when spec.soft_cap                  lse_scale   1 for base 2, ln 2 for natural
    rope_rcp_scale  1 / rope_scale                                      rope_log2_theta   log2(rope_theta)
    window_left     >= 0 when spec.window                               num_splits  KV splits (1 unless split_kv)
    num_ctas        CTAs a persistent grid starts
    """
    free = cute.sym_int64
    total_q, qo_heads, kv_heads, pages = (cute.sym_int() for _ in range(4))

    def stride(bits: int):  # every row starts on a 16-byte boundary
        return cute.sym_int64(divisibility=128 // bits)

    def rows(dtype: str, dim: int):
        bits = CUTE_DTYPES[dtype].width
        return make_fake_tensor(CUTE_DTYPES[dtype], (total_q, qo_heads, dim), (stride(bits), stride(bits), 1), assumed_align=16)

    def cache(dim: int):
        bits = spec.kv_bits
        page = spec.page_size or cute.sym_int()
        return make_fake_tensor(
            CUTE_DTYPES[spec.kv_dtype],
            (pages, page, kv_heads, dim),
            (stride(bits), stride(bits), stride(bits), 1),
            assumed_align=16,
        )

    def vector(dtype, present: bool, length=None):
        return make_fake_tensor(dtype, (length or cute.sym_int(),), (1,), assumed_align=dtype.width // 8) if present else None

    def scale(present: bool, heads):  # a 0-stride expansion of one element is welcome
        return make_fake_tensor(cutlass.Float32, (heads,), (free(),), assumed_align=4) if present else None

    paged, single = spec.kv_layout == "paged", spec.kv_layout == "single"
    f32 = cutlass.Float32
    splits = cute.sym_int()
    partial = (splits, total_q, qo_heads)
    return (
        rows(spec.q_dtype, spec.head_dim_qk),
        cache(spec.head_dim_qk),
        cache(spec.head_dim_vo),
        rows(spec.o_dtype, spec.head_dim_vo),
        make_fake_tensor(f32, (total_q, qo_heads), (free(), free()), assumed_align=4) if spec.lse else None,
        vector(cutlass.Int32, spec.kind == "prefill" and not single),
        vector(cutlass.Int32, not single),
        vector(cutlass.Int32, paged),
        vector(cutlass.Int32, paged),
        vector(cutlass.Uint8, spec.custom_mask),
        vector(cutlass.Int32, spec.custom_mask),
        vector(f32, spec.sinks, qo_heads),
        scale(spec.k_scale, qo_heads if spec.q_bits == 8 else kv_heads),
        scale(spec.v_scale, kv_heads),
        make_fake_tensor(f32, (*partial, spec.head_dim_vo), (free(), free(), free(), 1), assumed_align=16) if split_kv else None,
        make_fake_tensor(f32, partial, (free(), free(), 1), assumed_align=4) if split_kv else None,
        make_fake_tensor(cutlass.Int32, (4,), (1,), assumed_align=16),
        *(f32(1.0) for _ in range(6)),
        *(cutlass.Int32(1) for _ in range(3)),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
