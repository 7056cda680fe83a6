# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11 or newer (with venv), make and git.

PYTHON ?= python3
VENV   ?= .venv
# Set TORCH= to what your machine should have. On Linux PyPI's wheels may bring CUDA with them, several gigabytes; a CPU build:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo TORCH=torch==2.13.0+cpu
TORCH  ?= torch==2.13.0
# The newest that the package admits, unless told otherwise.
TRL    ?= trl
TRANSFORMERS ?= transformers

BIN := $(VENV)/bin

.PHONY: help install assets demo test test-oldest docs package bench decoders clean

help:  ## the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: setup.cfg pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TRL)" "$(TRANSFORMERS)" --editable ".[test]"
	touch $@

install: $(VENV)/.installed  ## virtual environment with the package and everything for tests and examples

assets: install  ## a real teacher, students and texts that need no model hub
	$(BIN)/python examples/offline_assets.py --output_dir examples/assets

demo: assets  ## distil a 135M teacher into a 99M student on a CPU: 10 minutes on two idle cores, up to 21 on busy ones
	@echo "Scores before (3 to 5 minutes), 32 steps (6 to 12, with the time left on each line), scores after (2 to 4)."
	$(BIN)/python examples/train_summarization.py --config examples/configs/demo.yaml

test: install  ## lint, types and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-oldest:  ## the tests of trainers, loss and sampler with the oldest TRL and transformers that setup.cfg admits
	$(MAKE) VENV=.venv-oldest TRL="trl==1.9.0" TRANSFORMERS="transformers==5.0.0" install
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q tests/test_skd_trainer.py tests/test_speckd_trainer.py \
	    tests/test_losses.py tests/test_lm_head.py tests/test_sampler.py

docs: install  ## build/docs, without warnings
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

package: $(VENV)/.installed  ## wheel and sdist in dist/, each installed in an empty environment and tried
	rm -rf dist build/lib build/empty
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist .
	for archive in dist/*.whl dist/*.tar.gz; do \
	    rm -rf build/empty && $(PYTHON) -m venv build/empty && \
	    build/empty/bin/python -m pip install --quiet "$(TORCH)" "$$archive" && \
	    (cd build/empty && bin/python ../../tests/smoke.py) || exit 1; \
	done

bench: assets  ## the tables of benchmarks/, in about an hour and a half
	$(BIN)/python benchmarks/sampler.py
	$(BIN)/python benchmarks/cost_model.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/draft_length.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scaling.py

decoders: install  ## docs/decoders.md: which models of the installed transformers the sampler can run, in about ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/decoders.py

clean:
	rm -rf $(VENV) runs build *.egg-info
