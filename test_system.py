"""The tests: short stories about a city of real processes, from the smallest part up.

        test --starts, kills, freezes--> cloud_server.py, broker.py, station.py, car.py
        test <--reads what they tell---- (processes of their own, on free ports)

        ann  --asks(at="A")------------> a broker of that city
        ann  <--hears(station="P1")----- (ann: one end of an MQTT connection, no more)

    python3 test_system.py                    all of it, simplest first
    python3 -m unittest test_system.Drills    a chapter of it; with -v story by story
    STORM=60 SEED=7 python3 test_system.py    drill 9 for a minute, with these numbers

Chapters: pure logic; packets, byte by byte; one conversation at each door; a whole
journey; what happens when anything dies. Nothing sleeps: a test waits until something
is so, and fails when its deadline has passed. Where the city promises a number of
seconds the tests allow SLACK more, for a machine whose cores are all busy.

Read next: the story that interests you. Left out on purpose: how fast things are.
"""

import asyncio
import concurrent.futures
import contextlib
import copy
import functools
import hmac
import http.client
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

os.environ.pop("EV_KEY", None)      # the city of these tests has open doors

import broker
import cloud_server
import ring

HERE = Path(__file__).resolve().parent
DEADLINE = 20   # s; only failures wait that long
SLACK = 1.5     # s that a busy machine may take longer than promised
STORM = float(os.environ.get("STORM", 8))   # s of drill 9
SEED = int(os.environ.get("SEED", time.time_ns() % 1_000_000))
SIGNALS = hasattr(signal, "SIGSTOP")        # and SIGKILL, SIGCONT, process groups
MOSQUITTO = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin")


def setUpModule():
    print(f"random numbers of this run: SEED={SEED}", file=sys.stderr)


def load_tests(loader, tests, pattern):
    """In the order of this file, where unittest would take the alphabet's."""
    cases = [case for case in globals().values()
             if isinstance(case, type) and issubclass(case, unittest.TestCase)]
    found = [case(name) for case in cases for name in loader.getTestCaseNames(case)]
    return unittest.TestSuite(sorted(found, key=lambda test: getattr(
        type(test), test._testMethodName).__code__.co_firstlineno))


def wait_until(condition, seconds=DEADLINE, what=lambda: "what was waited for"):
    """Look again and again until the condition holds; returns what it then says."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ConnectionError):      # whom it asks is not up yet
            if found := condition():
                return found
        if time.monotonic() > end:
            raise AssertionError(f"{what()} did not happen within {seconds} s")
        time.sleep(0.01)


# --- A city of real processes ---------------------------------------------------------

class Part:
    """A process, and the lines that it has told so far."""

    def __init__(self, *command, **popen):
        self.command, self.popen, self.lines = [*map(str, command)], popen, []
        self.again()

    def __str__(self):
        return "\n  ".join([" ".join(self.command), *self.lines[-40:], ""])

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

    def says(self, *patterns, seconds=DEADLINE):
        """Wait until it has said all of these, after what it was asked for before."""
        def found():
            over, new = not self.listener.is_alive(), self.lines[self.read:]
            at = [next((n for n, line in enumerate(new, 1) if re.search(it, line)), 0)
                  for it in patterns]
            assert all(at) or not over, f"it ended without {patterns}: {self}"
            return all(at) and max(at)
        self.read += wait_until(found, seconds, lambda: f"{patterns} of {self}")
        return self

    def ends(self, status, seconds=DEADLINE):
        self.gone = True
        found = self.process.wait(seconds)
        assert found == status, f"ended with {found}: {self}"
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
        return self

    def check(self):
        """It is alive if it should be, and no fault of its own has shown."""
        assert self.gone or self.process.poll() is None, f"has ended: {self}"
        assert "Traceback" not in str(self.lines), "\n".join(self.lines)

    def stop(self, how=signal.SIGTERM):
        """The way a user stops it: it ends at once, with exit status 0."""
        if SIGNALS and not self.gone:
            self.process.send_signal(how)
            self.ends(0, 2 + SLACK)

    def erase(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.listener.join()


#   P2            P4            P6          from A to P1 1 km, P2 2 km, P3 6 km,
#   |             |             |           P4 8 km, P5 11 km, P6 14 km
#   A--P1 . . . . C--P3 . . . . E--P5       (the dotted roads join A, C and E)
PLACES = {"server1": {"A": [0, 0], "P1": [1, 0], "P2": [0, 2]},
          "server2": {"C": [5, 0], "P3": [6, 0], "P4": [5, 3]},
          "server3": {"E": [10, 0], "P5": [11, 0], "P6": [10, 4]}}
ROADS = "A P1", "A P2", "A C", "C P3", "C P4", "C E", "E P5", "E P6"


def describe(ports, **spots):
    """A servers.json with these stations (P1=2: two spots), and their brokers."""
    names = [name for name, places in PLACES.items() if places.keys() & spots.keys()]
    places = {place: {"at": at, "broker": name}
              for name in names for place, at in PLACES[name].items()}
    for place in spots:
        places[place]["spots"] = spots[place]
    return {"cloud": {"host": "127.0.0.1", "port": next(ports)}, "places": places,
            "brokers": [{"name": name, "host": "127.0.0.1", "mqtt": next(ports),
                         "http": next(ports), "tcp": next(ports)} for name in names],
            "roads": [[a, b] for a, b in map(str.split, ROADS) if {a, b} <= {*places}]}


class City:
    """A cloud, brokers and stations that run. `apart`: each name has its own process.

    city["P1"], city["server1"], city["cloud"] are the parts, to be killed and frozen.
    """

    def __init__(self, apart=False, scripts="cloud broker station", options=(), key="",
                 mosquitto=False, **spots):
        ports = iter(cloud_server.free_ports(10))
        self.spots, self.file = spots, describe(ports, **spots)
        self.key, self.env, self.parts = key, os.environ | {"EV_KEY": key}, {}
        self.ports = {entry["name"]: entry for entry in self.file["brokers"]}
        self.cloud = self.file["cloud"]["port"]
        shared = self.file["brokers"][0]["mqtt"]
        for entry in self.file["brokers"] if mosquitto else ():
            entry["mqtt"] = shared
        self.folder = tempfile.TemporaryDirectory()
        self.config = Path(self.folder.name, "servers.json")
        self.config.write_text(json.dumps(self.file))
        try:
            if mosquitto:
                config = Path(self.folder.name, "mosquitto.conf")
                config.write_text(f"listener {shared} 127.0.0.1\n"
                                  "allow_anonymous true\nset_tcp_nodelay true\n")
                self.parts["mosquitto"] = Part(MOSQUITTO, "-c", config).says("running")
            if "cloud" in scripts:
                self.start("cloud_server.py", ["cloud"])["cloud"].says("listens")
            if "broker" in scripts:
                more = ["--external-mqtt"] if mosquitto else []
                self.start("broker.py", self.ports, apart, *more)
                for name in self.ports:
                    self[name].says(f"{name} .* serves")
            if "station" in scripts:
                self.start("station.py", spots, apart, *options).are_online(*spots)
        except BaseException:
            self.erase()
            raise
        self.size = len(self.parts)

    def __getitem__(self, name):
        return self.parts[name]

    def start(self, script, names, apart=False, *options):
        """One process for these names, or each apart. Without a name it is for all."""
        for group in [[name] for name in names] if apart else [names]:
            part = Part(sys.executable, HERE / script, *(group if apart else ()),
                        *options, "--config", self.config, env=self.env)
            self.parts.update(dict.fromkeys(group, part))
        return self

    def car(self, name, *options, at="A", battery=20, speed=20):
        """A real car.py."""
        return self.start("car.py", [name], True, "--at", at, "--battery", battery,
                          "--speed", speed, *options)[name]

    def all_parts(self):
        return reversed(dict.fromkeys(self.parts.values()))     # the cloud comes last

    def check(self):
        for part in self.all_parts():
            part.check()

    def rests(self):
        """The end of a story, but not of the city: every car leaves."""
        try:
            self.check()
            for name in [*self.parts][self.size:]:      # the real ones
                self[name].stop()
                self[name].check()
        finally:
            for name in [*self.parts][self.size:]:
                self.parts.pop(name).erase()
        for name in self.spots:
            for car in self.station(name)["cars"]:
                with contextlib.closing(Car(self, self.owner(name), car)) as last:
                    last.leaves(name)
        self.shows(**dict.fromkeys(self.spots, {}))

    def end(self):
        """The end of both: each part is well, and ends at once when it is told to."""
        try:
            self.check()
            for part in self.all_parts():
                part.stop(random.choice((signal.SIGTERM, signal.SIGINT)))
            self.check()
        finally:
            self.erase()

    def erase(self):
        for part in self.all_parts():
            part.erase()
        self.folder.cleanup()

    # --- what one can ask it

    def http(self, method, path, body=None, to="server1", **headers):
        """Status, headers, JSON of an answer. Content_Length=None: without it."""
        if body is not None:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content_Type": "application/json",
                       "Content_Length": len(body)} | headers
        if self.key:
            headers = {"Authorization": f"Bearer {self.key}"} | headers
        port = self.ports[to]["http"]
        connection = http.client.HTTPConnection("127.0.0.1", port, DEADLINE)
        with contextlib.closing(connection):
            connection.putrequest(method, path)
            for name, value in headers.items():
                if value is not None:
                    connection.putheader(name.replace("_", "-"), str(value))
            connection.endheaders(body)
            answer = connection.getresponse()
            kind, text = answer.headers.get_content_type(), answer.read()
            return (answer.status, answer.headers,
                    json.loads(text) if text and kind == "application/json" else text)

    def get(self, path, to="server1"):
        return self.http("GET", path, to=to)[2]

    def tcp(self, to, request):
        port = self.cloud if to == "cloud" else self.ports[to]["tcp"]
        return cloud_server.call("127.0.0.1", port, request, DEADLINE)

    def owner(self, place):
        return self.file["places"][place]["broker"]

    def station(self, name):
        return self.get(f"/stations/{name}", self.owner(name))

    def are_online(self, *names, online=True, seconds=DEADLINE):
        for name in names:
            wait_until(lambda: self.station(name)["online"] is online, seconds,
                       lambda: f"{name} online={online}")
        return self

    def shows(self, seconds=DEADLINE, **stations):
        """Wait until the stations have these cars: city.shows(P1={"car1": "held"})."""
        for name, cars in stations.items():
            wait_until(lambda: self.station(name)["cars"] == cars, seconds,
                       lambda: f"{name} with {cars}, not {self.station(name)},")
        return self


class Car:
    """A car as its broker sees it: it asks, plugs in and leaves, when it is told."""
    numbers = itertools.count(1)

    def __init__(self, city, broker="server1", name=None):
        self.name = name or f"car{next(self.numbers)}"
        self.topic, self.unacked = f"{broker}/cars/{self.name}", 0
        self.mqtt = RawClient(city.ports[broker]["mqtt"])
        self.close = self.mqtt.close
        try:
            self.mqtt.send(connect(self.name)).expect(WELCOME)
            self.mqtt.subscribes(f"{self.topic}/reply")
        except BaseException:
            self.close()
            raise

    def says(self, topic, value):
        """QoS 1; its PUBACK is waited for later, so many cars can speak at once."""
        payload = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.mqtt.send(publish(f"{self.topic}/{topic}", payload, 1))
        self.unacked += 1
        return self

    def was_heard(self):
        self.mqtt.expect(*[ack(PUBACK, 1)] * self.unacked)
        self.unacked = 0
        return self

    def plugs_in(self, station):
        return self.says(f"plug/{station}", {}).was_heard()

    def leaves(self, station):
        return self.says(f"leave/{station}", {}).was_heard()

    def asks(self, at="A", range=50, id=None):
        self.id = id or f"{self.name}-{next(self.numbers)}"
        self.asked = time.monotonic()
        return self.says("request", {"id": self.id, "at": at, "range": range})

    def reply(self):
        return json.loads(self.was_heard().mqtt.message()[1])

    def hears(self, **expected):
        """The reply to its request, within 9 s; with these fields among others."""
        reply = self.reply()
        self.waited = time.monotonic() - self.asked
        heard = {key: reply.get(key) for key in expected}
        assert heard == expected, f"{self.name} heard {reply}, not {expected}"
        assert reply["id"] == self.id and self.waited < 9 + SLACK, (self.waited, reply)
        return reply


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

    def founds(self, **options):
        """A city for this story alone."""
        city = City(**options)
        self.addCleanup(city.end)
        return city

    def cars(self, count, city=None, broker="server1", **options):
        cars = [Car(city or self.city, broker, **options) for _ in range(count)]
        for car in cars:
            self.addCleanup(car.close)
        return cars


# --- MQTT by hand: bytes, and one end of a connection ---------------------------------

(CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK,
 UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT) = range(1, 15)
HANDSHAKE = (), (PUBACK,), (PUBREC, PUBREL, PUBCOMP)  # after a PUBLISH of QoS 0, 1, 2


def text(data):
    data = data.encode() if isinstance(data, str) else data
    return len(data).to_bytes(2, "big") + data


def encode(kind, flags, *fields):
    """Type, flags, length of the rest, 7 bits a byte; fields: text, number or bytes."""
    body = b"".join(text(field) if isinstance(field, str) else field.to_bytes(2, "big")
                    if isinstance(field, int) else field for field in fields)
    length, rest = [], len(body)
    while rest > 127:
        length, rest = [*length, rest & 127 | 128], rest >> 7
    return bytes([kind << 4 | flags, *length, rest]) + body


def connect(id="", *fields, flags=2, keep=0, name="MQTT", level=4):
    """flags: user 128, password 64, retain 32, QoS 16 and 8, will 4, clean session 2"""
    return encode(CONNECT, 0, name, bytes([level, flags]), keep, id, *fields)


def publish(topic, payload=b"x", qos=0, retain=0, dup=0, id=1):
    flags = dup << 3 | qos << 1 | retain
    return encode(PUBLISH, flags, text(topic), *[id] * bool(qos), payload)


def ack(kind, id, *codes):
    """In CONNACK session present << 8 | return code stand in the place of the id."""
    return encode(kind, 2 if kind == PUBREL else 0, id, bytes(codes))


PING, PONG, GOODBYE = encode(PINGREQ, 0), encode(PINGRESP, 0), encode(DISCONNECT, 0)
WELCOME = ack(CONNACK, 0)


class RawClient:
    """A connection, byte by byte. Most methods return it, so that its story chains.

    That nothing comes is shown by a fence: it would come before the PINGRESP.
    """

    def __init__(self, port, first=b""):
        self.socket = socket.create_connection(("127.0.0.1", port), DEADLINE)
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

    def packet(self):
        """The next packet: type, flags, body."""
        [first], length, shift, more = self.read(1), 0, 0, 128
        while more & 128:
            [more] = self.read(1)
            length, shift = length | (more & 127) << shift, shift + 7
        return first >> 4, first & 15, self.read(length)

    def read(self, count):
        data = self.stream.read(count)
        if len(data) < count:
            raise ConnectionError("the server has closed the connection")
        return data

    def expect(self, *packets):
        """These come, in this order; messages between them are put aside."""
        for expected in packets:
            while encode(*(got := self.packet())) != expected:
                assert got[0] == PUBLISH, f"{got} came, not {expected}"
                self.early.append(got)
        return self

    def message(self):
        """The next message: topic, payload, QoS, retain, DUP, packet id (or 0)."""
        kind, flags, body = self.early.pop(0) if self.early else self.packet()
        assert kind == PUBLISH, f"{(kind, flags, body)} came, not a message"
        qos, at = flags >> 1 & 3, 2 + int.from_bytes(body[:2], "big")
        end = at + 2 * bool(qos)
        id = int.from_bytes(body[at:end], "big")
        assert bool(id) == bool(qos), "[MQTT-2.3.1-1] a packet id is never 0"
        return body[2:at].decode(), body[end:], qos, flags & 1, flags >> 3, id

    def hears(self, topic, payload=b"x", qos=0, retain=0, dup=0):
        """This is the next message; returns its packet id."""
        *got, id = self.message()
        assert got == [topic, payload, qos, retain, dup], f"heard {got}"[:300]
        return id

    def takes(self, topic, payload=b"x", qos=0, retain=0):
        return self.settle(qos, self.hears(topic, payload, qos, retain))

    def settle(self, qos, *ids, sender=False):
        """Our part of the handshake for these messages, all of them at each step."""
        for step, kind in enumerate(HANDSHAKE[qos], start=sender):
            packets = [ack(kind, id) for id in ids]
            self.expect(*packets) if step % 2 else self.send(*packets)
        return self

    def publishes(self, topic, payload=b"x", qos=0, retain=0):
        self.send(publish(topic, payload, qos, retain)).settle(qos, 1, sender=True)
        return self.send(PING).expect(PONG)

    def subscribes(self, filter, qos=0):
        self.send(encode(SUBSCRIBE, 2, 9, filter, bytes([qos])))
        return self.expect(ack(SUBACK, 9, qos))

    def unsubscribes(self, *filters):
        return self.send(encode(UNSUBSCRIBE, 2, 8, *filters)).expect(ack(UNSUBACK, 8))

    def quiet(self):
        """The server lives, and had nothing more to say to us."""
        self.send(PING).expect(PONG)
        assert not self.early, f"unexpected: {self.early}"[:300]
        return self

    def closed(self, *last):
        """After this the server closes; returns what it said before."""
        with contextlib.suppress(ConnectionError):  # it left bytes of ours unread
            return self.send(*last).stream.read()
        return b""

    def vanish(self, *last):
        """Our end closes, the server's follows: now it knows that we are gone."""
        self.send(*last).socket.shutdown(socket.SHUT_WR)
        self.stream.read()


# ======================================================================================
# Pure logic: no process, no socket
# ======================================================================================

class TheRing(unittest.TestCase):
    """ring.py: a circular linked list, and the walk round it."""

    def setUp(self):
        self.ring, self.asked = ring.Ring(), []
        for name in "abcd":
            self.ring.append(ring.Broker(name, "localhost", 1, 2, 3))

    def walk(self, answers, clock=itertools.repeat(0.0), **options):
        """From b on, on a clock of ours; the others answer as the dict says."""
        def ask(node, patience):
            self.asked.append((node.name, patience))
            return answers.get(node.name)
        with mock.patch("ring.time.monotonic", lambda: next(clock)):
            return ring.walk(self.ring.find("b"), ask, **options)

    def test_the_last_ones_next_is_the_first(self):
        node, seen = self.ring.find("a"), ""
        for _ in range(9):
            seen, node = seen + node.name, node.next
        self.assertEqual(seen, "abcdabcda")
        self.assertEqual("".join(node.name for node in self.ring), "abcd")
        self.assertIsNone(self.ring.find("e"))

    def test_a_ring_of_one_has_nobody_to_ask(self):
        self.ring = ring.Ring()
        self.assertEqual([*self.ring], [])
        self.ring.append(ring.Broker("b", "localhost", 1, 2, 3))
        self.assertIs(self.ring.find("b").next, self.ring.find("b"))
        self.assertEqual(self.walk({"b": {"station": "P1"}}), (None, []))

    def test_a_walk_asks_everybody_else_once_until_one_says_yes(self):
        yes, no = {"station": "P9"}, {"station": None, "reason": "full"}
        self.assertEqual(self.walk({"c": no, "d": yes, "a": yes}), (yes, ["c", "d"]))
        self.assertEqual(self.walk({"d": no, "b": yes}), (no, ["c", "d", "a"]))
        self.assertEqual(self.walk({}), (None, ["c", "d", "a"]))
        self.assertEqual({patience for _, patience in self.asked}, {ring.ASK})

    def test_a_walk_has_only_so_long(self):
        clock = iter([0, 0.1, 2.5, 4.5])    # begins, asks c, asks d, gives up
        self.assertEqual(self.walk({}, clock, seconds=3), (None, ["c", "d"]))
        self.assertEqual(self.asked, [("c", ring.ASK), ("d", 0.5)])


GONE = object()


def changed(file, value, *path):
    """A copy of a JSON value with another one at this place in it, or (GONE) none."""
    file = copy.deepcopy(file)
    *way, last = path
    inside = functools.reduce(operator.getitem, way, file)
    if value is GONE:
        del inside[last]
    else:
        inside[last] = value
    return file


FILE = describe(itertools.count(5000), P1=2, P3=1)
BROKER, PLACE = FILE["brokers"][0], FILE["places"]["A"]
BAD_NAMES = ("", "n" * 65, "a/b", "a+", "#", "a\nb", "a\0", "\x7f", "\u2028", "\ud800",
             5, None)
TEXTS = (b"", b"{", b"[]", b"5", b"\xff", b"[" * 20_000, b"9" * 5_000,
         b'{"a": 1, "a": 1}', json.dumps(FILE).encode("utf-16"))
MISTAKES = [        # what stands in the file instead, and where
    *((value, key) for key in FILE for value in (GONE, None, 5, "x", True)),
    *((host, *at, "host") for at in (["cloud"], ["brokers", 0])
      for host in (GONE, "", " ", 5, None, "a\nb")),
    *((port, *at) for at in (["cloud", "port"], ["brokers", 0, "mqtt"],
                             ["brokers", 1, "http"], ["brokers", 0, "tcp"])
      for port in (GONE, 0, 65536, -1, 1883.0, "1883", True, None)),
    *((n, "brokers", 0, "name") for n in (*BAD_NAMES, GONE, "server2", "A", "P1")),
    *((entry, "brokers", 0) for entry in ({}, [], "server1", None)), ([], "brokers"),
    ({}, "places"), *((PLACE, "places", n) for n in BAD_NAMES if isinstance(n, str)),
    (PLACE, "places", "server1"), *((place, "places", "A") for place in (5, [], {})),
    *((at, "places", "A", "at") for at in (GONE, None, 5, [], [1], [1, 2, 3], ["1", 2],
      [True, 0], [math.nan, 0], [math.inf, 0], {"x": 1, "y": 2})),
    *((name, "places", "P1", "broker") for name in (GONE, "server9", None, [], "")),
    *((n, "places", "P1", "spots") for n in (0, -1, 1001, 1.0, "2", True, None, [])),
    *((road, "roads", 0) for road in (["A", "Z"], ["A"], ["A", "P1", "C"], "AP1", None,
      ["A", 5], ["A", "A"], [["A"], "P1"], {"A": "P1"}))]


class ServersJson(unittest.TestCase):
    """ring.py reads it; a mistake in it ends every script with one line."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "city.json")
        self.path.write_text(json.dumps(FILE))

    def test_the_city_of_the_drawing(self):
        city = ring.load(ring.SERVERS)
        self.assertEqual([b.name for b in city.ring], ["server1", "server2", "server3"])
        self.assertEqual(sorted(city.places), "A B C D E F P1 P2 P3 P4 P5 P6".split())
        for n, stations in enumerate((["P1", "P2"], ["P3", "P4"], ["P5", "P6"]), 1):
            self.assertEqual(sorted(city.stations(f"server{n}")), stations)
        for place in city.places:
            self.assertEqual(broker.Map(city).routes(place).keys(), city.places.keys())

    def test_what_is_read(self):
        city = ring.load(self.path)
        second = city.ring.find("server1").next
        self.assertEqual((city.cloud, city.km("A", "P3")), (("127.0.0.1", 5000), 6))
        self.assertEqual((city.stations(), city.stations("server1")),
                         (["P1", "P3"], ["P1"]))
        self.assertEqual((second.name, second.mqtt, second.http, second.tcp),
                         ("server2", 5004, 5005, 5006))

    def test_each_mistake_is_named(self):
        files = [json.dumps(changed(FILE, value, *path)) for value, *path in MISTAKES]
        for text in (*TEXTS, *map(str.encode, files), None):
            self.path.write_bytes(text) if text is not None else self.path.unlink()
            with self.subTest(text), self.assertRaises(ValueError) as caught:
                ring.load(self.path)
            name, colon, fault = str(caught.exception).partition(": ")
            self.assertEqual(name, str(self.path))
            self.assertTrue(5 < len(fault) < 300 and fault.isprintable(), fault)

    def test_each_script_ends_with_one_line(self):
        """Exit status 2, and one line on stderr that names the file and the fault."""
        self.path.with_name("bad.json").write_text("{}")
        cases = {f"{script}.py --config bad.json": "bad.json.*cloud"
                 for script in ("cloud_server", "broker", "station", "car")}
        cases |= {"car.py --config none.json": "none", "broker.py server9": "server9",
                  "station.py P1 P9": "P9", "station.py A": "'A'", "car.py P1": "P1",
                  "car.py --at Z": "'Z'", "car.py a/b": "a/b", "car.py server1": "er1"}
        def run(line):
            script, *options = line.split()
            options += [] if "--config" in options else ["--config", self.path.name]
            return subprocess.run([sys.executable, HERE / script, *options], text=True,
                                  capture_output=True, timeout=60, cwd=self.path.parent)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for (line, fault), end in zip(cases.items(), pool.map(run, cases)):
                with self.subTest(line):
                    self.assertEqual((end.returncode, end.stdout), (2, ""))
                    self.assertRegex(end.stderr, rf"\A(?=.*\.json).*{fault}.*\n\Z")


class Readme(unittest.TestCase):
    """What the README's tables promise is what the scripts do, and all of it."""
    TEXT = (HERE / "README.md").read_text("utf-8")

    def first_cells(self, title):
        """What stands in backticks in the first column of the table below a title."""
        table = self.TEXT.split(f"### {title}\n")[1].split("\n#")[0]
        return [code for row in re.findall(r"^\| (.+?) \|", table, re.M)
                for code in re.findall("`(.+?)`", row)]

    def test_options(self):
        promised = {option for cell in self.first_cells("Command lines")
                    for option in re.findall("--[a-z-]+", cell)}
        known = set()
        for script in "cloud_server.py", "broker.py", "station.py", "car.py":
            told = subprocess.run([sys.executable, HERE / script, "--help"],
                                  capture_output=True, text=True, check=True).stdout
            known |= set(re.findall("--[a-z-]+", told))
        self.assertEqual(promised, known)

    def test_routes(self):
        doors = broker.Doors(None, None)
        for cell in self.first_cells("HTTP, at each broker"):
            with self.subTest(cell):
                method, path = cell.split()
                self.assertIn(method, doors.routes(path))

    def test_topics(self):
        """The fog hears exactly what is sent to it, and stations and cars the rest."""
        promised = {topic.split("/", 1)[1].translate(str.maketrans("CP", "++"))
                    for topic in self.first_cells("MQTT topics")}
        code = "".join((HERE / name).read_text("utf-8") for name in
                       ("broker.py", "station.py", "car.py"))
        heard = set(re.findall(r'\("((?:cars|stations)/[a-z+/]+)"', code))
        self.assertEqual(len(heard), 6)
        self.assertLessEqual(heard, promised)
        for verb in {topic.split("/")[2] for topic in promised - heard}:
            with self.subTest(verb):
                self.assertRegex(code, rf'[/"]{verb}[/"]')

    def test_who_decides_it(self):
        """Each function in the table is to be found under its name."""
        modules = [__import__(name) for name in
                   ("ring", "cloud_server", "broker", "station", "car")]
        table = self.TEXT.split("## Who decides it")[1].split("\n## ")[0]
        names = re.findall(r"`([\w.]+)`", table)
        self.assertGreater(len(names), 20)
        for name in names:
            with self.subTest(name):
                self.assertTrue(any(self.has(module, name) for module in modules))

    @staticmethod
    def has(module, name):
        try:
            return operator.attrgetter(name)(module)
        except AttributeError:
            return None


class Roads(unittest.TestCase):
    """broker.py: the shortest way on the roads."""

    def test_against_trying_all(self):
        """Dijkstra finds the same lengths as Floyd and Warshall, on random maps."""
        dice = random.Random(SEED)
        for _ in range(30):
            names = [f"x{n}" for n in range(dice.randrange(2, 12))]
            places = {name: {"at": [dice.random(), dice.random()]} for name in names}
            roads = [dice.sample(names, 2) for _ in range(dice.randrange(16))]
            city, km = ring.City(("", 1), ring.Ring(), places, roads), {}
            for a, b in itertools.product(names, repeat=2):
                joined = a == b or [a, b] in roads or [b, a] in roads
                km[a, b] = city.km(a, b) if joined else math.inf
            for via, a, b in itertools.product(names, repeat=3):
                km[a, b] = min(km[a, b], km[a, via] + km[via, b])
            for a in names:
                routes = broker.Map(city).routes(a)
                self.assertEqual({*routes}, {b for b in names if km[a, b] < math.inf})
                self.assertEqual([*routes], sorted(routes, key=lambda b: routes[b][0]))
                for b, (length, route) in routes.items():
                    self.assertAlmostEqual(length, km[a, b])
                    self.assertAlmostEqual(length, sum(map(city.km, route, route[1:])))
                    self.assertEqual((route[0], route[-1]), (a, b))


class Topics(unittest.TestCase):
    """broker.py: the tree finds who has subscribed to a topic."""

    @staticmethod
    def matches(topic_filter, topic):
        """The standard, by the letter. [MQTT-4.7]"""
        wanted, levels = topic_filter.split("/"), topic.split("/")
        if topic[0] == "$" and wanted[0] in ("+", "#"):
            return False
        if wanted[-1] == "#":
            wanted, levels = wanted[:-1], levels[:len(wanted) - 1]
        return len(wanted) == len(levels) and all(
            want in ("+", level) for want, level in zip(wanted, levels))

    def test_against_comparing_with_every_filter(self):
        dice, tree, filters = random.Random(SEED), broker.TopicTree(), {}
        for _ in range(600):
            deep, last = range(dice.randrange(1, 5)), ["#"] * dice.randrange(2)
            wanted = [dice.choice(["", "a", "b", "+", "$a"]) for _ in deep] + last
            topic = "/".join(dice.choice(["", "a", "b", "$a"]) for _ in deep) or "/"
            key = "/".join(wanted) or "#", dice.randrange(5)    # a filter, and whose
            if filters.pop(key, None) is not None:
                tree.remove(*key)
            else:
                filters[key] = dice.randrange(3)
                tree.add(*key, filters[key])
            expected = {}
            for (topic_filter, who), qos in filters.items():
                if self.matches(topic_filter, topic):
                    expected[who] = max(qos, expected.get(who, 0))
            self.assertEqual(tree.match(topic), expected, f"{topic!r} {filters}")
        for key in filters:
            tree.remove(*key)
        self.assertEqual(tree.match("a/b"), {})


class TheSearch(unittest.IsolatedAsyncioTestCase):
    """broker.py: how long a fog node asks its own stations, one after the other."""

    async def asked(self, answer, seconds):
        """The stations it asks if each answers this, after so many seconds."""
        names, asked = [f"P{n}" for n in range(1, 9)], []
        places = {name: {"at": [n, 0], "broker": "b", "spots": 1}
                  for n, name in enumerate(names)}
        city = ring.City(("", 1), ring.Ring(), places, [[a, b] for a, b in
                                                       itertools.pairwise(names)])
        fog = broker.Fog("b", city, broker.Map(city), cloud_server.Story("b"))
        for station in fog.stations.values():
            station.online, station.state["free"] = True, 1

        async def hold(name, *_):
            asked.append(name)
            return answer, seconds
        request = {"id": "x-1", "car": "x", "at": "P1", "range": 99}
        with mock.patch.object(fog, "hold", hold):
            reply, _ = await fog.find_spot(request, time.monotonic() + 9, ring=False)
        self.assertEqual(reply["reason"], "full")
        return asked

    async def test_the_nearest_first_within_1_2_s(self):
        self.assertEqual(len(await self.asked({"ok": False}, 0.001)), 8)
        self.assertEqual(await self.asked({"ok": False}, 0.4), ["P1", "P2"])
        self.assertEqual(await self.asked(None, 0.5), ["P1", "P2"])


class TooMuch(unittest.TestCase):
    """broker.py: what the server does about it, without a socket."""

    def setUp(self):
        self.server = broker.MqttServer(set(), mock.Mock())
        self.server.loop = asyncio.new_event_loop()
        self.addCleanup(self.server.loop.close)

    def reader(self, name):
        """It subscribes to t, and never reads."""
        reader = broker.Connection(self.server)
        reader.connection_made(transport := mock.Mock(**{
            "get_extra_info.return_value.fileno.return_value": 5,
            "is_closing.return_value": False,
            "get_write_buffer_size.return_value": broker.SLOW + 1}))
        transport.abort = lambda: transport.configure_mock(
            **{"is_closing.return_value": True})
        self.server.open_session(reader, name, True)
        self.server.tree.add("t", reader.session, 0)
        return reader

    def test_nothing_more_for_who_is_too_slow(self):
        """However much comes before the loop has come round to end it."""
        eve = self.reader("eve")
        for _ in range(100):
            self.server.publish("t", bytes(cloud_server.LIMIT))
        self.assertEqual(eve.transport.write.call_count, 1)
        self.assertEqual(eve.out, [])

    def test_wills_that_are_too_much_for_others(self):
        """...whose wills are, too: one ends after the other, never one within it."""
        for n in range(200):
            will = broker.Message("t", bytes(cloud_server.LIMIT))
            self.reader(f"c{n}").will = will    # so large that it is flushed at once
        self.server.loop.call_soon(self.server.publish, "t", b"x")
        for _ in range(1_000):      # times round the loop
            self.server.loop.run_until_complete(asyncio.sleep(0))
        self.assertEqual((self.server.connections, self.server.sessions), (set(), {}))
        self.assertEqual(len([call for call in self.server.tell.mock_calls
                              if "too slow" in str(call)]), 200)

    def test_a_full_store_of_retained_messages(self):
        """What comes new finds no room; a station's state that grows keeps its own."""
        self.server.publish("P1", b"{}", retain=True)
        for guest in bytes(60_000), b"small":
            for n in range(2_000):
                self.server.publish(f"{len(guest)}/{n}", guest, retain=True)
        self.assertTrue(1_000 < len(self.server.retained) < 1_200)
        self.server.publish("P1", bytes(3_000), retain=True)
        self.assertEqual(self.server.retained["P1"].payload, bytes(3_000))


class Frames(unittest.TestCase):
    """broker.py: where a packet begins and ends in what has come so far."""

    def test_each_length_there_and_back(self):
        for size in 0, 1, 127, 128, 16_383, 16_384, cloud_server.LIMIT - 4:
            packet = broker.encode(PUBLISH, bytes(size // 2), bytes(size - size // 2))
            self.assertEqual(packet, encode(PUBLISH, 0, bytes(size)))
            body = broker.find_body(bytearray(b"before" + packet + b"after"), 6)
            self.assertEqual((body.stop - body.start, body.stop),
                             (size, 6 + len(packet)))
            for missing in range(1, min(len(packet), 9)):
                self.assertIsNone(broker.find_body(bytearray(packet[:-missing]), 0))

    def test_too_long(self):
        for length in b"\x80\x80\x04", b"\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x01":
            with self.subTest(length), self.assertRaises(broker.ProtocolError):
                broker.find_body(bytearray(b"0" + length), 0)


# ======================================================================================
# Packets, byte by byte: MQTT 3.1.1, with the clauses of the OASIS standard in brackets
# ======================================================================================

VALID = [*(ack(kind, 1) for kind in (PUBACK, PUBREC, PUBREL, PUBCOMP)), PING, GOODBYE,
         encode(SUBSCRIBE, 2, 1, "t", b"\0"), encode(UNSUBSCRIBE, 2, 1, "t")]


@functools.cache
def broker_alone():
    """Two brokers without stations, for the whole chapter."""
    city = City(scripts="broker", P1=1, P3=1)
    unittest.addModuleCleanup(city.end)
    return city


class Bytes(unittest.TestCase):
    """ann and bob, with ids and topics of this test's own."""
    COUNT = itertools.count(1)

    def setUp(self):
        self.addCleanup(broker_alone().check)
        self.mark = f"x{next(self.COUNT)}"
        self.t = f"t/{self.mark}"
        self.ann, self.bob = self.join("ann"), self.join("bob")

    def raw(self, first=b""):
        client = RawClient(broker_alone().ports["server1"]["mqtt"], first)
        self.addCleanup(client.close)
        return client

    def join(self, name, session=None, will=("", "", 0, 0), keep=0):
        """session: None a clean one; 0 or 1 one that stays, and was there or not."""
        topic, payload, qos, retain = will
        flags = (session is None) << 1 | bool(topic) << 2 | qos << 3 | retain << 5
        fields = [name + self.mark, topic, payload][:3 if topic else 1]
        first = connect(*fields, flags=flags, keep=keep)
        return self.raw(first).expect(ack(CONNACK, (session or 0) << 8))

    def each_closes(self, *faults, first=connect()):
        for fault in faults:
            with self.subTest(fault[:80]):
                answer = self.raw(first).expect(*[WELCOME] * bool(first)).closed(fault)
                self.assertTrue(first or not answer)  # [MQTT-3.1.4-1] without CONNACK


class Packets(Bytes):
    BAD = b"a\0", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe2\x82", b"\xf4\x90\x80\x80"

    def test_refused_connect(self):
        """[MQTT-3.1.2-1, -2, 3.1.3-6..8, 3.1.4-5] What follows is not even read."""
        self.bob.subscribes(self.t)
        for level in 0, 3, 6, 127:
            eve = self.raw(connect("", "?", level=level) + publish(self.t))
            eve.expect(ack(CONNACK, 1)).closed()
        for name in "", "mqtt", "MQTTT":  # with a CONNACK or without
            self.assertIn(self.raw(connect(name=name)).closed(), (b"", ack(CONNACK, 1)))
        self.raw(connect("", flags=0)).expect(ack(CONNACK, 2)).closed()
        guest, _ = (self.raw(connect("")).expect(WELCOME) for _ in range(2))
        guest.quiet()  # for each has an id of its own
        self.bob.quiet()

    def test_malformed_connect(self):
        """[MQTT-3.1.0-1, 3.1.4-1] Not first, or not well-formed: no CONNACK."""
        self.each_closes(
            *VALID, publish("t"), connect(flags=3), b"\x11" + connect()[1:],  # reserved
            connect(flags=6), connect("", "t", "x"), connect("", "t", "x", flags=30),
            connect(flags=10), connect(flags=34),  # [MQTT-3.1.2-9..15] will
            connect(flags=130), connect("", "u"),  # [MQTT-3.1.2-18, -19] user name
            connect("", "u", flags=194), connect("", "u", "p", flags=130),  # [-20, -21]
            connect("", "p", flags=66), connect("", "", "x", flags=6),  # [-22, 4.7.3-1]
            connect("", "t/#", "x", flags=6), encode(CONNECT, 0),  # [MQTT-4.7.1-1]
            encode(CONNECT, 0, connect()[2:-2]),  # [MQTT-3.1.3-3] no client id
            *(connect("", text(bad), "x", flags=6) for bad in self.BAD),  # [3.1.3-10]
            *(connect("", text(bad), flags=130) for bad in self.BAD),  # [3.1.3-11]
            *(connect(text(bad)) for bad in self.BAD), first=b"")  # [3.1.3-4]

    def test_malformed_packets(self):
        """[MQTT-1.5.3, 2.2.2-2, 2.3.1-1, 3.1.0-2, 3.3, 3.8.3, 4.7, 4.8.0-1] Closed."""
        filters = "", "a#", "a/#/b", "#/a", "##", "a+", "+a", "a/b+/c", "++", "a/+#"
        for bad in *map(text, filters), *map(text, self.BAD):
            self.each_closes(encode(SUBSCRIBE, 2, 1, "t", b"\0", bad, b"\0"),
                             encode(UNSUBSCRIBE, 2, 1, "t", bad))
        self.each_closes(
            *(bytes([p[0] ^ 1 << bit]) + p[1:] for p in VALID for bit in range(4)),
            *(bytes([p[0], p[1] + 1]) + p[2:] + b"\0" for p in VALID),  # too long
            *(bytes([p[0], p[1] - 1]) + p[2:-1] for p in VALID if p[1]),  # too short
            b"\xc0\x80\x80\x80\x80\0", b"\0\0", b"\xf0\0",  # 5 bytes of length; 0, 15
            connect(), WELCOME, ack(SUBACK, 1, 0), ack(UNSUBACK, 1), PONG,
            publish("t", dup=1), publish("t", qos=3), publish("t", qos=1, id=0),
            publish("t", qos=2, id=0), publish("t/#"), publish("+/t"), publish(""),
            encode(PUBLISH, 0), encode(PUBLISH, 0, b"\0\2t"), encode(PUBLISH, 2, "t"),
            encode(SUBSCRIBE, 2, 0, "t", b"\0"), encode(UNSUBSCRIBE, 2, 0, "t"),
            encode(SUBSCRIBE, 2, 1, "t", b"\3"), encode(SUBSCRIBE, 2, 1, "t", b"\4"),
            encode(SUBSCRIBE, 2, 1), encode(UNSUBSCRIBE, 2, 1), *map(publish, self.BAD))

    def test_framing(self):
        """[MQTT-3.1.3-1, -5, 3.1.4, 3.12.4-1] Byte by byte or at once; all fields."""
        self.bob.subscribes(self.t)
        cid = self.mark.ljust(23, "Z"), self.t, "will", "user", text(b"\xff\0")
        story = (connect(*cid, flags=198, keep=9) + (publish("t") + PING) * 9
                 + encode(SUBSCRIBE, 2, 65_535, "t", b"\0") + publish("t"))
        for size in 1, len(story):
            cid = self.raw()
            for at in range(0, len(story), size):
                cid.send(story[at:at + size])
            cid.expect(WELCOME, *[PONG] * 9, ack(SUBACK, 65_535, 0)).takes("t").vanish()
            self.bob.hears(self.t, b"will")
        for size in 127, 128, 16_383, 16_384, 65_532:  # the last one: 64 KiB in all
            payload = (bytes(range(256)) * 256)[:size - len(text(self.t))]
            self.ann.publishes(self.t, payload)
            self.bob.hears(self.t, payload)

    def test_larger_than_64_KiB(self):
        """Refused at the header, which announces 65,537 or 268,435,455 bytes."""
        for size in b"\x81\x80\x04", b"\xff\xff\xff\x7f":
            self.each_closes(b"\x10" + size, first=b"")
            self.each_closes(b"\x30" + size)


class Sessions(Bytes):
    def test_resumed_or_clean(self):
        """[MQTT-3.1.2-4..7, 3.2.2-1..3] Clean keeps only retained messages."""
        for session in 0, 1, None, 0, 1:
            cid = self.join("cid", session).subscribes(f"{self.t}/{session}", 1)
            cid.vanish(GOODBYE)
        self.ann.publishes(f"{self.t}/0", qos=1, retain=1).publishes(f"{self.t}/None")
        self.join("cid", session=1).takes(f"{self.t}/0", qos=1).quiet()
        cid = self.join("cid").quiet().subscribes(f"{self.t}/+")
        cid.takes(f"{self.t}/0", retain=1).quiet()

    def test_takeover(self):
        """[MQTT-3.1.4-2, 3.1.2-8] The old one ends, with a will; the new one works."""
        will = f"{self.t}/will", "x", 0, 0
        self.bob.subscribes(will[0])
        old = self.join("cid", 0, will).subscribes(self.t, 1)
        new = self.join("cid", 1, will)
        self.assertEqual(old.closed(), b"")
        self.bob.takes(will[0]).quiet()
        self.ann.publishes(self.t, qos=1)
        new.takes(self.t, qos=1).quiet()

    def test_redelivery(self):
        """[MQTT-3.1.2-5, 3.3.1-1, 4.4.0-1, 4.6.0-1] DUP, old ids, in order."""
        for name, qos in ("cid", 1), ("dan", 2):
            payloads, cid = (b"0", b"1"), self.join(name, 0).subscribes(self.t, qos)
            for payload in payloads:
                self.ann.publishes(self.t, payload, qos)
            ids = [cid.hears(self.t, payload, qos) for payload in payloads]
            cid.vanish()
            self.ann.publishes(self.t, b"new", qos)
            cid = self.join(name, 1)
            again = [cid.hears(self.t, payload, qos, dup=1) for payload in payloads]
            self.assertEqual(again, ids)
            cid.settle(qos, *ids, cid.hears(self.t, b"new", qos)).vanish(GOODBYE)
            self.join(name, 1).quiet()

    def test_exactly_once(self):
        """[MQTT-4.3.3-1, -2, 4.4.0-1] QoS 2, whatever either side sends again."""
        first, again = (publish(self.t, qos=2, dup=dup, id=7) for dup in (0, 1))
        cid = self.join("cid", 0).subscribes(self.t, 2)
        self.join("dan", 0).send(first, again).expect(*[ack(PUBREC, 7)] * 2).vanish()
        dan = self.join("dan", 1).send(again).settle(2, 7, sender=True)
        dan.send(ack(PUBREL, 7)).expect(ack(PUBCOMP, 7))  # the first may have been lost
        id = cid.hears(self.t, qos=2)
        cid.quiet().send(ack(PUBREC, id)).expect(ack(PUBREL, id)).vanish()
        cid = self.join("cid", 1).expect(ack(PUBREL, id)).send(ack(PUBCOMP, id)).quiet()
        dan.send(again).settle(2, 7, sender=True)  # the id was free: a new message
        cid.takes(self.t, qos=2)

    def test_the_lower_qos(self):
        """[MQTT-3.8.4-6, 3.3.5, 4.3.1..3] Each QoS to each, the sender too, once."""
        people = self.ann, self.bob, self.join("cid")
        for granted, person in enumerate(people):
            person.subscribes(self.t, granted)
        for sent in range(3):
            self.ann.publishes(self.t, qos=sent)
            for granted, person in enumerate(people):
                person.takes(self.t, qos=min(sent, granted)).quiet()

    def test_order(self):
        """[MQTT-3.3.1-3, 4.3.2-2, 4.6.0-2..6] In order; DUP stays here, ids do not."""
        self.bob.subscribes(self.t, 2)
        for qos, dup in (0, 0), (1, 0), (1, 1), (2, 0), (2, 1):
            ids = {id: b"%d" % id for id in range(65_521, 65_536)}
            self.ann.send(*(publish(self.t, ids[id], qos, 0, dup, id) for id in ids))
            self.ann.settle(qos, *ids, sender=True)
            self.bob.settle(qos, *[self.bob.hears(self.t, ids[id], qos) for id in ids])

    def test_packet_ids(self):
        """[MQTT-2.3.1-4] After all 65,535, the one not acknowledged is still taken."""
        self.bob.subscribes(self.t, 1).publishes(self.t, qos=1)
        held, ids = self.bob.hears(self.t, qos=1), range(1, 501)
        for _ in range(0, 66_000, len(ids)):
            self.ann.send(*(publish(self.t, qos=1, id=id) for id in ids))
            self.ann.settle(1, *ids, sender=True)
            for _ in ids:
                self.bob.settle(1, id := self.bob.hears(self.t, qos=1))
                self.assertNotEqual(id, held)

    def test_never_reads(self):
        """A subscriber that never reads is cut off (its will tells), delays nobody."""
        self.join("eve", None, (f"{self.t}/b", "will", 0, 0)).subscribes(f"{self.t}/a")
        self.bob.subscribes(f"{self.t}/b")
        for _ in range(500):  # 30 MB
            self.ann.send(publish(f"{self.t}/a", bytes(60_000)), publish(f"{self.t}/b"))
            asked, payload = time.monotonic(), self.bob.message()[1]
            self.assertLess(time.monotonic() - asked, 0.2)
            if payload == b"will":
                return
        self.fail("it was not cut off")

    def test_acknowledges_nothing(self):
        """A subscriber that leaves 10,000 messages unacknowledged is cut off."""
        self.bob.subscribes(self.t, 1)
        for start in range(1, 10_501, 500):
            ids = range(start, start + 500)
            self.ann.send(*(publish(self.t, qos=1, id=id) for id in ids))
            self.ann.settle(1, *ids, sender=True)
        taken = self.bob.closed().count(self.t.encode())
        self.assertTrue(10_000 <= taken <= 10_001, taken)

    def test_acknowledges_what_never_was(self):
        """[MQTT-4.3.3-1] The handshake goes on, but nothing of it is kept."""
        eve = self.join("eve", 0)
        for id in range(1, 2_000):
            eve.send(ack(PUBREC, id)).expect(ack(PUBREL, id))
        eve.send(ack(PUBACK, 7), ack(PUBCOMP, 8)).quiet().vanish()
        self.join("eve", 1).quiet()

    def test_takes_turns(self):
        """Who sends 50,000 packets at once does not keep the others waiting."""
        self.bob.subscribes(f"{self.t}/+")
        eve = self.raw(connect("eve") + publish(f"{self.t}/eve", b"", 1) * 50_000)
        self.ann.publishes(f"{self.t}/ann")
        topics = iter(lambda: self.bob.message()[0], f"{self.t}/ann")
        self.assertLess(len([*topics]), 10_000)     # of eve's, before ann's came
        eve.closed(GOODBYE)

    def test_messages_for_the_absent(self):
        """1,000 of them and 512 KiB are kept for each; the oldest go first."""
        for name, count, size, kept in ("cid", 1005, 10, 1000), ("dan", 20, 60_000, 8):
            messages = [b"%0*d" % (size, n) for n in range(count)]
            self.join(name, 0).subscribes(self.t, 1).vanish(GOODBYE)
            for message in messages:
                self.ann.publishes(self.t, message, 1)
            absent = self.join(name, 1)
            for message in messages[-kept:]:
                absent.takes(self.t, message, 1)
            absent.quiet().vanish()


class Subscriptions(Bytes):
    def test_dollar_topics(self):
        """[MQTT-4.7.2-1] A wildcard at the start matches everything but $..."""
        self.bob.subscribes("#").subscribes(f"+/{self.mark}")
        self.join("eve").vanish(publish(f"$t/{self.mark}"), GOODBYE)
        self.ann.publishes(f"/{self.mark}")
        while (topic := self.bob.message()[0]) != f"/{self.mark}":
            self.assertFalse(topic.startswith("$"))

    def test_several_that_match(self):
        """[MQTT-3.3.5-1, 3.8.4-3..5, 3.9.3-1] Highest QoS, once; the same replaces."""
        a, b, plus, hash = (f"{self.t}/{last}" for last in "ab+#")
        self.bob.send(encode(SUBSCRIBE, 2, 7, a, b"\2", b, b"\0", self.t, b"\1"))
        self.bob.expect(ack(SUBACK, 7, 2, 0, 1))
        for filter, qos, best in (a, 2, 2), (a, 0, 0), (hash, 1, 1), (plus, 2, 2):
            self.bob.subscribes(filter, qos)
            self.ann.publishes(a, qos=2)
            self.bob.takes(a, qos=best).quiet()

    def test_unsubscribe(self):
        """[MQTT-3.10.4-1..6] By the letter; what has begun ends; always UNSUBACK."""
        a, b, c, plus = (f"{self.t}/{last}" for last in ("a", "b", "x/c", "+/c"))
        self.bob.subscribes(a, 2).subscribes(b).subscribes(plus)
        self.ann.publishes(a, qos=2)
        id = self.bob.hears(a, qos=2)
        self.bob.unsubscribes(a, c).unsubscribes(f"{self.t}/#").settle(2, id)
        self.ann.publishes(a, qos=2).publishes(b).publishes(c)
        self.bob.takes(b).takes(c).quiet()

    def test_32_000_levels(self):
        """[4.7.3] A topic may have them; a filter may be refused [MQTT-3.8.4-5]."""
        deep, plus = self.t + "/a" * 32_000, self.t + "/+" * 32_000
        self.ann.send(encode(SUBSCRIBE, 2, 1, plus, b"\0"))
        self.assertIn(self.ann.packet()[2], (b"\0\1\0", b"\0\1\x80"))
        self.bob.subscribes(f"{self.t}/#").publishes(deep, retain=1).takes(deep)
        self.bob.subscribes(f"{self.t}/#").takes(deep, retain=1)
        self.ann.publishes(deep, b"", retain=1).unsubscribes(plus)

    def test_for_new_subscriptions(self):
        """[MQTT-3.3.1-5, -6, -8, -9, 3.8.4-3] RETAIN is set for those who come later"""
        self.bob.subscribes(self.t, before := 0)
        for sent, granted in itertools.product(range(3), repeat=2):
            self.ann.publishes(self.t, qos=sent, retain=1)
            self.bob.takes(self.t, qos=min(sent, before)).subscribes(self.t, granted)
            self.bob.takes(self.t, qos=min(sent, granted), retain=1).quiet()
            before = granted

    def test_the_last_one_or_none(self):
        """[MQTT-3.3.1-7, -10..12, 3.8.4-4] Replaced by the next, deleted by none."""
        a, b = f"{self.t}/a", f"{self.t}/b"
        for payload, qos in (b"1", 1), (b"2", 2), (b"3", 0):
            self.ann.publishes(a, payload, qos, retain=1)
        self.ann.publishes(a, b"other", 1).publishes(a, b"", 1).publishes(b, retain=1)
        self.bob.send(encode(SUBSCRIBE, 2, 1, a, b"\1", b, b"\0"))
        self.bob.expect(ack(SUBACK, 1, 1, 0)).takes(a, b"3", 0, 1).takes(b, retain=1)
        self.ann.publishes(a, b"", 1, retain=1)
        self.bob.takes(a, b"", 1).subscribes(f"{self.t}/+").takes(b, retain=1).quiet()


class Wills(Bytes):
    def dies(self, *last, qos=0, retain=0):
        self.join("eve", None, (self.t, "x", qos, retain)).vanish(*last)

    def test_when_and_how(self):
        """[MQTT-3.1.2-8..17, 3.14.1-1, 3.14.4-3] At any end but a true goodbye."""
        ends = [b"", b"", b"", publish(self.t, b"half a packet")[:-1], connect(),
                publish("t", qos=3), GOODBYE[:1] + b"\1\0", b"\xe1\0"]
        for n, last in enumerate(ends):
            self.bob.subscribes(self.t, 2)  # and nothing was retained
            self.dies(last, qos=n % 3)
            self.bob.takes(self.t, qos=n % 3).quiet()
        self.dies(GOODBYE)
        self.join("eve").vanish()  # without a will
        self.bob.quiet()
        self.dies(retain=1)
        self.bob.takes(self.t).subscribes(self.t).takes(self.t, retain=1)

    def test_keepalive(self):
        """[MQTT-3.1.2-24] Gone after 1.5 of it; half a packet is no sign of life."""
        self.bob.subscribes(self.t)
        began = time.monotonic()
        clock = self.join("clock", None, (self.t, "x", 0, 0), keep=1)
        half, deaf, dan = (self.join(name, keep=2) for name in ("half", "deaf", "dan"))
        deaf.subscribes(f"{self.t}/tick")
        clock.closed()  # 1.5 s have passed
        half.send(PING[:1])
        dan.publishes(f"{self.t}/tick")
        deaf.takes(f"{self.t}/tick").closed()
        half.closed()
        self.assertTrue(2.9 < time.monotonic() - began < 4.4)  # 4.5 had they been fed
        dan.quiet()
        self.bob.takes(self.t)


class WhoMaySpeak(Bytes):
    """Of the contract: below a broker's name a client speaks where its id stands."""

    def test_for_itself_and_its_fleet(self):
        """Its messages and its will are heard."""
        for id, topics in {
                "car1": "server1/cars/car1/x server2/cars/car1/plug/P3 server10/x "
                        "x/server1 /server1/x server/x cars/car2/x",
                "P1": "server1/stations/P1/x/y",
                "rush": "server1/cars/rush/x server1/cars/rush-1/x"}.items():
            for topic in topics.split():
                self.bob.subscribes(topic)
                cid = self.raw(connect(id, topic, "will", flags=6)).expect(WELCOME)
                cid.publishes(topic).vanish()
                self.bob.takes(topic).takes(topic, b"will")

    def test_not_for_others(self):
        """What it says ends its connection; its will is refused, or not published."""
        for topic, ids in {
                "server1/cars/car1/x": ["server1", "", "+", "#", "car10", "rush", "P1"],
                "server1/cars/rush1/x": ["rush"], "server1/cars/rush/x": ["rush-1"],
                "server1/x/car1/x": ["car1"], "server1/stations/P1/x": ["car1"],
                "server1/x": ["car1", "server1"], "server2/x": ["car1"]}.items():
            for id in ids:
                self.bob.subscribes(topic)
                self.raw(connect(id)).expect(WELCOME).closed(publish(topic))
                self.raw(connect(id, topic, "will", flags=6)).vanish()
                self.bob.quiet()


# ======================================================================================
# One conversation: right answers at each door, and nonsense that is sent away
# ======================================================================================

REQUEST = {"id": "x-1", "at": "A", "range": 50}
NO_JSON = [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"[" * 20_000,
           b"9" * 5_000, b'{"range": %s}' % (b"9" * 5_000), b'{"a":' * 10_000,
           b'{"id": NaN}', b'{"at": "A", "range": NaN}', b'{"range": -Infinity}']
WRONG = {"at": [GONE, None, 5, "", "Z", ["A"], {}, True, "\ud800", "A" * 9_000, "P1\n"],
         "range": [GONE, None, "5", True, [], {}, -1, 1e300],
         "id": [None, 5, "", "x" * 65, "a\nb", ["x"], {}, "\ud800", "\x7f"]}
NONSENSE = NO_JSON + [json.dumps(changed(REQUEST, value, key)).encode()
                      for key, values in WRONG.items() for value in values]


class Doors(Story):
    """MQTT for cars, TCP for the cloud and other brokers, HTTP for people."""
    SPOTS = dict(P1=1, P3=1, P5=1)

    def test_http_headers_that_choke_the_parser(self):
        """Python's header parser raises what no other nonsense raises: a 400."""
        for kind in (f"multipart/x; boundary*{'9' * 5000}=a",
                     "multipart/x; boundary*=a; boundary*0=b"):
            web = http.client.HTTPConnection(
                "127.0.0.1", self.city.ports["server1"]["http"], timeout=DEADLINE)
            with self.subTest(kind[:30]), contextlib.closing(web):
                web.request("GET", "/", headers={"Content-Type": kind})
                self.assertEqual(web.getresponse().status, 400)

    def test_mqtt_a_car_is_offered_a_spot(self):
        [ann], city = self.cars(1), self.city
        self.assertEqual(ann.asks(at="A", range=50).hears(), {
            "id": ann.id, "station": "P1", "broker": "server1", "route": ["A", "P1"],
            "km": 1, "hold": 60, "lease": 15, "asked": ["server1"]})
        city.shows(P1={ann.name: "held"})
        self.assertEqual(city.station("P1"), {
            "station": "P1", "spots": 1, "free": 0, "cars": {ann.name: "held"},
            "online": True})
        ann.plugs_in("P1")
        city.shows(P1={ann.name: "charging"})
        ann.leaves("P1")
        city.shows(P1={})

    def test_mqtt_a_car_plugs_in_unasked(self):
        """It gets a free spot; if there is none, the station says who has them."""
        ann, bob = self.cars(2)
        ann.plugs_in("P1")
        self.city.shows(P1={ann.name: "charging"})
        bob.mqtt.subscribes("server1/stations/P1/state").message()  # the retained one
        bob.plugs_in("P1")
        state = json.loads(bob.mqtt.message()[1])
        self.assertEqual(state["cars"], {ann.name: "charging"})

    def test_mqtt_within_range(self):
        """The nearest by road, if it is in range; a map without one is a dead end."""
        ann, bob, cid = self.cars(3)
        ann.asks("C", range=1.5).hears(station="P3", asked=["server1", "server2"], km=1)
        bob.asks("C", range=0.9).hears(reason="out of range", retry=None,
                                       asked=["server1"])
        cid.asks("C", range=1.5).hears(reason="full", retry=5, asked=[*PLACES])

    def test_mqtt_takes_1_ms(self):
        """40 ms or more would be Nagle's algorithm, at one of the four sockets."""
        [ann], waited = self.cars(1), []
        for _ in range(50):
            ann.asks().hears(station="P1")
            ann.leaves("P1")
            waited.append(ann.waited)
        self.assertLess(statistics.median(waited), 0.03)    # on busy cores

    def test_mqtt_refuses_nonsense(self):
        [ann] = self.cars(1)
        for body in NONSENSE:
            with self.subTest(body[:80]):
                refusal = ann.says("request", body).reply()
                self.assertRegex(refusal.pop("reason"), r"\Abad request: .")
                id = "x-1" if b'"x-1"' in body else None
                self.assertEqual(refusal, {"id": id, "station": None, "retry": None,
                                           "asked": ["server1"]})
        ann.asks().hears(station="P1")

    def test_tcp_answers(self):
        """The cloud searches from the asker's broker on; reserve asks one alone."""
        tcp, car = self.city.tcp, REQUEST | {"op": "reserve", "car": "ann"}
        far = tcp("cloud", car | {"op": "search", "broker": "server2"})
        self.assertEqual((far["station"], far["asked"]), ("P5", ["server3"]))
        near = tcp("server2", car)
        self.assertEqual((near["station"], near["asked"]), ("P3", ["server2"]))
        self.city.shows(P1={}, P3={"ann": "held"}, P5={"ann": "held"})
        self.assertEqual(tcp("server2", car | {"car": "bob"}), {
            "id": "x-1", "station": None, "reason": "full", "retry": 5,
            "asked": ["server2"]})
        none = tcp("server2", car | {"range": 0.5})
        self.assertEqual((none["reason"], none["retry"]), ("out of range", None))
        status = tcp("server2", {"op": "status"})
        self.assertEqual(sorted(status), "broker cars events requests stations".split())
        self.assertEqual(status["stations"], {"P3": self.city.station("P3")})
        self.assertEqual({*tcp("cloud", {"op": "city"})["brokers"]}, {*PLACES})

    def test_tcp_refuses_nonsense(self):
        """Each gets an error, over one connection, which then serves an honest one."""
        for port, station, needed, good in (
                (self.city.ports["server1"]["tcp"], "P1", "car",
                 {"op": "reserve", "car": "c"}),
                (self.city.cloud, "P5", "broker",
                 {"op": "search", "car": "c", "broker": "server2"})):
            first, good = json.dumps(good).encode()[:-1] + b", ", good | REQUEST
            bodies = [b"{}", b'{"op": 5}', b'{"op": ["status"]}', b'{"op": "x"}',
                      b" " * 65_535]
            bodies += [re.sub(rb'\A{(?=")', first, body) for body in NONSENSE]
            bodies += [json.dumps(changed(good, name, needed)).encode()
                       for name in (*BAD_NAMES, GONE)]
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as connection:
                lines = connection.makefile("rb")
                for body in bodies:
                    connection.sendall(body + b"\n")
                    with self.subTest(body[:80], to=port):
                        self.assertRegex(json.loads(lines.readline())["error"], ".")
                connection.sendall(json.dumps(good).encode() + b"\n")
                self.assertEqual(json.loads(lines.readline())["station"], station)
                connection.sendall(b" " * 65_538)       # a line that is too long
                with contextlib.suppress(ConnectionError):
                    self.assertEqual(lines.read(), b"")

    def test_http_answers(self):
        city, good = self.city, {"at": "A", "range": 3}     # only P1 is in range
        post = functools.partial(city.http, "POST")
        status, _, offer = post("/cars/ann/request", good | {"id": "a-1"})
        self.assertEqual((status, offer["id"], offer["station"]), (200, "a-1", "P1"))
        self.assertEqual(post("/cars/ann/request", good | {"id": "a-1"})[2], offer)
        status, headers, full = post("/cars/bob/request", good)
        self.assertEqual((status, full["reason"]), (503, "full"))
        self.assertEqual(headers["Retry-After"], "5")
        status, _, none = post("/cars/bob/request", good | {"range": 0})
        self.assertEqual((status, none["reason"]), (409, "out of range"))
        city.shows(P1={"ann": "held"})
        [cid] = self.cars(1)
        state = {"car": cid.name, "at": "A", "battery": 5.5, "doing": "waiting"}
        cid.says("state", state).was_heard()
        self.assertEqual(city.get(f"/cars/{cid.name}"), state)
        self.assertEqual(city.get("/cars")[cid.name], state)
        self.assertEqual(city.get("/stations"), {"P1": city.station("P1")})
        self.assertEqual(city.get("/status")["stations"], city.get("/stations"))
        whole = city.get("/city")
        self.assertIs(whole["cloud"], True)
        self.assertEqual(whole["map"]["places"], city.file["places"])
        self.assertEqual(whole["map"]["roads"], city.file["roads"])
        self.assertEqual({*whole["brokers"]}, {*PLACES})
        self.assertEqual(whole["brokers"]["server1"]["stations"], city.get("/stations"))
        status, _, nothing = city.http("DELETE", "/cars/ann/request")
        self.assertEqual((status, nothing), (204, b""))
        city.shows(P1={})
        self.assertEqual(city.http("DELETE", "/cars/ann/request")[0], 404)

    def test_http_page(self):
        """It needs nothing from outside."""
        status, headers, page = self.city.http("GET", "/")
        self.assertEqual((status, headers.get_content_type()), (200, "text/html"))
        self.assertNotRegex(page, rb"""(src|href|url|import)\W{0,3}(https?:)?//""")

    def test_http_refuses_nonsense(self):
        good, ask = json.dumps(REQUEST).encode(), "/cars/ann/request"
        cases = [(404, "GET", path) for path in (
            "/x", "/stations/P9", "/stations/P3", "/stations/P1/x", "/cars/x",
            "/cars/x/request/", "/%2e%2e/ring.py")]
        cases += [(404, "DELETE", ask), (404, "POST", "/x", good), (405, "GET", ask)]
        cases += [(405, method, path)
                  for method in ("POST", "PUT", "DELETE", "HEAD", "TRACE", "NEW")
                  for path in ("/", "/status", "/city", "/stations/P1", "/cars")]
        cases += [(415, "POST", ask, good, kind) for kind in (None, "text/plain", "x")]
        cases += [(status, "POST", ask, good, "application/json", length)
                  for status, lengths in {411: [None], 413: [65_537, 10 ** 30],
                                          400: ["-1", "x", "1_0", "+9"]}.items()
                  for length in lengths]
        cases += [(400, "POST", f"/cars/{name}/request", good) for name in (
                  "", "a%2Fb", "%0A", "%23", "n" * 65, "%FF%00")]
        cases += [(400, "POST", ask, body) for body in NONSENSE]
        for wanted, method, path, *more in cases:
            headers = dict(zip(("Content_Type", "Content_Length"), more[1:]))
            body = more[0] if more else b"{}" if method in ("POST", "PUT") else None
            with self.subTest(f"{method} {path} {headers}", body=body and body[:80]):
                status, headers, answer = self.city.http(method, path, body, **headers)
                self.assertEqual(status, wanted)
                self.assertTrue(method == "HEAD" or answer["error"])
                if status == 405:
                    self.assertEqual({*headers["Allow"].split(", ")},
                                     {"POST", "DELETE"} if path == ask else {"GET"})
        self.assertEqual(self.city.http("POST", ask, good)[2]["station"], "P1")


# ======================================================================================
# A whole journey: cars, real ones too, in a city that works
# ======================================================================================

class Demo:
    """cloud_server.py --demo, in a process group and a temporary folder of its own."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), self.folder.name)
        self.part = Part(sys.executable, HERE / "cloud_server.py", "--demo",
                         env=os.environ | places, start_new_session=True)

    def ends_well(self, seconds):
        """Exit status 0, no traceback; no file and no process is left."""
        self.part.ends(0, seconds).check()
        assert os.listdir(self.folder.name) == [], os.listdir(self.folder.name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.part.process.pid, 0)
            raise AssertionError(f"a process is left: {self.part}")

    def erase(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.part.process.pid, signal.SIGKILL)
        self.part.erase()
        self.folder.cleanup()


class Journeys(Story):
    """The three cases of the demo, and what else happens between asking and leaving."""
    SPOTS = dict(P1=1, P3=1, P5=1)

    @classmethod
    def setUpClass(cls):
        if SIGNALS:
            cls.demo = Demo()       # it takes 20 s, beside the others
            cls.addClassCleanup(cls.demo.erase)
        super().setUpClass()

    def test_case_1_the_own_broker_has_a_spot(self):
        [ann] = self.cars(1)
        ann.asks(at="A").hears(station="P1", broker="server1", asked=["server1"])

    def test_case_2_the_third_broker_has_one(self):
        ann, bob, cid = self.cars(3)
        ann.asks(at="A").hears(station="P1")
        bob.asks(at="A").hears(station="P3", asked=["server1", "server2"])
        cid.asks(at="A").hears(station="P5", broker="server3", asked=[*PLACES],
                               route=["A", "C", "E", "P5"], km=11)
        self.city["cloud"].says(f"{cid.id} yes, at P5")

    def test_case_3_nobody_has_one_until_somebody_leaves(self):
        ann, bob, cid, dan = self.cars(4)
        for car, station in (ann, "P1"), (bob, "P3"), (cid, "P5"):
            car.asks().hears(station=station)
        dan.asks().hears(station=None, reason="full", retry=5, asked=[*PLACES])
        ann.plugs_in("P1").leaves("P1")
        self.city.shows(P1={})
        dan.asks().hears(station="P1", asked=["server1"])

    def test_the_same_id_asked_twice(self):
        """The same reply, until the car asks with a new id or leaves; one spot."""
        ann, bob = self.cars(2)
        first = ann.asks(id="a-1").asks(id="a-1").hears(station="P1")
        self.assertEqual(ann.hears(), first)
        before = self.city.get("/status")["requests"]
        self.assertEqual(ann.asks(at="C", id="a-1").hears(), first)
        self.assertEqual(self.city.get("/status")["requests"], before)  # no search
        ann.asks(id="a-2").hears(station="P1")      # a new one finds the spot it has
        self.city.shows(P1={ann.name: "held"}, P3={}, P5={})
        ann.leaves("P1")
        self.city.shows(P1={})
        bob.asks().hears(station="P1")
        ann.asks(id="a-2").hears(station="P3")      # the old offer is forgotten

    def test_two_hundred_cars_for_ten_spots(self):
        """They ask at once: ten offers, and no spot twice."""
        city = self.founds(P1=4, P2=1, P3=2, P5=3)
        crowd = [car for name in PLACES for car in self.cars(67, city, name)][:200]
        for car in crowd:
            car.asks(at="A")
        replies = {car.name: car.hears() for car in crowd}
        self.assertEqual([reply["reason"] for reply in replies.values()
                          if not reply["station"]], ["full"] * 190)
        for name, spots in city.spots.items():
            cars = [car for car, reply in replies.items() if reply["station"] == name]
            self.assertEqual(len(cars), spots)
            self.assertEqual(city.station(name)["cars"], dict.fromkeys(cars, "held"))

    def test_a_whole_life_of_a_car(self):
        zoe = self.city.car("zoe", "--charges", 1, battery=26)
        zoe.says(r"zoe-\d+ asks for a spot", "P1 at server1")
        self.city.shows(P1={"zoe": "charging"})
        self.assertEqual(self.city.get("/cars/zoe")["doing"], "charging")
        zoe.says("charging at P1").says("100 % .* leaves P1").ends(0)
        self.city.shows(P1={})
        state = self.city.get("/cars/zoe")
        self.assertEqual((state["doing"], state["battery"]), ("offline", 100))

    def test_roaming(self):
        """It charges in another region, and nothing of it stays where it came from."""
        [ann] = self.cars(1)
        ann.asks().hears(station="P1")
        max = self.city.car("max").says("P3 at server2")
        max.says("roams there from server1").says("charging at P3")
        self.city.shows(P3={"max": "charging"})
        self.assertEqual(self.city.http("GET", "/cars/max")[0], 404)
        self.assertEqual(self.city.get("/cars/max", "server2")["doing"], "charging")
        max.stop()      # it says goodbye, so no lease has to end
        self.city.shows(1, P3={})
        self.assertEqual(self.city.get("/cars/max", "server2")["doing"], "offline")

    def test_a_refused_car_asks_again(self):
        """And takes the spot that has become free meanwhile."""
        [ann], reserve = self.cars(1), REQUEST | {"op": "reserve", "car": "bob"}
        ann.asks(range=3).hears(station="P1")
        for name in "server2", "server3":
            self.assertTrue(self.city.tcp(name, reserve)["station"])
        kim = self.city.car("kim").says("full: waits 5 s")
        ann.leaves("P1")
        kim.says("charging at P1")

    def test_rush_hour(self):
        """Forty cars that ask at once: three spots, and a table of how they fared."""
        self.city.car("--rush=40").says(r"refused +37 ", r"never +0\b").ends(0)
        self.city.shows(P1={}, P3={}, P5={})

    def test_stopped_at_work(self):
        """A broker ends at once, with exit status 0, while it waits for others."""
        city = self.founds(apart=True, P1=1)
        [ann], ports = self.cars(1, city), city.ports["server1"]
        city["P1"].freeze()
        ann.asks(id="a-1")
        line, body = (json.dumps(REQUEST | {"op": "reserve", "car": "x", "id": id})
                      for id in ("b-1", "c-1"))
        post = (f"POST /cars/cid/request HTTP/1.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}")
        for kind, words in [("tcp", line + "\n"), ("http", post)] * 20:
            self.addCleanup(RawClient(ports[kind], words.encode()).close)
        city["server1"].says("a-1 asks", "b-1 asks", "c-1 asks").stop(signal.SIGINT)
        city["P1"].thaw()

    def test_a_taken_port(self):
        """Exit status 2, and one line that names the port."""
        ports = "|".join(str(self.city.ports["server1"][kind])
                         for kind in ("mqtt", "http", "tcp"))
        for script, port in ("cloud_server.py", self.city.cloud), ("broker.py", ports):
            end = subprocess.run(
                [sys.executable, HERE / script, "--config", self.city.config],
                text=True, capture_output=True, timeout=60)
            self.assertEqual(end.returncode, 2)
            self.assertRegex(end.stderr, rf"\A.*\b({port})\b.*\n\Z")

    @unittest.skipUnless(SIGNALS, "this system has no process groups")
    def test_the_demo_interrupted(self):
        """Ctrl-C, which reaches every process: at once, and with a car on its way."""
        demos = [Demo(), Demo()]
        for demo, line in zip(demos, ("=== A cloud", "car1 .* asks")):
            self.addCleanup(demo.erase)
            demo.part.says(line)
            os.killpg(demo.part.process.pid, signal.SIGINT)
        for demo in demos:
            demo.ends_well(5 + SLACK)

    @unittest.skipUnless(SIGNALS, "this system has no process groups")
    def test_the_demo_to_its_end(self):
        self.demo.part.says("Case 1", "Case 2", "Case 3", "All three cases", seconds=40)
        self.demo.ends_well(3 + SLACK)


class OtherDoors(Story):
    """The same city behind a key, and with another MQTT server in the middle."""

    def test_the_key(self):
        """Without it, or with another's proof of it, no door opens; with it all do."""
        city = self.founds(key="s3cret", P1=1, P3=1)    # its own parts come in with it
        car1, car2, p1 = (hmac.new(b"s3cret", id, "sha256").hexdigest()
                          for id in (b"car1", b"car2", b"P1"))
        for user, password in (("car1", car1), ("car1", "s3cret"), ("car1", car2),
                               ("car1", ""), ("P1", p1), (None, None)):
            hello = (connect("car1", user, text(password), flags=194) if user
                     else connect("car1"))
            client = RawClient(city.ports["server1"]["mqtt"], hello)
            self.addCleanup(client.close)
            client.expect(WELCOME if password == car1 else ack(CONNACK, 5))
        for to, request in ("server1", {"op": "status"}), ("cloud", {"op": "city"}):
            for key in {}, {"key": "secret"}, {"key": ["s3cret"]}, {"key": "\ud800"}:
                self.assertEqual(city.tcp(to, request | key), {"error": "key"})
            self.assertNotIn("error", city.tcp(to, request | {"key": "s3cret"}))
        for status, path, key in ((200, "/status", "Bearer s3cret"), (401, "/x", None),
                                  (401, "/status", "Bearer secret"), (200, "/", None),
                                  (401, "/status", "Basic s3cret")):
            self.assertEqual(city.http("GET", path, Authorization=key)[0], status, path)
        ask = functools.partial(city.http, "POST", body={"at": "A", "range": 50})
        self.assertEqual(ask("/cars/ann/request")[2]["station"], "P1")
        self.assertEqual(ask("/cars/bob/request")[2]["asked"], ["server1", "server2"])
        city.car("zoe").says("full: waits")
        for part in city.all_parts():
            self.assertNotIn("s3cret", str(part.lines))

    @unittest.skipUnless(MOSQUITTO, "there is no mosquitto to be found")
    def test_mosquitto_in_its_place(self):
        """One server for both brokers; it is killed and started again."""
        city = self.founds(mosquitto=True, P1=1, P3=1)
        ann, bob = self.cars(2, city)
        ann.asks().hears(station="P1", asked=["server1"])
        bob.asks().hears(station="P3", asked=["server1", "server2"])
        city["mosquitto"].kill().again().says("running")
        city["P1"].says("P1 .* serves 1 spots, 0 of", "P3 .* serves 1 spots, 0 of")
        city["server1"].says("server1 .* Success", "server2 .* Success")
        [ann], [cid] = self.cars(1, city, name=ann.name), self.cars(1, city)
        cid.asks().hears(reason="full", asked=["server1", "server2"])
        ann.leaves("P1")
        city.shows(P1={})
        cid.asks().hears(station="P1")
        city.car("zoe").says("full: waits")


# ======================================================================================
# Anything may die: the ten drills
# ======================================================================================

@unittest.skipUnless(SIGNALS, "this system has no SIGKILL, SIGSTOP and SIGCONT")
class Drills(Story):
    """Each promise of the city, while its parts die, hang and come back."""

    @classmethod
    def setUpClass(cls):
        """Those who never say anything whole begin first: drill 10 sees their end."""
        cls.quiet = City(scripts="broker", P1=1)
        cls.addClassCleanup(cls.quiet.end)
        post = (b"POST /cars/ann/request HTTP/1.1\r\n", b"Content-Length: 9\r\n"
                b"Content-Type: application/json\r\n\r\n{")
        silent = [("mqtt", b""), ("mqtt", b"\x10"), ("mqtt", connect()[:-1]),
                  ("http", b""), ("http", b"GET /status HT"), ("http", post[0]),
                  ("http", b"".join(post))]
        ports, cls.began = cls.quiet.ports["server1"], time.monotonic()
        cls.silent = [RawClient(ports[kind], first) for kind, first in silent]
        for client in cls.silent:
            cls.addClassCleanup(client.close)

    def quickly(self, car, least=0.0, **expected):
        """It is answered after so many seconds, and not much later."""
        car.hears(**expected)
        self.assertTrue(least <= car.waited < least + SLACK, car.waited)

    def test_drill_01_the_next_broker_hangs_or_is_dead(self):
        city = self.founds(apart=True, P1=1, P3=1, P5=3)
        ann, bob, cid, dan = self.cars(4, city)
        ann.asks().hears(station="P1")
        city["server2"].freeze()
        self.quickly(bob.asks(), 1.5, station="P5", asked=[*PLACES])
        city["server2"].kill()
        self.quickly(cid.asks(), station="P5", asked=[*PLACES])
        city["cloud"].kill()
        self.quickly(dan.asks(), station="P5", asked=[*PLACES])
        city["server1"].says(f"cloud .*{dan.id} no answer")

    def test_drill_02_the_cloud_hangs(self):
        """A hundred wait for it; who can be served nearby does not notice."""
        city = self.founds(P1=1, P3=1)
        crowd, [ann, bob] = self.cars(100, city), self.cars(2, city)
        city["cloud"].freeze()
        for car in crowd:
            car.asks("C", range=1.5)        # only P3 is in range, and not server1's
        waited = []
        for _ in range(9):
            self.quickly(ann.asks(range=3), station="P1", asked=["server1"])
            ann.leaves("P1")
            waited.append(ann.waited)
        self.assertLess(statistics.median(waited), 0.2)     # and each, on idle cores
        replies = [car.hears(asked=["server1", "server2"])["station"] for car in crowd]
        self.assertEqual(sorted(filter(None, replies)), ["P3"])
        self.assertGreater(min(car.waited for car in crowd), 4)
        self.quickly(bob.asks("C", range=1.5), reason="full")   # it is left out now
        city["cloud"].thaw()

    def test_drill_03_a_station_dies_or_hangs(self):
        city = self.founds(apart=True, P1=1, P2=3)
        ann, bob, cid, dan = self.cars(4, city)
        city["P1"].kill()
        city.are_online("P1", online=False, seconds=SLACK)      # its will
        ann.asks().hears(station="P2")
        city["P1"].again()
        city.are_online("P1")["P1"].freeze()
        self.quickly(bob.asks(), 0.5, station="P2")
        city.are_online("P1", online=False, seconds=0)
        cid.asks().hears(station="P2")
        city["P1"].thaw().says("released")          # its late yes
        self.assertNotIn(cid.id, str(city["P1"]))   # who did not even ask it
        city.are_online("P1").shows(P1={})
        dan.asks().hears(station="P1")

    def test_drill_04_a_station_comes_back(self):
        """Its broker knows its spots, or it tells the broker; together they forget."""
        city = self.founds(apart=True, P1=3)
        ann, bob = self.cars(2, city)
        for car in ann, bob:
            car.asks().hears(station="P1")
        bob.plugs_in("P1")
        both = {ann.name: "held", bob.name: "charging"}
        city.shows(P1=both)
        city["P1"].kill().again().says("remembers", "serves 3 spots, 1 of them free")
        city.are_online("P1").shows(P1=both)
        city["server1"].kill().again().says("P1 .* is online")
        city["P1"].kill().again().says("serves 3 spots, 1 of them free")
        city.are_online("P1").shows(P1=both)
        cid, dan = self.cars(2, city)
        cid.asks().hears(station="P1")
        dan.asks().hears(reason="full")
        city["P1"].kill()
        city["server1"].kill().again()
        city["P1"].again().says("serves 3 spots, 3 of them free")
        [bob] = self.cars(1, city, name=bob.name)
        bob.plugs_in("P1")                  # as a car does every third of a lease
        city.shows(P1={bob.name: "charging"})

    def test_drill_05_a_broker_comes_back(self):
        city = self.founds(apart=True, P1=2)
        [ann], zoe = self.cars(1, city), city.car("zoe")
        ann.asks().hears(station="P1")
        zoe.says("charging at P1")
        city["server1"].kill().again().says("serves")
        city.are_online("P1", seconds=5)
        city.shows(5, P1={ann.name: "held", "zoe": "charging"})
        wait_until(lambda: city.get("/cars/zoe").get("doing") == "charging", 5)

    def test_drill_06_a_car_is_killed(self):
        """Its spot is free again after its lease, held or charging, and not before."""
        city = self.founds(P1=2, options=("--hold", 3, "--lease", 1))
        going, charging = city.car("slow", speed=0.01), city.car("fast")
        charging.says("charging at P1")
        city.shows(P1={"slow": "held", "fast": "charging"})
        going.kill()
        charging.kill()
        city.shows(1 + SLACK, P1={"slow": "held"})
        city.shows(3 + SLACK, P1={})

    def test_drill_07_a_home_broker_dies(self):
        city = self.founds(apart=True, P1=1, P3=1)
        zoe = city.car("zoe").says("charging at P1")
        city["server1"].kill()
        zoe.says("server2 .* asks for a spot at P1").says("P3 at server2")
        zoe.says("charging at P3")

    def test_drill_08_a_request_or_a_reply_is_lost(self):
        """Asked again with the same id: one spot, and one answer that counts."""
        city = self.founds(apart=True, P1=2)
        ann, bob = self.cars(2, city)
        reply = ann.asks(id="a-1").hears(station="P1")      # say that this one is lost
        self.assertEqual(ann.asks(id="a-1").asks(id="a-1").hears(), reply)
        self.assertEqual(ann.hears(), reply)
        city.shows(P1={ann.name: "held"})
        city["P1"].freeze()
        bob.asks(id="b-1").was_heard()
        city["server1"].kill()              # with the request, before it could reply
        city["P1"].thaw()
        city["server1"].again().says("P1 .* is online")
        [bob], [cid] = self.cars(1, city, name=bob.name), self.cars(1, city)
        bob.asks(id="b-1").hears(station="P1")
        city.shows(P1={ann.name: "held", bob.name: "held"})
        cid.asks().hears(reason="full")

    def test_drill_09_everything_at_once(self):
        city = self.founds(apart=True, options=("--hold", 4, "--lease", 2),
                           P1=1, P2=2, P3=1, P4=2, P5=1, P6=2)
        storm = Storm(city)
        storm.rages(STORM)
        self.assertEqual(storm.faults, [])
        self.assertGreater(storm.promises, STORM)       # or it has tested nothing
        city.are_online(*city.spots).shows(**dict.fromkeys(city.spots, {}))
        for name, [place, *_] in PLACES.items():
            [car] = self.cars(1, city, name)
            car.asks(at=place).hears(broker=name)

    def test_drill_10_nonsense_at_every_door(self):
        """What the doors' own tests leave: lies, noise, and words that never end."""
        city = self.founds(scripts="cloud broker", P1=1, P2=1)
        city.start("station.py", ["P1"], True).are_online("P1")
        [ann], [bob], [liar] = self.cars(1, city), self.cars(1, city), self.cars(
            1, city, name="P2")     # it says that it is a station
        state = {"car": ann.name, "at": "A", "battery": 5, "doing": "going"}
        for body in NO_JSON:
            ann.says("plug/P1", body).says("leave/P1", body).says("state", body)
        for value, key in (None, "at"), ("Z", "at"), (5, "car"), (101, "battery"), (
                "", "doing"):
            ann.says("state", changed(state, value, key))
        ann.was_heard()
        topic = "server1/stations/P2"
        p2 = {"station": "P2", "spots": 1, "free": 1, "cars": {}}
        held = {"id": "h", "car": "c", "ok": True, "hold": 9, "lease": 9}
        lies = [("state", changed(p2, value, key)) for key, values in {
            "station": ["P1", None], "spots": [0, 1001, True, "1"],
            "free": [-1, 2, None, 1.0], "cars": [None, [], {"c": "x"}, {"a/b": "held"},
            {"c": "held", "d": "held"}]}.items() for value in values]
        lies += [("held", changed(held, value, key)) for key, values in {
            "id": [None, ""], "ok": [None, 1, "yes"], "hold": [GONE, True],
            "lease": ["9"]}.items() for value in values]
        lies = [(last, json.dumps(lie).encode()) for last, lie in lies]
        lies += itertools.product(("held", "state", "online"), NO_JSON)
        liar.mqtt.subscribes(f"{topic}/release")
        for last, lie in (*lies, ("held", json.dumps(held).encode())):
            liar.mqtt.publishes(f"{topic}/{last}", lie, 1)
        liar.mqtt.hears(f"{topic}/release", b'{"id": "h"}')     # nobody had asked
        self.assertEqual(city.station("P2"), p2 | {"free": 0, "online": False})
        [evil] = self.cars(1, city, name="two\nlines")
        self.assertIn("bad request", evil.asks(id="x-1").hears(station=None)["reason"])
        for kind in "mqtt", "http", "tcp":
            self.makes_noise(city.ports["server1"][kind])
        self.makes_noise(city.cloud)
        self.assertEqual(city.http("GET", f"/cars/{ann.name}")[0], 404)
        city.shows(P1={})
        bob.asks().hears(station="P1")
        for line in itertools.chain(*(part.lines for part in city.all_parts())):
            self.assertRegex(line, r"\A\d\d:\d\d:\d\d  ")       # an event is one line
        for client in self.silent:
            left = 10 + SLACK - (time.monotonic() - self.began)
            client.socket.settimeout(max(0.1, left))
            self.assertIn(client.closed()[:12], (b"", b"HTTP/1.1 408"))

    def makes_noise(self, port):
        """Random bytes, and what looks like an honest beginning."""
        dice = random.Random(SEED)
        noises = [dice.randbytes(dice.randrange(1, 300)) for _ in range(100)]
        noises += [b"GET /" + b"x" * 70_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500,
                   b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, connect("eve") + noises[0]]
        for noise in noises:
            client = RawClient(port)
            with contextlib.closing(client), contextlib.suppress(OSError):
                client.vanish(noise)


class Storm:
    """Thirty cars that ask and use what they get, while parts die, hang and come back.

    `kept` is guarded by `lock`: the station where a car was promised a spot, and until
    when at least. A promise ends when its car leaves or asks anew, or with its lease,
    counted from before it was given.
    """

    def __init__(self, city):
        self.city, self.over, self.lock = city, threading.Event(), threading.Lock()
        self.kept, self.faults, self.replies, self.promises = {}, [], 0, 0

    def rages(self, seconds):
        """In each region one part is away at a time: a station and its broker that die
        together forget their holds."""
        dice, end = random.Random(SEED), time.monotonic() + seconds
        regions = [["cloud"], ["server1", "P1", "P2"], ["server2", "P3", "P4"],
                   ["server3", "P5", "P6"]]
        cars = [threading.Thread(target=self.live, args=[n]) for n in range(30)]
        for car in cars:
            car.start()
        try:
            while time.monotonic() < end:
                self.strikes(dice, [self.city[dice.choice(names)] for names in regions
                                    if dice.random() < 0.6])
        finally:
            self.over.set()
            for car in cars:
                car.join()

    def strikes(self, dice, victims):
        """These parts die or hang, for a while, and then come back."""
        undo = []
        for part in victims:
            if dice.random() < 0.5:
                undo.append(part.kill().again)
            else:
                undo.append(part.freeze().thaw)
        enough = self.replies + dice.randrange(200)
        end = time.monotonic() + 3 * dice.random()
        wait_until(lambda: self.replies >= enough or time.monotonic() > end)
        for come_back in undo:
            come_back()
        self.city.are_online(*self.city.spots)

    def live(self, number):
        """The life of a car: broker after broker, as their connections end."""
        dice, name, offer = random.Random(SEED + number), f"storm{number}", None
        brokers = itertools.cycle(dice.sample([*PLACES], 3))
        broker = next(brokers)
        while not self.over.is_set():
            try:
                with contextlib.closing(Car(self.city, broker, name)) as car:
                    car.mqtt.socket.settimeout(3)
                    car.mqtt.subscribes(f"{broker}/stations/+/state")
                    while not self.over.is_set() and (
                            not offer or offer["broker"] == broker):
                        offer = (self.use if offer else self.ask)(car, dice, offer)
                broker = offer["broker"] if offer else next(brokers)
            except OSError:
                broker, offer = next(brokers), None
            except Exception as fault:
                self.faults.append(fault)
                raise

    def news(self, car, wanted):
        """The next message on a topic with that end; stations are always checked."""
        while True:
            topic, payload, *_ = car.was_heard().mqtt.message()
            value = json.loads(payload)
            if "spots" in value and not (len(value["cars"]) <= value["spots"]
                                         == len(value["cars"]) + value["free"]):
                self.faults.append(f"{value} shows more cars than spots")
            if topic.endswith(wanted):
                return value

    def ask(self, car, dice, _):
        """Returns an offer, or None after a refusal and some news of a station."""
        with self.lock:
            self.kept.pop(car.name, None)
        car.asks(at=dice.choice([*self.city.file["places"]]))
        while (reply := self.news(car, "/reply"))["id"] != car.id:
            pass        # that one comes too late
        with self.lock:
            self.replies += 1
            if station := reply["station"]:
                self.promises += 1
                self.kept[car.name] = station, car.asked + reply["hold"]
                here = [name for name, (where, until) in self.kept.items()
                        if where == station and until > time.monotonic()]
                if len(here) > self.city.spots[station]:
                    self.faults.append(f"{station} is promised to {here}")
                return reply
        self.news(car, "/state")
        return None

    def use(self, car, dice, offer):
        """Leave at once, or charge first, or go without a word."""
        how, station = dice.choice(["leave", "charge", "vanish"]), offer["station"]
        if how == "charge":
            with self.lock:
                until = min(self.kept[car.name][1], time.monotonic() + offer["lease"])
                self.kept[car.name] = station, until
            car.plugs_in(station)
            cars = {}
            while cars.get(car.name) != "charging":
                cars = self.news(car, f"/{station}/state")["cars"]
        if how != "vanish":
            with self.lock:
                del self.kept[car.name]
            car.leaves(station)


if __name__ == "__main__":
    unittest.main()
