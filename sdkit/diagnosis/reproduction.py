"""A script of at most 30 lines that shows a backend fault with torch alone.

It is made for an upstream issue, so the tensors are drawn anew with the shapes, strides, offsets,
dtypes and ranges that were seen: an issue needs no picture of anyone's. Whether the drawn ones show
the fault is tried before it is said: numbers that were chosen by hand may be the whole fault.
"""

import contextlib
import io

import torch

from sdkit.diagnosis.experiments import ATTENTION, drop_out
from sdkit.diagnosis.op_record import BadOp, summarize
from sdkit.emulate.mode import active as find_emulation
from sdkit.emulate.mode import suspended

ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "is_causal", "scale")
REFERENCE_MARK = "# the same on the CPU, in float32"
HEAD = '''"""{op}: NaN or Inf on {device}, none on the CPU.{emulated}"""
import copy, sys
import torch

device = sys.argv[1] if len(sys.argv) > 1 else "{device}"
generator = torch.Generator().manual_seed(0)

def draw(shape, stride, offset, dtype, low, high):
    size = 1 + offset + sum((n - 1) * s for n, s in zip(shape, stride))
    values = torch.rand(size, generator=generator) * (high - low) + low
    return values.to(dtype).to(device).as_strided(shape, stride, offset)

nan, inf = float("nan"), float("inf")
arguments = {{
'''
TAIL = """}}
op = torch.{call}
result = op(**copy.deepcopy(arguments){options})  # it may write into them
{mark}
def on_cpu(value):
    value = value.cpu() if torch.is_tensor(value) else value
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value

expected = op(**{{name: on_cpu(value) for name, value in arguments.items()}}{options})
count = [int((~t.cpu().isfinite()).sum()) for r in (result, expected)
         for t in (r if isinstance(r, (tuple, list)) else (r,))[:1]]
print(torch.__version__, device, *count, "NaN or Inf there and on the CPU")
sys.exit(count[0] > count[1])
"""


def write_reproduction(bad: BadOp) -> str:
    """Returns the script.

    Args:
        bad: The op of a backend fault, or of memory that it must not read.
    """
    func, named = bad.call.func, bad.call.named
    if ATTENTION in str(func):
        call = "nn.functional.scaled_dot_product_attention"
        named = {name: named[name] for name in ATTENTION_ARGUMENTS if name in named}
    else:
        func, named = drop_out(func, named)
        call = f"ops.{func}"
    blank = {*bad.call.ignored, *(name.partition("[")[0] for name in bad.call.undefined)}
    device = bad.outputs[0].device
    head = HEAD.format(
        op=bad.op,
        device="mps" if find_emulation() else device,
        emulated=" Found on an emulation." if find_emulation() else "",
    )
    tensors = {name: v for name, v in named.items() if holds_tensors(v)}
    options = {name: v for name, v in named.items() if name not in tensors and v is not None}
    lines = [f'    "{n}": {draw(value, is_blank=n in blank)},\n' for n, value in tensors.items()]
    spelt = "".join(f", {name}={spell(value)}" for name, value in options.items())
    return head + "".join(lines) + TAIL.format(call=call, options=spelt, mark=REFERENCE_MARK)


def holds_tensors(value) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, torch.Tensor) for item in values)


def draw(value, *, is_blank: bool) -> str:
    """Code that draws a tensor like the one that was seen; NaN for one that must not matter."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(draw(item, is_blank=is_blank) for item in value)}]"
    if value is None:
        return "None"
    with suspended():
        seen = summarize("", value)
    low, high = (
        ("nan", "nan") if is_blank else (f"{v or 0:.6g}" for v in (seen.minimum, seen.maximum))
    )
    layout = f"{seen.shape}, {seen.stride}, {value.storage_offset()}"
    return f"draw({layout}, torch.{seen.dtype}, {low}, {high})"


def spell(value) -> str:
    """An option as Python code."""
    return "device" if isinstance(value, torch.device) else repr(value)


def shows_the_fault(script: str) -> bool:
    """Whether the script finds the fault here: on this device, or under the active emulation.

    Its reference runs outside the emulation, which stands for another device.
    """
    device_part, mark, reference_part = script.partition(REFERENCE_MARK)
    names = {"__name__": "reproduction"}
    device = "cpu" if find_emulation() else None
    if device:
        device_part = device_part.replace('else "mps"', f'else "{device}"')
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        exec(compile(device_part.replace("sys.argv", "['']"), "reproduction.py", "exec"), names)
        try:
            with suspended():
                exec(compile(reference_part, "reproduction.py", "exec"), names)
        except SystemExit as end:
            return bool(end.code)
    return False
