"""The least float32: a set of layers from which none can be dropped, found on real runs.

A candidate is judged by what it draws: every image finite, and as near to the float32 reference as
rounding alone would leave it. Layers are tried in the order of their headroom, so that a search
that would bisect blindly begins where the trouble is.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio
from tqdm.auto import tqdm

from sdkit.emulate import active as find_emulation
from sdkit.emulate import float16_arithmetic
from sdkit.finding import NonFiniteError, find_tensors
from sdkit.guarding import guard, unguarded
from sdkit.loading.dtype_policy import DTYPES
from sdkit.loading.lifting import in_float32
from sdkit.loading.modules import find_models, find_module
from sdkit.loading.recipe import (
    RECIPE_VERSION,
    Recipe,
    count_bytes,
    mixed_precision,
    take_fingerprint,
    weight_of,
)
from sdkit.precision.rounding import rounded_significands
from sdkit.validation import ValidationError, judge_image

CANDIDATES = ("float16", "bfloat16")


def plan_precision(
    pipe,
    prompts,
    *,
    tolerance_db=1.0,
    dtype="float16",
    seed=0,
    compare_with_bisect=False,
    progress=True,
    **pipe_kwargs,
) -> Recipe:
    """Finds the smallest set of layers that must stay float32 for a pipeline to draw right.

    The pipeline is left as it was. On a CPU float16 is emulated (see `float16_arithmetic`).

    Args:
        pipe: A diffusers pipeline, best in float32.
        prompts: One prompt or a list; the recipe is as good as they are representative.
        tolerance_db: How many dB an image may be below what rounding alone costs.
        dtype: "float16" or "bfloat16".
        seed: Image i is drawn from seed + i.
        compare_with_bisect: Count too what a plain bisection over module order takes.
        progress: Show the runs.
        **pipe_kwargs: For the pipeline call.

    Returns:
        A Recipe; `load_pipeline(model, recipe=...)` applies it.

    Raises:
        ValidationError: An unknown dtype, a float32 reference that is bad itself, or a tolerance
            that no set meets; the message tells the best that was reached.
    """
    if dtype not in CANDIDATES:
        raise ValidationError(f"dtype={dtype!r}: expected one of {', '.join(CANDIDATES)}.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValidationError("prompts: got none, expected a prompt or a list of prompts.")

    def draw():
        return draw_images(pipe, prompts, seed, pipe_kwargs)

    with unguarded(pipe), tqdm(desc="plan", unit="run", disable=not progress) as bar:
        peaks = {}
        with in_float32(pipe), watching_peaks(pipe, peaks):
            reference = draw()
            float32_weight_bytes = count_bytes(pipe)
        check_reference(reference)
        healthy_db = measure_healthy_db(pipe, draw, reference, DTYPES[dtype])
        if tolerance_db < 0:
            raise ValidationError(
                f"tolerance_db={tolerance_db}: rounding to {dtype} alone leaves {healthy_db:.1f}"
                " dB, the best that can be reached. Expected at least 0. No recipe was written."
            )
        search = Search(
            lambda paths: try_paths(pipe, paths, DTYPES[dtype], draw, reference),
            healthy_db - tolerance_db,
            bar,
        )
        layers = sorted(peaks, key=peaks.get, reverse=True)
        paths = search.find_least(
            layers, find_endangered(peaks, layers, DTYPES[dtype]), find_tiers(pipe, layers)
        )
        trials = search.trials
        bisect_trials = count_bisect_trials(search, list(peaks)) if compare_with_bisect else None
        with mixed_precision(pipe, paths, DTYPES[dtype]):
            weight_bytes = count_bytes(pipe)
        fingerprint = take_fingerprint(pipe)
    return Recipe(
        version=RECIPE_VERSION,
        model=str(pipe.config.get("_name_or_path") or "unnamed").rpartition("/")[2],
        fingerprint=fingerprint,
        dtype=dtype,
        float32=tuple(path for path in peaks if path in set(paths)),
        psnr_db=search.measured[frozenset(paths)],
        healthy_db=healthy_db,
        tolerance_db=tolerance_db,
        trials=trials,
        bisect_trials=bisect_trials,
        weight_bytes=weight_bytes,
        float32_weight_bytes=float32_weight_bytes,
        prompts=tuple(prompts),
        made_on={
            "device": str(pipe._execution_device),
            "torch": torch.__version__,
            "emulated": find_emulation() or describe_own_emulation(pipe, dtype),
        },
    )


@dataclass
class Search:
    """Trials of sets of layers, each run once.

    Attributes:
        measure: Runs with these layers in float32 and returns the least PSNR in dB, -inf if an
            image is not finite.
        target_db: What a valid set reaches.
        bar: Progress bar of the runs.
        measured: {set of layers: dB}.
    """

    measure: Callable
    target_db: float
    bar: object
    measured: dict = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """Runs so far."""
        return len(self.measured)

    def is_valid(self, paths) -> bool:
        """Whether these layers in float32 suffice."""
        key = frozenset(paths)
        if key not in self.measured:
            self.measured[key] = self.measure(key)
            self.bar.update()
        return self.measured[key] >= self.target_db

    def find_least(self, layers, endangered, tiers) -> list[str]:
        """A valid set of layers, none of which can be dropped.

        Args:
            layers: All, the most endangered first.
            endangered: Heads of that list by headroom, growing.
            tiers: Where to look if none of these suffices: the VAE, attention, both.

        Raises:
            ValidationError: Nothing less than everything suffices, or not even that.
        """
        if self.is_valid([]):
            return []
        enough = next((head for head in endangered if self.is_valid(head)), None)
        if enough is None:
            tier = next((tier for tier in tiers if tier and self.is_valid(tier)), layers)
            if not self.is_valid(tier):
                self._give_up("even with every layer in float32")
            enough = self._shorten([path for path in layers if path in set(tier)])
        found = self._drop(enough)
        if len(found) == len(layers):
            self._give_up("with less than every layer in float32")
        return found

    def _shorten(self, ordered):
        """The shortest valid head of an ordered list, as far as validity grows with length."""
        low, high = 0, 1
        while high < len(ordered) and not self.is_valid(ordered[:high]):
            low, high = high, 2 * high
        high = min(high, len(ordered))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_valid(ordered[:middle]) else (middle, high)
        return ordered[:high]

    def _drop(self, paths):
        """Drops halves, quarters, ... and in the end single layers, until none can be dropped."""
        size = max(1, len(paths) // 2)
        while True:
            dropped = False
            for start in range(len(paths) - size, -1, -size):  # the least endangered first
                rest = paths[:start] + paths[start + size :]
                if self.is_valid(rest):
                    paths, dropped = rest, True
            if size == 1 and not dropped:
                return paths
            size = max(1, size // 2)

    def _give_up(self, what):
        best = max(self.measured.values())
        reached = "no finite image" if best == -np.inf else f"{best:.1f} dB"
        raise ValidationError(
            f"plan: {what} the best reached is {reached}, expected {self.target_db:.1f} dB. No "
            "recipe was written. Allow a greater tolerance_db, or find the cause with diagnose: "
            "a fault that float32 shares is none of precision."
        )


def draw_images(pipe, prompts, seed, pipe_kwargs) -> np.ndarray | None:
    """Float images (N, H, W, 3) in [0, 1], or None where NaN or Inf arose on the way."""
    try:
        return draw_guarded(pipe, prompts, seed, pipe_kwargs)
    except NonFiniteError:
        return None


def draw_guarded(pipe, prompts, seed, pipe_kwargs) -> np.ndarray:
    """Float images (N, H, W, 3) in [0, 1]; image i is drawn from seed + i.

    Raises:
        NonFiniteError: NaN or Inf arose on the way; its `finding` says where.
    """
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    with guard(pipe):
        output = pipe(prompts, generator=generators, output_type="np", **pipe_kwargs)
    return np.asarray(output.images, dtype=np.float64)


def check_reference(images):
    """Returns the float32 images if they are valid.

    Raises:
        ValidationError: float32 itself is bad, so there is nothing to compare with.
    """
    if images is None:
        raise ValidationError(
            "plan: float32 gives NaN or Inf as well, so precision is not the cause. "
            "Run sdkit.diagnose."
        )
    for index, image in enumerate(images):
        verdict = judge_image(image)
        if not verdict.valid:
            raise ValidationError(f"plan: float32's image {index} is bad: {verdict.message}")
    return images


def measure_psnr(images, reference) -> float:
    """The least PSNR of an image in dB; inf where they are equal, -inf where there are none."""
    if images is None:
        return -np.inf
    pairs = [(o, t) for o, t in zip(images, reference, strict=True) if not np.array_equal(o, t)]
    decibels = [peak_signal_noise_ratio(theirs, ours, data_range=1) for ours, theirs in pairs]
    return float(min(decibels, default=np.inf))


def measure_healthy_db(pipe, draw, reference, dtype) -> float:
    """What rounding to the dtype's significand costs, with float32's range."""
    with in_float32(pipe), rounded_significands(find_models(pipe).values(), dtype):
        return measure_psnr(draw(), reference)


def try_paths(pipe, paths, dtype, draw, reference) -> float:
    """The least PSNR with some layers in float32 and the rest in `dtype`."""
    with mixed_precision(pipe, sorted(paths), dtype), low_arithmetic(pipe, dtype):
        return measure_psnr(draw(), reference)


def low_arithmetic(pipe, dtype):
    """Emulated float16 where the device would take minutes for it: on a CPU."""
    is_slow = pipe._execution_device.type == "cpu" and dtype is torch.float16
    return float16_arithmetic() if is_slow and not find_emulation() else nullcontext()


def describe_own_emulation(pipe, dtype) -> str | None:
    with low_arithmetic(pipe, DTYPES[dtype]):
        return find_emulation()


@contextmanager
def watching_peaks(pipe, peaks):
    """Fills {path: greatest |x| that a unit takes or makes} while the body runs.

    A unit is what a plan may keep in float32: a layer with weights, or an attention as a whole, for
    its scores need one dtype.
    """
    with ExitStack() as undo:
        for path, module in list_units(pipe):
            peaks[path] = 0.0

            def look(_, args, kwargs, output, path=path):
                for tensor in find_tensors([args, kwargs, output]):
                    peaks[path] = max(peaks[path], float(tensor.detach().abs().max()))

            undo.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        yield


def list_units(pipe):
    """Yields (path, module) of all units, in module order."""
    for root, model in find_models(pipe).items():
        attentions = []
        for name, module in model.named_modules():
            path = f"{root}.{name}".rstrip(".")
            if path.startswith(tuple(f"{attention}." for attention in attentions)):
                continue
            if is_attention(module):
                attentions.append(path)
            if is_attention(module) or weight_of(module) is not None:
                yield path, module


def is_attention(module) -> bool:
    """Whether queries, keys and values are made in it, in diffusers' or transformers' naming."""
    return hasattr(module, "to_q") or hasattr(module, "q_proj")


def find_endangered(peaks, layers, dtype):
    """Heads of the list by headroom: within 2, 8, 32, 128 of the dtype's maximum, each once.

    A sum of two tensors may overflow where neither does, so the first margin is no less than 2.
    """
    maximum = torch.finfo(dtype).max
    heads = [[path for path in layers if peaks[path] > maximum / m] for m in (2, 8, 32, 128)]
    return [head for i, head in enumerate(heads) if head and head not in heads[:i]]


def find_tiers(pipe, layers):
    """Where to look first: the VAE, all attention, both."""
    vae = [path for path in layers if path.startswith("vae.")]
    attention = [path for path in layers if is_attention(find_module(pipe, path))]
    yield from (vae, attention, list(dict.fromkeys([*vae, *attention])))


def count_bisect_trials(search, order) -> int:
    """Runs that a bisection over module order takes, as converters of graphs do it.

    The largest undecided segment goes to low precision if the run stays valid, else it is halved; a
    single layer that cannot go stays in float32. Runs that the search has made count too.
    """
    kept, undecided, trials = set(order), [list(order)], 0
    while undecided:
        segment = max(undecided, key=len)
        undecided.remove(segment)
        trials += 1
        if search.is_valid(kept - set(segment)):
            kept -= set(segment)
        elif len(segment) > 1:
            middle = len(segment) // 2
            undecided += [segment[:middle], segment[middle:]]
    return trials
