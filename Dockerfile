# The server on the bundled model, as `make serve` starts it:
#   docker build -t apportion . && docker run --rm -p 8000:8000 apportion
# Another model: docker run ... -v "$PWD/models:/models" apportion /models/NAME   (every flag of `apportion serve` may follow)
# Another port:  docker run -e PORT=9000 -p 9000:9000 apportion                   (not --port: the health check asks $PORT)
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
# What pip needs to be told about where packages come from, such as an index of CPU builds of torch.
ARG PIP_ARGS=
WORKDIR /build
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY csrc csrc
COPY src src
RUN python -m venv /opt/apportion && /opt/apportion/bin/pip install --no-cache-dir ${PIP_ARGS} '.[serve,otel]'

FROM python:${PYTHON}-slim
COPY --from=build /opt/apportion /opt/apportion
RUN useradd --create-home apportion
USER apportion
ENV PATH=/opt/apportion/bin:$PATH PORT=8000
EXPOSE 8000
# SIGTERM drains; a second one ends it at once.
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=30s --interval=10s --timeout=3s \
    CMD python -c "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/readyz', timeout=2)"
ENTRYPOINT ["sh", "-c", "exec apportion serve --host 0.0.0.0 --port \"$PORT\" \"$@\"", "apportion"]
