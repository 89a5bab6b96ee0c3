"""Load time and peak memory: `load_pipeline` against plain `DiffusionPipeline.from_pretrained`.

    python tests/benchmarks/bench_loading.py [FOLDER]

Each load runs in a process of its own, in turn with its baseline, so that neither inherits the
other's memory or imports. The clock starts after the imports; what `load_pipeline` adds is its
checks: headers, dtypes, devices, finiteness, and the trial of the device.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

REPEATS = 3
PROGRAM = """
import json, sys, time
import diffusers, torch, transformers
from sdkit.device import MemoryMeter
from sdkit.loading.pipeline import DTYPE_ARGUMENT, load_pipeline

who, folder, dtype = sys.argv[1:]
diffusers.StableDiffusionPipeline, transformers.CLIPTextModel  # lazily imported: not on the clock
with MemoryMeter("cpu", interval_seconds=0.005) as meter:
    started = time.perf_counter()
    if who == "ours":
        load_pipeline(folder, backend="cpu", dtype=dtype, progress=False)
    else:
        diffusers.DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, **{DTYPE_ARGUMENT: getattr(torch, dtype)}
        )
    seconds = time.perf_counter() - started
peak_gib = meter.peak_process_gib - meter.start_process_gib
print(json.dumps({"seconds": seconds, "peak_gib": peak_gib}))
"""


def measure(folder=None):
    """Returns one row a dtype: seconds, and peak memory on top of what the imports take."""
    if folder is None:
        from sdkit.mini import MODEL_FOLDER as folder
    rows = []
    for dtype in ("float32", "float16"):
        runs = {"baseline": [], "ours": []}
        for _ in range(REPEATS):
            for who, measured in runs.items():
                measured.append(_run(who, folder, dtype))
        seconds = {who: statistics.median(r["seconds"] for r in runs[who]) for who in runs}
        peaks = {who: statistics.median(r["peak_gib"] for r in runs[who]) for who in runs}
        rows.append(
            {
                "benchmark": "loading",
                "case": f"{Path(folder).name}, {dtype}, CPU",
                "baseline": "DiffusionPipeline.from_pretrained",
                "baseline_seconds": seconds["baseline"],
                "ours": "load_pipeline",
                "ours_seconds": seconds["ours"],
                "ratio": seconds["ours"] / seconds["baseline"],
                "baseline_peak_gib": peaks["baseline"],
                "ours_peak_gib": peaks["ours"],
            }
        )
    return rows


def _run(who, folder, dtype):
    command = [sys.executable, "-c", PROGRAM, who, str(folder), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    for row in measure(*sys.argv[1:2]):
        print(json.dumps(row))
