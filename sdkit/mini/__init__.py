"""The bundled model: a small Stable Diffusion trained from scratch on drawings of our own."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "checkpoint"
CLASSIFIER_PATH = Path(__file__).parent / "classifier.safetensors"
