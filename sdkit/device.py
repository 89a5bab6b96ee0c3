"""Which device, and why: a backend is believed after a trial, not because it is reported.

Also what the machine is made of, without personal data, and how much memory a run took.
"""

import importlib.metadata
import os
import platform
import subprocess
import threading
from pathlib import Path

import psutil
import torch

from sdkit.validation import ValidationError

# No machine has both: MPS exists on macOS alone, where CUDA does not. MPS comes first for it is
# what this kit is about; the CPU always works and is always slow.
AUTO_ORDER = ("mps", "cuda", "cpu")
TRIAL_MIB = 16
GIB = 1024**3
# What changes how PyTorch computes or allocates; none of them holds a path.
ENVIRONMENT_VARIABLES = (
    "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO",
    "PYTORCH_MPS_LOW_WATERMARK_RATIO",
    "PYTORCH_MPS_FAST_MATH",
    "PYTORCH_MPS_PREFER_METAL",
    "OMP_NUM_THREADS",
)
PACKAGES = (
    "sdkit",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
)


def choose_device(backend="auto"):
    """Returns a device that has passed a trial, and why it was chosen.

    Hosted Macs report MPS and then fail to allocate. So a device is believed only after it has
    allocated 16 MiB, carried numbers there and back unchanged, and agreed with the CPU on a
    float32 matmul. What float16 does on it is another question, which the diagnosis answers.

    Args:
        backend: "auto" (the first of mps, cuda, cpu that passes), "mps", "cuda", "cuda:1" or "cpu".

    Returns:
        The `torch.device`, and one line that says why, with every device that was passed over.

    Raises:
        ValidationError: An unknown backend; or the one asked for is missing or fails its trial.
    """
    if backend != "auto":
        device = _parse_device(backend)
        problem = find_device_problem(device)
        if problem:
            raise ValidationError(
                f'backend="{backend}": {problem}. Expected a working device. '
                f'Use backend="auto" or "cpu"; this is torch {torch.__version__} on '
                f"{platform.system()} {platform.machine()}."
            )
        return device, f"{device}: asked for, and passed its trial"
    passed_over = []
    for name in AUTO_ORDER:
        problem = find_device_problem(torch.device(name))
        if problem is None:
            others = f" ({'; '.join(passed_over)})" if passed_over else ""
            reason = f"{name}: first of {', '.join(AUTO_ORDER)} to pass its trial{others}"
            return torch.device(name), reason
        passed_over.append(f"{name}: {problem}")
    raise ValidationError(f"No device passed its trial: {'; '.join(passed_over)}.")


def find_device_problem(device, dtype=torch.float32):
    """Returns in a few words why a device cannot compute in a dtype, or None if it can."""
    device = torch.device(device)
    backend = {"mps": torch.backends.mps, "cuda": torch.cuda}.get(device.type)
    if backend and not backend.is_available():
        return "not there"
    try:
        return _try_device(device, dtype)
    except Exception as error:  # drivers fail with whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"reported, but failed its trial ({reason})"


def _try_device(device, dtype):
    matrix = torch.linspace(-1, 1, 128 * 128).reshape(128, 128).to(dtype)
    torch.empty(TRIAL_MIB * 1024**2, dtype=torch.uint8, device=device).zero_()
    on_device = matrix.to(device)
    if not torch.equal(on_device.cpu(), matrix):
        return "numbers change on the way there and back"
    product = (on_device @ on_device.T).cpu().float()
    difference = (product - matrix.float() @ matrix.float().T).abs().max().item()
    # Sums of 128 products below 1: off by 0.06 in TF32, where that is allowed, by 0.5 in bfloat16.
    tolerance = 0.1 if dtype == torch.float32 else 1
    if not difference <= tolerance:  # NaN is within nothing
        return f"a matmul is off by {difference:.3g} from the CPU's"
    return None


def _parse_device(backend):
    try:
        device = torch.device(str(backend))  # a number would be an accelerator's
    except RuntimeError:
        device = None
    if device is None or device.type not in AUTO_ORDER:
        raise ValidationError(
            f"backend={backend!r}: expected auto, {', '.join(AUTO_ORDER)} or such as cuda:1."
        )
    return device


def describe_environment(backend="auto"):
    """Returns what a result depends on: versions, chip, memory, device and why, variables.

    Args:
        backend: Which device to describe; see `choose_device`.

    Returns:
        A dict of strings, numbers, bools and None, so that it prints and goes into JSON. Nothing
        personal is in it: no user, no host name, no path.
    """
    device, device_reason = choose_device(backend)
    system = platform.system()
    return {
        "python": platform.python_version(),
        "platform": system,
        "macos": platform.mac_ver()[0] or None,
        "machine": platform.machine(),
        "chip": _find_chip(system),
        # An x86 Python on Apple silicon runs translated, and sees no MPS.
        "rosetta": system == "Darwin" and _read_sysctl("sysctl.proc_translated") == "1",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        **{name: _find_version(name) for name in PACKAGES},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device_memory_gib": _measure_device_total_gib(device),
        "device_reason": device_reason,
        **{name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ},
    }


def _find_version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_chip(system):
    """The processor's trade name, "Apple M2 Max", or None where the system does not tell."""
    if system == "Darwin":
        return _read_sysctl("machdep.cpu.brand_string")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _read_sysctl(name):
    command = ["/usr/sbin/sysctl", "-n", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _measure_device_total_gib(device):
    if device.type == "cuda":
        return round(torch.cuda.get_device_properties(device).total_memory / GIB, 1)
    if device.type == "mps":
        return round(torch.mps.recommended_max_memory() / GIB, 1)
    return None


def synchronize(device):
    """Waits until the device has done what it was told, so that a clock may be read."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_available_gib(device):
    """Returns the memory that is free now for a model on this device, in GiB.

    On CUDA the card's own; else the machine's, which on MPS is shared with everything that runs,
    and of which Metal recommends to use no more than a part.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    available = psutil.virtual_memory().available
    if device.type == "mps":
        metal = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        available = min(available, metal)
    return available / GIB


def measure_memory(device):
    """Returns {"process_gib": resident memory, "device_gib": tensors on the device or None on CPU}.

    On a Mac both are the same unified memory and overlap: never add them up.
    """
    device = torch.device(device)
    device_gib = None
    if device.type == "cuda":
        device_gib = torch.cuda.memory_allocated(device) / GIB
    elif device.type == "mps":
        device_gib = torch.mps.current_allocated_memory() / GIB
    return {"process_gib": psutil.Process().memory_info().rss / GIB, "device_gib": device_gib}


class MemoryMeter:
    """Context manager that measures the peak memory of what runs inside it.

    The process is sampled from a thread, so a peak shorter than the interval may be missed. The
    device is asked for its own peak: CUDA always, MPS from torch 2.13; before that, what the MPS
    driver holds (its cache included) is sampled. Neither sees what MPSGraph takes for itself.

    Attributes:
        peak_process_gib: Peak resident memory of the process, what it held before included.
        peak_device_gib: Peak on the device, or None on the CPU.
        start_process_gib: Resident memory at the start, to tell what came on top.
        device_source: Where the device's number comes from, or None.
    """

    def __init__(self, device="cpu", *, interval_seconds=0.02):
        """Prepares a meter for a device, sampled every so many seconds."""
        self.device = torch.device(device)
        self.interval_seconds = interval_seconds
        self.start_process_gib = self.peak_process_gib = None
        self.peak_device_gib = self.device_source = None
        self._device_memory = _device_peak_memory(self.device)

    def __enter__(self):
        """Starts to measure."""
        self.start_process_gib = self.peak_process_gib = measure_memory("cpu")["process_gib"]
        if self._device_memory:
            self.device_source, reset, self._read_device = self._device_memory
            self.peak_device_gib = 0.0
            reset()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        """Stops, with one last sample."""
        self._stopped.set()
        self._thread.join()
        self._sample()

    def _sample_until_stopped(self):
        while not self._stopped.wait(self.interval_seconds):
            self._sample()

    def _sample(self):
        self.peak_process_gib = max(self.peak_process_gib, measure_memory("cpu")["process_gib"])
        if self._device_memory:
            self.peak_device_gib = max(self.peak_device_gib, self._read_device() / GIB)


def _device_peak_memory(device):
    """Returns (name of the source, how to reset it, how to read it), or None on the CPU."""
    if device.type == "cuda":
        return (
            "torch.cuda.max_memory_allocated",
            lambda: torch.cuda.reset_peak_memory_stats(device),
            lambda: torch.cuda.max_memory_allocated(device),
        )
    if device.type == "mps":
        # torch.accelerator has had memory functions since 2.9, for MPS since 2.13.
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13):
            return (
                "torch.accelerator.max_memory_allocated",
                torch.accelerator.reset_peak_memory_stats,
                torch.accelerator.max_memory_allocated,
            )
        sampled = torch.mps.driver_allocated_memory
        return "torch.mps.driver_allocated_memory, sampled", lambda: None, sampled
    return None
