# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo demo-full demo-retain90 demo-npo_kl demo-ga demo-report study study-runs study-sweeps study-attacks plan test check format docs links clean

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Fine-tune the tiny model on data/sample (and on retain90 alone, to compare with), unlearn forget10 in two ways, score both
# runs at all their checkpoints, measure their G-effects, and put all of it on one page. Two commands run side by side, of a
# thread each; what one of the two says goes into a log, which is shown where it fails.
TINY = data/weight/ft_epoch40_lr0.001_tiny
RUN = icml/tiny
OF = _*_forget10_5_0.0_None
RETAIN = retain_path=$(TINY)_retain90_wd0.0
# Twice the longest true answer, in tokens: what has unlearned by ga would go on for 200.
TOFU = $(BIN)/python tofu_evaluation.py generation.max_new_tokens=40 $(RETAIN)
demo: setup
	@mkdir -p $(RUN)
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 demo-report
	@echo "The scores are in $(RUN)/*/scores.csv, the figures in $(RUN)/*/figures, */geffect/figures and */checkpoint-*/eval_results/*/figures"
	@echo "Look at $(RUN)/report.html: open it in a browser"

demo-full:
	@echo "--- fine-tuning on all rows; beside it on retain90 alone, of which $(RUN)/retain90.log tells"
	$(BIN)/python finetune.py model_family=tiny

demo-retain90:
	$(BIN)/python finetune.py model_family=tiny split=retain90 > $(RUN)/retain90.log 2>&1 || { cat $(RUN)/retain90.log; exit 1; }

# From a method's name to its run, that run's scores and its G-effects.
unlearned = $(BIN)/python basher1.py $(1) --model=tiny --setting=forget10 && \
	$(TOFU) model_path=$$(echo $(RUN)/$(1)$(OF)) && \
	$(BIN)/python evaluation_everything.py model_path=$$(echo $(RUN)/$(1)$(OF)) $(RETAIN) && \
	$(BIN)/python basher2.py $(1) --model=tiny --setting=forget10 tokens=true

demo-npo_kl: demo-full demo-retain90
	@echo "--- unlearning by npo_kl, its scores and G-effects; beside it ga and the fine-tuned model's, of which $(RUN)/ga.log tells"
	$(call unlearned,npo_kl)

demo-ga: demo-full demo-retain90
	{ $(TOFU) split=forget10 model_path=$(TINY)_full_wd0.0 && \
	$(call unlearned,ga); } > $(RUN)/ga.log 2>&1 || { cat $(RUN)/ga.log; exit 1; }

demo-report: demo-npo_kl demo-ga
	$(BIN)/python report.py $(RUN)/ga$(OF) $(RUN)/npo_kl$(OF) --out $(RUN)/report.html

# docs/results/study.md of any family, or its parts one by one: make study SETTINGS="model_path=FULL data_path=DATA"
# RETAIN_MODEL=MODEL. What is finished is not run again. Attacks are of the runs of seed 1, the fair comparison by mixing of
# those at 1e-4, sweeps and tokens of one of npo's. Few methods give no rank correlations, and rows without wrong answers no
# facts: that is said, and the rest is done.
STUDY = icml/study
LAYERS = 5 15 28
COMMA = ,
study: study-runs study-attacks study-sweeps

study-runs: setup
	for experiment in trajectories rates hyper retain seeds "layers method.layer=$(subst $() ,$(COMMA),$(LAYERS))"; do \
		$(BIN)/python forget.py -m +experiment=$$experiment $(SETTINGS) output_dir=$(STUDY) || exit 1; done
	$(BIN)/python study.py runs $$(dirname $(STUDY)/*/*/scores.csv) --out $(STUDY)
	-$(BIN)/python study.py predict --out $(STUDY)

study-attacks: setup
	for run in $(STUDY)/*/*_seed=1; do \
		$(BIN)/python robustness.py model_path=$$run attacks=[relearn,quantize] $(RETAIN_MODEL:%=retain_path=%) || exit 1; done
	for run in $(STUDY)/*/*_0.0001_*; do $(BIN)/python evaluation_everything.py model_path=$$run || exit 1; done
	$(BIN)/python study.py runs $(STUDY)/*/*_seed=1 $(STUDY)/*/*_0.0001_* --out $(STUDY)

SWEEP = ga wga npo tnpo idk simnpo undial satimp dpo $(LAYERS:%=rmu_%) $(foreach m,npo simnpo tnpo wga,$m:0.1 $m:1)
study-sweeps: setup
	$(BIN)/python forget.py +experiment=rates method=npo lr=3e-5 save_steps=10 $(SETTINGS) geffect.every=0 save_dir=$(STUDY)/npo
	$(BIN)/python compute_geffect.py model_path_cur=$(STUDY)/npo tokens=true dtype=float32 sweep=[$(subst $() ,$(COMMA),$(strip $(SWEEP)))]
	-$(BIN)/python study.py order $(STUDY)/npo/geffect/sweep.csv --out $(STUDY)
	-$(BIN)/python study.py words $(STUDY)/npo --out $(STUDY)
	$(BIN)/python study.py rows $(STUDY)/npo --out $(STUDY)

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
