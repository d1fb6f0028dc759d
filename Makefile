# Every target sets itself up: `make demo` and `make test` work on a fresh clone with no command before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test engines aot kernels tritons docs site wheel hub lint format clean

demo: $(READY)
	$(BIN)/kvfold demo --out demo-out $(if $(TEXT),--text "$(TEXT)")

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal

# The integrations against vLLM's and SGLang's own classes, from their wheels (380 MB, downloaded once), on a CPU: their Triton
# kernels run interpreted.
engines: $(READY)
	$(BIN)/python packaging/engines.py build/engines
	TRITON_INTERPRET=1 $(BIN)/pytest tests/engines

# Every row of the table with every format, for every GPU in the support table, to files under build/aot; needs none of them, and
# about an hour of two cores. Fails where a kernel does not compile; `kvfold aot sm_90 DIR` also where one spills more than it may.
TARGETS := sm_80 sm_89 sm_90 sm_100 sm_103 sm_120 gfx942 gfx950
aot: $(READY)
	failed=; for target in $(TARGETS); do $(BIN)/kvfold aot $$target build/aot/$$target --spec table --no-strict || failed=1; done; [ -z "$$failed" ]

# The kernels of DeepSeek-V4's calls for an H100 or H200, compiled for whichever Triton is here: a package in build/kernels and a
# wheel of it in dist/kernels. A minute on 16 cores, 10 on 2; no GPU. SETS: whose calls, as of `kvfold prebuild --set`.
SETS := v4
kernels: $(READY)
	$(BIN)/kvfold prebuild sm_90 build/kernels/sm_90 $(addprefix --set ,$(SETS))
	$(BIN)/python packaging/kernels.py build/kernels dist/kernels

# What the benchmarks call, compiled by every older Triton that the package takes, each in an environment with nothing else of its
# own; 1 to 4 minutes each.
OLDER := 3.5 3.6 3.7 3.8
tritons: $(READY)
	for version in $(OLDER); do \
		place=build/triton-$$version; \
		$(PYTHON) -m venv $$place && \
		$$place/bin/python -m pip install --quiet --disable-pip-version-check "triton==$$version.*" && \
		$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
			> "$$($$place/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/development.pth" && \
		PYTHONPATH=src TRITON_CACHE_DIR=$$place/cache $$place/bin/python -m benchmarks.run.precompile || exit 1; \
	done

# Tables, pictures and marked parts of the documents, from results, formats and configurations.
docs: $(READY)
	$(BIN)/python -m benchmarks.publish.documents

# The documents as a static site, in build/site.
site: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[site]"
	$(BIN)/python packaging/make_site.py build/site

# The wheel, by way of the source distribution, and a new user's first steps with it in an environment of its own.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(PYTHON) packaging/smoke.py dist/*.whl dist/environment

# kvfold as a repository of the Hugging Face Hub, in hub/; standard library only.
hub:
	$(PYTHON) packaging/hub.py hub

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo-out dist hub build
