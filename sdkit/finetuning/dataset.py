"""Images with captions for fine-tuning, checked one by one before anything is trained on them."""

# H W pixels

import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from sdkit.finetuning.captions import CaptionedFile, find_captioned_files
from sdkit.finetuning.catalogue_source import STUDIO_COUNTS, render_studio_pictures
from sdkit.finetuning.dataset_report import (
    SHOWN_FILES,
    DatasetReport,
    FileReport,
    Finding,
)
from sdkit.finetuning.picture import hash_pixels, read_picture
from sdkit.finetuning.splits import check_split, draw_split, find_split_folder
from sdkit.validation import ValidationError
from sdkit.verdict import strict_pillow

MINI = "mini"
THREADS = min(8, (os.cpu_count() or 1) + 1)  # each may hold one large image
LEAST_IMAGES = {"train": 2, "validation": 1, "test": 1}


@dataclass(frozen=True)
class Example:
    """One image with its caption.

    Attributes:
        name: Its path within the data set.
        image: (3, H, W), float32 in [-1, 1].
        caption: What it shows.
    """

    name: str
    image: torch.Tensor
    caption: str


class ImageCaptionDataset:
    """A folder of images with captions, or the rendered studio catalogue; a map-style dataset.

    A folder has `metadata.jsonl` or `metadata.csv` (`file_name` and `text`), or `captions.json`, or
    a text file beside each image; in folders `train`, `validation` and `test`, or in one, which is
    then split 70, 15 and 15 % by a seed. Each picture is turned upright, laid on white where it is
    transparent, brought to the resolution by its shorter side and cropped around its middle.

    Attributes:
        folder: Where it is, or mini.
        split: train, validation or test.
        resolution: Side of the pictures in pixels.
        report: What was found in each file, a DatasetReport.
        fingerprint: A hash of pixels, captions and settings.
    """

    def __init__(
        self,
        folder=None,
        *,
        split="train",
        resolution=64,
        strict=False,
        tokenizer=None,
        progress=True,
    ):
        """Reads and checks every file.

        Args:
            folder: A folder; None or "mini" is the studio catalogue, drawn here.
            split: train, validation or test.
            resolution: Side in pixels; smaller images are not used.
            strict: Raise if any file cannot be used just as it is, instead of leaving out or
                changing that file and reporting it.
            tokenizer: If given, the tokens that each caption has too many are counted.
            progress: Whether to show a progress bar.

        Raises:
            ValidationError: There is no such folder or split, too few of its images can be used,
                or `strict` and a file has a finding: the message names every such file.
        """
        self.folder = MINI if folder is None else str(folder)
        self.split = check_split(split)
        self.resolution = _check_resolution(resolution)
        find = self._render if self.folder == MINI else self._check_folder
        files, self._sources = find(progress)
        files = tuple(_count_tokens(file, tokenizer) for file in files)
        self.report = DatasetReport(self.folder, split, resolution, files)
        self._used = self.report.used
        self._judge(strict)
        self.fingerprint = self._measure_fingerprint()

    def __len__(self):
        """How many images can be used."""
        return len(self._used)

    def __getitem__(self, index) -> Example:
        """Returns an Example.

        Raises:
            IndexError: There is none of this index.
            ValidationError: The file is not what it was when it was checked.
        """
        file = self._used[index]
        pixels = torch.from_numpy(self.read_pixels([index])[0])
        return Example(file.name, pixels.permute(2, 0, 1).float() / 127.5 - 1, file.caption)

    @property
    def names(self) -> tuple:
        """Names of the images, in order."""
        return tuple(file.name for file in self._used)

    @property
    def captions(self) -> tuple:
        """Captions of the images, in order."""
        return tuple(file.caption for file in self._used)

    @property
    def digests(self) -> tuple:
        """A hash of the pixels of each image, in order."""
        return tuple(self._sources[file.name].digest for file in self._used)

    def read_pixels(self, indices) -> np.ndarray:
        """Reads several images at once, in threads.

        Args:
            indices: B of them.

        Returns:
            (B, H, W, 3) uint8.

        Raises:
            ValidationError: A file is not what it was when it was checked.
        """
        sources = [self._sources[self._used[index].name] for index in indices]
        with strict_pillow(), ThreadPoolExecutor(THREADS) as pool:
            return np.stack(list(pool.map(self._read_source, sources)))

    def _read_source(self, source):
        if source.pixels is not None:
            return source.pixels
        picture = read_picture(source.path, self.resolution)
        if picture.digest != source.digest:
            seen = "; ".join(f.message for f in picture.findings if f.is_fatal)
            raise ValidationError(
                f"{source.path}: changed since it was checked ({seen or 'other pixels'}). "
                "Expected the same picture; make the dataset again."
            )
        return picture.pixels

    def _render(self, progress):
        """Draws the catalogue; returns FileReports and {name: _Source}."""
        drawn = render_studio_pictures(self.split, self.resolution)
        files, sources = [], {}
        for name, pixels, caption in tqdm(
            drawn, desc="catalogue", total=STUDIO_COUNTS[self.split], disable=not progress, delay=1
        ):
            sources[name] = _Source(hash_pixels(pixels), pixels=pixels)
            files.append(FileReport(name, caption, size_pixels=(self.resolution,) * 2))
        return files, sources

    def _check_folder(self, progress):
        """Checks every file; returns the FileReports of this split and {name: _Source}."""
        folder = _find_folder(self.folder)
        split_folder = find_split_folder(folder, self.split)
        found = find_captioned_files(split_folder or folder, is_split=bool(split_folder))
        prefix = f"{split_folder.name}/" if split_folder else ""
        files, sources, first = [], {}, {}
        with strict_pillow(), ThreadPoolExecutor(THREADS) as pool:
            pictures = pool.map(lambda file: _look_at(file, self.resolution), found)
            bar = tqdm(
                pictures, desc=f"checking {self.split}", total=len(found), unit="image",
                disable=not progress, delay=1,
            )  # fmt: skip
            for file, (digest, findings, size) in zip(found, bar, strict=True):
                name = prefix + file.name
                if digest and first.setdefault(digest, name) != name:
                    findings = (*findings, Finding("duplicate", f"the picture of {first[digest]}"))
                sources[name] = _Source(digest, path=file.path)
                files.append(FileReport(name, file.caption, findings, size))
        if not split_folder:
            good = [file.name for file in files if file.is_used]
            chosen = set(draw_split(good, self.split))
            files = [file for file in files if file.name in chosen or not file.is_used]
        return files, sources

    def _judge(self, strict):
        """Raises, or warns, about what was found.

        Raises:
            ValidationError: See `__init__`.
        """
        where = f"{self.folder}, {self.split}"
        listed = [str(file) for file in self.report.files if file.findings]
        if strict and listed:
            raise ValidationError(
                f"{where}: {len(listed)} of {len(self.report.files)} files cannot be used just as "
                "they are. Expected none, for strict was asked for. Mend them, or leave strict "
                "out:\n  " + "\n  ".join(listed)
            )
        least = LEAST_IMAGES[self.split]
        if len(self) < least:
            raise ValidationError(
                f"{where}: {len(self)} of {len(self.report.files)} images can be used. Expected at "
                f"least {least}, each with a caption (metadata.jsonl, captions.json or a text file "
                "beside it)." + "".join(f"\n  {line}" for line in listed[:SHOWN_FILES])
            )
        if listed:
            warnings.warn(str(self.report), stacklevel=3)

    def _measure_fingerprint(self):
        settings = {"resolution": self.resolution}
        content = json.dumps([settings, list(zip(self.digests, self.captions, strict=True))])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class _Source:
    """Where an image comes from: a file, or memory."""

    digest: str | None
    path: Path | None = None
    pixels: np.ndarray | None = None


def _check_resolution(resolution):
    if not isinstance(resolution, int) or resolution < 8:
        raise ValidationError(
            f"resolution={resolution!r}: expected a whole number of pixels from 8 on."
        )
    return resolution


def _find_folder(folder):
    path = Path(folder)
    if not path.is_dir():
        seen = "is not a folder" if path.exists() else "no such folder"
        raise ValidationError(
            f"{folder}: {seen}. Expected a folder of images with captions, or {MINI}."
        )
    return path


def _look_at(file: CaptionedFile, resolution):
    """Returns (digest, findings, size) of a file; the pixels are not kept."""
    if any(finding.kind == "outside" for finding in file.findings):
        return None, file.findings, None
    picture = read_picture(file.path, resolution)
    findings = (*file.findings, *picture.findings)
    is_used = not any(finding.is_fatal for finding in findings)
    return (picture.digest if is_used else None), findings, picture.size_pixels


def _count_tokens(file: FileReport, tokenizer):
    """Returns the report of a file with the tokens that its caption has too many."""
    if tokenizer is None or not file.is_used:
        return file
    count = len(tokenizer(file.caption, truncation=False, verbose=False).input_ids)
    cut = max(0, count - tokenizer.model_max_length)
    if not cut:
        return replace(file, tokens_cut=0)
    message = (
        f"{count} tokens, of which the text encoder takes {tokenizer.model_max_length}: {cut} cut"
    )
    findings = (*file.findings, Finding("caption-cut", message, is_fatal=False))
    return replace(file, tokens_cut=cut, findings=findings)
