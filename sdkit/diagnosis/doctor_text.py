"""A check-up as text: aligned, and readable at 100 columns."""

import textwrap

from sdkit.device import ENVIRONMENT_VARIABLES
from sdkit.diagnosis.probes import PROBES

WIDTH = 100
STATUS_WORDS = {"pass": "ok", "fail": "FAIL", "not-runnable": "n/a"}


def format_checkup(checkup):
    """Returns a Checkup as lines of at most 100 columns."""
    sections = [
        ("Environment", _describe_environment(checkup.environment)),
        ("Device", _describe_device(checkup)),
        (_count_probes(checkup), _describe_probes(checkup.probes)),
        (f"Policy for {checkup.model}", _describe_policy(checkup)),
        (_name_known_faults(checkup), _describe_known_faults(checkup.known_faults)),
        ("What to do", _describe_advice(checkup)),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections)


def _row(name, text, *, width=14):
    """A name, and a text beside it, wrapped."""
    lines = textwrap.wrap(str(text), WIDTH - width - 2, break_on_hyphens=False) or [""]
    margin = "\n" + " " * (width + 2)
    return f"  {name:<{width}}{margin.join(lines)}".rstrip()


def _describe_environment(environment):
    system = f"macOS {environment['macos']}" if environment["macos"] else environment["platform"]
    machine = [environment["machine"], environment["chip"], f"{environment['cores']} cores",
               f"{environment['memory_gib']} GiB"]  # fmt: skip
    variables = [f"{name}={environment[name]}" for name in ENVIRONMENT_VARIABLES
                 if name in environment]  # fmt: skip
    packages = ("diffusers", "transformers", "accelerate", "numpy")
    return [
        _row("torch", environment["torch"]),
        _row("others", ", ".join(f"{name} {environment[name] or 'missing'}" for name in packages)),
        _row("sdkit", f"{environment['sdkit']}, Python {environment['python']}"),
        _row("system", system),
        _row("machine", ", ".join(filter(None, machine))),
        *([_row("rosetta", "this Python is x86-64, translated")] if environment["rosetta"] else []),
        _row("variables", ", ".join(variables) or "none of PyTorch's is set"),
    ]


def _describe_device(checkup):
    if checkup.emulated:
        planted = [_row(name, affects, width=26) for name, affects in checkup.planted.items()]
        emulated = checkup.emulated.replace("emulated MPS", "EMULATED on the CPU")
        return [_row("mps", emulated), *planted]
    environment = checkup.environment
    memory = environment["device_memory_gib"]
    name = ", ".join(
        filter(None, (environment["device_name"], memory and f"{memory} GiB of its own memory"))
    )
    return [
        _row(environment["device"], environment["device_reason"]),
        *([_row("", name)] if name else []),
    ]


def _count_probes(checkup):
    counts = [
        (sum(result.status == status for result in checkup.probes), words)
        for status, words in (("pass", "pass"), ("fail", "fail"), ("not-runnable", "cannot run"))
    ]
    told = ", ".join(f"{count} {words}" for count, words in counts if count)
    if checkup.emulated:
        when = "emulated: no seconds"
    elif checkup.probes_date:
        when = f"kept from {checkup.probes_date}; --fresh runs them again"
    else:
        when = f"{sum(result.seconds or 0 for result in checkup.probes):.1f} s"
    return f"Probes: {told} ({when})"


def _describe_probes(results):
    width = max(len(name) for name in PROBES) + 2
    margin = " " * (2 + 6 + width)
    lines = []
    for result in results:
        probe = PROBES[result.name]
        head = f"{STATUS_WORDS[result.status]:<6}{result.name:<{width}}"
        lines.append(_row(head, probe.contract, width=len(head)))
        if result.message:
            wrapped = textwrap.wrap(result.message, WIDTH - len(margin), break_on_hyphens=False)
            lines += [margin + line for line in wrapped]
        if result.status == "fail":
            lines += [margin + thread for thread in probe.threads]
    return lines


def _describe_policy(checkup):
    rows = [_row(name, dtype) for name, dtype in checkup.dtypes.items()]
    return [*rows, _row("why", checkup.dtype_reason)]


def _name_known_faults(checkup):
    return f"Known of {checkup.device_type} with torch {checkup.environment['torch']}"


def _describe_known_faults(known_faults):
    lines = []
    for fault in known_faults:
        until = f"before {fault.fixed_in}" if fault.fixed_in else "no fix known"
        lines.append(_row(until, fault.summary))
        lines += [" " * 16 + thread for thread in fault.threads]
    return lines or ["  nothing that concerns images"]


def _describe_advice(checkup):
    passed = sum(result.status == "pass" for result in checkup.probes)
    rows = [_row(f"{number}.", text, width=4) for number, text in enumerate(checkup.advice, 1)]
    rows = rows or [f"  nothing: all {passed} contracts that could be tried hold"]
    return [*rows, *(_row("note", notice, width=6) for notice in checkup.notices)]
