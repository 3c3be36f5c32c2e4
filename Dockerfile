# One image with the five services and `lastseen`. The container's command selects the program.
FROM rust:1-bookworm AS build
WORKDIR /build

# Builds the dependencies with empty crates, so that the layer stays valid until a manifest changes.
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
COPY viewer/Cargo.toml viewer/
RUN for crate in */; do mkdir "$crate/src" && touch "$crate/src/lib.rs"; done \
 && mkdir faults/tests && touch faults/tests/faults.rs \
 && for service in producer consumer routine standalone tester viewer; do echo 'fn main() {}' >"$service/src/main.rs"; done \
 && cargo build --release --locked -p producer -p consumer -p routine -p standalone -p tester -p viewer

# COPY keeps the dates of files, which may be older than the empty crates. Without the touch, cargo
# would not rebuild anything.
COPY . .
RUN find . -path ./target -prune -o -name '*.rs' -exec touch {} + \
 && cargo build --release --locked -p producer -p consumer -p routine -p standalone -p tester -p viewer

FROM debian:bookworm-slim
# For TLS to an external broker, database or status API.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /build/target/release/producer /build/target/release/consumer \
     /build/target/release/routine /build/target/release/lastseen /build/target/release/tester \
     /build/target/release/viewer \
     /usr/local/bin/
# The default folders of the spool (./spool) and of lastseen's files (./data) are on this volume, which gets the same owner.
RUN mkdir /var/lib/lastseen && chown 65532:65532 /var/lib/lastseen
WORKDIR /var/lib/lastseen
VOLUME /var/lib/lastseen
USER 65532:65532
STOPSIGNAL SIGTERM
CMD ["lastseen"]
