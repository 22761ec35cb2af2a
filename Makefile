# The whole method on generated apartments, in the real ManiSkill-HAB environments:
#
#   make demo    the workflow below, small: 20 minutes on two cores -> runs/demo/report.md
#   make learn   one policy for six columns: 3 hours                -> runs/learn/report.md
#   make test    the fast tests
#   make clean   remove both runs; assets, which may hold a download, stays
#
# Each target first makes .venv and finds a renderer (tools/setup.sh; PYTHON=... chooses Python). A
# stopped run goes on, and finished steps are not repeated: `make clean` after you change a number.
# `make learn SEED=1` trains again with other weights and another order -> runs/learn-1.

PYTHON ?=
# Simulators, and training processes (which share a batch of 32): one per core.
WORKERS ?= 2
PROCESSES ?= 2
PY = .venv/bin/python

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Threads that wait must sleep: spinning, they slow torch 3 to 9 times when another program runs.
export OMP_WAIT_POLICY = passive
# Threads of Mesa's renderer, per simulator.
export LP_NUM_THREADS = 1

.PHONY: demo learn test setup clean shipped workflow
.NOTPARALLEL:

demo: setup
	@$(MAKE) --no-print-directory shipped workflow RUN=runs/demo

learn: setup
	@$(MAKE) --no-print-directory workflow SIZE=learn RUN=runs/learn$(SEED:%=-%)

test: setup
	$(PY) -m pytest -q -m "not slow"

setup:
	@PYTHON="$(PYTHON)" bash tools/setup.sh

clean:
	rm -rf runs/demo runs/learn runs/learn-*

# --- The workflow's numbers ---

SIZE = demo
RUN = runs/demo
# Seed of weights, order of samples and flow noise; empty: 0.
SEED =
COLUMNS = pick_all place_all open_fridge open_drawer close_fridge close_drawer
EVAL_SEED = 10000

ifeq ($(SIZE),demo)
# Demonstrations, as subtask:target:number; mostly closing the drawer.
DEMONSTRATIONS = close:kitchen_counter:70 open:kitchen_counter:4 close:fridge:4 open:fridge:4 \
	pick:all:4 place:all:4
# Optimizer steps of stages 1, 2, 3, and the learning rate of stage 2.
STEPS1 = 100
STEPS2 = 700
STEPS3 = 700
LR2 = 1e-3
# Evaluation episodes: stage 2 on closing the drawer and on each other column, stage 3 (flow head),
# random actions and the expert.
TRIALS = 20
TRIALS_OTHERS = 1
TRIALS_FLOW = 6
TRIALS_RANDOM = 20
TRIALS_BOUNDS = 1
FLOW_COLUMNS = close_drawer
else
DEMONSTRATIONS = pick:024_bowl:220 pick:013_apple:180 place:all:140 open:fridge:140 \
	open:kitchen_counter:150 close:fridge:90 close:kitchen_counter:80
# Corrections: the policy of stage 1 drives, then the expert takes over (collect.py --after); twice,
# with more training of stage 1 in between. Not after stage 2, since there the losses of position,
# grasp and joints slow grasping down.
CORRECTIONS = pick:024_bowl:90 pick:013_apple:50 place:all:30 open:fridge:30 \
	open:kitchen_counter:40 close:fridge:60 close:kitchen_counter:20
STEPS1 = 4000
STEPS2 = 4000
STEPS3 = 3000
LR2 = 5e-4
TRIALS = 60
TRIALS_OTHERS = 60
TRIALS_FLOW = 20
TRIALS_RANDOM = 60
TRIALS_BOUNDS = 60
FLOW_COLUMNS = $(COLUMNS)
endif
LR1 = 1e-3
LR3 = 1e-3
OTHERS = $(filter-out close_drawer,$(COLUMNS))

# $(call record,LIST,FLAGS) records demonstrations; collect.py goes on where it was stopped.
record = set -e; for each in $(1); do set -- $$(echo $$each | tr : ' '); \
	$(PY) collect.py --task set_table --split train --subtask $$1 --target $$2 \
	--episodes $$3 --workers $(WORKERS) $(2); done
PACK = $(PY) data.py pack --data $(RUN)/data
# Two processes of one thread are 1.5 times as fast as one process of two threads. The scripted
# expert uses only a part of the controller's range, the flow head's noise all of it: bounds from
# the data's percentiles give both one scale (GAP-23).
TRAIN = OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc_per_node=$(PROCESSES) train.py --preset tiny \
	--action-bounds percentiles --run-name $(notdir $(RUN)) --data $(RUN)/data $(SEED:%=--seed %)
# Episodes stop at a success, as demonstrations do; what a policy does afterwards is not counted.
EVAL = $(PY) eval.py --task set_table --split val --seed $(EVAL_SEED) --workers $(WORKERS) \
	--stop-at-success

shipped workflow: export MS_ASSET_DIR = $(CURDIR)/assets
shipped: $(RUN)/.shipped
workflow: $(RUN)/.evaluated
	$(PY) -m tools.report --run $(RUN)

# Films to look at before the long work: the policy of weights/ drives, once in each column.
$(RUN)/.shipped: assets/household.json
	$(EVAL) --checkpoint weights/stage2 --out $(RUN)/eval-shipped \
		--columns $(COLUMNS) --episodes 1 --video 1
	@echo "The trained policy of weights/ drove: films in $(RUN)/eval-shipped/videos"
	@touch $@

assets/household.json:
	$(PY) -m household.assets --out assets --seed 0

$(RUN)/.collected: assets/household.json
	@$(call record,$(DEMONSTRATIONS),--out $(RUN)/data)
	$(PACK)
	@touch $@

$(RUN)/.stage1: $(RUN)/.collected
	$(TRAIN) --stage 1 --steps $(STEPS1) --lr $(LR1)
	@touch $@

$(RUN)/.corrected: $(RUN)/.stage1
	@$(call record,$(CORRECTIONS),--out $(RUN)/data/after-stage1 --after $(RUN)/stage1 --seed 20000)
	$(PACK)
	@touch $@

$(RUN)/.stage1-more: $(RUN)/.corrected
	$(TRAIN) --stage 1 --steps $(STEPS1) --lr $(LR1) --init-from $(RUN)/stage1 \
		--out $(RUN)/stage1-more
	@touch $@

$(RUN)/.corrected-more: $(RUN)/.stage1-more
	@$(call record,$(CORRECTIONS),--out $(RUN)/data/after-stage1-more \
		--after $(RUN)/stage1-more --seed 30000)
	$(PACK)
	@touch $@

STAGE1 = $(if $(CORRECTIONS),stage1-more,stage1)
$(RUN)/.trained: $(RUN)/$(if $(CORRECTIONS),.corrected-more,.stage1)
	$(TRAIN) --stage 2 --steps $(STEPS2) --lr $(LR2) --init-from $(RUN)/$(STAGE1)
	$(TRAIN) --stage 3 --steps $(STEPS3) --lr $(LR3)
	$(PY) -m storage.checkpoint export --checkpoint $(RUN)/stage2 --out $(RUN)/policy
	@touch $@

$(RUN)/.evaluated: $(RUN)/.trained
	$(EVAL) --checkpoint $(RUN)/policy --out $(RUN)/eval \
		--columns close_drawer --episodes $(TRIALS) --video 3
	$(EVAL) --checkpoint $(RUN)/policy --out $(RUN)/eval \
		--columns $(OTHERS) --episodes $(TRIALS_OTHERS) --video 1
	$(EVAL) --checkpoint $(RUN)/stage3 --out $(RUN)/eval-flow \
		--columns $(FLOW_COLUMNS) --episodes $(TRIALS_FLOW) --video 1 \
		--row auxvla-action-head
	$(EVAL) --policy random --out $(RUN)/eval-random \
		--columns close_drawer --episodes $(TRIALS_RANDOM)
	$(EVAL) --policy random --out $(RUN)/eval-random \
		--columns $(OTHERS) --episodes $(TRIALS_BOUNDS)
	$(EVAL) --policy expert --out $(RUN)/eval-expert \
		--columns $(COLUMNS) --episodes $(TRIALS_BOUNDS) --video 1
	@touch $@
