# make demo | make test | make lint | make clean. Each makes .venv by itself; PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := output/demo
DEMO_MODEL := $(DEMO)/model/config.json

.PHONY: demo test lint clean

demo: $(INSTALLED) $(DEMO_MODEL)
	rm -rf $(DEMO)/adapter $(DEMO)/predictions
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml glm_peft/train.py configs/demo.yaml
	$(BIN)/python -m glm_peft.predict --model_name_or_path $(DEMO)/model --adapter_name_or_path $(DEMO)/adapter \
		--test_file examples/demo/test.json --prompt_column content --response_column summary \
		--output_dir $(DEMO)/predictions
	@echo "Model: $(DEMO)/model   Adapter: $(DEMO)/adapter"
	@echo "Predictions: $(DEMO)/predictions/generated_predictions.jsonl   Scores: $(DEMO)/predictions/predict_results.json"

# One thread for each worker: two workers on two cores must not fight for them.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf output build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(DEMO_MODEL): $(wildcard scripts/*.py) | $(INSTALLED)
	rm -rf $(DEMO)/model
	$(BIN)/python scripts/make_tiny_model.py --output_dir $(DEMO)/model --generation chatglm \
		--hidden_size 128 --num_layers 4 --num_heads 4

# pip is there only where venv came to its end: a half-made .venv is made again.
$(INSTALLED): constraints.txt setup.cfg pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@
