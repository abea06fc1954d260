# One command each: `make demo` installs and runs the main job, `make test` installs and passes the tests.
PYTHON ?= python3
BIN    := .venv/bin
STORE  := data/demo.zarr
RUNS   := data/runs
FUZZ_SECONDS ?= 600
PROCESSES ?= 2
# So many processes of one thread each share a sweep: small autoencoders keep no two cores busy.
SHARED := seq $(PROCESSES) | OMP_NUM_THREADS=1 xargs -P $(PROCESSES) -I N

demo: .venv/ready  ## harvest the built-in model, inspect the store, train two autoencoders, compare them
	$(BIN)/posae harvest $(STORE) --contexts 1024
	$(BIN)/posae inspect-store $(STORE) --verify
	$(BIN)/posae train $(STORE) $(RUNS)/hierarchical --steps 2000
	$(BIN)/posae train $(STORE) $(RUNS)/baseline --steps 2000 --preset paper-baseline
	$(BIN)/posae inspect-store $(STORE) --brief
	$(BIN)/posae report $(RUNS)/hierarchical $(RUNS)/baseline

paper: .venv/ready  ## every variant, ablation and control of the paper on the demo store, and a report; resumes where it stopped
	$(BIN)/posae harvest $(STORE) --contexts 1024
	$(SHARED) $(BIN)/posae train $(STORE) data/paper --sweep examples/paper/all.toml --steps 600
	$(BIN)/posae report data/paper --out data/paper.html

paper-quick: .venv/ready  ## the same in minutes, to see that it runs
	$(BIN)/posae harvest data/quick.zarr --contexts 256
	$(SHARED) $(BIN)/posae train data/quick.zarr data/paper-quick --sweep examples/paper/quick.toml
	$(BIN)/posae report data/paper-quick --out data/paper-quick.html

test: .venv/ready  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

check: .venv/ready  ## format, lint, types
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/basedpyright

fuzz: .venv/ready  ## parsers of a stranger's bytes, for FUZZ_SECONDS; what it finds lies in data/fuzz
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/fuzz.py data/fuzz/corpus -max_total_time=$(FUZZ_SECONDS) -timeout=5 -max_len=8192 -print_final_stats=1

docs: .venv/ready  ## the site, of docs/, docstrings and what commands say of themselves, in build/site
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not -q: then nothing counts as a warning

lock:  ## renew constraints.txt
	uv pip compile -q --universal --python-version 3.11 pyproject.toml --extra dev --extra docs --extra fuzz -c pins.in -o constraints.txt

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo paper paper-quick test check fuzz docs lock
