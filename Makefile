# What can be done here; `make` alone lists it.
#
# The environment is .venv, made at first use and kept. Another interpreter is chosen
# with PYTHON=python3.13; if .venv is of another Python version, .venv-3.13 is used.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= $(shell grep -qs '^version *= *$(VERSION)' .venv/pyvenv.cfg || test ! -e .venv \
	&& echo .venv || echo .venv-$(VERSION))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# TorchGeo 0.9, TerraTorch, which wants it, and rs-embed over what the environment has.
OLDER := $(VENV)-torchgeo-0.9
PAGES := from-rs-embed terratorch timm torchgeo

.PHONY: help
help:
	@echo 'make demo    embed a synthetic scene with random weights; writes demo-output/'
	@echo 'make test    run the tests'
	@echo 'make test-torchgeo-0.9'
	@echo '             run those that touch TorchGeo, with TorchGeo 0.9, TerraTorch and rs-embed'
	@echo 'make lint    check style and types'
	@echo 'make docs    build the documentation into build/docs'
	@echo 'make dist    build what is published into dist/ (Linux, with a C compiler)'
	@echo 'make clean   remove the environments and what was made here'
	@echo
	@echo 'The first run creates $(VENV) and installs into it (PyTorch is a few GB).'
	@echo 'PYTHON=python3.13 make test picks another interpreter.'

.PHONY: demo
demo: $(INSTALLED)
	$(BIN)/dynamicvis-geo demo --output demo-output

.PHONY: test
test: $(INSTALLED)
	$(BIN)/python -m pytest

# Python 3.12 or later; CONTRIBUTING.md says what else runs where.
.PHONY: test-torchgeo-0.9
test-torchgeo-0.9: $(OLDER)/.installed
	$(OLDER)/bin/python -m pytest -m 'not once' \
		tests/integrations tests/datasets tests/samplers \
		tests/datamodules tests/test_places.py tests/test_embedding.py \
		$(PAGES:%='tests/test_documents.py::test_page[%]')

.PHONY: lint
lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: docs
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# The second wheel is made as where there is no compiler, for all other platforms.
.PHONY: dist
dist: $(INSTALLED)
	rm -rf dist build/dist *.egg-info
	$(BIN)/python -m build --no-isolation --outdir build/dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m auditwheel repair --wheel-dir dist build/dist/*.whl
	CC=false $(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m twine check --strict dist/*

# The interpreter that would be used, for scripts.
.PHONY: python
python:
	@echo $(PYTHON)

.PHONY: clean
clean:
	rm -rf .venv .venv-* demo-output build dist *.egg-info

$(INSTALLED): pyproject.toml setup.py dynamicvis_geo/models/_scan.c
	@test -n '$(VERSION)' || { echo 'Python 3.11 or later is needed: name one with \
	PYTHON=/path/to/python3.12 make ...' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	'Python 3.11 or later is needed, but $(PYTHON) is $(VERSION): name another with \
	PYTHON=/path/to/python3.12 make ...' >&2; exit 2; }
	@echo 'Installing into $(VENV) with Python $(VERSION)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[tests]'
	@touch $@

# A path file lets pip find there what the environment has, and add what differs.
$(OLDER)/.installed: $(INSTALLED)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	echo 'TorchGeo 0.9 needs Python 3.12 or later, but $(PYTHON) is $(VERSION)' >&2; \
	exit 2; }
	$(BIN)/python -m venv --clear --without-pip $(OLDER)
	here=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	there=$$($(OLDER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$here')" > "$$there/environment.pth"
	$(OLDER)/bin/python -m pip install 'dynamicvis-geo[terratorch]' 'torchgeo==0.9.*'
	@# By itself: its own models need seventy packages more, and an old timm.
	$(OLDER)/bin/python -m pip install --no-deps 'rs-embed>=0.3'
	@touch $@
