# gpt-arc in a container, with what torch.compile needs.
#   docker build -t gpt-arc .                                                              for CPUs
#   docker build -t gpt-arc --build-arg BASE=nvidia/cuda:TAG --build-arg INDEX= .          for GPUs: TAG ends with ubuntu24.04
#   docker run --rm -v "$PWD:/work" gpt-arc train configs/quickstart.toml                  --gpus all for GPUs
#   docker run --rm -v "$PWD:/work" --network=host gpt-arc playground out/quickstart       it serves its own machine alone
ARG BASE=python:3.12-slim
FROM ${BASE}
# PyPI's torch includes CUDA; this index has the build for CPUs, of which pip prefers the version that ends with +cpu
ARG INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && { command -v python3 || apt-get install -y --no-install-recommends python3-dev python3-venv; } \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir ${INDEX:+--extra-index-url ${INDEX}} "/source[data,gguf,metrics,plot,serve,vision]" \
    && rm -rf /source
WORKDIR /work
ENTRYPOINT ["/venv/bin/gpt-arc"]
CMD ["--help"]
