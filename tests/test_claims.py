"""The ledger: every claim has a verdict and evidence, and what is computed is computed."""

import numpy as np
import pytest

from sdkit.diagnosis.ablation import FAULTY, HONEST, OWN, Cell
from sdkit.diagnosis.claims import (
    CONFIRMED,
    REFUTED,
    VERDICTS,
    judge_claims,
    style_claims,
    tabulate_claims,
)
from sdkit.diagnosis.claims.claim import COMPUTED
from sdkit.diagnosis.claims.cost import FLOAT16_SECONDS, FLOAT32_SECONDS, count_parameters
from sdkit.diagnosis.claims.symptom import cast_to_8_bits, count_shown_warnings


def make_cells(*, emulated="emulated MPS", control=None):
    kernels = (FAULTY, HONEST) if emulated else (OWN,)
    sliced = [
        Cell(dtype, "diffusers-sliced", kernel, "nan", "nan" if kernel != HONEST else None, "unet")
        for dtype in ("float16", "float32")
        for kernel in kernels
    ]
    plain = [
        Cell("float16", "sdpa", kernel, "nan", control, emulated=emulated) for kernel in kernels
    ]
    return (*sliced, *plain)


@pytest.fixture(scope="module")
def claims():
    return judge_claims(make_cells())


def find(claims, words):
    (claim,) = [claim for claim in claims if words in claim.text]
    return claim


def test_every_claim_is_judged_and_shown(claims):
    assert len(claims) >= 24
    assert len({claim.text for claim in claims}) == len(claims)
    assert {claim.verdict for claim in claims} == set(VERDICTS)
    for claim in claims:
        assert claim.text and claim.where and claim.shown_by and len(claim.evidence) > 10
        assert claim.verdict in VERDICTS
    computed = [claim for claim in claims if claim.shown_by.startswith("computed")]
    assert len(computed) >= 15 and any(claim.shown_by == COMPUTED for claim in computed)


def test_both_citations_and_both_quotations_are_refuted(claims):
    for words in ("pytorch#77764", "diffusers#2557", "for stability", "MPS users should"):
        assert find(claims, words).verdict == REFUTED


def test_seconds_are_recomputed_from_its_own(claims):
    assert np.mean(FLOAT16_SECONDS) == pytest.approx(12.20, abs=0.005)
    assert np.mean(FLOAT32_SECONDS) == pytest.approx(11.37, abs=0.005)
    assert find(claims, "Mean 12.20").verdict == CONFIRMED
    assert find(claims, "These means compare").verdict == REFUTED
    slower = np.mean(FLOAT32_SECONDS[1:]) / np.mean(FLOAT16_SECONDS[1:]) - 1
    assert f"{slower:.1%}" in find(claims, "10 to 20 %").evidence


def test_weights_are_those_of_stable_diffusion_1_5(claims):
    # huggingface.co/stable-diffusion-v1-5: 859,520,964 + 83,653,863 + 123,060,480
    assert sum(count_parameters().values()) == 1_066_235_307
    assert find(claims, "The model takes").verdict == CONFIRMED
    assert find(claims, "860 million").verdict == REFUTED


def test_the_cast_is_run_and_the_validator_asked(claims):
    pixels, messages = cast_to_8_bits(np.full((2, 2, 3), np.nan, np.float32))
    assert pixels.dtype == np.uint8 and any("invalid value" in message for message in messages)
    assert cast_to_8_bits(np.zeros((2, 2, 3)))[1] == []
    assert count_shown_warnings(np.full((3, 2, 2), np.nan)) == 1
    assert find(claims, "np.isnan").verdict == REFUTED
    assert find(claims, "all black").verdict == CONFIRMED


def test_the_ablation_decides_what_it_can(claims):
    assert find(claims, "only stable choice").verdict == REFUTED
    assert find(claims, "completely resolved").verdict == REFUTED
    on_a_mac = judge_claims(make_cells(emulated=None, control="nan"))
    assert find(on_a_mac, "only stable choice").verdict == CONFIRMED
    assert "this device" in find(on_a_mac, "only stable choice").evidence


def test_the_table_has_one_row_a_claim(claims):
    table = tabulate_claims(claims)
    assert list(table) == ["text", "where", "verdict", "evidence", "shown_by"]
    assert len(table) == len(claims)
    page = style_claims(table).to_html()
    assert ">diffusers#14438</a>" in page and page.count("<tr>") == len(claims) + 1
