"""What to do on which device about which failure: read from the ladder's numbers by one rule.

A rung must be proven: every image valid and like the reference, whatever fresh memory holds. Of
those, the ones within `TOLERANCE_DB` of healthy float16 come first, then those of the fewest weight
bytes, then the first on the ladder, which changes least. What draws right only as long as memory is
kind is never advised, and named beside the advice.
"""

import math
from dataclasses import dataclass

import pandas as pd

from sdkit.precision.costs import Cost
from sdkit.precision.failures import HEALTHY
from sdkit.precision.rungs import AS_IT_IS, FLOAT32, HOW, NEWER_TORCH, PLANNED

TOLERANCE_DB = 1.0  # as plan_precision: no more below what healthy float16 reaches
SLOW = 1.5  # times float32's seconds: a dtype that takes longer saves memory at too high a price
ROUNDED_ALIKE = (AS_IT_IS, "float16, SDPA", "float16, safe slicing")
NOTHING_CURES = "nothing cures it: mend the model"


@dataclass(frozen=True)
class Advice:
    """What to do on one device about one failure.

    Attributes:
        device: "mps", "cuda" or "cpu".
        failure: Its name.
        do: The rung, or that nothing cures.
        weight_share: Of float32's weight bytes; None if nothing cures.
        psnr_db: To float32; None if nothing cures.
        others: How many other rungs are proven.
        only_hide: The rungs that draw right and cure nothing.
        how: What to type.
        measured_on: Where the numbers are from.
    """

    device: str
    failure: str
    do: str
    weight_share: float | None
    psnr_db: float | None
    others: int
    only_hide: tuple[str, ...]
    how: str
    measured_on: str


def find_healthy_db(climbed) -> float:
    """What float16 costs the model without a failure: the least PSNR that it reaches there.

    One image says little, for how near to float32 one rounding comes is half chance. So all that
    rounds differently counts: the attentions in float16, and the roundings that the plan measured.

    Args:
        climbed: From `climb_failures`, with the control.

    Returns:
        dB; inf where float16 breaks the control too, so that nothing counts as near it.
    """
    rungs = {rung.name: rung for rung in climbed[HEALTHY.name]}
    measured = [rungs[name].psnr_db for name in ROUNDED_ALIKE if name in rungs]
    if rungs[PLANNED].recipe:
        measured.append(rungs[PLANNED].recipe.healthy_db)
    return min((psnr_db for psnr_db in measured if psnr_db is not None), default=math.inf)


def recommend(table, costs: dict[str, Cost], healthy_db, *, emulated: bool) -> list[Advice]:
    """Chooses a rung for every device and failure that the numbers can tell about.

    Numbers of the emulated Mac tell about MPS. They tell about CUDA and CPU too, for their float16
    is emulated alike and the kernel faults are MPS's alone: what an honest kernel gave is what they
    give. Numbers of a real device tell about that device.

    Args:
        table: From `tabulate_ladder`, with the control.
        costs: From `measure_costs`; on the device they are from, a slow dtype is not offered.
        healthy_db: From `find_healthy_db`.
        emulated: Whether the table is from the emulated Mac.
    """
    own = next(iter(costs.values())).device
    slow = {name for name, cost in costs.items() if cost.seconds > SLOW * costs[FLOAT32].seconds}
    advice = []
    for device in ("mps", "cuda", "cpu") if emulated else (own,):
        offered = table if device == "mps" or not emulated else with_honest_kernel(table)
        if device == own:
            offered = offered[~offered["rung"].map(find_dtype).isin(slow)]
        measured_on = "emulated float16" if emulated else device
        for failure in dict.fromkeys(table["failure"]):
            about = offered[offered["failure"] == failure]
            rows = about[about["proven"]]
            best = choose_rung(rows.to_dict("records"), healthy_db - TOLERANCE_DB)
            advice.append(
                Advice(
                    device=device,
                    failure=failure,
                    do=best["rung"] if best else NOTHING_CURES,
                    weight_share=best and best["weight share"],
                    psnr_db=best and best["PSNR dB"],
                    others=max(0, len(rows) - 1),
                    only_hide=tuple(about[about["only hides"]]["rung"]),
                    how=describe_how(best["rung"]) if best else "sdkit diagnose",
                    measured_on=measured_on,
                )
            )
    return advice


def describe_how(rung: str) -> str:
    """What to type; where a file is needed, the command that writes it comes first."""
    line = HOW[rung].replace("{folder}", "runs/fix")
    return line if line == HOW[rung] else f"sdkit fix MODEL, then {line}"


def choose_rung(rows: list[dict], enough_db: float) -> dict | None:
    """The rule of this module; None if there is nothing to choose from."""

    def rank(row):
        return row["PSNR dB"] < enough_db, round(row["weight share"], 2)

    return min(rows, key=rank, default=None)


def with_honest_kernel(table) -> pd.DataFrame:
    """The table of a device without MPS's kernel faults: float16 as it is, is what a fix gives.

    What hides a fault of MPS's kernel draws right there, for there is nothing to hide.
    """
    honest = table[table["rung"] == NEWER_TORCH].assign(rung=AS_IT_IS)
    rest = table[~table["rung"].isin((AS_IT_IS, NEWER_TORCH))]
    rest = rest.assign(**{"proven": rest["proven"] | rest["only hides"], "only hides": False})
    return pd.concat([honest, rest])


def find_dtype(rung: str) -> str:
    """The dtype that most of a rung's arithmetic is in."""
    return rung if rung in ("bfloat16", FLOAT32) else "float16"


def tell_advice(advice: list[Advice]) -> str:
    """One paragraph a device: each remedy, and what it is for."""
    lines = []
    for device in dict.fromkeys(one.device for one in advice):
        remedies = {}
        for one in advice:
            if one.device == device:
                remedies.setdefault(one.do, []).append(one)
        lines.append(f"{device} ({next(a for a in advice if a.device == device).measured_on}):")
        for do, ones in remedies.items():
            numbers = "" if ones[0].psnr_db is None else describe_numbers(ones)
            lines.append(f"  {do}{numbers}: {', '.join(one.failure for one in ones)}")
            lines.append(f"      {ones[0].how}")
            lines += [
                f"      only hide {one.failure}: {', '.join(one.only_hide)}"
                for one in ones
                if one.only_hide
            ]
    return "\n".join(lines)


def describe_numbers(ones: list[Advice]) -> str:
    """The greatest share and the least PSNR of some advice, in brackets."""
    share, least = max(o.weight_share for o in ones), min(o.psnr_db for o in ones)
    quality = "the same to the last bit" if least == float("inf") else f"{least:.1f} dB or more"
    return f" ({share:.2f}x the weight bytes, {quality})"
