"""The cloud: a TCP hub that finds a spot in the next broker's region, or the one after.

        broker --search--> CLOUD --reserve--> the next broker      full
                           CLOUD --reserve--> and the one after    an offer
        broker <--an offer, or a refusal-- CLOUD

One JSON object a line, one thread a connection, and no state whatever: kill it, start
it again, and nothing was lost. While it is away the brokers walk the ring by themselves
with this file's `search`. What all scripts share stands here too: how a part starts,
ends and tells its story, a TCP server that bad guests cannot hurt, and `call`, the
other end of it.

    python3 cloud_server.py            serve at the address in servers.json
    python3 cloud_server.py --demo     the whole city in one terminal, told as a story

Read next: broker.py. Left out on purpose: remembering who is full; it could be wrong.
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

from ring import (ASK, SERVERS, WALK, City, is_name, is_number, load, need, read_object,
                  walk)

try:
    import resource
except ImportError:     # Windows does not count file descriptors
    resource = None

LIMIT = 64 * 1024   # bytes of a line, an HTTP body, an MQTT packet
LINE_WAIT = 60      # s for a whole line to come in
BACKLOG = 1024      # connections that may wait for accept(): a rush comes all at once
THREADS = 2000      # at a time, of one process
ANSWER = 16 * 1024 * 1024   # bytes of an answer: a city may have many cars
SPARE = 32          # file descriptors kept for what is not a guest
RETRY = 5           # s after which a refused car asks again
REPLY = ("id", "station", "broker", "route", "km", "hold", "lease", "asked", "reason",
         "retry")
DEMO = 38           # s the demo may take; it needs about 15
KEY = os.environ.get("EV_KEY", "")  # set on every part, it closes every door


def is_key(key) -> bool:
    """Is it the key? Compared in constant time: how long it takes tells nothing."""
    return not KEY or isinstance(key, str) and hmac.compare_digest(
        key.encode(errors="replace"), KEY.encode(errors="replace"))


def mqtt_password(client_id: str) -> str:
    """Proof of the key for one MQTT client, worth nothing under another id."""
    key = KEY.encode(errors="replace")
    return hmac.new(key, client_id.encode(), "sha256").hexdigest()


# --- How a part starts, ends and tells its story --------------------------------------

class Story:
    """What one part tells, a line an event: time, who, what, why. Keeps the last 50."""

    def __init__(self, who: str):
        self.who, self.events = who, collections.deque(maxlen=50)

    def __call__(self, text: str) -> None:
        text = text[:400]
        if not text.isprintable():      # a client id from the network may hold anything
            text = text.encode("unicode_escape").decode()
        line = f"{time.strftime('%H:%M:%S')}  {self.who:<8}  {text}"
        self.events.append(line)
        logging.info("%s", line)


def start_up(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, City]:
    """What every script begins with: options, log, signals, servers.json."""
    parser.add_argument("--config", metavar="FILE", default=SERVERS,
                        help="the city (default: servers.json beside the scripts)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")   # a terminal may lack a letter
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    for stop in signal.SIGINT, signal.SIGTERM:
        signal.signal(stop, signal.default_int_handler)
    threading.excepthook = lambda fault: crash(fault.exc_value)
    if resource:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for limit in 10_000, most:      # macOS says that it allows more than it does
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    try:
        return args, load(args.config)
    except ValueError as fault:
        give_up(fault)


def positive(text: str) -> float:
    """A number of the command line that must be more than nothing."""
    need(is_number(float(text), 1e-3, 1e6), "")
    return float(text)


def give_up(fault) -> None:
    """The user must change something first: say what, in one line; exit status 2."""
    print(fault, file=sys.stderr)
    sys.exit(2)


def crash(fault: BaseException) -> None:
    """A fault of ours, in whatever thread, ends the process: never a half-dead part."""
    traceback.print_exception(fault)
    sys.stdout.flush()
    os._exit(1)


@contextlib.contextmanager
def until_stopped():
    """Runs its block to the end, or until Ctrl-C or SIGTERM; exit status 0."""
    with contextlib.suppress(KeyboardInterrupt):
        yield
    sys.stdout.flush()
    os._exit(0)     # at once: no thread that waits for a silent peer may keep us


def run_until_stopped(parts: list) -> None:
    """A thread for the life of each part, to its end; Ctrl-C lets each say goodbye."""
    threads = [threading.Thread(target=part.live, daemon=True) for part in parts]
    with until_stopped():
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.1)     # Ctrl-C in a join() makes Python think it is over
        finally:
            for part in parts:
                part.stopping.set()
            end = time.monotonic() + 1
            for thread in threads:
                if thread.ident:        # it was started
                    thread.join(max(0.0, end - time.monotonic()))


def to_json(answer) -> bytes:
    """What we answer, as JSON; parts of it are what others have told us."""
    try:
        return json.dumps(answer).encode()
    except RecursionError:
        return b'{"error": "nested too deep"}'


# --- A TCP server that bad guests cannot hurt -----------------------------------------

def resolve(host: str, port: int) -> tuple[int, tuple[str, int]]:
    """The family and the one address that servers and clients use: IPv4 if there is."""
    family, *_, address = min(
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        key=lambda info: info[0] != socket.AF_INET)
    return family, address[:2]


@contextlib.contextmanager
def listening(host: str, port: int, tell: Story):
    """For the block that opens a port: its family and address, IPv4 if there is one.

    Warns of an open door; a port that cannot be had is exit status 2 and one line.
    """
    try:
        family, address = resolve(host, port)
        if not KEY and not ipaddress.ip_address(address[0]).is_loopback:
            tell(f"WARNING: {host} port {port} is open to all: EV_KEY is not set")
        yield family, address
    except OSError as fault:
        give_up(f"cannot listen on {host} port {port}: {fault.strerror}. End what "
                "uses it (is this part running already?), or edit servers.json")


def has_room(connection: socket.socket) -> bool:
    """Are there descriptors left? A new one gets the lowest free number: that tells."""
    return not resource or connection.fileno() < resource.getrlimit(
        resource.RLIMIT_NOFILE)[0] - SPARE


class Door(socketserver.ThreadingTCPServer):
    """Serves `answer` to whoever connects, a thread a connection, with `handler`.

    Its threads share nothing but `answer`, which must bear being called by several.
    """
    daemon_threads = True
    request_queue_size = BACKLOG
    allow_reuse_address = os.name == "posix"    # on Windows two could share a port

    def __init__(self, host: str, port: int, handler, answer, tell: Story):
        self.answer, self.tell = answer, tell
        with listening(host, port, tell) as (self.address_family, address):
            super().__init__(address, handler)

    def verify_request(self, request, client_address):
        """Turn the newcomer away rather than fail those who are being served."""
        if room := has_room(request) and threading.active_count() < THREADS:
            return True
        self.tell(f"<- {client_address[0]} turned away: too many connections")
        return room

    def process_request(self, request, client_address):
        try:
            super().process_request(request, client_address)
        except RuntimeError as fault:   # there are no more threads to be had
            self.tell(f"<- {client_address[0]} turned away: {fault}")
            self.shutdown_request(request)

    def handle_error(self, request, client_address):
        """A connection that breaks is the guest's affair; anything else is ours."""
        fault = sys.exc_info()[1]
        if not isinstance(fault, OSError):
            crash(fault)
        self.tell(f"<- {client_address[0]} went away: {fault}")


class Patience(io.RawIOBase):
    """A socket as a file that waits until `end`, however slowly the bytes drip in."""

    def __init__(self, connection: socket.socket, end: float = 0.0):
        self.connection, self.end = connection, end

    def readable(self):
        return True

    def readinto(self, buffer):
        self.connection.settimeout(max(0.001, self.end - time.monotonic()))
        return self.connection.recv_into(buffer)


class Lines(socketserver.StreamRequestHandler):
    """A conversation: a line of JSON comes in, a line of JSON goes out."""
    disable_nagle_algorithm = True      # or an answer may wait 40 ms for the peer's ACK

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Patience(self.connection))

    def handle(self):
        while line := self.read_line():
            answer = self.server.answer(line, self.is_gone)
            self.wfile.write(to_json(answer) + b"\n")

    def read_line(self) -> bytes | None:
        """The next line, or None: it was too long, too slow, or there is none."""
        self.rfile.raw.end = time.monotonic() + LINE_WAIT
        line = self.rfile.readline(LIMIT + 1)
        if len(line) > LIMIT and not line.endswith(b"\n"):
            self.server.tell(f"<- {self.client_address[0]} sends too long a line")
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


# --- The other end: asking one question -----------------------------------------------

def call(host: str, port: int, request: dict, seconds: float) -> dict | None:
    """The answer to one request, over a connection of its own; None: none in time."""
    end = time.monotonic() + seconds
    request = request | ({"key": KEY} if KEY else {})
    try:
        with socket.create_connection(resolve(host, port)[1], seconds) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            lines = io.BufferedReader(Patience(connection, end))
            return read_object(lines.readline(ANSWER))
    except (OSError, ValueError):
        return None


# --- Requests and replies -------------------------------------------------------------

def read_request(line: bytes) -> dict:
    """A line of somebody who knows the key. Raises ValueError for any other."""
    request = read_object(line)
    need(is_key(request.get("key")), "key")
    return request


def is_id(text, length: int = 64) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= length and text.isprintable()


def check_request(city: City, request: dict) -> None:
    """Raises ValueError saying what is wrong with a request for a spot."""
    at = request.get("at")
    need(is_id(request.get("id")), '"id" must be 1 to 64 printable characters')
    need(is_name(request.get("car")), '"car" must be a name')
    need(isinstance(at, str) and at in city.places, '"at" must be a place on the map')
    need(is_number(request.get("range"), 0, 1e9), '"range" must be a number of km')


def refusal(request_id: str | None, reason: str, asked=()) -> dict:
    """A reply that promises nothing. Asking again only helps where all was full."""
    return {"id": request_id, "station": None, "reason": reason,
            "retry": RETRY if reason == "full" else None, "asked": list(asked)}


def is_reply(city: City, reply: dict | None, request_id: str) -> bool:
    """Is it an offer or a refusal for that request, with all that belongs to one?"""
    reply = reply or {}
    station, broker, route = map(reply.get, ("station", "broker", "route"))
    retry, asked = reply.get("retry"), reply.get("asked")
    if (reply.get("id") != request_id or not isinstance(asked, list)
            or not all(map(is_name, asked))):
        return False
    if "station" in reply and station is None:
        return (isinstance(reply.get("reason"), str)
                and (retry is None or is_number(retry, 0, 3600)))
    return (is_name(station) and is_name(broker) and station in city.stations(broker)
            and isinstance(route, list) and route[-1:] == [station]
            and all(is_name(place) and place in city.places for place in route)
            and is_number(reply.get("km"), 0, 1e9)
            and all(is_number(reply.get(key), 1e-3, 1e9) for key in ("hold", "lease")))


def read_reply(city: City, reply: dict | None, request_id: str) -> dict | None:
    """What belongs to a reply, and nothing else that came with it; None: it is none."""
    if not is_reply(city, reply, request_id):
        return None
    return {key: reply[key] for key in reply if key in REPLY}


def outcome(reply: dict | None) -> str:
    """A reply in the words of the log."""
    if reply is None:
        return "no answer: skipped"
    return f"yes, at {reply['station']}" if reply["station"] else reply["reason"]


# --- The cloud ------------------------------------------------------------------------

def search(city: City, request: dict, tell: Story, seconds: float = WALK,
           is_gone=lambda: False) -> dict:
    """Walk the ring for a car, from the broker after its own: an offer or a refusal.

    A broker that has no good answer in time is skipped, but stands in `asked`. Nobody
    is asked any more once the asker `is_gone`: nobody would take the spot.
    """
    question = {key: request[key] for key in ("id", "car", "at", "range")}

    def ask(broker, patience):
        if is_gone():
            return None
        tell(f"-> {broker.name:<8} {request['id']} a spot for {request['car']}?")
        reply = call(broker.host, broker.tcp, question | {"op": "reserve"}, patience)
        reply = read_reply(city, reply, request["id"])
        tell(f"<- {broker.name:<8} {request['id']} {outcome(reply)}")
        return reply

    reply, asked = walk(city.ring.find(request["broker"]), ask, seconds)
    return (reply or refusal(request["id"], "full")) | {"asked": asked}


def statuses(city: City) -> dict:
    """What every broker says of itself, all asked at once; None for a silent one."""
    def ask(broker):
        status = call(broker.host, broker.tcp, {"op": "status"}, ASK) or {}
        return status if status.get("broker") == broker.name else None
    brokers = list(city.ring)
    with concurrent.futures.ThreadPoolExecutor(len(brokers)) as pool:
        found = pool.map(ask, brokers)
        return {"brokers": {b.name: status for b, status in zip(brokers, found)}}


def answer(city: City, tell: Story, line: bytes, is_gone) -> dict:
    """The cloud's answer to one line."""
    try:
        request = read_request(line)
        if request.get("op") == "city":
            return statuses(city)
        need(request.get("op") == "search", 'wanted: "op": "search" or "city"')
        need(is_name(request.get("broker")) and city.ring.find(request["broker"]),
             '"broker" must be the name of a broker')
        check_request(city, request)
    except ValueError as fault:
        tell(f"<- a question that makes no sense: {fault!s:.99}")
        return {"error": str(fault)}
    tell(f"<- {request['broker']:<8} {request['id']} wants a spot near {request['at']}")
    reply = search(city, request, tell, is_gone=is_gone)
    tell(f"-> {request['broker']:<8} {request['id']} {outcome(reply)}")
    return reply


# --- The demo -------------------------------------------------------------------------

class Demo:
    """Real parts on free ports of this machine, and what they print."""

    def __init__(self, config: dict, folder: str):
        self.config = Path(folder, "servers.json")
        self.config.write_text(json.dumps(config))
        self.parts, self.end = [], time.monotonic() + DEMO
        self.lines = queue.SimpleQueue()    # what they print; None: Ctrl-C
        for stop in signal.SIGINT, signal.SIGTERM:  # a mark, no exception: so no part
            signal.signal(stop, lambda *_: self.lines.put(None))    # is lost unknown

    def start(self, script: str, *options: str) -> None:
        """A part as a process of its own, as its user would start it."""
        part = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), *options, "--config",
             self.config], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.parts.append(part)
        threading.Thread(target=self.listen, args=[part.stdout], daemon=True).start()

    def start_car(self, name: str, at: str, battery: str) -> None:
        self.start("car.py", name, "--at", at, "--battery", battery, "--speed", "4",
                   "--charges", "1")

    def listen(self, output) -> None:
        for line in output:
            self.lines.put(line.rstrip())

    def until(self, *patterns: str) -> None:
        """Show what is printed until each pattern was there. Raises TimeoutError."""
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
        """End every part, by its process id: first asked to, then not."""
        for part in self.parts:
            part.terminate()
        for part in self.parts:
            try:
                part.wait(3)
            except subprocess.TimeoutExpired:
                part.kill()
                part.wait()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that outgoing connections are given."""
    found = set()
    while len(found) < count:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def small_city(city: City) -> dict:
    """The same map on this machine, one spot for each of its first three brokers."""
    ports = iter(free_ports(1 + 3 * len(list(city.ring))))
    brokers = [{"name": broker.name, "host": "localhost", "mqtt": next(ports),
                "http": next(ports), "tcp": next(ports)} for broker in city.ring]
    only = [city.stations(broker["name"])[:1] for broker in brokers[:3]]
    if len(only) < 3 or [] in only:
        give_up("the demo needs three brokers with a station each in servers.json")
    shrink = min(1, 11 / max(abs(x) for place in city.places.values()
                             for x in place["at"] + [1]))   # to within a car's range
    places = {name: {"at": [x * shrink for x in place["at"]], "broker": place["broker"]}
              | ({"spots": 1} if [name] in only else {})
              for name, place in city.places.items()}
    return {"cloud": {"host": "localhost", "port": next(ports)}, "brokers": brokers,
            "places": places, "roads": city.roads}


def tell_story(demo: Demo, city: City) -> None:
    """The three cases. Raises TimeoutError if one of them does not happen."""
    near, full, free = [broker.name for broker in city.ring][:3]
    spot, taken, last = (city.stations(broker)[0] for broker in (near, full, free))
    home, other = (next(name for name, place in city.places.items()
                        if place["broker"] == broker) for broker in (near, full))
    logging.info("=== A cloud, a ring of brokers, and three stations of one spot each")
    for script in "cloud_server.py", "broker.py", "station.py":
        demo.start(script)
    demo.until(*(f"<- {station} .* is online" for station in (spot, taken, last)))
    logging.info("=== Case 1: car1 asks %s, which has a free spot", near)
    demo.start_car("car1", home, "5")
    demo.until(f"car1 .* charging at {spot}")
    logging.info("=== Case 2: %s is full, and soon %s; car3 asks there", near, full)
    demo.start_car("car2", other, "5")
    demo.until(f"car2 .* charging at {taken}")
    demo.start_car("car3", home, "24")
    demo.until(f"{near} .* -> cloud .* car3-", f"car3 .* charging at {last}")
    logging.info("=== Case 3: no spot is free anywhere: car4 waits until car1 leaves")
    demo.start_car("car4", home, "5")
    demo.until("car4 .* waits")
    demo.until(f"car1 .* leaves {spot}")
    demo.until(f"car4 .* charging at {spot}")
    logging.info("=== All three cases happened.")


def run_demo(city: City) -> int:
    """Returns the exit status: 1 if one of the three cases did not happen."""
    config = small_city(city)
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(config, folder)
        try:
            tell_story(demo, city)
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
    parser.add_argument("--demo", action="store_true", help="the city, as a story")
    args, city = start_up(parser)
    if args.demo:
        sys.exit(run_demo(city))
    tell = Story("cloud")
    door = Door(*city.cloud, Lines, functools.partial(answer, city, tell), tell)
    tell(f"listens on {city.cloud[0]} port {city.cloud[1]} for the ring of "
         + ", ".join(broker.name for broker in city.ring))
    with until_stopped():
        door.serve_forever()


if __name__ == "__main__":
    main()
