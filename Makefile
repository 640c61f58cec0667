# Needs Python 3.11 or newer and make; everything else goes into .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
GOOD := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)
FOUND := $(if $(VERSION),Python $(VERSION),no Python that runs)

.PHONY: demo install test test-all lint format clean

# the model that comes with the package answers a question and draws what it finds
demo: $(VENV)/demo
	$(BIN)/python -m mlx_lfm2vl.generate --model demo --image examples/demo/picture.png \
		--prompt "What is in this image?"
	$(BIN)/python -m mlx_lfm2vl.detect --model demo --image examples/demo/picture.png \
		--query "yellow square" "green cross" --draw boxes.png
	$(BIN)/python -m mlx_lfm2vl.generate --model demo --image examples/demo/picture.png \
		--prompt "Record the picture as JSON."

# an environment of another Python is made anew
$(VENV)/python-$(VERSION):
	$(if $(GOOD),,$(error Python 3.11 or newer is needed and $(PYTHON) is $(FOUND); name another, as in: make PYTHON=python3.13))
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/demo: $(VENV)/python-$(VERSION) pyproject.toml
	@echo "Installing mlx_lfm2vl and its libraries into $(VENV), once; this can take some minutes."
	@$(PIP) -e .
	@touch $@

install: $(VENV)/installed

$(VENV)/installed: $(VENV)/python-$(VERSION) pyproject.toml
	@echo "Installing mlx_lfm2vl and what its tests need into $(VENV), once; this can take some minutes."
	@$(PIP) -e ".[test,heic]"
	@touch $@

test: install lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# the tests that take minutes, too
test-all: install lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
