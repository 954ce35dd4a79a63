# make demo   sets everything up and runs the main job (pictures and metrics.json under out/)
# make test   sets everything up and passes the tests
# make paper  every experiment of the paper, preset cpu, JOBS side by side; interrupted, it goes on
# make kernels    compiles every GPU kernel ahead of time; fails on spills and on lost wide loads;
#                 FULL=1 for every kind of layer and whole models
# make gpu-check  on a GPU machine: build, tests, launches, benchmarks, into OUT; needs no network
#                 and no virtual environment, PYTHON must have torch and triton
# make bench  the CPU benchmark suite, 10 minutes; BENCH_ARGS=--quick for a minute, --save to keep rows
#
# PYTHON chooses the interpreter of the virtual environment, TORCH the requirement for torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= out
JOBS ?= 2
PAPER_ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=
GPU_CHECK_ARGS ?=

# Tests of the Triton kernels in Triton's interpreter; their own file skips without it or a GPU.
INTERPRETED := tests/test_triton_kernels.py tests/test_traffic.py tests/test_functional.py \
	-k "triton and not any_scale and not any_layer"

# Tests of the CUDA kernels, compiled for the CPU against csrc/cuda/shim.
EMULATED := tests/test_cuda_kernels.py tests/test_cuda_plan.py tests/test_functional.py \
	-k "cuda and not any_scale and not any_layer"

VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)

FORMATTED := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cpu/*.inc csrc/cuda/*.cu \
	csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/shim/*.cpp csrc/cuda/shim/*.h)

.PHONY: setup demo paper test tsan lint format kernels gpu-check bench clean

$(VENV)/created: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/built: $(VENV)/created setup.py $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --editable ".[triton,lab,bench,test,dev]"
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
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(PYTHON) -m benchmarks.gpu_check --out "$(OUT)" $(GPU_CHECK_ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --require-backend cpu $(TEST_ARGS)
ifeq ($(shell uname -s),Linux)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --require-backend triton $(INTERPRETED)
	$(BIN)/python -m pytest --cuda-shim --require-backend cuda $(EMULATED)
	$(MAKE) --no-print-directory kernels
endif

# The CUDA kernels on the CPU under ThreadSanitizer; Linux on x86-64, with g++.
tsan: setup
	$(BIN)/python tests/cuda_tsan.py

bench: setup
	$(BIN)/python -m benchmarks run $(BENCH_ARGS)

clean:
	rm -rf build $(OUT) srn_kernels/*.so *.egg-info
