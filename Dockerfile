# vllm-jd on a machine with an NVIDIA GPU: vLLM's own image with this package added.
#
#   docker build --tag vllm-jd .
#   docker run --rm --init --gpus all --ipc=host --stop-timeout 60 -p 127.0.0.1:8000:8000 \
#       -v /path/to/store:/store:ro -v vllm-jd-cache:/home/serve/.cache \
#       vllm-jd serve /store --model BASE --host 0.0.0.0
#
# It answers on this machine only; docs/deploy.md says how to open it, and what of this has been run. For
# machines without a GPU: Dockerfile.cpu.

# Another build can be named, such as one for an older driver, or vLLM 0.32 (v0.32.0).
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0

FROM python:3.11-slim-bookworm AS wheel
COPY pyproject.toml README.md LICENSE /src/
COPY vllm_jd /src/vllm_jd
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${VLLM_IMAGE}
LABEL org.opencontainers.image.title="vllm-jd" \
      org.opencontainers.image.description="An OpenAI-compatible vLLM server with thousands of compressed LoRA adapters resident" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# vLLM, torch and all that they were built and tested with stay as they are: --no-deps, and of what we
# require only what the image lacks. Should it lack more, the build ends with pip's word on it.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip list --format=freeze > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --break-system-packages --no-deps /wheels/*.whl \
    && python3 -m pip install --no-cache-dir --break-system-packages \
        --constraint /tmp/constraints.txt 'scipy>=1.15' \
    && { python3 -m pip check > /tmp/check.txt || ! grep '^vllm-jd ' /tmp/check.txt; } \
    && rm /tmp/constraints.txt /tmp/check.txt \
    && vllm-jd --version

# In group 0, which may write to the home folder: so may any other user of that group
# (`docker run --user "$(id -u):0"`, OpenShift). Everything that is compiled or downloaded goes below
# .cache, so that one volume keeps it.
RUN useradd --uid 10001 --gid 0 --create-home --home-dir /home/serve serve \
    && mkdir /home/serve/.cache \
    && chown 10001:0 /home/serve/.cache \
    && chmod -R g=u /home/serve
ENV HOME=/home/serve \
    USER=serve \
    TRITON_CACHE_DIR=/home/serve/.cache/triton \
    CUDA_CACHE_PATH=/home/serve/.cache/nv
USER 10001:0
WORKDIR /home/serve
EXPOSE 8000
# http.client, since curl may not be there, and since urllib would ask a proxy.
HEALTHCHECK --interval=15s --timeout=5s --start-period=900s --retries=4 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["vllm-jd"]
CMD ["--help"]
