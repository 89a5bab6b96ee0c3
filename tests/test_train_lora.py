"""The training loop: it learns, cuts its batches as it likes, drops what is not finite, stops."""

import dataclasses
import json
import warnings

import pytest
import safetensors.torch
import torch
from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config, make_data, make_encoded, spoil

from sdkit.finetuning.adapter import find_parameters
from sdkit.finetuning.batches import choose_indices, draw_batch
from sdkit.finetuning.checkpoints import list_checkpoints
from sdkit.finetuning.dropping import drop_step
from sdkit.finetuning.gradient_step import compute_gradients, take_step
from sdkit.finetuning.held_out import measure_validation_loss
from sdkit.finetuning.report import REPORT_FILE
from sdkit.finetuning.training import find_gradients, train_lora
from sdkit.finetuning.training_run import begin_run, save
from sdkit.validation import ValidationError

NAN = float("nan")


@pytest.fixture
def data(tiny_pipe):
    return make_data(tiny_pipe)


def train(pipe, data, folder, *, resume=False, overwrite=False, on_step=None, **changes):
    few = {"gradient_accumulation_steps": 2}  # six steps of four show each image once
    return train_lora(
        make_config(folder, **(few | changes)), pipe=pipe, data=data, progress=False, resume=resume,
        overwrite=overwrite, on_step=on_step,
    )  # fmt: skip


def read_weights(path):
    return safetensors.torch.load_file(path)


def copy_weights(pipe):
    return [parameter.detach().clone() for parameter in find_parameters(pipe).values()]


def test_it_learns(tiny_pipe, data, tmp_path):
    report = train(
        tiny_pipe, data, tmp_path / "run", max_train_steps=40, learning_rate=1e-2,
        validation_steps=20,
    )  # fmt: skip
    assert (report.stopped, report.steps_done, report.dropped_steps) == ("finished", 40, ())
    before, after = report.validation_losses[0][1], report.validation_losses[-1][1]
    assert after < 0.9 * before
    assert report.images_per_second > 0 and report.is_good
    saved = json.loads((tmp_path / "run" / REPORT_FILE).read_text())
    assert saved["losses"] == [list(pair) for pair in report.losses]
    assert str(report).startswith("stopped     finished")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["attention", "attention,text_encoder"])
def test_any_micro_batch_gives_the_same_gradients(
    tokenizer_folder, tmp_path, checkpointing, targets
):
    gradients, losses = {}, {}
    for size in ("given", 1, 3, 8):
        pipe = build_tiny_pipe(tokenizer_folder)
        config = make_config(
            tmp_path / str(size), micro_batch=size, snr_gamma=5.0, targets=targets,
            gradient_checkpointing=checkpointing, gradient_accumulation_steps=4,
        )  # fmt: skip
        run, _ = begin_run(config, pipe=pipe, data=make_data(pipe), progress=False)
        assert run.micro_batch.size == (2 if size == "given" else size)
        batch = draw_batch(run.train, config, 1000, 0)
        for parameter in run.parameters:  # B is zero at the start, and so would be the rest
            parameter.data += 0.02
        loss, norm, gate = compute_gradients(run, batch)
        assert gate is None
        gradients[size] = torch.cat([p.grad.flatten() for p in run.parameters])
        losses[size] = loss
    length = gradients["given"].norm()
    for size, gradient in gradients.items():
        # Sums of 8 float32 losses in another order, through a dozen layers: a few ulp of 6e-8.
        assert float((gradient - gradients["given"]).norm() / length) < 2e-6, size
        assert losses[size] == pytest.approx(losses["given"], rel=1e-6)


def test_training_is_weighed_and_the_validation_loss_is_not(tokenizer_folder, tmp_path):
    losses, looks = {}, {}
    for weight in (1.0, 5.0):
        pipe = build_tiny_pipe(tokenizer_folder)
        config = make_config(tmp_path / str(weight), velocity_weight=weight)
        run, _ = begin_run(config, pipe=pipe, data=make_data(pipe), progress=False)
        batch = draw_batch(run.train, config, 1000, 0)
        losses[weight], _, _ = compute_gradients(run, batch)
        with torch.no_grad():
            each = run.measure_losses(batch)
        looks[weight] = measure_validation_loss(run)
    signal = run.noise_scheduler.alphas_cumprod[batch.timesteps]
    assert losses[1.0] == pytest.approx(float(each.mean()), rel=1e-6)
    assert losses[5.0] == pytest.approx(float(((1 / signal).clamp(max=5) * each).mean()), rel=1e-5)
    assert losses[5.0] > 1.5 * losses[1.0]
    assert looks[1.0] == looks[5.0]


def test_any_micro_batch_gives_the_same_training(tokenizer_folder, tmp_path):
    losses = {}
    for size in ("given", "auto"):
        pipe = build_tiny_pipe(tokenizer_folder)
        report = train(pipe, make_data(pipe), tmp_path / size, micro_batch=size)
        losses[size] = [loss for _, loss in report.losses]
        assert ("4 at a time, without" in report.micro_batch) == (size == "auto")
    assert losses["auto"] == pytest.approx(losses["given"], rel=1e-5)


def test_a_bad_image_is_named_and_left_out(tiny_pipe, data, tmp_path):
    spoiled = (spoil(data[0], 5), data[1])
    report = train(tiny_pipe, spoiled, tmp_path / "run")
    (dropped,) = report.dropped_steps
    assert dropped.images == ("image_005.png",) == report.excluded_images
    assert (dropped.gate, dropped.cause) == ("batch", "bad-input")
    assert "1 NaN and 0 Inf of 256 values in its latents" in dropped.message
    assert dropped.message.endswith("; it is left out from now on")
    assert report.steps_done == 5 and report.is_good
    assert all(torch.isfinite(w).all() for w in read_weights(report.adapter_path).values())


def test_a_bad_caption_is_named(tiny_pipe, data, tmp_path):
    embeds = data[0].prompt_embeds.clone()
    embeds[1, 3, 2] = float("inf")
    bad = {n for n, c in zip(data[0].names, data[0].caption_index, strict=True) if c == 1}
    spoiled = (dataclasses.replace(data[0], prompt_embeds=embeds), None)
    report = train(tiny_pipe, spoiled, tmp_path / "run")
    assert set(report.excluded_images) == bad and bad
    assert "prompt_embeds" in report.dropped_steps[0].message


def test_what_belongs_to_no_image_is_not_laid_at_its_door(tiny_pipe, data, tmp_path):
    embeds = data[0].prompt_embeds.clone()
    embeds[0, 3, 2] = NAN
    spoiled = (dataclasses.replace(data[0], prompt_embeds=embeds), None)
    with pytest.raises(ValidationError, match="prompt_embeds of the empty caption .*1 of"):
        train(tiny_pipe, spoiled, tmp_path / "run", caption_dropout=0.1)
    kept = dataclasses.replace(
        data[0], kept_rows=(1,), kept_latents=torch.full((1, 4, 8, 8), NAN)
    )  # fmt: skip
    with pytest.raises(ValidationError, match="latents of kept_prompts .*256 of 256"):
        train(tiny_pipe, (kept, None), tmp_path / "run")


def test_a_run_without_one_finite_step_has_not_finished(tiny_pipe, data, tmp_path):
    spoiled = dataclasses.replace(data[0], latent_mean=data[0].latent_mean * NAN)
    spoiled.latent_mean[0] = 0.0
    report = train(tiny_pipe, (spoiled, None), tmp_path / "run", max_bad_steps=9, max_train_steps=2)
    assert report.stopped.startswith("given up: not one step was finite (image_")
    assert not report.is_good and report.steps_done == 0


def test_a_run_whose_images_are_all_bad_gives_up_and_does_so_again(tokenizer_folder, tmp_path):
    for resume in (False, True):
        pipe = build_tiny_pipe(tokenizer_folder)
        data = make_encoded(pipe)
        spoiled = dataclasses.replace(data, latent_mean=data.latent_mean * NAN)
        report = train(
            pipe, (spoiled, None), tmp_path / "run", resume=resume, max_bad_steps=99,
            max_train_steps=20,
        )  # fmt: skip
        assert report.stopped.startswith("given up: every image is bad (image_")
        assert set(report.excluded_images) == set(data.names) and report.steps_done == 0
        assert len(report.dropped_steps) == 6  # of four images each


def test_an_image_that_overflows_in_the_model_is_named(tiny_pipe, data, tmp_path):
    """Its own numbers are finite, its loss is not."""
    spoiled = (spoil(data[0], 5, 1e25), data[1])
    weights = []
    report = train(
        tiny_pipe, spoiled, tmp_path / "run", max_train_steps=2, max_bad_steps=2,
        gradient_accumulation_steps=8,
        on_step=lambda record: weights.append(copy_weights(tiny_pipe)),
    )  # fmt: skip
    dropped = report.dropped_steps[0]
    assert (dropped.gate, dropped.images) == ("loss", ("image_005.png",))
    assert "image_005.png; first bad op aten." in dropped.message
    assert report.excluded_images == ()
    assert all(torch.isfinite(value).all() for step in weights for value in step)


def test_an_image_that_is_alone_in_its_batch_is_named_too(tiny_pipe, data, tmp_path):
    config, spoiled = make_config(tmp_path / "run"), (spoil(data[0], 5, 1e25), None)
    run, progress = begin_run(config, pipe=tiny_pipe, data=spoiled, progress=False)
    alone = (s for step in range(24) for s in draw_batch(run.train, config, 1000, step).split(1))
    batch = next(sample for sample in alone if sample.names == ("image_005.png",))
    dropped = drop_step(run, batch, progress, "loss", 1e-3, 1.0).dropped[-1]
    assert dropped.images == ("image_005.png",)
    assert dropped.message.startswith("image_005.png; first bad op")


def test_gradients_that_are_not_finite_never_reach_the_weights(tiny_pipe, data, tmp_path):
    """The forward is finite: only the backward of one layer makes a NaN, and for one step."""
    layer = tiny_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    calls = {"count": 0}

    def poison(module, grad_input, grad_output):
        calls["count"] += 1
        return (grad_input[0] * NAN,) if calls["count"] == 3 else None

    layer.register_full_backward_hook(poison)
    after = {}
    report = train(
        tiny_pipe, data, tmp_path / "run", micro_batch=16,
        on_step=lambda record: after.update({record.step: copy_weights(tiny_pipe)}),
    )  # fmt: skip
    (dropped,) = report.dropped_steps
    assert (dropped.step, dropped.gate, dropped.cause) == (2, "gradients", "not-repeatable")
    assert all(torch.equal(a, b) for a, b in zip(after[1], after[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after[2], after[3], strict=True))
    assert report.steps_done == 5


def test_a_bad_held_out_image_is_left_out(tiny_pipe, data, tmp_path):
    report = train(tiny_pipe, (data[0], spoil(data[1], 2)), tmp_path / "run")
    assert report.is_good and report.rollbacks == 0 and not report.dropped_steps
    assert len(report.validation_losses) == 3
    assert any("held out no more" in n and "image_002.png" in n for n in report.notices)


def test_a_held_out_image_that_overflows_in_the_model_is_named(tiny_pipe, data, tmp_path):
    report = train(
        tiny_pipe, (data[0], spoil(data[1], 2, 1e25)), tmp_path / "run", max_train_steps=3,
        max_rollbacks=0,
    )  # fmt: skip
    assert report.stopped.startswith("given up")
    (dropped,) = report.dropped_steps
    assert (dropped.gate, dropped.cause, dropped.images) == (
        "validation", "bad-input", ("image_002.png",)
    )  # fmt: skip


def test_where_all_held_out_images_are_bad_it_is_none_of_theirs(tiny_pipe, data, tmp_path):
    held_out = dataclasses.replace(data[1], latent_mean=data[1].latent_mean * 1e25)
    config = make_config(tmp_path / "run")
    run, progress = begin_run(config, pipe=tiny_pipe, data=(data[0], held_out), progress=False)
    batch = draw_batch(run.train, config, 1000, 0)
    dropped = drop_step(run, batch, progress, "validation", 1e-3, 1.0).dropped[-1]
    assert (dropped.cause, dropped.images) == ("diverged", ())


def test_bad_weights_are_the_model_s_fault(tiny_pipe, data, tmp_path):
    tiny_pipe.unet.mid_block.resnets[0].conv1.weight.data[0, 0, 0, 0] = NAN
    report = train(
        tiny_pipe, (data[0], None), tmp_path / "run", max_bad_steps=2, max_rollbacks=1,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    assert report.stopped.startswith("given up: 2 steps in a row")
    assert (report.rollbacks, report.steps_done, report.is_good) == (1, 0, False)
    assert len(report.dropped_steps) == 4
    dropped = report.dropped_steps[0]
    assert (dropped.images, dropped.cause) == ((), "bad-weights")
    assert "unet.mid_block.resnets.0.conv1" in dropped.message


def test_a_step_that_spoils_the_moments_goes_back_whatever_was_dropped_before(
    tiny_pipe, data, tmp_path
):
    """Gradients that are finite, and whose squares are too large."""
    layer = tiny_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.register_full_backward_hook(lambda m, grad_input, g: (grad_input[0] * 1e18,))
    (first, *_) = choose_indices(len(data[0].names), make_config(tmp_path), 0)
    spoiled = (spoil(data[0], first), data[1])
    report = train(tiny_pipe, spoiled, tmp_path / "run", max_grad_norm=None, max_rollbacks=0)
    before, dropped = report.dropped_steps
    assert (before.step, before.gate) == (0, "batch")
    assert (dropped.gate, dropped.cause, dropped.images) == ("weights", "diverged", ())
    assert "at learning rate 0.001 left" in dropped.message
    assert "(diverged: " in report.stopped and report.rollbacks == 0 and not report.is_good


def test_a_run_that_diverges_goes_back_at_a_lower_rate(tiny_pipe, data, tmp_path):
    rates, checkpoints = [], tmp_path / "run" / "checkpoints"

    def watch(record):
        rates.append(record.learning_rate)
        if len(rates) == 3:  # what an overflowing update leaves
            next(iter(find_parameters(tiny_pipe).values())).data.fill_(1e38)

    report = train(
        tiny_pipe, data, tmp_path / "run", on_step=watch, lr_scheduler="constant",
        lr_warmup_steps=0, max_bad_steps=1,
    )  # fmt: skip
    assert report.rollbacks == 1
    assert rates[:4] == [1e-3] * 4 and rates[4:] == [5e-4] * (len(rates) - 4)
    assert report.is_good and report.steps_done == 6
    for path in checkpoints.glob("*/pytorch_lora_weights.safetensors"):
        assert all(w.abs().max() < 1e3 for w in read_weights(path).values())


def test_a_moment_that_is_not_finite_is_seen_at_once(tiny_pipe, data, tmp_path):
    config = make_config(tmp_path / "run")
    run, progress = begin_run(config, pipe=tiny_pipe, data=data, progress=False)
    batch = draw_batch(run.train, config, 1000, 0)
    for expected in (None, "weights"):
        _, norm, _ = compute_gradients(run, batch)
        assert take_step(run, 1e-3, norm) == expected
        state = run.optimizer.state[run.parameters[4]]
        state["exp_avg_sq"][0, 0] = float("inf")  # the update is finite, and zero for ever after
    with pytest.raises(ValidationError, match="optimiser: .*exp_avg_sq holds 0 NaN and 1 Inf"):
        save(run, progress.after_good_step(1.0, 1.0))
    assert [path.name for path in list_checkpoints(run.folder)] == ["step_00000000"]


def test_early_stopping_keeps_the_best(tiny_pipe, data, tmp_path):
    report = train(
        tiny_pipe, data, tmp_path / "run", max_train_steps=60, learning_rate=0.3, micro_batch=16,
        lr_scheduler="constant", early_stopping_patience=2, validation_steps=1,
        checkpoints_total_limit=1, checkpointing_steps=1,
    )  # fmt: skip
    assert report.stopped.startswith("early stopping") and report.is_good
    best = min(report.validation_losses, key=lambda pair: pair[1])[0]
    assert report.validation_losses[-1][0] == best + 2
    kept = tmp_path / "run" / "checkpoints" / f"step_{best:08d}"
    assert kept.is_dir()
    final = read_weights(report.adapter_path)
    for name, value in read_weights(kept / "pytorch_lora_weights.safetensors").items():
        assert torch.equal(value, final[name])


def test_early_stopping_without_anything_held_out_is_refused(tiny_pipe, data, tmp_path):
    for held_out in (None, dataclasses.replace(data[1], latent_mean=data[1].latent_mean * NAN)):
        with pytest.raises(ValidationError, match="early_stopping_patience=2: there is nothing to"):
            train(tiny_pipe, (data[0], held_out), tmp_path / "run", early_stopping_patience=2)
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_early_stopping_where_no_look_was_finite_is_told(tiny_pipe, data, tmp_path):
    """A held-out image overflows in the model from the first look on, so there is no best."""
    report = train(
        tiny_pipe, (data[0], spoil(data[1], 2, 1e25)), tmp_path / "run", validation_steps=3,
        early_stopping_patience=2, max_rollbacks=0,
    )  # fmt: skip
    assert report.stopped.startswith("given up: not finite at the validation gate, after 0 returns")
    assert report.dropped_steps[-1].images == ("image_002.png",)
    assert report.adapter_path


def test_validation_pictures_are_checked_and_leave_no_trace(tokenizer_folder, tmp_path):
    losses = {}
    for prompts in ((), ("a shoe", "a boot")):
        pipe, name = build_tiny_pipe(tokenizer_folder), f"run{len(prompts)}"
        report = train(
            pipe, make_data(pipe), tmp_path / name, validation_prompts=prompts,
            validation_inference_steps=2, validation_image_steps=3,
        )  # fmt: skip
        losses[name] = report.losses
        assert len(report.validation_images) == (3 if prompts else 0)
    for folder in report.validation_images:
        record = json.loads((tmp_path / "run2" / folder / "record.json").read_text())
        assert len(record["images"]) == 2
    assert losses["run0"] == losses["run2"]


def test_warnings_of_the_run_are_kept_and_shown(tiny_pipe, data, tmp_path):
    def watch(record):
        warnings.warn("invalid value encountered in cast", RuntimeWarning, stacklevel=1)

    with pytest.warns(RuntimeWarning, match="in cast"):
        report = train(tiny_pipe, data, tmp_path / "run", on_step=watch)
    (found,) = [w for w in report.warnings if w["category"] == "RuntimeWarning"]
    assert found["count"] == 6
    assert "in cast (6 times)" in str(report)


def test_bfloat16_learns_and_keeps_float32_adapters(tiny_pipe, data, tmp_path):
    tiny_pipe.unet.to(torch.bfloat16)
    report = train(tiny_pipe, data, tmp_path / "run", mixed_precision="bf16")
    assert report.steps_done == 6
    assert {w.dtype for w in read_weights(report.adapter_path).values()} == {torch.float32}


def test_a_loss_scale_that_is_too_large_costs_no_step(tiny_pipe, data, tmp_path):
    tiny_pipe.unet.to(torch.float16)
    report = train(
        tiny_pipe, data, tmp_path / "run", mixed_precision="fp16", force_mixed_precision=True,
        max_train_steps=2, validation_steps=None,
    )  # fmt: skip
    assert report.steps_done == 2 and not report.dropped_steps
    assert any("forced" in notice for notice in report.notices)


def test_gradients_that_no_loss_scale_mends_leave_it_as_it_was(tiny_pipe, data, tmp_path):
    layer = tiny_pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    config = make_config(tmp_path / "run", micro_batch=16, validation_steps=None)
    run, progress = begin_run(config, pipe=tiny_pipe, data=data, progress=False)
    progress = dataclasses.replace(progress, loss_scale=4.0)
    layer.register_full_backward_hook(lambda m, grad_input, g: (grad_input[0] * NAN,))
    after, _, _, gate = find_gradients(run, draw_batch(run.train, config, 1000, 0), progress)
    assert (gate, after.loss_scale) == ("gradients", 4.0)


def test_refusals(tiny_pipe, data, tmp_path):
    for changes, message in (
        ({"mixed_precision": "fp16"}, "far slower than float32"),
        ({"use_8bit_adam": True}, "run on CUDA alone"),
        ({"report_to": "nosuch"}, "report_to='nosuch'"),
    ):
        with pytest.raises(ValidationError, match=message):
            train(tiny_pipe, data, tmp_path / "run", **changes)
    empty = dataclasses.replace(data[0], names=())
    with pytest.raises(ValidationError, match="no image to train on"):
        train(tiny_pipe, (empty, None), tmp_path / "run")


def test_one_image_is_enough(tiny_pipe, data, tmp_path):
    one = dataclasses.replace(
        data[0], names=data[0].names[:1], latent_mean=data[0].latent_mean[:1],
        latent_std=data[0].latent_std[:1], caption_index=data[0].caption_index[:1],
    )  # fmt: skip
    report = train(tiny_pipe, (one, None), tmp_path / "run")
    assert report.steps_done == 6
    assert any("1 image" in notice for notice in report.notices)


def test_trackers(tiny_pipe, data, tmp_path):
    train(tiny_pipe, data, tmp_path / "run", report_to="tensorboard")
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))
