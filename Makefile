# Thin: every target is a line or two over cargo and scripts/. What is slow to make is kept in CACHE, outside the tree.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

export XDG_CACHE_HOME ?= $(HOME)/.cache
CACHE := $(XDG_CACHE_HOME)/auralink
# A folder that the caller named is the caller's, and may hold other builds: `make clean` deletes none.
OWN_TARGET := $(if $(filter undefined,$(origin CARGO_TARGET_DIR)),yes)
# A fresh checkout finds the builds of the one before.
export CARGO_TARGET_DIR ?= $(CACHE)/target
AURALINK := $(CARGO_TARGET_DIR)/release/auralink
# The tests' Python; there once `make setup` has run.
PYTHON = $$(scripts/setup.sh --env | sed -n 's/^AURALINK_PYTHON=//p')
CARGO_FUZZ := $(CACHE)/tools/bin/cargo-fuzz
FUZZ_SECONDS ?= 120
# Each test of tests/livekit is a whole call with several processes: more at a time would measure the machine.
export RUST_TEST_THREADS ?= 2

.PHONY: help setup models build test faults seeds lint licences demo measure ladder bench fuzz clean tools

help: ## what the targets are
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

tools:
	@command -v cargo >/dev/null || { echo 'cargo is missing: install rustup (https://rustup.rs); rust-toolchain.toml picks the version' >&2; exit 1; }

setup: ## LiveKit server, clients, speech, video and models for tests and demo, into the cache
	@scripts/setup.sh all >/dev/null

models: ## the bundles of the AIC codecs and ONNX Runtime, into the cache; prints where (docs/models.md)
	@scripts/setup.sh models | grep -E '^AURALINK_(MODELS|ONNXRUNTIME)='

build: tools ## the release binary
	cargo build --release --locked
	@echo $(AURALINK)

test: setup lint ## everything that has to hold: format, lints, licences, converted models, tests against the real server
	scripts/models/make.sh --test
	"$(PYTHON)" -B scripts/test_transit.py
	$(MAKE) --no-print-directory seeds
	scripts/test.sh

faults: setup ## the tests against the real server while each loses a participant's media: every one has to fail; SEED=N, ONLY=FILTER; as root, half an hour
	@"$(PYTHON)" -B scripts/faults.py $(if $(SEED),--seed $(SEED)) $(ONLY)

# One process for each target, as under the fuzzer; no nightly toolchain, no sanitizer.
seeds: tools ## every fuzz target over its seeds in fuzz/seeds
	cargo build --locked --bins --manifest-path fuzz/Cargo.toml
	@for target in fuzz/fuzz_targets/*.rs; do \
		name=$$(basename "$$target" .rs); \
		printf 'seeds of %s: ' "$$name"; \
		"$(CARGO_TARGET_DIR)/debug/$$name" "fuzz/seeds/$$name"; \
	done

lint: tools licences ## rustfmt, clippy with warnings denied, licences; the fuzz targets' format and lock file
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	@# A workspace of its own, which nothing else here builds: its lock file would go stale unseen.
	cargo metadata --locked --format-version 1 --manifest-path fuzz/Cargo.toml >/dev/null || { \
		echo 'fuzz/Cargo.lock has to follow what changed: cargo update -w --manifest-path fuzz/Cargo.toml' >&2; exit 1; }
	cargo clippy --workspace --all-targets --locked -- -D warnings

licences: tools ## licences, sources and yanked versions of the dependencies (deny.toml)
	@python=$(PYTHON); "$${python:-python3.11}" scripts/licences.py

demo: setup build ## two clients talk through AuraLink: off, lean, neural; BROWSER=1: in Chromium
	@"$(PYTHON)" scripts/demo.py --auralink $(AURALINK) $(if $(BROWSER),--browser)

measure: setup build ## figures of whole processes in docs/benchmarks.md; ONLY=join,load,memory,beside,scale,relays for parts of them
	@"$(PYTHON)" scripts/measure.py --auralink $(AURALINK) $(if $(ONLY),--only $(ONLY))

ladder: setup ## ViSQOL and PESQ of every rung through the engine, 23 clips, and what loss costs; a quarter of an hour
	cargo build --release --locked -p auralink-engine --example ladder
	@"$(PYTHON)" scripts/ladder.py --tool $(CARGO_TARGET_DIR)/release/examples/ladder
	@"$(PYTHON)" scripts/ladder.py --tool $(CARGO_TARGET_DIR)/release/examples/ladder --losses

bench: tools ## the relay by stage, and the codecs: run `make setup` before, which includes `make models`
	cargo bench --workspace --locked

fuzz: $(CARGO_FUZZ) ## every fuzz target for FUZZ_SECONDS, from the seeds in fuzz/seeds
	for target in $$(cd fuzz && cargo +nightly fuzz list); do \
		mkdir -p fuzz/corpus-grown/$$target; \
		echo "fuzz: $$target for $(FUZZ_SECONDS) s"; \
		cargo +nightly fuzz run $$target fuzz/corpus-grown/$$target fuzz/seeds/$$target -- -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1; \
	done

$(CARGO_FUZZ): | tools
	@rustup toolchain list | grep -q nightly || { echo 'the nightly toolchain is missing: rustup toolchain install nightly' >&2; exit 1; }
	cargo install cargo-fuzz --locked --root $(CACHE)/tools

# cargo finds `cargo fuzz` by PATH.
fuzz: export PATH := $(CACHE)/tools/bin:$(PATH)

PACKAGES := -p auralink -p auralink-engine -p auralink-proto

clean: ## what cargo built: in the cache all, in a CARGO_TARGET_DIR of yours these packages alone; downloads stay
ifeq ($(OWN_TARGET),yes)
	rm -rf "$(CACHE)/target"
else
	cargo clean --locked $(PACKAGES)
	cargo clean --locked --release $(PACKAGES)
endif
