"""The fog: a broker near its cars and stations. It serves MQTT, and finds free spots.

                     cloud, other brokers                  people
                            | TCP                            | HTTP
        +-------------------v--------------------------------v------------+
        |  4 the doors      one thread a connection, they only ask the fog |
        |  3 the fog node   which stations are near, free, alive? who has  |
        |     ^  |          asked? ONE coroutine finds a spot              |
        |     |  v                                                         |
        |  2 MQTT server    sessions and the topic tree, in the same loop  |
        |  1 MQTT packets   bytes <-> fields                               |
        +-------------^-------------------^-------------------------------+
                      | MQTT              | MQTT
                   stations             cars

The fog node owns nothing that lasts. It knows what its stations last said, and asks one
to hold a spot before it promises that spot to anybody. All state of chapters 2 and 3 is
touched by one asyncio loop alone, so it needs no lock; what would block (the cloud, the
other brokers) waits in threads of its own, which only hand back an answer.

    python3 broker.py [NAME ...]       these brokers in one process; no name: all
    python3 broker.py --external-mqtt  with Mosquitto in the place of chapters 1 and 2

Read next: station.py. Left out on purpose: MQTT 5, TLS, and anything kept on disk.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import hmac
import http
import http.server
import io
import itertools
import json
import logging
import math
import operator
import re
import secrets
import socket
import struct
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

from paho.mqtt import client as paho

import ring
from cloud_server import (BACKLOG, KEY, LIMIT, RETRY, Door, Lines, Patience, Story,
                          call, check_request, crash, give_up, has_room, is_id, is_key,
                          listening, mqtt_password, outcome, read_reply, read_request,
                          refusal, resolve, search, start_up, to_json,
                          until_stopped)
from ring import City, is_name, is_number, need, read_json, read_object

CONNECT_WAIT = 10           # s in which a new connection must have sent its CONNECT
SLOW = 1024 * 1024          # bytes that may wait for a subscriber that does not read
UNACKED = 10_000            # messages on their way to one connected client, or from it
KEPT, KEPT_BYTES = 1_000, 512 * 1024    # messages kept for an absent client
ABSENT = 1_000              # sessions of absent clients
RETAINED_BYTES = 64 * 1024 * 1024   # of all retained messages together, with topics
BLOCK = 4095                # each counts in blocks of 4 KiB: if it grows it has room
UNACKED_BYTES = 4 * 1024 * 1024    # of what a connected client has not acknowledged
TURN = 0.02                 # s for one client's packets before it is the others' turn
FILTERS = 128 * 1024        # characters of all filters of a session: a tree node a "/"

STATION_WAIT = 0.5          # s a station has to answer a hold
STATIONS_WAIT = 1.2         # s all stations of this broker together have
CLOUD_WAIT = 4.5            # s for the cloud: its walk takes at most 4
REQUEST_WAIT = 8.8          # s a request may take in all: the car is told 9
SILENT = 10                 # s for which a silent station, or cloud, is left out
HOLDS = 16                  # holds on their way at a time, of a broker
HOLDS_STATION = 12          # to one station: a silent one shall not hold up the others
WALKERS = 128               # requests that may wait for the cloud at the same time
REMEMBERED = 10_000         # cars, requests and holds that a broker keeps in mind
HTTP_WAIT = 10              # s for a whole HTTP request to come in
DOING = "driving", "asking", "waiting", "going", "charging", "offline"  # a car

# The types of MQTT packets, what text in them looks like, a two-byte number
(CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK,
 UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT) = range(1, 15)
TEXT = re.compile("[^\0]*")         # [MQTT-1.5.3-2]
TOPIC = re.compile("[^\0+#]+")      # [MQTT-4.7.3-1], [MQTT-3.3.2-2]
FILTER = re.compile("(?=.)(([^\0+#/]*|[+])/)*([^\0+#/]*|[+]|#)", re.S)  # [MQTT-4.7.1]
pack = struct.Struct(">H").pack
ANY = -1                            # flags, or a size of the body, that may be any


class ProtocolError(Exception):
    """A client broke the standard: its connection is closed. [MQTT-4.8.0-1]"""


require = functools.partial(need, error=ProtocolError)


# ===== 1. MQTT packets: bytes <-> fields ==============================================
#     byte 0             bytes 1 to 4            the body
#     +------+-------+   +------------------+   +----------------------+---------+
#     | type | flags |   | remaining length |   | fields of that type  | payload |
#     +------+-------+   +------------------+   +----------------------+---------+
#      4 bits  4 bits     7 bits a byte; its highest bit: one more byte follows

def encode(kind: int, *fields: bytes, flags: int = 0) -> bytes:
    """A whole packet: the fixed header, then the fields one after the other."""
    body, digits = b"".join(fields), []
    length = len(body)
    while length > 127:
        length, low = divmod(length, 128)
        digits.append(low | 128)
    return bytes([kind << 4 | flags, *digits, length]) + body


def find_body(buffer: bytearray, start: int) -> slice | None:
    """Where the body of the packet at `start` lies; None: it is not all there yet."""
    length = 0
    for count, byte in enumerate(buffer[start + 1:start + 5]):
        length |= (byte & 127) << 7 * count
        if byte < 128:
            begin, end = start + count + 2, start + count + 2 + length
            require(end - start <= LIMIT, "the packet is too long")
            return slice(begin, end) if end <= len(buffer) else None
    require(len(buffer) < start + 5, "a length of more than four bytes")
    return None


class Packet:
    """A packet that came in: its fields are taken off one after the other."""

    def __init__(self, first: int, data: bytes):
        self.kind, self.flags, self.data, self.at = first >> 4, first & 15, data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        require(self.at <= len(self.data), "a packet that ends in a field")
        return self.data[self.at - count:self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def packet_id(self) -> int:
        require(number := self.number(), "packet identifier 0")     # [MQTT-2.3.1-1]
        return number

    def text(self, pattern: re.Pattern = TEXT) -> str:
        text = self.take(self.number()).decode()    # or UnicodeError [MQTT-1.5.3-1]
        require(pattern.fullmatch(text), "no good text, topic or topic filter")
        return text


class Message(NamedTuple):
    """An application message on its way from a publisher to a subscriber."""
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


@functools.lru_cache(8)     # so it is encoded once for all its QoS 0 subscribers
def encode_publish(message: Message, packet_id: int = 0) -> bytes:
    topic, number = message.topic.encode(), pack(packet_id) if message.qos else b""
    return encode(PUBLISH, pack(len(topic)), topic, number, message.payload,
                  flags=message.qos << 1 | message.retain)


# ===== 2. The MQTT server: topic tree, sessions, connections ==========================

class TopicTree(collections.defaultdict):
    """Who subscribes to what: level -> the tree below it. A topic costs its depth.
        server1 -- cars -- + -- request   {fog: 1}
                     |     +--- plug -- P1   {P1: 1}
                     +-- car1 -- reply   {car1: 1}
    """
    def __init__(self):
        super().__init__(TopicTree)
        self.subscribers: dict = {}     # subscriber: the QoS granted to it

    def add(self, topic_filter: str, subscriber, qos: int) -> None:
        node = functools.reduce(operator.getitem, topic_filter.split("/"), self)
        node.subscribers[subscriber] = qos      # a second time replaces [MQTT-3.8.4-3]

    def remove(self, topic_filter: str, subscriber) -> None:
        levels = topic_filter.split("/")
        nodes = list(itertools.accumulate(levels, operator.getitem, initial=self))
        del nodes[-1].subscribers[subscriber]
        while levels and not (nodes[-1] or nodes[-1].subscribers):
            nodes.pop()
            del nodes[-1][levels.pop()]         # leave no empty branches

    def match(self, topic: str) -> dict:
        """Each subscriber once, with the highest QoS of its filters that match."""
        ends, nodes, wild = [], [self], topic[0] != "$"     # [MQTT-4.7.2-1]
        for level in topic.split("/"):      # level by level: no recursion, however deep
            ends += [node["#"] for node in nodes if wild and "#" in node]
            nodes = [node[key] for node in nodes
                     for key in ((level, "+") if wild else (level,)) if key in node]
            wild = True
        found = {}
        for node in nodes + ends + [node["#"] for node in nodes if "#" in node]:
            for subscriber, qos in node.subscribers.items():
                found[subscriber] = max(qos, found.get(subscriber, 0))
        return found


class Session:
    """What the server knows of a client id; if not `clean`, beyond its connection."""

    def __init__(self, client_id: str, clean: bool):
        self.client_id, self.clean = client_id, clean
        self.connection: Connection | None = None
        self.filters: set[str] = set()
        self.unacked: dict[int, bytes] = {}     # packets to send (again), in order
        self.kept_bytes = 0                     # their size together [MQTT-4.6.0-1]
        self.received: set[int] = set()         # QoS 2 identifiers not yet released
        self.ids = itertools.count()

    def deliver(self, message: Message, granted: int) -> None:
        """Send or keep a message: the lower QoS of publisher and subscriber counts."""
        if granted < message.qos:               # [MQTT-3.8.4-6]
            message = message._replace(qos=granted)
        if not message.qos and self.connection:
            self.connection.send(encode_publish(message))
        elif message.qos and not (self.connection and self.is_full()):  # soon shut
            packet_id = next(free for number in self.ids        # [MQTT-2.3.1-2]
                             if (free := number % 65535 + 1) not in self.unacked)
            self.keep(packet_id, encode_publish(message, packet_id))
            self.send(packet_id)
            self.keep_bounds()

    def keep(self, packet_id: int, packet: bytes) -> None:
        """What is to be sent (again) until it is acknowledged; if empty, nothing."""
        self.kept_bytes += len(packet) - len(self.unacked.pop(packet_id, b""))
        if packet:
            self.unacked[packet_id] = packet

    def send(self, packet_id: int) -> None:
        """Send a PUBLISH, or its PUBREL; if again, then with DUP. [MQTT-3.3.1-1]"""
        if self.connection:
            packet = self.unacked[packet_id]
            if packet[0] >> 4 == PUBLISH:
                self.unacked[packet_id] = bytes([packet[0] | 8]) + packet[1:]
            self.connection.send(packet)

    def keep_bounds(self) -> None:
        """Forget the oldest messages, if nobody is there to take them."""
        while not self.connection and self.is_full():
            self.keep(next(iter(self.unacked)), b"")

    def is_full(self) -> bool:
        most, size = (UNACKED, UNACKED_BYTES) if self.connection else (KEPT, KEPT_BYTES)
        return len(self.unacked) > most or self.kept_bytes > size


class Connection(asyncio.Protocol):
    """One client's socket. The loop calls data_received; each packet meets a do_..."""

    def __init__(self, server: "MqttServer"):
        self.server, self.closed = server, False
        self.session, self.will = None, None    # from CONNECT on
        self.buffer, self.out, self.waiting = bytearray(), [], 0    # bytes in `out`
        self.patience, self.deadline = CONNECT_WAIT, time.monotonic() + CONNECT_WAIT

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.server.connections.add(self)
        if not has_room(transport.get_extra_info("socket")):
            self.close("turned away: too many open connections")

    def connection_lost(self, error) -> None:
        self.close(f"vanished: {error}" if error else "vanished")

    def data_received(self, data: bytes) -> None:
        """Cut whole packets off what has come: it may hold half a one, or very many."""
        self.buffer += data
        self.transport.resume_reading()
        at, body, end = 0, None, time.monotonic() + TURN
        try:
            while (not self.closed and (body := find_body(self.buffer, at))
                   and time.monotonic() < end):
                self.handle(Packet(self.buffer[at], bytes(self.buffer[body])))
                at = body.stop
        except (ProtocolError, UnicodeError) as fault:
            self.close(f"broke the protocol: {fault}")
        if at:
            del self.buffer[:at]
            self.deadline = time.monotonic() + self.patience        # [MQTT-3.1.2-24]
        if body and not self.closed:    # there is more, but it is the others' turn
            self.transport.pause_reading()
            self.server.loop.call_soon(self.data_received, b"")

    def handle(self, packet: Packet) -> None:
        require((packet.kind == CONNECT) != bool(self.session),     # [MQTT-3.1.0-1], 2
                "CONNECT must be the first packet, and no other one")
        flags, size, act = self.HANDLERS.get(packet.kind, (None, None, None))
        require(act and flags in (packet.flags, ANY), "a packet no client may send")
        require(size in (len(packet.data), ANY), "bytes missing or left over")
        act(self, packet)

    def do_connect(self, packet: Packet) -> None:
        """protocol | level | flags | keepalive | client id | will | user | password"""
        require(packet.text() == "MQTT", "not MQTT")                # [MQTT-3.1.2-1]
        level, flags, keepalive = *packet.take(2), packet.number()
        if level != 4:
            return self.refuse(1, "another version of MQTT")        # [MQTT-3.1.2-2]
        user, password, retain = flags & 128, flags & 64, bool(flags & 32)
        qos, will, clean = flags >> 3 & 3, flags & 4, bool(flags & 2)
        require(not flags & 1 and qos < 3 and (will or not qos and not retain)
                and (user or not password), "impossible flags")  # [MQTT-3.1.2-3] to 22
        client_id = packet.text()
        will = Message(packet.text(TOPIC), packet.take(packet.number()), qos, retain
                       ) if will else None
        user = packet.text() if user else ""
        password = packet.take(packet.number()) if password else b""
        require(packet.at == len(packet.data), "bytes left over")
        if not client_id and not clean:
            return self.refuse(2, "no client id for its session")   # [MQTT-3.1.3-8]
        if not may_connect(client_id, user, password):
            return self.refuse(5, "the wrong key")
        client_id = client_id or f"auto-{secrets.token_hex(8)}"     # [MQTT-3.1.3-6]
        if will and not may_publish(client_id, will.topic, self.server.brokers):
            return self.refuse(5, "a will in another's name")
        self.will, self.patience = will, keepalive * 1.5 or math.inf
        self.server.open_session(self, client_id, clean)

    def refuse(self, code: int, why: str) -> None:
        self.send(encode(CONNACK, bytes([0, code])))    # no session [MQTT-3.2.2-4]
        self.close(f"refused: {why}")                   # [MQTT-3.2.2-5]

    def do_publish(self, packet: Packet) -> None:
        """topic | packet identifier unless QoS 0 | payload; flags: DUP, QoS, RETAIN"""
        qos, received = packet.flags >> 1 & 3, self.session.received
        require(qos < 3 and (qos or packet.flags < 8), "impossible flags")
        topic, packet_id = packet.text(TOPIC), packet.packet_id() if qos else 0
        require(may_publish(self.session.client_id, topic, self.server.brokers),
                f"it may not publish {topic:.99}")
        if qos < 2 or packet_id not in received:        # else it is sent again
            self.server.publish(topic, packet.data[packet.at:], qos, packet.flags & 1)
        if qos == 2:
            received.add(packet_id)                     # until PUBREL [MQTT-4.3.3-2]
            require(len(received) <= UNACKED, "it releases nothing")
        if qos:                                                     # [MQTT-4.3.2-2]
            self.send(encode(PUBACK if qos == 1 else PUBREC, pack(packet_id)))

    def do_acknowledge(self, packet: Packet) -> None:
        """PUBACK ends QoS 1. PUBREC, then PUBREL, then PUBCOMP, which ends QoS 2."""
        packet_id, kind, pubrel = packet.packet_id(), packet.kind, b""
        if kind == PUBREL:                              # [MQTT-4.3.3-2]
            self.session.received.discard(packet_id)
            return self.send(encode(PUBCOMP, pack(packet_id)))
        if kind == PUBREC:                              # [MQTT-4.3.3-1]
            self.send(pubrel := encode(PUBREL, pack(packet_id), flags=2))
        if sent := self.session.unacked.get(packet_id):     # else we know nothing of it
            expected = (PUBCOMP if sent[0] >> 4 == PUBREL else
                        PUBACK if sent[0] & 2 else PUBREC)
            require(kind == expected, "the wrong acknowledgement")
            self.session.keep(packet_id, pubrel)

    def do_subscribe(self, packet: Packet) -> None:
        packet_id, wanted = packet.packet_id(), []
        while not wanted or packet.at < len(packet.data):       # [MQTT-3.8.3-3]
            wanted.append((packet.text(FILTER), packet.take(1)[0]))
        require(all(qos < 3 for _, qos in wanted), "impossible QoS")    # [MQTT-3-8.3-4]
        filters = self.session.filters
        room = FILTERS >= sum(map(len, filters.union(name for name, _ in wanted)))
        self.send(encode(SUBACK, pack(packet_id),                   # [MQTT-3.8.4-5]
                         bytes(qos if room else 0x80 for _, qos in wanted)))
        for topic_filter, qos in wanted if room else ():
            filters.add(topic_filter)
            self.server.tree.add(topic_filter, self.session, qos)
        self.server.send_retained(self.session, dict(wanted if room else ()))

    def do_unsubscribe(self, packet: Packet) -> None:
        packet_id, filters = packet.packet_id(), set()
        while not filters or packet.at < len(packet.data):      # [MQTT-3.10.3-2]
            filters.add(packet.text(FILTER))
        for topic_filter in filters & self.session.filters:
            self.session.filters.discard(topic_filter)
            self.server.tree.remove(topic_filter, self.session)
        self.send(encode(UNSUBACK, pack(packet_id)))                # [MQTT-3.10.4-5]

    def do_disconnect(self, packet: Packet) -> None:
        self.will = None                                            # [MQTT-3.1.2-10]
        self.close("said goodbye")

    HANDLERS = {    # what clients may send: its flags [MQTT-2.2.2-1], its body's size
        CONNECT: (0, ANY, do_connect), DISCONNECT: (0, 0, do_disconnect),
        PUBLISH: (ANY, ANY, do_publish), PUBACK: (0, 2, do_acknowledge),
        PUBREC: (0, 2, do_acknowledge), PUBREL: (2, 2, do_acknowledge),
        PUBCOMP: (0, 2, do_acknowledge), SUBSCRIBE: (2, ANY, do_subscribe),
        UNSUBSCRIBE: (2, ANY, do_unsubscribe),             # [MQTT-3.12.4-1]
        PINGREQ: (0, 0, lambda self, packet: self.send(encode(PINGRESP)))}

    def send(self, data: bytes) -> None:
        """Collect what goes out; one system call sends it when the loop comes round."""
        if not self.out:
            self.server.loop.call_soon(self.flush)
        self.out.append(data)
        self.waiting += len(data)
        if self.waiting > LIMIT:
            self.flush()

    def flush(self) -> None:
        if self.out and not self.transport.is_closing():
            self.transport.write(b"".join(self.out))
            if (self.transport.get_write_buffer_size() > SLOW
                    or self.session and self.session.is_full()):
                self.server.loop.call_soon(self.close, "is too slow")
                self.transport.abort()      # its will waits until all have this message
        self.out, self.waiting = [], 0

    def close(self, why: str) -> None:
        """However a connection ends, it ends here, once: the session, then the will."""
        self.flush()
        if not self.closed:
            self.closed = True
            if self.transport.get_write_buffer_size():
                self.transport.abort()      # who does not read does not get the rest
            self.transport.close()
            self.server.close_session(self, why)


class MqttServer:
    """Sessions, subscriptions and retained messages; touched by the loop only."""

    def __init__(self, brokers: set[str], tell: Story):
        self.brokers, self.tell = brokers, tell
        self.connections: set[Connection] = set()
        self.sessions: dict[str, Session] = {}
        self.absent: dict[Session, int] = {}    # the longest away first: its filters
        self.tree, self.retained, self.retained_bytes = TopicTree(), {}, 0

    def open_session(self, connection: Connection, client_id: str, clean: bool) -> None:
        if (old := self.sessions.get(client_id)) and old.connection:
            old.connection.close("was taken over")          # [MQTT-3.1.4-2]
        if clean and client_id in self.sessions:
            self.drop(old)                                  # [MQTT-3.1.2-6]
        present = client_id in self.sessions
        session = self.sessions.setdefault(client_id, Session(client_id, clean))
        self.absent.pop(session, None)
        session.connection, connection.session = connection, session
        connection.send(encode(CONNACK, bytes([present, 0])))   # [MQTT-3.2.2-1] to 3
        for packet_id in list(session.unacked):
            session.send(packet_id)
        self.tell(f"<- {client_id:<8} connects{' again' * present}")

    def close_session(self, connection: Connection, why: str) -> None:
        self.connections.discard(connection)
        session = connection.session
        self.tell(f"<- {session.client_id if session else 'somebody':<8} {why}")
        if session:
            session.connection = None
            self.absent[session] = sum(map(len, session.filters))
            session.keep_bounds()
            if session.clean:
                self.drop(session)
            while len(self.absent) > ABSENT or sum(self.absent.values()) > FILTERS:
                self.drop(next(iter(self.absent)))
        if connection.will:
            self.publish(*connection.will)                  # [MQTT-3.1.2-8]

    def drop(self, session: Session) -> None:
        for topic_filter in session.filters:
            self.tree.remove(topic_filter, session)
        del self.absent[session], self.sessions[session.client_id]

    def subscribe_inside(self, topic_filter: str, callback: Callable) -> None:
        """`callback(topic, payload)` for each message: a subscriber without socket."""
        self.tree.add(topic_filter, Inside(callback), 0)

    def send_retained(self, session: Session, wanted: dict[str, int]) -> None:
        """To new subscriptions, with the retain flag on. [MQTT-3.3.1-6], 8"""
        tree, wild = TopicTree(), {"+", "#"} & set("".join(wanted))
        for topic_filter, qos in wanted.items():
            tree.add(topic_filter, topic_filter, qos)
        for topic in self.retained if wild else filter(self.retained.get, wanted):
            for granted in tree.match(topic).values():
                session.deliver(self.retained[topic], granted)

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain=False) -> None:
        """To all subscribers; if `retain`, to later ones too, unless it is empty."""
        message = Message(topic, payload, qos)      # retain is off here [MQTT-3.3.1-9]
        if retain:
            self.forget(topic)                      # replaced or deleted [MQTT-3.3.1-5]
        if retain and payload:
            self.retained[topic] = message._replace(retain=True)
            self.retained_bytes += len(topic) + len(payload) | BLOCK
        if self.retained_bytes > RETAINED_BYTES:
            self.forget(topic)                          # there is no room for it
        for subscriber, granted in self.tree.match(topic).items():
            subscriber.deliver(message, granted)

    def forget(self, topic: str) -> None:
        if old := self.retained.pop(topic, None):
            self.retained_bytes -= len(topic) + len(old.payload) | BLOCK


# ===== 3. The fog node: what is near, free and alive ==================================
# A request's way through this chapter:
#
#     on_request -> answer -> serve -> find_spot -> hold -> "hold" ---> station
#                     |         |          |         ^                     |
#                     |         |          |      on_held <--- "held" -----+
#                     |         |          +-> walk_ring: no spot here, who has one?
#                     |         +-> a reply within 9 s, whatever else hangs
#                     +-> to the same id the same reply
#
# All of it but walk_ring runs in the one loop. Between two awaits nobody else changes
# anything: that is all the locking there is.

def may_connect(client_id: str, user: str, password: bytes) -> bool:
    """With a key set, a client id is proved by its password. Without, come in."""
    return not KEY or user == client_id and hmac.compare_digest(
        password, mqtt_password(client_id).encode())


def may_publish(client_id: str, topic: str, brokers: set[str]) -> bool:
    """Below a broker's name a client speaks as itself, or for its fleet, ID-..."""
    name, kind, who, *_ = topic.split("/", 3) + ["", ""]
    return name not in brokers or kind in ("cars", "stations") and (
        who == client_id or who.startswith(client_id + "-"))


class Inside:
    """A subscriber inside the server: a function in the place of a session."""

    def __init__(self, callback: Callable):
        self.callback = callback

    def deliver(self, message: Message, granted: int) -> None:
        self.callback(message.topic, message.payload)


class Map:
    """The roads of the city. Distances in km."""

    def __init__(self, city: City):
        self.city, self.roads = city, {place: {} for place in city.places}
        self.near: dict[str, list] = {}     # by start: what `stations` found
        for a, b in city.roads:
            self.roads[a][b] = self.roads[b][a] = city.km(a, b)

    def routes(self, start: str) -> dict[str, tuple[float, list[str]]]:
        """Dijkstra: the shortest way from `start` to each place that can be reached,
        the nearest first: {"P3": (7.335, ["A", "C", "P3"]), ...}."""
        found, edge = {}, [(0.0, [start])]
        while edge:
            km, route = heapq.heappop(edge)
            if route[-1] not in found:
                found[route[-1]] = km, route
                for place, length in self.roads[route[-1]].items():
                    if place not in found:
                        heapq.heappush(edge, (km + length, [*route, place]))
        return found

    def stations(self, start: str) -> list[tuple[str, float, list[str]]]:
        """(station, km, route) of each station in reach, the nearest first."""
        if start not in self.near:      # the roads never change: search once
            self.near[start] = [(place, *way) for place, way in
                                self.routes(start).items()
                                if "spots" in self.city.places[place]]
        return self.near[start]


@dataclasses.dataclass
class Station:
    """What one of the broker's own stations last said."""
    state: dict                     # {"station", "spots", "free", "cars"}
    turns: asyncio.Semaphore        # for holds on their way to it
    online: bool = False
    silent_until: float = 0.0       # it left a hold unanswered: offline until then
    spoke: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    def is_online(self) -> bool:
        """It said so, its will did not, and it answers when it is asked."""
        return self.online and time.monotonic() >= self.silent_until

    def may_have_a_spot(self, car: str) -> bool:
        """As far as we know: its own yes may still be a no."""
        state = self.state
        return self.is_online() and (state["free"] > 0 or car in state["cars"])


@dataclasses.dataclass
class Hold:
    """What we asked of a station, and its answer to come; None: it took too long."""
    station: str
    car: str
    answer: asyncio.Future

    def give_up(self) -> None:
        if not self.answer.done():
            self.answer.set_result(None)


@dataclasses.dataclass
class Asked:
    """A car's last request."""
    request_id: str
    task: asyncio.Task
    since: float = dataclasses.field(default_factory=time.monotonic)

    def is_stale(self) -> bool:
        """An offer whose hold has run out promises nothing any more."""
        return self.task.done() and (
            time.monotonic() > self.since + self.task.result().get("hold", math.inf))


class Fog:
    """A broker's table of stations and cars, and the search for a spot.

    Touched by the loop only. `walk_ring` alone runs in other threads, and shares with
    the loop one float, `cloud_silent_until`, that is only ever replaced.
    """

    def __init__(self, name: str, city: City, city_map: Map, tell: Story):
        self.name, self.city, self.map, self.tell = name, city, city_map, tell
        own = city.stations(name)
        self.stations = {station: Station(
            {"station": station, "spots": city.places[station]["spots"], "free": 0,
             "cars": {}}, asyncio.Semaphore(HOLDS_STATION if len(own) > 1 else HOLDS))
            for station in own}
        self.cars: dict[str, dict] = {}     # their states
        self.asked: dict[str, Asked] = {}   # by car, who asked last stands last
        self.holds: dict[str, Hold] = {}    # by id: unanswered, or answered lately
        self.numbers = itertools.count(time.time_ns())  # of holds: new after a restart
        self.turns = asyncio.Semaphore(HOLDS)
        self.requests = {"local": 0, "ring": 0, "refused": 0}
        self.walkers, self.cloud_silent_until = ThreadPoolExecutor(WALKERS), 0.0

    def attach(self, mqtt) -> None:
        """Subscribe to what the fog node hears, at a server of ours or another's."""
        self.mqtt = mqtt
        for topic, act in (("cars/+/request", self.on_request),
                           ("cars/+/state", self.on_car_state),
                           ("cars/+/leave/+", self.on_leave),
                           ("stations/+/held", self.on_held),
                           ("stations/+/state", self.on_state),
                           ("stations/+/online", self.on_online)):
            mqtt.subscribe_inside(f"{self.name}/{topic}",
                                  functools.partial(self.hear, act))

    def hear(self, act: Callable, topic: str, payload: bytes) -> None:
        """Nonsense is told in one line, and never stops us."""
        _, _, name, what, *_ = topic.split("/")
        try:
            act(name, payload)
        except ValueError as fault:
            self.tell(f"<- {name:<8.66} makes no sense ({what:.66}): {fault!s:.99}")

    def send(self, topic: str, message: dict) -> None:
        self.mqtt.publish(f"{self.name}/{topic}", json.dumps(message).encode(), qos=1)

    # --- what cars say

    def on_request(self, car: str, payload: bytes) -> None:
        """A task for each request: one that hangs on the cloud holds nobody up."""
        request = {}
        try:
            request = read_object(payload) | {"car": car}
            check_request(self.city, request)
        except ValueError as fault:
            self.send(f"cars/{car}/reply", bad_request(self.name, request, fault))
            raise
        spawn(self.reply(request))

    async def reply(self, request: dict) -> None:
        reply = await self.answer(request)
        self.send(f"cars/{request['car']}/reply", reply)

    def on_car_state(self, car: str, payload: bytes) -> None:
        """For people to see. The search does not need it: a request says all."""
        if not payload:     # it has gone to another broker
            self.cars.pop(car, None)
            return
        state = read_object(payload)
        at, doing = state.get("at"), state.get("doing")
        need(is_name(car) and state.get("car") == car, "not a car's own state")
        need(isinstance(at, str) and at in self.city.places, "at an unknown place")
        need(is_number(state.get("battery"), 0, 100), "no battery has that")
        need(isinstance(doing, str) and doing in DOING, "does what no car does")
        self.cars.pop(car, None)
        self.cars[car] = {key: state[key] for key in ("car", "at", "battery", "doing")}
        drop_oldest(self.cars)

    def on_leave(self, car: str, payload: bytes) -> None:
        """It has what it asked for, or wants it no more: its next request is new."""
        if car in self.asked and self.asked[car].task.done():
            del self.asked[car]

    # --- what stations say

    def speaker(self, name: str) -> Station:
        """The station that speaks: so it is alive."""
        need(name in self.stations, "not a station of this broker")
        self.stations[name].silent_until = 0.0
        return self.stations[name]

    def on_held(self, name: str, payload: bytes) -> None:
        """A station's yes or no. A yes that nobody waits for would block a spot for a
        minute, so it is undone; one that has come before is the same spot again."""
        self.speaker(name)
        held = read_object(payload)
        need(is_id(held.get("id"), 200), "no id")
        need(held.get("ok") is False or held.get("ok") is True and all(
            is_number(held.get(key), 1e-3, 1e6) for key in ("hold", "lease")),
            "neither a yes with its times nor a no")
        hold = self.holds.get(held["id"])
        if hold and not (hold.answer.done() and hold.answer.result() is None):
            need((hold.station, hold.car) == (name, held.get("car")), "not asked for")
            if not hold.answer.done():      # else the same yes has come twice
                hold.answer.set_result(held)
        elif held["ok"]:
            self.tell(f"-> {name:<8} {short(held['id'])} that yes is too late: undone")
            self.send(f"stations/{name}/release", {"id": held["id"]})

    def on_state(self, name: str, payload: bytes) -> None:
        """Who is at a station. Replaced as a whole, so a lost state costs nothing."""
        station, state = self.speaker(name), read_object(payload)
        spots, free, cars = map(state.get, ("spots", "free", "cars"))
        need(state.get("station") == name, "not a station's own state")
        need(type(spots) is int and 1 <= spots <= 1000, "no number of spots")
        need(type(free) is int and 0 <= free <= spots, "more free spots than spots")
        need(isinstance(cars, dict) and len(cars) <= spots
             and all(use in ("held", "charging") for use in cars.values())
             and all(map(is_name, cars.keys() - station.state["cars"].keys())),
             "more cars than spots, or no cars")
        station.state = {"station": name, "spots": spots, "free": free, "cars": cars}
        station.spoke.set()

    def on_online(self, name: str, payload: bytes) -> None:
        """From the station itself, or, when it has vanished, from its will."""
        station, online = self.speaker(name), read_json(payload)
        need(isinstance(online, bool), "neither true nor false")
        if station.online != online:
            self.tell(f"<- {name:<8} is {'online' if online else 'offline'}")
        station.online = online

    # --- the search

    def answer(self, request: dict) -> asyncio.Task:
        """The reply to come for a car: to the same id, the same reply again."""
        car, request_id = request["car"], request["id"]
        last = self.asked.pop(car, None)
        if not last or last.request_id != request_id or last.is_stale():
            last = Asked(request_id, spawn(self.serve(request, last and last.task)))
        self.asked[car] = last
        drop_oldest(self.asked)
        return last.task

    async def serve(self, request: dict, former: asyncio.Task | None) -> dict:
        """One request, from its arrival to its reply; a car's are served in turn."""
        end = time.monotonic() + REQUEST_WAIT
        car, request_id = request["car"], request["id"]
        self.tell(f"<- {car:<8} {request_id} asks for a spot at {request['at']} "
                  f"(range {request['range']:g} km)")
        if former and not former.done():
            await asyncio.wait([former], timeout=REQUEST_WAIT - STATIONS_WAIT)
        finding = spawn(self.find_spot(request, end))
        await asyncio.wait([finding], timeout=end - time.monotonic())
        if finding.done():
            reply, _ = finding.result()
        else:       # the car is told in time; what is still found is given back
            finding.add_done_callback(self.undo)
            reply = refusal(request_id, "full", [self.name])
        where = "local" if reply.get("broker") == self.name else "ring"
        self.requests[where if reply["station"] else "refused"] += 1
        self.tell(f"-> {car:<8} {request_id} {outcome(reply)}")
        return reply

    def undo(self, finding: asyncio.Task) -> None:
        """A spot of ours found too late is given back; elsewhere the lease ends it."""
        reply, hold_id = finding.result()
        if hold_id:
            self.send(f"stations/{reply['station']}/release", {"id": hold_id})

    async def find_spot(self, request: dict, end: float, ring=True) -> tuple[dict, str]:
        """The nearest free spot: of our own stations; else, if `ring`, round the ring.

        Returns the reply, and the id of the hold if the spot is one of ours.
        """
        near = [found for found in self.map.stations(request["at"])
                if found[1] <= request["range"]]
        if not near:
            return refusal(request["id"], "out of range", [self.name]), ""
        patience = STATIONS_WAIT
        for name, km, route in near:
            if time.monotonic() > end - STATION_WAIT:
                break
            if patience < STATION_WAIT or not (name in self.stations and self.stations[
                    name].may_have_a_spot(request["car"])):
                continue
            hold_id = f"{request['id']}@{self.name}.{next(self.numbers)}"
            held, seconds = await self.hold(name, hold_id, request["car"],
                                            end - STATION_WAIT)
            patience -= seconds
            if held and held["ok"]:
                return {"id": request["id"], "station": name, "broker": self.name,
                        "route": route, "km": round(km, 3), "hold": held["hold"],
                        "lease": held["lease"], "asked": [self.name]}, hold_id
        reply = refusal(request["id"], "full")
        if ring and time.monotonic() < end - STATION_WAIT:
            reply = await asyncio.get_running_loop().run_in_executor(
                self.walkers, self.walk_ring, request, end)
        return reply | {"asked": [self.name, *reply["asked"]]}, ""

    async def hold(self, name: str, hold_id: str, car: str, latest: float
                   ) -> tuple[dict | None, float]:
        """Ask a station to keep a spot: its answer, or None if none came in time.

        Returns with it the seconds it took, without those in line before it.
        """
        station, loop = self.stations[name], asyncio.get_running_loop()
        async with station.turns, self.turns:
            if not station.may_have_a_spot(car) or time.monotonic() > latest:
                return None, 0.0        # things have changed while we stood in line
            began = time.monotonic()
            hold = self.holds[hold_id] = Hold(name, car, loop.create_future())
            timer = loop.call_later(STATION_WAIT, hold.give_up)
            self.send(f"stations/{name}/hold", {"id": hold_id, "car": car})
            held = await hold.answer
            timer.cancel()
        drop_oldest(self.holds)
        if held is None:
            del self.holds[hold_id]         # from now on its yes is too late
            station.silent_until = time.monotonic() + SILENT
            self.tell(f"<- {name:<8} {short(hold_id)} no answer: counts as offline")
        return held, time.monotonic() - began

    def walk_ring(self, request: dict, end: float) -> dict:
        """Ask the cloud, or without it the others in turn. In a thread of its own."""
        request = request | {"broker": self.name}
        enough = end - time.monotonic() > CLOUD_WAIT    # else a late yes would be lost
        if enough and time.monotonic() >= self.cloud_silent_until:
            self.tell(f"-> cloud    {request['id']} no spot here: who has one?")
            reply = call(*self.city.cloud, request | {"op": "search"}, CLOUD_WAIT)
            if reply := read_reply(self.city, reply, request["id"]):
                self.tell(f"<- cloud    {request['id']} {outcome(reply)}")
                return reply
            self.cloud_silent_until = time.monotonic() + SILENT
            self.tell(f"<- cloud    {request['id']} no answer: left out for {SILENT} s")
        return search(self.city, request, self.tell,
                      min(ring.WALK, end - time.monotonic()))

    # --- what the doors ask for

    async def give_back(self, car: str) -> bool:
        """Give the car's held spots back, if any. Waits until the stations agree."""
        self.on_leave(car, b"")
        held = [name for name, station in self.stations.items()
                if station.state["cars"].get(car) == "held"]
        for name in held:
            self.stations[name].spoke.clear()
            self.send(f"stations/{name}/release", {"car": car})
        for name in held:
            agreed = spawn(self.stations[name].spoke.wait())
            await asyncio.wait([agreed], timeout=STATION_WAIT)
            agreed.cancel()
        return bool(held)

    async def status(self) -> dict:
        """All that this broker knows, for the doors: the shape is in the README."""
        return {"broker": self.name, "cars": dict(self.cars),
                "stations": {name: station.state | {"online": station.is_online()}
                             for name, station in self.stations.items()},
                "requests": dict(self.requests), "events": list(self.tell.events)}


def bad_request(broker: str, request: dict, fault: ValueError) -> dict:
    request_id = request.get("id") if is_id(request.get("id")) else None
    return refusal(request_id, f"bad request: {fault}", [broker])


def short(hold_id: str) -> str:
    """The car's own id in that of a hold: it stands in every line about the car."""
    return hold_id.split("@")[0]


def drop_oldest(table: dict) -> None:
    """A table that the network fills must not grow for ever."""
    if len(table) > REMEMBERED:
        del table[next(iter(table))]


# ===== 4. The doors: TCP for the cloud, HTTP for people ===============================
# A thread a connection, because a thread may wait: for a slow guest, or for the cloud.
# No thread touches the fog's tables. It hands a coroutine to the loop and waits for
# what comes back, so the tables need no lock here either.

class Doors:
    """What both doors do in their threads: check what is asked, and ask the fog.

    They hand each question over to the loop, which owns the answer, and wait.
    """

    def __init__(self, fog: Fog, loop: asyncio.AbstractEventLoop):
        self.fog, self.loop = fog, loop

    def in_loop(self, coroutine):
        """Its result, computed where all of the fog's state lives."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def answer_line(self, line: bytes, is_gone: Callable) -> dict:
        """The answer to a line of TCP."""
        request = {}
        try:
            request = read_request(line)
            if request.get("op") == "status":
                return self.in_loop(self.fog.status())
            need(request.get("op") == "reserve", 'wanted: "op": "reserve" or "status"')
            check_request(self.fog.city, request)
        except ValueError as fault:
            self.fog.tell(f"<- tcp      a question that makes no sense: {fault!s:.99}")
            reply = {}
            if request.get("op") == "reserve" and is_key(request.get("key")):
                reply = bad_request(self.fog.name, request, fault)
            return reply | {"error": str(fault)}
        return self.in_loop(self.reserve(request, is_gone))

    async def reserve(self, request: dict, is_gone: Callable) -> dict:
        """A spot of ours for another broker's car, if somebody still waits for it."""
        fog, end = self.fog, time.monotonic() + STATIONS_WAIT
        fog.tell(f"<- ring     {request['id']} asks for a spot for {request['car']}")
        reply, hold_id = await fog.find_spot(request, end, ring=False)
        if hold_id and is_gone():
            fog.tell(f"-> {reply['station']:<8} {request['id']} nobody waits: undone")
            fog.send(f"stations/{reply['station']}/release", {"id": hold_id})
            reply = refusal(request["id"], "full", [fog.name])
        fog.tell(f"-> ring     {request['id']} {outcome(reply)}")
        return reply

    def routes(self, path: str) -> dict[str, Callable]:
        """Who answers which method on this path; {}: there is no such thing."""
        match [urllib.parse.unquote(part, errors="surrogateescape")
               for part in path.partition("?")[0].split("/")[1:]]:
            case [""]:
                return {"GET": lambda body: (200, PAGE)}
            case ["status"]:
                return {"GET": lambda body: (200, self.in_loop(self.fog.status()))}
            case ["city"]:
                return {"GET": self.get_city}
            case ["stations" | "cars" as kind, *name] if len(name) < 2:
                return {"GET": functools.partial(self.get_states, kind, name)}
            case ["cars", name, "request"]:
                return {"POST": functools.partial(self.post_request, name),
                        "DELETE": functools.partial(self.delete_request, name)}
        return {}

    def get_city(self, body: bytes) -> tuple[int, dict]:
        """What the cloud says of all brokers; without it, what we know: ourselves."""
        city = self.fog.city
        found = call(*city.cloud, {"op": "city"}, CLOUD_WAIT)
        brokers = (found or {}).get("brokers")
        alive = isinstance(brokers, dict) and all(
            status is None or isinstance(status, dict) and status.get("broker") == name
            for name, status in brokers.items())
        if not alive:
            brokers = {self.fog.name: self.in_loop(self.fog.status())}
        return 200, {"cloud": alive, "brokers": brokers,
                     "map": {"places": city.places, "roads": city.roads}}

    def get_states(self, kind: str, name: list[str], body: bytes) -> tuple[int, dict]:
        states = self.in_loop(self.fog.status())[kind]
        if name and name[0] not in states:
            return 404, {"error": f"no {kind[:-1]} of that name here"}
        return 200, states[name[0]] if name else states

    def post_request(self, car: str, body: bytes) -> tuple[int, dict]:
        """The same search as over MQTT, for whoever speaks HTTP only."""
        try:
            request = {"id": f"http-{secrets.token_hex(8)}"} | read_object(body)
            request["car"] = car
            check_request(self.fog.city, request)
        except ValueError as fault:
            return 400, {"error": str(fault)}
        reply = self.in_loop(self.wait_for_answer(request))
        if reply["station"]:
            return 200, reply
        status = 503 if reply["reason"] == "full" else 409
        return status, reply | {"error": reply["reason"]}

    async def wait_for_answer(self, request: dict) -> dict:
        return await self.fog.answer(request)

    def delete_request(self, car: str, body: bytes) -> tuple[int, dict | None]:
        """What a car's `leave` is over MQTT, but for a spot that is only held."""
        if self.in_loop(self.fog.give_back(car)):
            return 204, None
        return 404, {"error": "this car holds no spot here"}


class Http(http.server.BaseHTTPRequestHandler):
    """One HTTP conversation: requests come in, JSON (or the page) goes out."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Patience(self.connection))

    def handle_one_request(self):
        self.rfile.raw.end = time.monotonic() + HTTP_WAIT
        super().handle_one_request()

    def parse_request(self):
        try:
            return super().parse_request()
        except (ValueError, TypeError, LookupError):    # its parser lets some out
            return self.send_error(400, "headers that make no sense")

    def do(self):
        """Any method: first who asks, then for what, then how, then with which body."""
        methods = self.server.answer(self.path)
        said = self.headers.get("Authorization", "").encode("latin-1", "replace")
        scheme, _, key = said.decode(errors="replace").partition(" ")
        if self.path != "/" and not is_key(key if scheme == "Bearer" else None):
            self.refuse(401, "key", WWW_Authenticate="Bearer")
        elif not methods:
            self.refuse(404, "there is no such thing")
        elif self.command not in methods:
            self.refuse(405, "not with this method", Allow=", ".join(methods))
        elif self.command == "POST" and (fault := self.body_fault()):
            self.refuse(*fault)
        else:
            has_body = self.command == "POST"
            if not has_body and self.headers["Content-Length"]:
                self.close_connection = True    # a body we do not read is no request
            length = int(self.headers["Content-Length"]) if has_body else 0
            self.reply(*methods[self.command](self.rfile.read(length)))

    def __getattr__(self, name: str):
        """do_GET, do_POST, and those of methods that nobody has heard of: a 405."""
        if not name.startswith("do_"):
            raise AttributeError(name)
        return self.do

    def body_fault(self) -> tuple[int, str] | None:
        """What is wrong with the body that the headers announce."""
        length = self.headers["Content-Length"]
        if self.headers.get_content_type() != "application/json":
            return 415, "the body must be application/json"
        if length is None or self.headers["Transfer-Encoding"]:
            return 411, "Content-Length is missing"
        if not (length.isascii() and length.isdecimal()):
            return 400, "Content-Length must be a number"
        if len(length) > 9 or int(length) > LIMIT:
            return 413, f"the body must be at most {LIMIT} bytes"
        return None

    def reply(self, status: int, answer, **headers) -> None:
        """The page, or JSON. Headers are written with _ for -."""
        is_page = answer is PAGE
        body = PAGE.encode() if is_page else to_json(answer)
        kind = "text/html; charset=utf-8" if is_page else "application/json"
        headers |= {"Content_Type": kind, "Content_Length": len(body),
                    "Cache_Control": "no-store"}
        if status == 204:
            headers, body = {}, b""
        if is_page:
            headers["Content_Security_Policy"] = PAGE_POLICY
        if status == 503:
            headers["Retry_After"] = RETRY
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refuse(self, status: int, why: str, **headers) -> None:
        """Says no, and reads no further: what follows may be an unread body."""
        self.reply(status, {"error": why}, Connection="close", **headers)
        self.connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # let it finish, or it may miss our answer
            self.rfile.read(16 * LIMIT)

    def send_error(self, code, message=None, explain=None):
        """What http.server itself finds wrong, in the same form."""
        self.close_connection = True
        self.reply(code, {"error": message or http.HTTPStatus(code).phrase},
                   Connection="close")

    def log_message(self, format, *args):
        """The fog tells its story; a line for each look of a page would drown it."""


PAGE = r"""<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<title>Smart-charging city</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; --own: gray; } .lost main { opacity: .4; }
.b0 { --own: royalblue; } .b1 { --own: darkorange; } .b2 { --own: lightseagreen; }
.b3 { --own: mediumorchid; } .b4 { --own: yellowgreen; } .b5 { --own: hotpink; }
html { font: max(15px, 1.35vw)/1.35 system-ui, sans-serif; } h1, p { margin: .3em 0; }
#news { border-left: .5em solid seagreen; padding-left: .5em; font-weight: bold; }
.bad #news { border-color: crimson; } #story { font: .8em/1.5 monospace; margin: 1em; }
@media (min-width: 900px) { main { display: grid; grid: auto / 8fr 5fr; gap: 1em; } }
section { height: 40vh; overflow: auto; white-space: pre-wrap; word-break: break-word; }
table { border-spacing: 0 .2em; } th, td { padding: 0 .6em; text-align: left; }
td:first-child { border-left: .5em solid var(--own); min-width: 6em; }
#map { width: 100%; height: min(68vh, 92vw); } svg svg { overflow: visible; }
text { font-size: .8em; text-anchor: middle; dominant-baseline: central;
  fill: CanvasText; stroke: Canvas; stroke-width: .2em; paint-order: stroke; }
.name { text-anchor: start; translate: 1em; } g { transform-box: view-box; }
line, circle { stroke: var(--own); stroke-width: .25em; r: .6em; fill: Canvas; }
.land { r: 3.4em; fill: var(--own); stroke: none; opacity: .25; } .dead { opacity: .6; }
.ring { fill: none; rotate: -90deg; stroke: seagreen; } .low { stroke: crimson; }
rect { y: -1.9em; height: 1.1em; fill: Canvas; stroke: CanvasText; }
.held { y: -1.3em; height: .5em; fill: gray; } .charging { fill: seagreen; }
</style><h1>Smart-charging city</h1><p id="news" role="status">Asking ...</p><main><div>
<svg id="map" role="img" aria-label="Map: see the table"><g id="town"/><g id="fleet"/>
</svg><p>Spots: □ free, ▄ held, ■ charging. Cars, ringed by their battery: › driving,
? asking, … waiting, » going to a spot, + charging, × offline</div><div><section
tabindex="0"><table><thead><tr><th>Part<th>State<th>local / ring / refused<tbody
id="facts"></table></section><section id="story" tabindex="0" aria-label="Last events">
</section></div></main><script>"use strict";  // braces close at the end of a line
const {news, town, fleet, facts, story} = window;  // the elements with these ids
const SIGNS = {driving: "›", asking: "?", waiting: "…", going: "»", charging: "+"};
const short = name => name.replace(/^(.{11})..+$/su, "$1…"), drawn = new Map();
let at, lanes, rows;  // place -> [x, y]; roads, both ways: [from, to, km]; of the table
function make(tag, attributes, ...children) {  // what comes from outside stays text
  const space = /^t[rd]$/.test(tag) ? "1999/xhtml" : "2000/svg";
  const node = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children); return node; }
function layOut(places, roads) {  // the map fills its frame, however large or small
  const [x, y] = [40, -36].map((percent, i) => {  // halves: 1e308 - -1e308 is infinite
    const all = Object.values(places).map(place => place.at[i] / 2);
    const low = Math.min(...all), high = Math.max(...all), span = high - low || 1;
    return name => `${50 + percent * (places[name].at[i] - low - high) / span}%`; });
  at = new Map(Object.keys(places).map(name => [name, [x(name), y(name)]]));
  lanes = roads.flatMap(([a, b]) => [[a, b], [b, a]]).map(([a, b]) => [a, b,
    Math.hypot(...[0, 1].map(i => places[a].at[i] - places[b].at[i]))]); }
function way(from, to) {  // the shortest, by Bellman and Ford: a road more each round
  const best = new Map([[from, [0]]]);
  for (let i = 0; i < 8 && from !== to; i++) for (const [a, b, km] of lanes) {
    const [sum, ...way] = best.get(a) ?? [Infinity], [old] = best.get(b) ?? [Infinity];
    if (sum + km < old) best.set(b, [sum + km, ...way, b]); }
  return (best.get(to) ?? []).slice(1, -1).map(place => at.get(place).join(" ")); }
const road = (a, b, look, [x1, y1] = at.get(a), [x2, y2] = at.get(b)) =>
  make("line", {x1, y1, x2, y2, class: look(a) === look(b) ? look(a) : ""});
function site(name, {spots = 0, broker}, state, color) {  // over 12 spots: 12 cells
  const busy = Object.values(state?.cars ?? {}).sort(), cells = Math.min(spots, 12);
  const look = spots && !state?.online ? "dead" : color(broker), [x, y] = at.get(name);
  const words = !spots ? short(broker) : !state ? "unknown" : !state.online ?
    "no answer" : `${state.free}/${spots} free`, wide = Math.min(1.1, 6 / cells);
  if (spots) rows.push([look, name, words]);
  return make("svg", {x, y, class: look}, make("circle", {class: "land"}),
    make("text", {y: spots ? "-3em" : "-1.2em"}, `${short(name)} ${words}`),
    ...Array.from({length: cells}, (_, i) => make("rect", {width: `${wide}em`,
      x: `${(i - cells / 2) * wide}em`, class: busy[i * spots / cells | 0] ?? ""}))); }
function move(name, {at: place, battery, doing}, size, here) {  // a crowd has no names
  const was = drawn.get(name) ?? {node: make("g"), place, here}, {node} = was;
  const ring = {class: battery < 25 ? "ring low" : "ring", pathLength: 100};
  node.replaceChildren(make("circle"), make("text", {}, SIGNS[doing] ?? "×"),
    make("circle", {...ring, "stroke-dasharray": `${battery} 100`}),
    make("text", {class: "name"}, size < 1 ? "" : short(name)));
  Object.assign(node.style, {translate: here, fontSize: `${size}em`});
  if (was.here !== here && !matchMedia("(prefers-reduced-motion)").matches)
    node.animate({translate: [was.here, ...way(was.place, place), here]}, 1000);
  rows.push(["", name, `${doing} at ${place}, ${Math.round(battery)} %`]);
  drawn.set(name, {node, place, here}); return node; }
function show({cloud, map: {places, roads}, brokers}) {  // -> the page's class, news
  const up = Object.values(brokers).filter(Boolean), own = name => places[name].broker;
  const all = [...new Set([...Object.keys(places).map(own), ...Object.keys(brokers)])];
  const status = name => up.find(status => status.broker === name);
  const look = name => status(name) ? `b${all.indexOf(name) % 6}` : "dead";
  const [stations, cars] = ["stations", "cars"].map(kind => new Map(
    up.flatMap(status => Object.entries(status[kind])).sort(([, a], [, b]) =>
      (b.doing === "offline") - (a.doing === "offline"))));  // seen twice: it is alive
  rows = [[cloud ? "" : "dead", "the cloud", cloud ? "answers" : "no answer"],
    ...all.map(name => [look(name), name, status(name) ? "answers" : cloud ? "no answer"
      : "unknown", Object.values(status(name)?.requests ?? {}).join(" / ")])];
  layOut(places, roads); town.style.fontSize = `${Math.min(1, 7 / at.size ** .5)}em`;
  town.replaceChildren(...roads.map(([a, b]) => road(a, b, name => look(own(name)))),
    ...[...at.keys()].map(name => site(name, places[name], stations.get(name), look)));
  const size = Math.min(1, Math.cbrt(40 / cars.size)), gap = size < 1 ? 1.5 : 4;
  fleet.replaceChildren(...[...at].flatMap(([place, [x, y]]) => [...cars].filter(
    ([, car]) => car.at === place).map(([name, car], k) => move(name, car, size,
      `calc(${x} + ${(k / 12 | 0) * gap}em) calc(${y} + ${k % 12 * 1.4}em)`))));
  facts.replaceChildren(...rows.map(([look, ...texts]) =>
    make("tr", {class: look}, ...texts.map(text => make("td", {}, text)))));
  story.textContent = up.flatMap(status => status.events).reverse().sort((a, b) =>
    (b.slice(0, 2) - a.slice(0, 2) + 36) % 24 - 12 ||  // hours go round: 00 after 23
    b.slice(2, 8).localeCompare(a.slice(2, 8))).join("\n");
  const lost = rows.filter(row => row[2] === "no answer").map(row => row[1]).join(", ");
  return lost ? ["bad", `No answer from ${lost}`] : ["", "All parts answer"]; }
(async function tick() {
  const key = unescape(location.hash.split("#key=")[1] ?? "");  // as bytes of UTF-8
  const [mood, text] = await fetch("/city", {signal: AbortSignal.timeout(9500),
    headers: key ? {Authorization: `Bearer ${key}`} : {}})
    .then(answer => answer.status !== 401 ? answer.json().then(show)
      : ["bad lost", "A key is needed: write #key=KEY behind this page's address"])
    .catch(why => ["bad lost", `No answer from ${location.host}, retrying: ${why}`]);
  if (news.textContent !== text) news.textContent = text;
  document.body.className = mood; setTimeout(tick, 1000); })();</script>"""


def page_policy(page: str) -> str:
    """Only the page's own script and style may run, and it may talk to us alone."""
    def own(tag):
        text = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0].encode()
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
    return (f"default-src 'none'; script-src {own('script')}; style-src {own('style')};"
            " connect-src 'self'; base-uri 'none'; form-action 'none';"
            " frame-ancestors 'none'")


PAGE_POLICY = page_policy(PAGE)


# ===== 5. Starting and stopping =======================================================
# Who is connected how: stations and cars by a `Link`, whose paho client lives in their
# own thread; the fog node by nothing at all, as it is inside the server (chapter 2);
# or, with --external-mqtt, by an `ExternalServer`, whose paho client has a thread.

def mqtt_client(client_id: str) -> paho.Client:
    """A paho client as this city uses it: MQTT 3.1.1, and Nagle's algorithm off."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id)
    client.on_socket_open = lambda client, data, sock: sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or messages wait 40 ms for an ACK
    client.connect_timeout = 3
    client.max_inflight_messages_set(UNACKED)       # paho's 20 would make a rush queue
    if KEY:
        client.username_pw_set(client_id, mqtt_password(client_id))
    return client


def encode_json(value) -> bytes:
    """A payload; None is an empty one, which takes a retained message away."""
    return b"" if value is None else json.dumps(value).encode()


class Link:
    """A station's or car's connection: a paho client that lives in its owner's thread.

    Each connection has a client of its own, so that nothing unsent of the last one
    comes back later. Once it is lost, whatever is at work raises ConnectionError.
    """

    def __init__(self, broker: ring.Broker, name: str, will_topic: str, will):
        self.inbox, self.client = collections.deque(), mqtt_client(name)
        self.client.will_set(will_topic, encode_json(will), qos=1, retain=True)
        self.client.on_message = lambda client, data, news: self.inbox.append(
            Message(news.topic, news.payload, news.qos, news.retain))
        try:
            _, (host, *_) = resolve(broker.host, broker.mqtt)
            self.client.connect(host, broker.mqtt, keepalive=5)
        except OSError as fault:
            raise ConnectionError(f"does not answer ({fault})") from None
        end = time.monotonic() + 3
        while not self.client.is_connected():
            self.turn(0.1)
            if time.monotonic() > end:
                raise ConnectionError("does not answer")

    def turn(self, seconds: float) -> None:
        """Let paho send and receive for a moment; what came in is in the inbox."""
        try:
            self.check(self.client.loop(seconds))
        except (ValueError, LookupError, TypeError, struct.error) as fault:
            raise ConnectionError(f"does not speak MQTT ({fault})") from None

    def check(self, code: int) -> None:
        """paho returns its errors; a life that reads from top to bottom wants them
        raised, at whatever step the connection has ended."""
        if code == paho.MQTT_ERR_CONN_REFUSED:
            raise ConnectionError("refuses us: is EV_KEY the same on both sides?")
        if code != paho.MQTT_ERR_SUCCESS:
            raise ConnectionError("has hung up")

    def subscribe(self, *topics: str) -> None:
        self.check(self.client.subscribe([(topic, 1) for topic in topics])[0])

    def publish(self, topic: str, value, qos: int = 1, retain: bool = False) -> None:
        self.last = self.client.publish(topic, encode_json(value), qos, retain)
        self.check(self.last.rc)

    def close(self) -> None:
        """Say goodbye, when what was published before has arrived."""
        end = time.monotonic() + 0.5
        while not self.last.is_published() and time.monotonic() < end:
            self.turn(0.05)
        self.client.disconnect()


class ExternalServer:
    """Somebody else's MQTT server (Mosquitto, EMQX, ...), seen through paho.

    The same two methods as MqttServer has, so the fog node notices no difference:
    paho's thread hands what it hears over to the loop, and may be told to publish.
    """

    def __init__(self, broker: ring.Broker, tell: Story):
        self.callbacks, self.loop, self.tell = {}, asyncio.get_running_loop(), tell
        self.client = mqtt_client(broker.name)
        self.client.on_connect = self.on_connect
        self.client.on_disconnect = lambda *_: tell("<- mqtt     connection lost")
        self.client.on_connect_fail = lambda *_: tell("-> mqtt     does not answer yet")
        self.client.reconnect_delay_set(0.5, 2)
        self.client.connect_async(broker.host, broker.mqtt, keepalive=5)

    def subscribe_inside(self, topic_filter: str, callback: Callable) -> None:
        self.callbacks[topic_filter] = callback
        self.client.message_callback_add(topic_filter, lambda client, data, message:
            self.loop.call_soon_threadsafe(callback, message.topic, message.payload))

    def on_connect(self, client, data, flags, code, properties) -> None:
        """Every time: a server that was started again knows no subscriptions."""
        self.tell(f"<- mqtt     somebody else's server says: {code}")
        if code.is_failure:
            return
        client.subscribe([(topic_filter, 1) for topic_filter in self.callbacks])

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain=False) -> None:
        self.client.publish(topic, payload, qos, retain)


def spawn(coroutine) -> asyncio.Task:
    """A task whose fault is not forgotten."""
    task = asyncio.get_running_loop().create_task(coroutine)
    TASKS.add(task)     # the loop itself keeps only a weak reference
    task.add_done_callback(end_task)
    return task


def end_task(task: asyncio.Task) -> None:
    TASKS.discard(task)
    if not task.cancelled() and task.exception():
        crash(task.exception())


TASKS: set[asyncio.Task] = set()    # touched by the loop only


def on_loop_fault(loop, context: dict) -> None:
    """A fault in a callback of the loop is ours; a socket that fails is not."""
    fault = context.get("exception")
    if not isinstance(fault, OSError):
        crash(fault or RuntimeError(context["message"]))
    logging.info("%s: %s", context["message"], fault)


async def listen(server: MqttServer, broker: ring.Broker) -> None:
    server.loop = asyncio.get_running_loop()
    with listening(broker.host, broker.mqtt, server.tell) as (family, address):
        await server.loop.create_server(lambda: Connection(server), *address,
                                        family=family, backlog=BACKLOG)
    spawn(watch(server))


async def watch(server: MqttServer) -> None:
    """Cut off whoever has not sent a whole packet in its time. [MQTT-3.1.2-24]"""
    while True:
        await asyncio.sleep(0.5)
        now = time.monotonic()
        for connection in [c for c in server.connections if c.deadline < now]:
            connection.close("was silent for too long")


async def serve(names: list[str], city: City, external: bool) -> None:
    """These brokers, all in this one loop, until somebody ends it."""
    loop, city_map = asyncio.get_running_loop(), Map(city)
    loop.set_exception_handler(on_loop_fault)
    for broker in [city.ring.find(name) for name in names]:
        tell = Story(broker.name)
        fog = Fog(broker.name, city, city_map, tell)
        doors = Doors(fog, loop)
        tcp = Door(broker.host, broker.tcp, Lines, doors.answer_line, tell)
        web = Door(broker.host, broker.http, Http, doors.routes, tell)
        server = (ExternalServer(broker, tell) if external else
                  MqttServer({other.name for other in city.ring}, tell))
        fog.attach(server)
        if external:
            server.client.loop_start()      # paho's thread: reads and writes its socket
        else:
            await listen(server, broker)
        for door in tcp, web:               # a thread each: waits for guests
            threading.Thread(target=door.serve_forever, daemon=True).start()
        tell(f"serves {', '.join(fog.stations) or 'no station'}: MQTT on {broker.mqtt},"
             f" TCP on {broker.tcp}, http://{broker.host}:{broker.http}/")
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Brokers: the fog of the city.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="brokers (all)")
    parser.add_argument("--external-mqtt", action="store_true",
                        help="use the MQTT server that listens there already")
    args, city = start_up(parser)
    known = [broker.name for broker in city.ring]
    for name in args.names:
        if name not in known:
            give_up(f"{args.config}: there is no broker {name!a}")
    names = list(dict.fromkeys(args.names)) or known
    with until_stopped():   # asyncio.run would cancel what the doors' threads wait for
        asyncio.new_event_loop().run_until_complete(
            serve(names, city, args.external_mqtt))


if __name__ == "__main__":
    main()
