"""The smallest change that makes reduced precision right; names are resolved when first used."""

import importlib

EXPORTS = {
    "Headroom": "sdkit.precision.headroom",
    "OpHeadroom": "sdkit.precision.headroom",
    "measure_headroom": "sdkit.precision.headroom",
    "plot_headroom": "sdkit.precision.headroom_map",
    "RebalanceReport": "sdkit.precision.rebalance_report",
    "amplify": "sdkit.precision.rebalancing",
    "rebalance": "sdkit.precision.rebalancing",
    "save_rebalanced": "sdkit.precision.rebalancing",
    "plan_precision": "sdkit.precision.plan",
    "predict_memory": "sdkit.precision.memory",
}
__all__ = list(EXPORTS)


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module 'sdkit.precision' has no attribute {name!r}")
    return getattr(importlib.import_module(EXPORTS[name]), name)
