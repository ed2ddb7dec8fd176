# The commands of this repository. `make` lists them. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
PLUGINS := vit quant vision audio synth track percept unet controlnet fourm terramind text fit
OURS := -e . $(foreach id,$(PLUGINS),-e plugins/vqcore_$(id))
EXAMPLES := -e examples/vqcore-pose
PROJECTS := pyproject.toml $(wildcard plugins/*/pyproject.toml)
CODE := vqcore plugins examples benchmarks tests
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help quickstart test test-slow lint types format clean

help:
	@echo "make quickstart  train, measure and use a tokenizer on bundled photographs (about 6 minutes)"
	@echo "make test        the test suite (at most 5 minutes on two cores)"
	@echo "make test-slow   the long tests"
	@echo "make lint        ruff and mypy;  make format mends what ruff can"

# The light set: what a user needs.
.venv/light: $(PROJECTS)
	@echo "Making .venv. PyTorch and its libraries are about 3 GB to download and 5.5 GB on disk; all the rest is 0.2 GB."
	@echo "(A smaller PyTorch, if you want one, can be installed into .venv before: any version from 2.4 on will do.)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(OURS)
	@touch $@

# Everything: the light set, the example, the tools of the suite, and torchvision, which must match torch.
.venv/full: .venv/light
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torchvision -e '.[dev]' $(OURS) $(EXAMPLES)
	@touch $@

quickstart: .venv/light
	@echo
	@echo "== Training on 37 files of photographs (data/photos/train), a fixed number of steps, about 2 to 3 minutes =="
	$(BIN)/vqcore train cfgs/quickstart.yaml
	@echo
	@echo "== Measuring on 7 held-out photographs (data/photos/heldout), beside a constant and k-means with as many bits =="
	$(BIN)/vqcore eval runs/quickstart
	@echo
	@echo "Look at   runs/quickstart/samples/strip.png   reconstructions during training"
	@echo "          runs/quickstart/samples/eval.png    original, reconstruction, token map"
	@echo "          runs/quickstart/report.html         curves, best and worst samples, codes"
	@echo "Now yours ($(BIN) is not on your PATH unless you activate it: . $(BIN)/activate):"
	@echo "  vqcore tokenize runs/quickstart ~/Pictures tokens/pictures"
	@echo "  vqcore decode runs/quickstart tokens/pictures rebuilt"
	@echo "  vqcore train cfgs/quickstart.yaml run.dir=runs/mine data.path=~/Pictures data.eval_path=null data.eval_share=0.1"
	@echo "  vqcore export runs/quickstart my-tokenizer"
	@echo "  vqcore show quant/vq"

test: .venv/full
	$(PYTEST) -n 2

test-slow: .venv/full
	$(PYTEST) -n 2 -m slow --durations=10

lint: .venv/full
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

types: .venv/full
	$(BIN)/mypy vqcore $(foreach id,$(PLUGINS),plugins/vqcore_$(id)/vqcore_$(id)) benchmarks
	cd examples/vqcore-pose && ../../$(BIN)/mypy vqcore_pose

format: .venv/full
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
