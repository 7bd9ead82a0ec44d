# On a fresh machine `make demo` and `make test` set up everything in .venv and build/; no step comes before them.
# Stamp files (.venv/ready, build/installed) make a second run start at once; ninja rebuilds what was edited.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt
TRITON := triton==3.9.0
TRITON_OLDEST := triton==3.6.0
CXX_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all test-gpu lint format build bench bench-regression clean

# ---- set up and build ---------------------------------------------------------------------------------------------
NEEDED := command -v $(CXX) >/dev/null && $(PYTHON) -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))'
HEADERS := $(PYTHON) -c 'import pathlib, sysconfig as s, sys; sys.exit(not pathlib.Path(s.get_path("include"), "Python.h").exists())'
APT := export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && \
	apt-get install -y -qq --no-install-recommends g++ python3 python3-dev python3-venv

.venv/ready: constraints.txt pyproject.toml
	@{ $(NEEDED) && $(HEADERS); } 2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { $(APT); }; } || true
	@$(NEEDED) 2>/dev/null || { echo "sparsekern needs a C++17 compiler ($(CXX)) and Python >= 3.11 with venv" \
		"(on Debian: apt-get install g++ python3-dev python3-venv); see CONTRIBUTING.md" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) setuptools cmake ninja pybind11 torch
	@# A torch for GPUs has brought the Triton that it is pinned to; elsewhere the newest one compiles the kernels in tests.
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -sm)" != "Linux x86_64" ] || $(PIP) $(TRITON)
	@touch $@

build/installed: .venv/ready setup.py
	$(PIP) --no-build-isolation --editable '.[dev]'
	@mkdir -p build && touch $@

build: build/installed
	@$(BIN)/cmake --build build/cmake

# ---- the main job, on real data ---------------------------------------------------------------------------------------
TRAIN := $(BIN)/sparsekern train --dataset fashion-mnist --sparsity 0.9 --pruner snip --compare-dense --seed 0 --overwrite

demo: build
	$(TRAIN) --model lenet-300-100 --blocksize 1x1 --epochs 8 --out demo/lenet-300-100-1x1
	$(TRAIN) --model lenet-300-100 --blocksize 8x8 --epochs 8 --out demo/lenet-300-100-8x8
	$(TRAIN) --model lenet-5-caffe --blocksize 8x8 --epochs 5 --out demo/lenet-5-caffe-8x8
	@$(BIN)/sparsekern summary demo/lenet-300-100-1x1 demo/lenet-300-100-8x8 demo/lenet-5-caffe-8x8

# ---- checks -------------------------------------------------------------------------------------------------------------
# One thread each for two workers: spinning pools of several threads would fight for the cores. Tests about threads
# set their own number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

test: build lint
	$(PYTEST) -n 2

test-all: build lint tools
	$(PYTEST) -n 2 -m "slow or not slow"
	$(MAKE) test-triton-oldest test-sanitized

# The cases that emulators run in `make test`, on the GPU of this machine.
test-gpu: build
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU here"'
	SPARSEKERN_TEST_DEVICE=cuda $(PYTEST) -m "slow or not slow" tests/gpu tests/test_backend_triton.py

# Every kernel compiled by the oldest Triton that is supported, too; it stays out of .venv.
.PHONY: test-triton-oldest
test-triton-oldest: build
	@[ "$$(uname -sm)" != "Linux x86_64" ] || [ -d build/triton-oldest ] || \
		$(BIN)/pip install -qq --disable-pip-version-check --no-deps --target build/triton-oldest $(TRITON_OLDEST)
	PYTHONPATH=build/triton-oldest $(PYTEST) -n 2 -m "slow or not slow" tests/gpu/test_compile.py

# What tests of other compilers and processors need; where they cannot be had, those tests say that they are skipped.
.PHONY: tools
tools:
	@{ command -v clang++ && command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends \
		clang g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user; } || true

lint: build/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: build/installed
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .
	$(BIN)/clang-format -i $(CXX_FILES)

# The op tests on a copy of the package whose libraries carry ASan and UBSan. Python itself has neither, so their
# run-time is preloaded; what Python leaks at exit is not asked.
SANITIZED_TESTS := $(wildcard tests/test_ops*.py tests/test_functional*.py tests/test_nn.py)
.PHONY: test-sanitized
test-sanitized: build/installed
	rm -rf build/sanitized/sparsekern && mkdir -p build/sanitized
	cp -r sparsekern build/sanitized/ && rm -f build/sanitized/sparsekern/*.so
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -G Ninja -S . -B build/sanitized/cmake -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-DSPARSEKERN_SANITIZE='address;undefined' -DSPARSEKERN_OUTPUT_DIR=$(CURDIR)/build/sanitized/sparsekern
	$(BIN)/cmake --build build/sanitized/cmake
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized $(PYTEST) $(SANITIZED_TESTS)

# ---- timings ------------------------------------------------------------------------------------------------------------
# Other libraries to compare with. SparseProp is compiled by a script of its own, which looks for pip and python3 on PATH;
# where it fails, the table names it as missing.
build/peers: build/installed
	$(PIP) --no-build-isolation --editable '.[bench]'
	-PATH=$(CURDIR)/$(BIN):$$PATH $(PIP) --no-build-isolation --no-deps sparseprop
	@touch $@

bench: build build/peers
	$(BIN)/python -m bench

# On a GPU; without one, a model's figures.
.PHONY: bench-cuda
bench-cuda: build
	$(BIN)/python -m bench --device cuda

# Against the last run on this machine, if there is one: fails where a median is a quarter above it.
bench-regression: build build/peers
	$(PYTEST) bench/regression.py --benchmark-autosave --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
		$(if $(wildcard .benchmarks/*/*),--benchmark-compare --benchmark-compare-fail=median:25%)

clean:
	rm -rf build *.egg-info sparsekern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
