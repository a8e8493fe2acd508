# The environment of `make setup`, in an image.
#
#   docker build -t mme .
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD/runs:/opt/mme/runs" mme make train
#
# Without a GPU: docker build --build-arg STACK=cpu --build-arg BASE=ubuntu:24.04 -t mme-cpu .
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

# A C compiler and Python's headers: Triton and torch.compile build launchers with them at run time.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        python3 python3-venv python3-dev gcc g++ make git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mme

COPY . .

# No driver answers while an image is built, so the build is named: cuda or cpu.
ARG STACK=cuda
ARG TORCH_INDEX_URL=
ENV MME_STACK=${STACK} PIP_NO_CACHE_DIR=1
RUN TORCH_INDEX_URL="${TORCH_INDEX_URL}" scripts/setup_environment.sh

# Jobs need no rights over the code. With --user, too, caches find a home that can be written to.
RUN useradd --uid 10001 --create-home mme \
    && chmod 1777 /home/mme \
    && mkdir -p datasets runs \
    && chown mme: datasets runs
USER mme
ENV HOME=/home/mme
ENV PATH=/opt/mme/.venv/bin:${PATH}
CMD ["mme", "--help"]
