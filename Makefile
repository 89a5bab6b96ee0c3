# make demo   the whole story on the bundled model, into runs/demo/
# make test   lint and tests            make test-all   long campaigns too
# make bench  one table of benchmarks   make figures    the demo's figures, for the README
# make clean  forget .venv and runs/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo figures test test-all bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/sdkit demo --output runs/demo

figures: demo
	cp runs/demo/*/figures/*.png runs/demo/*/figures/*.csv figures/

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -rs -n auto --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -rs -n auto --dist loadfile --no-loadscope-reorder -m ""

bench: $(VENV)/installed-test
	$(BIN)/python tests/benchmarks/run.py

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "sdkit needs Python 3.11 or newer, and '$(PYTHON)' is not on the PATH: install it, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sdkit needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version): say make PYTHON=python3.12, or install a newer one"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "this Python cannot make virtual environments: install its venv package (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(BIN)/python -m pip install -q -c constraints.txt -e . || { echo "the installation failed: the lines above name the package; a package index (PyPI or a mirror set in pip's configuration) must be reachable"; exit 1; }
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]" || { echo "the installation of the test tools failed: the lines above name the package"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) runs
