# The whole method on generated apartments, in the real ManiSkill-HAB environments:
#
#   make demo    the workflow below, small: 20 minutes on two cores -> runs/demo/report.md
#   make learn   the same with more of everything, 97 minutes      -> runs/learn/report.md
#   make test    the fast tests
#   make clean   remove both runs; assets, which may hold a download, stays
#
# Each target first makes .venv and finds a renderer (tools/setup.sh; PYTHON=... chooses Python). A
# stopped run goes on, and finished steps are not repeated: `make clean` after you change a number.

PYTHON ?=
# Simulators, and training processes (which share a batch of 32): one per core.
WORKERS ?= 2
PROCESSES ?= 2
PY = .venv/bin/python

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Threads that wait must sleep: spinning, they slow torch tenfold when another program runs.
export OMP_WAIT_POLICY = passive
# Threads of Mesa's renderer, per simulator.
export LP_NUM_THREADS = 1

.PHONY: demo learn test setup clean shipped workflow
.NOTPARALLEL:

demo: setup
	@$(MAKE) --no-print-directory shipped workflow RUN=runs/demo

learn: setup
	@$(MAKE) --no-print-directory workflow RUN=runs/learn EPISODES=80 EPISODES_OTHERS=80 \
		STEPS1=300 STEPS2=6000 STEPS3=3000 TRIALS=20 TRIALS_OTHERS=20 TRIALS_FLOW=20 \
		TRIALS_RANDOM=20 TRIALS_BOUNDS=20

test: setup
	$(PY) -m pytest -q -m "not slow"

setup:
	@PYTHON="$(PYTHON)" bash tools/setup.sh

clean:
	rm -rf runs/demo runs/learn

# --- The workflow, with the demo's numbers: mostly closing the drawer ---

RUN = runs/demo
OTHERS = pick_all place_all open_fridge open_drawer close_fridge
COLUMNS = $(OTHERS) close_drawer

# Demonstrations of closing the drawer, and of each other column.
EPISODES = 70
EPISODES_OTHERS = 4
# Optimizer steps of stages 1, 2, 3.
STEPS1 = 100
STEPS2 = 600
STEPS3 = 900
LR3 = 1e-3
# Evaluation episodes: stage 2 on closing the drawer and on each other column, stage 3 (flow head),
# random actions and the expert. Episodes stop at a success, which is faster; whether they would
# have succeeded at their end is unknown.
TRIALS = 20
TRIALS_OTHERS = 3
TRIALS_FLOW = 6
TRIALS_RANDOM = 20
TRIALS_BOUNDS = 3
FLOW_COLUMNS = close_drawer
EVAL_FLAGS = --stop-at-success

COLLECT = $(PY) collect.py --expert scripted --task set_table --split train \
	--workers $(WORKERS) --out $(RUN)/data
# Two processes of one thread are 1.5 times as fast as one process of two threads. The scripted
# expert uses only a part of the controller's range, the flow head's noise all of it: bounds from
# the data's percentiles give both one scale (GAP-23).
TRAIN = OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc_per_node=$(PROCESSES) train.py --preset tiny \
	--action-bounds percentiles --run-name $(notdir $(RUN)) --data $(RUN)/data
EVAL = $(PY) eval.py --task set_table --split val --workers $(WORKERS) $(EVAL_FLAGS)

shipped workflow: export MS_ASSET_DIR = $(CURDIR)/assets
shipped: $(RUN)/.shipped
workflow: $(RUN)/.evaluated
	$(PY) -m tools.report --run $(RUN)

# A film to look at before the long work: the policy of weights/ drives.
$(RUN)/.shipped: assets/household.json
	$(EVAL) --checkpoint weights/stage2 --out $(RUN)/eval-shipped \
		--columns close_drawer close_fridge --episodes 2 --video 1
	@echo "The trained policy of weights/ drove: films in $(RUN)/eval-shipped/videos"
	@touch $@

assets/household.json:
	$(PY) -m household.assets --out assets --seed 0

$(RUN)/.collected: assets/household.json
	$(COLLECT) --subtask close --target kitchen_counter --episodes $(EPISODES)
	$(COLLECT) --subtask open --target kitchen_counter --episodes $(EPISODES_OTHERS)
	$(COLLECT) --subtask close --target fridge --episodes $(EPISODES_OTHERS)
	$(COLLECT) --subtask open --target fridge --episodes $(EPISODES_OTHERS)
	$(COLLECT) --subtask pick --target all --episodes $(EPISODES_OTHERS)
	$(COLLECT) --subtask place --target all --episodes $(EPISODES_OTHERS)
	@touch $@

$(RUN)/.trained: $(RUN)/.collected
	$(PY) data.py pack --data $(RUN)/data
	$(TRAIN) --stage 1 --steps $(STEPS1)
	$(TRAIN) --stage 2 --steps $(STEPS2)
	$(TRAIN) --stage 3 --steps $(STEPS3) --lr $(LR3)
	@touch $@

$(RUN)/.evaluated: $(RUN)/.trained
	$(EVAL) --checkpoint $(RUN)/stage2 --out $(RUN)/eval \
		--columns close_drawer --episodes $(TRIALS) --video 3
	$(EVAL) --checkpoint $(RUN)/stage2 --out $(RUN)/eval \
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
