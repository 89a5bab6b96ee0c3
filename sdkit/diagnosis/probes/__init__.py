"""Backend contract probes: what Stable Diffusion relies on, tried on the device that runs it."""

from sdkit.diagnosis.probes.probe import Check, Probe, ProbeResult
from sdkit.diagnosis.probes.run import PROBES, run_probe, run_probes

__all__ = ["PROBES", "Check", "Probe", "ProbeResult", "run_probe", "run_probes"]
