"""The names that others script against, the one list of dependencies, and what lies at the top."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import sdkit

ROOT = Path(__file__).parent.parent
PROMISED = {
    "load_pipeline", "LoadReport", "generate", "RunRecord", "guard", "check_finite", "check_image",
    "check_image_file", "validate_image_array", "ValidationError", "describe_environment",
    "run_probes", "measure_headroom", "rebalance", "amplify", "plan_precision",
    "predict_memory", "ImageCaptionDataset", "prepare_fashion_products", "LoRAConfig",
    "train_lora", "run_sweep", "load_results", "diagnose", "Diagnosis",
    "evaluate_lora",
}  # fmt: skip
TOP_LEVEL = {
    "notebooks", "sdkit", "tests", "figures", "environment.yml", "README.md", "pyproject.toml",
    "constraints.txt", "Makefile", "LICENSE", "CHANGELOG.md",
}  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def list_tracked(*folders):
    listing = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listing.stdout.splitlines()


def read_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_promised_names_are_there(name):
    assert getattr(sdkit, name).__name__ == name
    assert name in dir(sdkit)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        _ = sdkit.genrate


def test_import_is_light():
    heavy = "('torch', 'numpy', 'diffusers', 'PIL')"
    code = f"import sys, sdkit; print([name for name in {heavy} if name in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_no_module_bears_the_name_of_an_exported_name():
    # A command's file is named as what one types; nothing imports it but the command line.
    paths = [p for p in (ROOT / "sdkit").rglob("*.py") if p.parent.name != "commands"]
    modules = {path.stem for path in paths}
    assert not modules & PROMISED


def test_every_dependency_is_used():
    source = "\n".join(
        p.read_text() for p in [*ROOT.glob("sdkit/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    )
    imported_as = {"pillow": "PIL", "scikit-image": "skimage", "pyyaml": "yaml"}
    # JupyterLab and its kernel are run, not imported; accelerate is used by diffusers to load,
    # peft by diffusers for LoRA, pyarrow by pandas for parquet.
    run_not_imported = {
        "jupyterlab", "ipykernel", "ipywidgets", "accelerate", "peft", "pyarrow"
    }  # fmt: skip
    for line in PROJECT["dependencies"]:
        name = Requirement(line).name
        if name not in run_not_imported:
            assert (
                f"import {imported_as.get(name, name)}" in source
                or f"from {imported_as.get(name, name)}" in source
            ), name
    assert "torchvision" not in json.dumps(PROJECT)


def test_constraints_satisfy_pyproject_and_leave_a_mac_free():
    pins = {pin.name: pin for pin in read_constraints()}
    dependencies = [Requirement(line) for line in PROJECT["dependencies"]]
    assert dependencies
    for dependency in dependencies:
        pin = pins[dependency.name]
        version = next(iter(pin.specifier)).version
        assert dependency.specifier.contains(version), pin
        assert pin.marker.evaluate({"sys_platform": "linux"})
        assert not pin.marker.evaluate({"sys_platform": "darwin"})


def test_conda_environment_is_python_pip_and_the_package():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": ["-c constraints.txt", "-e ."]}


def test_top_level_holds_what_it_should():
    tracked = {path.split("/")[0] for path in list_tracked()}
    assert tracked
    assert {name for name in tracked if not name.startswith(".")} <= TOP_LEVEL


def test_a_wheel_holds_all_that_the_demo_needs(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(next(tmp_path.glob("sdkit-*.whl"))) as wheel:
        wheel.extractall(unpacked)
    for path in list_tracked("sdkit", "notebooks"):
        inside = path if path.startswith("sdkit/") else f"sdkit/{path}"
        assert (unpacked / inside).read_bytes() == (ROOT / path).read_bytes()
    assert not (unpacked / "tests").exists()
    code = "import sdkit.demo; print(*sdkit.demo.find_notebooks())"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, check=True
    )
    found = printed.stdout.split()
    assert found and all(path.startswith(str(unpacked)) for path in found)
