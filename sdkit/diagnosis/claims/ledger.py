"""The whole ledger, in the order of the report."""

from dataclasses import asdict

import pandas as pd

from sdkit.diagnosis.claims.cause import judge_cause
from sdkit.diagnosis.claims.claim import CONFIRMED, REFUTED, Claim
from sdkit.diagnosis.claims.cost import judge_memory, judge_seconds
from sdkit.diagnosis.claims.sources import ADVICE, CITATIONS
from sdkit.diagnosis.claims.symptom import judge_formats, judge_symptom, judge_validator
from sdkit.figures import BAD, GOOD


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
    order = ["text", "where", "verdict", "evidence", "shown_by"]
    return pd.DataFrame([asdict(claim) for claim in claims])[order]


def style_claims(table: pd.DataFrame):
    """The ledger as a notebook shows it: verdicts in colour, addresses as short links."""
    colours = {CONFIRMED: GOOD, REFUTED: BAD}

    def link(source):
        is_address = source.startswith("https://")
        return f'<a href="{source}">{name_source(source)}</a>' if is_address else source

    names = {"text": "claim", "where": "in", "shown_by": "shown by"}
    return (
        table.style.hide(axis="index")
        .format({"shown_by": link})
        .set_properties(**{"text-align": "left", "vertical-align": "top"})
        .map(lambda verdict: f"color: {colours.get(verdict, 'inherit')}", subset=["verdict"])
        .relabel_index(list(pd.Series(table.columns).replace(names)), axis="columns")
    )


def name_source(address: str) -> str:
    """Short words for an address: "diffusers#14438", or the site's name."""
    parts = address.removeprefix("https://").split("/")
    if parts[0] == "github.com" and parts[-1].isdigit():
        return f"{parts[2]}#{parts[-1]}"
    return parts[2] if parts[0] == "github.com" else parts[0]
