"""The views read what is stored, move with their controls, and say what they do not have."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_pipelines import build_tiny_pipe

from sdkit import (
    RunRecord,
    ValidationError,
    compare_runs,
    diagnose,
    explore_run,
    generate,
    measure_headroom,
)  # fmt: skip
from sdkit.exploration.evidence import draw_line
from sdkit.exploration.material import make_steps
from sdkit.exploration.network_map import NAN_COLOUR, NetworkMap

FAST = {"num_inference_steps": 4, "guidance_scale": 2, "progress": False}
SPOILT = "unet.mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def runs(tokenizer_folder, tmp_path_factory):
    """A healthy run of two images, and one whose third step is spoilt in the middle of the UNet."""
    folder = tmp_path_factory.mktemp("runs")
    pipe = build_tiny_pipe(tokenizer_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generate(pipe, ["a", "<b>b</b>"], output_folder=folder / "good", record_steps=True, **FAST)
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 3 else output

    pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(spoil)
    generate(
        pipe, ["a", "<b>b</b>"], output_folder=folder / "bad", record_steps=True, batch_size=2,
        on_nonfinite="skip", **FAST,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def diagnosis(tokenizer_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.nan
    return diagnose(pipe, "a", num_inference_steps=2)


def test_the_slider_moves_what_is_seen(runs):
    view = explore_run(runs / "good")
    assert (view.step.min, view.step.max, view.step.value) == (0, 3, 3)
    seen = set()
    for step in range(4):
        view.step.value = step
        assert f"after step {step}" in view.forming.value
        seen.add((view.forming.value, view.marker.value))
    assert len(seen) == 4
    assert "linear reading" in view.forming.value and "finished: valid" in view.finished.value
    assert "No NaN and no Inf" in view.told.value


def test_a_click_and_the_list_choose_the_same(runs):
    view = explore_run(runs / "good")
    columns = len(view.map.steps.modules)
    view.click.value = f"{(17 + 0.5) / columns} 0.3 1.0"
    assert (view.step.value, view.module.value) == (1, 17)
    clicked = view.evidence.value
    assert view.map.steps.modules[17] in clicked and "bits left" in clicked
    view.module.value = 18
    assert view.evidence.value != clicked
    view.module.value = 17
    assert view.evidence.value == clicked
    for nonsense in ("", "a b c", "1", "nan nan 1", "1e400 1 1"):
        view.click.value = nonsense
        assert (view.step.value, view.module.value) == (1, 17)
    view.click.value = "5 -5 1"
    assert (view.step.value, view.module.value) == (0, columns - 1)


def test_where_nan_starts_is_shown_and_reached(runs):
    view = explore_run(runs / "bad")
    first = view.map.steps.first_bad
    assert (first[0], view.map.steps.modules[first[1]]) == (2, SPOILT)
    assert (view.step.value, view.module.value) == first
    assert f"at step 2, in <b>{SPOILT}</b>" in view.told.value
    assert "are NaN" in view.evidence.value
    view.click.value = "0 0 1"
    view.first.click()
    assert (view.step.value, view.module.value) == first
    pixels = np.asarray(view.map.draw())
    colour = tuple(bytes.fromhex(NAN_COLOUR[1:]))
    assert tuple(pixels[first][:3]) == colour
    assert not (pixels[:2, :, :3] == colour).all(axis=2)[:, ~view.map.steps.runs_once].any()
    assert ">nan<" in view.finished.value


def test_modules_are_found_by_name_and_by_state(runs):
    view = explore_run(runs / "bad")
    view.find.value = "nan MID_BLOCK"
    labels = [label for label, _ in view.module.options]
    assert labels and all("mid_block" in label and "NaN from" in label for label in labels)
    assert f"NaN from 2 · {SPOILT}" in labels
    view.find.value = "no such thing"
    assert view.module.value == -1 and view.evidence.value == ""
    view.click.value = "0.5 0.5 9"
    assert view.find.value == "" and view.module.value >= 0


def test_another_dtype_and_another_image_draw_another_view(runs):
    view = explore_run(runs / "good")
    drawn, legend = view.drawn.value, view.legend.value
    view.step.value = 1
    view.dtype.value = "bfloat16"
    assert view.drawn.value != drawn and view.legend.value != legend
    assert view.step.value == 1
    forming = view.forming.value
    view.picture.value = 1
    assert view.forming.value != forming


def test_every_form_of_a_record_is_read(runs, tmp_path):
    path = runs / "bad" / "record.json"
    record = RunRecord.load(path)
    for source in (record, path.parent, str(path.parent), path, str(path)):
        assert explore_run(source).account == explore_run(path).account
    alone = explore_run(path.read_text())
    assert "not recorded" in repr(alone) and "unet" in alone.told.value
    assert "NaN or Inf starts at step 2, in <b>unet</b>" in alone.told.value
    moved = explore_run(replace(record, folder=tmp_path))
    assert "not recorded" in moved.told.value


def test_images_beside_which_nothing_is_kept_are_said_to_be_missing(runs, tmp_path):
    (tmp_path / "record.json").write_bytes((runs / "good" / "record.json").read_bytes())
    view = explore_run(tmp_path)
    assert "images [0, 1] are not beside the record" in view.told.value
    assert "not kept" in view.finished.value


def test_a_diagnosis_is_read_with_its_op(diagnosis, runs):
    for source in (diagnosis, diagnosis.to_json()):
        view = explore_run(source)
        assert view.map.steps.modules[view.module.value] == SPOILT
        assert "non-finite-weights" in repr(view) or diagnosis.cause in repr(view)
        assert diagnosis.op in view.evidence.value and "weight" in view.evidence.value
        assert diagnosis.cause in view.told.value
    both = explore_run(runs / "bad", diagnosis=diagnosis)
    assert both.map.steps.modules[both.module.value] == SPOILT
    assert diagnosis.op in both.evidence.value and "after step" in both.forming.value
    record = RunRecord.load(runs / "bad" / "record.json")
    grafted = explore_run(replace(record, folder=None), diagnosis=diagnosis)
    assert diagnosis.op in grafted.evidence.value


@pytest.mark.parametrize(
    ("name", "value"), [("step", "2"), ("step", -1), ("module", 3), ("evidence", [])]
)
def test_a_damaged_diagnosis_is_refused(diagnosis, name, value):
    content = json.loads(diagnosis.to_json()) | {name: value}
    with pytest.raises(ValidationError, match=f"{name} is .*Expected what to_json wrote"):
        explore_run(json.dumps(content))


def test_only_modules_are_shown_as_modules(diagnosis):
    """Between two calls of a component it is the pipeline's own code that runs."""
    before = ("after unet: aten.mul.Tensor", "unet.conv_in: aten.convolution.default")
    view = explore_run(replace(diagnosis, bad_op=replace(diagnosis.bad_op, before=before)))
    assert view.map.steps.modules == ("unet.conv_in", SPOILT)


def test_an_op_that_no_module_ran_is_told_all_the_same(diagnosis):
    outside = replace(
        diagnosis, module=None, bad_op=replace(diagnosis.bad_op, module="", after="unet")
    )
    assert str(outside.bad_op.outputs[0]) in explore_run(outside).told.value


def test_another_run_is_no_diagnosis(runs):
    with pytest.raises(ValidationError, match="diagnosis: got a RunRecord, expected"):
        explore_run(runs / "bad", diagnosis=runs / "good")


def test_what_was_found_in_every_image_is_told_of_its_component(runs):
    view = explore_run(runs / "bad")
    view.module.value = view.map.steps.modules.index("unet")
    assert all(f"image {i}: unet" in view.evidence.value for i in (0, 1))


def test_a_line_of_zeros_can_be_drawn():
    """An output of zeros alone has room without end, which no picture has."""
    steps = make_steps((), ["unet.a"], 3)
    steps.largest[:, 0], steps.total[:] = (1, 0, 4), 1
    line = draw_line(NetworkMap.of(steps, "float16"), 0, 0)
    points = re.search('points="([^"]*)"', line)[1]
    assert len(points.split()) == 3 and "inf" not in points and "nan" not in points


def test_an_incident_shows_what_the_bad_call_was_given(runs):
    view = explore_run(runs / "bad" / "incident_000")
    assert "2048" in repr(view) or "are NaN" in repr(view)
    assert "latents after step" in view.forming.value
    assert explore_run(runs / "bad" / "incident_000" / "incident.json").account == view.account


def test_a_headroom_report_is_read(tiny_pipe):
    headroom = measure_headroom(tiny_pipe, "a", num_inference_steps=2)
    for source in (headroom, headroom.to_json()):
        view = explore_run(source)
        assert view.step.max == len(tiny_pipe.scheduler.timesteps) - 1
        module = view.map.steps.modules.index("unet.conv_in")
        view.module.value = module
        largest = max(op.largest_of_all for op in headroom.ops if op.module == "unet.conv_in")
        assert view.map.steps.largest[:, module].max() == np.float32(largest)
        assert "aten.convolution" in view.evidence.value


def test_a_run_in_memory_shows_its_latents(tiny_pipe):
    view = explore_run(generate(tiny_pipe, "a", **FAST))
    assert view.step.max == len(tiny_pipe.scheduler.timesteps) - 1 and view.map is None
    first = view.forming.value
    view.step.value = 0
    assert view.forming.value != first
    assert "record_steps=True" in repr(view)


@pytest.mark.parametrize(
    "source",
    [
        None,
        3,
        [],
        {},
        "",
        "no/such/path",
        b"x",
        "{}",
        "{",
        '{"ops": [], "overflowing_weights": {}}',
        '{"cause": 1, "stage": 2}',
    ],
)
def test_what_is_no_run_is_refused(source, tmp_path):
    with pytest.raises(ValidationError, match=r"(?i)expected"):
        explore_run(source)
    with pytest.raises(ValidationError, match=r"(?i)expected"):
        explore_run(tmp_path)


def test_a_damaged_run_is_refused(runs, tmp_path):
    text = (runs / "good" / "record.json").read_text()
    (tmp_path / "record.json").write_text(text[:100])
    with pytest.raises(ValidationError, match="record.json"):
        explore_run(tmp_path)
    content = json.loads(text)
    content["images"][1]["finding"] = {"component": "unet"}
    (tmp_path / "record.json").write_text(json.dumps(content))
    with pytest.raises(ValidationError, match="image 1: its finding lacks"):
        explore_run(tmp_path)
    content["images"][1]["finding"] = None
    for place, name in ((content, "dtypes"), (content["images"][0], "index")):
        kept, place[name] = place[name], "odd"
        (tmp_path / "record.json").write_text(json.dumps(content))
        with pytest.raises(ValidationError, match=f"{name} is 'odd', expected"):
            compare_runs([tmp_path])
        place[name] = kept
    content["images"][0]["path"] = "../../etc/passwd"
    (tmp_path / "record.json").write_text(json.dumps(content))
    assert "not kept" in explore_run(tmp_path).finished.value
    (tmp_path / "steps_000.npz").write_bytes(b"no archive")
    with pytest.raises(ValidationError, match="steps_000"):
        explore_run(tmp_path)
    assert "2 of 2" in repr(compare_runs([runs / "good", tmp_path]))  # which shows no steps


def test_words_of_others_are_shown_and_not_run(runs):
    view = explore_run(runs / "good")
    view.picture.value = 1
    assert "<b>b</b>" not in view.finished.value and "&lt;b&gt;" in view.finished.value
    compared = compare_runs({"<i>x</i>": runs / "good"})
    assert "<i>" not in compared.table.value and "<b>b" not in compared.table.value


def test_runs_are_compared_side_by_side(runs):
    good = RunRecord.load(runs / "good" / "record.json")
    view = compare_runs({"as it was": good, "spoilt": runs / "bad"})
    assert view.table.value.count("<img") == 2 and view.table.value.count('role="img"') == 2
    assert "2 of 2 images valid" in repr(view) and "spoilt: 0 of 2" in repr(view)
    assert view.table.value.count(">nan<") == 2
    view.side.value = 200
    assert "height:200px" in view.table.value
    same = compare_runs([good, runs / "good"])
    assert "0: good" in same.table.value and "1: good" in same.table.value
    same.shown.index = 1
    assert same.table.value.count("the same pixels") == 4


@pytest.mark.parametrize("records", [None, [], {}, "somewhere", 3, [None], ["no/such"], [[]]])
def test_what_is_no_list_of_runs_is_refused(records):
    with pytest.raises(ValidationError, match="records"):
        compare_runs(records)


def test_a_diagnosis_is_no_run_to_compare(diagnosis, runs):
    good = RunRecord.load(runs / "good" / "record.json")
    with pytest.raises(ValidationError, match=r"records\[1\]: got a Diagnosis"):
        compare_runs([good, diagnosis])
    with pytest.raises(ValidationError, match="expected a list"):
        compare_runs(good)


def test_a_page_without_widgets_still_shows_the_run(runs):
    bundle = explore_run(runs / "bad")._repr_mimebundle_()
    assert bundle["text/plain"].startswith("0 of 2 images valid")
    assert bundle["text/html"].count("<img") >= 2 and SPOILT in bundle["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_map_keeps_every_module_apart_and_each_cell_under_its_point():
    steps = make_steps((), [f"unet.m{i}" for i in range(1000)], 100)
    steps.largest[:] = 2.0 ** np.linspace(-3, 20, 1000)
    drawn = NetworkMap.of(steps, "float16")
    assert drawn.draw().size == (1000, 100) and "min-width:1000px" in drawn.box
    assert drawn.find_cell(0.5005, 0.999) == (99, 500)
    assert (drawn.bits[0, 0], drawn.bits[0, -1]) == pytest.approx((19, -4), abs=0.01)
