"""The whole ledger, in the order of the report."""

from dataclasses import asdict

import pandas as pd

from sdkit.diagnosis.claims.cause import judge_cause
from sdkit.diagnosis.claims.claim import Claim
from sdkit.diagnosis.claims.cost import judge_memory, judge_seconds
from sdkit.diagnosis.claims.sources import ADVICE, CITATIONS
from sdkit.diagnosis.claims.symptom import judge_formats, judge_symptom, judge_validator


def judge_claims(cells) -> tuple[Claim, ...]:
    """Judges every claim.

    Args:
        cells: What `run_ablation` returned; claims about the cure are held against it.

    Returns:
        The ledger, in the order of the report.
    """
    return (
        *judge_symptom(),
        *judge_validator(),
        *judge_formats(),
        *judge_cause(cells),
        *judge_seconds(),
        *judge_memory(),
        *ADVICE,
        *CITATIONS,
    )


def tabulate_claims(claims) -> pd.DataFrame:
    """The ledger as a table, one row a claim."""
    return pd.DataFrame([asdict(claim) for claim in claims])
