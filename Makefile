# make demo   set up everything in .venv and fine-tune a real language model
# make test   set up everything in .venv and pass the tests
# make lint   format, style and type checks
# make bench  the step benchmark against MeZO's loop

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
# What a set-up depends on: the native sources and the build and dependency lists.
sources := pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint format bench clean

demo: $(VENV)/.installed-demo
	$(python) -m zokernels finetune --demo

test: $(VENV)/.installed-dev
	$(python) -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.installed-bench
	$(python) -m bench.step

lint: $(VENV)/.installed-dev
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.installed-dev
	$(python) -m ruff format .
	$(python) -m ruff check --fix .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

# torch first: the native build compiles against its headers. uv knows which build of torch fits the
# machine (CPU without a GPU); where it cannot reach that build, pip takes what it finds.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(pip) install --quiet uv
	$(python) -c 'import torch' 2>/dev/null \
	|| UV_HTTP_RETRIES=1 $(python) -m uv pip install --python $(python) --torch-backend=auto '$(TORCH)' \
	|| $(pip) install '$(TORCH)'
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch $(sources)
	$(pip) install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
