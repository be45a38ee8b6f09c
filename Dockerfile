# MediBot in a container; not built in the project's own checks, which have no engine. Lint: make check
#   docker build -t medibot .                               CPU
#   docker build -t medibot --build-arg TORCH=cu130 .       NVIDIA GPUs; run with --gpus all
#   docker run --rm --gpus all -v "$PWD/outputs:/home/medibot/outputs" medibot train medquad-qlora
FROM python:3.11-slim

# A folder of https://download.pytorch.org/whl: cpu, cu130, cu126 (GPUs before Turing) …
ARG TORCH=cpu

# Triton compiles what it loads a GPU's kernels with; this image has Python.h
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 medibot
USER 1000
WORKDIR /home/medibot
ENV PATH="/home/medibot/.venv/bin:$PATH" PYTHONUNBUFFERED=1

COPY --chown=1000 pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=1000 medibot medibot
COPY --chown=1000 recipes recipes
COPY --chown=1000 accelerate_configs accelerate_configs
COPY --chown=1000 benchmarks/tasks benchmarks/tasks
# torch comes first and from its own index: PyPI's build for Linux always brings CUDA along
RUN python -m venv .venv \
    && grep "^torch==" constraints.txt > torch.txt \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" -r torch.txt \
    && pip install --no-cache-dir -c constraints.txt -e ".[quickstart]"

ENTRYPOINT ["medibot"]
CMD ["--help"]
