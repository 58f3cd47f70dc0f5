"""Attention: the public calls (decode, prefill, cascade), the reference, and the kernels behind them."""
