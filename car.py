"""An electric car: it drives, drains, asks for a spot, goes there, charges, drives on.

           +--------------------------full---------------------------+
           v                                                         |
        driving --below 25 %--> asking --an offer--> going --> charging
                                ^ ^ |                  |             |
                                | | +--refused---+     |             |
                                | +--`retry`-- waiting |             |
                                +---- the spot is lost +-------------+

        CAR --request--> fog --reply--> CAR         where is the nearest free spot?
        CAR --claim--> station                      again and again: I still need it
        CAR --leave--> station                      the spot is somebody else's now
        station --state--> CAR                      am I shown there as charging?

A car owns its battery and its plan, and decides where to go at places only.

    python3 car.py [NAME ...] [--at PLACE] ...      these cars; no name: car1

One thread per car runs `live` and touches all of its state: no lock.
Read next: broker.py.
Left out on purpose: traffic, hills, and choosing a spot by anything but its distance.
"""

import argparse
import math
import random
from contextlib import suppress
from time import monotonic

from cloud_server import Breaker, give_up, outcome, read_reply, start_up, until_stopped
from ring import NAME, PERCENT, fit, read_object
from station import STATE, Client, Stopped, live_until_stopped, positive

FULL_RANGE = 60     # km on a full battery
LOW = 25            # %: below it the car asks for a spot
POWER = 10          # % a second that charging adds
NEWS = 1.0          # s between two messages about the battery
REPLY_WAIT = 10     # s for a reply; the broker has 9
STRANDED = 60       # s between two looks for a road, where there is none
SHOWN_WAIT = 3      # s until the station must show the car as charging ...
INSIST = 1.0        # ... and s between its claims until then


class Car(Client):
    """Touched by its own thread only, the one that runs `live`. Whatever a step of its
    life waits for, it waits in `pass_time`, which looks after connection and spot."""
    def __init__(self, name, city, at, battery, speed, charges):
        super().__init__(name, "cars", city.broker_of(at))
        self.city = city
        self.at = at                # the place it is at, or has last passed
        self.battery = battery      # %
        self.speed = speed          # km/s
        self.charges = charges      # that it still has to do
        self.doing = "driving"
        self.request_id = ""
        self.reply = None           # to that request
        self.last_news = 0.0        # on the monotonic clock
        self.offer = None           # the spot that it goes to, or charges at,
        self.watched = ""           # and the topic of its station's state
        self.shown = None           # "held" or "charging": what its station says of it
        self.last_claim = 0.0       # on the monotonic clock
        self.breaker = Breaker()    # for brokers: which are not worth a try now

    # --- its life: each step below lasts until the car goes on to the next one
    #     driving     live -> travel, from place to place
    #     charging    live -> recharge: ask (or wait), go, charge, give_back
    #     stopping    whichever it is in, `attend` raises Stopped

    def live(self):
        with suppress(Stopped):
            while self.charges > 0:
                roads = [(place, km)
                         for place, km in self.city.neighbours[self.at].items()
                         if km <= FULL_RANGE]
                place, km = random.choice(roads or [(self.at, 0)])
                if self.battery < LOW or self.range() < km:
                    self.recharge()
                elif place == self.at:
                    self.wait(STRANDED)
                else:
                    self.become("driving")
                    self.travel(place)
        self.give_back()
        self.say_goodbye()

    def recharge(self):
        """From asking for a spot to leaving it with a full battery."""
        while self.battery < 100:
            reply = self.ask()
            if reply is None:
                self.tell("<-", self.broker.name, self.request_id, "no reply")
                self.switch_to_next()
                continue
            self.tell("<-", self.broker.name, self.request_id, outcome(reply),
                      f"(asked {', '.join(reply['asked'])})")
            if reply["station"]:
                self.go(reply)
                if self.offer:
                    self.charge()
                self.give_back()
            else:
                self.wait(reply["retry"])
        self.charges -= 1

    def ask(self):
        """Ask for a spot. Returns the reply, which may be a refusal, or None.
        Asking again is harmless: a second spot, elsewhere, would end by itself."""
        # A new id, so that a late reply to an earlier request does not count.
        number = random.randrange(1_000_000)
        self.request_id = f"{self.name[:50]}-{number}"
        self.reply = None
        self.become("asking")
        self.say_request()
        waited = 0.0                # s since it was said last
        while self.reply is None and waited < REPLY_WAIT:
            waited += self.pass_time()
            if not self.is_up:
                waited = 0.0        # `greet` will say it again
        return self.reply

    def wait(self, seconds):
        """As long as the broker has said; it stands still, so its battery lasts."""
        self.become("waiting", f"{seconds} s")
        while seconds > 0:
            seconds -= self.pass_time()

    def go(self, offer):
        """The fog has just made the first claim for us; the next ones are ours."""
        self.offer = offer
        self.watched = f"{offer['broker']}/stations/{offer['station']}/state"
        self.shown = None
        self.last_claim = monotonic()       # the fog made it for us
        self.switch_to(self.city.ring[offer["broker"]])
        self.become("going", f"{offer['km']} km by", "-".join(offer["route"]))
        for place in offer["route"][1:]:
            if self.offer:              # else it was lost on the way
                self.travel(place)

    def charge(self):
        """Charge while the station says that we do, until we are full. What its station
        shows is the truth: our own belief could be wrong, if a claim came too late.
        While the broker is away nobody says no, so we go on, for a lease at most."""
        self.become("charging", "at", self.at)
        self.claim()
        not_shown = 0.0             # s here and connected, but not shown as charging
        while self.offer and self.battery < 100 and not_shown < SHOWN_WAIT:
            seconds = self.pass_time()
            if self.offer and self.shown == "charging":
                self.battery = min(100.0, self.battery + POWER * seconds)
                not_shown = 0.0
            elif self.is_up:
                not_shown += seconds

    def give_back(self):
        """A courtesy: without it the spot would be free after a lease."""
        if self.offer:
            self.tell("->", self.offer["station"], self.request_id, "leaves with",
                      f"{self.battery:.0f} %")
            self.publish(f"leave/{self.offer['station']}", {})
            if self.is_up:
                self.mqtt.unsubscribe(self.watched)
            self.offer = None

    def travel(self, place):
        """Along the road to a place. While we wait for a dead broker we drive on, too.
        The battery never ends on a road: it was enough for this one when we set out."""
        left = self.city.km(self.at, place)
        while True:
            km = min(left, self.pass_time() * self.speed)
            self.battery = max(0.0, self.battery - km / FULL_RANGE * 100)
            left -= km
            if left == 0:
                break
        self.at = place
        self.tell(f"{self.battery:3.0f} % at {place}")
        home = self.city.broker_of(place)
        if self.offer is None and not self.breaker.is_open(home.name):
            self.switch_to(home)

    def pass_time(self):
        """Look after connection and spot for a moment. Returns the seconds gone by.
        Whatever the car does is made of such moments, so it always hears and claims."""
        seconds = self.attend()
        if self.offer:
            self.keep_spot()
        elif self.failures > 1:     # after one it may be back at the next try
            self.switch_to_next()
        if monotonic() > self.last_news + NEWS:
            self.publish_state()
        return seconds

    # --- its spot: a lease, which ends unless we claim it again
    #     we claim it     every third of a lease; each second until shown as charging
    #     it is lost      a lease after the last claim that we could send
    #     we ask anew     there and connected, but not shown as charging for 3 s

    def keep_spot(self):
        """Every third of a lease, so that one claim may be lost or late."""
        lease = self.offer["lease"]
        interval = lease / 3
        if self.doing == "charging" and self.shown != "charging":
            interval = INSIST
        since = monotonic() - self.last_claim
        if since > lease:
            self.tell("->", self.offer["station"], self.request_id,
                      "could not be claimed for a lease: the spot is lost")
            self.offer = None
        elif since > interval:
            self.claim()

    def claim(self):
        """And hear what the station says of us. Both may be said again and again."""
        if self.is_up:
            use = "charging" if self.doing == "charging" else "held"
            self.mqtt.subscribe(self.watched, 1)
            self.publish(f"claim/{self.offer['station']}", {"use": use})
            self.last_claim = monotonic()

    # --- its connection: to one broker at a time (`Client` connects, and tries again)
    #     go                  with a spot: to its station's broker, until it is lost
    #     travel              without one, at each place: to the region's, if it speaks
    #     recharge            no reply in 10 s: to the next one
    #     pass_time           without a spot, after two failures: to the next one

    def switch_to_next(self):
        """This one does not answer; any other one can find a spot just as well."""
        self.breaker.failed(self.broker.name)
        self.switch_to(self.broker.next)

    def switch_to(self, broker):
        """Leave nothing behind at the old broker, and connect to another one. The empty
        message takes our retained state away; else we would be seen twice."""
        if broker is not self.broker:
            self.tell("->", broker.name, f"instead of {self.broker.name}")
            if self.is_up:
                self.mqtt.publish(self.topic("state"), b"", 1, True)
            self.close()
            self.broker = broker

    def will(self):
        return "state", self.state() | {"doing": "offline"}

    def greet(self):
        """A broker has let us in: it must hear all that counts (soft state). It may be
        a new one, or have been started again: it knows nothing of us."""
        self.breaker.answered(self.broker.name)
        self.tell("->", self.broker.name, f"connected at {self.at}")
        self.mqtt.subscribe(self.topic("reply"), 1)
        self.publish_state()
        if self.offer:
            self.claim()
        if self.doing == "asking":
            self.say_request()

    def say_request(self):
        """The same words each time, so repeating it is harmless."""
        if self.is_up:
            self.tell("->", self.broker.name, self.request_id, "asks for a spot at",
                      f"{self.at} (range {self.range():.1f} km)")
        self.publish("request", {
            "id": self.request_id, "at": self.at, "range": self.range()})

    def become(self, doing, *where):
        self.doing = doing
        self.publish_state()
        if where:
            self.tell(self.request_id, doing, *where)

    def publish_state(self):
        self.last_news = monotonic()
        self.publish("state", self.state(), qos=0, retain=True)

    def state(self):
        return {"car": self.name, "at": self.at, "battery": round(self.battery, 1),
                "doing": self.doing}

    def hear(self, topic, message):
        """Only note it: the step that waits for it will see it, so each step reads from
        top to bottom. What no step waits for is passed over."""
        fields = read_object(message.payload)
        if topic == self.topic("reply"):
            self.reply = read_reply(self.city, fields, self.request_id)
        elif topic == self.watched:
            self.shown = fit(STATE, fields, "state")["cars"].get(self.name)

    def range(self):        # km
        return self.battery / 100 * FULL_RANGE


def percent(text: str) -> float:
    return fit(PERCENT, float(text), "it")


def main():
    parser = argparse.ArgumentParser(description="Electric cars of the city.")
    parser.add_argument("names", metavar="NAME", nargs="*", default=["car1"],
                        help="cars (car1)")
    parser.add_argument("--at", metavar="PLACE",
                        help="where they start (the first place of the file)")
    parser.add_argument("--battery", metavar="PERCENT", type=percent, default=50,
                        help="how full they start (50)")
    parser.add_argument("--speed", metavar="KM_PER_S", type=positive, default=2,
                        help="how fast they drive (2)")
    parser.add_argument("--charges", metavar="N", type=int, default=math.inf,
                        help="stop after so many charges (never)")
    args, city = start_up(parser)
    at = args.at or next(iter(city.places))     # the first one of the file
    if at not in city.places:
        give_up(f"{args.config}: there is no place {at!a}")
    for name in args.names:
        if name in city.places or name in city.ring or not NAME.holds(name):
            give_up(f"{args.config}: {name!a} cannot be the name of a car here")
    with until_stopped():
        live_until_stopped([
            Car(name, city, at, args.battery, args.speed, args.charges)
            for name in set(args.names)])       # each of them once


if __name__ == "__main__":
    main()
