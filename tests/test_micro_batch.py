"""The micro-batch: the most that fits, checkpointing as the last resort, predicted as measured."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config, make_encoded

from sdkit.device import GIB
from sdkit.finetuning.adapter import add_adapter
from sdkit.finetuning.batches import draw_batch
from sdkit.finetuning.micro_batch import (
    ADAM_STATES,
    choose_micro_batch,
    list_candidates,
    predict_step_gib,
    set_training_mode,
)
from sdkit.finetuning.objective import make_noise_scheduler, measure_losses
from sdkit.memory import LiveBytes, build_architecture
from sdkit.mini.recipe import make_scheduler

TINY = {"latents": (4, 8, 8), "prompt_embeds": (77, 32)}
SD15 = {"latents": (4, 64, 64), "prompt_embeds": (77, 768)}


@pytest.fixture
def adapted(tiny_pipe, tmp_path):
    add_adapter(tiny_pipe, make_config(tmp_path))
    return tiny_pipe


def measure_step_gib(pipe, config, size, checkpointing):
    """The same step on real tensors."""
    set_training_mode(pipe.unet, pipe.text_encoder, config, checkpointing)
    batch = draw_batch(make_encoded(pipe), config, 1000, 0).take(0, size)
    schedule = make_noise_scheduler(pipe)
    with LiveBytes(pipe.unet) as live:
        measure_losses(pipe.unet, schedule, batch, batch.prompt_embeds).mean().backward()
    trained = sum(p.numel() for p in pipe.unet.parameters() if p.requires_grad) * 4
    return (live.peak_bytes + (1 + ADAM_STATES) * trained) / GIB


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [2, 8])
def test_the_prediction_is_what_a_step_takes(adapted, tmp_path, size, checkpointing):
    config = make_config(tmp_path)
    predicted = predict_step_gib(
        adapted, config, size, checkpointing, shapes=TINY, device_type="cpu"
    )
    measured = measure_step_gib(adapted, config, size, checkpointing)
    # A checkpointed block keeps the state of torch's generator, 5056 bytes, which a prediction on
    # the meta device does not see: nothing at the size of a real model.
    assert predicted == pytest.approx(measured, rel=0.1, abs=30 * 5056 / GIB)


def test_predicting_changes_nothing(adapted, tmp_path):
    before = {name: p.clone() for name, p in adapted.unet.named_parameters()}
    predict_step_gib(adapted, make_config(tmp_path), 2, True, shapes=TINY, device_type="mps")
    for name, parameter in adapted.unet.named_parameters():
        assert parameter.device.type == "cpu" and parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not adapted.unet.is_gradient_checkpointing


def test_the_order_of_choice(tmp_path):
    config = make_config(tmp_path)
    assert list_candidates(config, 16) == [
        (16, False), (8, False), (4, False), (2, False),
        (16, True), (8, True), (4, True), (2, True), (1, True),
    ]  # fmt: skip
    never = config.replace(gradient_checkpointing=False)
    assert list_candidates(never, 6) == [(6, False), (3, False), (2, False), (1, False)]


def test_less_memory_smaller_micro_batch_then_checkpointing(adapted, tmp_path):
    config = make_config(tmp_path)

    def choose(available_gib):
        found = choose_micro_batch(adapted, config, shapes=TINY, available_gib=available_gib)
        assert found.needed_gib * 1.1 <= available_gib or "does not fit" in found.reason
        return found.size, found.gradient_checkpointing

    two_gib = predict_step_gib(adapted, config, 2, False, shapes=TINY, device_type="cpu")
    assert choose(10) == (16, False)
    assert choose(two_gib * 1.11) == (2, False)
    assert choose(0) == (1, True)
    config = config.replace(gradient_checkpointing=False)
    assert choose(0) == (1, False)


def test_what_is_asked_for_is_taken(adapted, tmp_path):
    for asked, size in (("given", 2), (5, 5), (99, 16)):
        config = make_config(tmp_path, micro_batch=asked)
        found = choose_micro_batch(adapted, config, shapes=TINY, available_gib=0)
        assert (found.size, found.gradient_checkpointing) == (size, True)
        assert found.needed_gib is None


def test_processes_share_the_batch(adapted, tmp_path):
    config = make_config(tmp_path)
    found = choose_micro_batch(adapted, config, shapes=TINY, available_gib=10, processes=3)
    assert found.size == 6


def test_the_report_s_mac(tmp_path):
    """Attention's scores are materialised on MPS: at 512 pixels 16 images take 82 GiB."""
    pipe = SimpleNamespace(**build_architecture("sd15"), scheduler=make_scheduler())
    for name in ("unet", "text_encoder"):
        getattr(pipe, name).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=targets), "default")
    found = choose_micro_batch(
        pipe, make_config(tmp_path), shapes=SD15, available_gib=8.0, device_type="mps"
    )
    assert (found.size, found.gradient_checkpointing) == (4, True)
    assert str(found).startswith("4 at a time, with gradient checkpointing (7.1")
    assert "8.00 GiB free; 16 at a time would take 81." in str(found)


def test_the_text_encoder_counts_if_it_is_trained(tokenizer_folder, tmp_path):
    needs = {}
    for targets in ("attention", "attention,text_encoder"):
        pipe, config = build_tiny_pipe(tokenizer_folder), make_config(tmp_path, targets=targets)
        add_adapter(pipe, config)
        needs[targets] = predict_step_gib(pipe, config, 8, False, shapes=TINY, device_type="cpu")
    assert needs["attention,text_encoder"] > 1.02 * needs["attention"]
