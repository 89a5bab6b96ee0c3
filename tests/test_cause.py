"""One bad op of each kind, and the cause, the numbers and the remedy that must follow."""

from dataclasses import replace

import pytest
import torch

from sdkit.diagnosis.cause import CAUSES, REFUTED_BY, find_cause
from sdkit.diagnosis.op_record import BadOp, OpCall, summarize
from sdkit.diagnosis.op_traits import name_options, name_tensors

NAN, INF = float("nan"), float("inf")
aten = torch.ops.aten


def half(*values):
    return torch.tensor(values, dtype=torch.float16)


def single(*values):
    return torch.tensor(values)


def broken(
    func, *args, keywords=None, output=None, weights=None, ignored=(), undefined=(), **fields
):  # fmt: skip
    """The record of one op, which ran here; what a wrong kernel gave instead is `output`."""
    keywords = keywords or {}
    output = func(*args, **keywords) if output is None else output
    call = OpCall(func, args, keywords, (output,), ignored, undefined)
    return BadOp(
        **{
            "op": str(func), "module": "unet.mid", "source": "own.py:3 in f", "source_line": "",
            "options": name_options(call.named), "before": (), "call": call,
            "outputs": (summarize("output", output),), **fields,
        },
        inputs=tuple(
            summarize(name, tensor, weights=(weights or {}).get(name, ()))
            for name, tensor in name_tensors(call.named)
        ),
    )  # fmt: skip


def test_every_cause_has_its_refutation():
    assert sorted(REFUTED_BY) == sorted(CAUSES)


@pytest.mark.parametrize(
    ("weight", "is_cast"),
    [
        (half(INF, 1, -INF), True),
        (half(NAN, 1, 1), False),
        (half(NAN, INF, 1), False),
        (single(INF, 1, 1), False),
    ],
)
def test_bad_weights_are_counted_and_inf_in_float16_is_a_cast(weight, is_cast):
    given = torch.full_like(weight, NAN)  # it is the weight that is blamed and counted
    names = ("unet.mid.norm.weight",)
    bad = broken(
        aten.mul.Tensor, given, weight, weights={"other": names}, bad_weights=names,
        inherited=("self",),
    )  # fmt: skip
    cause = find_cause(bad)
    assert (cause.name, cause.module) == ("bad-weights", "unet.mid.norm")
    assert cause.evidence == {
        "weights": list(names),
        "nan_count": int(weight.isnan().sum()),
        "inf_count": int(weight.isinf().sum()),
        "overflowed_in_the_cast": is_cast,
    }
    assert ("65504" in cause.remedy) == is_cast
    assert ("Replace the weights" in cause.remedy) != is_cast


def test_of_two_bad_weights_the_first_one_s_module_is_blamed():
    names = ("unet.mid.norm.weight", "unet.up.norm.weight")
    weights = {"self": names[:1], "other": names[1:]}
    bad = broken(
        aten.mul.Tensor, single(NAN, 1, 1), single(1, INF, NAN), weights=weights, bad_weights=names
    )
    cause = find_cause(bad)
    assert (cause.module, cause.evidence["weights"]) == ("unet.mid.norm", list(names))
    assert (cause.evidence["nan_count"], cause.evidence["inf_count"]) == (2, 1)


def test_a_finite_weight_whose_cast_gives_inf_is_a_bad_weight():
    names = ("unet.mid.norm.weight",)
    bad = broken(aten._to_copy.default, single(70000.0), output=half(INF), weights={"self": names})
    cause = find_cause(bad)
    assert (cause.name, cause.evidence["overflowed_in_the_cast"]) == ("bad-weights", True)
    activation = broken(aten._to_copy.default, single(70000.0), output=half(INF))
    assert find_cause(activation).name != "bad-weights"


@pytest.mark.parametrize(
    ("found", "suspect"),
    [
        ({"hooks": ("spoil (own.py:12)", "count (own.py:20)")}, "spoil (own.py:12), count"),
        ({}, "in unet.mid"),
        ({"module": ""}, "the code between two modules"),
    ],
)
def test_memory_that_changed_without_an_op_comes_before_all_else(found, suspect):
    bad = broken(
        aten.mul.Tensor, single(NAN, INF, -INF), single(1.0, 1, 1), op=None,
        changed_after="unet.first: aten.mul.Tensor", bad_weights=("unet.mid.weight",), **found,
    )  # fmt: skip
    cause = find_cause(bad)
    assert (cause.name, cause.module) == ("bad-input", None)
    assert (cause.evidence["nan_count"], cause.evidence["inf_count"]) == (1, 2)
    assert cause.evidence["hooks"] == list(bad.hooks)
    assert suspect in cause.remedy and "kernel" not in cause.remedy
    on_a_device = (replace(bad.outputs[0], device="mps"),)
    assert "or for a kernel" in find_cause(replace(bad, outputs=on_a_device)).remedy


def test_a_number_that_was_written_as_nan_outside_a_module_is_an_input():
    bad = broken(aten.mul.Scalar, single(1.0), NAN, module="")
    cause = find_cause(bad)
    assert (cause.name, cause.evidence) == ("bad-input", {"written_as_a_number": ["other"]})
    assert "own.py:3" in cause.remedy
    assert find_cause(broken(aten.mul.Scalar, single(1.0), NAN)).name == "invalid-arithmetic"
    finite = broken(aten.mul.Scalar, half(60000), 2.0, module="")
    assert find_cause(finite).name == "range-overflow"


def test_what_arrived_bad_is_named():
    bad = broken(aten.mul.Tensor, single(1.0), single(NAN), inherited=("other",))
    assert find_cause(bad).evidence == {"arrived_bad": ["other"]}


def test_masked_rows_are_counted():
    scores = torch.zeros(3, 4)
    scores[:2] = -INF
    cause = find_cause(broken(aten._softmax.default, scores, -1, False))
    assert (cause.name, cause.evidence) == ("masked-softmax", {"fully_masked_rows": 2, "rows": 3})


def add_product(**memory):
    """A kernel that read the buffer that beta = 0 tells it to ignore."""
    buffer, ones = torch.full((1, 2, 2), NAN), torch.ones(1, 2, 2)
    return broken(
        aten.baddbmm.default, buffer, ones, ones, keywords={"beta": 0}, output=buffer, **memory
    )


def test_a_buffer_that_must_be_ignored_is_the_backend_s_fault_and_fresh_memory_is_told_from_it():
    cause = find_cause(add_product(ignored=("self",)))
    assert cause.name == "backend-fault"
    assert cause.evidence == {
        "finite_with_zeroed_buffer": True, "ignored_by_contract": ["self"], "uninitialised": [],
    }  # fmt: skip
    cause = find_cause(add_product(ignored=("self",), undefined=("self",)))
    assert (cause.name, cause.evidence["uninitialised"]) == ("uninitialised-memory", ["self"])
    assert "SDPA" in cause.remedy
    fresh = broken(aten.add.Tensor, single(1.0), single(NAN), undefined=("other",))
    cause = find_cause(fresh)
    assert (cause.name, cause.evidence["uninitialised"]) == ("uninitialised-memory", ["other"])
    assert "torch.zeros for torch.empty" in cause.remedy and "own.py:3" in cause.remedy
    not_by_memory = broken(aten.div.Tensor, single(NAN), single(0.0), undefined=("self",))
    assert find_cause(not_by_memory).name == "invalid-arithmetic"


def test_an_overflow_is_shown_by_its_numbers():
    cause = find_cause(broken(aten.mul.Tensor, half(60000, 2), half(2, 2)))
    assert cause.name == "range-overflow"
    assert cause.evidence == {
        "bad_values": 1,
        "of_these_float64_fits": 0,
        "of_these_float64_is_above_the_maximum": 1,
        "of_these_float64_is_nan": 0,
        "of_these_float64_is_inf": 0,
        "float64_largest": 120000.0,
        "dtype_maximum": 65504.0,
    }
    assert cause.remedy.startswith('Run unet.mid in float32; `load_pipeline(dtype={"unet": "floa')
    assert cause.remedy.endswith("float16 ends at 65504.")
    outside = find_cause(broken(aten.mul.Tensor, half(60000), half(2), module=""))
    assert outside.remedy.startswith("Smaller guidance_scale")
    widest = find_cause(broken(aten.mul.Tensor, single(3e38), single(2.0)))
    assert widest.name == "range-overflow" and widest.remedy.startswith("No wider dtype")


@pytest.mark.parametrize(
    "call",
    [
        (aten.sub.Tensor, single(INF), single(INF)),
        (aten.add.Scalar, single(1.0), INF),
        (aten.div.Tensor, single(1.0, 4), single(0.0, 2)),
        (aten.reciprocal.default, single(0.0)),
        (aten.log.default, single(0.0)),
        (aten.rsqrt.default, single(0.0)),
        (aten.pow.Tensor_Scalar, single(0.0), -1),
        (aten.mul.Tensor, half(INF, 60000, 60000), half(0, 2, 2)),
    ],
    ids=lambda call: str(call[0]),
)
def test_what_float64_cannot_answer_either_is_the_formula(call):
    cause = find_cause(broken(*call))
    assert cause.name == "invalid-arithmetic" and "own.py:3" in cause.remedy


@pytest.mark.parametrize(
    ("inputs", "output", "name"),
    [
        ((1, 2), (NAN, 7.4), "backend-fault"),
        ((12, 12, 1), (INF, INF, NAN), "range-overflow"),
        ((12, 1), (INF, NAN), "range-overflow"),  # as many: the range is the nearer answer
        ((12, 1, 1), (INF, NAN, NAN), "backend-fault"),
        ((1000, 1), (INF, NAN), "range-overflow"),  # above float64's maximum too
        ((1000, 12, 1, 1), (INF, INF, NAN, NAN), "range-overflow"),
    ],
)
def test_a_kernel_is_wrong_where_most_of_the_bad_values_fit(inputs, output, name):
    bad = broken(aten.exp.default, half(*inputs), output=half(*output))
    assert find_cause(bad).name == name


def test_what_has_no_reference_is_undecided():
    bytes_ = torch.ones(16, 16).to(torch.float8_e4m3fn)
    one = torch.tensor(1.0)
    bad = broken(aten._scaled_mm.default, bytes_, bytes_, one, one, output=single(NAN))
    cause = find_cause(bad)
    assert cause.name == "undecided" and "float64_reference" in cause.evidence
