"""From a black image to a named, proven cause; names are resolved when first used."""

import importlib

EXPORTS = {
    "CAUSES": "sdkit.diagnosis.cause",
    "Diagnosis": "sdkit.diagnosis.diagnosis",
    "diagnose": "sdkit.diagnosis.examination",
    "diagnose_incident": "sdkit.diagnosis.incident_replay",
    "diagnose_training_step": "sdkit.diagnosis.training_step",
    "find_first_bad_op": "sdkit.diagnosis.trace",
    "run_probes": "sdkit.diagnosis.probes",
}
__all__ = list(EXPORTS)


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module 'sdkit.diagnosis' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)
