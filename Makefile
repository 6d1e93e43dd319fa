# SPDX-License-Identifier: Apache-2.0
# Thin: each target calls a script or a tool of the virtual environment. `make help` lists them.

KERNEL ?=
TEST ?=
CMD ?=
export CMD

PYTHON := .venv/bin/python -B
PYTEST := $(PYTHON) -m pytest -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help build demo test test-unit test-engine test-harness test-vm test-faults
.PHONY: driver test-driver test-driver-long vm bench lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

build: ## install what is missing and build ublkd in .venv
	@scripts/setup build

demo: ## a file becomes a disk, is used as one, and goes away
	@scripts/setup build
	@scripts/demo

test: ## unit, engine, test machines, our driver, faults, and integration on real kernels
	@scripts/setup
	@$(MAKE) --no-print-directory test-unit
	@$(MAKE) --no-print-directory test-engine
	@$(MAKE) --no-print-directory test-harness
	@$(MAKE) --no-print-directory test-driver
	@scripts/faults storm orderings powercut many
	@$(MAKE) --no-print-directory test-vm

test-unit: ## seconds, without a kernel driver (TEST="-k something" or a node id)
	@scripts/setup build
	$(PYTEST) -m 'not vm' $(if $(findstring tests/,$(TEST)),,tests/unit tests/vm tests/faults) $(TEST)

test-engine: ## the C engine alone, under the address and undefined-behaviour sanitizers
	@scripts/setup build
	$(MAKE) --no-print-directory -C tests/engine check

test-harness: ## what scripts/vm promises, on a real machine (2 minutes)
	@scripts/setup vm build
	UBLKD_TEST_VM=1 $(PYTEST) -m vm tests/vm

test-vm: ## integration tests on 6.12 and newest, or KERNEL=6.12 (TEST="-k something" or a node id)
	@scripts/setup
	@scripts/lib/integration $(KERNEL) -- $(TEST)

test-faults: ## hours: what docs/reliability.md promises, in full (KERNEL=6.12 for one)
	@scripts/setup
	@scripts/faults --full storm upgrades orderings powercut many $(if $(KERNEL),--kernel $(KERNEL))

driver: ## build our own kernel module for the kernels of scripts/vm
	@scripts/setup driver
	@scripts/driver $(KERNEL)

test-driver: ## our driver on 6.1 and 6.12, or KERNEL=6.12: conformance, zones, memory, shards, fuzz
	@scripts/setup driver
	@scripts/setup
	@scripts/driver $(KERNEL) --test -- $(TEST)

test-driver-long: ## the same for much longer, on debug kernels, too, and the whole integration suite on it (hours)
	@scripts/setup debug-kernel
	@scripts/setup
	UBLKD_SHARD_KILLS=500 UBLKD_FUZZ_SECONDS=1800 scripts/driver $(KERNEL) --test
	UBLKD_FUZZ_SECONDS=1800 scripts/driver $(KERNEL) --debug --test
	@scripts/lib/integration $(KERNEL) --own-driver

vm: ## a shell in KERNEL=6.12, or CMD="a command"
	@scripts/setup vm
	@scripts/vm $(KERNEL) $(if $(CMD),-- sh -c "$$CMD")

bench: ## measure beside others: half an hour and more (docs/benchmarks)
	@scripts/setup build vm bench
	@scripts/bench

lint: ## ruff and mypy
	@scripts/setup lint
	.venv/bin/ruff check daemon tests scripts/vm scripts/tune scripts/tunelib scripts/bench scripts/benchlib
	.venv/bin/mypy

clean: ## remove what was built, not the cached kernels
	rm -rf build .venv .pytest_cache .mypy_cache .ruff_cache daemon/*.egg-info daemon/ublkd/_engine.c
	rm -f daemon/ublkd/*.so
	find daemon tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -f tests/engine/Makefile ]; then $(MAKE) --no-print-directory -C tests/engine clean; fi
