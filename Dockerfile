# The sidecar alone. docker-compose.yml runs it in front of a stock LiveKit server.
FROM rust:1.95-bookworm AS build
# libopus is built from source.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# rust-toolchain.toml asks for rustfmt and clippy too, which a build doesn't need.
ENV RUSTUP_TOOLCHAIN=1.95.0
COPY . .
# The image's context has no repository: docker build --build-arg REVISION=$(git rev-parse --short=12 HEAD)
ARG REVISION=unknown
ENV AURALINK_REVISION=$REVISION
RUN cargo build --release --locked --bin auralink

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --no-create-home auralink
COPY --from=build /src/target/release/auralink /usr/local/bin/auralink
COPY config/auralink.yaml /etc/auralink/auralink.yaml
USER auralink
# SIGTERM drains: give it session drain_grace (20 s) and a little more (docker stop --time 30).
STOPSIGNAL SIGTERM
ENTRYPOINT ["auralink"]
CMD ["--config", "/etc/auralink/auralink.yaml"]
