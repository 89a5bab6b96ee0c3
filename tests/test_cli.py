"""`sdkit check` as it is typed: exit codes, one line a file, never a traceback."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdkit.cli import COMMANDS, app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path):
    """Good and bad images, in a folder and one below it, and a file that is no image."""
    random_pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    good = Image.fromarray(random_pixels)
    (tmp_path / "below").mkdir()
    good.save(tmp_path / "good.png")
    good.save(tmp_path / "below" / "GOOD.JPG", format="JPEG")
    Image.new("RGB", (32, 32)).save(tmp_path / "below" / "black.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.webp").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_one_line_a_file_and_a_summary(images):
    result = run("check", images)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[-1] == "5 checked, 3 bad"
    words = {os.path.relpath(line.split()[1], images): line.split()[0] for line in lines[:-1]}
    assert words == {
        "good.png": "ok",
        os.path.join("below", "GOOD.JPG"): "ok",
        os.path.join("below", "black.png"): "all-black",
        "cut.png": "truncated",
        "empty.webp": "empty-file",
    }
    assert len({line.index(str(images)) for line in lines[:-1]}) == 1  # aligned


def test_all_good_exits_with_0_and_files_count_once(images):
    result = run("check", images / "good.png", images / "below" / "GOOD.JPG", images / "good.png")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "2 checked, 0 bad")


def test_a_named_file_is_judged_whatever_its_ending(images):
    result = run("check", images / "notes.txt")
    assert result.exit_code == 1 and result.stdout.startswith("not-an-image")


def test_json(images):
    result = run("check", "--json", images / "good.png", images / "below" / "black.png")
    content = json.loads(result.stdout)
    assert (result.exit_code, content["checked"], content["bad"]) == (1, 2, 1)
    assert [image["problem"] for image in content["images"]] == [None, "all-black"]
    assert content["images"][1]["path"] == str(images / "below" / "black.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bare"], "bare: no image in this folder"),
        ([], "Missing argument"),
        (["--jsn", "x"], "No such option"),
    ],
)
def test_what_cannot_be_carried_out_exits_with_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    result = run("check", *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["check", "bare"], "no image in this folder"),
        (["check"], "Missing argument"),
        (["check", "--jsn", "x"], "No such option"),
        (["diagnose", "--incident", "nowhere"], "nowhere"),
        (["diagnose", "--dtype", "float17"], "float17"),
        (["diagnose", "--reproduction", "bare"], "bare: is a folder"),
        (["doctor", "--emulate", "nothing"], "nothing"),
        (["evaluate", "nowhere"], "nowhere"),
        (["fix", "nowhere/"], "nowhere"),
        (["prepare", "nowhere", "out"], "nowhere"),
        (["sweep", "nowhere.ipynb", "report_ablation"], "nowhere.ipynb: no such notebook"),
        (["train", "--rank", "0"], "rank"),
        (["train", "--resume", "bare"], "no training to resume there"),
    ],
    ids=" ".join,
)
def test_json_is_json_also_where_a_command_is_refused(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    result = run(*command, "--json")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in json.loads(result.stdout)["error"]
    assert message in result.stderr and run(*command).stdout == ""


def test_a_missing_file_is_a_bad_line_beside_the_others(images):
    result = run("check", images / "good.png", images / "no.png", images / "below" / "black.png")
    assert result.exit_code == 1
    words = [line.split()[0] for line in result.stdout.splitlines()]
    assert words == ["ok", "missing", "all-black", "3"]


def test_a_folder_that_cannot_be_searched_is_told_not_passed_over(images, monkeypatch):
    """Folders nested deeper than the system takes a path: also root may not search them."""
    monkeypatch.chdir(images)
    for _ in range(17):  # of 255 characters, where paths end at 4096
        os.mkdir("d" * 255)
        os.chdir("d" * 255)
    result = run("check", images)
    assert result.exit_code == 2
    assert "cannot be searched (File name too long)" in result.stderr


def test_names_that_no_encoding_knows_and_links_to_nowhere(images):
    """In a process of its own, for its output must pass a real, narrow stream."""
    strange = os.fsencode(images) + b"/line\nfeed \xff " + "黑.png".encode()
    os.link(images / "good.png", strange)
    os.symlink("nowhere", images / "link.png")
    command = [sys.executable, "-m", "sdkit", "check", strange, images / "link.png"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ok", "missing", "2"]


def test_the_list_of_commands_can_be_read_whole():
    listed = run("--help").stdout
    assert all(f"{name:<10}{summary}\n" in listed for name, summary in COMMANDS.items())


def test_every_command_has_json():
    for name in COMMANDS:
        assert "--json" in run(name, "--help").stdout, name


def test_help_and_check_do_not_wait_for_torch():
    code = (
        "import sys, sdkit.cli as c; from typer.testing import CliRunner as R; "
        "assert R().invoke(c.app, ['check', '--help']).exit_code == 0; "
        "R().invoke(c.app, ['check', sys.executable]); "
        "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['numpy']"


def test_demo_says_in_one_line_what_it_cannot_do(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run("demo", "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "file" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_diagnose_names_the_cause_proves_it_and_writes_the_reproduction(tiny_folder, tmp_path):
    script = tmp_path / "reproduction.py"
    options = ["--dtype", "float16", "--attention", "diffusers-sliced", "--steps", "2"]
    emulation = ["--memory", "nan", "--reproduction", str(script)]
    result = run("diagnose", "a shoe", "--model", str(tiny_folder), *options, *emulation)
    assert result.exit_code == 1, result.output
    assert "uninitialised-memory" in result.stdout and "yes: unet with SDPA" in result.stdout
    assert len(script.read_text().splitlines()) <= 30


def test_diagnose_exits_with_0_where_nothing_is_broken(tiny_folder):
    result = run("diagnose", "a", "--model", str(tiny_folder), "--steps", "2", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["cause"] == "healthy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory", "full"], "memory: got 'full'"),
        (["--emulate", "nobody"], "fault: got 'nobody'"),
        (["--model", "nowhere"], "nowhere"),
        (["--incident", "nowhere"], "nowhere"),
        (["a prompt", "--incident", "nowhere"], "brings its own prompt"),
        (["--dtype", "float12"], "float12"),
    ],
)
def test_diagnose_says_in_one_line_what_cannot_be(arguments, words):
    result = run("diagnose", *arguments)
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output


def test_an_error_nobody_foresaw_is_one_line_and_a_traceback_only_when_asked(monkeypatch, tmp_path):
    monkeypatch.setattr("sdkit.verdict.judge_image_file", lambda path: 1 / 0)
    (tmp_path / "a.png").touch()
    result = run("check", tmp_path / "a.png")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "unexpected ZeroDivisionError: division by zero (say --debug for the traceback)"
    ]
    file = tmp_path / "a.png"
    for arguments in (["--debug", "check", file], ["check", file, "--debug"]):
        assert isinstance(run(*arguments).exception, ZeroDivisionError)


def test_a_file_may_be_called_debug():
    result = run("check", "--", "--debug")
    assert result.exit_code == 1
    assert "--debug" in result.stdout


def test_ctrl_c_ends_with_its_own_code(monkeypatch, tmp_path):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdkit.verdict.judge_image_file", interrupt)
    (tmp_path / "a.png").touch()
    assert run("check", tmp_path / "a.png").exit_code == 130
