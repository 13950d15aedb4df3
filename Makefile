# Two commands are all that a newcomer needs: make demo, make test. Both set up what they need in $(VENV).
#
#   make demo DATA=file.csv      your own numbers: numeric columns, the last one is the target
#   make test TORCH=torch==2.14.1 VENV=.venv-2.14   another torch, in an environment of its own

VENV   ?= .venv
CLIENTS_VENV ?= .venv-clients
PYTHON ?= python3
TORCH  ?= torch==2.13.0
DATA   ?=
OUT    ?= out
RESULTS     ?= benchmarks/results
GPU_PYTHON  ?= python3
GPU_SECONDS ?= 460
REHEARSE    ?=
ROWS        ?=
KEEP        ?=

SHELL := bash
.SHELLFLAGS := -o pipefail -ec
BIN := $(VENV)/bin
# ninja prints whole compiler commands; the file is enough.
SHORTER := sed -u -E 's/^(\[[0-9]+\/[0-9]+\]) .* -c -c [^ ]*\/(csrc\/[^ ]+) .*/\1 \2/; s/^g\+\+ .*-shared .*/link/'
# Whoever develops wants no build without compiled part.
export REGFUSED_BUILD ?= require
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
TEST_JOBS ?= $(shell echo $$(($(MAX_JOBS) > 8 ? 8 : $(MAX_JOBS) < 2 ? 2 : $(MAX_JOBS))))

.PHONY: help demo test test-more test-all test-clients matrix sanitize aarch64 wheels bench gpu-check build docs lint format clean

help:
	@echo "make demo     train on real data, the loop that people write against regfused.SGD; figure in $(OUT)/"
	@echo "make test     build, and run the tests that need no compiler and no whole programs"
	@echo "make test-all all tests, and those of the kernels once more on the CUDA kernels, emulated under sanitizers;"
	@echo "make test-more is what make test leaves out"
	@echo "make test-clients   train with Lightning, accelerate, transformers, timm, peft and stable-baselines3"
	@echo "make sanitize compile and run everything for the CPU under AddressSanitizer, UndefinedBehaviorSanitizer,"
	@echo "              ThreadSanitizer and valgrind, which must be installed; each must see a planted bug"
	@echo "make aarch64  cross-compile the CPU kernels for 64-bit Arm and check them under qemu, which must be installed"
	@echo "make wheels   a wheel for the torch of $(VENV), in $(OUT)/wheels, and tests of it in a clean environment"
	@echo "make bench    measure the step, the penalty, clipping and dropout against torch; targets at the"
	@echo "              end, result files in $(RESULTS)/"
	@echo "make gpu-check   on a machine with a GPU, with the torch of GPU_PYTHON=$(GPU_PYTHON): compile, test, count launches,"
	@echo "              check memory accesses, measure; result files in $(RESULTS)/; $(GPU_SECONDS) s at most."
	@echo "              REHEARSE=1 needs no GPU: small shapes on the CPU, result files in $(OUT)/"
	@echo "make matrix   build and test with the oldest and the newest torch and Python, and with clang, each in an"
	@echo "              environment of its own, of up to 6 GB; ROWS=\"oldest newest\" runs these alone, KEEP=1 keeps environments"
	@echo "make docs     the documentation as a website, in $(OUT)/docs"
	@echo "make lint     ruff, clang-format, mypy"
	@echo "make clean    remove what was built and $(VENV)"

demo: build
	$(BIN)/python examples/demo.py --out $(OUT)/demo.png $(if $(DATA),--data "$(DATA)")

test: build
	@echo "== tests"
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal -m "not long"

test-all: test test-more

test-more: build
	@echo "== tests that take long"
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal -m long
	@echo "== tests of the kernels once more, on the CUDA kernels, emulated on the CPU under sanitizers"
	$(BIN)/python -m tests.emulated_cuda -n $(TEST_JOBS) --dist worksteal

# The rows are in noxfile.py.
matrix: $(VENV)/installed
	$(BIN)/nox $(if $(KEEP),--reuse-existing-virtualenvs) $(if $(ROWS),--session $(ROWS)) $(if $(KEEP),-- keep) || { \
		echo "A Python that was not found comes with, for example: pyenv install 3.10 3.12 3.13"; exit 1; }

# Needs torch and the tests, but nothing of the ordinary build: it compiles all of it under sanitizers.
sanitize: $(VENV)/installed
	$(BIN)/python -m tests.sanitizers

# In an environment of their own, beside the same torch; the compiled part is the one of this checkout.
test-clients: build $(CLIENTS_VENV)/installed
	PYTHONPATH="$(CURDIR)" $(CLIENTS_VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile tests/clients

CLIENTS := tests/clients/requirements.txt tests/clients/requirements-without-torch.txt
$(CLIENTS_VENV)/installed: $(CLIENTS) requirements-dev.txt
	@echo "== set up $(CLIENTS_VENV): $(TORCH) and the libraries that drive an optimizer"
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off "$(TORCH)" \
		-r requirements-dev.txt -r tests/clients/requirements.txt
	$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-deps \
		-r tests/clients/requirements-without-torch.txt
	@touch $@

aarch64: $(VENV)/installed
	$(BIN)/python -m tests.aarch64

# The version says for which torch it is: 0.1.0+torch2.13.0.cpu. The tests are copied, so that they find no checkout.
wheels: $(VENV)/installed
	rm -rf $(OUT)/wheels
	REGFUSED_LOCAL_VERSION=torch$$($(BIN)/python -c "import torch; print(torch.__version__.replace('+', '.'))") \
		$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir $(OUT)/wheels .
	@echo "== tests of the wheel, in an environment of its own"
	$(BIN)/python -m venv $(OUT)/wheels/environment
	$(OUT)/wheels/environment/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -r requirements-dev.txt $(OUT)/wheels/*.whl
	mkdir $(OUT)/wheels/tests && cp tests/*.py $(OUT)/wheels/tests
	cd $(OUT)/wheels && environment/bin/python -m regfused && \
		environment/bin/python -m pytest -q -n 2 -p no:cacheprovider $(patsubst %,tests/test_%.py,step_parity step_state penalty dropout)
	rm -r $(OUT)/wheels/tests $(OUT)/wheels/environment
	@ls $(OUT)/wheels

bench: build
	@for piece in $(foreach rule,sgd adam,"step --optimizer $(rule) --models $(STEP_MODELS)" $(foreach threads,1 2,\
			"step --optimizer $(rule) --models in_cache --threads $(threads) --seconds 6 --stem $(rule)_in_cache_$(threads)")) \
			penalty clip dropout zeros sharded; do \
		echo "== $$piece"; \
		$(BIN)/python -m benchmarks.bench_$$piece --out $(RESULTS); \
	done
	@echo "== targets"
	@$(BIN)/python -m benchmarks.cpu_targets --out $(RESULTS)

STEP_MODELS := mlp_251,many_small_1000x1k,many_small_10000x64,resnet50,gpt2_124m

# Not in $(VENV): torch, CUDA and all else are those of the machine, which may have no network. Every stage runs, and the
# files are written, whatever fails; the time that compiling took is taken from that of the stages. With REHEARSE=1 no
# GPU is needed: the stages run on the CPU, on small shapes.
gpu-check:
	@echo "== compile for $(if $(REHEARSE),a rehearsal without a GPU,the GPU that is here)"
	@start=$$(date +%s); \
	$(if $(REHEARSE),,here=$$($(GPU_PYTHON) -m benchmarks.gpu_architecture); \
	export TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$here};) \
	REGFUSED_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace 2>&1 | $(SHORTER); \
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(REHEARSE),--rehearse --out $(OUT),--out $(RESULTS)) \
		--seconds $$(($(GPU_SECONDS) + start - $$(date +%s)))

build: $(VENV)/installed
	@echo "== compile what changed (everything takes about a minute)"
	@$(BIN)/python setup.py build_ext --inplace 2>&1 | $(SHORTER)

# torch comes first: regfused is compiled against the one that is installed. The .pth file makes this checkout
# importable; pip install -e would compile everything once more, in a folder that it throws away.
$(VENV)/installed: requirements-dev.txt
	@echo "== set up $(VENV): $(TORCH), and what demo, tests and benchmarks need"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" | \
		while read -r folder; do echo "$(CURDIR)" > "$$folder/regfused-checkout.pth"; done
	@touch $@

# Into $(OUT)/docs; a broken link or a name that is not there is an error.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir $(abspath $(OUT))/docs

lint: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy regfused

LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
SOURCES := $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)

format: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LINTERS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf build regfused/*.so *.egg-info $(VENV) $(CLIENTS_VENV) .nox $(OUT)
