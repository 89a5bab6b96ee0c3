"""Tiny models of the real diffusers classes, made here and offline: nothing is mocked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: each takes one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_pipelines import build_tiny_pipe, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """Two files of a CLIP tokenizer; do not write into it."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tiny_pipe(tokenizer_folder):
    """A fresh tiny StableDiffusionPipeline: a test may plant any fault in it."""
    return build_tiny_pipe(tokenizer_folder)


@pytest.fixture
def compilable_pipe(tiny_pipe):
    """A tiny pipeline to compile: torch marks code that ran under an emulation as not to be."""
    torch.compiler.reset()
    return tiny_pipe


@pytest.fixture(scope="session")
def tiny_folder(tokenizer_folder, tmp_path_factory):
    """The tiny pipeline saved by diffusers' own `save_pretrained`; do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_pipe(tokenizer_folder).save_pretrained(folder)
    return folder
