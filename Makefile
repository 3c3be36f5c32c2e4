.DEFAULT_GOAL := help
.PHONY: help test schemathesis faults lint bench bench-check up observe down audit

# The plugin where it is there, else the program of its own.
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: ## build all and run all tests, with a RabbitMQ and a Postgres found or started for them
	@scripts/test

schemathesis: ## try the viewer's API against its own description; needs Python 3
	@scripts/schemathesis

faults: ## run the whole fault suite, or one case (make faults CASE=broker_killed), and note it in FAULTS.md
	cargo build --release --workspace --locked
	FAULTS=all FAULTS_FILE=$(CURDIR)/FAULTS.md cargo test --release --workspace --locked --test faults -- $(CASE)

lint: ## check format, clippy and documentation; a warning is a failure
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --document-private-items

bench: ## measure all services against their limits, in one table; SOAK=10m make bench for a long look at memory
	@scripts/bench

bench-check: ## measure the ratios to the limits, and fail if one is more than a tenth below bench/ratios.json
	@BENCH_CHECK=bench/ratios.json scripts/bench callbacks lookups slow adaptive writes cleanup

up: ## build the image, start the whole system in the background, say where it is
	$(COMPOSE) up --build -d
	@echo
	@echo "watch       http://$$($(COMPOSE) port viewer 9080)/"
	@echo "callbacks   http://$$($(COMPOSE) port producer 9090)/callback"
	@echo "broker      http://$$($(COMPOSE) port rabbitmq 15672), user and password: RABBITMQ_DEFAULT_… in .env"
	@echo "who is on   $(COMPOSE) exec postgres psql -U postgres -c 'select * from object order by id'"
	@echo "logs        $(COMPOSE) logs -f producer consumer routine viewer tester"

observe: export COMPOSE_PROFILES = observability
observe: up ## the same, with Prometheus and Grafana beside it
	@echo "dashboard   http://$$($(COMPOSE) port grafana 3000)"
	@echo "alerts      http://$$($(COMPOSE) port prometheus 9090)/alerts"

down: export COMPOSE_PROFILES = observability
down: ## stop it; its volumes stay (remove them too: docker-compose down -v)
	$(COMPOSE) down

audit: ## check dependencies for licences, sources and advisories; needs the network
	cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny check
