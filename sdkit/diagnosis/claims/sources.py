"""Claims that only a source can decide: advice, citations and quotations."""

from sdkit.diagnosis.claims.claim import CONFIRMED, DIFFUSERS, PYTORCH, REFUTED, UNTESTED, Claim

MPS_NOTES = "https://docs.pytorch.org/docs/stable/notes/mps.html"
MPS_PAGE = "https://huggingface.co/docs/diffusers/optimization/mps"

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
