"""A small judge of catalogue pictures: which kind, which colour, which background."""

# B batch, H W pixels, A answers (kinds, colours, backgrounds, one after another)

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sdkit.mini import CLASSIFIER_PATH
from sdkit.mini.catalogue import BACKGROUNDS, COLOURS, KINDS, Product, render_dataset
from sdkit.run_folder import replace_file

QUESTIONS = {"kind": KINDS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}
INPUT_PIXELS = 64
BATCH_SIZE, LEARNING_RATE = 48, 2e-3


def make_classifier() -> nn.Sequential:
    """Four strided convolutions and one linear layer."""
    widths = (3, 24, 48, 96, 128)
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1),
            nn.GroupNorm(8, after),
            nn.SiLU(),
        ]
    answers = sum(len(options) for options in QUESTIONS.values())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, answers))


def load_classifier() -> nn.Sequential:
    """The bundled judge."""
    classifier = make_classifier()
    classifier.load_state_dict(load_file(CLASSIFIER_PATH))
    return classifier.float().eval()


@torch.no_grad()
def classify(classifier: nn.Module, images: torch.Tensor) -> list[dict[str, str]]:
    """Names what each picture shows.

    Args:
        classifier: From `load_classifier`.
        images: (B, 3, H, W) float in [0, 1].

    Returns:
        One dict a picture: `kind`, `colour`, `background`.
    """
    answers = split_answers(classifier(shrink_images(images)))
    best = {name: logits.argmax(dim=1).tolist() for name, logits in answers.items()}
    return [
        {name: QUESTIONS[name][best[name][i]] for name in QUESTIONS} for i in range(len(images))
    ]


def shrink_images(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, (INPUT_PIXELS, INPUT_PIXELS), mode="area") * 2 - 1


def split_answers(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = logits.split([len(options) for options in QUESTIONS.values()], dim=1)
    return dict(zip(QUESTIONS, parts, strict=True))


def train_classifier(
    images: np.ndarray, products: list[Product], *, steps: int, seed: int, path: Path
) -> Path:
    """Trains the judge on renders, blurred, noised and re-lit, and writes it in float16.

    Args:
        images: (N, H, W, 3) uint8.
        products: What each shows.
        steps: Optimiser steps.
        seed: Of weights and batches.
        path: Where to write.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = make_classifier()
    labels = {
        name: torch.tensor([options.index(getattr(p, name)) for p in products])
        for name, options in QUESTIONS.items()
    }
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    for _ in tqdm(range(steps), desc="classifier", mininterval=5):
        index = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        batch = torch.from_numpy(images[index.numpy()]).permute(0, 3, 1, 2).float() / 255
        answers = split_answers(classifier(shrink_images(worsen(batch, generator))))
        loss = sum(
            F.cross_entropy(answers[name], labels[name][index], label_smoothing=0.02)
            for name in QUESTIONS
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = {name: value.half().contiguous() for name, value in classifier.state_dict().items()}
    with replace_file(path) as temporary:
        save_file(weights, temporary)
    return path


def worsen(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a generated picture may lack: sharpness, cleanness, exact brightness."""
    if torch.rand((), generator=generator) < 0.5:
        size = int(torch.randint(32, 96, (), generator=generator))
        small = F.interpolate(images, (size, size), mode="area")
        images = F.interpolate(small, images.shape[2:], mode="bilinear")
    noise = torch.randn(images.shape, generator=generator) * 0.03
    gain = 1 + 0.06 * torch.randn((len(images), 1, 1, 1), generator=generator)
    return (images * gain + noise).clamp(0, 1)


def measure_accuracy(classifier: nn.Module, *, count: int, seed: int) -> dict[str, float]:
    """Share of right answers on `count` renders of a seed that no training used."""
    right = dict.fromkeys(QUESTIONS, 0)
    for image, _, product in tqdm(
        render_dataset(count, seed), total=count, desc="classifier check", mininterval=5
    ):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        answer = classify(classifier, pixels)[0]
        for name in QUESTIONS:
            right[name] += answer[name] == getattr(product, name)
    return {name: value / count for name, value in right.items()}
