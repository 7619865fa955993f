"""A charging station: it owns its spots, and nobody else does.

        fog --claim----> STATION --answer: yes / no--> fog     to reserve, for a car
        car --claim----> STATION        again and again, while it needs its spot
        car --leave----> STATION        it does not need it any more
                         STATION --state, online--> all        (retained)

The life of a spot:     free --claim--> held --claim--> charging
                        held, charging --leave, or 15 s without a claim--> free

Every promise is a lease: it ends by itself unless it is claimed again, and claiming
twice is harmless (idempotent). Its broker keeps what a station said last, as a retained
message; after a crash the station reads that back.

    python3 station.py [NAME ...] [--lease S]       these stations; no name: all

One thread per station owns all its state and looks after its connection: no lock. The
first half of this file is that connection (`Client`), which cars have, too.

Read next: car.py. Left out on purpose: kilowatts, prices, a memory of its own on disk.
"""

import argparse
import math
import random
import socket
import struct
import threading
from contextlib import suppress
from time import monotonic, sleep
from typing import NamedTuple

from paho.mqtt import client as paho

from cloud_server import (KEY, SECONDS, Story, choose_names, give_up, mqtt_password,
                          resolve, start_up, until_stopped)
from ring import (COUNTER, NAME, SPOTS, Invalid, Kind, fit, one_of, printable,
                  read_object, to_json)

LEASE = 15          # s a spot stays a car's; the car claims it every third of that
LOOK = 0.1          # s between two looks at the leases, or at the road
RECONNECT = 1       # s before a lost broker is tried again
FROZEN = 1          # s between two looks: if longer, this process was frozen
KEEPALIVE = 5       # s; a broker that leaves a ping unanswered for that long is lost
GOODBYE_WAIT = 1    # s for all stations or cars of a process to say goodbye

USE = one_of("held", "charging")
CLAIM_ID = printable("1 to 200 printable characters", 200)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
CLAIM = {"use": USE, "id?": CLAIM_ID}
ANSWER = {"id": CLAIM_ID, "car": NAME, "ok": BOOLEAN, "lease?": SECONDS}
STATE = {"station": NAME, "spots": SPOTS, "free": COUNTER, "cars": {NAME: USE},
         "life": COUNTER}


# --- The connection of a station or a car ---------------------------------------------
# paho-mqtt speaks MQTT for us, whenever a station's or car's own thread lets it work
# (`loop`). So a message is handled between two steps of that thread: no locks.

def mqtt_client(client_id):
    """A paho client: MQTT 3.1.1, a clean session (nothing is kept in its absence)."""
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id)
    client.on_socket_open = lambda client, data, sock: sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or messages wait 40 ms for an ACK
    client.max_inflight_messages_set(1000)          # paho's 20 would make a rush queue
    if KEY:
        client.username_pw_set(client_id, mqtt_password(client_id))
    return client


class Stopped(Exception):
    """Ends the life of a station or car, from wherever it is raised: see `live`."""


class Client:
    """What a station and a car have in common: a name, a story, and a connection.

        down --connect--> waits to be let in --work--> up: greet, then hear
          ^                       |                     |
          +-----------------------+--------lose---------+  tried again after 1 s

    A lost connection raises nothing. While it is not up, what is published is dropped:
    all that counts is said again (soft state). Each connection has a new paho client,
    so nothing left unsent by the old one is sent later. Stations and cars have their
    own ways to `greet` a broker and to `hear` a message, and their own last `will`.
    """
    is_stopping = False     # all of a process at once; the main thread says when

    def __init__(self, name, kind, broker):
        self.name = name
        self.kind = kind        # "stations" or "cars", a level of its topics
        self.broker = broker
        self.tell = Story(name)
        self.mqtt = None        # paho's client; None: not even a connection
        self.is_up = False      # has the broker let us in?
        self.failures = 0       # in a row, at this broker
        self.next_try = 0.0     # on the monotonic clock, as the next one
        self.last_look = monotonic()
        self.inbox = []         # (topic, message) that have come in in paho's `loop`

    def attend(self):
        """Let paho send and receive for a moment, or connect; then hear what came in.
        An invalid message changes nothing. Returns the seconds since the last time."""
        if self.is_stopping:
            raise Stopped
        if self.mqtt:
            self.work()
        elif monotonic() < self.next_try:
            sleep(LOOK)
        else:
            self.connect()
        while self.inbox:
            topic, message = self.inbox.pop(0)
            try:
                self.hear(topic, message)
            except Invalid as fault:
                self.tell("<-", topic, f"invalid message: {fault}")
        before = self.last_look
        self.last_look = monotonic()
        return self.last_look - before

    def connect(self):
        client = mqtt_client(self.name)
        what, value = self.will()
        client.will_set(self.topic(what), to_json(value), qos=1, retain=True)
        # Called in `loop`: a topic that is not UTF-8 is a ValueError there.
        client.on_message = lambda client, data, message: self.inbox.append(
            (message.topic, message))
        try:
            client.connect(resolve(self.broker.host), self.broker.mqtt, KEEPALIVE)
            self.mqtt = client
        except OSError as fault:
            self.lose(f"no connection ({fault})")

    def work(self):
        try:
            code = self.mqtt.loop(LOOK)
        except (ValueError, LookupError, TypeError, struct.error) as fault:
            # paho's parser has met what is not MQTT.
            return self.lose(f"does not speak MQTT ({fault})")
        if code == paho.MQTT_ERR_CONN_REFUSED:
            self.lose("refuses us: is EV_KEY the same on both sides?")
        elif code != paho.MQTT_ERR_SUCCESS:
            self.lose("the connection is lost")
        elif self.mqtt.is_connected() and not self.is_up:
            self.is_up = True
            self.failures = 0
            self.tell.trouble("->", self.broker.name, "")
            self.greet()

    def lose(self, why):
        self.mqtt = None
        self.is_up = False
        self.failures += 1
        self.next_try = monotonic() + RECONNECT
        self.tell.trouble("->", self.broker.name, f"{why}; trying again")

    def topic(self, what):
        """All that a client publishes must be below its own name."""
        return f"{self.broker.name}/{self.kind}/{self.name}/{what}"

    def publish(self, what, value, qos=1, retain=False):
        """QoS 1 is at-least-once delivery. That it may come twice is harmless here."""
        if self.is_up:
            self.mqtt.publish(self.topic(what), to_json(value), qos, retain)

    def say_goodbye(self):
        """In the words of the last will, so the broker need not publish that."""
        self.publish(*self.will(), retain=True)
        self.close()

    def close(self):
        """Hang up, but first let the last messages arrive."""
        if self.is_up:
            self.work()
        if self.mqtt:
            self.mqtt.disconnect()
        self.mqtt = None
        self.is_up = False
        self.failures = 0
        self.next_try = 0.0


def live_until_stopped(parts):
    """A thread for the life of each part, to its end; Ctrl-C lets each say goodbye."""
    for part in parts:
        threading.Thread(target=part.live, daemon=True).start()
    try:
        while threading.active_count() > 1:     # (a join() does not survive Ctrl-C)
            sleep(LOOK)
    finally:
        Client.is_stopping = True
        end = monotonic() + GOODBYE_WAIT
        while threading.active_count() > 1 and monotonic() < end:
            sleep(LOOK)


# --- The station ----------------------------------------------------------------------

class Spot(NamedTuple):
    use: str        # "free", "held" or "charging"
    claimed: float  # when it was claimed last, on the monotonic clock
    request: str    # the car's request, as it stands in every log, if it is known


FREE = Spot("free", 0.0, "-")
TWICE = "was started again elsewhere: that one goes on"


class Station(Client):
    """Its spots are touched by its own thread only, the one that runs `live`. At any
    time: len(self.cars) <= self.spots, and a car has at most one of them."""
    def __init__(self, name, city, lease):
        super().__init__(name, "stations", city.broker_of(name))
        self.lease = lease
        self.spots = city.places[name]["spots"]
        self.cars = {}                          # car: its Spot
        self.life = random.randrange(2**31)     # tells us from a second one of our name
        self.is_restored = False                # has it ever read its state back?
        self.hears_since = math.inf             # since when it hears claims: not yet

    def live(self):
        with suppress(Stopped):
            while True:
                if self.attend() > FROZEN:      # claims may wait unread: all begin anew
                    self.hears_since = max(self.hears_since, self.last_look)
                elif self.is_up:
                    self.end_leases()
        self.say_goodbye()

    def will(self):
        return "online", False

    # --- reading its own state back: greet -> remember -> go_online
    #     STATION --subscribe, then publish the mark--> broker
    #     broker --the last state, if there is one; then the mark--> STATION
    #     STATION --subscribe to claims; state, online--> all

    def greet(self):
        """Ask for what we said last, before we hear any claim. There may be nothing,
        and nobody would say so: so we say something to ourselves (a marker message).
        Once it is back, the state has come or never will."""
        self.hears_since = math.inf
        for memory in "state", "mark":
            self.mqtt.subscribe(self.topic(memory), 1)
        self.publish("mark", {})

    def remember(self, state):
        """Who had our spots when we were last heard of. The first time we take over
        what an earlier process has left. Later we should find what we said ourselves:
        if we find another's, it was started after us."""
        if not self.is_restored:
            uses = state["cars"]
            # There may be fewer spots now: "charging" comes before "held".
            cars = sorted(uses, key=uses.get)[:self.spots]
            # When they were claimed does not count: `hears_since` is later.
            self.cars = {car: Spot(uses[car], 0.0, "-") for car in cars}
        elif state["life"] != self.life:
            self.tell(TWICE)
            raise Stopped           # that one says only after this that it is online

    def go_online(self):
        """Our mark is back: what it has retained has come. From now on we hear claims,
        and not what we say ourselves."""
        self.is_restored = True
        self.hears_since = monotonic()
        self.mqtt.unsubscribe(self.topic("state"))
        self.mqtt.subscribe(f"{self.broker.name}/cars/+/+/{self.name}", 1)
        self.publish_state()
        self.publish("online", True, retain=True)
        self.tell("->", self.broker.name, "serves:", self.count())

    # --- what it hears: claims and leaves

    def hear(self, topic, message):
        match topic.split("/"):
            case [_, "stations", _, "state"]:
                state = read_object(message.payload)
                self.remember(fit(STATE, state, "our last state"))
            case _ if message.retain:
                pass        # it was said before we listened, so it does not count
            case [_, "stations", _, "mark"]:
                self.go_online()
            case [_, "cars", car, "claim", _]:
                claim = fit(CLAIM, read_object(message.payload), "claim")
                self.on_claim(fit(NAME, car, "car"), claim)
            case [_, "cars", car, "leave", _] if car in self.cars:
                read_object(message.payload)        # nothing is in it
                self.end_lease(car, "leaves")

    def on_claim(self, car, claim):
        """It takes a spot, renews it, or is refused. The fog's claim has an id."""
        claim_id = claim.get("id", "")
        request = claim_id.rpartition("@")[0]
        ok = self.take(car, claim["use"], request)
        answer = {"id": claim_id, "car": car, "ok": ok}
        if ok:
            answer["lease"] = self.lease
        if claim_id:
            self.publish("answer", answer)

    def take(self, car, use, request):
        """The whole rule: a car has at most one spot, and whoever claims it has it for
        one lease from now. Returns whether the car has one. Each change, and each
        refusal, publishes our state, before the answer: so whoever has the answer has
        the state, and a car that has lost its spot sees it there."""
        old = self.cars.get(car, FREE)
        if request == "":
            request = old.request
        if old is FREE and len(self.cars) >= self.spots:
            self.publish_state()
            self.tell("<-", car, request, "finds no free spot")
            return False
        if old.use == "charging":
            use = "charging"            # it stays plugged in, whatever comes late
        self.cars[car] = Spot(use, monotonic(), request)
        if use != old.use:
            self.publish_state()
            self.tell("<-", car, request, use)
        return True

    def end_leases(self):
        """A car not heard from for a lease loses its spot: no dead car can block it for
        ever. After a time when nobody could be heard all leases begin anew."""
        for car, spot in list(self.cars.items()):
            began = max(spot.claimed, self.hears_since)
            if began + self.lease <= self.last_look:
                self.end_lease(car, "claims it no more")

    def end_lease(self, car, why):
        spot = self.cars.pop(car)
        self.publish_state()
        self.tell("<-", car, spot.request, why + ":", self.count())

    def count(self):
        free = self.spots - len(self.cars)
        return f"{free} of {self.spots} spots free"

    def publish_state(self):
        """Retained, for ourselves, too. QoS 0: the next one replaces a lost one."""
        self.publish("state", {
            "station": self.name, "spots": self.spots,
            "free": self.spots - len(self.cars),
            "cars": {car: spot.use for car, spot in self.cars.items()},
            "life": self.life}, qos=0, retain=True)


def positive(text: str) -> float:
    return fit(SECONDS, float(text), "it")


def main():
    parser = argparse.ArgumentParser(description="Charging stations of the city.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="stations (all)")
    parser.add_argument("--lease", metavar="S", type=positive, default=LEASE,
                        help="seconds a spot stays a car's without a claim (15)")
    args, city = start_up(parser)
    names = choose_names(args, city.stations(), "station")
    with until_stopped():
        live_until_stopped([Station(name, city, args.lease) for name in names])
        give_up(f"{names[-1]} {TWICE}")     # no Ctrl-C: each was started again


if __name__ == "__main__":
    main()
