# make demo | make demo-distil | make test | make lint | make docs | make clean. Each makes .venv by itself;
# PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := output/demo
DEMO_MODEL := glm_peft/assets
PREDICT := $(BIN)/python -m glm_peft.predict --model_name_or_path $(DEMO_MODEL) --dtype float32 \
	--test_file examples/demo/test.json --prompt_column content --response_column summary --max_new_tokens 96 \
	--per_device_eval_batch_size 20
DISTIL := output/demo_distil
READING := examples/reading
ASK := $(BIN)/python -m glm_peft.predict --model_name_or_path $(READING)/model --dtype float32 \
	--test_file $(READING)/questions.jsonl --max_new_tokens 16 --per_device_eval_batch_size 64
# Two threads are what the demo was timed with; with no number at all accelerate chooses one and remarks on it.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS

.PHONY: demo demo-distil test lint docs clean

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml glm_peft/train.py configs/demo.yaml
	$(PREDICT) --output_dir $(DEMO)/before
	$(PREDICT) --output_dir $(DEMO)/after --adapter_name_or_path $(DEMO)/adapter
	@$(BIN)/python scripts/demo_report.py --base $(DEMO_MODEL) --adapter $(DEMO)/adapter \
		--before $(DEMO)/before --after $(DEMO)/after --bin $(BIN)/

demo-distil: $(INSTALLED)
	rm -rf $(DISTIL)
	$(BIN)/python -m glm_peft.distil $(READING)/distil.yaml
	$(ASK) --output_dir $(DISTIL)/document --system_text "$$(cat $(READING)/sheet.md)"
	$(ASK) --output_dir $(DISTIL)/prefix --adapter_name_or_path $(DISTIL)/adapter
	$(ASK) --output_dir $(DISTIL)/neither
	@$(BIN)/python scripts/distil_report.py --folder $(DISTIL) --bin $(BIN)/

# One thread for each worker: two workers on two cores must not fight for them.
# Who is done takes tests from the other, as files take from a moment to minutes.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports setup.cfg --no-cache

# The site, both languages, into site/: every link and anchor is checked, and nothing is loaded from the network.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site begins at site/index.html and site/zh/index.html."

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf site output build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# pip is there only where venv came to its end: a half-made .venv is made again.
$(INSTALLED): constraints.txt setup.cfg pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@
