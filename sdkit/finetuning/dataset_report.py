"""What was found in a data set: every file, what is wrong with it, and whether it is used."""

import json
from collections import Counter
from dataclasses import asdict, dataclass

SHOWN_FILES = 20  # the rest is counted, and all of it is in the JSON


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: One word, such as truncated, duplicate, turned or caption-cut.
        message: What was seen, and what was done about it.
        is_fatal: Whether the image cannot be used; else it is used, changed as the message says.
    """

    kind: str
    message: str
    is_fatal: bool = True


@dataclass(frozen=True)
class FileReport:
    """What was found in one file.

    Attributes:
        name: Its path within the data set.
        caption: Its caption, or None.
        findings: Of Finding; empty if all is well.
        size_pixels: (width, height) as shown, or None if it could not be read.
        tokens_cut: Tokens of the caption that do not fit the text encoder; None if not counted.
    """

    name: str
    caption: str | None
    findings: tuple = ()
    size_pixels: tuple | None = None
    tokens_cut: int | None = None

    @property
    def is_used(self) -> bool:
        """Whether it is an example of the data set."""
        return not any(finding.is_fatal for finding in self.findings)

    def __str__(self):
        """One line."""
        return f"{self.name}: " + "; ".join(f"{f.kind}, {f.message}" for f in self.findings)


@dataclass(frozen=True)
class DatasetReport:
    """What was found in a data set.

    Attributes:
        folder: Where it is, or mini.
        split: Which part of it.
        resolution: Side of the training pictures in pixels.
        files: A FileReport of each.
    """

    folder: str
    split: str
    resolution: int
    files: tuple

    @property
    def used(self) -> tuple:
        """The files that are examples."""
        return tuple(file for file in self.files if file.is_used)

    @property
    def skipped(self) -> tuple:
        """The files that are not."""
        return tuple(file for file in self.files if not file.is_used)

    @property
    def changed(self) -> tuple:
        """The files that are used, but not just as they are."""
        return tuple(file for file in self.used if file.findings)

    @property
    def tokens_cut(self) -> int | None:
        """Tokens of captions in use that do not fit the text encoder; None if not counted."""
        counts = [file.tokens_cut for file in self.used if file.tokens_cut is not None]
        return sum(counts) if counts else None

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text) -> "DatasetReport":
        """The report that `to_json` wrote."""
        fields = json.loads(text)
        files = []
        for file in fields["files"]:
            size = file["size_pixels"] and tuple(file["size_pixels"])
            findings = tuple(Finding(**finding) for finding in file["findings"])
            files.append(FileReport(**{**file, "findings": findings, "size_pixels": size}))
        return cls(**{**fields, "files": tuple(files)})

    def summary(self) -> str:
        """One line: how many files are used, changed and skipped, and why."""
        kinds = Counter(finding.kind for file in self.files for finding in file.findings)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        return (
            f"{self.folder}, {self.split}: {len(self.used)} of {len(self.files)} files used, "
            f"{len(self.changed)} of them changed, {len(self.skipped)} skipped"
            + (f" ({counts})" if counts else "")
        )

    def __str__(self):
        """The summary, and a line for each file with a finding, the skipped ones first."""
        lines = [
            *(f"  skipped  {file}" for file in self.skipped),
            *(f"  changed  {file}" for file in self.changed),
        ]
        if len(lines) > SHOWN_FILES:
            lines[SHOWN_FILES:] = [f"  and {len(lines) - SHOWN_FILES} more, all in to_json()"]
        return "\n".join([self.summary(), *lines])
