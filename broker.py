"""The fog: a broker near its cars and stations. It serves MQTT, and finds free spots.

                     cloud, other brokers                  people
                            | TCP                            | HTTP
        +-------------------v--------------------------------v------------+
        |  4 the doors      one thread per connection; 5 the page          |
        |     |  ^                                                         |
        |  3 the fog node   which stations are near, free, alive? One      |
        |     |  ^          coroutine per request finds a spot             |
        |     v  |                                                         |
        |  2 MQTT server    sessions and the topic tree, in the same loop  |
        |  1 MQTT packets   bytes <-> fields                               |
        +-------------^-------------------^-------------------------------+
                      | MQTT              | MQTT
                   stations             cars

The fog node owns nothing that lasts. It knows what its stations said last, and promises
only what one of them has just confirmed. One asyncio loop alone touches all state of
chapters 2 and 3, so it needs no lock. What would block (the cloud, the other brokers)
waits in threads of its own, which only hand back an answer.

    python3 broker.py [NAME ...]       these brokers in one process; no name: all
    python3 broker.py --external-mqtt  with Mosquitto in place of chapters 1 and 2

Read next: test_system.py. Left out on purpose: MQTT 5, TLS, and anything kept on disk.
"""

import argparse
import asyncio
import base64
import collections
import functools
import hmac
import html
import http.server
import io
import ipaddress
import logging
import re
import secrets
import socket
import struct
import threading
import urllib.parse
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from paho.mqtt.matcher import MQTTMatcher

from cloud_server import (BACKLOG, KEY, LIMIT, TEXT, Breaker, Door, Lines, Node, Story,
                          choose_names, crash, has_room, is_key, listening,
                          mqtt_password, outcome, read_reply, read_request, refusal,
                          start_up, until_stopped)
from ring import (COUNTER, ID, NAME, PERCENT, Invalid, fit, need, one_of, read_json,
                  read_object, to_json)
from station import ANSWER, BOOLEAN, STATE, mqtt_client

CONNECT_WAIT = 10           # s in which a new connection must have sent its CONNECT
SLICE = 0.02                # s for one client's packets before it is the others' turn
ACCEPTS = 8                 # new connections at a time, before `has_room` looks at them
PAUSE = 0.001               # s that a publisher waits for each KiB to one who is behind
MOMENT = 1e-6               # s of pause after a request, so that others get a turn
BUDGET = 1024 * 1024        # bytes not yet sent to one client; bytes of all else for it
OVERHEAD = 128              # bytes counted for each thing kept, on top of its size
LEVELS = 128                # of a topic or topic filter
ABSENT = 1_000              # sessions of absent clients
RETAINED_BYTES = 64 * 1024 * 1024   # of all retained messages together


# ===== 1. MQTT packets: bytes <-> fields ==============================================
#     byte 0             bytes 1 to 4            the body
#     +------+-------+   +------------------+   +----------------------+---------+
#     | type | flags |   | remaining length |   | fields of that type  | payload |
#     +------+-------+   +------------------+   +----------------------+---------+
#      4 bits  4 bits     7 bits a byte; its highest bit: one more byte follows

# Byte 0 of each type of packet: all but PUBLISH have fixed flags. [MQTT-2.2.2-1]
(CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE, SUBACK,
 UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT) = bytes.fromhex(
     "10 20 30 40 50 62 70 82 90 A2 B0 C0 D0 E0")

# The flags of PUBLISH: it is sent again; the quality of service; keep it for later
DUP = 0b1000
QOS = 0b0110
RETAIN = 0b0001
# Byte 0 with them: there is no DUP with QoS 0, and no QoS 3. [MQTT-3.3.1-2], 4
PUBLISHES = bytes.fromhex("30 31 32 33 34 35 3A 3B 3C 3D")

# By what they are acknowledged: a PUBLISH of QoS 1, one of QoS 2, a PUBREL
ACKNOWLEDGED_BY = {0x32: (PUBACK,), 0x34: (PUBREC,), PUBREL: (PUBREC, PUBCOMP)}

TOPIC = re.compile("[^+#]+", re.DOTALL)     # [MQTT-4.7.3-1], [MQTT-3.3.2-2]
FILTER = re.compile(r"""
    (?=.)                       # it is not empty [MQTT-4.7.3-1]
    ( ([^+#/]* | \+) / )*       # each level is a text, or + alone [MQTT-4.7.1-3]
    ( [^+#/]* | \+ | \# )       # the last one may be # alone [MQTT-4.7.1-2]
    """, re.VERBOSE | re.DOTALL)


# An application message, on its way from a publisher to a subscriber
class Message(NamedTuple):
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


def take_packet(buffer: bytearray):
    """Cut the first Packet off; None if it is not all there yet. TCP carries bytes, not
    packets: what comes at once may be a part of one, or many."""
    length = 0
    for place, byte in enumerate(buffer[1:5]):
        length += byte % 128 * 128 ** place
        if byte < 128:
            end = 2 + place + length
            need(end <= LIMIT, "the packet is too long")
            if end > len(buffer):
                return None
            packet = Packet(buffer[end - length:end])
            packet.first = buffer[0]
            del buffer[:end]
            return packet
    need(len(buffer) < 5, "a length of more than four bytes")
    return None


class Packet(io.BytesIO):
    """A packet that came in: `first` is its byte 0, its body is read field by field."""
    def take(self, count):
        field = self.read(count)
        need(len(field) == count, "a packet that ends in a field")
        return field

    def number(self, size=2):
        return int.from_bytes(self.take(size), "big")

    def packet_id(self):
        packet_id = self.number()
        need(packet_id, "packet identifier 0")                      # [MQTT-2.3.1-1]
        return packet_id

    def data(self):
        return self.take(self.number())

    def text(self):
        try:
            text = self.data().decode()
        except UnicodeDecodeError:
            raise Invalid("not UTF-8") from None                    # [MQTT-1.5.3-1]
        need("\0" not in text, "a text with U+0000")                # [MQTT-1.5.3-2]
        return text

    def topic(self):
        topic = self.text()
        need(TOPIC.fullmatch(topic), "not a topic")
        need(topic.count("/") < LEVELS, "a topic of too many levels")
        return topic

    def topic_filters(self):
        """Up to its end, at least one. [MQTT-3.8.3-3], [MQTT-3.10.3-2]"""
        while True:
            topic_filter = self.text()
            need(FILTER.fullmatch(topic_filter), "not a topic filter")
            yield topic_filter      # before we go on, our caller reads its QoS
            if self.tell() == len(self.getbuffer()):
                return

    def must_end(self):
        need(not self.read(), "bytes left over")


# CONNECT: protocol name | level | flags | keepalive | id | will | user | password
#
#     bit    7      6          5            4 3         2      1       0
#          | user | password | will retain | will QoS | will | clean | reserved |

class ConnectFlags(NamedTuple):
    """Each bit: 1 or 0. Which fields follow, and what kind of will and session."""
    user: int
    password: int
    will_retain: int
    will_qos_2: int
    will_qos_1: int
    will: int
    clean: int
    reserved: int

    def check(self):
        need(self.user or not self.password, "no user")         # [MQTT-3.1.2-22]
        of_will = self.will_retain + self.will_qos_2 + self.will_qos_1
        need(self.will or of_will == 0, "no will")              # [MQTT-3.1.2-11] to 15
        need(self.will_qos_2 + self.will_qos_1 < 2, "QoS 3")    # [MQTT-3.1.2-14]
        need(self.reserved == 0, "a reserved flag")             # [MQTT-3.1.2-3]


def encode(first: int, *fields: bytes) -> bytes:
    body = b"".join(fields)
    length = len(body)
    digits = []
    while length > 127:
        length, digit = divmod(length, 128)
        digits.append(digit + 128)
    return bytes([first, *digits, length]) + body


pack = struct.Struct(">H").pack     # a number of two bytes


@functools.lru_cache(8)     # so it is encoded once for all its subscribers of QoS 0
def encode_publish(message: Message, qos: int, packet_id: int) -> bytes:
    topic = message.topic.encode()
    number = pack(packet_id) if qos else b""
    return encode(PUBLISH + 2 * qos + message.retain,
                  pack(len(topic)), topic, number, message.payload)


# ===== 2. The MQTT server: topic tree, sessions, connections ==========================
# A client meets the server in three steps: its socket is a Connection; a CONNECT packet
# gives it a Session; a SUBSCRIBE puts that session into the topic tree. To publish is
# to walk down the tree, and to let each session found there deliver the message. One
# asyncio loop calls everything in this chapter, so no state in it needs a lock.
#
#     do_publish -> publish -> match -> deliver -> send -> flush      to the subscribers
#                      |                   +-> keep      until it is acknowledged
#                      +-> retain                        for later subscribers

def may_connect(client_id: str, user: str, password: bytes) -> bool:
    if KEY == "":
        return True         # no key is set: every door is open
    if user != client_id:
        return False
    return hmac.compare_digest(password, mqtt_password(client_id).encode())


def may_publish(client_id: str, topic: str, brokers: set[str]) -> bool:
    match topic.split("/", 3):
        case [broker, *_] if broker not in brokers:
            return True     # below no broker's name: anybody's
        case [_, "cars" | "stations", owner, *_]:
            return owner == client_id
    return False            # the fog node's


class TopicTree(MQTTMatcher):
    """Who subscribes to what. Paho's matcher is a tree (a trie) of the filters' levels:

        server1 -- cars -- + -- request       {fog: 0}
                     |     +--- claim -- P1   {P1: 1}
                     +-- car1 -- reply        {car1: 1}

    So a topic costs its depth to match, however many subscriptions there are."""
    def add(self, topic_filter, subscriber, qos):
        """A second time replaces the QoS. [MQTT-3.8.4-3]"""
        try:
            self[topic_filter][subscriber] = qos
        except KeyError:
            self[topic_filter] = {subscriber: qos}

    def remove(self, topic_filter, subscriber):
        del self[topic_filter][subscriber]
        if not self[topic_filter]:
            del self[topic_filter]          # leave no empty branches

    def match(self, topic):
        """Each subscriber once, with the highest QoS of its filters that match."""
        found = {}
        for subscribers in self.iter_match(topic):              # [MQTT-4.7]
            for subscriber, qos in subscribers.items():
                found[subscriber] = max(qos, found.get(subscriber, 0))
        return found


def cost(*kept: str | bytes) -> int:
    """What a thing takes of the budget that it is kept within, in bytes."""
    return OVERHEAD + sum(map(len, kept))


class Session:
    """What the server knows of a client id. Unless `clean`, it outlives the connection:
    what comes for an absent client is kept until it is back. All that a session keeps
    takes at most BUDGET bytes; else one client could use up the memory of all."""
    def __init__(self, client_id, clean):
        self.client_id = client_id
        self.clean = clean
        self.connection = None      # while it is connected
        self.filters = {}           # topic filter: what it costs
        self.budget = BUDGET        # in bytes, for all that is kept but filters
        self.unacked = {}           # packet id: packet, the oldest first;
        self.unacked_bytes = 0      # and what they cost
        self.received = set()       # ids of QoS 2 that are not yet released
        self.last_id = 0
        self.wanted = {}            # filter: QoS; their retained messages are to come;
        self.begun = {}             # of these they are coming now (see `hand_out`)

    def budget_left(self):
        """What is left of its budget, in bytes."""
        return self.budget - self.unacked_bytes - OVERHEAD * len(self.received)

    def deliver(self, message, granted):
        """Send a message, with the lower QoS of publisher and subscriber. With QoS 1 or
        2 it has a packet id, and is kept until it is acknowledged. Returns for
        how many seconds its publisher must pause."""
        qos = min(message.qos, granted)         # [MQTT-3.8.4-6]
        packet_id = self.next_id() if qos else 0
        packet = encode_publish(message, qos, packet_id)
        if qos:
            self.keep(packet_id, packet)
        if self.connection:
            self.connection.send(packet)
            if self.is_behind():
                return PAUSE * (1 + len(packet) // 1024)
        return 0

    def is_behind(self):
        """More than half of its limit is unsent, or unacknowledged. Then publishers
        slow down (backpressure), but go on: a client that never reads is dropped."""
        return self.connection.is_blocked or self.unacked_bytes > self.budget // 2

    def next_id(self):
        """From 1 to 65,535, and not one that is on its way. [MQTT-2.3.1-1], 2"""
        while True:
            self.last_id = self.last_id % 65535 + 1
            if self.last_id not in self.unacked:
                return self.last_id

    def keep(self, packet_id, packet):
        """It is sent again on the next connection if it is not acknowledged by then."""
        self.unacked[packet_id] = packet
        self.unacked_bytes += cost(packet)
        self.keep_to_budget()

    def forget(self, packet_id):
        self.unacked_bytes -= cost(self.unacked.pop(packet_id))

    def keep_to_budget(self):
        """A connected client is dropped, an absent one loses its oldest messages."""
        if self.connection:
            if self.budget_left() < 0:
                self.connection.drop("acknowledges or releases too little")
            return
        while self.unacked and self.budget_left() < LIMIT:  # room to come back with
            self.forget(next(iter(self.unacked)))

    def disconnect(self):
        """What was sent and is not acknowledged gets DUP. [MQTT-3.3.1-1] The hand-out
        will begin anew: nobody knows how much of it has arrived."""
        self.connection = None
        self.wanted = self.begun | self.wanted
        self.keep_to_budget()
        for packet_id, packet in self.unacked.items():
            if packet[0] != PUBREL:
                self.unacked[packet_id] = bytes([packet[0] | DUP]) + packet[1:]


class Connection(asyncio.Protocol):
    """One client's socket, and what is on its way in and out.

        socket -> data_received -> buffer -> work -> do_next -> do_publish, do_...
        socket <- flush <- out <- send

    asyncio's loop waits for all sockets at once (`select`), and calls data_received
    when something has come. Nobody else runs meanwhile; so each call must be short.

        reading --its SLICE is over, or it made work--> paused --a moment--> reading
        reading --a goodbye, an error, a silence, a takeover--> closed
        any of these --far too much is unsent or unacknowledged--> dropped --> closed
    """
    def __init__(self, server):
        self.server = server
        self.session = None         # from CONNECT on
        self.will = None
        self.buffer = bytearray()   # what came in and is not handled yet
        self.out = []               # packets that go out when the loop comes round,
        self.waiting = 0            # and their bytes
        self.handout = iter(())     # of retained messages, for what its session wants
        self.is_blocked = False     # much is unsent, as asyncio says (pause_writing)
        self.deadline = monotonic() + CONNECT_WAIT
        self.patience = 0.0         # s without a packet; CONNECT says how many
        self.pause = 0.0            # s before its next packet

    def connection_made(self, transport):
        self.transport = transport
        transport.set_write_buffer_limits(BUDGET // 2)
        self.server.connections.add(self)
        if not has_room(transport.get_extra_info("socket")):
            self.close("turned away: too many open connections")

    def connection_lost(self, error):
        self.close("vanished")

    def data_received(self, data):
        self.buffer += data
        self.work()

    def pause_writing(self):
        self.is_blocked = True

    def resume_writing(self):
        self.is_blocked = False
        if self.transport.is_reading():     # else it goes on when its pause is over
            self.work()

    def work(self):
        """Do what there is to do, for a slice of time; then it is the others' turn. One
        that makes work, or speaks faster than others listen, pauses for each message.
        While reading is paused, only `call_later` calls this."""
        end = monotonic() + SLICE
        self.pause = 0.0
        try:
            while self.do_next():
                now = monotonic()
                self.deadline = now + self.patience             # [MQTT-3.1.2-24]
                if self.pause or now > end:
                    self.transport.pause_reading()
                    self.server.loop.call_later(self.pause, self.work)
                    return
        except Invalid as fault:                                # [MQTT-4.8.0-1]
            self.close(str(fault))
        self.transport.resume_reading()

    def do_next(self):
        """One retained message or one packet; returns whether there was one. Retained
        messages come first, so a station's mark comes back after its old state. But
        they wait for a client that is behind: we must hear it to go on."""
        if self.transport.is_closing():
            return False
        session = self.session
        if session and (session.wanted or session.begun) and not session.is_behind():
            if not next(self.handout, False):
                # None is under way. The first `next` will begin this one:
                self.handout = self.server.hand_out(session)
            return True
        if not self.buffer:
            return False
        first = self.buffer[0]      # a browser or TLS client is not kept waiting
        need(first in self.HANDLERS, "a packet that no client may send")
        need((first == CONNECT) == (session is None),
             "CONNECT must be the first packet, and no other")  # [MQTT-3.1.0-1], 2
        packet = take_packet(self.buffer)
        if packet:
            self.HANDLERS[first](self, packet)
        return packet is not None

    # --- CONNECT, DISCONNECT, PINGREQ

    def do_connect(self, packet):
        need(packet.text() == "MQTT", "not MQTT")               # [MQTT-3.1.2-1]
        self.admit(packet.number(1) == 4, "not version 3.1.1", 1)       # [-3.1.2-2]
        flags = ConnectFlags(*map(int, f"{packet.number(1):08b}"))
        flags.check()
        keepalive = packet.number() or float("inf")             # 0: there is none
        client_id = packet.text()
        if flags.will:
            qos = 2 * flags.will_qos_2 + flags.will_qos_1
            self.will = Message(packet.topic(), packet.data(), qos, flags.will_retain)
        user = packet.text() if flags.user else ""
        password = packet.data() if flags.password else b""
        packet.must_end()
        self.admit(client_id or flags.clean, "no id for its session", 2)  # [-3.1.3-8]
        self.admit(may_connect(client_id, user, password), "wrong key", 5)
        if not client_id:
            client_id = f"auto-{secrets.token_hex(8)}"          # [MQTT-3.1.3-6]
        if self.will:
            self.admit(may_publish(client_id, self.will.topic, self.server.brokers),
                       "a will in another's name", 5)
        self.patience = 1.5 * keepalive
        self.server.open_session(self, client_id, flags.clean)

    def admit(self, condition, why, code):
        """Whoever may not connect gets a CONNACK that says why. [MQTT-3.2.2-4]"""
        if not condition:
            self.send(encode(CONNACK, bytes([0, code])))
            raise Invalid(why)

    def do_disconnect(self, packet):
        packet.must_end()
        self.will = None                                        # [MQTT-3.1.2-10]
        self.close("said goodbye")

    def do_pingreq(self, packet):
        packet.must_end()
        self.send(encode(PINGRESP))                             # [MQTT-3.12.4-1]

    # --- Messages from the client
    #     QoS 0   PUBLISH ->                                      at most once
    #     QoS 1   PUBLISH ->  <- PUBACK                           at least once
    #     QoS 2   PUBLISH ->  <- PUBREC   PUBREL ->  <- PUBCOMP   exactly once

    def do_publish(self, packet):
        """topic | packet identifier, unless QoS 0 | payload"""
        qos = (packet.first & QOS) // 2
        topic = packet.topic()
        packet_id = packet.packet_id() if qos else 0
        need(may_publish(self.session.client_id, topic, self.server.brokers),
             "publishes in another's name")
        if qos < 2 or packet_id not in self.session.received:   # else it is sent again
            self.pause = self.server.publish(
                topic, packet.read(), qos, packet.first & RETAIN)
        if qos == 1:
            self.send(encode(PUBACK, pack(packet_id)))          # [MQTT-4.3.2-2]
        elif qos == 2:
            self.session.received.add(packet_id)                # [MQTT-4.3.3-2]
            self.session.keep_to_budget()
            self.send(encode(PUBREC, pack(packet_id)))

    def do_pubrel(self, packet):
        packet_id = packet.packet_id()
        packet.must_end()
        self.session.received.discard(packet_id)
        self.send(encode(PUBCOMP, pack(packet_id)))             # [MQTT-4.3.3-2]

    # --- Messages to the client: the same handshakes, the other way round
    #     QoS 1   <- PUBLISH  PUBACK ->
    #     QoS 2   <- PUBLISH  PUBREC ->  <- PUBREL   PUBCOMP ->

    def do_acknowledge(self, packet):
        packet_id = packet.packet_id()
        packet.must_end()
        session = self.session
        if packet_id in session.unacked:    # if not, the handshake goes on all the same
            sent = session.unacked[packet_id][0] & ~(DUP | RETAIN)
            need(packet.first in ACKNOWLEDGED_BY[sent], "the wrong acknowledgement")
            session.forget(packet_id)
        if packet.first == PUBREC:
            pubrel = encode(PUBREL, pack(packet_id))
            session.keep(packet_id, pubrel)
            self.send(pubrel)                                   # [MQTT-4.3.3-1]

    # --- Subscriptions

    def do_subscribe(self, packet):
        """packet identifier | topic filter, QoS | topic filter, QoS | ..."""
        packet_id = packet.packet_id()
        codes = []
        for topic_filter in packet.topic_filters():
            qos = packet.number(1)
            need(qos <= 2, "impossible QoS")            # [MQTT-3-8.3-4], so written
            codes.append(self.server.subscribe(self.session, topic_filter, qos))
        self.send(encode(SUBACK, pack(packet_id), bytes(codes)))

    def do_unsubscribe(self, packet):
        """packet identifier | topic filter | topic filter | ..."""
        packet_id = packet.packet_id()
        for topic_filter in packet.topic_filters():
            if topic_filter in self.session.filters:
                self.server.unsubscribe(self.session, topic_filter)
        self.send(encode(UNSUBACK, pack(packet_id)))            # [MQTT-3.10.4-5]

    HANDLERS = {CONNECT: do_connect, **dict.fromkeys(PUBLISHES, do_publish),
                PUBACK: do_acknowledge, PUBREC: do_acknowledge, PUBREL: do_pubrel,
                PUBCOMP: do_acknowledge, PINGREQ: do_pingreq, SUBSCRIBE: do_subscribe,
                UNSUBSCRIBE: do_unsubscribe, DISCONNECT: do_disconnect}

    # --- What goes out

    def send(self, packet):
        """Collect what goes out. One system call sends it all when the loop comes round
        (call_soon): a call for each packet would take most of our time."""
        if not self.out:
            self.server.loop.call_soon(self.flush)
        self.out.append(packet)
        self.waiting += len(packet)
        if self.waiting > LIMIT:
            self.flush()

    def flush(self):
        if self.out and not self.transport.is_closing():
            self.transport.write(b"".join(self.out))
            if self.transport.get_write_buffer_size() > BUDGET:
                self.drop("reads too slowly")
        self.out.clear()
        self.waiting = 0

    def drop(self, why):
        """We may be in the middle of a publish: nothing goes to this client from now
        on, but it is closed, and its will published, when all others have that."""
        self.server.loop.call_soon(self.close, why)
        self.transport.abort()

    def close(self, why):
        """However a connection ends, it ends here, once. The will is published last, so
        that whoever hears it finds everything in order."""
        self.flush()
        if self in self.server.connections:
            self.server.connections.remove(self)
            self.transport.abort()      # one that does not read does not get the rest
            self.server.close_session(self, why)


class MqttServer:
    """What the connections share: sessions, subscriptions and retained messages. A
    subscriber (a Session, or the fog node itself) has `deliver(message, QoS granted)`,
    which returns for how many seconds the publisher must pause."""
    def __init__(self, brokers, reserved, tell):
        self.brokers = brokers      # names; below them not everybody may publish
        self.reserved = reserved    # topics whose retained messages always find room
        self.tell = tell
        self.loop = asyncio.get_running_loop()
        self.connections = set()
        self.present = {}           # client id: its Session, while it is connected
        self.absent = {}            # and while it is not; the longest away first
        self.tree = TopicTree()
        self.retained = {}          # topic: Message
        self.retained_bytes = 0

    def watch(self):
        """Cut off whoever sends no whole packet in its time: 10 s for the first, later
        1.5 times its keepalive [MQTT-3.1.2-24]. (A hand-out takes none of it.)"""
        for connection in list(self.connections):
            if monotonic() > connection.deadline:
                connection.close("was silent for too long")
        self.loop.call_later(0.5, self.watch)

    def open_session(self, connection, client_id, clean):
        """A session belongs to a client id, and has one connection at most: an older
        one ends here (session takeover). What was unacknowledged is sent again."""
        if client_id in self.present:                           # [MQTT-3.1.4-2]
            self.present[client_id].connection.close("was taken over")
        if clean and client_id in self.absent:
            self.end_session(client_id)                         # [MQTT-3.1.2-6]
        is_resumed = client_id in self.absent
        session = self.absent.pop(client_id, Session(client_id, clean))
        self.present[client_id] = session
        session.connection = connection
        connection.session = session
        connection.send(encode(CONNACK, bytes([is_resumed, 0])))    # [-3.2.2-1] to 3
        for packet in session.unacked.values():
            connection.send(packet)
        self.tell("<-", client_id, "connects")

    def close_session(self, connection, why):
        """The client is absent now. Its session stays, unless it is clean; its last
        will is published, unless it has said goodbye."""
        session = connection.session
        client_id = session.client_id if session else "somebody"
        self.tell("<-", client_id, why)
        if session is None:
            return
        session.disconnect()
        self.absent[client_id] = self.present.pop(client_id)
        if session.clean:
            self.end_session(client_id)
        if len(self.absent) > ABSENT:
            self.end_session(next(iter(self.absent)))
        if connection.will:
            self.publish(*connection.will)                      # [MQTT-3.1.2-8]

    def end_session(self, client_id):
        session = self.absent.pop(client_id)
        for topic_filter in session.filters:
            self.tree.remove(topic_filter, session)

    def subscribe(self, session, topic_filter, qos):
        """Returns the code for SUBACK: the QoS, or a failure. [MQTT-3.8.4-5]"""
        if topic_filter not in session.filters:
            levels = topic_filter.split("/")
            taken = len(topic_filter) + OVERHEAD * len(levels)  # nodes of the tree
            if len(levels) > LEVELS or taken > session.budget_left():
                return 0x80
            session.filters[topic_filter] = taken
            session.budget -= taken
        self.tree.add(topic_filter, session, qos)
        session.wanted[topic_filter] = qos
        return qos

    def unsubscribe(self, session, topic_filter):
        session.budget += session.filters.pop(topic_filter)
        session.wanted.pop(topic_filter, None)
        session.begun.pop(topic_filter, None)
        self.tree.remove(topic_filter, session)

    def hand_out(self, session):
        """What is retained for new subscriptions [MQTT-3.3.1-6]: what the session has
        wanted is begun, one topic at each `next`, so that in between others have their
        turn. UNSUBSCRIBE takes a filter out of either table."""
        session.begun = session.wanted
        session.wanted = {}
        filters = MQTTMatcher()
        for topic_filter in session.begun:
            filters[topic_filter] = topic_filter
        are_topics = all(map(TOPIC.fullmatch, session.begun))   # without a wildcard
        for topic in list(session.begun if are_topics else self.retained):
            message = self.retained.get(topic)
            for topic_filter in filters.iter_match(topic):
                if message and topic_filter in session.begun:       # still [-3.10.4-2]
                    session.deliver(message, session.begun[topic_filter])
            yield True
        session.begun = {}

    def subscribe_inside(self, topic_filter, subscriber):
        self.tree.add(topic_filter, subscriber, 0)      # no session, so nothing is kept

    def publish(self, topic, payload, qos=0, retain=False):
        """To all subscribers; if `retain`, to later ones, too. Returns for how many
        seconds the publisher must pause, as one of them has enough to do already."""
        message = Message(topic, payload, qos)      # retain is off here [MQTT-3.3.1-9]
        if retain:
            self.retain(message)
        return max([subscriber.deliver(message, granted)
                    for subscriber, granted in self.tree.match(topic).items()],
                   default=0)

    def retain(self, message):
        """In place of the last one of its topic. [MQTT-3.3.1-5] An empty one only takes
        that away. So does one that finds no room: better none than an old one."""
        old = self.retained.pop(message.topic, None)
        if old:
            self.retained_bytes -= cost(old.topic, old.payload)
        total = self.retained_bytes + cost(message.topic, message.payload)
        fits = total <= RETAINED_BYTES or message.topic in self.reserved
        if fits and message.payload:                            # [MQTT-3.3.1-10], 11
            self.retained[message.topic] = message._replace(retain=True)
            self.retained_bytes = total


# ===== 3. The fog node: what is near, free and alive ==================================
# A request's way through this chapter:
#
#   on_request -> reply -> find_spot -> search -> reserve -> claim -> "claim" -> station
#                              |           |                   ^                    |
#                              |           |               on_answer <-- "answer" --+
#                              |           +-> ask_around: no spot here, who has one?
#                              +-> a reply within 9 s, whatever else hangs
#
# All of it but ask_around runs in the one loop. Between two awaits nobody else changes
# anything: that is all the locking there is. A search may be cancelled anywhere, as
# there is nothing to undo: what nobody claims again is free after a lease.
#
# The waits nest (a deadline budget; the README draws it): whoever waits is more patient
# than the one that it waits for, so nobody gives up on an answer that is about to come.

STATION_WAIT = 0.5          # s a station has to answer a claim
SILENT_STATIONS = 2         # for which one search waits
RESERVE_WAIT = 1.3          # s for a request round the ring: who asks waits BROKER_WAIT
CLOUD_WAIT = 4              # s for the cloud
REQUEST_WAIT = 8.7          # s for a request in all: the car must hear within 9
CLAIMS = 16                 # on their way to one station at a time
UNDER_WAY = 2_000           # requests at a time; more are refused at once
REMEMBERED = 10_000         # cars; who has been silent longest is forgotten first

# What a car may be doing, and its sign on the page
SIGNS = {"driving": "›", "asking": "?", "waiting": "…", "going": "»",
         "charging": "+", "offline": "×"}
CAR_STATE = {"car": NAME, "at": NAME, "doing": one_of(*SIGNS), "battery": PERCENT}
STATUS = {"broker": NAME, "cars": {NAME: CAR_STATE},
          "stations": {NAME: STATE | {"online": BOOLEAN}},
          "requests": {"local": COUNTER, "ring": COUNTER, "refused": COUNTER},
          "events": [TEXT]}


class Fog(Node):
    """A broker's table of stations and cars, and the search for a spot.

    The table is a copy (soft state): who owns a truth says it again, and what is missed
    is replaced by the next message. It tells which stations are worth asking; only the
    station itself can promise a spot.

    Touched by the loop only; but what runs in other threads (ask_around, and the last
    section) uses only what a Node has for that.
    """
    def __init__(self, name, city, tell):
        super().__init__(city, tell)
        self.loop = asyncio.get_running_loop()
        self.name = name
        stations = city.stations(name)
        self.online = {}                    # station: bool, what it said last
        self.states = {     # what each station said last; replaced as a whole, as a
                            # door's thread may still be reading the one before
            station: {"station": station, "spots": city.places[station]["spots"],
                      "free": 0, "cars": {}, "life": 0} for station in stations}
        self.turns = {station: asyncio.Semaphore(CLAIMS) for station in stations}
        self.breaker = Breaker()            # for stations
        self.cars = {}                      # what each car said last, the latest last
        self.awaited = {}                   # (station, claim id): a future, its answer
        self.requests = {"local": 0, "ring": 0, "refused": 0}
        self.capacity = asyncio.Semaphore(UNDER_WAY)

    def attach(self, mqtt):
        """Each station is listened to by its name, as some servers (RabbitMQ) keep what
        is retained from filters with wildcards."""
        self.mqtt = mqtt
        for topic in self.HEARS:
            names = self.states if topic.startswith("stations") else ["+"]
            for name in names:
                heard = topic.replace("+", name)
                mqtt.subscribe_inside(f"{self.name}/{heard}", self)

    def deliver(self, message, granted):
        """What a station or car says: HEARS has the handler for its topic. An invalid
        message is told in one line, and never stops us."""
        _, kind, name, what = message.topic.split("/")
        if message.retain and what in ("request", "answer"):
            return 0        # these count when they are said, not when they are repeated
        try:
            if kind == "stations":
                self.breaker.answered(name)     # it speaks, so it is asked again
            self.HEARS[f"{kind}/+/{what}"](self, name, message.payload)
        except Invalid as fault:
            self.tell("<-", name, what, f"is invalid: {fault}")
        return MOMENT if what == "request" else 0

    def send(self, topic, message):
        self.mqtt.publish(f"{self.name}/{topic}", to_json(message), qos=1)

    # --- what cars say

    def on_request(self, car, payload):
        """A task for each request: one that hangs on the cloud holds nobody up. (That
        we do not keep it is safe: what a task waits for keeps it alive.)"""
        fields = {}
        try:
            fields = read_object(payload) | {"car": car}
            self.loop.create_task(self.reply(read_request(self.city, fields)))
        except Invalid as fault:
            request_id = fields["id"] if ID.holds(fields.get("id")) else None
            self.send(f"cars/{car}/reply", refusal(
                request_id, f"bad request: {fault}", [self.name]))
            raise

    async def reply(self, request):
        self.send(f"cars/{request['car']}/reply", await self.find_spot(request))

    def on_car_state(self, car, payload):
        """For people to see. The search does not need it: a request says all."""
        self.cars.pop(car, None)
        if payload == b"":
            return          # it has gone to another broker
        state = fit(CAR_STATE, read_object(payload), "state")
        need(state["car"] == car, "not its own state")
        self.cars[car] = state
        if len(self.cars) > REMEMBERED:
            del self.cars[next(iter(self.cars))]

    # --- what stations say

    def on_answer(self, name, payload):
        """A station's yes or no. If nobody waits for it any more, there is nothing to
        undo: a spot that nobody claims again is free after a lease."""
        answer = fit(ANSWER, read_object(payload), "answer")
        try:
            self.awaited[name, answer["id"]].set_result(answer)
        except (KeyError, asyncio.InvalidStateError):   # answered before, or too late
            self.tell("<-", name, answer["id"], "is too late: a lease ends by itself")

    def on_state(self, name, payload):
        """Who is at a station. Replaced as a whole, so a lost state costs nothing."""
        state = fit(STATE, read_object(payload), "state")
        need(state["station"] == name, "not its own state")
        self.states[name] = state

    def on_online(self, name, payload):
        # It says so itself, or, when it has vanished, its last will does.
        self.online[name] = fit(BOOLEAN, read_json(payload), "online")
        self.tell("<-", name, "is online" if self.online[name] else "is offline")

    HEARS = {"cars/+/request": on_request, "cars/+/state": on_car_state,
             "stations/+/answer": on_answer, "stations/+/state": on_state,
             "stations/+/online": on_online}

    def is_online(self, name):
        """Its last word (or last will) said so, and it is not left out as silent."""
        return self.online.get(name, False) and not self.breaker.is_open(name)

    # --- the search
    #     in_time, search, reserve and claim are coroutines: the loop does other things
    #     where they wait, and cancels them when their time is up. (The crew goes on.)

    async def find_spot(self, request):
        # It is counted as served here, round the ring, or not at all.
        reply = await self.in_time(REQUEST_WAIT, request["car"], self.search, request)
        where = "refused"
        if reply["station"]:
            where = "local" if reply["broker"] == self.name else "ring"
        self.requests[where] += 1
        return reply

    async def in_time(self, seconds, who, find, request):
        """One request, from its arrival to its reply: what `find` replies, or "full"
        when its time is up. If too many were under way all would be late: so the next
        one is refused at once (load shedding)."""
        self.tell("<-", who, request["id"], "asks for a spot at", request["at"])
        reply = refusal(request["id"], "full", [self.name])
        if not self.capacity.locked():
            async with self.capacity:
                with suppress(asyncio.TimeoutError):        # then it stays "full"
                    reply = await asyncio.wait_for(find(request), seconds)
        self.tell("->", who, request["id"], outcome(reply))
        return reply

    async def search(self, request):
        """The nearest free spot: here; if there is none, round the ring. A thread of
        its own walks, as that would block the loop, and we await it."""
        reply = await self.reserve(request)
        if reply.get("reason") == "full":
            reply = await self.loop.run_in_executor(
                self.crew, self.ask_around, request)
            reply["asked"].insert(0, self.name)
        return reply

    async def reserve(self, request):
        """The nearest spot of our own stations, confirmed: an offer, or a refusal. One
        station after the other is asked until one says yes; our table tells whom to
        pass over. After two silent ones we give up."""
        car = request["car"]
        near = self.city.within_range(request["at"], request["range"])
        ours = [name for name in near if name in self.states]
        # First the one that keeps a spot for this car already (False < True); sort()
        # leaves the others in their order, by distance.
        ours.sort(key=lambda name: car not in self.states[name]["cars"])
        unanswered = 0
        for name in ours:
            try:
                lease = await self.claim(name, request)
                if lease:
                    return {"id": request["id"], "station": name, "broker": self.name,
                            "route": near[name].route, "km": round(near[name].km, 3),
                            "lease": lease, "asked": [self.name]}
            except asyncio.TimeoutError:
                unanswered += 1
                if unanswered == SILENT_STATIONS:
                    break
        return refusal(request["id"], "full" if near else "out of range", [self.name])

    async def claim(self, name, request):
        """Ask a station for a spot, in the car's name: its lease, or None for a no.
        Raises asyncio.TimeoutError if it does not answer. The answer is a message, too:
        by the claim's id on_answer finds the future that is awaited here. Only CLAIMS
        are on their way to one station (a semaphore, as a bulkhead); waiting for one's
        turn does not count as silence, and by then the station may be full or away."""
        car = request["car"]
        async with self.turns[name]:
            state = self.states[name]
            is_full = state["free"] == 0 and car not in state["cars"]
            if is_full or not self.is_online(name):
                return None
            claim_id = f"{request['id']}@{self.name}-{secrets.token_hex(8)}"
            future = self.awaited[name, claim_id] = self.loop.create_future()
            self.send(f"cars/{car}/claim/{name}", {"use": "held", "id": claim_id})
            try:
                answer = await asyncio.wait_for(future, STATION_WAIT)
                return answer.get("lease") if answer["ok"] else None
            except asyncio.TimeoutError:
                self.breaker.failed(name)
                self.tell("<-", name, request["id"], "no answer: left out for a while")
                raise
            finally:
                del self.awaited[name, claim_id]

    def ask_around(self, request):
        """In a thread: ask the cloud; without it walk the ring ourselves."""
        self.tell("->", "cloud", request["id"], "no spot here: who has one?")
        try:
            answer = self.caller.ask(self.city.cloud, request | {
                "op": "search", "broker": self.name}, CLOUD_WAIT)
            return read_reply(self.city, answer, request["id"])
        except Invalid as fault:
            self.tell("<-", "cloud", request["id"], f"{fault}: walks without it")
        return self.walk_ring(request, self.city.ring[self.name])

    # --- what the doors ask for, in the loop

    async def give_back(self, car):
        """Give back the spots that the car has here. They count as free at once, before
        the station says so itself. Returns whether it had any (the states of them)."""
        had = [state for state in self.states.values() if car in state["cars"]]
        for state in had:
            name = state["station"]
            cars = state["cars"].copy()
            del cars[car]
            free = min(state["spots"], state["free"] + 1)
            self.states[name] = state | {"free": free, "cars": cars}
            self.send(f"cars/{car}/leave/{name}", {})
        return had

    async def look_around(self):
        """All that this broker knows: a STATUS. (`in_loop` runs only coroutines.)"""
        stations = {name: state | {"online": self.is_online(name)}
                    for name, state in self.states.items()}
        return {"broker": self.name, "stations": stations, "cars": dict(self.cars),
                "requests": dict(self.requests), "events": list(self.tell.events)}

    # --- what runs in the doors' threads: it hands over to the loop

    def in_loop(self, coroutine):
        """Its result, computed where all of our state lives."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def answer(self, request):
        """Over TCP. Raises Invalid. For another broker's car we ask nobody else: one
        walk is enough, and two could send each other round the ring for ever."""
        match request.get("op"):
            case "reserve":
                request = read_request(self.city, request)
                return self.in_loop(
                    self.in_time(RESERVE_WAIT, "ring", self.reserve, request))
            case "status":
                return self.status()
        raise Invalid("request.op must be reserve or status")

    def status(self):
        return self.in_loop(self.look_around())

    def whole_city(self):
        """What the cloud knows of all brokers; without it, what we know: ourselves."""
        trouble = ""
        try:
            answer = self.caller.ask(self.city.cloud, {"op": "city"}, CLOUD_WAIT)
            brokers = fit({NAME: (STATUS,)}, answer.get("brokers"), "brokers")
        except Invalid as fault:
            trouble = f"no city: {fault}"
            brokers = {self.name: self.status()}
        self.tell.trouble("<-", "cloud", trouble)
        return {"cloud": not trouble, "map": {
            "places": self.city.places, "roads": self.city.roads}, "brokers": brokers}


# ===== 4. The doors: TCP for the cloud, HTTP for people ===============================
#     GET /                        the page of chapter 5
#     GET /map                     what it shows, drawn anew
#     GET /status, /stations[/P1], /cars[/car1]     what this broker knows
#     GET /city                    what all brokers know, through the cloud
#     POST, DELETE /cars/car1/request               a spot for a car without MQTT
#
# One thread per connection, as a thread may wait: for a slow guest, or the cloud. None
# touches the fog's tables: it hands a coroutine to the loop, and waits for its result.


class Http(http.server.BaseHTTPRequestHandler):
    """One HTTP request. http.server reads it, and refuses what there is no do_... for.
    It speaks HTTP/1.0, one request per connection: none can hide behind another. Its
    own refusals are JSON, too: hence the first two lines."""
    error_content_type = "application/json"
    error_message_format = '{"error": "%(explain)s"}'

    def do(self):
        """First who asks, then for what."""
        _, *levels = map(urllib.parse.unquote, self.path.split("?")[0].split("/"))
        try:
            self.check_host()
            if not is_key(self.password()):
                return self.respond(401, {"error": "key"})
            self.respond(*self.answer(levels))
        except Invalid as fault:
            self.respond(400, {"error": str(fault)})

    do_GET = do_POST = do_DELETE = do

    def check_host(self):
        """Any name but ours is DNS rebinding: a foreign page tries to speak to us."""
        try:
            host = "//" + self.headers.get("Host", "localhost")
            name = urllib.parse.urlsplit(host).hostname
            if name not in (self.server.host.lower(), "localhost"):
                ipaddress.ip_address(name)
        except ValueError:
            raise Invalid("this is not the host you named") from None

    def password(self):
        """HTTP Basic authentication: any user name, and the key as password."""
        code = self.headers.get("Authorization", "").partition(" ")[2]
        with suppress(ValueError):
            return base64.b64decode(code).decode().partition(":")[2]

    def answer(self, path):
        """(code, what is sent: HTML, or something that is sent as JSON)"""
        fog = self.server.node
        match self.command, *path:
            case "GET", "":
                return 200, PAGE
            case "GET", "map":
                return 200, draw(fog.whole_city())
            case "GET", "status":
                return 200, fog.status()
            case "GET", "city":
                return 200, fog.whole_city()
            case "GET", "stations" | "cars" as kind:
                return 200, fog.status()[kind]
            case "GET", "stations" | "cars" as kind, name:
                states = fog.status()[kind]
                if name in states:
                    return 200, states[name]
            case "POST", "cars", car, "request":
                return self.ask_for_spot(fog, car)
            case "DELETE", "cars", car, "request":
                if fog.in_loop(fog.give_back(car)):
                    return 204, ""
        return 404, {"error": "there is no such thing here"}

    def ask_for_spot(self, fog, car):
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            return 415, {"error": "the body must be application/json"}
        need(length.isdecimal(), "Content-Length must say how long the body is")
        if len(length) > 6 or int(length) > LIMIT:
            return 413, {"error": f"the body must be at most {LIMIT} bytes"}
        own = {"id": f"http-{secrets.token_hex(8)}"}        # unless it brings one
        fields = own | read_object(self.rfile.read(int(length))) | {"car": car}
        reply = fog.in_loop(fog.find_spot(read_request(fog.city, fields)))
        if reply["station"]:
            return 200, reply
        code = 503 if reply["reason"] == "full" else 409
        return code, reply | {"error": reply["reason"]}

    def respond(self, code, answer):
        kind = "application/json"
        body = to_json(answer)
        if isinstance(answer, str):
            kind = "text/html; charset=utf-8"
            body = answer.encode(errors="replace")
        self.send_response(code)
        if code == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="city"')
        if code == 503:
            self.send_header("Retry-After", answer["retry"])
        if body:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", len(body))
        self.end_headers()
        self.wfile.write(body)

    def finish(self):
        """A guest who is still sending what we do not read would miss our answer."""
        with suppress(OSError):         # or it has hung up, or takes too long
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read(LIMIT):
                pass
        super().finish()

    def log_message(self, *args):
        """The fog tells its story; a line for each look at the page would drown it."""


# ===== 5. The page: the city, drawn ===================================================
# `GET /` is a frame, which fetches `GET /map` each second: what is drawn here. It is
# made of templates; whatever comes from outside goes through `fill`, which escapes it,
# so a car named "<b>" is drawn with just that name.

PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Smart-charging city</title><style>
:root { color-scheme: light dark; font: max(15px, 1.3vw)/1.4 sans-serif; --own: gray; }
body { margin: 4px; } h1 { margin: 0; } b, td, line { opacity: var(--seen, 1); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
td { border-left: .4em solid var(--own); padding: 0 .6em; }
#map { position: relative; height: min(75vh, 92vw); overflow-x: clip; }
svg { position: absolute; top: 0; z-index: -1; width: 100%; height: 100%; }
line { stroke: var(--own); stroke-width: .25em; }
li { position: absolute; display: flex; flex-flow: column wrap; max-height: 9.6em;
  text-shadow: 0 0 .2em Canvas, 0 0 .2em Canvas; white-space: nowrap; }
li:has(i:nth-of-type(7)) { --size: .35em; --names: none; }
li::before { content: ""; position: absolute; translate: -50% -50%; opacity: .25;
  background: var(--own); border-radius: 50%; width: 6em; height: 6em; }
b { position: absolute; translate: -50% -2.4em; font-weight: normal; }
i { width: 1.6em; height: 1.6em; margin: -.8em .8em .8em -.8em; border-radius: 50%;
  font: normal var(--size, 1em)/1.6 sans-serif; text-align: center; position: relative;
  background: radial-gradient(Canvas 50%, transparent 53%), conic-gradient(
    hsl(calc(1.3 * var(--battery)) 80% 40%) calc(1% * var(--battery)), gray 0); }
span { position: absolute; top: 0; left: 1.8em; max-width: 7em; overflow: hidden;
  text-overflow: ellipsis; display: var(--names, block); }
</style><h1>Smart-charging city</h1><p id="news" role="status">Asking ...</p>
<div id="city"></div><p>Spots: ■ charging, ▄ held, □ free. Cars, ringed by their
battery: › driving, ? asking, … waiting, » going, + charging, × offline</p>
<script>const cars = () => [...document.querySelectorAll("[data-car]")].map(
  car => [car, car.dataset.car, car.getBoundingClientRect()]);
const say = (text, opacity) => { city.style.opacity = opacity;
  if (news.textContent !== text) news.textContent = text; };
async function tick() { try {
  const patience = {signal: AbortSignal.timeout(9500)};
  const answer = await fetch(location.origin + "/map", patience);
  if (!answer.ok) throw answer.status;
  const was = new Map(cars().map(([, name, place]) => [name, place]));
  city.innerHTML = await answer.text();
  if (!matchMedia("(prefers-reduced-motion)").matches)
    for (const [car, name, to] of cars()) { const from = was.get(name) ?? to;
      car.animate({translate: [`${from.x - to.x}px ${from.y - to.y}px`, "0"]}, 900); }
  say(city.firstChild.dataset.news, 1);
} catch (why) { say(`No answer from ${location.host}, retrying: ${why}`, .4); }
setTimeout(tick, 1000); } tick();</script></html>"""


def fill(template: str, **texts) -> str:
    """The template, with these texts in its blanks. Escaped: they are never HTML."""
    return template.format(**{key: html.escape(str(texts[key])) for key in texts})


def draw(city: dict) -> str:
    """One look at the city: {"cloud", "map", "brokers"}, as GET /city shows it."""
    brokers = city["brokers"]       # their statuses; None: no answer
    alive = [status for status in brokers.values() if status]
    lines = [line for status in alive for line in reversed(status["events"])]
    # Lines have a time but no date: just after midnight their order is wrong.
    lines.sort(key=lambda line: line[:8], reverse=True)
    lost = [name for name in brokers if not brokers[name]]
    if not city["cloud"]:
        lost.append("the cloud")
    news = f"No answer from {', '.join(lost)}" if lost else "All parts answer"
    return "".join([
        fill('<div data-news="{news}"><div id="map"><ul>', news=news),
        *draw_map(city["map"], brokers, alive), "</svg></div><table>",
        *draw_rows(brokers),
        fill("</table><pre>{events}</pre></div>", events="\n".join(lines))])


def look(broker, brokers):
    """Its region's color, as CSS: each is far from the one before, on the color wheel;
    pale gray, where nobody answers."""
    if not brokers.get(broker):
        return "--seen: .6"
    return f"--own: hsl({225 + 150 * list(brokers).index(broker)} 70% 55%)"


def draw_map(city_map, brokers, alive):
    """Positions are in percent of the drawing, so it fits a phone and a projector."""
    places = city_map["places"]
    xs, ys = zip(*[place["at"] for place in places.values()])
    states = collections.ChainMap(*[status["stations"] for status in alive])
    cars = draw_cars(alive)
    at = {}
    for name, place in places.items():
        x, y = place["at"]
        at[name] = {"look": look(place["broker"], brokers),
                    "x": percent(x, min(xs), max(xs)),
                    "y": percent(y, max(ys), min(ys))}      # y points upwards
        spots = say_spots(states.get(name)) if "spots" in place else ""
        yield fill('<li style="left: {x}%; top: {y}%; {look}"><b>{name} {spots}</b>',
                   **at[name], name=name, spots=spots)
        yield from cars[name]
    yield "</ul><svg>"
    for a, b in city_map["roads"]:
        yield fill('<line style="{look}" x1="{x}%" y1="{y}%" x2="{x2}%" y2="{y2}%"/>',
                   **at[a], x2=at[b]["x"], y2=at[b]["y"])


def percent(value: float, first: float, last: float) -> float:
    """Where it lies between the first and the last one, on a map with a margin."""
    if first == last:
        return 50
    return round(12 + 76 * (value - first) / (last - first), 1)


def say_spots(state):
    if not state or not state["online"]:
        return "no answer"
    uses = list(state["cars"].values())
    return f"■ {uses.count('charging')} ▄ {uses.count('held')} □ {state['free']}"


def draw_cars(alive):
    """{place: the cars there}"""
    known = [car for status in alive for car in status["cars"].values()]
    # A car that two brokers know is alive at one of them, if it is at all.
    known.sort(key=lambda car: car["doing"] != "offline")
    found = collections.defaultdict(list)
    for car in {car["car"]: car for car in known}.values():
        found[car["at"]].append(fill(
            '<i data-car="{car}" style="--battery: {battery}" role="img" title="{car}: '
            '{doing} at {at}, {battery} %">{sign}<span>{car}</span></i>',
            **car, sign=SIGNS[car["doing"]]))
    return found


def draw_rows(brokers):
    for name, status in brokers.items():
        yield fill('<tr style="{look}"><td>{name}<td>', name=name,
                   look=look(name, brokers))
        if status:
            yield fill("local {local} / ring {ring} / refused {refused}",
                       **status["requests"])
        else:
            yield "no answer"


# ===== 6. Starting and stopping =======================================================
# The threads of a broker process, each started here or in `Fog.__init__`:
#
#     the main thread     runs the loop: all of MQTT, all tables, all searches
#     two for each fog    accept guests for the doors; each guest has a thread, too
#     32 for each fog     its crew: they wait for the cloud and the other brokers
#     one for each fog    with --external-mqtt: paho's, which hands over to the loop

class ExternalServer:
    """Somebody else's MQTT server (Mosquitto, EMQX, ...), seen through paho: the way to
    grow past one machine. Brokers may share one. To the fog it is like MqttServer."""
    def __init__(self, broker, fog):
        self.fog = fog
        self.filters = []
        self.client = mqtt_client(broker.name)
        self.client.on_connect = self.on_connect
        self.client.on_disconnect = lambda *_: fog.tell("<-", "mqtt", "connection lost")
        self.client.on_connect_fail = lambda *_: fog.tell("->", "mqtt", "no answer yet")
        self.client.reconnect_delay_set(1, 2)
        self.client.connect_async(broker.host, broker.mqtt, keepalive=5)

    def subscribe_inside(self, topic_filter, subscriber):
        self.filters.append((topic_filter, 1))
        self.client.message_callback_add(topic_filter, self.on_message)

    def on_connect(self, client, data, flags, code, properties):
        """Each time: a server that was started again knows no subscriptions, and who is
        not online there is not online."""
        self.fog.tell("<-", "mqtt", f"the external server says: {code}")
        if not code.is_failure:
            self.fog.loop.call_soon_threadsafe(self.fog.online.clear)
            client.subscribe(self.filters)

    def on_message(self, client, data, message):
        """In paho's thread. Its messages have the fields of ours."""
        self.fog.loop.call_soon_threadsafe(self.fog.deliver, message, 0)

    def publish(self, topic, payload, qos):
        with suppress(ValueError):      # to a car that calls itself "+" or "#"
            self.client.publish(topic, payload, qos)


async def start_mqtt(broker, city, fog, external):
    if external:
        server = ExternalServer(broker, fog)
        fog.attach(server)
        server.client.loop_start()      # paho's thread: it reads and writes the socket
        return
    server = MqttServer(set(city.ring), {
        f"{broker.name}/stations/{station}/state" for station in fog.states}, fog.tell)
    fog.attach(server)
    with listening(broker.host, broker.mqtt, fog.tell) as address:
        door = await server.loop.create_server(
            lambda: Connection(server), address, broker.mqtt, backlog=ACCEPTS)
    # To asyncio `backlog` is both how many may wait and how many it accepts at a time.
    door.sockets[0].dup().listen(BACKLOG)
    server.watch()


def on_loop_fault(loop, context):
    """A bug in a callback or a task ends the process; a socket that fails does not."""
    fault = context.get("exception", RuntimeError(context["message"]))
    if isinstance(fault, OSError):
        logging.info("%s: %s", context["message"], fault)
    else:
        crash(fault)


async def run(names, city, external):
    """These brokers, all in this one loop, until somebody ends it. Their doors answer
    last: whoever comes in finds everything there."""
    asyncio.get_running_loop().set_exception_handler(on_loop_fault)
    for name in names:
        broker = city.ring[name]
        host, port = broker.address
        fog = Fog(name, city, Story(name))
        doors = [Door(host, port, Lines, fog), Door(host, broker.http, Http, fog)]
        await start_mqtt(broker, city, fog, external)
        for door in doors:              # a thread each, which waits for guests
            threading.Thread(target=door.serve_forever, daemon=True).start()
        fog.tell(f"serves MQTT on port {broker.mqtt}, TCP on {port}, people at "
                 f"http://{host}:{broker.http}/")
    await asyncio.Event().wait()


def main():
    parser = argparse.ArgumentParser(description="Brokers: the fog of the city.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="brokers (all)")
    parser.add_argument("--external-mqtt", action="store_true",
                        help="use the MQTT server that listens there already")
    args, city = start_up(parser)
    names = choose_names(args, city.ring, "broker")
    with until_stopped():   # asyncio.run would cancel what the doors' threads wait for
        asyncio.new_event_loop().run_until_complete(
            run(names, city, args.external_mqtt))


if __name__ == "__main__":
    main()
