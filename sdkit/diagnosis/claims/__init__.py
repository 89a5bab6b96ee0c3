"""The report's claims, each confirmed, refuted, or not testable here, with what shows it.

What can be computed is computed when the ledger is made. What only a source can tell names it. What
only a Mac could tell is said to be not testable here.
"""

from sdkit.diagnosis.claims.claim import CONFIRMED, REFUTED, UNTESTED, VERDICTS, Claim
from sdkit.diagnosis.claims.ledger import judge_claims, style_claims, tabulate_claims

__all__ = [
    "CONFIRMED",
    "REFUTED",
    "UNTESTED",
    "VERDICTS",
    "Claim",
    "judge_claims",
    "style_claims",
    "tabulate_claims",
]
