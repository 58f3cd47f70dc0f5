"""Targets: names, capabilities and limits."""

from __future__ import annotations

import pytest
import torch

from cute_infer.errors import DeviceError
from cute_infer.jit import Target


@pytest.mark.parametrize(
    "text, arch, smem",
    [
        ("sm_80", "sm_80", 166912),
        ("sm_86", "sm_80", 101376),
        ("sm_89", "sm_80", 101376),
        ("sm_90a", "sm_90a", 232448),
        ("sm_90", "sm_90a", 232448),
        ("9.0", "sm_90a", 232448),
        ("80", "sm_80", 166912),
        ("sm_100a", "sm_100a", 232448),
        ("12.0", "sm_120a", 101376),
    ],
)
def test_parse(text, arch, smem):
    target = Target.parse(text)
    assert (target.arch, target.smem_limit, target.is_hopper) == (arch, smem, arch == "sm_90a")
    assert target == Target.parse(text) and str(target) == arch


@pytest.mark.parametrize("text", ["sm_75", "7.0", "sm_53"])
def test_too_old(text):
    with pytest.raises(DeviceError, match=r"compute capability \d\.\d") as error:
        Target.parse(text)
    assert "8.0 (Ampere) or newer" in str(error.value)


@pytest.mark.parametrize("text", ["", "hopper", "sm_", "sm_9", "gfx942"])
def test_not_an_architecture(text):
    with pytest.raises(DeviceError, match="unknown architecture"):
        Target.parse(text)


@pytest.fixture
def device(monkeypatch):
    """Pretend that there is a device of the given capability."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")

    return pretend


def test_detect_without_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device"):
        Target.detect()


@pytest.mark.parametrize("capability, arch", [((8, 6), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a")])
def test_detect(device, capability, arch):
    device(capability)
    assert Target.detect("cuda:0").arch == arch


def test_detect_names_a_device_that_is_too_old(device):
    device((7, 5))
    with pytest.raises(DeviceError, match="Pretended GPU, compute capability 7.5"):
        Target.detect()


def test_environment_chooses_within_what_the_device_runs(device, setenv):
    device((8, 0))
    setenv("CUTE_INFER_ARCH", "sm_86")
    assert Target.detect().smem_limit == 101376
    setenv("CUTE_INFER_ARCH", "sm_90a")
    with pytest.raises(DeviceError, match="cannot run on this device"):
        Target.detect()
