# Every target works on a fresh clone with Python >= 3.11 and pip. pip's own settings (index, proxies) apply.
PYTHON ?= python3
DEMO_MINUTES ?= 3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long lint shape bench clean

# The package with its dev and plot extras, pinned by constraints.txt.
.venv: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("moesys needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev,plot]' || { rm -rf .venv; exit 1; }
	touch .venv

demo: .venv
	$(BIN)/python examples/demo.py --minutes $(DEMO_MINUTES)

test: .venv
	$(BIN)/python -m pytest -q -m "not long"

test-long: .venv
	$(BIN)/python -m pytest -q --hypothesis-profile=searching

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

# Lines, longest functions, widest signatures, repeated bodies and imports of each room.
shape: .venv
	$(BIN)/python tools/shape.py

bench: .venv
	$(PIP) --editable '.[dev,plot,bench]'
	status=0; for name in train_step moe_layer load offload; do \
	  $(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name-$$(date +%Y-%m-%d).json || status=1; \
	done; exit $$status

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
