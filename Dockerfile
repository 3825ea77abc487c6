# syntax=docker/dockerfile:1
# Two images from one file, the CPU one by default:
#   docker build --tag exeunt --build-arg TORCH_INDEX=... .
#   docker build --tag exeunt:cuda --target cuda .
# TORCH_INDEX is the index of PyTorch's CPU builds, which PyTorch's installation page has. Without it the CPU image gets
# the default build: on Linux x86-64 that carries CUDA's libraries, and the image works as well but is far larger.
# The packaged model is inside; at run time nothing is fetched from the network.

ARG PYTHON_VERSION=3.11

# ---- what both builds share: a virtual environment and the sources that become the wheel
FROM python:${PYTHON_VERSION}-slim-bookworm AS sources
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/exeunt
ENV PATH=/opt/exeunt/bin:$PATH
WORKDIR /src
COPY constraints.txt ./

# ---- PyTorch without CUDA, an eighth of the size, where TORCH_INDEX names the index it is on; else the default build
FROM sources AS build-cpu
ARG TORCH_INDEX=
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX" --no-deps} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY compression compression
COPY calibration calibration
COPY server server
COPY deploy deploy
RUN pip install -c constraints.txt .

# ---- PyTorch as it comes, with the CUDA libraries; the host brings only the driver
FROM sources AS build-cuda
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY compression compression
COPY calibration calibration
COPY server server
COPY deploy deploy
RUN pip install -c constraints.txt .

# ---- what both images share at run time
FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
# The CPU kernels are compiled on first use for the processor at hand, hence the compiler; without it the
# server runs on plain PyTorch, only slower.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# Bundles made from the packaged model and compiled kernels are cached here; mount a volume to keep them.
RUN groupadd --gid 10001 exeunt \
    && useradd --uid 10001 --gid exeunt --home-dir /var/cache/exeunt --no-create-home --shell /usr/sbin/nologin exeunt \
    && install --directory --owner exeunt --group exeunt /var/cache/exeunt
ENV PATH=/opt/exeunt/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/cache/exeunt \
    XDG_CACHE_HOME=/var/cache/exeunt \
    HF_HOME=/var/cache/exeunt/huggingface \
    HF_HUB_OFFLINE=1 \
    EXEUNT_HOST=0.0.0.0 \
    EXEUNT_PORT=8000
WORKDIR /var/cache/exeunt
VOLUME /var/cache/exeunt
USER exeunt
EXPOSE 8000
# SIGTERM drains: new requests get 503 while running ones finish.
STOPSIGNAL SIGTERM
# The server listens, and answers /health, before it calibrates or loads: the start is the time that imports take.
HEALTHCHECK --interval=10s --timeout=3s --start-period=1m --start-interval=2s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ['EXEUNT_PORT']}/health\", timeout=2)"]
ENTRYPOINT ["exeunt"]
CMD ["serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/exeunt /opt/exeunt

FROM runtime AS cpu
COPY --from=build-cpu /opt/exeunt /opt/exeunt
