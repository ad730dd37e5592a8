# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo study plan test check format docs links clean

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Fine-tune the tiny model on data/sample (and on retain90 alone, to compare with), unlearn forget10 in two ways, score both
# runs at all their checkpoints, measure their G-effects, and put all of it on one page.
TINY = data/weight/ft_epoch40_lr0.001_tiny
RUN = icml/tiny
RUNS = $(RUN)/ga_*_forget10_5_0.0_None $(RUN)/npo_kl_*_forget10_5_0.0_None
demo: setup
	$(BIN)/python finetune.py model_family=tiny
	$(BIN)/python finetune.py model_family=tiny split=retain90
	$(BIN)/python basher1.py ga --model=tiny --setting=forget10
	$(BIN)/python basher1.py npo_kl --model=tiny --setting=forget10
	$(BIN)/python tofu_evaluation.py split=forget10 model_path=$(TINY)_full_wd0.0 retain_path=$(TINY)_retain90_wd0.0
	for run in $(RUNS); do for script in tofu_evaluation evaluation_everything; do \
		$(BIN)/python $$script.py model_path=$$run retain_path=$(TINY)_retain90_wd0.0 || exit 1; done; done
	$(BIN)/python basher2.py ga --model=tiny --setting=forget10 tokens=true
	$(BIN)/python basher2.py npo_kl --model=tiny --setting=forget10 tokens=true
	$(BIN)/python report.py $(RUNS) --out $(RUN)/report.html
	@echo "The scores are in $(RUN)/*/scores.csv, the figures in $(RUN)/*/figures, */geffect/figures and */checkpoint-*/eval_results/*/figures"
	@echo "Look at $(RUN)/report.html: open it in a browser"

# The runs of docs/results/study.md and its tables, of any family: make study SETTINGS="model_path=FULL data_path=DATA". What is
# finished is not run again.
STUDY = icml/study
study: setup
	for experiment in trajectories layers rates retain seeds; do \
		$(BIN)/python forget.py -m +experiment=$$experiment $(SETTINGS) output_dir=$(STUDY) || exit 1; done
	$(BIN)/python study.py runs $(STUDY)/*/*_forget01_* --out $(STUDY)
	$(BIN)/python study.py predict --out $(STUDY)

# What a family needs of memory and disk: make plan FAMILY=llama2-7b GPUS=8 SETTINGS="parallel=fsdp plan_for=gpu".
FAMILY ?= llama2-7b
GPUS ?= 1
plan: setup
	$(BIN)/python finetune.py model_family=$(FAMILY) plan=$(GPUS) $(SETTINGS)
	$(BIN)/python forget.py model_family=$(FAMILY) method=npo retain=kl plan=$(GPUS) geffect.every=5 $(SETTINGS)
	$(BIN)/python evaluation_everything.py model_family=$(FAMILY) plan=$(GPUS) $(SETTINGS)

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

# The site of docs/, in docs/_build/html: a warning, or a link to nothing in here, is an error.
SPHINX = $(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet
docs: setup
	$(SPHINX) -b html docs docs/_build/html
	@echo "The site is docs/_build/html/index.html"

# Whether the links that lead elsewhere still do: needs a network.
links: setup
	$(SPHINX) -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf .venv icml data/weight docs/_build
