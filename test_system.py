"""The tests: short stories about the city, from its smallest part to all of it.

    python3 test_system.py                    all of it, simplest first
    python3 -m unittest test_system.Drills    a chapter of it; with -v story by story
    STORM=60 SEED=7 python3 test_system.py    the storm for a minute, with these numbers
    python3 test_system.py --demo             the whole city in one terminal, as a story
    python3 test_system.py --rush 1000        rush hour in the city that runs

Chapters: one function at a time; one part at a time, in a city without processes, whose
time only the test moves; the MQTT server, packet by packet; one conversation at each
door; what happens when anything dies, in a city of real processes on free ports.

Nothing sleeps: a test waits until something is so, and fails when its deadline is over.
Where the city promises a number of seconds the tests allow SLACK more, for a busy
machine.

Many stories are texts. A line tells who does what: verbs, which are methods of that
chapter or of whom they tell, and their words. `ann claims P1 held` is
self.claims("ann", "P1", "held"); `P1 dies; comes_back` is self.cast["P1"].dies(), and
then .comes_back().

Read next: the story that interests you. Left out on purpose: how fast things are.
"""

import argparse
import asyncio
import atexit
import base64
import collections
import concurrent.futures
import copy
import functools
import heapq
import itertools
import json
import logging
import math
import os
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

EV_KEY = os.environ.pop("EV_KEY", "")       # the city of these tests has open doors

import broker
import car
import cloud_server
import ring
import station

HERE = Path(__file__).resolve().parent
DEADLINE = 20   # s; only failures wait that long
SLACK = 1.5     # s that a busy machine may take longer than promised
STORM = float(os.environ.get("STORM", 3))       # s of the storm
SEED = int(os.environ.get("SEED", time.time_ns() % 1_000_000))
SIGNALS = hasattr(signal, "SIGSTOP")            # and SIGKILL, SIGCONT, process groups
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH')}:/usr/sbin")


def setUpModule():
    logging.getLogger("asyncio").setLevel(logging.ERROR)    # it warns of long stories
    print(f"random numbers of this run: SEED={SEED}", file=sys.stderr)


def load_tests(loader, tests, pattern):
    """In the order of this file, where unittest would take the alphabet's."""
    found = [case for case in globals().values()
             if isinstance(case, type) and issubclass(case, unittest.TestCase)]
    return unittest.TestSuite(map(loader.loadTestsFromTestCase, found))


def wait_until(condition, what, seconds=DEADLINE):
    """Look again and again until the condition holds; returns what it then says."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ConnectionError):     # whom it asks is not up yet
            found = condition()
            if found:
                return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not happen within {seconds} s")


def rows(table):
    """The rows of a table of cases: lists of cells."""
    return [[cell.strip() for cell in line.split("|")]
            for line in table.strip().splitlines()]


class Clock:
    """Lets one thread run at a time, the one whose time has come. So minutes are over
    at once, and all goes the same way each time."""

    def __init__(self):
        self.now = 1000.0
        self.turns = []         # a heap: (when, a counter, an Event: it may go on)
        self.count = itertools.count()

    def enter(self, seconds):
        turn = threading.Event()
        heapq.heappush(self.turns, (self.now + seconds, next(self.count), turn))
        return turn

    def leave(self):
        self.now, _, turn = heapq.heappop(self.turns)
        turn.set()

    def wait(self, seconds):
        turn = self.enter(seconds)
        self.leave()
        turn.wait()

    def run(self, life):
        def body():
            turn.wait()
            try:
                life()
            finally:
                self.leave()
        turn = self.enter(0)
        threading.Thread(target=body, daemon=True).start()


class Story(unittest.TestCase):
    """Tests whose stories are texts. If SPOTS names stations, all of them play in one
    city of real processes. `cast` has those who have verbs of their own."""
    SPOTS = {}
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        if cls.SPOTS:
            cls.city = cls.cast = City(**cls.SPOTS)
            cls.addClassCleanup(cls.city.end)
            cls.city.begin()

    def runs(self, city, **how):
        """A city for this story alone."""
        self.city = self.cast = City(**how)
        self.addCleanup(self.city.end)
        self.city.begin()

    def raw(self, to="server1", door="mqtt", *packets):
        """A connection for this story alone, to a door of the city."""
        client = self.city.raw(to, door, *packets)
        self.addCleanup(client.close)
        return client

    def patch(self, *where):
        patch = mock.patch.object(*where)
        patch.start()
        self.addCleanup(patch.stop)

    def has_clock(self, *modules):
        """These modules now have a clock that only this test moves."""
        self.clock = Clock()
        for module in modules:
            self.patch(module, "monotonic", lambda: self.clock.now)

    def plays(self, story):
        """Each line: who, then steps with ; between them. A step: a verb, its words."""
        for line in story.strip().splitlines():
            line, _, _ = line.partition(" # ")
            who, _, steps = line.strip().partition(" ")
            for step in steps.split(";"):
                try:
                    self.act(who, *step.split())
                except (AssertionError, ConnectionError) as fault:
                    raise AssertionError(f"{step!r} of {line!r}: {fault}") from None

    def act(self, who, verb, *words):
        named = dict(word.split("=") for word in words if "=" in word)
        for key, value in named.items():
            named[key] = int(value) if value.isdecimal() else value
        plain = [self.means(word) for word in words if "=" not in word]
        if hasattr(self, verb):
            getattr(self, verb)(who, *plain, **named)
        else:
            getattr(self.cast[who], verb)(*plain, **named)

    def means(self, word):
        return word


# --- A city of real processes ---------------------------------------------------------

class Part:
    """A process, and the lines that it has told so far; `show` is told each of them."""

    def __init__(self, *command, show=None, **popen):
        self.command = [*map(str, command)]
        self.show = show
        self.popen = popen
        self.lines = []
        self.comes_back()
        atexit.register(self.erase)     # whatever happens to the tests

    def comes_back(self):
        """Start it, or start it again."""
        self.read = len(self.lines)     # what it said before counts no more
        self.gone = False               # True: it has ended, and was meant to
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", **self.popen)
        self.listener = threading.Thread(target=self.listen, daemon=True,
                                         args=[self.process.stdout])
        self.listener.start()
        return self

    def listen(self, output):
        with output:
            for line in output:
                self.lines.append(line.rstrip())
                if self.show:
                    self.show(line.rstrip())

    def says(self, *patterns):
        """Wait until it has said these, one after the other, after what came before."""
        for pattern in patterns:
            wait_until(lambda: self.has_said(pattern), (pattern, self))
        return self

    def has_said(self, pattern):
        over = not self.listener.is_alive()
        while self.read < len(self.lines):
            self.read += 1
            if re.search(pattern, self.lines[self.read - 1]):
                return True
        assert not over, f"it ended without {pattern}: {self}"

    def __repr__(self):
        return "\n".join(self.lines[-40:])

    def ends(self, status, seconds=DEADLINE):
        self.gone = True
        found = self.process.wait(seconds)
        assert found == status, f"ended with {found}: {self}"
        self.listener.join()
        return self

    def dies(self):
        """As a power cut would: no goodbye, no clean-up."""
        self.process.kill()
        return self.ends(-signal.SIGKILL)

    def freezes(self):
        """It hangs: its connections stay open, and nobody answers."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)      # until it does stand still

    def thaws(self):
        self.process.send_signal(signal.SIGCONT)

    def check(self):
        """It is alive if it should be, and no bug has shown."""
        assert self.gone or self.process.poll() is None, f"has ended: {self}"
        assert "Traceback" not in str(self.lines), "\n".join(self.lines)

    def stop(self):
        """The way a user stops it: it ends at once, with exit status 0."""
        self.check()
        if SIGNALS and not self.gone:
            self.thaws()                # its story may have ended early
            self.process.send_signal(random.choice([signal.SIGTERM, signal.SIGINT]))
            self.ends(0, 2 + SLACK).check()

    def erase(self):
        self.process.terminate()        # the demo ends its own parts
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.process.kill()
        self.process.wait()
        self.listener.join()


def free_ports(count):
    """Ports nobody listens on, below those that outgoing connections are given."""
    found = set()
    while len(found) < count:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


#   P2            P4            P6          from A to P1 1 km, P2 2 km, P3 6 km,
#   |             |             |           P4 8 km, P5 11 km, P6 14 km
#   A--P1 . . . . C--P3 . . . . E--P5       (the dotted roads join A, C and E)
PLACES = {"server1": {"A": [0, 0], "P1": [1, 0], "P2": [0, 2]},
          "server2": {"C": [5, 0], "P3": [6, 0], "P4": [5, 3]},
          "server3": {"E": [10, 0], "P5": [11, 0], "P6": [10, 4]}}
ROADS = [road.split("-") for road in "A-P1 A-P2 A-C C-P3 C-P4 C-E E-P5 E-P6".split()]


def describe(ports=range(5000, 5010), **spots):
    """A servers.json with these stations (P1=2: two spots), and their brokers."""
    [cloud, *ports] = ports
    brokers = []
    found = {}
    for name, places in PLACES.items():
        if places.keys() & spots:
            [mqtt, http, tcp, *ports] = ports
            brokers.append({"name": name, "host": "127.0.0.1", "mqtt": mqtt,
                            "http": http, "tcp": tcp})
            for place, at in places.items():
                found[place] = {"at": at, "broker": name}
    for place, count in spots.items():
        found[place]["spots"] = count
    roads = [road for road in ROADS if found.keys() >= {*road}]
    return {"cloud": {"host": "127.0.0.1", "port": cloud}, "brokers": brokers,
            "places": found, "roads": roads}


class City:
    """A cloud, brokers and stations that run, each in a process of its own.

    city["P1"], city["server1"], city["cloud"] are the parts, to be killed and frozen.
    """

    def __init__(self, lease=15, key="", mosquitto=False, show=None, **spots):
        self.lease = lease
        self.spots = spots
        self.key = key
        self.file = describe(free_ports(10), **spots)
        self.brokers = {entry["name"]: entry for entry in self.file["brokers"]}
        self.options = []
        if mosquitto:       # one for all brokers
            self.options = ["--external-mqtt"]
            for entry in self.file["brokers"]:
                entry["mqtt"] = self.brokers["server1"]["mqtt"]
        self.popen = {"env": os.environ | {"EV_KEY": key}, "show": show}
        self.folder = tempfile.TemporaryDirectory()
        self.config = Path(self.folder.name, "servers.json")
        self.config.write_text(json.dumps(self.file))
        self.parts = {}

    def begin(self):
        if self.options:
            mosquitto = MOSQUITTO, "-p", self.brokers["server1"]["mqtt"]
            self.parts["mosquitto"] = Part(*mosquitto).says("running")
        self.start("cloud_server.py", "cloud")
        for name in self.brokers:
            self.start("broker.py", name, name, *self.options)
        for name in self.brokers:
            self[name].says("serves")
        for name in self.spots:
            self.start("station.py", name, name, "--lease", self.lease)
        self.shows(*self.spots, online=True)

    def __getitem__(self, name):
        return self.parts[name]

    def start(self, script, name, *options):
        self.parts[name] = Part(sys.executable, HERE / script, *options,
                                "--config", self.config, **self.popen)
        return self[name]

    def car(self, name, *options, at="A", battery=20, speed=20):
        """A real car.py."""
        return self.start("car.py", name, name, "--at", at, "--battery", battery,
                          "--speed", speed, *options)

    def end(self):
        """Each part is well, and ends at once when it is told to."""
        try:
            for part in reversed(self.parts.values()):      # the cloud comes last
                part.stop()
        finally:
            self.erase()

    def erase(self):
        for part in self.parts.values():
            part.show = None        # how they miss each other now tells nothing
        for part in self.parts.values():
            part.erase()
        self.folder.cleanup()

    # --- what one can ask it

    def raw(self, to, door, *packets):
        """A connection to a broker's mqtt, http or tcp, or to the cloud's port."""
        where = self.file["cloud"] if to == "cloud" else self.brokers[to]
        return RawClient(where[door], *packets)

    def http(self, method, path, body=None, to="server1", **headers):
        """(status, headers, text)"""
        headers = {"Authorization": basic(f"me:{self.key}")} | headers
        if body:
            headers["Content-Type"] = "application/json"
        with closing(HTTPConnection("127.0.0.1", self.brokers[to]["http"])) as web:
            web.request(method, path, body, headers)
            answer = web.getresponse()
            return answer.status, answer.headers, answer.read().decode()

    def get(self, path, to="server1"):
        return json.loads(self.http("GET", path, to=to)[2])

    def shows(self, *stations, seconds=DEADLINE, **state):
        """Wait until they have this state: shows("P1", cars={"car1": "held"})."""
        for name in stations:
            to = self.file["places"][name]["broker"]
            wait_until(lambda: self.get(f"/stations/{name}", to).items()
                       >= state.items(), f"{name} with {state}", seconds)

    def asks(self, car, at="A", range=50, to="server1"):
        """The reply to a car's request, and what it `took`, in seconds: at most 9."""
        began = time.monotonic()
        request = json.dumps({"at": at, "range": range})
        _, _, reply = self.http("POST", f"/cars/{car}/request", request, to)
        took = time.monotonic() - began
        assert took < 9 + SLACK, reply
        return SimpleNamespace(took=took, **json.loads(reply))

    def rests(self):
        """Every car gives back what it has."""
        for to in self.brokers:
            for state in self.get("/stations", to).values():
                for car in state["cars"]:
                    self.http("DELETE", f"/cars/{car}/request", to=to)
        self.shows(*self.spots, cars={})


def basic(user_and_key):
    return f"Basic {base64.b64encode(user_and_key.encode()).decode()}"


# --- MQTT by hand: bytes, and one end of a connection ---------------------------------

(CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK,
 UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT) = range(1, 15)
HANDSHAKE = (), (PUBACK,), (PUBREC, PUBREL, PUBCOMP)    # after a PUBLISH of QoS 0, 1, 2


def encode(kind, flags, *fields):
    """Type, flags, length of the rest, 7 bits a byte; fields: text, number or bytes."""
    body = b""
    for field in fields:
        if isinstance(field, str):
            body += len(field.encode()).to_bytes(2, "big") + field.encode()
        else:
            body += field if isinstance(field, bytes) else field.to_bytes(2, "big")
    length = []
    rest = len(body)
    while rest > 127:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([kind * 16 + flags, *length, rest]) + body


def connect(id="", *fields, flags=2, keep=0):
    """flags: user 128, password 64, retain 32, QoS 16 and 8, will 4, clean session 2"""
    return encode(CONNECT, 0, "MQTT", bytes([4, flags]), keep, id, *fields)


def publish(topic, payload=b"x", qos=0, retain=0, dup=0, id=1):
    number = [id] if qos else []
    return encode(PUBLISH, dup * 8 + qos * 2 + retain, topic, *number, payload)


def ack(kind, id, *codes):
    """In CONNACK session present * 256 + return code stand in the place of the id."""
    return encode(kind, 2 if kind == PUBREL else 0, id, bytes(codes))


def subscribe(*filters, qos=0):
    wanted = [part for name in filters for part in (name, bytes([qos]))]
    return encode(SUBSCRIBE, 2, 9, *wanted)


PING, PONG, GOODBYE = encode(PINGREQ, 0), encode(PINGRESP, 0), encode(DISCONNECT, 0)
WELCOME = ack(CONNACK, 0)


class RawClient:
    """A connection, byte by byte. Most methods return it, so that its story chains.

    That nothing comes is shown by a fence: it would come before the PINGRESP.
    """

    def __init__(self, port, *first, host="127.0.0.1"):
        self.socket = socket.create_connection((host, port), DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")
        self.early = []     # messages that came while something else was awaited
        self.ids = []       # the packet ids of those that were heard
        self.send(*first)

    def close(self):
        self.stream.close()
        self.socket.close()

    def send(self, *packets):
        self.socket.sendall(b"".join(packets))
        return self

    def asks(self, request):
        """The answer to a line of JSON."""
        line = json.dumps(request) + "\n"
        return json.loads(self.send(line.encode()).stream.readline())

    def packet(self):
        """The next packet: type, flags, body."""
        first = self.stream.read(1)
        if not first:
            raise ConnectionError("the server has closed the connection")
        length = 0
        for place in range(4):
            [byte] = self.stream.read(1)
            length += byte % 128 * 128 ** place
            if byte < 128:
                break
        return *divmod(first[0], 16), self.stream.read(length)

    def expect(self, *packets):
        """These come, in this order; messages between them are put aside."""
        for expected in packets:
            got = self.packet()
            while encode(*got) != expected:
                assert got[0] == PUBLISH, f"{got} came, not {expected}"
                self.early.append(got)
                got = self.packet()
        return self

    def message(self):
        return self.early.pop(0) if self.early else self.packet()

    def reply(self):
        """The next message, of QoS 0: its JSON."""
        _, _, body = self.message()
        length = int.from_bytes(body[:2], "big")
        return json.loads(body[2 + length:])

    def hears(self, topic, payload=b"x", qos=0, retain=0, dup=0):
        """This is the next message; returns its packet id, whatever that is."""
        got = self.message()
        at = 2 + len(topic)
        id = int.from_bytes(got[-1][at:at + 2], "big")
        expected = publish(topic, payload, qos, retain, dup, id)
        assert encode(*got) == expected, f"heard {got}"[:300]
        self.ids.append(id)
        return id

    def takes(self, topic, payload=b"x", qos=0, retain=0):
        return self.settle(qos, self.hears(topic, payload, qos, retain))

    def sends(self, topic, payload=b"x", **flags):
        self.send(publish(topic, payload, **flags))

    def gives(self, kind, id=0):
        """An acknowledgement, of the last message that was heard if it has no id."""
        self.send(ack(kind, id or self.ids[-1]))

    def gets(self, kind, id=0):
        self.expect(ack(kind, id or self.ids[-1]))

    def settle(self, qos, *ids, sender=False):
        """Our part of the handshake for these messages, all of them at each step."""
        for step, kind in enumerate(HANDSHAKE[qos], start=sender):
            act = self.expect if step % 2 else self.send
            act(*[ack(kind, id) for id in ids])
        return self

    def publishes(self, topic, payload=b"x", qos=0, retain=0):
        self.send(publish(topic, payload, qos, retain)).settle(qos, 1, sender=True)
        return self.send(PING).expect(PONG)

    def subscribes(self, filter, qos=0):
        return self.send(subscribe(filter, qos=qos)).expect(ack(SUBACK, 9, qos))

    def unsubscribes(self, filter):
        self.send(encode(UNSUBSCRIBE, 2, 8, filter)).expect(ack(UNSUBACK, 8))

    def quiet(self):
        """The server lives, and had nothing more to say to us."""
        self.send(PING).expect(PONG)
        assert not self.early, f"unexpected: {self.early}"[:300]
        return self

    def closed(self, *last):
        """After this the server closes; returns what it said before."""
        with suppress(ConnectionError):     # it left bytes of ours unread
            return self.send(*last).stream.read()
        return b""

    def vanish(self, *last):
        """Our end closes, the server's follows: now it knows that we are gone."""
        self.send(*last).socket.shutdown(socket.SHUT_WR)
        self.stream.read()

    def leaves(self):
        self.vanish(GOODBYE)


# --- The demo, and rush hour ----------------------------------------------------------

CASES = [   # title; who starts then: name, place, battery; what these must say
    ("Case 1: car1 asks server1, which has a free spot", "car1 A 20",
     "P1 <- car1 .*charging"),
    ("Case 2: server1 is full, and soon server2, too: car2 takes its spot", "car2 C 20",
     "P3 <- car2 .*charging"),
    ("... so car3, which asks server1, is sent on to server3", "car3 A 24",
     "cloud -> server2 +car3-; P5 <- car3 .*charging"),
    ("Case 3: no spot is free anywhere: car4 waits until car1 leaves", "car4 A 20",
     "car4 full; P1 <- car1 .*leaves; P1 <- car4 .*charging")]


def run_demo():
    """Ends with an AssertionError if one of the three cases does not happen."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    logging.raiseExceptions = False     # that nobody listens is no reason to stop
    show = logging.info
    show("=== A cloud, a ring of three brokers, and three stations with one spot each")
    city = City(show=show, P1=1, P3=1, P5=1)
    try:
        city.begin()
        for title, words, steps in CASES:
            show(f"=== {title}")
            name, at, battery = words.split()
            city.car(name, "--charges", 1, at=at, battery=battery, speed=4)
            for step in steps.split("; "):
                who, _, pattern = step.partition(" ")
                city[who].says(pattern)
        city["car1"].ends(0)
        show("=== All three cases happened.")
    finally:
        city.erase()


FARED = ["by its own broker", "one broker further", "two brokers further",
         "further on", "refused", "late", "missing", "double"]


class RushedCar(RawClient):
    """One of many that ask the running city at once, at the end of a connection.

    Their spots are free again when the leases end.
    """

    def __init__(self, city, name, place):
        node = city.broker_of(place)
        self.topic = f"{node.name}/cars/{name}"
        self.request = json.dumps({"id": f"{name}-1", "at": place, "range": 60})
        self.replies = []       # (after how many ms, reply)
        hello = connect(name, name, cloud_server.mqtt_password(name), flags=194)
        super().__init__(node.mqtt, hello, host=node.host)
        self.expect(WELCOME).subscribes(f"{self.topic}/reply")

    def fared(self):
        match self.replies:
            case []:
                return "missing"
            case [(took, _)] if took > 9000:
                return "late"
            case [(_, {"station": None})]:
                return "refused"
            case [(_, {"asked": asked})]:
                return FARED[min(3, len(asked) - 1)]
        return "double"


def rush(city, count):
    """Returns the exit status: 1 if a reply is late, missing or double."""
    dice = random.Random(SEED)
    cars = [RushedCar(city, f"rush{SEED}-{n}", dice.choice([*city.places]))
            for n in range(count)]
    ready = selectors.DefaultSelector()
    for car in cars:
        ready.register(car.socket, selectors.EVENT_READ, car)
    began = time.monotonic()
    for car in cars:
        car.sends(f"{car.topic}/request", car.request.encode())
    missing = count
    while missing and time.monotonic() < began + 9 + SLACK:
        for key, _ in ready.select(0.1):
            car = key.data
            missing -= not car.replies
            reply = car.reply()
            car.replies.append((1000 * (time.monotonic() - began), reply))
    seconds = time.monotonic() - began
    for car in cars:
        for _ in car.send(PING).expect(PONG).early:     # late, or double
            car.replies.append((math.inf, {"station": None}))
        car.send(GOODBYE).close()
    return report(city, cars, seconds)


def report(city, cars, seconds):
    times = {fared: [] for fared in FARED}
    offers = collections.Counter()
    for car in cars:
        times[car.fared()] += [took for took, _ in car.replies[:1]] or [0]
        offers.update(reply["station"] for _, reply in car.replies)
    for name in city.stations():        # a spot that was promised twice
        times["double"] += [0] * (offers[name] - city.places[name]["spots"])
    print(f"{'':24}{'cars':>6}{'median':>12}{'99 %':>12}{'slowest':>12}")
    for fared, ms in times.items():
        ms.sort()
        line = f"{fared:24}{len(ms):6}"
        if any(ms):
            for at in len(ms) // 2, len(ms) * 99 // 100, -1:
                line += f"{ms[at]:9.1f} ms"
        print(line)
    count = len(cars) - len(times["missing"])
    print(f"{count} replies in {seconds:.2f} s: {count / seconds:.0f} a second")
    return int(any(times[fared] for fared in ("late", "missing", "double")))


def run_rush(city, count):
    """Returns the exit status."""
    cloud_server.raise_file_limit()
    try:
        return rush(city, count)
    except OSError as fault:
        print(f"rush hour needs a city that runs: {fault}")
        return 1


# ======================================================================================
# One function or object at a time
# ======================================================================================

def changed(value, path, new):
    """A copy of a JSON value with another one at this path in it ("a.0.b"), or none."""
    value = inside = copy.deepcopy(value)
    *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    for key in way:
        inside = inside[key]
    if new == "gone":
        del inside[last]
    else:
        inside[last] = json.loads(new)
    return value


class Ring(Story):
    """ring.py: the circular list, the walk, servers.json, and the roads."""
    FILE = describe(P1=2, P3=1) | {"places": describe(P1=2)["places"], "roads": []}
    WALKS = """
        b | da | 0   | c:1.5 d:1.5       | the first that says yes
        a |    | 0   | b:1.5 c:1.5 d:1.5 | round to the one before the first
        b |    | 1.5 | c:1.5 d:1.5 a:0.5 | three that hang
        b |    | 3.5 | c:1.5             | no time is left
        """
    MAP = json.loads("""{
        "places": {
            "A": {"at": [0, 0], "spots": 1}, "B": {"at": [3, 0], "spots": 1},
            "C": {"at": [0, 1]}, "D": {"at": [4, 0], "spots": 1},
            "E": {"at": [9, 9], "spots": 1}},
        "roads": [["A", "C"], ["B", "D"], ["C", "D"], ["B", "A"]]}""")
    MISTAKES = """
        cloud            | gone             | no cloud
        cloud.host       | "a..b"           | not a host name
        cloud.port       | 65536            | not a port
        brokers          | []               | no brokers
        brokers.1.mqtt   | "1883"           | a port as a text
        brokers.1.name   | "server1"        | a broker given twice
        places           | {}               | no places
        places.server1   | {"at": [0, 0], "broker": "server1"} | a broker's name
        places.P1.broker | "server9"        | an unknown broker
        places.P1.spots  | 0                | a station without a spot
        places.P1.spots  | 201              | too many spots
        places.A.at      | [1, 2, 3]        | three coordinates
        places.A.at.0    | Infinity         | a place infinitely far away
        roads            | [["A", "Z"]]     | a road to nowhere
        roads            | [["A", "A"]]     | a road from a place to itself
        roads            | [["A", "P1", "A"]] | a road of three ends
        """
    TWICE = json.dumps(FILE)[:-1].encode() + b', "roads": []}'     # a key
    TEXTS = b"{", b"\xff", b"[" * 20_000, b"9" * 5_000, TWICE
    SCRIPTS = r"""
        cloud_server.py --config bad.json            | ""       | bad.json: .*cloud
        broker.py --config none.json                 | ""       | none.json: .*No such
        broker.py --config city.json server1 server9 | ""       | city.json: .*server9
        station.py --config city.json A              | ""       | 'A'
        station.py --config bare.json                | ""       | no station
        car.py --config city.json --at Z             | ""       | 'Z'
        car.py --config city.json a/b                | ""       | a/b
        car.py --config city.json P1                 | ""       | P1
        test_system.py --config bad.json             | ""       | bad.json
        station.py                                   | "\udcff" | EV_KEY is not UTF-8
        car.py                                       | "\t "    | EV_KEY
        """

    def test_a_walk_asks_everybody_else_once_until_one_says_yes(self):
        """From where, who says yes, how long each takes; who is asked, how long."""
        self.has_clock(ring)
        circle = ring.link([ring.Broker(name, "localhost", 1, 2, 3) for name in "abcd"])
        for home, yes, seconds, expected, why in rows(self.WALKS):
            asked = []
            for node, patience in ring.walk(circle[home]):
                asked.append(f"{node.name}:{patience:.1f}")
                if node.name in yes:
                    break
                self.clock.now += float(seconds)
            self.assertEqual(" ".join(asked), expected, why)

    def test_the_shortest_way_by_road(self):
        """From A to D over B, though C is nearer to A. C is no station, E is not to be
        reached."""
        ways = ring.City(self.FILE | self.MAP).ways("A")
        self.assertEqual([f"{way.km:g} {'-'.join(way.route)}" for way in ways.values()],
                         ["0 A", "3 A-B", "4 A-B-D"])

    def test_servers_json(self):
        texts = [json.dumps(changed(self.FILE, where, new)).encode()
                 for where, new, _ in rows(self.MISTAKES)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "city.json")
            path.write_text(json.dumps(self.FILE))
            self.assertEqual(ring.load(path).stations("server1"), ["P1"])
            for text in *texts, *self.TEXTS:
                path.write_bytes(text)
                with self.assertRaisesRegex(ring.Invalid, rf"\A{path}: .*\Z", msg=text):
                    ring.load(path)

    def test_each_script_ends_with_one_line(self):
        """Exit status 2, and one line on stderr that names the fault."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "bad.json").write_text("{}")
            Path(folder, "city.json").write_text(json.dumps(self.FILE))
            bare = changed(self.FILE, "places.P1", "gone")
            Path(folder, "bare.json").write_text(json.dumps(bare))
            for words, key, fault in rows(self.SCRIPTS):
                script, *options = words.split()
                end = subprocess.run(
                    [sys.executable, HERE / script, *options], text=True, cwd=folder,
                    capture_output=True, env=os.environ | {"EV_KEY": json.loads(key)})
                self.assertEqual((end.returncode, end.stdout), (2, ""), words)
                self.assertRegex(end.stderr, rf"\A.*{fault}.*\n\Z")


class Shapes(Story):
    """ring.py: what does not fit is refused; what no shape lists is dropped."""
    SHAPES = {"request": cloud_server.REQUEST, "offer": cloud_server.OFFER,
              "refusal": cloud_server.REFUSAL, "claim": station.CLAIM,
              "answer": station.ANSWER, "state": station.STATE, "car": broker.CAR_STATE}
    GOOD = json.loads("""{
        "request": {"id": "a-1", "car": "ann", "at": "A", "range": 0},
        "offer": {"id": "a-1", "station": "P1", "broker": "server1", "km": 2.5,
                  "route": ["A", "P1"], "lease": 15, "asked": ["server1"]},
        "refusal": {"id": "a-1", "station": null, "reason": "full", "retry": 5,
                    "asked": []},
        "claim": {"use": "charging"},
        "answer": {"id": "c", "car": "ann", "ok": false},
        "state": {"station": "P1", "spots": 2, "free": 1, "cars": {"ann": "held"},
                  "life": 7},
        "car": {"car": "ann", "at": "A", "battery": 99.5, "doing": "going"}}""")
    MISTAKES = r"""
        request.id    | ""              | an empty id
        request.id    | "a\nb"          | an id of two lines
        request.id    | "\ud800"        | half a character (a lone surrogate)
        request.id    | gone            | no id
        request.car   | "a/b"           | a name that would be two levels of a topic
        request.car   | "a+"            | a name that is a wildcard
        request.car   | ["a"]           | a list, which cannot be a key
        request.range | -1              | less than nothing
        request.range | NaN             | a number that is none
        request.range | true            | what Python takes for 1
        request.range | "5"             | a text
        refusal.retry | 0               | asking again at once
        offer.lease   | 0               | a spot for no time
        offer.route   | ["A", 5]        | a place that is no name
        offer.route   | "A"             | a text in place of a list
        state.free    | -1              | less than none
        state.spots   | 2.0             | not a whole number
        state.cars    | {"ann": "free"} | a car that has a spot, and has none
        state.cars    | {"a/b": "held"} | a car without a name
        state.life    | gone            | a state of before
        claim.use     | "free"          | neither held nor charging
        claim.id      | null            | an id that is nothing
        answer.ok     | 0               | neither true nor false
        car.battery   | 101             | more than full
        car.doing     | "flying"        | what no car does
        car           | null            | nothing at all
        """

    def test_what_fits_and_what_does_not(self):
        for name, value in self.GOOD.items():
            more = value | {"key": "s3cret", "x": [{}]}
            self.assertEqual(ring.fit(self.SHAPES[name], more, "it"), value)
        for path, new, why in rows(self.MISTAKES):
            name, _, _ = path.partition(".")
            bad = changed(self.GOOD, path, new)[name]
            with self.assertRaisesRegex(ring.Invalid, rf"\A{name}", msg=why):
                ring.fit(self.SHAPES[name], bad, name)
        for kind, longest in (ring.NAME, 64), (ring.ID, 64), (station.CLAIM_ID, 200):
            assert kind.holds("n" * longest) > kind.holds("n" * (longest + 1))

    def test_a_reply_is_to_this_request_and_of_this_map(self):
        city = ring.City(describe(P1=1))
        good = self.GOOD["offer"]
        self.assertEqual(cloud_server.read_reply(city, good, "a-1"), good)
        wrong = {"id": "a-2", "station": "P2", "broker": "x", "route": ["A", "Z"]}
        for key, value in wrong.items():
            with self.assertRaises(ring.Invalid, msg=key):
                cloud_server.read_reply(city, good | {key: value}, "a-1")


class Asking(Story):
    """cloud_server.py: asking others, and leaving out who is silent."""

    def test_left_out_for_longer_each_time_until_it_answers(self):
        self.has_clock(cloud_server)
        caller = cloud_server.Caller()
        caller.exchange = lambda *question: b"{}"
        breaker = caller.breaker
        for seconds in 10, 20, 40, 80, 80, 10:
            if seconds == 10:
                caller.ask("x", {}, 1)
            breaker.failed("x")
            breaker.failed("x")     # others waited for it, too: that was one time
            self.clock.now += seconds - 0.25
            assert breaker.is_open("x")
            self.clock.now += 0.25
            assert not breaker.is_open("x")

    def test_nine_brokers_of_which_seven_hang(self):
        """Who hangs hides no spot: the ninth is found by the fifth try."""
        self.has_clock(cloud_server, ring)
        circle = ring.link([ring.Broker(f"b{n}", "localhost", 1, 2, n)
                            for n in range(1, 10)])

        def exchange(address, question, seconds):
            self.clock.now += 0.001
            if address[1] == 9:
                return json.dumps(Shapes.GOOD["offer"]).encode()
            self.clock.now += seconds
            raise TimeoutError
        caller = cloud_server.Caller()
        caller.exchange = exchange
        for asked in "b2 b3 b4", "b5 b6 b7", "b2 b3 b4", "b5 b6 b7", "b8 b9":
            reply = cloud_server.search(
                ring.City(describe(P1=1)), Shapes.GOOD["request"], circle["b1"],
                caller, mock.Mock())
            self.assertEqual(" ".join(reply["asked"]), asked)
            self.clock.now += 5
        assert reply["station"] == "P1"

    def test_a_connection_is_kept_and_replaced_when_it_was_closed(self):
        """Two questions on the first one; it is closed, so there is a second one."""
        def serve():
            for questions in 2, 1:
                connection, _ = server.accept()
                for _ in range(questions):
                    connection.recv(99)
                    connection.sendall(b"{}\n")
                connection.close()
        caller = cloud_server.Caller()
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            for _ in range(3):
                self.assertEqual(caller.ask(server.getsockname(), {}, 1), {})
            thread.join()

    def test_only_a_real_chance_counts(self):
        """Half a second is one. Who refuses the connection may be back at once."""
        caller = cloud_server.Caller()
        with socket.socket() as hung:
            hung.bind(("127.0.0.1", 0))
            address = hung.getsockname()
            for seconds, why in (1, "refused"), (0.3, "no answer"), (0.5, "no answer"):
                assert not caller.breaker.is_open(address)
                with self.assertRaisesRegex(ring.Invalid, why):
                    caller.ask(address, {}, seconds)
                hung.listen()
        assert caller.breaker.is_open(address)


# ======================================================================================
# One part at a time, in a city without processes
# ======================================================================================

class Line(mock.Mock):
    """The connection of `owner`, in the place of paho's client."""

    def connect(self, host, port, keepalive):
        nodes = self.city.map.ring.values()
        [self.broker] = [node.name for node in nodes if node.mqtt == port]
        if self.broker in self.city.down:
            raise ConnectionRefusedError("down")

    def loop(self, seconds):
        if not self.inbox:
            self.city.clock.wait(seconds)
        while self.owner in self.city.frozen:
            self.city.clock.wait(seconds)
        if self.broker in self.city.down:
            return station.paho.MQTT_ERR_CONN_LOST
        if self.inbox:                  # one at a time, as paho does
            self.on_message(self, None, self.inbox.pop(0))
        return station.paho.MQTT_ERR_SUCCESS

    def publish(self, *message):
        self.city.publish(*message)
        return self

    def subscribe(self, name, qos):
        self.city.server.tree.add(name, self, qos)
        for message in self.city.server.retained.values():
            if station.paho.topic_matches_sub(name, message.topic):
                self.deliver(message, qos)

    def deliver(self, message, qos):
        self.inbox.append(message)
        return 0


class Simulation(Story):
    """Real fog nodes, stations and cars, around one real MQTT server, in one process.
    Only the network and the time are this test's.

    What anybody says is noted in short: `claim:P5:held` of a car, `state:ann-held` or
    `state:empty` of a station.
    """
    TELLING = "cars", "station", "reason", "use", "ok", "at"

    def begins(self, moved={}, **spots):
        file = describe(**spots)
        for place, at in moved.items():
            file["places"][place]["at"] = at
        self.map = ring.City(file)
        self.down = set()       # brokers that do not run
        self.comes_back = self.down.remove
        self.frozen = set()     # stations and cars that hang
        self.freezes = self.frozen.add
        self.thaws = self.frozen.remove
        self.said = collections.defaultdict(list)   # by whom: (what, how many s after
        self.began = 0.0                            # a car has last set out)
        self.ids = []           # of the claims by a fog node
        self.parts = {}
        self.fogs = {}
        self.faults = []
        self.has_clock(station, car, cloud_server)
        self.patch(station, "sleep", self.clock.wait)
        self.patch(station, "mqtt_client",
                   lambda name: Line(city=self, owner=name, inbox=[]))
        self.patch(broker, "crew", lambda: self)
        self.clock.run(self.serve)
        self.clock.wait(0.1)
        self.fog = self.fogs["server1"]
        self.addCleanup(self.end)

    def serve(self):
        """The life of the brokers: all in one loop, by this clock."""
        async def live():
            self.server = broker.MqttServer(set(), set(), mock.Mock())
            self.server.subscribe_inside("#", self)
            for node in self.map.ring.values():
                self.fogs[node.name] = broker.Fog(node.name, self.map, mock.Mock())
                self.fogs[node.name].attach(self.server)
            while not self.is_over:
                await asyncio.sleep(0)
                self.clock.wait(0.01)
        self.is_over = False
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.clock.now
        self.loop.set_exception_handler(lambda loop, fault: self.faults.append(fault))
        self.loop.run_until_complete(live())
        self.loop.close()

    def end(self):
        self.down.clear()
        self.frozen.clear()
        for part in self.parts.values():
            part.is_stopping = True
        self.clock.wait(10)     # so every request has its reply
        self.is_over = True
        self.clock.wait(1)
        self.assertEqual(self.faults, [])

    def submit(self, walk_ring, request):
        """As the fog's walkers: nobody else has a spot."""
        found = concurrent.futures.Future()
        found.set_result(cloud_server.refusal(request["id"], "full", ["server2"]))
        return found

    def publish(self, *message):
        self.loop.call_soon(self.server.publish, *message)

    def deliver(self, message, qos):
        _, _, who, *what = message.topic.split("/")
        about = json.loads(message.payload or '{"ok": "gone"}')
        if not isinstance(about, dict):
            about = {"ok": about}
        found = [about[key] for key in self.TELLING if about.get(key) is not None]
        for value in found[:1]:
            if isinstance(value, dict):
                value = "+".join(map("-".join, value.items())) or "empty"
            what.append(str(value).replace(" ", "."))
        self.said[who].append((":".join(what), round(self.clock.now - self.began)))
        if what[0] == "reply":
            self.reply = about
        if what[0] == "claim" and "id" in about:
            self.ids.append(about["id"])
        return 0

    # --- the verbs of the stories

    def waits(self, who, seconds):
        """And all others, too."""
        self.clock.wait(float(seconds))

    def says(self, who, *expected, about=""):
        """Just that, of these verbs, and in this order; with @, in these seconds."""
        self.clock.wait(0.3)
        verbs = {re.split("[:@]", word)[0] for word in (*expected, about)}
        seconds = collections.defaultdict(list)
        said = []
        for what, second in self.said.pop(who, []):
            if what.split(":")[0] in verbs:
                said.append(what)
                seconds[what].append(str(second))
        if "@" in str(expected):
            said = [f"{what}@{','.join(seconds[what])}" for what in seconds]
        self.assertEqual(said, [*expected])

    def tells(self, who, verb, value, retain=False):
        """`who`, a station or car, to anybody: what server1 is to publish."""
        kind = "stations" if who in self.map.places else "cars"
        topic = f"server1/{kind}/{who}/{verb}"
        self.publish(topic, station.to_json(value), 1, retain)

    def claims(self, car, name, use, retain=False, **id):
        self.tells(car, f"claim/{name}", {"use": use} | id, retain)

    def leaves(self, car, name, retain=False):
        self.tells(car, f"leave/{name}", {}, retain)

    def starts(self, name, lease=15):
        self.parts[name] = station.Station(name, self.map, lease)
        self.clock.run(self.parts[name].live)
        self.clock.wait(0.7)

    def left(self, name, life, *cars):
        """What the server has of a station: said by itself, or by another one."""
        self.tells(name, "state", {
            "station": name, "spots": 3, "free": 3 - len(cars),
            "cars": dict(car.split("-") for car in cars),
            "life": self.parts[name].life if life == "own" else 1}, True)

    def is_offline(self, name):
        self.tells(name, "online", False)

    def has(self, name, *cars):
        self.clock.wait(0.3)
        uses = self.fogs[self.map.broker_of(name).name].states[name]["cars"]
        self.assertEqual(["-".join(item) for item in uses.items()], [*cars])

    def drives(self, name, at="A", battery=20, speed=1, charges=math.inf):
        self.parts[name] = car.Car(name, self.map, at, float(battery),
                                   float(speed), charges)
        self.began = self.clock.now
        self.clock.run(self.parts[name].live)

    def is_at(self, name, server):
        assert self.parts[name].broker.name == server

    def dies(self, name):
        """A broker, with all that it keeps."""
        self.down.add(name)
        self.server.retained.clear()

    def is_cut_off(self, name):
        """For a moment, from a broker that forgets nothing."""
        self.down.add("server1")
        self.clock.wait(0.2)
        self.down.clear()
        self.clock.wait(1.5)


class TheStation(Simulation):
    """station.py: its two spots, its leases and its memory."""

    def setUp(self):
        self.begins(P1=2)

    def test_take_renew_refuse(self):
        self.plays("""
            P1 starts; says mark state:empty online:True
            ann claims P1 held id=a-1@server1-9
            P1 says state:ann-held answer:True
            ann claims P1 charging
            ann claims P1 held id=a-2@server1-9     # it comes late: who charges goes on
            P1 says state:ann-charging answer:True
            bob claims P1 held
            bob claims P1 held                      # nothing new, so nothing to say
            P1 says state:ann-charging+bob-held
            cid claims P1 held id=c-1@server1-9
            P1 says state:ann-charging+bob-held answer:False
            ann leaves P1
            cid claims P1 charging
            P1 has bob-held cid-charging""")

    def test_what_does_not_count(self):
        """What is only repeated (retained), and what is invalid."""
        self.claims("ann", "P1", "held", retain=True)
        self.leaves("bob", "P1", retain=True)
        self.plays(f"""
            P1 starts; has
            cid leaves P1
            bob claims P1 held
            P1 has bob-held; is_cut_off; has bob-held
            eve claims P1 free
            eve claims P1 held id={'i' * 201}
            e\u200be claims P1 held; waits 0.3      # no name: it is not printable""")
        assert [*self.parts["P1"].cars] == ["bob"]
        assert "server1/stations/P1/online" in self.server.retained
        bad = station.paho.MQTTMessage(topic=b"\xff")
        with self.assertRaises(ValueError):     # which paho's loop passes on
            self.parts["P1"].mqtt.on_message(None, None, bad)

    def test_a_lease_ends_by_itself(self):
        """15 s after the last claim; but not while the station is cut off: then all
        begin anew when its mark is back, not before. Nor does a freeze end one:
        whoever claimed meanwhile is yet to be heard."""
        self.plays("""
            P1 starts
            ann claims P1 held; waits 10
            bob claims P1 charging; waits 4
            P1 has ann-held bob-charging; waits 0.8; has bob-charging
            bob claims P1 held; waits 14
            P1 has bob-charging
            server1 dies; waits 100; comes_back; waits 14
            ann claims P1 charging
            P1 has bob-charging ann-charging; freezes; waits 20
            ann claims P1 held
            bob claims P1 held
            P1 thaws; waits 14; has bob-charging ann-charging; waits 2; has""")

    def test_it_remembers(self):
        """Once, with whole leases, and no more cars than it has spots. And the one that
        was started later is the station: the older one ends, and says nothing more."""
        self.plays("""
            P1 left another dan-held bob-charging cid-charging
            P1 starts; has bob-charging cid-charging; says mark
            P1 waits 13; has bob-charging cid-charging
            bob leaves P1
            P1 has cid-charging; left own ann-held bob-charging
            P1 is_cut_off; has cid-charging; left another ann-held; says mark
            P1 is_cut_off; says mark about=online""")
        assert self.parts["P1"].mqtt is None
        unlucky = station.Station("P1", self.map, 15)
        for cars in {"ann": "held", "bob": "held"}, {"cid": "held", "dan": "held"}:
            unlucky.remember({"cars": cars})            # and cut off before its mark
        self.assertEqual([*unlucky.cars], ["cid", "dan"])

    def test_its_state_always_fits_into_a_packet(self):
        crowded = station.Station("P1", self.map, 15)
        crowded.spots = 200
        crowded.publish = mock.Mock()
        for n in range(200):
            crowded.claim("\U0001f697" * 61 + f"{n:03}", {"use": "charging"})
        _, state = crowded.publish.call_args.args
        assert state["free"] == 0 and len(station.to_json(state)) < 65_000


class TheCar(Simulation):
    """car.py: what it decides, and in which second."""

    def setUp(self):
        self.begins(P1=1, P3=1, P6=1)

    def test_it_asks_at_places_only(self):
        """Below 25 %, or where the next road is longer than it can drive. Even a name
        of 64 characters leaves room for its request's id."""
        self.patch(car.random, "choice", lambda roads: roads[-1])
        far = {"P6": [40, 0], "P3": [70, 0]}    # 30 km from E; and too far for any car
        self.begins(far, P1=1, P3=1, P6=1)
        long = "n" * 64
        self.plays(f"""
            {long} drives battery=24
            ann drives battery=25
            far drives at=P6 battery=49
            bob drives at=P6 battery=51
            max drives at=P3 battery=100
            zoe drives battery=25.5 speed=0.6
            {long} says request:A reply:full
            far says request:P6
            ann says about=request
            bob says about=request
            max says about=request
            zoe says about=request; waits 9; says request:C""")

    def test_it_claims_every_third_of_a_lease(self):
        """Held while it drives; charging, and at once, when it is there."""
        self.plays("""
            P6 starts lease=6
            zoe drives at=E speed=0.4 charges=1; waits 24
            zoe says request:E@0 claim:P6:held@0,2,4,6,8,10 \
                claim:P6:charging@10,12,14,16,18 leave:P6@19""")
        last = self.server.retained["server3/cars/zoe/state"]
        self.assertIn(b"offline", last.payload)

    def test_it_charges_only_where_it_is_shown_as_charging(self):
        """Not shown for 3 s it asks anew, whatever its battery; refused, it waits."""
        self.plays("""
            P1 starts
            zoe drives; waits 0.5
            P1 freezes; waits 12
            zoe says request:A@0 claim:P1:held@0,4 claim:P1:charging@1,2,3,4 \
                leave:P1@4 request:P1@4,10""")

    def test_frozen_for_longer_than_a_lease_it_has_not_charged(self):
        self.plays("""
            P1 starts lease=6
            zoe drives battery=5; waits 3; freezes
            server1 dies; waits 20
            zoe thaws; waits 0.5""")
        assert self.parts["zoe"].battery < 50

    def test_a_broker_away_costs_no_spot_within_a_lease(self):
        """On its way, as it arrives, or as it charges: it goes on, and claims when the
        broker is back."""
        self.plays("""
            P6 starts
            zoe drives at=E speed=0.4 charges=1; waits 3
            server3 dies; waits 4; comes_back; waits 2
            server3 dies; waits 5; comes_back; waits 2
            server3 dies; waits 3; comes_back; waits 10
            zoe says request:E@0 claim:P6:held@0,7 claim:P6:charging@14,15,19 \
                leave:P6@24""")

    def test_a_broker_away_for_longer_costs_the_spot(self):
        """A lease after its last claim the car turns elsewhere."""
        self.plays("""
            P6 starts
            zoe drives at=E speed=0.1; waits 3
            server3 dies; waits 11
            zoe is_at server3; waits 5; is_at server1""")

    def test_without_a_spot_it_turns_to_the_next_broker(self):
        """After a second failure, or without a reply for 10 s."""
        self.fogs["server2"].deliver = lambda message, qos: 0
        self.plays("""
            server1 dies
            zoe drives; waits 0.9; is_at server1
            zoe waits 9; says request:A@1; is_at server2
            zoe waits 2; says request:A@11; is_at server3""")

    def test_it_asks_again_where_there_is_no_other_broker(self):
        self.begins(P1=1)
        self.fog.deliver = lambda message, qos: 0
        self.plays("zoe drives; waits 21; says request:A@0,10,20")

    def test_it_connects_where_it_is(self):
        """In another region to another broker; the old one is told to forget it."""
        self.patch(car.random, "choice", lambda roads: roads[-1])
        self.plays("zoe drives battery=90 speed=2; waits 5.5; is_at server3")
        states = dict.fromkeys(what for what, _ in self.said["zoe"] if "state" in what)
        self.assertEqual(" ".join(states), "state:A state:gone state:C state:E")


class TheFog(Simulation):
    """broker.py: how a fog node finds a spot.

    `ann finds P2 P1 P2`: she is offered P2, after claims at P1 and P2.
    """
    YES = {"id": "x", "car": "ann", "ok": True, "lease": 15}
    INVALID = """
        cars/dan/request   | {"id": "d-1", "at": "A", "range": 5}
        stations/P1/state  | {"station": "P2", "spots":1, "free":1, "cars":{}, "life":1}
        stations/P1/online | 1
        stations/P1/online | {
        stations/P1/answer | {"id": "x", "car": "ann", "ok": true}
        cars/ann/state     | {"car": "bob", "at": "A", "battery": 5, "doing": "going"}
        cars/bob/request   | {"id": "b-1", "at": "Z", "range": 5}
        cars/cid/request   | {"id": 5, "at": "A", "range": 5}
        """

    def asks(self, car, range=50):
        self.tells(car, "request", {"id": "a-1", "at": "A", "range": float(range)})

    def finds(self, car, found, *claimed, after=0.05, range=50):
        self.said.clear()
        self.reply = None
        self.asks(car, range)
        self.clock.wait(float(after) - 0.05)
        assert self.reply is None
        self.clock.wait(0.45)
        self.assertEqual(self.reply["station"] or self.reply["reason"], found)
        said = [what.split(":")[1] for what, _ in self.said[car] if "claim" in what]
        self.assertEqual(said, [*claimed])

    def test_which_station(self):
        """The nearest first, but before it the one that keeps a spot for this car. Who
        has none is not even asked."""
        self.begins(P1=2, P2=2, P3=1)
        self.plays("""
            P1 starts
            P2 starts
            ann finds P1 P1
            bob finds P1 P1
            cid finds P2 P2
            P1 left another ann-held            # that was a lie: it has no free spot
            dan finds P2 P1 P2
            ann leaves P1
            P1 has bob-held
            cid finds P2 P2
            eve finds P1 P1 range=1
            fay finds full range=1
            bob leaves P1
            bob finds P1 P1
            P2 is_offline
            dan finds full
            fay asks range=0.9; says reply:out.of.range""")
        assert self.reply["asked"] == ["server1"]
        assert len(self.ids) == len(set(self.ids))
        self.assertRegex(" ".join(self.ids), r"\A(a-1@server1-[0-9a-f]+ ?)*\Z")

    def test_two_silent_stations_are_waited_for_and_then_left_out(self):
        self.begins(A=2, P1=1, P2=1)
        self.plays("""
            A starts; freezes
            P1 starts; freezes
            P2 starts
            ann finds full A P1 after=1
            ann finds P2 P2
            A thaws; has ann-held               # whoever speaks is asked again
            bob finds A A
            cid finds full""")
        assert self.reply["asked"] == ["server1", "server2"]

    def test_an_answer_counts_once_and_from_whom_was_asked(self):
        self.begins(P1=1, P2=1)
        self.plays("P1 starts; freezes \n ann asks; waits 0.1")
        yes = self.YES | {"id": self.ids[0]}
        self.tells("P2", "answer", yes)
        self.tells("P1", "answer", self.YES)
        self.plays("ann says about=reply")
        for ok in True, False, True:
            self.tells("P1", "answer", yes | {"ok": ok})
        self.plays("ann says reply:P1")

    def test_sixteen_claims_at_a_time(self):
        self.begins(P1=200)
        self.plays("P1 starts; freezes")
        for n in range(40):
            self.asks(f"c{n}")
        self.clock.wait(0.1)
        assert len(self.ids) == 16
        self.clock.wait(2)
        self.assertEqual((self.fog.answers, self.fog.room._value), ({}, 2_000))

    def test_a_request_has_its_time(self):
        """And then its car is told to wait; beyond 2,000 that is told at once."""
        self.begins(P1=2)
        self.submit = lambda *request: concurrent.futures.Future()      # nobody walks
        self.plays("ann finds full after=8.7 \n P1 starts")
        for room, found in (1, "P1 P1"), (0, "full"):
            self.fog.room = asyncio.Semaphore(room)
            self.plays(f"ann finds {found}")
        self.assertEqual(self.fog.requests, {"local": 1, "ring": 0, "refused": 2})

    def test_what_is_invalid_or_only_repeated(self):
        """(dan's request is retained.)"""
        self.begins(P1=1)
        table = self.fog.states, self.fog.online, self.fog.cars
        before = str(table)
        for topic, text in rows(self.INVALID):
            topic = f"server1/{topic}"
            message = broker.Message(topic, text.encode(), 1, "dan" in topic)
            self.loop.call_soon(self.fog.deliver, message, 1)
        self.clock.wait(0.1)
        self.assertEqual(str(table), before)
        replies = [who for who in self.said if "reply" in str(self.said[who])]
        self.assertEqual(replies, ["bob", "cid"])
        assert self.reply["id"] is None
        request = broker.Message("server1/cars/bob/request", b"{")
        assert self.fog.deliver(request, 1) == broker.MOMENT    # it ends bob's turn

    def test_the_cars_that_it_remembers(self):
        self.begins(P1=1)
        self.patch(broker, "REMEMBERED", 3)
        for name in "c0", "c1", "c2", "c0", "c3":
            state = {"car": name, "at": "A", "battery": 5, "doing": "going"}
            self.tells(name, "state", state)
        self.tells("c0", "state", None)
        self.clock.wait(0.1)
        assert [*self.fog.cars] == ["c2", "c3"]


class Topics(Story):
    """broker.py: who has subscribed to a topic, and who may publish on it."""
    MATCHES = """
        a/b  | a/b a/+ +/b +/+ # a/# a/b/# +/# | b a/b/c a a/+/+ /a/b $a/b
        a    | a + # a/# +/#                   | a/ /a a/+ $a
        /a   | /a /+ +/a +/+ /# #              | a /
        a/   | a/ a/+ +/ a/#                   | a a/b
        $a/b | $a/b $a/+ $a/#                  | +/b # +/# +/+
        """
    SPEAKERS = """
        car1 | server1/cars/car1 server2/cars/car1/claim/P3 | server1/cars/car2/x
        car1 | x server10/x server1x /server1/x | server1/cars server1 server2/x
        P1   | server1/stations/P1/state server1/stations/P1/a/b | server1/x/P1/x
        """

    def test_the_filters_that_match(self):
        """[MQTT-4.7] Each subscriber once, with the highest QoS of its filters."""
        for topic, good, bad in rows(self.MATCHES):
            tree = broker.TopicTree()
            added = [(name, who) for name in good.split() + bad.split()
                     for who in (name, "all")]
            for name, who in added:
                tree.add(name, who, 1)
            tree.add(topic, "all", 2)
            expected = dict.fromkeys(good.split(), 1) | {"all": 2}
            self.assertEqual(tree.match(topic), expected)
            for name, who in added:
                tree.remove(name, who)
            assert not tree._root._children     # no memory is lost

    def test_who_may_publish(self):
        """As itself below a broker's name; anybody elsewhere."""
        for name, good, bad in rows(self.SPEAKERS):
            for topic in good.split() + bad.split():
                may = broker.may_publish(name, topic, {"server1", "server2"})
                assert may == (topic in good.split()), topic


# ======================================================================================
# The MQTT server, packet by packet: with the clauses of the OASIS standard in brackets
# ======================================================================================

class Packets(unittest.IsolatedAsyncioTestCase):
    """broker.py: each mistake closes the connection, and is answered with nothing, or
    with what stands in a column between.

    How to read a packet: "text" stands for its length in two bytes and itself, - for
    the length of the rest; all other bytes are hexadecimal.
    """
    CONNECTS = """
        30 - "t"                            | not CONNECT [MQTT-3.1.0-1]
        50 02 00 07                         | nor this, as "POST ..." would begin
        16 03 01                            | the beginning of TLS, and no more
        11 - "MQTT" 04 02 00 00 ""          | a reserved flag [MQTT-2.2.2-2]
        10 - "MQTTT" 04 02 00 00 ""         | another protocol [MQTT-3.1.2-1]
        10 - "MQTT" 04 03 00 00 ""          | the reserved flag [MQTT-3.1.2-3]
        10 - "MQTT" 04 06 00 00 ""          | a will that is missing [MQTT-3.1.2-9]
        10 - "MQTT" 04 0a 00 00 ""          | QoS of no will [MQTT-3.1.2-13]
        10 - "MQTT" 04 22 00 00 ""          | a retain flag of no will [MQTT-3.1.2-15]
        10 - "MQTT" 04 1e 00 00 "" "t" ""   | QoS 3 of the will [MQTT-3.1.2-14]
        10 - "MQTT" 04 06 00 00 "" "t/#" "" | a will for many topics [MQTT-3.3.2-2]
        10 - "MQTT" 04 82 00 00 ""          | a missing user name [MQTT-3.1.2-19]
        10 - "MQTT" 04 02 00 00 "" "u"      | a user name, but no flag [MQTT-3.1.2-18]
        10 - "MQTT" 04 42 00 00 "" "p"      | a password without a user name [-3.1.2-22]
        10 - "MQTT" 04 02 00 00             | no client id [MQTT-3.1.3-3]
        10 - "MQTT" 04 02 00 00 00 01 ff    | a client id that is not UTF-8 [-3.1.3-4]
        10 81 80 04                         | more than 64 KiB, said in the header
        10 - "MQTT" 03 02 00 00 "" | 20 02 00 01 | another version [MQTT-3.1.2-2]
        10 - "MQTT" 04 00 00 00 "" | 20 02 00 02 | a session of nobody [MQTT-3.1.3-8]
        10 - "MQTT" 04 06 00 00 "eve" "server1/cars/ben/x" "" | 20 02 00 05 | another's
        """
    PACKETS = """
        10 - "MQTT" 04 02 00 00 "x"     | a second CONNECT [MQTT-3.1.0-2]
        f0 00                           | the reserved type 15
        d0 00                           | PINGRESP, which only a server sends
        c1 00                           | a reserved flag of PINGREQ
        60 02 00 01                     | PUBREL without its flag [MQTT-3.6.1-1]
        c0 80 80 80 80 00               | a length of five bytes
        c0 01 00                        | PINGREQ with a byte too many
        e0 01 00                        | DISCONNECT with a byte too many
        40 03 00 07 00                  | PUBACK with a byte too many
        40 01 00                        | PUBACK that ends in its id
        50 02 00 07                     | PUBREC for a PUBLISH of QoS 1
        70 02 00 07                     | PUBCOMP for the same
        36 - "t" 00 01                  | QoS 3 [MQTT-3.3.1-4]
        38 - "t"                        | DUP with QoS 0 [MQTT-3.3.1-2]
        32 - "t" 00 00                  | packet identifier 0 [MQTT-2.3.1-1]
        30 - "a/#"                      | PUBLISH to many topics [MQTT-3.3.2-2]
        30 - "+"                        | the same
        30 - ""                         | PUBLISH to no topic [MQTT-4.7.3-1]
        30 - 00 02 61 00                | U+0000 [MQTT-1.5.3-2]
        30 - 00 03 ed a0 80             | half a character [MQTT-1.5.3-1]
        30 - 00 05 74                   | a topic that is not all there
        30 - "server1/cars/ben/request" | speaking in another's name
        82 02 00 01                     | SUBSCRIBE to nothing [MQTT-3.8.3-3]
        82 - 00 01 "t" 03               | QoS 3 [MQTT-3.8.3-4]
        82 - 00 01 "t" 00 "a#" 00       | a good filter, and # within a level [-4.7.1-2]
        82 - 00 01 "#/a" 00             | # that is not the last level
        82 - 00 01 "a+/b" 00            | + within a level [MQTT-4.7.1-3]
        82 - 00 01 "" 00                | an empty filter
        a2 02 00 01                     | UNSUBSCRIBE from nothing [MQTT-3.10.3-2]
        """

    def parse(self, words):
        digits = re.sub(r'"(.*?)"', lambda text: encode(0, 0, text[1])[2:].hex(), words)
        head, dash, rest = digits.partition("-")
        rest = bytes.fromhex(rest)
        return bytes.fromhex(head) + bytes([len(rest)] * len(dash)) + rest

    async def test_what_is_not_well_formed(self):
        server = broker.MqttServer({"server1"}, set(), mock.Mock())
        for first, table in (b"", self.CONNECTS), (connect("eve"), self.PACKETS):
            for words, *answer, why in rows(table):
                client = join(server, first)
                client.flush()
                client.transport.write.reset_mock()
                if first:
                    client.session.keep(7, b"2", [broker.PUBACK])
                client.data_received(self.parse(words))
                said = [call.args for call in client.transport.write.call_args_list]
                assert client.transport.is_closing(), why
                self.assertEqual(said, [(self.parse(text),) for text in answer], why)

    async def test_all_that_connect_may_say(self):
        """[MQTT-3.1.3-1] In this order."""
        server = broker.MqttServer(set(), set(), mock.Mock())
        packet = connect("eve", "t", "x", "me", "password", flags=0b1110_1110)
        with mock.patch.object(broker, "may_connect") as may_connect:
            self.assertEqual(join(server, packet).will, ("t", b"x", 1, True))
        may_connect.assert_called_once_with("eve", "me", b"password")

    def test_each_length_there_and_back(self):
        for size in 0, 127, 128, 16_383, 16_384, cloud_server.LIMIT - 4:
            packet = broker.encode(broker.PUBLISH, bytes(size))
            self.assertEqual(packet, encode(PUBLISH, 0, bytes(size)))
            buffer = bytearray(packet + b"after")
            found = broker.take_packet(buffer)
            self.assertEqual((found.first, len(found.read()), buffer),
                             (broker.PUBLISH, size, b"after"))
            for missing in range(1, min(len(packet), 9)):
                assert broker.take_packet(bytearray(packet[:-missing])) is None


def join(server, *packets):
    """A connection of that server, without a socket, that has got these packets."""
    client = broker.Connection(server)
    transport = mock.Mock(**{"get_extra_info.return_value.fileno.return_value": 5,
                             "is_closing.return_value": False,
                             "get_write_buffer_size.return_value": 0})
    transport.abort = lambda: transport.is_closing.configure_mock(return_value=True)
    client.connection_made(transport)
    client.data_received(b"".join(packets))
    return client


class TooMuch(unittest.IsolatedAsyncioTestCase):
    """broker.py: what the MQTT server keeps for one client, and for all."""

    async def asyncSetUp(self):
        self.server = broker.MqttServer(set(), {"P1/state"}, mock.Mock())
        patch = mock.patch.object(broker, "SLICE", DEADLINE)
        self.slice, _ = patch.get_original()
        patch.start()
        self.addCleanup(patch.stop)

    def joins(self, name, *packets, **how):
        return join(self.server, connect(name, **how), *packets)

    def acknowledges(self, client):
        """Returns how many messages it had."""
        ids = [*client.session.unacked]
        client.data_received(b"".join(ack(PUBACK, id) for id in ids))
        return len(ids)

    async def goes_round(self, times=3):
        for _ in range(times):      # the loop
            await asyncio.sleep(0)

    async def test_nothing_more_for_who_is_too_slow(self):
        """However much comes before the loop ends it. Wills never nest."""
        slow = [self.joins(f"c{n}", subscribe("t")) for n in range(200)]
        await self.goes_round()
        for client in slow:
            client.will = broker.Message("t", bytes(60_000))
            client.transport.get_write_buffer_size.return_value = broker.BUDGET + 1
            client.transport.write.reset_mock()
        for _ in range(9):
            self.server.publish("t", bytes(60_000))
        await self.goes_round(1_000)
        assert not self.server.connections and not self.server.present
        assert {client.transport.write.call_count for client in slow} == {1}

    async def test_one_budget_for_what_is_not_acknowledged(self):
        """Beyond it a connected client is dropped, an absent one loses the oldest."""
        ann = self.joins("ann", subscribe("t", qos=1))
        bob = self.joins("bob", subscribe("t", qos=1), flags=0)
        kept = bob.session.unacked
        bob.connection_lost(None)
        for n in range(40):
            self.server.publish("t", b"%d" % n + bytes(50_000), 1)
        assert ann.transport.is_closing()
        self.assertEqual([int(packet[9:11]) for packet, _ in kept.values()],
                         [*range(21, 40)])
        bob = self.joins("bob", flags=0)
        await self.goes_round()
        assert not bob.transport.is_closing()       # it gets all that was kept
        self.acknowledges(bob)
        assert bob.session.room_left() == broker.BUDGET - 129    # its filter, of one level
        for id in itertools.count(1):               # what it does not release counts
            bob.data_received(publish("x", b"", 2, id=id))
            if bob.transport.is_closing():
                break
        assert id == (broker.BUDGET - 129) // 128 + 1

    async def test_filters_sessions_and_retained_messages(self):
        """What comes new finds no room, but a station's state always does."""
        server = self.server
        dan = self.joins("dan", publish("/" * 128))
        assert dan.transport.is_closing()           # too many levels
        eve = self.joins("eve").session
        codes = [server.subscribe(eve, f"{n}/a/b", 1) for n in range(5_000)]
        assert 1_000 < codes.index(0x80) < 4_000
        server.unsubscribe(eve, "0/a/b")
        assert server.subscribe(eve, "y/a/b", 1) == 1
        for n in range(1_002):
            self.joins(f"c{n}", subscribe("t"), flags=0).connection_lost(None)
        assert len(server.absent) == 1_000
        assert "c1" not in server.absent and len(server.tree.match("t")) == 1_000
        for n in range(2_000):
            server.publish(f"large/{n}", bytes(60_000), retain=True)
        assert 1_000 < len(server.retained) < 1_200
        server.publish("P1/state", bytes(65_000), retain=True)
        server.publish("large/0", bytes(120_000), retain=True)      # it has grown
        assert "P1/state" in server.retained and "large/0" not in server.retained
        for topic in [*server.retained]:
            server.publish(topic, b"", retain=True)
        assert server.retained_bytes == 0

    async def test_each_has_its_slice_of_time(self):
        """Many packets, or one expensive subscription, hold up nobody for long."""
        broker.SLICE = self.slice
        for n in range(1_000):
            self.server.publish("a/" * 10 + str(n), b"x", retain=True)
        filters = ["/".join(levels) for levels in itertools.product("a+", repeat=11)]
        for packets in [subscribe(*filters)], [publish("t", b"", 1)] * 50_000:
            began = time.monotonic()
            eve = self.joins("eve", *packets)
            assert time.monotonic() - began < 0.1 + SLACK
            await self.goes_round(5)
            assert eve.transport.pause_reading.call_count > 3

    async def test_who_makes_work_waits(self):
        """A request, or a message to who has enough to do, ends the slice."""
        ann = self.joins("ann", subscribe("t"))
        fog = mock.Mock(**{"deliver.return_value": broker.MOMENT})
        self.server.subscribe_inside("request", fog)
        for topic, is_blocked in ("request", False), ("t", True), ("t", False):
            ann.is_blocked = is_blocked
            eve = self.joins("eve", *[publish(topic)] * 9)
            assert bool(eve.buffer) == (topic == "request" or is_blocked)
            end = time.monotonic() + DEADLINE
            while eve.buffer and time.monotonic() < end:
                await self.goes_round()
            assert not eve.buffer

    async def test_who_is_behind_is_waited_for(self):
        """And is heard meanwhile, as it might be waiting for others itself."""
        ann = self.joins("ann", subscribe("t"))
        assert self.server.publish("t", b"") == 0
        ann.is_blocked = True
        assert self.server.publish("t", bytes(9_000)) == 9 * broker.PAUSE
        ann.data_received(PING + publish("x") + PING)
        assert ann.out.endswith(PONG + PONG)

    async def test_what_is_still_to_be_given(self):
        """Half its budget, the rest when it has acknowledged; and all of it anew, when
        the connection was lost."""
        for n in range(60):
            self.server.publish(f"t/{n}", bytes(30_000), 1, retain=True)
        ann = self.joins("ann", subscribe("t/#", qos=1), flags=0)
        ann.connection_lost(None)
        bob = self.joins("bob", subscribe("t/#", qos=1), flags=0)
        bob.data_received(encode(UNSUBSCRIBE, 2, 8, "t/#"))
        bob.connection_lost(None)
        assert not bob.session.wanted       # nor does that cost memory
        for total in 18 + 60, 0:
            ann = self.joins("ann", flags=0)
            count = 0
            while ann.session.unacked:
                count += self.acknowledges(ann)
            assert count == total
            ann.connection_lost(None)

    async def test_a_ping_does_not_wait_for_retained_messages(self):
        broker.SLICE = -1       # so it is one thing at a time
        for n in range(9):
            self.server.publish(f"t/{n}", b"x", retain=True)
        ann = self.joins("ann", subscribe("t/#"))
        while not ann.session.begun:
            await self.goes_round(1)
        ann.data_received(PING)
        assert ann.out.endswith(PONG) and ann.session.begun

    async def test_packet_ids(self):
        """[MQTT-2.3.1-4] After all 65,535 one that is still on its way is left out."""
        session = broker.Session("ann", False)
        for n in range(65_600):
            session.deliver(broker.Message("t", b"", 1), 1)
            if n:
                first, last = session.unacked
                assert first == 1 < last <= 65_535
                session.forget(last)


class Mqtt(Story):
    """ann, bob and others, with ids and topics of this test's own, at a real server.

    Steps are methods of RawClient. `t` is a topic of this test's own, `t/a` is below
    it; `qos=1` and the like are named; words in capitals are kinds of packets, any
    other word is a payload, and - an empty one.
    """
    SPOTS = dict(P1=1)

    def setUp(self):
        self.t = f"t/{self.id()}"
        self.cast = {}
        self.joins("ann")
        self.joins("bob")

    def joins(self, name, session=None, will=None, retain=0, keep=0):
        """session: None a clean one; 0 or 1 one that stays, and was there or not. will:
        the QoS of "x" to `t`. cid2 is a second connection of cid."""
        flags = 2 * (session is None)
        fields = [name.rstrip("2") + self.id()]
        if will is not None:
            flags += 4 + 8 * will + 32 * retain
            fields += [self.t, "x"]
        client = self.raw().send(connect(*fields, flags=flags, keep=keep))
        client.expect(ack(CONNACK, 256 * (session or 0)))
        if name in self.cast:
            client.ids = self.cast[name].ids
        self.cast[name] = client

    def means(self, word):
        if word.isupper():
            return globals()[word]
        return self.t + word[1:] if word[0] == "t" else word.strip("-").encode()

    def test_resumed_or_clean(self):
        """[MQTT-3.1.2-4..8, 3.2.2-1..3] A clean session keeps nothing."""
        self.plays("""
            cid joins session=0; subscribes t/0 qos=1; leaves
            cid joins session=1; subscribes t/1 qos=1; leaves
            cid joins; subscribes t/2 qos=1; leaves
            cid joins session=0; subscribes t/3 qos=1; leaves
            ann publishes t/3 qos=1 retain=1; publishes t/1 qos=1; publishes t/2 qos=1
            cid joins session=1; takes t/3 qos=1; quiet""")

    def test_taken_over(self):
        """[MQTT-3.1.4-2, 3.1.3-6] The first one ends, with its will; the second one is
        clean. Who has no id is nobody else."""
        self.plays("""
            bob subscribes t
            cid joins will=0; subscribes t/+
            cid2 joins
            cid closed
            bob takes t
            ann publishes t/a
            cid2 quiet; subscribes t/+
            ann publishes t/a
            cid2 takes t/a; quiet""")
        guest = self.raw().send(connect("")).expect(WELCOME)
        self.raw().send(connect("")).expect(WELCOME)
        guest.quiet()

    def test_redelivery(self):
        """[MQTT-3.1.2-5, 3.3.1-1, 4.4.0-1, 4.6.0-1] DUP, old ids, in order."""
        self.plays("""
            cid joins session=0; subscribes t qos=2
            ann publishes t qos=1; publishes t qos=2
            cid hears t qos=1; hears t qos=2; vanish
            ann publishes t new qos=2
            cid joins session=1; hears t qos=1 dup=1; hears t qos=2 dup=1
            cid takes t new qos=2""")
        first, second, *again, new = self.cast["cid"].ids
        assert again == [first, second]
        self.cast["cid"].settle(1, first).settle(2, second)
        self.plays("cid leaves; joins session=1; quiet")

    def test_exactly_once(self):
        """[MQTT-4.3.3-1, -2, 4.4.0-1] QoS 2, whatever either side sends again."""
        self.plays("""
            cid joins session=0; subscribes t qos=2
            dan joins session=0; sends t qos=2 id=7; sends t qos=2 id=7 dup=1
            dan gets PUBREC id=7; gets PUBREC id=7; vanish
            dan joins session=1; sends t qos=2 id=7 dup=1; gets PUBREC id=7
            dan gives PUBREL id=7; gets PUBCOMP id=7
            dan gives PUBREL id=7; gets PUBCOMP id=7    # the first one may be lost
            cid hears t qos=2; quiet
            cid gives PUBREC; gets PUBREL; gives PUBREC; gets PUBREL; vanish
            cid joins session=1; gets PUBREL; vanish
            cid joins session=1; gets PUBREL; gives PUBCOMP; quiet
            dan sends t qos=2 id=7 dup=1; gets PUBREC id=7      # the id was free
            dan gives PUBREL id=7; gets PUBCOMP id=7
            cid takes t qos=2
            cid gives PUBREC id=99; gets PUBREL id=99; gives PUBACK id=98; quiet""")

    def test_the_lower_qos_in_order(self):
        """[MQTT-3.8.4-6, 3.3.5, 4.3.1..3, 4.6.0-2..6] Each QoS to each, the sender too,
        once; whatever DUP and the ids are."""
        self.joins("cid")
        for granted, person in enumerate(self.cast.values()):
            person.subscribes(self.t, granted)
        ids = range(65_530, 65_536)
        ann = self.cast["ann"]
        for sent in range(3):
            for id in ids:
                ann.send(publish(self.t, b"%d" % id, sent, 0, sent > 0, id))
            ann.settle(sent, *ids, sender=True)
            for granted, person in enumerate(self.cast.values()):
                for id in ids:
                    person.takes(self.t, b"%d" % id, min(sent, granted))
                person.quiet()

    def test_subscriptions(self):
        """[MQTT-3.3.5-1, 3.8.4-3..5, 3.9.3-1, 3.10.4-1..6] Highest QoS, once; the same
        replaces. More than 128 levels are refused. Unsubscribing is by the letter."""
        deep = subscribe(self.t, self.t + "/a" * 127, qos=1)
        self.cast["bob"].send(deep).expect(ack(SUBACK, 9, 1, 128))
        self.plays("""
            bob subscribes t qos=2
            ann publishes t qos=2
            bob takes t qos=2; quiet; subscribes t
            ann publishes t qos=2
            bob takes t; quiet; subscribes t/# qos=1
            ann publishes t qos=2
            bob takes t qos=1; quiet; unsubscribes t/
            ann publishes t
            bob takes t; quiet; unsubscribes t/#
            ann publishes t
            bob takes t; quiet; unsubscribes t
            ann publishes t
            bob quiet""")

    def test_retained(self):
        """[MQTT-3.3.1-5..12, 3.8.4-3] Replaced by the next, deleted by an empty one;
        RETAIN is set for those who come later."""
        for sent, granted in itertools.product(range(3), repeat=2):
            self.plays(f"""
                ann publishes t/a - retain=1
                bob subscribes t/a qos=2
                ann publishes t/a old qos={sent} retain=1
                ann publishes t/a qos={sent} retain=1
                bob takes t/a old qos={sent}; takes t/a qos={sent}
                bob subscribes t/a qos={granted}
                bob takes t/a qos={min(sent, granted)} retain=1; quiet
                bob unsubscribes t/a""")
        self.plays("""
            ann publishes t/a -                     # not retained: no change
            bob subscribes t/+; takes t/a retain=1
            ann publishes t/a - retain=1
            bob takes t/a -; subscribes t/+; quiet""")

    def test_retained_comes_first(self):
        """Before what its subscriber says next, goodbye too."""
        self.plays("ann publishes t old qos=1 retain=1")
        bob = self.cast["bob"].send(subscribe(self.t), publish(self.t, b"mark"))
        bob.expect(ack(SUBACK, 9, 0)).takes(self.t, b"old", retain=1)
        self.plays("bob takes t mark \n cid joins session=0")
        self.cast["cid"].vanish(subscribe(self.t, qos=1), GOODBYE)
        self.plays("cid joins session=1; hears t old qos=1 retain=1 dup=1")

    def test_retained_more_than_its_budget(self):
        """Who reads slowly, but reads, gets all of them: at its own pace."""
        ann = self.cast["ann"]
        topics = [f"{self.t}/{n}" for n in range(200)]
        ann.send(*[publish(topic, bytes(60_000), retain=1) for topic in topics]).quiet()
        self.plays("bob subscribes t/# \n ann quiet")   # nobody waits for bob
        for topic in topics:
            self.cast["bob"].hears(topic, bytes(60_000), retain=1)

    def test_will(self):
        """[MQTT-3.1.2-8..17, 3.14.1-1, 3.14.4-3] At any end but a true goodbye."""
        ends = b"", publish(self.t)[:-1], connect(), publish("t", qos=3), b"\xe0\1\0"
        for qos, last in zip((0, 1, 2, 0, 1), ends):
            self.plays(f"bob subscribes t qos=2 \n eve joins will={qos}")
            self.cast["eve"].vanish(last)
            self.plays(f"bob takes t qos={qos}; quiet")
        self.plays("""
            eve joins will=0; leaves
            bob quiet
            eve joins will=0 retain=1; vanish
            bob takes t; subscribes t; takes t retain=1""")

    def test_keepalive(self):
        """[MQTT-3.1.2-24] Gone after 1.5 of it; half a packet is no sign of life."""
        began = time.monotonic()
        self.plays("""
            clock joins keep=1
            half joins keep=2
            dan joins keep=2
            clock closed""")        # 1.5 s have passed
        self.cast["half"].send(PING[:1])
        self.plays("dan quiet \n half closed")
        assert 2.9 < time.monotonic() - began < 4.4     # 4.5 had it been fed
        self.plays("dan quiet")


# ======================================================================================
# One conversation at each door
# ======================================================================================

RESERVE = {"op": "reserve", "id": "x-1", "car": "bob", "at": "A", "range": 50}


class Doors(Story):
    """MQTT for cars, TCP for the cloud and other brokers, HTTP for people."""
    SPOTS = dict(P1=1, P3=1, P5=1)
    TCP = """
        cloud   | {"op": "search", "broker": "server2"} | "station": "P5"
        server2 | {}                                    | "asked": ["server2"]
        server2 | {"range": 0.5}                        | "out of range", "retry": 60
        cloud   | {"op": "search", "broker": "server2"} | "asked": ["server3"]
        server2 | {"op": "status"}                      | "requests": {"local"
        cloud   | {"op": "city"}                        | "server3": {"broker":
        cloud   | {"op": "status"}                      | "error"
        server2 | {"op": "city"}                        | "error"
        server2 | {"at": "Z"}                           | "error"
        cloud   | {"op": "search", "broker": "x"}       | "error"
        cloud   | {"op": "search", "broker": "server2", "range": 0.1} | "out of range"
        """
    HTTP = """
        200 | POST /cars/ann/request   | {"at": "A", "range": 3, "id": "a-1"} | "a-1"
        200 | POST /cars/ann/request   | {"at": "A", "range": 3} | "station": "P1"
        503 | POST /cars/bob/request   | {"at": "A", "range": 3} | Retry-After: 5
        409 | POST /cars/bob/request   | {"at": "A", "range": 0} | "out of range"
        400 | POST /cars/bob/request   | {"at": "Z", "range": 0} | "request.at must be
        200 | GET /stations            |                         | {"P1": {"station":
        200 | GET /stations/P1         |                         | {"ann": "held"}
        200 | GET /status              |                         | "requests": {"local":
        200 | GET /city                |                         | {"cloud": true
        200 | GET /city                |                         | "server3": {"
        204 | DELETE /cars/ann/request |                         |
        """
    MISTAKES = """
        404 | GET /x                   | X: y                        | no such thing
        404 | GET /stations/P3         | X: y                        | of another broker
        404 | GET /cars/ann/request    | X: y                        | another method
        404 | DELETE /cars/ann/request | X: y                        | it has none
        501 | PUT /cars/ann/request    | X: y                        | of no use here
        400 | POST /cars/a%2Fb/request | Content-Length: 2           | no name
        400 | POST /cars/ann/request   | Content-Length: 1           | half a body
        400 | POST /cars/ann/request   | X: y                        | no length
        400 | POST /cars/ann/request   | Content-Length: -1          | nonsense
        413 | POST /cars/ann/request   | Content-Length: 65537       | too much
        413 | POST /cars/ann/request   | Content-Length: 99999999999 | far too much
        415 | POST /cars/ann/request   | Content-Type: text/plain    | of a web page
        400 | GET /status              | Host: evil.example:8081     | DNS rebinding
        400 | GET /status              | Host: [                     | no host
        200 | GET /status              | Host: LOCALHOST:99          | (a good one)
        200 | GET /status              | Host: [::1]:8081            | (another)
        """

    def setUp(self):
        self.addCleanup(self.city.rests)

    def test_mqtt(self):
        """A car and its broker, with no delay: 40 ms would be Nagle's algorithm."""
        ann = self.raw("server1", "mqtt", connect("ann")).expect(WELCOME)
        ann.subscribes("server1/cars/ann/reply")
        request = b'{"id": "a-1", "at": "A", "range": 50}'
        began = time.monotonic()
        for _ in range(30):
            ann.sends("server1/cars/ann/request", request)
            reply = ann.reply()
        assert time.monotonic() - began < 30 * 0.03
        self.assertEqual(reply, Shapes.GOOD["offer"] | {"km": 1})

    def test_tcp(self):
        """Many questions on one connection. The cloud searches from the asker's broker
        on; reserve asks one broker alone."""
        guests = {"cloud": self.raw("cloud", "port"),
                  "server2": self.raw("server2", "tcp")}
        for to, question, holds in rows(self.TCP):
            answer = guests[to].asks(RESERVE | json.loads(question))
            self.assertIn(holds, json.dumps(answer))

    def test_tcp_mistakes(self):
        """After what is no JSON object nothing is read, as it may come from a browser
        that somebody else's page has sent here; nor after too long a line."""
        post = b"POST / HTTP/1.1\r\n\r\n%s\n" % json.dumps(RESERVE).encode()
        assert self.raw("server1", "tcp").closed(post).count(b"\n") == 1
        assert self.raw("cloud", "port").closed(b" " * 65_537) == b""

    def test_http(self):
        for status, request, body, holds in rows(self.HTTP):
            found, headers, text = self.city.http(*request.split(), body)
            self.assertEqual(found, int(status), request)
            self.assertIn(holds, f"{headers}{text}")

    def test_http_mistakes(self):
        """The second request, which hides behind each of them, is never answered."""
        for status, request, header, why in rows(self.MISTAKES):
            text = (f"{request} HTTP/1.1\r\n{header}\r\nContent-Type: application/json"
                    "\r\n\r\n{}GET /y HTTP/1.1\r\n\r\n")
            answer = self.raw("server1", "http").closed(text.encode())
            self.assertRegex(answer, rf"HTTP/1.0 {status} ".encode(), why)
            assert answer.count(b"HTTP/1.0 ") == 1
            self.assertEqual(b'{"error": "' in answer, status != "200")

    def test_page(self):
        """It needs nothing from outside; what others wrote stays text."""
        page = self.city.http("GET", "/")[2]
        self.assertNotRegex(page, r"""(src|href|url)\W{0,3}(https?:)?//""")
        name = "<img src=x onerror=alert(1)>"
        state = {"car": name, "at": "A", "battery": 5, "doing": "going"}
        topic = f"server1/cars/{name}/state"
        evil = self.raw("server1", "mqtt", connect(name)).expect(WELCOME)
        evil.publishes(topic, json.dumps(state).encode())
        self.assertEqual(self.city.get("/cars"), {name: state})
        self.city.asks("ann")
        drawn = self.city.http("GET", "/map")[2]
        self.assertNotIn("<img", drawn)
        for part in "&lt;img", "P1 ■ 0 ▄ 1 □ 0", "»", 'news="All parts answer"':
            self.assertIn(part, drawn)

    def test_the_key(self):
        """Without it, or with another's proof of it, no door opens; with it all do."""
        self.runs("city", key="s3cret", P1=1, P3=1)     # its own parts come in with it
        with mock.patch.object(cloud_server, "KEY", "s3cret"):
            proof = cloud_server.mqtt_password("car1")
        for words, code in (("car1 car1 {}", 0), ("car1 car2 {}", 5),
                            ("car2 car2 {}", 5), ("car1 car1 s3cret", 5)):
            hello = connect(*words.format(proof).split(), flags=2 + 64 + 128)
            self.raw("server1", "mqtt", hello).expect(ack(CONNACK, code))
        for key in "", "secret", ["s3cret"], "\ud800", "s3cret":
            answer = self.raw("cloud", "port").asks({"op": "city", "key": key})
            assert (answer == {"error": "key"}) == (key != "s3cret")
        for status, proof in (
                (200, f"b{basic(':s3cret')[1:]}"), (401, basic("me:secret")),
                (401, basic("s3cret:")), (401, "Bearer s3cret"), (401, "\xff")):
            found, headers, _ = self.city.http("GET", "/", Authorization=proof)
            assert found == status
            self.assertEqual("WWW-Authenticate: Basic" in str(headers), status == 401)
        assert self.city.asks("ann").station == "P1"
        assert self.city.asks("bob").station == "P3"
        self.city.car("zoe").says("zoe .*full")
        self.assertNotIn("s3cret", str(self.city.parts))

    def test_rush_hour_a_taken_port_and_nobody_who_listens(self):
        rush = self.city.start("test_system.py", "rush", "--rush", 200)
        rush.says(r"refused +197 ", r"missing +0\b", r"double +0\b").ends(0)
        again = self.city.start("broker.py", "again").ends(2)
        self.assertRegex(str(again), r"\A.* port \d+.*\Z")
        line = f"timeout 1 {sys.executable} {HERE}/car.py --config {self.city.config}"
        for end in ">&-", "| head -n 1":
            told = subprocess.run(f"{line} {end}", shell=True, capture_output=True)
            assert told.stderr == b""


class Readme(Story):
    """What the README's tables promise is what the scripts have, and all of it."""
    TEXT = (HERE / "README.md").read_text("utf-8")

    def section(self, title):
        return self.TEXT.split(f"# {title}\n")[1].split("\n#")[0]

    def test_options(self):
        known = set()
        for script in "cloud_server", "broker", "station", "car", "test_system":
            told = subprocess.run([sys.executable, HERE / f"{script}.py", "--help"],
                                  capture_output=True, text=True, check=True).stdout
            known |= set(re.findall("--[a-z][a-z-]*", told))
        listed = re.findall("--[a-z][a-z-]*", self.section("Command lines"))
        self.assertEqual(set(listed), known)

    def test_who_decides_what(self):
        """Each function in the table is to be found in its file."""
        section = self.section("Who decides what")
        table = re.findall(r"\| `(\w+)\.py` \| `(.+)` \|", section)
        self.assertGreater(len(table), 15)
        for module, names in table:
            for name in names.split("`, `"):
                functools.reduce(getattr, name.split("."), sys.modules[module])


# ======================================================================================
# Anything may die: the drills
# ======================================================================================

@unittest.skipUnless(SIGNALS, "this system has no SIGKILL, SIGSTOP and SIGCONT")
class Drills(Story):
    """Each promise of the city, while its parts die, hang and come back.

    `ann gets P3 1.5 server1 server2`: she is offered P3 after 1.5 s and not much later,
    and these brokers were asked.
    """
    SILENT = [("mqtt", b""), ("mqtt", b"\x10"), ("mqtt", connect()[:-1]), ("http", b""),
              ("http", b"GET /x HTTP/1.1\r\n"), ("tcp", b""), ("tcp", b'{"op": ')]

    @classmethod
    def setUpClass(cls):
        """The demo takes 15 s, who says nothing is closed after 10: both begin now."""
        cls.demo = cls.begins_demo()
        cls.guests = City(P1=1)
        cls.addClassCleanup(cls.guests.end)
        cls.guests.begin()
        cls.patient = cls.guests.raw("server1", "tcp")
        cls.patient.asks({"op": "status"})
        cls.began = time.monotonic()
        cls.silent = [cls.guests.raw("server1", *how) for how in cls.SILENT]

    @staticmethod
    def begins_demo():
        return Part(sys.executable, HERE / "test_system.py", "--demo",
                    start_new_session=True)

    def gets(self, car, station, least="0", *asked, at="A", range=50):
        reply = self.city.asks(car, at, float(range))
        self.assertEqual(reply.station or "nothing", station, reply)
        assert float(least) <= reply.took < float(least) + SLACK, reply
        if asked:
            self.assertEqual(reply.asked, [*asked])

    def drives(self, car, **how):
        self.city.car(car, **how)

    def leaves(self, car):
        self.city.http("DELETE", f"/cars/{car}/request")

    def shows(self, station, **cars):
        self.city.shows(station, seconds=5, cars=cars)

    def is_offline(self, station):
        self.city.shows(station, seconds=SLACK, online=False)

    def test_the_next_broker_hangs_or_is_dead(self):
        self.plays("""
            city runs P1=1 P3=1 P5=4
            ann gets P1
            server2 freezes
            bob gets P5 1.5 server1 server2 server3
            cid gets P5 0 server1 server3           # who was silent is left out
            server2 dies
            cloud dies; comes_back; says listens
            dan gets P5 0 server1 server2 server3
            cloud says server2.*skipped:.*refused
            cloud dies
            eve gets P5""")
        assert not self.city.get("/city")["cloud"]
        self.assertIn("No answer from the cloud", self.city.http("GET", "/map")[2])

    def test_the_cloud_hangs(self):
        """Fifty wait for it, once; who can be served nearby does not notice."""
        self.plays("city runs P1=1 P3=1 \n cloud freezes")
        with concurrent.futures.ThreadPoolExecutor(50) as crowd:
            replies = crowd.map(lambda n: self.city.asks(f"c{n}", "C", 1.5), range(50))
            self.plays("ann gets P1 range=1.5 \n" * 9)
        assert len([*replies]) == 50
        assert len(self.city.get("/stations/P3", "server2")["cars"]) == 1
        self.plays("bob gets nothing at=C range=1.5 \n cloud thaws")

    def test_a_station_dies(self):
        """It remembers its cars; but if its broker dies, too, they must claim again."""
        self.plays("""
            city runs P1=1
            bob gets P1
            P1 dies; is_offline; comes_back; says serves:.0.of.1
            server1 dies; comes_back; says P1.*is.online
            P1 shows bob=held; dies
            server1 dies; comes_back; says serves
            P1 comes_back; says serves:.1.of.1
            zoe drives battery=5; says zoe-.*charging
            P1 dies
            server1 dies; comes_back
            P1 comes_back; shows zoe=charging
            P1 stop                                     # it needs no will
            server1 says P1.*said.goodbye""")

    def test_a_broker_stops_at_work(self):
        """And its station, which hung, after it."""
        self.plays("city runs P1=1 \n P1 freezes")
        line = json.dumps(RESERVE).encode() + b"\n"
        for _ in range(20):
            self.raw("server1", "tcp", line)
        self.city["server1"].says("x-1 asks").stop()

    def test_a_station_is_started_twice(self):
        """The older one ends: one line, exit status 2; no spot was promised twice."""
        self.plays("city runs P1=1 \n ann gets P1")
        older = self.city.parts["older"] = self.city["P1"]
        self.city.start("station.py", "P1", "P1")
        older.says("was started again").ends(2)
        self.plays("P1 says serves:.0.of.1 serves:.0.of.1 \n bob gets nothing")

    @unittest.skipUnless(MOSQUITTO, "there is no mosquitto to be found")
    def test_mosquitto_in_its_place(self):
        """One server for both brokers; it is killed and started again."""
        self.plays("""
            city runs mosquitto=1 P1=1 P3=1
            ann gets P1
            bob gets P3
            mosquitto dies
            P3 dies
            mosquitto comes_back; says running
            P1 says serves:.0.of
            server1 says connection.lost Success
            P3 is_offline
            cid gets nothing
            zoe drives; says full
            ann leaves
            P1 shows
            zoe says yes,.at.P1 zoe-.*charging""")

    def test_the_storm(self):
        """Thirty cars ask, while parts die, hang and come back: no spot is promised to
        two of them within a lease, and all are free at the end."""
        self.plays("city runs lease=2 P1=1 P2=2 P3=1 P4=2 P5=1 P6=2")
        storm = Storm(self.city)
        storm.rages()
        assert storm.promises > STORM       # or it has tested nothing
        self.city.shows(*self.city.spots, online=True, cars={})

    def test_with_noise_and_silence(self):
        """Random bytes at each door. Who says nothing whole is closed after 10 s."""
        dice = random.Random(SEED)
        noises = [dice.randbytes(dice.randrange(1, 300)) for _ in range(100)]
        noises += [b"GET /" + b"x" * 70_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500,
                   connect("e\nve") + noises[0]]
        for noise in noises:
            for door in "server1 mqtt", "server1 http", "server1 tcp", "cloud port":
                client = self.guests.raw(*door.split())
                with closing(client), suppress(OSError):    # it may hang up at once
                    client.vanish(noise)
        for line in self.guests["server1"].lines + self.guests["cloud"].lines:
            self.assertRegex(line, r"\A\d\d:\d\d:\d\d  ")       # one line per event
        for client in self.silent:
            left = self.began + 10 + SLACK - time.monotonic()
            client.socket.settimeout(max(0.1, left))
            client.closed()
            client.close()
        self.patient.asks({"op": "status"})     # who has asked has a minute
        self.patient.close()

    def test_zz_the_demo(self):
        """To its end; or until Ctrl-C, which reaches every process of it."""
        self.demo.says("Case 1", "Case 2", "Case 3", "All three cases")
        interrupted = self.begins_demo().says("car1 .* asks")
        os.killpg(interrupted.process.pid, signal.SIGINT)
        for demo in self.demo, interrupted:
            demo.ends(0, 5 + SLACK).check()
            with self.assertRaises(ProcessLookupError):     # no process is left
                os.killpg(demo.process.pid, 0)


class Storm:
    """Cars that ask, while in each region one part is away at a time. (A station and
    its broker that die together forget their spots.)

    `kept` is guarded by `lock`: the station where a car was promised a spot, and until
    when at least: for a lease from before it asked, or until it asks anew.
    """
    REGIONS = [["cloud"], ["server1", "P1", "P2"], ["server2", "P3", "P4"],
               ["server3", "P5", "P6"]]
    STRIKES = [(Part.dies, Part.comes_back), (Part.freezes, Part.thaws),
               (Part.check, Part.check)]

    def __init__(self, city):
        self.city = city
        self.dice = random.Random(SEED)
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.kept = {}
        self.promises = 0

    def rages(self):
        end = time.monotonic() + STORM
        with concurrent.futures.ThreadPoolExecutor(30) as pool:
            cars = [pool.submit(self.live, n) for n in range(30)]
            try:
                while time.monotonic() < end:
                    self.strikes()
            finally:
                self.over.set()
        for car in cars:
            car.result()

    def strikes(self):
        come_back = []
        for names in self.REGIONS:
            part = self.city[self.dice.choice(names)]
            strike, undo = self.dice.choice(self.STRIKES)
            strike(part)
            come_back.append((undo, part))
        enough = self.promises + self.dice.randrange(20)
        calm = time.monotonic() + 3 * self.dice.random()
        wait_until(lambda: self.promises > enough or time.monotonic() > calm, "a calm")
        for undo, part in come_back:
            undo(part)
        self.city.shows(*self.city.spots, online=True)

    def live(self, n):
        dice = random.Random(SEED + n)
        while not self.over.is_set():
            broker, places = dice.choice([*PLACES.items()])
            began = time.monotonic()
            with self.lock:
                self.kept.pop(n, None)
            with suppress(OSError, HTTPException):      # its broker is away, or dies
                reply = self.city.asks(f"storm{n}", dice.choice([*places]), to=broker)
                if reply.station:
                    self.note(n, reply.station, began + reply.lease)

    def note(self, n, station, until):
        with self.lock:
            self.promises += 1
            self.kept[n] = station, until
            here = [car for car, (where, end) in self.kept.items()
                    if where == station and end > time.monotonic()]
            assert len(here) <= self.city.spots[station], f"{station}: {here}"


def main():
    parser = argparse.ArgumentParser(description="The tests of the charging city.")
    parser.add_argument("--demo", action="store_true", help="the city, as a story")
    parser.add_argument("--rush", metavar="N", type=int,
                        help="N cars (at most 5000) ask the running city at once")
    parser.add_argument("--config", metavar="FILE", default=ring.SERVERS,
                        help="that city (servers.json beside the scripts)")
    args, rest = parser.parse_known_args()
    for stop in signal.SIGTERM, signal.SIGINT:      # a shell may have us ignore it
        signal.signal(stop, signal.default_int_handler)
    try:
        cloud_server.KEY = EV_KEY
        cloud_server.check_key()
        city = ring.load(args.config)
    except ring.Invalid as fault:
        cloud_server.give_up(fault)
    if args.rush is not None:
        if not 1 <= args.rush <= 5000:
            parser.error("--rush takes 1 to 5000 cars")
        sys.exit(run_rush(city, args.rush))
    cloud_server.KEY = ""               # the others have a city of their own
    if args.demo:
        with cloud_server.until_stopped():
            run_demo()
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
