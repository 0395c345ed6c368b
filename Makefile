# `make demo` and `make test` work on a fresh Debian machine with Python 3.11+, make and git.
PYTHON ?= python3
VENV ?= .venv
TOPOLOGY ?= examples/demo.toml
DEVICE ?= cuda
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One worker more than cores, since tests of processes wait as long as they compute; each holds some 1.5 GB. The order
# of tests: tests/conftest.py.
PARALLEL ?= -n $(shell expr $$(nproc) + 1) --maxprocesses 4 --dist worksteal

# Three wheels bring the same mooncake/ folder: one for hosts without an NVIDIA driver, one each for CUDA 12 and 13.
MOONCAKE := $(shell tools/mooncake_extra.sh)

.PHONY: help install demo serve test test-packages test-long test-hosts test-families test-s3 test-clients test-rdma test-prometheus test-placement test-ray test-page page-pictures test-contract test-gpu check format bench bench-http bench-memory gpu-report gpu-report-here docs docs-serve clean

help: ## This list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt tools/system_packages.sh tools/mooncake_extra.sh
	tools/system_packages.sh
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench,docs,$(MOONCAKE)]'
	touch $@

install: $(INSTALLED) ## Make the environment in .venv

demo: $(INSTALLED) ## An image through the running system, in out/demo.png
	$(BIN)/python -m triptych.tools.demo $(TOPOLOGY) -o out/demo.png

serve: $(INSTALLED) ## Start the system of TOPOLOGY=examples/demo.toml and keep it running
	$(BIN)/triptych up $(TOPOLOGY)

test: $(INSTALLED) test-packages ## All tests that need no GPU
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not families and not long and not hosts and not rdma and not placement and not ray and not s3 and not clients and not page and not prometheus and not contract"

test-packages: # Some tests run on hosts that are made of namespaces
	tools/system_packages.sh ip:iproute2 tc:iproute2 nft:nftables unshare:util-linux nsenter:util-linux

test-long: $(INSTALLED) ## chaos runs, pauses and the report for GPUs with tiny shapes: minutes
	$(BIN)/python -m pytest -m "long and not gpu"

test-hosts: $(INSTALLED) test-packages ## Three hosts made of namespaces, with long cuts between them: minutes
	$(BIN)/python -m pytest -m "hosts and not gpu"

test-families: $(INSTALLED) ## The same tests for every pipeline of diffusers, for when its version moves
	$(BIN)/python -m pytest $(PARALLEL) -m "families and not gpu"

test-s3: $(INSTALLED) $(VENV)-s3/bin/swift-proxy-server ## Tests against a real S3 server: OpenStack Swift, from PyPI, in an environment of its own
	TRIPTYCH_S3_PYTHON=$(abspath $(VENV)-s3/bin/python) $(BIN)/python -m pytest -m s3

$(VENV)-s3/bin/swift-proxy-server:
	$(PYTHON) -m venv $(VENV)-s3
	$(VENV)-s3/bin/pip install --quiet --disable-pip-version-check "swift==2.38.3"

test-clients: $(INSTALLED) ## Clients in other languages of examples/clients against a running system
	tools/system_packages.sh curl:curl node:nodejs go:golang-go
	$(BIN)/python -m pytest -m clients tests/system/test_client_examples.py

test-rdma: $(INSTALLED) ## Tests over RDMA, with a device that the kernel of a QEMU guest makes; two minutes
	tools/system_packages.sh qemu-system-x86_64:qemu-system-x86 rdma:iproute2
	$(BIN)/python -m triptych.tools.rdma_guest $(BIN)/python -m pytest -s -m rdma tests/engines/transfer

test-prometheus: $(INSTALLED) ## The dashboard and the alerts of examples/ against a real Prometheus that scrapes a system under load
	tools/system_packages.sh prometheus:prometheus promtool:prometheus
	$(BIN)/python -m pytest -m prometheus tests/system/test_prometheus.py

test-placement: $(INSTALLED) test-packages ## Hosts run over a real sshd and a real Slurm, manifests against all of Kubernetes' schemas
	tools/system_packages.sh sshd:openssh-server ps:procps slurmctld:slurmctld slurmd:slurmd srun:slurm-client
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt kubernetes-validate
	$(BIN)/python -m pytest -m placement tests/placement tests/actors/placement

test-ray: $(INSTALLED) test-packages ## Ray places the hosts, on three nodes made of namespaces; installs Ray (79 MB); minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m ray tests/hosts/test_ray.py

test-page: $(INSTALLED) ## The page in headless Chromium, with real clicks and axe-core; two minutes
	tools/system_packages.sh chromium:chromium
	$(BIN)/python -m pytest -m page tests/page

page-pictures: $(INSTALLED) # Those of the documentation, in docs/images
	tools/system_packages.sh chromium:chromium
	TRIPTYCH_PAGE_PICTURES=docs/images $(BIN)/python -m pytest -m page tests/page/test_pictures.py tests/page/test_map_pictures.py

test-contract: $(INSTALLED) ## What the OpenAPI document allows, and what it does not, sent to running systems by schemathesis; minutes
	$(BIN)/python -m pytest -m contract tests/system/test_schemathesis.py

test-gpu: ## Tests that need a GPU; makes no environment: `make test-gpu PYTHON=python3` uses that one
	$(PYTHON) -m pytest -m gpu tests/gpu

check: $(INSTALLED) ## Lint, formatting, import rules, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: $(INSTALLED) ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) test-packages ## The benchmarks, as JSON lines
	$(BIN)/python -m triptych.tools.bench bus
	$(BIN)/python -m triptych.tools.bench transfer
	$(BIN)/python -m triptych.tools.bench overhead
	$(BIN)/python -m triptych.tools.bench steps
	$(BIN)/python -m triptych.tools.bench hosts

bench-http: $(INSTALLED) $(VENV)-ray/bin/serve ## HTTP against Ray Serve, which is installed in an environment of its own (some 400 MB); minutes
	TRIPTYCH_RAY_PYTHON=$(abspath $(VENV)-ray/bin/python) $(BIN)/python -m triptych.tools.bench http

$(VENV)-ray/bin/serve: constraints.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/pip install --quiet --disable-pip-version-check "$$(grep '^ray==' constraints.txt | sed 's/ray/ray[serve]/')"
	touch $@

bench-memory: $(INSTALLED) ## What each process holds in memory, in docs/memory.md; some five minutes and 10 GiB
	$(BIN)/python -m triptych.tools.bench memory --markdown docs/memory.md

REPORT = -m triptych.tools.gpu_report --device $(DEVICE) --budget 540 -o out/gpu.json --page docs/gpu.md

gpu-report: $(INSTALLED) ## What a GPU gives, in docs/gpu.md; nine minutes, DEVICE=cpu shows the rows with tiny models
	$(BIN)/python $(REPORT)

gpu-report-here: ## The same without an environment of its own: `make gpu-report-here PYTHON=python3`
	$(PYTHON) $(REPORT)

docs: $(INSTALLED) ## The documentation as a site, in out/site; a broken link fails
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(INSTALLED) ## The same on http://127.0.0.1:8001, made anew at each change
	$(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8001

clean: ## Remove the environment and what was made
	rm -rf $(VENV) $(VENV)-s3 $(VENV)-ray out build *.egg-info .mypy_cache .ruff_cache
