# Every target does all of its own set-up: a virtual environment with pinned dependencies in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where PyTorch's builds for the CPU are, as PyTorch's installation page says; empty: whatever pip's own index has.
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help serve test check check-fast bench gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Exeunt needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=/path/to/python3.11." >&2; exit 2; }
	@echo "Installing PyTorch and the rest into $(VENV): some minutes and up to 6 GB, once." >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) --no-deps) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hub]'
	@touch $@

serve: $(STAMP) ## calibrate the packaged model on first use, then serve it on http://127.0.0.1:8000
	$(BIN)/exeunt serve

test: $(STAMP) ## run the test suite
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(STAMP) ## format, lint, types, tests, README commands
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

check-fast: $(STAMP) ## format, lint and types only
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check fast

bench: $(STAMP) ## measure the packaged model beside transformers, the parts of a step, exits by mode; JSON in benchmarks/results/
	$(BIN)/python -m scripts.bench
	$(BIN)/python -m scripts.bench_parts
	$(BIN)/python -m scripts.bench_adaptive
	$(BIN)/python -m scripts.bench_whole
	$(BIN)/python -m scripts.bench_gaps
	$(BIN)/python -m scripts.bench_server

gpu-check: ## on a machine with a CUDA GPU: answers, tests and speeds in eight minutes; JSON, offline where PYTHON has it all
	@if test ! -e $(STAMP) && $(PYTHON) -m scripts.gpu_check.needs 2>/dev/null; \
	then $(PYTHON) -m scripts.gpu_check; else $(MAKE) $(STAMP) && $(BIN)/python -m scripts.gpu_check; fi

clean: ## remove the virtual environment, caches and build leftovers (no bundle)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
