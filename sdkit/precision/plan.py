"""The least float32: a set of layers from which none can be dropped, found on real runs.

A candidate is judged by what it draws: every image finite, and as near to the float32 reference as
rounding alone would leave it. Layers are tried in the order of their headroom, so that a search
that would bisect blindly begins where the trouble is.
"""

import math
from contextlib import ExitStack, contextmanager

import torch
from tqdm.auto import tqdm

from sdkit.finding import find_tensors
from sdkit.guarding import unguarded
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
from sdkit.precision.drawing import (
    check_reference,
    check_request,
    describe_arithmetic,
    draw_images,
    measure_psnr,
)
from sdkit.precision.rounding import GRIDS, MORE_GRIDS, rounded_significands
from sdkit.precision.search import CHANCE_DB, Search, count_bisect_trials
from sdkit.precision.trials import Trials
from sdkit.validation import ValidationError

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

    The pipeline is left as it was. On a CPU float16 and bfloat16 are emulated, see
    `float16_arithmetic`.

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
    if not (isinstance(tolerance_db, int | float) and math.isfinite(tolerance_db)):
        raise ValidationError(f"tolerance_db={tolerance_db!r}: expected a number of dB, such as 1.")
    prompts = check_request(pipe, prompts, seed, pipe_kwargs)

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
        layers = sorted(peaks, key=peaks.get, reverse=True)

        def look_again():
            as_it_is = search.measured[frozenset()]
            if as_it_is >= search.target_db - CHANCE_DB and not is_endangered(peaks, DTYPES[dtype]):
                return as_it_is  # where nothing overflows, this is what a healthy model reaches
            more = measure_healthy_db(pipe, draw, reference, DTYPES[dtype], MORE_GRIDS)
            return more - tolerance_db

        search = Search(
            Trials(pipe, DTYPES[dtype], prompts, seed, pipe_kwargs, reference).measure,
            healthy_db - tolerance_db,
            bar,
            look_again,
        )
        paths = search.find_least(
            layers,
            find_endangered(peaks, layers, DTYPES[dtype]),
            find_tiers(pipe, layers),
            [path for path in layers if peaks[path] > torch.finfo(DTYPES[dtype]).max],
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
        healthy_db=min(healthy_db, search.target_db + tolerance_db),
        tolerance_db=tolerance_db,
        trials=trials,
        bisect_trials=bisect_trials,
        weight_bytes=weight_bytes,
        float32_weight_bytes=float32_weight_bytes,
        prompts=tuple(prompts),
        made_on={
            "device": str(pipe._execution_device),
            "torch": torch.__version__,
            "emulated": describe_arithmetic(pipe),
        },
    )


def measure_healthy_db(pipe, draw, reference, dtype, grids=GRIDS) -> float:
    """The least that rounding to the dtype's significand leaves, on some grids, range unlimited.

    How near to the reference one rounding comes is half chance, so one would be a bad measure.
    """
    models = list(find_models(pipe).values())
    reached = []
    for grid in grids:
        with in_float32(pipe), rounded_significands(models, dtype, grid):
            reached.append(measure_psnr(draw(), reference))
    return min(reached)


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


def is_endangered(peaks, dtype) -> bool:
    """Whether any layer comes within a factor of two of the dtype's maximum: sums may overflow."""
    return max(peaks.values()) > torch.finfo(dtype).max / 2


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
