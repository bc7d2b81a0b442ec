# posttrain on a CUDA GPU:
#   docker build -t posttrain .
#   docker run --rm --gpus all -v "$PWD":/work -v posttrain-cache:/cache posttrain run zephyr-7b-qlora
# Without a GPU: docker build --build-arg BASE_IMAGE=ubuntu:24.04 --build-arg PIP_ARGS="<your index of CPU wheels>" .
# The wheels of torch bring CUDA's libraries with them; the base image brings what a driver expects beside it.
ARG BASE_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/posttrain
ENV PATH=/opt/posttrain/bin:$PATH
WORKDIR /build

# Dependencies change seldom and are gigabytes: a layer of their own, from the two files that name them.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print("\n".join(project["dependencies"] + project["optional-dependencies"]["trackers"]))' > requirements.txt \
    && pip install ${PIP_ARGS} --constraint constraints.txt --requirement requirements.txt hatchling

COPY README.md LICENSE ./
COPY chat_templates chat_templates
COPY recipes recipes
COPY posttrain posttrain
RUN pip install --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 posttrain \
    && mkdir -p /cache /work && chown posttrain /cache /work
COPY --from=build /opt/posttrain /opt/posttrain
ENV PATH=/opt/posttrain/bin:$PATH \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1
USER posttrain
# Models and data sets that were downloaded outlive the container; runs go to the folder mounted at /work.
VOLUME /cache
WORKDIR /work
RUN posttrain --help > /dev/null
ENTRYPOINT ["posttrain"]
CMD ["--help"]
