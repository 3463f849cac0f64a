# install: the environment    demo: see it work    test: prove it    check: the same word by another name
# up: the whole cluster, by Docker Compose    down: its end; volumes stay    cluster-test: it proved, on a Docker engine
# format: let ruff rewrite    protos: the stubs, after teacher.proto changed
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test check up down cluster-test format protos

# Docker's own Compose where it is there, else the environment's: the program itself, for $(BIN)/docker-compose always
# ends with status 0.
COMPOSE = $$(docker compose version >/dev/null 2>&1 && echo docker compose || \
    echo $(VENV)/lib/python*/site-packages/compose/docker-compose)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Preceptor needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,embedded,tracing,student,ray,bench,dev]'
	touch $@

demo: install
	$(BIN)/python benchmarks/demo.py

# Format, lint, types, import contracts and stale stubs are tests too (tests/test_project.py), so there is one command.
test check: install
	$(BIN)/python -m pytest

up: .env
	@docker compose version >/dev/null 2>&1 || $(MAKE) install
	$(COMPOSE) up --detach --build --wait
	@$(COMPOSE) ps --format 'table {{.Service}}\t{{.Status}}\t{{.Ports}}'
	@echo "8000: where the compute went. 8001: for students. 8265: Ray. 9090: Prometheus. 3000: Grafana. See docs/cluster.md"

down: .env
	$(COMPOSE) --profile '*' down

# The password of both Redis, drawn once.
.env:
	@umask 077 && printf 'REDIS_PASSWORD=%s\n' "$$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >$@

cluster-test: install
	$(BIN)/python -m pytest -s tests/cluster

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stubs come from the oldest grpcio-tools that pyproject.toml allows: newer runtimes load older stubs, not the other
# way round.
protos: install
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher.proto
