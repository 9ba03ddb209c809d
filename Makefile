# Two commands for a fresh machine with Python 3.11 or newer:
#   make quickstart   install into .venv, then the whole line on a CPU: recipe to a low-bit model and its report
#   make test         install into .venv, then the test suite
# and for who changes the code:
#   make lint         ruff, the floors of the house, types, the pages
#   make docs         write what the pages say of the code anew: the map, the picture, the tables
#   make coverage     the same test suite, its lines counted: under 90 % it fails. Every night and before a release
# Installing happens once: .venv/installed is the stamp, renewed when pyproject.toml or constraints.txt changes.
# PYTHON=... chooses the interpreter, VENV=... the folder, WORKERS=... the test processes, ARGS=... goes to pytest.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
MARKDOWN = README.md CHANGELOG.md CONTRIBUTING.md docs kernels/README.md recipes/assets/README.md benchmarks/data/README.md

.PHONY: quickstart test coverage lint docs install clean

quickstart: $(VENV)/installed
	$(VENV)/bin/lowbit-ft run recipes/quickstart.yaml

# One thread per worker: the machines we test on have as many cores as workers, and a fixed thread count
# keeps sums in one order. worksteal: a worker takes half of the list, so that what a file's tests share is made
# once; in pytest-xdist's own order the last files are dealt out by twos, and made in each worker.
SUITE = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/installed
	$(SUITE) $(ARGS)

# A quarter to a third more processor time than `test` (LOG.md).
coverage: $(VENV)/installed
	$(SUITE) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90 $(ARGS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pymarkdown scan $(MARKDOWN)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# What the tests hold the pages to. The table of docs/models.md takes many minutes: python -m benchmarks.support_matrix.
docs: $(VENV)/installed
	$(VENV)/bin/python docs/draw_house.py
	$(VENV)/bin/python docs/write_pages.py
	$(VENV)/bin/python -m benchmarks.data_table
	$(VENV)/bin/python -m benchmarks.format_table
	$(VENV)/bin/python -m benchmarks.plan_targets --write
	$(VENV)/bin/python -m benchmarks.peers_table

install: $(VENV)/installed

# torch goes first and alone, at the tested version, so that no other package can pull a different one.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "lowbit-ft needs Python 3.11 or newer; none of python3.11 ... python3 is. Install one, or: make PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV) with $(PYTHON) (torch, transformers, ...: some minutes the first time)"
	@start=$$(date +%s) && \
	$(PYTHON) -m venv $(VENV) && \
	echo "  1 of 2: torch (some hundred MB)" && \
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 && \
	echo "  2 of 2: lowbit-ft and what it needs (transformers, datasets, the tools of the tests)" && \
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' && \
	touch $@ && \
	echo "installed in $$(( $$(date +%s) - start )) seconds"

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .coverage
