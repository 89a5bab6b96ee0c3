"""Watches a pipeline call and keeps a few numbers of every module's output, step by step.

Hooks look and change nothing. Nothing is read from the device until a step is over.

# B images, C channels, h w latents
"""

import math
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from sdkit.emulate.mode import find_emulations, suspended
from sdkit.finding import find_tensors
from sdkit.generation.request import packs_latents
from sdkit.generation.step_record import LATENTS_SIDE, ONCE, StepRecord
from sdkit.guarding import find_components
from sdkit.hooks import after_method, is_compiled

LARGEST_FLOAT16 = 65504.0


class StepRecorder:
    """Records one pipeline call while `installed()`; `finish()` gives the StepRecord.

    A step is one call of `scheduler.step`, as the loop of diffusers counts.
    """

    def __init__(self, pipe, images, *, height, width, with_modules):
        """Takes the pipeline, the indices of the images it will make, and their size in pixels.

        Without modules only the latents are kept, at no cost that can be measured.
        """
        self.pipe, self.images, self.size = pipe, tuple(images), (height, width)
        self.with_modules = with_modules
        self.step = 0
        self.kinds = {}  # {path: class}, in the order in which each first finished
        self.cells = {}  # {(step, path): [largest, NaN, Inf, values]}
        self.pending = []  # (step, path, values, extremes, counts): the last two on the device
        self.first_bad = None  # (step, path)
        self.latents = []  # (B, C, h, w) on the CPU, one a step
        self.skipped = []
        self.outside = suspended if find_emulations() else nullcontext  # the former costs 20 us

    @contextmanager
    def installed(self):
        """Watches every module and the scheduler; every hook is gone after."""
        with ExitStack() as undo:
            components = find_components(self.pipe) if self.with_modules else {}
            for root, component in components.items():
                if is_compiled(component):
                    self.skipped.append(f"{root} is compiled: nothing inside of it can be watched")
                    continue
                for name, module in component.named_modules():
                    look = self._look_from(f"{root}.{name}".rstrip("."))
                    undo.callback(module.register_forward_hook(look).remove)
            after_method(self.pipe.scheduler, "step", self._after_step, undo)
            yield self

    def _look_from(self, path):
        runs_once = path.startswith(ONCE)

        def look(module, args, output):
            self.kinds.setdefault(path, type(module).__name__)
            step = 0 if runs_once else self.step
            with self.outside():
                for tensor in find_tensors(output):
                    if tensor.numel():
                        self._note(step, path, tensor.detach())

        return look

    def _note(self, step, path, tensor):
        low, high = tensor.aminmax()  # NaN comes through
        if tensor.device.type == "cpu":  # looking costs nothing: only what is bad is counted
            largest = max(abs(low.item()), abs(high.item()))
            if math.isfinite(largest):
                self._add(step, path, largest, 0, 0, tensor.numel())
                return
        counts = torch.stack([tensor.isnan().sum(), tensor.isinf().sum()])
        extremes = torch.stack([low, high]).float()
        self.pending.append((step, path, tensor.numel(), extremes, counts))

    def _add(self, step, path, largest, *counts):
        cell = self.cells.setdefault((step, path), [0.0, 0, 0, 0])
        cell[0] = max(cell[0], largest) if largest == largest else math.nan  # NaN stays
        for i, count in enumerate(counts, start=1):
            cell[i] += count
        if self.first_bad is None and not math.isfinite(largest):
            self.first_bad = step, path

    def _after_step(self, args, kwargs, output):
        latents = next(find_tensors(output), None)
        with self.outside():
            if packs_latents(self.pipe):
                scale = self.pipe.vae_scale_factor
                latents = self.pipe._unpack_latents(latents, *self.size, scale)
            if latents is not None and latents.ndim == 4:
                side = LATENTS_SIDE if self.with_modules else LATENTS_SIDE // 2
                self.latents.append(shrink(latents.detach().float(), side))
        self._collect()
        self.step += 1

    def _collect(self):
        """Brings what waits on the devices over, in one piece each."""
        pending, self.pending = self.pending, []
        groups = {}
        for entry in pending:
            groups.setdefault(entry[3].device, []).append(entry)
        with suspended():
            for group in groups.values():
                extremes = torch.stack([entry[3] for entry in group]).cpu().abs().amax(dim=1)
                counts = torch.stack([entry[4] for entry in group]).cpu()
                rows = zip(group, extremes.tolist(), counts.tolist(), strict=True)
                for (step, path, total, *_), largest, counts in rows:
                    self._add(step, path, largest, *counts, total)

    def finish(self) -> StepRecord:
        """What was seen, of a call that was stopped too."""
        self._collect()
        columns = {path: m for m, path in enumerate(self.kinds)}
        begun = max([1 + step for step, _ in self.cells] or [1])
        shape = (max(begun, len(self.latents)), len(columns))
        largest = np.full(shape, np.nan, np.float32)
        nan_count, inf_count, total = (np.zeros(shape, np.int64) for _ in range(3))
        for (step, path), cell in self.cells.items():
            place = step, columns[path]
            largest[place], nan_count[place], inf_count[place], total[place] = cell
        return StepRecord(
            images=self.images,
            modules=tuple(columns),
            kinds=tuple(self.kinds.values()),
            largest=largest,
            nan_count=nan_count,
            inf_count=inf_count,
            total=total,
            latents=self._stack_latents(),
            first_bad=self.first_bad and (self.first_bad[0], columns[self.first_bad[1]]),
            skipped=tuple(self.skipped),
        )

    def _stack_latents(self):
        """(B, S, C, h, w), or None where the scheduler gave none, one an image."""
        shapes = {latents.shape for latents in self.latents}
        if len(shapes) != 1 or next(iter(shapes))[0] != len(self.images):
            return None
        return np.stack(self.latents, axis=1)


def shrink(latents, side):
    """(B, C, h, w) in float16 on the CPU, at most `side` a side; NaN and Inf stay what they are.

    An average with a NaN in it is NaN.
    """
    factor = -(-max(latents.shape[-2:]) // side)
    small = F.avg_pool2d(latents, factor, ceil_mode=True).cpu() if factor > 1 else latents.cpu()
    small = torch.where(small.isinf(), small, small.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16))
    return small.half().numpy()
