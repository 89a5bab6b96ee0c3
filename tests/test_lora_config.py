"""Settings of a training: checked one by one, written and read back, wrong names told."""

import dataclasses
import re

import pytest

from sdkit import LoRAConfig, ValidationError
from sdkit.finetuning.config import PRESETS, read_settings


def test_the_report_s_setting_is_the_default():
    config = LoRAConfig()
    assert (config.mixed_precision, config.use_8bit_adam) == ("no", False)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (2, 8)
    assert config.gradient_checkpointing and config.effective_batch == 16
    assert (config.rank, config.alpha, config.learning_rate, config.seed) == (8, 16, 1e-4, 42)
    assert config.lr_scheduler == "cosine" and config.warmup_steps > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0), ("rank", 1.5), ("rank", True), ("rank", None), ("alpha", 0),
        ("learning_rate", -1e-4), ("learning_rate", "fast"), ("learning_rate", float("nan")),
        ("learning_rate", float("inf")), ("targets", ()), ("targets", "attention,hands"),
        ("targets", "attention,attention"), ("max_train_steps", 0), ("lr_scheduler", "sine"),
        ("lr_warmup_steps", 300), ("train_batch_size", 0), ("micro_batch", 0),
        ("micro_batch", "most"), ("mixed_precision", "fp8"), ("gradient_checkpointing", "yes"),
        ("adam_beta2", 1), ("caption_dropout", 1.1), ("noise_offset", -0.1), ("snr_gamma", 0),
        ("max_grad_norm", 0), ("output_folder", ""), ("validation_prompts", [1]), ("seed", -1),
        ("resolution", 4), ("rollback_lr_factor", 0), ("timestep_bias", 0.5),
        ("velocity_weight", 0),
        ("alpha", 10**400), ("rank", 10**400), ("seed", 2**63), ("resolution", 10**5),
        ("noise_offset", 1e38), ("targets", 5), ("targets", [["attention"]]), ("targets", {}),
        ("kept_prompts", 1.5), ("validation_prompts", {"a shoe": 1}), ("model", "a\0b"),
        ("strict", "x" * 1000),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_one_sentence(name, value):
    with pytest.raises(ValidationError, match=rf"^{name}=.*: expected .*\.$") as caught:
        LoRAConfig(**{name: value})
    assert "\n" not in str(caught.value) and "object is" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_early_stopping_needs_a_validation_loss():
    with pytest.raises(ValidationError, match="early_stopping_patience=2: expected validation_"):
        LoRAConfig(early_stopping_patience=2, validation_steps=None)


def test_timesteps_are_weighed_in_one_way_at_a_time():
    with pytest.raises(ValidationError, match="velocity_weight=5.0: expected 1 beside snr_gamma=5"):
        LoRAConfig(velocity_weight=5, snr_gamma=5)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.yaml", "rank: 4\nalpha: 8\nrank: 8\n"), ("a.json", '{"rank": 4, "alpha": 8, "rank": 8}')],
)
def test_a_setting_that_is_there_twice_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValidationError, match="rank is there twice"):
        LoRAConfig.load(tmp_path / name)


@pytest.mark.parametrize("ending", [".json", ".yaml"])
def test_round_trip(tmp_path, ending):
    config = LoRAConfig(
        learning_rate=1e-5, targets=("attention", "convolution"), snr_gamma=5,
        validation_prompts=["a shoe", "no: \u00e7a", "\U0001f45f"], micro_batch=4,
        seed=2**53 + 1, early_stopping_patience=2,
    )  # fmt: skip
    assert LoRAConfig.load(config.save(tmp_path / f"config{ending}")) == config


def test_what_yaml_makes_of_words(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("mixed_precision: no\nlearning_rate: 1e-4\nsnr_gamma: none\nrank: 4.0\n")
    assert read_settings(path)["mixed_precision"] is False
    assert read_settings(path)["learning_rate"] == "1e-4"
    config = LoRAConfig.load(path)
    assert (config.mixed_precision, config.learning_rate, config.snr_gamma) == ("no", 1e-4, None)
    assert config.rank == 4 and isinstance(config.rank, int)


@pytest.mark.parametrize("text", ["- a\n- b\n", "rank: [", "", "just words"])
def test_files_that_are_no_settings(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValidationError, match=re.escape(str(path))):
        LoRAConfig.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValidationError, match="cannot be read"):
        LoRAConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("given", [None, 5, "rank", ["rank"]])
def test_what_is_no_mapping(given):
    with pytest.raises(ValidationError, match="expected a mapping of names to values"):
        LoRAConfig.from_dict(given)


def test_unknown_names_are_told():
    with pytest.raises(ValidationError, match="Did you mean learning_rate"):
        LoRAConfig.from_dict({"learning_rat": 1})
    with pytest.raises(ValidationError, match="Did you mean rank"):
        LoRAConfig().replace(rnak=1)


def test_every_field_is_documented():
    for field in dataclasses.fields(LoRAConfig):
        assert re.search(rf"^        {field.name}: \w", LoRAConfig.__doc__, re.MULTILINE), (
            field.name
        )


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig().rank = 4


def test_presets_are_named_and_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    assert "studio_white" in names
    assert LoRAConfig.load("studio_white").output_folder == "runs/studio_white"
    with pytest.raises(ValidationError, match="or one of studio_white"):
        LoRAConfig.load("studio_grey")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studio_white").write_text("rank: 3")
    assert LoRAConfig.load("studio_white").rank == 3
    with pytest.raises(ValidationError, match="cannot be read"):
        LoRAConfig.load(tmp_path / "elsewhere" / "studio_white")
