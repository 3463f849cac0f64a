# The students' side: `student-worker`, and `ray`, of whose cluster this is a node. Built from the root of the repository:
#
#   docker build --file deploy/docker/student.Dockerfile --tag preceptor-student .
#
# The stages, and the build arguments, are those of teacher.Dockerfile, which says more. EXTRAS=student,ray leaves out
# the data sets that travel in packages, and what comparisons and sweeps need: 0.2 GB.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

FROM ${PYTHON_IMAGE} AS torch
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_PYTHON=/opt/torch/bin/python
COPY constraints.txt /build/
# Removed: what only those need who build against torch, and tests. Bytecode stays: no run could write it later.
RUN python3 -m venv --without-pip /opt/torch \
    && printf "/opt/%s/lib/python3.11/site-packages\n" dependencies preceptor \
        > /opt/torch/lib/python3.11/site-packages/other-layers.pth \
    && python3 -m pip install -c /build/constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch numpy \
    && cd /opt/torch/lib/python3.11/site-packages \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && rm -rf torch/test torch/include \
    && find . -type d -name tests -prune -exec rm -rf {} +

# By itself, so that a change of pyproject.toml that asks for nothing else installs nothing anew.
FROM ${PYTHON_IMAGE} AS requirements
ARG EXTRAS=student,ray,bench
COPY pyproject.toml /build/
RUN python3 -c "import sys, tomllib; \
project = tomllib.load(open('/build/pyproject.toml', 'rb'))['project']; \
extras = [line for extra in sys.argv[1].split(',') for line in project['optional-dependencies'][extra]]; \
print(*project['dependencies'], *extras, sep='\n')" "${EXTRAS}" > /build/requirements.txt

FROM torch AS dependencies
COPY --from=requirements /build/requirements.txt /build/
# Removed: Java's part of Ray, headers, tests.
RUN python3 -m pip install --prefix /opt/dependencies -c /build/constraints.txt -r /build/requirements.txt \
    && cd /opt/dependencies/lib/python3.11/site-packages \
    && rm -rf ray/jars pyarrow/include \
    && find . -type d -name tests -prune -exec rm -rf {} +

FROM torch AS package
COPY . /build/
RUN python3 -m pip wheel --no-deps --wheel-dir /build/dist /build \
    && python3 -m pip install --no-deps --prefix /opt/preceptor /build/dist/*.whl

FROM ${PYTHON_IMAGE}
COPY --from=torch /opt/torch /opt/torch
COPY --from=dependencies /opt/dependencies /opt/dependencies
COPY --from=package /opt/preceptor /opt/preceptor
LABEL org.opencontainers.image.title="preceptor-student" \
    org.opencontainers.image.description="A shared teacher for knowledge distillation: students, and the nodes of their Ray cluster" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0"
# Folders of volumes belong to who writes there, or a new volume would be root's.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin preceptor \
    && install -d -o 10001 -g 10001 /demo /runs /targets
ENV PATH=/opt/preceptor/bin:/opt/dependencies/bin:/opt/torch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
ENTRYPOINT ["student-worker"]
CMD ["--help"]
