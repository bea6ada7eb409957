# The commands of this project. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# sudo may reset PATH; this is where Go puts itself.
export PATH := $(PATH):/usr/local/go/bin
export CGO_ENABLED := 0
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
COMMANDS := containerd-shim-stasis-v2 stasisd stasis
PREFIX ?= /usr/local
FUZZTIME ?= 20s

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort | expand -t 20

.PHONY: build
build: ## Build the shim, the daemon and the CLI into bin/
	@mkdir -p bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(COMMANDS:%=./cmd/%)

.PHONY: install
install: build ## Install binaries below PREFIX, systemd units and logind's setting (root)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)/etc/systemd/system $(DESTDIR)/etc/systemd/logind.conf.d $(DESTDIR)/etc/systemd/system/cri-containerd-.scope.d
	install -m 0755 $(COMMANDS:%=bin/%) $(DESTDIR)$(PREFIX)/bin/
	install -m 0644 contrib/systemd/*.service $(DESTDIR)/etc/systemd/system/
	install -m 0644 contrib/systemd/cri-containerd-.scope.d/stasis.conf $(DESTDIR)/etc/systemd/system/cri-containerd-.scope.d/
	install -m 0644 contrib/systemd/logind-stasis.conf $(DESTDIR)/etc/systemd/logind.conf.d/stasis.conf

.PHONY: check
check: ## Format, vet, layering and the fast tests; no root needed (under two minutes)
	@test -z "$$(gofmt -l cmd internal nri pkg shim test)" || { gofmt -d cmd internal nri pkg shim test; exit 1; }
	go vet ./...
	go test -count=1 ./internal/... ./pkg/... ./nri/... ./shim/... ./cmd/...

.PHONY: demo
demo: node build ## Stop a pod, create it again, see that it goes on (root)
	test/node/run -- /src/test/demo/with-node /src/test/demo/demo

.PHONY: test
test: ## Run everything: unit, crash, CRIU, node, critest, kubelet (root)
	test/run

.PHONY: test-vm
test-vm: node build ## Run the demo and the main tests in a VM: Debian's kernel, cgroup v2 (root; an hour)
	test/vm/test

.PHONY: test-reboot
test-reboot: node ## Reboot a node in a VM from one kernel into another; its pods go on (root; half an hour)
	test/reboot/run -test.run '$(or $(RUN),.)'

.PHONY: bench-reboot
bench-reboot: node ## Measure a node's dump, restores and return in a VM; writes out/reboot/bench-reboot.json (root)
	STASIS_TAGS=bench test/reboot/run -test.run '^TestBench$$'

.PHONY: node
node: ## Make the test node's root file system, tools and images, unless cached (root)
	test/node/prepare

.PHONY: bench
bench: node build ## Measure overhead and phases; prints a table, writes out/bench.json (root)
	test/bench/run

.PHONY: bench-restore
bench-restore: node build ## Measure restores of 30, 100, 1000 MB, lazy and eager in turn; writes out/bench-restore.json (root)
	test/bench/restore $(or $(RUNS),10)

.PHONY: bench-jvm
bench-jvm: node build ## Measure the first answer of a JVM: cold, by CRIU, cloned; writes out/bench-jvm.* (root; an hour)
	test/bench/jvm/run

.PHONY: fuzz
fuzz: ## Fuzz every parser for FUZZTIME each
	@for t in $$(grep -rl --include='*_test.go' 'func Fuzz' pkg nri cmd shim); do \
		for f in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\).*/\1/p' $$t); do \
			go test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) ./$$(dirname $$t); \
		done; \
	done

.PHONY: clean
clean: ## Remove what was built in this checkout
	rm -rf bin out
