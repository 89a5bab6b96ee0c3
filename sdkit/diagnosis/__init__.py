"""From a black image to a named, proven cause."""

from sdkit.diagnosis.cause import CAUSES
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.examination import diagnose
from sdkit.diagnosis.probes import run_probes

__all__ = ["CAUSES", "Diagnosis", "diagnose", "run_probes"]
