"""Loads a pipeline, checks what was got against what was asked, and says what it did and why."""

import time
import warnings

import diffusers
import torch
from diffusers import DiffusionPipeline

from sdkit.attention import check_baddbmm
from sdkit.device import (
    GIB,
    choose_device,
    describe_environment,
    find_device_problem,
    measure_available_gib,
)
from sdkit.emulate import active as find_emulation
from sdkit.guarding import install_guard
from sdkit.loading.border_casts import install_border_casts
from sdkit.loading.checkpoint import count_weights, find_checkpoint
from sdkit.loading.dtype_policy import (
    DTYPES,
    PrecisionWarning,
    assign_dtypes,
    check_dtype,
    choose_dtypes,
    dtype_name,
    find_cautions,
    find_memory_caution,
)
from sdkit.loading.load_warnings import collect_warnings, refuse_invented_weights
from sdkit.loading.memory_need import find_activations_gib
from sdkit.loading.rebalanced import apply_sidecars
from sdkit.loading.recipe import Recipe, apply_recipe
from sdkit.loading.report import LoadReport
from sdkit.loading.weights import check_components, check_weights, count_weight_bytes
from sdkit.slicing import SLICE_BYTES, use_sliced_attention
from sdkit.validation import ValidationError

ATTENTIONS = ("sdpa", "sliced", "diffusers-sliced")
GUARD_ON = (
    "on, for float16 on MPS: every call raises at its first NaN or Inf. Inside `with guard(pipe):` "
    "that one decides; sdkit.guarding.remove_guard(pipe) takes it off"
)
GUARD_OFF = "off: put one around a call with `with guard(pipe):`"
# diffusers renamed the argument in 0.40 and has warned of the old name since.
DTYPE_ARGUMENT = (
    "dtype"
    if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 40)
    else "torch_dtype"
)


def load_pipeline(
    model="mini",
    *,
    backend="auto",
    dtype="auto",
    attention="sdpa",
    recipe=None,
    variant=None,
    config=None,
    local_files_only=False,
    progress=True,
):
    """Loads a diffusers pipeline onto a device that works, in dtypes that are known to be right.

    Only safetensors are read. Every weight is checked afterwards: its dtype, its device, finite.
    Nothing is sliced unless it is asked for, and `device_map` is never used: on MPS it corrupted
    weights (diffusers#13227). A pipeline that gets float16 on MPS, or while MPS is emulated, is
    guarded: any call of it raises NonFiniteError at the first NaN or Inf; see `install_guard`, and
    `remove_guard` to take that off.

    Args:
        model: "mini" (the bundled one), a folder, a .safetensors file, or a Hub id.
        backend: "auto", "mps", "cuda" or "cpu"; see `choose_device`.
        dtype: "auto" (see `choose_dtypes`), "float32", "float16", "bfloat16", a torch.dtype, or a
            dict of these by component, such as {"unet": "float16", "vae": "float32"}: then casts
            are installed at the borders, where stock pipelines crash.
        attention: "sdpa"; "sliced" for less memory where SDPA materialises scores, as on MPS (see
            `sdkit.slicing`); or "diffusers-sliced" for diffusers' attention slicing, which is
            refused on a device whose `baddbmm` reads memory that it must ignore.
        recipe: A `Recipe` of `plan_precision`, or its file: this dtype for all, float32 for the
            modules that it names. It takes the place of `dtype`.
        variant: Such as "fp16", for `*.fp16.safetensors` files.
        config: For a single file: a pipeline folder of the same architecture; see
            `find_config_folder`.
        local_files_only: Do not ask the Hub.
        progress: Show the progress bars of diffusers and transformers.

    Returns:
        The pipeline, and a LoadReport.

    Raises:
        ValidationError: What was asked for cannot be had; the message says why and what can.
    """
    started = time.perf_counter()
    check_attention(attention)
    check_dtype(dtype)
    recipe = _read_recipe(recipe, dtype)
    device, device_reason = choose_device(backend)
    if recipe:
        check_device_dtype(device, DTYPES[recipe.dtype])
    if attention == "diffusers-sliced":
        check_baddbmm(device, f'attention="{attention}"')
    with collect_warnings(progress) as collected:
        checkpoint = find_checkpoint(
            model, variant=variant, config=config, local_files_only=local_files_only
        )
        environment = describe_environment(str(device))
        available_gib = measure_available_gib(device)
        dtypes, dtype_reason = _decide_dtypes(
            "float32" if recipe else dtype,
            checkpoint,
            device,
            environment,
            available_gib,
            attention,
        )
        pipe = _load(checkpoint, dtypes, variant)
        refuse_invented_weights(collected, checkpoint.asked)
        notices = _place(pipe, checkpoint, dtypes, device, variant)
    if recipe:
        apply_recipe(pipe, recipe)
        dtypes = {n: DTYPES["float32" if n in recipe.float32 else recipe.dtype] for n in dtypes}
        dtype_reason = f"recipe: {recipe.dtype}; float32: {', '.join(recipe.float32) or 'nothing'}"
    attention_reason = _enable_attention(pipe, attention)
    is_mps = device.type == "mps" or (find_emulation() or "").startswith("emulated MPS")
    device_type = "mps" if is_mps else device.type
    weight_bytes = {name: count_weight_bytes(getattr(pipe, name)) for name in dtypes}
    memory = {"weights_gib": sum(weight_bytes.values()) / GIB, "available_gib": available_gib}
    cautions = _list_cautions(device_type, dtypes, checkpoint, attention, **memory)
    for caution in cautions:
        warnings.warn(caution, PrecisionWarning, stacklevel=2)
    is_mixed = len(set(dtypes.values())) > 1 or recipe
    border_casts = install_border_casts(pipe) if is_mixed else ()
    is_guarded = is_mps and torch.float16 in dtypes.values()
    if is_guarded:
        install_guard(pipe)
    # Libraries name the folder that they read: in the Hub's cache it tells the user's name.
    folder = str(checkpoint.path)
    report = LoadReport(
        model=checkpoint.asked,
        resolved=checkpoint.resolved,
        pipeline_class=type(pipe).__name__,
        device=str(device),
        device_reason=device_reason,
        dtypes={name: dtype_name(dtype) for name, dtype in dtypes.items()},
        dtype_reason=dtype_reason,
        attention=attention,
        attention_reason=attention_reason,
        border_casts=border_casts,
        weight_bytes=weight_bytes,
        notices=tuple(notices),
        warnings=(*cautions, *(line.replace(folder, checkpoint.resolved) for line in collected)),
        load_seconds=time.perf_counter() - started,
        environment=environment,
        guard=GUARD_ON if is_guarded else GUARD_OFF,
    )
    return pipe, report


def _read_recipe(recipe, dtype):
    """The recipe itself, or the one in a file; dtype= beside it would be ignored."""
    if recipe is None:
        return None
    if not (isinstance(dtype, str) and dtype == "auto"):
        raise ValidationError(f"dtype={dtype!r}: the recipe decides. Leave dtype out, or recipe.")
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def check_attention(attention):
    """Returns an `attention` argument unchanged if it may be one.

    Raises:
        ValidationError: An unknown name.
    """
    if attention not in ATTENTIONS:
        raise ValidationError(
            f'attention={attention!r}: expected "sdpa" (fast and safe, the default), "sliced" '
            '(less memory, as safe) or "diffusers-sliced" (less memory; see '
            "notebooks/01_diagnose_black_images.ipynb for what it does on MPS)."
        )
    return attention


def _decide_dtypes(dtype, checkpoint, device, environment, available_gib, attention):
    float32_gib = count_weights(checkpoint) * 4 / GIB
    policy = choose_dtypes(
        device.type,
        float32_gib=float32_gib,
        available_gib=available_gib,
        activations_gib=find_activations_gib(
            checkpoint,
            device.type,
            weights_gib=float32_gib,
            available_gib=available_gib,
            itemsizes=dict.fromkeys(checkpoint.components, 4),
            sliced=attention == "sliced",
        ),
        macos=environment["macos"] or "",
        device_name=environment["device_name"] or "",
    )
    dtypes, reason = assign_dtypes(dtype, checkpoint.components, policy)
    for used in set(dtypes.values()):
        check_device_dtype(device, used)
    return dtypes, reason


def check_device_dtype(device, dtype):
    """Refuses a dtype that a device fails its trial in."""
    problem = find_device_problem(device, dtype)
    if problem:
        raise ValidationError(
            f"dtype={dtype_name(dtype)} on {device}: {problem}. Expected a dtype that the "
            'device can compute in. Use dtype="auto" or "float32".'
        )


def _load(checkpoint, dtypes, variant):
    """Loads onto the CPU, straight into the dtypes: no second copy is held."""
    try:
        if checkpoint.is_single_file:
            return _load_single_file(checkpoint, dtypes)
        return DiffusionPipeline.from_pretrained(
            checkpoint.path,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            **{DTYPE_ARGUMENT: {**dtypes, "default": torch.float32}},
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever they meet
        reason = " ".join(str(error).split()).replace(str(checkpoint.path), checkpoint.resolved)
        raise ValidationError(
            f"{checkpoint.asked}: {checkpoint.pipeline_class} cannot be loaded from it "
            f"({type(error).__name__}: {reason[:300]}). Check that weights and configuration "
            "belong together; if in doubt copy or download the model again."
        ) from error


def _place(pipe, checkpoint, dtypes, device, variant) -> list[str]:
    """Moves a pipeline to its device and checks what was got; returns what is worth knowing."""
    if device.type != "cpu":
        pipe.to(device)
    pipe.register_to_config(_name_or_path=checkpoint.resolved)  # for records; no folder in it
    notices = check_components(pipe, dtypes, device)
    float32 = dict.fromkeys(dtypes, torch.float32)
    check_weights(pipe, dtypes, lambda: _load(checkpoint, float32, variant))
    return [*checkpoint.notices, *notices, *apply_sidecars(pipe, checkpoint.config_folder)]


def _list_cautions(device_type, dtypes, checkpoint, attention, **memory) -> list[str]:
    """What is known to go wrong in these dtypes, and where memory may not suffice."""
    activations_gib = find_activations_gib(
        checkpoint,
        device_type,
        itemsizes={name: dtype.itemsize for name, dtype in dtypes.items()},
        sliced=attention == "sliced",
        **memory,
    )
    return [
        *find_cautions(device_type, dtypes.values()),
        *find_memory_caution(device_type, activations_gib=activations_gib, **memory),
    ]


def _load_single_file(checkpoint, dtypes):
    """One dtype is all that diffusers takes here; where they differ they are cast afterwards."""
    same = set(dtypes.values())
    pipe = getattr(diffusers, checkpoint.pipeline_class).from_single_file(
        str(checkpoint.path),
        config=str(checkpoint.config_folder),
        local_files_only=True,
        **{DTYPE_ARGUMENT: same.pop() if len(same) == 1 else torch.float32},
    )
    for name, dtype in dtypes.items():
        getattr(pipe, name).to(dtype=dtype)
    return pipe


def _enable_attention(pipe, attention):
    """Turns on the slicing that was asked for, and returns what attention does here."""
    if attention == "sdpa":
        return "one fused call, diffusers' default"
    if attention == "sliced":
        counts = use_sliced_attention(pipe)
        layers = ", ".join(f"{count} layers of {name}" for name, count in counts.items())
        return (
            f"{layers}, at most {SLICE_BYTES // 1024**2} MiB of scores at a time; scaled before "
            "the product, scores in float32, no memory read that was not written"
        )
    sliceable = [m for m in pipe.components.values() if hasattr(m, "set_attention_slice")]
    heads = [
        layer.sliceable_head_dim
        for module in sliceable
        for layer in module.modules()
        if hasattr(layer, "sliceable_head_dim")
    ]
    if not heads:
        raise ValidationError(
            f'attention="diffusers-sliced": {type(pipe).__name__} has no attention that diffusers '
            'can slice. Use attention="sdpa".'
        )
    # "auto" halves the heads: 0 of them at a time, and a crash at the first step, where one is all.
    if min(heads) == 1:
        pipe.enable_attention_slicing("max")
        return 'one head at a time ("auto", half of them, fails on layers of a single head)'
    pipe.enable_attention_slicing("auto")
    return "half of the heads at a time"
