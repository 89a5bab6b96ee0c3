"""Builds the bundled model: `python -m sdkit.mini.build WORK_FOLDER`; again to resume."""

import argparse
import json
import logging
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sdkit.mini import CLASSIFIER_PATH, MODEL_FOLDER
from sdkit.mini.autoencoder import encode_images, polish_decoder, train_vae
from sdkit.mini.catalogue import BASE_BACKGROUNDS, Product, render, sample_product
from sdkit.mini.classifier import train_classifier
from sdkit.mini.denoiser import train_denoiser
from sdkit.mini.recipe import Recipe, make_scheduler
from sdkit.mini.vocabulary import build_tokenizer
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

logger = logging.getLogger("sdkit.mini.build")
PREFIX = "text_model."


def build(recipe: Recipe, *, work_folder: Path, model_folder: Path, classifier_path: Path) -> Path:
    """Renders, trains and writes the bundled model; a finished stage is not done again.

    Args:
        recipe: Sizes and schedule.
        work_folder: For renders, latents, training states and logs (about 2 GB).
        model_folder: Where the finished pipeline goes.
        classifier_path: Where the judge of catalogue pictures goes.

    Returns:
        `model_folder`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work_folder.mkdir(parents=True, exist_ok=True)
    keep_recipe(recipe, work_folder / "recipe.json")
    tokenizer = build_tokenizer(work_folder / "tokenizer")
    images, products = render_training_images(recipe, work_folder)
    if not classifier_path.exists():
        train_classifier(
            images, products, steps=recipe.classifier_steps, seed=recipe.seed, path=classifier_path
        )
    logger.info(
        "autoencoder: %d steps of %d on %s", recipe.vae_steps, recipe.vae_batch_size, device
    )
    vae = train_vae(recipe, images, folder=work_folder, device=device)
    latents = cache_latents(vae, images, work_folder / "latents.safetensors", device)
    polish_decoder(vae, recipe, images, latents, folder=work_folder, device=device)
    scaling_factor = measure_scaling_factor(latents, products)
    logger.info(
        "scaling_factor %.4f; denoiser: %d steps of %d",
        scaling_factor,
        recipe.unet_steps,
        recipe.unet_batch_size,
    )
    text_encoder, unet = train_denoiser(
        recipe,
        latents,
        products,
        tokenizer=tokenizer,
        scaling_factor=scaling_factor,
        folder=work_folder,
        device=device,
    )
    vae.register_to_config(scaling_factor=scaling_factor)
    pipe = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        text_encoder=text_encoder.to("cpu"),
        tokenizer=tokenizer,
        unet=unet.to("cpu", torch.float16),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save_model(pipe, model_folder, tokenizer_folder=work_folder / "tokenizer")


def keep_recipe(recipe: Recipe, path: Path) -> Path:
    """Writes the recipe beside its stages, or refuses stages that another recipe made.

    Raises:
        ValidationError: The folder was begun with another recipe.
    """
    wanted = asdict(recipe)
    if path.exists() and (found := json.loads(path.read_text())) != wanted:
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        raise ValidationError(
            f"{path.parent.name}: its stages were made with another {', '.join(changed)}. Expected "
            "one recipe a folder. Build in a new folder, or take the old stages away."
        )
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=2) + "\n")
    return path


def render_training_images(recipe: Recipe, folder: Path) -> tuple[np.ndarray, list[Product]]:
    """Renders the training set once, on all cores, into a memory-mapped file.

    Returns:
        Images (N, H, W, 3) uint8 and their products, in the same order.
    """
    rng = np.random.default_rng(recipe.seed)
    products = [sample_product(rng) for _ in range(recipe.images)]
    path = folder / "images.npy"
    if not path.exists():
        seeds = [recipe.seed * 1_000_003 + index for index in range(recipe.images)]
        with ProcessPoolExecutor() as pool:
            renders = pool.map(render_array, products, seeds, chunksize=64)
            images = np.stack(
                list(tqdm(renders, desc="renders", total=len(products), mininterval=5))
            )
        with replace_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, images)
    return np.load(path, mmap_mode="r"), products


def render_array(product: Product, seed: int) -> np.ndarray:
    return np.asarray(render(product, seed))


def cache_latents(vae, images: np.ndarray, path: Path, device: torch.device) -> torch.Tensor:
    """Encodes the training set once."""
    if not path.exists():
        with replace_file(path) as temporary:
            save_file({"latents": encode_images(vae, images, device=device)}, temporary)
    return load_file(path)["latents"]


def measure_scaling_factor(latents: torch.Tensor, products: list[Product]) -> float:
    """One over the std of the latents, as in Rombach et al. (2022), section G."""
    shown = torch.tensor([product.background in BASE_BACKGROUNDS for product in products])
    return float(f"{1 / latents[shown].std().item():.5f}")


def save_model(pipe: StableDiffusionPipeline, folder: Path, *, tokenizer_folder: Path) -> Path:
    """Writes the pipeline in the layout that transformers 4 and 5 both read.

    transformers 5 writes the text encoder's weights without the prefix that SD 1.5's own file has
    and 4 needs (it would warn and go on with random ones), and no vocabulary files.
    `test_the_files_suit_transformers_4` in tests/test_mini.py guards it.
    """
    pipe.save_pretrained(folder, safe_serialization=True)
    weights_path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(weights_path)
    with replace_file(weights_path) as temporary:
        prefixed = {
            f"{PREFIX}{name.removeprefix(PREFIX)}": value for name, value in weights.items()
        }
        save_file(prefixed, temporary, metadata={"format": "pt"})
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, folder / "tokenizer" / name)
    return folder


def main() -> None:
    """Runs the recipe from the shell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "work_folder", type=Path, help="renders, latents, states and logs; kept for resuming"
    )
    parser.add_argument("--model-folder", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER_PATH)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = build(
        Recipe(),
        work_folder=arguments.work_folder,
        model_folder=arguments.model_folder,
        classifier_path=arguments.classifier,
    )
    size_mb = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    logger.info("%s: %.1f MB", folder.name, size_mb)


if __name__ == "__main__":
    main()
