"""Benchmarks of cute_infer beside its peers, through public APIs only.

    python -m benchmarks decode [--quick] [--only REGEX] [--out DIR]

protocol.py says how a number is taken, peers.py who is measured, the other modules which cases.
"""
