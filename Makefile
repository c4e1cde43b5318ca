# The two commands of a new user are `make demo` and `make test`; each sets itself up, and is fast when run again.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint format setup clean

demo: $(INSTALLED)
	$(BIN)/lorafit demo -o runs/demo

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist worksteal --durations 10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lorafit needs Python 3.11 or newer, got $$($(PYTHON) --version). Run: make PYTHON=/path/to/python3.11 setup"; exit 2; }
	@$(PYTHON) -m venv .venv || \
		{ echo "python3 cannot make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv"; exit 2; }
	@echo "installing into .venv; this takes a few minutes, once"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	@touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
