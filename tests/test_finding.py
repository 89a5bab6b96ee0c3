"""What a finding says, what it holds against another, and where tensors are looked for."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sdkit.finding import GuardReport, describe_bad, find_tensors

NAN, INF = float("nan"), float("inf")


def describe(values, stage="unet", step=2, timestep=334, component="unet", argument="output"):
    return describe_bad(torch.as_tensor(values), stage, step, timestep, component, argument)


def test_counts_and_rows_are_those_of_the_tensor():
    values = torch.zeros(4, 2, 3, dtype=torch.float16)
    values[1] = NAN
    values[3, 0, :2] = torch.tensor([INF, -INF])
    finding = describe(values)
    assert (finding.nan_count, finding.inf_count, finding.total) == (6, 2, 24)
    assert (finding.rows, finding.row_count) == ((1, 3), 4)
    assert (finding.dtype, finding.device) == ("float16", "cpu")
    scalar = describe(NAN)
    assert (scalar.rows, scalar.row_count, scalar.total) == ((0,), 1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"values": [NAN, 1.0]},
            "unet (float32, cpu): 1 of 2 values are NaN at step 2 (timestep 334). "
            "See notebooks/01_diagnose_black_images.ipynb to find the cause.",
        ),
        (
            {
                "values": torch.tensor([NAN, INF, 1.0]).half(),
                "stage": "vae", "component": "vae.decode", "step": None, "timestep": None,
            },
            "vae.decode (float16, cpu): 1 of 3 values are NaN and 1 of 3 values are Inf. "
            'Load with dtype="float32", or see notebooks/02_fix_precision.ipynb.',
        ),
        (
            {
                "values": torch.tensor([INF]).bfloat16(),
                "stage": "scheduler", "component": "vae.decode", "argument": "latents", "step": 0,
                "timestep": 0.5,
            },
            "scheduler (bfloat16, cpu): 1 of 1 values are Inf in what vae.decode was given as "
            "latents after step 0 (timestep 0.5). "
            "Check guidance_scale, callbacks and the scheduler itself.",
        ),
    ],
)  # fmt: skip
def test_the_message_says_where_what_when_and_the_next_step(given, message):
    assert describe(**given).message == message


def test_an_output_follows_from_what_was_given_only_where_its_rows_were_bad():
    made = describe([[NAN], [1.0], [NAN]])
    first, third = describe([[NAN], [1.0], [1.0]]), describe([[1.0], [1.0], [INF]])
    assert made.follows_from([first, third])
    assert not made.follows_from([first])
    assert made.follows_from([first, describe(NAN)])  # a timestep: one for the whole batch
    assert made.follows_from([made]) and first.follows_from([made])


@dataclass
class Bundle:
    """A model's own kind of output."""

    values: torch.Tensor
    more: dict


def test_tensors_are_found_however_they_are_nested():
    a, b, c, d = (torch.full((1, 2), float(i)) for i in range(4))
    nest = [a, ({"x": b}, Bundle(c, {"y": (d,)})), "text", None, 3, {1.5}]
    assert [t is e for t, e in zip(find_tensors(nest), (a, b, c, d), strict=True)] == [True] * 4
    assert next(find_tensors(UNet2DConditionOutput(sample=a))) is a
    assert next(find_tensors(OrderedDict(x=a))) is a
    moments = torch.ones(1, 8, 2, 2)
    assert next(find_tensors(DiagonalGaussianDistribution(moments))) is moments
    unjudged = [torch.arange(3), torch.ones(2, dtype=torch.bool), torch.empty(2, device="meta")]
    assert list(find_tensors(unjudged)) == []


def test_a_report_reads_as_a_list_of_its_findings():
    report = GuardReport(calls={"unet": 4, "vae.decode": 1})
    assert str(report) == "no NaN, no Inf (calls judged: unet 4, vae.decode 1)"
    findings = [describe([NAN]), describe([INF])]
    report.findings += findings
    assert (len(report), list(report), report[1]) == (2, findings, findings[1])
    assert str(report).splitlines()[0] == findings[0].message
    assert str(report).endswith(f"{findings[1].message} (calls judged: unet 4, vae.decode 1)")
