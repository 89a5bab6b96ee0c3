"""One process or several, on one machine or several: accelerate, and what they must agree on."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list

from sdkit.device import choose_device
from sdkit.emulate import active as find_emulation
from sdkit.finetuning.config import LoRAConfig
from sdkit.validation import ValidationError

LOGS_NAME = "logs"
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(config: LoRAConfig) -> Accelerator:
    """Returns accelerate's Accelerator on the device that the settings ask for.

    Precision is not left to it: `accelerate launch` would choose one too.

    Raises:
        ValidationError: A device that cannot be had, a way to share work that is not supported, or
            a tracker that is not there.
    """
    device, _ = choose_device(config.backend)
    known = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to and config.report_to not in known:
        raise ValidationError(
            f"report_to={config.report_to!r}: not installed, or no tracker of accelerate. Found "
            f"{', '.join(known) or 'none'}; pip install sdkit[tensorboard] brings tensorboard."
        )
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", log_with=config.report_to,
        project_dir=str(Path(config.output_folder) / LOGS_NAME),
    )  # fmt: skip
    if accelerator.distributed_type not in DISTRIBUTED:
        raise ValidationError(
            f"accelerate: {accelerator.distributed_type.value} is not supported. Expected one "
            "process, or several on CPUs or GPUs (an adapter is small: nothing need be sharded)."
        )
    if accelerator.device.type != device.type:
        raise ValidationError(
            f"backend={config.backend!r}: accelerate is on {accelerator.device} since an earlier "
            "training of this process. Restart Python to change the device."
        )
    return accelerator


def from_main(accelerator, read):
    """Returns what the main process reads, in every process."""
    values = [read() if accelerator.is_main_process else None]
    return values[0] if accelerator.num_processes == 1 else broadcast_object_list(values)[0]


def any_process(accelerator, is_so) -> bool:
    """Whether something is so in any process."""
    if accelerator.num_processes == 1:
        return is_so
    return bool(accelerator.reduce(torch.tensor(float(is_so), device=accelerator.device)) > 0)


def find_device_type(device) -> str:
    """Returns "mps", "cuda" or "cpu"; an emulated MPS is one."""
    return "mps" if (find_emulation() or "").startswith("emulated MPS") else device.type


def name_card(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
