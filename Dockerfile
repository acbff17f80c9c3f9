# The image for GKE and for Slurm with enroot and pyxis (docs/clusters.md).
#
#   docker build --tag=mvjax:tpu .
#   docker build --build-arg=EXTRAS=gpu,sim --tag=mvjax:gpu .
#   docker run --rm mvjax:tpu mvjax --help
#
# EXTRAS are those of pyproject.toml: tpu, gpu, sim (evaluation in Meta-World), wandb, ...
# data/, weights/ and runs/ are no part of the image: mount them below /mvjax, where the
# configurations look for them, or name other folders in the flags.
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}
ARG EXTRAS=tpu

# Off-screen OpenGL, the packages of launch/setup.sh. Debian removes old versions: none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

# Log lines appear at once. The NVIDIA variables are for the GPU support of Docker and enroot: without
# the first, enroot gives a container no GPU; without the second, GPUs cannot draw. Elsewhere they
# have no effect.
ENV PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics

WORKDIR /mvjax

# All packages, before the code: a change of the code alone does not install them again. An editable
# installation is a path to this folder, where the code comes to lie afterwards.
COPY pyproject.toml LICENSE ./
COPY mvjax/__init__.py mvjax/
RUN touch README.md && pip install --no-cache-dir --editable ".[${EXTRAS}]"

COPY . .

# The user is root: GKE gives TPU devices to root, and enroot maps root to the user of the job.
# No ENTRYPOINT: a JobSet, xpk and srun start launch/cluster/pod.sh or `mvjax COMMAND` by name.
CMD ["mvjax", "--help"]
