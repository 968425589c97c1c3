# Everything here sets up .venv by itself when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo
# What the targets for GPUs run: an environment with a PyTorch for CUDA (.venv holds the CPU's).
GPU_PYTHON ?= python3
TARGET ?= sm_90
# What check-install resolves for; PYTHONS="/path/to/python3.10 ..." where they are not on the PATH.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13

# The two installations that make up the environment: the CPU's PyTorch where that is what pip finds, then everything else.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PYTORCH := -c constraints.txt torch==2.13.0
PROJECT := -c constraints.txt -e '.[dev]'

.PHONY: help demo from-scratch test lint bench bench-cpu gpu-test bench-gpu check-install sanitize compile-report clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing PyTorch (CPU) and the tools; a few minutes on a slow line"
	$(BIN)/python $(PIP_INSTALL) $(PYTORCH)
	$(BIN)/python $(PIP_INSTALL) $(PROJECT)
	@touch $@

demo: $(READY) ## train a small GPT on Python's own documentation, generate from it, and time training with and without the kernels
	$(BIN)/gptcore info
	$(BIN)/gptcore prepare python-docs --out data/python-docs --vocab-size 4096
	rm -rf $(RUN)
	$(BIN)/gptcore train --data data/python-docs --out $(RUN) --preset mini --steps 500 --optimizer muon --schedule linear --lr 3e-3 --min-lr 1.5e-4 --eval-interval 125
	$(BIN)/gptcore generate --model $(RUN) --max-new-tokens 120 --temperature 0.8 --top-k 50 --seed 1 "The function returns"
	@echo "loss curve: $(RUN)/loss.png"
	$(BIN)/python -m bench.speedup --data data/python-docs

from-scratch: demo ## after the demo, every other command of docs/from-scratch.md (about half an hour; downloads 140 MB of data and weights)
	$(BIN)/gptcore tokens --tokenizer data/python-docs "The function returns a list of strings."
	$(BIN)/gptcore nearest --model runs/demo --count 6 returns list file
	$(BIN)/gptcore fetch smollm2-135m-instruct
	$(BIN)/gptcore fetch sms-spam
	$(BIN)/gptcore fetch instructions
	$(BIN)/gptcore fetch country-capitals
	$(BIN)/gptcore fetch analogies
	$(BIN)/gptcore fetch sentiment
	$(BIN)/gptcore fetch de-en
	$(BIN)/gptcore nearest --model smollm2-135m-instruct --count 6 king Paris seven
	$(BIN)/gptcore attention-map --model smollm2-135m-instruct --layers 13 --heads 8 --out docs/attention.svg "The cat sat down because it was tired"
	rm -rf runs/spam-demo runs/spam runs/assistant runs/preferred runs/few-shot
	$(BIN)/gptcore finetune classify --data sms-spam --model runs/demo --trained all --balance sampling --batch-size 16 --lr 5e-4 --steps 400 --out runs/spam-demo
	$(BIN)/gptcore finetune classify --data sms-spam --model smollm2-135m-instruct --context 128 --balance sampling --batch-size 16 --lr 5e-4 --steps 120 --eval-interval 60 --out runs/spam
	$(BIN)/gptcore classify --model runs/spam "You have won a prize! Call 09061701461 now." "Are you home yet?"
	$(BIN)/gptcore finetune instruct --data instructions --model smollm2-135m-instruct --batch-size 4 --epochs 1 --eval-interval 45 --out runs/assistant
	echo "What do bees make?" | $(BIN)/gptcore chat --model runs/assistant --temperature 0 --max-new-tokens 60
	$(BIN)/python docs/full_stops.py data/full-stops.jsonl
	$(BIN)/gptcore finetune prefer --data data/full-stops.jsonl --model runs/assistant --context 256 --batch-size 4 --epochs 1 --eval-interval 20 --out runs/preferred
	$(BIN)/gptcore eval --list
	$(BIN)/gptcore eval --model runs/demo --model smollm2-135m-instruct --task capitals --task analogies --task plurals --task arithmetic --task sentiment --task translate --shots 0,1,5 --out runs/few-shot --plot docs/few-shot.svg

test: $(READY) lint ## lint, types, and every test (kernels run in Triton's interpreter where there is no GPU)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(READY) ## ruff (lint and format) and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(READY) ## time every op and a training step beside PyTorch's own
	$(BIN)/python -m pytest bench --benchmark-only -q

bench-cpu: $(READY) ## time the native kernels against PyTorch on this CPU (docs/benchmarks.md), about fifteen minutes
	$(BIN)/python -m bench.cpu --out bench/results

gpu-test: ## on a machine with a GPU: the kernels on it, real sizes, past 2^31 elements, under CUDA graphs (about ten minutes)
	$(GPU_PYTHON) -m pytest -q -m gpu

bench-gpu: ## on a machine with a GPU: every Triton kernel and a training step against everybody else's (about ten minutes)
	PYTHONPATH=kernels:. $(GPU_PYTHON) -m bench.gpu

check-install: ## resolve what demo and test install, for each of PYTHONS as on a new machine (gigabytes; nothing is installed)
	@set -e; for python in $(PYTHONS); do \
	    $$python --version; \
	    resolve="env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL -u PIP_CONSTRAINT PIP_CONFIG_FILE=/dev/null \
	        $$python -m pip install --disable-pip-version-check --dry-run --ignore-installed"; \
	    found=$$($$resolve $(PYTORCH)); echo "PyTorch:$${found##*Would install}"; \
	    found=$$($$resolve $(PROJECT)); echo "project:$${found##*Would install}"; \
	done

sanitize: $(READY) ## the native kernels over every op's cases under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m bench.sanitize

compile-report: $(READY) ## compile every Triton kernel for a GPU that need not be there (TARGET=sm_90; sm_80, gfx942, ..., all)
	$(BIN)/python -m gptkernels.compile_report --target $(TARGET)

clean: ## remove the virtual environment and everything made by runs
	rm -rf $(VENV) runs data build dist *.egg-info .pytest_cache .ruff_cache
