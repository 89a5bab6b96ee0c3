"""What a run leaves beside its images: a record that round-trips."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args, get_origin

from PIL import Image

from sdkit.generation.step_record import STEPS_PATTERN, StepRecord
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

RECORD_VERSION = 3  # 1 did not name the input images
RECORD_NAME = "record.json"
NOT_IN_JSON = ("folder", "steps")
FINDING = {  # what is read of one
    "component": str, "step": int | None, "nan_count": int, "inf_count": int, "total": int,
    "message": str,
}  # fmt: skip


@dataclass(frozen=True)
class ImageRecord:
    """One image that was asked for.

    Attributes:
        index: Position among the prompts.
        prompt: Its prompt.
        negative_prompt: Its negative prompt, or None.
        seed: Seed of its noise.
        path: File name beside the record, or None if it was not saved.
        valid: Whether it was found valid.
        problem: None if valid, else as in `ImageVerdict`, or "safety-checker".
        message: One line: what was seen.
        finding: The guard's finding behind the problem, as a dictionary, or None.
        seconds: Its share of the pipeline call; None if emulated or not finished.
        minimum: Least finite value, in [0, 1].
        maximum: Greatest finite value, in [0, 1].
        nan_count: Number of NaN values in the image.
        inf_count: Number of infinite values in the image.
        pixels_sha256: Of the 8-bit pixels, row by row: equal images have equal ones.
        input_image: What it was started from, {"file_name", "pixels_sha256"}: the name without its
            folder, or None where it came from memory; the pixels upright, in RGB, at their own
            size. None if it was started from noise.
        pil_image: The valid image itself; not in the JSON, so None after loading.
    """

    index: int
    prompt: str
    negative_prompt: str | None
    seed: int
    path: str | None = None
    valid: bool = False
    problem: str | None = None
    message: str = ""
    finding: dict | None = None
    seconds: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    nan_count: int = 0
    inf_count: int = 0
    pixels_sha256: str | None = None
    input_image: dict | None = None
    pil_image: Image.Image | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class RunRecord:
    """One call of `generate`: what was asked, what came out, on what.

    Attributes:
        version: Of this format.
        complete: False if the run was stopped before its last image.
        error: Why it was stopped, or None.
        images: One ImageRecord for each image that was finished or that failed.
        settings: The arguments of the call.
        model: Name of the model, without its folder.
        pipeline: Class of the pipeline.
        scheduler: Class of the scheduler.
        device: Such as "mps".
        dtypes: The dtype of each component.
        attention: The classes of attention processor in the UNet.
        warnings: {"category", "message", "count"} of each warning during the run, logged ones too.
        cast_warning: Whether numpy cast NaN or Inf to an integer: "invalid value encountered in
            cast", the report's ignored sign. `generate` itself never casts an invalid image, so
            it was a safety checker or a callback.
        first_seconds: Seconds an image in the first pipeline call, which carries the warm-up.
        rest_mean_seconds: Mean seconds an image in the calls after it; None if there was none.
        memory: {"peak_process_gib", "peak_device_gib"}, or None if emulated.
        rescue: What was made again in float32, as `RescueLog.to_dict` gives it; None where nobody
            stood by.
        environment: What `describe_environment` returned.
        emulated: The emulation that was active, or None. Seconds and memory mean nothing under it,
            so they are None.
        folder: Where it lies, beside its images; None if it was not saved. Not in the JSON.
        steps: One StepRecord a pipeline call; not in the JSON. After loading `load_steps` reads
            those that `record_steps` had saved.
    """

    version: int
    complete: bool
    error: str | None
    images: tuple[ImageRecord, ...]
    settings: dict
    model: str
    pipeline: str
    scheduler: str
    device: str
    dtypes: dict
    attention: tuple[str, ...]
    warnings: tuple[dict, ...]
    cast_warning: bool
    first_seconds: float | None
    rest_mean_seconds: float | None
    memory: dict | None
    rescue: dict | None
    environment: dict
    emulated: str | None
    folder: Path | None = field(default=None, repr=False, compare=False)
    steps: tuple[StepRecord, ...] = field(default=(), repr=False, compare=False)

    @property
    def valid_count(self):
        """Number of valid images."""
        return sum(image.valid for image in self.images)

    def __str__(self):
        """One line: how many are valid, of what, how fast."""
        dtypes = "/".join(sorted(set(self.dtypes.values())))
        parts = [
            f"{self.valid_count} of {len(self.images)} images valid",
            f"{self.model}, {dtypes} on {self.device}",
        ]
        if self.emulated:
            parts.append(self.emulated)
        if self.first_seconds is not None:
            parts.append(f"first {self.first_seconds:.2f} s")
        if self.rest_mean_seconds is not None:
            parts.append(f"then {self.rest_mean_seconds:.2f} s an image")
        if self.rescue and self.rescue["rescues"]:
            parts.append(describe_rescue(self.rescue))
        if not self.complete:
            parts.append(f"STOPPED: {self.error}")
        return " · ".join(parts)

    def to_frame(self):
        """Returns a pandas DataFrame with one row an image."""
        import pandas as pd

        rows = [_fields_of(image, without="pil_image") for image in self.images]
        columns = [f.name for f in fields(ImageRecord) if f.name != "pil_image"]
        return pd.DataFrame(rows, columns=columns)

    def to_json(self):
        """Returns the record as JSON text; NaN cannot be in it."""
        images = [_fields_of(image, without="pil_image") for image in self.images]
        content = {**_fields_of(self), "images": images}
        for name in NOT_IN_JSON:
            del content[name]
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text):
        """Returns the record that `to_json` wrote, here or in an older version.

        Raises:
            ValidationError: It is no such JSON, or of a version that this sdkit does not know.
        """
        content = _upgrade(_parse(text))
        if content.get("version") != RECORD_VERSION:
            raise ValidationError(
                f"run record: version {content.get('version')!r}, expected {RECORD_VERSION}. "
                "Read it with the sdkit that wrote it."
            )
        content = _check_fields(content, cls, "run record", *NOT_IN_JSON)
        for name in ("images", "attention", "warnings"):
            if not isinstance(content[name], list):
                raise ValidationError(
                    f"run record: {name} is no list. Expected what to_json wrote."
                )
            content[name] = tuple(content[name])
        for i, image in enumerate(content["images"]):
            _check_finding(image, f"run record: image {i}")
        content["images"] = tuple(
            ImageRecord(**_check_fields(image, ImageRecord, f"run record: image {i}", "pil_image"))
            for i, image in enumerate(content["images"])
        )
        return cls(**content)

    def save(self, path):
        """Writes the record, whole or not at all, and returns its `Path`."""
        path = Path(path)
        with replace_file(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path):
        """Returns the record in a file.

        Raises:
            ValidationError: The file cannot be read, or holds no record.
        """
        try:
            record = cls.from_json(Path(path).read_text(encoding="utf-8"))
            return replace(record, folder=Path(path).parent)
        except (OSError, UnicodeDecodeError) as error:
            raise ValidationError(f"{path}: no run record can be read there ({error}).") from error
        except ValidationError as error:
            raise ValidationError(f"{path}: {error}") from error


def load_steps(record) -> tuple[StepRecord, ...]:
    """The steps of a run, in memory or beside its record; none where they were not recorded.

    Raises:
        ValidationError: A file of steps is damaged.
    """
    if record.steps or record.folder is None:
        return record.steps
    return tuple(map(StepRecord.load, sorted(record.folder.glob(STEPS_PATTERN))))


def describe_rescue(rescue):
    """Returns in a few words what was made again, "rescued in float32: unet 2 of 25 calls"."""
    counts = Counter(entry["component"] for entry in rescue["rescues"] if entry["rescued"])
    words = []
    for name, count in counts.items():
        switched = ", then switched over" if name in rescue["switched_over"] else ""
        words.append(f"{name} {count} of {rescue['calls'][name]} calls{switched}")
    return f"rescued in float32: {'; '.join(words) or 'nothing'}"


def plain(value):
    """Returns a value as JSON can hold it: NaN becomes None, an object the name of its class."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return type(value).__name__


def _fields_of(instance, without=None):
    """As `dataclasses.asdict`, but without its deep copies of what is not plain."""
    return {f.name: getattr(instance, f.name) for f in fields(instance) if f.name != without}


def _parse(text):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        content = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"run record: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValidationError("run record: the JSON is no object. Expected what to_json wrote.")
    return content


def _upgrade(content):
    """Makes content of version 1 (no input images) or 2 (no rescues) one of the present version."""
    if content.get("version") == 1 and isinstance(content.get("images"), list):
        content["version"] = 2
        for image in content["images"]:
            if isinstance(image, dict):
                image["input_image"] = None
    if content.get("version") == 2:
        content.update(version=RECORD_VERSION, rescue=None)
    return content


def _check_finding(image, where):
    """Refuses a finding without what is read of it; other versions may know more of it."""
    finding = image.get("finding") if isinstance(image, dict) else None
    if finding is not None and not is_finding(finding):
        raise ValidationError(
            f"{where}: its finding lacks some of {', '.join(FINDING)}, or they are of another "
            "kind. Expected what to_json wrote."
        )


def is_finding(value) -> bool:
    """Whether a value from JSON holds what is read of a finding of the guard."""
    return (
        isinstance(value, dict)
        and all(name in value and isinstance(value[name], kind) for name, kind in FINDING.items())
        and (value["step"] or 0) >= 0
    )


def _check_fields(content, cls, where, *without):
    expected = {f.name for f in fields(cls)} - set(without)
    seen = set(content) if isinstance(content, dict) else set()
    if seen != expected:
        missing, unknown = sorted(expected - seen), sorted(map(str, seen - expected))
        raise ValidationError(
            f"{where}: missing {missing}, unknown {unknown}. Expected what to_json wrote."
        )
    for wanted in fields(cls):
        if wanted.name in expected and not _is_of(content[wanted.name], wanted.type):
            kind = getattr(wanted.type, "__name__", wanted.type)
            raise ValidationError(
                f"{where}: {wanted.name} is {content[wanted.name]!r:.80}, expected {kind}, as "
                "to_json wrote it."
            )
    return content


def _is_of(value, kind) -> bool:
    """Whether a value from JSON is of a field's kind; what is a tuple there is looked at later."""
    kinds = get_args(kind) or (kind,)
    is_whole_float = float in kinds and type(value) is int
    return get_origin(kind) is tuple or type(value) in kinds or is_whole_float
