"""From a black image to a named, proven cause."""

from sdkit.diagnosis.cause import CAUSES
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.examination import diagnose

__all__ = ["CAUSES", "Diagnosis", "diagnose"]
