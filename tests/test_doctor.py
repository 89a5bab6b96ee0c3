"""`sdkit doctor` as it is typed: a check-up, its cache, its advice, and never a traceback."""

import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdkit.cli import app
from sdkit.diagnosis import probe_cache
from sdkit.diagnosis.doctor import advise, check_up
from sdkit.diagnosis.doctor_text import format_checkup
from sdkit.diagnosis.known_faults import KNOWN_FAULTS, find_known_faults
from sdkit.diagnosis.probe_cache import find_cache_file, find_cached, save_cached
from sdkit.diagnosis.probes import PROBES, ProbeResult
from sdkit.emulate import EmulationWarning, mps

SECTIONS = ["Environment", "Device", "Probes", "Policy", "Known", "What to do"]
HEALTHY = {"torch": "2.13.0", "rosetta": False}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A check-up of this CPU, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return check_up("cpu")


def check_layout(text):
    lines = text.splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert [title.split(":")[0] for title in titles][:2] == ["Environment", "Device"]
    assert all(t.startswith(section) for t, section in zip(titles, SECTIONS, strict=True)), titles
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_a_healthy_machine_exits_with_0():
    result = run("--backend", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    check_layout(result.stdout)
    assert f"Probes: {len(PROBES)} pass (" in result.stdout
    assert all(f"  ok    {name} " in result.stdout for name in PROBES)
    assert f"  torch         {version('torch')}" in result.stdout
    assert result.stdout.endswith(
        f"nothing: all {len(PROBES)} contracts that could be tried hold\n"
    )


def test_an_emulated_fault_shows_what_a_faulty_mac_would_print(cache_folder):
    result = run("--emulate", "baddbmm-beta-zero")
    assert (result.exit_code, result.stderr) == (1, "")
    check_layout(result.stdout)
    for part in (
        "EMULATED on the CPU (memory=zeros, faults=baddbmm-beta-zero)",
        "2 fail (emulated: no seconds)", "  FAIL  baddbmm-beta-zero  ",
        "https://github.com/pytorch/pytorch/issues/187521", "Known of mps with torch",
    ):  # fmt: skip
        assert part in result.stdout
    assert not cache_folder.exists()


def test_several_faults_are_planted_together_and_json_tells_them():
    result = run("--json", "--emulate", "baddbmm-beta-zero", "--emulate", "lost-writes")
    content = json.loads(result.stdout)
    assert result.exit_code == 1
    assert set(content["planted"]) == {"baddbmm-beta-zero", "lost-writes"}
    assert {"baddbmm-beta-zero", "writes"} <= set(content["failed"])
    assert content["emulated"].startswith("emulated MPS")
    assert all(probe["seconds"] is None for probe in content["probes"])
    assert str(Path.home()) not in result.stdout and os.getcwd() not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emulate", "flaky"], "fault 'flaky': unknown. Expected some of baddbmm-beta-zero"),
        (["--backend", "tpu"], "backend='tpu': expected auto"),
        (["--backend", "cuda:99"], 'backend="cuda:99"'),
        (["--backend", "cuda", "--emulate", "lost-writes"], "an emulated Mac runs on the CPU"),
        (["--model", "no/where/at-all"], "no/where/at-all"),
        (["--sizes"], "No such option"),
    ],
)
def test_what_cannot_be_carried_out_exits_with_2(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_the_policy_is_that_of_the_model_asked_for():
    default, mini = (
        json.loads(run("--json", "--emulate", "lost-writes", *more).stdout)
        for more in ([], ["--model", "mini"])
    )
    assert (default["model"], mini["model"]) == ("Stable Diffusion 1.5", "mini")
    assert "about 6.4 GiB needed as float32" in default["dtype_reason"]
    assert "about 0.0 GiB" in mini["dtype_reason"] or "about 0.1 GiB" in mini["dtype_reason"]


def test_results_are_kept_and_fresh_ignores_them():
    first, second, third = check_up("cpu"), check_up("cpu"), check_up("cpu", fresh=True)
    assert (first.probes_date, third.probes_date) == (None, None)
    assert second.probes_date is not None and second.probes == first.probes
    assert f"kept from {second.probes_date}; --fresh runs them again" in format_checkup(second)
    (key,) = json.loads(find_cache_file().read_text())
    assert version("torch") in key and "device=cpu" in key and "thorough=False" in key
    assert [path.name for path in find_cache_file().parent.iterdir()] == ["probes.json"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{", b"3", b'{"key": 3}'])
def test_a_corrupt_cache_is_ignored_and_rewritten(content):
    results = (ProbeResult("cumsum", "fail", "off", {"a": 1}, {"a": 0}, 0.5),)
    find_cache_file().parent.mkdir(parents=True)
    find_cache_file().write_bytes(content)
    assert find_cached("key") is None
    save_cached("key", results)
    assert find_cached("key")[1] == results


@pytest.mark.parametrize("entry", [
    {"results": []}, {"date": "2026-01-01", "results": [{"name": "cumsum"}]},
    {"date": "2026-01-01", "results": [{"shoe": 1}]}, {"date": "2026-01-01", "results": 3},
    {"date": "2026-01-01", "results": [{"name": "gone", "status": "pass"}]},
])  # fmt: skip
def test_entries_that_are_not_results_are_ignored(entry):
    find_cache_file().parent.mkdir(parents=True)
    find_cache_file().write_text(json.dumps({"key": entry}))
    assert find_cached("key") is None


@pytest.mark.parametrize("name", ["probes/stale_memory.py", "../attention.py"])
def test_another_code_of_the_probes_is_another_key(name, tmp_path, monkeypatch):
    """The leaks of `baddbmm` are counted in sdkit/attention.py."""
    code = (Path(probe_cache.__file__).parent / name).resolve()
    changed = tmp_path / code.name
    changed.write_bytes(code.read_bytes() + b"# changed")
    key = probe_cache.make_key({}, thorough=False)
    paths = [changed if path.resolve() == code else path for path in probe_cache.PROBE_CODE]
    monkeypatch.setattr(probe_cache, "PROBE_CODE", paths)
    assert probe_cache.make_key({}, thorough=False) != key


def test_the_cache_stays_small():
    for number in range(20):
        save_cached(f"key {number}", ())
    assert len(json.loads(find_cache_file().read_text())) == 16
    assert find_cached("key 19") and not find_cached("key 0")


def test_a_cache_that_cannot_be_written_is_a_notice(cache_folder):
    cache_folder.write_text("a file in the way")
    result = run("--backend", "cpu")
    assert result.exit_code == 0
    assert "note  The results could not be kept for next time (" in result.stdout


def test_nothing_is_kept_under_an_emulation(cache_folder):
    with pytest.warns(EmulationWarning), mps(faults=("lost-writes",)):
        assert check_up("cpu").failed == ("writes",)
    assert not cache_folder.exists()


def test_what_cannot_run_says_why(healthy):
    missing = ProbeResult("cumsum", "not-runnable", "TypeError: BFloat16 is not supported on MPS")
    probes = (missing, *(result for result in healthy.probes if result.name != "cumsum"))
    text = format_checkup(replace(healthy, probes=probes))
    check_layout(text)
    assert f"Probes: {len(PROBES) - 1} pass, 1 cannot run (" in text
    assert "  n/a   cumsum" in text and "BFloat16 is not supported on MPS" in text


def test_a_translated_python_and_a_macs_environment_are_told(healthy):
    environment = healthy.environment | {
        "platform": "Darwin", "macos": "15.1", "chip": "Apple M2 Max", "rosetta": True,
        "PYTORCH_ENABLE_MPS_FALLBACK": "1", "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "0.0",
    }  # fmt: skip
    advice = advise((), (), environment)
    text = format_checkup(replace(healthy, environment=environment, advice=advice))
    check_layout(text)
    for part in ("macOS 15.1", "Apple M2 Max", "translated", "PYTORCH_ENABLE_MPS_FALLBACK=1"):
        assert part in text
    assert len(advice) == 3 and advice[0].startswith("Install a Python for arm64")


def fail(*names):
    return tuple(ProbeResult(name, "fail", "planted") for name in names)


def test_upgrading_torch_comes_first_where_that_is_known_to_cure():
    results = fail("baddbmm-beta-zero", "unscale-gradients", "linear-repeats")
    advice = advise(results, find_known_faults("mps", "2.13.0"), HEALTHY)
    assert advice[0].startswith("Upgrade torch to 2.14 or newer (pip install -U 'torch>=2.14')")
    assert advice[0].endswith("baddbmm-beta-zero, unscale-gradients.")
    assert 'attention="sdpa"' in advice[1]
    assert advice[-1].startswith("No cure is known for linear-repeats")
    later = advise(results, find_known_faults("mps", "2.14.0"), HEALTHY | {"torch": "2.14.0"})
    assert not any("Upgrade" in line for line in later)
    assert advise((), find_known_faults("mps", "2.13.0"), HEALTHY) == ()


@pytest.mark.parametrize(
    ("arguments", "words", "applies"),
    [
        (("mps", "2.7.1"), "baddbmm", True),
        (("mps", "2.13.0+git1"), "baddbmm", True),
        (("mps", "2.14.0"), "baddbmm", False),
        (("cuda", "2.7.1"), "baddbmm", False),
        (("mps", "2.12.1"), "non_blocking", True),
        (("mps", "2.13.0"), "non_blocking", False),
        (("mps", "2.7.1"), "zero: the loss stays flat", False),
        (("mps", "2.8.0"), "zero: the loss stays flat", True),
        (("mps", "2.14.0", "14.5"), "part-way", True),
        (("mps", "2.14.0", "14.4"), "part-way", False),
        (("mps", "2.14.0", None), "part-way", False),
        (("mps", "2.14.0", "13.6"), "bfloat16 before", True),
        (("mps", "2.14.0", "14.0"), "bfloat16 before", False),
        (("cuda", "2.14.0", None, "NVIDIA GeForce GTX 1660"), "GTX 16", True),
        (("cuda", "2.14.0", None, "NVIDIA H200"), "GTX 16", False),
    ],
)
def test_known_faults_apply_by_version(arguments, words, applies):
    names = ("device_type", "torch_version", "macos", "device_name")
    faults = find_known_faults(**dict(zip(names, arguments, strict=False)))
    assert any(words in fault.summary for fault in faults) == applies


def test_known_faults_are_documented_and_name_probes_that_exist():
    for fault in KNOWN_FAULTS:
        assert fault.summary.endswith(".") and fault.threads
        assert all(thread.startswith("https://github.com/") for thread in fault.threads)
        assert set(fault.probes) <= set(PROBES)
    assert find_known_faults("cpu", "2.7.1") == ()
