# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project

PYTHON ?= python3
# Version of the base; empty is the default one: .venv. Any other: .venv-<version>.
BASE ?=
# The release on which the defect was reported, as far as a CPU has it.
REPORTED_BASE := 0.22.1
# What needs no engine, which that release cannot start with this torch.
REPORTED_BASE_TESTS := tests/distributed tests/model_executor/model_loader/reload \
	tests/entrypoints/serve tests/v1/metrics $(addprefix tests/v1/engine/test_, \
	pending_calls.py replica_calls.py rpc_refusal.py weight_health.py \
	weight_sync_feed.py) \
	tests/v1/worker/test_reload_source.py
# A first look: the docs, and the defects that the fork is about.
QUICK_TESTS := tests/docs tests/model_executor/model_loader/reload/test_defects.py
# How long `make soak` runs.
SCHEDULES ?= 5000
SYNCS ?= 200
GPU_TESTS := $(addprefix tests/kernels/, test_strided_copy.py test_group_sums.py \
	moe/test_scale_scan.py moe/test_fp8_grouped_gemm.py moe/test_fp8_experts.py \
	moe/test_against_base.py) \
	tests/v1/engine/test_bad_scale_engine.py \
	$(addprefix tests/entrypoints/rl/test_, trainer_process.py ipc_server.py \
	ranks.py replicas.py)

export HF_HUB_OFFLINE := 1
export VLLM_CPU_KVCACHE_SPACE := 1

.DELETE_ON_ERROR:
.PHONY: help venv demo quick test soak bench upstream-test gpu-test gpu-bench wheel \
	patch patch-test docs lint clean

help: ## this list
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

venv: ## [BASE=x.y.z] a working environment that follows this checkout
	@$(PYTHON) -m overlay venv $(if $(BASE),--base $(BASE))

demo: default-venv ## what the released vLLM does with a trainer's mistakes, and the fork
	.venv/bin/python -m demo

quick: lint ## lint, the docs, and each defect that the fork is about
	.venv/bin/python -m pytest $(QUICK_TESTS)

test: default-venv ## all tests that need no GPU, upstream's too
	@$(PYTHON) -m overlay venv --base $(REPORTED_BASE)
	.venv/bin/python -m pytest tests
	.venv/bin/python -m tests.upstream
	.venv-$(REPORTED_BASE)/bin/python -m pytest $(REPORTED_BASE_TESTS)

soak: default-venv ## [SCHEDULES=n] [SYNCS=n] random faults, then syncs, for hours
	mkdir -p build
	.venv/bin/python -m tests.soak syncs --count $(SYNCS) --log build/soak-syncs.log
	.venv/bin/python -m tests.soak faults --count $(SCHEDULES) --log build/soak-faults.log

upstream-test: default-venv ## upstream's own tests of the reload, on base and fork
	.venv/bin/python -m tests.upstream

bench: default-venv ## loads and syncs of base and fork in turns, into build/
	mkdir -p build
	.venv/bin/python -m benchmarks.sync --out build/sync.json
	.venv/bin/python -m benchmarks.sync.plot build/sync.json build/sync.png

gpu-test: ## with the fork installed on a machine with a GPU: what needs one
	$(PYTHON) -m pytest $(GPU_TESTS)

gpu-bench: ## the same: layers of FP8 experts and syncs, into build/
	mkdir -p build
	$(PYTHON) -m benchmarks.kernels.moe.bench --out build/moe.json
	$(PYTHON) -m benchmarks.kernels.moe.plot build/moe.json build/moe.png
	$(PYTHON) -m benchmarks.sync --model Qwen3-30B-A3B --layers 16 --out build/sync.json
	$(PYTHON) -m benchmarks.sync.plot build/sync.json build/sync.png

wheel: default-venv ## [BASE=x.y.z] the fork as a wheel, into dist/
	.venv/bin/python -m overlay build $(if $(BASE),--base $(BASE))

patch: default-venv ## [BASE=x.y.z] the fork as patches for upstream, into dist/upstream/
	.venv/bin/python -m overlay patch $(if $(BASE),--base $(BASE))

patch-test: default-venv ## [BASE=x.y.z] those, applied to upstream's source and tested there
	.venv/bin/python -m tests.upstream.patched $(if $(BASE),--base $(BASE))

docs: default-venv ## the pages of docs/ as a site, into build/site/
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "build/site/index.html"

lint: default-venv ## ruff, mypy and typos
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/typos

clean: ## remove what was built, but for environments and bases
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: default-venv
default-venv:
	@$(PYTHON) -m overlay venv
