"""A training made ready: device, model, data, adapter, optimiser, and the point where it stands."""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sdkit.device import measure_available_gib
from sdkit.finetuning.adapter import (
    add_adapter,
    check_is_trainable,
    check_targets,
    write_adapter,
)
from sdkit.finetuning.adapter_file import (
    describe_training,
    pack_adapter,
    read_header,
    sample_weights,
    unpack_adapter,
)
from sdkit.finetuning.batches import Batch
from sdkit.finetuning.checkpoints import (
    find_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.gates import check_state
from sdkit.finetuning.micro_batch import (
    MicroBatch,
    choose_micro_batch,
    encode_prompts,
    set_training_mode,
)
from sdkit.finetuning.objective import (
    check_weights,
    make_noise_scheduler,
    measure_losses,
    weigh_timesteps,
)
from sdkit.finetuning.optimizer import check_8bit_adam, make_optimizer
from sdkit.finetuning.processes import find_device_type, from_main, make_accelerator, name_card
from sdkit.finetuning.progress import LOSS_SCALE, Progress
from sdkit.finetuning.run_start import CONFIG_FILE, clear_run_folder, find_start
from sdkit.finetuning.training_data import open_data
from sdkit.finetuning.training_dtype import choose_training_dtype
from sdkit.guarding import remove_guard
from sdkit.loading import load_pipeline
from sdkit.validation import ValidationError


@dataclass(frozen=True)
class TrainingRun:
    """Everything that a step needs, and that stays the same from step to step.

    Attributes:
        config: The settings.
        accelerator: accelerate's: the device, the processes, the trackers.
        pipe: The pipeline with its adapter.
        noise_scheduler: The schedule that it was trained with.
        parameters: What is trained.
        optimizer: AdamW.
        train: An EncodedDataset.
        validation: Another, or None.
        dtype: Of the frozen UNet.
        micro_batch: How a step is cut.
        metadata: For the adapter's file.
        identity: Of base model and data.
        notices: What was decided for this machine.
    """

    config: LoRAConfig
    accelerator: Accelerator
    pipe: object
    noise_scheduler: object
    parameters: tuple
    optimizer: torch.optim.Optimizer
    train: object
    validation: object
    dtype: torch.dtype
    micro_batch: MicroBatch
    metadata: dict
    identity: dict
    notices: tuple

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.config.output_folder)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.accelerator.device

    @property
    def positions(self) -> tuple:
        """Places in the effective batch that are this process's."""
        processes = self.accelerator.num_processes
        return tuple(range(self.config.effective_batch))[
            self.accelerator.process_index :: processes
        ]

    def measure_losses(self, batch: Batch):
        """Returns (B,), the loss of each sample of a Batch on the device, unweighted."""
        with _autocast(self.device, self.dtype):
            prompt_embeds = encode_prompts(self.pipe.text_encoder, batch, self.config)
            return measure_losses(self.pipe.unet, self.noise_scheduler, batch, prompt_embeds)

    def measure_share(self, part: Batch):
        """Returns what a part of the effective batch adds to the loss that is trained on."""
        weights = weigh_timesteps(
            self.noise_scheduler,
            part.timesteps,
            snr_gamma=self.config.snr_gamma,
            velocity_weight=self.config.velocity_weight,
        )
        return (weights * self.measure_losses(part)).sum() / self.config.effective_batch


def _autocast(device, dtype):
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def begin_run(
    config: LoRAConfig, *, resume=False, overwrite=False, pipe=None, data=None, progress=True
):
    """Makes a training ready, new or from its last checkpoint.

    Args:
        config: The settings.
        resume: Go on with the run in `config.output_folder`.
        overwrite: Remove the run that is there.
        pipe: A loaded pipeline to train instead of `config.model`; it is changed.
        data: (train, validation) EncodedDatasets instead of `config.dataset`.
        progress: Whether to show progress bars.

    Returns:
        A TrainingRun and its Progress.

    Raises:
        ValidationError: Something cannot be as it was asked for, see `train_lora`.
    """
    accelerator = make_accelerator(config)
    # Of several machines only the main one need have the run's folder.
    checkpoint = from_main(
        accelerator, lambda: find_start(config, resume=resume, overwrite=overwrite)
    )
    device_type = find_device_type(accelerator.device)
    pipe, dtype, notices = _open_pipeline(pipe, config, accelerator, device_type, progress)
    check_targets(check_is_trainable(pipe), config)  # before an hour of encoding
    noise_scheduler = make_noise_scheduler(pipe)
    check_weights(noise_scheduler, config)
    remove_guard(pipe)  # the gates look at every step, and drop where a guard would raise
    train, validation, found = open_data(data, pipe, config, accelerator, progress)
    identity = _identify(pipe, train, validation)
    metadata = describe_training(pipe, config, train)
    parameters = tuple(add_adapter(pipe, config).values())
    optimizer = make_optimizer(parameters, config, device_type)
    if checkpoint:  # another cut would round differently
        record, _, _ = from_main(accelerator, lambda: load_checkpoint(checkpoint))
        micro_batch = MicroBatch(**record["micro_batch"])
    else:
        micro_batch = _choose_micro_batch(pipe, config, train, accelerator, device_type)
    set_training_mode(pipe.unet, pipe.text_encoder, config, micro_batch.gradient_checkpointing)
    run = TrainingRun(
        config, accelerator, pipe, noise_scheduler, parameters, optimizer, train,
        validation, dtype, micro_batch, metadata, identity, (*notices, *found),
    )  # fmt: skip
    accelerator.init_trackers("sdkit", config={k: str(v) for k, v in config.to_dict().items()})
    return run, restore(run, checkpoint) if checkpoint else _save_first(run)


def _open_pipeline(pipe, config, accelerator, device_type, progress):
    """Returns the pipeline, the dtype of its frozen weights, and what to say."""
    if config.use_8bit_adam:
        check_8bit_adam(device_type)
    dtype, notices = choose_training_dtype(
        config,
        accelerator.device,
        device_type=device_type,
        device_name=name_card(accelerator.device),
    )
    if pipe is None:
        dtypes = {"unet": dtype, "default": torch.float32}
        pipe, report = load_pipeline(
            config.model, backend=str(accelerator.device), dtype=dtypes, progress=progress
        )
        notices = [*notices, *report.notices]
    return pipe, dtype, notices


def _identify(pipe, train, validation) -> dict:
    """What a resumed run must find again, and every process have: base model and data.

    Raises:
        ValidationError: The processes have different ones.
    """
    identity = {
        "base_sample": sample_weights(pipe.unet),
        "train": train.fingerprint,
        "validation": validation.fingerprint if validation else None,
    }
    if len(set(gather_object([str(identity)]))) > 1:
        raise ValidationError(
            "accelerate: the processes have different models or images. Expected the same on "
            "every machine."
        )
    return identity


def _save_first(run):
    """Saves a checkpoint before the first step, so that there is always one to go back to."""
    progress = Progress(
        loss_scale=LOSS_SCALE if run.config.mixed_precision == "fp16" else 1.0,
        micro_batch=asdict(run.micro_batch),
        identity=run.identity,
    )
    if run.accelerator.is_main_process:
        clear_run_folder(run.folder)  # now that nothing can be wrong with the new one
    save(run, progress)
    if run.accelerator.is_main_process:
        run.config.save(run.folder / CONFIG_FILE)  # last: what has it is a run
    return progress


def _choose_micro_batch(pipe, config, train, accelerator, device_type):
    processes = accelerator.num_processes
    available = torch.tensor(measure_available_gib(accelerator.device))
    if processes > 1 and accelerator.device.type != "cuda":
        available = available / processes  # they share the machine's
    # All must cut alike: the least that any of them has.
    available = accelerator.gather(available.to(accelerator.device)).min()
    shapes = {
        "latents": tuple(train.latent_mean.shape[1:]),
        "prompt_embeds": tuple(train.prompt_embeds.shape[1:]),
    }
    return choose_micro_batch(
        pipe, config, shapes=shapes, available_gib=float(available), device_type=device_type,
        processes=processes,
    )  # fmt: skip


def save(run: TrainingRun, progress: Progress):
    """Writes a checkpoint, unless the one of this step is there, and removes old ones.

    Raises:
        ValidationError: A weight or a moment is not finite, or the disk refuses.
    """
    if run.accelerator.is_main_process and not find_checkpoint(run.folder, progress.step):
        state = run.optimizer.state_dict()
        check_state(state, "optimiser")
        adapter = pack_adapter(run.pipe, run.metadata)
        save_checkpoint(run.folder, progress.to_dict(), adapter, state)
        spare = {progress.best_step}
        prune_checkpoints(run.folder, run.config.checkpoints_total_limit, spare=spare)
    run.accelerator.wait_for_everyone()


def restore(run: TrainingRun, checkpoint) -> Progress:
    """Puts a checkpoint's weights and moments into a run.

    Returns:
        Its Progress.

    Raises:
        ValidationError: It is damaged, or belongs to another base model, other data or settings.
    """
    record, adapter, state = from_main(run.accelerator, lambda: load_checkpoint(checkpoint))
    _check_settings(checkpoint, adapter, run)
    progress = Progress.from_dict(record)
    saved = asdict(progress)["identity"]
    for name, value in run.identity.items():
        if json.dumps(saved[name]) != json.dumps(value):  # as text, for a NaN equals nothing
            what = "weights of the base model" if name == "base_sample" else f"{name} images"
            raise ValidationError(
                f"{checkpoint}: the run was begun with other {what}. Expected the same model and "
                "data; bring them back, or train anew into another folder."
            )
    write_adapter(run.pipe, unpack_adapter(adapter))
    run.optimizer.load_state_dict(state)
    return progress


def _check_settings(checkpoint, adapter, run):
    """Raises if a checkpoint was made with other settings: copied here, or the file was edited."""
    saved, own = (
        json.loads(metadata["sdkit.config"])
        for metadata in (read_header(adapter)["__metadata__"], run.metadata)
    )
    for name, value in saved.items():
        if name in own and own[name] != value:
            raise ValidationError(
                f"{checkpoint}: was made with {name}={value!r}, and the run has {own[name]!r}. "
                "Expected the same settings, or a resumed run would not end where it would have; "
                "bring them back, or train anew into another folder."
            )
