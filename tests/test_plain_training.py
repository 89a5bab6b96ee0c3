"""No lever changes the losses: cached, uncheckpointed, in one batch, they are a plain loop's."""

import pytest
from plain_training import PlainTraining
from tiny_images import make_splits
from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config

from sdkit import ImageCaptionDataset
from sdkit.finetuning.training import train_lora

STEPS = 5


@pytest.mark.parametrize("micro_batch", ["auto", "given"])
def test_the_losses_are_those_of_a_plain_loop(tokenizer_folder, tmp_path, micro_batch):
    make_splits(tmp_path / "photos", train=6, size=(64, 64))
    config = make_config(
        tmp_path / "run", dataset=str(tmp_path / "photos"), resolution=64, max_train_steps=STEPS,
        gradient_accumulation_steps=3, micro_batch=micro_batch, validation_steps=None,
        learning_rate=3e-3,
    )  # fmt: skip
    report = train_lora(config, pipe=build_tiny_pipe(tokenizer_folder), progress=False)
    examples = ImageCaptionDataset(tmp_path / "photos", resolution=64, progress=False)
    plain = PlainTraining(build_tiny_pipe(tokenizer_folder), examples, config)
    expected = [plain.step(number) for number in range(STEPS)]
    assert len(set(expected)) == STEPS
    assert [loss for _, loss in report.losses] == pytest.approx(expected, rel=1e-5)
