.DEFAULT_GOAL := help
.PHONY: help test schemathesis faults lint bench bench-check up observe down audit

# The plugin `docker compose` if it is installed; otherwise the program `docker-compose`.
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: ## build everything and run all tests; starts a private RabbitMQ and a private Postgres
	@scripts/test

schemathesis: ## test the viewer's API against its OpenAPI description; needs Python 3
	@scripts/schemathesis

faults: ## run all fault cases, or one (make faults CASE=broker_killed), and record the results in FAULTS.md
	cargo build --release --workspace --locked
	FAULTS=all FAULTS_FILE=$(CURDIR)/FAULTS.md cargo test --release --workspace --locked --test faults -- $(CASE)

lint: ## check format, clippy and documentation; any warning is a failure
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --document-private-items

bench: ## measure all services against their limits, in one table; SOAK=10m also watches memory for 10 minutes
	@scripts/bench

bench-check: ## measure the ratios to the limits; fail if one is more than a tenth below tests/bench/ratios.json
	@BENCH_CHECK=tests/bench/ratios.json scripts/bench callbacks lookups slow adaptive writes cleanup

up: ## build the image, start the whole system in the background, and print its addresses
	$(COMPOSE) up --build -d
	@echo
	@echo "live page   http://$$($(COMPOSE) port viewer 9080)/"
	@echo "callbacks   http://$$($(COMPOSE) port producer 9090)/callback"
	@echo "broker      http://$$($(COMPOSE) port rabbitmq 15672), user and password: RABBITMQ_DEFAULT_… in .env"
	@echo "table       $(COMPOSE) exec postgres psql -U postgres -c 'select * from object order by id'"
	@echo "logs        $(COMPOSE) logs -f producer consumer routine viewer tester"

observe: export COMPOSE_PROFILES = observability
observe: up ## the same as up, with Prometheus and Grafana
	@echo "dashboard   http://$$($(COMPOSE) port grafana 3000)"
	@echo "alerts      http://$$($(COMPOSE) port prometheus 9090)/alerts"

down: export COMPOSE_PROFILES = observability
down: ## stop the system; its volumes stay (docker-compose down -v also removes them)
	$(COMPOSE) down --remove-orphans

audit: ## check the licences, sources and advisories of dependencies; needs the network
	cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny
	cargo deny check
