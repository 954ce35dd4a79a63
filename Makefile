# make demo   sets everything up and runs the main job (pictures and metrics.json under out/)
# make test   sets everything up and passes the tests
# make paper  every experiment of the paper, preset cpu, JOBS side by side; interrupted, it goes on
# make kernels    compiles every GPU kernel ahead of time; fails on spills and on lost wide loads;
#                 FULL=1 for every kind of layer and whole models
# make gpu-check  on a GPU machine: build, tests, bits, benchmarks, into OUT; needs no network and no
#                 virtual environment, PYTHON must have torch, triton and pytest; exit status 3:
#                 stages are left, go on with GPU_CHECK_ARGS=--resume; --rehearse without a GPU
# make test-machines  the numerical tests under other instruction sets and numbers of threads
# make test-matrix  the suite's core on every Python found, with torch 2.11 and the newest, and the
#                 CPU kernels compiled for arm64; status 3: something could not be had
# make check-install  tries every way to install, from empty environments; TORCH is what with
# make build-cuda     the CUDA backend against a CUDA build of torch (3 to 4 GB, CUDA_TORCH) in an
#                     environment of its own, .venv-cuda; needs no GPU
# make dist   source distribution and wheel, checked, into dist/; on Linux with the manylinux tag that
#             the compiler allows; torch's libraries stay torch's
# make bench  the CPU benchmark suite, a quarter of an hour; BENCH_ARGS=--quick for a minute, --save to keep rows
# make docs   the documentation site, into OUT/docs; a warning is an error. DOCS_ARGS="-b linkcheck"
#             asks for every external link
#
# PYTHON chooses the interpreter of the virtual environment, TORCH the requirement for torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out
CUDA_TORCH ?= torch
JOBS ?= 2
PAPER_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=
GPU_CHECK_ARGS ?=
MATRIX_ARGS ?=

# Tests of the Triton kernels in Triton's interpreter; their own file skips without it or a GPU.
INTERPRETED := tests/backends/test_triton_kernels.py tests/backends/test_gpu_kernels.py \
	tests/benchmarks/test_traffic.py tests/core/test_functional.py \
	-k "triton and not any_scale"

# Tests of the CUDA kernels, compiled for the CPU against csrc/cuda/shim.
EMULATED := tests/backends/test_cuda_kernels.py tests/backends/test_gpu_kernels.py \
	tests/backends/test_cuda_plan.py tests/backends/test_cuda_host.py tests/core/test_functional.py \
	-k "cuda and not any_scale"

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

FORMATTED := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cpu/*.inc csrc/cuda/*.cu \
	csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/shim/*.cpp csrc/cuda/shim/*.h)

.PHONY: setup demo paper test test-machines test-matrix check-install build-cuda dist tsan lint format kernels \
	gpu-check bench clean

$(VENV)/created: pyproject.toml python/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/built: $(VENV)/created setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --editable ".[triton,bench,test,dev,plots,integrations]" --editable ./python
	touch $@

setup: $(VENV)/built

demo: setup
	$(BIN)/python -m srn_lab demo --out $(OUT)

paper: setup
	$(BIN)/python -m srn_lab paper --preset cpu --jobs $(JOBS) --out $(OUT)/paper $(PAPER_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

kernels: setup
	$(BIN)/python -m srn_kernels.backends.triton.compile $(if $(FULL),--full)
	$(BIN)/python -m srn_kernels.backends.cuda.compile

gpu-check:
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(PYTHON) -m benchmarks gpu check --out "$(OUT)" $(GPU_CHECK_ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --require-backend cpu $(TEST_ARGS)
ifeq ($(shell uname -s),Linux)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --require-backend triton $(INTERPRETED)
	$(BIN)/python -m pytest --cuda-shim --require-backend cuda $(EMULATED)
	$(MAKE) --no-print-directory kernels
endif

test-machines: setup
	$(BIN)/python tests/support/machines.py

test-matrix: setup
	$(BIN)/python tests/support/matrix.py $(MATRIX_ARGS)

check-install:
	$(PYTHON) tests/support/check_install.py --torch "$(TORCH)"

# nvcc is the one at hand if it fits torch's CUDA, else that of pip's packages.
build-cuda:
	test -x $(VENV)-cuda/bin/python || $(PYTHON) -m venv $(VENV)-cuda
	$(VENV)-cuda/bin/python -m pip install --quiet --disable-pip-version-check "$(CUDA_TORCH)" numpy \
		"setuptools>=77" wheel ninja pybind11 pytest rich tabulate nvidia-cuda-cuobjdump
	$(VENV)-cuda/bin/python tests/support/build_cuda.py

dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
ifeq ($(shell uname -s),Linux)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --strip --exclude "libtorch*" --exclude libc10.so \
		--exclude libgomp.so.1 --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
endif
	$(BIN)/python -m twine check --strict dist/*
	ls -l dist
	$(PYTHON) tests/support/check_install.py --torch "$(TORCH)" --wheel dist/*.whl

# The CUDA kernels on the CPU under ThreadSanitizer; Linux on x86-64, with g++.
tsan: setup
	$(BIN)/python tests/support/cuda_tsan.py

bench: setup
	$(BIN)/python -m benchmarks run $(BENCH_ARGS)

DOCS_ARGS ?=

# Only this needs the packages of the extra docs, so that setup stays short.
$(VENV)/documents: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --editable ".[docs]"
	touch $@

.PHONY: docs
docs: $(VENV)/documents
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html $(DOCS_ARGS) docs $(OUT)/docs
	@echo "$(OUT)/docs/index.html"

clean:
	rm -rf build dist $(OUT) srn_kernels/backends/*.so srn_kernels/backends/built.json *.egg-info
