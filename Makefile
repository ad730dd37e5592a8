# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo test check format clean

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Fine-tune the tiny model on data/sample, unlearn forget10 in two ways, ask all three models the questions, and measure
# the G-effects of both runs.
TINY = data/weight/ft_epoch40_lr0.001_tiny_full_wd0.0
RUN = icml/tiny
demo: setup
	$(BIN)/python finetune.py model_family=tiny
	$(BIN)/python basher1.py ga --model=tiny --setting=forget10
	$(BIN)/python basher1.py npo_kl --model=tiny --setting=forget10
	for model in $(TINY) $(RUN)/ga_*_forget10_5_0.0_None/checkpoint-12 $(RUN)/npo_kl_*_forget10_5_0.0_None/checkpoint-12; do \
		$(BIN)/python tofu_evaluation.py model_family=tiny split=forget10 model_path=$$model || exit 1; done
	$(BIN)/python basher2.py ga --model=tiny --setting=forget10
	$(BIN)/python basher2.py npo_kl --model=tiny --setting=forget10 tokens=true
	@echo "The figures are in $(RUN)/*/geffect/figures"

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv icml data/weight
