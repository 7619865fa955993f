"""The tests: short stories about the city, from its smallest part to all of it.

    python3 test_system.py                    all of it
    python3 -m unittest test_system.Drills    a chapter; -v: each story; -k WORD: some
    STORM=60 SEED=7 python3 test_system.py    the storm for a minute, with these numbers
    python3 test_system.py --demo             the whole city in one terminal, as a story
    python3 test_system.py --rush 1000        rush hour in the city that runs

Nothing sleeps: a test waits until something is so, and fails when its deadline is over,
SLACK later than the city promises. Most stories are texts: a title with a *, and below
it who does what -> and what comes of it. `P1 dies; shows x k=1` are two steps of P1:
dies(), a method of its own, and shows("P1", "x", k=1) of the chapter or the city. After
>>> comes Python, or an assert; each line by itself, so keep what you need in self.NAME.

Read next: the story that interests you. Left out on purpose: how fast things are.
"""

import argparse
import asyncio
import atexit
import base64
import collections
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
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

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
    print(f"random numbers of this run: SEED={SEED}", file=sys.stderr)
    cloud_server.KEY = broker.KEY = ""      # the city of these tests has open doors
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # so its parts end, too
    logging.disable()       # the parts of these tests tell their stories to nobody
    threading.excepthook = threading.__excepthook__     # nor does a fault end us all


def wait_until(condition, what, seconds=DEADLINE):
    end = time.monotonic() + seconds
    while True:
        with suppress(ConnectionError):     # whom it asks is not up yet
            if found := condition():
                return found
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


# --- Stories --------------------------------------------------------------------------
def rows(table):
    """The rows of a table of cases: lists of cells."""
    return [re.split(r"\s*\|\s*", line.strip()) for line in table.strip().splitlines()]


def stories(text):
    """[title, its lines] of each story in a text."""
    return [story.partition("\n")[::2] for story in re.split(r"(?m)^ *\* ", text)[1:]]


def meaning(word):
    """A number, or another value of JSON, or the word itself."""
    with suppress(ValueError):
        return json.loads(word)
    return word


class Story(unittest.TestCase):
    """A chapter: each story of its text is a test, in a city of its own, which stands
    behind its title (P1=1: that is all of it)."""
    STORIES = ""
    city = None

    def __init_subclass__(cls):
        for heading, lines in stories(cls.STORIES):
            title, _, city = heading.partition(" | ")
            name = "_".join(re.findall(r"\w+", title.lower()))
            story = f"city begins {city or 'P1=1'}\n{lines}"
            skips = unittest.skipIf("mosquitto" in city and not MOSQUITTO, "not found")
            test = skips(lambda self, story=story: self.plays(story))
            setattr(cls, f"test_{name:.60}", test)

    def begins(self, _="city", **how):
        self.city = City(**how)
        self.cast = self.city.cast
        self.addCleanup(self.city.end)
        self.city.begin()

    def plays(self, story):
        for line in story.strip().splitlines():
            told, _, _ = line.strip().partition(" # ")
            try:
                if told.startswith(("assert ", ">>> ")):
                    exec(told.removeprefix(">>> "), globals(), {"self": self})
                else:
                    self.play_line(told)
            except Exception as fault:
                raise AssertionError(f"{told}\n{fault!r}") from None

    def play_line(self, told):
        for sentence in told.split(" -> "):
            who, _, steps = sentence.partition(" ")
            for step in steps.split(";"):
                verb, *words = step.split()
                act = getattr(self, verb, getattr(self.city, verb, None))
                if act:
                    words.insert(0, who)
                else:
                    act = getattr(self.cast[who], verb)
                named = [word.split("=") for word in words if "=" in word]
                act(*[meaning(word) for word in words if "=" not in word],
                    **{key: meaning(word) for key, word in named})

    def patch(self, *where):
        patch = mock.patch.object(*where)
        patch.start()
        self.addCleanup(patch.stop)

    def has_clock(self, *modules):      # one that only this test moves
        self.clock = Clock()
        for module in modules:
            self.patch(module, "monotonic", lambda: self.clock.now)


class Clock:
    """Lets one thread run at a time, the one whose time has come. So minutes are over
    at once, and all goes the same way each time."""
    def __init__(self):
        self.now = 1000.0
        self.turns = {}         # of each thread that waits: an Event, and when

    def wait(self, seconds):
        turn = threading.Event()
        self.turns[turn] = self.now + seconds
        self.pass_on()
        turn.wait()

    def pass_on(self):
        turn = min(self.turns, key=self.turns.get)      # of equal ones the first
        self.now = self.turns.pop(turn)
        turn.set()

    def run(self, life):
        def body():
            turn.wait()
            try:
                life()
            finally:
                self.pass_on()
        turn = threading.Event()
        self.turns[turn] = self.now
        threading.Thread(target=body, daemon=True).start()


# --- A city of real processes ---------------------------------------------------------
class Part:
    """A process, and the lines that it has told so far."""
    def __init__(self, *command, **how):
        self.command = [*map(str, command)]
        self.how = {"errors": "replace"} | how      # as text, whatever it writes
        self.said = ""
        atexit.register(self.erase)     # whatever happens to the tests
        self.comes_back()

    def comes_back(self):
        self.read = len(self.said)      # what it said before counts no more
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self.how)
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self):
        with self.process.stdout as output:
            for line in output:
                self.said += line
                logging.info(line.rstrip())     # which the demo shows

    def says(self, *patterns):
        """Wait until it has said these, one after the other, after what came before."""
        for pattern in patterns:
            line = re.compile(f"{pattern}.*", re.MULTILINE)
            got = wait_until(lambda: line.search(self.said, self.read), (pattern, self))
            self.read = got.end()
        return self

    __repr__ = lambda self: self.said       # in the message of a failed test

    def ends(self, status, seconds=DEADLINE):
        found = self.process.wait(seconds)
        self.listener.join()
        assert found == status and "Traceback" not in self.said, (found, self)

    def dies(self):
        self.process.kill()         # as by a power cut: no goodbye, no clean-up
        self.ends(-signal.SIGKILL)

    def freezes(self):
        self.process.send_signal(signal.SIGSTOP)        # its connections stay open
        os.waitpid(self.process.pid, os.WUNTRACED)      # until it does stand still

    def thaws(self):
        self.process.send_signal(signal.SIGCONT)

    def stop(self):         # as a user does: it ends at once, with exit status 0
        if self.process.returncode is None:     # it did not end in its story
            assert self.process.poll() is None, f"has ended: {self}"
            self.thaws()
            self.process.send_signal(random.choice([signal.SIGTERM, signal.SIGINT]))
            self.ends(0, 2 + SLACK)

    def erase(self):
        self.process.terminate()        # the demo ends its own parts
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()


#   P2            P4            P6          from A to P1 1 km, P2 2 km, P3 6 km,
#   |             |             |           P4 8 km, P5 11 km, P6 14 km
#   A--P1 . . . . C--P3 . . . . E--P5 . . . . F . . . . . . . . G
#   (the dotted roads from A to C, E, F and G are 5, 5, 30 and 70 km long)
PLACES = {"server1": {"A": [0, 0], "P1": [1, 0], "P2": [0, 2]},
          "server2": {"C": [5, 0], "P3": [6, 0], "P4": [5, 3]},
          "server3": {"E": [10, 0], "P5": [11, 0], "P6": [10, 4],
                      "F": [40, 0], "G": [110, 0]}}
ROADS = [*map(str.split, "A P1,A P2,A C,C P3,C P4,C E,E P5,E P6,E F,F G".split(","))]


def is_free(port):
    with suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True


def describe(ports=range(5000, 5010), **spots):
    """A servers.json with these stations (P1=2: two spots), and their brokers."""
    cloud, *ports = ports
    brokers = [name for name, places in PLACES.items() if places.keys() & spots]
    places = {place: {"at": at, "broker": name}
              for name in brokers for place, at in PLACES[name].items()}
    for place, count in spots.items():
        places[place]["spots"] = count
    return {"cloud": {"host": "127.0.0.1", "port": cloud},
            "brokers": [{"name": name, "host": "127.0.0.1", "mqtt": ports.pop(),
                         "http": ports.pop(), "tcp": ports.pop()} for name in brokers],
            "places": places,
            "roads": [road for road in ROADS if places.keys() >= {*road}]}


class City:
    """A cloud, brokers and stations that run, each in its own process (its cast)."""
    def __init__(self, key="", mosquitto=False, **spots):
        self.key = key
        self.options = ["--external-mqtt"] if mosquitto else []
        self.spots = spots
        first = 10_000 + os.getpid() % 200 * 100    # no other process of ours has these
        ports = random.sample(range(first, first + 100), 20)    # outgoing: higher ones
        self.file = describe(filter(is_free, ports), **spots)
        self.brokers = {entry["name"]: entry for entry in self.file["brokers"]}
        if mosquitto:           # one MQTT server for both brokers
            self.brokers["server2"]["mqtt"] = self.brokers["server1"]["mqtt"]
        self.cast = {}
        self.leftovers = ExitStack()
        folder = self.leftovers.enter_context(tempfile.TemporaryDirectory())
        self.config = Path(folder, "servers.json")
        self.config.write_text(json.dumps(self.file))

    def begin(self):
        if self.options:
            port = self.brokers["server1"]["mqtt"]
            self.cast["mosquitto"] = Part(MOSQUITTO, "-p", port).says("running")
        self.start("cloud_server.py", "cloud")
        for part in [self.start("broker.py", name, name, *self.options)
                     for name in self.brokers]:
            part.says("serves")
        for name in self.spots:
            self.start("station.py", name, name)
        for name in self.spots:
            self.shows(name)

    def start(self, script, name, *options):
        self.cast[name] = Part(sys.executable, HERE / script, *options, "--config",
                               self.config, env=os.environ | {"EV_KEY": self.key})
        return self.cast[name]

    def end(self):          # each part at once, when it is told to; the cloud last
        with self.leftovers:
            for part in reversed(self.cast.values()):
                part.stop()

    def raw(self, door, *packets):      # the door: `server1 tcp`, say, or `cloud port`
        to, name = door.split()
        address = "127.0.0.1", (self.brokers | self.file)[to][name]
        connection = socket.create_connection(address, DEADLINE)
        return RawClient(self.leftovers.enter_context(connection), *packets)

    def http(self, request, body="", header="X: y", to="server1"):
        """The whole answer, as it came. A second request hides behind each one."""
        token = base64.b64encode(f"me:{self.key}".encode()).decode()
        if body:
            header += f"\r\nContent-Length: {len(body)}"
        words = [f"{request} HTTP/1.1", header, f"Authorization: Basic {token}",
                 "Content-Type: application/json", "", f"{body}GET /x HTTP/1.1", "", ""]
        return self.raw(f"{to} http").closed("\r\n".join(words).encode()).decode()

    def get(self, request, body="", to="server1"):
        return json.loads(self.http(request, body, to=to).partition("\r\n\r\n")[2])

    def state(self, station):       # ["bob-held", ...], or ["offline"]
        to = self.file["places"][station]["broker"]
        state = self.get(f"GET /stations/{station}", to=to)
        cars = [f"{car}-{use}" for car, use in state["cars"].items()]
        return cars if state["online"] else ["offline"]

    def drives(self, name, at="A", battery=20, speed=20, charges=9):
        self.start("car.py", name, name, "--at", at, "--battery", battery, "--speed",
                   speed, "--charges", charges)

    def leaves(self, car):
        for to in self.brokers:
            self.http(f"DELETE /cars/{car}/request", to=to)

    def shows(self, station, *state):
        seconds = SLACK if "offline" in state else DEADLINE     # a will comes at once
        wait_until(lambda: self.state(station) == [*state], (station, state), seconds)

    def gives_back(self):       # returns whether there was nothing, all stations up
        found = [state for station in self.spots for state in self.state(station)]
        for state in found:
            self.leaves(state.rpartition("-")[0])
        return not found


# --- MQTT by hand: bytes, and one end of a connection ---------------------------------
def text(value):
    return broker.pack(len(value.encode())) + value.encode()


def connect(id="", *fields, flags=2, keep=0):
    """flags: user 128, password 64, retain 32, QoS 16 and 8, will 4, clean session 2"""
    return broker.encode(broker.CONNECT, text("MQTT"), bytes([4, flags]),
                         broker.pack(keep), *map(text, [id, *fields]))


def publish(topic, payload="x", qos=0, retain=0, dup=0, id=1):
    """The payload `-` is an empty one."""
    if isinstance(payload, str):
        payload = payload.strip("-").encode()
    return broker.encode(broker.PUBLISH + 8 * dup + 2 * qos + retain, text(topic),
                         broker.pack(id) if qos else b"", payload)


def ack(kind, id, *codes):
    """In CONNACK session present * 256 + return code stand in the place of the id."""
    return broker.encode(getattr(broker, kind), broker.pack(id), bytes(codes))


def subscribe(*filters, qos=0):
    return ack("SUBSCRIBE", 9, *b"".join(text(name) + bytes([qos]) for name in filters))


PING, PONG = broker.encode(broker.PINGREQ), broker.encode(broker.PINGRESP)
WELCOME = ack("CONNACK", 0)
HANDSHAKE = [[], ["PUBACK"], ["PUBREC", "PUBREL", "PUBCOMP"]]   # in turns, by QoS


class RawClient:
    """A connection, byte by byte, over a socket or a Wire. That nothing comes is shown
    by a ping: it would come before the answer to that."""
    def __init__(self, connection, *first):
        self.socket = connection
        self.buffer = bytearray()
        self.messages = []  # that came, and nobody has looked at them yet
        self.others = []    # and other packets
        self.ids = []       # the packet ids of the messages that were heard
        self.send(*first)

    def send(self, *packets):
        self.socket.sendall(b"".join(packets))
        return self

    def receive(self):
        data = self.socket.recv(100_000)
        self.buffer += data
        return data != b""

    def closed(self, *last):
        """After this the server closes; returns what it said before."""
        with suppress(ConnectionError):     # it left bytes of ours unread
            self.send(*last)
            while self.receive():
                pass
        self.socket.close()
        return bytes(self.buffer)

    def vanish(self, *last):        # until the server has closed its end, too
        self.send(*last).socket.shutdown(socket.SHUT_WR)
        self.closed()

    def goes(self):
        self.vanish(broker.encode(broker.DISCONNECT))

    def asks(self, request):
        self.send(json.dumps(request).encode() + b"\n")
        return json.loads(self.socket.makefile("rb").readline())

    def packet(self, among):
        """The next one among the messages, or among the others."""
        while not among:
            packet = broker.take_packet(self.buffer)
            if packet is None:
                assert self.receive(), "the server has closed the connection"
            else:
                packet.bytes = broker.encode(packet.first, packet.getvalue())
                box = self.messages if packet.first in broker.PUBLISHES else self.others
                box.append(packet)
        return among.pop(0)

    def expect(self, *packets):     # in this order; messages may come between them
        for expected in packets:
            got = self.packet(self.others).bytes
            assert got == expected, f"{got}, not {expected}"
        return self

    def hears(self, topic, payload="x", qos=0, retain=0, dup=0, again=0):
        """This is the next message. again=2: the one before the last one had its id."""
        got = self.packet(self.messages)
        got.topic()
        self.ids.append(got.number() if qos else 0)
        expected = publish(topic, payload, qos, retain, dup, self.ids[-1])
        assert got.bytes == expected, f"heard {got.bytes}"[:300]
        assert not again or self.ids[-1] == self.ids[-1 - again], "not the old id"

    def takes(self, topic, payload="x", qos=0, retain=0):
        self.hears(topic, payload, qos, retain)
        for kind, act in zip(HANDSHAKE[qos], itertools.cycle([self.gives, self.gets])):
            act(kind)

    def publishes(self, *words, qos=0, **flags):
        self.sends(*words, qos=qos, **flags)
        for kind, act in zip(HANDSHAKE[qos], itertools.cycle([self.gets, self.gives])):
            act(kind, 1)
        self.send(PING).expect(PONG)

    def sends(self, *words, **flags):
        self.send(publish(*words, **flags))

    def gives(self, kind, id=0):        # without an id: for the last one that it heard
        self.send(ack(kind, id or self.ids[-1]))

    def gets(self, kind, id=0):
        self.expect(ack(kind, id or self.ids[-1]))

    def subscribes(self, name, qos=0):
        return self.send(subscribe(name, qos=qos)).expect(ack("SUBACK", 9, qos))

    def unsubscribes(self, name):
        self.send(ack("UNSUBSCRIBE", 9, *text(name))).expect(ack("UNSUBACK", 9))

    def quiet(self):        # the server lives, and had nothing more to say
        self.send(PING).expect(PONG)
        assert not self.messages, f"unexpected: {self.messages[0].bytes}"[:300]


# --- The demo, and rush hour ----------------------------------------------------------
DEMO = """
    >>> logging.info("=== A cloud, a ring of brokers, three stations with a spot each")
    city begins P1=1 P3=1 P5=1
    >>> logging.info("=== Case 1: car1 asks server1, which has a free spot")
    car1 drives speed=4 charges=1 -> P1 says <-.car1.*charging
    >>> logging.info("=== Case 2: server1 is full, and car2 takes the spot of server2")
    car2 drives at=C speed=4 charges=1 -> P3 says <-.car2.*charging
    >>> logging.info("=== ... so car3, which asks server1, is sent on to server3")
    car3 drives battery=24 speed=4 charges=1
    cloud says ->.server2.+car3- -> P5 says <-.car3.*charging
    >>> logging.info("=== Case 3: no spot is free, so car4 waits until car1 leaves")
    car4 drives speed=4 charges=1; says full
    P1 says <-.car1.*leaves <-.car4.*charging -> car1 ends 0
    >>> logging.info("=== All three cases happened.")
    """


def rush(city, count):
    """So many cars ask the running city at once, each at the end of a connection."""
    ready = selectors.DefaultSelector()
    requests = {}       # by car; their spots are free again when the leases end
    for n in range(count):
        place = random.choice([*city.places])
        node = city.broker_of(place)
        name = f"rush{SEED}-{n}"
        topic = f"{node.name}/cars/{name}"
        client = RawClient(socket.create_connection((node.host, node.mqtt), DEADLINE))
        client.send(connect(name, name, cloud_server.mqtt_password(name), flags=194))
        client.expect(WELCOME).subscribes(f"{topic}/reply")
        ready.register(client.socket, selectors.EVENT_READ, client)
        wish = {"id": name, "at": place, "range": 60}
        requests[client] = publish(f"{topic}/request", json.dumps(wish))
    began = time.monotonic()
    for client, request in requests.items():
        client.send(request)
    took = {}           # by car: the s until its reply
    while len(took) < count and time.monotonic() < began + 9 + SLACK:
        for key, _ in ready.select(0.1):
            key.data.receive()
            took.setdefault(key.data, time.monotonic() - began)
    return report(city, requests, took)


def report(city, clients, took):
    """Exit status 1: a reply is late, missing or double, or a spot was given twice."""
    table = collections.defaultdict(list)       # the ms of each row
    offers = collections.Counter()
    for client in clients:
        client.send(PING).expect(PONG)      # so what is late, or double, has come
        row = "late, missing, double"
        if len(client.messages) == 1 and took.get(client, 10) < 9:
            client.messages[0].topic()     # the reply stands behind it
            reply = json.load(client.messages[0])
            name = reply["station"]
            offers[name] += 1
            if name is None:
                row = "refused"
            elif offers[name] <= city.places[name]["spots"]:
                row = "round the ring" if reply["asked"][1:] else "by its own broker"
        table[row].append(1000 * took.get(client, math.inf))
        client.goes()
    print(f"{'':24}{'cars':>6}{'median':>12}{'99 %':>12}{'slowest':>12}")
    for row, ms in sorted(table.items()):
        ms.sort()
        marks = ms[len(ms) // 2], ms[len(ms) * 99 // 100], ms[-1]
        print(f"{row:24}{len(ms):6}", *(f"{mark:8.1f} ms" for mark in marks))
    seconds = max(took.values(), default=math.inf)
    print(f"{len(took)} replies in {seconds:.2f} s: {len(took) / seconds:.0f} a second")
    return int("late, missing, double" in table)


# --- One function or object at a time -------------------------------------------------
class Ring(Story):
    """ring.py and cloud_server.py: what fits, the roads, bad starts, and hung parts."""
    MAP = ring.City(describe(P1=2, P3=1))
    # Good texts. Below each: what stands there | what makes it bad instead | why.
    TEXTS = """
        * request {"id": "a-1", "car": "ann", "at": "A", "range": 0}
            "a-1" | ""; "a\\nb"; "\\ud800"; "LONG" | empty; two lines; half a letter
            "ann" | "a/b"; "a+"; ["a"]; "LONG" | two levels of a topic; a wildcard
            0     | -1; NaN; true; "5"; DEEP; DIGITS | no number of km; Python's traps
        * offer {"id": "a-1", "station": "P1", "broker": "server1", "km": 2.5, \
            "route": ["A"], "lease": 15, "asked": ["server1"]}
            "a-1" | "a-2"                   | to another request
            15    | 0                       | a spot for no time
            "P1"  | "P3"                    | not a station of that broker
            ["A"] | ["A", 5]; "A"; ["Z"]    | no name; no list; off the map
        * file CITY
            "cloud": | "Cloud":; "cloud": 5, "Cloud":; "cloud": 5, "cloud": | no cloud
            127.0.0.1           | a..b      | not a host name
            5008                | 65536     | not a port
            server2             | server1; P1   | a name given twice
            "broker": "server1" | "broker": "server9"   | an unknown broker
            "places": { | "places": {"P/": {"at": [0,0], "broker": "server1"}, | no name
            "spots": 2          | "spots": 0; "spots": 201; "spots": 2.0 | not 1 to 200
            [1, 0]              | [1, 0, 0]; [1, Infinity] | three coordinates; too far
            ["A", "P1"]         | ["A", "Z"]; ["A", "A"]; ["A", "P1", "A"] | not two
        """.replace("LONG", 65 * "n").replace("DEEP", 20_000 * "[").replace(
            "DIGITS", 5_000 * "9").replace("CITY", json.dumps(describe(P1=2, P3=1)))
    SCRIPTS = r"""
        cloud_server.py --config none.json | ""       | none.json: .*No such
        broker.py server1 server9          | ""       | servers.json: .*server9
        car.py --at Z                      | ""       | 'Z'
        car.py a/b                         | ""       | a/b
        car.py P1                          | ""       | P1
        car.py server1                     | ""       | server1
        station.py                         | "\udcff" | EV_KEY is not UTF-8
        car.py                             | "\t "    | EV_KEY
        """

    def reads(self, kind, words):
        if kind == "file":
            self.patch(ring.Path, "read_bytes", lambda path: words.encode())
            return ring.load("servers.json")
        value = ring.read_json(words.encode())
        if kind == "offer":
            return cloud_server.read_reply(self.MAP, value, "a-1")
        return cloud_server.read_request(self.MAP, value)

    def test_what_fits_and_what_does_not(self):
        """What is not asked for is dropped. The fault is told in one line."""
        for title, mistakes in stories(self.TEXTS):
            kind, good = title.split(" ", 1)
            found = self.reads(kind, good.replace("{", '{"x": [{}], ', 1))
            assert kind == "file" or found == json.loads(good), found
            bad = [(old, new, why) for old, them, why in rows(mistakes)
                   for new in them.split("; ")]
            for old, new, why in bad:
                with self.assertRaisesRegex(ring.Invalid, r"\A.+\Z", msg=why):
                    self.reads(kind, good.replace(old, new))
        # So a station's state fits into a packet, with 200 names of 64 characters.
        self.assertEqual(ring.to_json("\u00e9\ud800"), b'"\xc3\xa9?"')

    def test_the_shortest_way_by_road(self):
        """From P4 to A by P1, though C is nearer. P4, A and C are no stations."""
        city = describe(P1=1, P2=1, P3=1)
        city["roads"].append(["P1", "P4"])
        ways = ring.City(city).ways("P4").values()
        self.assertEqual([f"{way.km:g} {'-'.join(way.route)}" for way in ways],
                         ["4 P4-C-P3", "5 P4-P1", "8 P4-P1-A-P2"])

    def test_exit_status_2_and_a_line_that_names_the_fault_but_1_for_a_bug(self):
        city = City(P1=2, P3=1)     # only its file: nobody starts
        self.addCleanup(city.end)
        for words, key, fault in rows(self.SCRIPTS):
            script, *options = words.split()
            end = subprocess.run(
                [sys.executable, HERE / script, "--config", city.config, *options],
                text=True, capture_output=True, timeout=DEADLINE,
                env=os.environ | {"EV_KEY": json.loads(key)})
            self.assertEqual((end.returncode, end.stdout), (2, ""), words)
            self.assertRegex(end.stderr, rf"\A.*{fault}.*\n\Z")
        bug = "import car; car.Car.live = lambda car: {}['bug']; car.main()"
        end = subprocess.run([sys.executable, "-c", bug], cwd=HERE, timeout=DEADLINE,
                             capture_output=True)
        assert end.returncode == 1 and b"KeyError: 'bug'" in end.stderr, end

    def test_an_open_door_is_told_of(self):
        tell = mock.Mock()
        for host, warnings in ("127.0.0.1", 0), ("0.0.0.0", 1):
            with cloud_server.listening(host, 1, tell):
                self.assertEqual(tell.call_count, warnings)

    def test_seven_of_nine_brokers_hang(self):
        """Who asks every 5 s finds the spot behind them; no walk takes over 3.5 s."""
        self.has_clock(ring, cloud_server)
        self.patch(cloud_server, "read_reply", lambda *answer: {"station": "P1"})
        nodes = ring.link([ring.Broker(f"b{n}", "", 0, 0, n) for n in range(1, 10)])
        cloud = cloud_server.Cloud(self.MAP, mock.Mock())

        def exchange(address, request, seconds):
            if address == nodes["b9"].address:
                return b"{}"
            self.clock.now += seconds
            raise TimeoutError
        cloud.caller.exchange = exchange
        for asked in "b2 b3 b4", "b5 b6 b7", "b2 b3 b4", "b5 b6 b7", "b8 b9":
            reply = cloud.walk_ring({"id": "a-1", "car": "ann"}, nodes["b1"])
            self.assertEqual(reply["asked"], asked.split())
            self.clock.now += 5
        self.assertEqual([reply["station"], self.clock.now], ["P1", 1040.5])
        together = threading.Barrier(2)     # a look at the city asks all at once
        cloud.caller.ask = lambda *question: together.wait(DEADLINE)
        assert len(cloud.do_city()["brokers"]) == 2

    def test_left_out_for_longer_each_time_until_it_answers(self):
        self.has_clock(cloud_server)
        caller = cloud_server.Caller()
        hangs = TimeoutError
        for does, seconds, pause in (
                (ConnectionRefusedError, 1, 0), (hangs, 0.4, 0),    # too short to tell
                (hangs, 1, 10), (hangs, 1, 20), (hangs, 1, 40), (hangs, 1, 80),
                (hangs, 1, 80), ([b'{"error": "key"}'], 1, 0), (hangs, 1, 10)):
            caller.exchange = mock.Mock(side_effect=does)
            with self.assertRaises(ring.Invalid):
                caller.ask("x", {}, seconds)
            for _ in range(pause):
                assert caller.breaker.is_open("x"), (does, pause)
                caller.breaker.failed("x")      # others waited, too: that is one time
                self.clock.now += 1
            assert not caller.breaker.is_open("x"), (does, pause)


# --- One part at a time, in a city without processes ----------------------------------
class Line(mock.Mock):
    """The connection of its `owner`, in the place of paho's client."""
    def connect(self, *address):
        self.broker = self.city.cast[self.owner].broker.name
        if self.broker in self.city.down:
            raise ConnectionRefusedError("down")

    def loop(self, seconds):
        self.city.clock.wait(seconds)
        while self.owner in self.city.down:
            self.city.clock.wait(seconds)
        if self.broker in self.city.down:
            return station.paho.MQTT_ERR_CONN_LOST
        if self.inbox:                  # one at a time, as paho does
            self.on_message(self, None, self.inbox.pop(0))
        return station.paho.MQTT_ERR_SUCCESS

    def subscribe(self, name, qos):
        self.city.server.tree.add(name, self, qos)
        self.inbox += [message for topic, message in self.city.server.retained.items()
                       if station.paho.topic_matches_sub(name, topic)]

    def unsubscribe(self, name):
        self.city.server.tree.remove(name, self)

    def deliver(self, message, qos):
        self.inbox.append(message)
        return 0


class Wire(mock.Mock):
    """A connection: our socket, and the transport that the server writes to."""
    def opens(self, city):
        self.city = city
        self.came = bytearray()
        self.is_over = False
        self.is_read = True         # by the server; else what we send would wait
        self.get_extra_info().fileno.return_value = 9
        self.pause_reading = lambda: setattr(self, "is_read", False)
        self.resume_reading = lambda: setattr(self, "is_read", True)
        self.is_reading = lambda: self.is_read
        self.is_closing = lambda: self.is_over
        self.abort = lambda: setattr(self, "is_over", True)
        self.get_write_buffer_size = lambda: len(self.came)
        self.shutdown = lambda how: self.server.connection_lost(None)
        self.server = broker.Connection(city.server)
        self.server.connection_made(self)
        return self

    def write(self, data):
        self.came += data
        if len(self.came) > self.set_write_buffer_limits.call_args.args[0]:
            self.server.pause_writing()

    def sendall(self, data):
        self.server.data_received(data)
        self.city.clock.wait(0.05)

    def recv(self, count):
        end = self.city.clock.now + DEADLINE
        while not self.came and not self.is_over:
            assert self.city.clock.now < end, "nothing came, and it is not closed"
            self.city.clock.wait(0.01)
        found, self.came = self.came, bytearray()
        if self.server.is_blocked:
            self.server.resume_writing()
        return found


class Simulation(Story):
    """Real fog nodes, stations and cars around a real MQTT server. Network and time are
    ours: a message takes 0.1 s. It is noted in short, as one word: `claim:P5:held`."""
    def begins(self, _="city", **spots):
        self.map = ring.City(describe(**spots))
        self.waits = lambda who, seconds: self.clock.wait(seconds)  # all others, too
        self.cast = {}
        self.down = set()       # brokers that do not run; stations and cars that hang
        self.dies = self.freezes = self.down.add
        self.comes_back = self.thaws = self.down.remove
        self.said = collections.defaultdict(dict)   # who: {what: in which seconds after
        self.began = 0.0                            # a car has last set out, or asked}
        self.has_clock(station, car, cloud_server, broker)
        self.patch(station, "sleep", self.clock.wait)
        self.patch(station, "mqtt_client", lambda name: Line(
            city=self, owner=name, inbox=[], publish=self.server.publish))
        self.patch(car.random, "choice", lambda roads: roads[-1])
        self.patch(cloud_server, "crew", mock.Mock())
        self.loop = asyncio.new_event_loop()
        self.loop.time = lambda: self.clock.now
        self.loop.set_exception_handler(mock.Mock())
        self.loop.run_in_executor = mock.AsyncMock(side_effect=lambda crew, ask, wish:
            cloud_server.refusal(wish["id"], "full", ["server2"]))  # nobody has a spot
        self.loop.run_until_complete(self.open())
        self.clock.run(self.serve)
        self.addCleanup(self.end)

    async def open(self):
        names = {*self.map.ring}
        self.server = broker.MqttServer(names, {"server1/state"}, mock.Mock())
        self.server.subscribe_inside("+/+/+/#", self)
        self.server.watch()
        self.fogs = {name: broker.Fog(name, self.map, mock.Mock()) for name in names}
        for fog in self.fogs.values():
            fog.attach(self.server)
        self.fog = self.fogs["server1"]

    def serve(self):
        while not self.loop.is_closed():
            self.loop.stop()            # after one round
            self.loop.run_forever()
            self.clock.wait(0.01)

    def end(self):
        self.down.clear()
        for part in self.cast.values():
            part.is_stopping = True
        self.clock.wait(10)     # so every request has its reply
        self.loop.close()
        self.clock.wait(0.1)
        self.loop.get_exception_handler().assert_not_called()

    def deliver(self, message, qos):
        _, _, who, *what = message.topic.split("/")
        value = meaning(message.payload or "{}")
        if isinstance(value, dict):
            keys = "cars", "reason", "station", "use", "ok", "at"
            value = [value[key] for key in keys if key in value][:1]
        what.append(re.sub(r"\W+", "-", str(value)).strip("-"))
        seconds = self.said[who].setdefault(":".join(what).rstrip(":"), [])
        seconds.append(str(int(self.clock.now - self.began)))
        return 0

    def joins(self, name, session=None, will=None, retain=0, keep=0):
        """session: None a clean one; 0 or 1 one that stays, and was there or not. will:
        the QoS of "x" to t. cid' is a second connection of cid."""
        flags = 2 * (session is None)
        fields = [name.rstrip("'")]
        if will is not None:
            flags += 4 + 8 * will + 32 * retain
            fields += ["t", "x"]
        client = RawClient(Wire().opens(self), connect(*fields, flags=flags, keep=keep))
        client.expect(ack("CONNACK", 256 * (session or 0)))
        client.ids = self.cast.get(name, client).ids
        self.cast[name] = client
        return client

    def says(self, who, *expected, about=""):
        """Just that, of these verbs and of `about`; with @, in these seconds."""
        self.clock.wait(0.3)
        verbs = {re.split("[:@]", word)[0] for word in (*expected, about)}
        said = {what: seconds for what, seconds in self.said.pop(who, {}).items()
                if what.split(":")[0] in verbs}
        if "@" in str(expected):
            said = [f"{what}@{','.join(said[what])}" for what in said]
        self.assertEqual([*said], [*expected])

    def tells(self, who, what, value={}, retain=False):
        topic = f"server1/{'stations' if who[0] == 'P' else 'cars'}/{who}/{what}"
        self.server.publish(topic, ring.to_json(value), 1, retain)

    def claims(self, car, name, use, retain=False, **id):
        self.tells(car, f"claim/{name}", {"use": use} | id, retain)

    def starts(self, name, lease=15):
        self.cast[name] = station.Station(name, self.map, lease)
        self.clock.run(self.cast[name].live)
        self.clock.wait(0.7)

    def has(self, name, *cars):
        self.clock.wait(0.3)
        uses = self.fogs[self.map.broker_of(name).name].states[name]["cars"]
        self.assertEqual(["-".join(item) for item in uses.items()], [*cars])

    def drives(self, name, at="A", battery=20, speed=1, charges=math.inf):
        self.cast[name] = car.Car(name, self.map, at, battery, speed, charges)
        self.began = self.clock.now
        self.clock.run(self.cast[name].live)

    def is_at(self, name, server):
        assert self.cast[name].broker.name == server


class TheStation(Simulation):
    """station.py: its two spots, its leases and its memory."""
    STORIES = """
    * Take, renew, refuse; who charges goes on, whatever comes late | P1=2
        P1 starts; says state online:True -> ann claims P1 held id=a-1@server1-9
        P1 says state:ann-held answer:True -> ann claims P1 charging; claims P1 held
        bob claims P1 held -> P1 says state:ann-charging state:ann-charging-bob-held
        cid claims P1 held id=c-1 -> P1 says state:ann-charging-bob-held answer:False
        ann tells leave/P1 -> cid claims P1 charging -> P1 has bob-held cid-charging
        assert len(self.server.retained) == 2   # its state, and that it is online
        >>> self.cast["P1"].is_stopping = True
        P1 says online:False
    * What is repeated (retained), or invalid, does not count | P1=2
        ann claims P1 held retain=1 -> bob tells leave/P1 retain=1 -> P1 starts; has
        cid tells leave/P1 -> bob claims P1 held -> eve claims P1 off -> P1 has bob-held
        server1 dies; waits 0.2; comes_back; waits 1.5 -> e\u200be claims P1 held
        bob tells leave/P1 now -> cid claims P1 held -> P1 has bob-held cid-held
    * A lease ends by itself, 15 s after the last claim | P1=2
        P1 starts -> ann claims P1 held; waits 10 -> bob claims P1 charging; waits 4
        P1 has ann-held bob-charging; waits 0.8; has bob-charging
        bob claims P1 held; waits 14 -> server1 dies; waits 100; comes_back; waits 14
        ann claims P1 charging -> P1 has bob-charging ann-charging; freezes; waits 20
        ann claims P1 held -> bob claims P1 held    # heard later; all leases begin anew
        P1 thaws; waits 14; has bob-charging ann-charging; waits 2; has
    * It remembers once, with whole leases, and no more cars than it has spots | P1=2
        P1 tells OLD -> P1 starts; waits 13; has bob-charging cid-charging
        P1 tells OLD -> server1 dies; waits 0.2; comes_back; waits 1.5
        P1 says online:True online:False        # who was started later is the station
    """.replace("OLD", 'state {"station":"P1","spots":3,"free":0,"life":1,"cars":'
                       '{"ann":"held","bob":"charging","cid":"charging"}} retain=1')


class TheCar(Simulation):
    """car.py: what it decides, and in which second."""
    STORIES = """
    * It claims every third of a lease: held; charging, when it is there | P6=1 P1=1
        P6 starts lease=9 -> zoe drives at=E speed=0.4 charges=1; waits 24
        zoe says claim:P6:held@0,3,6,9 claim:P6:charging@10,13,16 leave:P6@19
        assert '100.0, "doing": "offline"' in str(self.server.retained)
    * Not shown as charging for 3 s it asks anew; refused, it waits
        P1 starts -> zoe drives; waits 0.5 -> P1 freezes; waits 12
        zoe says request:A@0 claim:P1:held@0,4 claim:P1:charging@1,2,3,4 request:P1@4,9
    * A broker away costs no spot within a lease of the last claim | P1=1 P6=1
        P6 starts -> zoe drives at=E speed=0.4 charges=1; waits 3
        server3 dies; waits 11; comes_back; waits 11
        zoe says claim:P6:held@0 claim:P6:charging@14,15,20 leave:P6@23
        max drives at=E speed=0.1; waits 3 -> server3 dies; waits 11
        max is_at server3; waits 5; is_at server1
    * Without a spot, or a reply, it turns to the next broker | P1=1 P3=1 P6=1
        >>> self.fogs["server2"].deliver = lambda *_, s=self.server: s.publish( \
        "server2/cars/zoe/reply", ring.to_json(cloud_server.refusal("old", "full", [])))
        P6 starts -> server1 dies -> zoe drives battery=24 speed=0.4; waits 0.9
        zoe is_at server1; waits 9; says request:A@1; is_at server2 # after two failures
        zoe waits 2; says request:A@11; is_at server3; waits 14; is_at server3
        eve drives; waits 5 -> server2 dies; waits 0.5; comes_back; waits 3
        server2 dies; waits 0.5; comes_back; waits 9 -> eve is_at server2   # asked anew
        max drives at=P1 battery=90 speed=0.4; waits 2.8; is_at server2    # though at A
    * At places only it asks, below 25 %, and turns to another broker | P1=1 P3=1 P6=1
        LONG drives battery=24; says request:A reply:full -> ann drives battery=25
        ann says about=request -> far drives at=F battery=49; waits 6; says request:F@0
        zoe drives battery=33; says about=request; waits 5; says request:C
        gus drives battery=90 speed=2; waits 5.5; is_at server3
        gus says state:A@0,1,2 state@2,5 state:C@2,3,4 state:E@5    # @2: an empty one
        assert "server1/cars/gus/state" not in self.server.retained
    """.replace("LONG", 64 * "n")


class TheFog(Simulation):
    """broker.py. `ann finds P2 P1 P2`: she is offered P2, after claims at P1 and P2."""
    STORIES = """
    * The nearest one, but first the one that she has | P1=2 P2=2 P3=1
        P1 starts -> P2 starts -> ann finds P1 P1 -> bob finds P1 P1 -> cid finds P2 P2
        >>> self.fog.states["P1"]["free"] = 1   # an old state: it has no free spot
        dan finds P2 P1 P2 -> ann tells leave/P1 -> P1 has bob-held
        cid finds P2 P2 -> eve finds P1 P1 range=1 -> fay finds full range=1
        bob tells leave/P1 -> bob finds P1 P1 -> P2 tells online false -> dan finds full
        fay finds full range=1.5 at=C -> fay finds out-of-range range=0.9
        assert self.fog.requests == {"local": 7, "ring": 0, "refused": 4}
    * Two silent stations are waited for, and then left out | A=2 P1=1 P2=1
        A starts; freezes -> P1 starts; freezes -> P2 starts
        ann finds full A P1 after=1 -> ann finds P2 P2
        A thaws; has ann-held -> bob finds A A  # whoever speaks is asked again
    * Sixteen claims at a time, with ids of their own; an answer counts once | P1=9 P2=1
        P1 starts; freezes
        >>> for n in range(40): self.asks(f"c{n}")
        P1 waits 0.1
        >>> self.ids = [id for _, id in self.fog.awaited if id.startswith("a-1@")]
        >>> for who, ok in ("P2", False), ("P1", True), ("P1", False): self.tells(who, \
        "answer", {"id": self.ids[0], "car": "c0", "ok": ok, "lease": 9})
        c0 says reply:P1; waits 0.6             # the others need not wait for it, too
        >>> self.assertEqual([len(self.ids), self.fog.awaited], [16, {}])
    * A request has its time; and beyond 2,000 it is told to wait at once | P1=2
        >>> self.fog.turns["P1"] = asyncio.Semaphore(0)     # nobody's turn comes
        >>> self.fog.capacity = asyncio.Semaphore(1)
        ann asks -> bob finds full; waits 7.5 -> ann says reply:full@8
    * It remembers the latest cars; what is invalid, or repeated, changes nothing | P1=1
        >>> self.patch(broker, "REMEMBERED", 3)
        >>> for c in "abcad": self.tells(c, "state", \
        {"car": c, "at": "A", "battery": 5, "doing": "going"})
        >>> self.server.publish("server1/cars/a/state", b"")    # it has gone elsewhere
        fay tells state {"car":"fay","at":"A","battery":101,"doing":"going"}
        ann tells state {"car":"bob","at":"A","battery":5,"doing":"going"}
        P1 tells state {"station":"P2","spots":1,"free":0,"cars":{"x":"held"},"life":1}
        P1 tells online 1 -> P1 tells answer {"id":"x","car":"ann","ok":true} -> P1 has
        assert [*self.fog.cars] == ["c", "d"] and not self.fog.online
        >>> self.fog.send = mock.Mock()
        >>> self.fog.deliver(broker.Message("server1/cars/b/request", b"", 1, True), 1)
        bob tells request {"id":5} -> bob tells request {"id":"b-1","at":"Z","range":5}
        assert [call[1][1]["id"] for call in self.fog.send.mock_calls] == [None, "b-1"]
        assert "is invalid: request.at" in str(self.fog.tell.mock_calls)
    """

    def asks(self, car, range=50, at="A"):
        self.began = self.clock.now
        self.tells(car, "request", {"id": "a-1", "at": at, "range": range, "car": "x"})

    def finds(self, car, found, *claimed, after=0, **how):
        self.asks(car, **how)
        self.clock.wait(after + 0.7)
        claims = [f"claim:{name}:held@0" for name in claimed]
        self.says(car, *claims, f"reply:{found}@{after}", about="claim")


class Mqtt(Simulation):
    """broker.py, packet by packet, with the clauses of the OASIS standard in brackets.
    Most verbs are RawClient's. After a topic comes the payload (none: x; -: empty)."""
    STORIES = """
    * A session is resumed, or clean [MQTT-3.1.2-4..8, 3.2.2-1..3]
        cid joins session=0; subscribes a qos=1; goes; joins session=1; goes
        cid joins; subscribes b qos=1; goes; joins session=0; subscribes c qos=1; goes
        ann joins; publishes a qos=1; publishes b qos=1; publishes c qos=1
        cid joins session=1; takes c qos=1; quiet
    * A takeover ends the first connection, with its will [MQTT-3.1.4-2, 3.1.3-6]
        bob joins; subscribes t -> cid joins will=0; subscribes t -> cid' joins
        cid closed -> bob takes t; publishes t; takes t -> cid' quiet
        ' joins -> '' joins -> ' quiet          # without any id they are not the same
    * At least once: DUP, old ids, in order [MQTT-3.1.2-5, 3.3.1-1, 4.4.0-1, 4.6.0-1]
        cid joins session=0; subscribes t qos=2 -> ann joins; publishes t qos=1
        ann publishes t qos=2 -> cid hears t qos=1; hears t qos=2; vanish
        ann publishes t new qos=2 -> cid joins session=1
        cid hears t qos=1 dup=1 again=2; gives PUBACK; hears t qos=2 dup=1 again=2
        cid gives PUBREC; gets PUBREL; gives PUBREC; gets PUBREL; vanish
        cid joins session=1; gets PUBREL; gives PUBCOMP
        cid hears t new qos=2 dup=1; gives PUBREC; gets PUBREL; gives PUBCOMP; goes
        cid joins session=1; gives PUBREC id=99; gets PUBREL id=99; gives PUBACK id=98
        ann publishes t qos=1 -> cid hears t qos=1; quiet; gives PUBREC; closed
    * Exactly once: a repeated message is known, until its id is free [MQTT-4.3.3-2]
        cid joins; subscribes t -> dan joins session=0; sends t qos=2 id=7
        dan gets PUBREC id=7; vanish; joins session=1; sends t qos=2 id=7 dup=1
        dan gets PUBREC id=7 -> cid takes t; quiet
        dan gives PUBREL id=7; gets PUBCOMP id=7; gives PUBREL id=7; gets PUBCOMP id=7
        dan sends t qos=2 id=7; gets PUBREC id=7 -> cid takes t
    * Identifiers: from 1 to 65,535, but for those on their way [MQTT-2.3.1-1, -4]
        ann joins; subscribes t qos=1; publishes t qos=1; hears t qos=1
        >>> self.server.present["ann"].last_id = 65_534
        ann publishes t qos=1; takes t qos=1; publishes t qos=1; takes t qos=1
        assert self.cast["ann"].ids == [1, 65_535, 2]
    * Each message once, in the lower QoS of both sides [MQTT-3.3.5-1, 3.8.4-3..6]
        bob joins; subscribes t -> cid joins; subscribes t qos=2; subscribes t/# qos=1
        ann joins; publishes t qos=2 -> bob takes t; quiet -> cid takes t qos=2; quiet
        cid subscribes t; unsubscribes t/ -> ann publishes t qos=2 -> cid takes t qos=1
        cid quiet; unsubscribes t/# -> ann publishes t qos=2 -> cid takes t
        cid unsubscribes t -> ann publishes t; publishes r qos=1 retain=1
        cid quiet; subscribes r qos=2; takes r qos=1 retain=1
    * Retained: for each SUBSCRIBE, until an empty one [MQTT-3.3.1-5..12, 3.8.4-3]
        ann joins; publishes t old retain=1; publishes t - -> bob joins; subscribes t
        bob takes t old retain=1; subscribes t; takes t old retain=1
        ann publishes t retain=1 -> bob takes t; subscribes t/#; takes t retain=1
        ann publishes t - retain=1 -> bob takes t -; subscribes t; quiet
    * A will, at any end but a true goodbye [MQTT-3.1.2-8..17, 3.14.1-1, 3.14.4-3]
        bob joins; subscribes t qos=2 -> eve joins will=0; goes -> bob quiet
        eve joins will=1; gives PINGREQ id=5; closed -> bob takes t qos=1  # too long
        eve joins will=2; gives DISCONNECT id=5; closed -> bob takes t qos=2
        eve joins will=0 retain=1; vanish -> bob takes t; subscribes t; takes t retain=1
    * Silence: 1.5 times the keepalive; half a packet is no sign of life [MQTT-3.1.2-24]
        ann joins -> bob joins keep=20 -> cid joins keep=10; waits 9
        >>> self.cast["bob"].send(PING[:1])
        cid quiet; waits 14; quiet; waits 15.7 -> ann quiet
        assert self.cast["bob"].socket.is_over and self.cast["cid"].socket.is_over
    """
    # "text" stands for its length in two bytes and itself, - for the rest's length, and
    # CONNECT 02 for its beginning with these flags; else it is hexadecimal. Each packet
    # closes the connection of somebody new, or of eve; a column between is the answer.
    MALFORMED = """
        new | 30 - "t"; 50 02 00 07; 16 03 01 | not CONNECT [MQTT-3.1.0-1]; "POST"; TLS
        new | 11 - "MQTT" 04 02 00 00 ""; 10 - "MQTTT" 04 02 00 00 "" | flag; protocol
        new | CONNECT 03 ""; CONNECT 0a ""; CONNECT 22 "" | reserved; QoS of no will
        new | CONNECT 1e "" "t" ""; CONNECT 06 "" "t/#" "" | a will of QoS 3; no topic
        new | CONNECT 82 ""; CONNECT 02 "" "u"; CONNECT 42 "" "p" | lacks; more; no user
        new | 10 - "MQTT" 05 02 00 00 "" | 20 02 00 01 | another version [-3.1.2-2]
        new | CONNECT 00 ""              | 20 02 00 02 | a session of nobody [-3.1.3-8]
        new | CONNECT 06 "" "server1/cars/ben/x" "" | 20 02 00 05 | another's will
        eve | CONNECT 02 "x"; f0 00; c0 80 80 80 80 00; c0 81 80 04 | again; type; size
        eve | c1 00; 60 02 00 01; 38 - "t"; 36 - "t" 00 01 | flags; DUP, QoS 0; QoS 3
        eve | 40 03 00 01 00; 62 03 00 01 00; 40 01 00; 32 - "t" 00 00 | length; id 0
        eve | 30 - "a/#"; 30 - ""; 30 - 00 01 00; 30 - 00 01 ff | no topics; no texts
        eve | 30 - "server1/cars/eve2/x"; 30 - "server1/x/eve" | as eve2; as the fog
        eve | 82 02 00 01; a2 02 00 01; a2 - 00 01 ""; 82 - 00 01 "t" 03 | none; QoS 3
        eve | a2 - 00 01 "a#"; a2 - 00 01 "#/a"; a2 - 00 01 "a+/b" | #, + [-4.7.1-2, 3]
        """

    def test_what_is_not_well_formed(self):
        self.begins(P1=1)
        for who, packets, *answer, why in rows(self.MALFORMED):
            for packet in packets.split(";"):
                hello = connect("eve") if who == "eve" else b""
                guest = RawClient(Wire().opens(self), hello, self.parse(packet))
                assert guest.socket.is_over, why        # at once
                said = guest.closed().removeprefix(WELCOME)
                self.assertEqual(said, b"".join(map(self.parse, answer)), why)

    def parse(self, words):
        words = re.sub("CONNECT (..)", r'10 - "MQTT" 04 \1 00 00', words)
        words = re.sub('"(.*?)"', lambda quoted: text(quoted[1]).hex(), words)
        first, *rest = map(bytes.fromhex, words.split("-"))
        return first + b"".join(bytes([len(body)]) + body for body in rest)

    def test_each_length_there_and_back(self):
        for size, head in (127, "30 7f"), (128, "30 80 01"), (65_532, "30 fc ff 03"):
            packet = bytes.fromhex(head) + bytes(size)
            self.assertEqual(broker.encode(broker.PUBLISH, bytes(size)), packet)
            self.assertEqual(broker.take_packet(bytearray(packet)).read(), bytes(size))


class TooMuch(Simulation):
    """broker.py: how much room and time the MQTT server has for each, and for all."""
    STORIES = """
    * Who reads too slowly gets nothing more, and is dropped; their wills never nest
        >>> self.patch(broker, "BUDGET", 100_000)
        >>> for n in range(200): self.joins(f"c{n}", will=0).subscribes("t")
        t floods 9 60000; waits 0.1
        assert not self.server.connections
        >>> for n in range(200): assert len(self.cast[f"c{n}"].socket.came) < 180_000
    * Too much unacknowledged: the client is dropped; an absent one loses the oldest
        >>> self.patch(broker, "BUDGET", 2_000 * 128 + 259)     # its filter takes 259
        ann joins; subscribes t/# qos=1
        bob joins session=0; subscribes t/# qos=1; goes
        t/{} floods 9 50000 qos=1 -> ann closed -> bob joins session=1
        >>> for n in range(6, 9): self.cast["bob"].takes(f"t/{n}", bytes(50_000), 1)
        bob quiet                       # but what it does not release counts, too
        >>> self.cast["bob"].send(*[publish("x", qos=2, id=n) for n in range(1, 2001)])
        >>> self.cast["bob"].expect(*[ack("PUBREC", n) for n in range(1, 2001)])
        bob sends x qos=2 id=2001; closed
    * A filter that finds no room is refused, until another one is given back
        >>> self.patch(broker, "BUDGET", 17_000)        # each level takes 128
        >>> self.joins("eve").send(subscribe("/" * 128, "/" * 127, "a/b", "c/d"))
        >>> self.cast["eve"].expect(ack("SUBACK", 9, 128, 0, 0, 128))
        eve unsubscribes a/b; subscribes c/d
        >>> self.cast["eve"].closed(publish("/" * 128))         # too many levels
    * Of the absent clients the one that has been away longest goes
        >>> self.patch(broker, "ABSENT", 2)
        ann joins session=0; goes -> bob joins session=0; subscribes t; goes
        ann joins session=1; goes -> cid joins session=0; goes
        assert not self.server.tree.match("t")
        ann joins session=1 -> bob joins session=0 -> cid joins session=1
    * Retained messages that find no room are not kept, but a station's state is
        >>> self.patch(broker, "RETAINED_BYTES", 400)      # each takes 128 and its size
        r/{} floods 4 1 retain=1 -> r/{} floods 3 1 retain=1
        assert [*self.server.retained] == ["r/0", "r/1", "r/2"]
        server1/state floods 1 99 retain=1 -> r/2 floods 1 2 retain=1
        assert [*self.server.retained] == ["r/0", "r/1", "server1/state"]
    * Retained beyond the budget: at each one's pace; anew after a lost connection
        >>> self.patch(broker, "BUDGET", 200_000)
        t/{} floods 9 30000 qos=1 retain=1 -> ann joins; subscribes t/#
        >>> for n in range(9): self.cast["ann"].hears(f"t/{n}", bytes(30_000), 0, 1)
        dan joins session=0; subscribes t/# qos=1   # pauses at half the budget
        >>> for n in range(4): self.cast["dan"].hears(f"t/{n}", bytes(30_000), 1, 1)
        dan quiet; vanish; joins session=1
        >>> for n in range(4): self.cast["dan"].hears(f"t/{n}", bytes(30_000), 1, 1, 1)
        >>> for id in range(1, 5): self.cast["dan"].gives("PUBACK", id)
        >>> for n in range(9): self.cast["dan"].takes(f"t/{n}", bytes(30_000), 1, 1)
        dan quiet -> bob joins session=0; subscribes t/# qos=1; subscribes t/+ qos=1
        bob subscribes t/0; unsubscribes t/0; unsubscribes t/#; gives PUBACK id=1
        bob unsubscribes t/+; vanish
        assert not self.server.absent["bob"].wanted
    * Who speaks to one who is behind waits (backpressure); who is behind is heard
        ann joins; subscribes x/x/x/x -> x/x/x/x floods 10 60000    # ann reads nothing
        >>> self.joins("eve").send(publish("x/x/x/x", bytes(60_000)) * 3)
        assert self.cast["eve"].socket.server.buffer
        >>> self.cast["ann"].send(PING)
        assert PONG in self.cast["ann"].socket.came
    * Short of file descriptors a server refuses the newcomer
        >>> self.patch(broker, "has_room", lambda connection: False)
        assert Wire().opens(self).is_over
    """

    def floods(self, topic, count, size, **how):
        """The server publishes so many of so many bytes; {} stands for 0, 1, ..."""
        for n in range(count):
            self.server.publish(topic.format(n), bytes(size), **how)

    def test_each_has_its_slice_of_time(self):
        """After 20 ms of packets, or of what is retained, it is the others' turn."""
        self.begins(P1=1)
        ticks = itertools.count()       # each packet, or topic, takes 1 ms
        self.patch(broker, "monotonic", lambda: self.clock.now + next(ticks) / 1000)
        self.floods("a/{}", 100, 1, retain=True)
        eve = self.joins("eve").socket
        for packets in publish("t") * 100, subscribe("a/#", "b") + publish("a/last"):
            eve.server.data_received(packets)
            assert eve.server.buffer and not eve.is_read
            self.clock.wait(1)
            assert eve.is_read and not eve.server.buffer
        self.assertEqual(eve.came.count(b"a/"), 101)
        assert eve.came.endswith(publish("a/last"))     # it has waited for all of that


# --- One conversation at each door, and the demo --------------------------------------
class Doors(Story):
    """MQTT for cars, TCP for the cloud and the brokers, HTTP for people: all locked."""
    QUESTION = {"op": "reserve", "id": "x-1", "car": "bob", "at": "A", "range": 50,
                "key": "s3:cret"}
    TCP = """
        cloud port  | {"op": "search", "broker": "server2"} | "asked": ["server3"]
        cloud port  | {"op": "search", "broker": "server2", "range": 0.5} | "retry": 60
        cloud port  | {"op": "status"}; {"op": "search", "broker": "x"} | "error"
        server2 tcp | {}                          | "station": "P3"
        server2 tcp | {"car": "cid"}      | "full", "retry": 5, "asked": ["server2"]
        server2 tcp | {"op": "city"}; {"at": "Z"} | "error"
        server2 tcp | {"key": "secret"}           | {"error": "key"}
        """
    HTTP = """
        200 | POST /cars/ann/request | {"at": "A", "range": 9, "id": "a"} | "a".*"km": 1
        503 | POST /cars/bob/request | {"at": "A", "range": 3} | Retry-After: 5
        409 | POST /cars/bob/request | {"at": "A", "range": 0} | "out of range"
        400 | POST /cars/a%2Fb/request | {"at": "A", "range": 3, "car": "b"} | must be a
        400 | POST /cars/ann/request | {; {"at": A}              | bad JSON
        400 | POST /cars/ann/request | X: y; Content-Length: -1  | Content-Length must
        413 | POST /cars/x/request   | Content-Length: DIGITS; {LONG} | at most 65536
        415 | POST /cars/ann/request | Content-Type: text/plain;x=json | must be app
        200 | GET /stations; GET /stations/P1 | Host: LOCALHOST:9 | {"ann": "held"}
        200 | GET /city   | Host: [::1]:8081                     | "server3": {"broker"
        400 | GET /status | Host: evil.example:8081; Host: [     | not the host
        401 | GET / | Authorization: Basic bWU6c2VjcmV0; Authorization: é | Basic realm
        404 | GET /x; GET /stations/P3; DELETE /cars/bob/request | X: y | no such thing
        501 | PUT /cars/ann/request    | X: y                    | PUT
        204 | DELETE /cars/ann/request | X: y                    | No Content
        """.replace("DIGITS", 5_000 * "9").replace("LONG", 9_999_999 * "n")
    HALVES = [connect()[:-1], b"GET / HTTP/1.1\r\n", b'{"op', b'{"key": "s3:cret"}\n']
    REFUSED = [b"POST / HTTP/1.1\n", b"[]\n", b'{"key": ""}\n', b'{"key": "\\ud800"}\n',
               b'{"key": ["s3:cret"]}\n', b" " * 65_537]     # the QUESTION follows

    @classmethod
    def setUpClass(cls):
        """The demo takes 15 s; guests who say nothing stay for 10: both begin now."""
        cls.demo = Part(sys.executable, HERE / "test_system.py", "--demo",
                        start_new_session=True)
        cls.city = City(key="s3:cret", P1=1, P3=1, P5=1)
        cls.addClassCleanup(cls.city.end)
        cls.city.begin()
        cls.city.cast["cloud"].says("listens")
        said = [*map(random.Random(SEED).randbytes, range(0, 300, 6)), *cls.HALVES]
        said += [first + ring.to_json(cls.QUESTION) + b"\n" for first in cls.REFUSED]
        cls.guests = [cls.city.raw(f"server1 {door}", words) for words in said
                      for door in ("mqtt", "http", "tcp")]
        cls.end = time.monotonic() + 10 + SLACK
        cls.asker = cls.city.raw("cloud port")
        cls.asker.asks({"op": "city", "key": "s3:cret"})

    def test_tcp(self):
        """Each answer; and a newcomer is turned away before descriptors run out."""
        for door, questions, holds in rows(self.TCP):
            for question in questions.split("; "):
                answer = self.city.raw(door).asks(self.QUESTION | json.loads(question))
                self.assertIn(holds, json.dumps(answer))
        self.patch(cloud_server.resource, "getrlimit", lambda kind: (100, 100))
        self.assertRaisesRegex(OSError, "too many", cloud_server.Door.process_request,
                               None, mock.Mock(fileno=lambda: 68), None)    # keeps 32

    def test_http(self):
        """A second request, which hides behind each of them, is never answered."""
        for status, lines, extras, holds in rows(self.HTTP):
            for line, extra in itertools.product(lines.split("; "), extras.split("; ")):
                body, header = (extra, "X: y") if extra[0] == "{" else ("", extra)
                answer = self.city.http(line, body, header)
                self.assertRegex(answer, rf"\AHTTP/1.0 {status} [^\0]*{holds}", line)
                self.assertEqual(answer.count("HTTP/1.0 "), 1)
                self.assertEqual('"error": "' in answer, int(status) >= 400)

    def test_page(self):
        """It needs nothing from outside; what others wrote stays text."""
        page = self.city.http("GET /")
        self.assertNotRegex(page, r"""(src|href|url)\W{0,3}(https?:)?//""")
        self.patch(cloud_server, "KEY", "s3:cret")
        name = "<img src=x onerror=alert(1)>"
        hello = connect(name, name, cloud_server.mqtt_password(name), flags=194)
        for to, doing in ("server2", "offline"), ("server1", "going"):  # it is alive
            evil = self.city.raw(f"{to} mqtt", hello).expect(WELCOME)
            state = {"car": name, "at": "A", "battery": 5, "doing": doing}
            evil.publishes(f"{to}/cars/{name}/state", json.dumps(state))
        self.assertEqual(self.city.get("GET /cars"), {name: state})
        self.city.get("POST /cars/ann/request", '{"at": "A", "range": 50}')
        drawn = self.city.http("GET /map")
        self.assertNotIn("<img", drawn)
        for part in ("text/html", "&lt;img", "P1 ■ 0 ▄ 1 □ 0", "»", "All parts answer",
                     'top: 12.0%; --own: hsl(525 70% 55%)"><b>P6'):     # at the top
            self.assertIn(part, drawn)
        evil.closed(publish("server2/cars/ann/state"))      # it may not write as ann

    def test_the_key(self):
        """A proof of it opens the door to one client id alone; a rush comes in, too."""
        self.patch(cloud_server, "KEY", "s3:cret")
        for name, user in itertools.product(["car\n1", "car2"], repeat=2):
            hello = connect(name, user, cloud_server.mqtt_password("car\n1"), flags=194)
            code = 0 if name == user == "car\n1" else 5
            self.city.raw("server1 mqtt", hello).expect(ack("CONNACK", code))
        self.city.start("test_system.py", "rush", "--rush", 500).ends(0)
        self.assertNotIn("s3:cret", self.city.cast["server1"].said)

    def test_who_says_nonsense_or_nothing(self):
        """They are gone after 10 s, without an offer; who has asked before may stay."""
        for guest in self.guests:
            guest.socket.settimeout(max(0.1, self.end - time.monotonic()))
            self.assertNotIn(b'"station"', guest.closed())
        assert self.asker.asks({"op": "city", "key": "s3:cret"})["brokers"]["server1"]
        for line in self.city.cast["server1"].said.splitlines():
            self.assertRegex(line, r"\A\d\d:\d\d:\d\d  ")       # one line per event
        self.assertEqual(len(self.city.get("GET /status")["events"]), 50)   # the last

    @unittest.skipUnless(SIGNALS, "this system has no process groups")
    def test_zz_the_demo(self):
        """To its end; or until Ctrl-C, which reaches every process of it."""
        self.demo.says("Case 1", "Case 2", "Case 3", "All three cases")
        cut_short = Part(*self.demo.command, start_new_session=True)
        os.killpg(cut_short.says("car1 .* asks").process.pid, signal.SIGINT)
        for demo in self.demo, cut_short:
            demo.ends(0, 5 + SLACK)
            with self.assertRaises(ProcessLookupError):     # no process is left
                os.killpg(demo.process.pid, 0)


# --- Anything may die: the drills -----------------------------------------------------
@unittest.skipUnless(SIGNALS, "this system has no SIGKILL, SIGSTOP and SIGCONT")
class Drills(Story):
    """Each promise of the city, while its parts die, hang and come back. (`ann gets P3
    1.5 server1 server2`: a spot at P3, after 1.5 s; these brokers were asked.)"""
    STORIES = r"""
    * The next broker hangs, or is dead; and then the cloud | P1=1 P3=1 P5=4
        ann gets P1 -> bob gets P3 0 server1 server2
        server2 dies; comes_back -> P3 shows bob-held -> bob gets P3 0 server1 server2
        server2 freezes -> cid gets P5 1.5 server1 server2 server3
        dan gets P5 0 server1 server3           # who was silent is left out
        server2 dies -> cloud dies; comes_back; says listens
        eve gets P5 0 server1 server2 server3 -> cloud says server2.*skipped:.*refused
        cloud dies -> fay gets P5 0 server1 server2 server3 -> P1 dies; shows offline
        >>> self.drawn = self.city.http("GET /map")
        assert re.search("the cloud.+P1 no answer.+local 1 / ring 6", self.drawn)
    * The cloud hangs: forty wait for it, but once; ann, nearby, does not notice
        ann gets P1 -> cloud says listens; freezes
        test_system.py start crowd --rush 40 -> server1 says no.spot.here -> ann gets P1
        crowd says refused.+40.+.[4-6]\d\d\d\.\d.ms$; ends 0     # even the slowest
    * A station dies: it remembers its cars, unless its broker dies, too | P1=1
        bob gets P1 -> P1 dies; shows offline; comes_back; says serves:.0.of.1
        server1 dies; comes_back; says P1.*is.online -> P1 shows bob-held
        bob leaves -> zoe drives battery=5; says zoe-.*charging -> P1 dies
        server1 dies; comes_back -> P1 comes_back; says serves:.1.of.1
        P1 shows zoe-charging; stop -> server1 says P1.*said.goodbye    # without a will
    * A part is started twice; or it is stopped, while it waits for others that hang
        ann gets P1 -> station.py start newer P1 -> P1 says was.started.again; ends 2
        newer says serves:.0.of.1 serves:.0.of.1 -> bob gets nothing
        broker.py start again -> again says ^cannot.listen.*port.\d; ends 2
        newer freezes -> ann leaves -> P1 shows     # as a courtesy
        cloud says listens; freezes -> zoe drives -> server1 says zoe-.*no.spot; stop
    * Mosquitto in place of the MQTT server: it is killed, too | mosquitto=1 P1=1 P3=1
        ann gets P1 -> mosquitto dies -> P3 dies -> mosquitto comes_back; says running
        P1 says serves:.0.of -> server1 says connection.lost Success -> P3 shows offline
        ann leaves -> P1 shows -> zoe drives; says yes,.at.P1 zoe-.*charging
        P1 dies; shows offline -> server1 dies; comes_back; says P1.*is.offline
    """
    STRIKES = """
        cloud P1 P3 P5          | dies                          | comes_back; says :
        P1 P3 P5                | freezes                       | thaws
        server1 server2 server3 | dies; comes_back; says serves | says rush
        """

    def gets(self, car, station, least=0, *asked):
        began = time.monotonic()
        reply = self.city.get(f"POST /cars/{car}/request", '{"at": "A", "range": 50}')
        assert least <= time.monotonic() - began < least + SLACK, reply
        self.assertEqual(reply["station"] or "nothing", station, reply)
        self.assertEqual(reply["asked"], [*asked] or reply["asked"])

    def test_the_storm(self):
        """Rush hour again and again, while a part is dead, hangs, or is just back."""
        self.begins(P1=2, P3=1, P5=1)
        dice = random.Random(SEED)
        end = time.monotonic() + STORM
        while time.monotonic() < end:
            parts, strike, undo = dice.choice(rows(self.STRIKES))
            part = dice.choice(parts.split())
            self.plays(f"{part} {strike} -> test_system.py start rush --rush 30")
            self.plays(f"rush ends 0 -> {part} {undo}")     # none is late, none double
            wait_until(self.city.gives_back, f"all free after {part} {strike}")


def main():
    parser = argparse.ArgumentParser(description="The tests of the charging city.")
    parser.add_argument("--demo", action="store_true", help="the city, as a story")
    parser.add_argument("--rush", metavar="N", type=int,
                        help="N cars ask the running city at once")
    args, city = cloud_server.start_up(parser)
    if args.demo:
        for stop in signal.SIGTERM, signal.SIGINT:      # a shell may have us ignore it
            signal.signal(stop, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            Story().plays(DEMO)
        for stop in signal.SIGTERM, signal.SIGINT:      # its parts must end first
            signal.signal(stop, signal.SIG_IGN)
        logging.disable()           # how they miss each other now tells nothing
        sys.exit()
    if args.rush is not None:
        if not 1 <= args.rush <= 5000:
            parser.error("--rush takes 1 to 5000 cars")
        try:
            with cloud_server.until_stopped():
                sys.exit(rush(city, args.rush))
        except (OSError, AssertionError) as fault:
            sys.exit(f"rush hour needs a city that runs, and its EV_KEY: {fault}")
    unittest.main(argv=sys.argv[:1])


if __name__ == "__main__":
    main()
