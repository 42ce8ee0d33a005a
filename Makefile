# Two commands: `make run` and `make test`. Each installs what is missing first, and says so (scripts/setup).

SHELL := /bin/bash
export PATH := $(PATH):$(CURDIR)/.cache/tools/bin

TARGET := $(or $(CARGO_TARGET_DIR),target)
EBB := $(TARGET)/debug/ebb
# Mounting volumes needs root.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=EBB_LOG,EBB_PG_BIN)
# … and so do the tests that mount: where the user is not root, test programs are run through sudo.
RUNNER := $(if $(filter 0,$(shell id -u)),,CARGO_TARGET_$(shell rustc -vV | sed -n 's/^host: //p' | tr a-z- A-Z_)_RUNNER='sudo --preserve-env')
# Options for `ebb serve`: make run SERVE='--data /var/lib/ebb'
SERVE ?=

.PHONY: help run test bench
.DEFAULT_GOAL := help

help: ## Show this
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: ## Build and start `ebb serve` in ./.ebb, make a first project, print its URLs; Ctrl-C stops it
	scripts/setup run
	cargo build -p ebb-cli
	@exec $(SUDO) $(EBB) serve --first-project shop $(SERVE)

test: ## Run every test: unit, integration against real PostgreSQL, end to end; then fuzz for a minute
	scripts/setup test
	cargo build --workspace --bin ebb
	$(RUNNER) cargo nextest run --workspace
	scripts/fuzz

bench: ## Measure Ebb against its peers; prints ratios
	scripts/setup bench
	cargo build --release -p ebb-cli -p ebb-benches -p ebb-proxy-bench
	$(SUDO) $(TARGET)/release/ebb-bench all
	$(SUDO) $(TARGET)/release/ebb-proxy-bench all
