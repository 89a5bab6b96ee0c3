"""The range of every op's output while a pipeline runs, at the price of three small ops each.

Nothing is read from the device until a component has finished: one minimum, one maximum and a small
sample of each output stay there, and cross in one piece. The extremes are of all values; shares and
spread are of the sample.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.diagnosis.module_path import ModulePath
from sdkit.emulate.mode import find_emulations, is_composite, suspended
from sdkit.emulate.schema import find_rule
from sdkit.validation import ValidationError

SAMPLE = 512  # values of each output; a share of 1 % is then known to about 0.4 %
FLUSHED = 2.0**-25  # float16 rounds this and less to zero
SUBNORMAL = 2.0**-14  # float16 has fewer than 11 bits below
# A mask is written as -inf or the dtype's least number, and is no magnitude.
MASK = -1e38
# Views whose parts matter one by one: GEGLU's value and gate.
SPLITTING = ("split", "chunk")


class OpRanges(TorchDispatchMode):
    """Records while `installed()`; `records` holds what was seen so far.

    Attributes:
        records: {(stage, module, op, index): {step: [largest, flushed share, subnormal share,
            offset bits, calls]}}, in the order of the first run.
        step: Index of the denoising loop, set by the caller; None outside of it.
    """

    def __init__(self, modules):
        """Takes {name: component}."""
        super().__init__()
        self.path = ModulePath(modules, on_enter=self._enter, on_leave=self._leave)
        self.records = {}
        self.step = None
        self.outside = suspended if find_emulations() else nullcontext  # the former costs 20 us
        self.counts = {}  # {module: how often each op ran in its current call}
        self.pending = []  # (key, step, minimum, maximum, sample), all on the device

    @contextmanager
    def installed(self):
        """Enters the mode and follows the modules; nothing is left of either after."""
        with self.path.followed(), self:
            yield self
        self.collect()

    def _enter(self, path):
        self.counts.pop(path, None)
        if len(self.path.running) == 1:  # what runs between two calls is counted from the last
            self.counts.pop("", None)

    def _leave(self, path):
        if not self.path.running:
            self.collect()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if not find_rule(func).exact:
            output = result[0] if isinstance(result, (tuple, list)) else result
            if self._counts_here(output):
                self._note(str(func), output)
        elif name in SPLITTING and self.path.running:
            for i, output in enumerate(result):
                if self._counts_here(output):
                    self._note(f"{str(func).removesuffix('.Tensor')}[{i}]", output)
        return result

    def _counts_here(self, output) -> bool:
        """Whether it is a floating tensor of the run; a scheduler's tables are float32 in any."""
        return (
            isinstance(output, torch.Tensor)
            and output.is_floating_point()
            and output.dim() > (0 if self.path.running else 1)
            and output.numel() > 0
            and not output.is_meta
        )

    def _note(self, op, output):
        running = self.path.running
        module = running[-1] if running else ""
        counts = self.counts.setdefault(module, Counter())
        index = counts[op]
        counts[op] += 1
        stage = module.partition(".")[0] or "scheduler"
        step = self.step if stage in ("unet", "transformer", "prior", "scheduler") else None
        key = (stage, module, op, index)
        with self.outside():
            flat = output.detach().reshape(-1)
            minimum, maximum = flat.aminmax()
            # An odd stride, for an even one would meet the same channels again and again.
            sample = flat[:: max(1, flat.numel() // SAMPLE) | 1].clone()
            self.pending.append((key, step, minimum, maximum, sample))

    def collect(self):
        """Brings what waits on the device over, one transfer for each device and dtype.

        Raises:
            ValidationError: An output held NaN or Inf; the message names the first.
        """
        pending, self.pending = self.pending, []
        groups = {}
        for place, entry in enumerate(pending):
            groups.setdefault((entry[4].device, entry[4].dtype), []).append((place, entry))
        for group in groups.values():
            self._collect([place for place, _ in group], [entry for _, entry in group])

    def _collect(self, places, entries):
        with suspended():
            extremes = torch.stack([value for entry in entries for value in entry[2:4]])
            lengths = [entry[4].numel() for entry in entries]
            values = torch.cat([entry[4] for entry in entries])
            extremes = extremes.cpu().double().numpy().reshape(-1, 2)
            values = values.cpu().double().numpy()
        starts = np.cumsum([0, *lengths[:-1]])
        refuse_nonfinite(entries, extremes)
        shares = measure_shares(values, starts, np.array(lengths))
        masked = extremes[:, 0] < MASK
        lowest = np.where(masked, 0.0, extremes[:, 0])
        largest = np.maximum(np.abs(lowest), np.abs(extremes[:, 1]))
        for entry, value, share in zip(entries, largest.tolist(), shares.tolist(), strict=True):
            self._add(*entry[:2], value, *share)

    def _add(self, key, step, largest, flushed, subnormal, offset_bits):
        by_step = self.records.setdefault(key, {})
        if step not in by_step:
            by_step[step] = [largest, flushed, subnormal, offset_bits, 1]
            return
        old = by_step[step]
        old[0], old[3] = max(old[0], largest), max(old[3], offset_bits)
        old[1] += (flushed - old[1]) / (old[4] + 1)
        old[2] += (subnormal - old[2]) / (old[4] + 1)
        old[4] += 1


def refuse_nonfinite(entries, extremes):
    """A reference with NaN or Inf says nothing about reduced precision."""
    is_bad = np.isnan(extremes).any(axis=1) | (extremes[:, 1] == np.inf)
    if not is_bad.any():
        return
    (stage, module, op, _), step = entries[int(is_bad.argmax())][:2]
    when = "" if step is None else f" at step {step}"
    raise ValidationError(
        f"{module or stage} ({op}): NaN or Inf in the float32 run that is to measure it{when}. "
        "Expected a pipeline that is right in float32. Find the cause with "
        "notebooks/01_diagnose_black_images.ipynb first."
    )


def measure_shares(values, starts, lengths):
    """Of each sample: share flushed to zero, share subnormal, bits that an offset uses up."""
    values = np.where(values < MASK, 0.0, values)
    magnitudes = np.abs(values)
    is_flushed = (magnitudes > 0) & (magnitudes <= FLUSHED)
    is_subnormal = (magnitudes > FLUSHED) & (magnitudes < SUBNORMAL)

    def average(array):
        return np.add.reduceat(array.astype(np.float64), starts) / lengths

    mean_square = average(values**2)
    variance = average((values - np.repeat(average(values), lengths)) ** 2)
    # A constant carries nothing that could be lost.
    has_spread = variance > 1e-12 * mean_square
    offset = np.where(has_spread, mean_square, 1) / np.where(has_spread, variance, 1)
    return np.stack([average(is_flushed), average(is_subnormal), 0.5 * np.log2(offset)], axis=1)
