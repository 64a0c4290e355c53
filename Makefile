# d3etr. Everything happens in the environment .venv, which the first command makes.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
TEACHER ?= shipped
SEED ?= $(shell date +%s)
RUN = .venv/bin/python
STAMP = .venv/.installed

.PHONY: help demo test fuzz bench docs lint environment force
.DEFAULT_GOAL = help

help:
	@echo "make demo    distil a small detector on the embedded data and compare (10 minutes on two cores)"
	@echo "             TEACHER=train trains the teacher too instead of using the shipped one"
	@echo "make test    every test"
	@echo "make fuzz    5,000 changed files and arguments, others at each call (SEED=N: the same again)"
	@echo "make bench   every benchmark, side by side, as ratios (half an hour or more on two cores)"
	@echo "make docs    the documentation and the Python API as a site, in build/site"
	@echo "make lint    ruff, ruff format and mypy"

demo: $(STAMP)
	@$(RUN) -m d3etr demo --teacher $(TEACHER)

test: $(STAMP)
	@.ci/chromium
	@$(RUN) -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 25

fuzz: $(STAMP)
	@D3ETR_FUZZ=5000 D3ETR_FUZZ_SEED=$(SEED) $(RUN) -m pytest tests/cli/test_fuzz.py

bench: $(STAMP)
	@PYTHONPATH=tests $(RUN) -m benchmarks $(BENCHMARKS)

docs: $(STAMP)
	@$(RUN) -c 'import material, mkdocstrings' 2>/dev/null || \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "build/site/index.html; with search: $(RUN) -m http.server --directory build/site"

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict

environment: $(STAMP)

# The stamp holds the folder's name: an environment that was moved is installed again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): force
endif

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "d3etr needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | tail -n 1)"; \
	  echo "Name another one, for example: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 1; }
	@test -x $(RUN) || { echo "Making the environment .venv with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv .venv; }
	@echo "Installing d3etr and its tested dependencies into .venv (minutes the first time)"
	@$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]" \
	    >.venv/install.log 2>&1 & pid=$$!; trap 'kill $$pid; exit 130' INT TERM; \
	  while kill -0 $$pid 2>/dev/null; do printf .; sleep 2; done; echo; \
	  wait $$pid || { tail -n 20 .venv/install.log; echo "Installing failed; all of it: .venv/install.log"; exit 1; }
	@printf '%s' "$(CURDIR)" >$(STAMP)
	@echo "Installed."
