# vllm-jd on a CPU machine. (An image for GPUs needs the CUDA kernels, which are not there yet.)
#
#   docker build -t vllm-jd .
#   docker run -p 8000:8000 -v /path/to/store:/store:ro -v /path/to/model:/model:ro \
#       vllm-jd serve /store --model /model --host 0.0.0.0
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make libnuma1 curl \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
# The same set-up as `make setup`, with the package itself not editable.
RUN VENV=/opt/vllm-jd EXTRAS=cpu EDITABLE= bash scripts/setup.sh && rm -rf /src

RUN useradd --create-home serve
USER serve
WORKDIR /home/serve
ENV PATH=/opt/vllm-jd/bin:$PATH
EXPOSE 8000
HEALTHCHECK --start-period=180s CMD curl --fail --silent http://127.0.0.1:8000/health || exit 1
ENTRYPOINT ["vllm-jd"]
CMD ["--help"]
