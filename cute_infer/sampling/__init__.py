"""Sampling: FlashInfer's ``flashinfer.sampling`` by name, and :func:`sample`, the whole step from raw logits in one launch."""

from __future__ import annotations

from .filters import softmax, top_k, top_k_mask_logits, top_k_renorm_probs, top_p_renorm_probs
from .samplers import (
    min_p_sampling_from_probs,
    sample,
    sampling_from_logits,
    sampling_from_probs,
    top_k_sampling_from_logits,
    top_k_sampling_from_probs,
    top_k_top_p_sampling_from_logits,
    top_k_top_p_sampling_from_probs,
    top_p_sampling_from_logits,
    top_p_sampling_from_probs,
)
from .speculative import chain_speculative_sampling

top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs

__all__ = [
    "chain_speculative_sampling",
    "min_p_sampling_from_probs",
    "sample",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k",
    "top_k_mask_logits",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_k_sampling_from_logits",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "top_p_sampling_from_logits",
    "top_p_sampling_from_probs",
]
