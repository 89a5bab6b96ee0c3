"""Runs probes on a device, or through an emulation, and says what came of each."""

import time

import torch
from tqdm.auto import tqdm

from sdkit.device import choose_device, synchronize
from sdkit.diagnosis.probes import attention, layers, stale_memory, training, values
from sdkit.diagnosis.probes.probe import Probe, ProbeResult
from sdkit.emulate import active as find_emulation
from sdkit.validation import ValidationError

PROBES = {
    probe.name: probe
    for theme in (stale_memory, attention, layers, values, training)
    for probe in theme.PROBES
}
BAR_DELAY_SECONDS = 5
BAR = "{desc} {percentage:3.0f}%|{bar:40}| {n_fmt}/{total_fmt}{postfix}"
# How backends say that an op, a dtype or the memory is not there: loud, so no contract is broken.
MISSING = (
    "not implemented",
    "not currently implemented",
    "not supported",
    "not currently supported",
    "does not support",
    "unsupported",
    "out of memory",
)


def run_probes(device="auto", *, thorough=False, names=None, progress=False):
    """Tries on a device every contract that Stable Diffusion relies on.

    Each probe computes something small on the device, and the same in float64 on the CPU; all is
    judged on copies on the CPU. Under `sdkit.emulate` the probes run through the emulation.

    Args:
        device: "auto", "mps", "cuda", "cuda:1", "cpu" or a torch.device; see `choose_device`.
        thorough: Use the sizes of Stable Diffusion 1.5, instead of what takes seconds.
        names: Names of the probes to run, by default all of `PROBES`.
        progress: Show a progress bar if it takes over 5 seconds.

    Returns:
        A tuple of one ProbeResult a probe.

    Raises:
        ValidationError: An unknown probe; an unknown device, or one that is not there.
    """
    probes = choose_probes(names)
    device = _choose_device(device)
    results = []
    with tqdm(
        probes, desc="probes", unit="probe", delay=BAR_DELAY_SECONDS, disable=not progress,
        leave=False, bar_format=BAR,
    ) as bar:  # fmt: skip
        for probe in bar:
            bar.set_postfix_str(probe.name, refresh=False)
            results.append(run_probe(probe, device, thorough=thorough))
    return tuple(results)


def choose_probes(names):
    """Returns the probes of these names, or all.

    Raises:
        ValidationError: An unknown name.
    """
    if names is None:
        return tuple(PROBES.values())
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        raise ValidationError(
            f"probe {unknown[0]!r}: unknown. Expected some of {', '.join(PROBES)}."
        )
    return tuple(PROBES[name] for name in names)


def _choose_device(device):
    emulation = find_emulation()
    if emulation is None:
        return choose_device(str(device))[0]
    if str(device) not in ("auto", "cpu", "mps"):
        raise ValidationError(
            f'device="{device}": expected auto, cpu or mps under {emulation}, which runs on the '
            "CPU. Leave the emulation to probe a device."
        )
    return torch.device("cpu")


@torch.no_grad()
def run_probe(probe: Probe, device, *, thorough=False):
    """Runs one probe.

    Args:
        probe: The probe.
        device: A torch.device that works.
        thorough: See `run_probes`.

    Returns:
        A ProbeResult: "fail" if a number is out of bounds or the device raised an error,
        "not-runnable" if it says that it lacks an op, a dtype or memory.
    """
    emulated = find_emulation() is not None
    started = time.perf_counter()
    try:
        checks = tuple(probe.measure(device, thorough))
        synchronize(device)
    except Exception as error:  # backends fail with whatever they like
        text = " ".join(str(error).split())[:200] or type(error).__name__
        is_missing = isinstance(error, (NotImplementedError, MemoryError)) or any(
            words in text.lower() for words in MISSING
        )
        status = "not-runnable" if is_missing else "fail"
        return ProbeResult(probe.name, status, f"{type(error).__name__}: {text}")
    broken = [check for check in checks if not check.is_kept]
    return ProbeResult(
        name=probe.name,
        status="fail" if broken else "pass",
        message=_describe(broken),
        evidence={check.name: check.value for check in checks},
        allowed={check.name: check.allowed for check in checks},
        seconds=None if emulated else time.perf_counter() - started,
    )


def _describe(broken):
    if not broken:
        return ""
    first = broken[0]
    others = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    value, allowed = (
        f"{number:,}" if isinstance(number, int) else f"{number:.3g}"
        for number in (first.value, first.allowed)
    )
    return f"{first.name} {value} (at most {allowed}){others}"
