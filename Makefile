# make demo, make test: each does all of its own set-up in .venv; a second run is fast.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
PROMPT ?= Here is a simple recipe for pancakes:

VENV   := .venv
OLDEST := .venv-triton-oldest
RUN    := $(VENV)/bin/python
# A torch that the machine already has is used as it is, never replaced.
HAVE_TORCH := $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' 2>/dev/null

.PHONY: demo test lint format arch-baseline clean

demo: $(VENV)/.worker
	$(VENV)/bin/regard generate --model gemma3-270m "$(PROMPT)"

# Two workers for two cores; the compile gate runs again with the oldest supported Triton.
test: lint $(OLDEST)/.ready
	$(RUN) -m pytest -q -n 2
	$(OLDEST)/bin/python -m pytest -q -n 2 tests/arch tests/conformance -k "arch or flash"

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Write the compile gate's figures anew, for the newest and the oldest Triton.
arch-baseline: $(VENV)/.dev $(OLDEST)/.ready
	$(RUN) tests/arch/footprints.py --write
	$(OLDEST)/bin/python tests/arch/footprints.py --write

$(VENV)/.base: pyproject.toml
	if $(HAVE_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(RUN) -m pip install --quiet "$(TORCH)"; fi
	touch $@

$(VENV)/.worker: $(VENV)/.base
	$(RUN) -m pip install --quiet --editable ".[worker]"
	touch $@

$(VENV)/.dev: $(VENV)/.worker
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

# Only Triton (and the NumPy its interpreter needs) differ: everything else comes from the first venv through a .pth.
$(OLDEST)/.ready: $(VENV)/.dev
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet "triton==3.6.*" "numpy<2.4"
	$(RUN) -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
	  > "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/regard_first_venv.pth"
	echo "$(CURDIR)/src" >> "$$($(OLDEST)/bin/python -c 'import site; print(site.getsitepackages()[0])')/regard_first_venv.pth"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
