# Targets for developers; `make help` lists them.
VENV ?= .venv
PYTHON ?= python3

.PHONY: help build test ladder amx neon asan fuzz memory broken lint bench notebooks docs
help:
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'
$(VENV)/bin/pytest:
	$(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -e '.[test]'
build: $(VENV)/bin/pytest ## build the extension in place
	$(VENV)/bin/pip install -q -e '.[test]'
test: build ## run the tests
	$(VENV)/bin/pytest
ladder: build ## the tests once per runnable kernel table, best to generic
	better=; tables=$$($(VENV)/bin/python -c "from singlequant import _C; print(*_C.kernels()['runnable'])") && \
	for table in $$tables; do \
		echo "kernels: $$table" && SINGLEQUANT_DISABLE_CPU=$$better $(VENV)/bin/pytest || exit 1; \
		better=$$better,$$table; \
	done
amx: build ## the kernels' tests with the AMX table on tiles in plain C
	$(VENV)/bin/pip install -q setuptools numpy scipy-openblas32
	VENV=$(VENV) tools/run_emulated_amx.sh
neon: ## the NEON kernels, cross-compiled, in an emulator (gcc-aarch64-linux-gnu, qemu-user)
	tools/check_neon.sh
asan: build ## the quick tests under the address and undefined-behaviour sanitizers
	$(VENV)/bin/pip install -q setuptools numpy scipy-openblas32
	VENV=$(VENV) tools/run_sanitized.sh
fuzz: ## an hour of inputs at random for the core (clang with libFuzzer)
	tools/run_fuzz.sh 3600
memory: ## the core's test programs under the thread sanitizer and valgrind
	tools/check_memory.sh 400
broken: build ## kill and stop runs at random, fill the disk under them, and go on with them
	for how in kill stop full; do $(VENV)/bin/python tools/break_runs.py $$how || exit 1; done
lint: build ## ruff and clang-format
	$(VENV)/bin/ruff check . && git ls-files 'csrc/*.[ch]' 'tools/*.[ch]' | xargs clang-format --dry-run -Werror
bench: build ## the linear against float32 and the machine's peaks
	$(VENV)/bin/singlequant bench
notebooks: build ## execute the notebooks
	$(VENV)/bin/pytest tests/test_notebooks.py
docs: build ## the pages, the reference and the executed notebooks as a site: build/docs/index.html
	$(VENV)/bin/pip install -q -e '.[docs]'
	VENV=$(VENV) tools/build_docs.sh build/docs
