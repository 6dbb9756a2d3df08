PYTHON ?= python3

# The CPU kernels, built into src/ so that the checkout runs without being installed.
.PHONY: ext
ext:
	@mkdir -p build/ext
	@{ cmake -S . -B build/ext -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	    -Dnanobind_DIR="$$($(PYTHON) -m nanobind --cmake_dir)" \
	  && cmake --build build/ext -j 2 && cmake --install build/ext --prefix src; } >build/ext.log 2>&1 || { cat build/ext.log; exit 1; }
	@grep -E 'warning:' build/ext.log || true
