# syntax=docker/dockerfile:1
# The gpu-worker's image. From the repository's root, for the CPU:
#
#   docker build -f deploy/docker/gpu-worker.Dockerfile -t cacheclip-gpu-worker:0.1.0 .
#
# For CUDA, on NVIDIA's image with its libraries (cuBLAS, NVRTC). The worker opens them, and the driver's that the node
# brings, when it starts: no toolkit is needed to build it, and the same image without a GPU says so and stops.
#
#   docker build -f deploy/docker/gpu-worker.Dockerfile -t cacheclip-gpu-worker:0.1.0-cuda \
#       --build-arg FEATURES=cuda --build-arg CUDA_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
#
# What is sent to the builder is chosen by gpu-worker.Dockerfile.dockerignore beside this file.

ARG RUST_IMAGE=rust:1.89-bookworm
# Where the worker runs: a glibc that is not older than the compiling image's.
ARG CUDA_IMAGE=debian:bookworm-slim

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
ARG FEATURES=""
# Registry and target directory outlive a build, so that the next one compiles what changed. The binary is copied out,
# because a cache is not part of the layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked -p cacheclip-gpu-worker --bin cacheclip-gpu-worker --features "otlp,${FEATURES}" \
    && install -D -s target/release/cacheclip-gpu-worker /out/cacheclip-gpu-worker

FROM ${CUDA_IMAGE}
COPY --from=build /out/cacheclip-gpu-worker /usr/local/bin/cacheclip-gpu-worker
# The small trained pair, for trying things out.
COPY models/tiny/primary /usr/share/cacheclip/models/tiny/primary
# The chart's user: numeric, so that Kubernetes can tell it is not root.
USER 65532:65532
EXPOSE 7072 9090
ENTRYPOINT ["/usr/local/bin/cacheclip-gpu-worker"]
