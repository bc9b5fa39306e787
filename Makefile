# Two commands do all the set-up: `make demo` and `make test`, on a bare machine with Python 3.11 or later.

PYTHON ?= python3
LEASE ?= build/lease
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-deep test-ranks test-rest sshd slurm bench bench-gpu bench-gpu-long docs lint clean

demo: $(VENV)/.examples
	$(BIN)/python -m examples.demo

test: $(VENV)/.test
	$(MAKE) --no-print-directory --jobs 3 lint test-ranks test-rest

# All of it, with 20,000 changed inputs for the readers in the place of 1,500.
test-deep: export ZGRAPH_DEEP = 1
test-deep: test

# What runs on several ranks often waits, for the network or for what it kills: the rest fills the time. Kernels,
# numbers, passes and certificates go with it so that both take about as long.
# Each op runs on one thread, for the halves share the cores.
test-ranks test-rest: export OMP_NUM_THREADS = 1
WITH_RANKS := $(addprefix tests/,distributed interp kernels passes rules trust)
test-ranks: $(VENV)/.test
	$(BIN)/python -m pytest $(WITH_RANKS)

test-rest: $(VENV)/.test $(VENV)/.chromium $(VENV)/.compiler
	$(BIN)/python -m pytest tests $(addprefix --ignore ,$(WITH_RANKS))

# Debian's sshd and SLURM's controller, for tests of `zgraph launch` that `make test-deep` runs where they are.
sshd:
	test -x /usr/sbin/sshd || { apt-get update && apt-get install --yes --no-install-recommends openssh-server; }

slurm:
	command -v slurmctld || { apt-get update && apt-get install --yes --no-install-recommends slurmctld slurm-client; }

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.steps

# The pages of docs/ and the API reference, in build/docs. A broken link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# With the torch of the GPU's machine: nothing is installed, PYTHON says which Python has it. At most nine minutes; the
# second, which compares more and checks less, takes an hour.
bench-gpu:
	$(PYTHON) -m benchmarks.lease --out $(LEASE)

bench-gpu-long:
	$(PYTHON) -m benchmarks.gpu --json benchmarks/results/gpu.json

# Each extra is a stamp in the virtual environment, renewed when what it installs changes.
$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit("zgraph needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.examples: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[examples]'
	touch $@

$(VENV)/.test: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[test,lint,examples]'
	touch $@

# Debian's Chromium, for the tests of the report; without it, and without the right to install it, they are skipped.
$(VENV)/.chromium: $(VENV)/.python
	command -v chromium || { apt-get update && apt-get install --yes --no-install-recommends chromium; } || \
		echo "no chromium: the tests of the HTML report are skipped"
	touch $@

# A C++ compiler, for the tests on an emulated GPU; without it, and without the right to install it, they are skipped.
$(VENV)/.compiler: $(VENV)/.python
	command -v g++ || { apt-get update && apt-get install --yes --no-install-recommends g++; } || \
		echo "no g++: the tests on an emulated GPU are skipped"
	touch $@

$(VENV)/.bench: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
