# From bare Python to a running package: `make demo`, `make test`. `make help` lists the rest.
#
# PYTHON  the Python that a new environment is made from
# VENV    the environment to use; made when it is not there, so it may also be one of your own
# JOBS    how many processes share the tests, each on a core of its own
# TORCH   what pip is asked for as torch. The default is the version the tests were run with.
#         `make demo TORCH=torch` takes the torch that VENV has already, or the newest one.
# Where packages come from, and which build of torch, is left to pip's own settings.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := $(VENV)/bin
# Touched after a complete installation; a broken-off one is started again.
INSTALLED := $(VENV)/.mixofshow-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: demo studio browser screenshots test check docs dist clean help

demo: $(INSTALLED) ## tune three concepts, fuse them, draw them together; writes out/demo/report.html
	$(BIN)/mixofshow demo --out out/demo

studio: $(INSTALLED) ## open the studio in a browser, on the embedded base with the example concepts
	$(BIN)/mixofshow studio out/studio $(foreach one,$(wildcard examples/concepts/*.safetensors),--concept $(one))

browser: ## install Debian's Chromium, where that may be, in which the tests open the studio; else they are skipped
	@command -v chromium || command -v chromium-browser \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
		|| echo 'no Chromium, and none could be installed: the tests of the studio in a browser are skipped'

screenshots: $(INSTALLED) ## pictures of the studio's tabs, into out/screenshots: light, dark, and on a phone; the documentation shows the light ones
	MIXOFSHOW_SCREENSHOTS=out/screenshots $(BIN)/python -m pytest -n0 -q -s tests/studio/test_screenshots.py
	cp out/screenshots/studio.png out/screenshots/studio-concepts.png out/screenshots/studio-tune.png out/screenshots/studio-measure.png docs/images/

# A file stays in one process, so that what it makes once for its tests is made once; one thread for each, or they
# and the commands that they start would be in each other's way.
test: $(INSTALLED) ## run the tests, without those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 25 --durations-min 10

check: $(INSTALLED) ## lint, types, and who may import whom
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## build the documentation site, strictly, into out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(INSTALLED) ## build the source archive and, out of it, the wheel, into dist/
	$(BIN)/python -m build --no-isolation

# TORCH decides about torch, so its line is left out of the constraints.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install -c $(VENV)/constraints.txt -e '.[dev,docs]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean: ## remove caches and what was built; leaves the environment and out/
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
