# Everything from an empty folder: `make demo` shows what the project does, `make test` runs all fast tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
LOWEST := .venv-lowest
CONSTRAINTS := .github/constraints
DEMO := demo
RUNS := ckpt
# make setup TORCH=cpu takes PyTorch without CUDA, from this index of PyTorch's own
TORCH ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu
IS_CPU := import sys, torch; sys.exit(torch.version.cuda is not None)

# One environment, so one pip at a time, also under make -j
.NOTPARALLEL:
.PHONY: setup dev lint types test test-lowest docs demo bench bench-packed ready gpu gpu-study clean

# What pre-training, fine-tuning and the demo need
setup: $(INSTALLED)
	@test -z '$(TORCH)' || $(BIN)/python -c '$(IS_CPU)' || \
		echo "setup: $(VENV) has PyTorch with CUDA; for the one without: rm -r $(VENV) && make setup TORCH=cpu"

$(INSTALLED): pyproject.toml
	@test -z '$(TORCH)' || test '$(TORCH)' = cpu || \
		(echo "TORCH=$(TORCH): expected TORCH=cpu, or no TORCH for PyTorch with CUDA" && false)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		(echo "$(PYTHON) is older than Python 3.10; run make PYTHON=python3.x with a newer one" && false)
	@echo "setup: PyTorch $(if $(TORCH),without CUDA: about 0.4 GB to download and 1.5,with CUDA: about 3.2 GB to download and 6)\
 GB on disk with all it needs, in $(VENV)"
	@test -n '$(TORCH)' || command -v nvidia-smi >/dev/null || \
		echo "setup: no NVIDIA driver found; make setup TORCH=cpu downloads 0.4 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
ifneq ($(TORCH),)
	@$(BIN)/pip install --quiet --timeout 15 --retries 1 --index-url $(CPU_INDEX) torch torchvision || \
		echo "setup: $(CPU_INDEX) has no PyTorch for this machine, or does not answer; the ordinary one follows"
endif
	$(BIN)/pip install --quiet --editable .
	@touch $@
	@echo "setup: done; next: make demo, or source $(BIN)/activate and hyspark --help"

# The tools of developers beside it
dev: $(TOOLS)

$(TOOLS): $(INSTALLED)
	@echo "dev: tools for tests, and all extras: about 0.15 GB to download"
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: dev
	$(BIN)/mypy

test: dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# make test-lowest [PYTHON=python3.10]: the same tests on the lowest versions that pyproject.toml allows
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

$(LOWEST)/.installed: pyproject.toml $(CONSTRAINTS)/lowest.txt
	@echo "test-lowest: about 3 GB to download and 6 GB on disk, in $(LOWEST)"
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(LOWEST)/bin/pip install --quiet --constraint $(CONSTRAINTS)/lowest.txt --editable '.[dev]'
	@touch $@

# The site, in site/
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # with --quiet, warnings would not count

$(DOCS): $(INSTALLED)
	@echo "docs: mkdocs-material and its plugins: about 0.05 GB to download"
	$(BIN)/pip install --quiet --editable '.[docs]'
	@touch $@

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

# make bench-packed [NNSSL=checkout]: any network packed against masked and dense
bench-packed: setup
	$(BIN)/python benchmarks/packed.py $(if $(NNSSL),--nnssl $(NNSSL))

# On the machine with the GPU: in .venv, or without it where the machine's own Python has PyTorch and what else is needed.
HERE = PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $$(test -f $(INSTALLED) && echo $(BIN)/python || echo $(PYTHON))
ready:
	@if test -f $(TOOLS); then :; \
	elif test ! -f $(INSTALLED) && $(PYTHON) -c 'import torch' 2>/dev/null; then \
		$(HERE) -c 'import hyspark.cli, pytest, psutil'; \
	else $(MAKE) dev; fi

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
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
