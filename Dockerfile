# posttrain in a container; docs/containers.md says how it is run.
#   GPU:  docker build -t posttrain .
#   CPU:  docker build -t posttrain:cpu --build-arg BASE_IMAGE=ubuntu:24.04 --build-arg COMPILER="" \
#           --build-arg PIP_ARGS="--extra-index-url <pytorch.org's index of CPU wheels>" .
# Any base of Debian 12, Ubuntu 24.04 or newer does. The wheels of torch bring CUDA's libraries with them;
# the CUDA base brings what a driver expects beside them. `scripts/prove_image.sh` builds and runs all this.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# 1. What every stage stands on. Distributions keep one version of a package: there is none to pin.
FROM ${BASE_IMAGE} AS system
# On a GPU, flex attention is compiled when it is first used, and Triton builds its launcher with a C compiler.
ARG COMPILER="gcc libc6-dev python3-dev"
# /cache and /runs may be written by any user, like /tmp, so that `--user "$(id -u)"` works with new volumes.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3 ${COMPILER} \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 posttrain \
    && useradd --uid 10001 --gid posttrain --no-create-home --home-dir /cache --shell /usr/sbin/nologin posttrain \
    && install --directory --mode 1777 /cache /runs \
    && install --directory /work

FROM system AS builder
ENV PATH=/opt/posttrain/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/posttrain
COPY pyproject.toml constraints.txt ./

# 2. Dependencies change seldom and are gigabytes: a layer of their own, from the two files that name them.
FROM builder AS dependencies
ARG PIP_ARGS=""
ARG EXTRAS="trackers sentencepiece tiktoken lang"
# hadolint ignore=SC2086
RUN python -c 'import sys, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = [line for name in sys.argv[1:] for line in project["optional-dependencies"][name]]; \
print("\n".join(project["dependencies"] + extras))' ${EXTRAS} > requirements.txt \
    && pip install ${PIP_ARGS} --constraint constraints.txt --requirement requirements.txt

# 3. The package changes often and is small. It is installed under /package, where nothing else is.
FROM builder AS package
ARG PIP_ARGS=""
# hadolint ignore=SC2086
RUN pip install ${PIP_ARGS} --constraint constraints.txt hatchling
COPY README.md LICENSE ./
COPY chat_templates chat_templates
COPY recipes recipes
COPY posttrain posttrain
RUN pip install --no-deps --no-index --no-build-isolation --root /package .

# 4. The image: what seldom changes first.
FROM system AS image
# Whatever a library wants to keep goes to /cache, so that the root may be read-only. USER and LOGNAME:
# torch asks for the user's name, and a user given by `--user` has none.
ENV PATH=/opt/posttrain/bin:$PATH \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    CUDA_CACHE_PATH=/cache/cuda \
    MPLCONFIGDIR=/cache/matplotlib \
    TMPDIR=/tmp \
    USER=posttrain \
    LOGNAME=posttrain \
    PYTHONUNBUFFERED=1
# All that is ever written: downloads and compiled kernels, runs, scratch. /work is for your own files.
VOLUME ["/cache", "/runs", "/tmp"]
# Runs go to `runs` in the current folder: /runs.
WORKDIR /
USER 10001:10001
ENTRYPOINT ["posttrain"]
CMD ["--help"]
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
COPY --from=dependencies /opt/posttrain /opt/posttrain
COPY --from=package /package/opt/posttrain /opt/posttrain
LABEL org.opencontainers.image.title="posttrain" \
      org.opencontainers.image.description="One recipe from a foundational checkpoint to an instruct and an aligned model" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
