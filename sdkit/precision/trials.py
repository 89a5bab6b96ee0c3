"""Trials of a plan: draws with some layers in float32, of which no part is run twice.

The VAE's decoder comes last, so what the UNet gave holds for any choice of the decoder's layers: it
is kept and handed out again, call by call. Where the UNet or what is before it broke, it breaks for
any such choice, and nothing is run.
A run ends at the first block of the UNet that gives NaN or Inf.
"""

import re
from contextlib import ExitStack, contextmanager

import numpy as np

from sdkit.finding import NonFiniteError, find_tensors
from sdkit.guarding import find_components
from sdkit.loading.border_casts import map_floats
from sdkit.loading.recipe import mixed_precision
from sdkit.precision.drawing import draw_guarded, low_arithmetic, measure_psnr
from sdkit.validation import is_finite

DECODING = ("vae.decoder", "vae.post_quant_conv")
BLOCK = re.compile(r"mid_block|(down|up|transformer)_blocks\.\d+")


class Trials:
    """Measures sets of layers on one pipeline, prompts and seeds."""

    def __init__(self, pipe, dtype, prompts, seed, pipe_kwargs, reference):
        """Takes what `draw_guarded` takes, and the images to compare with."""
        self.pipe, self.dtype, self.reference = pipe, dtype, reference
        self.arguments = (prompts, seed, pipe_kwargs)
        components = find_components(pipe).items()
        self.denoiser = next(c for n, c in components if n.startswith(("unet", "transformer")))
        self.given = {}  # {layers before the decoder: what the denoiser gave; None if it broke}

    def measure(self, paths) -> float:
        """The least PSNR with these layers in float32; -inf if an image is not finite."""
        key = frozenset(path for path in paths if not path.startswith(DECODING))
        if self.given.get(key, ()) is None:
            return -np.inf
        precision = mixed_precision(self.pipe, sorted(paths), self.dtype)
        try:
            with precision, low_arithmetic(self.pipe):
                return measure_psnr(self._draw(key), self.reference)
        except NonFiniteError as error:
            is_decoding = error.finding and error.finding.stage == "vae" and self.given.get(key)
            if not is_decoding:  # nor is what broke before the denoiser, in the VAE's encoder
                self.given[key] = None
            return -np.inf

    def _draw(self, key):
        if key in self.given:
            rest = iter(self.given[key])
            with forward_replaced(self.denoiser, lambda *args, **kwargs: copy(next(rest))):
                return draw_guarded(self.pipe, *self.arguments)
        given, forward = [], self.denoiser.forward

        def compute(*args, **kwargs):
            given.append(forward(*args, **kwargs))
            return copy(given[-1])

        try:
            with forward_replaced(self.denoiser, compute), stopping_early(self.denoiser):
                return draw_guarded(self.pipe, *self.arguments)
        finally:
            self.given[key] = given


def copy(output):
    """The same output in other memory, for what gets it may write into it."""
    return map_floats(output, lambda tensor: tensor.clone())


@contextmanager
def stopping_early(denoiser):
    """Raises at the first block that gives NaN or Inf: no later one would mend that."""

    def look(module, args, output):
        if not all(is_finite(tensor) for tensor in find_tensors(output)):
            raise NonFiniteError("a block of the denoiser gave NaN or Inf")

    with ExitStack() as undo:
        for name, module in denoiser.named_modules():
            if BLOCK.fullmatch(name):
                undo.callback(module.register_forward_hook(look).remove)
        yield


@contextmanager
def forward_replaced(module, forward):
    """Lets a module compute something else while the body runs."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
