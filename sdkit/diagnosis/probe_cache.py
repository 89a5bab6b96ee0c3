"""Probe results kept between runs, by all that they depend on: a second look costs nothing."""

import hashlib
import json
import os
import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path

from sdkit import attention
from sdkit.diagnosis.probes import PROBES, ProbeResult
from sdkit.run_folder import replace_file

ENTRIES_KEPT = 16
# What decides the numbers, of what `describe_environment` tells.
DECISIVE = ("sdkit", "torch", "platform", "macos", "machine", "chip", "device", "device_name",
            "rosetta", "PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_FAST_MATH",
            "PYTORCH_MPS_PREFER_METAL")  # fmt: skip

# What the probes run: their own files, and the products that attention relies on.
PROBE_CODE = (*sorted((Path(__file__).parent / "probes").glob("*.py")), Path(attention.__file__))


def find_cache_file():
    """Returns where the results are kept: in the user's cache folder, as the system has it."""
    if os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"])
    elif platform.system() == "Darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    return folder / "sdkit" / "probes.json"


def make_key(environment, *, thorough):
    """Makes the key of a configuration; the code of the probes is part of it.

    Args:
        environment: What `describe_environment` returned.
        thorough: Whether the probes are.

    Returns:
        A string.
    """
    source = hashlib.sha256()
    for path in PROBE_CODE:
        source.update(path.read_bytes())
    decisive = [f"{name}={environment.get(name)}" for name in DECISIVE]
    kernel = platform.release()  # drivers come with it
    return "; ".join([*decisive, f"{kernel=!s}", f"{thorough=}", source.hexdigest()[:16]])


def find_cached(key):
    """Finds the results of a configuration.

    Args:
        key: See `make_key`.

    Returns:
        The date, such as "2026-11-23", and a tuple of ProbeResults; or None if there are none,
        or the file cannot be read.
    """
    entry = _read_entries().get(key)
    try:
        results = tuple(ProbeResult(**result) for result in entry["results"])
        is_known = all(result.name in PROBES for result in results)
        return (entry["date"], results) if is_known else None
    except (TypeError, KeyError):
        return None


def save_cached(key, results):
    """Saves results, beside those of other configurations.

    Args:
        key: See `make_key`.
        results: What `run_probes` returned, without an emulation.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    entry = {"date": date.today().isoformat(), "results": [asdict(result) for result in results]}
    entries = _read_entries()
    entries.pop(key, None)
    entries = dict([*entries.items(), (key, entry)][-ENTRIES_KEPT:])
    path = find_cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    return path


def _read_entries():
    """What is in the file; nothing if there is none or something else wrote it."""
    try:
        entries = json.loads(find_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}
