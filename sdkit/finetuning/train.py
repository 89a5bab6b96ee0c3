"""The trainer as a module: `accelerate launch -m sdkit.finetuning.train CONFIG.yaml`.

The same as `sdkit train`, under the name that accelerate's launcher starts in every process.
"""

import sys

if __name__ == "__main__":
    from sdkit.cli import app  # the one place that looks up to the commands

    app(["train", *sys.argv[1:]])
