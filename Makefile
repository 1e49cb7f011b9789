# Every target sets itself up in .venv. From a fresh clone, `make demo` is all it takes.
PYTHON ?= python3
BIN := .venv/bin
TRAIN := $(BIN)/accelerate launch -m training.train --config configs/tiny
TINY ?= flowomni/models/flowomni-tiny

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

# Do the ten stages fit together? A few steps of each, in minutes:
#   make tiny TINY=runs/rehearsal CORPUS_ARGS='--num-pairs 300' TRAIN_ARGS='--max_steps 3 --compile false'
tiny: .venv/.base  ## the model in the box, retrained from nothing
	$(BIN)/python -m scripts.make_talk_corpus --out data/talk $(CORPUS_ARGS)
	$(TRAIN)/vocoder.yaml $(TRAIN_ARGS)
	$(TRAIN)/tokenizer.yaml $(TRAIN_ARGS)
	$(TRAIN)/vocoder_tuned.yaml $(TRAIN_ARGS)
	$(TRAIN)/text.yaml $(TRAIN_ARGS)
	$(TRAIN)/hearing.yaml $(TRAIN_ARGS)
	$(TRAIN)/align.yaml $(TRAIN_ARGS)
	$(TRAIN)/listen.yaml $(TRAIN_ARGS)
	$(TRAIN)/voice.yaml $(TRAIN_ARGS)
	$(TRAIN)/speech.yaml $(TRAIN_ARGS)
	$(TRAIN)/again.yaml $(TRAIN_ARGS)
	$(BIN)/python -m scripts.pack_model runs/tiny/again/final $(TINY) --average-with runs/tiny/speech/final \
		--sampling '{"solver": "euler", "num_steps": 16, "temperature": 0.6, "guidance": 2.5}'

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
