PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo bench test contract check lint types zoo prune-zoo prune-speed prune-accuracy low-rank quantize prune-weights finetuning pack-bench hashed-bench kmeans-bench gpu gpu-bundle versions grouped-bench widths deep-compression scale kills composition operators clean

install: $(STAMP)

# torch first and alone: where the machine offers a CPU wheel of this version, nothing later pulls CUDA arrays in.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" torch==$(TORCH)
	touch $(STAMP)

demo: install
	$(BIN)/surgery demo --out runs/demo

# every shipped recipe on trained networks: docs/benchmarks.md; BENCH=quick, BENCH=torchvision
bench: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/bench.py $(BENCH)

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# every pass with several options on every network; `test` has passes of one plugin take turns, and options meet fewer networks
contract: install
	CONTRACT=all $(BIN)/python -m pytest -n 2 --dist worksteal -k contract

# the suite on each supported torch, in a virtual environment of its own; gigabytes, where only CUDA builds are on offer
versions:
	$(MAKE) test VENV=.venv-2.11 TORCH=2.11.0
	$(MAKE) test VENV=.venv-2.13 TORCH=2.13.0
	$(MAKE) test VENV=.venv-2.14 TORCH=2.14.1

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

$(VENV)/.zoo: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torchvision==0.28.0 timm==1.0.31
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps torch-pruning==1.6.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check huggingface_hub pillow matplotlib tqdm
	touch $(VENV)/.zoo

zoo: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/zoo.py $(ZOO)

prune-zoo: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/pruning.py $(PRUNE)

prune-speed: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/pruning_speed.py $(SPEED)

prune-accuracy: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/accuracy.py $(ACCURACY)

quantize: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/quantize.py $(BENCH)

low-rank: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/low_rank.py $(BENCH)

prune-weights: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/prune_weights.py $(BENCH)

kmeans-bench: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/kmeans.py $(KMEANS)

finetuning: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/finetuning.py $(FINETUNING)

deep-compression: $(VENV)/.zoo
	$(BIN)/python tests/benchmarks/deep_compression.py $(DEEP)

pack-bench: install
	$(BIN)/python tests/benchmarks/pack.py $(PACK)

hashed-bench: install
	$(BIN)/python tests/benchmarks/hashed.py $(HASHED)

# which grouped convolutions the runtime is fast with
grouped-bench: install
	$(BIN)/python tests/benchmarks/grouped.py $(GROUPED)

# how many channels the runtime is fast with
widths: install
	$(BIN)/python tests/benchmarks/widths.py $(WIDTHS)

# memory and time of large and deep models: docs/scale.md; SCALE="--models chain vit_h", SCALE=--quick
scale: install
	$(BIN)/python tests/benchmarks/scale.py $(SCALE)

# one recipe killed at random moments and resumed
kills: install
	$(BIN)/python tests/benchmarks/kills.py $(KILLS)

# every ordered pair of passes on every network of the contract kit
composition: install
	$(BIN)/python tests/benchmarks/composition.py $(COMPOSE)

# what a CUDA device does with all this, within 9 minutes: docs/gpu.md
gpu: install
	$(BIN)/python tests/benchmarks/gpu.py $(GPU)

# what a bare machine with a device lacks, in one folder
gpu-bundle: install
	$(BIN)/python tests/benchmarks/gpu_bundle.py $(BUNDLE)

# PyTorch's database of operators, each between two layers: docs/operators.md
operators: install
	$(BIN)/python tests/benchmarks/operators.py $(OPERATORS)

clean:
	rm -rf $(VENV) runs build *.egg-info
