"""Claims on the cause and the cure, against the two runs of the report and the ablation."""

from sdkit.diagnosis.claims.claim import (
    CONFIRMED,
    DIFFUSERS,
    PYTORCH,
    REFUTED,
    REPOSITORY,
    UNTESTED,
    Claim,
    decide,
)
from sdkit.diagnosis.hypotheses import HYPOTHESES, REPORTED, find_survivors


def judge_cause(cells) -> tuple[Claim, ...]:
    """The root cause, the cure and what was said of the backends, in the order of the report.

    Args:
        cells: What `run_ablation` returned.
    """
    return (*judge_root_cause(), *judge_cure(cells), *BACKENDS)


def judge_root_cause() -> tuple[Claim, ...]:
    """float16 as the cause, against the two runs it rests on."""
    survivors = find_survivors(REPORTED)
    return (
        Claim(
            "Only the dtype was changed between the failure and the cure",
            "Mudança Principal", CONFIRMED, f"{REPOSITORY}/tree/dcd914a",
            "Both scripts call enable_attention_slicing(), 25 steps, guidance 7.5, PNDM, no safety "
            "checker. So slicing was never switched off: there is no control.",
        ),
        Claim(
            "The two runs show that float16 on MPS is the root cause",
            "Causa Raiz", decide(len(survivors) == 1 and "VAE" not in survivors[0]),
            "computed: sdkit/diagnosis/hypotheses.py",
            f"{len(survivors)} of {len(HYPOTHESES)} explanations predict both runs: "
            f"{', '.join(survivors)}.",
        ),
        Claim(
            "Some operations exceed float16's range during denoising",
            "Causa Raiz", UNTESTED, "the report measured nothing",
            "No latent, layer or stage was looked at: only PNG files. `measure_activations` and "
            "`measure_scores` tell it for a model; notebook 01 runs them.",
        ),
        Claim(
            "The NaN arises in the denoising, before the VAE",
            "Causa Raiz", UNTESTED, "the report measured nothing",
            "A black PNG does not tell the UNet from the VAE. `guard` and `diagnose` do; in the "
            "public reports that fit this configuration it is the UNet (diffusers#14438).",
        ),
    )  # fmt: skip


def judge_cure(cells) -> tuple[Claim, ...]:
    """float32 as the cure, against the ablation."""
    control = [cell for cell in cells if (cell.dtype, cell.attention) == ("float16", "sdpa")]
    valid = sum(cell.outcome == "valid" for cell in control)
    hidden = [
        cell
        for cell in cells
        if cell.dtype == "float32" and "sliced" in cell.attention and cell.outcome != "valid"
    ]
    where = "emulated MPS" if any(cell.emulated for cell in cells) else "this device"
    return (
        Claim(
            "float32 is stable on MPS and makes no NaN",
            "Comparação float16 vs float32", REFUTED, f"{DIFFUSERS}/pull/13701",
            "It reports NaN in 30 of 30 trials on an M4 whose memory was filled with NaN, in "
            "float16 and in float32. "
            + (
                f"Here float32 with slicing broke in {len(hidden)} cell ({where})."
                if hidden
                else f"Here ({where}) it did not break."
            ),
        ),
        Claim(
            "float32 is the only stable choice on MPS",
            "final report",
            CONFIRMED if valid < len(control) and where == "this device" else REFUTED,
            "https://github.com/invoke-ai/InvokeAI",
            "InvokeAI runs float16 on Macs by default, without slicing. In the ablation float16 "
            f"without slicing is valid in {valid} of {len(control)} cells ({where}).",
        ),
        Claim(
            "The problem is completely resolved by float32",
            "Conclusão", REFUTED if hidden else UNTESTED, "notebook 01, section 3",
            (
                f"Slicing is still on, and the fault with it: where memory holds "
                f"{hidden[0].memory}, float32 breaks too ({where}). float32 lowers the odds: one "
                "in 64 float16 readings of float32 bytes is NaN or Inf, float32 readings of "
                "float16 bytes practically never are."
                if hidden
                else f"float32 with slicing did not break here ({where})."
            ),
        ),
    )  # fmt: skip


BACKENDS = (
    Claim(
        "MPS has known bugs",
        "Causa Raiz", CONFIRMED, f"{PYTORCH}/issues/187521",
        "baddbmm with beta=0 lets NaN through, in every floating dtype, through torch 2.13. "
        "It is not the issue that the report cites.",
    ),
    Claim(
        "float16 works on CUDA because its hardware is mature",
        "Por que float16 Funciona em CUDA", UNTESTED, "the report measured nothing",
        "CUDA ignores the buffer as the contract says, so slicing cannot leak there, in any "
        "dtype: another explanation of the same difference.",
    ),
    Claim(
        "Some MPS operations go to float32 internally",
        "Por que float16 Funciona em CUDA", CONFIRMED,
        f"{PYTORCH}/blob/v2.7.1/aten/src/ATen/native/mps/operations/Attention.mm",
        "SDPA casts Q.K^T to float32 before it scales, but after it was rounded to float16. "
        "What PyTorch calls fallback (PYTORCH_ENABLE_MPS_FALLBACK) goes to the CPU instead.",
    ),
)  # fmt: skip
