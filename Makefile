# Every target sets itself up in .venv. From a fresh clone, `make demo` is all it takes.
PYTHON ?= python3
BIN := .venv/bin
TRAIN := $(BIN)/accelerate launch -m training.train --config configs/tiny

.PHONY: setup demo test lint tiny clean

setup: .venv/.dev

# torch comes first and alone: with its range fixed, nothing later replaces it by a newer build.
.venv/.base: pyproject.toml scripts/repair_torchaudio.py
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
		"FlowOmni needs Python 3.11 or 3.12, and $(PYTHON) is %d.%d; run: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'torch>=2.11,<2.14'
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python scripts/repair_torchaudio.py
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.base  ## three questions answered aloud, then one new answer taught
	$(BIN)/python -m inference.demo

test: .venv/.dev
	$(BIN)/python -m pytest -q --durations=15

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tiny: .venv/.base  ## the model in the box, retrained from nothing
	$(BIN)/python -m scripts.make_talk_corpus --out data/talk
	$(TRAIN)/vocoder.yaml
	$(TRAIN)/tokenizer.yaml
	$(TRAIN)/vocoder_tuned.yaml
	$(TRAIN)/text.yaml
	$(TRAIN)/hearing.yaml
	$(TRAIN)/align.yaml
	$(TRAIN)/listen.yaml
	$(TRAIN)/voice.yaml
	$(TRAIN)/speech.yaml
	$(BIN)/python -m scripts.pack_model runs/tiny/speech/final flowomni/models/flowomni-tiny \
		--sampling '{"solver": "euler", "num_steps": 16, "temperature": 0.6, "guidance": 2.5}'

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
