# make demo | test | test-isa | test-install | test-all | soak | mutants | bench | bench-gpu | lint | clean. Each makes
# its own environment first, once: the demo the packages that users need, the others those for development too.
#   VENV=DIR           use this virtual environment as it is if it has the packages, else install into it
#   PYTHON=FILE        use this interpreter and install nothing
#   TORCH_INDEX=URL    take torch from this wheel index (https://download.pytorch.org/whl/cpu is 200 MB, not 3 GB)
#   THREADS=N          CPU threads for benchmarks
#   WORKERS=N          processes for tests, each with one thread; 1 runs them in one process

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV ?= .venv
THREADS ?= 2
WORKERS ?= 2
SCALE ?= 1
BENCH ?=
MUTANTS ?=
RECIPE ?= recipes/quickstart.yaml
OVERRIDES ?=

TORCH := $(shell grep '^torch==' constraints.txt)
# For a torch that brings none (a CPU wheel): the kernels then run under Triton's interpreter and compile ahead of time.
TRITON := triton==3.9.0; platform_system == 'Linux'
PYTHON3 = $(shell for python in python3 python3.13 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP = $(PY) -m pip --disable-pip-version-check
# What an environment that was handed over must have to count as complete, for the demo and for the rest.
HAS := import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
DEMO_MODULES := torch transformers safetensors tokenizers jinja2 gguf accelerate rich yaml matplotlib
DEV_MODULES := $(DEMO_MODULES) peft psutil pytest pytest_benchmark \
    pytest_timeout xdist hypothesis cosmic_ray ruff pyright

# An environment of somebody else's may not have this checkout installed, or another one: ours comes first.
ifdef PYTHON
PY := $(PYTHON)
ENVIRONMENT :=
DEMO_ENVIRONMENT :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
else
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.flora-installed
# An environment for development has what the demo needs.
DEMO_ENVIRONMENT := $(VENV)/$(if $(wildcard $(VENV)/.flora-installed),.flora-installed,.flora-demo)
ifneq ($(VENV),.venv)
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
endif
endif

# OpenMP teams larger than the machine's free cores are many times slower, not faster.
LIMITED := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS)
# A process that runs out of tests takes half of another's rest: whole files stay together until the last minutes.
PARALLEL := $(if $(filter-out 0 1,$(WORKERS)),-n $(WORKERS) --dist worksteal)
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL)

# Instruction sets of lesser processors, for the tests whose numbers could depend on this one's. On an AMD processor MKL
# obeys MKL_CBWR alone; its COMPATIBLE code also rounds a row by the number of rows beside it.
LEAST := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
    FLORA_ISA=portable
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 FLORA_ISA=avx2
ISA_TESTS := $(patsubst %,tests/aggregation/test_%.py,downlink flora flora_warm norms strategies) \
    $(patsubst %,tests/federation/test_%.py,rounds strategies) \
    $(patsubst %,tests/kernels/test_%.py,cuda_harness native native_fidelity) \
    $(patsubst %,tests/merge/test_%.py,in_place) \
    $(patsubst %,tests/model/test_%.py,attention attention_kernels cohort isolation loss) \
    $(patsubst %,tests/ops/test_%.py,cohort_adamw fusion lora_linear rounding shared_input stacked_merge) \
    $(patsubst %,tests/training/test_%.py,optimizer peft_equality static_steps trainer)
SOAK_TESTS := $(patsubst %,tests/federation/test_%.py,callable_clients faults hostile kill_resume privacy) \
    tests/aggregation/test_norms.py tests/training/test_memory.py

.PHONY: demo test test-isa test-install test-all soak mutants bench bench-gpu lint clean environment install

demo: $(DEMO_ENVIRONMENT)
	$(PY) -m flora_core.cli run $(RECIPE) $(OVERRIDES)

test: environment
	$(PYTEST) -q --scale=$(SCALE)

# A share of the tests as a processor without AVX-512, and one without AVX2, would run them.
test-isa: environment
	$(LEAST) $(PYTEST) -q $(ISA_TESTS)
	! grep -qsw avx2 /proc/cpuinfo || $(AVX2) $(PYTEST) -q $(ISA_TESTS)

# The README's own lines in fresh environments, from an sdist and from a wheel; needs the network or pip's cache.
test-install: environment
	$(PY) -m tests.project.install_check --torch $(TORCH)

test-all: environment
	mkdir -p docs/logs
	$(PYTEST) --scale=full -ra --durations=25 2>&1 | tee docs/logs/test-all.txt

# What takes longest of the full size: kills, mixed faults and mutated files, each seeded.
soak: environment
	mkdir -p docs/logs
	$(PYTEST) --scale=full -ra --durations=10 $(SOAK_TESTS) 2>&1 | tee docs/logs/soak.txt

# Small seeded changes to the code, each of which a test must notice; the log has counts and every survivor.
#   MUTANTS=WORDS      packages and options, such as MUTANTS='data --count 5 --seed 3'; see --help
mutants: environment
	nice $(PY) -m tests.project.mutants $(MUTANTS)

# A red check or a stopped run (Ctrl-C too) still leaves the results that came before it; the page is written from them.
#   BENCH=WORDS        questions and options of flora bench, such as BENCH='merge --select all'; see flora bench --list
bench: environment
	status=0; $(LIMITED) $(PY) -m bench.run --select cpu --minutes 18 --stop 20 --threads $(THREADS) $(BENCH) || status=$$?; \
	    [ $$status = 130 ] || $(LIMITED) $(PY) -m bench.run --explain --threads $(THREADS) || status=$$?; \
	    $(PY) -m bench.reporting.publish; exit $$status

bench-gpu: environment
	status=0; $(PY) -m bench.gpu.run || status=$$?; $(PY) -m bench.reporting.publish; exit $$status

lint: environment
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

environment: $(ENVIRONMENT)

# The demo's model is made here too, so that nothing needs the network later.
$(VENV)/.flora-installed: EXTRAS = dev
$(VENV)/.flora-installed: MODULES = $(DEV_MODULES)
$(VENV)/.flora-demo: EXTRAS = train,cli,demo
$(VENV)/.flora-demo: MODULES = $(DEMO_MODULES)
$(VENV)/.flora-installed $(VENV)/.flora-demo: constraints.txt pyproject.toml setup.py
	@if [ "$(VENV)" != .venv ] && $(PY) -c '$(HAS)' $(MODULES) 2>/dev/null; then \
	    echo "$(VENV) has the packages: used as it is"; \
	else \
	    $(MAKE) --no-print-directory install EXTRAS=$(EXTRAS) STAMP=$(@F); \
	fi

#   EXTRAS=NAMES       the extras of flora-core that are installed (dev unless given; the demo takes train,cli,demo)
EXTRAS ?= dev
STAMP ?= .flora-installed
install:
	@[ -x $(PY) ] || [ -n "$(PYTHON3)" ] || { echo "Python 3.11 or newer is needed and was not found; set PYTHON="; exit 1; }
	[ -x $(PY) ] || $(PYTHON3) -m venv $(VENV)
	$(PIP) install $(TORCH) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	[ '$(EXTRAS)' != dev ] || $(PY) -c 'import triton' 2>/dev/null || $(PIP) install "$(TRITON)"
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	$(PY) -m flora_core.runs.demo_model
	touch $(VENV)/$(STAMP)

clean:
	rm -rf .venv .cache build dist *.egg-info runs .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
