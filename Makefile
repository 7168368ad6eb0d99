.PHONY: demo test test-slow test-versions test-kernels zoo quality style docs package test-pythons clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
DOCS_READY := .venv-docs/ready
PACKAGE_READY := .venv-package/ready

# The main job end to end on generated data: dense against compressed, no network, under 3 minutes on 2 cores.
demo: $(READY)
	$(BIN)/python recipes/demo.py

# Two processes of one thread each; the tests of one file stay together, since they share what they made.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# A choice of the tests at the lowest and newest versions that pyproject.toml allows, and at torch 2.11, which was faulty;
# a download of gigabytes and about 10 minutes each. Environments are made in runs/ and removed.
test-versions:
	PYTHON=$(PYTHON) tests/versions/run.sh "torch==2.10.*" "transformers==5.17.*"
	PYTHON=$(PYTHON) tests/versions/run.sh "torch==2.11.*" "transformers==5.17.*"
	PYTHON=$(PYTHON) tests/versions/run.sh

# Compiles every Triton kernel for GPUs that are not here and interprets it. Triton comes in an environment of its own, which
# sees the packages of the other: where it is installed, the tests of kernels would run in `make test` as well.
test-kernels: $(READY)
	$(BIN)/python -m venv .venv-kernels
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		>"$$(.venv-kernels/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/packages.pth"
	.venv-kernels/bin/python -m pip install --quiet --no-deps "triton==3.7.*"
	OMP_NUM_THREADS=1 PYTHONPATH=. .venv-kernels/bin/python -m pytest \
		tests/inference/test_weight_only.py tests/quantization/test_kernels_triton.py

# Every architecture through every gate, trained and exported, into docs/architectures.md; about an hour on one core.
zoo: $(READY)
	$(BIN)/python -m benchmarks.zoo

# The site, into build/site; fails on any warning. Its tools are in an environment of their own.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict
	@echo "open build/site/index.html"

# Wheel and source distribution in dist/, whose metadata and long description are checked.
package: $(PACKAGE_READY)
	rm -rf dist
	.venv-package/bin/python -m build --quiet
	.venv-package/bin/python -m twine check --strict dist/*

# The wheel in clean environments of every supported Python that this machine has; gigabytes and minutes each.
test-pythons: package
	OMP_NUM_THREADS=1 .venv-package/bin/nox

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-docs .venv-kernels .venv-package build dist .nox runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Pages are made from the source without importing it, so the extra's own list is installed and not what it extends.
$(DOCS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt \
		$$($(PYTHON) docs/site/packages.py)
	touch $@

$(PACKAGE_READY): constraints.txt
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet --constraint constraints.txt build twine nox
	touch $@
