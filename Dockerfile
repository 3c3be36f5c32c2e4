# One image with the four services and `lastseen`; the command says which of them runs.
FROM rust:1-bookworm AS build
WORKDIR /build

# The dependencies, in a layer that lasts until a manifest changes: each crate is empty here.
COPY Cargo.toml Cargo.lock ./
COPY amqp/Cargo.toml amqp/
COPY authenticity/Cargo.toml authenticity/
COPY bench/Cargo.toml bench/
COPY broker/Cargo.toml broker/
COPY consumer/Cargo.toml consumer/
COPY embedded/Cargo.toml embedded/
COPY events/Cargo.toml events/
COPY faults/Cargo.toml faults/
COPY pipeline/Cargo.toml pipeline/
COPY producer/Cargo.toml producer/
COPY routine/Cargo.toml routine/
COPY service/Cargo.toml service/
COPY standalone/Cargo.toml standalone/
COPY store/Cargo.toml store/
COPY testbed/Cargo.toml testbed/
COPY tester/Cargo.toml tester/
RUN for crate in */; do mkdir "$crate/src" && touch "$crate/src/lib.rs"; done \
 && mkdir faults/tests && touch faults/tests/faults.rs \
 && for service in producer consumer routine standalone tester; do echo 'fn main() {}' >"$service/src/main.rs"; done \
 && cargo build --release --locked -p producer -p consumer -p routine -p standalone -p tester

# The files keep their dates, which may lie before those of the empty crates: without the touch, cargo
# would find nothing to do.
COPY . .
RUN find . -path ./target -prune -o -name '*.rs' -exec touch {} + \
 && cargo build --release --locked -p producer -p consumer -p routine -p standalone -p tester

FROM debian:bookworm-slim
# For TLS to a broker, a database or a status API elsewhere.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /build/target/release/producer /build/target/release/consumer \
     /build/target/release/routine /build/target/release/lastseen /build/target/release/tester \
     /build/scripts/ready /usr/local/bin/
# The producer's spool, on a volume that takes over the owner.
RUN mkdir /var/lib/lastseen && chown 65532:65532 /var/lib/lastseen
USER 65532:65532
STOPSIGNAL SIGTERM
