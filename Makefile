# What one does with this repository. Each target is one line of shell; the work is done by the scripts in dev/.
.DEFAULT_GOAL := help
CLUSTER ?= demo
NODES ?= 2

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- set-up ---------------------------------------------------------------------------------------------------------
.PHONY: setup
setup: ## Install what is missing: Debian packages, uv, .venv, the cluster's programs (8 minutes the first time)
	@dev/setup

.PHONY: images
images: setup ## Build the images of operator, agent and simulator
	@dev/images

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
	@# Offline and without a mirror: nothing may be resolved anew, only compared.
	env -u UV_DEFAULT_INDEX -u UV_INDEX_URL WATTLOCK_UV_SETTINGS_DONE=1 dev/uv lock --check --offline

.PHONY: clean
clean: ## Remove caches: built programs, images and tools (not .venv)
	@dev/clean
