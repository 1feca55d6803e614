# The three images of Wattlock:  docker build --target operator|agent|simulator .
# "dev/images" builds them for the local cluster, also on machines without docker.
#
# The digest pins all that comes from Debian; how to renew it: docs/supply-chain.md.
ARG BASE_IMAGE=docker.io/library/python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# --- build: uv and the descriptions of the workspace, no sources yet -------------------------------------------------
FROM ${BASE_IMAGE} AS build
COPY dev/supplychain/build-requirements.txt /tmp/build-requirements.txt
# Debian's own Python lets pip install nothing outside a virtual environment unless told; this stage is thrown away.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --require-hashes --only-binary :all: --requirement /tmp/build-requirements.txt
# The interpreter must be the one of the base image, for it is what the finished .venv points to.
ENV UV_PYTHON_DOWNLOADS=never \
    UV_PYTHON_PREFERENCE=only-system \
    UV_LINK_MODE=copy \
    UV_NO_PROGRESS=1
WORKDIR /app
COPY pyproject.toml uv.lock ./
COPY crds/pyproject.toml crds/
COPY operator/pyproject.toml operator/
COPY agent/pyproject.toml agent/
COPY simulator/pyproject.toml simulator/
COPY dev/supplychain/runtime_root.py /

# --- for each package two stages: what it depends on (cached until uv.lock changes), then our sources ----------------
# "uv sync" would take the download addresses from uv.lock; going through "uv pip" honours a configured mirror, and the
# hashes of uv.lock hold either way. Ours goes to a folder of its own, so that it becomes a small layer on top of the
# large one: an upgrade, or a build while developing, moves kilobytes. Our wheels are made by the hatchling that was
# installed above with its hash, not by one that is looked up while building.
FROM build AS dependencies-operator
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet && \
    uv export --quiet --frozen --no-dev --no-emit-workspace --package wattlock-operator --output-file /tmp/requirements.txt && \
    uv pip install --require-hashes --only-binary :all: --requirement /tmp/requirements.txt && \
    python3 /runtime_root.py venv /app/.venv /dependencies && \
    python3 /runtime_root.py root /app/.venv /root-of-image

FROM dependencies-operator AS build-operator
COPY crds crds
COPY operator operator
RUN cd /app/crds && python3 -m hatchling build --target wheel --directory /wheels && \
    cd /app/operator && python3 -m hatchling build --target wheel --directory /wheels && \
    uv pip install --no-deps --no-index --prefix /ours /wheels/*.whl && \
    python3 /runtime_root.py tidy /ours /app/.venv

FROM build AS dependencies-agent
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet && \
    uv export --quiet --frozen --no-dev --no-emit-workspace --package wattlock-agent --output-file /tmp/requirements.txt && \
    uv pip install --require-hashes --only-binary :all: --requirement /tmp/requirements.txt && \
    python3 /runtime_root.py venv /app/.venv /dependencies && \
    python3 /runtime_root.py root /app/.venv /root-of-image

FROM dependencies-agent AS build-agent
COPY crds crds
COPY agent agent
RUN cd /app/crds && python3 -m hatchling build --target wheel --directory /wheels && \
    cd /app/agent && python3 -m hatchling build --target wheel --directory /wheels && \
    uv pip install --no-deps --no-index --prefix /ours /wheels/*.whl && \
    python3 /runtime_root.py tidy /ours /app/.venv

FROM build AS dependencies-simulator
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet && \
    uv export --quiet --frozen --no-dev --no-emit-workspace --package wattlock-simulator --output-file /tmp/requirements.txt && \
    uv pip install --require-hashes --only-binary :all: --requirement /tmp/requirements.txt && \
    python3 /runtime_root.py venv /app/.venv /dependencies

FROM dependencies-simulator AS build-simulator
COPY simulator simulator
RUN cd /app/simulator && python3 -m hatchling build --target wheel --directory /wheels && \
    uv pip install --no-deps --no-index --prefix /ours /wheels/*.whl && \
    python3 /runtime_root.py tidy /ours /app/.venv

# --- the simulated driver: a C library in the place of NVIDIA's ------------------------------------------------------
FROM ${BASE_IMAGE} AS compiler
RUN apt-get update && \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*

FROM compiler AS build-driver
COPY simulator/driver /driver
RUN gcc -O2 -Wall -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o /libnvidia-ml.so.1 /driver/*.c

# --- what runs: Python and the libraries that it loads, one .venv, no shell and no other program ---------------------
FROM scratch AS operator
ARG BASE_IMAGE
LABEL org.opencontainers.image.base.name=${BASE_IMAGE}
COPY --from=dependencies-operator /root-of-image /
COPY --from=dependencies-operator /dependencies /app/.venv
COPY --from=build-operator /ours /app/.venv
# Kopf asks for the user's name, also where Kubernetes chooses a number that /etc/passwd does not have.
ENV PATH=/app/.venv/bin LANG=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LOGNAME=wattlock
# Not /app: no folder of ours may shadow a module.
WORKDIR /
USER 65532:65532
ENTRYPOINT ["wattlock-operator"]

FROM scratch AS agent
ARG BASE_IMAGE
LABEL org.opencontainers.image.base.name=${BASE_IMAGE}
COPY --from=dependencies-agent /root-of-image /
COPY --from=dependencies-agent /dependencies /app/.venv
COPY --from=build-agent /ours /app/.venv
ENV PATH=/app/.venv/bin LANG=C.UTF-8 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /
# The kubelet's socket is in a folder that only root may enter, and a capability added by Kubernetes takes effect for
# uid 0 only. All other capabilities are dropped by the DaemonSet.
USER 0:0
ENTRYPOINT ["wattlock-agent"]

# Not for production: it keeps the base image, with a shell for whoever tries things out.
FROM ${BASE_IMAGE} AS simulator
ARG BASE_IMAGE
LABEL org.opencontainers.image.base.name=${BASE_IMAGE}
RUN rm -rf "$(python3 -c 'import os, pip; print(os.path.dirname(pip.__file__))')"* /usr/bin/pip* /usr/local/bin/pip*
COPY --from=build-driver /libnvidia-ml.so.1 /usr/local/lib/wattlock-simulator/libnvidia-ml.so.1
COPY --from=dependencies-simulator /dependencies /app/.venv
COPY --from=build-simulator /ours /app/.venv
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /
# For serving. The roles driver and device plugin write to folders of root; their DaemonSets set runAsUser: 0.
USER 65532:65532
ENTRYPOINT ["wattlock-simulator"]
