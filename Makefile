# `make demo`, `make test` and `make lint` do their own set-up in .venv and are quick when run again.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv/.peers

.PHONY: help demo peers test test-thorough bench bench-memory bench-long bench-warm bench-run bench-peers bench-large bench-replicas lint clean

help:  ## Say what can be made.
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED)  ## Clean a noisy real data set by bilevel optimization (under three minutes).
	@echo "==> cleaning scikit-learn's digits, half of whose training labels are made wrong"
	$(BIN)/python -m paper_repro run hypercleaning --preset cpu --seeds 3 --out results/demo

peers: $(PEERS)  ## Install the peer libraries and hold their hypergradients against known answers (minutes).
	$(BIN)/python -m paper_repro run peers-correctness --seeds 3

test: $(INSTALLED)  ## Run the tests and the examples of the docstrings and the pages.
	@echo "==> running the tests (HYPOTHESIS_PROFILE=thorough draws more examples)"
	$(BIN)/python -m pytest -q

test-thorough: $(INSTALLED)  ## Run the tests with many more random examples, and the slow ones.
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -q --run-slow

bench: $(INSTALLED)  ## Print how the time of a hypergradient grows with the number of levels (seconds).
	$(BIN)/python -m tests.benchmarks.ladder

bench-memory: $(INSTALLED)  ## Measure the memory of ITD's modes and draw its figure (about ten minutes).
	$(BIN)/python -m tests.benchmarks.memory --figure docs/itd-memory.png

bench-long: $(INSTALLED)  ## Differentiate 10,000 inner steps of a million parameters within 2 GB (about twenty minutes).
	$(BIN)/python -m tests.benchmarks.long_run

bench-warm: $(INSTALLED)  ## Print what warm-started linear solves save on a real run (minutes).
	$(BIN)/python -m tests.benchmarks.warm_start

bench-run: $(INSTALLED)  ## Measure what the run loop costs, and that thousands of steps leak nothing (minutes).
	$(BIN)/python -m tests.benchmarks.run_loop

bench-peers: $(PEERS)  ## Install the peer libraries and time every hypergradient beside theirs (about twenty minutes).
	$(BIN)/python -m paper_repro run peers --preset cpu --out results/peers/cpu

bench-large: $(INSTALLED)  ## Count the copies that 100 million parameters take (minutes; 6 GB of memory).
	$(BIN)/python -m tests.benchmarks.large

bench-replicas: $(INSTALLED)  ## Print what 64 copies of a program cost, together, over one (a minute).
	$(BIN)/python -m tests.benchmarks.replicas

lint: $(INSTALLED)  ## Check style, docstrings and types.
	@echo "==> ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## Remove the virtual environment and the caches.
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

# The stamp is written last, so an interrupted installation starts again. Where python3 has no venv of its own
# (Debian without python3-venv), virtualenv makes one.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "==> installing funcmlo and its tools into .venv (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv 2>/dev/null || { rm -rf .venv; \
	  $(PYTHON) -m pip install --quiet --user virtualenv && $(PYTHON) -m virtualenv --quiet .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,paper,kfac,compare,loggers]'
	@touch $(INSTALLED)

$(PEERS): $(INSTALLED) paper_repro/peers_correctness/requirements.txt
	@echo "==> installing the peer libraries"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --ignore-requires-python \
	  -r paper_repro/peers_correctness/requirements.txt
	@touch $(PEERS)
