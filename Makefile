# Everything a newcomer needs is `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE := .cache/starter
CONTENT := $(shell find statics/starter -type f 2>/dev/null)

.PHONY: install serve test check fix proto bench starter clean system

install: $(VENV)/.dev  ## everything developers need

$(VENV)/.train: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (torch and all; a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo "setting up $(VENV) for development (torch and all; a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.train

system:  ## what tests need beside Python: a real redis-server
	@command -v redis-server >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq redis-server >/dev/null; \
	  else echo "redis-server is missing; install it with your system's package manager" >&2; exit 1; fi; }

starter: $(BUNDLE)/manifest.json  ## the bundle built from the authored content

$(BUNDLE)/manifest.json: $(CONTENT) | $(VENV)/.train
	$(BIN)/nlu bundle starter --out $(BUNDLE) $(if $(DATA),--data $(DATA))

serve: $(VENV)/.train starter  ## serve it on 127.0.0.1:50051
	$(BIN)/nlu serve --bundle $(BUNDLE)

test: $(VENV)/.dev system  ## all tests
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## style, types, layers, stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nlu annotators index statics tests benchmarks
	$(BIN)/lint-imports
	mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=build/proto --pyi_out=build/proto --grpc_python_out=build/proto proto/nlu/v1/nlu.proto
	diff -r -x __init__.py -x __pycache__ build/proto/nlu/v1 nlu/v1

fix: $(VENV)/.dev  ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev  ## stubs from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/nlu/v1/nlu.proto

bench: $(VENV)/.dev starter  ## the numbers README cites
	$(BIN)/python -m benchmarks.latency

clean:
	rm -rf build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info $(VENV)
