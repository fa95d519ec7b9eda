# Not built yet by its authors: the machines that they had so far run no Docker engine.
#
# CPU:   docker build -t superpose .
# CUDA:  docker build -t superpose:cuda \
#          --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 \
#          --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run:   docker run -p 127.0.0.1:50051:50051 -v superpose-state:/var/lib/superpose superpose
ARG BASE=python:3.11-slim
FROM ${BASE}

# CUDA bases come without Python; Python bases have theirs first in PATH.
RUN command -v python3 >/dev/null && python3 -m venv --help >/dev/null 2>&1 \
    || (apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*)

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV VIRTUAL_ENV=/opt/superpose PATH=/opt/superpose/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV \
    && pip install --no-cache-dir --index-url ${TORCH_INDEX} torch==2.13.0

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY proto proto
COPY adapters adapters
COPY server server
COPY client client
RUN pip install --no-cache-dir --constraint constraints.txt ".[server,http]"

# The kernels are compiled for the machine that runs them, at the first start.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --system --uid 10001 --home-dir /var/lib/superpose --create-home superpose
USER superpose
WORKDIR /var/lib/superpose

# Inside a container, loopback is nobody's: publish the port on an address that you trust.
ENV SUPERPOSE_BASE=mini \
    SUPERPOSE_STATE_DIR=/var/lib/superpose/state \
    SUPERPOSE_LISTEN=0.0.0.0:50051 \
    SUPERPOSE_METRICS_LISTEN=0.0.0.0:9464 \
    SUPERPOSE_INSECURE=1
VOLUME /var/lib/superpose
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s CMD ["adapterctl", "health"]
ENTRYPOINT ["superpose-server"]
