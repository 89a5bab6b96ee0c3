"""What there is to look at in a stored run, whatever form it is stored in; no model is needed.

It may be a RunRecord, its folder or its record.json; a Diagnosis or its JSON; an incident folder;
or a Headroom or its JSON.
"""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.finding import find_tensors
from sdkit.generation.incident import INCIDENT_NAME, Incident, load_incident
from sdkit.generation.record import RECORD_NAME, RunRecord, load_steps
from sdkit.generation.step_record import StepRecord
from sdkit.precision.headroom import Headroom, find_bits
from sdkit.validation import ValidationError
from sdkit.verdict import strict_pillow

EXPECTED = (
    "Expected a RunRecord, a Diagnosis, a Headroom, the folder or the JSON of one, or a folder "
    "incident_... that generate left."
)
NO_MAP = (
    "The map of the network was not recorded: generate(..., record_steps=True) keeps it, "
    "measure_headroom(pipe, prompts) measures it."
)
NO_LATENTS = "The latents of each step were not recorded: generate(..., record_steps=True) does."
LATENTS = ("sample", "hidden_states", "z")  # what the components call them


@dataclass(frozen=True)
class Picture:
    """One image of a run: the PIL image or None, and what was found in it."""

    index: int
    label: str
    pil_image: Image.Image | None
    problem: str | None
    message: str


@dataclass(frozen=True)
class Material:
    """What `explore_run` shows.

    Attributes:
        account: The whole in plain text; its first line is the title.
        pictures: In the order of the prompts.
        steps: StepRecords, in the order of the calls.
        notes: {dotted path of a module: what is known of it, plain text}.
        dtype: Of the colours: "float16" or "bfloat16".
        missing: What was not recorded and how to have it, one sentence each.
        focus: Path of the module to look at first, or None.
    """

    account: str
    pictures: tuple[Picture, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    dtype: str = "float16"
    missing: tuple[str, ...] = ()
    focus: str | None = None

    def find_steps(self, picture_index) -> tuple[StepRecord, int] | None:
        """(StepRecord, row of its latents) of the call that made an image, or None."""
        for steps in self.steps:
            if picture_index in steps.images:
                return steps, steps.images.index(picture_index)
        return (self.steps[0], 0) if self.steps and not self.pictures else None


def gather(source) -> Material:
    """Reads one source, in any of its forms.

    Raises:
        ValidationError: It is none, or it is damaged.
    """
    source = read(source)
    if isinstance(source, RunRecord):
        return gather_record(source)
    if isinstance(source, Diagnosis):
        return gather_diagnosis(source)
    return gather_headroom(source) if isinstance(source, Headroom) else gather_incident(source)


def read(source):
    """Returns the RunRecord, Diagnosis, Headroom or Incident that `source` is or leads to."""
    if isinstance(source, (RunRecord, Diagnosis, Headroom, Incident)):
        return source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return read_json(source, "the JSON")
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValidationError(f"source: got {type(source).__name__} {source!r:.80}. {EXPECTED}")
    path = Path(source)
    try:
        if path.is_dir():
            if (path / INCIDENT_NAME).is_file():
                return load_incident(path)
            if not (path / RECORD_NAME).is_file():
                raise ValidationError(f"{path}: holds no {RECORD_NAME}. {EXPECTED}")
            path = path / RECORD_NAME
        if path.name == INCIDENT_NAME:
            return load_incident(path.parent)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no text, or a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, ValidationError):
            raise
        raise ValidationError(f"{path}: cannot be read ({reason}). {EXPECTED}") from error
    found = read_json(text, path)
    return replace(found, folder=path.parent) if isinstance(found, RunRecord) else found


def read_json(text, where):
    """Returns what a JSON text holds, told by its keys."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{where}: is no JSON ({error}). {EXPECTED}") from error
    keys = set(content) if isinstance(content, dict) else set()
    try:
        if {"images", "settings"} <= keys:
            return RunRecord.from_json(text)
        if {"cause", "stage"} <= keys:
            return Diagnosis.from_json(text)
        if {"ops", "overflowing_weights"} <= keys:
            return Headroom.from_json(text)
    except ValidationError as error:
        raise ValidationError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValidationError(
            f"{where}: damaged ({error!r}). Expected what to_json wrote."
        ) from error
    raise ValidationError(f"{where}: is another kind of JSON. {EXPECTED}")


def gather_record(record: RunRecord) -> Material:
    """The run itself: its images, what the guard found, and the steps if they were kept."""
    steps, notes, missing = load_steps(record), {}, []
    for image in record.images:
        if image.finding:
            note, owner = (
                f"image {image.index}: {image.finding['message']}",
                image.finding["component"],
            )
            notes[owner] = f"{notes[owner]}\n{note}" if owner in notes else note
    if any(found.modules for found in steps):
        missing += [text for found in steps for text in found.skipped]
    else:
        missing.append(NO_MAP)
        steps = add_findings(steps, record)
    if not any(found.latents is not None for found in steps):
        missing.append(NO_LATENTS)
    shown = gather_pictures(record)
    is_bfloat16 = record.dtypes.get("unet", record.dtypes.get("transformer")) == "bfloat16"
    return replace(
        shown,
        steps=steps,
        notes=notes,
        dtype="bfloat16" if is_bfloat16 else "float16",
        missing=tuple(dict.fromkeys([*missing, *shown.missing])),
    )


def gather_pictures(record: RunRecord) -> Material:
    """The images of a run and what was found in them; its steps are not read."""
    pictures = tuple(
        Picture(
            image.index,
            f"{image.prompt} · seed {image.seed}",
            image.pil_image or open_picture(record.folder, image.path),
            image.problem,
            image.message or ("valid" if image.valid else ""),
        )
        for image in record.images
    )
    lost = [p.index for p in pictures if p.pil_image is None and p.problem is None]
    lines = [str(record)] + [f"image {p.index}: {p.message}" for p in pictures if p.problem]
    return Material(
        account="\n".join(lines),
        pictures=pictures,
        missing=(f"The files of images {lost} are not beside the record.",) if lost else (),
    )


def add_findings(steps, record) -> tuple[StepRecord, ...]:
    """Where nothing was watched the guard still knows in which component the first NaN was."""
    added, known = [], {index for found in steps for index in found.images}
    for found in steps:
        findings = [i.finding for i in record.images if i.index in found.images and i.finding]
        added.append(mark(found, findings[0]) if findings else found)
    for image in record.images:
        if image.finding and image.index not in known:
            empty = make_steps((image.index,), (), (image.finding["step"] or 0) + 1)
            added.append(mark(empty, image.finding))
    return tuple(added)


def make_steps(images, modules, step_count) -> StepRecord:
    """A StepRecord in which nothing has run yet."""
    shape = (step_count, len(modules))
    return StepRecord(
        images=images,
        modules=tuple(modules),
        kinds=("",) * len(modules),
        largest=np.full(shape, np.nan, np.float32),
        **{name: np.zeros(shape, np.int64) for name in ("nan_count", "inf_count", "total")},
    )


def mark(steps: StepRecord, finding) -> StepRecord:
    """The same with the one column that a finding of the guard fills."""
    step = finding["step"] or 0
    marked = make_steps(steps.images, [finding["component"]], max(steps.step_count, step + 1))
    for name in ("nan_count", "inf_count", "total"):
        getattr(marked, name)[step, 0] = finding[name]
    return replace(marked, latents=steps.latents, first_bad=(step, 0))


def open_picture(folder, name):
    """The image file of a record, or None: a record may have been moved without its images."""
    if folder is None or name is None or Path(name).name != name:
        return None
    try:
        with strict_pillow(), Image.open(folder / name) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning):
        return None


def gather_diagnosis(diagnosis: Diagnosis) -> Material:
    """The op with what it was given and what it made, and the modules that ran before it."""
    text, bad, step = str(diagnosis), diagnosis.bad_op, diagnosis.step or 0
    if diagnosis.module is None:  # so there is no module to choose, at which the op would be told
        text = f"{text}\n\n{bad}" if bad else text
        return Material(account=f"{diagnosis.message}\n{text}", missing=(NO_MAP, NO_LATENTS))
    before = [entry.partition(":")[0] for entry in bad.before] if bad else []
    ran = [m for m in before if not m.startswith("after ")]  # else the pipeline's own code
    modules = [m for m in dict.fromkeys(ran) if m != diagnosis.module]
    steps = make_steps((), [*modules, diagnosis.module], step + 1)
    for output in bad.outputs if bad else ():
        steps.nan_count[step, -1] += output.nan_count
        steps.inf_count[step, -1] += output.inf_count
        steps.total[step, -1] += int(np.prod(output.shape))
    if steps.is_bad[step, -1]:
        steps = replace(steps, first_bad=(step, len(modules)))
    notes = dict.fromkeys(modules, "It ran shortly before the first bad op.")
    notes[diagnosis.module] = f"{text}\n\n{bad}" if bad else text
    return Material(
        focus=diagnosis.module,
        account=f"{diagnosis.message}\n{text}",
        steps=(steps,),
        notes=notes,
        missing=(
            "A diagnosis keeps the ops around the first bad one, not the whole network. " + NO_MAP,
            NO_LATENTS,
        ),
    )


def gather_incident(incident: Incident) -> Material:
    """The call that broke: the latents it was given, and the guard's finding."""
    finding, prompt = incident.image["finding"], incident.image["prompt"]
    message = incident.image.get("message") or "no finding"
    picture = Picture(0, str(prompt), None, incident.image.get("problem") or "invalid", message)
    steps = ()
    if finding:
        empty = make_steps((0,), (), (finding["step"] or 0) + 1)
        steps = (replace(mark(empty, finding), latents=find_latents(incident, empty.step_count)),)
    has_latents = bool(steps) and steps[0].latents is not None
    seen = "The latents shown are those that the call which broke was given, at each step the same."
    return Material(
        account=f"incident: {message}",
        pictures=(picture,),
        steps=steps,
        notes={finding["component"]: message} if finding else {},
        missing=(NO_MAP, seen if has_latents else NO_LATENTS),
    )


def find_latents(incident, step_count):
    """(1, S, C, h, w) what the bad call was given, at every step the same, or None."""
    call = incident.call
    named = [call.kwargs[name] for name in LATENTS if name in call.kwargs] if call else []
    given = next(find_tensors([*named, *(call.args if call else ())]), None)
    if given is None or given.ndim != 4:
        return None
    return np.repeat(given[:1].float().numpy()[:, None], step_count, axis=1)


def gather_headroom(headroom: Headroom) -> Material:
    """The greatest |x| of every op, by module and step."""
    paths = list(dict.fromkeys(op.module or op.stage for op in headroom.ops))
    columns = {path: m for m, path in enumerate(paths)}
    count = 1 + max([step or 0 for op in headroom.ops for step in op.steps], default=0)
    steps, notes = make_steps((), paths, count), {}
    for op in headroom.ops:
        path = op.module or op.stage
        column = columns[path]
        for step, largest in zip(op.steps, op.largest, strict=True):
            place = step or 0, column
            steps.largest[place] = np.fmax(steps.largest[place], largest)
            steps.total[place] += 1
        bits = find_bits(op.largest_of_all, "float16")
        line = f"{op.op}: |x| up to {op.largest_of_all:.4g}, {bits:.1f} bits left in float16"
        notes[path] = f"{notes[path]}\n{line}" if path in notes else line
    return Material(
        account=str(headroom),
        steps=(steps,) if paths else (),
        notes=notes,
        missing=("A headroom report holds no latents and no images: it is one run in float32.",),
    )
