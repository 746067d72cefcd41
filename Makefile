# Each target sets up what it needs; `make train` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 WANDB_MODE=$${WANDB_MODE:-offline} $(VENV)/bin/python

.PHONY: train test test-slow test-slurm test-long test-all coverage lint docs nano setup

train: setup
	$(RUN) train.py experiment=dreamy_style

# Three workers keep two cores busy: some tests wait for processes, disks and a browser.
PYTEST := $(RUN) -m pytest -n $${WORKERS:-3} --dist worksteal --durations=12

# The fast tests, in a few minutes.
test: setup
	$(PYTEST) -m "not slow and not long and not slurm and not gpu"

# The tests that `make test` leaves out: more kills, processes, modes and commands.
test-slow: setup
	$(PYTEST) -m "slow and not long and not slurm and not gpu"

test-all: test test-slow test-slurm

# Over a thousand commands and files that go wrong, and half an hour of fuzzing for each reader of strangers' files.
test-long: setup
	$(PYTEST) -m "long and not slurm and not gpu"
	for reader in lora shards recipes; do PYTHONPATH=tests $(RUN) tests/robustness/readers.py $$reader || exit 1; done

coverage: setup
	$(PYTEST) -m "not long and not slurm and not gpu" --cov --cov-report=term:skip-covered --cov-report=html

# Needs root and Debian's slurm-wlm and munge: emulates SLURM nodes on this machine, which end with the tests.
test-slurm: setup
	$(RUN) -m pytest tests/slurm

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The site of docs/ into site/, with reference pages from the docstrings.
docs: $(VENV)/ready_docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "open site/index.html"

# Trains the embedded model from nothing: minutes on a GPU, hours on two cores. A run that is stopped goes on with the
# same command.
nano: setup
	$(RUN) train.py experiment=nano_vae run_dir=runs/nano/vae resume=auto
	$(RUN) train.py experiment=nano_clip run_dir=runs/nano/clip resume=auto
	$(RUN) train.py experiment=nano_clip_watching run_dir=runs/nano/clip_watching resume=auto
	$(RUN) train.py experiment=nano_base run_dir=runs/nano/base resume=auto
	$(RUN) -m sdft.models.nano

setup: $(VENV)/ready

# torch comes first and pinned: a loose range pulls gigabytes of CUDA libraries that a laptop has no use for.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/ready_docs: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@
