# The three images of Wattlock:  docker build --target operator|agent|simulator .
# "dev/images" builds them for the local cluster, also on machines without docker.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

# --- build: uv and the descriptions of the workspace, no sources yet -------------------------------------------------
FROM ${BASE_IMAGE} AS build
# Debian's own Python lets pip install nothing outside a virtual environment unless told; this stage is thrown away.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --disable-pip-version-check uv==0.13.9
# The interpreter must be the one of the base image, for it is what the finished .venv points to.
# Bytecode is compiled here because the containers run with a read-only root.
ENV UV_PYTHON_DOWNLOADS=never \
    UV_PYTHON_PREFERENCE=only-system \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    UV_NO_PROGRESS=1
WORKDIR /app
COPY pyproject.toml uv.lock ./
COPY crds/pyproject.toml crds/
COPY operator/pyproject.toml operator/
COPY agent/pyproject.toml agent/
COPY simulator/pyproject.toml simulator/

# --- for each package two stages: what it depends on (cached until uv.lock changes), then our sources ----------------
# "uv sync" would take the download addresses from uv.lock; going through "uv pip" honours a configured mirror, and the
# hashes of uv.lock hold either way. Ours goes to a folder of its own, so that it becomes a small layer on top of the
# large one: an upgrade, or a build while developing, moves kilobytes.
FROM build AS dependencies-operator
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet && \
    uv export --quiet --frozen --no-dev --no-emit-workspace --package wattlock-operator --output-file /tmp/requirements.txt && \
    uv pip install --require-hashes --requirement /tmp/requirements.txt

FROM dependencies-operator AS build-operator
COPY crds crds
COPY operator operator
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --prefix /ours ./crds ./operator

FROM build AS dependencies-agent
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet && \
    uv export --quiet --frozen --no-dev --no-emit-workspace --package wattlock-agent --output-file /tmp/requirements.txt && \
    uv pip install --require-hashes --requirement /tmp/requirements.txt

FROM dependencies-agent AS build-agent
COPY crds crds
COPY agent agent
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --prefix /ours ./crds ./agent

FROM build AS dependencies-simulator
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet && \
    uv export --quiet --frozen --no-dev --no-emit-workspace --package wattlock-simulator --output-file /tmp/requirements.txt && \
    uv pip install --require-hashes --requirement /tmp/requirements.txt

FROM dependencies-simulator AS build-simulator
COPY simulator simulator
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --prefix /ours ./simulator

# --- the simulated driver: a C library in the place of NVIDIA's ------------------------------------------------------
FROM ${BASE_IMAGE} AS compiler
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*

FROM compiler AS build-driver
COPY simulator/driver /driver
RUN gcc -O2 -Wall -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o /libnvidia-ml.so.1 /driver/*.c

# --- what runs: the base image without pip, and one .venv ------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
# Nothing is ever installed in a running container.
RUN rm -rf "$(python3 -c 'import os, pip; print(os.path.dirname(pip.__file__))')" /usr/bin/pip* /usr/local/bin/pip*
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Not /app: no folder of ours may shadow a module.
WORKDIR /

FROM runtime AS operator
COPY --from=dependencies-operator /app/.venv /app/.venv
COPY --from=build-operator /ours /app/.venv
# Kopf asks for the user's name, which a number without an entry in /etc/passwd does not have.
ENV LOGNAME=wattlock
USER 65532:65532
ENTRYPOINT ["wattlock-operator"]

FROM runtime AS agent
COPY --from=dependencies-agent /app/.venv /app/.venv
COPY --from=build-agent /ours /app/.venv
# The kubelet's socket is in a folder that only root may enter, and a capability added by Kubernetes takes effect for
# uid 0 only. All other capabilities are dropped by the DaemonSet.
USER 0:0
ENTRYPOINT ["wattlock-agent"]

FROM runtime AS simulator
COPY --from=build-driver /libnvidia-ml.so.1 /usr/local/lib/wattlock-simulator/libnvidia-ml.so.1
COPY --from=dependencies-simulator /app/.venv /app/.venv
COPY --from=build-simulator /ours /app/.venv
# For serving. The roles driver and device plugin write to folders of root; their DaemonSets set runAsUser: 0.
USER 65532:65532
ENTRYPOINT ["wattlock-simulator"]
