"""A device is believed after a trial; here those that fail it are real ones."""

import getpass
import json
import socket
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sdkit.device
from sdkit.device import (
    MemoryMeter,
    choose_device,
    describe_environment,
    find_device_problem,
    measure_available_gib,
    measure_memory,
    synchronize,
)
from sdkit.validation import ValidationError

PRESENT = {
    "cpu": True,
    "cuda": torch.cuda.is_available(),
    "mps": torch.backends.mps.is_available(),
}


@pytest.fixture(params=PRESENT)
def device(request):
    if not PRESENT[request.param]:
        pytest.skip(f"no {request.param} here")
    return torch.device(request.param)


def test_auto_takes_a_device_that_works_and_says_what_it_passed_over():
    device, reason = choose_device()
    assert torch.ones(2, device=device).sum().item() == 2
    assert reason.startswith(f"{device}: ")
    for name in ("mps", "cuda")[: ("mps", "cuda", "cpu").index(device.type)]:
        assert f"{name}: not there" in reason or f"{name}: reported, but failed" in reason


def test_auto_falls_back_from_a_device_that_is_there_and_cannot_allocate(monkeypatch):
    # "meta" is there and holds no numbers: it fails for real, as a hosted Mac's MPS does.
    monkeypatch.setattr(sdkit.device, "AUTO_ORDER", ("meta", "cpu"))
    device, reason = choose_device()
    assert device.type == "cpu"
    assert "meta: reported, but failed its trial (" in reason
    with pytest.raises(ValidationError, match='backend="meta": reported, but failed its trial'):
        choose_device("meta")


class FirstMatmulIsWrong(TorchDispatchMode):
    """A device that computes 5 too much: the trial asks the device first, then the CPU."""

    was_wrong = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and not self.was_wrong:
            self.was_wrong = True
            result = result + 5
        return result


def test_a_device_that_computes_wrongly_is_not_believed():
    with FirstMatmulIsWrong():
        assert "off by 5" in find_device_problem("cpu")
    with FirstMatmulIsWrong(), pytest.raises(ValidationError, match="off by 5"):
        choose_device("cpu")


@pytest.mark.parametrize("backend", ["mps", "cuda", "cuda:7"])
def test_a_missing_backend_is_refused_with_the_next_step(backend):
    if PRESENT[backend[:4].rstrip(":")]:
        pytest.skip(f"{backend} may be here")
    with pytest.raises(ValidationError, match=f'backend="{backend}": not there.*backend="auto"'):
        choose_device(backend)


@pytest.mark.parametrize("backend", ["tpu", "", None, "CPU", 3, "xla"])
def test_an_unknown_backend_is_refused_with_those_that_there_are(backend):
    with pytest.raises(ValidationError, match="expected auto, mps, cuda, cpu"):
        choose_device(backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_present_device_passes_its_trial(device, dtype):
    assert find_device_problem(device, dtype) is None
    assert choose_device(device.type)[0].type == device.type


def test_the_environment_is_json_and_tells_nothing_personal():
    environment = describe_environment()
    text = json.dumps(environment)
    needed = {"python", "platform", "machine", "macos", "chip", "cores", "memory_gib", "rosetta"}
    assert needed | {"torch", "diffusers", "transformers", "device", "device_reason"} <= set(
        environment
    )
    assert environment["torch"].split("+")[0] == torch.__version__.split("+")[0]
    values = [str(value) for value in environment.values()]
    assert str(Path.home()) not in text
    assert socket.gethostname() not in values
    assert getpass.getuser() not in values
    assert not any(value.startswith("/") for value in values)


def test_variables_that_change_results_are_told(monkeypatch):
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert describe_environment()["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    assert "PYTORCH_ENABLE_MPS_FALLBACK" not in describe_environment()


def test_memory_is_measured(device):
    memory = measure_memory(device)
    assert memory["process_gib"] > 0.05
    assert (memory["device_gib"] is None) == (device.type == "cpu")
    assert measure_available_gib(device) > 0
    synchronize(device)


def test_the_meter_sees_a_peak_that_is_gone_at_the_end(device):
    with MemoryMeter(device) as meter:
        block = torch.ones(64, 1024, 1024, device=device)  # 256 MiB
        synchronize(device)
        time.sleep(0.2)
        del block
    peak = meter.peak_device_gib
    if device.type == "cpu":
        assert meter.peak_device_gib is None
        peak = meter.peak_process_gib - meter.start_process_gib
    assert 0.2 < peak < 1.5
