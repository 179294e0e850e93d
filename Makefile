# Targets: run, test, bench, lint, format, clean. Everything else is a step on the way to one of these.
#
# Every recipe works from a fresh clone: the stamps below .venv say what is installed there, and depend
# on pyproject.toml, so a changed dependency is installed by the next make. Paths are relative, so the
# clone may live under any name.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# One locale and no interpreter settings of the caller's: what is installed and tested is what is here.
export LC_ALL := C.UTF-8
unexport PYTHONHOME
unexport PYTHONPATH
unexport PYTHONSTARTUP

PY := .venv/bin/python

# make PYTHON=/path/to/python3 test: another interpreter than .venv was made with makes it anew.
ifdef PYTHON
ifneq ($(shell PYTHON='$(PYTHON)' scripts/environment --is-named || echo another),)
.PHONY: .venv/installed .venv/installed-dev .venv/installed-fuzz .venv/installed-audit
endif
endif

.PHONY: help run test bench bench-workers fuzz soak torture coverage package audit lint format clean
.PHONY: system-test system-guest system-bench

help:
	@echo 'make run     serve a ready 1 GiB demo target (ARGS="..." adds options of iscsi-targetd serve)'
	@echo 'make test    all checks: format, lint, types, tests against the installed system peers'
	@echo 'make bench   compare with the C floor, tgtd and istgt (ARGS="--quick" and more: --help)'
	@echo 'make bench-workers   two targets in one process against two processes'
	@echo 'make fuzz    whatever bytes come: atheris, 5 minutes a harness (ARGS="--seconds 60 pdus")'
	@echo 'make soak    1000 sessions, faults and changes for 10 minutes (ARGS="--seconds 60 --sessions 100")'
	@echo 'make torture verified load with edits, flipped bits and kills for 10 minutes (ARGS="--seconds 7200")'
	@echo 'make coverage   branches of protocol/ that tests and corpus reach'
	@echo 'make package the Debian package, built and tried;   make audit   known holes in what we depend on'
	@echo 'make lint    format, lint and type checks only;   make format   put right what can be'
	@echo 'make clean   remove what make made, but no state directory'

.venv/installed: pyproject.toml scripts/environment
	@scripts/environment

.venv/installed-dev: pyproject.toml scripts/environment
	@scripts/environment dev

.venv/installed-fuzz .venv/installed-audit: .venv/installed-%: pyproject.toml scripts/environment
	@scripts/environment $*

system-test system-guest system-bench: system-%:
	@scripts/system-packages $*

run: .venv/installed
	@exec $(PY) -m targetd serve --demo $(ARGS)

lint: .venv/installed-dev
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

test: .venv/installed-dev system-test system-guest lint
	@umask 022 && $(PY) -m pytest $(ARGS)

bench: .venv/installed-dev system-bench
	@umask 022 && bench/build.sh && $(PY) -m bench.run $(ARGS)

bench-workers: .venv/installed-dev system-bench
	@umask 022 && bench/build.sh && $(PY) -m bench.workers $(ARGS)

fuzz: .venv/installed-fuzz
	@umask 022 && $(PY) -m tests.fuzz $(ARGS)

soak: .venv/installed
	@umask 022 && $(PY) -m tests.soak $(ARGS)

torture: .venv/installed-dev
	@umask 022 && $(PY) -m tests.torture $(ARGS)

coverage: .venv/installed-dev system-test
	@umask 022 && mkdir -p build && $(PY) -m coverage run -m pytest -q tests/protocol tests/scsi tests/fuzz \
	    tests/security/test_published_holes.py tests/security/test_limits.py tests/security/test_memory.py \
	    tests/test_initiator.py $(ARGS)
	@$(PY) -m coverage report

package:
	@packaging/debian/build.sh dist && packaging/debian/try.sh dist/iscsi-targetd_*.deb

audit: .venv/installed .venv/installed-audit
	@mkdir -p build && $(PY) -m pip --quiet freeze --local --exclude-editable > build/requirements.txt
	@$(PY) -m pip_audit --strict --no-deps --disable-pip -r build/requirements.txt $(ARGS)

format: .venv/installed-dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist bench/build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
