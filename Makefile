# Needs Python 3.10 or newer and make; everything else goes into .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo install test lint format clean

# the model that comes with the package answers a question and draws what it finds
demo: $(VENV)/demo
	$(BIN)/python -m mlx_lfm2vl.generate --model demo --image examples/demo/picture.png \
		--prompt "What is in this image?"
	$(BIN)/python examples/demo/detect.py --image examples/demo/picture.png \
		--query "yellow square" "green cross" --output boxes.png

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test,heic]"
	touch $@

test: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
