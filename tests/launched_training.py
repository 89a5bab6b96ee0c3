"""accelerate launch launched_training.py TOKENIZER_FOLDER OUTPUT_FOLDER: a tiny training."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config, make_data, spoil

from sdkit.finetuning.training import train_lora


def train(tokenizer_folder, output_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    data = make_data(pipe)
    config = make_config(output_folder, targets="attention,text_encoder", caption_dropout=0.1)
    spoiled = (spoil(data[0], 5), data[1])
    return train_lora(config, pipe=pipe, data=spoiled, progress=False)


if __name__ == "__main__":
    train(*sys.argv[1:])
