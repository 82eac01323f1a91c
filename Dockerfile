# One image for every process: `docker run model-broker worker decide`, `... gateway`, `... topics apply`.
# The credit example is inside, so that docker-compose.yml needs nothing else.

FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# Dependencies first: their layer is made again only when they change. scikit-learn is the example's.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt scikit-learn
COPY README.md LICENSE ./
COPY schemas schemas
COPY topics topics
COPY app app
RUN pip install --no-deps .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home broker \
    && install --directory --owner=broker --group=broker /var/lib/model-broker /var/lib/models
COPY --from=build /opt/venv /opt/venv
COPY examples /opt/model-broker/examples
# The example's modules are found from any directory, by the pool worker too. Local state holds nothing that Kafka does
# not, so its directory needs no volume.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/model-broker \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BROKER_DATA_DIR=/var/lib/model-broker \
    BROKER_LOG_FORMAT=json
WORKDIR /opt/model-broker
USER broker
# SIGTERM drains: the entrypoint is the process itself, no shell stands before it.
ENTRYPOINT ["model-broker"]
CMD ["--help"]
