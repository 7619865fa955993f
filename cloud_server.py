"""The cloud: a TCP hub that finds a spot in the next broker's region, or the one after.

        broker --search--> CLOUD --reserve--> the next broker      full
                           CLOUD --reserve--> and the one after    an offer
        broker <--an offer, or a refusal-- CLOUD

One JSON object per line, one thread per connection, and nothing that lasts: kill it,
start it again, and nothing was lost. While it is away the brokers walk the ring by
themselves (`Node.walk_ring`).

All scripts share what stands before it: how a part starts, ends and tells its story; a
TCP server that bad guests cannot hurt (`Door`, `Lines`); the client for it (`Caller`);
and a circuit breaker (`Breaker`), so a part that hangs costs the city one wait.

    python3 cloud_server.py

Read next: station.py. Left out on purpose: remembering who is full. It could be wrong.
"""

import argparse
import collections
import concurrent.futures
import hmac
import ipaddress
import logging
import os
import signal
import socket
import socketserver
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from time import monotonic, strftime

from ring import (BROKER_WAIT, ID, KM, NAME, SERVERS, City, Invalid, Kind, fit,
                  load, need, number, read_object, to_json, walk)

try:
    import resource
except ImportError:     # Windows does not count file descriptors
    resource = None

KEY = os.environ.get("EV_KEY", "")  # set on every part, it closes every door
LIMIT = 64 * 1024   # bytes of a line, an HTTP body, an MQTT packet
ANSWER_LIMIT = 16 * 1024 * 1024     # bytes of an answer: a city may have many cars
GUEST_WAIT = 10     # s for a guest's first good question
LINE_WAIT = 60      # s for each one after it
BACKLOG = 1024      # connections that may wait for accept(): a rush comes all at once
A_CHANCE = 0.49     # s to answer in; a walk's third hung broker gets just under 0.5
CREW = 32           # threads of a part that wait for other parts in its place


# --- The key --------------------------------------------------------------------------

def is_key(key) -> bool:
    if not KEY:
        return True         # no key is set: every door is open
    if not isinstance(key, str):
        return False
    # In constant time: how long it takes must not tell how much of it was right.
    return hmac.compare_digest(key.encode(errors="surrogatepass"), KEY.encode())


def mqtt_password(client_id: str) -> str:
    """Proof of the key for one MQTT client: worth nothing under another client id."""
    return hmac.new(KEY.encode(), client_id.encode(), "sha256").hexdigest()


# --- How a part starts, ends and tells its story --------------------------------------

class Story:
    """What one part tells, one line per event: time, who, what and why.

        tell("listens on port 5555")              12:00:00  cloud     listens ...
        tell("->", "server2", "car1-7", "...")    12:00:01  cloud     -> server2  car1-7

    Any thread may tell something: appending to a deque, or copying it, needs no lock.
    """
    def __init__(self, who):
        self.who = who
        self.events = collections.deque(maxlen=50)      # the latest lines
        self.troubles = {}      # whom: the trouble told of last; "": none any more

    def __call__(self, *words):
        if words[0] in ("->", "<-"):    # then comes to whom, or because of whom
            arrow, whom, *words = words
            words = arrow, f"{whom:<8}", *words
        text = " ".join(words)[:400]
        if not text.isprintable():      # a client id may contain anything
            text = text.encode("unicode_escape").decode()
        line = f"{strftime('%H:%M:%S')}  {self.who:<8}  {text}"
        self.events.append(line)
        logging.info(line)

    def trouble(self, arrow, whom, what):
        """Tell of a trouble once, however often it is met; "" means that it is over."""
        if what and self.troubles.get(whom) != what:
            self(arrow, whom, what)
        self.troubles[whom] = what


def start_up(parser):
    """What every script begins with: options, log, the key, servers.json. Returns (the
    options, the City)."""
    if sys.stdout is None:              # it was closed before we began
        sys.stdout = open(os.devnull, "w")
    parser.add_argument("--config", metavar="FILE", default=SERVERS,
                        help="the city (default: servers.json beside the scripts)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")   # a terminal may lack a letter
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    logging.raiseExceptions = False     # that nobody listens is no reason to stop
    threading.excepthook = lambda fault: crash(fault.exc_value)
    raise_file_limit()
    try:
        check_key()
        return args, load(args.config)
    except Invalid as fault:
        give_up(fault)


def choose_names(args, known, what):
    if not known:
        give_up(f"{args.config}: there is no {what}")
    for name in args.names:
        if name not in known:
            give_up(f"{args.config}: there is no {what} {name!a}")
    return [name for name in known if name in args.names or not args.names]


def check_key():
    try:
        KEY.encode()
    except UnicodeEncodeError:          # Python's way of saying: not UTF-8
        raise Invalid("EV_KEY is not UTF-8") from None
    need(KEY == "" or KEY.strip(), "EV_KEY is nothing but blanks")


def raise_file_limit():
    # Each connection takes a file descriptor: allow as many as the system does.
    if resource is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in 10_000, most:          # macOS says that it allows more than it does
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def give_up(why):
    """The user must change something first: say what, in one line; exit status 2."""
    print(why, file=sys.stderr)
    sys.exit(2)


def crash(fault):
    """A bug in a part's own thread or loop ends the process (fail-fast): the others
    know what to do when a part is gone, but would wait for one that only looks
    alive."""
    traceback.print_exception(fault)
    os._exit(1)


@contextmanager
def until_stopped():
    """Runs its block to the end, or until Ctrl-C or SIGTERM; then exit status 0, at
    once: no thread that still waits for a silent peer may hold us up."""
    with suppress(KeyboardInterrupt):
        for stop in signal.SIGINT, signal.SIGTERM:
            signal.signal(stop, signal.default_int_handler)
        yield
    os._exit(0)


# --- A TCP server that bad guests cannot hurt -----------------------------------------

def resolve(host):
    """The one address that servers and clients use: IPv4 if the host has one. (Where
    "localhost" has two, a client that tries both loses time with the wrong one.)"""
    found = socket.getaddrinfo(host, None)
    return min(found, key=lambda info: info[0])[4][0]       # AF_INET is the least


@contextmanager
def listening(host, port, tell):
    """For the block that opens a port: the address to listen on. Warns of an open door;
    a port that cannot be had is exit status 2 and one line."""
    try:
        address = resolve(host)
        if KEY == "" and not ipaddress.ip_address(address).is_loopback:
            tell(f"WARNING: {host} port {port} is open to all: EV_KEY is not set")
        yield address
    except OSError as fault:
        give_up(f"cannot listen on {host} port {port} ({fault.strerror}): is this part "
                "running already? End what uses the port, or edit servers.json")


def has_room(connection):
    """A new descriptor gets the lowest free number: is that far from the limit?"""
    if resource is None:
        return True
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connection.fileno() < most - 32      # these are kept for what is not a guest


class Patience(socket.socket):
    """A connection that may be read from until `end`, however slowly its bytes drip in:
    a time-out for each byte would let one who drips stay for ever."""
    def __init__(self, connection, seconds):
        super().__init__(connection.family, fileno=connection.detach())
        # Nagle's algorithm off: or what we say may wait 40 ms for the peer's ACK.
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.settimeout(seconds)
        self.end = monotonic() + seconds

    def recv_into(self, buffer):
        left = self.end - monotonic()
        if left <= 0:
            raise TimeoutError("was silent for too long")
        self.settimeout(left)
        return super().recv_into(buffer)

    __del__ = socket.socket.close       # as soon as nobody refers to it any more


class Door(socketserver.ThreadingTCPServer):
    """Serves whoever connects, one thread per connection, with `handler`. The threads
    share nothing but `node`, the cloud or a fog node, which many may ask at a time."""
    daemon_threads = True
    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"    # on Windows two could share a port

    def __init__(self, host, port, handler, node):
        self.host = host
        self.node = node
        with listening(host, port, node.tell) as address:
            if ":" in address:
                self.address_family = socket.AF_INET6
            super().__init__((address, port), handler)

    def process_request(self, request, client_address):
        """Turn a newcomer away rather than fail those who are being served: a process
        has at most 2,000 threads. (What is raised here goes to handle_error.)"""
        if not has_room(request) or threading.active_count() > 2000:
            raise OSError("turned away: too many connections")
        try:
            super().process_request(Patience(request, GUEST_WAIT), client_address)
        except RuntimeError:            # the system has no more threads to give
            raise OSError("turned away: too many threads") from None

    def handle_error(self, request, client_address):
        """One line for a broken connection, a traceback for a bug; then we go on."""
        fault = sys.exc_info()[1]
        if isinstance(fault, OSError):
            self.node.tell("<-", client_address[0], str(fault))
        else:
            super().handle_error(request, client_address)


class Lines(socketserver.StreamRequestHandler):
    """A conversation: a line of JSON comes in, a line of JSON goes out."""
    def handle(self):
        """Answer each line. After one without the key we hang up, and after one that is
        not a JSON object: it may be an HTTP request that a foreign web page has made a
        browser send here, and the next line may be what that page wants to tell us."""
        wait = GUEST_WAIT
        is_ours = True
        while is_ours:
            line = self.rfile.readline(LIMIT + 1)
            if not line.endswith(b"\n"):
                break                   # that was all, or it is too long
            is_ours = False
            try:
                request = read_object(line)
                need(is_key(request.get("key")), "key")
                is_ours = True
                answer = self.server.node.answer(request)
                wait = LINE_WAIT
            except Invalid as fault:
                self.server.node.tell("<-", self.client_address[0],
                                      f"invalid message: {fault}")
                answer = {"error": str(fault)}
            self.wfile.write(to_json(answer) + b"\n")
            self.connection.end = monotonic() + wait


# --- The other end: asking questions --------------------------------------------------
# Three things may go wrong, and each is dealt with differently:
#
#     it refuses the connection    it is not running, and may be back at once: ask again
#     it does not answer in time   it hangs, and would cost us all a wait: leave it out
#     it answers nonsense          it is alive: ask again, and tell what it said

class Breaker:
    """A circuit breaker, open for whoever left a question unanswered: for 10 s, then
    twice as long each time, at most 80 s, until it answers. Many may wait for the same
    silence: it counts once. No lock: an entry is only ever replaced as a whole."""
    NEVER = 0.0, 10         # left out until then; s to be left out the next time

    def __init__(self):
        self.left_out = {}  # who: such a pair

    def is_open(self, who):
        until, _ = self.left_out.get(who, self.NEVER)
        return monotonic() < until

    def failed(self, who):
        now = monotonic()
        until, seconds = self.left_out.get(who, self.NEVER)
        if now >= until:
            self.left_out[who] = now + seconds, min(2 * seconds, 80)

    def answered(self, who):
        self.left_out.pop(who, None)


class Caller:
    """Asks other parts' doors, for many threads. Opening a connection costs more than
    asking, so up to 8 idle ones are kept for each address, in a deque, as threads may
    take them and put them back at the same time; beyond that the oldest is closed."""
    def __init__(self):
        self.breaker = Breaker()        # for addresses: (host, port)
        self.kept = collections.defaultdict(lambda: collections.deque(maxlen=8))

    def ask(self, address, request, seconds):
        """The answer. Raises Invalid, with the true cause, if there is none."""
        if self.breaker.is_open(address):
            raise Invalid("left out, as it was silent")
        try:
            answer = read_object(self.exchange(address, request, seconds))
        except TimeoutError:
            if seconds > A_CHANCE:      # a shorter silence proves nothing
                self.breaker.failed(address)
            raise Invalid(f"no answer in {seconds:.1f} s") from None
        except OSError as fault:
            raise Invalid(f"no answer ({fault})") from None
        self.breaker.answered(address)
        if "error" in answer:
            raise Invalid(f"refused ({answer['error']!s:.99}); for \"key\" see EV_KEY")
        return answer

    def exchange(self, address, request, seconds):
        """Send a line, read a line: over a connection that was kept, or a new one.
        Raises OSError; TimeoutError is one, too."""
        end = monotonic() + seconds
        if KEY:
            request = request | {"key": KEY}
        line = to_json(request) + b"\n"
        # The other end may have closed a kept connection. Then we ask anew: that
        # is harmless, as claims are idempotent. After a time-out we never do.
        try:
            connection = self.kept[address].pop()
            return self.converse(address, connection, line, end)
        except (IndexError, ConnectionError):
            pass                        # none was kept, or it was closed
        host, port = address
        left = max(0.01, end - monotonic())
        connection = socket.create_connection((resolve(host), port), left)
        return self.converse(address, Patience(connection, left), line, end)

    def converse(self, address, connection, line, end):
        """Keep the connection if it answers. If not, nobody refers to it any more, so
        it is closed."""
        connection.end = end
        connection.sendall(line)
        answer = connection.makefile("rb").readline(ANSWER_LIMIT)
        if not answer.endswith(b"\n"):
            raise ConnectionError("it hung up")
        self.kept[address].append(connection)
        return answer


# --- Requests and replies -------------------------------------------------------------
# What a car asks for, and what it may be told. Whoever reads one checks it, and raises
# Invalid: so a broker that answers nonsense is skipped like one that does not answer.

SECONDS = number("a number of seconds", 0.001, 1e6)
TEXT = Kind("a text", lambda value: isinstance(value, str))
REQUEST = {"id": ID, "car": NAME, "at": NAME, "range": KM}
OFFER = {"id": ID, "station": NAME, "broker": NAME, "route": [NAME], "km": KM,
         "lease": SECONDS, "asked": [NAME]}
REFUSAL = {"id": ID, "station": (NAME,), "reason": TEXT, "retry": SECONDS,
           "asked": [NAME]}


def read_request(city: City, fields: dict) -> dict:
    request = fit(REQUEST, fields, "request")
    need(request["at"] in city.places, "request.at must be a place on the map")
    return request


def read_reply(city: City, fields: dict, request_id: str) -> dict:
    need(fields.get("id") == request_id, "not a reply to this request")
    if fields.get("station") is None:
        return fit(REFUSAL, fields, "refusal")
    offer = fit(OFFER, fields, "offer")
    need(offer["station"] in city.stations(offer["broker"]),
         "offer.station is not known")
    need(city.places.keys() >= set(offer["route"]), "offer.route leads off the map")
    return offer


def refusal(request_id: str | None, reason: str, asked: list[str]) -> dict:
    """`retry`: s after which to ask again; if it is not "full", that hardly helps."""
    retry = 5 if reason == "full" else 60
    return {"id": request_id, "station": None, "reason": reason, "retry": retry,
            "asked": asked}


def outcome(reply: dict) -> str:
    if reply["station"]:
        return f"yes, at {reply['station']}"
    return reply["reason"]


# --- The cloud, and what a fog node has in common with it -----------------------------

def crew():
    """A pool of threads that all start now: later the system may have none left. (A
    pool starts one only if none is idle. At the barrier each waits until all run.)"""
    pool = concurrent.futures.ThreadPoolExecutor(CREW)
    barrier = threading.Barrier(CREW)
    for _ in range(CREW):
        pool.submit(barrier.wait)
    return pool


class Node:
    """Whoever can walk the ring for a car. Many threads use it at once: they share the
    city, which nobody changes, and what is made for that: story, caller and crew."""
    def __init__(self, city, tell):
        self.city = city
        self.tell = tell
        self.caller = Caller()
        self.crew = crew()      # they wait for other parts

    def walk_ring(self, request, home):
        """From the broker after `home` on: an offer, or a refusal. A broker that does
        not answer in time is in `asked`, too; one that is left out is not."""
        request_id = request["id"]
        asked = []
        for broker, seconds in walk(home):
            if self.caller.breaker.is_open(broker.address):
                continue
            asked.append(broker.name)
            self.tell("->", broker.name, request_id, "a spot for", request["car"])
            try:
                answer = self.caller.ask(
                    broker.address, {"op": "reserve"} | request, seconds)
                reply = read_reply(self.city, answer, request_id)
            except Invalid as fault:
                self.tell("<-", broker.name, request_id, f"skipped: {fault}")
                continue
            self.tell("<-", broker.name, request_id, outcome(reply))
            if reply["station"]:
                return reply | {"asked": asked}
        return refusal(request_id, "full", asked)


class Cloud(Node):
    """Answers brokers, in a thread for each connection."""
    def answer(self, request):
        match request.get("op"):
            case "search":
                return self.do_search(request)
            case "city":
                return self.do_city()
        raise Invalid("request.op must be search or city")

    def do_search(self, fields):
        request = read_request(self.city, fields)
        home = self.city.ring.get(str(fields.get("broker")))
        need(home, "request.broker must be the name of a broker")
        self.tell("<-", home.name, request["id"], "wants a spot near", request["at"])
        if not self.city.within_range(request["at"], request["range"]):
            return refusal(request["id"], "out of range", [])
        return self.walk_ring(request, home)

    def do_city(self):
        """What every broker says of itself, all asked at once; None: no answer."""
        return {"brokers": dict(self.crew.map(
            self.ask_status, self.city.ring.values()))}

    def ask_status(self, broker):
        trouble = ""
        status = None
        try:
            status = self.caller.ask(broker.address, {"op": "status"}, BROKER_WAIT)
        except Invalid as fault:
            trouble = f"no status: {fault}"
        self.tell.trouble("<-", broker.name, trouble)
        return broker.name, status


def main():
    parser = argparse.ArgumentParser(description="The cloud of the charging city.")
    _, city = start_up(parser)
    tell = Story("cloud")
    with until_stopped():
        door = Door(*city.cloud, Lines, Cloud(city, tell))
        tell("listens on {} port {}".format(*city.cloud))
        door.serve_forever()


if __name__ == "__main__":
    main()
