"""The report's claims, each confirmed, refuted, or not testable here, with what shows it.

What can be computed is computed when the ledger is made. What only a source can tell names it. What
only a Mac could tell is said to be not testable here. The report is `TASK_1.4_ISSUE_REPORT.md` of
github.com/ab-orbit/phd-computing-vision; `first write-up` is `TASK_1.4_DOCUMENTATION.md` beside it,
and `final report` is `TASK_1.4_FINAL_REPORT.md`.
"""

import inspect
import io
import warnings
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from PIL import Image

from sdkit.diagnosis.hypotheses import HYPOTHESES, REPORTED, find_survivors

CONFIRMED, REFUTED, UNTESTED = "confirmed", "refuted", "not testable here"
VERDICTS = (CONFIRMED, REFUTED, UNTESTED)
COMPUTED = "computed: sdkit/diagnosis/claims.py"
REPOSITORY = "https://github.com/ab-orbit/phd-computing-vision"
DIFFUSERS = "https://github.com/huggingface/diffusers"
PYTORCH = "https://github.com/pytorch/pytorch"
MPS_NOTES = "https://docs.pytorch.org/docs/stable/notes/mps.html"
MPS_PAGE = "https://huggingface.co/docs/diffusers/optimization/mps"
# Seconds of each image, as the first write-up (float16) and the final report (float32) list them.
FLOAT16_SECONDS, FLOAT32_SECONDS = (18.78, 8.93, 8.90), (14.20, 9.95, 9.95)
GB = 10**9


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


def decide(is_true: bool) -> str:
    """The verdict on what was computed."""
    return CONFIRMED if is_true else REFUTED


def cast_to_8_bits(images):
    """The pipeline's own cast, with what it warns of: (uint8 array, messages)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = (images * 255).round().astype("uint8")
    return pixels, [str(warning.message) for warning in caught]


def count_shown_warnings(images) -> int:
    """How many lines a script shows that casts so many images of NaN in a loop, by default."""
    module = {}  # Python notes per module which line has warned already
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        code = "for image in images: (image * 255).round().astype('uint8')"
        exec(compile(code, "script.py", "exec"), module | {"images": images})
    return len(caught)


def measure_black_png_bytes() -> int:
    """Bytes of an all-black PNG of 512 x 512 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((512, 512, 3), np.uint8)).save(file, "PNG")
    return len(file.getvalue())


@cache
def count_parameters() -> dict[str, int]:
    """Parameters of Stable Diffusion 1.5's exact configuration, built without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(
                sample_size=64, cross_attention_dim=768, attention_head_dim=8
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, projection_dim=768,
                )
            ),
        }  # fmt: skip
    return {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}


def judge_symptom() -> tuple[Claim, ...]:
    """Black pictures and the warning."""
    nan_images = np.full((3, 64, 64, 3), np.nan, np.float32)
    pixels, messages = cast_to_8_bits(nan_images)
    shown = count_shown_warnings(nan_images)
    png_bytes = measure_black_png_bytes()
    from diffusers.image_processor import VaeImageProcessor

    source = inspect.getsource(VaeImageProcessor)
    is_black = bool(messages) and int(pixels.max()) == 0
    return (
        Claim(
            "All three images are black, every pixel 0",
            "Sintoma", CONFIRMED, f"{REPOSITORY}/tree/dcd914a",
            "The three files are one and the same blob of 843 bytes, and it decodes to 0 "
            f"everywhere. Pillow writes a black 512 x 512 PNG in {png_bytes} bytes here.",
        ),
        Claim(
            "Three images of about 500 KB each were generated",
            "first write-up", decide(png_bytes > 400_000), COMPUTED,
            f"A black 512 x 512 PNG has {png_bytes} bytes. The size alone would have told.",
        ),
        Claim(
            "The colours asked for (black, brown, white) were checked: all match",
            "first write-up", REFUTED, f"{REPOSITORY}/tree/dcd914a",
            "The three files are byte for byte equal and black.",
        ),
        Claim(
            'RuntimeWarning "invalid value encountered in cast" means NaN or Inf before the cast',
            "Warning Durante Execução",
            decide(any("invalid value encountered in cast" in m for m in messages)), COMPUTED,
            f"Casting NaN says: {messages[0] if messages else 'nothing'}.",
        ),
        Claim(
            "The warning is normal on MPS, comes with the first image (warm-up) and is harmless",
            "first write-up", decide(shown == len(nan_images)), COMPUTED,
            f"Three images of NaN, cast one after the other, show {shown} warning: Python shows "
            "one a source line. All three images were black.",
        ),
        Claim(
            "NaN cast to uint8 becomes 0, so the picture is black",
            "Causa Raiz", decide(is_black), COMPUTED,
            f"On this machine the cast gives {int(pixels.min())} to {int(pixels.max())}. C leaves "
            "the value open; the black files show that it was 0 on the Mac as well.",
        ),
        Claim(
            "The pipeline computes `(latents * 255).round().astype('uint8')`",
            "Causa Raiz",
            decide("latents * 255" in source and "images * 255" not in source),
            f"{DIFFUSERS}/blob/v0.35.2/src/diffusers/image_processor.py#L148",
            "diffusers casts `images`, what the VAE decoded and brought into [0, 1]. Latents have "
            "4 channels and an eighth of the size, and are never cast.",
        ),
    )  # fmt: skip


def judge_validator() -> tuple[Claim, ...]:
    """What its checks can see."""
    pixels, _ = cast_to_8_bits(np.full((8, 8, 3), np.nan, np.float32))
    finds_nan = bool(np.isnan(pixels).any())
    finds_inf = bool(np.isinf(cast_to_8_bits(np.full((8, 8, 3), np.inf))[0]).any())
    limits = np.iinfo(np.uint8)
    can_leave = limits.min < 0 or limits.max > 255
    return (
        Claim(
            "The new check finds NaN: `np.isnan(image_array).any()`",
            "Validação de Imagens", decide(finds_nan), COMPUTED,
            f"The array is uint8, made from NaN: isnan says {finds_nan}, isinf of Inf {finds_inf}. "
            "No integer is NaN.",
        ),
        Claim(
            "The new check finds values outside [0, 255]",
            "Validação de Imagens", decide(can_leave), COMPUTED,
            f"uint8 holds {limits.min} to {limits.max} and nothing else: it can never fire.",
        ),
        Claim(
            "The new check finds a picture that is all black: `image_array.max() == 0`",
            "Validação de Imagens", decide(int(pixels.max()) == 0), COMPUTED,
            "The one of its four checks that can fire. A grey or half-black failure passes it.",
        ),
    )  # fmt: skip


def judge_formats() -> tuple[Claim, ...]:
    """The table of float16 and float32, and what leaves it."""
    half, single = torch.finfo(torch.float16), torch.finfo(torch.float32)
    digits = {name: -np.log10(info.eps) for name, info in (("16", half), ("32", single))}
    largest = torch.tensor(half.max, dtype=torch.float16)
    doubled, rounded = largest * 2, torch.tensor(1 + half.eps / 4, dtype=torch.float16)
    return (
        Claim(
            "float16 reaches to 65,504 and float32 to 3.4e38",
            "Comparação float16 vs float32",
            decide(half.max == 65504 and 3.4e38 < single.max < 3.41e38), COMPUTED,
            f"torch.finfo: {half.max:,.0f} and {single.max:.3g}.",
        ),
        Claim(
            "float16 is exact to about 3 decimal digits, float32 to about 7",
            "Comparação float16 vs float32",
            decide(round(digits["16"]) == 3 and round(digits["32"]) == 7), COMPUTED,
            f"-log10 of the spacing at 1: {digits['16']:.1f} and {digits['32']:.1f}.",
        ),
        Claim(
            "float16 takes 2 bytes, float32 takes 4",
            "Comparação float16 vs float32", decide((half.bits, single.bits) == (16, 32)), COMPUTED,
            f"{half.bits} and {single.bits} bits.",
        ),
        Claim(
            "Operations that exceed the limits of *precision* give NaN",
            "Causa Raiz", decide(not bool(rounded.isfinite())), COMPUTED,
            f"Beyond the precision a value is rounded (1 + eps/4 gives {float(rounded):g}). Beyond "
            f"the range it is {float(doubled):g}, and NaN comes only of Inf - Inf or 0 * Inf "
            f"({float(doubled - doubled):g}).",
        ),
    )  # fmt: skip


def judge_cause(cells) -> tuple[Claim, ...]:
    """The root cause, against the two runs it rests on and against the ablation."""
    survivors = find_survivors(REPORTED)
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


def judge_seconds() -> tuple[Claim, ...]:
    """Means and steady seconds, from its own figures."""
    mean16, mean32 = np.mean(FLOAT16_SECONDS), np.mean(FLOAT32_SECONDS)
    steady16, steady32 = np.mean(FLOAT16_SECONDS[1:]), np.mean(FLOAT32_SECONDS[1:])
    slower = steady32 / steady16 - 1
    return (
        Claim(
            "Mean 12.20 s an image in float16, 11.37 s in float32",
            "Antes vs Depois",
            decide(abs(mean16 - 12.20) < 0.005 + 1e-9 and abs(mean32 - 11.37) < 0.005 + 1e-9),
            COMPUTED,
            f"Of its own seconds: {mean16:.2f} and {mean32:.2f}.",
        ),
        Claim(
            "These means compare the two dtypes (float32 would be the faster one)",
            "Antes vs Depois", decide(steady32 < steady16), COMPUTED,
            f"The first images carry the warm-up, {FLOAT16_SECONDS[0]} and {FLOAT32_SECONDS[0]} s. "
            f"Without them: {steady16:.2f} and {steady32:.2f} s.",
        ),
        Claim(
            "float32 is 10 to 20 % slower",
            "Performance", decide(0.1 <= slower <= 0.2), COMPUTED,
            f"{slower:.1%}, by the images after the first, two of each.",
        ),
        Claim(
            "float16 takes about 8 to 9 s an image, float32 10 to 11 s",
            "Performance", decide(8 <= steady16 <= 9 and 10 <= round(steady32) <= 11), COMPUTED,
            f"{steady16:.2f} and {steady32:.2f} s after the warm-up.",
        ),
    )  # fmt: skip


def judge_memory() -> tuple[Claim, ...]:
    """Weight bytes computed, and the totals against each other."""
    parameters = count_parameters()
    count = sum(parameters.values())
    half, single = count * 2 / GB, count * 4 / GB
    totals = {"Uso de Memória": (4, 5), "Antes vs Depois": (8, 10), "first write-up": (10, 10)}
    agree = max(low for low, _ in totals.values()) <= min(high for _, high in totals.values())
    single_totals = {"Uso de Memória": (6, 8), "Antes vs Depois": (11, 12)}
    single_agree = max(low for low, _ in single_totals.values()) <= min(
        high for _, high in single_totals.values()
    )
    return (
        Claim(
            "The model takes about 2 to 3 GB in float16 and 4 to 5 GB in float32",
            "Uso de Memória", decide(2 <= half <= 3 and 4 <= single <= 5), COMPUTED,
            f"Weights of the exact Stable Diffusion 1.5 configuration: {count:,} parameters, "
            f"{half:.2f} and {single:.2f} GB.",
        ),
        Claim(
            "The model has about 860 million parameters in all",
            "first write-up", decide(abs(count / 1e6 - 860) < 10), COMPUTED,
            f"That is the UNet alone ({parameters['unet'] / 1e6:.0f} million). With VAE and text "
            f"encoder there are {count / 1e6:.0f} million.",
        ),
        Claim(
            "float16 uses about 4 to 5 GB in all",
            "Uso de Memória", decide(agree), COMPUTED,
            "The same run is said to use "
            + ", ".join(f"{show_range(*ends)} GB ({name})" for name, ends in totals.items())
            + ". These ranges do not meet; 2.0 GB of model and 1.74 GB of inference were measured.",
        ),
        Claim(
            "float32 uses about 6 to 8 GB in all",
            "Uso de Memória", decide(single_agree), COMPUTED,
            "The same run is said to use 11 to 12 GB under Antes vs Depois. 5.3 and 0.4 GB were "
            "measured, says the final report.",
        ),
        Claim(
            "32 GB are enough for training in float32",
            "Uso de Memória", UNTESTED, "the report measured nothing",
            f"Weights are {single:.2f} GB and LoRA trains few of them; activations at 512 pixels "
            "were estimated, not measured.",
        ),
    )  # fmt: skip


def show_range(low, high) -> str:
    return str(low) if low == high else f"{low} to {high}"


ADVICE = (
    Claim(
        "8-bit Adam is not compatible with MPS",
        "Configuração Recomendada", CONFIRMED,
        "https://huggingface.co/docs/bitsandbytes/main/en/installation",
        "bitsandbytes has no 8-bit optimiser for MPS. Third parties offer one (mps-bitsandbytes).",
    ),
    Claim(
        "enable_sequential_cpu_offload() helps where memory is short",
        "Troubleshooting", UNTESTED, f"{DIFFUSERS}/issues/14438",
        "It runs on MPS, but CPU and GPU share one memory there, so little can be gained. Offload "
        "together with slicing gave black images on an M1.",
    ),
    Claim(
        "Mixed precision must not be used on MPS",
        "Conclusão", UNTESTED, f"{PYTORCH}/pull/184286",
        "Nothing was trained in it. autocast is there from torch 2.5; until 2.14 GradScaler zeroed "
        "float16 gradients on MPS, which is a reason, though not the one given.",
    ),
    Claim(
        "The model is runwayml/stable-diffusion-v1-5",
        "Mudança Principal", REFUTED,
        "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        "That address is gone from the Hub. The same weights are at the one given here.",
    ),
    Claim(
        "PyTorch's documentation suggests float16 on MPS to save memory",
        "Lições Aprendidas", UNTESTED, MPS_PAGE,
        "No page is named. It is diffusers' page on MPS that loads float16 and switches slicing "
        "on, the very pair that failed.",
    ),
)  # fmt: skip
CITATIONS = (
    Claim(
        'pytorch#77764 is "MPS backend generates NaN values with float16"',
        "Referências", REFUTED, f"{PYTORCH}/issues/77764",
        'It is "General MPS op coverage tracking issue", about operations that MPS lacks.',
    ),
    Claim(
        'diffusers#2557 is "Black images on Apple Silicon with float16"',
        "Referências", REFUTED, f"{DIFFUSERS}/pull/2557",
        'It is a merged pull request, "add intermediate logging for dreambooth training script". '
        "The issue that fits is diffusers#11229.",
    ),
    Claim(
        'PyTorch\'s MPS documentation says "Use float32 for stability on complex models"',
        "Referências", REFUTED, MPS_NOTES,
        "The sentence is not in the source of that page (docs/source/notes/mps.rst), and a search "
        "of public repositories finds it nowhere.",
    ),
    Claim(
        'diffusers\' documentation says "MPS users should use float32"',
        "Referências", REFUTED, MPS_PAGE,
        "The page never says so. It recommends attention slicing below 64 GB, and shows it with "
        "float16.",
    ),
)  # fmt: skip
