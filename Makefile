# make demo    an answer from the default model, then a comparison of seven recipes: report.html and report.json
# make test    lint, types and all tests that need no GPU
# make docs    the generated tables of README.md and docs/
# make clean   remove what the above made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Without an NVIDIA driver one version of PyTorch is pinned (its CPU build suffices: `PIP_INDEX_URL` or a wheel on disk
# can supply that); with a driver, the newest build that pip chooses, with the Triton that it brings.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

.PHONY: demo test docs clean

demo: $(VENV)/.installed
	$(BIN)/fewer models pull smollm2
	$(BIN)/fewer generate "Explain in three sentences why the sky is blue." --max-tokens 120
	$(BIN)/fewer compare --rounds 2 --html report.html --json-file report.json \
		--recipe "weights=dense" \
		--recipe "weights=int8" \
		--recipe "weights=int4" \
		--recipe "weights=auto" \
		--recipe "weights=auto decoding=prompt-lookup" \
		--recipe "weights=auto cache=sink-window:window=252" \
		--recipe "weights=int4 cache=sink-window:window=252 decoding=prompt-lookup"
	@echo "The page is report.html, its figures are in report.json."

test: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

docs: $(VENV)/.installed
	$(BIN)/python -m benchmarks.figures

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info report.html report.json
