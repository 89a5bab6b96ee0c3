"""Measures the bundled model: `python -m sdkit.mini.evaluate [MODEL_FOLDER]`."""

# B batch, H W pixels

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from tqdm.auto import tqdm

from sdkit.mini import MODEL_FOLDER
from sdkit.mini.catalogue import BASE_BACKGROUNDS, COLOURS, KINDS, Product, render_dataset
from sdkit.mini.classifier import QUESTIONS, classify, load_classifier, measure_accuracy
from sdkit.run_folder import replace_file

HELD_OUT_SEED = 777  # no training or choice used it
GUIDANCE_SCALE = 2.0  # chosen once, on other seeds; from 4 on PNDM overshoots and colours turn
NUM_INFERENCE_STEPS = 25
BATCH_SIZE = 8


def evaluation_products() -> list[Product]:
    """Every colour of every kind on every background of the base model: 128 products."""
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    return [
        Product(kind, colour, (index + place) % 2 == 0, background)
        for place, background in enumerate(BASE_BACKGROUNDS)
        for index, (kind, colour) in enumerate(pairs)
    ]


def draw_products(
    pipe: StableDiffusionPipeline, products: list[Product], *, seed: int
) -> torch.Tensor:
    """One generated picture a product, (B, 3, H, W) float in [0, 1]."""
    images = []
    for start in tqdm(range(0, len(products), BATCH_SIZE), desc="images", mininterval=5):
        prompts = [product.caption() for product in products[start : start + BATCH_SIZE]]
        generator = [
            torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(prompts))
        ]
        images.append(
            pipe(
                prompts,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(images)


@torch.no_grad()
def measure_psnr(vae, *, count: int, seed: int) -> float:
    """Mean PSNR in dB of the autoencoder's reconstruction of held-out renders, all backgrounds."""
    values = []
    for image, _, _ in tqdm(
        render_dataset(count, seed), total=count, desc="reconstructions", mininterval=5
    ):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        decoded = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
        pair = (pixels.numpy(), decoded.clamp(0, 1).numpy())
        values.append(peak_signal_noise_ratio(*pair, data_range=1))
    return float(np.mean(values))


def contact_sheet(images: torch.Tensor, columns: int) -> Image.Image:
    """Pictures (B, 3, H, W) side by side, row after row."""
    rows = [torch.cat(list(images[i : i + columns]), dim=2) for i in range(0, len(images), columns)]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0)
    return Image.fromarray((sheet.numpy() * 255).round().astype(np.uint8))


def evaluate(model_folder: Path, *, figure_path: Path | None = None) -> dict:
    """Classifier accuracy, what the prompts asked for and got, and the autoencoder's fidelity.

    Args:
        model_folder: A folder that `StableDiffusionPipeline.from_pretrained` loads.
        figure_path: For the contact sheet of all drawn products.

    Returns:
        Shares in [0, 1], `vae_psnr_db`, and the settings they were measured with.
    """
    pipe = StableDiffusionPipeline.from_pretrained(model_folder)
    pipe.set_progress_bar_config(disable=True)
    classifier = load_classifier()
    products = evaluation_products()
    images = draw_products(pipe, products, seed=HELD_OUT_SEED)
    answers = classify(classifier, images)
    right = {
        name: np.mean([a[name] == getattr(p, name) for a, p in zip(answers, products, strict=True)])
        for name in QUESTIONS
    }
    if figure_path is not None:
        with replace_file(figure_path) as temporary:
            contact_sheet(images, 2 * len(COLOURS)).save(temporary, format="PNG")
    return {
        "prompts": len(products),
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        **{f"{name}_right": round(float(value), 4) for name, value in right.items()},
        "vae_psnr_db": round(measure_psnr(pipe.vae, count=256, seed=HELD_OUT_SEED), 2),
        "classifier_accuracy": measure_accuracy(classifier, count=1024, seed=HELD_OUT_SEED),
        "torch": torch.__version__,
    }


def main() -> None:
    """Prints the quality as JSON, and writes it and the contact sheet where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_folder", type=Path, nargs="?", default=MODEL_FOLDER)
    parser.add_argument("--figure", type=Path, help="write the contact sheet here")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    quality = json.dumps(evaluate(arguments.model_folder, figure_path=arguments.figure), indent=2)
    print(quality)
    if arguments.json:
        with replace_file(arguments.json) as temporary:
            temporary.write_text(quality + "\n")


if __name__ == "__main__":
    main()
