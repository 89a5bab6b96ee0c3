"""The bundled model's own CLIP vocabulary: a byte-level BPE learnt from its captions."""

import json
from pathlib import Path

from transformers import CLIPTokenizer

from sdkit.mini.catalogue import BACKGROUNDS, COLOURS, FRAMES, KINDS, REPORT_STUDIO, Product

VOCABULARY_SIZE = 1_000  # 256 bytes, once inside and once at the end of a word, and what merges add
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own


def every_caption() -> list[str]:
    """All captions that the catalogue can give, white studios in the report's words."""
    return [
        Product(kind, colour, leather, background)
        .caption(frame)
        .replace(BACKGROUNDS["white"], REPORT_STUDIO)
        for kind in KINDS
        for colour in COLOURS
        for leather in (False, True)
        for background in BACKGROUNDS
        for frame in FRAMES
    ]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learns the vocabulary and writes it in the layout that every transformers version reads.

    Args:
        folder: For `vocab.json`, `merges.txt` and `tokenizer_config.json`.

    Returns:
        The tokenizer, loaded back from the folder.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(every_caption(), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(alphabet)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), *SPECIAL_TOKENS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n"
    )
    start, end = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
