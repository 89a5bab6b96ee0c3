"""What every module put out at every step of one pipeline call, and the latents after each step.

    steps_000.npz   beside the images, of the call that made image 0 and those of its batch

A few numbers a module and step, in one compressed file: small enough to keep beside the images, and
enough to see without the model where the numbers grow and where the first NaN is.

# S steps, M modules, B images, C channels, h w latents
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdkit.guarding import TEXT_ENCODERS, VAES
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

STEPS_VERSION = 1
STEPS_NAME = "steps_{:03}.npz"
STEPS_PATTERN = "steps_[0-9][0-9][0-9]*.npz"
LATENTS_SIDE = 64  # larger latents are averaged down to this; to half where modules are not kept
ONCE = (*TEXT_ENCODERS, *VAES)  # components that run before or after the denoising loop


@dataclass(frozen=True)
class StepRecord:
    """One pipeline call, step by step.

    Attributes:
        images: Indices of the images that the call made.
        modules: Dotted paths from the pipeline, in the order in which each first finished.
        kinds: The class of each.
        largest: (S, M) greatest |x| of what it put out, NaN or Inf where that was in it. Modules
            of components that run once stand in the first row.
        nan_count: (S, M) number of NaN values.
        inf_count: (S, M) number of infinite values.
        total: (S, M) number of values; 0 where the module did not run.
        latents: (B, up to S, C, h, w) after each step, rounded to float16 and averaged down to a
            small size; None where there were none.
        first_bad: (step, index of the module) of the first output with NaN or Inf, or None. Not the
            first such column: a module may run twice a step, as activations do.
        skipped: What could not be watched, in words.
    """

    images: tuple[int, ...]
    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    largest: np.ndarray
    nan_count: np.ndarray
    inf_count: np.ndarray
    total: np.ndarray
    latents: np.ndarray | None = None
    first_bad: tuple[int, int] | None = None
    skipped: tuple[str, ...] = ()

    @property
    def step_count(self) -> int:
        """Number of steps that were begun, at least 1."""
        return len(self.largest)

    @property
    def runs_once(self) -> np.ndarray:
        """(M,) whether the module runs outside of the denoising loop."""
        return np.array([path.startswith(ONCE) for path in self.modules], bool)

    @property
    def is_bad(self) -> np.ndarray:
        """(S, M) whether NaN or Inf was in the output."""
        return (self.nan_count + self.inf_count) > 0

    def save(self, path) -> Path:
        """Writes it, whole or not at all, and returns its `Path`."""
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        told = {name: getattr(self, name) for name in ("images", "first_bad", *WORDS)}
        arrays["told"] = np.array(json.dumps({"version": STEPS_VERSION, **told}))
        with replace_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return Path(path)

    @classmethod
    def load(cls, path) -> "StepRecord":
        """Returns what `save` wrote.

        Raises:
            ValidationError: The file cannot be read, is of another version, or does not add up.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                told = json.loads(str(file["told"]))
                arrays = {name: file[name] for name in ARRAYS if name in file}
            if told.pop("version") != STEPS_VERSION:
                raise ValueError("it is of another version")
            first_bad = told["first_bad"] and tuple(told["first_bad"])
            kept = {name: tuple(told[name]) for name in ("images", *WORDS)}
            record = cls(**kept, first_bad=first_bad, **arrays)
            record._check()
        except Exception as error:  # zlib, zipfile, numpy and its tokenizer all have their own
            raise ValidationError(
                f"{path}: no record of steps can be read there ({' '.join(str(error).split())}). "
                "Expected what generate(..., record_steps=True) wrote; run it again."
            ) from error
        return record

    def _check(self):
        shape = (len(self.largest), len(self.modules))
        grids = [getattr(self, name) for name in GRIDS]
        if shape[0] < 1 or any(grid.shape != shape for grid in grids):
            raise ValueError("its tables do not fit its list of modules")
        if any(grid.dtype.kind not in "iuf" for grid in grids):
            raise ValueError("its tables hold no numbers")
        if len(self.kinds) != len(self.modules) or not all(
            isinstance(word, str) for name in WORDS for word in getattr(self, name)
        ):
            raise ValueError("its modules have no names")
        if self.first_bad is not None and not self.is_bad[self.first_bad]:
            raise ValueError("its first bad output is none")
        latents = self.latents
        if latents is not None and (latents.ndim != 5 or len(latents) != len(self.images)):
            raise ValueError("its latents do not fit its images")


GRIDS = ("largest", "nan_count", "inf_count", "total")
ARRAYS = (*GRIDS, "latents")
WORDS = ("modules", "kinds", "skipped")
