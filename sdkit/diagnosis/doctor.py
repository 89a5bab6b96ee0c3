"""A check-up of this machine: what it is, what its device does wrong, and what to do about it."""

import json
import warnings
from dataclasses import asdict, dataclass

import torch

from sdkit.device import GIB, describe_environment, measure_available_gib
from sdkit.diagnosis.known_faults import find_known_faults, read_version
from sdkit.diagnosis.probe_cache import find_cached, make_key, save_cached
from sdkit.diagnosis.probes import run_probes
from sdkit.emulate import FAULTS, EmulationWarning, mps
from sdkit.emulate import active as find_emulation
from sdkit.generation.record import plain
from sdkit.loading.checkpoint import count_weights, find_checkpoint
from sdkit.loading.dtype_policy import choose_dtypes
from sdkit.validation import ValidationError

# Its UNet, VAE and text encoder hold 1,066,235,307 weights, by their published configurations.
SD15_FLOAT32_GIB = 1_066_235_307 * 4 / GIB
UNTIL_THEN = {  # what to do about a probe that fails, whatever the release
    "baddbmm-beta-zero": 'Keep attention="sdpa" and never call enable_attention_slicing(): sdkit '
    "refuses attention that reads this memory on this device.",
    "scores-baddbmm": 'Load with dtype="bfloat16" or "float32": scores overflow in float16.',
    "scores-sdpa": 'Load with dtype="bfloat16" or "float32": scores overflow in float16.',
    "group-norm-range": 'Load with dtype="bfloat16" or "float32": norms overflow in float16.',
    "layer-norm-range": 'Load with dtype="bfloat16" or "float32": norms overflow in float16.',
    "softmax-long-rows": 'Load with dtype="float32": sums over many keys lose their precision.',
    "randn-values": "Draw noise on the CPU, as `generate` does.",
    "randn-distinct": "Draw noise on the CPU, as `generate` does.",
    "host-copies": "Load onto the CPU and move the whole, as `load_pipeline` does; no device_map.",
    "clamp-keeps-nan": "Look for NaN with torch.isfinite, as the guard does, before any clamp.",
    "maximum-keeps-nan": "Look for NaN with torch.isfinite, as the guard does, not with max().",
    "addcdiv-transposed": "Make trained weights contiguous(): transposed ones do not move.",
    "adamw-step": "Make trained weights contiguous(): transposed ones do not move.",
    "unscale-gradients": "Train in float32 or bfloat16, without GradScaler.",
}


@dataclass(frozen=True)
class Checkup:
    """What `check_up` found.

    Attributes:
        environment: See `describe_environment`.
        emulated: The emulation that the probes ran under, or None.
        planted: {name: what it affects} of the faults that were planted in it.
        device_type: "mps", "cuda" or "cpu": what the policy and the known faults are about.
        probes: A tuple of ProbeResults.
        probes_date: When they ran, if they come from the cache; None if just now.
        model: The model that the policy is for.
        dtypes: {component: dtype name}, "default" for all that are not named.
        dtype_reason: Why these.
        known_faults: KnownFaults of this torch on this device and system.
        advice: What to do, the first thing first.
        notices: What else is worth knowing.
    """

    environment: dict
    emulated: str | None
    planted: dict
    device_type: str
    probes: tuple
    probes_date: str | None
    model: str
    dtypes: dict
    dtype_reason: str
    known_faults: tuple
    advice: tuple
    notices: tuple

    @property
    def failed(self):
        """Names of the probes that failed."""
        return tuple(result.name for result in self.probes if result.status == "fail")

    def to_json(self):
        """Returns the check-up as JSON."""
        return json.dumps(plain(asdict(self) | {"failed": self.failed}), indent=2)


def check_up(backend="auto", *, thorough=False, faults=(), model=None, fresh=False, progress=False):
    """Checks up on this machine, or on an emulated Mac with faults.

    Args:
        backend: See `choose_device`.
        thorough: See `run_probes`.
        faults: Names of `sdkit.emulate.FAULTS`: emulate MPS with them instead.
        model: What to choose dtypes for, a name that `load_pipeline` takes and that is on this
            disk; by default Stable Diffusion 1.5, which need not be there.
        fresh: Run the probes again although results of this configuration are kept.
        progress: Show a progress bar if it takes over 5 seconds.

    Returns:
        A Checkup.

    Raises:
        ValidationError: An unknown fault, or a device or model that is not there.
    """
    unknown = [name for name in faults if name not in FAULTS]
    if unknown:
        raise ValidationError(
            f"fault {unknown[0]!r}: unknown. Expected some of {', '.join(FAULTS)}."
        )
    if faults and backend not in ("auto", "cpu", "mps"):
        raise ValidationError(
            f'backend="{backend}" with faults: an emulated Mac runs on the CPU. Leave one out.'
        )
    environment = describe_environment("cpu" if faults else backend)
    weights, float32_gib = _weigh(model)
    device_type = "mps" if faults else torch.device(environment["device"]).type
    emulated, results, probes_date, notices = _probe(
        environment, faults, thorough=thorough, fresh=fresh, progress=progress
    )
    dtypes, dtype_reason = choose_dtypes(
        device_type,
        float32_gib=float32_gib,
        available_gib=measure_available_gib(environment["device"]),
        macos=environment["macos"] or "",
        device_name=environment["device_name"] or "",
    )
    known_faults = find_known_faults(
        device_type,
        torch.__version__,
        macos=environment["macos"],
        device_name=environment["device_name"] or "",
    )
    return Checkup(
        environment=environment,
        emulated=emulated,
        planted={name: FAULTS[name].affects for name in faults},
        device_type=device_type,
        probes=results,
        probes_date=probes_date,
        model=weights,
        dtypes=dtypes,
        dtype_reason=dtype_reason,
        known_faults=known_faults,
        advice=advise(results, known_faults, environment),
        notices=notices,
    )


def _weigh(model):
    """What the policy is for, and what its weights take as float32."""
    if model is None:
        return "Stable Diffusion 1.5", SD15_FLOAT32_GIB
    checkpoint = find_checkpoint(model, local_files_only=True)
    return checkpoint.asked, count_weights(checkpoint) * 4 / GIB


def _probe(environment, faults, *, thorough, fresh, progress):
    """Runs the probes, or finds what they found; only a real device's results are kept."""
    if faults:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmulationWarning)  # the check-up says it itself
            with mps(faults=tuple(faults)):
                return find_emulation(), run_probes(thorough=thorough, progress=progress), None, ()
    emulated = find_emulation()
    key = make_key(environment, thorough=thorough)
    kept = None if fresh or emulated else find_cached(key)
    if kept:
        return None, kept[1], kept[0], ()
    results = run_probes(environment["device"], thorough=thorough, progress=progress)
    notices = ()
    lacked_memory = any("out of memory" in result.message for result in results)  # may have it soon
    if not emulated and not lacked_memory:
        try:
            save_cached(key, results)
        except OSError as error:
            notices = (f"The results could not be kept for next time ({error.strerror}).",)
    return emulated, results, None, notices


def advise(results, known_faults, environment):
    """Says what to do, from plain values: upgrading torch first, where that cures a probe.

    Args:
        results: ProbeResults.
        known_faults: What `find_known_faults` returned.
        environment: What `describe_environment` returned.

    Returns:
        A tuple of sentences.
    """
    failed = [result.name for result in results if result.status == "fail"]
    cures = {
        name: fault.fixed_in
        for fault in known_faults
        for name in fault.probes
        if name in failed and fault.fixed_in
    }
    advice = []
    if environment["rosetta"]:
        advice.append(
            "Install a Python for arm64: this one is translated by Rosetta, slow, and sees no MPS."
        )
    if cures:
        newest = max(cures.values(), key=read_version)
        advice.append(
            f"Upgrade torch to {newest} or newer (pip install -U 'torch>={newest}'): it is known "
            f"to cure {', '.join(cures)}."
        )
    advice += dict.fromkeys(UNTIL_THEN[name] for name in failed if name in UNTIL_THEN)
    others = [name for name in failed if name not in UNTIL_THEN and name not in cures]
    if others:
        advice.append(
            f"No cure is known for {', '.join(others)}: compute on the CPU what must be right "
            '(backend="cpu"), and report it upstream with the numbers above.'
        )
    if environment.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO") in ("0", "0.0"):
        advice.append(
            "Unset PYTORCH_MPS_HIGH_WATERMARK_RATIO: at 0 nothing stops memory from running out."
        )
    if environment.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1":
        advice.append(
            "Mind PYTORCH_ENABLE_MPS_FALLBACK=1: what MPS lacks runs on the CPU, slowly, and what "
            "passes may have passed there."
        )
    return tuple(advice)
