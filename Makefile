# Everything a person or a machine runs here. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BOOTSTRAP := $(PYTHON) deploy/setup/bootstrap.py $(if $(GPU),--gpu)
PYTEST_ARGS ?=
SOAK_ARGS ?=
POLICIES_ARGS ?=
HANDOFF_ARGS ?=
FUZZ_ARGS ?= --seconds 600
ROUTER_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo bench bench-policies bench-scheduling bench-preemption bench-handoff bench-router test test-clusters soak fuzz chaos chaos-kills chaos-controller chaos-handoff check proto clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 24
	@echo
	@echo "  GPU=1 with setup, demo or test installs SGLang's own packages for an NVIDIA GPU."
	@echo "  PYTHON=/path/to/python3.11 names the Python that .venv is made with."

setup:  ## make .venv, install everything, convert the default model; repeating it does nothing
	@$(BOOTSTRAP)
	@$(BIN)/python -m streamfill.models

demo: setup  ## stream a document into a small cluster and compare with sending it at once
	@$(BIN)/streamfill demo

bench: setup  ## replay a trace streamed, in one shot and warmed up; draws report.html; 15 minutes
	@$(BIN)/streamfill bench compare --trace traces/crawl-small.jsonl --request-rate 1.15 \
		--modes oneshot,warmup,stream --report report.html

bench-policies: setup  ## every scheduling policy on two traces at three loads; hours. POLICIES_ARGS=--resume goes on
	@$(BIN)/streamfill bench policies --output-file runs-policies.jsonl $(POLICIES_ARGS)

bench-scheduling: setup  ## what one decision of the scheduler costs, per policy; seconds
	@$(BIN)/python -m streamfill.scheduling.bench

bench-handoff: setup  ## KV hand-off beside its baselines: bare send, copy, SGLang's TCP backend; 10 minutes
	@$(BIN)/streamfill bench handoff $(HANDOFF_ARGS)

bench-router: setup  ## what one router on one core takes: segments, idle streams, requests; 4 minutes
	@$(BIN)/streamfill bench router $(ROUTER_ARGS)

# Unit tests share no cluster, so two run at a time; a file's tests stay together. Those of the
# transport, which live by short time-outs, run alone, as do those with clusters. Both parts run in any
# case. PYTEST_ARGS names what to run in place of all.
test: setup  ## run the tests: units, fuzzing, one shared cluster, a real model
ifeq ($(strip $(PYTEST_ARGS)),)
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit --ignore=tests/unit/kv_transfer || failed=1; \
	$(BIN)/python -m pytest -m "not clusters" tests/unit/kv_transfer tests/fuzz tests/integration tests/e2e || failed=1; \
	exit $$failed
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

test-clusters: setup  ## run the tests that kill, drain, squeeze and secure clusters of their own
	$(BIN)/python -m pytest -m clusters tests/integration

soak: setup  ## many streams do everything at random, and everything is checked; 15 minutes
	$(BIN)/python -m tests.chaos.soak $(SOAK_ARGS)

fuzz: setup  ## random input for every decoder and the HTTP API, seed after seed; 10 minutes. FUZZ_ARGS='--seconds 60'
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

bench-preemption: setup  ## memory for a quarter of the open streams, in each preemption mode; 35 minutes
	@$(BIN)/streamfill bench compare --trace traces/crawl-small.jsonl --request-rate 1.15 --modes oneshot,stream \
		--preemption auto,swap,recompute,none --set prefill.pool_tokens=4000 --report report-preemption-crawl.html
	@$(BIN)/streamfill bench compare --trace traces/ann-small.jsonl --request-rate 0.55 --modes oneshot,stream \
		--preemption auto,swap,recompute,none --set prefill.pool_tokens=2500 --report report-preemption-ann.html

chaos: setup  ## kills, pauses, bad links, clock jumps against a whole cluster, 20 seeds; half an hour. CHAOS_ARGS="--seed 7": one
	$(BIN)/python -m tests.chaos.cluster $(or $(CHAOS_ARGS),--seeds 0:20)

chaos-kills: setup  ## kill -9 of each process of a cluster in turn, under load; 2 minutes
	$(BIN)/python -m tests.chaos.cluster --kills $(CHAOS_ARGS)

chaos-controller: setup  ## the preemption controller is killed 20 times under memory pressure; 10 minutes
	$(BIN)/python -m tests.chaos.controller_kills --trace traces/crawl-small.jsonl $(CHAOS_ARGS)

chaos-handoff: setup  ## every fifth hand-off is spoiled and each server killed once, under 500 streams; 3 minutes
	$(BIN)/python -m tests.chaos.handoff_faults $(CHAOS_ARGS)

check: setup  ## lint, format, types and the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not integration and not e2e and not gpu" $(PYTEST_ARGS)

proto: setup  ## generate the gRPC stubs from the .proto file again
	$(BIN)/python src/streamfill/api/generate.py

clean:  ## remove .venv and caches; converted models stay
	rm -rf $(VENV) build dist .setup.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
