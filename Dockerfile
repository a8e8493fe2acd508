# An image with the environment of `make setup`.
#
#   docker build -t mme .
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD/runs:/opt/mme/runs" mme make train
#
# Without a GPU: docker build --build-arg STACK=cpu --build-arg BASE=ubuntu:24.04 -t mme-cpu .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# Triton and torch.compile need a C compiler and Python's headers to build launchers at run time.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-venv python3-dev gcc g++ make git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mme

COPY . .

# No driver answers during the build of an image, so STACK selects cuda or cpu.
ARG STACK=cuda
ARG TORCH_INDEX_URL=
ENV MME_STACK=${STACK} PIP_NO_CACHE_DIR=1
RUN TORCH_INDEX_URL="${TORCH_INDEX_URL}" scripts/setup_environment.sh

# Jobs do not need to write to the code. The home folder is writable for any --user, because caches need it.
RUN useradd --uid 10001 --create-home mme \
    && chmod 1777 /home/mme \
    && mkdir -p datasets runs \
    && chown mme: datasets runs
USER mme
ENV HOME=/home/mme
ENV PATH=/opt/mme/.venv/bin:${PATH}
CMD ["mme", "--help"]
