"""Attention that reads uninitialised memory: found by its code, refused where it harms."""

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.pipelines.kolors.text_encoder import CoreAttention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel

import sdkit
from sdkit.attention import (
    allow_unsafe_attention,
    collect_names,
    find_baddbmm_problem,
    find_unsafe_processors,
    refuse_unsafe_attention,
)
from sdkit.emulate import FAULTS, mps
from sdkit.validation import ValidationError

pytestmark = pytest.mark.filterwarnings("ignore::sdkit.emulate.EmulationWarning")
REFUSAL = "baddbmm with beta=0 reads the input that it must ignore"


class FaultyBackend(TorchDispatchMode):
    """A backend with the fault that is no emulation to sdkit, as a real device is none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def compute(func, args, kwargs):
            return func(*args, **kwargs)

        fault = FAULTS["baddbmm-beta-zero"]
        is_struck = str(func.overloadpacket) in fault.ops
        return (fault.apply if is_struck else lambda *call: call[-1](*call[:3]))(
            func, args, kwargs or {}, compute
        )


class InheritedProcessor(AttnProcessor):
    """Unsafe through its parent's code."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class HelpedProcessor:
    """Unsafe through a method, and a function of this module."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.attend(attn, hidden_states)

    def attend(self, attn, hidden_states):
        return multiply_into_nothing(hidden_states)


def multiply_into_nothing(tokens):
    buffer = torch.empty(len(tokens), tokens.shape[1], tokens.shape[1], dtype=tokens.dtype)
    return torch.baddbmm(buffer, tokens, tokens.mT, beta=0)


class CarefulProcessor:
    """Safe: it multiplies into zeros."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        zeros = torch.zeros(1, 1, 1, dtype=hidden_states.dtype)
        return torch.baddbmm(zeros, hidden_states, hidden_states.mT, beta=0)


class OverridingProcessor(AttnProcessor):
    """Safe: its parent's code never runs."""

    def __call__(self, attn, hidden_states, **kwargs):
        return AttnProcessor2_0()(attn, hidden_states, **kwargs)


UNSAFE = [
    AttnProcessor(), SlicedAttnProcessor(1), CustomDiffusionAttnProcessor(hidden_size=32),
    IPAdapterAttnProcessor(32, 32), InheritedProcessor(), HelpedProcessor(),
]  # fmt: skip
SAFE = [
    AttnProcessor2_0(), IPAdapterAttnProcessor2_0(32, 32), CarefulProcessor(),
    OverridingProcessor(),
]  # fmt: skip


def get_class_name(processor):
    return type(processor).__name__


@pytest.mark.parametrize("processor", UNSAFE, ids=get_class_name)
def test_unsafe_processors_are_found_by_what_their_code_reaches(tiny_pipe, processor):
    attention = tiny_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.set_processor(processor)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert find_unsafe_processors(tiny_pipe) == {path: type(processor).__name__}


@pytest.mark.parametrize("processor", SAFE, ids=get_class_name)
def test_safe_processors_are_left_alone(tiny_pipe, processor):
    tiny_pipe.unet.set_attn_processor(processor)
    assert find_unsafe_processors(tiny_pipe) == {}


def test_slicing_and_the_default_processor_are_found_and_undone(tiny_pipe):
    count = len(tiny_pipe.unet.attn_processors)
    assert find_unsafe_processors(tiny_pipe) == {}
    tiny_pipe.enable_attention_slicing("max")
    assert list(find_unsafe_processors(tiny_pipe).values()) == ["SlicedAttnProcessor"] * count
    tiny_pipe.disable_attention_slicing()
    assert find_unsafe_processors(tiny_pipe) == {}
    tiny_pipe.unet.set_default_attn_processor()
    assert list(find_unsafe_processors(tiny_pipe).values()) == ["AttnProcessor"] * count


def test_all_components_are_searched_compiled_ones_too(tiny_pipe):
    tiny_pipe.vae.set_default_attn_processor()
    tiny_pipe.unet = torch.compile(tiny_pipe.unet)
    tiny_pipe.unet.set_attn_processor(AttnProcessor())
    paths = list(find_unsafe_processors(tiny_pipe))
    assert {path.split(".")[0] for path in paths} == {"unet", "vae"}
    assert not any("_orig_mod" in path for path in paths)


def test_layers_without_a_processor_are_found_too():
    """diffusers#14624: the text encoder of Kolors does the same in its own forward."""
    assert {"baddbmm", "empty"} <= collect_names(CoreAttention, "forward")
    assert not {"baddbmm", "empty"} <= collect_names(CLIPTextModel, "forward")


def test_baddbmm_is_asked_on_the_device():
    assert find_baddbmm_problem("cpu") is None
    with mps(faults=()):
        assert find_baddbmm_problem("cpu") is None
    with mps():
        assert find_baddbmm_problem("cpu") == f"{REFUSAL} (float16, bfloat16, float32)"


def test_the_refusal_names_processors_reason_and_ways_out(tiny_pipe):
    refuse_unsafe_attention(tiny_pipe, "cpu")
    tiny_pipe.enable_attention_slicing("max")
    refuse_unsafe_attention(tiny_pipe, "cpu")  # honest here
    with FaultyBackend(), pytest.raises(ValidationError) as caught:
        refuse_unsafe_attention(tiny_pipe, "cpu")
    message = str(caught.value)
    for part in (
        "SlicedAttnProcessor (unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1 and",
        REFUSAL, 'attention="sdpa"', "set_attn_processor(AttnProcessor2_0())", "torch >= 2.14",
    ):  # fmt: skip
        assert part in message


def test_the_ways_out_are_accepted(tiny_pipe):
    tiny_pipe.enable_attention_slicing("max")
    with FaultyBackend():
        with allow_unsafe_attention():
            refuse_unsafe_attention(tiny_pipe, "cpu")
        tiny_pipe.unet.set_attn_processor(AttnProcessor2_0())
        refuse_unsafe_attention(tiny_pipe, "cpu")
        assert sdkit.generate(tiny_pipe, "a", num_inference_steps=1, progress=False).complete


def test_generate_refuses_before_anything_runs(tiny_pipe, tmp_path):
    tiny_pipe.unet.set_default_attn_processor()
    with FaultyBackend(), pytest.raises(ValidationError, match=REFUSAL):
        sdkit.generate(tiny_pipe, "a", output_folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_load_pipeline_refuses_slicing_and_nothing_else(tiny_folder):
    with FaultyBackend():
        with pytest.raises(ValidationError, match=f'attention="diffusers-sliced": .*{REFUSAL}'):
            sdkit.load_pipeline(tiny_folder, backend="cpu", attention="diffusers-sliced")
        with allow_unsafe_attention():
            sdkit.load_pipeline(tiny_folder, backend="cpu", attention="diffusers-sliced")
        sdkit.load_pipeline(tiny_folder, backend="cpu")


def test_an_emulation_shows_the_fault_instead(tiny_pipe):
    tiny_pipe.enable_attention_slicing("max")
    with mps("nan"), pytest.raises(ValidationError, match="NaN"):
        sdkit.generate(tiny_pipe, "a", num_inference_steps=1, progress=False)
