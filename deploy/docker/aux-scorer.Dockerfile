# syntax=docker/dockerfile:1
# The aux-scorer's image. From the repository's root:
#
#   docker build -f deploy/docker/aux-scorer.Dockerfile -t cacheclip-aux-scorer:0.1.0 .
#
# What is sent to the builder is chosen by aux-scorer.Dockerfile.dockerignore beside this file.

ARG RUST_IMAGE=rust:1.89-bookworm
# Needs glibc and libgcc and no shell: a distroless "cc" image does as well and is smaller.
ARG RUNTIME_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
COPY crates crates
COPY services services
COPY proto proto
# A member of the workspace: cargo wants its manifest, and builds nothing of it here.
COPY tests/Cargo.toml tests/Cargo.toml
COPY tests/src tests/src
# Registry and target directory outlive a build, so that the next one compiles what changed. The binary is copied out,
# because a cache is not part of the layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked -p cacheclip-aux-scorer --bin cacheclip-aux-scorer --features otlp \
    && install -D -s target/release/cacheclip-aux-scorer /out/cacheclip-aux-scorer

FROM ${RUNTIME_IMAGE}
COPY --from=build /out/cacheclip-aux-scorer /usr/local/bin/cacheclip-aux-scorer
# The small trained pair, for trying things out.
COPY models/tiny/aux /usr/share/cacheclip/models/tiny/aux
# The chart's user: numeric, so that Kubernetes can tell it is not root.
USER 65532:65532
EXPOSE 7074 9090
ENTRYPOINT ["/usr/local/bin/cacheclip-aux-scorer"]
