"""Spec and tile of the tiny kernel. Apart from it, so that tests can name it without importing the compiler."""

import dataclasses

PATH = "tests.jit.tiny_kernel:Tiny"


@dataclasses.dataclass(frozen=True)
class TinySpec:
    factor: float = 2.0
    label: str = "a"
    flag: bool = False
    optional: int | None = None
    dims: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class TinyTile:
    threads: int = 128
    smem: int = 1024
