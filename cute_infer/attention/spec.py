"""What code an attention call needs: the compile key.

An ``AttentionSpec`` holds every static fact a kernel may read and nothing that changes from call to call. Presence is static,
values are not: ``soft_cap=True`` compiles the tanh in, its strength is an argument. Two calls with equal specs (and equal tiles)
run the same machine code.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import torch

DTYPE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float8_e4m3fn": 8, "float8_e5m2": 8}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Static facts of one attention call.

    kind           "decode": exactly one query row per request. "prefill": rows of request r are q[qo_indptr[r]:qo_indptr[r+1]],
                   or all of q when there is a single request.
    kv_layout      "paged":  kv_indptr/kv_indices/kv_last_page_len address a cache of pages (CSR).
                   "ragged": request r owns tokens kv_indptr[r]:kv_indptr[r+1] of one long K and V.
                   "single": one request owns all of K and V; no metadata at all.
    group_size     query heads per KV head.
    page_size      tokens per page; 0 unless paged.
    causal         bottom-right aligned: key j is visible to query i iff j <= i + kv_len - qo_len. Ignored by decode.
    window         keys older than window_left are hidden (the value is an argument).
    soft_cap       logits = cap * tanh(q.k * sm_scale / cap) (the value is an argument).
    pos_encoding   "NONE", "ROPE_LLAMA" (neox halves, applied to q and k on the fly) or "ALIBI".
    custom_mask    packed little-endian bits per request, True = keep; overrides causal.
    sinks          per query head, exp(sink) joins the denominator.
    k_scale        a device tensor [num_kv_heads] multiplies k (plain float scales are folded into sm_scale and are not static). With 8-bit
                   queries it is [num_qo_heads]: the product of the scales of q and k.
    v_scale        the same for v.
    lse            the log-sum-exp is written.
    fp8_fast_accumulation   8-bit prefill leaves O in wgmma's short accumulator instead of adding it up in fp32; False for other kernels.
    """

    kind: str
    q_dtype: str
    kv_dtype: str
    o_dtype: str
    head_dim_qk: int
    head_dim_vo: int
    group_size: int
    kv_layout: str
    page_size: int = 0
    causal: bool = False
    window: bool = False
    soft_cap: bool = False
    pos_encoding: str = "NONE"
    custom_mask: bool = False
    sinks: bool = False
    k_scale: bool = False
    v_scale: bool = False
    lse: bool = False
    fp8_fast_accumulation: bool = False

    def __post_init__(self) -> None:
        assert self.kind in ("decode", "prefill"), self.kind
        assert self.kv_layout in ("paged", "ragged", "single"), self.kv_layout
        assert (self.page_size > 0) == (self.kv_layout == "paged"), self
        assert self.pos_encoding in ("NONE", "ROPE_LLAMA", "ALIBI"), self.pos_encoding

    @property
    def q_bits(self) -> int:
        return DTYPE_BITS[self.q_dtype]

    @property
    def kv_bits(self) -> int:
        return DTYPE_BITS[self.kv_dtype]

    def to_string(self) -> str:
        """Canonical JSON of the fields that differ from their defaults; the name under which torch ops carry the spec."""
        # Field by field: a traced function may hand plain values to a constant one, but not a dataclass.
        return _text_of(
            self.kind,
            self.q_dtype,
            self.kv_dtype,
            self.o_dtype,
            self.head_dim_qk,
            self.head_dim_vo,
            self.group_size,
            self.kv_layout,
            self.page_size,
            self.causal,
            self.window,
            self.soft_cap,
            self.pos_encoding,
            self.custom_mask,
            self.sinks,
            self.k_scale,
            self.v_scale,
            self.lse,
            self.fp8_fast_accumulation,
        )

    @staticmethod
    def from_string(text: str) -> AttentionSpec:
        """The inverse of :meth:`to_string`."""
        return _from_string(text)

    def __str__(self) -> str:
        """One readable line: ``decode q=bfloat16 kv=float8_e4m3fn d=128 group=8 paged page=16 lse``."""
        d = self.head_dim_qk if self.head_dim_qk == self.head_dim_vo else f"{self.head_dim_qk}/{self.head_dim_vo}"
        words = [self.kind, f"q={self.q_dtype}", f"kv={self.kv_dtype}", f"d={d}", f"group={self.group_size}", self.kv_layout]
        if self.o_dtype != self.q_dtype:
            words.insert(3, f"o={self.o_dtype}")
        if self.page_size:
            words.append(f"page={self.page_size}")
        if self.pos_encoding != "NONE":
            words.append(self.pos_encoding)
        flags = ("causal", "window", "soft_cap", "custom_mask", "sinks", "k_scale", "v_scale", "lse", "fp8_fast_accumulation")
        return " ".join(words + [f for f in flags if getattr(self, f)])


@torch.compiler.assume_constant_result
def _text_of(*values: str | int | bool) -> str:
    return _to_string(AttentionSpec(*values))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _to_string(spec: AttentionSpec) -> str:
    fields = {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if f.default is dataclasses.MISSING or getattr(spec, f.name) != f.default
    }
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def _from_string(text: str) -> AttentionSpec:
    return AttentionSpec(**json.loads(text))
