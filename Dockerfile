# One image with one program, `lastseen`, and a link for each role. The container's command selects the role.
FROM rust:1-bookworm AS chef
RUN cargo install --locked cargo-chef
WORKDIR /build

FROM chef AS plan
COPY . .
RUN cargo chef prepare

# The dependencies are in a layer of their own, which Docker rebuilds only when a manifest changes.
FROM chef AS build
COPY --from=plan /build/recipe.json .
RUN cargo chef cook --release --locked -p lastseen
COPY . .
RUN cargo build --release --locked -p lastseen

FROM debian:bookworm-slim
# For TLS to an external broker, database or status API.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /build/target/release/lastseen /usr/local/bin/
# The default folders of the spool (./spool) and of lastseen's files (./data) are in /var/lib/lastseen. A new volume
# there gets the owner of this directory.
RUN for role in producer consumer routine viewer tester; do ln -s lastseen "/usr/local/bin/$role"; done \
 && mkdir /var/lib/lastseen && chown 65532:65532 /var/lib/lastseen
WORKDIR /var/lib/lastseen
VOLUME /var/lib/lastseen
USER 65532:65532
STOPSIGNAL SIGTERM
CMD ["lastseen"]
