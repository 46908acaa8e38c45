# make demo, make test: each does all of its own set-up in .venv; a second run is fast.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
PROMPT ?= Here is a simple recipe for pancakes:

VENV   := .venv
OLDEST := .venv-triton-oldest
RUN    := $(VENV)/bin/python
# Never another torch than the one that .ci/environment.py found or installed.
INSTALL := $(RUN) -m pip install --quiet --constraint $(VENV)/constraints.txt

.PHONY: demo test lint format arch-baseline clean

demo: $(VENV)/.worker
	$(VENV)/bin/regard generate --model gemma3-270m "$(PROMPT)"

# Two workers for two cores; the compile gate, the forward and its export run again with the oldest supported Triton.
test: lint $(OLDEST)/.ready
	$(RUN) -m pytest -q -n 2
	$(OLDEST)/bin/python -m pytest -q -n 2 tests/arch tests/conformance tests/test_export.py \
	  -k "arch or (test_forward and flash and float16) or conformance_through_c"

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

$(VENV)/.base: pyproject.toml .ci/environment.py
	$(PYTHON) .ci/environment.py $(VENV) "$(TORCH)"
	touch $@

$(VENV)/.worker: $(VENV)/.base
	$(INSTALL) --editable ".[worker]"
	touch $@

$(VENV)/.dev: $(VENV)/.worker
	$(INSTALL) --editable ".[dev]"
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
