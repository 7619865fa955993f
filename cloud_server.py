"""The cloud: a TCP hub that finds a spot in the next broker's region, or the one after.

        broker --{"op": "search", "car": "car1", ...}--> CLOUD --{"op": "reserve", ...}--> next
        broker <--an offer, or a refusal---------------- CLOUD <--a refusal: full--------- broker
                                                         CLOUD --{"op": "reserve", ...}--> the
                                                         CLOUD <--an offer---------------- next one

One JSON object a line, one thread a connection, and no state whatever: kill it, start it
again, and nothing was lost. While it is away the brokers walk the ring by themselves, with
this file's `search`. The tools that all four scripts share stand here too: how a part
starts, ends and tells its story, a TCP server that bad guests cannot hurt, and `call`, the
other end of it.

    python3 cloud_server.py            serve on the address in servers.json
    python3 cloud_server.py --demo     the whole city in one terminal, told as a story

Read next: broker.py. Left out on purpose: remembering who is full, which could be wrong.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hmac
import io
import ipaddress
import json
import logging
import os
import queue
import random
import re
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from ring import ASK, SERVERS, WALK, City, is_name, is_number, load, need, read_object, walk

try:
    import resource
except ImportError:     # Windows counts no file descriptors
    resource = None

LIMIT = 64 * 1024   # bytes of a line, an HTTP body, an MQTT packet
LINE_WAIT = 60      # s for a whole line to come in
BACKLOG = 1024      # connections that may wait for accept(): a rush hour comes at once
SPARE = 32          # file descriptors kept free for what is not a guest
RETRY = 5           # s after which a refused car asks again
DEMO = 38           # s the whole demo may take; it needs about 20


# --- The key: set on every part, it closes every door -----------------------------------

KEY = os.environ.get("EV_KEY", "")


def is_key(key) -> bool:
    """Is it the key? Compared in constant time: how long it takes tells nothing."""
    return not KEY or isinstance(key, str) and hmac.compare_digest(
        key.encode(errors="replace"), KEY.encode(errors="replace"))


def mqtt_password(client_id: str) -> str:
    """The password of an MQTT client: proof of the key, worth nothing under another id."""
    return hmac.new(KEY.encode(errors="replace"), client_id.encode(), "sha256").hexdigest()


# --- How a part starts, ends and tells its story -----------------------------------------

class Story:
    """What one part tells: a line an event - time, who, what and why. Keeps the last 50."""

    def __init__(self, who: str):
        self.who, self.events = who, collections.deque(maxlen=50)

    def __call__(self, text: str) -> None:
        if not text.isprintable():      # a name from the network may hold anything
            text = text.encode("unicode_escape").decode()
        line = f"{time.strftime('%H:%M:%S')}  {self.who:<8}  {text}"
        self.events.append(line)
        logging.info("%s", line)


def start_up(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, City]:
    """What every script begins with: its options, its log, its signals, servers.json."""
    parser.add_argument("--config", metavar="FILE", default=SERVERS,
                        help="the city (default: servers.json beside the scripts)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")   # a terminal may lack a letter
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    for stop in signal.SIGINT, signal.SIGTERM:
        signal.signal(stop, signal.default_int_handler)
    threading.excepthook = lambda fault: crash(fault.exc_value)
    if resource:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    try:
        return args, load(args.config)
    except ValueError as fault:
        give_up(fault)


def positive(text: str) -> float:
    """A number of the command line that must be more than nothing."""
    number = float(text)
    need(is_number(number, 1e-3, 1e6), "")
    return number


def give_up(fault) -> None:
    """The user must change something first: say what, in one line, exit status 2."""
    print(fault, file=sys.stderr)
    sys.exit(2)


def crash(fault: BaseException) -> None:
    """A fault of our own, in whatever thread, ends the process: never a half-dead part."""
    traceback.print_exception(fault)
    sys.stdout.flush()
    os._exit(1)


@contextlib.contextmanager
def until_stopped():
    """Runs its block to the end, or until Ctrl-C or SIGTERM; exit status 0 in both cases."""
    with contextlib.suppress(KeyboardInterrupt):
        yield
    sys.stdout.flush()
    os._exit(0)     # at once: no thread that waits for a silent peer may keep us


def run_until_stopped(parts: list) -> None:
    """A thread for the life of each part, to their end; Ctrl-C lets each say goodbye."""
    threads = [threading.Thread(target=part.live, daemon=True) for part in parts]
    with until_stopped():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)    # on Windows a wait without end hears no Ctrl-C
        finally:
            for part in parts:
                part.stopping.set()
            for thread in threads:
                thread.join(1)


# --- A TCP server that bad guests cannot hurt --------------------------------------------

def listening_address(host: str, port: int, tell: Story) -> tuple[int, tuple]:
    """The family and the address to listen on; IPv4 first. Says so if it is an open door."""
    family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
                              key=lambda info: info[0] != socket.AF_INET)
    if not KEY and not ipaddress.ip_address(address[0]).is_loopback:
        tell(f"WARNING: {host}:{port} is open to whoever can reach it: EV_KEY is not set")
    return family, address


@contextlib.contextmanager
def explain_taken(host: str, port: int):
    """Turns a port that cannot be had into exit status 2 and one line."""
    try:
        yield
    except OSError as fault:
        give_up(f"cannot listen on {host} port {port} ({fault.strerror}): end the program "
                f"that uses it (is this broker or cloud running already?), or give another "
                f"host or port in servers.json")


def has_room(connection: socket.socket) -> bool:
    """Are there descriptors left? A new one gets the lowest free number: a high one tells."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else sys.maxsize
    return connection.fileno() < limit - SPARE


class Door(socketserver.ThreadingTCPServer):
    """Serves `answer` to whoever connects, a thread a connection.

    Holds no state that its threads share but `answer`, which must bear being called by
    several of them at once.
    """
    daemon_threads = True
    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"    # Windows would let two servers share a port

    def __init__(self, host, port, handler, answer, tell):
        self.answer, self.tell = answer, tell
        with explain_taken(host, port):
            self.address_family, address = listening_address(host, port, tell)
            super().__init__(address[:2], handler)

    def verify_request(self, request, client_address):
        if room := has_room(request):
            return True
        self.tell(f"<- {client_address[0]} turned away: too many open connections")
        return room

    def process_request(self, request, client_address):
        try:
            super().process_request(request, client_address)
        except RuntimeError as fault:   # no more threads to be had
            self.tell(f"<- {client_address[0]} turned away: {fault}")
            self.shutdown_request(request)

    def handle_error(self, request, client_address):
        fault = sys.exc_info()[1]
        if not isinstance(fault, OSError):
            crash(fault)
        self.tell(f"<- {client_address[0]} went away: {fault}")


class Patience(io.RawIOBase):
    """A socket as a file that waits until `end`, however slowly the bytes drip in."""

    def __init__(self, connection: socket.socket):
        self.connection, self.end = connection, 0.0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.connection.settimeout(max(0.001, self.end - time.monotonic()))
        return self.connection.recv_into(buffer)


class Lines(socketserver.StreamRequestHandler):
    """A conversation: a line of JSON comes in, a line of JSON goes out."""
    disable_nagle_algorithm = True      # or every answer waits 40 ms for the peer's ACK

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Patience(self.connection))

    def handle(self):
        while line := self.read_line():
            answer = self.server.answer(line, self.is_gone)
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def read_line(self) -> bytes | None:
        self.rfile.raw.end = time.monotonic() + LINE_WAIT
        line = self.rfile.readline(LIMIT + 1)
        if len(line) > LIMIT and not line.endswith(b"\n"):
            self.server.tell(f"<- {self.client_address[0]} sends too long a line: closed")
        return line if line.endswith(b"\n") else None

    def is_gone(self) -> bool:
        """Has the peer hung up while we looked for its answer?"""
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(LINE_WAIT)


# --- The other end: asking one question --------------------------------------------------

def call(host: str, port: int, request: dict, seconds: float) -> dict | None:
    """The answer to one request over a connection of its own; None: none came in time."""
    end = time.monotonic() + seconds
    try:
        with socket.create_connection((host, port), seconds) as connection:
            request = request | ({"key": KEY} if KEY else {})
            connection.sendall(json.dumps(request).encode() + b"\n")
            patient = Patience(connection)
            patient.end = end
            return read_object(io.BufferedReader(patient).readline())
    except (OSError, ValueError):
        return None


# --- The cloud ---------------------------------------------------------------------------

def check_request(city: City, request: dict) -> None:
    """Raises ValueError saying what is wrong with a request for a spot."""
    need(is_id(request.get("id")), '"id" must be 1 to 64 printable characters')
    need(is_name(request.get("car")), '"car" must be a name')
    at = request.get("at")
    need(isinstance(at, str) and at in city.places, '"at" must be a place on the map')
    need(is_number(request.get("range"), 0, 1e9), '"range" must be a number of km')


def is_id(text, length: int = 64) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= length and text.isprintable()


def refusal(request_id, reason: str, asked=()) -> dict:
    """A reply that promises nothing; only "full" is worth asking again from the same place."""
    return {"id": request_id, "station": None, "reason": reason,
            "retry": RETRY if reason == "full" else None, "asked": list(asked)}


def is_reply(city: City, reply, request_id: str) -> bool:
    """Is it a refusal or an offer for that request, with all that the contract promises?"""
    if not isinstance(reply, dict) or reply.get("id") != request_id or "station" not in reply:
        return False
    if reply["station"] is None:
        return (isinstance(reply.get("reason"), str)
                and (reply.get("retry") is None or is_number(reply["retry"], 0, 3600)))
    route = reply.get("route")
    return (reply["station"] in city.stations(reply.get("broker"))
            and isinstance(route, list) and route[-1:] == [reply["station"]]
            and all(isinstance(name, str) and name in city.places for name in route)
            and all(is_number(reply.get(key), 0, 1e9) for key in ("km", "hold", "lease")))


def search(city: City, request: dict, tell: Story, seconds: float = WALK) -> dict:
    """Walk the ring for a car, from the broker after its own: an offer or a refusal.

    Here every broker that has no answer is skipped, but stands in `asked`.
    """
    question = {key: request[key] for key in ("id", "car", "at", "range")}
    def ask(broker, patience):
        tell(f"-> {broker.name:<8} {request['id']} has it a spot for {request['car']}?")
        answer = call(broker.host, broker.tcp, {"op": "reserve"} | question, patience)
        if not is_reply(city, answer, request["id"]):
            answer = None
        tell(f"<- {broker.name:<8} {request['id']} {outcome(answer)}")
        return answer
    answer, asked = walk(city.ring.find(request["broker"]), ask, seconds)
    return (answer or refusal(request["id"], "full")) | {"asked": asked}


def outcome(reply: dict | None) -> str:
    """A reply in the words of the log."""
    if reply is None:
        return "no answer: skipped"
    return f"yes, at {reply['station']}" if reply["station"] else reply["reason"]


def statuses(city: City) -> dict:
    """What every broker says of itself, all asked at once; None for one that is silent."""
    def ask(broker):
        return call(broker.host, broker.tcp, {"op": "status"}, ASK)
    brokers = list(city.ring)
    with concurrent.futures.ThreadPoolExecutor(len(brokers)) as pool:
        return {"brokers": dict(zip((b.name for b in brokers), pool.map(ask, brokers)))}


def read_request(line: bytes) -> dict:
    """A line of somebody who knows the key. Raises ValueError for any other."""
    request = read_object(line)
    need(is_key(request.get("key")), "key")
    return request


def answer(city: City, tell: Story, line: bytes, is_gone) -> dict:
    """The cloud's answer to one line."""
    try:
        request = read_request(line)
        if request.get("op") == "city":
            return statuses(city)
        need(request.get("op") == "search", 'wanted: {"op": "search", ...} or {"op": "city"}')
        need(is_name(request.get("broker")) and city.ring.find(request["broker"]),
             '"broker" must be the name of a broker')
        check_request(city, request)
    except ValueError as fault:
        tell(f"<- a question that makes no sense: {fault}")
        return {"error": str(fault)}
    tell(f"<- {request['broker']:<8} {request['id']} asks for a spot near {request['at']}")
    reply = search(city, request, tell)
    tell(f"-> {request['broker']:<8} {request['id']} {outcome(reply)}")
    return reply


# --- The demo ----------------------------------------------------------------------------

class Demo:
    """Real parts on free ports of this machine, and what they print."""

    def __init__(self, city: City, folder: str):
        self.config = Path(folder, "servers.json")
        self.config.write_text(json.dumps(small_city(city)))
        self.parts = []
        self.lines = queue.SimpleQueue()    # what they print; None: Ctrl-C
        self.end = time.monotonic() + DEMO
        for stop in signal.SIGINT, signal.SIGTERM:  # a mark, not an exception: no part is
            signal.signal(stop, lambda *_: self.lines.put(None))    # started and forgotten

    def start(self, script: str, *options: str) -> None:
        part = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), *options, "--config",
             self.config], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.parts.append(part)
        threading.Thread(target=self.listen, args=[part.stdout], daemon=True).start()

    def listen(self, output) -> None:
        for line in output:
            self.lines.put(line.rstrip())

    def until(self, *patterns: str) -> None:
        """Show what is printed until each pattern was there; TimeoutError if it never is."""
        missing = set(patterns)
        while missing:
            try:
                line = self.lines.get(timeout=max(0.0, self.end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"never seen: {missing}") from None
            if line is None:
                raise KeyboardInterrupt
            logging.info("%s", line)
            missing -= {pattern for pattern in missing if re.search(pattern, line)}

    def stop(self) -> None:
        for part in self.parts:
            part.terminate()
        for part in self.parts:
            try:
                part.wait(3)
            except subprocess.TimeoutExpired:
                part.kill()
                part.wait()


def small_city(city: City) -> dict:
    """The same map with one station of one spot a broker, all on this machine."""
    ports = free_ports(1 + 3 * len(list(city.ring)))
    only = {city.stations(broker.name)[0] for broker in city.ring}
    return {"cloud": {"host": "localhost", "port": ports.pop()}, "roads": city.roads,
            "brokers": [{"name": broker.name, "host": "localhost", "mqtt": ports.pop(),
                         "http": ports.pop(), "tcp": ports.pop()} for broker in city.ring],
            "places": {name: {"at": place["at"], "broker": place["broker"]}
                       | ({"spots": 1} if name in only else {})
                       for name, place in city.places.items()}}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that systems give to outgoing connections."""
    found = set()
    while len(found) < count:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def tell_story(demo: Demo) -> None:
    def car(name, at, battery):
        demo.start("car.py", name, "--at", at, "--battery", battery, "--speed", "4",
                   "--charges", "1")
    logging.info("=== A cloud, three brokers in a ring, and a station of one spot for each")
    for script in "cloud_server.py", "broker.py", "station.py":
        demo.start(script)
    demo.until("P1 .* serves", "P3 .* serves", "P5 .* serves")
    logging.info("=== Case 1: car1 asks server1, which has a free spot")
    car("car1", "A", "5")
    demo.until("car1 .* charging at P1")
    logging.info("=== Case 2: server1 is full, and car2 fills server2; car3 asks server1")
    car("car2", "C", "5")
    demo.until("car2 .* charging at P3")
    car("car3", "A", "24")
    demo.until("server1 .* -> cloud .* car3-", "car3 .* charging at P5")
    logging.info("=== Case 3: no spot anywhere: car4 is told to wait, until car1 leaves")
    car("car4", "A", "5")
    demo.until("car4 .* waits")
    demo.until("car1 .* leaves P1")
    demo.until("car4 .* charging at P1")
    logging.info("=== All three cases happened.")


def run_demo(city: City) -> int:
    """Tell the three cases. Returns the exit status: 1 if one of them did not happen."""
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(city, folder)
        try:
            tell_story(demo)
        except TimeoutError as fault:
            logging.info("=== FAILED: %s", fault)
            return 1
        except KeyboardInterrupt:
            logging.info("=== Interrupted.")
        finally:
            demo.stop()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description="The cloud of the charging city.")
    parser.add_argument("--demo", action="store_true", help="the whole city, as a story")
    args, city = start_up(parser)
    if args.demo:
        sys.exit(run_demo(city))
    tell = Story("cloud")
    door = Door(*city.cloud, Lines, functools.partial(answer, city, tell), tell)
    tell(f"listens on {city.cloud[0]}:{city.cloud[1]} for {len(list(city.ring))} brokers")
    with until_stopped():
        door.serve_forever()


if __name__ == "__main__":
    main()
