"""What a training is: every setting with its reason, checked, written and read back."""

import difflib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from sdkit.finetuning.settings import choice, number, some_of, switch, text, texts, whole

# Names of the layers that get an adapter, by what they do; the text encoder has its own.
TARGET_MODULES = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": (
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
        "proj_in", "proj_out",
    ),
}  # fmt: skip
TEXT_ENCODER_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
SHOWN_LETTERS = 100  # of a value that is refused
PRESETS = Path(__file__).parent / "presets"  # settings that were measured, by name


@dataclass(frozen=True)
class LoRAConfig:
    """A training, as the report recommends it unless something else is said.

    Attributes:
        model: What is adapted: mini (the bundled one), a folder, a .safetensors file or a Hub id.
        dataset: What is learnt: mini (the rendered studio catalogue) or a folder of images with
            captions.
        resolution: Side of the training pictures in pixels; none is the model's own.
        output_folder: Where the run is kept: adapter, checkpoints, pictures and report.
        cache_folder: Where encoded images are kept between runs; none is `encoded` beside the
            output folder.
        strict: Whether a bad image in the dataset stops the run, rather than being left out.
        backend: auto, mps, cuda, cuda:1 or cpu.
        seed: Of the adapter's first weights, the order of the images, and every draw.
        rank: Of the adapters: the width that a layer's change passes through.
        alpha: The change is multiplied by alpha / rank.
        targets: What gets an adapter: attention, feed_forward, convolution, text_encoder.
        max_train_steps: Optimiser steps, the dropped ones among them.
        learning_rate: At its peak, after the warm-up.
        lr_scheduler: What the rate does after the warm-up: cosine (to zero), linear (to zero) or
            constant.
        lr_warmup_steps: Steps in which the rate rises to its peak; none is a twentieth of all.
        train_batch_size: Images at a time, in the report's setting.
        gradient_accumulation_steps: How many times that before each step of the optimiser. The
            product is the effective batch, whatever the number of processes and the micro-batch.
        gradient_checkpointing: Whether blocks may be computed again in the backward pass, which
            saves memory and costs time. With micro_batch auto, only where the memory asks for it.
        micro_batch: How many images really go through at a time: auto (the most that the memory
            allows), given (train_batch_size and gradient_checkpointing as they stand: the report's
            exact setting) or a number. The gradients are the same but for rounding.
        mixed_precision: no, bf16 or fp16. Weights of the adapter and their gradients stay float32.
        force_mixed_precision: Use it on a device that is not fit for it, under a warning.
        use_8bit_adam: Optimiser states in 8 bits, by bitsandbytes; CUDA alone has that.
        adam_beta1: Of AdamW.
        adam_beta2: Of AdamW.
        adam_weight_decay: Of AdamW.
        adam_epsilon: Of AdamW.
        max_grad_norm: Gradients longer than this are shortened to it; none leaves them.
        snr_gamma: Min-SNR weighting with this gamma (Hang et al. 2023); none weighs all timesteps
            alike. 5 is the paper's.
        velocity_weight: The most that the loss of a noisy sample may weigh where an error of noise
            is counted as the error of velocity that it makes (1 / alphas_cumprod larger; Salimans
            and Ho 2022). There the ground of a picture is decided, and the loss of noise hardly
            tells. 1 leaves all alike.
        noise_offset: How far the noise of a channel is moved as a whole. The schedule of Stable
            Diffusion never reaches pure noise, which is why pure white is hard for it (Lin et al.
            2023); 0.05 to 0.1 loosens that.
        timestep_bias: How much more the noisy timesteps are drawn: T (1 - u^bias) of an even u. 1
            draws all alike; 2 half of them above three quarters of T, where a picture's ground is
            made.
        caption_dropout: Share of the images that are shown without their caption.
        random_flip: Whether images are mirrored at random.
        kept_prompts: What shall be drawn as before. Some samples are shown under one of these
            instead of their caption, and what the base predicts there is asked for; an empty text
            keeps the unconditional half of guidance.
        kept_share: How many of the samples, where there are such prompts.
        validation_steps: Steps between two looks at the validation loss; none does without.
        validation_prompts: Prompts that are drawn on the way.
        validation_image_steps: Steps between two drawings of them.
        validation_seed: Of these pictures: prompt i is drawn from seed + i.
        validation_inference_steps: Denoising steps of these pictures.
        validation_guidance_scale: Of these pictures.
        early_stopping_patience: Stop when the validation loss has not fallen for so many looks, and
            keep the adapter of the best; none trains to the end.
        checkpointing_steps: Steps between two checkpoints.
        checkpoints_total_limit: How many of them are kept; none keeps all.
        max_bad_steps: So many dropped steps in a row, and the run goes back to the last checkpoint.
        max_rollbacks: So often, and the run stops.
        rollback_lr_factor: What the learning rate is multiplied with each time.
        report_to: A tracker of accelerate, such as tensorboard; none keeps the report alone.
    """

    model: str = text("mini")
    dataset: str = text("mini")
    resolution: int | None = whole(None, least=8, most=8192, words=(None,))
    output_folder: str = text("runs/lora")
    cache_folder: str | None = text(None, words=(None,))
    strict: bool = switch(False)
    backend: str = text("auto")
    seed: int = whole(42)
    rank: int = whole(8, least=1)
    alpha: float = number(16.0, above=0)
    targets: tuple[str, ...] = some_of(("attention",), *TARGET_MODULES, "text_encoder")
    max_train_steps: int = whole(300, least=1)
    learning_rate: float = number(1e-4, above=0, most=1)
    lr_scheduler: str = choice("cosine", "cosine", "linear", "constant")
    lr_warmup_steps: int | None = whole(None, words=(None,))
    train_batch_size: int = whole(2, least=1)
    gradient_accumulation_steps: int = whole(8, least=1)
    gradient_checkpointing: bool = switch(True)
    micro_batch: str | int = whole("auto", least=1, words=("auto", "given"))
    mixed_precision: str = choice("no", "no", "bf16", "fp16")
    force_mixed_precision: bool = switch(False)
    use_8bit_adam: bool = switch(False)
    adam_beta1: float = number(0.9, most=0.99999)
    adam_beta2: float = number(0.999, most=0.99999)
    adam_weight_decay: float = number(1e-2)
    adam_epsilon: float = number(1e-8, above=0)
    max_grad_norm: float | None = number(1.0, above=0, words=(None,))
    snr_gamma: float | None = number(None, above=0, words=(None,))
    velocity_weight: float = number(1.0, least=1.0)
    noise_offset: float = number(0.0, most=1)
    timestep_bias: float = number(1.0, least=1.0)
    caption_dropout: float = number(0.0, most=1)
    random_flip: bool = switch(False)
    kept_prompts: tuple[str, ...] = texts()
    kept_share: float = number(0.25, most=1)
    validation_steps: int | None = whole(50, least=1, words=(None,))
    validation_prompts: tuple[str, ...] = texts()
    validation_image_steps: int = whole(100, least=1)
    validation_seed: int = whole(0)
    validation_inference_steps: int = whole(25, least=1)
    validation_guidance_scale: float = number(4.0)
    early_stopping_patience: int | None = whole(None, least=1, words=(None,))
    checkpointing_steps: int = whole(50, least=1)
    checkpoints_total_limit: int | None = whole(3, least=1, words=(None,))
    max_bad_steps: int = whole(3, least=1)
    max_rollbacks: int = whole(2)
    rollback_lr_factor: float = number(0.5, above=0, most=1)
    report_to: str | None = text(None, words=(None,))

    def __post_init__(self):
        """Checks every field by its rule, and those that must agree with each other."""
        for setting in fields(self):
            given = getattr(self, setting.name)
            try:
                value = setting.metadata["rule"](given)
            except (ValueError, TypeError) as error:
                raise _refuse(setting.name, given, error) from None
            object.__setattr__(self, setting.name, value)
        if self.warmup_steps >= self.max_train_steps and self.warmup_steps > 0:
            raise _refuse(
                "lr_warmup_steps", self.lr_warmup_steps,
                f"fewer than max_train_steps={self.max_train_steps}",
            )  # fmt: skip
        if self.velocity_weight > 1 and self.snr_gamma is not None:
            raise _refuse(
                "velocity_weight", self.velocity_weight,
                f"1 beside snr_gamma={self.snr_gamma}, for either weighs the timesteps",
            )  # fmt: skip
        if self.early_stopping_patience and not self.validation_steps:
            raise _refuse(
                "early_stopping_patience", self.early_stopping_patience,
                "validation_steps beside it, for without a validation loss nothing tells when",
            )  # fmt: skip

    @property
    def effective_batch(self) -> int:
        """Images a step of the optimiser."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        if self.lr_warmup_steps is None:
            return self.max_train_steps // 20
        return self.lr_warmup_steps

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Name endings of the UNet's layers that get an adapter."""
        return tuple(name for target in self.targets for name in TARGET_MODULES.get(target, ()))

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder gets an adapter too."""
        return "text_encoder" in self.targets

    def to_dict(self) -> dict:
        """The fields, as JSON and YAML can hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict) -> "LoRAConfig":
        """A configuration from names and values; what is not named has its default.

        Raises:
            ValidationError: An unknown name, or a value that a field may not have.
        """
        if not isinstance(values, dict):
            raise _refuse("settings", values, "a mapping of names to values")
        check_names(values)
        return cls(**values)

    def replace(self, **changes) -> "LoRAConfig":
        """The same with some fields changed, checked again."""
        check_names(changes)
        return replace(self, **changes)

    def save(self, path) -> Path:
        """Writes a .json file, or a .yaml file, by its ending."""
        from sdkit.run_folder import replace_file

        path = Path(path)
        with replace_file(path) as temporary:
            temporary.write_text(self.dumps(path.suffix), encoding="utf-8")
        return path

    def dumps(self, suffix: str = ".yaml") -> str:
        """The text of such a file."""
        if suffix == ".json":
            return json.dumps(self.to_dict(), indent=2) + "\n"
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def load(cls, path) -> "LoRAConfig":
        """Reads a .json or .yaml file, or a preset by its name, such as studio_white.

        Raises:
            ValidationError: It is not there, is no mapping of names to values, or says something
                that is not allowed.
        """
        return cls.from_dict(read_settings(path))


def read_settings(path) -> dict:
    """Returns the names and values in a .json or .yaml file, or in a preset, unchecked.

    Raises:
        ValidationError: The file is not there, cannot be read, says something twice, or is no
            mapping.
    """
    import yaml

    from sdkit.validation import ValidationError

    path = find_settings(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
        # JSON is YAML but for one thing: its letters beyond 16 bits are written as two halves.
        if path.suffix.lower() == ".json":
            values = json.loads(content, object_pairs_hook=_read_pairs)
        else:
            values = yaml.safe_load(content)
            root = yaml.compose(content, yaml.SafeLoader)
            if isinstance(root, yaml.MappingNode):
                _read_pairs([(key.value, value) for key, value in root.value])
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValidationError(
            f"{path}: cannot be read ({reason}). Expected a YAML or JSON file of settings, such as "
            f"`rank: 8`, or one of {', '.join(sorted(p.stem for p in PRESETS.glob('*.yaml')))}."
        ) from error
    if not isinstance(values, dict):
        raise ValidationError(
            f"{path}: holds {type(values).__name__}, expected names and values, such as `rank: 8`."
        )
    return values


def _read_pairs(pairs):
    """A dict of pairs; of a name that is there twice both formats would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return values


def find_settings(path) -> Path:
    """Returns the path of a file of settings: as it is, or of the preset with that name."""
    path = Path(path)
    preset = PRESETS / f"{path.name}.yaml"
    return preset if not path.exists() and path == Path(path.name) and preset.is_file() else path


def check_names(names):
    """Returns names of settings unchanged.

    Raises:
        ValidationError: An unknown one, with the one that was probably meant.
    """
    from sdkit.validation import ValidationError

    known = [setting.name for setting in fields(LoRAConfig)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Expected some of {', '.join(known)}."
            raise ValidationError(f"{name}: no setting of a training has this name. {hint}")
    return names


def _refuse(name, value, expected):
    from sdkit.validation import ValidationError

    shown = repr(value)
    shown = shown if len(shown) <= SHOWN_LETTERS else f"{shown[:SHOWN_LETTERS]}..."
    return ValidationError(f"{name}={shown}: expected {expected}.")
