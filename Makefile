# install: the environment    demo: see it work    test: prove it    check: the same word by another name
# format: let ruff rewrite    protos: the stubs, after teacher.proto changed
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test check format protos

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

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The stubs come from the oldest grpcio-tools that pyproject.toml allows: newer runtimes load older stubs, not the other
# way round.
protos: install
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/teacher.proto
