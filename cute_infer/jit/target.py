"""For which chip code is generated, and what that chip offers.

A GPU runs the machine code of its own major version: sm_80 code runs on every 8.x device, sm_90a code on 9.0 only, and "a" code of
10.x and later on that exact version only. The cache key holds the architecture of the *code*; the limits below belong to the *device*,
so an A10 (8.6) shares its kernels with an A100 (8.0) but refuses those that need more shared memory than it has.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING

from ..config import get_config
from ..errors import DeviceError, fail

if TYPE_CHECKING:
    import torch

KIB = 1024
SMEM_LIMITS = {  # largest dynamic shared memory of one block, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
    (8, 0): 163 * KIB,
    (8, 6): 99 * KIB,
    (8, 7): 163 * KIB,
    (8, 9): 99 * KIB,
    (9, 0): 227 * KIB,
    (10, 0): 227 * KIB,
    (10, 3): 227 * KIB,
}
SMEM_LIMIT_OTHERS = 99 * KIB  # 12.x, and the smallest of all for what is newer than this table
OLDEST = (8, 0)


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip to generate code for.

    capability  compute capability of the device, ``(9, 0)``.
    arch        architecture of the code, ``"sm_90a"``: what the compiler is told and what the cache key holds.
    """

    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        major, minor = self.capability
        return "sm_80" if major == 8 else f"sm_{major}{minor}a"

    @property
    def is_hopper(self) -> bool:
        """TMA, wgmma, clusters and setmaxnreg exist."""
        return self.capability == (9, 0)

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory one block may use."""
        return SMEM_LIMITS.get(self.capability, SMEM_LIMIT_OTHERS)

    def __str__(self) -> str:
        return self.arch

    @staticmethod
    def parse(text: str) -> Target:
        """``"sm_90a"``, ``"sm_90"``, ``"90"`` or ``"9.0"`` -> Target. The trailing letter is implied by the version.

        Raises:
            DeviceError: not an architecture, or older than 8.0.
        """
        match = re.fullmatch(r"(?:sm_)?(\d{1,2})\.?(\d)[a-z]?", text.strip().lower())
        if match is None:
            fail(DeviceError, "unknown architecture", got=repr(text), expected='a name such as "sm_80" or "sm_90a"')
        return _supported((int(match[1]), int(match[2])), f"architecture {text}")

    @staticmethod
    def detect(device: torch.device | int | str | None = None) -> Target:
        """The target of a CUDA device (default: the current one); ``CUTE_INFER_ARCH`` overrides it.

        Raises:
            DeviceError: no CUDA device, a device older than 8.0, or CUTE_INFER_ARCH names code that the device cannot run.
        """
        import torch

        if not torch.cuda.is_available():
            fail(DeviceError, "no CUDA device to generate code for", fix='name one: Target.parse("sm_90a")')
        capability = torch.cuda.get_device_capability(device)
        here = _supported(capability, f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}")
        chosen = get_config().arch
        if chosen is None:
            return here
        target = Target.parse(chosen)
        if target.arch != here.arch:
            fail(
                DeviceError,
                f"CUTE_INFER_ARCH={chosen} cannot run on this device",
                got=f"{target.arch} code",
                expected=f"{here.arch} code",
                fix="unset CUTE_INFER_ARCH",
            )
        return target


@functools.lru_cache(maxsize=32)
def _supported(capability: tuple[int, int], name: str) -> Target:
    if capability < OLDEST:
        fail(
            DeviceError,
            f"{name} is too old",
            got=f"compute capability {capability[0]}.{capability[1]}",
            expected="8.0 (Ampere) or newer",
            fix='pass backend="reference"',
        )
    return Target(capability)
