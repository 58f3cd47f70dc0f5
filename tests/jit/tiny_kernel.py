"""The smallest kernel that has a spec, a tile and shared memory: x[i] = x[i] * factor + 1. For tests of the machinery around it."""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator


class Tiny:
    """One block of ``tile.threads`` threads; ``tile.smem`` bytes of shared memory are allocated and touched."""

    def __init__(self, spec, tile):
        self.spec = spec
        self.tile = tile

    def abi(self):
        x = make_fake_tensor(cutlass.Float32, (cute.sym_int(),), (1,), assumed_align=4)
        return (x, cutlass.Int32(1), make_fake_stream(use_tvm_ffi_env_stream=True))

    @cute.jit
    def __call__(self, x: cute.Tensor, n: cutlass.Int32, stream: cuda.CUstream):
        self.kernel(x, n).launch(grid=[1, 1, 1], block=[self.tile.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, n: cutlass.Int32):
        smem = SmemAllocator().allocate_tensor(cutlass.Float32, cute.make_layout(self.tile.smem // 4))
        i = cute.arch.thread_idx()[0]
        for _ in cutlass.range(n, unroll=1):
            smem[i] = x[i]
            x[i] = smem[i] * cutlass.Float32(self.spec.factor) + 1.0
