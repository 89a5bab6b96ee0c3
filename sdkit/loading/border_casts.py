"""Casts at the borders of components, so that one pipeline can hold several dtypes.

Stock pipelines hand tensors on in whatever dtype they have, and crash in the first layer where two
components differ. Here every component gets its floating inputs in its own dtype, looked up at
each call. A UNet or transformer hands its prediction back in the dtype of the latents that came in,
so the scheduler computes in one dtype, which is the (last) text encoder's: diffusers makes the
latents in it. A VAE hands out its own dtype.

Tested with Stable Diffusion 1.x and SDXL pipelines, text-to-image and image-to-image.
"""

from contextlib import contextmanager
from types import MethodType

import torch

# UNets embed these in float32 themselves: as float16 a timestep above 2048 or between two integers
# would be another one.
KEPT_AS_THEY_ARE = ("timestep", "time_ids")
DENOISERS = ("unet", "transformer", "prior")
MARK = "_sdkit_border_casts"


def install_border_casts(pipe):
    """Installs casts on a pipeline's components; a second call changes nothing.

    They belong to the components: other pipelines made of the same ones (`from_pipe`) have them.

    Args:
        pipe: A diffusers pipeline.

    Returns:
        The names of the components that have casts now.
    """
    remove_border_casts(pipe)
    installed = []
    for name, component in _components_with_inputs(pipe):
        if hasattr(component, "encode") and hasattr(component, "decode"):
            # decode() and encode() are no forward(): the layers they call first do the casting.
            undo = [
                _cast_inputs(child).remove for child in component.children() if _dtype_of(child)
            ]
            if not _is_upcast_by_pipelines(component):
                undo.append(_keep_dtype(component))
        elif name.startswith(DENOISERS):
            undo = _cast_inputs_and_output(component)
        else:
            undo = [_cast_inputs(component).remove]
        setattr(component, MARK, undo)
        installed.append(name)
    return tuple(installed)


def remove_border_casts(pipe):
    """Takes the casts of `install_border_casts` away again."""
    for _, component in _components_with_inputs(pipe):
        for undo in getattr(component, MARK, ()):
            undo()
        if hasattr(component, MARK):
            delattr(component, MARK)


@contextmanager
def bordered(pipe):
    """Runs the body with casts at the borders; those that were there before stay as they are."""
    if any(hasattr(component, MARK) for component in pipe.components.values()):
        yield
        return
    install_border_casts(pipe)
    try:
        yield
    finally:
        remove_border_casts(pipe)


def _components_with_inputs(pipe):
    """The models that take floating inputs; text encoders take token numbers."""
    return [
        (name, component)
        for name, component in pipe.components.items()
        if isinstance(component, torch.nn.Module) and not name.startswith("text_encoder")
    ]


def _cast_inputs(module):
    return module.register_forward_pre_hook(
        lambda module, args, kwargs: _cast_call(args, kwargs, _dtype_of(module)), with_kwargs=True
    )


def _cast_inputs_and_output(module):
    def before(module, args, kwargs):
        # Kept on the module, for a pre-hook can hand nothing on, and deep copies have their own.
        latents = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        dtype = _dtype_of(module)
        module._sdkit_latents_dtype = getattr(latents, "dtype", dtype)
        return _cast_call(args, kwargs, dtype)

    def after(module, args, kwargs, output):
        return _cast(output, module._sdkit_latents_dtype)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True).remove,
        module.register_forward_hook(after, with_kwargs=True).remove,
        lambda: vars(module).pop("_sdkit_latents_dtype", None),
    ]


def _cast_call(args, kwargs, dtype):
    # The second positional argument of UNets is the timestep; pipelines name all others.
    args = tuple(value if i == 1 else _cast(value, dtype) for i, value in enumerate(args))
    return args, _cast(kwargs, dtype)


def _cast(value, dtype):
    return map_floats(value, lambda tensor: tensor.to(dtype))


def map_floats(value, change):
    """The same value, the floating tensors within it changed, however it is nested."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):  # diffusers' outputs are dicts that are built from keywords
        items = value.items()
        return type(value)(
            **{key: v if key in KEPT_AS_THEY_ARE else map_floats(v, change) for key, v in items}
        )
    if type(value) in (list, tuple):
        return type(value)(map_floats(v, change) for v in value)
    return value


def _dtype_of(module):
    """The dtype of a module's weights (of most of them, where it is mixed), or None."""
    sizes = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=sizes.get, default=None)


def _is_upcast_by_pipelines(vae):
    """Whether SDXL's pipelines lift this VAE to float32 for the call themselves: let them."""
    return _dtype_of(vae) is torch.float16 and getattr(vae.config, "force_upcast", False)


def _keep_dtype(vae):
    """Makes `vae.to` move a VAE without changing its dtype; returns how to undo that.

    Symptom: on MPS the SDXL pipelines cast a VAE to the latents' dtype before they decode, so a
    float32 VAE asked for beside a float16 UNet is silently float16, and overflows. Seen in
    diffusers 0.35.2 to 0.42.1, pipeline_stable_diffusion_xl.py, beside pytorch#99272.
    Guarded by test_border_casts_keep_the_dtype_of_a_vae in tests/test_loading.py.
    """

    def to(vae, *args, **kwargs):
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return vae if device is None else type(vae).to(vae, device, non_blocking=non_blocking)

    vae.to = MethodType(to, vae)  # a bound method: a deep copy moves itself
    return lambda: vars(vae).pop("to", None)
