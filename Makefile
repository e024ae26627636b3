# One virtual environment for everything; a stamp file in it says which extras it has.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= demo
BIN := $(VENV)/bin
# --no-compile: all of torch would take 20 seconds. WARM compiles what a chat imports, also where Python is told not to.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(INSTALL) -c constraints.txt
WARM := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -P -c 'import prompt_toolkit, offmoe.__main__ as offmoe; offmoe.main()' \
	chat </dev/null 2>/dev/null
# Tests start Python dozens of times: it keeps the bytecode of torch and transformers, also where it is told not to.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal
CACHE_TESTS := tests/cache
COMPARING = $(shell grep -rlE 'assert_close|check_(answers|stacked)|reference' tests --include='test_*.py')
# Supported versions of Triton: each is installed into a folder of its own, as the only package there.
TRITONS ?= 3.6.0 3.7.1
TRITON_TESTS := tests/kernels/test_compile.py
FAST := tests/test_imports.py tests/test_words.py tests/test_golden.py tests/test_settings.py tests/test_prefetch.py \
	tests/cache/test_residency.py tests/cache/test_echo.py tests/checkpoint/test_find_model.py \
	tests/machine/test_disk_reader.py tests/experts/test_ram_tier.py tests/trunk/test_recurrent_state.py \
	tests/decode/test_prefetch_guard.py tests/kernels/test_route.py tests/kernels/test_formats.py \
	tests/text/test_thinking_switch.py tests/lab/report tests/app/test_doctor.py \
	'tests/decode/test_step.py::test_logits_are_those_of_transformers[qwen3_moe-layer]' \
	'tests/models/test_models.py::test_logits_and_routing_are_those_of_transformers[olmoe-split]'
METADATA := setup.py pyproject.toml constraints.txt
VIEW := build/view/offmoe

# Environments in which torch computes as on another processor: the order of its sums changes, so the last bits of floats.
# On AMD, MKL ignores MKL_ENABLE_INSTRUCTIONS but not MKL_CBWR.
PROCESSORS := $(foreach isa,default avx2 avx512,ATEN_CPU_CAPABILITY=$(isa)) MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2

.PHONY: help chat install test test-all test-fast test-triton $(TRITONS:%=test-triton-%) test-llama test-processors lint view types docs clean
.SILENT:

chat: $(VENV)/installed  ## install offmoe and chat with MODEL (default: the demo)
	$(BIN)/offmoe chat $(MODEL)

help:  ## list the targets
	grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(VENV)/installed  ## install offmoe into .venv

# What is traced takes 2.6 times as long through Triton's interpreter: only the tests of cache/ are.
test: $(VENV)/with-test  ## run the default tests: about 12 minutes on two cores
	$(PYTEST) --cov --cov-report= $(CACHE_TESTS)
	$(BIN)/coverage report --include='*/cache/*' --fail-under=95
	$(PYTEST) --ignore=$(CACHE_TESTS)

test-all: $(VENV)/with-test  ## run what make test leaves out: the exhaustive matrices
	$(PYTEST) -m 'exhaustive and not llama' --ignore=$(TRITON_TESTS)

test-fast: $(VENV)/with-test  ## run a few telling tests of every room: at most 90 seconds
	$(PYTEST) $(FAST)

# Every kernel in every weight format, compiled for every capability with each Triton, which is an environment of its own.
test-triton: $(TRITONS:%=test-triton-%)  ## compile every kernel for every GPU with every supported Triton

$(TRITONS:%=test-triton-%): test-triton-%: $(VENV)/triton-%/installed
	echo "compiling all kernels with Triton $*" >&2
	PYTHONPATH=$(abspath $(<D))$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/pytest -n 0 -m '' -k 'not few' $(TRITON_TESTS)

test-llama: $(VENV)/with-llama  ## compare with llama.cpp (compiles llama-cpp-python once)
	$(PYTEST) -m llama

# The tests that compare floats, as on other processors, with one thread and with two: by hand before a release, on a
# processor with AVX-512. Takes ten times as long as the tests of these files.
test-processors: $(VENV)/with-test  ## run the numeric comparisons as on other processors, with one thread and two
	for processor in $(PROCESSORS); do for threads in 1 2; do \
		echo "$$processor OMP_NUM_THREADS=$$threads"; \
		env $$processor OMP_NUM_THREADS=$$threads $(BIN)/pytest -n 0 -q $(COMPARING) || exit 1; \
	done; done

lint: $(VENV)/with-test  ## check the layout and style of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and mkdocs do not see through an editable install: they are shown the three folders as the package they install as.
view:
	rm -rf $(VIEW) && mkdir -p $(VIEW)
	ln -s $(CURDIR)/offmoe/* $(CURDIR)/cache $(CURDIR)/kernels $(VIEW)/

types: $(VENV)/with-test view  ## check types
	$(BIN)/mypy -p offmoe

docs: $(VENV)/with-docs view  ## build the documentation as a site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove everything that was built or installed here
	rm -rf build dist $(VENV) *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "offmoe: $(PYTHON) is missing or older than 3.11: name another one with make PYTHON=..."; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "offmoe: $(PYTHON) cannot make a virtual environment: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(METADATA) | $(BIN)/python
	echo "installing offmoe into $(VENV), once" >&2
	$(PIP) -e .
	$(WARM)
	touch $@

$(VENV)/with-test: $(METADATA) | $(BIN)/python
	echo "installing offmoe and what tests need into $(VENV), once" >&2
	$(PIP) -e '.[test,lab]'
	touch $@ $(VENV)/installed

$(VENV)/with-docs: $(METADATA) | $(BIN)/python
	echo "installing what the documentation needs into $(VENV), once" >&2
	$(PIP) -e '.[docs]'
	touch $@

$(TRITONS:%=$(VENV)/triton-%/installed): $(VENV)/triton-%/installed: | $(VENV)/with-test
	echo "installing Triton $* into $(@D), once" >&2
	rm -rf $(@D)
	$(INSTALL) --no-deps --target $(@D) triton==$*
	touch $@

# Compiles llama.cpp: 4 to 23 minutes on 2 cores. Without AMX: GCC 12 drops stores that ldtilecfg reads, and products of
# small matrices crash on a processor that has it.
NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
$(VENV)/with-llama: $(METADATA) | $(VENV)/with-test
	echo "compiling llama-cpp-python into $(VENV), once; this takes minutes" >&2
	flags=$$($(CC) $(NO_AMX) -E -x c /dev/null >/dev/null 2>&1 && echo $(NO_AMX)); \
	CFLAGS="$$CFLAGS $$flags" CXXFLAGS="$$CXXFLAGS $$flags" \
		CMAKE_ARGS="-DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) $(PIP) -e '.[llama]'
	touch $@
