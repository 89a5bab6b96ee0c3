"""What shall be drawn as before: whose samples they are, what their target is, what it changes."""

import pytest
import torch
from tiny_pipelines import build_tiny_pipe
from tiny_training import CAPTIONS, make_config, make_data

from sdkit.finetuning.batches import draw_batch
from sdkit.finetuning.keeping import add_kept_prompts, without_adapter
from sdkit.finetuning.training import train_lora
from sdkit.finetuning.training_run import begin_run
from sdkit.validation import ValidationError

KEEPING = {"kept_prompts": ("a cat on grass", ""), "validation_inference_steps": 2}


def begin(folder, pipe, **changes):
    config = make_config(folder, **KEEPING, **{"kept_share": 0.5, **changes})
    run, _ = begin_run(config, pipe=pipe, data=make_data(pipe), progress=False)
    return run


def draw(run, step=0):
    return draw_batch(run.train, run.config, 1000, step)


def predict(unet, batch):
    with torch.no_grad():
        return unet(batch.latents, batch.timesteps, batch.prompt_embeds).sample


def test_kept_prompts_have_rows_of_their_own_after_those_of_the_images(tiny_pipe):
    train, _ = make_data(tiny_pipe)
    kept = add_kept_prompts(tiny_pipe, train, make_config("unused", **KEEPING))
    assert kept.kept_latents.shape == (2, 4, 8, 8)
    again = add_kept_prompts(tiny_pipe, train, make_config("unused", **KEEPING))
    assert torch.equal(again.kept_latents, kept.kept_latents)  # so that a run resumes exactly
    assert kept.kept_rows == (len(CAPTIONS), len(CAPTIONS) + 1)
    assert torch.equal(kept.prompt_embeds[-1], kept.prompt_embeds[0])  # "" is what row 0 has
    assert torch.equal(kept.prompt_embeds[: len(CAPTIONS)], train.prompt_embeds)
    assert kept.names == train.names and len(kept) == len(train)


def test_a_prompt_that_comes_twice_is_drawn_twice(tiny_pipe):
    twice = make_config("unused", **KEEPING | {"kept_prompts": ("", "")})
    first, second = add_kept_prompts(tiny_pipe, make_data(tiny_pipe)[0], twice).kept_latents
    assert not torch.equal(first, second)


def test_data_that_has_them_is_taken_and_that_of_others_refused(tiny_pipe):
    config = make_config("unused", **KEEPING)
    kept = add_kept_prompts(tiny_pipe, make_data(tiny_pipe)[0], config)
    assert add_kept_prompts(tiny_pipe, kept, config) is kept
    with pytest.raises(ValidationError, match="not those of the configuration"):
        add_kept_prompts(tiny_pipe, kept, config.replace(kept_prompts=("a dog", "")))


def test_so_many_samples_are_kept_and_nothing_else_is_drawn_anew(tiny_pipe, tmp_path):
    run = begin(tmp_path / "run", tiny_pipe, kept_share=0.25)
    plain = make_data(tiny_pipe)[0]
    marks = []
    for step in range(60):
        batch, without = draw(run, step), draw_batch(plain, run.config, 1000, step)
        own = ~batch.is_kept
        for name in ("noise", "timesteps"):
            assert torch.equal(getattr(batch, name), getattr(without, name))
        assert torch.equal(batch.latents[own], without.latents[own])
        for latents, embeds in zip(batch.latents[~own], batch.prompt_embeds[~own], strict=True):
            place = [torch.equal(embeds, row) for row in run.train.prompt_embeds[4:]].index(True)
            assert torch.equal(latents, run.train.kept_latents[place])
        assert torch.equal(batch.prompt_embeds[own], without.prompt_embeds[own])
        marks.append(batch.is_kept)
    share = torch.cat(marks).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.05)  # 960 draws: four standard errors
    assert draw_batch(plain, run.config, 1000, 0).is_kept is None


def test_their_target_is_what_the_base_predicts(tiny_pipe, tmp_path):
    run = begin(tmp_path / "run", tiny_pipe)
    batch = draw(run)
    base = predict(run.pipe.unet, batch)
    losses = run.measure_losses(batch).detach()
    assert 0 < int(batch.is_kept.sum()) < len(batch)
    # The adapter is zero at its start; another batch rounds at 3e-7, and that is squared.
    assert float(losses[batch.is_kept].max()) < 1e-11
    assert float(losses[~batch.is_kept].min()) > 0.1
    for parameter in run.parameters:
        parameter.data += 0.05
    with without_adapter(run.pipe.unet):
        assert torch.equal(predict(run.pipe.unet, batch), base)
    assert not torch.equal(predict(run.pipe.unet, batch), base)
    assert float(run.measure_losses(batch).detach()[batch.is_kept].min()) > 1e-6
    assert all(parameter.requires_grad for parameter in run.parameters)


def test_where_the_text_encoder_alone_is_trained(tiny_pipe, tmp_path):
    run = begin(tmp_path / "run", tiny_pipe, targets="text_encoder")
    for parameter in run.parameters:
        parameter.data += 0.05
    batch = draw(run)
    kept = batch.is_kept
    base = predict(run.pipe.unet, batch)  # of the frozen text encoder's embeddings
    with torch.no_grad():
        prompt_embeds = run.pipe.text_encoder(batch.input_ids)[0]
        changed = run.pipe.unet(batch.latents, batch.timesteps, prompt_embeds).sample
    assert not torch.equal(changed, base)
    assert bool(kept.any()) and float(run.measure_losses(batch).detach()[kept].min()) > 1e-8


def test_an_error_in_the_base_leaves_the_adapter_on(tiny_pipe, tmp_path):
    run = begin(tmp_path / "run", tiny_pipe)
    for parameter in run.parameters:
        parameter.data += 0.05
    batch = draw(run)
    changed = predict(run.pipe.unet, batch)
    with pytest.raises(RuntimeError), without_adapter(run.pipe.unet):
        raise RuntimeError("planted")
    assert torch.equal(predict(run.pipe.unet, batch), changed)


def test_what_is_kept_drifts_less(tokenizer_folder, tmp_path):
    drifts = {}
    for share in (0.0, 0.5):
        pipe = build_tiny_pipe(tokenizer_folder)
        train, _ = make_data(pipe)
        kept = add_kept_prompts(pipe, train, make_config("unused", **KEEPING))
        input_ids = kept.input_ids[kept.kept_rows[0]].repeat(4, 1)
        config = make_config(
            tmp_path / str(share), **KEEPING, kept_share=share, max_train_steps=12,
            learning_rate=1e-2, validation_steps=None, targets="attention,text_encoder",
        )  # fmt: skip
        before = predict_prompt(pipe, input_ids)
        train_lora(config, pipe=pipe, data=(train, None), progress=False)
        drifts[share] = float((predict_prompt(pipe, input_ids) - before).square().mean())
    assert drifts[0.5] < 0.5 * drifts[0.0]


@torch.no_grad()
def predict_prompt(pipe, input_ids):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    timesteps = torch.tensor([100, 400, 700, 990])
    return pipe.unet(latents, timesteps, pipe.text_encoder(input_ids)[0]).sample


@pytest.mark.parametrize("size", [1, 3])
def test_a_micro_batch_changes_nothing(tokenizer_folder, tmp_path, size):
    losses = []
    for micro_batch in (16, size):
        pipe = build_tiny_pipe(tokenizer_folder)
        run = begin(tmp_path / str(micro_batch), pipe, micro_batch=micro_batch)
        for parameter in run.parameters:
            parameter.data += 0.02
        parts = draw(run).split(run.micro_batch.size)
        losses.append(torch.cat([run.measure_losses(part).detach() for part in parts]))
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-7)
