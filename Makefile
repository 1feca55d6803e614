# What one does with this repository. Each target is one line of shell; the work is done by the scripts in dev/.
.DEFAULT_GOAL := help
CLUSTER ?= demo
NODES ?= 2

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- the two commands of the README ---------------------------------------------------------------------------------
.PHONY: demo
demo: images ## See it work: a policy from Observe to Enforce to Verified, on simulated GPUs; then all is undone
	@dev/demo/run

.PHONY: test
test: setup ## Run all tests; starts the clusters it needs and leaves nothing behind
	@dev/test

.PHONY: test-vllm
test-vllm: export WATTLOCK_KIND_MODE = no
test-vllm: setup ## Sweep a real vLLM, then run one, prefill and decode, on the local cluster (downloads 2.6 GB the first time; not part of "test")
	@dev/test vllm

# --- set-up ---------------------------------------------------------------------------------------------------------
.PHONY: setup
setup: ## Install what is missing: Debian packages, uv, .venv, the cluster's programs (8 minutes the first time)
	@dev/setup

.PHONY: images
images: setup ## Build the images of operator, agent and simulator
	@dev/images

.PHONY: sbom
sbom: images ## List what is in each image, as CycloneDX documents in dist/sbom/
	@dev/sbom

.PHONY: scan
scan: sbom ## Ask the registries what is known against the packages in the images (docs/supply-chain.md)
	@dev/scan

.PHONY: cluster-up
cluster-up: images ## Start a local Kubernetes with two nodes (CLUSTER=demo NODES=2)
	@dev/cluster up --name $(CLUSTER) --nodes $(NODES)

.PHONY: cluster-down
cluster-down: ## Stop it; nothing is left behind
	@dev/cluster down --name $(CLUSTER)

# --- code -----------------------------------------------------------------------------------------------------------
.PHONY: check
check: setup ## Check formatting, lint, types, import rules and the lock file
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m wattlock_api.generate --check crds
	.venv/bin/python charts/generate.py --check
	.venv/bin/python docs/generate.py --check
	.venv/bin/python agent/generate_protos.py --check
	dev/build-requirements --check
	@# Offline and without a mirror: nothing may be resolved anew, only compared.
	env -u UV_DEFAULT_INDEX -u UV_INDEX_URL WATTLOCK_UV_SETTINGS_DONE=1 dev/uv lock --check --offline

.PHONY: unit
unit: setup ## Run the unit tests alone (three minutes)
	.venv/bin/python -m pytest tests/unit

.PHONY: fuzz
fuzz: setup ## Odd inputs through all parsers (21,000), new examples for all properties, new lives for the model of an agent (5 minutes)
	WATTLOCK_FUZZ_INPUTS=3000 .venv/bin/python -m pytest -q -s tests/unit/test_fuzz_parsers.py
	.venv/bin/python -m pytest -q -m hypothesis --hypothesis-profile search tests/unit
	WATTLOCK_MODEL_EXAMPLES=300 .venv/bin/python -m pytest -q tests/unit/agent/test_lifecycle_model.py

.PHONY: chaos
chaos: setup ## Random faults against a cluster of its own (N=200 SEED=a new one FROM=1), until one is not undone
	@dev/chaos --steps $(or $(N),200) $(if $(SEED),--seed $(SEED)) --from-step $(or $(FROM),1) $(CHAOS)

.PHONY: test-hardware
test-hardware: ## Measure this machine's real GPU under load, read-only, and write docs/hardware/ (LOAD_PYTHON=PYTHON)
	@dev/hardware

.PHONY: bench
bench: setup ## Print reaction times, the agent's cost and API requests, measured on a local cluster
	@dev/bench

.PHONY: bench-estimator
bench-estimator: setup ## Judge the estimator by simulated truth: coverage, false verdicts, half-widths (six minutes), and plot
	.venv/bin/python tests/bench/estimator/estimator_bench.py

.PHONY: bench-decision
bench-decision: setup ## Judge the tuner's choice by simulated truth, beside power caps, fixed clocks and the oracle (half a minute), and plot
	.venv/bin/python tests/bench/decision/decision_bench.py

.PHONY: generate
generate: setup ## Write what is generated: CRDs, the chart's copies and tables, the table of metrics, protobuf code
	.venv/bin/python -m wattlock_api.generate crds
	.venv/bin/python charts/generate.py
	.venv/bin/python docs/generate.py
	.venv/bin/python agent/generate_protos.py
	dev/build-requirements

.PHONY: sweep
sweep: setup ## Measure simulated GPUs over clocks and power limits, and write docs/sweep/ (half an hour, little CPU)
	@dev/sweep

.PHONY: clean
clean: ## Remove caches: built programs, images and tools (not .venv)
	@dev/clean
