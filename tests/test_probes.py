"""Every probe: an emulated fault makes it fail, an honest backend makes it pass."""

import contextlib
import json
from dataclasses import asdict, replace

import pytest
import torch

from sdkit.diagnosis.probes import PROBES, Check, ProbeResult, run_probe, run_probes
from sdkit.emulate import FAULTS, Fault, mps
from sdkit.validation import ValidationError

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")
CPU = torch.device("cpu")
GUARDED = {
    "float16", "attention slicing", "attention", "loading", "sampling", "training", "checks",
}  # fmt: skip

BREAKING = {  # probe: the documented fault that makes it fail
    "baddbmm-beta-zero": "baddbmm-beta-zero",
    "addbmm-beta-zero": "addbmm-beta-zero",
    "addmm-beta-zero": "addmm-beta-zero",
    "recycled-memory": "baddbmm-beta-zero",
    "matmul-large-inner-size": "matmul-last-tile",
    "scores-baddbmm": "score-rounding",
    "scores-sdpa": "score-rounding",
    "sdpa-shapes": "sdpa-last-keys",
    "sdpa-permuted": "sdpa-permuted",
    "sdpa-masked-row": "sdpa-masked-row",
    "softmax-long-rows": "softmax-narrow-sum",
    "group-norm-range": "norm-float16-statistics",
    "layer-norm-range": "norm-float16-statistics",
    "norm-slices": "norm-slice-offset",
    "norm-transposed": "norm-transposed",
    "conv-chunk": "conv-chunk",
    "conv-channels-last": "conv-channels-last-slice",
    "linear-strided-weight": "linear-weight-strides",
    "linear-repeats": "linear-changes",
    "activations": "gelu-bfloat16",
    "randn-values": "randn-nan",
    "randn-distinct": "randn-repeats",
    "rand-below-one": "rand-reaches-one",
    "host-copies": "copy-non-blocking",
    "writes": "lost-writes",
    "clamp-keeps-nan": "clamp-hides-nan",
    "maximum-keeps-nan": "maximum-hides-nan",
    "cumsum": "cumsum-integers",
    "interpolate": "interpolate-corners",
    "addcdiv-transposed": "inplace-strided",
    "adamw-step": "inplace-strided",
    "unscale-gradients": "unscale-zeroes",
}


def test_no_probe_is_without_a_fault_and_no_fault_without_a_probe():
    assert len(PROBES) >= 20
    assert set(BREAKING) == set(PROBES)
    assert set(BREAKING.values()) == set(FAULTS)


@pytest.mark.parametrize("name", PROBES)
def test_a_fault_makes_it_fail(name):
    with mps(faults=(BREAKING[name],)):
        (result,) = run_probes(names=[name])
    assert (result.name, result.status) == (name, "fail"), result
    assert result.seconds is None
    broken = [key for key, value in result.evidence.items() if not value <= result.allowed[key]]
    assert broken and broken[0] in result.message


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("backend", ["plain", "emulated"])
def test_an_honest_backend_makes_it_pass(name, backend):
    with mps(faults=()) if backend == "emulated" else contextlib.nullcontext():
        (result,) = run_probes("cpu", names=[name])
    assert (result.status, result.message) == ("pass", "")
    assert result.evidence and set(result.evidence) == set(result.allowed)
    assert (result.seconds is None) == (backend == "emulated")


ALSO_BROKEN = {
    "score-rounding": {"sdpa-masked-row"},  # it computes the softmax plainly
    "sdpa-last-keys": {"sdpa-permuted"},  # over 77 tokens as well
}


@pytest.mark.parametrize("name", sorted(set(BREAKING.values())))
def test_a_fault_breaks_its_own_probes_alone(name):
    """A judge that runs through the emulation would see faults everywhere."""
    own = {probe for probe, fault in BREAKING.items() if fault == name}
    with mps(faults=(name,)):
        failed = {result.name for result in run_probes() if result.status != "pass"}
    assert failed == own | ALSO_BROKEN.get(name, set())


@pytest.mark.parametrize("memory", ["nan", "stale_float32"])
def test_an_honest_backend_passes_on_any_memory(memory):
    with mps(memory, faults=()):
        assert {result.status for result in run_probes()} == {"pass"}


def test_it_is_told_what_recycled_memory_held():
    shares = {}
    for memory in ("zeros", "stale_float32", "nan"):
        with mps(memory, faults=()):
            (result,) = run_probes(names="recycled-memory")
        shares[memory] = result.evidence["share of NaN or Inf that a fresh buffer held"]
    assert shares == {"zeros": 0, "stale_float32": pytest.approx(1 / 64, abs=0.01), "nan": 1}


@pytest.mark.parametrize("name", ["scores-baddbmm", "scores-sdpa"])
def test_a_control_that_does_not_overflow_proves_nothing(name):
    def saturate(func, args, kwargs, compute):
        return compute(func, args, kwargs).clamp(max=65504)

    fault = Fault("saturating", ("aten.bmm",), (), "nowhere", saturate)
    with mps(faults=(fault,)):
        (result,) = run_probes(names=name)
    assert result.status == "fail" and result.message.startswith("control (bmm, then scale)")


def test_every_probe_says_what_it_is_about():
    for name, probe in PROBES.items():
        assert probe.name == name
        assert probe.contract.endswith(".") and len(probe.contract) <= 67  # one line of the doctor
        assert probe.guards and set(probe.guards) <= GUARDED
        assert probe.threads
        assert all(thread.startswith("https://github.com/") for thread in probe.threads)


def test_results_go_into_json():
    results = run_probes("cpu", names=["randn-values", "cumsum"])
    assert [ProbeResult(**r) for r in json.loads(json.dumps([asdict(r) for r in results]))] == [
        *results
    ]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotImplementedError("aten::thing"), "not-runnable"),
        (RuntimeError("\"gelu\" not implemented for 'Half'"), "not-runnable"),
        (TypeError("BFloat16 is not supported on MPS"), "not-runnable"),
        (RuntimeError("MPS backend out of memory"), "not-runnable"),
        (RuntimeError("an illegal memory access was encountered"), "fail"),
    ],
)
def test_what_a_device_lacks_is_told_from_what_it_breaks(error, status):
    def measure(device, thorough):
        raise error

    result = run_probe(replace(PROBES["cumsum"], measure=measure), CPU)
    assert (result.status, result.evidence, result.seconds) == (status, {}, None)
    assert str(error) in result.message and type(error).__name__ in result.message


def test_nan_keeps_no_contract():
    assert not Check("error", float("nan"), 1.0).is_kept
    assert Check("error", 1.0, 1.0).is_kept


def test_probes_leave_no_trace():
    state = torch.get_rng_state()
    run_probes("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("arguments", [
    {"names": ["baddbm"]}, {"device": "tpu"}, {"device": "cuda:99"}, {"names": ("cumsum", 3)},
])  # fmt: skip
def test_unknown_names_and_devices_are_refused(arguments):
    with pytest.raises(ValidationError, match=r"expected|Expected"):
        run_probes(**arguments)


def test_another_device_is_refused_under_an_emulation():
    with mps(), pytest.raises(ValidationError, match="expected auto, cpu or mps under emulated"):
        run_probes("cuda")


@pytest.mark.device
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_there_answers_every_probe(name):
    module = {"cuda": torch.cuda, "mps": torch.backends.mps}[name]
    if not module.is_available():
        pytest.skip(f"no {name} here")
    results = run_probes(name)
    assert {result.name for result in results} == set(PROBES)
    assert all(result.message for result in results if result.status != "pass")
    if name == "cuda":
        assert results[0].status == "pass", results[0]  # baddbmm keeps its contract there


@pytest.mark.slow
def test_the_sizes_of_stable_diffusion_pass_under_emulation():
    with mps(faults=()):
        results = run_probes(thorough=True)
    assert [result for result in results if result.status != "pass"] == []
