# Everything a newcomer needs is `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHIPPED := statics/shipped
VECTORIZER ?= $(SHIPPED)
DATA ?= $(wildcard ../shared/data)
OUT ?= $(SHIPPED)

.PHONY: install heads serve test check fix proto bench starter clean system horovod

install: $(VENV)/.dev  ## everything developers need

$(VENV)/.cpu $(VENV)/.heads: pyproject.toml constraints.txt
	@echo "setting up $(VENV) with [$(EXTRAS)] (no torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.cpu: EXTRAS := cpu
$(VENV)/.heads: EXTRAS := cpu,heads

$(VENV)/.dev: pyproject.toml constraints.txt
	@echo "setting up $(VENV) for development (torch and all; a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.cpu $(VENV)/.heads

system:  ## what tests need beside Python: a real redis-server, and OpenMP for boosted trees
	@{ command -v redis-server && ldconfig -p | grep libgomp.so.1; } >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq redis-server libgomp1 >/dev/null; \
	  else echo "redis-server or libgomp1 is missing; install them with your system's package manager" >&2; exit 1; fi; }

horovod: $(VENV)/.dev  ## ranks for training; the wheel is built once (needs g++) and kept in .cache/wheels
	@echo "building Horovod, unless its wheel is there (a few minutes)"
	@wheel=$$(deploy/horovod/build.sh) && $(BIN)/python -m pip install -qq "$$wheel"

heads: $(VENV)/.heads  ## what training heads needs: no torch
	@$(BIN)/nlu heads --help >/dev/null && echo "ready: $(BIN)/nlu heads --help"

serve: $(VENV)/.cpu  ## serve the shipped bundle on 127.0.0.1:50051
	$(BIN)/nlu serve

starter: $(VENV)/.heads  ## build the shipped bundle again, from content, public sets (DATA=) and vectorizer (VECTORIZER=)
	$(BIN)/nlu bundle starter --vectorizer $(VECTORIZER) $(if $(DATA),--data $(DATA)) --out $(OUT)

test: $(VENV)/.dev system  ## all tests
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## style, types, layers, stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy nlu annotators index statics tests benchmarks
	$(BIN)/lint-imports
	mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=build/proto --pyi_out=build/proto --grpc_python_out=build/proto proto/nlu/v1/nlu.proto proto/nlu/v1/control.proto
	diff -r -x __init__.py -x __pycache__ build/proto/nlu/v1 nlu/v1

fix: $(VENV)/.dev  ## format and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.dev  ## stubs from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/nlu/v1/nlu.proto proto/nlu/v1/control.proto

bench: $(VENV)/.dev  ## the numbers README cites
	$(BIN)/python -m benchmarks.latency

clean:
	rm -rf build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info $(VENV)
