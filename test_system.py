"""The tests: short stories about a city of real processes, from the smallest part up.

        test --starts, kills, freezes--> cloud_server.py, broker.py, station.py, car.py
        test <--reads what they tell---- (processes of their own, on free ports)

    python3 test_system.py                    all of it, simplest first
    python3 -m unittest test_system.Drills    a chapter of it; with -v story by story
    STORM=60 SEED=7 python3 test_system.py    the storm for a minute, with these numbers
    python3 test_system.py --demo             the whole city in one terminal, as a story
    python3 test_system.py --rush 1000        rush hour in the city that runs

Chapters: one function or object at a time, without process or socket; the MQTT server,
packet by packet; one conversation at each door; whole journeys; what happens when
anything dies. Nothing sleeps: a test waits until something is so, and fails when its
deadline is over. Where the city promises a number of seconds the tests allow SLACK more,
for a machine whose cores are all busy.

Read next: the story that interests you. Left out on purpose: how fast things are.
"""

import argparse
import asyncio
import base64
import collections
import copy
import itertools
import json
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
STORM = float(os.environ.get("STORM", 5))       # s of the storm
SEED = int(os.environ.get("SEED", time.time_ns() % 1_000_000))
SIGNALS = hasattr(signal, "SIGSTOP")            # and SIGKILL, SIGCONT, process groups
MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH')}:/usr/sbin")


def setUpModule():
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


# --- A city of real processes ---------------------------------------------------------

class Part:
    """A process, and the lines that it has told so far; `show` is told each of them."""

    def __init__(self, *command, show=None, **popen):
        self.command = [str(word) for word in command]
        self.show = show
        self.popen = popen
        self.lines = []
        self.again()

    def again(self):
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
            def found():
                over = not self.listener.is_alive()
                for n in range(self.read, len(self.lines)):
                    if re.search(pattern, self.lines[n]):
                        return n + 1
                assert not over, f"it ended without {pattern}: {self.lines[-40:]}"
            self.read = wait_until(found, what=lambda: f"{pattern} of {self.lines[-40:]}")
        return self

    def ends(self, status, seconds=DEADLINE):
        self.gone = True
        found = self.process.wait(seconds)
        assert found == status, f"ended with {found}: {self.lines[-40:]}"
        self.listener.join()
        return self

    def kill(self):
        """As a power cut would: no goodbye, no clean-up."""
        self.process.kill()
        return self.ends(-signal.SIGKILL)

    def freeze(self):
        """It hangs: its connections stay open, and nobody answers."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)      # until it does stand still
        return self

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def check(self):
        """It is alive if it should be, and no bug has shown."""
        assert self.gone or self.process.poll() is None, f"has ended: {self.lines[-40:]}"
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
    file = {"cloud": {"host": "127.0.0.1", "port": next(port)}, "brokers": [],
            "places": {}, "roads": []}
    for name, places in PLACES.items():
        if places.keys() & spots:
            file["brokers"].append({"name": name, "host": "127.0.0.1", "mqtt": next(port),
                                    "http": next(port), "tcp": next(port)})
            for place, at in places.items():
                file["places"][place] = {"at": at, "broker": name}
                if place in spots:
                    file["places"][place]["spots"] = spots[place]
    file["roads"] = [road for road in ROADS if file["places"].keys() >= {*road}]
    return file


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
        self.asked = set()      # cars
        self.start("cloud_server.py", "cloud")
        for name in self.brokers:
            self.start("broker.py", name, name, *["--external-mqtt"] * bool(mqtt))
        for name in spots if lease else ():
            self.start("station.py", name, name, "--lease", lease)
        try:
            wait_until(lambda: all(self.get("/city")["brokers"].values()))
            if lease:
                self.are_online(*spots)
        except BaseException:
            self.erase()
            raise

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
        port = self.cloud if to == "cloud" else self.brokers[to]["tcp"]
        with closing(RawClient(port)) as client:
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
        self.asked.add(car)
        began = time.monotonic()
        _, _, reply = self.http("POST", f"/cars/{car}/request", {"at": at, "range": range}, to)
        took = time.monotonic() - began
        assert took < 9 + SLACK, reply
        return SimpleNamespace(took=took, **reply)

    def claims(self, car, station, verb="claim", **value):
        """What a car says to a station, over a connection of its own."""
        name = self.file["places"][station]["broker"]
        with closing(RawClient(self.brokers[name]["mqtt"], connect(car))) as client:
            client.expect(WELCOME).publishes(f"{name}/cars/{car}/{verb}/{station}",
                                             json.dumps(value).encode(), 1)

    def rests(self):
        """Every car gives back what it has."""
        for car, name in itertools.product(self.asked, self.brokers):
            with suppress(ConnectionError):     # that broker is dead
                self.http("DELETE", f"/cars/{car}/request", to=name)
        self.shows(**dict.fromkeys(self.spots, {}))


def basic(user_and_key):
    return f"Basic {base64.b64encode(user_and_key.encode()).decode()}"


class Story(unittest.TestCase):
    """A test with a city: one for the whole chapter if SPOTS names its stations."""
    SPOTS, maxDiff = {}, None

    @classmethod
    def setUpClass(cls):
        if cls.SPOTS:
            cls.city = City(**cls.SPOTS)
            cls.addClassCleanup(cls.city.end)

    def setUp(self):
        if self.SPOTS:
            self.addCleanup(self.city.rests)

    def founds(self, **how):
        """A city for this story alone."""
        city = City(**how)
        self.addCleanup(city.end)
        return city


# --- MQTT by hand: bytes, and one end of a connection ---------------------------------

(CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK,
 UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT) = range(1, 15)
HANDSHAKE = (), (PUBACK,), (PUBREC, PUBREL, PUBCOMP)  # after a PUBLISH of QoS 0, 1, 2


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

    def __init__(self, port, first=b"", host="127.0.0.1"):
        self.socket = socket.create_connection((host, port), DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rb")
        self.early = []  # messages that came while something else was awaited
        self.send(first)

    def close(self):
        self.stream.close()
        self.socket.close()

    def send(self, *packets):
        self.socket.sendall(b"".join(packets))
        return self

    def asks(self, request):
        """The answer to a line of JSON."""
        return json.loads(self.send(json.dumps(request).encode() + b"\n").stream.readline())

    def packet(self):
        """The next packet: type, flags, body."""
        first, byte, *_ = self.stream.read(2) or b"\0\0"
        length = byte % 128
        for place in 1, 2, 3:
            if byte >= 128:
                [byte] = self.stream.read(1)
                length += byte % 128 * 128 ** place
        if first == 0:
            raise ConnectionError("the server has closed the connection")
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
        return got.id

    def takes(self, topic, payload=b"x", qos=0, retain=0):
        return self.settle(qos, self.hears(topic, payload, qos, retain))

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
        with suppress(ConnectionError):  # it left bytes of ours unread
            return self.send(*last).stream.read()
        return b""

    def vanish(self, *last):
        """Our end closes, the server's follows: now it knows that we are gone."""
        self.send(*last).socket.shutdown(socket.SHUT_WR)
        self.stream.read()


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
    city = None
    try:
        city = City(show=show, P1=1, P3=1, P5=1)
        for title, words, pattern in CASES:
            show(f"=== {title}")
            name, at, battery = words.split()
            city.car(name, "--charges", 1, at=at, battery=battery, speed=4)
            wait_until(lambda: re.search(pattern, "\n".join(told)), what=lambda: title)
        show("=== All three cases happened.")
    finally:
        if city:
            city.erase()


class Rush:
    """Many cars that ask the running city at once, each at the end of a connection."""
    FARED = "by its own broker", "one broker further", "two brokers further", "further on"

    def __init__(self, city, count):
        dice = random.Random(SEED)
        self.city = city
        self.homes = {f"rush{SEED}-{n}": dice.choice([*city.places]) for n in range(count)}
        self.clients = {}
        self.asked = {}         # car: when
        self.replies = {}       # car: its first reply
        self.times = collections.defaultdict(list)      # how they fared: [ms]

    def connect(self, name, broker):
        first = connect(name)
        if cloud_server.KEY:
            proof = cloud_server.mqtt_password(name)
            first = connect(name, name, proof, flags=2 + 128 + 64)
        return RawClient(broker.mqtt, first, broker.host).expect(WELCOME)

    def run(self):
        """Returns the exit status: 1 if a reply is late, missing or double."""
        ready = selectors.DefaultSelector()
        for name, place in self.homes.items():
            broker = self.city.broker_of(place)
            client = self.clients[name] = self.connect(name, broker)
            client.subscribes(f"{broker.name}/cars/{name}/reply")
            ready.register(client.socket, selectors.EVENT_READ, name)
        for name, place in self.homes.items():
            request = {"id": f"{name}-1", "at": place, "range": 60}
            topic = f"{self.city.broker_of(place).name}/cars/{name}/request"
            self.asked[name] = time.monotonic()
            self.clients[name].send(publish(topic, json.dumps(request).encode()))
        end = time.monotonic() + 9 + SLACK
        while len(self.replies) < len(self.homes) and time.monotonic() < end:
            for key, _ in ready.select(0.1):
                self.hear(key.data, json.loads(self.clients[key.data].message().payload))
        seconds = time.monotonic() - min(self.asked.values())
        self.give_back()
        return self.report(seconds)

    def hear(self, name, reply):
        took = 1000 * (time.monotonic() - self.asked[name])
        fared = "refused"
        if took > 9000:
            fared = "late"
        elif reply["station"]:
            fared = self.FARED[min(3, len(reply["asked"]) - 1)]
        self.replies[name] = reply
        self.times[fared].append(took)

    def give_back(self):
        """And see whether something came twice: a reply, or the offer of a spot."""
        offers = collections.Counter(reply["station"] for reply in self.replies.values())
        for name, client in self.clients.items():
            client.send(PING).expect(PONG)
            self.times["double"] += client.early        # a second reply
            client.close()
            reply = self.replies.get(name, {})
            place = reply.get("station")
            if place:
                over = offers[place] > self.city.places[place]["spots"]
                self.times["double"] += [place] * over
                topic = f"{reply['broker']}/cars/{name}/leave/{place}"
                with closing(self.connect(name, self.city.broker_of(place))) as client:
                    client.send(publish(topic, b"{}", 1)).expect(ack(PUBACK, 1))

    def report(self, seconds):
        self.times["missing"] = [name for name in self.homes if name not in self.replies]
        print(f"{'':24}{'cars':>6}{'median':>12}{'99 %':>12}{'slowest':>12}")
        for fared in *self.FARED, "refused", "late":
            times = sorted(self.times[fared])
            columns = [f"{times[int(len(times) * part)]:9.1f} ms"
                       for part in (0.5, 0.99, 1 - 1e-9) if times]
            print(f"{fared:24}{len(times):6}{''.join(columns)}")
        for fared in "missing", "double":
            print(f"{fared:24}{len(self.times[fared]):6}")
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

class Clock:
    """The time of a test: it stands still until the test moves it."""

    def __init__(self, case, *modules):
        self.now = 1000.0
        for module in modules:
            patch = mock.patch.object(module, "monotonic", self)
            patch.start()
            case.addCleanup(patch.stop)

    def __call__(self):
        return self.now


def rows(table, count):
    """Of a table of cases: in each row so many cells, the last one says it in words."""
    for line in table.strip().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        assert len(cells) == count, line
        yield cells


def changed(value, path, new):
    """A copy of a JSON value with another one at this path in it ("a.0.b"), or none."""
    value = copy.deepcopy(value)
    *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    inside = value
    for key in way:
        inside = inside[key]
    if new == "gone":
        del inside[last]
    else:
        inside[last] = json.loads(new)
    return value


class Ring(unittest.TestCase):
    """ring.py: the circular list, the walk, servers.json, and the roads."""
    FILE = describe({"P1": 2, "P3": 1})
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

    def walk(self, home="b", takes=0.0, **answers):
        """Each broker takes so long, and answers this (others: no)."""
        clock = Clock(self, ring)
        asked = []

        def ask(node, patience):
            asked.append((node.name, round(patience, 3)))
            clock.now += takes
            return answers.get(node.name)
        circle = ring.Ring()
        for name in "abcd":
            circle.append(ring.Broker(name, "localhost", 1, 2, 3))
        offer, names = ring.walk(circle.find(home).others(), ask)
        self.assertEqual(names, [name for name, _ in asked])
        return offer, asked

    def test_a_walk_asks_everybody_else_once_until_one_says_yes(self):
        self.assertEqual(self.walk(b="own", d="yes", a="no more"),
                         ("yes", [("c", 1.5), ("d", 1.5)]))
        self.assertEqual(self.walk("a")[1], [("b", 1.5), ("c", 1.5), ("d", 1.5)])
        self.assertEqual(self.walk(takes=1.5)[1], [("c", 1.5), ("d", 1.5), ("a", 0.5)])
        self.assertEqual(self.walk(takes=3.5)[1], [("c", 1.5)])
        alone = ring.Broker("b", "localhost", 1, 2, 3)
        self.assertEqual((alone.next, [*alone.others()]), (alone, []))

    def test_the_shortest_way_by_road(self):
        """From A to D over B, though C is nearer to A."""
        at = {"A": [0, 0], "B": [3, 0], "C": [0, 1], "D": [4, 0], "E": [9, 9]}
        places = {name: {"at": at[name], "broker": "b"} for name in at}
        city = ring.City({"cloud": {"host": "", "port": 1}, "brokers": [], "places": places,
                          "roads": [["A", "C"], ["B", "D"], ["C", "D"], ["B", "A"]]})
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
                     for where, new, _ in rows(self.MISTAKES, 3)]
            for text in *texts, b"{", b"\xff", b"[" * 20_000, b"9" * 5_000, b'{"a":1,"a":1}':
                path.write_bytes(text)
                with self.subTest(text), self.assertRaisesRegex(
                        ring.Invalid, rf"\A{path}: .*\Z"):
                    ring.load(path)

    def test_each_script_ends_with_one_line(self):
        """Exit status 2, and one line on stderr that names the fault."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "bad.json").write_text("{}")
            Path(folder, "city.json").write_text(json.dumps(self.FILE))
            for line, key, fault in rows(self.SCRIPTS, 3):
                script, *options = line.split()
                end = subprocess.run(
                    [sys.executable, HERE / script, *options], text=True, cwd=folder,
                    capture_output=True, env=os.environ | {"EV_KEY": json.loads(key)})
                with self.subTest(line):
                    self.assertEqual((end.returncode, end.stdout), (2, ""))
                    self.assertRegex(end.stderr, rf"\A.*{fault}.*\n\Z")


class Shapes(unittest.TestCase):
    """ring.py: what does not fit is refused, and nothing more than the shape is taken."""
    GOOD = {
        "request": (cloud_server.REQUEST,
                    {"id": "a" * 64, "car": "n" * 64, "at": "A", "range": 0}),
        "offer": (cloud_server.OFFER, {
            "id": "a-1", "station": "P1", "broker": "server1", "route": ["A", "P1"],
            "km": 2.5, "lease": 15, "asked": ["server1"]}),
        "refusal": (cloud_server.REFUSAL, {
            "id": "a-1", "station": None, "reason": "full", "retry": 5, "asked": []}),
        "claim": (station.CLAIM, {"use": "charging", "id": "c" * 200}),
        "renewal": (station.CLAIM, {"use": "held"}),
        "no": (station.ANSWER, {"id": "c", "car": "ann", "ok": False}),
        "state": (station.STATE, {"station": "P1", "spots": 2, "free": 1,
                                  "cars": {"ann": "held"}, "life": 7}),
        "car": (broker.CAR_STATE, {"car": "ann", "at": "A", "battery": 99.5,
                                   "doing": "going"})}
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
        no.ok         | 0               | neither true nor false
        car.battery   | 101             | more than full
        car.doing     | "flying"        | what no car does
        car           | null            | nothing at all
        """

    def test_what_fits_and_what_does_not(self):
        for name, (shape, value) in self.GOOD.items():
            more = value | {"key": "s3cret", "x": [{}]}
            self.assertEqual(ring.fit(shape, more, "it"), value)
        for path, new, why in rows(self.MISTAKES, 3):
            name, _, _ = path.partition(".")
            shape, value = self.GOOD[name]
            bad = changed({name: value}, path, new)[name]
            with self.subTest(why), self.assertRaisesRegex(ring.Invalid, rf"\A{name}"):
                ring.fit(shape, bad, name)


class Breaker(unittest.TestCase):
    """cloud_server.py: who is silent is left out for 10 s, 20, 40, 80."""

    def test_longer_each_time_until_it_answers(self):
        clock = Clock(self, cloud_server)
        breaker = cloud_server.Breaker()
        for seconds in 10, 20, 40, 80, 80:
            self.assertFalse(breaker.is_open("x"))
            breaker.failed("x")
            breaker.failed("x")     # others waited for it, too: that was one time
            clock.now += seconds - 0.25
            self.assertTrue(breaker.is_open("x"))
            clock.now += 0.25
        breaker.answered("x")
        breaker.failed("x")
        clock.now += 10
        self.assertFalse(breaker.is_open("x"))

    def test_nine_brokers_of_which_seven_hang(self):
        """Who hangs hides no spot: the ninth is found by the fifth try."""
        clock = Clock(self, cloud_server, ring)
        city = ring.City({"cloud": {"host": "x", "port": 99}, "roads": [], "places": {
            "P": {"at": [0, 0], "broker": "b9", "spots": 1}}, "brokers": [
            {"name": f"b{n}", "host": "x", "mqtt": 1, "http": 2, "tcp": n}
            for n in range(1, 10)]})
        request = {"id": "a-1", "car": "ann", "at": "P", "range": 50}

        def exchange(address, question, seconds):
            clock.now += 0.001
            if address != ("x", 9):
                clock.now += seconds
                raise TimeoutError
            return json.dumps({"id": "a-1", "station": "P", "broker": "b9", "km": 1,
                               "route": ["P"], "lease": 15, "asked": ["b9"]}).encode()
        caller = cloud_server.Caller()
        caller.exchange = exchange
        asked = []
        for _ in range(5):
            reply = cloud_server.search(city, request, city.ring.find("b1"), caller,
                                        mock.Mock())
            asked.append(" ".join(reply["asked"]))
            clock.now += 5
        self.assertEqual(asked, ["b2 b3 b4", "b5 b6 b7", "b2 b3 b4", "b5 b6 b7", "b8 b9"])
        self.assertEqual(reply["station"], "P")

    def test_only_a_real_chance_counts(self):
        """Half a second is one. Who refuses the connection may be there again at once."""
        caller = cloud_server.Caller()
        with socket.socket() as hung:
            hung.bind(("127.0.0.1", 0))
            address = hung.getsockname()
            for seconds, why, is_open in (1, "refused", False), (0.3, "no answer", False), (
                    0.5, "no answer", True):
                with self.assertRaisesRegex(cloud_server.NoAnswer, why):
                    caller.ask(address, {}, seconds)
                self.assertIs(caller.breaker.is_open(address), is_open)
                hung.listen()


class TheStation(unittest.TestCase):
    """station.py: its spots, its leases and its memory, without a broker."""

    def setUp(self):
        self.clock = Clock(self, station)
        self.starts()

    def starts(self, **state):
        """A station, and what it reads back when it connects for the first time."""
        self.said = []
        self.it = station.Station("P1", ring.City(describe({"P1": 2})), 15)
        self.it.publish = lambda topic, value, **_: self.said.append(
            (topic.rpartition("/")[2], value))
        self.it.close = mock.Mock()
        self.connects(**state)

    def connects(self, **state):
        self.it.mqtt = mock.Mock()
        self.it.is_up = True
        self.it.greet()
        if state:
            self.hears("stations/P1/state", 1, station="P1", **state)
        self.hears("stations/P1/mark")

    def hears(self, topic, retain=0, **value):
        message = SimpleNamespace(topic=f"server1/{topic}", retain=retain,
                                  payload=json.dumps(value).encode())
        self.it.look = lambda turn: [message]
        self.it.attend(0)

    def claims(self, car, use="held", **more):
        self.hears(f"cars/{car}/claim/P1", use=use, **more)

    def after(self, seconds, **cars):
        """So much later it looks at its leases once; then it has these cars."""
        self.clock.now += seconds
        self.it.stopping.clear()
        self.it.look = lambda turn: self.it.stopping.set() or []
        self.it.live()
        self.assertEqual({car: spot.use for car, spot in self.it.cars.items()}, cars)

    def test_take_renew_refuse(self):
        """A car has one spot; who charges stays charging; full is a no, with the state."""
        self.claims("ann", id="a-1@server1-9")
        (first, _), second = self.said[-2:]     # the fog must know both before the yes
        self.assertEqual((first, second), ("state", ("answer", {
            "id": "a-1@server1-9", "car": "ann", "ok": True, "lease": 15})))
        self.claims("ann", "charging")
        self.claims("ann", id="a-2@server1-9")
        self.claims("bob")
        self.claims("bob")      # nothing new: nothing to say
        self.assertEqual([what for what, _ in self.said[-3:]], ["state", "answer", "state"])
        self.claims("cid", id="c-1@server1-9")
        (_, state), answer = self.said[-2:]
        self.assertEqual((answer, state["free"], state["cars"]), (
            ("answer", {"id": "c-1@server1-9", "car": "cid", "ok": False}), 0,
            {"ann": "charging", "bob": "held"}))
        self.hears("cars/ann/leave/P1")
        self.claims("cid", "charging")
        self.after(0, bob="held", cid="charging")

    def test_what_does_not_count(self):
        """What is only repeated (retained), and what is invalid."""
        self.claims("ann")
        before = list(self.said)
        self.hears("cars/ann/leave/P1", retain=1)
        self.hears("cars/eve/claim/P1", retain=1, use="held")
        self.claims("eve", id=5)
        self.claims("e\ne")
        self.hears("stations/P1/mark", retain=1)
        self.assertEqual(self.said, before)

    def test_a_lease_ends_by_itself(self):
        """15 s after the last claim; but not while the station is cut off: then all
        begin anew when its mark is back, not before."""
        self.claims("ann")
        self.clock.now += 10
        self.claims("bob", "charging")
        self.after(4.75, ann="held", bob="charging")
        self.after(0.25, bob="charging")
        self.claims("bob")
        self.after(14.75, bob="charging")
        self.it.is_up = False
        self.after(100, bob="charging")
        self.it.is_up = True
        self.it.greet()
        self.after(1, bob="charging")
        self.hears("stations/P1/mark")
        self.after(14.75, bob="charging")
        self.after(0.25)

    def test_it_remembers(self):
        """Once, with whole leases, and no more cars than it has spots."""
        cars = {"ann": "held", "bob": "charging", "cid": "charging"}
        self.starts(spots=3, free=0, cars=cars, life=1)
        self.after(14.75, bob="charging", cid="charging")
        self.hears("cars/bob/leave/P1")
        self.connects(spots=3, free=0, cars=cars, life=self.it.life)
        self.after(0, cid="charging")
        self.starts(spots=2, free="nonsense", cars=cars, life=1)
        self.after(0)

    def test_whoever_was_started_later_is_the_station(self):
        """The older one finds another life when it is back, and says nothing more."""
        self.said.clear()
        self.connects(spots=2, free=1, cars={"ann": "held"}, life=1)
        self.assertTrue(self.it.stopping.is_set())
        self.after(1)
        self.assertEqual(self.said, [("mark", {})])

    def test_its_state_always_fits_into_a_packet(self):
        self.it.spots = 200
        for n in range(200):
            self.claims("\U0001f697" * 61 + f"{n:03}", "charging")
        self.assertEqual(len(self.it.cars), 200)
        self.assertLess(len(station.to_json(self.said[-1][1])), 65_000)


class TheCar(unittest.TestCase):
    """car.py: what it decides, in a world of this test's own."""

    def setUp(self):
        self.clock = Clock(self, station, car, cloud_server)
        self.city = ring.City(describe({"P1": 1, "P2": 1, "P3": 1, "P5": 1}))
        self.down = set()       # brokers that do not answer
        self.replies = []       # what the fog replies, one after the other
        self.shown = True       # does its station show it as it claims to be?
        self.events = []        # (second, what happens then)

    def offer(self, *route, lease=15):
        return {"station": route[-1], "broker": self.city.places[route[-1]]["broker"],
                "route": route, "km": 1, "lease": lease}

    def lives(self, seconds, at="A", battery=20.0, charges=math.inf, speed=1.0):
        """The life of a car for so many seconds of this world's time."""
        self.said = []          # (second, broker, verb, value)
        self.began = self.clock.now
        self.end = self.began + seconds
        self.it = car.Car("zoe", self.city, at, battery, speed, charges)
        self.it.look = self.look
        self.it.publish = self.hears
        self.it.last = mock.Mock()
        self.it.live()

    def look(self, turn):
        """What happens in the world while the car looks at its connection."""
        self.clock.now += turn
        if self.clock.now > self.end:
            self.it.stopping.set()
        while self.events and self.began + self.events[0][0] <= self.clock.now:
            self.events.pop(0)[1]()
        if self.it.broker.name not in self.down and not self.it.is_up:
            self.it.mqtt = mock.Mock()
            self.it.is_up = True
            self.it.failures = 0
            self.it.greet()
        elif self.it.broker.name in self.down and self.clock.now > self.it.next_try:
            self.it.next_try = self.clock.now + 1
            self.it.lose("down")
        messages, self.it.inbox = self.it.inbox, []
        return messages

    def hears(self, topic, value, qos=1, retain=False):
        """What a broker, its fog node and its stations do when the car says something."""
        if not self.it.is_up:
            return
        name, _, _, verb, *place = topic.split("/")
        self.said.append((self.clock.now - self.began, name, verb, value))
        if verb == "request" and self.replies:
            reply = {"id": value["id"], "asked": [name]} | self.replies.pop(0)
            self.tells(f"{name}/cars/zoe/reply", reply)
        if verb == "claim" and self.shown:
            self.tells(f"{name}/stations/{place[0]}/state", {
                "station": place[0], "spots": 1, "free": 0, "life": 1,
                "cars": {"zoe": value["use"]}})

    def tells(self, topic, value):
        self.it.inbox.append(SimpleNamespace(topic=topic, payload=json.dumps(value).encode()))

    def times(self, wanted, **fields):
        """When it said that, with these fields in it, in seconds."""
        return [round(second) for second, _, verb, value in self.said
                if verb == wanted and (value or {}).items() >= fields.items()]

    def test_it_asks_at_places_only(self):
        """Below 25 %, or where the next road is longer than it can drive."""
        self.lives(9, battery=25.5)
        [request] = [value for *_, verb, value in self.said if verb == "request"]
        self.assertIn(request["at"], self.city.places)
        self.assertLess(request["range"], 15)
        self.lives(1, battery=25)
        self.assertEqual(self.times("request"), [])
        self.city.places["P5"]["at"] = [40, 0]      # 30 km from E
        for battery, expected in (49, [0]), (51, []):
            self.lives(1, "P5", battery)
            self.assertEqual(self.times("request", at="P5"), expected)

    def test_it_claims_every_third_of_a_lease(self):
        """Held while it drives; charging, and at once, when it is there."""
        self.replies = [self.offer("A", "C", "E", "P5", lease=6)]
        self.lives(40, charges=1)
        self.assertEqual(self.times("claim", use="held"), [0, 2, 4, 6, 8, 10])
        self.assertEqual(self.times("claim", use="charging"), [11, 13, 15, 17, 19])
        self.assertEqual((self.times("leave"), self.it.battery), ([21], 100))
        self.assertEqual(self.said[-1][3]["doing"], "offline")

    def test_it_charges_only_where_it_is_shown_as_charging(self):
        """Not shown for 3 s it asks anew, whatever its battery; refused, it waits."""
        self.shown = False
        late = self.offer("A", "P2") | {"id": "zoe-0", "asked": []}
        self.events = [(5, lambda: self.tells("server1/cars/zoe/reply", late))]
        self.replies = [self.offer("A", "P1"), {"station": None, "reason": "full",
                                                "retry": 5}]
        self.lives(12)
        self.assertEqual(self.times("request"), [0, 4, 9])
        self.assertEqual(self.times("claim", use="charging")[:3], [1, 2, 3])
        self.assertEqual((self.times("leave"), self.times("state", doing="waiting")[:1]),
                         ([4], [4]))

    def test_a_broker_away_costs_no_spot_within_a_lease(self):
        """On its way or charging, it goes on, and claims as soon as the broker is back."""
        for second in 3, 13:
            self.replies = [self.offer("A", "C", "E", "P5")]
            self.events = [(second, lambda: self.down.add("server3")),
                           (second + 8, self.down.clear)]
            self.lives(40, charges=1)
            self.assertEqual((self.times("request"), self.times("leave")), ([0], [21]))
            self.assertIn(second + 8, self.times("claim"))

    def test_a_broker_away_for_longer_costs_the_spot(self):
        """A lease after its last claim it asks elsewhere: the next broker."""
        self.replies = [self.offer("A", "P1", lease=6)]
        self.events = [(4, lambda: self.down.add("server1"))]
        self.lives(12, battery=5)
        self.assertEqual((self.times("claim"), self.times("request")), ([1, 3], [0, 9]))
        self.assertEqual(self.said[-1][1], "server2")

    def test_without_a_spot_it_turns_to_the_next_broker(self):
        """After a second failure, or without a reply for 10 s."""
        self.down.add("server1")
        self.lives(5)
        self.assertEqual({name for _, name, *_ in self.said}, {"server2"})
        self.assertEqual(self.times("request"), [1])
        self.down.clear()
        self.lives(15)
        self.assertEqual((self.times("request"), self.said[-1][1]), ([0, 10], "server2"))

    def test_it_connects_where_it_is(self):
        """In another region to another broker; the old one is told to forget it."""
        with mock.patch("car.random.choice", lambda roads: roads[-1]):
            self.lives(20, battery=90, speed=2)     # from A to C, to E, to P5
        states = [(name, value and value["at"]) for _, name, verb, value in self.said]
        self.assertEqual([*dict.fromkeys(states)][:5], [
            ("server1", "A"), ("server1", None), ("server2", "C"), ("server2", None),
            ("server3", "E")])


class TheFog(unittest.IsolatedAsyncioTestCase):
    """broker.py: how a fog node finds a spot. This test is its MQTT server."""
    INVALID = """
        stations/P1/state  | {"station": "P2", "spots": 1, "free": 1, "cars": {}, "life": 1}
        stations/P1/state  | {"station": "P1", "spots": 1, "free": 2, "cars": {}, "life": 1}
        stations/P9/online | true
        stations/P1/online | 1
        stations/P1/online | {
        stations/P1/answer | {"id": "x", "car": "ann", "ok": true}
        cars/ann/state     | {"car": "bob", "at": "A", "battery": 5, "doing": "going"}
        cars/ann/state     | {"car": "ann", "at": "Z", "battery": 5, "doing": "going"}
        """

    async def asyncSetUp(self):
        self.clock = Clock(self, cloud_server)
        city = ring.City(describe({"P1": 2, "P2": 2, "P3": 1}))
        with mock.patch.object(broker, "WALKERS", 1):
            self.fog = broker.Fog("server1", city, mock.Mock())
        self.addCleanup(self.fog.walkers.shutdown, wait=False)
        self.fog.walk_ring = lambda request: cloud_server.refusal("a-1", "full", ["server2"])
        self.fog.attach(mock.Mock(publish=self.publish))
        self.claims = []        # (station, car, id) that the fog has sent
        self.replies = []
        self.answers = {}       # station: whether it says yes; None: it is silent
        for name in "P1", "P2":
            self.says(f"stations/{name}/online", "true")
            self.shows(name, 2)

    def publish(self, topic, payload, qos):
        _, _, car, verb, *name = topic.split("/")
        value = json.loads(payload)
        if verb == "reply":
            self.replies.append(value)
        elif verb == "claim":
            self.claims.append((*name, car, value["id"]))
            ok = self.answers.get(*name, True)
            if ok is not None:
                self.answer(*name, value["id"], ok)

    def answer(self, station, id, ok):
        value = {"id": id, "car": "ann", "ok": ok} | ({"lease": 15} if ok else {})
        self.says(f"stations/{station}/answer", json.dumps(value))

    def says(self, topic, text, retain=False):
        self.fog.deliver(broker.Message(f"server1/{topic}", text.encode(), 1, retain), 1)

    def shows(self, name, free, *cars):
        state = {"station": name, "spots": free + len(cars), "free": free,
                 "cars": dict.fromkeys(cars, "held"), "life": 1}
        self.says(f"stations/{name}/state", json.dumps(state))

    async def asks(self, car="ann", act="search", **more):
        request = {"id": "a-1", "car": car, "at": "A", "range": 50} | more
        return await getattr(self.fog, act)(request)

    async def finds(self, station, *args, **more):
        self.assertEqual((await self.asks(*args, **more))["station"], station)

    async def test_which_station(self):
        """The nearest first, but before it the one that keeps a spot for this car."""
        await self.finds("P1")
        self.answers["P1"] = False
        await self.finds("P2")
        self.assertEqual([name for name, *_ in self.claims], ["P1", "P1", "P2"])
        self.assertEqual(len({id for *_, id in self.claims if id.startswith("a-1@")}), 3)
        self.answers = {}
        self.shows("P2", 0, "ann", "bob")
        await self.finds("P2")
        await self.finds("P1", "cid")
        await self.finds("P1", range=1)     # P2 is too far
        count = len(self.claims)
        self.shows("P1", 0, "bob", "cid")
        self.says("stations/P2/online", "false")
        self.assertEqual((await self.asks())["asked"], ["server1", "server2"])
        self.assertEqual(len(self.claims), count)       # who has none is not even asked
        self.assertEqual((await self.asks(range=1))["reason"], "full")
        self.assertEqual((await self.asks(range=0.9))["reason"], "out of range")

    async def test_two_silent_stations_are_waited_for_and_then_left_out(self):
        self.fog.states["P3"] = self.fog.states["P1"] | {"station": "P3"}
        self.fog.turns["P3"] = asyncio.Semaphore(1)
        self.fog.online.add("P3")       # a third one, farther away
        self.answers = dict.fromkeys(["P1", "P2"])
        with mock.patch.object(broker, "STATION_WAIT", 0.05):
            await self.finds(None)
            await self.finds("P3")
        self.assertEqual([name for name, *_ in self.claims], ["P1", "P2", "P3"])
        self.answers = {}
        self.shows("P2", 2)             # whoever speaks is asked again
        await self.finds("P2")
        self.clock.now += 10
        await self.finds("P1")

    async def test_an_answer_counts_once_and_from_whom_was_asked(self):
        self.answers["P1"] = None
        task = asyncio.ensure_future(self.asks())
        await asyncio.sleep(0)
        [(_, _, id)] = self.claims
        self.answer("P2", id, True)
        self.answer("P1", id + "0", True)
        self.assertFalse(task.done())
        for ok in True, False, True:
            self.answer("P1", id, ok)
        self.assertEqual((await task)["station"], "P1")
        self.assertEqual(self.fog.answers, {})

    async def test_sixteen_claims_at_a_time(self):
        self.answers["P1"] = None
        self.shows("P1", 200)
        tasks = [asyncio.ensure_future(self.asks(f"c{n}")) for n in range(40)]
        await asyncio.sleep(0)
        self.assertEqual(len(self.claims), 16)
        self.answer("P1", self.claims[0][2], True)
        await tasks[0]
        await asyncio.sleep(0)
        self.assertEqual(len(self.claims), 17)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.assertEqual(self.fog.answers, {})

    async def test_a_request_has_its_time(self):
        """And then its car is told to wait; beyond 2,000 that is told at once."""
        self.answers["P1"] = None
        with mock.patch.object(broker, "REQUEST_WAIT", 0.05):
            self.assertEqual((await self.asks(act="serve"))["reason"], "full")
        self.assertEqual(self.fog.under_way, 0)
        self.shows("P1", 2)
        self.answers = {}
        for under_way, station in (1_999, "P1"), (2_000, None):
            self.fog.under_way = under_way
            await self.finds(station, act="serve")
        self.assertEqual(self.fog.requests, {"local": 1, "ring": 0, "refused": 2})

    async def test_what_is_invalid_or_only_repeated(self):
        before = json.dumps([self.fog.states, sorted(self.fog.online), {}])
        for topic, text in rows(self.INVALID, 2):
            self.says(topic, text)
        self.assertEqual(json.dumps(
            [self.fog.states, sorted(self.fog.online), self.fog.cars]), before)
        self.says("cars/ann/request", '{"id": "a-1", "at": "A", "range": 5}', retain=True)
        self.says("cars/ann/request", '{"id": "a-2", "at": "Z", "range": 5}')
        self.says("cars/ann/request", '{"id": 5, "at": "A", "range": 5}')
        self.assertEqual([(reply["id"], reply["reason"][:13]) for reply in self.replies],
                         [("a-2", "bad request: "), (None, "bad request: ")])
        with mock.patch.object(broker, "REMEMBERED", 3):
            for name in "c0", "c1", "c2", "c0", "c3":
                state = {"car": name, "at": "A", "battery": 5, "doing": "going"}
                self.says(f"cars/{name}/state", json.dumps(state))
        self.says("cars/c0/state", "")
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
        car1 | server1/cars/car1/x server2/cars/car1/claim/P3 x server10/x server1x /server1/x
        P1   | server1/stations/P1/state server1/stations/P1/a/b
        """
    MUTE = "server1/cars/car2/x server1/cars/car1 server1/x/car1/x server1 server2/x"

    def test_the_filters_that_match(self):
        """[MQTT-4.7] Before and after others have come and gone."""
        for topic, good, bad in rows(self.MATCHES, 3):
            tree = broker.TopicTree()
            for name in good.split() + bad.split():
                tree.add(name, "all", 0)
                tree.add(name, name, 1)
            tree.add(topic, "all", 2)
            self.assertEqual(tree.match(topic), {"all": 2} | dict.fromkeys(good.split(), 1))
            for name in good.split() + bad.split():
                tree.remove(name, name)
                tree.remove(name, "all")
            self.assertEqual((tree.below, tree.subscribers), ({}, {}))

    def test_who_may_publish(self):
        """As itself below a broker's name; anybody elsewhere."""
        for name, topics in rows(self.SPEAKERS, 2):
            for topic in topics.split():
                self.assertTrue(broker.may_publish(name, topic, {"server1", "server2"}))
        for topic in self.MUTE.split():
            self.assertFalse(broker.may_publish("car1", topic, {"server1", "server2"}))


# ======================================================================================
# The MQTT server, packet by packet: with the clauses of the OASIS standard in brackets
# ======================================================================================

class Packets(unittest.IsolatedAsyncioTestCase):
    """broker.py: each mistake closes the connection, and is answered with nothing.

    How to read a packet: "text" stands for its length in two bytes and itself, - for the
    length of the rest; all other bytes are hexadecimal.
    """
    CONNECTS = """
        30 - "t"                            | not CONNECT [MQTT-3.1.0-1]
        50                                  | the beginning of "POST ...", and no more
        16 03 01                            | the beginning of TLS, and no more
        11 - "MQTT" 04 02 00 00 ""          | a reserved flag of the first byte [-2.2.2-2]
        10 - "MQTTT" 04 02 00 00 ""         | another protocol [MQTT-3.1.2-1]
        10 - "MQTT" 04 03 00 00 ""          | the reserved flag [MQTT-3.1.2-3]
        10 - "MQTT" 04 06 00 00 ""          | a will that is missing [MQTT-3.1.2-9]
        10 - "MQTT" 04 0a 00 00 ""          | QoS of no will [MQTT-3.1.2-13]
        10 - "MQTT" 04 22 00 00 ""          | a retain flag of no will [MQTT-3.1.2-15]
        10 - "MQTT" 04 1e 00 00 "" "t" ""   | QoS 3 of the will [MQTT-3.1.2-14]
        10 - "MQTT" 04 06 00 00 "" "t/#" "" | a will for many topics [MQTT-3.3.2-2]
        10 - "MQTT" 04 82 00 00 ""          | a user name that is missing [MQTT-3.1.2-19]
        10 - "MQTT" 04 02 00 00 "" "u"      | a user name without its flag [MQTT-3.1.2-18]
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
            for words, why in rows(table, 2):
                client = broker.Connection(server)
                client.connection_made(mock.Mock(**{
                    "get_extra_info.return_value.fileno.return_value": 5}))
                client.data_received(first)
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
            packet = broker.encode(PUBLISH, bytes(size // 2), bytes(size - size // 2))
            self.assertEqual(packet, encode(PUBLISH, 0, bytes(size)))
            buffer = bytearray(packet + b"after")
            found = broker.take_packet(buffer)
            self.assertEqual((found.kind, found.flags, len(found.body), buffer),
                             (PUBLISH, 0, size, b"after"))
            for missing in range(1, min(len(packet), 9)):
                self.assertIsNone(broker.take_packet(bytearray(packet[:-missing])))


class TooMuch(unittest.IsolatedAsyncioTestCase):
    """broker.py: what the MQTT server keeps for one client, and for all."""

    async def asyncSetUp(self):
        self.server = broker.MqttServer(set(), {"P1/state"}, mock.Mock())

    def joins(self, name, *packets, clean=True):
        client = broker.Connection(self.server)
        transport = mock.Mock(**{"get_extra_info.return_value.fileno.return_value": 5,
                                 "is_closing.return_value": False,
                                 "get_write_buffer_size.return_value": 0})
        transport.abort = lambda: transport.configure_mock(
            **{"is_closing.return_value": True})
        client.connection_made(transport)
        client.data_received(connect(name, flags=2 * clean) + b"".join(packets))
        return client

    async def goes_round(self, times=3):
        for _ in range(times):      # the loop
            await asyncio.sleep(0)

    async def test_nothing_more_for_who_is_too_slow(self):
        """However much comes before the loop has come round to end it; wills never nest."""
        slow = [self.joins(f"c{n}", subscribe("t")) for n in range(200)]
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
        ann = self.joins("ann", subscribe("t", qos=1))
        self.joins("bob", subscribe("t", qos=1), clean=False).connection_lost(None)
        for n in range(40):
            self.server.publish("t", b"%d" % n + bytes(50_000), 1)
        self.assertTrue(ann.transport.is_closing())
        await self.goes_round()
        [bob] = self.server.sessions.values()
        self.assertEqual([unacked.packet[9:11] for unacked in bob.unacked.values()],
                         [b"%d" % n for n in range(20, 40)])
        again = self.joins("bob", clean=False)
        await self.goes_round()
        self.assertFalse(again.transport.is_closing())      # it gets all that was kept
        again.data_received(b"".join(ack(PUBACK, id) for id in list(bob.unacked)))
        self.assertEqual(bob.size(), 129)       # its filter is left, of one level
        for id in range(1, 10_000):
            if again.is_closed:
                break
            again.data_received(publish("x", b"", 2, id=id))
        self.assertEqual(id, broker.BUDGET // 128)      # the ids of QoS 2 count, too

    async def test_filters_sessions_and_retained_messages(self):
        """What comes new finds no room, but a station's state always does."""
        eve = self.joins("eve").session
        codes = [self.server.subscribe(eve, f"{n}/a/b", 1) for n in range(5_000)]
        self.assertTrue(1_000 < codes.index(0x80) < 4_000)
        self.server.unsubscribe(eve, "0/a/b")
        self.assertEqual(self.server.subscribe(eve, "x", 1), 1)
        for n in range(1_002):
            self.joins(f"c{n}", clean=False).connection_lost(None)
        self.assertEqual((len(self.server.sessions), "c1" in self.server.sessions),
                         (1_001, False))
        for n in range(2_000):
            self.server.publish(f"large/{n}", bytes(60_000), retain=True)
        self.assertTrue(1_000 < len(self.server.retained) < 1_200)
        self.server.publish("large/0", bytes(120_000), retain=True)     # it has grown
        self.server.publish("P1/state", bytes(65_000), retain=True)
        self.assertEqual(("large/0" in self.server.retained,
                          "P1/state" in self.server.retained), (False, True))
        for topic in list(self.server.retained):
            self.server.publish(topic, b"", retain=True)
        self.assertEqual(self.server.retained_bytes, 0)

    async def test_an_expensive_subscription_is_served_in_slices(self):
        for n in range(1_000):
            self.server.publish("a/" * 10 + str(n), b"x", retain=True)
        filters = ["/".join(levels) for levels in itertools.product("a+", repeat=11)]
        began = time.monotonic()
        eve = self.joins("eve", subscribe(*filters), PING)
        self.assertLess(time.monotonic() - began, 0.1 + SLACK)
        await self.goes_round(5)
        self.assertEqual(eve.transport.pause_reading.call_count, 6)

    async def test_packet_ids(self):
        """[MQTT-2.3.1-4] After all 65,535, the one that is not acknowledged is taken."""
        session = broker.Session("ann", False)
        session.deliver(broker.Message("t", b"", 1), 1)
        for _ in range(65_600):
            session.deliver(broker.Message("t", b"", 1), 1)
            first, last = session.unacked
            self.assertTrue(first == 1 < last <= 65_535)
            session.forget(last)


class Mqtt(Story):
    """ann and bob, with ids and topics of this test's own, at a real server."""
    SPOTS = dict(P1=1, lease=0)
    COUNT = itertools.count(1)

    def setUp(self):
        self.addCleanup(self.city.check)
        self.mark = f"x{next(self.COUNT)}"
        self.t = f"t/{self.mark}"
        self.ann = self.join("ann")
        self.bob = self.join("bob")

    def raw(self, first=b""):
        client = RawClient(self.city.brokers["server1"]["mqtt"], first)
        self.addCleanup(client.close)
        return client

    def join(self, name, session=None, will=None, keep=0):
        """session: None a clean one; 0 or 1 one that stays, and was there or not.
        will: QoS and retain, of "x" to the topic `t`."""
        flags = 2 * (session is None)
        fields = [name + self.mark]
        if will:
            flags += 4 + 8 * will[0] + 32 * will[1]
            fields += [self.t, "x"]
        return self.raw(connect(*fields, flags=flags, keep=keep)).expect(
            ack(CONNACK, 256 * (session or 0)))

    def test_byte_by_byte_or_at_once(self):
        """[MQTT-3.1.3-1, -5, 3.1.4, 3.12.4-1] With all the fields that CONNECT has."""
        self.bob.subscribes(self.t)
        story = (connect(self.mark, self.t, "will", "user", "password", flags=198, keep=9)
                 + (publish("t") + PING) * 9 + subscribe("t") + publish("t"))
        for size in 1, len(story):
            cid = self.raw()
            for at in range(0, len(story), size):
                cid.send(story[at:at + size])
            cid.expect(WELCOME, *[PONG] * 9, ack(SUBACK, 9, 0)).takes("t").vanish()
            self.bob.hears(self.t, b"will")

    def test_refused(self):
        """[MQTT-3.1.2-2, 3.1.3-6..8, 3.1.4-5] What follows is not even read."""
        self.bob.subscribes(self.t)
        old = connect("").replace(b"MQTT\4", b"MQTT\3")
        will = connect("eve", "server1/cars/ben/x", "will", flags=6)
        for first, code in (old, 1), (connect("", flags=0), 2), (will, 5):
            self.raw(first + publish(self.t)).expect(ack(CONNACK, code)).closed()
        guest = self.raw(connect("")).expect(WELCOME)
        self.raw(connect("")).expect(WELCOME)
        guest.quiet()       # for each has an id of its own
        self.bob.quiet()

    def test_resumed_or_clean(self):
        """[MQTT-3.1.2-4..8, 3.2.2-1..3, 3.1.4-2] Clean keeps only retained messages. A
        second one takes over: the first one ends, with its will."""
        for session in 0, 1, None, 0, 1:
            self.join("cid", session).subscribes(f"{self.t}/{session}", 1).vanish(GOODBYE)
        self.ann.publishes(f"{self.t}/0", qos=1, retain=1).publishes(f"{self.t}/None")
        self.join("cid", 1).takes(f"{self.t}/0", qos=1).quiet()
        self.bob.subscribes(self.t)
        old = self.join("cid", None, (0, 0)).quiet().subscribes(f"{self.t}/+")
        old.takes(f"{self.t}/0", retain=1)
        new = self.join("cid").subscribes(f"{self.t}/+", 1).takes(f"{self.t}/0", b"x", 1, 1)
        self.assertEqual(old.closed(), b"")
        self.bob.takes(self.t)
        self.ann.publishes(f"{self.t}/a", qos=1)
        new.takes(f"{self.t}/a", qos=1).quiet()

    def test_redelivery(self):
        """[MQTT-3.1.2-5, 3.3.1-1, 4.4.0-1, 4.6.0-1] DUP, old ids, in order."""
        for name, qos in ("cid", 1), ("dan", 2):
            cid = self.join(name, 0).subscribes(self.t, qos)
            for payload in b"0", b"1":
                self.ann.publishes(self.t, payload, qos)
            ids = [cid.hears(self.t, payload, qos) for payload in (b"0", b"1")]
            cid.vanish()
            self.ann.publishes(self.t, b"new", qos)
            cid = self.join(name, 1)
            again = [cid.hears(self.t, payload, qos, dup=1) for payload in (b"0", b"1")]
            self.assertEqual(again, ids)
            cid.settle(qos, *ids, cid.hears(self.t, b"new", qos)).vanish(GOODBYE)
            self.join(name, 1).quiet()

    def test_exactly_once(self):
        """[MQTT-4.3.3-1, -2, 4.4.0-1] QoS 2, whatever either side sends again."""
        first = publish(self.t, qos=2, id=7)
        again = publish(self.t, qos=2, dup=1, id=7)
        cid = self.join("cid", 0).subscribes(self.t, 2)
        self.join("dan", 0).send(first, again).expect(*[ack(PUBREC, 7)] * 2).vanish()
        dan = self.join("dan", 1).send(again).settle(2, 7, sender=True)
        dan.send(ack(PUBREL, 7)).expect(ack(PUBCOMP, 7))  # the first may have been lost
        id = cid.hears(self.t, qos=2)
        cid.quiet().send(ack(PUBREC, id)).expect(ack(PUBREL, id)).vanish()
        cid = self.join("cid", 1).expect(ack(PUBREL, id)).send(ack(PUBCOMP, id)).quiet()
        dan.send(again).settle(2, 7, sender=True)  # the id was free: a new message
        cid.takes(self.t, qos=2)
        cid.send(ack(PUBREC, 99)).expect(ack(PUBREL, 99)).send(ack(PUBACK, 98)).quiet()

    def test_the_lower_qos_in_order(self):
        """[MQTT-3.8.4-6, 3.3.5, 4.3.1..3, 4.6.0-2..6] Each QoS to each, the sender too,
        once; whatever DUP and the ids are."""
        people = self.ann, self.bob, self.join("cid")
        for granted, person in enumerate(people):
            person.subscribes(self.t, granted)
        ids = range(65_530, 65_536)
        for sent in range(3):
            self.ann.send(*(publish(self.t, b"%d" % id, sent, 0, sent > 0, id) for id in ids))
            self.ann.settle(sent, *ids, sender=True)
            for granted, person in enumerate(people):
                for id in ids:
                    person.takes(self.t, b"%d" % id, min(sent, granted))
                person.quiet()

    def test_never_reads(self):
        """A subscriber that never reads is cut off (its will tells), delays nobody."""
        self.join("eve", None, (0, 0)).subscribes(f"{self.t}/a")
        self.bob.subscribes(self.t)
        for _ in range(500):  # 30 MB
            self.ann.send(publish(f"{self.t}/a", bytes(60_000)), publish(self.t, b"y"))
            asked = time.monotonic()
            if self.bob.message().payload == b"x":
                return
            self.assertLess(time.monotonic() - asked, 0.2)
        self.fail("it was not cut off")

    def test_takes_turns(self):
        """Who sends 50,000 packets at once does not keep the others waiting."""
        self.bob.subscribes(f"{self.t}/+")
        eve = self.raw(connect("eve") + publish(f"{self.t}/eve", b"", 1) * 50_000)
        self.ann.publishes(f"{self.t}/ann")
        topics = iter(lambda: self.bob.message().topic, f"{self.t}/ann")
        self.assertLess(len([*topics]), 10_000)     # of eve's, before ann's came
        eve.closed(GOODBYE)

    def test_subscriptions(self):
        """[MQTT-3.3.5-1, 3.8.4-3..5, 3.9.3-1, 3.10.4-1..6] Highest QoS, once; the same
        replaces. More than 128 levels are refused. Unsubscribing is by the letter."""
        deep = self.t + "/a" * 127
        self.bob.send(subscribe(self.t, deep, qos=1)).expect(ack(SUBACK, 9, 1, 128))
        for filter, qos, best in (self.t, 2, 2), (self.t, 0, 0), (f"{self.t}/#", 1, 1):
            self.bob.subscribes(filter, qos)
            self.ann.publishes(self.t, qos=2)
            self.bob.takes(self.t, qos=best).quiet()
        for filter, is_left in ("t/#", True), (f"{self.t}/#", True), (self.t, False):
            self.bob.send(encode(UNSUBSCRIBE, 2, 8, filter)).expect(ack(UNSUBACK, 8))
            self.ann.publishes(self.t)
            if is_left:
                self.bob.takes(self.t)
            self.bob.quiet()

    def test_retained(self):
        """[MQTT-3.3.1-5..12, 3.8.4-3] Replaced by the next, deleted by an empty one;
        RETAIN is set for those who come later."""
        self.bob.subscribes(self.t)
        before = 0
        for sent, granted in itertools.product(range(3), repeat=2):
            self.ann.publishes(self.t, qos=sent, retain=1)
            self.bob.takes(self.t, qos=min(sent, before)).subscribes(self.t, granted)
            self.bob.takes(self.t, qos=min(sent, granted), retain=1).quiet()
            before = granted
        self.ann.publishes(self.t, b"").publishes(self.t, b"", retain=1)
        self.bob.takes(self.t, b"").takes(self.t, b"").subscribes(f"+/{self.mark}").quiet()

    def test_retained_more_than_its_budget(self):
        """Who reads slowly, but reads, gets all of them: at its own pace."""
        topics = [f"{self.t}/{n}" for n in range(200)]
        self.ann.send(*[publish(topic, bytes(60_000), retain=1) for topic in topics]).quiet()
        self.bob.subscribes(f"{self.t}/#")
        self.ann.quiet()        # 12 MB are on their way; nobody waits for bob
        self.assertEqual([self.bob.message().topic for _ in topics], topics)
        self.ann.send(*[publish(topic, b"", retain=1) for topic in topics]).quiet()

    def test_will(self):
        """[MQTT-3.1.2-8..17, 3.14.1-1, 3.14.4-3] At any end but a true goodbye."""
        ends = b"", publish(self.t)[:-1], connect(), publish("t", qos=3), b"\xe0\1\0"
        for n, last in enumerate(ends):
            self.bob.subscribes(self.t, 2)  # and nothing was retained
            self.join("eve", None, (n % 3, 0)).vanish(last)
            self.bob.takes(self.t, qos=n % 3).quiet()
        self.join("eve", None, (0, 0)).vanish(GOODBYE)
        self.bob.quiet()
        self.join("eve", None, (0, 1)).vanish()
        self.bob.takes(self.t).subscribes(self.t).takes(self.t, retain=1)

    def test_keepalive(self):
        """[MQTT-3.1.2-24] Gone after 1.5 of it; half a packet is no sign of life."""
        began = time.monotonic()
        clock, half, dan = (self.join(name, keep=keep) for name, keep in (
            ("clock", 1), ("half", 2), ("dan", 2)))
        clock.closed()  # 1.5 s have passed
        half.send(PING[:1])
        dan.quiet()
        half.closed()
        self.assertTrue(2.9 < time.monotonic() - began < 4.4)  # 4.5 had it been fed
        dan.quiet()


# ======================================================================================
# One conversation at each door, and whole journeys
# ======================================================================================

RESERVE = {"op": "reserve", "id": "x-1", "car": "bob", "at": "A", "range": 50}


class Doors(Story):
    """MQTT for cars, TCP for the cloud and other brokers, HTTP for people."""
    SPOTS = dict(P1=1, P3=1, P5=1)
    MISTAKES = """
        404 | GET /x                   |                                | no such thing
        404 | GET /stations/P3         |                                | another broker's
        404 | GET /cars/ann/request    |                                | another method
        404 | DELETE /cars/ann/request |                                | nothing to give back
        501 | PUT /cars/ann/request    |                                | of no use here
        400 | POST /cars/a%2Fb/request |                                | no name
        400 | POST /cars/ann/request   | {"Content-Length": 5}          | half a body: no JSON
        400 | POST /cars/ann/request   | {"Content-Length": null}       | no length
        400 | POST /cars/ann/request   | {"Content-Length": "-1"}       | nonsense as length
        413 | POST /cars/ann/request   | {"Content-Length": 65537}      | too much
        413 | POST /cars/ann/request   | {"Content-Length": 9999999999} | far too much
        415 | POST /cars/ann/request   | {"Content-Type": "text/plain"} | a web page may do so
        415 | POST /cars/ann/request   | {"Content-Type": null}         | and so
        400 | GET /status              | {"Host": "evil.example:8081"}  | DNS rebinding
        400 | GET /status              | {"Host": "["}                  | no host
        200 | GET /status              | {"Host": "LOCALHOST:99"}       | (a good one)
        200 | GET /status              | {"Host": "[::1]:8081"}         | (another)
        200 | GET /status              | {"Host": null}                 | (an old client)
        """

    def test_mqtt(self):
        """A car and its broker, with no delay: 40 ms would be Nagle's algorithm."""
        topic = "server1/cars/ann"
        ann = RawClient(self.city.brokers["server1"]["mqtt"], connect("ann"))
        self.addCleanup(ann.close)
        ann.expect(WELCOME).subscribes(f"{topic}/reply")
        waited = []
        for _ in range(30):
            began = time.monotonic()
            ann.send(publish(f"{topic}/request", b'{"id": "a-1", "at": "A", "range": 50}'))
            reply = json.loads(ann.message().payload)
            waited.append(time.monotonic() - began)
            self.assertEqual(reply, {
                "id": "a-1", "station": "P1", "broker": "server1", "route": ["A", "P1"],
                "km": 1, "lease": 15, "asked": ["server1"]})
            ann.publishes(f"{topic}/leave/P1", b"{}")
        self.assertLess(sorted(waited)[15], 0.03)

    def test_tcp(self):
        """The cloud searches from the asker's broker on; reserve asks one alone."""
        tcp = self.city.tcp
        self.city.asked.add("bob")
        far = tcp("cloud", **RESERVE | {"op": "search", "broker": "server2"})
        self.assertEqual((far["station"], far["asked"]), ("P5", ["server3"]))
        near = tcp("server2", **RESERVE)
        self.assertEqual((near["station"], near["asked"]), ("P3", ["server2"]))
        none = tcp("server2", **RESERVE | {"range": 0.5})
        self.assertEqual((none["reason"], none["retry"]), ("out of range", 60))
        status = tcp("server2", op="status")
        self.assertEqual(sorted(status), "broker cars events requests stations".split())
        self.assertEqual({*tcp("cloud", op="city")["brokers"]}, {*PLACES})

    def test_tcp_mistakes(self):
        """A wrong question gets an error; after what is no JSON object nothing is read,
        as it may come from a browser that somebody else's page has sent here."""
        for port, op in (self.city.brokers["server1"]["tcp"], "status"), (
                self.city.cloud, "city"):
            with closing(RawClient(port)) as client:
                for wrong in {}, {"op": ["status"]}, RESERVE | {"at": "Z"}, {
                        "op": "search", "broker": "x"}:
                    self.assertRegex(client.asks(wrong)["error"], ".")
                self.assertNotIn("error", client.asks({"op": op}))
                self.assertEqual(client.closed(b" " * 65_537), b"")    # too long a line
            post = b"POST / HTTP/1.1\r\n\r\n%s\n" % json.dumps(RESERVE).encode()
            with closing(RawClient(port)) as client:
                self.assertEqual(client.closed(post).count(b"\n"), 1)

    def test_http(self):
        http, get = self.city.http, self.city.get
        near = {"at": "A", "range": 3}      # only P1 is in range
        self.city.asked.add("ann")
        status, _, offer = http("POST", "/cars/ann/request", near | {"id": "a-1"})
        self.assertEqual((status, offer["id"], offer["station"]), (200, "a-1", "P1"))
        self.assertEqual(http("POST", "/cars/ann/request", near)[0], 200)   # renewed
        status, headers, full = http("POST", "/cars/bob/request", near)
        self.assertEqual((status, full["reason"], headers["Retry-After"]), (503, "full", "5"))
        self.assertEqual(http("POST", "/cars/bob/request", near | {"range": 0})[0], 409)
        self.assertEqual(get("/stations"), {"P1": get("/stations/P1")})
        whole = get("/city")
        self.assertEqual((whole["cloud"], whole["map"]), (True, {
            "places": self.city.file["places"], "roads": self.city.file["roads"]}))
        self.assertEqual(whole["brokers"]["server1"]["stations"], get("/stations"))
        self.assertEqual(http("DELETE", "/cars/ann/request")[::2], (204, b""))
        self.assertEqual(http("DELETE", "/cars/ann/request")[0], 404)

    def test_http_mistakes(self):
        for status, request, headers, why in rows(self.MISTAKES, 4):
            method, path = request.split()
            body = RESERVE if method in ("POST", "PUT") else None
            with self.subTest(why):
                found, _, answer = self.city.http(
                    method, path, body, **json.loads(headers or "{}"))
                self.assertEqual(found, int(status))
                self.assertTrue(found == 200 or answer["error"])
        hidden = b"GET /x HTTP/1.1\r\nContent-Length: 19\r\n\r\nGET /status HTTP/1.1\r\n\r\n"
        with closing(RawClient(self.city.brokers["server1"]["http"])) as client:
            self.assertEqual(client.closed(hidden).count(b"HTTP/1.0 "), 1)

    def test_page(self):
        """It needs nothing from outside; what others wrote stays text."""
        self.assertNotRegex(self.city.get("/"), rb"""(src|href|url)\W{0,3}(https?:)?//""")
        name = "<img src=x onerror=alert(1)>"
        state = {"car": name, "at": "A", "battery": 5, "doing": "going"}
        evil = RawClient(self.city.brokers["server1"]["mqtt"], connect(name)).expect(WELCOME)
        self.addCleanup(evil.close)
        evil.publishes(f"server1/cars/{name}/state", json.dumps(state).encode())
        self.assertEqual(self.city.get("/cars"), {name: state})
        drawn = self.city.get("/map").decode()
        self.assertNotIn("<img", drawn)
        for part in "&lt;img", "P1 ■ 0 ▄ 0 □ 1", "»", 'news="All parts answer"':
            self.assertIn(part, drawn)
        evil.publishes(f"server1/cars/{name}/state", b"")
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
            with closing(RawClient(city.brokers["server1"]["mqtt"], hello)) as client:
                client.expect(ack(CONNACK, code))
        for to, op in ("server1", "status"), ("cloud", "city"):
            for key in "", "secret", ["s3cret"], "\ud800":
                self.assertEqual(city.tcp(to, op=op, key=key), {"error": "key"})
            self.assertNotIn("error", city.tcp(to, op=op, key="s3cret"))
        for words in basic("me:secret"), basic("s3cret:"), "Bearer s3cret", "Basic \xff", None:
            status, headers, _ = city.http("GET", "/", Authorization=words)
            self.assertEqual((status, headers["WWW-Authenticate"][:5]), (401, "Basic"))
        self.assertEqual(city.asks("ann").asked, ["server1"])
        self.assertEqual(city.asks("bob").asked, ["server1", "server2"])
        city.car("zoe").says("zoe .*full")
        self.assertNotIn("s3cret", str([part.lines for part in city.parts.values()]))

    def test_a_whole_life_of_a_car(self):
        """It finds its spot in another region; nothing stays behind where it has been."""
        self.city.asks("ann")
        zoe = self.city.car("zoe", "--charges", 1, battery=26)
        zoe.says(r"zoe-\d+ asks for a spot", "yes, at P3", "goes there from server1")
        self.city.shows(P3={"zoe": "charging"})
        self.assertEqual(self.city.http("GET", "/cars/zoe")[0], 404)
        self.assertEqual(self.city.get("/cars/zoe", "server2")["doing"], "charging")
        zoe.says("leaves .* 100 %").ends(0)
        self.city.shows(P3={})
        state = self.city.get("/cars/zoe", "server2")
        self.assertEqual((state["doing"], state["battery"]), ("offline", 100))

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
        line = f"timeout 1 {sys.executable} {HERE / 'car.py'} --config {self.city.config}"
        for end in ">&-", "| head -n 1":
            told = subprocess.run(f"{line} {end}", shell=True, capture_output=True, text=True)
            self.assertEqual(told.stderr, "")

    @unittest.skipUnless(MOSQUITTO, "there is no mosquitto to be found")
    def test_mosquitto_in_its_place(self):
        """One server for both brokers; it is killed and started again."""
        [port] = free_ports(1)
        mosquitto = Part(MOSQUITTO, "-p", port).says("running")
        self.addCleanup(mosquitto.erase)
        city = self.founds(mqtt=port, P1=1, P3=1)
        self.assertEqual(city.asks("ann").asked, ["server1"])
        self.assertEqual(city.asks("bob").station, "P3")
        mosquitto.kill().again().says("running")
        city["P1"].says("has hung up", "serves: 0 of")
        city["server1"].says("connection lost", "Success")
        self.assertEqual(city.asks("cid").station, None)
        city.claims("ann", "P1", "leave")
        city.shows(P1={})
        city.car("zoe").says("yes, at P1", "zoe-.* charging")


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
        self.assertEqual(set(re.findall("--[a-z][a-z-]*", self.section("Command lines"))), known)

    def test_who_decides_what(self):
        """Each function in the table is to be found in its file."""
        table = re.findall(r"\| `(\w+)\.py` \| `(.+)` \|", self.section("Who decides what"))
        self.assertGreater(len(table), 20)
        for module, names in table:
            for name in names.split("`, `"):
                with self.subTest(name):
                    found = sys.modules[module]
                    for part in name.split("."):
                        found = getattr(found, part)


# ======================================================================================
# Anything may die: the drills
# ======================================================================================

@unittest.skipUnless(SIGNALS, "this system has no SIGKILL, SIGSTOP and SIGCONT")
class Drills(Story):
    """Each promise of the city, while its parts die, hang and come back."""
    SILENT = [("mqtt", b""), ("mqtt", b"\x10"), ("mqtt", connect()[:-1]), ("http", b""),
              ("http", b"GET /x HTTP/1.1\r\n"), ("tcp", b""), ("tcp", b'{"op": ')]

    @classmethod
    def setUpClass(cls):
        """The demo takes 15 s, and who says nothing is closed after 10: both begin now."""
        cls.demo = cls.begins_demo()
        cls.guests = City(P1=1, lease=0)
        cls.addClassCleanup(cls.guests.end)
        cls.began = time.monotonic()
        cls.silent = [RawClient(cls.guests.brokers["server1"][kind], first)
                      for kind, first in cls.SILENT]

    @staticmethod
    def begins_demo():
        return Part(sys.executable, HERE / "test_system.py", "--demo", start_new_session=True)

    def asks(self, city, car, least=0.0, **more):
        """It is answered after so many seconds, and not much later."""
        reply = city.asks(car, **more)
        self.assertTrue(least <= reply.took < least + SLACK, reply)
        return reply

    def test_the_next_broker_hangs_or_is_dead(self):
        city = self.founds(P1=1, P3=1, P5=4)
        city.asks("ann")
        city["server2"].freeze()
        self.assertEqual(self.asks(city, "bob", 1.5).asked, [*PLACES])
        self.assertEqual(self.asks(city, "cid").asked, ["server1", "server3"])  # left out
        city["server2"].kill()
        city["cloud"].kill().again().says("listens")
        self.assertEqual(self.asks(city, "dan").asked, [*PLACES])
        city["cloud"].says("server2 .*skipped: .*refused").kill()
        self.assertEqual(self.asks(city, "eve").station, "P5")
        self.assertFalse(city.get("/city")["cloud"])
        self.assertIn("No answer from the cloud", city.get("/map").decode())

    def test_the_cloud_hangs(self):
        """Fifty wait for it, once; who can be served nearby does not notice."""
        city = self.founds(P1=1, P3=1)
        city["cloud"].freeze()
        crowd = [threading.Thread(target=city.asks, args=[f"c{n}", "C", 1.5])
                 for n in range(50)]
        for car in crowd:
            car.start()
        for _ in range(9):
            self.assertEqual(self.asks(city, "ann", range=1.5).station, "P1")
        for car in crowd:
            car.join()
        self.assertEqual(len(city.station("P3")["cars"]), 1)
        self.asks(city, "bob", at="C", range=1.5)       # it is left out now
        city["cloud"].thaw()

    def test_a_station_hangs_or_dies(self):
        """Dead, it is offline, and it remembers; but not if its broker dies, too."""
        city = self.founds(lease=4, P1=1, P2=1)
        city["P1"].freeze()
        self.assertEqual(self.asks(city, "ann", 0.5).station, "P2")
        city["P1"].thaw()
        city["server1"].says("P1 .*is too late")
        city.shows(P1={}, P2={})        # its late yes has ended by itself
        city.claims("bob", "P1", use="charging")
        city.shows(P1={"bob": "charging"})
        city["P1"].kill()
        city.are_online("P1", online=False, seconds=SLACK)      # its will
        city["P1"].again().says("serves: 0 of 1")
        city.claims("bob", "P1", use="charging")
        city["server1"].kill().again().says("P1 .* is online")
        city.shows(P1={"bob": "charging"})
        city["P1"].kill()
        city["server1"].kill().again().says("serves")
        city["P1"].again().says("serves: 1 of 1")

    def test_a_broker_is_away_under_real_cars(self):
        """One charges, one is on its way: both keep their spot and ask nobody anew,
        though a station dies with the broker, too. And a broker stops at work."""
        city = self.founds(P1=1, P2=1)
        zoe = city.car("zoe", battery=5).says("zoe-.* charging")
        max = city.car("max", speed=0.3).says("yes, at P2")
        city["server1"].kill()
        city["P1"].kill().again()
        zoe.says("no connection")
        city["server1"].again().says("serves")
        city.shows(5, P1={"zoe": "charging"}, P2={"max": "held"})
        max.says("max-.* charging")
        for part in zoe, max:
            self.assertEqual(len(re.findall("asks for", str(part.lines))), 1)
        city["P1"].freeze()
        line = json.dumps(RESERVE | {"car": "zoe"}).encode() + b"\n"
        for _ in range(20):
            self.addCleanup(RawClient(city.brokers["server1"]["tcp"], line).close)
        city["server1"].says("x-1 asks").stop()
        city["P1"].thaw()

    def test_a_lease_without_a_broker_or_a_car(self):
        """A car whose broker stays away asks elsewhere; a dead car's spot is free."""
        city = self.founds(lease=2, P1=1, P3=1)
        zoe = city.car("zoe", battery=5).says("zoe-.* charging")
        city["server1"].kill()
        zoe.says("the spot is lost", "server2 .* asks for a spot at P1", "yes, at P3",
                 "zoe-.* charging").kill()
        city.shows(0.5, P3={"zoe": "charging"})
        city.shows(2 + SLACK, P3={})

    def test_a_station_is_started_twice(self):
        """The older one ends: one line, exit status 2; no spot was promised twice."""
        city = self.founds(P1=1)
        city.asks("ann")
        older = city.parts["older"] = city["P1"]
        city.start("station.py", "P1", "P1")
        older.says("was started again").ends(2)
        city["P1"].says("serves: 0 of 1", "serves: 0 of 1")
        self.assertEqual(city.asks("bob").reason, "full")

    def test_the_storm(self):
        """Thirty cars ask, while parts die, hang and come back: no spot is promised to
        two of them within a lease, and all are free at the end."""
        city = self.founds(lease=2, P1=1, P2=2, P3=1, P4=2, P5=1, P6=2)
        storm = Storm(city)
        storm.rages()
        self.assertEqual(storm.faults, [])
        self.assertGreater(storm.promises, STORM)       # or it has tested nothing
        city.are_online(*city.spots)
        city.rests()

    def test_with_noise_and_silence(self):
        """Random bytes at each door. And who says nothing whole is closed after 10 s."""
        dice = random.Random(SEED)
        noises = [dice.randbytes(dice.randrange(1, 300)) for _ in range(100)]
        noises += [b"GET /" + b"x" * 70_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500,
                   connect("eve") + noises[0]]
        ports = [self.guests.brokers["server1"][kind] for kind in ("mqtt", "http", "tcp")]
        for port, noise in itertools.product([*ports, self.guests.cloud], noises):
            with closing(RawClient(port)) as client, suppress(OSError):
                client.vanish(noise)
        for line in self.guests["server1"].lines + self.guests["cloud"].lines:
            self.assertRegex(line, r"\A\d\d:\d\d:\d\d  ")       # one line per event
        for client in self.silent:
            client.socket.settimeout(max(0.1, self.began + 10 + SLACK - time.monotonic()))
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
    """Cars that ask, while in each region one part is away at a time. (A station and its
    broker that die together forget their spots.)

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
            undo = []
            for names in self.REGIONS:
                part = self.city[dice.choice(names)]
                strike = dice.choice([lambda: part.kill().again, lambda: part.freeze().thaw,
                                      lambda: lambda: None])
                undo.append(strike())
            enough = self.promises + dice.randrange(20)
            calm = time.monotonic() + 3 * dice.random()
            wait_until(lambda: self.promises >= enough or time.monotonic() > calm)
            for come_back in undo:
                come_back()
            self.city.are_online(*self.city.spots)
        self.over.set()
        for car in cars:
            car.join()

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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
