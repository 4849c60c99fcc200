# Every command of the project. Paths are relative, so the folder may have any name.
.DEFAULT_GOAL := help
.PHONY: help install demo up doctor up-embedded status logs down clean test lint format test-unit test-integration test-repos \
        test-monitoring test-docker test-e2e test-e2e-docker bench lock

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin
PYTHON ?=
UV_VERSION := 0.13.8
PYTEST := $(BIN)/python -m pytest -q
# Where this machine trusts authorities of its own, so do the images that are built here.
ifneq ($(SSL_CERT_FILE),)
export AIRLOOM_CA_BUNDLE ?= $(SSL_CERT_FILE)
endif
# Where pip finds wheels on this machine, image builds find them too.
ifneq ($(PIP_FIND_LINKS),)
export AIRLOOM_WHEELS ?= $(PIP_FIND_LINKS)
endif

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 26

install: ## make .venv with the packages of requirements/lock.txt; does nothing when nothing changed
	@PYTHON='$(PYTHON)' UV_VERSION='$(UV_VERSION)' bash requirements/install.sh

demo: install ## from nothing to a served model: start the platform, run the pipeline digits, show what is served
	@$(BIN)/airloom demo

up: install ## start the stack: check this machine, build the platform's image, start the containers, provision
	@$(BIN)/airloom init
	@$(BIN)/airloom doctor
	@while IFS== read -r name value; do [[ -v $$name ]] || export "$$name=$$value"; done \
	    < <(cat .env.local .env 2>/dev/null | grep -E '^[A-Z_]+='); \
	  export AIRLOOM_COMMIT=$$(git describe --always --abbrev=40 --dirty --exclude '*' 2>/dev/null || echo unknown); \
	  DOCKER_BUILDKIT=1 docker build -q $${AIRLOOM_CA_BUNDLE:+--secret "id=ca,src=$$AIRLOOM_CA_BUNDLE"} \
	  --build-arg AIRLOOM_PYTHON_IMAGE --build-arg DOCKER_CLI_IMAGE --build-arg AIRLOOM_COMMIT \
	  -f images/airflow/Dockerfile -t "$$AIRLOOM_PLATFORM_IMAGE" . ; \
	  case ",$$COMPOSE_PROFILES," in *,jenkins,*) \
	    DOCKER_BUILDKIT=1 docker build -q $${AIRLOOM_CA_BUNDLE:+--secret "id=ca,src=$$AIRLOOM_CA_BUNDLE"} \
	    --build-arg JENKINS_BASE_IMAGE --build-arg AIRLOOM_PLATFORM_IMAGE --build-arg AIRLOOM_COMMIT \
	    -f images/jenkins/Dockerfile -t "$$JENKINS_IMAGE" . ;; \
	  esac
	@$(BIN)/airloom up

doctor: install ## check what the stack needs of this machine
	@$(BIN)/airloom init
	@$(BIN)/airloom doctor

up-embedded: install ## start the platform without Docker
	@$(BIN)/airloom up --embedded

status: install ## show every service
	@$(BIN)/airloom status

logs: install ## show what the services wrote
	@$(BIN)/airloom logs

down: install ## stop the platform; its data stays
	@$(BIN)/airloom down

clean: install ## remove all data, models, logs and secrets of this installation; asks first
	@$(BIN)/airloom clean

test: install lint test-unit test-integration test-monitoring test-docker test-e2e test-e2e-docker ## all tests, quickest first

lint: install ## style, types, layers and spelling; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/airloom check

format: install ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-unit: install ## single modules, no service; the stage repos' own tests too
	$(PYTEST) -n 2 --dist worksteal tests/unit

test-repos: install ## the tests of the three stage repos alone
	@for repo in gitbucket_repos/*/; do echo "$$repo"; (cd "$$repo" && ../../$(PYTEST) tests); done

test-integration: install ## real services of one kind
	$(PYTEST) -n 2 --dist loadfile tests/integration --ignore tests/integration/test_monitoring.py

test-monitoring: install ## dashboards and alerts over services that have done nothing else
	$(PYTEST) tests/integration/test_monitoring.py

test-docker: install ## images, containers and the stack; needs a Docker engine, skips with the reason where there is none
	$(PYTEST) -n 2 --dist loadfile tests/docker

test-e2e: install ## the whole platform: a first run to a reproduced one, pushes, kills
	$(PYTEST) $(addprefix tests/e2e/test_,pipeline.py monitoring.py push.py reconcile.py own_repo.py kills.py)

test-e2e-docker: install ## the whole platform with its stages in containers
	$(PYTEST) tests/e2e/test_docker.py

bench: install ## the benchmarks that need no running platform; docs/benchmarks.md tells of the others
	$(BIN)/python bench/dag_parsing.py
	$(BIN)/python bench/versioning.py
	$(BIN)/python -m bench.serving

lock: install ## make requirements/lock.txt anew from pyproject.toml
	rm -f requirements/lock.txt  # an old pin of torch would bring the build with GPU libraries
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra stack --python-version 3.11 --no-annotate --no-header \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} -o requirements/lock.txt
	sed -i 's/+cpu$$//' requirements/lock.txt
