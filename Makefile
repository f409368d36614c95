# Everything runs in .venv, which the first target that needs it makes, and makes anew when pyproject.toml or
# constraints.txt change. Options of a command go into ARGS: make train ARGS="--train.steps 500".

VENV := .venv
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
UI_PORT ?= 5000
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
CHECK_PYTHON := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])

# A name on PATH is not yet a Python that starts (version managers leave such names), so each is tried.
PYTHON ?= $(shell for name in python3.11 python3.12 python3 python; do \
	if $$name -c '$(CHECK_PYTHON)' >/dev/null 2>&1; then command -v $$name; break; fi; done)

# Programs that a run starts (ray) are looked up on PATH, as in an activated environment.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PIP_INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train test test-long gpu gpu-cluster lint hooks docs ui clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-18s %s\n' "$$target" "$$text"; done

train: $(STAMP) ## Train on the embedded digits; run it again to resume
	@$(IN_VENV) $(VENV)/bin/python pipelines/train.py $(ARGS)

# Two files at a time, in the order of tests/conftest.py: most tests are of one thread. The slow ones start clusters that want the machine for themselves.
test: $(STAMP) ## Run the tests, but for the slow ones
	$(IN_VENV) $(VENV)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(STAMP) ## Run the slow tests
	$(IN_VENV) $(VENV)/bin/python -m pytest -m slow $(ARGS) || { code=$$?; test $$code -eq 5 || exit $$code; }

# Not in .venv, for the machine with the GPU may have no network to make it: in whatever Python has torch.
gpu: ## See on a GPU, in ten minutes, all that a CPU cannot show (GPU_PYTHON=python3; small on a CPU)
	@$(GPU_PYTHON) -m benchmarks.gpu_day $(ARGS)

gpu-cluster: ## The same for what needs DeepSpeed and Ray
	@$(GPU_PYTHON) -m benchmarks.gpu_day --cluster $(ARGS)

lint: $(STAMP) ## Check style, formatting, types and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(IN_VENV) $(VENV)/bin/pyright
	$(VENV)/bin/lint-imports --no-logo

hooks: $(STAMP) ## Let git check style and formatting before each commit
	$(IN_VENV) $(VENV)/bin/pre-commit install

docs: $(DOCS_STAMP) ## Build the documentation site into build/docs/site
	@$(VENV)/bin/python docs/build_site.py build/docs

# The store is named from here, for a directory's name may hold what an address must not. Nobody uploads anything.
ui: runs/mlflow.db $(STAMP) ## Serve the MLflow UI of runs/ on this machine only (UI_PORT=5000)
	@echo "MLflow UI: http://127.0.0.1:$(UI_PORT) (Ctrl-C ends it)"
	@$(IN_VENV) MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(VENV)/bin/mlflow server \
		--host 127.0.0.1 --port $(UI_PORT) --allowed-hosts "127.0.0.1:$(UI_PORT),localhost:$(UI_PORT)" --workers 1 \
		--backend-store-uri sqlite:///runs/mlflow.db --no-serve-artifacts

runs/mlflow.db:
	@echo "There is no run to show yet: runs/mlflow.db does not exist. Start one with: make train" >&2; exit 1

clean: ## Remove the environment, caches and build products; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: with its version settled, the index of the machine decides between the CPU and the CUDA
# build once, and nothing that is installed after it can ask for another.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "eqm-dist needs Python 3.11 or 3.12 with the venv module, and none was found on" \
		"PATH. Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)' || { echo "eqm-dist needs Python 3.11 or 3.12 with the venv module, got" \
		"PYTHON=$(PYTHON). Name another: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into $(VENV) with $(PYTHON): once, a few minutes."
	@$(VENV)/bin/python -c 'import pip; $(CHECK_PYTHON)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

# The generator of the site is no part of the development environment: only make docs needs it.
$(DOCS_STAMP): $(STAMP)
	$(PIP_INSTALL) --quiet --editable '.[dev,docs]'
	@touch $@
