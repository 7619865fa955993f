"""The tests: short stories about a city of real processes, from the smallest part up.

        test --starts, kills, freezes--> cloud_server.py, broker.py, station.py, car.py
        test <--reads what they tell---- (processes of their own, on free ports)

    python3 test_system.py                    all of it, simplest first
    python3 -m unittest test_system.Drills    a chapter of it; with -v story by story
    STORM=60 SEED=7 python3 test_system.py    the storm for a minute, with these numbers
    python3 test_system.py --demo             the whole city in one terminal, as a story
    python3 test_system.py --rush 1000        rush hour in the city that runs

Chapters: one function or object at a time, without process or socket; the MQTT server,
packet by packet; one conversation at each door; what happens when anything dies.
Nothing sleeps: a test waits until something is so, and fails when its deadline is over.
Where the city promises a number of seconds the tests allow SLACK more, for a busy
machine.

Many stories are texts. A line tells who does what: verbs, which are methods of that
chapter or of a Part, and their words. `ann claims held` is self.claims("ann", "held"),
`P1 dies; comes_back` is self.city["P1"].dies(), and then .comes_back().

Read next: the story that interests you. Left out on purpose: how fast things are.
"""

import argparse
import asyncio
import base64
import collections
import copy
import inspect
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
from http.client import HTTPConnection
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


def wait_until(condition, seconds=DEADLINE, what=lambda: "what was waited for"):
    """Look again and again until the condition holds; returns what it then says."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(ConnectionError):     # whom it asks is not up yet
            found = condition()
            if found:
                return found
        time.sleep(0.01)
    raise AssertionError(f"{what()} did not happen within {seconds} s")


def lines(text):
    """The lines of a text, without what stands behind #."""
    for line in text.strip().splitlines():
        yield line.partition(" # ")[0].strip()


def rows(table):
    """The rows of a table of cases: lists of cells; the last cell says it in words."""
    return [[cell.strip() for cell in line.split("|")]
            for line in table.strip().splitlines()]


# --- A city of real processes ---------------------------------------------------------

class Part:
    """A process, and the lines that it has told so far; `show` is told each of them."""

    def __init__(self, *command, show=None, **popen):
        self.command = [str(word) for word in command]
        self.show = show
        self.popen = popen
        self.lines = []
        self.comes_back()

    def comes_back(self):
        """Start it, or start it again."""
        self.read = len(self.lines)     # what it said before counts no more
        self.gone = False               # True: it has ended, and was meant to
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", **self.popen)
        self.listener = threading.Thread(target=self.listen, args=[self.process.stdout])
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
            self.read = wait_until(lambda: self.find(pattern),
                                   what=lambda: f"{pattern} of {self.lines[-40:]}")
        return self

    def find(self, pattern):
        over = not self.listener.is_alive()
        for at in range(self.read, len(self.lines)):
            if re.search(pattern, self.lines[at]):
                return at + 1
        assert not over, f"it ended without {pattern}: {self.lines[-40:]}"

    def ends(self, status, seconds=DEADLINE):
        self.gone = True
        found = self.process.wait(seconds)
        assert found == status, f"ended with {found}: {self.lines[-40:]}"
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
        return self

    def thaws(self):
        self.process.send_signal(signal.SIGCONT)

    def check(self):
        """It is alive if it should be, and no bug has shown."""
        alive = self.process.poll() is None
        assert self.gone or alive, f"has ended: {self.lines[-40:]}"
        assert "Traceback" not in str(self.lines), "\n".join(self.lines)

    def stop(self):
        """The way a user stops it: it ends at once, with exit status 0."""
        if SIGNALS and not self.gone:
            self.process.send_signal(random.choice([signal.SIGTERM, signal.SIGINT]))
            self.ends(0, 2 + SLACK)

    def erase(self):
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


def describe(spots, ports=range(5000, 5010)):
    """A servers.json with these stations ({"P1": 2}: two spots), and their brokers."""
    port = iter(ports)
    cloud = {"host": "127.0.0.1", "port": next(port)}
    brokers = []
    found = {}
    for name, places in PLACES.items():
        if places.keys() & spots:
            brokers.append({"name": name, "host": "127.0.0.1", "mqtt": next(port),
                            "http": next(port), "tcp": next(port)})
            for place, at in places.items():
                found[place] = {"at": at, "broker": name}
                if place in spots:
                    found[place]["spots"] = spots[place]
    roads = [road for road in ROADS if found.keys() >= {*road}]
    return {"cloud": cloud, "brokers": brokers, "places": found, "roads": roads}


class City:
    """A cloud, brokers and stations that run, each in a process of its own.

    city["P1"], city["server1"], city["cloud"] are the parts, to be killed and frozen.
    """

    def __init__(self, lease=15, key="", mqtt=None, show=None, **spots):
        self.spots = spots
        self.key = key
        self.file = describe(spots, free_ports(10))
        self.cloud = self.file["cloud"]["port"]
        self.brokers = {entry["name"]: entry for entry in self.file["brokers"]}
        self.popen = {"env": os.environ | {"EV_KEY": key}, "show": show}
        if mqtt:
            for entry in self.file["brokers"]:
                entry["mqtt"] = mqtt
        self.folder = tempfile.TemporaryDirectory()
        self.config = Path(self.folder.name, "servers.json")
        self.config.write_text(json.dumps(self.file))
        self.parts = {}
        try:
            self.begin(lease, ["--external-mqtt"] if mqtt else [])
        except BaseException:
            self.erase()
            raise

    def begin(self, lease, options):
        self.start("cloud_server.py", "cloud")
        for name in self.brokers:
            self.start("broker.py", name, name, *options)
        for name in self.brokers:
            self[name].says("serves")
        if lease:
            for name in self.spots:
                self.start("station.py", name, name, "--lease", lease)
            self.are_online(*self.spots)

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

    def check(self):
        for part in self.parts.values():
            part.check()

    def end(self):
        """Each part is well, and ends at once when it is told to."""
        try:
            self.check()
            for part in reversed(self.parts.values()):      # the cloud comes last
                part.stop()
            self.check()
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
        """A connection to a broker's door ("mqtt", "http", "tcp"), or to the cloud."""
        port = self.cloud if to == "cloud" else self.brokers[to][door]
        return RawClient(port, *packets)

    def http(self, method, path, body=None, to="server1", **headers):
        """(status, headers, JSON or bytes). A header that is None is left out."""
        if body is not None:
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json",
                       "Content-Length": len(body)} | headers
        if self.key:
            headers = {"Authorization": basic(f"me:{self.key}")} | headers
        with closing(HTTPConnection("127.0.0.1", self.brokers[to]["http"])) as web:
            web.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                if value is not None:
                    web.putheader(name, str(value))
            web.endheaders(body)
            answer = web.getresponse()
            text = answer.read()
        if answer.headers.get_content_type() == "application/json":
            text = json.loads(text)
        return answer.status, answer.headers, text

    def get(self, path, to="server1"):
        return self.http("GET", path, to=to)[2]

    def tcp(self, to, **request):
        with closing(self.raw(to, "tcp")) as client:
            return client.asks(request)

    def station(self, name):
        return self.get(f"/stations/{name}", self.file["places"][name]["broker"])

    def are_online(self, *names, online=True, seconds=DEADLINE):
        for name in names:
            wait_until(lambda: self.station(name)["online"] is online, seconds,
                       lambda: f"{name} online={online}")

    def shows(self, seconds=DEADLINE, **stations):
        """Wait until the stations have these cars: city.shows(P1={"car1": "held"})."""
        for name, cars in stations.items():
            wait_until(lambda: self.station(name)["cars"] == cars, seconds,
                       lambda: f"{name} with {cars}, not {self.station(name)},")

    def asks(self, car, at="A", range=50, to="server1"):
        """The reply to a car's request, and what it `took`, in seconds: at most 9."""
        began = time.monotonic()
        request = {"at": at, "range": range}
        _, _, reply = self.http("POST", f"/cars/{car}/request", request, to)
        took = time.monotonic() - began
        assert took < 9 + SLACK, reply
        return SimpleNamespace(took=took, **reply)

    def claims(self, car, station, verb="claim", **value):
        """What a car says to a station, over a connection of its own."""
        name = self.file["places"][station]["broker"]
        with closing(self.raw(name, "mqtt", connect(car))) as client:
            client.expect(WELCOME).publishes(f"{name}/cars/{car}/{verb}/{station}",
                                             json.dumps(value).encode(), 1)

    def rests(self):
        """Every car gives back what it has."""
        for name in self.spots:
            for car in self.station(name)["cars"]:
                self.claims(car, name, "leave")
        self.shows(**dict.fromkeys(self.spots, {}))


def basic(user_and_key):
    return f"Basic {base64.b64encode(user_and_key.encode()).decode()}"


class Story(unittest.IsolatedAsyncioTestCase):
    """A test whose stories are texts, or play in a city.

    In one city for the whole chapter, if SPOTS names its stations.
    """
    SPOTS = {}
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        if cls.SPOTS:
            cls.city = City(**cls.SPOTS)
            cls.addClassCleanup(cls.city.end)

    def founds(self, **how):
        """A city for this story alone."""
        city = City(**how)
        self.addCleanup(city.end)
        return city

    def has_clock(self, *modules):
        """These modules now have a clock that only this test moves."""
        self.now = 1000.0
        for module in modules:
            patch = mock.patch.object(module, "monotonic", lambda: self.now)
            patch.start()
            self.addCleanup(patch.stop)

    async def plays(self, story):
        """Each line: who, then steps with ; between them. A step: a verb, its words."""
        for line in lines(story):
            who, _, steps = line.partition(" ")
            for step in steps.split(";"):
                verb, *words = step.split()
                try:
                    done = self.step(who, verb, words)
                    if inspect.isawaitable(done):
                        await done
                except (AssertionError, ConnectionError) as fault:
                    raise AssertionError(f"{step!r} of {line!r}: {fault}") from None

    def step(self, who, verb, words):
        plain = [word for word in words if "=" not in word]
        named = {}
        for word in words:
            key, is_named, value = word.partition("=")
            if is_named:
                named[key] = int(value) if value.isdecimal() else value
        return self.act(who, verb, plain, named)

    def act(self, who, verb, plain, named):
        if hasattr(self, verb):
            return getattr(self, verb)(who, *plain, **named)
        return getattr(self.city[who], verb)(*plain, **named)


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
Heard = collections.namedtuple("Heard", "topic payload qos retain dup id")


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
        first, byte, *_ = self.stream.read(2) or b"\0\0"
        if first == 0:
            raise ConnectionError("the server has closed the connection")
        length = byte % 128
        for place in 1, 2, 3:
            if byte >= 128:
                [byte] = self.stream.read(1)
                length += byte % 128 * 128 ** place
        return first // 16, first % 16, self.stream.read(length)

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
        """The next message, as Heard. Its id is 0 if it has none."""
        kind, flags, body = self.early.pop(0) if self.early else self.packet()
        assert kind == PUBLISH, f"{(kind, flags, body)} came, not a message"
        qos = flags // 2 % 4
        at = 2 + int.from_bytes(body[:2], "big")
        end = at + 2 * bool(qos)
        id = int.from_bytes(body[at:end], "big")
        assert bool(id) == bool(qos), "[MQTT-2.3.1-1] a packet id is never 0"
        return Heard(body[2:at].decode(), body[end:], qos, flags % 2, flags // 8, id)

    def hears(self, topic, payload=b"x", qos=0, retain=0, dup=0):
        """This is the next message; returns its packet id."""
        got = self.message()
        assert got[:-1] == (topic, payload, qos, retain, dup), f"heard {got}"[:300]
        self.ids.append(got.id)
        return got.id

    def takes(self, topic, payload=b"x", qos=0, retain=0):
        return self.settle(qos, self.hears(topic, payload, qos, retain))

    def sends(self, topic, **flags):
        self.send(publish(topic, **flags))

    def gives(self, kind, id=0):
        """An acknowledgement, of the last message that was heard if it has no id."""
        self.send(ack(globals()[kind.decode()], id or self.ids[-1]))

    def gets(self, kind, id=0):
        self.expect(ack(globals()[kind.decode()], id or self.ids[-1]))

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

CASES = [   # title; who starts then: name, place, battery; what must be seen
    ("Case 1: car1 asks server1, which has a free spot", "car1 A 20",
     "P1 +<- car1 .*charging"),
    ("Case 2: server1 is full, and soon server2, too: car2 takes its spot", "car2 C 20",
     "P3 +<- car2 .*charging"),
    ("... so car3, which asks server1, is sent on to server3", "car3 A 24",
     "cloud +-> server2 +car3-(.|\n)*P5 +<- car3 .*charging"),
    ("Case 3: no spot is free anywhere: car4 waits until car1 leaves", "car4 A 20",
     "car4 .*full(.|\n)*P1 +<- car1 .*leaves(.|\n)*P1 +<- car4 .*charging")]


def run_demo():
    """Ends with an AssertionError if one of the three cases does not happen."""
    told = []

    def show(line):
        told.append(line)
        print(line, flush=True)

    show("=== A cloud, a ring of three brokers, and three stations with one spot each")
    city = City(show=show, P1=1, P3=1, P5=1)
    try:
        for title, words, pattern in CASES:
            show(f"=== {title}")
            name, at, battery = words.split()
            city.car(name, "--charges", 1, at=at, battery=battery, speed=4)
            wait_until(lambda: re.search(pattern, "\n".join(told)), what=lambda: title)
        city["car1"].ends(0)
        show("=== All three cases happened.")
    finally:
        city.erase()


class Rush:
    """Many cars that ask the running city at once, each at the end of a connection.

    Their spots are free again when the leases end.
    """
    FARED = ["by its own broker", "one broker further", "two brokers further",
             "further on"]

    def __init__(self, city, count):
        dice = random.Random(SEED)
        self.city = city
        self.homes = {}         # car: the place where it is
        for n in range(count):
            self.homes[f"rush{SEED}-{n}"] = dice.choice([*city.places])
        self.clients = {}
        self.began = 0.0
        self.replies = {}       # car: its first reply
        self.times = collections.defaultdict(list)      # how they fared: [ms]

    def join(self, name, broker):
        hello = connect(name)
        if cloud_server.KEY:
            hello = connect(name, name, cloud_server.mqtt_password(name), flags=194)
        client = RawClient(broker.mqtt, hello, host=broker.host).expect(WELCOME)
        return client.subscribes(f"{broker.name}/cars/{name}/reply")

    def run(self):
        """Returns the exit status: 1 if a reply is late, missing or double."""
        ready = selectors.DefaultSelector()
        for name, place in self.homes.items():
            self.clients[name] = self.join(name, self.city.broker_of(place))
            ready.register(self.clients[name].socket, selectors.EVENT_READ, name)
        self.began = time.monotonic()
        for name, place in self.homes.items():
            request = json.dumps({"id": f"{name}-1", "at": place, "range": 60})
            topic = f"{self.city.broker_of(place).name}/cars/{name}/request"
            self.clients[name].send(publish(topic, request.encode()))
        end = self.began + 9 + SLACK
        while len(self.replies) < len(self.homes) and time.monotonic() < end:
            for key, _ in ready.select(0.1):
                message = self.clients[key.data].message()
                self.hear(key.data, json.loads(message.payload))
        seconds = time.monotonic() - self.began
        self.look_for_doubles()
        return self.report(seconds)

    def hear(self, name, reply):
        took = 1000 * (time.monotonic() - self.began)
        fared = "refused"
        if took > 9000:
            fared = "late"
        elif reply["station"]:
            fared = self.FARED[min(3, len(reply["asked"]) - 1)]
        self.replies[name] = reply
        self.times[fared].append(took)

    def look_for_doubles(self):
        """A second reply, or a spot that was promised twice."""
        for client in self.clients.values():
            self.times["double"] += client.send(PING).expect(PONG).early
            client.send(GOODBYE).close()
        offers = [reply["station"] for reply in self.replies.values()]
        for name in self.city.stations():
            over = offers.count(name) - self.city.places[name]["spots"]
            self.times["double"] += [name] * over

    def report(self, seconds):
        self.times["missing"] = [*self.homes.keys() - self.replies]
        print(f"{'':24}{'cars':>6}{'median':>12}{'99 %':>12}{'slowest':>12}")
        for fared in *self.FARED, "refused", "late", "missing", "double":
            times = sorted(self.times[fared])
            columns = ""
            if times and fared not in ("missing", "double"):
                for part in 0.5, 0.99, 1:
                    columns += f"{times[math.ceil(len(times) * part) - 1]:9.1f} ms"
            print(f"{fared:24}{len(times):6}{columns}")
        count = len(self.replies)
        print(f"{count} replies in {seconds:.2f} s: {count / seconds:.0f} a second")
        return int(any(self.times[fared] for fared in ("late", "missing", "double")))


def run_rush(config, count):
    """Returns the exit status."""
    cloud_server.KEY = EV_KEY
    cloud_server.raise_file_limit()
    try:
        return Rush(ring.load(config), count).run()
    except (OSError, ring.Invalid) as fault:
        print(f"rush hour needs a city that runs: {fault}")
        return 1


# ======================================================================================
# One function or object at a time: no process, no socket
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
    FILE = describe({"P1": 2, "P3": 1})
    WALKS = """
        b yes=d,a 0   | c:1.5 d:1.5       | d  # the first that says yes
        a yes=    0   | b:1.5 c:1.5 d:1.5 |    # round to the one before the first
        b yes=    1.5 | c:1.5 d:1.5 a:0.5 |    # three that hang
        b yes=    3.5 | c:1.5             |    # no time is left
        """
    MISTAKES = """
        cloud               | gone             | no cloud
        cloud.host          | "a..b"           | not a host name
        cloud.port          | 65536            | not a port
        brokers             | []               | no brokers
        brokers.1.mqtt      | "1883"           | a port as a text
        brokers.1.name      | "a+"             | a name that is a wildcard
        brokers.1.name      | "server1"        | a broker given twice
        brokers.1.name      | "A"              | a broker and a place of one name
        places              | {}               | no places
        places.P1.broker    | "server9"        | an unknown broker
        places.P1.spots     | 0                | a station without a spot
        places.P1.spots     | 201              | too many spots
        places.A.at         | [1, 2, 3]        | three coordinates
        places.A.at.0       | Infinity         | a place infinitely far away
        places.A.at.0       | true             | what Python takes for 1
        roads.0             | ["A", "Z"]       | a road to nowhere
        roads.0             | ["A", "A"]       | a road from a place to itself
        roads.0             | ["A", "P1", "C"] | a road of three ends
        """
    TWICE = json.dumps(FILE)[:-1].encode() + b', "roads": []}'     # a key
    TEXTS = b"{", b"\xff", b"[" * 20_000, b"9" * 5_000, TWICE
    SCRIPTS = r"""
        cloud_server.py --config bad.json            | ""       | bad.json: .*cloud
        broker.py --config none.json                 | ""       | none.json: No such
        broker.py --config city.json server1 server9 | ""       | city.json: .*server9
        station.py --config city.json A              | ""       | 'A'
        car.py --config city.json --at Z             | ""       | 'Z'
        car.py --config city.json a/b                | ""       | a/b
        car.py --config city.json P1                 | ""       | P1
        station.py                                   | "\udcff" | EV_KEY is not UTF-8
        car.py                                       | "\t "    | EV_KEY
        """

    def test_a_walk_asks_everybody_else_once_until_one_says_yes(self):
        """Home, who says yes, how long each takes | who is asked with what patience"""
        self.has_clock(ring)
        circle = ring.Ring()
        for name in "abcd":
            circle.append(ring.Broker(name, "localhost", 1, 2, 3))
        for words, expected, found in rows("\n".join(lines(self.WALKS))):
            home, yes, seconds = words.split()
            asked = []

            def ask(node, patience):
                asked.append(f"{node.name}:{patience:.1f}")
                self.now += float(seconds)
                return node.name if node.name in yes else None
            offer, names = ring.walk(circle.find(home).others(), ask)
            self.assertEqual((" ".join(asked), offer or ""), (expected, found))
            self.assertEqual(names, [who[0] for who in asked])
        alone = ring.Broker("b", "localhost", 1, 2, 3)
        self.assertEqual((alone.next, [*alone.others()]), (alone, []))

    def test_the_shortest_way_by_road(self):
        """From A to D over B, though C is nearer to A."""
        at = {"A": [0, 0], "B": [3, 0], "C": [0, 1], "D": [4, 0], "E": [9, 9]}
        places = {name: {"at": at[name], "broker": "b"} for name in at}
        roads = [["A", "C"], ["B", "D"], ["C", "D"], ["B", "A"]]
        city = ring.City(self.FILE | {"places": places, "roads": roads})
        self.assertEqual([(*way,) for way in city.ways("A").values()], [
            (0, ["A"]), (1, ["A", "C"]), (3, ["A", "B"]), (4, ["A", "B", "D"])])

    def test_servers_json(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "city.json")
            path.write_text(json.dumps(self.FILE))
            city = ring.load(path)
            second = city.broker_of("P3")
            self.assertIs(second, city.ring.find("server1").next)
            self.assertEqual((second.mqtt, second.http, second.address, city.cloud),
                             (5004, 5005, ("127.0.0.1", 5006), ("127.0.0.1", 5000)))
            self.assertEqual(city.stations("server1"), ["P1"])
            texts = [json.dumps(changed(self.FILE, where, new)).encode()
                     for where, new, _ in rows(self.MISTAKES)]
            for text in *texts, *self.TEXTS:
                path.write_bytes(text)
                with self.subTest(text), self.assertRaisesRegex(
                        ring.Invalid, rf"\A{path}: .*\Z"):
                    ring.load(path)

    def test_each_script_ends_with_one_line(self):
        """Exit status 2, and one line on stderr that names the fault."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "bad.json").write_text("{}")
            Path(folder, "city.json").write_text(json.dumps(self.FILE))
            for words, key, fault in rows(self.SCRIPTS):
                script, *options = words.split()
                end = subprocess.run(
                    [sys.executable, HERE / script, *options], text=True, cwd=folder,
                    capture_output=True, env=os.environ | {"EV_KEY": json.loads(key)})
                with self.subTest(words):
                    self.assertEqual((end.returncode, end.stdout), (2, ""))
                    self.assertRegex(end.stderr, rf"\A.*{fault}.*\n\Z")


class Shapes(unittest.TestCase):
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
            with self.subTest(why), self.assertRaisesRegex(ring.Invalid, rf"\A{name}"):
                ring.fit(self.SHAPES[name], bad, name)

    def test_a_reply_is_to_this_request_and_of_this_map(self):
        city = ring.City(describe({"P1": 1}))
        good = self.GOOD["offer"]
        self.assertEqual(cloud_server.read_reply(city, good, "a-1"), good)
        for key, wrong in rows("id|a-2 \n station|P2 \n broker|x"):
            with self.subTest(key), self.assertRaises(ring.Invalid):
                cloud_server.read_reply(city, good | {key: wrong}, "a-1")

    def test_how_long_a_name_may_be(self):
        for kind, longest in (ring.NAME, 64), (ring.ID, 64), (station.CLAIM_ID, 200):
            self.assertTrue(kind.holds("n" * longest))
            self.assertFalse(kind.holds("n" * (longest + 1)))


class Breaker(Story):
    """cloud_server.py: asking others; who is silent is left out for 10 s and more."""

    def test_longer_each_time_until_it_answers(self):
        self.has_clock(cloud_server)
        caller = cloud_server.Caller()
        caller.exchange = lambda *question: b"{}"
        breaker = caller.breaker
        for seconds in 10, 20, 40, 80, 80, 10:
            if seconds == 10:
                caller.ask("x", {}, 1)
            breaker.failed("x")
            breaker.failed("x")     # others waited for it, too: that was one time
            self.now += seconds - 0.25
            self.assertTrue(breaker.is_open("x"))
            self.now += 0.25
            self.assertFalse(breaker.is_open("x"))

    def test_nine_brokers_of_which_seven_hang(self):
        """Who hangs hides no spot: the ninth is found by the fifth try."""
        self.has_clock(cloud_server, ring)
        file = {"cloud": {"host": "x", "port": 99}, "brokers": [], "roads": [],
                "places": {"P": {"at": [0, 0], "broker": "b9", "spots": 1}}}
        for n in range(1, 10):
            file["brokers"].append({"name": f"b{n}", "host": "x", "mqtt": 1, "http": 2,
                                    "tcp": n})
        city = ring.City(file)
        request = {"id": "a-1", "car": "ann", "at": "P", "range": 50}
        yes = {"id": "a-1", "station": "P", "broker": "b9", "km": 1, "route": ["P"],
               "lease": 15, "asked": ["b9"]}

        def exchange(address, question, seconds):
            self.now += 0.001
            if address == ("x", 9):
                return json.dumps(yes).encode()
            self.now += seconds
            raise TimeoutError
        caller = cloud_server.Caller()
        caller.exchange = exchange
        asked = []
        for _ in range(5):
            reply = cloud_server.search(city, request, city.ring.find("b1"), caller,
                                        mock.Mock())
            asked.append(" ".join(reply["asked"]))
            self.now += 5
        self.assertEqual(asked, [
            "b2 b3 b4", "b5 b6 b7", "b2 b3 b4", "b5 b6 b7", "b8 b9"])
        self.assertEqual(reply["station"], "P")

    def test_a_connection_is_kept_and_replaced_when_it_was_closed(self):
        """Two questions on the first one; it is closed, so there is a second one."""
        def serve():
            for questions in 2, 1:
                connection, _ = server.accept()
                with connection, connection.makefile("rb") as stream:
                    for _ in range(questions):
                        stream.readline()
                        connection.sendall(b"{}\n")
        caller = cloud_server.Caller()
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=serve)
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
                self.assertFalse(caller.breaker.is_open(address))
                with self.assertRaisesRegex(cloud_server.NoAnswer, why):
                    caller.ask(address, {}, seconds)
                hung.listen()
        self.assertTrue(caller.breaker.is_open(address))


class TheStation(Story):
    """station.py: its spots, its leases and its memory, without a broker.

    It has two spots, and says: `mark`, `online`, its state (`ann-held+bob-charging`, or
    `empty`), `yes:ID`, `no:ID`.
    """

    def setUp(self):
        self.has_clock(station)
        self.starts("P1")

    def starts(self, name, *memory):
        self.said = []
        self.it = station.Station(name, ring.City(describe({"P1": 2})), 15)
        self.it.publish = self.note
        self.it.close = mock.Mock()
        self.connects(name, *memory)

    def connects(self, name, life="", *cars):
        """Its broker lets it in, and has a state of it: of its own life, or another."""
        self.it.mqtt = mock.Mock()
        self.it.is_up = True
        self.it.greet()
        if life:
            state = {"station": name, "spots": 3, "free": 0, "life": 1,
                     "cars": dict(car.split("-") for car in cars)}
            if life == "own":
                state["life"] = self.it.life
            self.hears("stations/P1/state", state, retain=1)
        self.hears("stations/P1/mark", {})

    def note(self, topic, value, qos=1, retain=False):
        said = topic.rpartition("/")[2]
        if said == "state":
            self.assertEqual(value["free"], value["spots"] - len(value["cars"]))
            said = "+".join("-".join(item) for item in value["cars"].items()) or "empty"
        elif said == "answer":
            self.assertEqual(value.get("lease", 15), 15)
            said = f"{'yes' if value['ok'] else 'no'}:{value['id']}"
        self.said.append(said)

    def hears(self, topic, value, retain=0):
        message = SimpleNamespace(topic=f"server1/{topic}", retain=retain,
                                  payload=json.dumps(value).encode())
        self.it.look = lambda turn: [message]
        self.it.attend(0)

    def claims(self, car, use, id="", retain=0):
        claim = {"use": use, "id": id} if id else {"use": use}
        self.hears(f"cars/{car}/claim/P1", claim, retain)

    def leaves(self, car, retain=0):
        self.hears(f"cars/{car}/leave/P1", {}, retain)

    def says(self, name, *said):
        self.assertEqual(self.said, [*said])
        self.said.clear()

    def passes(self, time, seconds):
        """Then it looks at its leases, once."""
        self.now += float(seconds)
        self.it.stopping.clear()
        self.it.look = lambda turn: self.it.stopping.set() or []
        self.it.live()
        self.said.clear()

    def has(self, name, *cars):
        self.assertEqual([f"{car}-{spot.use}" for car, spot in self.it.cars.items()],
                         [*cars])

    def is_cut_off(self, name):
        self.it.is_up = False

    async def test_take_renew_refuse(self):
        await self.plays("""
            P1 says mark empty online
            ann claims held a-1@server1-9
            P1 says ann-held yes:a-1@server1-9
            ann claims charging
            ann claims held a-2@server1-9      # it comes late: who charges goes on
            P1 says ann-charging yes:a-2@server1-9
            bob claims held
            bob claims held                    # nothing new, so nothing to say
            P1 says ann-charging+bob-held
            cid claims held c-1@server1-9
            P1 says ann-charging+bob-held no:c-1@server1-9
            ann leaves
            cid claims charging
            P1 has bob-held cid-charging""")

    async def test_what_does_not_count(self):
        """What is only repeated (retained), and what is invalid."""
        await self.plays("""
            ann claims held
            P1 says mark empty online ann-held
            e\u200be claims held               # no name: it is not printable
            eve claims free                    # no use""")
        self.leaves("ann", retain=1)
        self.claims("bob", "held", retain=1)
        self.hears("stations/P1/mark", {}, retain=1)
        self.claims("eve", "held", id="i" * 201)
        self.assertEqual(self.said, [])

    async def test_a_lease_ends_by_itself(self):
        """15 s after the last claim; but not while the station is cut off: then all
        begin anew when its mark is back, not before."""
        await self.plays("""
            ann claims held
            time passes 10
            bob claims charging
            time passes 4.75
            P1 has ann-held bob-charging
            time passes 0.25
            P1 has bob-charging
            bob claims held
            time passes 14.75
            P1 is_cut_off
            time passes 100
            P1 has bob-charging
            P1 connects
            time passes 14.75
            P1 has bob-charging
            time passes 0.25
            P1 has""")
        self.claims("ann", "held")
        self.it.greet()             # connected, but its mark is not back
        await self.plays("time passes 99 \n P1 has ann-held")

    async def test_it_remembers(self):
        """Once, with whole leases, and no more cars than it has spots."""
        await self.plays("""
            P1 starts another ann-held bob-charging cid-charging
            P1 has bob-charging cid-charging
            time passes 14.75
            P1 has bob-charging cid-charging
            bob leaves
            P1 connects own ann-held bob-charging cid-charging
            P1 has cid-charging""")

    async def test_whoever_was_started_later_is_the_station(self):
        """The older one finds another life when it is back, and says nothing more."""
        await self.plays("""
            P1 says mark empty online
            P1 connects another ann-held
            P1 says mark""")
        self.assertTrue(self.it.stopping.is_set())

    def test_its_state_always_fits_into_a_packet(self):
        self.it.spots = 200
        self.it.publish = mock.Mock()
        for n in range(200):
            self.claims("\U0001f697" * 61 + f"{n:03}", "charging")
        _, state = self.it.publish.call_args.args
        self.assertEqual(state["free"], 0)
        self.assertLess(len(station.to_json(state)), 65_000)


class TheCar(Story):
    """car.py: what it decides, in a world of this test's own.

    What it says is told as rows: to which broker, what | in which seconds of its life.
    """

    def setUp(self):
        self.has_clock(station, car, cloud_server)
        self.city = ring.City(describe({"P1": 1, "P2": 1, "P3": 1, "P5": 1}))
        self.down = set()       # brokers that do not answer
        self.replies = []       # what the fog replies, one after the other
        self.shown = True       # does its station show it as it claims to be?
        self.events = []        # (second, what happens then)

    def offer(self, *route, lease=15):
        broker = self.city.places[route[-1]]["broker"]
        return {"station": route[-1], "broker": broker, "route": route, "km": 1,
                "lease": lease}

    def lives(self, seconds, at="A", battery=20.0, charges=math.inf, speed=1.0):
        """The life of a car for so many seconds of this world's time."""
        self.said = collections.defaultdict(list)
        self.began = self.now
        self.end = self.now + seconds
        self.it = car.Car("zoe", self.city, at, battery, speed, charges)
        self.it.look = self.look
        self.it.publish = self.hears
        self.it.last = mock.Mock()
        self.it.live()

    def look(self, turn):
        """What happens in the world while the car looks at its connection."""
        self.now += turn
        if self.now > self.end:
            self.it.stopping.set()
        while self.events and self.began + self.events[0][0] <= self.now:
            self.events.pop(0)[1]()
        if self.it.broker.name not in self.down and not self.it.is_up:
            self.it.mqtt = mock.Mock()
            self.it.is_up = True
            self.it.failures = 0
            self.it.greet()
        elif self.it.broker.name in self.down and self.now > self.it.next_try:
            self.it.next_try = self.now + 1
            self.it.lose("down")
        messages, self.it.inbox = self.it.inbox, []
        return messages

    def hears(self, topic, value, qos=1, retain=False):
        """What broker, fog node and station do when the car says something."""
        if not self.it.is_up:
            return
        name, _, _, verb, *place = topic.split("/")
        about = {"doing": "goes away"} if value is None else value
        words = [name, verb, *place, *[about[key] for key in ("at", "use", "doing")
                                       if key in about]]
        self.said[" ".join(words)].append(str(round(self.now - self.began)))
        if verb == "request" and self.replies:
            reply = {"id": value["id"], "asked": [name]} | self.replies.pop(0)
            self.tells(f"{name}/cars/zoe/reply", reply)
        if verb == "claim" and self.shown:
            self.tells(f"{name}/stations/{place[0]}/state", {
                "station": place[0], "spots": 1, "free": 0, "life": 1,
                "cars": {"zoe": value["use"]}})

    def tells(self, topic, value):
        payload = json.dumps(value).encode()
        self.it.inbox.append(SimpleNamespace(topic=topic, payload=payload))

    def says(self, expected):
        """Just that, of these verbs."""
        verbs = set(re.findall(r"server\d (\w+)", expected))
        said = [[words, " ".join(times)] for words, times in self.said.items()
                if words.split()[1] in verbs]
        self.assertEqual(said, rows(expected))

    def test_it_asks_at_places_only(self):
        """Below 25 %, or where the next road is longer than it can drive."""
        self.lives(9, battery=25.5)
        [request] = [words for words in self.said if "request" in words]
        self.assertIn(request.split()[-1], self.city.places)
        self.assertLess(self.it.range(), 15)
        self.city.places["P5"]["at"] = [40, 0]      # 30 km from E, its only road
        for at, battery, asks in ("A", 25, False), ("P5", 49, True), ("P5", 51, False):
            self.lives(1, at, battery)
            self.assertEqual("request" in str(self.said.keys()), asks)

    def test_it_claims_every_third_of_a_lease(self):
        """Held while it drives; charging, and at once, when it is there."""
        self.replies = [self.offer("A", "C", "E", "P5", lease=6)]
        self.lives(40, charges=1)
        self.says("""
            server1 request A         | 0
            server3 claim P5 held     | 0 2 4 6 8 10
            server3 claim P5 charging | 11 13 15 17 19
            server3 leave P5          | 21""")
        self.assertIn("server3 state P5 offline", self.said)
        self.assertEqual(self.it.battery, 100)

    def test_it_charges_only_where_it_is_shown_as_charging(self):
        """Not shown for 3 s it asks anew, whatever its battery; refused, it waits."""
        self.shown = False
        self.replies = [self.offer("A", "P1"), {"station": None, "reason": "full",
                                                "retry": 5}]
        self.lives(12)
        self.says("""
            server1 request A         | 0
            server1 claim P1 charging | 1 2 3 4
            server1 leave P1          | 4
            server1 request P1        | 4 9""")
        self.assertEqual(self.said["server1 state P1 waiting"][0], "4")

    def test_a_broker_away_costs_no_spot_within_a_lease(self):
        """On its way or charging, it goes on, and claims when the broker is back."""
        for second in 3, 13:
            self.replies = [self.offer("A", "C", "E", "P5")]
            self.events = [(second, lambda: self.down.add("server3")),
                           (second + 8, self.down.clear)]
            self.lives(40, charges=1)
            self.says("server1 request A | 0 \n server3 leave P5 | 21")
            claims = self.said["server3 claim P5 charging"]
            self.assertIn(str(second + 8), claims)

    def test_a_broker_away_for_longer_costs_the_spot(self):
        """A lease after its last claim it asks elsewhere: the next broker."""
        self.replies = [self.offer("A", "P1", lease=6)]
        self.events = [(4, lambda: self.down.add("server1"))]
        self.lives(12, battery=5)
        self.says("""
            server1 request A         | 0
            server1 claim P1 charging | 1 3
            server2 request P1        | 9""")

    def test_without_a_spot_it_turns_to_the_next_broker(self):
        """After a second failure, or without a reply for 10 s."""
        self.down.add("server1")
        self.lives(5)
        self.says("server2 request A | 1")
        self.down.clear()
        self.lives(15)
        self.says("server1 request A | 0 \n server2 request A | 10")

    def test_it_connects_where_it_is(self):
        """In another region to another broker; the old one is told to forget it."""
        with mock.patch("car.random.choice", lambda roads: roads[-1]):
            self.lives(11, battery=90, speed=2)     # from A to C, to E, to P5
        self.assertEqual([*self.said][:5], [
            "server1 state A driving", "server1 state goes away",
            "server2 state C driving", "server2 state goes away",
            "server3 state E driving"])


class TheFog(Story):
    """broker.py: how a fog node finds a spot. This test is its MQTT server.

    `ann finds P2 P1 P2`: she is offered P2, after claims at P1 and P2; 0 is no offer.
    """
    INVALID = """
        stations/P1/state  | {"station": "P2", "spots":1, "free":1, "cars":{}, "life":1}
        stations/P1/state  | {"station": "P1", "spots":1, "free":2, "cars":{}, "life":1}
        stations/P9/online | true
        stations/P1/online | 1
        stations/P1/online | {
        stations/P1/answer | {"id": "x", "car": "ann", "ok": true}
        cars/ann/state     | {"car": "bob", "at": "A", "battery": 5, "doing": "going"}
        cars/ann/state     | {"car": "ann", "at": "Z", "battery": 5, "doing": "going"}
        """

    async def asyncSetUp(self):
        self.has_clock(cloud_server)
        city = ring.City(describe({"P1": 2, "P2": 2, "P3": 1}))
        with mock.patch.object(broker, "WALKERS", 1):
            self.fog = broker.Fog("server1", city, mock.Mock())
        self.addCleanup(self.fog.walkers.shutdown, wait=False)
        full = cloud_server.refusal("a-1", "full", ["server2"])
        self.fog.walk_ring = lambda request: copy.deepcopy(full)
        self.fog.attach(mock.Mock(publish=self.publish))
        self.claims = []        # (station, car, id) that the fog has sent
        self.replies = []
        self.answers = {}       # station: "yes", "no", or "nothing"
        self.range = 50
        await self.plays("""
            P1 says online true \n P1 shows 2
            P2 says online true \n P2 shows 2""")

    def publish(self, topic, payload, qos):
        _, _, car, verb, *name = topic.split("/")
        value = json.loads(payload)
        if verb == "reply":
            self.replies.append(value)
        elif verb == "claim":
            self.claims.append((*name, car, value["id"]))
            self.answer(*name, value["id"], self.answers.get(*name, "yes"))

    def answer(self, name, id, word):
        value = {"id": id, "car": "ann", "ok": word == "yes"}
        if word == "yes":
            value["lease"] = 15
        if word != "nothing":
            self.says(name, "answer", json.dumps(value))

    def hears(self, topic, text, retain=False):
        message = broker.Message(f"server1/{topic}", text.encode(), 1, retain)
        self.fog.deliver(message, 1)

    def says(self, name, verb, text):
        self.hears(f"stations/{name}/{verb}", text)

    def shows(self, name, free, *cars):
        state = {"station": name, "spots": int(free) + len(cars), "free": int(free),
                 "cars": dict.fromkeys(cars, "held"), "life": 1}
        self.says(name, "state", json.dumps(state))

    def replies_with(self, name, word):
        self.answers[name] = word

    def can_drive(self, car, km):
        self.range = float(km)

    def time_passes(self, clock, seconds):
        self.now += float(seconds)

    async def asks(self, car="ann", act="search"):
        request = {"id": "a-1", "car": car, "at": "A", "range": self.range}
        self.reply = await getattr(self.fog, act)(request)
        return self.reply

    async def finds(self, car, found, *claimed):
        before = len(self.claims)
        reply = await self.asks(car)
        self.assertEqual(reply["station"] or "0", found)
        self.assertEqual([name for name, *_ in self.claims[before:]], [*claimed])

    def hears_that(self, car, *words):
        self.assertEqual(self.reply["reason"], " ".join(words))

    async def test_which_station(self):
        """The nearest first, but before it the one that keeps a spot for this car. Who
        has none is not even asked."""
        await self.plays("""
            ann finds P1 P1
            P1 replies_with no
            ann finds P2 P1 P2
            P1 replies_with yes
            P2 shows 0 ann bob
            ann finds P2 P2
            cid finds P1 P1
            ann can_drive 1                 # so P2 is too far
            ann finds P1 P1
            P1 shows 0 bob cid
            ann finds 0
            ann hears_that full
            ann can_drive 0.9
            ann finds 0
            ann hears_that out of range
            ann can_drive 50
            P2 says online false
            ann finds 0""")
        self.assertEqual(self.reply["asked"], ["server1", "server2"])
        ids = {id for *_, id in self.claims}
        self.assertEqual(len(ids), len(self.claims))
        self.assertTrue(all(id.startswith("a-1@server1-") for id in ids))

    async def test_two_silent_stations_are_waited_for_and_then_left_out(self):
        self.fog.states["P3"] = self.fog.states["P1"] | {"station": "P3"}
        self.fog.turns["P3"] = asyncio.Semaphore(1)
        self.fog.online.add("P3")       # a third one, farther away
        with mock.patch.object(broker, "STATION_WAIT", 0.05):
            await self.plays("""
                P1 replies_with nothing
                P2 replies_with nothing
                ann finds 0 P1 P2
                ann finds P3 P3""")
        await self.plays("""
            P1 replies_with yes
            P2 replies_with yes
            P2 shows 2                      # whoever speaks is asked again
            ann finds P2 P2
            clock time_passes 10
            ann finds P1 P1""")

    async def test_an_answer_counts_once_and_from_whom_was_asked(self):
        self.answers["P1"] = "nothing"
        task = asyncio.ensure_future(self.asks())
        await asyncio.sleep(0)
        [(_, _, id)] = self.claims
        self.answer("P2", id, "yes")
        self.answer("P1", id + "0", "yes")
        self.assertFalse(task.done())
        for word in "yes", "no", "yes":
            self.answer("P1", id, word)
        self.assertEqual((await task)["station"], "P1")
        self.assertEqual(self.fog.answers, {})

    async def test_sixteen_claims_at_a_time(self):
        await self.plays("P1 replies_with nothing \n P1 shows 200")
        tasks = [asyncio.ensure_future(self.asks(f"c{n}")) for n in range(40)]
        await asyncio.sleep(0)
        self.assertEqual(len(self.claims), 16)
        self.answer("P1", self.claims[0][2], "yes")
        await tasks[0]
        await asyncio.sleep(0)
        self.assertEqual(len(self.claims), 17)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.assertEqual(self.fog.answers, {})

    async def test_a_request_has_its_time(self):
        """And then its car is told to wait; beyond 2,000 that is told at once."""
        self.answers["P1"] = "nothing"
        with mock.patch.object(broker, "REQUEST_WAIT", 0.05):
            await self.asks(act="serve")
        self.hears_that("ann", "full")
        self.assertEqual(self.fog.under_way, 0)
        await self.plays("P1 replies_with yes \n P1 shows 2")
        for under_way, found in (1_999, "P1"), (2_000, None):
            self.fog.under_way = under_way
            self.assertEqual((await self.asks(act="serve"))["station"], found)
        self.assertEqual(self.fog.requests, {"local": 1, "ring": 0, "refused": 2})

    async def test_what_is_invalid_or_only_repeated(self):
        table = self.fog.states, self.fog.online, self.fog.cars
        before = copy.deepcopy(table)
        for topic, text in rows(self.INVALID):
            self.hears(topic, text)
        self.assertEqual(table, before)
        topic = "cars/ann/request"
        self.hears(topic, '{"id": "a-1", "at": "A", "range": 5}', retain=True)
        self.hears(topic, '{"id": "a-2", "at": "Z", "range": 5}')
        self.hears(topic, '{"id": 5, "at": "A", "range": 5}')
        self.assertEqual([reply["id"] for reply in self.replies], ["a-2", None])
        for reply in self.replies:
            self.assertRegex(reply["reason"], "^bad request: request")

    def test_the_cars_that_it_remembers(self):
        with mock.patch.object(broker, "REMEMBERED", 3):
            for name in "c0", "c1", "c2", "c0", "c3":
                state = {"car": name, "at": "A", "battery": 5, "doing": "going"}
                self.hears(f"cars/{name}/state", json.dumps(state))
        self.hears("cars/c0/state", "")
        self.assertEqual([*self.fog.cars], ["c2", "c3"])


class Topics(unittest.TestCase):
    """broker.py: who has subscribed to a topic, and who may publish on it."""
    MATCHES = """
        a/b  | a/b a/+ +/b +/+ # a/# a/b/# +/# | b a/b/c a a/+/+ /a/b $a/b
        a    | a + # a/# +/#                   | a/ /a a/+ $a
        /a   | /a /+ +/a +/+ /# #              | a /
        a/   | a/ a/+ +/ a/#                   | a a/b
        $a/b | $a/b $a/+ $a/#                  | +/b # +/# +/+
        """
    SPEAKERS = """
        car1 | server1/cars/car1/x server2/cars/car1/claim/P3
        car1 | x server10/x server1x /server1/x
        P1   | server1/stations/P1/state server1/stations/P1/a/b
        """
    MUTE = "server1/cars/car2/x server1/cars/car1 server1/x/car1/x server1 server2/x"

    def test_the_filters_that_match(self):
        """[MQTT-4.7] Before and after others have come and gone."""
        for topic, good, bad in rows(self.MATCHES):
            tree = broker.TopicTree()
            for name in good.split() + bad.split():
                tree.add(name, "all", 0)
                tree.add(name, name, 1)
            tree.add(topic, "all", 2)
            found = {"all": 2} | dict.fromkeys(good.split(), 1)
            self.assertEqual(tree.match(topic), found)
            for name in good.split() + bad.split():
                tree.remove(name, name)
                tree.remove(name, "all")
            self.assertEqual((tree.below, tree.subscribers), ({}, {}))

    def test_who_may_publish(self):
        """As itself below a broker's name; anybody elsewhere."""
        for name, topics in rows(self.SPEAKERS):
            for topic in topics.split():
                self.assertTrue(broker.may_publish(name, topic, {"server1", "server2"}))
        for topic in self.MUTE.split():
            self.assertFalse(broker.may_publish("car1", topic, {"server1", "server2"}))


# ======================================================================================
# The MQTT server, packet by packet: with the clauses of the OASIS standard in brackets
# ======================================================================================

class Packets(Story):
    """broker.py: each mistake closes the connection, and is answered with nothing.

    How to read a packet: "text" stands for its length in two bytes and itself, - for
    the length of the rest; all other bytes are hexadecimal.
    """
    CONNECTS = """
        30 - "t"                            | not CONNECT [MQTT-3.1.0-1]
        50                                  | the beginning of "POST ...", and no more
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
        parts = []
        for word in re.findall(r'"[^"]*"|\S+', words):
            if word.startswith('"'):
                parts.append(encode(0, 0, word[1:-1])[2:])
            else:
                parts.append(word.encode() if word == "-" else bytes.fromhex(word))
        if b"-" in parts:
            at = parts.index(b"-")
            parts[at] = bytes([sum(map(len, parts[at + 1:]))])
        return b"".join(parts)

    async def test_what_is_not_well_formed(self):
        server = broker.MqttServer({"server1"}, set(), mock.Mock())
        for first, table in (b"", self.CONNECTS), (connect("eve"), self.PACKETS):
            for words, why in rows(table):
                client = join(server, first)
                client.flush()
                client.transport.write.reset_mock()
                if first:
                    client.session.keep(7, broker.Unacked(b"2", PUBACK))
                client.data_received(self.parse(words))
                with self.subTest(why):
                    self.assertTrue(client.is_closed)
                    client.transport.write.assert_not_called()

    def test_each_length_there_and_back(self):
        for size in 0, 127, 128, 16_383, 16_384, cloud_server.LIMIT - 4:
            packet = broker.encode(PUBLISH, bytes(size))
            self.assertEqual(packet, encode(PUBLISH, 0, bytes(size)))
            buffer = bytearray(packet + b"after")
            found = broker.take_packet(buffer)
            self.assertEqual((found.kind, found.flags, len(found.body), buffer),
                             (PUBLISH, 0, size, b"after"))
            for missing in range(1, min(len(packet), 9)):
                self.assertIsNone(broker.take_packet(bytearray(packet[:-missing])))


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


class TooMuch(Story):
    """broker.py: what the MQTT server keeps for one client, and for all."""

    async def asyncSetUp(self):
        self.server = broker.MqttServer(set(), {"P1/state"}, mock.Mock())

    async def goes_round(self, times=3):
        for _ in range(times):      # the loop
            await asyncio.sleep(0)

    async def test_nothing_more_for_who_is_too_slow(self):
        """However much comes before the loop comes round to end it. Wills never nest.
        """
        slow = [join(self.server, connect(f"c{n}"), subscribe("t")) for n in range(200)]
        await self.goes_round()
        for client in slow:
            client.will = broker.Message("t", bytes(60_000))
            client.transport.get_write_buffer_size.return_value = broker.BUDGET + 1
            client.transport.write.reset_mock()
        for _ in range(9):
            self.server.publish("t", bytes(60_000))
        await self.goes_round(1_000)
        self.assertEqual((self.server.connections, self.server.sessions), (set(), {}))
        self.assertEqual({client.transport.write.call_count for client in slow}, {1})

    async def test_one_budget_for_what_is_not_acknowledged(self):
        """Beyond it a connected client is dropped, an absent one loses the oldest."""
        ann = join(self.server, connect("ann"), subscribe("t", qos=1))
        bob = join(self.server, connect("bob", flags=0), subscribe("t", qos=1))
        session = bob.session
        bob.connection_lost(None)
        for n in range(40):
            self.server.publish("t", b"%d" % n + bytes(50_000), 1)
        self.assertTrue(ann.transport.is_closing())
        self.assertEqual([unacked.packet[9:11] for unacked in session.unacked.values()],
                         [b"%d" % n for n in range(20, 40)])
        again = join(self.server, connect("bob", flags=0))
        await self.goes_round()
        self.assertFalse(again.transport.is_closing())      # it gets all that was kept
        again.data_received(b"".join(ack(PUBACK, id) for id in [*session.unacked]))
        self.assertEqual(session.size(), 129)   # its filter is left, of one level
        id = 0
        while not again.is_closed:
            id += 1
            again.data_received(publish("x", b"", 2, id=id))
        self.assertEqual(id, (broker.BUDGET - 129) // 128 + 1)      # these count, too

    async def test_filters_sessions_and_retained_messages(self):
        """What comes new finds no room, but a station's state always does."""
        server = self.server
        eve = join(server, connect("eve")).session
        codes = [server.subscribe(eve, f"{n}/a/b", 1) for n in range(5_000)]
        self.assertTrue(1_000 < codes.index(0x80) < 4_000)
        server.unsubscribe(eve, "0/a/b")
        self.assertEqual(server.subscribe(eve, "x", 1), 1)
        for n in range(1_002):
            join(server, connect(f"c{n}", flags=0)).connection_lost(None)
        self.assertEqual(len(server.sessions), 1_001)       # eve is there, too
        self.assertNotIn("c1", server.sessions)
        for n in range(2_000):
            server.publish(f"large/{n}", bytes(60_000), retain=True)
        self.assertTrue(1_000 < len(server.retained) < 1_200)
        server.publish("large/0", bytes(120_000), retain=True)      # it has grown
        server.publish("P1/state", bytes(65_000), retain=True)
        self.assertNotIn("large/0", server.retained)
        self.assertIn("P1/state", server.retained)
        for topic in [*server.retained]:
            server.publish(topic, b"", retain=True)
        self.assertEqual(server.retained_bytes, 0)

    async def test_an_expensive_subscription_is_served_in_slices(self):
        for n in range(1_000):
            self.server.publish("a/" * 10 + str(n), b"x", retain=True)
        filters = ["/".join(levels) for levels in itertools.product("a+", repeat=11)]
        began = time.monotonic()
        eve = join(self.server, connect("eve"), subscribe(*filters), PING)
        self.assertLess(time.monotonic() - began, 0.1 + SLACK)
        await self.goes_round(5)
        self.assertEqual(eve.transport.pause_reading.call_count, 6)

    async def test_packet_ids(self):
        """[MQTT-2.3.1-4] After all 65,535 one that is still on its way is left out."""
        session = broker.Session("ann", False)
        session.deliver(broker.Message("t", b"", 1), 1)
        for _ in range(65_600):
            session.deliver(broker.Message("t", b"", 1), 1)
            first, last = session.unacked
            self.assertTrue(first == 1 < last <= 65_535)
            session.forget(last)


class Mqtt(Story):
    """ann, bob and others, with ids and topics of this test's own, at a real server.

    Steps are methods of RawClient. `t` is a topic of this test's own, `t/a` is below
    it; `qos=1` and the like are named; any other word is a payload or kind of packet.
    """
    SPOTS = dict(P1=1, lease=0)
    COUNT = itertools.count(1)

    def setUp(self):
        self.addCleanup(self.city.check)
        self.mark = f"x{next(self.COUNT)}"
        self.t = f"t/{self.mark}"
        self.people = {}
        self.joins("ann")
        self.joins("bob")

    def raw(self, *first):
        client = self.city.raw("server1", "mqtt", *first)
        self.addCleanup(client.close)
        return client

    def joins(self, name, session=None, will=None, retain=0, keep=0):
        """session: None a clean one; 0 or 1 one that stays, and was there or not. will:
        the QoS of "x" to `t`. cid2 is a second connection of cid."""
        flags = 2 * (session is None)
        fields = [name.rstrip("2") + self.mark]
        if will is not None:
            flags += 4 + 8 * will + 32 * retain
            fields += [self.t, "x"]
        client = self.raw(connect(*fields, flags=flags, keep=keep))
        client.expect(ack(CONNACK, 256 * (session or 0)))
        if name in self.people:
            client.ids = self.people[name].ids
        self.people[name] = client

    def unsubscribes(self, name, filter):
        packet = encode(UNSUBSCRIBE, 2, 8, filter)
        self.people[name].send(packet).expect(ack(UNSUBACK, 8))

    def act(self, who, verb, plain, named):
        words = [self.t + word[1:] if word[0] == "t" else word.encode()
                 for word in plain]
        if hasattr(self, verb):
            getattr(self, verb)(who, *words, **named)
        else:
            getattr(self.people[who], verb)(*words, **named)

    def test_byte_by_byte_or_at_once(self):
        """[MQTT-3.1.3-1, -5, 3.1.4, 3.12.4-1] With all the fields that CONNECT has."""
        bob = self.people["bob"].subscribes(self.t)
        hello = connect(self.mark, self.t, "will", "me", "password", flags=198, keep=9)
        story = (hello + (publish("t") + PING) * 9 + subscribe("t") + publish("t"))
        for size in 1, len(story):
            cid = self.raw()
            for at in range(0, len(story), size):
                cid.send(story[at:at + size])
            cid.expect(WELCOME, *[PONG] * 9, ack(SUBACK, 9, 0)).takes("t").vanish()
            bob.hears(self.t, b"will")

    async def test_refused(self):
        """[MQTT-3.1.2-2, 3.1.3-6..8, 3.1.4-5] What follows is not even read."""
        await self.plays("bob subscribes t")
        old = connect("").replace(b"MQTT\4", b"MQTT\3")
        will = connect("eve", "server1/cars/ben/x", "will", flags=6)
        for first, code in (old, 1), (connect("", flags=0), 2), (will, 5):
            self.raw(first, publish(self.t)).expect(ack(CONNACK, code)).closed()
        guest = self.raw(connect("")).expect(WELCOME)
        self.raw(connect("")).expect(WELCOME)
        guest.quiet()       # for each has an id of its own
        await self.plays("bob quiet")

    async def test_resumed_or_clean(self):
        """[MQTT-3.1.2-4..8, 3.2.2-1..3] A clean session keeps nothing."""
        await self.plays("""
            cid joins session=0; subscribes t/0 qos=1; leaves
            cid joins session=1; subscribes t/1 qos=1; leaves
            cid joins; subscribes t/2 qos=1; leaves
            cid joins session=0; subscribes t/3 qos=1; leaves
            ann publishes t/3 qos=1 retain=1; publishes t/1 qos=1; publishes t/2 qos=1
            cid joins session=1; takes t/3 qos=1; quiet""")

    async def test_taken_over(self):
        """[MQTT-3.1.4-2] The first one ends, with its will; the second one is clean."""
        await self.plays("""
            bob subscribes t
            cid joins will=0; subscribes t/+
            cid2 joins
            cid closed
            bob takes t
            ann publishes t/a
            cid2 quiet; subscribes t/+
            ann publishes t/a
            cid2 takes t/a; quiet""")

    async def test_redelivery(self):
        """[MQTT-3.1.2-5, 3.3.1-1, 4.4.0-1, 4.6.0-1] DUP, old ids, in order."""
        for qos in 1, 2:
            cid = f"cid{qos + 2}"
            await self.plays(f"""
                {cid} joins session=0; subscribes t qos={qos}
                ann publishes t 0 qos={qos}; publishes t 1 qos={qos}
                {cid} hears t 0 qos={qos}; hears t 1 qos={qos}; vanish
                ann publishes t new qos={qos}
                {cid} joins session=1; hears t 0 qos={qos} dup=1
                {cid} hears t 1 qos={qos} dup=1; hears t new qos={qos}""")
            first, second, *again, new = self.people[cid].ids
            self.assertEqual(again, [first, second])
            self.people[cid].settle(qos, first, second, new)
            await self.plays(f"{cid} leaves; joins session=1; quiet")

    async def test_exactly_once(self):
        """[MQTT-4.3.3-1, -2, 4.4.0-1] QoS 2, whatever either side sends again."""
        await self.plays("""
            cid joins session=0; subscribes t qos=2
            dan joins session=0; sends t qos=2 id=7; sends t qos=2 id=7 dup=1
            dan gets PUBREC id=7; gets PUBREC id=7; vanish
            dan joins session=1; sends t qos=2 id=7 dup=1; gets PUBREC id=7
            dan gives PUBREL id=7; gets PUBCOMP id=7
            dan gives PUBREL id=7; gets PUBCOMP id=7    # the first one may be lost
            cid hears t qos=2; quiet
            cid gives PUBREC; gets PUBREL; vanish
            cid joins session=1; gets PUBREL; gives PUBCOMP; quiet
            dan sends t qos=2 id=7 dup=1; gets PUBREC id=7      # the id was free
            dan gives PUBREL id=7; gets PUBCOMP id=7
            cid takes t qos=2
            cid gives PUBREC id=99; gets PUBREL id=99; gives PUBACK id=98; quiet""")

    def test_the_lower_qos_in_order(self):
        """[MQTT-3.8.4-6, 3.3.5, 4.3.1..3, 4.6.0-2..6] Each QoS to each, the sender too,
        once; whatever DUP and the ids are."""
        self.joins("cid")
        for granted, person in enumerate(self.people.values()):
            person.subscribes(self.t, granted)
        ids = range(65_530, 65_536)
        ann = self.people["ann"]
        for sent in range(3):
            for id in ids:
                ann.send(publish(self.t, b"%d" % id, sent, 0, sent > 0, id))
            ann.settle(sent, *ids, sender=True)
            for granted, person in enumerate(self.people.values()):
                for id in ids:
                    person.takes(self.t, b"%d" % id, min(sent, granted))
                person.quiet()

    async def test_takes_turns(self):
        """Who sends 50,000 packets at once does not keep the others waiting."""
        await self.plays("bob subscribes t/+")
        eve = self.raw(connect("eve") + publish(f"{self.t}/eve", b"", 1) * 50_000)
        await self.plays("ann publishes t/ann")
        bob = self.people["bob"]
        topics = iter(lambda: bob.message().topic, f"{self.t}/ann")
        self.assertLess(len([*topics]), 10_000)     # of eve's, before ann's came
        eve.closed(GOODBYE)

    async def test_subscriptions(self):
        """[MQTT-3.3.5-1, 3.8.4-3..5, 3.9.3-1, 3.10.4-1..6] Highest QoS, once; the same
        replaces. More than 128 levels are refused. Unsubscribing is by the letter."""
        deep = subscribe(self.t, self.t + "/a" * 127, qos=1)
        self.people["bob"].send(deep).expect(ack(SUBACK, 9, 1, 128))
        await self.plays("""
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

    async def test_retained(self):
        """[MQTT-3.3.1-5..12, 3.8.4-3] Replaced by the next, deleted by an empty one;
        RETAIN is set for those who come later."""
        for sent, granted in itertools.product(range(3), repeat=2):
            await self.plays(f"""
                bob subscribes t qos=2
                ann publishes t old qos={sent} retain=1; publishes t qos={sent} retain=1
                bob takes t old qos={sent}; takes t qos={sent}
                bob subscribes t qos={granted}
                bob takes t qos={min(sent, granted)} retain=1; quiet; unsubscribes t""")
            self.people["ann"].publishes(self.t, b"")       # not retained: no change
            self.people["bob"].subscribes(f"+/{self.mark}").takes(self.t, retain=1)
            self.people["ann"].publishes(self.t, b"", retain=1)
            self.people["bob"].takes(self.t, b"").subscribes(f"+/{self.mark}").quiet()
            self.unsubscribes("bob", f"+/{self.mark}")

    async def test_retained_more_than_its_budget(self):
        """Who reads slowly, but reads, gets all of them: at its own pace."""
        ann = self.people["ann"]
        topics = [f"{self.t}/{n}" for n in range(200)]
        ann.send(*[publish(topic, bytes(60_000), retain=1) for topic in topics]).quiet()
        await self.plays("bob subscribes t/# \n ann quiet")   # nobody waits for bob
        self.assertEqual([self.people["bob"].message().topic for _ in topics], topics)
        ann.send(*[publish(topic, b"", retain=1) for topic in topics]).quiet()

    async def test_will(self):
        """[MQTT-3.1.2-8..17, 3.14.1-1, 3.14.4-3] At any end but a true goodbye."""
        ends = b"", publish(self.t)[:-1], connect(), publish("t", qos=3), b"\xe0\1\0"
        for qos, last in zip((0, 1, 2, 0, 1), ends):
            await self.plays(f"bob subscribes t qos=2 \n eve joins will={qos}")
            self.people["eve"].vanish(last)
            await self.plays(f"bob takes t qos={qos}; quiet")
        await self.plays("""
            eve joins will=0; leaves
            bob quiet
            eve joins will=0 retain=1; vanish
            bob takes t; subscribes t; takes t retain=1""")

    async def test_keepalive(self):
        """[MQTT-3.1.2-24] Gone after 1.5 of it; half a packet is no sign of life."""
        began = time.monotonic()
        await self.plays("""
            clock joins keep=1
            half joins keep=2
            dan joins keep=2
            clock closed""")        # 1.5 s have passed
        self.people["half"].send(PING[:1])
        await self.plays("dan quiet \n half closed")
        self.assertTrue(2.9 < time.monotonic() - began < 4.4)   # 4.5 had it been fed
        await self.plays("dan quiet")


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
        cloud   | {"op": ["city"]}                      | "error"
        cloud   | {"op": "status"}                      | "error"
        server2 | {"op": "city"}                        | "error"
        server2 | {"at": "Z"}                           | "error"
        cloud   | {"op": "search", "broker": "x"}       | "error"
        """
    HTTP = """
        200 | POST /cars/ann/request   | {"at": "A", "range": 3, "id": "a-1"} | "a-1"
        200 | POST /cars/ann/request   | {"at": "A", "range": 3} | "station": "P1"
        503 | POST /cars/bob/request   | {"at": "A", "range": 3} | "reason": "full"
        409 | POST /cars/bob/request   | {"at": "A", "range": 0} | "out of range"
        400 | POST /cars/bob/request   | {"at": "Z", "range": 0} | "request.at must be
        200 | GET /stations            |                         | {"P1": {"station":
        200 | GET /stations/P1         |                         | {"ann": "held"}
        200 | GET /status              |                         | "requests": {"local":
        200 | GET /city                |                         | "cloud": true
        200 | GET /city                |                         | "server3": {"
        204 | DELETE /cars/ann/request |                         |
        """
    MISTAKES = """
        404 | GET /x                   |                                | no such thing
        404 | GET /stations/P3         |                                | of another
        404 | GET /cars/ann/request    |                                | another method
        404 | DELETE /cars/ann/request |                                | it has none
        501 | PUT /cars/ann/request    |                                | of no use here
        400 | POST /cars/a%2Fb/request |                                | no name
        400 | POST /cars/ann/request   | {"Content-Length": 5}          | half a body
        400 | POST /cars/ann/request   | {"Content-Length": null}       | no length
        400 | POST /cars/ann/request   | {"Content-Length": "-1"}       | nonsense
        413 | POST /cars/ann/request   | {"Content-Length": 65537}      | too much
        413 | POST /cars/ann/request   | {"Content-Length": 9999999999} | far too much
        415 | POST /cars/ann/request   | {"Content-Type": "text/plain"} | a web page
        415 | POST /cars/ann/request   | {"Content-Type": null}         | and so
        400 | GET /status              | {"Host": "evil.example:8081"}  | DNS rebinding
        400 | GET /status              | {"Host": "["}                  | no host
        200 | GET /status              | {"Host": "LOCALHOST:99"}       | (a good one)
        200 | GET /status              | {"Host": "[::1]:8081"}         | (another)
        200 | GET /status              | {"Host": null}                 | (old clients)
        """

    def setUp(self):
        self.addCleanup(self.city.rests)

    def raw(self, *where):
        client = self.city.raw(*where)
        self.addCleanup(client.close)
        return client

    def test_mqtt(self):
        """A car and its broker, with no delay: 40 ms would be Nagle's algorithm."""
        topic = "server1/cars/ann"
        ann = self.raw("server1", "mqtt", connect("ann")).expect(WELCOME)
        ann.subscribes(f"{topic}/reply")
        request = b'{"id": "a-1", "at": "A", "range": 50}'
        waited = []
        for _ in range(30):
            began = time.monotonic()
            ann.send(publish(f"{topic}/request", request))
            reply = json.loads(ann.message().payload)
            waited.append(time.monotonic() - began)
            ann.publishes(f"{topic}/leave/P1", b"{}")
        self.assertEqual(reply, {
            "id": "a-1", "station": "P1", "broker": "server1", "route": ["A", "P1"],
            "km": 1, "lease": 15, "asked": ["server1"]})
        self.assertLess(sorted(waited)[15], 0.03)

    def test_tcp(self):
        """Many questions on one connection. The cloud searches from the asker's broker
        on; reserve asks one broker alone."""
        guests = {to: self.raw(to, "tcp") for to in ("cloud", "server2")}
        for to, question, holds in rows(self.TCP):
            answer = json.dumps(guests[to].asks(RESERVE | json.loads(question)))
            for part in holds.split(", "):
                self.assertIn(part, answer)

    def test_tcp_mistakes(self):
        """After what is no JSON object nothing is read, as it may come from a browser
        that somebody else's page has sent here; nor after too long a line."""
        post = b"POST / HTTP/1.1\r\n\r\n%s\n" % json.dumps(RESERVE).encode()
        for to in "server1", "cloud":
            self.assertEqual(self.raw(to, "tcp").closed(post).count(b"\n"), 1)
            self.assertEqual(self.raw(to, "tcp").closed(b" " * 65_537), b"")

    def test_http(self):
        for status, request, body, holds in rows(self.HTTP):
            method, path = request.split()
            found, headers, answer = self.city.http(
                method, path, json.loads(body) if body else None)
            with self.subTest(request):
                self.assertEqual(found, int(status))
                self.assertIn(holds, json.dumps(answer if found != 204 else ""))
                self.assertEqual(headers["Retry-After"], "5" if found == 503 else None)

    def test_http_mistakes(self):
        for status, request, headers, why in rows(self.MISTAKES):
            method, path = request.split()
            body = RESERVE if method in ("POST", "PUT") else None
            with self.subTest(why):
                found, _, answer = self.city.http(
                    method, path, body, **json.loads(headers or "{}"))
                self.assertEqual(found, int(status))
                self.assertTrue(found == 200 or answer["error"])
        two = b"GET /x HTTP/1.1\r\nContent-Length: 19\r\n\r\nGET /y HTTP/1.1\r\n\r\n"
        answers = self.raw("server1", "http").closed(two)
        self.assertEqual(answers.count(b"HTTP/1.0 "), 1)

    def test_page(self):
        """It needs nothing from outside; what others wrote stays text."""
        page = self.city.get("/")
        self.assertNotRegex(page, rb"""(src|href|url)\W{0,3}(https?:)?//""")
        name = "<img src=x onerror=alert(1)>"
        state = {"car": name, "at": "A", "battery": 5, "doing": "going"}
        topic = f"server1/cars/{name}/state"
        evil = self.raw("server1", "mqtt", connect(name)).expect(WELCOME)
        evil.publishes(topic, json.dumps(state).encode())
        self.assertEqual(self.city.get("/cars"), {name: state})
        drawn = self.city.get("/map").decode()
        self.assertNotIn("<img", drawn)
        for part in "&lt;img", "P1 ■ 0 ▄ 0 □ 1", "»", 'news="All parts answer"':
            self.assertIn(part, drawn)
        evil.publishes(topic, b"")
        self.assertEqual(self.city.get("/cars"), {})

    def test_the_key(self):
        """Without it, or with another's proof of it, no door opens; with it all do."""
        city = self.founds(key="s3cret", P1=1, P3=1)    # its own parts come in with it
        with mock.patch.object(cloud_server, "KEY", "s3cret"):
            proofs = [cloud_server.mqtt_password(name) for name in ("car1", "car2")]
        for user, password, code in (
                ("car1", proofs[0], 0), ("car2", proofs[1], 5), ("car1", proofs[1], 5),
                ("car1", "s3cret", 5), ("car1", "", 5)):
            hello = connect("car1", user, password, flags=2 + 64 + 128)
            with closing(city.raw("server1", "mqtt", hello)) as client:
                client.expect(ack(CONNACK, code))
        for to, op in ("server1", "status"), ("cloud", "city"):
            for key in "", "secret", ["s3cret"], "\ud800":
                self.assertEqual(city.tcp(to, op=op, key=key), {"error": "key"})
            self.assertNotIn("error", city.tcp(to, op=op, key="s3cret"))
        for wrong in basic("me:secret"), basic("s3cret:"), "Bearer s3cret", "\xff":
            status, headers, _ = city.http("GET", "/", Authorization=wrong)
            self.assertEqual((status, headers["WWW-Authenticate"][:5]), (401, "Basic"))
        self.assertEqual(city.asks("ann").asked, ["server1"])
        self.assertEqual(city.asks("bob").asked, ["server1", "server2"])
        city.car("zoe").says("zoe .*full")
        self.assertNotIn("s3cret", str([part.lines for part in city.parts.values()]))

    def test_rush_hour_a_taken_port_and_nobody_who_listens(self):
        config = ["--config", self.city.config]
        rush = Part(sys.executable, HERE / "test_system.py", "--rush", 200, *config)
        self.addCleanup(rush.erase)
        rush.says(r"refused +197 ", r"missing +0\b", r"double +0\b").ends(0)
        for script in "cloud_server.py", "broker.py":
            end = subprocess.run([sys.executable, HERE / script, *config], text=True,
                                 capture_output=True)
            self.assertEqual(end.returncode, 2)
            self.assertRegex(end.stderr, r"\A.* port \d+.*\n\Z")
        line = f"timeout 1 {sys.executable} {HERE}/car.py --config {self.city.config}"
        for end in ">&-", "| head -n 1":
            told = subprocess.run(f"{line} {end}", shell=True, capture_output=True)
            self.assertEqual(told.stderr, b"")


class Readme(unittest.TestCase):
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
        self.assertGreater(len(table), 20)
        for module, names in table:
            for name in names.split("`, `"):
                found = sys.modules[module]
                for part in name.split("."):
                    found = getattr(found, part)


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
        cls.guests = City(P1=1, lease=0)
        cls.addClassCleanup(cls.guests.end)
        cls.began = time.monotonic()
        cls.silent = [cls.guests.raw("server1", *how) for how in cls.SILENT]

    @staticmethod
    def begins_demo():
        return Part(sys.executable, HERE / "test_system.py", "--demo",
                    start_new_session=True)

    def has(self, city, **how):
        self.city = self.founds(**how)

    def gets(self, car, station, least="0", *asked, at="A", range=50):
        reply = self.city.asks(car, at, float(range))
        self.assertEqual(reply.station or "nothing", station, reply)
        self.assertTrue(float(least) <= reply.took < float(least) + SLACK, reply)
        if asked:
            self.assertEqual(reply.asked, [*asked])

    def drives(self, car, **how):
        self.city.car(car, **how)

    def claims(self, car, station, use):
        self.city.claims(car, station, use=use)

    def shows(self, station, **cars):
        self.city.shows(5, **{station: cars})

    def is_offline(self, station):
        self.city.are_online(station, online=False, seconds=SLACK)

    async def test_the_next_broker_hangs_or_is_dead(self):
        await self.plays("""
            city has P1=1 P3=1 P5=4
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
        self.assertFalse(self.city.get("/city")["cloud"])
        self.assertIn("No answer from the cloud", self.city.get("/map").decode())

    async def test_the_cloud_hangs(self):
        """Fifty wait for it, once; who can be served nearby does not notice."""
        await self.plays("city has P1=1 P3=1 \n cloud freezes")
        crowd = [threading.Thread(target=self.city.asks, args=[f"c{n}", "C", 1.5])
                 for n in range(50)]
        for car in crowd:
            car.start()
        await self.plays("ann gets P1 range=1.5 \n" * 9)
        for car in crowd:
            car.join()
        self.assertEqual(len(self.city.station("P3")["cars"]), 1)
        await self.plays("bob gets nothing at=C range=1.5 \n cloud thaws")

    async def test_a_station_hangs_or_dies(self):
        """Dead, it is offline, and it remembers; but not if its broker dies, too."""
        await self.plays("""
            city has lease=3 P1=1 P2=1
            P1 freezes
            ann gets P2 0.5
            P1 thaws
            server1 says P1.*is.too.late
            P1 shows                            # its late yes has ended by itself
            P2 shows
            bob claims P1 charging
            P1 shows bob=charging
            P1 dies; is_offline; comes_back; says serves:.0.of.1
            bob claims P1 charging
            server1 dies; comes_back; says P1.*is.online
            P1 shows bob=charging
            P1 dies
            server1 dies; comes_back; says serves
            P1 comes_back; says serves:.1.of.1""")

    async def test_a_broker_is_away_under_real_cars(self):
        """One charges, one is on its way: both keep their spot and ask nobody anew,
        though a station dies with the broker, too. And a broker stops at work."""
        await self.plays("""
            city has P1=1 P2=1
            zoe drives battery=5; says zoe-.*charging
            max drives speed=0.5; says yes,.at.P2
            server1 dies
            P1 dies; comes_back
            zoe says no.connection
            server1 comes_back; says serves
            P1 shows zoe=charging
            P2 shows max=held
            max says max-.*charging""")
        for car in "zoe", "max":
            self.assertEqual(len(re.findall("asks for", str(self.city[car].lines))), 1)
        self.city["P1"].freezes()
        line = json.dumps(RESERVE | {"car": "zoe"}).encode() + b"\n"
        for _ in range(20):
            self.addCleanup(self.city.raw("server1", "tcp", line).close)
        self.city["server1"].says("x-1 asks").stop()
        self.city["P1"].thaws()

    async def test_a_car_dies_or_says_goodbye(self):
        """In another region: nothing stays behind where it was."""
        await self.plays("""
            city has lease=2 P1=1 P3=2
            ann gets P1
            zoe drives battery=5 at=C; says zoe-.*charging; dies
            max drives battery=26; says goes.there.from.server1 max-.*charging
            P3 shows zoe=charging max=charging
            P3 shows max=charging""")
        self.assertEqual(self.city.get("/cars"), {})
        self.city["max"].stop()
        self.city.shows(0.5, P3={})
        self.assertEqual(self.city.get("/cars/max", "server2")["doing"], "offline")

    async def test_a_station_is_started_twice(self):
        """The older one ends: one line, exit status 2; no spot was promised twice."""
        await self.plays("city has P1=1 \n ann gets P1")
        older = self.city.parts["older"] = self.city["P1"]
        self.city.start("station.py", "P1", "P1")
        older.says("was started again").ends(2)
        await self.plays("P1 says serves:.0.of.1 serves:.0.of.1 \n bob gets nothing")

    @unittest.skipUnless(MOSQUITTO, "there is no mosquitto to be found")
    async def test_mosquitto_in_its_place(self):
        """One server for both brokers; it is killed and started again."""
        [port] = free_ports(1)
        mosquitto = Part(MOSQUITTO, "-p", port).says("running")
        self.addCleanup(mosquitto.erase)
        self.has("city", mqtt=port, P1=1, P3=1)
        await self.plays("ann gets P1 0 server1 \n bob gets P3")
        mosquitto.dies().comes_back().says("running")
        await self.plays("""
            P1 says serves:.0.of
            server1 says connection.lost Success
            cid gets nothing
            zoe drives; says full""")
        self.city.claims("ann", "P1", "leave")
        await self.plays("P1 shows \n zoe says yes,.at.P1 zoe-.*charging")

    async def test_the_storm(self):
        """Thirty cars ask, while parts die, hang and come back: no spot is promised to
        two of them within a lease, and all are free at the end."""
        await self.plays("city has lease=2 P1=1 P2=2 P3=1 P4=2 P5=1 P6=2")
        storm = Storm(self.city)
        storm.rages()
        self.assertEqual(storm.faults, [])
        self.assertGreater(storm.promises, STORM)       # or it has tested nothing
        self.city.are_online(*self.city.spots)
        self.city.shows(**dict.fromkeys(self.city.spots, {}))

    def test_with_noise_and_silence(self):
        """Random bytes at each door. Who says nothing whole is closed after 10 s."""
        dice = random.Random(SEED)
        noises = [dice.randbytes(dice.randrange(1, 300)) for _ in range(100)]
        noises += [b"GET /" + b"x" * 70_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500,
                   connect("eve") + noises[0]]
        doors = ["server1 mqtt", "server1 http", "server1 tcp", "cloud tcp"]
        for door, noise in itertools.product(doors, noises):
            with closing(self.guests.raw(*door.split())) as client, suppress(OSError):
                client.vanish(noise)
        for line in self.guests["server1"].lines + self.guests["cloud"].lines:
            self.assertRegex(line, r"\A\d\d:\d\d:\d\d  ")       # one line per event
        for client in self.silent:
            left = self.began + 10 + SLACK - time.monotonic()
            client.socket.settimeout(max(0.1, left))
            client.closed()
            client.close()
        self.assertGreater(time.monotonic() - self.began, 9)

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

    def __init__(self, city):
        self.city = city
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.kept = {}
        self.faults = []
        self.promises = 0

    def rages(self):
        dice = random.Random(SEED)
        end = time.monotonic() + STORM
        cars = [threading.Thread(target=self.live, args=[f"storm{n}", SEED + n])
                for n in range(30)]
        for car in cars:
            car.start()
        while time.monotonic() < end:
            undo = [self.strikes(self.city[dice.choice(names)], dice.randrange(3))
                    for names in self.REGIONS]
            enough = self.promises + dice.randrange(20)
            calm = time.monotonic() + 3 * dice.random()
            wait_until(lambda: max(self.promises - enough, time.monotonic() - calm) > 0)
            for come_back in undo:
                come_back()
            self.city.are_online(*self.city.spots)
        self.over.set()
        for car in cars:
            car.join()

    def strikes(self, part, how):
        """Returns what brings it back."""
        if how == 0:
            return part.dies().comes_back
        if how == 1:
            return part.freezes().thaws
        return part.check

    def live(self, name, seed):
        dice = random.Random(seed)
        while not self.over.is_set():
            broker, places = dice.choice([*PLACES.items()])
            began = time.monotonic()
            with self.lock:
                self.kept.pop(name, None)
            try:
                reply = self.city.asks(name, dice.choice([*places]), to=broker)
                if reply.station:
                    self.note(name, reply.station, began + reply.lease)
            except OSError:
                continue        # its broker is away
            except Exception as fault:
                self.faults.append(fault)
                raise

    def note(self, name, station, until):
        with self.lock:
            self.promises += 1
            self.kept[name] = station, until
            here = [car for car, (where, end) in self.kept.items()
                    if where == station and end > time.monotonic()]
            if len(here) > self.city.spots[station]:
                self.faults.append(f"{station} is promised to {here}")


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
    if args.rush is not None:
        if not 1 <= args.rush <= 5000:
            parser.error("--rush takes 1 to 5000 cars")
        sys.exit(run_rush(args.config, args.rush))
    if args.demo:
        with suppress(KeyboardInterrupt):
            run_demo()
        sys.exit()
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    main()
