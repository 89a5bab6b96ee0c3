"""Load time and peak memory: `load_pipeline` against plain `DiffusionPipeline.from_pretrained`.

Each load runs in a process of its own, in turn with its baseline, so that neither inherits the
other's memory or imports. The clock starts after the imports; what `load_pipeline` adds is its
checks: headers, dtypes, devices, finiteness, and the trial of the device.
"""

import json
import statistics
import subprocess
import sys

from pairs import summarize

from sdkit.mini import MODEL_FOLDER

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


def measure():
    """Returns one row a dtype: seconds, and peak memory on top of what the imports take."""
    rows = []
    for dtype in ("float32", "float16"):
        runs = {"baseline": [], "ours": []}
        for _ in range(REPEATS):
            for who, measured in runs.items():
                measured.append(_run(who, MODEL_FOLDER, dtype))
        pairs = [(b["seconds"], o["seconds"]) for b, o in zip(*runs.values(), strict=True)]
        peaks = {who: statistics.median(r["peak_gib"] for r in runs[who]) for who in runs}
        rows.append(
            {
                "benchmark": "loading",
                "case": f"{MODEL_FOLDER.name}, {dtype}, CPU",
                "baseline": "DiffusionPipeline.from_pretrained",
                "ours": "load_pipeline",
                **summarize(pairs),
                "limit": "",
                "baseline_peak_gib": peaks["baseline"],
                "ours_peak_gib": peaks["ours"],
            }
        )
    return rows


def _run(who, folder, dtype):
    command = [sys.executable, "-c", PROGRAM, who, str(folder), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])
