# The teacher: `teacher-server`, which serves unless told otherwise. Built from the root of the repository:
#
#   docker build --file deploy/docker/teacher.Dockerfile --tag preceptor-teacher .
#
# --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 makes it one for CUDA. Where packages come from another
# place, pip's own variables are build arguments. The stages are those of student.Dockerfile, and their first layer is
# the very same, so that torch is stored and sent once for both images. A change of our code remakes the last layer.
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
ARG EXTRAS=server,embedded,tracing
COPY pyproject.toml /build/
RUN python3 -c "import sys, tomllib; \
project = tomllib.load(open('/build/pyproject.toml', 'rb'))['project']; \
extras = [line for extra in sys.argv[1].split(',') for line in project['optional-dependencies'][extra]]; \
print(*project['dependencies'], *extras, sep='\n')" "${EXTRAS}" > /build/requirements.txt

FROM torch AS dependencies
COPY --from=requirements /build/requirements.txt /build/
RUN python3 -m pip install --prefix /opt/dependencies -c /build/constraints.txt -r /build/requirements.txt \
    && cd /opt/dependencies/lib/python3.11/site-packages \
    && find . -type d -name tests -prune -exec rm -rf {} +

FROM torch AS package
COPY . /build/
RUN python3 -m pip wheel --no-deps --wheel-dir /build/dist /build \
    && python3 -m pip install --no-deps --prefix /opt/preceptor /build/dist/*.whl

FROM ${PYTHON_IMAGE}
COPY --from=torch /opt/torch /opt/torch
COPY --from=dependencies /opt/dependencies /opt/dependencies
COPY --from=package /opt/preceptor /opt/preceptor
LABEL org.opencontainers.image.title="preceptor-teacher" \
    org.opencontainers.image.description="A shared teacher for knowledge distillation: the server" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0"
# Folders of volumes belong to who writes there, or a new volume would be root's.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin preceptor \
    && install -d -m 0750 -o 10001 -g 10001 /state /tokens/server /tokens/admin /tokens/viewer /tokens/student
ENV PATH=/opt/preceptor/bin:/opt/dependencies/bin:/opt/torch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 TEACHER_STATE_DIRECTORY=/state
USER 10001:10001
EXPOSE 8000 8001
ENTRYPOINT ["teacher-server"]
CMD ["serve"]
