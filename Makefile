# Everything from an empty folder: `make demo` shows what the project does, `make test` runs all fast tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := data/demo
RUNS := ckpt

.PHONY: setup lint types test demo bench ready gpu gpu-study clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		(echo "$(PYTHON) is older than Python 3.10; run make PYTHON=python3.x with a newer one" && false)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

demo: setup
	@echo "--- phantom CTs"
	$(BIN)/hyspark phantom --out $(DEMO) --num_labelled 6 --num_unlabelled 18
	@echo "--- data lists"
	$(BIN)/python generate_js.py --data $(DEMO) --splits auto --val_fraction 0.33
	$(BIN)/python generate_js.py --data $(DEMO) --labels --splits auto --val_fraction 0.33 \
		--out $(DEMO)/labelled.json
	@echo "--- pre-training on unlabelled volumes"
	$(BIN)/python train.py --config configs/pretrain_demo.yaml --data $(DEMO) --out $(RUNS)/demo
	@echo "--- fine-tuning on 4 labelled volumes, from these weights and from scratch"
	$(BIN)/python finetune_btcv.py --config configs/finetune_demo.yaml --data $(DEMO) \
		--weights $(RUNS)/demo/hyspark_1kpretrained_timm_style.pth --out $(RUNS)/demo_pretrained
	$(BIN)/python finetune_btcv.py --config configs/finetune_demo.yaml --data $(DEMO) \
		--weights none --out $(RUNS)/demo_scratch
	@echo "--- result"
	@$(BIN)/hyspark compare $(RUNS)/demo_pretrained $(RUNS)/demo_scratch
	@echo "demo: report $(RUNS)/demo/report.html, pictures $(RUNS)/demo/pictures"

# make bench CT=prepared.nii.gz NATIVE=scanner.nii.gz PUBLISHED=checkout; phantoms, and nothing beside, by default
bench: setup
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/store.py $(if $(CT),--image $(CT))
	$(BIN)/python benchmarks/run.py $(if $(CT),--prepared_ct $(CT)) $(if $(NATIVE),--native_ct $(NATIVE)) \
		$(if $(PUBLISHED),--published $(PUBLISHED))

# On the machine with the GPU: in .venv, or without it where the machine's own Python has PyTorch and what else is needed.
HERE = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $$(test -f $(INSTALLED) && echo $(BIN)/python || echo $(PYTHON))
ready:
	@if test -f $(INSTALLED); then :; \
	elif $(PYTHON) -c 'import torch' 2>/dev/null; then $(HERE) -c 'import hyspark.cli, pytest, psutil'; \
	else $(MAKE) setup; fi

DEVICE ?= cuda

# make gpu [MINUTES=9] [PUBLISHED=checkout] [DEVICE=cuda]; the same command continues
gpu: ready
	$(HERE) benchmarks/gpu.py --minutes $(or $(MINUTES),9) --device $(DEVICE) --out $(RUNS)/gpu \
		$(if $(PUBLISHED),--published $(PUBLISHED))

# make gpu-study [MINUTES=6] [STUDY=data/gpu_study] [DEVICE=cuda]; the same command continues
gpu-study: ready
	$(HERE) benchmarks/gpu_study.py run --minutes $(or $(MINUTES),6) --device $(DEVICE) --out $(RUNS)/gpu_study \
		--data $(or $(STUDY),data/gpu_study)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
