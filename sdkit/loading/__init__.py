"""Models onto a device that works, in dtypes that are known to be right, with every reason told."""

from sdkit.loading.dtype_policy import PrecisionWarning
from sdkit.loading.pipeline import load_pipeline
from sdkit.loading.report import LoadReport

__all__ = ["LoadReport", "PrecisionWarning", "load_pipeline"]
