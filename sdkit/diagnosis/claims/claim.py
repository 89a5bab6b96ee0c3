"""One claim of the report, and the three verdicts that there are."""

from dataclasses import dataclass

CONFIRMED, REFUTED, UNTESTED = "confirmed", "refuted", "not testable here"
VERDICTS = (CONFIRMED, REFUTED, UNTESTED)
COMPUTED = "computed: sdkit/diagnosis/claims"
# The report is TASK_1.4_ISSUE_REPORT.md of this repository. "first write-up" is
# TASK_1.4_DOCUMENTATION.md beside it, and "final report" TASK_1.4_FINAL_REPORT.md.
REPOSITORY = "https://github.com/ab-orbit/phd-computing-vision"
DIFFUSERS = "https://github.com/huggingface/diffusers"
PYTORCH = "https://github.com/pytorch/pytorch"


@dataclass(frozen=True)
class Claim:
    """One claim, judged.

    Attributes:
        text: What is claimed, in English.
        where: The section of the report, or the document beside it.
        verdict: One of `VERDICTS`.
        shown_by: What computes it, or the address of the source.
        evidence: Numbers and findings, in one or two sentences.
    """

    text: str
    where: str
    verdict: str
    shown_by: str
    evidence: str


def decide(is_true: bool) -> str:
    """The verdict on what was computed."""
    return CONFIRMED if is_true else REFUTED
