# Each target makes its own .venv when there is none: on a fresh machine one command does everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find src csrc -type f ! -name '*.pyc' ! -name '*.so') pyproject.toml CMakeLists.txt

# The server on the bundled model until Ctrl-C: make serve SERVE_ARGS='--port 9000'
.PHONY: serve demo test lint size bench ext

serve: $(VENV)/.installed
	@exec $(BIN)/apportion serve $(SERVE_ARGS)

demo: $(VENV)/.installed
	@$(BIN)/apportion doctor
	@$(BIN)/python recipes/hello.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/size.py

size:
	@$(PYTHON) scripts/size.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/peers/install.py
	$(BIN)/python benchmarks/run_all.py $(BENCH_ARGS)

# The package is installed from the checkout, extension included, and again whenever a source has changed. Without build
# isolation the build directory stays valid between runs, so that only what changed is compiled.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "apportion needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'scikit-build-core>=0.11' 'nanobind>=2.4' 'cmake>=3.25' 'ninja>=1.11'
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation '.[dev]'
	@touch $@

# Every tile of every Triton kernel compiled for four GPUs, none of which need be there: the record in benchmarks/results.
.PHONY: triton-sweep
triton-sweep: $(VENV)/.installed
	$(BIN)/python scripts/triton_sweep.py

# The CPU kernels, built into src/ so that the checkout runs without being installed.
.PHONY: ext
ext:
	@mkdir -p build/ext
	@{ cmake -S . -B build/ext -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	    -Dnanobind_DIR="$$($(PYTHON) -m nanobind --cmake_dir)" \
	  && cmake --build build/ext -j 2 && cmake --install build/ext --prefix src; } >build/ext.log 2>&1 || { cat build/ext.log; exit 1; }
	@grep -E 'warning:' build/ext.log || true
