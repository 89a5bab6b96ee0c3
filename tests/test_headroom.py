"""Headroom from a float32 run, beside what real reduced-precision runs do; tiny real pipelines."""

from collections import Counter
from functools import partial

import matplotlib.figure
import pytest
import torch
from healthy import HEALTHY
from planted import PLANTED
from planting import NAN, both, scale_inside, set_weight, with_ddim
from tiny_pipelines import build_tiny_pipe
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit import ValidationError, load_pipeline, measure_headroom, plan_precision
from sdkit.diagnosis.module_path import ModulePath
from sdkit.emulate import float16_arithmetic
from sdkit.emulate.mode import suspended
from sdkit.emulate.schema import find_rule
from sdkit.finding import find_tensors
from sdkit.guarding import find_components
from sdkit.precision import Headroom, plot_headroom
from sdkit.precision.headroom import OVERFLOW, following_steps
from sdkit.precision.ladder import climb
from sdkit.validation import is_finite

pytestmark = pytest.mark.filterwarnings(
    "ignore::sdkit.emulate.EmulationWarning", "ignore:invalid value encountered in cast"
)
RUN = {"num_inference_steps": 3}
OVERFLOWS = [case for case in PLANTED if case.cause == "range-overflow"]
INNER = "unet.down_blocks.0.resnets.0.conv1"


class RealOverflows(TorchDispatchMode):
    """Watches a real run: which (module, op, index, step) make Inf of finite inputs."""

    def __init__(self, pipe):
        super().__init__()
        self.path = ModulePath(find_components(pipe), on_enter=self.forget)
        self.step = self.position = None
        self.counts = {}
        self.overflows = {}
        self.is_spoilt = False  # until then all is finite

    def forget(self, path):
        self.counts.pop(path, None)
        if len(self.path.running) == 1:
            self.counts.pop("", None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, inputs_fit = kwargs or {}, True
        if self.is_spoilt:
            with suspended():
                inputs_fit = all(is_finite(t) for t in find_tensors([args, kwargs]))
        result = func(*args, **kwargs)
        least = 1 if self.path.running else 2  # a scheduler's tables are float32 in any run
        tensors = [t for t in list(find_tensors(result))[:1] if t.dim() >= least]
        if tensors and not find_rule(func).exact:
            module = self.path.running[-1] if self.path.running else ""
            counts = self.counts.setdefault(module, Counter())
            counts[str(func)] += 1
            in_loop = module.startswith(("unet", "transformer")) or not module
            place = (module, str(func), counts[str(func)], in_loop and self.step)
            with suspended():
                fits = is_finite(tensors[0])
            if inputs_fit:
                self.overflows[place] = self.overflows.get(place, False) or not fits
            self.is_spoilt = self.is_spoilt or not fits
        return result


def run_really(pipe, pipe_kwargs):
    """{(module, op, index, step): whether it overflowed} of one call as the pipeline is."""
    watch = RealOverflows(pipe)
    with watch.path.followed(), following_steps(pipe, watch), watch:
        pipe("a shoe", generator=torch.Generator("cpu").manual_seed(0), **pipe_kwargs)
    return watch.overflows


def compare(case, tokenizer_folder):
    """Counts of (predicted, happened) over every op and step, and the predicted (module, op)."""
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        pipe.set_progress_bar_config(disable=True)
        headroom = measure_headroom(pipe, "a shoe", **pipe_kwargs)
        happened = run_really(pipe, pipe_kwargs)
    predicted = {
        (op.module, op.op, op.index + 1, False if step is None and op.module else step)
        for op in headroom.ops
        for step, largest in zip(op.steps, op.largest, strict=True)
        if largest >= OVERFLOW["float16"]
    }
    matrix = Counter((place in predicted, bad) for place, bad in happened.items())
    return matrix, headroom.predict("float16")


def test_every_planted_overflow_is_predicted(tokenizer_folder):
    """The confusion matrix over every op and step that a real float16 run gave finite inputs."""
    matrix = Counter()
    assert len(OVERFLOWS) >= 14
    for case in OVERFLOWS:
        counts, predicted = compare(case, tokenizer_folder)
        truths = {case.module or "", *(module or "" for _, module in case.also)}
        assert truths & {module for module, _ in predicted}, case.name
        matrix += counts
    print({"hit": matrix[True, True], "miss": matrix[False, True],
           "false alarm": matrix[True, False], "quiet": matrix[False, False]})  # fmt: skip
    assert matrix[True, True] >= len(OVERFLOWS)
    assert matrix[False, True] == 0
    assert matrix[True, False] == 0


@pytest.mark.parametrize(
    "case", [c for c in HEALTHY if c.fast and c.dtype is torch.float16], ids=lambda case: case.name
)
def test_no_healthy_run_is_accused(case, tokenizer_folder):
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        assert measure_headroom(pipe, list(case.prompts), **pipe_kwargs).predict("float16") == []


def test_the_step_is_told(tiny_pipe):
    pipe_kwargs = both(with_ddim(), scale_inside("unet.up_blocks.1.resnets.0", 43200.0))(tiny_pipe)
    tiny_pipe.to(torch.float16)
    headroom = measure_headroom(tiny_pipe, "a shoe", **pipe_kwargs)
    frame = headroom.to_frame()
    frame = frame[frame["module"] == "unet.up_blocks.1.resnets.0.conv1"]
    assert frame["step"].tolist() == list(range(6))
    assert (frame["float16_bits"] < 0).tolist()[:3] == [False, False, True]


def test_a_pipeline_holds_the_very_tensors_it_had(tiny_pipe):
    tiny_pipe.to(torch.float16)
    before = {name: p.data_ptr() for name, p in tiny_pipe.unet.named_parameters()}
    hooks = len(tiny_pipe.unet._forward_hooks), len(tiny_pipe.unet._forward_pre_hooks)
    headroom = measure_headroom(tiny_pipe, ["a shoe", "a boot"], **RUN)
    after = {name: p.data_ptr() for name, p in tiny_pipe.unet.named_parameters()}
    assert before == after and tiny_pipe.unet.dtype is torch.float16
    assert (len(tiny_pipe.unet._forward_hooks), len(tiny_pipe.unet._forward_pre_hooks)) == hooks
    assert headroom.prompts == ("a shoe", "a boot") and headroom.source == "2 prompts"


def test_what_is_measured_is_right(tiny_pipe):
    """The record of one convolution beside a hook on it."""
    seen = []
    handle = tiny_pipe.unet.conv_in.register_forward_hook(
        lambda module, args, output: seen.append(output.clone())
    )
    headroom = measure_headroom(tiny_pipe, "a shoe", **RUN)
    handle.remove()
    op = next(op for op in headroom.ops if op.module == "unet.conv_in")
    assert op.op == "aten.convolution.default" and op.steps == (0, 1, 2, 3)
    assert list(op.largest) == [float(output.abs().max()) for output in seen]


def test_the_share_that_flushes_is_measured(tiny_pipe):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.bias.zero_()
        tiny_pipe.unet.conv_in.weight *= 2.0**-26
    headroom = measure_headroom(tiny_pipe, "a shoe", **RUN)
    op = next(op for op in headroom.ops if op.module == "unet.conv_in")
    weight, inputs = tiny_pipe.unet.conv_in.weight, torch.randn(2, 4, 8, 8)
    expected = (torch.nn.functional.conv2d(inputs, weight, padding=1).abs() <= 2.0**-25).float()
    assert op.flushed_share[0] == pytest.approx(float(expected.mean()), abs=0.15)
    assert op.flushed_share[0] + op.subnormal_share[0] > 0.99


def test_bfloat16_loses_what_an_offset_leaves_no_room_for(tiny_pipe):
    """An offset that a norm takes away again: float32 and float16 are hardly touched."""
    pipe, resnet = tiny_pipe, tiny_pipe.unet.mid_block.resnets[0]
    inputs = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    embedding = torch.zeros(1, 128)
    with torch.no_grad():
        reference = resnet(inputs, embedding)
        assert (
            resnet.bfloat16()(inputs.bfloat16(), embedding.bfloat16()) - reference
        ).abs().max() < 0.05
        resnet.float().conv1.bias += 256.0
        lost = resnet.bfloat16()(inputs.bfloat16(), embedding.bfloat16()) - reference
        resnet.float()
    assert lost.abs().max() > 0.2
    headroom = measure_headroom(pipe, "a shoe", **RUN)
    modules = {module for module, _ in headroom.predict("bfloat16")}
    assert modules == {"unet.mid_block.resnets.0", "unet.mid_block.resnets.0.conv1"}
    assert headroom.predict("float16") == []


def test_it_survives_json_and_says_the_worst(tiny_pipe):
    scale_inside("unet.down_blocks.0.resnets.0", 2.0**17)(tiny_pipe)
    headroom = measure_headroom(tiny_pipe, "a shoe", **RUN)
    assert Headroom.from_json(headroom.to_json()) == headroom
    assert INNER in str(headroom) and "bits left in float16" in str(headroom)
    assert (INNER, "aten.convolution.default") in headroom.predict()
    with pytest.raises(AttributeError):
        headroom.seed = 1
    with pytest.raises(ValidationError, match='expected "float16" or "bfloat16"'):
        headroom.predict("float8")


def test_a_weight_that_float16_cannot_hold_is_predicted(tiny_pipe):
    set_weight("unet.up_blocks.0.resnets.1.conv2", 70000.0)(tiny_pipe)
    headroom = measure_headroom(tiny_pipe, "a shoe", **RUN)
    assert headroom.overflowing_weights == ("unet.up_blocks.0.resnets.1.conv2.weight",)
    assert headroom.predict()[0] == ("unet.up_blocks.0.resnets.1.conv2", "weight")


def test_nan_in_the_calibration_run_names_its_place(tokenizer_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight *= 1e30  # norm2 squares it
    with pytest.raises(ValidationError, match=r"norm2 \(aten\.native_group_norm.* at step 0"):
        measure_headroom(pipe, "a shoe", **RUN)
    set_weight("unet.conv_in", NAN)(pipe)
    with pytest.raises(ValidationError, match=r"unet\.conv_in\.weight .*holds NaN or Inf"):
        measure_headroom(pipe, "a shoe", **RUN)
    with pytest.raises(ValidationError, match=r"prompts: got \[\], expected a prompt"):
        measure_headroom(pipe, [], **RUN)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (None, {}, "prompts: got None"),
        (["a", None], {}, r"prompts\[1\]: got None"),
        ("a", {"seed": "0"}, "seed: got '0'"),
        ("a", {"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ("a", {"guidance": 2}, "guidance: .*takes no such argument"),
        ("a", {"generator": None}, "generator: expected none"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_runs(tiny_pipe, prompts, options, said):
    for measure in (measure_headroom, partial(plan_precision, progress=False), climb):
        with pytest.raises(ValidationError, match=said):
            measure(tiny_pipe, prompts, **options)


def test_the_map_is_drawn(tiny_pipe):
    scale_inside("unet.mid_block.resnets.1", 2.0**17)(tiny_pipe)
    headroom = measure_headroom(tiny_pipe, "a shoe", **RUN)
    figure = plot_headroom(headroom)
    assert isinstance(figure, matplotlib.figure.Figure)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:3] == ["text encoder", "unet", "vae"]
    labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
    assert {"conv in", "down 0 resnet 0", "mid resnet 1", "up 1 attention 1"} <= set(labels)
    assert "1 of" in figure.get_suptitle()


def test_it_measures_the_bundled_model_under_emulation():
    pipe, _ = load_pipeline("mini", dtype="float16", backend="cpu", progress=False)
    pipe.set_progress_bar_config(disable=True)
    alone = measure_headroom(pipe, "black casual shoes", num_inference_steps=2)
    with float16_arithmetic():
        emulated = measure_headroom(pipe, "black casual shoes", num_inference_steps=2)
    assert alone == emulated and alone.predict() == []
